#include "worker/strategies/tile_ring.h"

#include <algorithm>

#include "base/check.h"

namespace kvsweep {

int32_t RingTokens(int32_t least, int64_t most, uint64_t token_bytes, uint64_t device_bytes) {
  // 300 us of a PCIe 5.0 x16 link, of which a copy's start and end take about ten. Where the budget
  // is small, memory is dearer than that.
  constexpr uint64_t kTileBytes = uint64_t{16} << 20;
  constexpr uint64_t kSmallBudgetBytes = uint64_t{1} << 30;
  if (device_bytes <= kSmallBudgetBytes) return least;
  const auto tokens = std::min(most, static_cast<int64_t>(kTileBytes / token_bytes));
  return std::max(least, static_cast<int32_t>(tokens));
}

TileRing::TileRing(Backend* backend, std::byte* memory, DType dtype, int32_t tokens,
                   int32_t most_rows, int32_t heads, int32_t head_dim)
    : backend_(backend),
      memory_(memory),
      dtype_(dtype),
      tokens_(tokens),
      fixed_rows_(backend->info().batch_invariant ? most_rows : 0),
      heads_(heads),
      head_dim_(head_dim),
      fork_(backend->CreateEvent()) {
  for (Buffer& buffer : buffers_) {
    buffer.ready = backend->CreateEvent();
    buffer.free = backend->CreateEvent();
  }
}

int32_t TileRing::PaddedTiles(int32_t rows, int32_t tokens) const {
  return TileLadder(rows, tokens).back();
}

std::vector<int32_t> TileRing::TileLadder(int32_t rows, int32_t most_tokens) const {
  const int32_t tiles = (most_tokens + TileTokens(rows) - 1) / TileTokens(rows);
  std::vector<int32_t> ladder = {1};
  while (ladder.back() < tiles) ladder.push_back(ladder.back() + std::max(1, ladder.back() / 2));
  return ladder;
}

void TileRing::Fork() {
  backend_->RecordEvent(fork_, Stream::kCompute);
  backend_->WaitEvent(fork_, Stream::kHostToDevice);
  // What used the buffers before stands before the fork.
  for (Buffer& buffer : buffers_) buffer.used = false;
}

KvView TileRing::View(int buffer, int32_t tokens) const {
  const int64_t bytes = DTypeBytes(dtype_);
  const int64_t head = int64_t{tokens} * 2 * head_dim_;
  std::byte* key = memory_ + int64_t{buffer} * tokens_ * heads_ * 2 * head_dim_ * bytes;
  return {.key = key,
          .value = key + head_dim_ * bytes,
          .dtype = dtype_,
          .block_size = tokens,
          .block_stride = head * heads_,
          .token_stride = 2 * head_dim_,
          .head_stride = head};
}

KvView TileRing::Load(CopyTileArgs args) {
  current_ = 1 - current_;
  Buffer& buffer = buffers_[static_cast<size_t>(current_)];
  const bool whole = args.row >= 0;
  KVSWEEP_CHECK(whole || fixed_rows_ == 0 || args.rows <= fixed_rows_);
  KvView view = View(current_, whole ? WholeTokens() : TileTokens(args.rows));
  KVSWEEP_CHECK_LE(args.tokens, view.block_size);
  view.length = args.source.length;
  view.length_stride = args.source.length_stride;
  view.length_head_stride = args.source.length_head_stride;
  args.target = view;
  if (buffer.used) backend_->WaitEvent(buffer.free, Stream::kHostToDevice);
  backend_->CopyTile(args, Stream::kHostToDevice);
  backend_->RecordEvent(buffer.ready, Stream::kHostToDevice);
  backend_->WaitEvent(buffer.ready, Stream::kCompute);
  buffer.used = true;
  view.first_token = args.first_token;
  view.max_tokens = args.tokens;
  return view;
}

void TileRing::Free() {
  backend_->RecordEvent(buffers_[static_cast<size_t>(current_)].free, Stream::kCompute);
}

KvView TileRing::Nothing(const KvView& source) const {
  KvView view = View(0, WholeTokens());
  view.length = source.length;
  view.length_stride = source.length_stride;
  view.length_head_stride = source.length_head_stride;
  view.max_tokens = 0;
  return view;
}

}  // namespace kvsweep
