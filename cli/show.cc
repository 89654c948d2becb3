// `kvsweep show`: one trial, from what was asked to what came out.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/clock.h"
#include "base/status_macros.h"
#include "cli/commands.h"
#include "cli/exit_code.h"
#include "cli/flags.h"
#include "cli/source.h"
#include "cli/table_format.h"
#include "experiments/metrics.h"
#include "experiments/report.h"

namespace kvsweep {
namespace {

using Json = nlohmann::ordered_json;

constexpr char kSummary[] = "Shows one trial.";

constexpr char kMore[] =
    "What was asked, where and by what it was measured, how it ended with the evidence, and its "
    "metrics in the console\n"
    "block of vLLM's benchmark.\n"
    "\n"
    "Example:\n"
    "  kvsweep show 7\n"
    "  kvsweep show 7 --output vllm > result.json   # the flat keys of vLLM's benchmark\n"
    "  kvsweep show 7 --requests                    # a row for each request\n";

struct Flags {
  SourceFlags source;
  std::string trial;
  std::string output = "text";
  bool requests = false;
};

std::string ValueText(const Json& value) {
  return value.is_string() ? value.get<std::string>() : value.dump();
}

// "  name   value" for each entry of an object that has a value.
void AppendEntries(const Json& object, std::string* text) {
  for (const auto& [name, value] : object.items()) {
    if (value.is_null() || ValueText(value).empty()) continue;
    absl::StrAppendFormat(text, "  %-24s %s\n", name, ValueText(value));
  }
}

// `infos` with the values, or the reasons why there are none, of ShowTrial's JSON.
std::vector<SummaryMetric> MetricsOf(const Json& shown, const std::vector<MetricInfo>& infos) {
  const Json& values = shown["metrics"];
  const Json& reasons = shown["reasons"];
  std::vector<SummaryMetric> metrics;
  for (const MetricInfo& info : infos) {
    SummaryMetric metric{.name = info.name, .value = std::nullopt, .reason = "not measured"};
    if (values.contains(info.name) && values[info.name].is_number()) {
      metric.value = values[info.name].get<double>();
      metric.reason.clear();
    } else if (reasons.contains(info.name)) {
      metric.reason = ValueText(reasons[info.name]);
    }
    metrics.push_back(std::move(metric));
  }
  return metrics;
}

std::string TitleOf(const Json& trial) {
  const std::string cell = ValueText(trial["cell"]);
  return absl::StrCat("trial ", ValueText(trial["trial_id"]), ": ", ValueText(trial["arm"]),
                      cell == "-" ? "" : absl::StrCat(", ", cell), ", repeat ",
                      ValueText(trial["repeat"]), " (", ValueText(trial["kind"]), ")");
}

std::string FormatShown(const Json& shown) {
  std::string text = absl::StrCat(TitleOf(shown["trial"]), "\n");
  AppendEntries(shown["trial"], &text);
  if (!shown["facts"].empty()) {
    absl::StrAppend(&text, "measured with\n");
    AppendEntries(shown["facts"], &text);
  }
  for (const Json& outcome : shown["outcome"]) {
    absl::StrAppend(&text, "ended\n");
    AppendEntries(outcome, &text);
  }
  if (!shown["counters"].empty()) absl::StrAppend(&text, "counted\n");
  std::map<std::string, std::string> by_layer;
  for (const Json& counter : shown["counters"]) {
    if (counter["layer"] == -1) {
      absl::StrAppendFormat(&text, "  %-24s %s\n", ValueText(counter["name"]),
                            ValueText(counter["value"]));
    } else {
      absl::StrAppendFormat(&by_layer[ValueText(counter["name"])], " %s:%.3g",
                            ValueText(counter["layer"]), counter["value"].get<double>());
    }
  }
  for (const auto& [name, values] : by_layer) {
    absl::StrAppendFormat(&text, "  %-24s by layer%s\n", name, values);
  }
  absl::StrAppend(&text, "spec\n  ", shown["spec"].dump(), "\n");
  if (ValueText(shown["trial"]["kind"]) == "quality") {
    absl::StrAppend(&text, "quality\n");
    for (const SummaryMetric& metric : MetricsOf(shown, QualityMetrics())) {
      absl::StrAppendFormat(&text, "  %-24s %s\n", metric.name,
                            metric.value ? absl::StrFormat("%.6g", *metric.value) : metric.reason);
    }
    for (const Json& part : shown["positions"]) {
      absl::StrAppendFormat(&text,
                            "  from position %-10s kl %.4g, top-1 agreement %.3f, %s tokens\n",
                            ValueText(part["first_position"]), part["kl"].get<double>(),
                            part["top1_agreement"].get<double>(), ValueText(part["scored_tokens"]));
    }
    for (const Json& depth : shown["passkeys"]) {
      absl::StrAppendFormat(&text,
                            "  pass keys at depth %-5s %s of %s recalled, %s by the full cache\n",
                            ValueText(depth["depth"]), ValueText(depth["recalled"]),
                            ValueText(depth["prompts"]), ValueText(depth["reference_recalled"]));
    }
    return text;
  }
  return absl::StrCat(text, FormatTelemetry(MetricsOf(shown, Metrics())), "\n",
                      FormatTrialBlock("Serving Benchmark Result", MetricsOf(shown, Metrics())));
}

absl::Status ShowRequests(const Flags& flags, TableSource& tables, TrialId trial) {
  // The packed token times are for programs.
  const bool text = flags.output == "text";
  const char* columns = text ? "request_index AS request, status, prompt_tokens, output_tokens, "
                               "scheduled_ns, first_token_ns, finished_ns, preemptions, "
                               "tokens_evicted, entries_fetched, engaged, output_digest"
                             : "*";
  ASSIGN_OR_RETURN(const Table table,
                   tables.Run(absl::StrCat("SELECT ", columns, " FROM v_requests WHERE trial_id = ",
                                           trial.value(), " ORDER BY request_index"),
                              QueryLimits()));
  std::fputs(FormatTable(table, text ? ReportFormat::kTable : ReportFormat::kJson).c_str(), stdout);
  return absl::OkStatus();
}

absl::Status Show(const Flags& flags, TableSource& tables) {
  ASSIGN_OR_RETURN(const TrialId trial, ParseTrial(flags.trial));
  ASSIGN_OR_RETURN(const std::string json, tables.ShowTrial(trial));
  if (flags.requests) return ShowRequests(flags, tables, trial);
  const Json shown = Json::parse(json, nullptr, false);
  if (shown.is_discarded()) return absl::DataLossError("the store's answer is no JSON");
  std::string text;
  if (flags.output == "json") {
    text = shown.dump(2) + "\n";
  } else if (flags.output == "vllm") {
    text = FormatTrialJson(MetricsOf(shown, Metrics()));
  } else {
    text = FormatShown(shown);
  }
  std::printf("%s%s", text.c_str(), text.back() == '\n' ? "" : "\n");
  return absl::OkStatus();
}

int Run(const Flags& flags) {
  const absl::StatusOr<Source> source = OpenSource(flags.source);
  if (!source.ok()) return Fail(source.status());
  const absl::Status status = Show(flags, *source->tables);
  return status.ok() ? kExitOk : Fail(status);
}

}  // namespace

void AddShowCommand(CLI::App& app, int* exit_code) {
  CLI::App* command = AddCommand(app, "show", kSummary, kMore);
  auto flags = std::make_shared<Flags>();
  command->add_option("TRIAL", flags->trial, "Its number")->required();
  command->add_option("-o,--output", flags->output, "text, json (everything) or vllm (flat keys)")
      ->check(CLI::IsMember({"text", "json", "vllm"}))
      ->type_name("FORMAT")
      ->capture_default_str();
  command->add_flag("--requests", flags->requests,
                    "A row for each request instead, with the digest of its output");
  AddSourceFlags(*command, &flags->source);
  command->callback([flags, exit_code] { *exit_code = Run(*flags); });
}

}  // namespace kvsweep
