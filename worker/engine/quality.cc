#include "worker/engine/quality.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "worker/engine/manual_steps.h"

namespace kvsweep {
namespace {

// Buckets that a window is divided into.
constexpr int32_t kPositionBuckets = 8;
// Bytes of the full cache's logits kept for the arms that follow.
constexpr uint64_t kKeptLogitsBytes = uint64_t{512} << 20;

struct LogitsSummary {
  double log_sum_exp = 0;
  size_t top = 0;  // lowest index of the largest
};

absl::StatusOr<LogitsSummary> Summarise(std::span<const float> logits) {
  LogitsSummary summary;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (!std::isfinite(logits[i]))
      return absl::InternalError(absl::StrCat("logit ", i, " is not finite"));
    if (logits[i] > logits[summary.top]) summary.top = i;
  }
  const double maximum = logits[summary.top];
  double sum = 0;
  for (const float logit : logits) sum += std::exp(logit - maximum);
  summary.log_sum_exp = maximum + std::log(sum);
  return summary;
}

// Carries windows first .. first + count - 1 through both engines.
class Lockstep {
 public:
  Lockstep(InferenceEngine* reference, InferenceEngine* arm, const QualityTask& task,
           const QualityOptions& options, int64_t deadline_ns, ReferenceLogits* kept,
           QualityResult* result)
      : reference_(reference),
        arm_(*arm),
        task_(task),
        options_(options),
        deadline_ns_(deadline_ns),
        kept_(*kept),
        result_(*result),
        vocabulary_(static_cast<size_t>(arm->config().vocabulary)),
        layer_counts_(static_cast<size_t>(arm->config().layers)) {
    const RequestShape shape = ArmShape(task);
    const int32_t budget = arm->strategy().TokenBudget(shape);
    dropped_from_ = budget < 0 ? task.context : std::max(task.prefill, budget);
  }

  static RequestShape ArmShape(const QualityTask& task) {
    return {task.prefill, task.context - task.prefill, task.context};
  }
  // The last token of a window is scored but never fed.
  static RequestShape ReferenceShape(const QualityTask& task) { return {task.context - 1, 1}; }

  absl::StatusOr<std::vector<QualityRow>> Run(int32_t first, int32_t count) {
    count_ = count;
    rows_.assign(static_cast<size_t>(count), QualityRow());
    attended_.assign(static_cast<size_t>(count), 0.0);
    for (int32_t w = 0; w < count; ++w) {
      rows_[static_cast<size_t>(w)].set_window(static_cast<uint32_t>(first + w));
      windows_.push_back(CutWindow(first + w));
      arm_.AddSequence(w, windows_.back(), task_.prefill);
      if (computes_reference()) {
        reference_->AddSequence(w, windows_.back(), task_.context - 1);
      }
    }
    RETURN_IF_ERROR(Score());
    for (int32_t w = 0; w < count && ended_well(); ++w) {
      rows_[static_cast<size_t>(w)].set_attended_fraction(
          decode_steps_ > 0 ? attended_[static_cast<size_t>(w)] / decode_steps_ : 1.0);
    }
    for (int32_t w = 0; w < count; ++w) {
      RemoveSequence(&arm_, w);
      if (computes_reference()) RemoveSequence(reference_, w);
    }
    return std::move(rows_);
  }

 private:
  bool ended_well() const { return result_.end == QualityResult::End::kScoredAll; }

  std::vector<int32_t> CutWindow(int32_t window) const {
    const size_t from_text = static_cast<size_t>(task_.context) - task_.bos_id.has_value();
    std::vector<int32_t> tokens;
    tokens.reserve(static_cast<size_t>(task_.context));
    if (task_.bos_id.has_value()) tokens.push_back(*task_.bos_id);
    const auto text = task_.text_ids.subspan(static_cast<size_t>(window) * from_text, from_text);
    tokens.insert(tokens.end(), text.begin(), text.end());
    return tokens;
  }

  // The full cache's logits of an earlier arm serve this one too.
  bool computes_reference() const { return !kept_.complete; }

  absl::Status Score() {
    // Row p holds what follows token p; the first that counts is the last one of the prefill.
    RETURN_IF_ERROR(PrefillArm());
    if (!computes_reference()) return ScoreAgainstKept();
    const int32_t chunk = reference_->options().max_batched_tokens / count_;
    KVSWEEP_CHECK_GE(chunk, 1);
    int32_t row = 0;
    while (row < task_.context - 1 && ended_well()) {
      const int32_t border = row < task_.prefill - 1 ? task_.prefill - 1 : task_.context - 1;
      const int32_t rows = std::min(chunk, border - row);
      ASSIGN_OR_RETURN(const StepResult reference, AdvanceReference(row, rows));
      for (int32_t r = row; r < row + rows && r >= task_.prefill - 1; ++r) {
        if (!KeepGoing()) return absl::OkStatus();
        RETURN_IF_ERROR(ScoreRow(r, [&](int32_t w) {
          const size_t chunk_row = static_cast<size_t>(w * rows + r - row);
          const auto logits = reference.logits.subspan(chunk_row * vocabulary_, vocabulary_);
          kept_.Keep(window(w), r - task_.prefill + 1, logits);
          return logits;
        }));
      }
      row += rows;
    }
    return absl::OkStatus();
  }

  absl::Status ScoreAgainstKept() {
    for (int32_t row = task_.prefill - 1; row < task_.context - 1 && KeepGoing(); ++row) {
      RETURN_IF_ERROR(
          ScoreRow(row, [&](int32_t w) { return kept_.Row(window(w), row - task_.prefill + 1); }));
    }
    return absl::OkStatus();
  }

  // Number in the text of the window in slot `w`.
  int32_t window(int32_t w) const {
    return static_cast<int32_t>(rows_[static_cast<size_t>(w)].window());
  }

  bool KeepGoing() {
    if (options_.cancel != nullptr && options_.cancel->load(std::memory_order_relaxed)) {
      result_.end = QualityResult::End::kCancelled;
    } else if (options_.clock->NowNs() >= deadline_ns_) {
      result_.end = QualityResult::End::kTimeLimit;
    }
    return ended_well();
  }

  // Computes rows [row, row + rows) of every window with the full cache.
  absl::StatusOr<StepResult> AdvanceReference(int32_t row, int32_t rows) {
    StepPlan plan;
    for (int32_t w = 0; w < count_; ++w) {
      RETURN_IF_ERROR(HoldTokens(reference_, w, ReferenceShape(task_), row, rows));
      plan.prefill.push_back({.request = w,
                              .slot = w,
                              .first_row = w * rows,
                              .rows = rows,
                              .start_position = row,
                              .last_chunk = row + rows == task_.context - 1});
    }
    ASSIGN_OR_RETURN(const StepResult result, reference_->Execute(plan));
    if (plan.prefill.front().last_chunk) {
      for (int32_t w = 0; w < count_; ++w) reference_->manager().EndPrompt(w);
    }
    return result;
  }

  // One window after the other; keeps the logits of each one's last row.
  absl::Status PrefillArm() {
    prompt_logits_.resize(static_cast<size_t>(count_) * vocabulary_);
    for (int32_t w = 0; w < count_; ++w) {
      ASSIGN_OR_RETURN(const StepResult step,
                       PrefillPrompt(&arm_, w, ArmShape(task_),
                                     [this](const StepResult& done) { CountStep(done); }));
      std::copy_n(step.logits.begin(), vocabulary_,
                  prompt_logits_.begin() + static_cast<std::ptrdiff_t>(w * vocabulary_));
    }
    return absl::OkStatus();
  }

  void CountStep(const StepResult& step) {
    if (options_.modelled != nullptr) options_.modelled->AdvanceNs(step.modelled_ns);
    ++result_.steps;
  }

  // Feeds token `row` of every window to the arm (unless the prefill did) and compares with what
  // `reference_of` gives for each window: the full cache's logits of that row.
  template <typename LogitsOf>
  absl::Status ScoreRow(int32_t row, const LogitsOf& reference_of) {
    std::span<const float> logits = prompt_logits_;
    if (row >= task_.prefill) {
      ASSIGN_OR_RETURN(logits, DecodeArm(row));
    }
    for (int32_t w = 0; w < count_; ++w) {
      ASSIGN_OR_RETURN(
          const PositionScore score,
          Annotate(ScorePosition(reference_of(w),
                                 logits.subspan(static_cast<size_t>(w) * vocabulary_, vocabulary_),
                                 windows_[static_cast<size_t>(w)][static_cast<size_t>(row) + 1]),
                   absl::StrCat("position ", row, " of window ",
                                rows_[static_cast<size_t>(w)].window())));
      QualityRow& sums = rows_[static_cast<size_t>(w)];
      AddScore(score, row + 1 > dropped_from_, &sums);
      AddToBucket(score, row + 1, &sums);
    }
    return absl::OkStatus();
  }

  absl::StatusOr<std::span<const float>> DecodeArm(int32_t row) {
    StepPlan plan;
    for (int32_t w = 0; w < count_; ++w) {
      RETURN_IF_ERROR(HoldTokens(&arm_, w, ArmShape(task_), row, 1));
      plan.decode.push_back(
          {.request = w, .slot = w, .first_row = w, .rows = 1, .start_position = row});
    }
    ASSIGN_OR_RETURN(const StepResult step, arm_.Execute(plan));
    CountStep(step);
    const double tokens = row + 1;
    for (int32_t w = 0; w < count_; ++w) {
      const double attended = arm_.CollectDecode(static_cast<size_t>(w), layer_counts_).attended;
      attended_[static_cast<size_t>(w)] +=
          attended / (tokens * static_cast<double>(layer_counts_.size()));
      for (size_t layer = 0; layer < layer_counts_.size(); ++layer) {
        result_.attended_by_layer[layer] += layer_counts_[layer] / tokens;
      }
    }
    result_.decode_rows += count_;
    ++decode_steps_;
    return step.logits;
  }

  static void AddScore(const PositionScore& score, bool dropped, QualityRow* row) {
    row->set_scored_tokens(row->scored_tokens() + 1);
    row->set_nll_sum(row->nll_sum() + score.nll);
    row->set_reference_nll_sum(row->reference_nll_sum() + score.reference_nll);
    row->set_kl_sum(row->kl_sum() + score.kl);
    row->set_top1_matches(row->top1_matches() + score.top1_match);
    if (!dropped) return;
    row->set_dropped_tokens(row->dropped_tokens() + 1);
    row->set_dropped_nll_sum(row->dropped_nll_sum() + score.nll);
    row->set_dropped_reference_nll_sum(row->dropped_reference_nll_sum() + score.reference_nll);
    row->set_dropped_kl_sum(row->dropped_kl_sum() + score.kl);
    row->set_dropped_top1_matches(row->dropped_top1_matches() + score.top1_match);
  }

  // `position` of the token that was to be foreseen.
  void AddToBucket(const PositionScore& score, int32_t position, QualityRow* sums) const {
    const auto bucket = [&](int64_t at) { return at * kPositionBuckets / task_.context; };
    const auto& known = sums->positions();
    if (known.empty() || bucket(known.rbegin()->first_position()) != bucket(position)) {
      sums->add_positions()->set_first_position(static_cast<uint32_t>(position));
    }
    QualityPositions& part = *sums->mutable_positions()->rbegin();
    part.set_scored_tokens(part.scored_tokens() + 1);
    part.set_nll_sum(part.nll_sum() + score.nll);
    part.set_reference_nll_sum(part.reference_nll_sum() + score.reference_nll);
    part.set_kl_sum(part.kl_sum() + score.kl);
    part.set_top1_matches(part.top1_matches() + score.top1_match);
  }

  InferenceEngine* reference_;  // nullptr: everything is kept
  InferenceEngine& arm_;
  const QualityTask& task_;
  const QualityOptions& options_;
  const int64_t deadline_ns_;
  ReferenceLogits& kept_;
  QualityResult& result_;
  const size_t vocabulary_;
  std::vector<double> layer_counts_;
  int32_t dropped_from_ = 0;  // positions with more tokens than this were scored after a drop
  int32_t count_ = 0;
  std::vector<std::vector<int32_t>> windows_;
  std::vector<float> prompt_logits_;  // [windows, V]
  std::vector<QualityRow> rows_;
  std::vector<double> attended_;  // by window: attended fractions of its steps, summed
  double decode_steps_ = 0;
};

absl::Status CheckTask(const QualityTask& task, const ModelConfig& config) {
  KVSWEEP_CHECK(task.windows >= 1 && task.prefill >= 1 && task.prefill < task.context);
  if (task.context > config.max_positions) {
    return absl::InvalidArgumentError(
        absl::StrCat("quality.context: ", task.context, " tokens; the model takes ",
                     config.max_positions, ": lower quality.context"));
  }
  const size_t needed = static_cast<size_t>(task.windows) *
                        (static_cast<size_t>(task.context) - task.bos_id.has_value());
  if (task.text_ids.size() >= needed) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      "quality.text_tokens: ", task.windows, " windows of ", task.context,
      " tokens need a text of ", needed, " tokens, this one has ", task.text_ids.size(),
      ": lower quality.text_tokens or quality.context, or take a longer text"));
}

}  // namespace

int32_t QualityWindows(uint32_t text_tokens, int32_t context, int32_t prefill) {
  const int64_t scored = context - prefill;
  KVSWEEP_CHECK_GE(scored, 1);
  return static_cast<int32_t>((static_cast<int64_t>(text_tokens) + scored - 1) / scored);
}

EngineOptions ReferenceOptions(const ModelConfig& config, const QualityTask& task, int32_t windows,
                               DType kv_dtype, uint64_t logits_bytes) {
  const uint64_t row_bytes = static_cast<uint64_t>(config.vocabulary) * sizeof(float);
  const int64_t rows = std::clamp<int64_t>(static_cast<int64_t>(logits_bytes / row_bytes), windows,
                                           std::max(windows, 512));
  // Whole pages for each window, and room for the tables.
  constexpr int64_t kPageTokens = 16;
  constexpr uint64_t kTableBytes = uint64_t{64} << 20;
  const uint64_t tokens =
      static_cast<uint64_t>(windows) * static_cast<uint64_t>(task.context + kPageTokens);
  return {.max_sequences = windows,
          .max_batched_tokens = static_cast<int32_t>(rows),
          .max_context = task.context,
          .graphs = false,
          .logits = LogitsMode::kAll,
          .kv_dtype = kv_dtype,
          .device_bytes =
              tokens * static_cast<uint64_t>(config.KvBytesPerToken(kv_dtype)) + kTableBytes,
          .host_bytes = 0};
}

int32_t WindowsSideBySide(InferenceEngine* arm, const QualityTask& task) {
  return SequencesSideBySide(arm, Lockstep::ArmShape(task), task.windows);
}

void ReferenceLogits::Begin(const QualityTask& task, int32_t vocabulary) {
  const uint64_t row = static_cast<uint64_t>(vocabulary);
  const uint64_t values = row * static_cast<uint64_t>(task.windows) *
                          static_cast<uint64_t>(task.context - task.prefill);
  complete = false;
  rows_ = static_cast<size_t>(task.context - task.prefill);
  vocabulary_ = static_cast<size_t>(vocabulary);
  logits_.assign(values * sizeof(float) <= kKeptLogitsBytes ? values : 0, 0.0f);
}

void ReferenceLogits::Keep(int32_t window, int32_t row, std::span<const float> logits) {
  if (logits_.empty()) return;
  std::copy(logits.begin(), logits.end(), logits_.begin() + Offset(window, row));
}

std::span<const float> ReferenceLogits::Row(int32_t window, int32_t row) const {
  return {logits_.begin() + Offset(window, row), vocabulary_};
}

std::ptrdiff_t ReferenceLogits::Offset(int32_t window, int32_t row) const {
  return static_cast<std::ptrdiff_t>(
      (static_cast<size_t>(window) * rows_ + static_cast<size_t>(row)) * vocabulary_);
}

absl::StatusOr<QualityResult> ScoreText(InferenceEngine* reference, InferenceEngine* arm,
                                        const QualityTask& task, int32_t side_by_side,
                                        const QualityOptions& options, ReferenceLogits* kept,
                                        const QualitySink& sink) {
  KVSWEEP_CHECK_GE(side_by_side, 1);
  KVSWEEP_CHECK(kept->complete || reference != nullptr);
  RETURN_IF_ERROR(CheckTask(task, arm->config()));
  if (!kept->complete) kept->Begin(task, arm->config().vocabulary);
  QualityResult result;
  result.attended_by_layer.resize(static_cast<size_t>(arm->config().layers));
  const int64_t start_ns = options.clock->NowNs();
  const int64_t deadline_ns =
      options.time_limit_ns > kNeverNs - start_ns ? kNeverNs : start_ns + options.time_limit_ns;
  for (int32_t first = 0; first < task.windows && result.end == QualityResult::End::kScoredAll;
       first += side_by_side) {
    const int32_t count = std::min(side_by_side, task.windows - first);
    Lockstep lockstep(reference, arm, task, options, deadline_ns, kept, &result);
    ASSIGN_OR_RETURN(std::vector<QualityRow> rows, lockstep.Run(first, count));
    if (result.end != QualityResult::End::kScoredAll) break;
    for (QualityRow& row : rows) {
      if (!sink(std::move(row))) result.end = QualityResult::End::kSinkFull;
    }
    if (options.progress) options.progress(static_cast<size_t>(first + count));
  }
  if (result.end == QualityResult::End::kScoredAll) kept->Finish();
  result.duration_ns = options.clock->NowNs() - start_ns;
  return result;
}

absl::StatusOr<PositionScore> ScorePosition(std::span<const float> reference_logits,
                                            std::span<const float> arm_logits, int32_t target) {
  KVSWEEP_CHECK(reference_logits.size() == arm_logits.size() && target >= 0 &&
                static_cast<size_t>(target) < arm_logits.size());
  ASSIGN_OR_RETURN(const LogitsSummary reference,
                   Annotate(Summarise(reference_logits), "full cache"));
  ASSIGN_OR_RETURN(const LogitsSummary arm, Annotate(Summarise(arm_logits), "arm"));
  PositionScore score{
      .nll = arm.log_sum_exp - arm_logits[static_cast<size_t>(target)],
      .reference_nll = reference.log_sum_exp - reference_logits[static_cast<size_t>(target)],
      .top1_match = reference.top == arm.top};
  for (size_t i = 0; i < arm_logits.size(); ++i) {
    const double reference_log = reference_logits[i] - reference.log_sum_exp;
    const double arm_log = arm_logits[i] - arm.log_sum_exp;
    score.kl += std::exp(reference_log) * (reference_log - arm_log);
  }
  return score;
}

}  // namespace kvsweep
