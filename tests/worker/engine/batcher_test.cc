#include "worker/engine/batcher.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "base/random.h"
#include "tests/worker/engine/fake_kv_manager.h"

namespace kvsweep {
namespace {

// ------------------------------------------------------------------------------------------------
// Golden transcripts: a script of commands, each followed by what it led to. Lines that begin with
// two blanks are output. KVSWEEP_REWRITE_GOLDEN=1 rewrites the files instead of comparing.
//
//   batcher mode=recompute device=12 host=0 sequences=4 tokens=8 alignment=1
//   add 0 prompt=5 max=4 output=3
//   step [count]
//   drop 0

class Script {
 public:
  std::string Run(const std::string& command) {
    const std::vector<std::string> words = absl::StrSplit(command, ' ');
    std::map<std::string, std::string> values;
    for (const std::string& word : words) {
      const std::pair<std::string, std::string> pair =
          absl::StrSplit(word, absl::MaxSplits('=', 1));
      values[pair.first] = pair.second;
    }
    const auto number = [&](const char* key) {
      int32_t value = 0;
      EXPECT_TRUE(absl::SimpleAtoi(values[key], &value)) << command << ": " << key;
      return value;
    };
    const auto operand = [&] { return words.size() > 1 ? std::atoi(words[1].c_str()) : 1; };
    if (words[0] == "batcher") {
      const PreemptionMode mode = values["mode"] == "offload"     ? PreemptionMode::kOffload
                                  : values["mode"] == "recompute" ? PreemptionMode::kRecompute
                                                                  : PreemptionMode::kNone;
      const TierBytes budget = {static_cast<uint64_t>(number("device")),
                                static_cast<uint64_t>(number("host"))};
      manager_ = std::make_unique<FakeKvManager>(mode, budget);
      batcher_ = std::make_unique<Batcher>(BatcherOptions{.max_sequences = number("sequences"),
                                                          .max_batched_tokens = number("tokens"),
                                                          .chunk_alignment = number("alignment"),
                                                          .budget = budget},
                                           manager_.get());
      return "";
    }
    if (words[0] == "add") {
      const bool added =
          batcher_->Add(operand(), {number("prompt"), number("max")}, number("output"));
      return added ? "" : "  refused\n";
    }
    if (words[0] == "drop") {
      batcher_->Drop(operand());
      return "";
    }
    EXPECT_EQ(words[0], "step") << command;
    std::string out;
    for (int i = operand(); i > 0; --i) out += Step();
    return out;
  }

 private:
  std::string Step() {
    const StepPlan& plan = batcher_->Plan();
    batcher_->CheckInvariants();
    if (plan.empty()) {
      batcher_->Complete();
      return "  idle\n";
    }
    std::string out = " ";
    if (!plan.preempted.empty())
      absl::StrAppend(&out, " preempt ", absl::StrJoin(plan.preempted, ","));
    if (!plan.admitted.empty()) absl::StrAppend(&out, " admit ", absl::StrJoin(plan.admitted, ","));
    for (const Segment& segment : plan.decode) {
      absl::StrAppend(&out, " decode ", segment.request, "@", segment.start_position, "/slot",
                      segment.slot, segment.resumed ? "/resumed" : "");
    }
    for (const Segment& segment : plan.prefill) {
      absl::StrAppend(&out, " prefill ", segment.request, "@", segment.start_position, "+",
                      segment.rows, "/slot", segment.slot, segment.last_chunk ? "/last" : "");
    }
    const StepEffects& effects = batcher_->Complete();
    batcher_->CheckInvariants();
    absl::StrAppend(&out, " -> produced ", absl::StrJoin(effects.produced, ","));
    if (!effects.finished.empty())
      absl::StrAppend(&out, " finished ", absl::StrJoin(effects.finished, ","));
    const TierBytes reserved = manager_->ReservedBytes();
    absl::StrAppend(&out, " | ", reserved.device, "+", reserved.host, " bytes, ",
                    batcher_->running(), " run, ", batcher_->waiting(), " wait\n");
    return out;
  }

  std::unique_ptr<FakeKvManager> manager_;
  std::unique_ptr<Batcher> batcher_;
};

std::string RunScript(const std::string& text) {
  Script script;
  std::string out;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with("  ")) continue;
    absl::StrAppend(&out, line, "\n");
    if (!line.empty() && !line.starts_with("#")) out += script.Run(line);
  }
  return out;
}

TEST(BatcherTest, GoldenTranscripts) {
  int files = 0;
  for (const auto& entry : std::filesystem::directory_iterator("tests/golden/batcher")) {
    std::ifstream in(entry.path());
    const std::string expected((std::istreambuf_iterator<char>(in)),
                               std::istreambuf_iterator<char>());
    const std::string actual = RunScript(expected);
    ++files;
    if (std::getenv("KVSWEEP_REWRITE_GOLDEN") != nullptr) {
      std::ofstream(entry.path()) << actual;
    } else {
      EXPECT_EQ(actual, expected) << entry.path();
    }
  }
  EXPECT_GE(files, 5);
}

// ------------------------------------------------------------------------------------------------
// Properties over random runs.

struct Expected {
  RequestShape shape;
  int32_t output_tokens = 0;
  int32_t produced = 0;
  int32_t stored = 0;         // tokens in the cache, as the plans say
  int32_t computed_rows = 0;  // rows of all its segments
  bool running = false;
  bool admitted_before = false;
};

class RandomRun {
 public:
  explicit RandomRun(uint64_t seed) : random_(seed) {
    mode_ = static_cast<PreemptionMode>(random_.Uniform(3));
    options_.max_sequences = Draw(1, 8);
    options_.chunk_alignment = random_.Bernoulli(0.5) ? 1 : Draw(2, 4);
    options_.max_batched_tokens = Draw(options_.chunk_alignment, 24);
    options_.budget = {static_cast<uint64_t>(Draw(20, 120)), static_cast<uint64_t>(Draw(20, 120))};
    manager_ = std::make_unique<FakeKvManager>(mode_, options_.budget);
    batcher_ = std::make_unique<Batcher>(options_, manager_.get());
  }

  void Run() {
    const int32_t total = Draw(1, 40);
    int32_t steps = 0;
    while (next_ < total || !batcher_->idle()) {
      while (next_ < total && (batcher_->idle() || random_.Bernoulli(0.4))) AddOne();
      Step();
      if (testing::Test::HasFailure()) return;
      ASSERT_LT(++steps, 20'000) << "no progress";
      if (random_.Bernoulli(0.01)) DropOne();
    }
    for (const auto& [id, request] : requests_) {
      EXPECT_EQ(request.produced, request.output_tokens) << "request " << id;
      const Batcher::Tally tally = batcher_->tally(id);
      // Every token but the last output is stored once; what was computed beyond that was lost.
      EXPECT_EQ(request.computed_rows - tally.recomputed_tokens,
                request.shape.prompt_tokens + request.output_tokens - 1)
          << "request " << id;
    }
    EXPECT_EQ(manager_->ReservedBytes(), TierBytes{});
    EXPECT_EQ(order_.size(), requests_.size());
  }

  int32_t preemptions() const { return preemptions_; }
  int32_t resumed() const { return resumed_; }
  int32_t refused() const { return refused_; }

 private:
  int32_t Draw(int32_t low, int32_t high) {
    return low + static_cast<int32_t>(random_.Uniform(static_cast<uint64_t>(high - low + 1)));
  }

  void AddOne() {
    const RequestShape shape = {Draw(1, 40), Draw(1, 40)};
    const int32_t output = Draw(1, shape.max_tokens);
    const TierBytes peak = manager_->PeakBytes(shape);
    const bool fits = peak.device <= options_.budget.device && peak.host <= options_.budget.host;
    ASSERT_EQ(batcher_->Add(next_, shape, output), fits);
    if (fits) {
      requests_[next_] = {.shape = shape, .output_tokens = output};
    } else {
      ++refused_;
    }
    ++next_;
  }

  void DropOne() {
    for (const auto& [dropped, request] : requests_) {
      if (request.produced == request.output_tokens) continue;
      const RequestId id = dropped;  // outlives its entry
      batcher_->Drop(id);
      batcher_->CheckInvariants();
      order_.insert(id);
      requests_.erase(id);
      order_.erase(id);
      return;
    }
  }

  void Step() {
    const StepPlan& plan = batcher_->Plan();
    batcher_->CheckInvariants();
    CheckPlan(plan);
    for (const RequestId id : plan.preempted) {
      ++preemptions_;
      Expected& request = requests_.at(id);
      request.running = false;
      if (mode_ == PreemptionMode::kNone) {
        EXPECT_EQ(request.produced, 0) << "preempted after its prompt";
      }
    }
    for (const RequestId id : plan.admitted) Enter(id);
    int32_t rows = 0;
    std::set<int32_t> slots;
    for (const Segment& segment : plan.decode) Segments(segment, true, &rows, &slots);
    for (const Segment& segment : plan.prefill) Segments(segment, false, &rows, &slots);
    EXPECT_LE(rows, options_.max_batched_tokens);
    const StepEffects& effects = batcher_->Complete();
    batcher_->CheckInvariants();
    for (const RequestId id : effects.produced) ++requests_.at(id).produced;
    for (const RequestId id : effects.finished) {
      EXPECT_EQ(requests_.at(id).produced, requests_.at(id).output_tokens);
      requests_.at(id).running = false;
    }
  }

  void CheckPlan(const StepPlan& plan) {
    EXPECT_FALSE(plan.empty() && !requests_.empty() && !batcher_->idle());
    if (!plan.preempted.empty()) {
      EXPECT_TRUE(plan.admitted.empty());
    }
    int32_t partial = 0;
    for (const Segment& segment : plan.prefill) {
      if (segment.last_chunk) continue;
      ++partial;
      EXPECT_EQ((segment.start_position + segment.rows) % options_.chunk_alignment, 0);
    }
    EXPECT_LE(partial, 1);
  }

  void Enter(RequestId id) {
    Expected& request = requests_.at(id);
    EXPECT_FALSE(request.running);
    request.running = true;
    if (!request.admitted_before) {
      EXPECT_TRUE(order_.empty() || *order_.rbegin() < id)
          << "overtook request " << *order_.rbegin();
      order_.insert(id);
    }
    request.admitted_before = true;
  }

  void Segments(const Segment& segment, bool decode, int32_t* rows, std::set<int32_t>* slots) {
    Expected& request = requests_.at(segment.request);
    EXPECT_TRUE(request.running);
    EXPECT_EQ(segment.first_row, *rows);
    EXPECT_GE(segment.rows, 1);
    *rows += segment.rows;
    EXPECT_TRUE(segment.slot >= 0 && segment.slot < options_.max_sequences);
    EXPECT_TRUE(slots->insert(segment.slot).second) << "slot " << segment.slot;
    if (segment.start_position != request.stored) {
      EXPECT_EQ(segment.start_position, 0);
    }
    request.stored = segment.start_position + segment.rows;
    request.computed_rows += segment.rows;
    const int32_t known = request.shape.prompt_tokens + request.produced;
    if (decode) {
      EXPECT_EQ(segment.rows, 1);
      EXPECT_EQ(segment.start_position, known - 1) << "feeds the latest token";
      resumed_ += segment.resumed;
    } else {
      EXPECT_EQ(segment.last_chunk, request.stored == known);
      EXPECT_LE(request.stored, known);
    }
  }

  Random random_;
  PreemptionMode mode_;
  BatcherOptions options_;
  std::unique_ptr<FakeKvManager> manager_;
  std::unique_ptr<Batcher> batcher_;
  std::map<RequestId, Expected> requests_;
  std::set<RequestId> order_;  // admitted at least once
  RequestId next_ = 0;
  int32_t preemptions_ = 0;
  int32_t resumed_ = 0;
  int32_t refused_ = 0;
};

TEST(BatcherTest, RandomRunsServeEveryRequestByTheRules) {
  int64_t preemptions = 0;
  int64_t resumed = 0;
  int64_t refused = 0;
  for (uint64_t seed = 1; seed <= 1500; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    RandomRun run(seed);
    run.Run();
    if (HasFailure()) return;
    preemptions += run.preemptions();
    resumed += run.resumed();
    refused += run.refused();
  }
  // The runs are worth something only if they are short of memory now and then.
  EXPECT_GT(preemptions, 1000);
  EXPECT_GT(resumed, 100);
  EXPECT_GT(refused, 100);
}

TEST(BatcherTest, AmpleMemoryNeverPreempts) {
  FakeKvManager manager(PreemptionMode::kRecompute, {1'000'000, 0});
  Batcher batcher({.max_sequences = 16, .max_batched_tokens = 32, .budget = {1'000'000, 0}},
                  &manager);
  for (RequestId id = 0; id < 100; ++id)
    ASSERT_TRUE(batcher.Add(id, {20 + id % 7, 30}, 1 + id % 30));
  while (!batcher.idle()) {
    EXPECT_TRUE(batcher.Plan().preempted.empty());
    batcher.Complete();
  }
}

TEST(BatcherTest, MemoryOfExactlyOneRequestServesAllOneAtATime) {
  FakeKvManager manager(PreemptionMode::kRecompute, {50, 0});
  Batcher batcher({.max_sequences = 4, .max_batched_tokens = 16, .budget = {50, 0}}, &manager);
  for (RequestId id = 0; id < 5; ++id) ASSERT_TRUE(batcher.Add(id, {30, 20}, 20));
  std::vector<RequestId> finished;
  while (!batcher.idle()) {
    batcher.Plan();
    for (const RequestId id : batcher.Complete().finished) finished.push_back(id);
  }
  EXPECT_EQ(finished, (std::vector<RequestId>{0, 1, 2, 3, 4}));
  EXPECT_FALSE(batcher.Add(7, {30, 21}, 1)) << "one byte more than there is";
}

}  // namespace
}  // namespace kvsweep
