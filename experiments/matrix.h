// From an experiment to its rounds, by a mixed-radix counter: the number of trials is known before
// any is made, and round i can be made without its neighbours, so a matrix of a million trials
// takes the memory of its spec.
//
// Order (part of the contract, tested):
//   arms     in the order of the spec; an arm with a grid becomes the product of its axes, the last
//            axis fastest
//   cells    the product of sweep.grid's axes, the points of sweep.zip and the points of
//            sweep.list, the last fastest; one cell without a sweep
//   rounds   for each repeat, for each cell, for each group of arms; then the quality rounds
//   trials   the arms of the group and the reference, in an order drawn from the seed
// Repeats are outermost, so that a campaign that is cut short has something of every cell.
//
// A group is the reference arm and at most round_arms - 1 others, in the order of the arms.
// Differences are paired inside a round only.
//
// Seeds depend on arrivals.seed and the repeat, not on the cell or the arm: common random numbers.
//
// A quality trial is made once for each distinct question (arm, model, kv.dtype, quality block,
// backend), however many cells and repeats share it; it runs with ample memory of a fixed size, and
// the load trials name it by its content key.
#ifndef KVSWEEP_EXPERIMENTS_MATRIX_H_
#define KVSWEEP_EXPERIMENTS_MATRIX_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "experiments/files.h"
#include "proto/experiment.pb.h"

namespace kvsweep {

// Version of the method of measuring. A change that makes equal specs give other numbers bumps it;
// it is part of every content key and stands in every row.
inline constexpr uint32_t kMethodVersion = 1;

// One point of the sweep.
struct Cell {
  std::string name;  // "rate=4/s device_bytes=3MiB"; "-" without a sweep
  std::vector<std::pair<std::string, std::string>>
      values;  // dotted path, value in base units; in axis order
};

// A round, ready to be leased but for the ids of its trials, which the store gives.
struct PlannedRound {
  uint64_t index = 0;
  TrialSpec::Kind kind = TrialSpec::KIND_LOAD;
  uint64_t cell = 0;
  uint32_t repeat = 0;
  uint32_t group = 0;        // which part of the arms, when one round cannot hold them all
  RoundSpec spec;            // trials with content keys, trial_id unset
  std::vector<size_t> arms;  // index into arms() of each trial; equal in number to spec.trials
  std::vector<std::string>
      quality_keys;  // content key of each trial's quality trial; "" where there is none
};

class Matrix {
 public:
  // Expands `experiment` (which must have passed ValidateExperiment). InvalidArgument when an arm
  // or cell is not sound once its axes are applied, when names collide, or past the limit of trials
  // (with the count; nothing is expanded).
  static absl::StatusOr<Matrix> Create(const Experiment& experiment,
                                       const ExperimentInputs& inputs);

  const std::vector<Arm>& arms() const { return arms_; }  // expanded; defaults filled in
  size_t reference() const { return reference_; }         // index into arms()
  uint64_t cell_count() const { return cell_count_; }
  std::vector<Cell> cells() const;    // all of them
  Cell CellAt(uint64_t index) const;  // REQUIRES: index < cell_count()
  uint64_t repeats() const { return repeats_; }

  uint64_t round_count() const { return load_rounds() + quality_.size(); }
  uint64_t trial_count() const;

  // Round `index` in the documented order. REQUIRES: index < round_count(). Thread-safe.
  PlannedRound RoundAt(uint64_t index) const;

  // The complete spec of a trial, defaults filled in.
  TrialSpec LoadTrial(size_t arm, uint64_t cell, uint32_t repeat) const;
  TrialSpec QualityTrial(size_t arm, uint64_t cell) const;
  bool has_quality() const { return has_quality_; }

 private:
  Matrix() = default;
  uint64_t groups() const;
  uint64_t load_rounds() const { return repeats_ * cell_count_ * groups(); }
  std::vector<size_t> GroupArms(uint64_t group) const;
  // Which value each axis has in a cell.
  std::vector<size_t> ValueIndices(uint64_t cell) const;
  void SetAxes(const Sweep& sweep);
  TrialSpec BaseTrial(size_t arm, uint64_t cell) const;
  absl::Status ExpandArms(const Experiment& experiment);
  absl::Status CheckCombinations() const;
  void FindQualityTrials();

  Experiment experiment_;  // defaults filled in, arms and sweep removed
  ExperimentInputs inputs_;
  std::vector<Arm> arms_;
  std::vector<Axis> axes_;             // of the sweep
  std::vector<size_t> digit_of_axis_;  // those of zip share a digit of the cell's number, so do
                                       // those of list
  std::vector<uint64_t> radices_;      // by digit, the last fastest
  uint64_t cell_count_ = 1;
  size_t reference_ = 0;
  uint64_t repeats_ = 0;
  uint32_t round_arms_ = 0;
  bool has_quality_ = false;
  // (arm, cell) that first asks each distinct quality question.
  std::vector<std::pair<size_t, uint64_t>> quality_;
};

// The key under which a trial's result can be found again, 32 bytes: SHA-256 over the canonical
// form of `trial` with what cannot change a number removed (names, paths, the number of the repeat;
// seeds and digests stay) and kMethodVersion. What else a result depends on (runner's build,
// device) stands beside it in the store.
std::string ContentKey(const TrialSpec& trial);

// The three seeds of a repeat.
Seeds SeedsOfRepeat(uint64_t base_seed, uint32_t repeat);

// Whether the arm moves KV over the host link, by its strategy or by swapping, so that rounds with
// it keep the link to themselves.
bool UsesHostTier(const Arm& arm);

}  // namespace kvsweep

#endif  // KVSWEEP_EXPERIMENTS_MATRIX_H_
