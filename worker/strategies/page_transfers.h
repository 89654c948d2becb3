// The copies that PageSwaps asks for: out on Stream::kDeviceToHost, in on Stream::kHostToDevice,
// with the events that order both against the steps that use the pages, and their bytes and time.
#ifndef KVSWEEP_WORKER_STRATEGIES_PAGE_TRANSFERS_H_
#define KVSWEEP_WORKER_STRATEGIES_PAGE_TRANSFERS_H_

#include <array>
#include <cstdint>
#include <vector>

#include "kernels/backend.h"
#include "worker/strategies/cache_strategy.h"
#include "worker/strategies/page_swaps.h"

namespace kvsweep {

class PageTransfers {
 public:
  struct Memory {
    std::byte* device = nullptr;  // page 0
    std::byte* host = nullptr;    // page 0
    std::byte* lists = nullptr;   // ListBytes, device
    int64_t page_bytes = 0;
    int32_t most_pages = 0;  // of one list
  };
  // For lists of at most `most_pages` pages: one of what leaves, one for each batch that comes.
  static constexpr uint64_t ListBytes(int32_t most_pages) {
    return (1 + PageSwaps::kMostBatches) * static_cast<uint64_t>(most_pages) * sizeof(PagePair);
  }

  // Borrows the backend and the memory.
  PageTransfers(Backend* backend, const Memory& memory);
  // Waits for what is under way.
  ~PageTransfers();
  PageTransfers(const PageTransfers&) = delete;
  PageTransfers& operator=(const PageTransfers&) = delete;

  // Before a step. The pages of what leaves are wanted in this very step: Stream::kCompute waits.
  void EnqueueOuts(PageSwaps* swaps);
  // After what else Stream::kCompute must do with pages before the step. Nobody waits.
  void EnqueueIns(PageSwaps* swaps);
  // Stream::kCompute waits for all batches under way: the step uses what they bring.
  void AwaitArrivals();
  // Something was enqueued that has not been seen to have ended.
  bool under_way() const { return out_under_way_ || begun_ > landed_; }
  // After the step has been waited for: how many batches have landed, the first ones.
  int32_t StepDone();

  void BeginMeasurement();
  // Bytes, and GB/s over the time between the events around the copies.
  void AddFigures(std::vector<CacheStrategy::Figure>* figures) const;

 private:
  // A list of pages on its way, and the events around its copy.
  struct Transfer {
    std::vector<PagePair> pairs;  // read by the device
    int32_t* list = nullptr;      // [pairs, 2], device
    Event begun;
    Event done;
  };
  struct Tally {
    int64_t pages = 0;
    double ns = 0;
  };

  Transfer MakeTransfer(int64_t index) const;
  void Enqueue(std::vector<PagePair> pairs, std::byte* target, const std::byte* source,
               Stream stream, Transfer* transfer);
  void Book(const Transfer& transfer, Tally* tally) const;
  Transfer& Batch(int64_t batch) {
    return ins_[static_cast<size_t>(batch % PageSwaps::kMostBatches)];
  }

  Backend* backend_;
  Memory memory_;
  Event ready_;  // Stream::kCompute has done what precedes a batch
  Transfer out_;
  std::array<Transfer, PageSwaps::kMostBatches> ins_;
  bool out_under_way_ = false;
  int64_t begun_ = 0;  // batches
  int64_t landed_ = 0;
  Tally out_tally_;
  Tally in_tally_;
};

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_STRATEGIES_PAGE_TRANSFERS_H_
