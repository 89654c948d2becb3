#ifndef KVSWEEP_CLI_PROGRESS_H_
#define KVSWEEP_CLI_PROGRESS_H_

#include <cstdint>
#include <cstdio>
#include <string>

#include "absl/strings/string_view.h"
#include "base/clock.h"
#include "proto/control.pb.h"

namespace kvsweep {

// Where an experiment stands, in one line: rounds done of all, what was served and what failed, the
// time that is left, what runs now or why nothing does. `cancelled` of the event's failed rounds
// were cancelled, which the event does not tell.
std::string ProgressLine(const WatchEvent& event, uint64_t cancelled = 0);

// Progress on a terminal is one line that is drawn again; elsewhere (a log file, a pipe) it is a
// line now and then. What must not be missed is said on lines of its own. One thread at a time.
class ProgressDisplay {
 public:
  // `out` is usually stderr; whether it is a terminal is found out here. `clock` must outlive this.
  ProgressDisplay(std::FILE* out, const Clock& clock);
  ~ProgressDisplay() { Clear(); }
  ProgressDisplay(const ProgressDisplay&) = delete;
  ProgressDisplay& operator=(const ProgressDisplay&) = delete;

  // As ProgressLine.
  void Show(const WatchEvent& event, uint64_t cancelled = 0);

  // One line that stays.
  void Say(absl::string_view line);

  // Takes the progress line away, before something else is printed.
  void Clear();

 private:
  std::FILE* const out_;
  const Clock& clock_;
  const bool redraws_;
  bool drawn_ = false;
  int64_t shown_ns_ = 0;     // of a plain line; 0: none yet
  uint64_t shown_done_ = 0;  // rounds that were done then
};

}  // namespace kvsweep

#endif  // KVSWEEP_CLI_PROGRESS_H_
