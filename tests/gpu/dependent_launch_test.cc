// Kernels that start while the one ahead still runs, in the format that the fast kernels take: a
// run must say what it says when every operation waits for all before it.
#include <gtest/gtest.h>

#include <memory>
#include <vector>

#include "kernels/cuda/cuda_backend.h"
#include "tests/gpu/forwarding_backend.h"
#include "tests/worker/engine/engine_fixture.h"

namespace kvsweep {
namespace {

std::unique_ptr<Backend> NewBf16() {
  return CreateCudaBackend({.dtype = DType::kBf16, .batch_invariant = true}).value();
}

// Waits for all work ahead of whatever reads or writes a cache, and of the products between.
class WaitingBackend : public ForwardingBackend {
 public:
  WaitingBackend() : ForwardingBackend(NewBf16()) {}
  void Gemm(const GemmArgs& args, Stream stream) override {
    ForwardingBackend::Gemm(args, Idle(stream));
  }
  void GatedGemm(const GatedGemmArgs& args, Stream stream) override {
    ForwardingBackend::GatedGemm(args, Idle(stream));
  }
  void Append(const AppendArgs& args, Stream stream) override {
    ForwardingBackend::Append(args, Idle(stream));
  }
  void Rotary(const RotaryArgs& args, Stream stream) override {
    ForwardingBackend::Rotary(args, Idle(stream));
  }
  void DecodeAttention(const DecodeAttentionArgs& args, Stream stream) override {
    ForwardingBackend::DecodeAttention(args, Idle(stream));
  }
  void AppendAndAttend(const AppendAndAttendArgs& args, Stream stream) override {
    Backend::AppendAndAttend(args, stream);
  }
  void EvictHeavy(const EvictHeavyArgs& args, Stream stream) override {
    ForwardingBackend::EvictHeavy(args, Idle(stream));
  }

 private:
  Stream Idle(Stream stream) {
    KVSWEEP_CHECK_OK(WaitAll());
    return stream;
  }
};

std::vector<std::vector<int32_t>> Serve(Backend* backend, const Arm& arm, bool overlapped) {
  const auto model = LoadModel(backend, "books-llama-14m");
  const int32_t vocabulary = model->config().vocabulary;
  Random random(71);
  const std::vector<int32_t> calibration = RandomIds(random, 256, vocabulary);
  std::vector<TestRequest> requests;
  for (const size_t prompt : {15, 16, 100, 257, 300}) {
    requests.push_back({.prompt = RandomIds(random, prompt, vocabulary),
                        .output_tokens = 60,
                        .arrival_step = static_cast<int32_t>(requests.size())});
  }
  EngineOptions options = SmallEngine(512);
  options.graphs = overlapped;
  const absl::StatusOr<TestRun> run = RunRequests(backend, *model, arm, options, requests,
                                                  calibration, {}, {.run_ahead = overlapped});
  KVSWEEP_CHECK_OK(run);
  return run->outputs;
}

TEST(DependentLaunchTest, ARunSaysWhatItSaysWhenAllWaits) {
  const std::vector<Arm> arms = {PagedArm(), H2oArm(0.1, 0.1),
                                 InfinigenArm({.alpha = 4, .max_kv_ratio = 0.3})};
  for (const Arm& arm : arms) {
    SCOPED_TRACE(arm.strategy());
    WaitingBackend waiting;
    const auto backend = NewBf16();
    EXPECT_EQ(Serve(backend.get(), arm, true), Serve(&waiting, arm, false));
  }
}

}  // namespace
}  // namespace kvsweep
