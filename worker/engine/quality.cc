#include "worker/engine/quality.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace kvsweep {
namespace {

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
           const QualityOptions& options, int64_t deadline_ns, QualityResult* result)
      : reference_(*reference),
        arm_(*arm),
        task_(task),
        options_(options),
        deadline_ns_(deadline_ns),
        result_(*result),
        vocabulary_(static_cast<size_t>(arm->config().vocabulary)),
        layer_counts_(static_cast<size_t>(arm->config().layers)) {
    const RequestShape shape = ArmShape(task);
    const int32_t budget = arm->strategy().TokenBudget(shape);
    dropped_from_ = budget < 0 ? task.context : std::max(task.prefill, budget);
  }

  static RequestShape ArmShape(const QualityTask& task) {
    return {task.prefill, task.context - task.prefill};
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
      reference_.AddSequence(w, windows_.back(), task_.context - 1);
    }
    RETURN_IF_ERROR(Score());
    for (int32_t w = 0; w < count && ended_well(); ++w) {
      rows_[static_cast<size_t>(w)].set_attended_fraction(
          full_per_window_ > 0 ? attended_[static_cast<size_t>(w)] / full_per_window_ : 1.0);
    }
    for (int32_t w = 0; w < count; ++w) Remove(w);
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

  void Remove(int32_t window) {
    arm_.manager().Release(window);
    arm_.RemoveSequence(window);
    reference_.manager().Release(window);
    reference_.RemoveSequence(window);
  }

  absl::Status Score() {
    // Row p holds what follows token p; the first that counts is the last one of the prefill.
    RETURN_IF_ERROR(PrefillArm());
    const int32_t chunk = reference_.options().max_batched_tokens / count_;
    KVSWEEP_CHECK_GE(chunk, 1);
    int32_t row = 0;
    while (row < task_.context - 1 && ended_well()) {
      const int32_t border = row < task_.prefill - 1 ? task_.prefill - 1 : task_.context - 1;
      const int32_t rows = std::min(chunk, border - row);
      ASSIGN_OR_RETURN(const StepResult reference, AdvanceReference(row, rows));
      for (int32_t r = row; r < row + rows && r >= task_.prefill - 1; ++r) {
        if (!KeepGoing()) return absl::OkStatus();
        RETURN_IF_ERROR(ScoreRow(r, reference.logits, rows, r - row));
      }
      row += rows;
    }
    return absl::OkStatus();
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
      RETURN_IF_ERROR(Hold(reference_, w, ReferenceShape(task_), row, rows));
      plan.prefill.push_back({.request = w,
                              .slot = w,
                              .first_row = w * rows,
                              .rows = rows,
                              .start_position = row,
                              .last_chunk = row + rows == task_.context - 1});
    }
    ASSIGN_OR_RETURN(const StepResult result, reference_.Execute(plan));
    if (plan.prefill.front().last_chunk) {
      for (int32_t w = 0; w < count_; ++w) reference_.manager().EndPrompt(w);
    }
    return result;
  }

  // Memory for `rows` more tokens of a window that has `row`.
  static absl::Status Hold(InferenceEngine& engine, int32_t window, const RequestShape& shape,
                           int32_t row, int32_t rows) {
    KvManager& manager = engine.manager();
    const bool held =
        row == 0 ? manager.Admit(window, shape, rows) : manager.Grow(window, row + rows);
    if (held) return absl::OkStatus();
    return absl::ResourceExhaustedError(absl::StrCat("no KV memory for token ", row + rows,
                                                     " of window ", window,
                                                     " although its peak fits the budget"));
  }

  // One window after the other, in chunks; keeps the logits of each one's last row.
  absl::Status PrefillArm() {
    const int32_t alignment = arm_.chunk_alignment();
    const int32_t chunk = arm_.options().max_batched_tokens / alignment * alignment;
    prompt_logits_.resize(static_cast<size_t>(count_) * vocabulary_);
    for (int32_t w = 0; w < count_; ++w) {
      for (int32_t row = 0; row < task_.prefill; row += chunk) {
        const int32_t rows = std::min(chunk, task_.prefill - row);
        const bool last = row + rows == task_.prefill;
        RETURN_IF_ERROR(Hold(arm_, w, ArmShape(task_), row, rows));
        StepPlan plan;
        plan.prefill.push_back(
            {.request = w, .slot = w, .rows = rows, .start_position = row, .last_chunk = last});
        ASSIGN_OR_RETURN(const StepResult step, ExecuteArm(plan));
        if (!last) continue;
        arm_.manager().EndPrompt(w);
        std::copy_n(step.logits.begin(), vocabulary_,
                    prompt_logits_.begin() + static_cast<std::ptrdiff_t>(w * vocabulary_));
      }
    }
    return absl::OkStatus();
  }

  absl::StatusOr<StepResult> ExecuteArm(const StepPlan& plan) {
    ASSIGN_OR_RETURN(const StepResult step, arm_.Execute(plan));
    if (options_.modelled != nullptr) options_.modelled->AdvanceNs(step.modelled_ns);
    ++result_.steps;
    return step;
  }

  // Feeds token `row` of every window to the arm (unless the prefill did) and compares. The
  // reference's logits are [windows, chunk_rows, V].
  absl::Status ScoreRow(int32_t row, std::span<const float> reference, int32_t chunk_rows,
                        int32_t chunk_row) {
    std::span<const float> logits = prompt_logits_;
    if (row >= task_.prefill) {
      ASSIGN_OR_RETURN(logits, DecodeArm(row));
    }
    for (int32_t w = 0; w < count_; ++w) {
      const size_t reference_row = static_cast<size_t>(w * chunk_rows + chunk_row);
      ASSIGN_OR_RETURN(
          const PositionScore score,
          Annotate(ScorePosition(reference.subspan(reference_row * vocabulary_, vocabulary_),
                                 logits.subspan(static_cast<size_t>(w) * vocabulary_, vocabulary_),
                                 windows_[static_cast<size_t>(w)][static_cast<size_t>(row) + 1]),
                   absl::StrCat("position ", row, " of window ",
                                rows_[static_cast<size_t>(w)].window())));
      AddScore(score, row + 1 > dropped_from_, &rows_[static_cast<size_t>(w)]);
    }
    return absl::OkStatus();
  }

  absl::StatusOr<std::span<const float>> DecodeArm(int32_t row) {
    StepPlan plan;
    for (int32_t w = 0; w < count_; ++w) {
      RETURN_IF_ERROR(Hold(arm_, w, ArmShape(task_), row, 1));
      plan.decode.push_back(
          {.request = w, .slot = w, .first_row = w, .rows = 1, .start_position = row});
    }
    ASSIGN_OR_RETURN(const StepResult step, ExecuteArm(plan));
    for (int32_t w = 0; w < count_; ++w) {
      attended_[static_cast<size_t>(w)] +=
          arm_.CollectDecode(static_cast<size_t>(w), layer_counts_).attended;
      for (size_t layer = 0; layer < layer_counts_.size(); ++layer) {
        result_.attended_by_layer[layer] += layer_counts_[layer];
      }
    }
    result_.full_per_layer += static_cast<double>(count_) * (row + 1);
    full_per_window_ += static_cast<double>(layer_counts_.size()) * (row + 1);
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

  InferenceEngine& reference_;
  InferenceEngine& arm_;
  const QualityTask& task_;
  const QualityOptions& options_;
  const int64_t deadline_ns_;
  QualityResult& result_;
  const size_t vocabulary_;
  std::vector<double> layer_counts_;
  int32_t dropped_from_ = 0;  // positions with more tokens than this were scored after a drop
  int32_t count_ = 0;
  std::vector<std::vector<int32_t>> windows_;
  std::vector<float> prompt_logits_;  // [windows, V]
  std::vector<QualityRow> rows_;
  std::vector<double> attended_;  // by window
  double full_per_window_ = 0;
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
  const EngineOptions& options = arm->options();
  const TierBytes fixed = arm->manager().FixedBytes();
  const TierBytes peak = arm->manager().PeakBytes(Lockstep::ArmShape(task));
  int64_t windows = std::min(options.max_sequences, task.windows);
  const auto bound = [&windows](uint64_t budget, uint64_t fixed_bytes, uint64_t peak_bytes) {
    if (fixed_bytes > budget) windows = 0;
    if (peak_bytes == 0) return;
    windows = std::min<int64_t>(
        windows, static_cast<int64_t>((budget - std::min(budget, fixed_bytes)) / peak_bytes));
  };
  bound(options.device_bytes, fixed.device, peak.device);
  bound(options.host_bytes, fixed.host, peak.host);
  return static_cast<int32_t>(windows);
}

absl::StatusOr<QualityResult> ScoreText(InferenceEngine* reference, InferenceEngine* arm,
                                        const QualityTask& task, int32_t side_by_side,
                                        const QualityOptions& options, const QualitySink& sink) {
  KVSWEEP_CHECK_GE(side_by_side, 1);
  RETURN_IF_ERROR(CheckTask(task, arm->config()));
  QualityResult result;
  result.attended_by_layer.resize(static_cast<size_t>(arm->config().layers));
  const int64_t start_ns = options.clock->NowNs();
  const int64_t deadline_ns =
      options.time_limit_ns > kNeverNs - start_ns ? kNeverNs : start_ns + options.time_limit_ns;
  for (int32_t first = 0; first < task.windows && result.end == QualityResult::End::kScoredAll;
       first += side_by_side) {
    const int32_t count = std::min(side_by_side, task.windows - first);
    Lockstep lockstep(reference, arm, task, options, deadline_ns, &result);
    ASSIGN_OR_RETURN(std::vector<QualityRow> rows, lockstep.Run(first, count));
    if (result.end != QualityResult::End::kScoredAll) break;
    for (QualityRow& row : rows) {
      if (!sink(std::move(row))) result.end = QualityResult::End::kSinkFull;
    }
    if (options.progress) options.progress(static_cast<size_t>(first + count));
  }
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
