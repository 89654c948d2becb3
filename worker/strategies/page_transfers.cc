#include "worker/strategies/page_transfers.h"

#include <utility>

#include "base/check.h"
#include "base/planted_bug.h"

namespace kvsweep {

PageTransfers::PageTransfers(Backend* backend, const Memory& memory)
    : backend_(backend), memory_(memory), ready_(backend->CreateEvent()), out_(MakeTransfer(0)) {
  for (int64_t i = 0; i < PageSwaps::kMostBatches; ++i) Batch(i) = MakeTransfer(1 + i);
}

PageTransfers::~PageTransfers() {
  // An error of that work belongs to whoever waits for it.
  if (begun_ > landed_) backend_->WaitAll().IgnoreError();
}

PageTransfers::Transfer PageTransfers::MakeTransfer(int64_t index) const {
  Transfer transfer;
  transfer.list = reinterpret_cast<int32_t*>(memory_.lists) + 2 * index * memory_.most_pages;
  transfer.begun = backend_->CreateEvent();
  transfer.done = backend_->CreateEvent();
  return transfer;
}

void PageTransfers::Enqueue(std::vector<PagePair> pairs, std::byte* target, const std::byte* source,
                            Stream stream, Transfer* transfer) {
  KVSWEEP_CHECK_LE(static_cast<int64_t>(pairs.size()), int64_t{memory_.most_pages});
  transfer->pairs = std::move(pairs);
  backend_->RecordEvent(transfer->begun, stream);
  backend_->Copy(transfer->list, transfer->pairs.data(), transfer->pairs.size() * sizeof(PagePair),
                 stream);
  backend_->CopyBlocks({.target = target,
                        .source = source,
                        .pair = transfer->list,
                        .block_bytes = memory_.page_bytes,
                        .count = static_cast<int32_t>(transfer->pairs.size())},
                       stream);
  backend_->RecordEvent(transfer->done, stream);
}

void PageTransfers::EnqueueOuts(PageSwaps* swaps) {
  if (swaps->TakeGivenUp() && !BugPlanted("given_up_pages_not_awaited")) {
    AwaitArrivals();
    // Pages of the host that a batch reads may be given to what leaves now.
    if (begun_ > landed_) backend_->WaitEvent(Batch(begun_ - 1).done, Stream::kDeviceToHost);
  }
  std::vector<PagePair> outs = swaps->TakeOuts();
  if (outs.empty()) return;
  Enqueue(std::move(outs), memory_.host, memory_.device, Stream::kDeviceToHost, &out_);
  out_under_way_ = true;
  if (!BugPlanted("swap_out_not_awaited")) backend_->WaitEvent(out_.done, Stream::kCompute);
}

void PageTransfers::EnqueueIns(PageSwaps* swaps) {
  std::vector<PagePair> ins = swaps->TakeIns();
  if (ins.empty()) return;
  KVSWEEP_CHECK_LT(begun_ - landed_, PageSwaps::kMostBatches);
  // What comes may take pages that were read or copied just now.
  backend_->RecordEvent(ready_, Stream::kCompute);
  backend_->WaitEvent(ready_, Stream::kHostToDevice);
  Enqueue(std::move(ins), memory_.device, memory_.host, Stream::kHostToDevice, &Batch(begun_));
  ++begun_;
}

void PageTransfers::AwaitArrivals() {
  if (begun_ > landed_ && !BugPlanted("swap_in_not_awaited")) {
    backend_->WaitEvent(Batch(begun_ - 1).done, Stream::kCompute);
  }
}

int32_t PageTransfers::StepDone() {
  if (std::exchange(out_under_way_, false)) Book(out_, &out_tally_);
  int32_t landed = 0;
  for (; landed_ < begun_ && backend_->Reached(Batch(landed_).done); ++landed_, ++landed) {
    Book(Batch(landed_), &in_tally_);
  }
  return landed;
}

void PageTransfers::Book(const Transfer& transfer, Tally* tally) const {
  tally->pages += static_cast<int64_t>(transfer.pairs.size());
  tally->ns += backend_->ElapsedNs(transfer.begun, transfer.done);
}

void PageTransfers::BeginMeasurement() { out_tally_ = in_tally_ = {}; }

void PageTransfers::AddFigures(std::vector<CacheStrategy::Figure>* figures) const {
  const auto add = [&](const char* bytes, const char* rate, const Tally& tally) {
    const double moved = static_cast<double>(tally.pages) * static_cast<double>(memory_.page_bytes);
    figures->push_back({.name = bytes, .value = moved});
    if (tally.ns > 0) figures->push_back({.name = rate, .value = moved / tally.ns});
  };
  add("swapped_out_bytes", "swap_out_gb_per_s", out_tally_);
  add("swapped_in_bytes", "swap_in_gb_per_s", in_tally_);
}

}  // namespace kvsweep
