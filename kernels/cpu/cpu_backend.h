#ifndef KVSWEEP_KERNELS_CPU_CPU_BACKEND_H_
#define KVSWEEP_KERNELS_CPU_CPU_BACKEND_H_

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/cost.h"
#include "kernels/cpu/operation.h"
#include "kernels/cpu/stream_scheduler.h"
#include "kernels/cpu/workspace.h"

// The reference backend: numbers in f32 on the cores of this machine, streams and graphs as on a
// GPU, in an order that a seed repeats.
//
// What is enqueued runs inside Wait and WaitAll (stream_scheduler.h says in which order). Argument
// structs hold only values and pointers and are copied when enqueued or captured, so an argument by
// value is on every replay what it was in the capture, never what the caller's variable holds by
// then; a captured Copy must lie in memory of this backend, so no replay reads a caller's variable
// either. A scalar that varies from step to step and was baked into a graph therefore shows as a
// wrong number.
//
// After an operation has failed nothing more is computed until a Wait has returned the error.

namespace kvsweep {

struct CpuBackendOptions {
  int threads = 0;               // 0: one for each core
  bool batch_invariant = false;  // a row's result does not depend on the rows computed with it
  bool shuffle_streams = false;  // draw the order of the streams from stream_seed
  uint64_t stream_seed = 0;
  std::optional<DeviceProfile> modelled;  // keep modelled time for this machine
  // With modelled time: numbers of the model (weights, activations, keys and values) are not
  // computed, only what operations cost, and what decides on costs to come: selections, copies,
  // zeros. Memory is untouched where nothing is written, so machines larger than this one can be
  // modelled.
  bool costs_alone = false;
  uint64_t device_memory_bytes = 0;       // what Tier::kDevice may take; 0: no bound of our own
  uint64_t host_memory_bytes = 0;         // likewise for Tier::kHost
};

class CpuBackend : public Backend, private cpu::Executor, private cpu::MemoryMap {
 public:
  // REQUIRES: the processor has what the kernels were compiled for; CreateCpuBackend checks it.
  explicit CpuBackend(const CpuBackendOptions& options);
  ~CpuBackend() override;
  CpuBackend(const CpuBackend&) = delete;
  CpuBackend& operator=(const CpuBackend&) = delete;

  const BackendInfo& info() const override { return info_; }

  absl::StatusOr<std::byte*> Allocate(Tier tier, uint64_t bytes) override;
  void Free(std::byte* memory) override;
  uint64_t allocated_bytes(Tier tier) const override;

  Event CreateEvent() override { return scheduler_.CreateEvent(); }
  void RecordEvent(Event event, Stream stream) override { scheduler_.RecordEvent(event, stream); }
  void WaitEvent(Event event, Stream stream) override { scheduler_.WaitEvent(event, stream); }
  absl::Status Wait(Event event) override;
  absl::Status WaitAll() override;
  bool Reached(Event event) override;
  double ElapsedNs(Event from, Event to) const override;

  void BeginCapture() override { scheduler_.BeginCapture(); }
  absl::StatusOr<Graph> EndCapture() override { return scheduler_.EndCapture(); }
  void Launch(Graph graph) override { scheduler_.Launch(graph); }
  void DestroyGraph(Graph graph) override { scheduler_.DestroyGraph(graph); }

  int64_t modelled_ns() const override;

  void Enter(StepPart part) override { scheduler_.Enter(part); }
  void BeginProfile() override;
  void EndProfile() override;
  absl::StatusOr<std::vector<OperationTime>> TakeProfile() override;
  void SkipFetches(bool skip) override { skip_fetches_ = skip; }

  uint64_t link_bytes_to_device() const override { return link_bytes_to_device_; }
  uint64_t link_bytes_to_host() const override { return link_bytes_to_host_; }

  AttentionPlan PlanAttention(int32_t rows, int32_t max_tokens, int32_t kv_heads) const override;

  void Copy(void* target, const void* source, uint64_t bytes, Stream stream) override;
  void Zero(void* target, uint64_t bytes, Stream stream) override;

  void FillNormal(const FillNormalArgs& args, Stream stream) override { Enqueue(args, stream); }
  void Embed(const EmbedArgs& args, Stream stream) override { Enqueue(args, stream); }
  void Norm(const NormArgs& args, Stream stream) override { Enqueue(args, stream); }
  void Gemm(const GemmArgs& args, Stream stream) override { Enqueue(args, stream); }
  void SiluGate(const SiluGateArgs& args, Stream stream) override { Enqueue(args, stream); }
  void Rotary(const RotaryArgs& args, Stream stream) override { Enqueue(args, stream); }
  void TakeRows(const TakeRowsArgs& args, Stream stream) override { Enqueue(args, stream); }
  void Argmax(const ArgmaxArgs& args, Stream stream) override { Enqueue(args, stream); }
  void Append(const AppendArgs& args, Stream stream) override { Enqueue(args, stream); }
  void DecodeAttention(const DecodeAttentionArgs& args, Stream stream) override {
    Enqueue(args, stream);
  }
  void PrefillAttention(const PrefillAttentionArgs& args, Stream stream) override {
    Enqueue(args, stream);
  }
  void ColumnSum(const ColumnSumArgs& args, Stream stream) override { Enqueue(args, stream); }
  void PruneHeavy(const PruneHeavyArgs& args, Stream stream) override { Enqueue(args, stream); }
  void EvictHeavy(const EvictHeavyArgs& args, Stream stream) override { Enqueue(args, stream); }
  void RepeatHeads(const RepeatHeadsArgs& args, Stream stream) override { Enqueue(args, stream); }
  void ProjectHeads(const ProjectHeadsArgs& args, Stream stream) override { Enqueue(args, stream); }
  void RankColumns(const RankColumnsArgs& args, Stream stream) override { Enqueue(args, stream); }
  void Speculate(const SpeculateArgs& args, Stream stream) override { Enqueue(args, stream); }
  void SelectTop(const SelectTopArgs& args, Stream stream) override { Enqueue(args, stream); }
  void PlaceTokens(const PlaceTokensArgs& args, Stream stream) override { Enqueue(args, stream); }
  void GatherRows(const GatherRowsArgs& args, Stream stream) override { Enqueue(args, stream); }
  void CopyTile(const CopyTileArgs& args, Stream stream) override { Enqueue(args, stream); }
  void CopyBlocks(const CopyBlocksArgs& args, Stream stream) override { Enqueue(args, stream); }
  void AllReduce(const AllReduceArgs& args, Stream stream) override { Enqueue(args, stream); }

  // Cost of all operations run so far, link bytes both ways: what they had to move and compute at
  // least.
  const Cost& total_cost() const { return total_cost_; }

  // How often queues, tables, graphs and workspaces have had to allocate since the start; constant
  // after warm-up.
  int64_t growths() const;

 private:
  struct Allocation {
    std::byte* memory = nullptr;  // as the system gave it
    uint64_t bytes = 0;
    Tier tier = Tier::kDevice;
  };

  std::byte* Take(uint64_t bytes) const;  // nullptr: there is not so much
  void GiveBack(const Allocation& allocation) const;

  bool IsFetch(const cpu::Operation& operation) const;
  void Enqueue(const cpu::Operation& operation, Stream stream);
  double Execute(const cpu::Operation& operation) override;
  Tier TierOf(const void* pointer) const override;
  // The allocation that holds `pointer`, or nullptr.
  const Allocation* Find(const void* pointer) const;
  absl::Status TakeError();

  const CpuBackendOptions options_;
  BackendInfo info_;
  cpu::Context context_;
  cpu::StreamScheduler scheduler_;
  std::map<const std::byte*, Allocation> allocations_;  // by aligned address
  uint64_t allocated_bytes_[2] = {};                    // by tier
  Cost total_cost_;
  uint64_t link_bytes_to_device_ = 0;
  uint64_t link_bytes_to_host_ = 0;
  std::vector<OperationTime> times_;  // of a profile
  bool skip_fetches_ = false;
  absl::Status error_;  // of the first operation that failed since the last Wait
};

// FailedPrecondition, naming the feature, if this processor lacks what the kernels were compiled
// for; InvalidArgument for negative threads.
absl::StatusOr<std::unique_ptr<Backend>> CreateCpuBackend(const CpuBackendOptions& options);

}  // namespace kvsweep

#endif  // KVSWEEP_KERNELS_CPU_CPU_BACKEND_H_
