#include "kernels/cpu/operations.h"
#include "kernels/cpu/rows.h"
#include "kernels/cpu/simd.h"

namespace kvsweep::cpu {
namespace {

KVSWEEP_INLINE F8 SiluGate(F8 gate, F8 up) { return gate / (Splat(1.0f) + Exp(-gate)) * up; }

}  // namespace

absl::Status Run(const SiluGateArgs& args, Context& context) {
  ForRows(context, args.rows, args.columns, [&](int64_t row, int) {
    const int columns = args.columns;
    const float* const gate = Row(args.in, row);
    const float* const up = gate + columns;
    float* const out = Row(args.out, row);
    int i = 0;
    for (; i + kLanes <= columns; i += kLanes) {
      Store(out + i, SiluGate(Load(gate + i), Load(up + i)));
    }
    for (; i < columns; ++i) out[i] = SiluGate(Splat(gate[i]), Splat(up[i]))[0];
  });
  return absl::OkStatus();
}

}  // namespace kvsweep::cpu
