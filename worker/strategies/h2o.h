// H2O: heavy-hitter eviction (Zhang et al. 2023). Each layer and head keeps at most C = heavy +
// recent tokens: the most recent ones, and of the others those with the largest attention
// probability accumulated over all queries so far. What is evicted is gone.
//
// A page holds `page_tokens` slots of all evicting layers, for each layer
// [heads][key, value][slots][d], then scores (f32), original positions (i32) and, for rolling
// positions, ranks (i32), [heads][slots] each; with tier: host the keys and values lie in a host
// page of the same number. heads are the KV heads, or the query heads where each votes for itself.
// Layers that keep everything (full_layers) have pages of their own,
// [layer][Hk][key, value][tokens][d].
//
// During the prompt slots are in order of position. After it they are H2O's closed form: position
// p < heavy in slot p, a later recent one in slot heavy + ((p - heavy) mod recent), heavy hitters
// where recent ones were displaced (arguments.h: PruneHeavyArgs, EvictHeavyArgs).
//
// Rules of eviction: window_compare (the authors' real-drop code), slot_promote (their FlexGen
// program), current_only (TOVA: scores that do not last).
#ifndef KVSWEEP_WORKER_STRATEGIES_H2O_H_
#define KVSWEEP_WORKER_STRATEGIES_H2O_H_

#include <array>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "proto/experiment.pb.h"
#include "worker/strategies/cache_strategy.h"
#include "worker/strategies/h2o_manager.h"
#include "worker/strategies/page_transfers.h"
#include "worker/strategies/sequence_tables.h"
#include "worker/strategies/tile_ring.h"

namespace kvsweep {

class H2oStrategy : public CacheStrategy {
 public:
  // Errors as of H2oLayoutOf; ResourceExhausted too when the machine has not the memory.
  static absl::StatusOr<std::unique_ptr<CacheStrategy>> Create(const H2o& parameters,
                                                               const StrategyContext& context);
  ~H2oStrategy() override;

  KvManager& manager() override { return manager_; }
  // The column sums are formed over tiles of this many rows, so that chunks change no bit; where
  // each chunk's end evicts, chunks matter anyway.
  int32_t chunk_alignment() const override;
  int32_t GraphKey(const StepView& step) const override;
  std::vector<int32_t> GraphKeys(int32_t decode_rows) const override;
  void BeginStep(const StepView& step) override;
  // Swaps are ordered by the host.
  bool NeedsHost() const override;
  void MoveMemory(const StepView& step) override;
  void Attend(const StepView& step, int32_t layer, const AttentionInputs& inputs,
              const Activations& out) override;
  void EndStep(const StepView& /*step*/) override {}
  void StepDone() override;
  void BeginMeasurement() override;
  DecodeCounts CollectDecode(const StepView& step, size_t index,
                             std::span<double> attended_by_layer) override;
  int32_t PromptEvictions(const RequestShape& shape, int32_t tokens) const override;
  int32_t declared_full_layers() const override { return full_layers(); }
  // Probabilities and scores, each written and read, of all entries that have scores.
  double SelectionBytes(const MeanBatch& batch) const override;
  int32_t TokenBudget(const RequestShape& shape) const override;
  EngagementRule engagement_rule() const override;
  bool EngagementExpected(const RequestShape& shape, int32_t tokens) const override;
  std::vector<Figure> Figures() const override;

 private:
  // Arrays of the step state.
  struct Arrays {
    StepState::Field position;        // [decode rows], of the new token
    StepState::Field heavy;           // [decode rows]
    StepState::Field recent;          // [decode rows]
    StepState::Field cache_position;  // [rows], rolling positions: the place of the row's own key
  };
  struct Memory {
    std::byte* scratch = nullptr;
    std::byte* pages = nullptr;
    std::byte* host = nullptr;  // tier: host: keys and values; preemption: swap: victims' pages
  };

  H2oStrategy(const H2oLayout& layout, const StrategyContext& context, SequenceTables tables,
              std::optional<SequenceTables> full_tables, const Arrays& arrays);
  absl::Status AllocateMemory();

  const H2o& parameters() const { return manager_.layout().parameters; }
  bool on_host() const { return parameters().tier() == H2o::TIER_HOST; }
  bool rolling() const { return parameters().positions() == H2o::POSITIONS_ROLLING; }
  int32_t full_layers() const { return static_cast<int32_t>(parameters().full_layers()); }
  int32_t heads() const { return manager_.layout().heads; }
  int32_t HistorySlots(const Segment& segment) const;

  KvView View(int32_t layer) const;
  KvView FullView(int32_t layer) const;
  // The layer's scores (0), positions (1) or ranks (2).
  SlotView Numbers(int32_t layer, int64_t which) const;
  SlotView Ranks(int32_t layer) const;  // empty unless positions roll
  float* Floats(uint64_t offset) const;
  PartialAttention PartialFrom(int32_t row) const;
  int32_t LongestSlab(const StepView& step) const;  // slots of a decode row

  // Rotates, and repeats keys and values for each query head, as the layer's entries are stored.
  AttentionInputs Prepare(const StepView& step, const AttentionInputs& inputs);
  void AttendFullLayer(const StepView& step, int32_t layer, const AttentionInputs& inputs,
                       const Activations& out);
  void AttendDecode(const StepView& step, int32_t layer, const AttentionInputs& own,
                    const Activations& out);
  void AttendTiles(DecodeAttentionArgs call, const StepView& step, int32_t layer);
  void AttendPrefill(const Segment& segment, int32_t row, int32_t layer, const AttentionInputs& own,
                     const Activations& out);
  void AttendPrefillTiles(PrefillAttentionArgs call, const Segment& segment, int32_t row,
                          int32_t layer);
  void PruneChunk(const Segment& segment, int32_t row, int32_t layer);
  void AddColumnSums(const PrefillAttentionArgs& attention, int32_t row, int32_t layer);

  StrategyContext context_;
  H2oManager manager_;
  SequenceTables tables_;
  std::optional<SequenceTables> full_tables_;
  Arrays arrays_;
  HeavyScoring scoring_;
  Memory memory_;
  std::optional<TileRing> ring_;
  std::optional<PageTransfers> transfers_;
  AttentionPlan plan_;
  AttentionPlan full_plan_;
  std::array<std::vector<int32_t>, 2> decode_budget_;  // of each decode segment, by step parity
  int64_t evicted_ = 0;                                // tokens that left each evicting layer
  int64_t scores_updated_ = 0;  // by decode steps, of each head of each evicting layer
};

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_STRATEGIES_H2O_H_
