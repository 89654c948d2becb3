#ifndef KVSWEEP_COORDINATOR_PERSISTENCE_H_
#define KVSWEEP_COORDINATOR_PERSISTENCE_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "coordinator/scheduler.h"
#include "storage/store.h"

// Between the scheduler's plans and the store's rows, both ways: what a plan makes durable, and
// what a scheduler is after a restart.

namespace kvsweep {

// The plan's rows as operations of the store, in the order in which they must be applied. The store
// must accept every one of them: scheduler and store say the same about rounds and attempts, or one
// of them is wrong.
std::vector<Operation> RowsOf(const SchedulerPlan& plan, int64_t unix_ns);

// Puts a new scheduler where the store says that the last one was: rounds that have not ended,
// their mishaps, and the attempts that were live, which get one full lease length to be reported.
// Workers tell the rest.
absl::Status RecoverScheduler(const Queue& queue, StoreReader& reader, int64_t now_ns,
                              Scheduler* scheduler);

}  // namespace kvsweep

#endif  // KVSWEEP_COORDINATOR_PERSISTENCE_H_
