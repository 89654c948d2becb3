#include "cli/progress.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "base/text.h"

namespace kvsweep {
namespace {

// Between two plain lines: when rounds were done, and when nothing changed.
constexpr int64_t kPlainGapNs = 5 * kNsPerSecond;
constexpr int64_t kPlainSilenceNs = 30 * kNsPerSecond;
constexpr size_t kDefaultColumns = 100;

uint64_t Ended(const WatchEvent& event) {
  return event.rounds_done() + event.rounds_served() + event.rounds_failed();
}

// "h2o-20 rate=4/s: measure 12/24 (+3 more)".
std::string RunningText(const WatchEvent& event) {
  const RunningTrial& trial = event.running(0);
  std::string text(absl::StripSuffix(trial.trial(), " -"));
  if (text.empty()) text = absl::StrCat("starting on ", trial.worker_id());
  if (!trial.phase().empty()) absl::StrAppend(&text, ": ", trial.phase());
  if (trial.total() > 0) absl::StrAppend(&text, " ", trial.done(), "/", trial.total());
  if (event.running_size() > 1) absl::StrAppend(&text, " (+", event.running_size() - 1, " more)");
  return text;
}

size_t Columns(std::FILE* out) {
  winsize size = {};
  if (ioctl(fileno(out), TIOCGWINSZ, &size) != 0 || size.ws_col == 0) return kDefaultColumns;
  return size.ws_col;
}

// At most `columns` characters, one byte each at least.
absl::string_view Cut(absl::string_view line, size_t columns) {
  if (line.size() <= columns) return line;
  size_t end = columns;
  while (end > 0 && (static_cast<uint8_t>(line[end]) & 0xC0) == 0x80) --end;
  return line.substr(0, end);
}

bool IsTerminal(std::FILE* out) {
  const char* terminal = std::getenv("TERM");
  return isatty(fileno(out)) != 0 && (terminal == nullptr || absl::string_view(terminal) != "dumb");
}

}  // namespace

std::string ProgressLine(const WatchEvent& event, uint64_t cancelled) {
  std::string line = absl::StrCat(Ended(event), "/", event.rounds(), " rounds");
  std::vector<std::string> parts;
  if (event.rounds_served() > 0) {
    parts.push_back(absl::StrCat(event.rounds_served(), " from the store"));
  }
  cancelled = std::min<uint64_t>(cancelled, event.rounds_failed());
  const uint64_t failed = event.rounds_failed() - cancelled;
  if (failed > 0) parts.push_back(absl::StrCat(failed, " failed"));
  if (cancelled > 0) parts.push_back(absl::StrCat(cancelled, " cancelled"));
  if (!parts.empty()) absl::StrAppend(&line, " (", absl::StrJoin(parts, ", "), ")");
  if (event.finished()) return line;
  if (event.eta_ns() >= 0) {
    const int64_t seconds = (event.eta_ns() + kNsPerSecond - 1) / kNsPerSecond;
    absl::StrAppend(&line, ", about ", FormatDurationNs(seconds * kNsPerSecond), " left");
  }
  if (event.running_size() > 0) {
    absl::StrAppend(&line, "; ", RunningText(event));
  } else if (!event.waiting_for().empty()) {
    absl::StrAppend(&line, "; waiting: ", event.waiting_for());
  }
  return line;
}

ProgressDisplay::ProgressDisplay(std::FILE* out, const Clock& clock)
    : out_(out), clock_(clock), redraws_(IsTerminal(out)) {}

void ProgressDisplay::Show(const WatchEvent& event, uint64_t cancelled) {
  const std::string line = ProgressLine(event, cancelled);
  if (redraws_) {
    const std::string cut(Cut(line, Columns(out_) - 1));
    std::fprintf(out_, "\r\033[K%s", cut.c_str());
    std::fflush(out_);
    drawn_ = true;
    return;
  }
  const int64_t since_ns = clock_.NowNs() - shown_ns_;
  const bool changed = Ended(event) != shown_done_;
  if (shown_ns_ != 0 && since_ns < (changed ? kPlainGapNs : kPlainSilenceNs) && !event.finished()) {
    return;
  }
  shown_ns_ = clock_.NowNs();
  shown_done_ = Ended(event);
  std::fprintf(out_, "%s\n", line.c_str());
}

void ProgressDisplay::Say(absl::string_view line) {
  Clear();
  std::fprintf(out_, "%s\n", std::string(line).c_str());
}

void ProgressDisplay::Clear() {
  if (drawn_) std::fputs("\r\033[K", out_);
  drawn_ = false;
  std::fflush(out_);
}

}  // namespace kvsweep
