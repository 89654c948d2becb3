#include <cmath>

#include "kernels/cpu/operations.h"
#include "kernels/cpu/rows.h"
#include "kernels/cpu/simd.h"

namespace kvsweep::cpu {
namespace {

// Sum over a row of (x - center)^power, power 1 or 2, in the fixed order of simd.h.
template <int kPower>
float SumPowers(const float* x, int count, float center) {
  F8 sum = {};
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const F8 difference = Load(x + i) - center;
    sum += kPower == 1 ? difference : difference * difference;
  }
  float total = Sum(sum);
  for (; i < count; ++i) {
    const float difference = x[i] - center;
    total += kPower == 1 ? difference : difference * difference;
  }
  return total;
}

}  // namespace

absl::Status Run(const NormArgs& args, Context& context) {
  ForRows(context, args.rows, args.columns, [&](int64_t row, int) {
    const float* const in = Row(args.in, row);
    float* const out = Row(args.out, row);
    const int columns = args.columns;
    const float mean =
        args.bias == nullptr ? 0.0f : SumPowers<1>(in, columns, 0.0f) / static_cast<float>(columns);
    const float variance = SumPowers<2>(in, columns, mean) / static_cast<float>(columns);
    const float scale = 1.0f / std::sqrt(variance + args.epsilon);
    for (int i = 0; i < columns; ++i) out[i] = (in[i] - mean) * scale * args.weight[i];
    if (args.bias == nullptr) return;
    for (int i = 0; i < columns; ++i) out[i] += args.bias[i];
  });
  return absl::OkStatus();
}

}  // namespace kvsweep::cpu
