// Mistakes of the kinds that a GPU hides, made on one: a wait that is missing, a stream argument
// that was dropped, a wrong stride, a number baked into a graph. Each must change the tokens of a
// run, which delays of any stream alone do not.
#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "kernels/cuda/cuda_backend.h"
#include "tests/gpu/forwarding_backend.h"
#include "tests/worker/engine/engine_fixture.h"

namespace kvsweep {
namespace {

constexpr uint64_t kDelayBytes = uint64_t{16} << 20;  // a third of a millisecond on the link

// Lets the device's side streams lag: whatever they do for a layer begins late.
class LaggingBackend : public ForwardingBackend {
 public:
  LaggingBackend()
      : ForwardingBackend(
            CreateCudaBackend({.dtype = DType::kF32, .batch_invariant = true}).value()) {
    source_ = Allocate(Tier::kHost, kDelayBytes).value();
    target_ = Allocate(Tier::kDevice, kDelayBytes).value();
  }
  void GatherRows(const GatherRowsArgs& args, Stream stream) override {
    Lag(stream);
    ForwardingBackend::GatherRows(args, stream);
  }
  void Speculate(const SpeculateArgs& args, Stream stream) override {
    Lag(stream);
    ForwardingBackend::Speculate(args, stream);
  }

 private:
  void Lag(Stream stream) { Copy(target_, source_, kDelayBytes, stream); }
  std::byte* source_ = nullptr;
  std::byte* target_ = nullptr;
};

class MissingWaitBackend : public LaggingBackend {
 public:
  explicit MissingWaitBackend(Stream stream) : stream_(stream) {}
  void GatherRows(const GatherRowsArgs& args, Stream stream) override {
    LaggingBackend::GatherRows(args, stream);
    gathered_ = true;
  }
  void RecordEvent(Event event, Stream stream) override {
    LaggingBackend::RecordEvent(event, stream);
    if (gathered_ && stream == Stream::kHostToDevice) gather_event_[event.index] = true;
    gathered_ = false;
  }
  void WaitEvent(Event event, Stream stream) override {
    if (stream == stream_ && gather_event_[event.index]) return;
    LaggingBackend::WaitEvent(event, stream);
  }

 private:
  Stream stream_;
  bool gathered_ = false;
  std::map<int32_t, bool> gather_event_;  // events recorded right behind a gather
};

// The selection runs on another stream than it was told to, where nothing waits for what it reads.
class DroppedStreamBackend : public LaggingBackend {
 public:
  void SelectTop(const SelectTopArgs& args, Stream /*stream*/) override {
    LaggingBackend::SelectTop(args, Stream::kHostToDevice);
  }
};

class WrongStrideBackend : public LaggingBackend {
 public:
  void DecodeAttention(const DecodeAttentionArgs& args, Stream stream) override {
    DecodeAttentionArgs wrong = args;
    wrong.view.head_stride -= wrong.view.token_stride;
    LaggingBackend::DecodeAttention(wrong, stream);
  }
};

// Passes lengths as they were when the step was captured.
class BakedScalarBackend : public LaggingBackend {
 public:
  void BeginCapture() override {
    KVSWEEP_CHECK_OK(WaitAll());
    capturing_ = true;
    LaggingBackend::BeginCapture();
  }
  absl::StatusOr<Graph> EndCapture() override {
    capturing_ = false;
    return LaggingBackend::EndCapture();
  }
  void DecodeAttention(const DecodeAttentionArgs& args, Stream stream) override {
    DecodeAttentionArgs baked = args;
    if (capturing_) baked.view.length = baked_;
    LaggingBackend::DecodeAttention(baked, stream);
  }
  // Lengths of the latest step that was not captured, as the step before a capture leaves them.
  void Append(const AppendArgs& args, Stream stream) override {
    if (!capturing_ && args.target.length != nullptr) {
      if (baked_ == nullptr) {
        baked_ = reinterpret_cast<int32_t*>(Allocate(Tier::kDevice, 4096).value());
      }
      Copy(baked_, args.target.length, 64, stream);
    }
    LaggingBackend::Append(args, stream);
  }

 private:
  bool capturing_ = false;
  int32_t* baked_ = nullptr;
};

// A run that fails has no outputs.
std::vector<std::vector<int32_t>> RunOn(Backend* backend, bool graphs = true) {
  const auto model = LoadModel(backend, "stories260K");
  Random random(51);
  const std::vector<int32_t> calibration = RandomIds(random, 256, 512);
  std::vector<TestRequest> requests;
  for (int i = 0; i < 3; ++i) {
    requests.push_back(
        {.prompt = RandomIds(random, 40 + 10 * static_cast<size_t>(i), 512), .output_tokens = 40});
  }
  EngineOptions options = SmallEngine(128);
  options.graphs = graphs;
  const absl::StatusOr<TestRun> run =
      RunRequests(backend, *model, InfinigenArm({.alpha = 2, .max_kv_ratio = 0.3}), options,
                  requests, calibration, {}, {.run_ahead = true});
  return run.ok() ? run->outputs : std::vector<std::vector<int32_t>>();
}

class PlantedOnDeviceTest : public testing::Test {
 protected:
  static const std::vector<std::vector<int32_t>>& Sound() {
    static const auto sound = [] {
      const auto backend = CreateCudaBackend({.dtype = DType::kF32, .batch_invariant = true});
      return RunOn(backend->get());
    }();
    return sound;
  }
};

TEST_F(PlantedOnDeviceTest, LagsOfSideStreamsChangeNothing) {
  LaggingBackend backend;
  ASSERT_FALSE(Sound().empty());
  EXPECT_EQ(RunOn(&backend), Sound());
}

TEST_F(PlantedOnDeviceTest, AMissingWaitIsSeen) {
  // A capture would refuse the stream that nobody waits for.
  MissingWaitBackend backend(Stream::kCompute);
  EXPECT_NE(RunOn(&backend, /*graphs=*/false), Sound());
}

TEST_F(PlantedOnDeviceTest, ADroppedStreamIsSeen) {
  DroppedStreamBackend backend;
  EXPECT_NE(RunOn(&backend), Sound());
}

TEST_F(PlantedOnDeviceTest, AWrongStrideIsSeen) {
  WrongStrideBackend backend;
  EXPECT_NE(RunOn(&backend), Sound());
}

TEST_F(PlantedOnDeviceTest, ABakedInLengthIsSeen) {
  BakedScalarBackend backend;
  EXPECT_NE(RunOn(&backend), Sound());
}

}  // namespace
}  // namespace kvsweep
