#ifndef KVSWEEP_BASE_CHECK_H_
#define KVSWEEP_BASE_CHECK_H_

#include <sstream>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

// Assertions on our own invariants, never on input from outside (that is a Status). They stay on in
// release builds: a wrong result costs more than a stopped process.
//
//   KVSWEEP_CHECK(block < block_count) << "request " << id.value();
//   KVSWEEP_CHECK_EQ(used + free, total);      prints both values
//   KVSWEEP_CHECK_OK(status_or_statusor);      prints the status
//
// On failure: file, line, the condition and the streamed words go to stderr, then abort().
// KVSWEEP_DCHECK is for conditions too costly for release builds; under NDEBUG it is compiled, not
// run.

namespace kvsweep::internal_check {

// Collects the words of a failed check and aborts in its destructor.
class CheckFailure {
 public:
  CheckFailure(const char* file, int line, const char* condition);
  [[noreturn]] ~CheckFailure();
  CheckFailure(const CheckFailure&) = delete;
  CheckFailure& operator=(const CheckFailure&) = delete;

  std::ostream& stream() { return stream_; }

 private:
  std::ostringstream stream_;
};

// Binds weaker than << and stronger than ?:, and gives the macros the type void.
struct Voidify {
  void operator&(std::ostream&) const {}
};

inline const absl::Status& ToStatus(const absl::Status& status) { return status; }
template <typename T>
const absl::Status& ToStatus(const absl::StatusOr<T>& result) {
  return result.status();
}

}  // namespace kvsweep::internal_check

#define KVSWEEP_CHECK(condition)                      \
  (__builtin_expect(static_cast<bool>(condition), 1)) \
      ? (void)0                                       \
      : ::kvsweep::internal_check::Voidify() &        \
            ::kvsweep::internal_check::CheckFailure(__FILE__, __LINE__, #condition).stream()

// Evaluates both operands once more when it fails; keep them free of side effects.
#define KVSWEEP_CHECK_OP(left, op, right) \
  KVSWEEP_CHECK((left)op(right)) << "(" << (left) << " vs " << (right) << ") "
#define KVSWEEP_CHECK_EQ(left, right) KVSWEEP_CHECK_OP(left, ==, right)
#define KVSWEEP_CHECK_NE(left, right) KVSWEEP_CHECK_OP(left, !=, right)
#define KVSWEEP_CHECK_LT(left, right) KVSWEEP_CHECK_OP(left, <, right)
#define KVSWEEP_CHECK_LE(left, right) KVSWEEP_CHECK_OP(left, <=, right)
#define KVSWEEP_CHECK_GT(left, right) KVSWEEP_CHECK_OP(left, >, right)
#define KVSWEEP_CHECK_GE(left, right) KVSWEEP_CHECK_OP(left, >=, right)

#define KVSWEEP_CHECK_OK(expression)                                                        \
  do {                                                                                      \
    const absl::Status kvsweep_status = ::kvsweep::internal_check::ToStatus((expression));  \
    KVSWEEP_CHECK(kvsweep_status.ok()) << #expression << ": " << kvsweep_status.ToString(); \
  } while (false)

#ifdef NDEBUG
#define KVSWEEP_DCHECK(condition) KVSWEEP_CHECK(true || (condition))
#else
#define KVSWEEP_DCHECK(condition) KVSWEEP_CHECK(condition)
#endif

#endif  // KVSWEEP_BASE_CHECK_H_
