// InfiniGen: keys and values on the host, the few that matter prefetched by speculation (Lee et al.
// 2024, OSDI).
//
// The first n_full_layers layers attend to everything, streamed from the host through a ring of
// tiles (or resident on the device). For every later layer a thin skewed copy of the keys stays on
// the device; the input of the layer before predicts the scores, entries within alpha of the
// maximum are counted, and the best m of each KV head, m the mean count bounded by max_kv_ratio,
// are gathered from the host while the layer before still runs. infinigen_layout.h says where what
// lies.
//
// A bounded pool (capacity < 1) has C slots for each layer and KV head. A prompt, a full layer and
// fifo place tokens by a closed form; in the decode steps of speculating layers the device looks
// for the slot that was fetched least often or longest ago.
//
// Streams: the step forks from compute; speculation and selection run on kSpeculation, gathers and
// tiles on kHostToDevice, appends to the pool on kDeviceToHost; EndStep joins them all. A layer's
// tokens are appended after its attention, so nothing is overwritten that its step still reads.
#ifndef KVSWEEP_WORKER_STRATEGIES_INFINIGEN_H_
#define KVSWEEP_WORKER_STRATEGIES_INFINIGEN_H_

#include <array>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "proto/experiment.pb.h"
#include "worker/strategies/cache_strategy.h"
#include "worker/strategies/infinigen_diagnosis.h"
#include "worker/strategies/infinigen_layout.h"
#include "worker/strategies/infinigen_manager.h"
#include "worker/strategies/sequence_tables.h"
#include "worker/strategies/skewing.h"
#include "worker/strategies/tile_ring.h"

namespace kvsweep {

class InfinigenStrategy : public CacheStrategy {
 public:
  // Calibrates and skews through the context. Errors as of InfinigenLayoutOf and of the
  // calibration.
  static absl::StatusOr<std::unique_ptr<CacheStrategy>> Create(const Infinigen& parameters,
                                                               const StrategyContext& context);
  ~InfinigenStrategy() override;

  KvManager& manager() override { return manager_; }
  int32_t chunk_alignment() const override;
  // The staged gather needs the host in the middle of a step, and so does a diagnosis.
  bool capturable() const override { return !layout().staged() && !diagnosing_; }
  int32_t GraphKey(const StepView& step) const override;
  std::vector<int32_t> GraphKeys(int32_t decode_rows) const override;
  // The staged gather packs what the host has read; a request's own columns come to the host's
  // memory and go back from there.
  bool NeedsHost() const override { return layout().staged() || diagnosing_ || moves_columns_; }
  void BeginStep(const StepView& step) override;
  void MoveMemory(const StepView& step) override;
  void BeforeLayer(const StepView& step, int32_t layer, const Activations& x) override;
  void Attend(const StepView& step, int32_t layer, const AttentionInputs& inputs,
              const Activations& out) override;
  void EndStep(const StepView& step) override;
  void ReadBack(const StepView& step) override;
  void StepDone() override { moves_columns_ = false; }
  void BeginMeasurement() override;
  DecodeCounts CollectDecode(const StepView& step, size_t index,
                             std::span<double> attended_by_layer) override;
  int32_t PromptEvictions(const RequestShape& shape, int32_t tokens) const override;
  int32_t declared_full_layers() const override {
    return static_cast<int32_t>(layout().parameters.n_full_layers());
  }
  // Partial keys once, margins written once and read twice, and the weights of the partial query.
  double SelectionBytes(const MeanBatch& batch) const override;
  int32_t TokenBudget(const RequestShape& shape) const override;
  uint64_t ReadbackBytes(const StepView& step) const override;
  EngagementRule engagement_rule() const override;
  bool EngagementExpected(const RequestShape& shape, int32_t tokens) const override;
  // By layer: fetched_entries, mean over decode steps and KV heads; partial_columns, share of the
  // head dimension kept for speculation. With Diagnose: speculation_recall, covered_mass and
  // input_cosine (with the layer before).
  std::vector<Figure> Figures() const override;
  void Diagnose() override { diagnosing_ = true; }

  // Tests only: speculate from the layer's own input, known when it is too late to prefetch. Before
  // the first step.
  void UseOracleInput() { oracle_input_ = true; }
  // Tests only: what the host read after the last step.
  const InfinigenHostScratch& host_scratch() const { return host_scratch_; }

 private:
  // An event that orders streams inside one step; waiting before it was recorded in this step is no
  // wait, since steps are joined.
  struct StepEvent {
    Event event;
    bool recorded = false;
  };
  enum EventName {
    kFork,
    kInputReady,
    kKvReady,
    kSelected0,
    kSelected1,
    kGathered0,
    kGathered1,
    kAppended0,
    kAppended1,
    kEventCount
  };

  InfinigenStrategy(const InfinigenLayout& layout, const StrategyContext& context);
  absl::Status AllocateMemory();
  // Fills matrices and weights for speculation (infinigen_speculation.cc).
  absl::Status Skew(const Skewing& skewing);
  absl::Status SkewLayer(const LayerSkewing& skewing, int32_t layer,
                         std::span<const float> inverse_frequency);
  absl::Status PutThinProjection(int32_t layer, const std::vector<float>& queries,
                                 const LayerSkewing& skewing);
  absl::Status FoldLayer(const LayerSkewing& skewing, int32_t layer);
  absl::StatusOr<std::vector<float>> ReadFloats(const void* source, DType dtype, int64_t count);
  absl::Status Put(const std::vector<float>& values, DType dtype, void* target);

  const InfinigenLayout& layout() const { return manager_.layout(); }
  int32_t full_layers() const { return layout().full_layers; }
  // Index of a layer among the speculating ones.
  int64_t Index(int32_t layer) const { return layer - full_layers(); }
  bool IsResident(int32_t layer) const { return layout().resident() && layer < full_layers(); }
  SlotUse UseRule() const;

  KvView HostView(int32_t layer) const;
  KvView HostPartialView(int32_t layer) const;
  KvView PartialView(int32_t layer) const;
  KvView ResidentView(int32_t layer) const;
  KvView FetchView(int32_t layer) const;
  KvView HistoryView(int32_t layer) const;
  SlotView StateView(int32_t layer, int32_t which) const;  // 0: positions, 1: uses
  // Whether decode steps read layers from the host in tiles.
  bool loads_tiles() const { return full_layers() > 0 && !layout().resident(); }
  PartialAttention PartialFrom(int32_t row) const;
  int32_t* Selected(int32_t layer) const;
  int32_t* Chosen(int32_t layer) const;
  // Weights and activations at an element offset.
  static std::byte* At(std::byte* base, int64_t elements, DType dtype) {
    return base + elements * DTypeBytes(dtype);
  }

  void Record(EventName name, Stream stream);
  void Wait(EventName name, Stream stream);
  static EventName OfParity(EventName zero, int32_t layer) {
    return static_cast<EventName>(zero + layer % 2);
  }

  // What CollectDecode needs of a decode segment, whose request may be gone by then.
  struct Decoded {
    int32_t held = 0;  // slots
    bool evicts = false;
  };

  void PlaceSegment(const Segment& segment, int32_t row);
  void FillDecodeRow(const Segment& segment);
  void FillHistory(const StepView& step);
  void SaveOffloaded();
  void BringBack(const Segment& segment);
  void FoldQueriesAndKeys(const StepView& step, int32_t layer, const AttentionInputs& inputs);

  void SpeculateLayer(const StepView& step, int32_t layer, const Activations& x);
  void ProjectPartialQuery(const StepView& step, int32_t layer, const Activations& x);
  void PickColumns(int32_t layer, ProjectHeadsArgs* project) const;
  void GatherStaged(const StepView& step, int32_t layer);
  void RankRequestColumns(const StepView& step, int32_t layer, const AttentionInputs& inputs);
  void AppendLayer(const StepView& step, int32_t layer, const AttentionInputs& inputs);
  AppendArgs PartialAppend(const StepView& step, int32_t layer, const AttentionInputs& inputs);
  void AttendFull(const StepView& step, int32_t layer, const AttentionInputs& inputs,
                  const Activations& out);
  void AttendFetched(const StepView& step, int32_t layer, const AttentionInputs& inputs,
                     const Activations& out);
  void AttendPrefill(const Segment& segment, size_t index, int32_t layer,
                     const AttentionInputs& inputs, const Activations& out);
  void DiagnoseLayer(const StepView& step, int32_t layer, const AttentionInputs& inputs);
  std::vector<float> ReadKeys(RequestId request, int32_t layer, int32_t slots) const;
  std::vector<int32_t> ReadSelection(int32_t layer, int32_t row, int32_t head) const;
  size_t ColumnsOfRequest() const;
  uint64_t SelectedBytes(int32_t layers) const;

  StrategyContext context_;
  InfinigenManager manager_;
  SequenceTables tables_;  // host pages, lengths, where tokens go
  InfinigenArrays arrays_;
  std::byte* pages_ = nullptr;  // device
  std::byte* host_pages_ = nullptr;
  std::byte* scratch_memory_ = nullptr;
  std::byte* host_scratch_memory_ = nullptr;
  InfinigenScratch scratch_;
  InfinigenHostScratch host_scratch_;
  std::array<StepEvent, kEventCount> events_;
  std::optional<TileRing> ring_;  // once there is memory
  Activations input_[2];          // x of the last two layers, by parity
  AttentionPlan plan_;
  // A request's own columns, kept for its resume: [L - n][Hk, d'].
  std::map<RequestId, std::vector<int32_t>> columns_;
  bool moves_columns_ = false;                   // a step under way reads or writes columns_
  std::vector<int32_t> history_row_;             // by prefill segment of the step; -1: no history
  std::array<std::vector<Decoded>, 2> decoded_;  // by decode segment, by step parity
  bool oracle_input_ = false;
  bool diagnosing_ = false;
  std::vector<double> column_share_;  // by speculating layer
  LayerMeans fetched_;
  LayerMeans recall_;
  LayerMeans covered_;
  LayerMeans cosine_;
};

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_STRATEGIES_INFINIGEN_H_
