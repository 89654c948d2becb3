// How operations that work row by row are cut into tasks.
#ifndef KVSWEEP_KERNELS_CPU_ROWS_H_
#define KVSWEEP_KERNELS_CPU_ROWS_H_

#include <algorithm>
#include <cstdint>

#include "kernels/backend.h"
#include "kernels/cpu/workspace.h"

namespace kvsweep::cpu {

// Elements below which waking another worker costs more than it saves.
inline constexpr int64_t kTaskElements = 16 * 1024;

// Calls body(row, worker) for each row, several rows a task if rows are short.
template <typename Body>
void ForRows(Context& context, int64_t rows, int64_t elements_per_row, const Body& body) {
  const int64_t per_task =
      std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, elements_per_row));
  context.pool.For((rows + per_task - 1) / per_task, [&](int64_t task, int worker) {
    const int64_t end = std::min((task + 1) * per_task, rows);
    for (int64_t row = task * per_task; row < end; ++row) body(row, worker);
  });
}

inline float* Row(const Activations& activations, int64_t row) {
  return static_cast<float*>(activations.data) + row * activations.stride;
}

}  // namespace kvsweep::cpu

#endif  // KVSWEEP_KERNELS_CPU_ROWS_H_
