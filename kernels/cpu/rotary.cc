#include <cmath>

#include "kernels/cpu/operations.h"
#include "kernels/cpu/rows.h"

namespace kvsweep::cpu {

absl::Status Run(const RotaryArgs& args, Context& context) {
  const int half = args.head_dim / 2;
  context.ReserveWorkers(2 * Workspace::Padded<float>(half));
  // Sines and cosines weigh as much as several passes over the row.
  const int64_t work = int64_t{args.head_dim} * (args.heads + 16);
  ForRows(context, args.rows, work, [&](int64_t row, int worker) {
    Workspace& workspace = context.worker[worker];
    workspace.Reset(0);
    float* const cosine = workspace.Take<float>(half);
    float* const sine = workspace.Take<float>(half);
    const float position = static_cast<float>(args.position[row]);
    for (int j = 0; j < half; ++j) {
      // In f32, as the models' own code computes them.
      const float angle = position * args.inverse_frequency[j];
      cosine[j] = std::cos(angle);
      sine[j] = std::sin(angle);
    }
    for (int head = 0; head < args.heads; ++head) {
      float* const low = Row(args.data, row) + int64_t{head} * args.head_dim;
      float* const high = low + half;
      for (int j = 0; j < half; ++j) {
        const float x = low[j];
        const float y = high[j];
        low[j] = x * cosine[j] - y * sine[j];
        high[j] = y * cosine[j] + x * sine[j];
      }
    }
  });
  return absl::OkStatus();
}

}  // namespace kvsweep::cpu
