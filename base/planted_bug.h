// Mistakes that one build can be told to make, so that tests can be shown to catch them.
//
// `if (BugPlanted("name")) …` stands where a developer could slip. In a build with
// KVSWEEP_PLANTED_BUGS it is true when the environment variable KVSWEEP_PLANTED_BUG is that name;
// in every other build it is the constant false and leaves no trace. tests/planted_bugs_test
// switches each bug on and demands that the test named beside it fails.
#ifndef KVSWEEP_BASE_PLANTED_BUG_H_
#define KVSWEEP_BASE_PLANTED_BUG_H_

#ifdef KVSWEEP_PLANTED_BUGS
#include <cstdlib>
#include <cstring>
#endif

namespace kvsweep {

#ifdef KVSWEEP_PLANTED_BUGS
inline bool BugPlanted(const char* name) {
  static const char* const chosen = std::getenv("KVSWEEP_PLANTED_BUG");
  return chosen != nullptr && std::strcmp(chosen, name) == 0;
}
#else
constexpr bool BugPlanted(const char* /*name*/) { return false; }
#endif

}  // namespace kvsweep

#endif  // KVSWEEP_BASE_PLANTED_BUG_H_
