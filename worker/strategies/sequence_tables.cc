#include "worker/strategies/sequence_tables.h"

#include <algorithm>

#include "base/check.h"
#include "base/planted_bug.h"

namespace kvsweep {

SequenceTables::SequenceTables(const StrategyContext& context, int32_t max_pages)
    : state_(context.step_state), decode_rows_(context.max_decode_rows), max_pages_(max_pages) {
  // A step has at most one prefill segment for each sequence.
  const int64_t rows = int64_t{decode_rows_} + context.max_sequences;
  pages_ = state_->Add(rows * max_pages);
  length_ = state_->Add(rows);
  token_row_ = state_->Add(context.max_rows);
  token_slot_ = state_->Add(context.max_rows);
}

uint64_t SequenceTables::Bytes(const StrategySizes& sizes, int32_t max_pages) {
  const int64_t rows = int64_t{sizes.max_decode_rows} + sizes.max_sequences;
  return StepState::FieldBytes(rows * max_pages) + StepState::FieldBytes(rows) +
         2 * StepState::FieldBytes(sizes.max_rows);
}

void SequenceTables::Clear(const StepView& step) {
  std::ranges::fill(state_->Host(token_row_).first(static_cast<size_t>(step.rows)), -1);
  std::ranges::fill(state_->Host(token_slot_).first(static_cast<size_t>(step.rows)), 0);
  std::ranges::fill(state_->Host(length_), 0);
  // Block 0 is a valid address for rows that are read with length 0.
  std::ranges::fill(state_->Host(pages_).first(static_cast<size_t>(step.decode_rows) * max_pages_),
                    0);
}

void SequenceTables::SetRow(int32_t row, std::span<const PageIndex> pages, int32_t length) {
  KVSWEEP_CHECK_LE(pages.size(), static_cast<size_t>(max_pages_));
  std::ranges::copy(pages, state_->Host(pages_).begin() + int64_t{row} * max_pages_);
  state_->Host(length_)[static_cast<size_t>(row)] = length;
}

void SequenceTables::SetTokens(const Segment& segment, int32_t row, int32_t first_slot) {
  for (int32_t i = 0; i < segment.rows; ++i) {
    const auto token = static_cast<size_t>(segment.first_row + i);
    state_->Host(token_row_)[token] = row;
    state_->Host(token_slot_)[token] = first_slot + i + (BugPlanted("slot_off_by_one") ? 1 : 0);
  }
}

void SequenceTables::SetToken(int32_t token, int32_t row, int32_t slot) {
  state_->Host(token_row_)[static_cast<size_t>(token)] = row;
  state_->Host(token_slot_)[static_cast<size_t>(token)] = slot;
}

}  // namespace kvsweep
