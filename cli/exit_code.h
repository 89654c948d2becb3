#ifndef KVSWEEP_CLI_EXIT_CODE_H_
#define KVSWEEP_CLI_EXIT_CODE_H_

#include "absl/status/status.h"

// What every command of `kvsweep` ends with. Scripts rely on these numbers: they do not change.

namespace kvsweep {

inline constexpr int kExitOk = 0;
// It ran, and part of it failed: a trial crashed, a round was given up or cancelled, a query took
// longer than it may. What a repetition would give again (oom, infeasible, unstable, timeout) is a
// result, not this.
inline constexpr int kExitFailed = 1;
// Wrong flags, an invalid spec, an id that does not exist, more than a limit allows.
inline constexpr int kExitUsage = 2;
// The coordinator, the store or the runner cannot be had.
inline constexpr int kExitUnreachable = 3;
inline constexpr int kExitInterrupted = 130;  // Ctrl-C or SIGTERM

// For the end of --help.
inline constexpr char kExitCodesHelp[] =
    "Exit codes:\n"
    "  0    done\n"
    "  1    done, but something failed: a trial crashed, a round was given up or cancelled, a\n"
    "       query took longer than it may\n"
    "  2    wrong usage, an invalid spec, or more than a limit allows\n"
    "  3    the coordinator, the store or the runner cannot be reached\n"
    "  130  interrupted\n";

// The code for a command that failed with `status` (not OK).
int ExitCodeOf(const absl::Status& status);

// Says on stderr what went wrong and returns its code.
int Fail(const absl::Status& status);

// The same for problems of a spec, a line each: printed as they are, so that editors find
// "file:line:column:". Always kExitUsage.
int FailSpec(const absl::Status& status);

}  // namespace kvsweep

#endif  // KVSWEEP_CLI_EXIT_CODE_H_
