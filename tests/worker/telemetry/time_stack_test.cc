#include "worker/telemetry/time_stack.h"

#include <gtest/gtest.h>

#include <memory>

#include "kernels/cpu/cpu_backend.h"

namespace kvsweep {
namespace {

OperationTime At(absl::string_view name, StepPart part, Stream stream, double begin_ns,
                 double end_ns) {
  return {.name = name, .part = part, .stream = stream, .begin_ns = begin_ns, .end_ns = end_ns};
}

TEST(TimeStack, CountsEveryInstantOnce) {
  const std::vector<OperationTime> operations = {
      At("Gemm", StepPart::kProjections, Stream::kCompute, 100, 200),
      // Hidden behind the projection, then exposed, then hidden behind attention.
      At("GatherRows", StepPart::kAttention, Stream::kHostToDevice, 150, 260),
      At("DecodeAttention", StepPart::kAttention, Stream::kCompute, 250, 300),
      // Looks ahead while nothing else runs, beside a transfer.
      At("Speculate", StepPart::kSpeculation, Stream::kSpeculation, 310, 340),
      At("Append", StepPart::kAttention, Stream::kDeviceToHost, 300, 350),
      At("Gemm", StepPart::kMlp, Stream::kCompute, 360, 400),
      At("Argmax", StepPart::kSampling, Stream::kCompute, 400, 410)};
  const TimeStack stack = StackOf(operations);
  EXPECT_EQ(stack[StackPart::kProjections], 100);
  EXPECT_EQ(stack[StackPart::kAttention], 50);
  EXPECT_EQ(stack[StackPart::kSpeculation], 30);
  EXPECT_EQ(stack[StackPart::kTransfer], 50 + 10 + 10) << "200-250, 300-310, 340-350";
  EXPECT_EQ(stack[StackPart::kMlp], 40);
  EXPECT_EQ(stack[StackPart::kSampling], 10);
  EXPECT_EQ(stack[StackPart::kIdle], 10) << "350-360";
  EXPECT_EQ(stack.total_ns(), 310);
  EXPECT_EQ(TransferNs(operations), 110 + 50) << "150-260 and 300-350";
}

TEST(TimeStack, KnowsPartsByNameWhereTheStepDoesNotSay) {
  const auto part = [](absl::string_view name, StepPart of, Stream stream = Stream::kCompute) {
    return PartOf(At(name, of, stream, 0, 1));
  };
  EXPECT_EQ(part("EvictHeavy", StepPart::kAttention), StackPart::kSelection);
  EXPECT_EQ(part("PruneHeavy", StepPart::kOther), StackPart::kSelection);
  EXPECT_EQ(part("SelectTop", StepPart::kSpeculation, Stream::kSpeculation), StackPart::kSelection);
  EXPECT_EQ(part("CopyTile", StepPart::kAttention), StackPart::kTransfer);
  EXPECT_EQ(part("Gemm", StepPart::kSpeculation, Stream::kSpeculation), StackPart::kSpeculation);
  EXPECT_EQ(part("Rotary", StepPart::kAttention), StackPart::kAttention);
  EXPECT_EQ(part("Copy", StepPart::kNone), StackPart::kOther);
}

TEST(TimeStack, OfNothingIsEmpty) {
  EXPECT_EQ(StackOf({}).total_ns(), 0);
  EXPECT_EQ(TransferNs({}), 0);
}

// The CPU backend's notes: parts as entered, streams that overlap in modelled time, no more and no
// less than what ran.
TEST(Profile, OfTheCpuBackendTellsPartsAndTimes) {
  for (const bool modelled : {false, true}) {
    CpuBackendOptions options{.threads = 1};
    if (modelled) options.modelled = *FindDeviceProfile("laptop");
    const std::unique_ptr<Backend> backend = *CreateCpuBackend(options);
    constexpr uint64_t kBytes = 1 << 20;
    std::byte* const device = *backend->Allocate(Tier::kDevice, 2 * kBytes);
    std::byte* const host = *backend->Allocate(Tier::kHost, kBytes);
    backend->Zero(device, kBytes, Stream::kCompute);
    backend->BeginProfile();
    backend->Enter(StepPart::kMlp);
    backend->BeginCapture();
    backend->Copy(device + kBytes, device, kBytes, Stream::kCompute);
    const Graph graph = *backend->EndCapture();
    backend->Enter(StepPart::kNone);
    backend->Launch(graph);
    backend->Copy(device, host, kBytes, Stream::kHostToDevice);
    const std::vector<OperationTime> times = *backend->TakeProfile();
    ASSERT_EQ(times.size(), 3u) << "what was enqueued before has run since";
    const TimeStack stack = StackOf(times);
    EXPECT_GT(stack[StackPart::kMlp], 0);
    EXPECT_GT(TransferNs(times), 0);
    if (modelled) {
      EXPECT_GT(TransferNs(times), stack[StackPart::kTransfer]) << "a part is hidden";
    }
    backend->EndProfile();
    backend->Zero(device, kBytes, Stream::kCompute);
    EXPECT_TRUE(backend->TakeProfile()->empty());
  }
}

TEST(Profile, FetchesCanBeLeftOut) {
  const std::unique_ptr<Backend> backend = *CreateCpuBackend({.threads = 1});
  std::byte* const device = *backend->Allocate(Tier::kDevice, 4096);
  std::byte* const host = *backend->Allocate(Tier::kHost, 4096);
  std::byte* const pair = *backend->Allocate(Tier::kDevice, 256);
  backend->Zero(host, 4096, Stream::kCompute);
  const int32_t blocks[2] = {0, 0};
  backend->Copy(pair, blocks, sizeof(blocks), Stream::kCompute);
  CopyBlocksArgs fetch{.target = device, .source = host};
  fetch.pair = reinterpret_cast<const int32_t*>(pair);
  fetch.count = 1;
  fetch.block_bytes = 1024;
  ASSERT_TRUE(backend->WaitAll().ok());
  const uint64_t to_device = backend->link_bytes_to_device();
  const uint64_t to_host = backend->link_bytes_to_host();
  backend->SkipFetches(true);
  backend->CopyBlocks(fetch, Stream::kHostToDevice);
  CopyBlocksArgs store = fetch;
  store.target = host;
  store.source = device;
  backend->CopyBlocks(store, Stream::kDeviceToHost);
  ASSERT_TRUE(backend->WaitAll().ok());
  EXPECT_EQ(backend->link_bytes_to_device(), to_device);
  EXPECT_EQ(backend->link_bytes_to_host(), to_host + 1024);
  backend->SkipFetches(false);
  backend->CopyBlocks(fetch, Stream::kHostToDevice);
  ASSERT_TRUE(backend->WaitAll().ok());
  EXPECT_EQ(backend->link_bytes_to_device(), to_device + 1024);
}

}  // namespace
}  // namespace kvsweep
