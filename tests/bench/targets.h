#ifndef KVSWEEP_TESTS_BENCH_TARGETS_H_
#define KVSWEEP_TESTS_BENCH_TARGETS_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "proto/experiment.pb.h"
#include "tests/bench/bench.h"
#include "tests/bench/results.h"

// The tables of the performance page, row by row: what is measured and what it is held against.

namespace kvsweep {

struct BenchRow {
  ResultRow row;  // name, what, target, peer; measuring fills in the rest
  std::function<absl::Status(Bench& bench, ResultRow* row)> measure;
};

// What the tables are about.
struct BenchSizes {
  std::string grouped = "llama-3.1-8b";  // grouped heads: steps, bursts, long contexts
  std::string plain = "opt-6.7b";        // as many KV heads as query heads: the offloading rows
  std::vector<std::string> shapes = {"opt-6.7b", "opt-13b", "llama-2-7b", "llama-3.1-8b"};
  std::vector<std::string> trained = {"experiments/models/books-llama-14m",
                                      "experiments/models/books-opt-16m"};
  int64_t shrink = 1;  // all batches and lengths are divided by it: to try the command on a CPU
};

// Kernels, whole steps, a burst, offloading, recording, long contexts: with their targets.
std::vector<BenchRow> TargetRows(const BenchSizes& sizes);
// Decode steps of model shapes over batches and contexts, without targets.
std::vector<BenchRow> ShapeRows(const BenchSizes& sizes);

// The arms of the offloading rows, all over prompts on the host or, of `h2o-device`, on the device.
struct OffloadArm {
  Arm arm;  // its name says what it is
  int64_t fetched = 0;
  double target = 0;  // share of the floor
};
std::vector<OffloadArm> OffloadArms(int64_t context, int64_t selected);

// One decode step of an arm: floor by its formula.
absl::Status TimeArmStep(Bench& bench, const std::string& model, const Arm& arm, int64_t rows,
                         int64_t context, int64_t fetched, bool real_prompts, ResultRow* row);
// A burst of equal requests: the ratio is measured over floor.
absl::Status TimeBurst(Bench& bench, const std::string& model, int64_t rows, int64_t input,
                       int64_t output, int64_t max_batched_tokens, ResultRow* row);
// The share of the transfer of an arm's step that compute hides, of what it could hide at most: by
// the same step without its fetches.
absl::Status TimeHidden(Bench& bench, const std::string& model, const Arm& arm, int64_t rows,
                        int64_t context, int64_t fetched, bool real_prompts, ResultRow* row);

}  // namespace kvsweep

#endif  // KVSWEEP_TESTS_BENCH_TARGETS_H_
