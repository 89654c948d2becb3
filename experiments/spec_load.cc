// What the fields of a load mean together: arrivals that fit their process, lengths from one
// source, sessions that can be.
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "base/limits.h"
#include "experiments/spec_checks.h"

namespace kvsweep {
namespace {

std::string ProcessName(const Arrivals& arrivals) {
  const std::string& name = Arrivals::Process_Name(arrivals.process());
  return absl::AsciiStrToLower(absl::StripPrefix(name, "PROCESS_"));
}

bool HasRate(const Arrivals& arrivals) {
  switch (arrivals.process()) {
    case Arrivals::PROCESS_POISSON:
    case Arrivals::PROCESS_GAMMA:
    case Arrivals::PROCESS_CONSTANT:
    case Arrivals::PROCESS_RAMP:
      return true;
    default:
      return false;
  }
}

void CheckRates(const Arrivals& arrivals, const Reporter& report) {
  const bool ramp = arrivals.process() == Arrivals::PROCESS_RAMP;
  const bool gamma = arrivals.process() == Arrivals::PROCESS_GAMMA;
  const std::string name = ProcessName(arrivals);
  if (HasRate(arrivals) && !arrivals.has_rate()) {
    report.Add("rate", "missing", absl::StrCat(name, " arrivals need a mean rate, such as 4/s"));
  }
  report.Useless(!HasRate(arrivals) && arrivals.has_rate(), "rate",
                 absl::StrCat(name, " arrivals have no rate"));
  report.Useless(!(gamma || ramp) && arrivals.has_burstiness() && arrivals.burstiness() != 1,
                 "burstiness", absl::StrCat(name, " arrivals are not gamma's or a ramp's"));
  if (ramp && !arrivals.has_ramp_from()) {
    report.Add("ramp_from", "missing", "a ramp needs the rate that it begins with, such as 1/s");
  }
  if (ramp && arrivals.has_rate() && !(arrivals.rate() <= 1e6)) {
    report.Add("rate", "a ramp cannot end at an infinite rate", "write the rate at its end");
  }
  report.Useless(!ramp && arrivals.has_ramp_from(), "ramp_from", "process is not \"ramp\"");
  report.Useless(!ramp && arrivals.ramp() != Arrivals::RAMP_LINEAR, "ramp",
                 "process is not \"ramp\"");
}

void CheckArrivals(const Load& load, const std::string& path, ProblemList* problems) {
  const Arrivals& arrivals = load.arrivals();
  const Reporter report(path, problems);
  const bool closed = arrivals.process() == Arrivals::PROCESS_CLOSED;
  const bool batches = arrivals.process() == Arrivals::PROCESS_STATIC;
  const bool replay = arrivals.process() == Arrivals::PROCESS_REPLAY;
  CheckRates(arrivals, report);
  if (closed && !arrivals.has_concurrency()) {
    report.Add("concurrency", "missing", "a closed loop needs the number of requests in flight");
  }
  if (batches && !arrivals.has_concurrency()) {
    report.Add("concurrency", "missing", "static batches need the number of requests in each");
  }
  report.Useless(!(closed || batches) && arrivals.has_concurrency(), "concurrency",
                 "only a closed loop and static batches have a concurrency");
  if (replay && !load.lengths().has_trace()) {
    report.Add("process", "replay needs a trace with times",
               "name it as load.lengths.trace, or another process");
  }
  report.Useless(!replay && arrivals.has_time_scale() && arrivals.time_scale() != 1, "time_scale",
                 "process is not \"replay\"");
}

void CheckDistribution(const Distribution& distribution, const std::string& path,
                       ProblemList* problems) {
  const Reporter report(path, problems);
  const bool lognormal = distribution.kind() == Distribution::KIND_LOGNORMAL;
  const uint32_t least = distribution.has_min() ? distribution.min() : 1;
  if (least > distribution.max()) {
    report.Add("min", absl::StrCat(least, " exceeds the max of ", distribution.max()),
               "swap the two");
  }
  if (lognormal && !(distribution.has_mean() && distribution.has_deviation())) {
    report.Add(distribution.has_mean() ? "deviation" : "mean", "missing",
               "lognormal lengths need mean and deviation");
  } else if (lognormal &&
             (distribution.mean() < least || distribution.mean() > distribution.max())) {
    report.Add("mean", absl::StrCat("lies outside ", least, " to ", distribution.max()),
               "widen min and max, which clip what is drawn");
  }
  report.Useless(!lognormal && distribution.has_mean(), "mean", "kind is not \"lognormal\"");
  report.Useless(!lognormal && distribution.has_deviation(), "deviation",
                 "kind is not \"lognormal\"");
}

void CheckLengths(const Lengths& lengths, const std::string& path, ProblemList* problems) {
  const Reporter report(path, problems);
  if (lengths.has_input() && lengths.has_input_distribution()) {
    report.Add("input_distribution", "the prompt length is fixed by input", "remove one of them");
  }
  if (lengths.has_output() && lengths.has_output_distribution()) {
    report.Add("output_distribution", "the output length is fixed by output", "remove one of them");
  }
  if (lengths.has_input_distribution()) {
    CheckDistribution(lengths.input_distribution(), absl::StrCat(path, ".input_distribution"),
                      problems);
  }
  if (lengths.has_output_distribution()) {
    CheckDistribution(lengths.output_distribution(), absl::StrCat(path, ".output_distribution"),
                      problems);
  }
  const bool input = lengths.has_input() || lengths.has_input_distribution();
  const bool output = lengths.has_output() || lengths.has_output_distribution();
  const bool own = input || output;
  if (lengths.has_trace() == own) {
    return report.Add("", own ? "names both a trace and lengths" : "names no lengths",
                      "give either \"trace\", or \"input\" and \"output\", each fixed or as a "
                      "distribution");
  }
  if (!own) return;
  if (!(input && output)) {
    report.Add(input ? "output" : "input", "missing",
               "without a trace give input and output, each fixed or as a distribution");
  }
  const uint64_t total = uint64_t{lengths.input()} + lengths.output();
  if (lengths.has_max_total() && total > lengths.max_total()) {
    report.Add("max_total",
               absl::StrCat("input ", lengths.input(), " and output ", lengths.output(),
                            " do not fit ", lengths.max_total()),
               absl::StrCat("write at least ", total));
  }
  report.Useless(lengths.has_scale() && lengths.scale() != 1, "scale",
                 "only lengths of a trace are scaled");
  report.Useless(lengths.has_output() && lengths.has_max_output(), "max_output",
                 "the output length is fixed");
  report.Useless(lengths.has_output_distribution() && lengths.has_max_output(), "max_output",
                 "the distribution has its own max");
}

void CheckSessions(const Load& load, const std::string& path, ProblemList* problems) {
  const Sessions& sessions = load.sessions();
  const Reporter report(path, problems);
  if (sessions.turns() < 2) {
    return report.Useless(sessions.has_turn_input() || sessions.think_time() > 0, "turns",
                          "sessions of one turn are plain requests");
  }
  if (load.arrivals().process() == Arrivals::PROCESS_STATIC) {
    report.Add("", "static batches have no further turns",
               "remove the block, or write \"process: closed\"");
  }
  const uint64_t requests = uint64_t{load.arrivals().requests()} * sessions.turns();
  if (requests > static_cast<uint64_t>(limits::kRequestsPerTrial)) {
    report.Add("turns",
               absl::StrCat(load.arrivals().requests(), " sessions of ", sessions.turns(),
                            " turns are ", requests, " requests"),
               absl::StrCat("a trial has at most ", limits::kRequestsPerTrial));
  }
  if (load.samples() > 1) {
    report.Add("", "a session goes on from one continuation, and load.samples asks for several",
               "remove one of the two");
  }
}

}  // namespace

void CheckLoad(const Load& load, const std::string& path, ProblemList* problems) {
  CheckArrivals(load, absl::StrCat(path, ".arrivals"), problems);
  CheckLengths(load.lengths(), absl::StrCat(path, ".lengths"), problems);
  if (load.has_sessions()) CheckSessions(load, absl::StrCat(path, ".sessions"), problems);
  const uint64_t rows = uint64_t{load.arrivals().requests()} * std::max(1u, load.samples());
  if (load.samples() > 1 && rows > static_cast<uint64_t>(limits::kRequestsPerTrial)) {
    Reporter(path, problems)
        .Add("samples",
             absl::StrCat(load.arrivals().requests(), " requests of ", load.samples(),
                          " samples are ", rows, " rows"),
             absl::StrCat("a trial has at most ", limits::kRequestsPerTrial));
  }
}

void CheckRegime(Experiment::Regime regime, const Load& load, const Engine& engine,
                 ProblemList* problems) {
  const Arrivals& arrivals = load.arrivals();
  const bool batches = arrivals.process() == Arrivals::PROCESS_STATIC;
  const bool closed = arrivals.process() == Arrivals::PROCESS_CLOSED;
  const bool fits = arrivals.concurrency() <= engine.max_num_seqs();
  const Reporter report("", problems);
  if (regime == Experiment::REGIME_EQUAL_BATCH && !(batches || closed)) {
    report.Add("regime", "equal_batch needs as many requests in flight for every arm",
               "write \"process: static\" or \"process: closed\" with a concurrency");
  }
  if ((batches || (closed && regime == Experiment::REGIME_EQUAL_BATCH)) && !fits) {
    report.Add("load.arrivals.concurrency",
               absl::StrCat(arrivals.concurrency(),
                            " requests do not run side by side: "
                            "engine.max_num_seqs is ",
                            engine.max_num_seqs()),
               "lower it, or raise engine.max_num_seqs");
  }
}

}  // namespace kvsweep
