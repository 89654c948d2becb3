#include "cli/follow.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "base/status_macros.h"
#include "cli/source.h"

namespace kvsweep {
namespace {

constexpr int kTries = 30;
constexpr int64_t kFailuresGapNs = 1 * kNsPerSecond;
constexpr size_t kFailuresAtOnce = 20;

// Outcomes that say something about the machinery, not about the arm.
constexpr absl::string_view kBroken[] = {"crashed", "recorder_overflow", "poisoned", "cancelled"};

// Trials that did not end well, each said once.
class Failures {
 public:
  Failures(TableSource& tables, ExperimentId experiment, ProgressDisplay* display,
           const Clock& clock)
      : tables_(tables), experiment_(experiment), display_(display), clock_(clock) {}

  // Looks when rounds have ended since, at most once a second unless `now` is set.
  void Look(uint64_t rounds_ended, bool now) {
    if (rounds_ended == looked_at_rounds_) return;
    if (!now && looked_ns_ != 0 && clock_.NowNs() < looked_ns_ + kFailuresGapNs) return;
    looked_at_rounds_ = rounds_ended;
    looked_ns_ = clock_.NowNs();
    const absl::StatusOr<Table> table = tables_.Run(
        absl::StrCat("SELECT trial_id, arm, cell, repeat, outcome, evidence FROM v_trials WHERE "
                     "experiment_id = ",
                     experiment_.value(), " AND outcome NOT IN ('ok', 'cancelled')"),
        QueryLimits());
    if (!table.ok()) return;  // a look at the store; what is missed stands in the table at the end
    size_t said = 0;
    size_t left_out = 0;
    for (size_t i = 0; i < table->rows.size(); ++i) {
      if (!seen_.insert(IntAt(*table, i, 0)).second) continue;
      if (++said > kFailuresAtOnce) {
        ++left_out;
        continue;
      }
      const std::string cell = TextAt(*table, i, 2);
      display_->Say(absl::StrCat("trial ", TextAt(*table, i, 0), " ", TextAt(*table, i, 1),
                                 cell == "-" ? "" : absl::StrCat(" ", cell), " repeat ",
                                 TextAt(*table, i, 3), ": ", TextAt(*table, i, 4), ": ",
                                 TextAt(*table, i, 5)));
    }
    if (left_out > 0) display_->Say(absl::StrCat("... and ", left_out, " more"));
  }

 private:
  TableSource& tables_;
  const ExperimentId experiment_;
  ProgressDisplay* const display_;
  const Clock& clock_;
  std::set<int64_t> seen_;
  uint64_t looked_at_rounds_ = 0;
  int64_t looked_ns_ = 0;
};

// The cancelled among the event's failed rounds, from the store: a cancellation ends all that is
// left at once, so that only the last event has any. 0 where the store does not say.
uint64_t CancelledRounds(TableSource& tables, ExperimentId experiment, const WatchEvent& event) {
  if (!event.finished() || event.rounds_failed() == 0) return 0;
  const absl::StatusOr<Standing> standing = ReadStanding(tables, experiment);
  return standing.ok() ? static_cast<uint64_t>(standing->cancelled) : 0;
}

}  // namespace

absl::Status Follow(ControlClient& client, TableSource& tables, ExperimentId experiment,
                    ProgressDisplay* display, Clock& clock) {
  Failures failures(tables, experiment, display, clock);
  absl::Status status;
  for (int tries = 0; tries < kTries; ++tries) {
    status = client.Watch(experiment, [&](const WatchEvent& event) {
      tries = 0;
      for (const std::string& message : event.messages()) display->Say(message);
      failures.Look(event.rounds_done() + event.rounds_failed(), event.finished());
      display->Show(event, CancelledRounds(tables, experiment, event));
    });
    if (!absl::IsUnavailable(status)) break;
    if (tries == 0) display->Say(absl::StrCat(status.message(), "; trying again"));
    clock.SleepUntilNs(clock.NowNs() + kNsPerSecond);
  }
  display->Clear();
  return status;
}

bool Standing::has_failures() const {
  return failed + cancelled > 0 ||
         std::any_of(std::begin(kBroken), std::end(kBroken), [this](absl::string_view outcome) {
           return outcomes.contains(std::string(outcome));
         });
}

absl::StatusOr<Standing> ReadStanding(TableSource& tables, ExperimentId experiment) {
  const std::string where = absl::StrCat(" WHERE experiment_id = ", experiment.value());
  ASSIGN_OR_RETURN(
      const Table rounds,
      tables.Run(absl::StrCat("SELECT rounds, done, served, failed + poisoned, cancelled FROM "
                              "v_experiments",
                              where),
                 QueryLimits()));
  if (rounds.rows.empty()) {
    return absl::NotFoundError(absl::StrCat("the store has no experiment ", experiment.value()));
  }
  ASSIGN_OR_RETURN(const Table trials,
                   tables.Run(absl::StrCat("SELECT outcome, count(*) FROM v_trials", where,
                                           " AND outcome IS NOT NULL GROUP BY outcome"),
                              QueryLimits()));
  Standing standing{.rounds = IntAt(rounds, 0, 0),
                    .done = IntAt(rounds, 0, 1),
                    .served = IntAt(rounds, 0, 2),
                    .failed = IntAt(rounds, 0, 3),
                    .cancelled = IntAt(rounds, 0, 4),
                    .outcomes = {}};
  for (size_t i = 0; i < trials.rows.size(); ++i) {
    standing.outcomes[TextAt(trials, i, 0)] = IntAt(trials, i, 1);
  }
  return standing;
}

std::string FormatStanding(const Standing& standing) {
  std::vector<std::string> rounds;
  const auto add = [&](int64_t count, absl::string_view what) {
    if (count > 0) rounds.push_back(absl::StrCat(count, " ", what));
  };
  add(standing.done, "measured");
  add(standing.served, "from the store");
  add(standing.failed, "failed");
  add(standing.cancelled, "cancelled");
  const int64_t ended = standing.done + standing.served + standing.failed + standing.cancelled;
  std::string text = absl::StrCat(ended, " of ", standing.rounds, " rounds");
  if (!rounds.empty()) absl::StrAppend(&text, ": ", absl::StrJoin(rounds, ", "));
  if (!standing.outcomes.empty()) {
    absl::StrAppend(&text,
                    "; trials: ", absl::StrJoin(standing.outcomes, ", ", absl::PairFormatter(" ")));
  }
  return text;
}

}  // namespace kvsweep
