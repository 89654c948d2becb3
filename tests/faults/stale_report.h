#ifndef KVSWEEP_TESTS_FAULTS_STALE_REPORT_H_
#define KVSWEEP_TESTS_FAULTS_STALE_REPORT_H_

#include <cstdint>
#include <string>

#include "tests/faults/cluster.h"

namespace kvsweep {

// Sends one more record of `attempt` to the coordinator, exactly as the worker that was leased it
// would: its name, its incarnation, the next sequence. Gives the answer: "refused: REASON", or
// "stored up to N", or why there is none.
std::string ReportStaleRow(const Cluster& cluster, const std::string& worker, int64_t attempt,
                           int64_t sequence);

}  // namespace kvsweep

#endif  // KVSWEEP_TESTS_FAULTS_STALE_REPORT_H_
