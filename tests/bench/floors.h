#ifndef KVSWEEP_TESTS_BENCH_FLOORS_H_
#define KVSWEEP_TESTS_BENCH_FLOORS_H_

#include <cstdint>
#include <string>

#include "kernels/cost.h"
#include "proto/experiment.pb.h"
#include "worker/engine/model_config.h"

// The least that whole steps must move and compute, by the strategies' traffic formulas: what a
// measured step is held against. Weights count once a step, keys and values as often as they are
// read; activations stay in the caches.

namespace kvsweep {

// What a step's traffic depends on.
struct StepShape {
  int64_t rows = 1;           // B
  double tokens = 0;          // stored tokens of each row, mean over the steps
  double element_bytes = 2;   // of weights and activations
  double kv_bytes = 2;        // of a stored key or value element
  double fetched_tokens = 0;  // InfiniGen: entries fetched for a row, layer and head
};

// Weights that a decode step reads: all matrices, of the embedding table one row a token.
double StepWeights(const ModelConfig& model);
// Keys and values of one token in all layers, in elements.
double TokenElements(const ModelConfig& model);

// One decode step under an arm: paged, h2o (either tier) or infinigen (either fetch). REQUIRES: the
// arm is one of these, with its parameters complete. link_bytes are those to the device, the larger
// direction.
Cost DecodeFloor(const ModelConfig& model, const Arm& arm, const StepShape& shape);

// Prompts of `rows` requests of `input` tokens each, and the first token of each: operations.
Cost PromptFloor(const ModelConfig& model, int64_t rows, int64_t input, double element_bytes);

// Nanoseconds of a cost at measured limits, and the limit that decides ("read", "link", "matrix").
double FloorNs(const Cost& cost, const DeviceProfile& limits, std::string* bound);

// Nanoseconds of `rows` requests that all arrive at once, each of `input` and `output` tokens:
// their prompts at the matrix rate, then decode steps of all of them at the read bandwidth.
double BurstFloorNs(const ModelConfig& model, int64_t rows, int64_t input, int64_t output,
                    double element_bytes, const DeviceProfile& limits);

// What is hidden of a transfer that runs beside compute: the step takes step_ns, the same step with
// the host's memory on the device compute_ns, the bytes alone link_ns. The share of the transfer
// that does not lengthen the step, and the same of what could be hidden at most.
struct HiddenTransfer {
  double of_transfer = 0;
  double of_possible = 0;
};
HiddenTransfer HiddenShare(double step_ns, double compute_ns, double link_ns);

}  // namespace kvsweep

#endif  // KVSWEEP_TESTS_BENCH_FLOORS_H_
