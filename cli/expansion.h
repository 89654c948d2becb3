#ifndef KVSWEEP_CLI_EXPANSION_H_
#define KVSWEEP_CLI_EXPANSION_H_

#include <cstdint>
#include <string>

#include "experiments/matrix.h"
#include "experiments/spec.h"
#include "storage/query.h"

namespace kvsweep {

// "3 arms x 4 cells x 3 repeats: 39 trials in 15 rounds, 3 of them quality".
std::string FormatCounts(const Matrix& matrix);

// What a matrix consists of, one row each, at most `limit`.
Table ArmsTable(const Matrix& matrix);
Table CellsTable(const Matrix& matrix, uint64_t limit);
Table RoundsTable(const Matrix& matrix, uint64_t limit);
Table TrialsTable(const Matrix& matrix, uint64_t limit);

}  // namespace kvsweep

#endif  // KVSWEEP_CLI_EXPANSION_H_
