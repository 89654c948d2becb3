// Where InfiniGen's rows lie, as views: the same pages by other numbers.

#include <algorithm>

#include "worker/strategies/infinigen.h"

namespace kvsweep {

KvView InfinigenStrategy::HostView(int32_t layer) const {
  const int64_t bytes = DTypeBytes(context_.kv_dtype);
  const int32_t tokens = layout().page_tokens;
  const int64_t head = int64_t{tokens} * 2 * context_.shape.head_dim;
  std::byte* key = host_pages_ + int64_t{layer} * context_.shape.kv_heads * head * bytes;
  return {.key = key,
          .value = key + context_.shape.head_dim * bytes,
          .dtype = context_.kv_dtype,
          .block_size = tokens,
          .block_stride = static_cast<int64_t>(layout().host_page_bytes()) / bytes,
          .token_stride = 2 * context_.shape.head_dim,
          .head_stride = head,
          .block_table = tables_.pages(),
          .block_table_stride = tables_.max_pages(),
          .length = tables_.length()};
}

KvView InfinigenStrategy::PartialView(int32_t layer) const {
  const int64_t bytes = DTypeBytes(context_.kv_dtype);
  const int32_t tokens = layout().page_tokens;
  const int64_t head = int64_t{tokens} * layout().partial_dim;
  return {.key = pages_ + Index(layer) * context_.shape.kv_heads * head * bytes,
          .dtype = context_.kv_dtype,
          .block_size = tokens,
          .block_stride = static_cast<int64_t>(layout().page_bytes) / bytes,
          .token_stride = layout().partial_dim,
          .head_stride = head,
          .block_table = context_.step_state->Device(arrays_.slot_pages),
          .block_table_stride = layout().table_pages,
          .length = tables_.length()};
}

KvView InfinigenStrategy::HostPartialView(int32_t layer) const {
  const auto keys_and_values =
      static_cast<int64_t>(layout().key_value_token_bytes) * layout().page_tokens;
  KvView view = PartialView(layer);
  view.key = host_pages_ + keys_and_values + (view.key - pages_);
  view.block_stride =
      static_cast<int64_t>(layout().host_page_bytes()) / DTypeBytes(context_.kv_dtype);
  view.block_table = tables_.pages();
  view.block_table_stride = tables_.max_pages();
  return view;
}

KvView InfinigenStrategy::ResidentView(int32_t layer) const {
  const uint64_t before = layout().partial_token_bytes + layout().state_token_bytes;
  KvView view = HostView(layer);
  view.key =
      pages_ + before * static_cast<uint64_t>(layout().page_tokens) + (view.key - host_pages_);
  view.value = view.key + context_.shape.head_dim * DTypeBytes(context_.kv_dtype);
  view.block_stride = static_cast<int64_t>(layout().page_bytes) / DTypeBytes(context_.kv_dtype);
  view.block_table = context_.step_state->Device(arrays_.slot_pages);
  view.block_table_stride = layout().table_pages;
  return view;
}

SlotView InfinigenStrategy::StateView(int32_t layer, int32_t which) const {
  const int64_t tokens = layout().page_tokens;
  const int64_t of_layer = int64_t{context_.shape.kv_heads} * tokens;
  auto* base = reinterpret_cast<int32_t*>(pages_ + layout().partial_token_bytes *
                                                       static_cast<uint64_t>(tokens));
  return {.data = base + (which * int64_t{layout().speculating_layers()} + Index(layer)) * of_layer,
          .block_size = layout().page_tokens,
          .block_stride = static_cast<int64_t>(layout().page_bytes / sizeof(int32_t)),
          .head_stride = tokens,
          .block_table = context_.step_state->Device(arrays_.slot_pages),
          .block_table_stride = layout().table_pages};
}

// Rows of one layer in device pages, wherever their table stands.
KvView InfinigenStrategy::FetchView(int32_t layer) const {
  const int64_t bytes = DTypeBytes(context_.kv_dtype);
  const int32_t rows = layout().fetch_page_rows;
  return {.key = pages_,
          .value = pages_ + context_.shape.head_dim * bytes,
          .dtype = context_.kv_dtype,
          .block_size = rows,
          .block_stride = static_cast<int64_t>(layout().page_bytes) / bytes,
          .token_stride = 2 * context_.shape.head_dim,
          .head_stride = int64_t{rows} * 2 * context_.shape.head_dim,
          .block_table =
              context_.step_state->Device(arrays_.fetch_pages) + (layer % 2) * layout().fetch_pages,
          .block_table_stride = 2 * layout().fetch_pages,
          .length = Selected(layer),
          .length_stride = context_.shape.kv_heads,
          .length_head_stride = 1};
}

KvView InfinigenStrategy::HistoryView(int32_t layer) const {
  const int32_t first = layout().layers - layout().history_layers();
  KvView view = FetchView(layer);
  view.block_table = context_.step_state->Device(arrays_.history_pages) +
                     int64_t{layer - first} * layout().history_pages;
  view.block_table_stride = layout().history_layers() * layout().history_pages;
  view.length = nullptr;
  return view;
}

// Tiles that the longest decode row needs, rounded up to a ladder so that few graphs serve all
// lengths.
int32_t InfinigenStrategy::GraphKey(const StepView& step) const {
  if (step.decode_rows == 0 || !loads_tiles()) return 0;
  int32_t longest = 0;
  for (const Segment& segment : step.decode) {
    const RequestShape& shape = manager_.Shape(segment.request);
    longest = std::max(longest, layout().SlotsOf(segment.start_position, shape));
  }
  return ring_->PaddedTiles(step.decode_rows, longest);
}

std::vector<int32_t> InfinigenStrategy::GraphKeys(int32_t decode_rows) const {
  if (!loads_tiles()) return {0};
  return ring_->TileLadder(decode_rows, context_.max_context - 1);
}

PartialAttention InfinigenStrategy::PartialFrom(int32_t row) const {
  const int64_t head_rows = int64_t{row} * context_.shape.query_heads;
  return {.output = scratch_.partial.output + head_rows * context_.shape.head_dim,
          .maximum = scratch_.partial.maximum + head_rows,
          .sum = scratch_.partial.sum + head_rows};
}

int32_t* InfinigenStrategy::Selected(int32_t layer) const {
  return scratch_.selected + int64_t{layer} * context_.max_decode_rows * context_.shape.kv_heads;
}

int32_t* InfinigenStrategy::Chosen(int32_t layer) const {
  return scratch_.index + int64_t{layer % 2} * context_.max_decode_rows * context_.shape.kv_heads *
                              layout().fetch_limit;
}

}  // namespace kvsweep
