// InfiniGen: keys and values on the host, the few that matter prefetched by speculation (Lee et al.
// 2024, OSDI).
//
// The first n_full_layers layers attend to everything, streamed from the host through a ring of
// tiles. For every later layer a thin skewed copy of the keys stays on the device; the input of the
// layer before predicts the scores, entries within alpha of the maximum are counted, and the best m
// of each KV head, m the mean count bounded by max_kv_ratio, are gathered from the host while the
// layer before still runs.
//
// Memory. Device page: kPageTokens partial keys of all speculating layers, [L - n][Hk][tokens][d'];
// the same pages hold fetched rows, as many as fit, [Hk][rows][key, value][d]. Host page: as many
// tokens of all layers, [L][Hk][tokens][key, value][d], then a copy of the partial keys in the
// device's layout, so that a preempted request comes back bit-identical by plain copies.
//
// Streams: the step forks from compute; speculation and selection run on kSpeculation, gathers and
// tiles on kHostToDevice, appends to the pool on kDeviceToHost; EndStep joins them all.
#ifndef KVSWEEP_WORKER_STRATEGIES_INFINIGEN_H_
#define KVSWEEP_WORKER_STRATEGIES_INFINIGEN_H_

#include <array>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include "proto/experiment.pb.h"
#include "worker/strategies/cache_strategy.h"
#include "worker/strategies/page_pool.h"
#include "worker/strategies/sequence_tables.h"
#include "worker/strategies/skewing.h"

namespace kvsweep {

// Entries fetched at most for a request, layer and KV head (m_max).
int32_t InfinigenFetchLimit(const Infinigen& parameters, const RequestShape& shape);

// Device bytes = fixed + pages * page_bytes; host bytes likewise.
struct InfinigenLayout {
  Infinigen parameters;
  int32_t page_tokens = 16;
  int32_t fetch_page_rows = 0;       // fetched rows that fit a device page
  uint64_t partial_token_bytes = 0;  // partial keys of one token, all speculating layers
  uint64_t host_token_bytes = 0;     // keys, values and partial keys of one token, all layers
  uint64_t fixed_device_bytes = 0;
  uint64_t fixed_host_bytes = 0;
  int32_t pages = 0;
  int32_t host_pages = 0;
  uint64_t page_bytes() const { return partial_token_bytes * static_cast<uint64_t>(page_tokens); }
  uint64_t host_page_bytes() const { return host_token_bytes * static_cast<uint64_t>(page_tokens); }
};

class InfinigenManager : public KvManager {
 public:
  explicit InfinigenManager(const InfinigenLayout& layout);

  TierBytes FixedBytes() const override;
  TierBytes PeakBytes(const RequestShape& shape) const override;
  // Host pages are taken as the request grows, but admission counts on its peak: what preemption
  // would have to free is on the device.
  bool Admit(RequestId request, const RequestShape& shape, int32_t tokens) override;
  bool Grow(RequestId request, int32_t tokens) override;
  void EndPrompt(RequestId request) override;
  void Release(RequestId request) override;
  PreemptionMode preemption_mode() const override { return PreemptionMode::kOffload; }
  void Preempt(RequestId request) override;
  bool Resume(RequestId request, int32_t tokens) override;
  TierBytes ReservedBytes() const override;
  TierBytes LiveBytes() const override;
  TierBytes RequestBytes(RequestId request) const override;
  void CheckInvariants() const override;

  std::span<const PageIndex> PartialPages(RequestId request) const {
    return held_.at(request).partial;
  }
  std::span<const PageIndex> FetchPages(RequestId request) const { return held_.at(request).fetch; }
  std::span<const PageIndex> HostPages(RequestId request) const { return held_.at(request).host; }
  const RequestShape& Shape(RequestId request) const { return held_.at(request).shape; }
  const InfinigenLayout& layout() const { return layout_; }

 private:
  struct Held {
    RequestShape shape;
    std::vector<PageIndex> partial;
    std::vector<PageIndex> fetch;  // two buffers, used by layers in turn
    std::vector<PageIndex> host;
    int32_t tokens = 0;
    bool prompt_ended = false;
    bool offloaded = false;
  };
  int32_t FetchPageCount(const RequestShape& shape) const;
  int32_t PeakHostPages(const RequestShape& shape) const;

  InfinigenLayout layout_;
  PagePool device_;
  PagePool host_;
  int32_t committed_host_pages_ = 0;  // peaks of all held requests
  std::map<RequestId, Held> held_;
};

class InfinigenStrategy : public CacheStrategy {
 public:
  // Calibrates and skews through the context. InvalidArgument when the model has no layer beyond
  // the full ones.
  static absl::StatusOr<std::unique_ptr<CacheStrategy>> Create(const Infinigen& parameters,
                                                               const StrategyContext& context);
  ~InfinigenStrategy() override;

  KvManager& manager() override { return manager_; }
  int32_t GraphKey(const StepView& step) const override { return TileCount(step); }
  void BeginStep(const StepView& step) override;
  void BeforeLayer(const StepView& step, int32_t layer, const Activations& x) override;
  void Attend(const StepView& step, int32_t layer, const AttentionInputs& inputs,
              const Activations& out) override;
  void EndStep(const StepView& step) override;
  DecodeCounts CollectDecode(const StepView& step, size_t index,
                             std::span<double> attended_by_layer) override;
  int32_t TokenBudget(const RequestShape& shape) const override;
  uint64_t ReadbackBytes(const StepView& step) const override;
  EngagementRule engagement_rule() const override;
  bool EngagementExpected(const RequestShape& shape, int32_t tokens) const override;

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
    kTileReady0,
    kTileReady1,
    kTileFree0,
    kTileFree1,
    kAppended0,
    kAppended1,
    kEventCount
  };

  // Numbers per layer, sizes of buffers.
  struct Sizes {
    int32_t full_layers = 0;
    int32_t partial_dim = 0;  // d'
    int32_t fetch_limit = 0;  // largest m_max
    int32_t fetch_pages = 0;  // of one of the two buffers, at most
    int32_t ring_tokens = 0;  // tokens of one ring slot, all rows together
    int32_t table_pages = 0;  // pages of the longest request
  };
  struct Arrays {
    StepState::Field partial_pages;  // [rows, table_pages]
    StepState::Field fetch_pages;    // [decode rows, 2, fetch_pages]
    StepState::Field limit;          // [decode rows]
  };
  // Pieces of one device allocation.
  struct Scratch {
    float* query_matrix = nullptr;  // [L - n][Hk, d, d'], scaled; rotary models
    float* key_matrix = nullptr;    // [L - n][Hk, d, d']
    float* query_weight =
        nullptr;  // [L - n][Hq d', D], scaled and skewed; models without rotary positions
    float* query_bias = nullptr;         // [L - n][Hq d']
    std::byte* query = nullptr;          // [decode rows, Hq d], activations; rotary models
    std::byte* partial_query = nullptr;  // [decode rows, Hq d'], activations
    std::byte* partial_key = nullptr;    // 2 x [rows, Hk d'], activations
    float* margin = nullptr;             // [decode rows, Hk, max_context]
    int32_t* count = nullptr;            // [decode rows, Hk]
    int32_t* index = nullptr;            // 2 x [decode rows, Hk, fetch_limit]
    int32_t* selected = nullptr;         // [L, decode rows]
    PartialAttention partial;            // [rows]
    std::byte* ring = nullptr;           // 2 x [ring_tokens][Hk][key, value][d], KV dtype
  };

  InfinigenStrategy(const InfinigenLayout& layout, const StrategyContext& context,
                    const Sizes& sizes, SequenceTables tables, const Arrays& arrays);
  // Lays the scratch out from `base` (nullptr: only measures) and returns its bytes.
  static uint64_t LayOut(const StrategyContext& context, const Sizes& sizes, std::byte* base,
                         Scratch* scratch);
  absl::Status AllocateMemory();
  absl::Status Skew(const Skewing& skewing);

  int32_t Speculating() const { return context_.shape.layers - sizes_.full_layers; }
  KvView HostView(int32_t layer) const;
  KvView HostPartialView(int32_t layer) const;
  KvView PartialView(int32_t layer) const;
  KvView FetchView(int32_t layer) const;
  KvView RingView(int32_t ring_slot, int32_t rows) const;
  int32_t TileTokens(int32_t rows) const;
  int32_t TileCount(const StepView& step) const;
  PartialAttention PartialFrom(int32_t row) const;

  void Record(EventName name, Stream stream);
  void Wait(EventName name, Stream stream);
  static EventName OfParity(EventName zero, int32_t layer) {
    return static_cast<EventName>(zero + layer % 2);
  }

  void ResumePartialKeys(const Segment& segment);
  void SpeculateLayer(const StepView& step, int32_t layer, const Activations& x);
  void AppendLayer(const StepView& step, int32_t layer, const AttentionInputs& inputs);
  void AttendFull(const StepView& step, int32_t layer, const AttentionInputs& inputs,
                  const Activations& out);
  void AttendFetched(const StepView& step, int32_t layer, const AttentionInputs& inputs,
                     const Activations& out);
  void AttendPrefill(const Segment& segment, int32_t row, int32_t layer,
                     const AttentionInputs& inputs, const Activations& out);

  StrategyContext context_;
  InfinigenManager manager_;
  Sizes sizes_;
  SequenceTables tables_;  // host pages, lengths, where tokens go
  Arrays arrays_;
  std::byte* pages_ = nullptr;  // device
  std::byte* host_pages_ = nullptr;
  std::byte* scratch_memory_ = nullptr;
  Scratch scratch_;
  int32_t* selected_host_ = nullptr;  // [L, decode rows], pinned: read after the step
  std::array<StepEvent, kEventCount> events_;
  int32_t next_ring_slot_ = 0;
  Activations input_[2];  // x of the last two layers, by parity
  AttentionPlan plan_;
};

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_STRATEGIES_INFINIGEN_H_
