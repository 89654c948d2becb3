#include "tests/bench/results.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/time.h"
#include "base/check.h"
#include "base/clock.h"
#include "base/file.h"
#include "base/status_macros.h"
#include "base/version.h"
#include "tests/bench/floors.h"

namespace kvsweep {
namespace {

using Json = nlohmann::json;

constexpr int64_t kFileBytes = int64_t{16} << 20;

double NsIn(absl::string_view unit) {
  if (unit == "us") return 1e3;
  if (unit == "ms") return 1e6;
  KVSWEEP_CHECK_EQ(unit, "s");
  return 1e9;
}

std::string Today() {
  const absl::Time now = absl::FromUnixNanos(RealClock::Get().UnixNs());
  return absl::FormatTime("%Y-%m-%d", now, absl::UTCTimeZone());
}

absl::StatusOr<Json> ParseJson(absl::string_view text, absl::string_view what) {
  Json json = Json::parse(text.begin(), text.end(), nullptr, /*allow_exceptions=*/false);
  if (json.is_discarded() || !json.is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(what, " is no JSON object"));
  }
  return json;
}

Json JsonOf(const ResultRow& row) {
  return {{"case", row.name},
          {"what", row.what},
          {"measured", row.measured},
          {"unit", row.unit},
          {"spread", row.spread},
          {"floor", row.floor},
          {"bound", row.bound},
          {"ratio", row.ratio},
          {"ratio_is", row.ratio_is},
          {"target", row.target},
          {"compare", row.at_least ? "at least" : "at most"},
          {"met", row.met()},
          {"device_bytes", row.cost.device_bytes},
          {"link_bytes", row.cost.link_bytes},
          {"operations", row.cost.operations},
          {"samples", row.samples},
          {"stop", row.stop},
          {"note", row.note},
          {"peer", row.peer},
          {"error", row.error}};
}

// Three digits that count.
std::string Short(double value) {
  const double size = std::abs(value);
  if (size >= 1000) return absl::StrFormat("%.0f", value);
  if (size >= 100) return absl::StrFormat("%.0f", value);
  if (size >= 10) return absl::StrFormat("%.1f", value);
  return absl::StrFormat("%.2f", value);
}

std::string WithUnit(double value, const std::string& unit) {
  return unit.empty() ? Short(value) : absl::StrCat(Short(value), " ", unit == "us" ? "µs" : unit);
}

// A share of a limit in per cent, else the number and what it is.
std::string ShowRatio(double ratio, const std::string& ratio_is) {
  if (ratio_is == "floor / measured" || ratio_is == "share") {
    return absl::StrFormat("%.1f %%", 100 * ratio);
  }
  return absl::StrCat(Short(ratio), " ", ratio_is);
}

std::string ShowTarget(const Json& row) {
  const double target = row.value("target", 0.0);
  if (target == 0) return "–";
  return absl::StrCat(row.value("compare", "") == "at least" ? "≥ " : "≤ ",
                      ShowRatio(target, row.value("ratio_is", "")));
}

std::string ShowPeers(const Json& file, const std::string& name) {
  std::string text;
  if (name.empty() || !file.contains("peers")) return "–";
  for (const Json& peer : file["peers"].value("rows", Json::array())) {
    if (peer.value("case", "") != name) continue;
    const std::string error = peer.value("error", "");
    absl::StrAppend(&text, text.empty() ? "" : ", ", peer.value("peer", ""), " ",
                    error.empty() ? WithUnit(peer.value("measured", 0.0), "us") : "refused");
  }
  return text.empty() ? "–" : text;
}

std::string ShowRow(const Json& file, const Json& row) {
  const std::string what = row.value("what", "");
  const std::string error = row.value("error", "");
  if (!error.empty()) return absl::StrCat("| ", what, " | ", error, " | | | | | |\n");
  const std::string unit = row.value("unit", "");
  const std::string ratio_is = row.value("ratio_is", "");
  const double floor = row.value("floor", 0.0);
  const std::string verdict = row.value("target", 0.0) == 0 ? ""
                              : row.value("met", false)     ? "met"
                                                            : "**missed**";
  return absl::StrCat(
      "| ", what, " | ", WithUnit(row.value("measured", 0.0), unit), " ± ",
      Short(100 * row.value("spread", 0.0)), " % | ",
      floor == 0 ? "–" : absl::StrCat(WithUnit(floor, unit), " (", row.value("bound", ""), ")"),
      " | ", ratio_is.empty() ? "–" : ShowRatio(row.value("ratio", 0.0), ratio_is), " | ",
      ShowTarget(row), " | ", verdict, " | ", ShowPeers(file, row.value("peer", "")), " |\n");
}

std::string ShowLimits(const Json& file) {
  std::string text;
  for (const Json& limit : file.value("limits", Json::array())) {
    const std::string unit = limit.value("unit", "");
    const double value = limit.value("value", 0.0);
    absl::StrAppend(&text, text.empty() ? "" : "; ", limit.value("name", ""), " ",
                    unit == "B/s"    ? absl::StrCat(Short(value / 1e9), " GB/s")
                    : unit == "op/s" ? absl::StrCat(Short(value / 1e12), " TFLOP/s")
                                     : absl::StrCat(Short(value), " ", unit));
  }
  return text;
}

Peers PeersOf(const Json& json) {
  Peers peers{.about = json.value("about", "")};
  for (const Json& row : json.value("rows", Json::array())) {
    peers.rows.push_back({.name = row.value("case", ""),
                          .peer = row.value("peer", ""),
                          .measured_us = row.value("measured", 0.0),
                          .error = row.value("error", "")});
  }
  return peers;
}

}  // namespace

// -------------------------------------------------------------------------------------------- rows

bool ResultRow::met() const {
  if (target == 0 || !error.empty()) return false;
  return at_least ? ratio >= target : ratio <= target;
}

void ResultRow::SetTime(const Timing& timing, absl::string_view time_unit) {
  unit = std::string(time_unit);
  measured = timing.median_ns / NsIn(unit);
  spread = timing.spread;
  samples = timing.samples;
  stop = timing.stop;
}

void ResultRow::SetFloor(const DeviceProfile& limits) {
  floor = FloorNs(cost, limits, &bound) / NsIn(unit);
  ratio = measured > 0 ? floor / measured : 0;
  ratio_is = "floor / measured";
}

// ------------------------------------------------------------------------------------------- peers

const PeerRow* Peers::Best(absl::string_view name) const {
  const PeerRow* best = nullptr;
  for (const PeerRow& row : rows) {
    if (row.name != name || !row.error.empty()) continue;
    if (best == nullptr || row.measured_us < best->measured_us) best = &row;
  }
  return best;
}

absl::StatusOr<Peers> ReadPeers(const std::string& path) {
  ASSIGN_OR_RETURN(const std::string text, ReadFile(path, kFileBytes));
  ASSIGN_OR_RETURN(const Json json, ParseJson(text, path));
  return PeersOf(json);
}

// -------------------------------------------------------------------------------------------- file

ResultFile::ResultFile(const std::string& path)
    : path_(path), content_(std::make_unique<Json>(Json::object())) {}
ResultFile::ResultFile(ResultFile&&) = default;
ResultFile::~ResultFile() = default;

absl::StatusOr<ResultFile> ResultFile::Open(const std::string& path, const ResultHeader& header,
                                            bool fresh) {
  ResultFile file(path);
  Json& content = *file.content_;
  content = {{"table", header.table},
             {"device", header.device.device},
             {"driver", header.device.driver},
             {"backend", header.device.backend},
             {"date", Today()},
             {"commit", GetBuildInfo().commit},
             {"build", GetBuildInfo().runner_digest},
             {"command", header.command},
             {"limits", Json::array()},
             {"rows", Json::array()},
             {"peers", Json::object()}};
  if (path.empty() || fresh) return file;
  const absl::StatusOr<std::string> text = ReadFile(path, kFileBytes);
  if (absl::IsNotFound(text.status())) return file;
  RETURN_IF_ERROR(text.status());
  ASSIGN_OR_RETURN(const Json old, ParseJson(*text, path));
  for (const char* key : {"table", "device", "build"}) {
    if (old.value(key, "") != content[key]) return file;
  }
  for (const char* key : {"date", "limits", "peers"}) content[key] = old.value(key, content[key]);
  for (const Json& row : old.value("rows", Json::array())) {
    const std::string error = row.value("error", "");
    if (error.empty() || error == kDoesNotFit) content["rows"].push_back(row);
  }
  DeviceProfile& profile = file.limits_.profile;
  for (const Json& limit : content["limits"]) {
    file.limits_.rows.push_back({.name = limit.value("name", ""),
                                 .value = limit.value("value", 0.0),
                                 .unit = limit.value("unit", ""),
                                 .spread = limit.value("spread", 0.0)});
  }
  const Json kept = old.value("profile", Json::object());
  profile = {.name = header.device.device,
             .device_bytes_per_s = kept.value("device_bytes_per_s", 0.0),
             .link_bytes_per_s = kept.value("link_bytes_per_s", 0.0),
             .operations_per_s = kept.value("operations_per_s", 0.0),
             .element_bytes = kept.value("element_bytes", 2.0)};
  content["profile"] = kept;
  file.peers_ = PeersOf(content["peers"]);
  return file;
}

bool ResultFile::Has(absl::string_view name) const {
  return std::ranges::any_of((*content_)["rows"], [&](const Json& row) {
    return row.value("case", "") == std::string(name);
  });
}

absl::Status ResultFile::SetLimits(const MachineLimits& limits) {
  limits_ = limits;
  Json rows = Json::array();
  for (const Limit& limit : limits.rows) {
    rows.push_back({{"name", limit.name},
                    {"value", limit.value},
                    {"unit", limit.unit},
                    {"spread", limit.spread}});
  }
  (*content_)["limits"] = std::move(rows);
  (*content_)["profile"] = {{"device_bytes_per_s", limits.profile.device_bytes_per_s},
                            {"link_bytes_per_s", limits.profile.link_bytes_per_s},
                            {"operations_per_s", limits.profile.operations_per_s},
                            {"element_bytes", limits.profile.element_bytes}};
  return Write();
}

absl::Status ResultFile::SetPeers(const Peers& peers) {
  peers_ = peers;
  Json rows = Json::array();
  for (const PeerRow& row : peers.rows) {
    rows.push_back({{"case", row.name},
                    {"peer", row.peer},
                    {"measured", row.measured_us},
                    {"unit", "us"},
                    {"error", row.error}});
  }
  (*content_)["peers"] = {{"about", peers.about}, {"rows", std::move(rows)}};
  return Write();
}

absl::Status ResultFile::Add(const ResultRow& row) {
  (*content_)["rows"].push_back(JsonOf(row));
  return Write();
}

absl::Status ResultFile::Write() const {
  if (path_.empty()) return absl::OkStatus();
  return WriteFileAtomic(path_, content_->dump(1) + "\n");
}

// ------------------------------------------------------------------------------------------ tables

absl::StatusOr<std::string> MarkdownTable(absl::string_view json_text) {
  ASSIGN_OR_RETURN(const Json file, ParseJson(json_text, "the file of results"));
  if (!file.contains("rows") || !file.contains("table")) {
    return absl::InvalidArgumentError("the file of results has no table or no rows");
  }
  std::string text = absl::StrCat(file.value("device", ""), ", ", file.value("driver", ""), ", ",
                                  file.value("date", ""), ", commit ", file.value("commit", ""),
                                  "; `", file.value("command", ""),
                                  "`.\n\nLimits of the same run: ", ShowLimits(file), ".\n\n");
  const std::string about = file.value("peers", Json::object()).value("about", "");
  if (!about.empty()) absl::StrAppend(&text, "Peers: ", about, ".\n\n");
  absl::StrAppend(&text,
                  "| what | measured | floor | ratio | target | | peers |\n"
                  "| --- | --- | --- | --- | --- | --- | --- |\n");
  std::string notes;
  std::string first_failed;
  int failed = 0;
  int missed = 0;
  int held = 0;
  for (const Json& row : file["rows"]) {
    const std::string error = row.value("error", "");
    if (error.empty() || error == kDoesNotFit) {
      absl::StrAppend(&text, ShowRow(file, row));
    } else if (++failed == 1) {
      first_failed = absl::StrCat(row.value("what", ""), ": ", error);
    }
    held += row.value("target", 0.0) != 0;
    missed += row.value("target", 0.0) != 0 && !row.value("met", false);
    if (!row.value("note", "").empty()) {
      absl::StrAppend(&notes, "- ", row.value("what", ""), ": ", row.value("note", ""), "\n");
    }
  }
  if (failed > 0) {
    absl::StrAppend(&text, "\nNot measured, and tried again by the next run: ", failed,
                    failed == 1 ? " row: " : " rows, the first of them ", first_failed, ".\n");
  }
  if (held > 0) absl::StrAppend(&text, "\n", held - missed, " of ", held, " targets met.\n");
  if (!notes.empty()) absl::StrAppend(&text, "\n", notes);
  return text;
}

absl::StatusOr<std::string> ReplaceTable(absl::string_view document, absl::string_view name,
                                         absl::string_view table) {
  const std::string begin = absl::StrCat("<!-- ", name, ": begin -->\n");
  const std::string end = absl::StrCat("<!-- ", name, ": end -->");
  const size_t from = document.find(begin);
  const size_t to = document.find(end);
  if (from == absl::string_view::npos || to == absl::string_view::npos || to < from) {
    return absl::NotFoundError(absl::StrCat("no lines \"<!-- ", name, ": begin -->\" and \"", end,
                                            "\" to put the table between"));
  }
  return absl::StrCat(document.substr(0, from + begin.size()), table, document.substr(to));
}

}  // namespace kvsweep
