#include <cstring>

#include "kernels/cpu/operations.h"
#include "kernels/cpu/rows.h"

namespace kvsweep::cpu {

absl::Status Run(const EmbedArgs& args, Context& context) {
  ForRows(context, args.rows, args.columns, [&](int64_t row, int) {
    const int64_t columns = args.columns;
    const int64_t named = args.token_id[row];
    const int64_t token = named >= 0 ? named : args.sampled[-1 - named];
    float* const out = Row(args.out, row);
    std::memcpy(out, static_cast<const float*>(args.table) + token * columns,
                columns * sizeof(float));
    if (args.position_table == nullptr) return;
    const int64_t position = args.position[row] + args.position_offset;
    const float* const added = static_cast<const float*>(args.position_table) + position * columns;
    for (int64_t i = 0; i < columns; ++i) out[i] += added[i];
  });
  return absl::OkStatus();
}

absl::Status Run(const TakeRowsArgs& args, Context& context) {
  ForRows(context, args.rows, args.columns, [&](int64_t row, int) {
    float* const out = Row(args.out, row);
    const int32_t source = args.row[row];
    if (source < 0) {
      std::memset(out, 0, args.columns * sizeof(float));
    } else {
      std::memcpy(out, Row(args.in, source), args.columns * sizeof(float));
    }
  });
  return absl::OkStatus();
}

}  // namespace kvsweep::cpu
