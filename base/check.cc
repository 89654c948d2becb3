#include "base/check.h"

#include <cstdio>
#include <cstdlib>
#include <string>

namespace kvsweep::internal_check {

CheckFailure::CheckFailure(const char* file, int line, const char* condition) {
  stream_ << file << ":" << line << ": check failed: " << condition << " ";
}

CheckFailure::~CheckFailure() {
  // Straight to stderr: the logger may hold locks of the code that is failing.
  stream_ << "\n";
  const std::string text = stream_.str();
  std::fwrite(text.data(), 1, text.size(), stderr);
  std::fflush(stderr);
  std::abort();
}

}  // namespace kvsweep::internal_check
