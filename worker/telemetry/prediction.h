// How long a step should take at least, from what it must move and compute and from what its
// machine was measured to carry. Measured over predicted is the self-check of every timing: far
// above 1 it tells of a kernel or an overlap, not of the strategy.
#ifndef KVSWEEP_WORKER_TELEMETRY_PREDICTION_H_
#define KVSWEEP_WORKER_TELEMETRY_PREDICTION_H_

#include "kernels/cost.h"

namespace kvsweep {

// A model's share: the same for every strategy.
struct ModelWork {
  double weight_bytes = 0;          // of all matrices, read once a step
  double operations_per_row = 0;    // two for each element of a matrix
  double entry_bytes = 0;           // key and value of one token in one layer, all KV heads
  double operations_per_entry = 0;  // attention's, all query heads
  double layers = 0;
};

// What decode steps do in the mean; entries are means over KV heads, summed over layers and rows.
struct DecodeWork {
  double rows = 0;             // tokens decoded
  double attended = 0;         // entries read by attention
  double fetched = 0;          // of these, from the host
  double selection_bytes = 0;  // read and written on the device to decide which
};

// What such a step costs: bytes on the device, over the link, operations.
Cost DecodeCost(const ModelWork& model, const DecodeWork& work);

// The slowest of the three. Launches, waits and the host are not in it.
double FloorNs(const Cost& cost, const DeviceProfile& machine);

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_TELEMETRY_PREDICTION_H_
