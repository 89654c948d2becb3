#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/operations.h"
#include "kernels/normal_value.h"

namespace kvsweep::cpu {

absl::Status Run(const CopyArgs& args, Context&) {
  if (args.bytes > 0) std::memmove(args.target, args.source, args.bytes);
  return absl::OkStatus();
}

absl::Status Run(const ZeroArgs& args, Context&) {
  if (args.bytes > 0) std::memset(args.target, 0, args.bytes);
  return absl::OkStatus();
}

absl::Status Run(const FillNormalArgs& args, Context& context) {
  constexpr int64_t kPiece = 4096;
  const int64_t pieces = (args.count + kPiece - 1) / kPiece;
  context.pool.For(pieces, [&](int64_t piece, int) {
    float values[kPiece];
    const int64_t first = piece * kPiece;
    const int64_t count = std::min(kPiece, args.count - first);
    for (int64_t i = 0; i < count; ++i) {
      values[i] = args.deviation * NormalValue(args.seed, static_cast<uint64_t>(first + i));
    }
    FromFloats({values, static_cast<size_t>(count)}, args.dtype,
               static_cast<std::byte*>(args.out) + first * DTypeBytes(args.dtype));
  });
  return absl::OkStatus();
}

absl::Status Run(const CopyBlocksArgs& args, Context& context) {
  for (int32_t i = 0; i < 2 * args.count; ++i) {
    if (args.pair[i] < 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("pair ", i / 2, " names block ", args.pair[i]));
    }
  }
  context.pool.For(args.count, [&](int64_t i, int) {
    std::memcpy(args.target + args.pair[2 * i + 1] * args.block_bytes,
                args.source + args.pair[2 * i] * args.block_bytes,
                static_cast<size_t>(args.block_bytes));
  });
  return absl::OkStatus();
}

// One process holds the whole model: its own part is the sum.
absl::Status Run(const AllReduceArgs&, Context&) { return absl::OkStatus(); }

}  // namespace kvsweep::cpu
