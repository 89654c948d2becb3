// InfiniGen's account: device pages for what stands for a token there (partial keys), for the rows
// fetched in a step and for the earlier chunks of a prompt; host pages for keys and values.
#ifndef KVSWEEP_WORKER_STRATEGIES_INFINIGEN_MANAGER_H_
#define KVSWEEP_WORKER_STRATEGIES_INFINIGEN_MANAGER_H_

#include <map>
#include <span>
#include <vector>

#include "worker/strategies/cache_strategy.h"
#include "worker/strategies/infinigen_layout.h"
#include "worker/strategies/page_pool.h"

namespace kvsweep {

class InfinigenManager : public KvManager {
 public:
  explicit InfinigenManager(const InfinigenLayout& layout);

  TierBytes FixedBytes() const override;
  TierBytes PeakBytes(const RequestShape& shape) const override;
  // Takes the first chunk's pages, the fetch buffers and, if the prompt goes on after this chunk,
  // its history's. Host pages are taken as the request grows, but admission counts on its peak:
  // what preemption would have to free is on the device.
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

  bool Holds(RequestId request) const { return held_.contains(request); }
  std::span<const PageIndex> SlotPages(RequestId request) const { return held_.at(request).slot; }
  std::span<const PageIndex> FetchPages(RequestId request) const { return held_.at(request).fetch; }
  std::span<const PageIndex> HistoryPages(RequestId request) const {
    return held_.at(request).history;
  }
  std::span<const PageIndex> HostPages(RequestId request) const { return held_.at(request).host; }
  const RequestShape& Shape(RequestId request) const { return held_.at(request).shape; }
  const InfinigenLayout& layout() const { return layout_; }

  // A device page that a preempted request gave up, and its host page: what slots remember must be
  // saved before anybody writes to the device page. Taken once; only where slots remember.
  struct Offload {
    PageIndex device = 0;
    PageIndex host = 0;
  };
  std::vector<Offload> TakeOffloads() { return std::exchange(offloads_, {}); }

 private:
  struct Held {
    RequestShape shape;
    std::vector<PageIndex> slot;
    std::vector<PageIndex> fetch;  // two buffers, used by layers in turn
    std::vector<PageIndex> history;
    std::vector<PageIndex> host;
    int32_t tokens = 0;
    bool prompt_ended = false;
    bool offloaded = false;
  };
  int32_t PeakHostPages(const RequestShape& shape) const;
  void GiveBackDevice(Held* held);

  InfinigenLayout layout_;
  PagePool device_;
  PagePool host_;
  int32_t committed_host_pages_ = 0;  // peaks of all held requests
  std::map<RequestId, Held> held_;
  std::vector<Offload> offloads_;
};

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_STRATEGIES_INFINIGEN_MANAGER_H_
