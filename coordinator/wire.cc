#include "coordinator/wire.h"

#include <algorithm>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/digest.h"
#include "base/limits.h"
#include "base/status_macros.h"
#include "experiments/matrix.h"

namespace kvsweep {
namespace {

constexpr size_t kFinishRecordBytes = 128;  // a finish record is two numbers and a digest
constexpr size_t kFullMessageBytes = limits::kMessageBytes / 2;  // of what goes out

absl::Status CheckName(absl::string_view name, absl::string_view what, bool required) {
  if ((required && name.empty()) || name.size() > static_cast<size_t>(limits::kNameLength) ||
      !std::all_of(name.begin(), name.end(), [](unsigned char c) { return c >= 32 && c != 127; })) {
    return absl::InvalidArgumentError(absl::StrCat(what, " '", absl::CHexEscape(name.substr(0, 40)),
                                                   "' must have ", required ? "1 to " : "at most ",
                                                   limits::kNameLength, " plain characters"));
  }
  return absl::OkStatus();
}

absl::Status CheckCount(int64_t count, int64_t limit, absl::string_view what) {
  if (count <= limit) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(count, " ", what, "; at most ", limit));
}

std::string Shortened(const std::string& text, int64_t limit) {
  return text.substr(0, static_cast<size_t>(limit));
}

absl::StatusOr<SlotHolding> HoldingFromWire(const Holding& message) {
  if (message.attempt() == 0) return absl::InvalidArgumentError("a slot holds attempt 0");
  if (!Holding::Phase_IsValid(message.phase())) {
    return absl::InvalidArgumentError(absl::StrCat("unknown phase ", message.phase()));
  }
  SlotHolding holding;
  holding.attempt = Attempt(message.attempt());
  holding.phase = static_cast<HoldingPhase>(message.phase());
  holding.trial = TrialId(message.trial_id());
  holding.trial_phase = Shortened(message.trial_phase(), limits::kNameLength);
  holding.done = message.done();
  holding.total = message.total();
  holding.reason = Shortened(message.reason(), limits::kEvidenceBytes);
  return holding;
}

absl::StatusOr<SlotReport> SlotFromWire(const SlotState& message) {
  RETURN_IF_ERROR(CheckCount(message.devices_size(), limits::kDevicesPerSlot, "devices in a slot"));
  SlotReport slot;
  for (const Device& device : message.devices()) {
    RETURN_IF_ERROR(CheckName(device.backend(), "backend", /*required=*/true));
    RETURN_IF_ERROR(CheckName(device.name(), "device", /*required=*/false));
    RETURN_IF_ERROR(CheckName(device.device_class(), "device class", /*required=*/false));
    RETURN_IF_ERROR(CheckCount(device.facts_size(), limits::kLabelsPerWorker, "facts of a device"));
    DeviceDescription description{.backend = device.backend(),
                                  .name = device.name(),
                                  .device_class = device.device_class(),
                                  .memory_bytes = device.memory_bytes()};
    for (const auto& [name, value] : device.facts()) {
      RETURN_IF_ERROR(CheckName(name, "fact", /*required=*/true));
      description.facts[name] = Shortened(value, limits::kNameLength);
    }
    slot.devices.push_back(std::move(description));
  }
  if (message.has_holding()) {
    ASSIGN_OR_RETURN(slot.holding, HoldingFromWire(message.holding()));
  }
  return slot;
}

absl::Status CheckState(const WorkerState& state) {
  if (state.protocol_version() != kProtocolVersion) {
    return absl::FailedPreconditionError(absl::StrCat(
        "the worker speaks protocol version ", state.protocol_version(), ", this coordinator ",
        kProtocolVersion, ": install the same release on both"));
  }
  RETURN_IF_ERROR(CheckName(state.worker_id(), "worker id", /*required=*/true));
  RETURN_IF_ERROR(CheckName(state.machine(), "machine", /*required=*/false));
  RETURN_IF_ERROR(CheckName(state.build(), "build", /*required=*/false));
  RETURN_IF_ERROR(CheckCount(state.slots_size(), limits::kSlotsPerWorker, "slots"));
  RETURN_IF_ERROR(CheckCount(state.labels_size(), limits::kLabelsPerWorker, "labels"));
  RETURN_IF_ERROR(CheckCount(state.models_size(), limits::kDigestsPerWorker, "models"));
  for (const auto& [name, value] : state.labels()) {
    RETURN_IF_ERROR(CheckName(name, "label", /*required=*/true));
    RETURN_IF_ERROR(CheckName(value, "label", /*required=*/false));
  }
  for (const HeldModel& model : state.models()) {
    if (model.digest().size() != Digest::kBytes) {
      return absl::InvalidArgumentError("the digest of a model is not 32 bytes long");
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<WorkerReport> ReportFromWire(const WorkerState& state) {
  RETURN_IF_ERROR(CheckState(state));
  WorkerReport report;
  report.worker = WorkerId(state.worker_id());
  report.incarnation = state.incarnation();
  report.machine = state.machine().empty() ? state.worker_id() : state.machine();
  report.labels = {state.labels().begin(), state.labels().end()};
  report.build = state.build();
  report.method_version = state.method_version();
  report.draining = state.draining();
  report.unhealthy_reason = Shortened(state.unhealthy_reason(), limits::kEvidenceBytes);
  bool has_devices = false;
  for (int index = 0; index < state.slots_size(); ++index) {
    if (state.slots(index).index() != static_cast<uint32_t>(index)) {
      return absl::InvalidArgumentError(
          absl::StrCat("slot ", state.slots(index).index(), " stands where slot ", index, " must"));
    }
    ASSIGN_OR_RETURN(SlotReport slot, SlotFromWire(state.slots(index)));
    has_devices = has_devices || !slot.devices.empty();
    report.slots.push_back(std::move(slot));
  }
  for (const HeldModel& model : state.models()) report.model_digests.insert(model.digest());
  if (has_devices && report.method_version != kMethodVersion && report.unhealthy_reason.empty()) {
    report.unhealthy_reason = absl::StrCat("its runner measures by method ", report.method_version,
                                           ", this coordinator by ", kMethodVersion);
  }
  return report;
}

absl::Status CheckBatch(const ReportBatch& batch) {
  RETURN_IF_ERROR(CheckName(batch.worker_id(), "worker id", /*required=*/true));
  RETURN_IF_ERROR(CheckCount(batch.records_size(), limits::kBatchRows, "records in a batch"));
  if (batch.records_size() == 0 || batch.attempt() == 0 || batch.first_sequence() == 0) {
    return absl::InvalidArgumentError("a batch without records, attempt or sequence");
  }
  return absl::OkStatus();
}

bool EndsWithFinish(const ReportBatch& batch) {
  const std::string& last = batch.records(batch.records_size() - 1);
  Record record;
  return last.size() <= kFinishRecordBytes && record.ParseFromString(last) && record.has_finish();
}

DesiredState WishToWire(const WorkerWish& wish, const std::map<Attempt, std::string>& round_specs) {
  DesiredState desired;
  size_t bytes = 0;
  for (const SlotWish& slot : wish.slots) {
    if (slot.kind == SlotWish::Kind::kRun) {
      // What does not fit comes with the next answer; a slot that is not named is left as it is.
      const size_t spec_bytes = round_specs.at(slot.attempt).size();
      if (bytes > 0 && bytes + spec_bytes > kFullMessageBytes) continue;
      bytes += spec_bytes;
    }
    SlotDesire* message = desired.add_slots();
    message->set_index(static_cast<uint32_t>(slot.slot.value()));
    message->set_attempt(slot.attempt.value());
    switch (slot.kind) {
      case SlotWish::Kind::kRun:
        message->set_run(round_specs.at(slot.attempt));
        break;
      case SlotWish::Kind::kAbandon:
        message->set_abandon(true);
        break;
      case SlotWish::Kind::kSettled:
        message->set_settled(true);
        break;
    }
  }
  return desired;
}

namespace {

// The table of workers is made as a table of the store is, and sent the same way.
std::string SlotText(const SlotReport& slot) {
  if (slot.devices.empty()) return "no runner";
  return absl::StrCat(
      slot.devices.size(), "x",
      slot.devices[0].name.empty() ? slot.devices[0].backend : slot.devices[0].name);
}

std::string HoldingText(const SlotReport& slot) {
  if (!slot.holding.has_value()) return "idle";
  const SlotHolding& holding = *slot.holding;
  return absl::StrCat("trial ", holding.trial.value(), " ", holding.trial_phase, " ", holding.done,
                      "/", holding.total);
}

}  // namespace

Table WorkersTable(const Roster& roster, int64_t now_ns) {
  Table table;
  table.columns = {"worker", "state",       "machine", "slots", "running",
                   "build",  "heard_s_ago", "models",  "labels"};
  for (const auto& [id, entry] : roster.entries()) {
    std::vector<std::string> slots;
    std::vector<std::string> running;
    for (const SlotReport& slot : entry.report.slots) {
      slots.push_back(SlotText(slot));
      running.push_back(HoldingText(slot));
    }
    const std::string reason = entry.IdleReason();
    table.rows.push_back({id.value(),
                          reason.empty() ? std::string(PresenceName(entry.presence)) : reason,
                          entry.report.machine, absl::StrJoin(slots, ", "),
                          absl::StrJoin(running, ", "), Shortened(entry.report.build, 12),
                          static_cast<double>((now_ns - entry.heard_ns) / kNsPerMs) / 1000.0,
                          static_cast<int64_t>(entry.report.model_digests.size()),
                          absl::StrJoin(entry.report.labels, " ", absl::PairFormatter("="))});
  }
  return table;
}

namespace {

size_t SetField(const TableCell& value, TableValue* field) {
  if (const auto* integer = std::get_if<int64_t>(&value)) {
    field->set_integer(*integer);
  } else if (const auto* real = std::get_if<double>(&value)) {
    field->set_real(*real);
  } else if (const auto* text = std::get_if<std::string>(&value)) {
    if (text->size() > kFullMessageBytes) {
      field->set_text(absl::StrCat("(", text->size(), " bytes: too large to be sent)"));
    } else {
      field->set_text(*text);
    }
  } else if (const auto* blob = std::get_if<Blob>(&value)) {
    if (blob->bytes.size() > kFullMessageBytes) {
      field->set_text(absl::StrCat("(", blob->bytes.size(), " bytes: too large to be sent)"));
    } else {
      field->set_blob(blob->bytes);
    }
  }
  return field->ByteSizeLong() + 4;
}

}  // namespace

std::vector<TableReply> TableToWire(const Table& table) {
  std::vector<TableReply> messages(1);
  for (const std::string& column : table.columns) messages.back().add_columns(column);
  messages.back().set_truncated(table.truncated);
  size_t bytes = messages.back().ByteSizeLong();
  for (const std::vector<TableCell>& values : table.rows) {
    TableRow row;
    size_t row_bytes = 8;
    for (const TableCell& value : values) row_bytes += SetField(value, row.add_values());
    if (row_bytes >
        kFullMessageBytes) {  // wide rows of long texts: keep the columns, drop what is long
      for (TableValue& field : *row.mutable_values()) {
        if (field.ByteSizeLong() > 1024) field.set_text("(too large to be sent)");
      }
      row_bytes = row.ByteSizeLong() + 8;
    }
    if (bytes + row_bytes > kFullMessageBytes && messages.back().rows_size() > 0) {
      messages.emplace_back();
      bytes = 0;
    }
    *messages.back().add_rows() = std::move(row);
    bytes += row_bytes;
  }
  return messages;
}

}  // namespace kvsweep
