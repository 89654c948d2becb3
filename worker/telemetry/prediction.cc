#include "worker/telemetry/prediction.h"

namespace kvsweep {

Cost DecodeCost(const ModelWork& model, const DecodeWork& work) {
  // What a step appends and what it fetches is written too.
  const double written =
      work.rows * model.entry_bytes * model.layers + work.fetched * model.entry_bytes;
  return {.device_bytes = model.weight_bytes + work.attended * model.entry_bytes + written +
                          work.selection_bytes,
          .link_bytes = work.fetched * model.entry_bytes,
          .operations =
              work.rows * model.operations_per_row + work.attended * model.operations_per_entry};
}

double FloorNs(const Cost& cost, const DeviceProfile& machine) {
  DeviceProfile without_launches = machine;
  without_launches.operation_ns = 0;
  return DurationNs(cost, without_launches);
}

}  // namespace kvsweep
