#include "experiments/matrix.h"

#include <algorithm>
#include <map>
#include <set>
#include <span>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/check.h"
#include "base/digest.h"
#include "base/limits.h"
#include "base/random.h"
#include "base/status_macros.h"
#include "experiments/spec.h"
#include "proto/schema.h"

namespace kvsweep {
namespace {

using Axes = google::protobuf::RepeatedPtrField<Axis>;

// What a derived seed is for; part of the contract, since results are named by seeds.
enum SeedPurpose : uint64_t { kContent = 1, kOrder = 2, kSchedule = 3, kArmOrder = 4 };

// Memory of a quality trial, on either tier, for each token of its window: more than any model's KV
// takes.
constexpr uint64_t kQualityBytesPerToken = uint64_t{1} << 20;

// a * b, or the largest number if that does not fit.
uint64_t MultiplySaturating(uint64_t a, uint64_t b) {
  uint64_t product = 0;
  return __builtin_mul_overflow(a, b, &product) ? UINT64_MAX : product;
}

uint64_t ProductSize(const std::vector<uint64_t>& radices) {
  uint64_t size = 1;
  for (const uint64_t radix : radices) size = MultiplySaturating(size, radix);
  return size;
}

// Position `index` of the product as one digit for each radix, the last fastest.
std::vector<size_t> Digits(const std::vector<uint64_t>& radices, uint64_t index) {
  std::vector<size_t> digits(radices.size());
  for (size_t i = digits.size(); i > 0; --i) {
    digits[i - 1] = index % radices[i - 1];
    index /= radices[i - 1];
  }
  return digits;
}

std::vector<uint64_t> Radices(const Axes& axes) {
  std::vector<uint64_t> radices;
  for (const Axis& axis : axes) radices.push_back(axis.values_size());
  return radices;
}

std::string LastComponent(const std::string& path) { return path.substr(path.rfind('.') + 1); }

// Shortest names of the axes: the last component, or the whole path where two axes end alike.
template <typename AxisList>
std::vector<std::string> AxisNames(const AxisList& axes) {
  std::map<std::string, int> uses;
  for (const Axis& axis : axes) ++uses[LastComponent(axis.path())];
  std::vector<std::string> names;
  for (const Axis& axis : axes) {
    const std::string last = LastComponent(axis.path());
    names.push_back(uses[last] == 1 ? last : axis.path());
  }
  return names;
}

// "rate=4/s": a digit of the product for people.
template <typename AxisList>
std::string PointName(const google::protobuf::Descriptor& root, const AxisList& axes,
                      const std::vector<size_t>& digits, absl::string_view separator) {
  const std::vector<std::string> names = AxisNames(axes);
  std::vector<std::string> parts;
  for (size_t i = 0; i < digits.size(); ++i) {
    const Axis& axis = axes[static_cast<int>(i)];
    const auto field = FindField(root, axis.path());
    KVSWEEP_CHECK(field.ok()) << axis.path();
    const std::string& value = axis.values(static_cast<int>(digits[i]));
    parts.push_back(absl::StrCat(names[i], "=", PrettyValue(**field, value)));
  }
  return absl::StrJoin(parts, separator);
}

// Whether a quality trial depends on the field.
bool MattersForQuality(absl::string_view path) {
  return path == "kv.dtype" || path == "load.text" || path == "engine.backend" ||
         path == "engine.batch_invariant";
}

// Puts the digest of each named file in the place of its path, so that moving a file changes no
// key.
void ReplacePathByDigest(const TrialSpec& trial, std::string* path) {
  for (const FileReference& file : trial.files()) {
    if (file.path() == *path) {
      *path = absl::BytesToHexString(file.digest());
      return;
    }
  }
}

}  // namespace

// ------------------------------------------------------------------------------------ creation

absl::StatusOr<Matrix> Matrix::Create(const Experiment& experiment,
                                      const ExperimentInputs& inputs) {
  Matrix matrix;
  matrix.inputs_ = inputs;
  Experiment& base = matrix.experiment_;
  base = experiment;
  base.clear_arms();
  base.clear_sweep();
  base.mutable_engine();
  base.mutable_limits();
  ApplyDefaults(&base);
  matrix.SetAxes(experiment.sweep());
  matrix.repeats_ = base.repeats();
  matrix.round_arms_ = base.round_arms();
  matrix.has_quality_ = base.has_quality();

  // Count before anything is made.
  uint64_t arms = 0;
  for (const Arm& arm : experiment.arms()) {
    arms += std::min<uint64_t>(ProductSize(Radices(arm.grid())), UINT32_MAX);
  }
  matrix.cell_count_ = ProductSize(matrix.radices_);
  const uint64_t trials =
      MultiplySaturating(MultiplySaturating(matrix.cell_count_, matrix.repeats_), arms);
  if (trials > static_cast<uint64_t>(limits::kTrialsPerExperiment)) {
    return absl::InvalidArgumentError(
        absl::StrCat("the matrix has ", matrix.cell_count_, " cells x ", arms, " arms x ",
                     matrix.repeats_, " repeats = ", trials, " trials, more than ",
                     limits::kTrialsPerExperiment, "; shorten an axis"));
  }
  RETURN_IF_ERROR(matrix.ExpandArms(experiment));
  RETURN_IF_ERROR(matrix.CheckCombinations());
  if (matrix.trial_count() > static_cast<uint64_t>(limits::kTrialsPerExperiment)) {
    return absl::InvalidArgumentError(
        absl::StrCat("with the reference in each round the matrix has ", matrix.trial_count(),
                     " trials, more than ", limits::kTrialsPerExperiment, "; raise round_arms"));
  }
  if (matrix.has_quality_) matrix.FindQualityTrials();
  return matrix;
}

void Matrix::SetAxes(const Sweep& sweep) {
  absl::string_view group;
  for (const auto& [axis, axis_group] : SweepAxes(sweep)) {
    const bool own_digit = axis_group == absl::string_view("grid") || axis_group != group;
    if (own_digit) radices_.push_back(axis.values_size());
    group = axis_group;
    axes_.push_back(axis);
    digit_of_axis_.push_back(radices_.size() - 1);
  }
}

absl::Status Matrix::ExpandArms(const Experiment& experiment) {
  std::set<std::string> names;
  for (const Arm& arm : experiment.arms()) {
    const std::vector<uint64_t> radices = Radices(arm.grid());
    const uint64_t count = ProductSize(radices);
    for (uint64_t i = 0; i < count; ++i) {
      Arm expanded = arm;
      expanded.clear_grid();
      const std::vector<size_t> digits = Digits(radices, i);
      for (size_t k = 0; k < digits.size(); ++k) {
        const Axis& axis = arm.grid(static_cast<int>(k));
        RETURN_IF_ERROR(SetField(&expanded, axis.path(), axis.values(static_cast<int>(digits[k]))));
      }
      if (!digits.empty()) {
        expanded.set_name(
            absl::StrCat(arm.name(), "/", PointName(*Arm::descriptor(), arm.grid(), digits, ",")));
      }
      ApplyArmDefaults(&expanded);
      if (!names.insert(expanded.name()).second) {
        return absl::InvalidArgumentError(
            absl::StrCat("two arms are named \"", expanded.name(), "\""));
      }
      arms_.push_back(std::move(expanded));
    }
  }
  if (!experiment.has_reference()) return absl::OkStatus();
  for (size_t i = 0; i < arms_.size(); ++i) {
    if (arms_[i].name() != experiment.reference()) continue;
    reference_ = i;
    return absl::OkStatus();
  }
  std::vector<std::string> known;
  for (size_t i = 0; i < std::min<size_t>(arms_.size(), 8); ++i) known.push_back(arms_[i].name());
  return absl::InvalidArgumentError(
      absl::StrCat("reference: \"", experiment.reference(), "\" names no expanded arm; they are ",
                   absl::StrJoin(known, ", "), known.size() < arms_.size() ? ", …" : ""));
}

// Load, memory and engine depend on the cell, the strategy's block on the arm: each cell with one
// arm and each arm with one cell cover every combination, but for the memory that arms set for
// themselves.
absl::Status Matrix::CheckCombinations() const {
  const auto check = [&](size_t arm, uint64_t cell) -> absl::Status {
    ProblemList problems;
    CheckTrial(BaseTrial(arm, cell), "", &problems);
    if (problems.empty()) return absl::OkStatus();
    return problems.ToStatus(
        absl::StrCat("arm \"", arms_[arm].name(), "\", cell \"", CellAt(cell).name, "\""));
  };
  // Of very many, the reference in every cell and every arm in the first.
  constexpr uint64_t kAll = 20'000;
  const bool all = cell_count_ <= kAll / arms_.size();
  for (uint64_t cell = 0; cell < cell_count_; ++cell) {
    for (size_t arm = 0; arm < arms_.size(); ++arm) {
      if (all || cell == 0 || arm == reference_) RETURN_IF_ERROR(check(arm, cell));
    }
  }
  return absl::OkStatus();
}

void Matrix::FindQualityTrials() {
  std::set<std::string> keys;
  std::vector<bool> matters(radices_.size());
  for (size_t i = 0; i < axes_.size(); ++i) {
    if (MattersForQuality(axes_[i].path())) matters[digit_of_axis_[i]] = true;
  }
  for (uint64_t cell = 0; cell < cell_count_; ++cell) {
    const std::vector<size_t> digits = Digits(radices_, cell);
    bool first_of_its_kind = true;
    for (size_t i = 0; i < digits.size(); ++i) first_of_its_kind &= digits[i] == 0 || matters[i];
    if (!first_of_its_kind) continue;
    for (size_t arm = 0; arm < arms_.size(); ++arm) {
      if (keys.insert(ContentKey(QualityTrial(arm, cell))).second) quality_.emplace_back(arm, cell);
    }
  }
}

// ------------------------------------------------------------------------------------- reading

std::vector<size_t> Matrix::ValueIndices(uint64_t cell) const {
  const std::vector<size_t> digits = Digits(radices_, cell);
  std::vector<size_t> indices;
  for (const size_t digit : digit_of_axis_) indices.push_back(digits[digit]);
  return indices;
}

Cell Matrix::CellAt(uint64_t index) const {
  KVSWEEP_CHECK_LT(index, cell_count_);
  Cell cell;
  const std::vector<size_t> digits = ValueIndices(index);
  for (size_t i = 0; i < digits.size(); ++i) {
    cell.values.emplace_back(axes_[i].path(), axes_[i].values(static_cast<int>(digits[i])));
  }
  cell.name = axes_.empty() ? "-" : PointName(*Experiment::descriptor(), axes_, digits, " ");
  return cell;
}

std::vector<Cell> Matrix::cells() const {
  std::vector<Cell> cells;
  for (uint64_t i = 0; i < cell_count_; ++i) cells.push_back(CellAt(i));
  return cells;
}

uint64_t Matrix::groups() const {
  const uint64_t others = arms_.size() - 1;
  const uint64_t places = round_arms_ - 1;
  return std::max<uint64_t>(1, (others + places - 1) / places);
}

uint64_t Matrix::trial_count() const {
  // The reference runs once in each round, every other arm in one group.
  const uint64_t each = arms_.size() - 1 + groups();
  return repeats_ * cell_count_ * each + quality_.size();
}

std::vector<size_t> Matrix::GroupArms(uint64_t group) const {
  std::vector<size_t> arms = {reference_};
  const uint64_t begin = group * (round_arms_ - 1);
  for (uint64_t i = begin; i < begin + round_arms_ - 1 && i + 1 < arms_.size(); ++i) {
    arms.push_back(i < reference_ ? i : i + 1);
  }
  return arms;
}

PlannedRound Matrix::RoundAt(uint64_t index) const {
  KVSWEEP_CHECK_LT(index, round_count());
  PlannedRound round;
  round.index = index;
  std::vector<TrialSpec> trials;
  if (index >= load_rounds()) {
    const auto& [arm, cell] = quality_[index - load_rounds()];
    round.kind = TrialSpec::KIND_QUALITY;
    round.cell = cell;
    round.arms = {arm};
    trials.push_back(QualityTrial(arm, cell));
  } else {
    round.group = static_cast<uint32_t>(index % groups());
    round.cell = index / groups() % cell_count_;
    round.repeat = static_cast<uint32_t>(index / groups() / cell_count_);
    round.arms = GroupArms(round.group);
    Random random(MixSeed(experiment_.load().arrivals().seed(), kArmOrder, round.repeat, round.cell,
                          round.group));
    random.Shuffle(std::span(round.arms));
    for (const size_t arm : round.arms) trials.push_back(LoadTrial(arm, round.cell, round.repeat));
  }
  round.spec.set_devices(1);
  bool uses_host_tier = false;
  for (size_t i = 0; i < trials.size(); ++i) {
    uses_host_tier |= UsesHostTier(trials[i].arm());
    const bool joined = has_quality_ && round.kind == TrialSpec::KIND_LOAD;
    round.quality_keys.push_back(joined ? ContentKey(QualityTrial(round.arms[i], round.cell))
                                        : std::string());
    PlannedTrial* planned = round.spec.add_trials();
    planned->set_content_key(ContentKey(trials[i]));
    *planned->mutable_spec() = std::move(trials[i]);
  }
  round.spec.set_uses_host_tier(uses_host_tier && !experiment_.colocate());
  return round;
}

TrialSpec Matrix::BaseTrial(size_t arm, uint64_t cell) const {
  Experiment point = experiment_;
  const std::vector<size_t> digits = ValueIndices(cell);
  for (size_t i = 0; i < digits.size(); ++i) {
    KVSWEEP_CHECK_OK(
        SetField(&point, axes_[i].path(), axes_[i].values(static_cast<int>(digits[i]))));
  }
  TrialSpec trial;
  trial.set_kind(TrialSpec::KIND_LOAD);
  *trial.mutable_model() = std::move(*point.mutable_model());
  *trial.mutable_load() = std::move(*point.mutable_load());
  *trial.mutable_kv() = std::move(*point.mutable_kv());
  *trial.mutable_engine() = std::move(*point.mutable_engine());
  *trial.mutable_limits() = std::move(*point.mutable_limits());
  if (point.has_slo()) *trial.mutable_slo() = std::move(*point.mutable_slo());
  if (point.regime() != Experiment::REGIME_EQUAL_DEVICE_BYTES) trial.set_regime(point.regime());
  *trial.mutable_arm() = arms_[arm];
  trial.mutable_kv()->MergeFrom(trial.arm().kv());
  trial.mutable_arm()->clear_kv();
  return trial;
}

namespace {

// Adds the references of what the trial names.
void AddReferences(const ExperimentInputs& inputs, TrialSpec* trial) {
  if (inputs.model) *trial->mutable_model_reference() = *inputs.model;
  std::set<std::string> seen;
  for (const NamedPath& named : FindNamedPaths(*trial)) {
    const FileReference* file = inputs.FindFile(named.value);
    if (file != nullptr && seen.insert(named.value).second) *trial->add_files() = *file;
  }
}

}  // namespace

TrialSpec Matrix::LoadTrial(size_t arm, uint64_t cell, uint32_t repeat) const {
  TrialSpec trial = BaseTrial(arm, cell);
  trial.set_repeat(repeat);
  *trial.mutable_seeds() = SeedsOfRepeat(trial.load().arrivals().seed(), repeat);
  AddReferences(inputs_, &trial);
  return trial;
}

TrialSpec Matrix::QualityTrial(size_t arm, uint64_t cell) const {
  const TrialSpec load = BaseTrial(arm, cell);
  TrialSpec trial;
  trial.set_kind(TrialSpec::KIND_QUALITY);
  *trial.mutable_model() = load.model();
  *trial.mutable_arm() = load.arm();
  *trial.mutable_quality() = experiment_.quality();
  if (!trial.quality().has_text()) trial.mutable_quality()->set_text(load.load().text());
  trial.mutable_kv()->set_dtype(load.kv().dtype());
  const uint64_t bytes = kQualityBytesPerToken * trial.quality().context();
  trial.mutable_kv()->set_device_bytes(bytes);
  trial.mutable_kv()->set_host_bytes(bytes);
  trial.mutable_engine()->set_backend(load.engine().backend());
  trial.mutable_engine()->set_batch_invariant(load.engine().batch_invariant());
  ApplyDefaults(trial.mutable_engine());
  if (trial.arm().has_infinigen()) {
    // What the arm calibrates itself on belongs to the arm: the load's text, whatever is scored.
    if (load.load().has_text() && load.load().text() != trial.quality().text()) {
      trial.mutable_load()->set_text(load.load().text());
    }
    if (trial.arm().infinigen().prefill_history() == Infinigen::PREFILL_HISTORY_WHOLE) {
      trial.mutable_engine()->set_max_num_batched_tokens(
          std::max(trial.engine().max_num_batched_tokens(), trial.quality().context()));
    }
  }
  *trial.mutable_limits() = load.limits();
  AddReferences(inputs_, &trial);
  return trial;
}

// ------------------------------------------------------------------------------- keys and seeds

std::string ContentKey(const TrialSpec& trial) {
  TrialSpec content = trial;
  // Names, and what has gone into the seeds and digests.
  content.mutable_arm()->clear_name();
  content.clear_repeat();
  content.clear_regime();
  if (content.has_load()) content.mutable_load()->mutable_arrivals()->clear_seed();
  if (trial.has_model_reference()) {
    content.mutable_model()->set_path(absl::BytesToHexString(trial.model_reference().digest()));
  }
  if (content.load().has_text()) ReplacePathByDigest(trial, content.mutable_load()->mutable_text());
  if (content.load().lengths().has_trace()) {
    ReplacePathByDigest(trial, content.mutable_load()->mutable_lengths()->mutable_trace());
  }
  if (content.quality().has_text()) {
    ReplacePathByDigest(trial, content.mutable_quality()->mutable_text());
  }
  content.clear_model_reference();
  content.clear_files();
  DigestBuilder builder;
  builder.Add("trial").AddNumber(kMethodVersion).Add(CanonicalJson(content));
  return std::string(builder.Finish().bytes());
}

Seeds SeedsOfRepeat(uint64_t base_seed, uint32_t repeat) {
  Seeds seeds;
  seeds.set_content(MixSeed(base_seed, kContent, repeat));
  seeds.set_order(MixSeed(base_seed, kOrder, repeat));
  seeds.set_schedule(MixSeed(base_seed, kSchedule, repeat));
  return seeds;
}

bool UsesHostTier(const Arm& arm) { return UsesHostLink(arm, arm.strategy()); }

}  // namespace kvsweep
