// The arrays through which a step's kernels find the sequences' pages: one block table row for each
// decode row, then one for each prefill segment; how many tokens each row holds; and for every
// token of the step where its key and value go.
#ifndef KVSWEEP_WORKER_STRATEGIES_SEQUENCE_TABLES_H_
#define KVSWEEP_WORKER_STRATEGIES_SEQUENCE_TABLES_H_

#include <cstdint>
#include <span>

#include "kernels/step_state.h"
#include "worker/strategies/cache_strategy.h"
#include "worker/strategies/page_pool.h"

namespace kvsweep {

class SequenceTables {
 public:
  // Registers its arrays with the context's step state. A row names at most `max_pages` pages.
  SequenceTables(const StrategyContext& context, int32_t max_pages);
  // Device bytes of these arrays.
  static uint64_t Bytes(const StrategySizes& sizes, int32_t max_pages);

  // Block table row of prefill segment `index`; decode row b has row b.
  int32_t PrefillRow(size_t index) const { return decode_rows_ + static_cast<int32_t>(index); }

  // Marks every token of the step as not stored and every decode row as empty. REQUIRES: the step
  // state is open.
  void Clear(const StepView& step);
  // Sets a row's pages and length (tokens stored before the step).
  void SetRow(int32_t row, std::span<const PageIndex> pages, int32_t length);
  // The segment's tokens go to slots `first_slot`, first_slot + 1, … of table row `row`.
  void SetTokens(const Segment& segment, int32_t row, int32_t first_slot);
  // One token of the step, likewise; row -1: it is not stored.
  void SetToken(int32_t token, int32_t row, int32_t slot);

  const int32_t* pages() const { return state_->Device(pages_); }  // [rows, max_pages]
  int32_t max_pages() const { return max_pages_; }
  const int32_t* length() const { return state_->Device(length_); }  // [rows]
  const int32_t* token_row() const {
    return state_->Device(token_row_);
  }  // [step rows], -1: not stored
  const int32_t* token_slot() const { return state_->Device(token_slot_); }

 private:
  StepState* state_;
  int32_t decode_rows_;
  int32_t max_pages_;
  StepState::Field pages_;
  StepState::Field length_;
  StepState::Field token_row_;
  StepState::Field token_slot_;
};

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_STRATEGIES_SEQUENCE_TABLES_H_
