#include "kernels/cpu/stream_scheduler.h"

#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace kvsweep::cpu {
namespace {

// Operations are told apart by the bytes of a Zero; each takes that many ns.
Operation Step(uint64_t id) { return ZeroArgs{.target = nullptr, .bytes = id}; }

class Recorder : public Executor {
 public:
  double Execute(const Operation& operation) override {
    const uint64_t id = std::get<ZeroArgs>(operation).bytes;
    order.push_back(id);
    return static_cast<double>(id);
  }
  std::vector<uint64_t> order;
};

constexpr Stream kSide = Stream::kSpeculation;

// Producer 1 on a side stream, consumer 2 on the compute stream; with or without the wait between
// them.
std::vector<uint64_t> ProducerAndConsumer(uint64_t seed, bool wait) {
  Recorder recorder;
  StreamScheduler scheduler(&recorder, seed);
  const Event produced = scheduler.CreateEvent();
  scheduler.Enqueue(Step(1), kSide);
  scheduler.RecordEvent(produced, kSide);
  if (wait) scheduler.WaitEvent(produced, Stream::kCompute);
  scheduler.Enqueue(Step(2), Stream::kCompute);
  scheduler.RunAll();
  return recorder.order;
}

TEST(StreamScheduler, AMissingWaitIsSeenWithinAHundredSeeds) {
  int wrong = 0;
  for (uint64_t seed = 0; seed < 100; ++seed) {
    EXPECT_EQ(ProducerAndConsumer(seed, true), (std::vector<uint64_t>{1, 2})) << "seed " << seed;
    if (ProducerAndConsumer(seed, false) != std::vector<uint64_t>{1, 2}) ++wrong;
  }
  EXPECT_GT(wrong, 20);
}

TEST(StreamScheduler, WithoutASeedTheOrderIsThatOfTheCalls) {
  Recorder recorder;
  StreamScheduler scheduler(&recorder, std::nullopt);
  const Event event = scheduler.CreateEvent();
  scheduler.Enqueue(Step(1), kSide);
  scheduler.Enqueue(Step(2), Stream::kCompute);
  scheduler.Enqueue(Step(3), kSide);
  scheduler.RecordEvent(event, kSide);
  scheduler.WaitEvent(event, Stream::kCompute);
  scheduler.Enqueue(Step(4), Stream::kCompute);
  scheduler.Enqueue(Step(5), Stream::kHostToDevice);
  scheduler.RunAll();
  EXPECT_EQ(recorder.order, (std::vector<uint64_t>{1, 2, 3, 4, 5}));
}

TEST(StreamScheduler, NothingRunsBeforeItIsWaitedFor) {
  Recorder recorder;
  StreamScheduler scheduler(&recorder, 7);
  const Event event = scheduler.CreateEvent();
  scheduler.RunUntil(event);  // never recorded: returns at once
  scheduler.Enqueue(Step(1), Stream::kCompute);
  scheduler.RecordEvent(event, Stream::kCompute);
  scheduler.Enqueue(Step(2), Stream::kCompute);
  EXPECT_TRUE(recorder.order.empty());
  scheduler.RunUntil(event);
  EXPECT_EQ(recorder.order, (std::vector<uint64_t>{1}));
  scheduler.RunAll();
  EXPECT_EQ(recorder.order, (std::vector<uint64_t>{1, 2}));
}

// A wait means the record that was the latest when it was called, not a later one of the same
// event.
TEST(StreamScheduler, AWaitKeepsTheRecordOfItsCall) {
  for (uint64_t seed = 0; seed < 50; ++seed) {
    Recorder recorder;
    StreamScheduler scheduler(&recorder, seed);
    const Event event = scheduler.CreateEvent();
    scheduler.Enqueue(Step(1), kSide);
    scheduler.RecordEvent(event, kSide);
    scheduler.WaitEvent(event, Stream::kCompute);
    scheduler.Enqueue(Step(2), Stream::kCompute);
    const Event done = scheduler.CreateEvent();
    scheduler.RecordEvent(done, Stream::kCompute);
    // The event moves on to a point that itself waits for the compute stream: waiting for it above
    // would never end.
    scheduler.WaitEvent(done, kSide);
    scheduler.Enqueue(Step(3), kSide);
    scheduler.RecordEvent(event, kSide);
    scheduler.RunUntil(event);
    EXPECT_EQ(recorder.order, (std::vector<uint64_t>{1, 2, 3})) << "seed " << seed;
  }
}

// Random programs of two producers and a consumer: in every order, what stream order and events
// demand holds.
TEST(StreamScheduler, RandomProgramsKeepEveryOrderThatTheyAskFor) {
  Random random(11);
  for (int round = 0; round < 300; ++round) {
    Recorder recorder;
    StreamScheduler scheduler(&recorder, round);
    std::vector<Event> events;
    std::vector<uint64_t>
        recorded;  // by event: operations of the stream at the record, as a bit set
    std::vector<uint64_t> before(40, 0);
    std::vector<uint64_t> stream_before(kStreams, 0);
    uint64_t id = 1;
    for (int i = 0; i < 60 && id < before.size(); ++i) {
      const int s = static_cast<int>(random.Uniform(kStreams));
      const Stream stream = static_cast<Stream>(s);
      switch (random.Uniform(4)) {
        case 0:
        case 1:
          scheduler.Enqueue(Step(id), stream);
          before[id] = stream_before[s];
          stream_before[s] |= uint64_t{1} << id;
          ++id;
          break;
        case 2:
          events.push_back(scheduler.CreateEvent());
          scheduler.RecordEvent(events.back(), stream);
          recorded.push_back(stream_before[s]);
          break;
        case 3:
          if (events.empty()) break;
          const size_t e = random.Uniform(events.size());
          scheduler.WaitEvent(events[e], stream);
          stream_before[s] |= recorded[e];
          break;
      }
      if (random.Uniform(10) == 0 && !events.empty()) {
        scheduler.RunUntil(events[random.Uniform(events.size())]);
      }
    }
    scheduler.RunAll();
    ASSERT_EQ(recorder.order.size(), id - 1);
    uint64_t ran = 0;
    for (uint64_t done : recorder.order) {
      ASSERT_EQ(before[done] & ~ran, 0u) << "round " << round << ": " << done << " ran too early";
      ran |= uint64_t{1} << done;
    }
  }
}

// A graph with a side stream inside: fork, two branches, join.
Graph CaptureFork(StreamScheduler& scheduler, bool join) {
  const Event fork = scheduler.CreateEvent();
  const Event joined = scheduler.CreateEvent();
  scheduler.BeginCapture();
  scheduler.Enqueue(Step(10), Stream::kCompute);
  scheduler.RecordEvent(fork, Stream::kCompute);
  scheduler.WaitEvent(fork, kSide);
  scheduler.Enqueue(Step(20), kSide);
  scheduler.RecordEvent(joined, kSide);
  scheduler.Enqueue(Step(30), Stream::kCompute);
  if (join) scheduler.WaitEvent(joined, Stream::kCompute);
  scheduler.Enqueue(Step(40), Stream::kCompute);
  return scheduler.EndCapture().value_or(Graph{});
}

TEST(StreamScheduler, AGraphReplaysWithItsOwnOrder) {
  bool swapped = false;
  for (uint64_t seed = 0; seed < 50; ++seed) {
    Recorder recorder;
    StreamScheduler scheduler(&recorder, seed);
    const Graph graph = CaptureFork(scheduler, true);
    ASSERT_GE(graph.index, 0);
    EXPECT_TRUE(recorder.order.empty());
    scheduler.Enqueue(Step(1), Stream::kCompute);
    scheduler.Launch(graph);
    scheduler.Launch(graph);
    scheduler.Enqueue(Step(2), Stream::kCompute);
    scheduler.RunAll();
    ASSERT_EQ(recorder.order.size(), 10u);
    EXPECT_EQ(recorder.order.front(), 1u);
    EXPECT_EQ(recorder.order.back(), 2u);
    for (int launch : {1, 5}) {
      EXPECT_EQ(recorder.order[launch], 10u);
      EXPECT_EQ(recorder.order[launch + 3], 40u);
      if (recorder.order[launch + 1] == 20) swapped = true;
    }
    scheduler.DestroyGraph(graph);
  }
  EXPECT_TRUE(swapped) << "streams inside a graph never overtook each other";
}

TEST(StreamScheduler, ACaptureMustJoinItsStreams) {
  Recorder recorder;
  StreamScheduler scheduler(&recorder, 0);
  EXPECT_EQ(CaptureFork(scheduler, false).index, -1);
  EXPECT_FALSE(scheduler.capturing());
}

TEST(StreamScheduler, ACaptureMayNotWaitForWhatWasRecordedBefore) {
  Recorder recorder;
  StreamScheduler scheduler(&recorder, 0);
  const Event event = scheduler.CreateEvent();
  scheduler.RecordEvent(event, kSide);
  scheduler.BeginCapture();
  scheduler.WaitEvent(event, Stream::kCompute);
  const absl::StatusOr<Graph> graph = scheduler.EndCapture();
  EXPECT_EQ(graph.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_NE(graph.status().message().find("recorded before the capture"), std::string::npos);
}

// Compute: 100, then waits for the side stream, then 50. Side: 300, beside it. 300 + 50 = 350; the
// host then enqueues 10 more on a side stream that has been idle since 300, which cannot start
// before 350.
TEST(StreamScheduler, ModelledTimeIsTheOverlapWhateverTheSeed) {
  for (uint64_t seed = 0; seed < 50; ++seed) {
    Recorder recorder;
    StreamScheduler scheduler(&recorder, seed);
    const Event side = scheduler.CreateEvent();
    const Event end = scheduler.CreateEvent();
    scheduler.Enqueue(Step(100), Stream::kCompute);
    scheduler.Enqueue(Step(300), kSide);
    scheduler.RecordEvent(side, kSide);
    scheduler.WaitEvent(side, Stream::kCompute);
    scheduler.Enqueue(Step(50), Stream::kCompute);
    scheduler.RecordEvent(end, Stream::kCompute);
    scheduler.Enqueue(Step(1000), Stream::kDeviceToHost);  // nobody waits for it yet
    scheduler.RunUntil(end);
    EXPECT_EQ(scheduler.host_ns(), 350);
    scheduler.Enqueue(Step(10), kSide);
    scheduler.RecordEvent(end, kSide);
    scheduler.RunUntil(end);
    EXPECT_EQ(scheduler.host_ns(), 360);
    scheduler.RunAll();
    EXPECT_EQ(scheduler.host_ns(), 1000);

    // In a graph: 10, then 20 beside 30, then 40.
    const Graph graph = CaptureFork(scheduler, true);
    scheduler.Launch(graph);
    scheduler.RunAll();
    EXPECT_EQ(scheduler.host_ns(), 1080);
  }
}

TEST(StreamScheduler, AllocatesNothingAfterWarmUp) {
  Recorder recorder;
  StreamScheduler scheduler(&recorder, 3);
  const Graph graph = CaptureFork(scheduler, true);
  const Event event = scheduler.CreateEvent();
  const auto step = [&] {
    for (int i = 0; i < 100; ++i) {
      scheduler.Enqueue(Step(1), kSide);
      scheduler.RecordEvent(event, kSide);
      scheduler.WaitEvent(event, Stream::kCompute);
      scheduler.Launch(graph);
    }
    scheduler.RunAll();
  };
  step();
  const int64_t warm = scheduler.growths();
  for (int i = 0; i < 10; ++i) step();
  EXPECT_EQ(scheduler.growths(), warm);
}

}  // namespace
}  // namespace kvsweep::cpu
