#include "tests/storage/store_fixture.h"

#include <gtest/gtest.h>

#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/digest.h"
#include "storage/record_tables.h"

namespace kvsweep {
namespace {

std::string RandomText(Random& random) {
  std::string text;
  for (uint64_t left = random.Uniform(12); left > 0; --left) {
    text += static_cast<char>(random.Uniform(128));  // NUL, quotes and newlines among them
  }
  return text;
}

// Small, large and extreme values alike.
uint64_t RandomCount(Random& random) { return random.Next64() >> (1 + random.Uniform(63)); }
int64_t RandomInteger(Random& random) {
  const int64_t magnitude = static_cast<int64_t>(RandomCount(random));
  return random.Bernoulli(0.3) ? -magnitude - 1 : magnitude;
}
uint32_t RandomSmall(Random& random) {
  return static_cast<uint32_t>(random.Next64() >> (32 + random.Uniform(32)));
}

// Numbers on which a store could stumble: signed zeros, whole numbers, the extremes.
double RandomReal(Random& random) {
  constexpr double kHard[] = {0.0,
                              -0.0,
                              1.0,
                              -3.0,
                              9007199254740993.0,
                              1e300,
                              std::numeric_limits<double>::denorm_min(),
                              std::numeric_limits<double>::max(),
                              -std::numeric_limits<double>::max()};
  return random.Bernoulli(0.5) ? kHard[random.Uniform(std::size(kHard))] : random.Normal();
}

QualityRow RandomWindow(Random& random) {
  QualityRow row;
  row.set_window(RandomSmall(random));
  row.set_scored_tokens(RandomSmall(random));
  row.set_nll_sum(RandomReal(random));
  row.set_reference_nll_sum(RandomReal(random));
  row.set_kl_sum(RandomReal(random));
  row.set_top1_matches(RandomSmall(random));
  row.set_dropped_tokens(RandomSmall(random));
  row.set_dropped_nll_sum(RandomReal(random));
  row.set_dropped_reference_nll_sum(RandomReal(random));
  row.set_dropped_kl_sum(RandomReal(random));
  row.set_dropped_top1_matches(RandomSmall(random));
  row.set_attended_fraction(RandomReal(random));
  for (uint64_t bucket = random.Uniform(4); bucket > 0; --bucket) {
    QualityPositions& part = *row.add_positions();
    part.set_first_position(RandomSmall(random));
    part.set_scored_tokens(RandomSmall(random));
    part.set_nll_sum(RandomReal(random));
    part.set_reference_nll_sum(RandomReal(random));
    part.set_kl_sum(RandomReal(random));
    part.set_top1_matches(RandomSmall(random));
  }
  return row;
}

PasskeyRow RandomPasskey(Random& random) {
  PasskeyRow row;
  row.set_index(RandomSmall(random));
  row.set_depth(RandomReal(random));
  row.set_context_tokens(RandomSmall(random));
  row.set_digits(RandomSmall(random));
  row.set_correct_digits(RandomSmall(random));
  row.set_recalled(random.Bernoulli(0.5));
  row.set_reference_correct_digits(RandomSmall(random));
  row.set_reference_recalled(random.Bernoulli(0.5));
  return row;
}

TrialStart RandomStart(Random& random) {
  TrialStart start;
  start.set_backend(RandomText(random));
  start.set_device(RandomText(random));
  start.set_device_class(RandomText(random));
  start.set_driver(RandomText(random));
  start.set_runner_build(RandomText(random));
  start.set_method_version(RandomSmall(random));
  start.set_time_mode(RandomText(random));
  start.set_started_unix_ns(RandomInteger(random));
  start.set_execution(RandomSmall(random));
  for (uint64_t left = random.Uniform(5); left > 0; --left) {
    (*start.mutable_facts())[RandomText(random)] = RandomText(random);
  }
  return start;
}

TrialOutcome RandomOutcome(Random& random) {
  TrialOutcome outcome;
  outcome.set_outcome(static_cast<Outcome>(random.Uniform(Outcome_MAX + 1)));
  outcome.set_evidence(RandomText(random));
  outcome.set_asked_bytes(RandomCount(random));
  outcome.set_available_bytes(RandomCount(random));
  outcome.set_phase(RandomText(random));
  outcome.set_duration_ns(RandomInteger(random));
  outcome.set_signal(static_cast<int32_t>(RandomInteger(random) >> 32));
  outcome.set_log_tail(RandomText(random));
  return outcome;
}

}  // namespace

std::string TestKey(uint64_t number) {
  return std::string(Sha256(absl::StrCat("key ", number)).bytes());
}

SubmitExperiment MakeExperiment(const TestExperimentOptions& options) {
  SubmitExperiment submit;
  submit.client_id = options.client_id;
  submit.name = "experiment of " + options.client_id;
  submit.spec_text = "name: \"a spec\"\n";
  submit.experiment.set_name(submit.name);
  submit.model.set_name("a-model");
  submit.model.set_digest(TestKey(0));
  submit.submitted_unix_ns = 1'700'000'000'000'000'000;
  for (uint32_t arm = 0; arm < options.arms; ++arm) {
    submit.arms.push_back({absl::StrCat("arm-", arm), arm == 0 ? "paged" : "h2o"});
  }
  submit.cells = {{"rate=4/s", {{"load.arrivals.rate", "4"}}},
                  {"rate=\"16\"/s", {{"load.arrivals.rate", "16"}}}};
  for (uint32_t i = 0; i < options.rounds; ++i) {
    NewRound& round = submit.rounds.emplace_back();
    round.cell_index = i % 2;
    round.repeat = i / 2;
    round.spec.set_devices(1);
    round.spec.set_uses_host_tier(i % 2 == 1);
    for (uint32_t arm = 0; arm < options.arms; ++arm) {
      TrialSpec& spec = *round.spec.add_trials()->mutable_spec();
      spec.mutable_arm()->set_name(submit.arms[arm].name);
      spec.mutable_arm()->set_strategy(submit.arms[arm].strategy);
      spec.mutable_engine()->set_backend(Engine::BACKEND_CPU);
      spec.mutable_engine()->set_time(i % 2 == 1 ? Engine::TIME_MODELLED : Engine::TIME_REAL);
      round.trials.push_back({.arm_index = arm,
                              .content_key = TestKey(options.first_key + i * options.arms + arm),
                              .quality_key = "",
                              .canonical_spec = "{\"repeat\":1}"});
    }
  }
  return submit;
}

Record RandomRequest(Random& random, uint64_t trial_id, uint32_t index) {
  Record record;
  record.set_trial_id(trial_id);
  RequestRow& row = *record.mutable_request();
  row.set_index(index);
  row.set_status(static_cast<RequestRow::Status>(random.Uniform(3)));
  row.set_prompt_tokens(RandomSmall(random));
  row.set_output_tokens(RandomSmall(random));
  row.set_scheduled_ns(RandomInteger(random));
  row.set_issued_ns(RandomInteger(random));
  row.set_admitted_ns(RandomInteger(random));
  row.set_first_token_ns(RandomInteger(random));
  row.set_finished_ns(RandomInteger(random));
  for (uint64_t left = random.Uniform(20); left > 0; --left) {
    row.add_token_gap_ns(random.Next64() >> random.Uniform(64));
  }
  row.set_preemptions(RandomSmall(random));
  row.set_recomputed_tokens(RandomSmall(random));
  row.set_entries_attended(RandomCount(random));
  row.set_entries_full(RandomCount(random));
  row.set_tokens_evicted(RandomCount(random));
  row.set_entries_fetched(RandomCount(random));
  row.set_kv_device_bytes_peak(RandomCount(random));
  row.set_kv_host_bytes_peak(RandomCount(random));
  row.set_output_digest(random.Next64());
  row.set_engaged(random.Bernoulli(0.5));
  row.set_engagement_expected(random.Bernoulli(0.5));
  row.set_session(static_cast<uint32_t>(random.Uniform(100)));
  row.set_turn(static_cast<uint32_t>(random.Uniform(8)));
  return record;
}

Record RandomRecord(Random& random, uint64_t trial_id) {
  Record record;
  record.set_trial_id(trial_id);
  switch (random.Uniform(7)) {
    case 0:
      return RandomRequest(random, trial_id, RandomSmall(random));
    case 1:
      record.mutable_counter()->set_name(RandomText(random));
      record.mutable_counter()->set_layer(static_cast<int32_t>(random.Uniform(40)) - 1);
      record.mutable_counter()->set_value(RandomReal(random));
      break;
    case 2:
      record.mutable_sample()->set_name(RandomText(random));
      record.mutable_sample()->set_time_ns(RandomInteger(random));
      record.mutable_sample()->set_value(RandomReal(random));
      break;
    case 3:
      *record.mutable_quality() = RandomWindow(random);
      break;
    case 5:
      *record.mutable_passkey() = RandomPasskey(random);
      break;
    case 4:
      *record.mutable_start() = RandomStart(random);
      break;
    default:
      *record.mutable_outcome() = RandomOutcome(random);
  }
  return record;
}

void AttemptScript::Add(const Record& record) {
  SerializeRecord(record, &records.emplace_back());
  kept_.push_back(records.back());
}

void AttemptScript::Start(uint64_t trial_id, uint32_t execution) {
  if (execution == 1) kept_before_trial_ = kept_.size();
  Record record;
  record.set_trial_id(trial_id);
  record.mutable_start()->set_backend("cpu");
  record.mutable_start()->set_device_class("class-1");
  record.mutable_start()->set_runner_build("build-1");
  record.mutable_start()->set_method_version(1);
  record.mutable_start()->set_time_mode("real");
  record.mutable_start()->set_execution(execution);
  (*record.mutable_start()->mutable_facts())["threads"] = "2";
  Add(record);
}

void AttemptScript::Requests(uint64_t trial_id, Random& random, uint32_t count) {
  for (uint32_t i = 0; i < count; ++i) Add(RandomRequest(random, trial_id, i));
}

void AttemptScript::Discard(uint64_t trial_id) {
  Record record;
  record.set_trial_id(trial_id);
  record.mutable_discard()->set_reason("the runner died");
  SerializeRecord(record, &records.emplace_back());
  kept_.resize(kept_before_trial_);
}

void AttemptScript::Outcome(uint64_t trial_id, kvsweep::Outcome outcome) {
  Record record;
  record.set_trial_id(trial_id);
  record.mutable_outcome()->set_outcome(outcome);
  record.mutable_outcome()->set_evidence("as it went");
  Add(record);
}

void AttemptScript::Finish() {
  DigestBuilder digest;
  for (const std::string& bytes : kept_) digest.Add(bytes);
  Record record;
  record.mutable_finish()->set_count(kept_.size());
  record.mutable_finish()->set_digest(std::string(digest.Finish().bytes()));
  SerializeRecord(record, &records.emplace_back());
}

std::vector<std::string> AttemptScript::Whole(const std::vector<TrialId>& trials, Random& random,
                                              uint32_t requests) {
  AttemptScript script;
  for (const TrialId trial : trials) {
    script.Start(trial.value());
    script.Requests(trial.value(), random, requests);
    script.Outcome(trial.value());
  }
  script.Finish();
  return script.records;
}

OperationResult Apply(Store& store, Operation operation) {
  WriteBatch batch;
  batch.operations.push_back(std::move(operation));
  absl::StatusOr<CommitResult> result = store.Commit(batch);
  if (!result.ok()) {
    ADD_FAILURE() << result.status();
    return {.status = result.status(), .value = {}};
  }
  return std::move(result->operations[0]);
}

}  // namespace kvsweep
