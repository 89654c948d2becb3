// What an arm takes of each tier before anything runs, for any shape of model and any budget: its
// own KV manager, made without a backend, is asked the questions that the batcher asks it. So the
// answer is the strategy's memory formula by construction; tests hold it to what the arenas really
// take.
#ifndef KVSWEEP_WORKER_STRATEGIES_MEMORY_MODEL_H_
#define KVSWEEP_WORKER_STRATEGIES_MEMORY_MODEL_H_

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "proto/experiment.pb.h"
#include "worker/strategies/cache_strategy.h"

namespace kvsweep {

// Rows that a batch of so many decode rows is padded to, so that captured steps can be replayed: 1,
// 2, 4, 8, then steps of 8.
int32_t PaddedDecodeRows(int32_t rows);

// What keys and values are stored as, for a model whose own format is `model_dtype`. A backend that
// computes in another format of the same width stores that: conversion would gain nothing (a model
// published in f16 whose keys are computed in bf16), and only such a cache takes the fast kernels.
DType KvDtype(const Kv& kv, DType model_dtype, DType activation_dtype);

// Bytes of one request along its life, fixed bytes not included.
struct RequestMemory {
  TierBytes prompt_peak;   // most, while its prompt is computed
  TierBytes after_prompt;  // once the prompt was pruned
  TierBytes at_end;        // with all its tokens
};

// Plain values; not thread-safe.
class MemoryModel {
 public:
  // `chunk_tokens`: tokens of a prompt's chunks. Errors as of the strategy: InvalidArgument for
  // parameters that the model cannot have, ResourceExhausted when fixed structures alone exceed the
  // budget.
  static absl::StatusOr<MemoryModel> Create(const Arm& arm, const StrategySizes& sizes,
                                            int32_t chunk_tokens);

  // Taken whatever runs.
  TierBytes fixed() const { return manager_->FixedBytes(); }
  // Taken by a request alone at its worst moment: what decides whether it can ever run.
  TierBytes PeakBytes(const RequestShape& shape) const { return manager_->PeakBytes(shape); }
  bool CanRun(const RequestShape& shape) const;

  // A request that runs alone. REQUIRES: CanRun(shape).
  RequestMemory Follow(const RequestShape& shape);

  // How many such requests are held at once, each with all its tokens, before the next finds no
  // memory or no sequence slot.
  int32_t FitAtOnce(const RequestShape& shape);

 private:
  MemoryModel(std::unique_ptr<KvManager> manager, const StrategySizes& sizes, int32_t chunk_tokens)
      : manager_(std::move(manager)), sizes_(sizes), chunk_tokens_(chunk_tokens) {}

  // Takes a request in and lets it have all its tokens; false: there was no memory, and it is gone
  // again.
  bool Hold(RequestId request, const RequestShape& shape, RequestMemory* memory);

  std::unique_ptr<KvManager> manager_;
  StrategySizes sizes_;
  int32_t chunk_tokens_ = 0;
};

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_STRATEGIES_MEMORY_MODEL_H_
