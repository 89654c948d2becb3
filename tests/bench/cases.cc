#include "tests/bench/cases.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "base/check.h"
#include "base/random.h"
#include "base/status_macros.h"

namespace kvsweep {

// -------------------------------------------------------------------------------------------- axes

void Point::Set(const std::string& name, int64_t value) { values_.emplace_back(name, value); }

int64_t Point::at(absl::string_view name) const {
  for (const auto& [axis, value] : values_) {
    if (axis == name) return value;
  }
  KVSWEEP_CHECK(false) << "no axis " << name;
  return 0;
}

std::vector<Point> Expand(const std::vector<BenchAxis>& axes) {
  std::vector<Point> points(1);
  for (const BenchAxis& axis : axes) {
    std::vector<Point> more;
    for (const Point& point : points) {
      for (const int64_t value : axis.values) {
        more.push_back(point);
        more.back().Set(axis.name, value);
      }
    }
    points = std::move(more);
  }
  return points;
}

absl::StatusOr<BenchAxis> ParseAxis(absl::string_view text) {
  const absl::Status wrong = absl::InvalidArgumentError(
      absl::StrCat("axis '", text, "': expected NAME=[NUMBER,...], such as B=[1,8,32]"));
  const size_t equals = text.find('=');
  if (equals == absl::string_view::npos || equals == 0) return wrong;
  absl::string_view list = text.substr(equals + 1);
  if (absl::ConsumePrefix(&list, "[")) absl::ConsumeSuffix(&list, "]");
  BenchAxis axis{.name = std::string(text.substr(0, equals)), .values = {}};
  for (absl::string_view item : absl::StrSplit(list, ',')) {
    int64_t value = 0;
    if (!absl::SimpleAtoi(item, &value)) return wrong;
    axis.values.push_back(value);
  }
  return axis;
}

std::string FormatAxes(const std::vector<BenchAxis>& axes) {
  return absl::StrJoin(axes, " ", [](std::string* text, const BenchAxis& axis) {
    absl::StrAppend(text, axis.name, "=[", absl::StrJoin(axis.values, ","), "]");
  });
}

absl::Status CheckAxes(const std::vector<BenchAxis>& given, const std::vector<BenchAxis>& axes) {
  std::vector<std::string> names;
  for (const BenchAxis& axis : axes) {
    if (std::ranges::find(names, axis.name) == names.end()) names.push_back(axis.name);
  }
  for (const BenchAxis& axis : given) {
    if (std::ranges::find(names, axis.name) != names.end()) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("no axis '", axis.name, "' here; there are ", absl::StrJoin(names, ", ")));
  }
  return absl::OkStatus();
}

// ------------------------------------------------------------------------------------------ memory

CaseMemory::~CaseMemory() {
  KVSWEEP_CHECK_OK(backend_.WaitAll());
  for (std::byte* memory : held_) backend_.Free(memory);
}

absl::StatusOr<std::byte*> CaseMemory::Room(uint64_t bytes, Tier tier) {
  ASSIGN_OR_RETURN(std::byte* const memory, backend_.Allocate(tier, bytes));
  held_.push_back(memory);
  return memory;
}

absl::StatusOr<std::byte*> CaseMemory::Normal(int64_t count, DType dtype, Tier tier,
                                              float deviation) {
  ASSIGN_OR_RETURN(std::byte* const memory, Room(count * DTypeBytes(dtype), tier));
  backend_.FillNormal(
      {.out = memory, .dtype = dtype, .count = count, .seed = held_.size(), .deviation = deviation},
      Stream::kCompute);
  return memory;
}

int ColdSets(double bytes) {
  constexpr double kColdBytes = 512.0 * (1 << 20);
  return static_cast<int>(std::clamp(std::ceil(kColdBytes / bytes), 2.0, 256.0));
}

DType BenchKvType(Backend& backend) { return backend.info().activation_dtype; }

absl::StatusOr<BenchView> MakeBenchView(CaseMemory& memory, int64_t rows, int64_t tokens,
                                        int64_t room, int64_t kv_heads, int64_t head_dim,
                                        int64_t page, Tier tier, bool with_values, uint64_t seed) {
  BenchView made;
  KvView& view = made.view;
  view.dtype = BenchKvType(memory.backend());
  view.block_size = static_cast<int32_t>(page);
  // A head's values lie behind its keys: on the device those of a block, on the host of a token.
  const int64_t parts = with_values ? 2 : 1;
  const int64_t together = tier == Tier::kHost ? 1 : page;  // tokens whose keys are in a row
  view.token_stride = tier == Tier::kHost ? kv_heads * parts * head_dim : head_dim;
  view.head_stride = parts * together * head_dim;
  view.block_stride = parts * page * kv_heads * head_dim;
  const int64_t blocks_of_row = (tokens + room + page - 1) / page;
  view.block_table_stride = static_cast<int32_t>(blocks_of_row);
  std::vector<int32_t> table(rows * blocks_of_row);
  std::iota(table.begin(), table.end(), 0);
  Random random(seed);
  random.Shuffle(std::span<int32_t>(table));
  ASSIGN_OR_RETURN(view.block_table, memory.Values(table));
  ASSIGN_OR_RETURN(view.length,
                   memory.Values(std::vector<int32_t>(rows, static_cast<int32_t>(tokens))));
  const int64_t elements = rows * blocks_of_row * view.block_stride;
  ASSIGN_OR_RETURN(view.key, memory.Normal(elements, view.dtype, tier));
  if (with_values) view.value = view.key + together * head_dim * DTypeBytes(view.dtype);
  made.entry_bytes = static_cast<double>((with_values ? 2 : 1) * head_dim * DTypeBytes(view.dtype));
  return made;
}

namespace {

absl::StatusOr<Activations> Rows(CaseMemory& memory, int64_t rows, int64_t columns) {
  ASSIGN_OR_RETURN(std::byte* const data,
                   memory.Normal(rows * columns, memory.backend().info().activation_dtype));
  return Activations{.data = data, .stride = columns};
}

double ElementBytes(CaseMemory& memory) {
  return static_cast<double>(DTypeBytes(memory.backend().info().activation_dtype));
}

// ----------------------------------------------------------------------------------------- kernels

absl::StatusOr<PreparedCase> PrepareDecode(CaseMemory& memory, const Point& point) {
  Backend& backend = memory.backend();
  const int64_t rows = point.at("B");
  const int64_t tokens = point.at("context");
  const int64_t kv_heads = point.at("Hk");
  const int64_t d = point.at("d");
  DecodeAttentionArgs args;
  args.rows = static_cast<int32_t>(rows);
  args.query_heads = static_cast<int32_t>(point.at("Hq"));
  args.kv_heads = static_cast<int32_t>(kv_heads);
  args.head_dim = static_cast<int32_t>(d);
  args.scale = 1.0f / std::sqrt(static_cast<float>(d));
  ASSIGN_OR_RETURN(args.query, Rows(memory, rows, args.query_heads * d));
  ASSIGN_OR_RETURN(args.current_key, Rows(memory, rows, kv_heads * d));
  ASSIGN_OR_RETURN(args.current_value, Rows(memory, rows, kv_heads * d));
  ASSIGN_OR_RETURN(args.out, Rows(memory, rows, args.query_heads * d));
  args.plan = backend.PlanAttention(args.rows, static_cast<int32_t>(tokens + 1), args.kv_heads);
  if (point.at("splits") > 0) {
    args.plan.splits = static_cast<int32_t>(point.at("splits"));
    args.plan.split_tokens = static_cast<int32_t>(
        ((tokens + 1 + args.plan.splits - 1) / args.plan.splits + 63) / 64 * 64);
  }
  if (point.at("probability") != 0) {
    args.probability_stride = tokens + 4;
    ASSIGN_OR_RETURN(std::byte* const room,
                     memory.Room(rows * args.query_heads * args.probability_stride * 4));
    args.probability = reinterpret_cast<float*>(room);
  }
  PreparedCase prepared;
  const int64_t page = point.at("page") == 0 ? tokens : point.at("page");
  const double bytes = static_cast<double>(rows * kv_heads * tokens * 2 * d) *
                       static_cast<double>(DTypeBytes(BenchKvType(backend)));
  prepared.sets = ColdSets(bytes);
  std::vector<KvView> views;
  for (int set = 0; set < prepared.sets; ++set) {
    ASSIGN_OR_RETURN(const BenchView view,
                     MakeBenchView(memory, rows, tokens, 0, kv_heads, d, page, Tier::kDevice, true,
                                   static_cast<uint64_t>(set)));
    views.push_back(view.view);
  }
  args.view = views[0];
  prepared.cost = DecodeAttentionCost(args, rows * kv_heads * tokens, ElementBytes(memory), false);
  prepared.enqueue = [&backend, args, views](int i) mutable {
    args.view = views[i % views.size()];
    backend.DecodeAttention(args, Stream::kCompute);
  };
  return prepared;
}

absl::StatusOr<PreparedCase> PreparePrefill(CaseMemory& memory, const Point& point, bool sums) {
  Backend& backend = memory.backend();
  const int64_t rows = point.at("rows");
  const int64_t history = point.at("history");
  const int64_t query_heads = point.at("Hq");
  const int64_t kv_heads = point.at("Hk");
  const int64_t d = point.at("d");
  const float scale = 1.0f / std::sqrt(static_cast<float>(d));
  ASSIGN_OR_RETURN(const BenchView view, MakeBenchView(memory, 1, history + rows, 0, kv_heads, d,
                                                       point.at("page"), Tier::kDevice, true, 1));
  PrefillAttentionArgs args;
  ASSIGN_OR_RETURN(args.query, Rows(memory, rows, query_heads * d));
  ASSIGN_OR_RETURN(args.chunk_key, Rows(memory, rows, kv_heads * d));
  ASSIGN_OR_RETURN(args.chunk_value, Rows(memory, rows, kv_heads * d));
  ASSIGN_OR_RETURN(args.out, Rows(memory, rows, query_heads * d));
  ASSIGN_OR_RETURN(std::byte* const sums_of_rows, memory.Room(rows * query_heads * 4));
  args.log_sum_exp = reinterpret_cast<float*>(sums_of_rows);
  args.history = view.view;
  args.history_tokens = static_cast<int32_t>(history);
  args.rows = static_cast<int32_t>(rows);
  args.query_heads = static_cast<int32_t>(query_heads);
  args.kv_heads = static_cast<int32_t>(kv_heads);
  args.head_dim = static_cast<int32_t>(d);
  args.scale = scale;
  PreparedCase prepared;
  if (!sums) {
    prepared.cost = PrefillAttentionCost(args, ElementBytes(memory), false);
    prepared.enqueue = [&backend, args](int) { backend.PrefillAttention(args, Stream::kCompute); };
    return prepared;
  }
  ColumnSumArgs column;
  column.query = args.query;
  column.log_sum_exp = args.log_sum_exp;
  column.keys = view.view;
  column.history_tokens = args.history_tokens;
  column.rows = args.rows;
  column.query_heads = args.query_heads;
  column.kv_heads = args.kv_heads;
  column.head_dim = args.head_dim;
  column.scale = scale;
  column.score.block_size = view.view.block_size;
  column.score.block_stride = view.view.block_size * kv_heads;
  column.score.head_stride = view.view.block_size;
  column.score.block_table = view.view.block_table;
  column.score.block_table_stride = view.view.block_table_stride;
  ASSIGN_OR_RETURN(std::byte* const scores, memory.Room(int64_t{view.view.block_table_stride} *
                                                        column.score.block_stride * 4));
  column.score.data = scores;
  prepared.cost = ColumnSumCost(column, ElementBytes(memory));
  prepared.enqueue = [&backend, column](int) { backend.ColumnSum(column, Stream::kCompute); };
  return prepared;
}

absl::StatusOr<PreparedCase> PrepareEvict(CaseMemory& memory, const Point& point) {
  Backend& backend = memory.backend();
  const int64_t rows = point.at("B");
  const int64_t budget = point.at("budget");
  const int64_t heads = point.at("Hk");
  const int64_t group = point.at("group");
  const int64_t d = point.at("d");
  ASSIGN_OR_RETURN(const BenchView view,
                   MakeBenchView(memory, rows, budget, 1, heads, d, 16, Tier::kDevice, true, 1));
  EvictHeavyArgs args;
  args.view = view.view;
  SlotView slots{.block_size = view.view.block_size,
                 .block_stride = view.view.block_size * heads,
                 .head_stride = view.view.block_size,
                 .block_table = view.view.block_table,
                 .block_table_stride = view.view.block_table_stride};
  const int64_t count = rows * view.view.block_table_stride * slots.block_stride;
  ASSIGN_OR_RETURN(slots.data, memory.Normal(count, DType::kF32));
  args.score = slots;
  ASSIGN_OR_RETURN(slots.data, memory.Room(count * 4));
  args.slot_position = slots;
  args.probability_stride = budget + 4;
  ASSIGN_OR_RETURN(std::byte* const probability,
                   memory.Normal(rows * heads * group * args.probability_stride, DType::kF32,
                                 Tier::kDevice, 0.001f));
  args.probability = reinterpret_cast<float*>(probability);
  ASSIGN_OR_RETURN(args.key, Rows(memory, rows, heads * d));
  ASSIGN_OR_RETURN(args.value, Rows(memory, rows, heads * d));
  const auto all = [&](int64_t value) {
    return memory.Values(std::vector<int32_t>(rows, static_cast<int32_t>(value)));
  };
  ASSIGN_OR_RETURN(args.position, all(2 * budget));
  ASSIGN_OR_RETURN(args.heavy, all(budget / 2));
  ASSIGN_OR_RETURN(args.recent, all(budget - budget / 2));
  args.rows = static_cast<int32_t>(rows);
  args.query_heads = static_cast<int32_t>(heads * group);
  args.kv_heads = static_cast<int32_t>(heads);
  args.head_dim = static_cast<int32_t>(d);
  PreparedCase prepared;
  prepared.cost =
      EvictHeavyCost(args, rows * heads * budget, rows, rows, ElementBytes(memory), false);
  prepared.enqueue = [&backend, args](int) { backend.EvictHeavy(args, Stream::kCompute); };
  return prepared;
}

// Speculation and selection of one layer together.
absl::StatusOr<PreparedCase> PrepareSpeculate(CaseMemory& memory, const Point& point) {
  Backend& backend = memory.backend();
  const int64_t rows = point.at("B");
  const int64_t tokens = point.at("context");
  const int64_t kv_heads = point.at("Hk");
  const int64_t query_heads = point.at("Hq");
  const int64_t d = point.at("partial");
  SpeculateArgs speculate;
  speculate.rows = static_cast<int32_t>(rows);
  speculate.query_heads = static_cast<int32_t>(query_heads);
  speculate.kv_heads = static_cast<int32_t>(kv_heads);
  speculate.partial_dim = static_cast<int32_t>(d);
  speculate.margin_stride = tokens;
  ASSIGN_OR_RETURN(std::byte* const margin, memory.Room(rows * kv_heads * tokens * 4));
  ASSIGN_OR_RETURN(std::byte* const count, memory.Room(rows * kv_heads * 4));
  speculate.margin = reinterpret_cast<float*>(margin);
  speculate.count = reinterpret_cast<int32_t*>(count);
  ASSIGN_OR_RETURN(speculate.query, Rows(memory, rows, query_heads * d));
  SelectTopArgs select;
  select.rows = speculate.rows;
  select.kv_heads = speculate.kv_heads;
  select.margin = speculate.margin;
  select.margin_stride = tokens;
  select.count = speculate.count;
  select.index_stride = std::max<int64_t>(1, tokens / 5);
  ASSIGN_OR_RETURN(std::byte* const index, memory.Room(rows * kv_heads * select.index_stride * 4));
  ASSIGN_OR_RETURN(std::byte* const selected, memory.Room(rows * kv_heads * 4));
  select.index = reinterpret_cast<int32_t*>(index);
  select.selected = reinterpret_cast<int32_t*>(selected);
  ASSIGN_OR_RETURN(select.length,
                   memory.Values(std::vector<int32_t>(rows, static_cast<int32_t>(tokens))));
  ASSIGN_OR_RETURN(select.limit, memory.Values(std::vector<int32_t>(
                                     rows, static_cast<int32_t>(select.index_stride))));
  PreparedCase prepared;
  prepared.sets = ColdSets(static_cast<double>(rows * kv_heads * tokens * d) *
                           static_cast<double>(DTypeBytes(BenchKvType(backend))));
  std::vector<KvView> views;
  for (int set = 0; set < prepared.sets; ++set) {
    ASSIGN_OR_RETURN(const BenchView view,
                     MakeBenchView(memory, rows, tokens, 0, kv_heads, d, 16, Tier::kDevice, false,
                                   static_cast<uint64_t>(set)));
    views.push_back(view.view);
  }
  speculate.partial_key = views[0];
  prepared.cost = SpeculateCost(speculate, rows * kv_heads * tokens, ElementBytes(memory));
  prepared.cost += SelectTopCost(select, rows * kv_heads * tokens);
  prepared.enqueue = [&backend, speculate, select, views](int i) mutable {
    speculate.partial_key = views[i % views.size()];
    backend.Speculate(speculate, Stream::kCompute);
    backend.SelectTop(select, Stream::kCompute);
  };
  return prepared;
}

absl::StatusOr<PreparedCase> PrepareGather(CaseMemory& memory, const Point& point) {
  Backend& backend = memory.backend();
  const int64_t rows = point.at("B");
  const int64_t tokens = point.at("context");
  const int64_t selected = point.at("selected");
  const int64_t heads = point.at("Hk");
  const int64_t d = point.at("d");
  ASSIGN_OR_RETURN(const BenchView source,
                   MakeBenchView(memory, rows, tokens, 0, heads, d, 64, Tier::kHost, true, 1));
  ASSIGN_OR_RETURN(const BenchView target,
                   MakeBenchView(memory, rows, selected, 0, heads, d, 16, Tier::kDevice, true, 2));
  GatherRowsArgs args;
  args.source = source.view;
  args.target = target.view;
  args.rows = static_cast<int32_t>(rows);
  args.kv_heads = static_cast<int32_t>(heads);
  args.head_dim = static_cast<int32_t>(d);
  args.index_stride = selected;
  std::vector<int32_t> index;
  Random random(3);
  for (int64_t pair = 0; pair < rows * heads; ++pair) {
    std::vector<int32_t> order(tokens);
    std::iota(order.begin(), order.end(), 0);
    random.Shuffle(std::span<int32_t>(order));
    std::sort(order.begin(), order.begin() + selected);
    index.insert(index.end(), order.begin(), order.begin() + selected);
  }
  ASSIGN_OR_RETURN(args.index, memory.Values(index));
  ASSIGN_OR_RETURN(args.selected, memory.Values(std::vector<int32_t>(
                                      rows * heads, static_cast<int32_t>(selected))));
  PreparedCase prepared;
  prepared.cost = CopyCost(
      static_cast<uint64_t>(static_cast<double>(rows * heads * selected) * source.entry_bytes),
      true, false);
  prepared.enqueue = [&backend, args](int) { backend.GatherRows(args, Stream::kCompute); };
  return prepared;
}

absl::StatusOr<PreparedCase> PrepareProduct(CaseMemory& memory, const Point& point) {
  Backend& backend = memory.backend();
  GemmArgs args;
  args.rows = static_cast<int32_t>(point.at("rows"));
  args.out_columns = static_cast<int32_t>(point.at("N"));
  args.in_columns = static_cast<int32_t>(point.at("K"));
  ASSIGN_OR_RETURN(args.in, Rows(memory, args.rows, args.in_columns));
  ASSIGN_OR_RETURN(args.out, Rows(memory, args.rows, args.out_columns));
  const DType dtype = backend.info().weight_dtype;
  const int64_t elements = int64_t{args.out_columns} * args.in_columns;
  PreparedCase prepared;
  prepared.sets = ColdSets(static_cast<double>(elements * DTypeBytes(dtype)));
  std::vector<const void*> weights;
  for (int set = 0; set < prepared.sets; ++set) {
    ASSIGN_OR_RETURN(const std::byte* const weight, memory.Normal(elements, dtype));
    weights.push_back(weight);
  }
  prepared.cost = GemmCost(args, static_cast<double>(DTypeBytes(dtype)));
  prepared.enqueue = [&backend, args, weights](int i) mutable {
    args.weight = weights[i % weights.size()];
    backend.Gemm(args, Stream::kCompute);
  };
  return prepared;
}

}  // namespace

const std::vector<KernelCase>& KernelCases() {
  static const auto& cases = *new std::vector<KernelCase>{
      {"decode_attention",
       "one token of each row against its paged cache; page 0: contiguous, splits 0: as planned",
       {{"B", {1, 8, 32, 64}},
        {"context", {1024, 4096}},
        {"Hq", {32}},
        {"Hk", {8, 32}},
        {"d", {128}},
        {"page", {16}},
        {"splits", {0}},
        {"probability", {0}}},
       PrepareDecode},
      {"prefill_attention",
       "a chunk of rows, causally, behind paged history",
       {{"rows", {2048}},
        {"history", {0, 6144, 14336}},
        {"Hq", {32}},
        {"Hk", {8, 32}},
        {"d", {128}},
        {"page", {16}}},
       [](CaseMemory& memory, const Point& point) {
         return PreparePrefill(memory, point, /*sums=*/false);
       }},
      {"column_sum",
       "H2O's second pass over a chunk",
       {{"rows", {2048}},
        {"history", {0, 6144, 14336}},
        {"Hq", {32}},
        {"Hk", {8, 32}},
        {"d", {128}},
        {"page", {16}}},
       [](CaseMemory& memory, const Point& point) {
         return PreparePrefill(memory, point, /*sums=*/true);
       }},
      {"evict_heavy",
       "H2O's score update and eviction, one layer",
       {{"B", {1, 8, 32}}, {"budget", {384, 818}}, {"Hk", {32}}, {"group", {1}}, {"d", {128}}},
       PrepareEvict},
      {"speculate",
       "InfiniGen's speculation and selection, one layer",
       {{"B", {1, 8, 32}},
        {"context", {2048, 4096, 131072}},
        {"Hq", {32}},
        {"Hk", {8, 32}},
        {"partial", {40}}},
       PrepareSpeculate},
      {"gather_rows",
       "selected rows from the host pool, one layer",
       {{"B", {1, 8}}, {"context", {1920}}, {"selected", {73, 400}}, {"Hk", {32}}, {"d", {128}}},
       PrepareGather},
      {"product",
       "activations times a weight matrix",
       {{"rows", {1, 8, 64, 512}}, {"N", {4096}}, {"K", {4096}}},
       PrepareProduct},
  };
  return cases;
}

}  // namespace kvsweep
