#ifndef KVSWEEP_CLI_TABLE_FORMAT_H_
#define KVSWEEP_CLI_TABLE_FORMAT_H_

#include <string>

#include "experiments/report.h"
#include "storage/query.h"

namespace kvsweep {

// A table as text, ending in a newline: aligned columns (numbers to the right, long and many-lined
// values cut), Markdown, CSV (RFC 4180, null is empty), or JSON (an array of objects; blobs in
// hexadecimal digits).
std::string FormatTable(const Table& table, ReportFormat format);

}  // namespace kvsweep

#endif  // KVSWEEP_CLI_TABLE_FORMAT_H_
