#include "experiments/arrivals.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "proto/schema.h"

namespace kvsweep {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

Arrivals Process(Arrivals::Process process, uint32_t requests, double rate) {
  Arrivals arrivals;
  arrivals.set_process(process);
  arrivals.set_requests(requests);
  if (rate > 0) arrivals.set_rate(rate);
  ApplyDefaults(&arrivals);
  return arrivals;
}

std::vector<Arrival> Drawn(const Arrivals& arrivals, uint64_t seed, const Trace* trace = nullptr) {
  const auto drawn = DrawArrivals(arrivals, seed, trace);
  EXPECT_TRUE(drawn.ok()) << drawn.status();
  return drawn.value_or(std::vector<Arrival>());
}

std::vector<int64_t> Times(const std::vector<Arrival>& arrivals) {
  std::vector<int64_t> times;
  for (const Arrival& arrival : arrivals) times.push_back(arrival.time_ns);
  return times;
}

// Mean and variance of the gaps, in seconds; the first gap begins at 0.
struct Moments {
  double mean = 0;
  double variance = 0;
};

Moments GapMoments(const std::vector<Arrival>& arrivals, size_t begin, size_t end) {
  double sum = 0;
  double squares = 0;
  for (size_t i = begin; i < end; ++i) {
    const int64_t before = i == 0 ? 0 : arrivals[i - 1].time_ns;
    const double gap = static_cast<double>(arrivals[i].time_ns - before) / 1e9;
    sum += gap;
    squares += gap * gap;
  }
  const double count = static_cast<double>(end - begin);
  return {sum / count, squares / count - sum / count * sum / count};
}

// vLLM's rule: the last request arrives at N / rate exactly, whatever the seed.
TEST(ArrivalLaws, EndAtRequestsOverRate) {
  for (const Arrivals::Process process :
       {Arrivals::PROCESS_POISSON, Arrivals::PROCESS_GAMMA, Arrivals::PROCESS_CONSTANT}) {
    for (uint64_t seed = 1; seed <= 20; ++seed) {
      SCOPED_TRACE(absl::StrCat("process ", process, ", seed ", seed));
      Arrivals arrivals = Process(process, 200, 4);
      if (process == Arrivals::PROCESS_GAMMA) arrivals.set_burstiness(0.25);
      const std::vector<int64_t> times = Times(Drawn(arrivals, seed));
      ASSERT_EQ(times.size(), 200u);
      EXPECT_EQ(times.back(), 50'000'000'000);
      EXPECT_TRUE(std::is_sorted(times.begin(), times.end()));
      EXPECT_GE(times.front(), 0);
    }
  }
}

// Poisson's draws are part of the contract: results are named by them.
TEST(ArrivalLaws, PoissonIsWhatItWas) {
  EXPECT_THAT(Times(Drawn(Process(Arrivals::PROCESS_POISSON, 4, 4), 1)),
              ElementsAre(367'953'236, 590'733'017, 849'492'303, 1'000'000'000));
}

TEST(ArrivalLaws, GapsOfPoissonAreExponential) {
  const Moments gaps =
      GapMoments(Drawn(Process(Arrivals::PROCESS_POISSON, 20'000, 4), 3), 0, 20'000);
  EXPECT_NEAR(gaps.mean, 0.25, 1e-9);
  EXPECT_NEAR(gaps.variance, 0.25 * 0.25, 0.01);
}

// A gamma of shape b and mean g has variance g^2 / b.
TEST(ArrivalLaws, GammaHasTheVarianceOfItsBurstiness) {
  for (const double burstiness : {0.25, 1.0, 4.0}) {
    Arrivals arrivals = Process(Arrivals::PROCESS_GAMMA, 40'000, 2);
    arrivals.set_burstiness(burstiness);
    const Moments gaps = GapMoments(Drawn(arrivals, 5), 0, 40'000);
    EXPECT_NEAR(gaps.mean, 0.5, 1e-9);
    EXPECT_NEAR(gaps.variance * burstiness, 0.25, 0.02) << burstiness;
  }
  EXPECT_EQ(Times(Drawn(Process(Arrivals::PROCESS_GAMMA, 50, 4), 9)),
            Times(Drawn(Process(Arrivals::PROCESS_POISSON, 50, 4), 9)))
      << "burstiness 1 is poisson, draw for draw";
}

TEST(ArrivalLaws, GapsTooSmallForANumberAreEqual) {
  Arrivals arrivals = Process(Arrivals::PROCESS_GAMMA, 1, 10);
  arrivals.set_burstiness(0.01);
  for (uint64_t seed = 0; seed < 2000; ++seed) {
    EXPECT_THAT(Times(Drawn(arrivals, seed)), ElementsAre(100'000'000)) << seed;
  }
}

TEST(ArrivalLaws, ConstantGapsAreEqual) {
  EXPECT_THAT(Times(Drawn(Process(Arrivals::PROCESS_CONSTANT, 4, 2), 1)),
              ElementsAre(500'000'000, 1'000'000'000, 1'500'000'000, 2'000'000'000));
}

TEST(ArrivalLaws, RampsGoFromOneRateToTheOther) {
  for (const Arrivals::Ramp ramp : {Arrivals::RAMP_LINEAR, Arrivals::RAMP_EXPONENTIAL}) {
    Arrivals arrivals = Process(Arrivals::PROCESS_RAMP, 60'001, 16);
    arrivals.set_ramp_from(1);
    arrivals.set_ramp(ramp);
    const std::vector<Arrival> drawn = Drawn(arrivals, 2);
    EXPECT_NEAR(1 / GapMoments(drawn, 0, 600).mean, 1, 0.15);
    EXPECT_NEAR(1 / GapMoments(drawn, 59'401, 60'001).mean, 16, 1.5);
    // In the middle of the requests: the mean of the rates, or their geometric mean.
    const double middle = ramp == Arrivals::RAMP_LINEAR ? 8.5 : 4;
    EXPECT_NEAR(1 / GapMoments(drawn, 28'001, 32'001).mean, middle, 0.08 * middle);
    double mean_gaps = 0;
    for (int i = 0; i <= 60'000; ++i) {
      const double progress = i / 60'000.0;
      mean_gaps +=
          ramp == Arrivals::RAMP_LINEAR ? 1 / (1 + 15 * progress) : std::pow(16.0, -progress);
    }
    EXPECT_NEAR(static_cast<double>(drawn.back().time_ns) / 1e9, mean_gaps, 1e-6);
  }
  Arrivals one = Process(Arrivals::PROCESS_RAMP, 1, 16);
  one.set_ramp_from(1);
  EXPECT_EQ(Drawn(one, 1).size(), 1u);
}

TEST(ArrivalLaws, ReplayKeepsTheTracesTimesScaled) {
  const Trace trace = {.rows = {{0, 1, 1}, {5'000, 1, 1}, {7'001, 1, 1}}, .has_times = true};
  Arrivals arrivals = Process(Arrivals::PROCESS_REPLAY, 3, 0);
  EXPECT_THAT(Times(Drawn(arrivals, 1, &trace)), ElementsAre(0, 5'000, 7'001));
  arrivals.set_time_scale(0.5);
  EXPECT_THAT(Times(Drawn(arrivals, 2, &trace)), ElementsAre(0, 2'500, 3'501));
  arrivals.set_requests(4);
  EXPECT_THAT(std::string(DrawArrivals(arrivals, 1, &trace).status().message()),
              HasSubstr("the trace has 3 rows and load.arrivals.requests is 4"));
  const Trace timeless = {.rows = trace.rows};
  EXPECT_THAT(std::string(DrawArrivals(arrivals, 1, &timeless).status().message()),
              HasSubstr("has no times to replay"));
}

TEST(ArrivalLaws, BurstsComeAtOnce) {
  const double infinity = std::numeric_limits<double>::infinity();
  for (const Arrivals& arrivals :
       {Process(Arrivals::PROCESS_BURST, 3, 0), Process(Arrivals::PROCESS_POISSON, 3, infinity),
        Process(Arrivals::PROCESS_CONSTANT, 3, infinity)}) {
    EXPECT_THAT(Times(Drawn(arrivals, 1)), ElementsAre(0, 0, 0));
    EXPECT_FALSE(IsOpenLoop(arrivals));
  }
}

TEST(ArrivalLaws, LoopsAndBatchesWaitForOthersToEnd) {
  const auto waits = [](Arrivals::Process process) {
    Arrivals arrivals = Process(process, 7, 0);
    arrivals.set_concurrency(3);
    std::vector<uint32_t> after;
    for (const Arrival& arrival : Drawn(arrivals, 1)) after.push_back(arrival.after_ended);
    EXPECT_FALSE(IsOpenLoop(arrivals));
    return after;
  };
  EXPECT_THAT(waits(Arrivals::PROCESS_CLOSED), ElementsAre(0, 0, 0, 1, 2, 3, 4));
  EXPECT_THAT(waits(Arrivals::PROCESS_STATIC), ElementsAre(0, 0, 0, 3, 3, 3, 6));
}

}  // namespace
}  // namespace kvsweep
