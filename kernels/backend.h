// The numbers' machine: two tiers of memory, four streams, events, graphs, and the operations that
// an engine with several KV-cache strategies needs, at the granularity at which a GPU is fast.
//
// All operations enqueue and return. Nothing is computed before somebody waits (CPU backend) or
// whenever the device gets to it (CUDA); an operation's error surfaces at the next Wait with the
// name of the first operation that failed. Argument structs are copied at the call, so what they
// hold by value is fixed there, in a captured graph for ever: all that varies from step to step
// must be read through a device pointer (step_state.h). Host pointers inside arguments (Copy) are
// read when the copy runs, not when it is enqueued.
//
// Ordering: operations of one stream run in the order they were enqueued; between streams only
// events order. The CPU backend chooses among all orders that the events allow by a seed, so a
// missing wait shows as a wrong number that a seed repeats.
//
// Padded rows: a decode batch is padded to a captured size. A padded row has row_active 0 (or a
// length of 0, or a block table row of -1, as each operation says); it is inert: it writes nothing
// outside its own activations, and no NaN comes of it.
//
// Threads: one engine thread calls a backend; it is not safe to share.
#ifndef KVSWEEP_KERNELS_BACKEND_H_
#define KVSWEEP_KERNELS_BACKEND_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/arguments.h"
#include "kernels/shapes.h"

namespace kvsweep {

enum class Stream : uint8_t { kCompute, kSpeculation, kHostToDevice, kDeviceToHost };
inline constexpr int kStreams = 4;

// A point in a stream; reusable. Waiting for an event that was never recorded returns at once.
struct Event {
  int32_t index = -1;
};

// A captured sequence of operations over all streams.
struct Graph {
  int32_t index = -1;
};

// What a step's time goes to, as whoever enqueues says it (Backend::Enter).
enum class StepPart : uint8_t {
  kNone,  // outside of steps
  kOther,
  kProjections,
  kSpeculation,
  kAttention,
  kMlp,
  kSampling
};

// When one operation ran (Backend::TakeProfile).
struct OperationTime {
  absl::string_view name;  // of the backend's function
  StepPart part = StepPart::kNone;
  Stream stream = Stream::kCompute;
  double begin_ns = 0;  // from an instant that one call of TakeProfile shares
  double end_ns = 0;
};

// --------------------------------------------------------------------------------------------------------------------
// interface

// What a backend says of itself.
struct BackendInfo {
  std::string backend;       // "cpu", "cuda"
  std::string device;        // name of the device
  std::string device_class;  // what must be equal for two results to compare
  std::string driver;
  std::string pci_address;  // of the device; empty: it is none on a bus
  std::string host_memory;  // where Tier::kHost lies, where that is a choice: for people
  bool beside_host = false;  // works while the host does something else, as soon as work is enqueued
  bool batch_invariant = false;  // a row's result does not depend on the rows computed with it
  uint64_t device_memory_bytes = 0;
  DType activation_dtype = DType::kF32;
  DType weight_dtype = DType::kF32;  // of matrices and embedding tables
};

class Backend {
 public:
  virtual ~Backend() = default;

  virtual const BackendInfo& info() const = 0;

  // Memory of a tier, aligned to 256 bytes, zeroed; freed by Free or with the backend.
  // ResourceExhausted with asked and available bytes.
  virtual absl::StatusOr<std::byte*> Allocate(Tier tier, uint64_t bytes) = 0;
  virtual void Free(std::byte* memory) = 0;
  // Bytes allocated now, as the backend itself counts them.
  virtual uint64_t allocated_bytes(Tier tier) const = 0;

  virtual Event CreateEvent() = 0;
  virtual void RecordEvent(Event event, Stream stream) = 0;
  // Later work of `stream` runs after what was enqueued before the event's latest record.
  virtual void WaitEvent(Event event, Stream stream) = 0;

  // Blocks the host until the event's latest record has been reached, or until all streams are
  // empty. Returns the first error of an operation that ran since the last Wait, with its name.
  virtual absl::Status Wait(Event event) = 0;
  virtual absl::Status WaitAll() = 0;

  // Whether the event's latest record has been reached, without waiting (true if it was never
  // recorded). On the CPU backend what stands before it is computed now, or, where a seed orders the
  // streams, perhaps later; in modelled time the answer is that of the instant at which the host's
  // last wait ended.
  virtual bool Reached(Event event) = 0;
  // Nanoseconds between the latest records of two events of one stream, both reached, on the device's
  // own clock (modelled in modelled time).
  virtual double ElapsedNs(Event from, Event to) const = 0;

  // Between the two, operations of all streams are recorded and not run. Capture begins and must
  // end on Stream::kCompute: streams that joined through events must be waited for before
  // EndCapture.
  virtual void BeginCapture() = 0;
  virtual absl::StatusOr<Graph> EndCapture() = 0;
  virtual void Launch(Graph graph) = 0;  // on Stream::kCompute
  virtual void DestroyGraph(Graph graph) = 0;

  // In modelled time: nanoseconds that all work waited for so far takes on the device profile,
  // streams overlapping as the events allow. 0 in real time.
  virtual int64_t modelled_ns() const = 0;

  // Bytes that copies between the tiers have moved so far, counted where they are moved.
  virtual uint64_t link_bytes_to_device() const = 0;
  virtual uint64_t link_bytes_to_host() const = 0;

  // What is enqueued from now on belongs to this part of a step: for profiles, here and in a profiler
  // that is attached.
  virtual void Enter(StepPart part) = 0;

  // From here to EndProfile it is noted when each operation runs, on the device's own clock (modelled
  // in modelled time); that takes time itself. Graphs are noted if they were captured in between.
  virtual void BeginProfile() = 0;
  virtual void EndProfile() = 0;
  // Waits for all work and returns the operations that ran since the last call, in any order. Of a
  // graph that was launched several times, the last launch alone.
  virtual absl::StatusOr<std::vector<OperationTime>> TakeProfile() = 0;
  // While on, gathers and copies of cached rows from host to device that are enqueued are left out,
  // and what would read the rows finds older ones: how long a step takes when all transfers are
  // hidden. For steps whose results nobody wants.
  virtual void SkipFetches(bool skip) = 0;

  // max_tokens: the longest view of the step; plain host value.
  virtual AttentionPlan PlanAttention(int32_t rows, int32_t max_tokens, int32_t kv_heads) const = 0;

  // Any tier to any tier. Host pointers may be ordinary memory; they must stay valid until the copy
  // has run.
  virtual void Copy(void* target, const void* source, uint64_t bytes, Stream stream) = 0;
  virtual void Zero(void* target, uint64_t bytes, Stream stream) = 0;
  virtual void FillNormal(const FillNormalArgs& args, Stream stream) = 0;

  virtual void Embed(const EmbedArgs& args, Stream stream) = 0;
  virtual void Norm(const NormArgs& args, Stream stream) = 0;
  virtual void Gemm(const GemmArgs& args, Stream stream) = 0;
  virtual void SiluGate(const SiluGateArgs& args, Stream stream) = 0;
  // Gemm and SiluGate in turn, unless a backend does them in one.
  virtual void GatedGemm(const GatedGemmArgs& args, Stream stream) {
    Gemm(args.product, stream);
    SiluGate({.out = args.gated,
              .in = args.product.out,
              .rows = args.product.rows,
              .columns = args.product.out_columns / 2},
             stream);
  }
  virtual void Rotary(const RotaryArgs& args, Stream stream) = 0;
  virtual void TakeRows(const TakeRowsArgs& args, Stream stream) = 0;
  virtual void Argmax(const ArgmaxArgs& args, Stream stream) = 0;
  virtual void Append(const AppendArgs& args, Stream stream) = 0;
  virtual void DecodeAttention(const DecodeAttentionArgs& args, Stream stream) = 0;
  // Append and DecodeAttention in turn, unless a backend does them in one.
  virtual void AppendAndAttend(const AppendAndAttendArgs& args, Stream stream) {
    Append(args.append, stream);
    DecodeAttention(args.attention, stream);
  }
  virtual void PrefillAttention(const PrefillAttentionArgs& args, Stream stream) = 0;
  virtual void ColumnSum(const ColumnSumArgs& args, Stream stream) = 0;
  virtual void PruneHeavy(const PruneHeavyArgs& args, Stream stream) = 0;
  virtual void EvictHeavy(const EvictHeavyArgs& args, Stream stream) = 0;
  virtual void RepeatHeads(const RepeatHeadsArgs& args, Stream stream) = 0;
  virtual void ProjectHeads(const ProjectHeadsArgs& args, Stream stream) = 0;
  virtual void RankColumns(const RankColumnsArgs& args, Stream stream) = 0;
  virtual void Speculate(const SpeculateArgs& args, Stream stream) = 0;
  virtual void SelectTop(const SelectTopArgs& args, Stream stream) = 0;
  virtual void PlaceTokens(const PlaceTokensArgs& args, Stream stream) = 0;
  virtual void GatherRows(const GatherRowsArgs& args, Stream stream) = 0;
  virtual void CopyTile(const CopyTileArgs& args, Stream stream) = 0;
  virtual void CopyBlocks(const CopyBlocksArgs& args, Stream stream) = 0;
  virtual void AllReduce(const AllReduceArgs& args, Stream stream) = 0;
};

}  // namespace kvsweep

#endif  // KVSWEEP_KERNELS_BACKEND_H_
