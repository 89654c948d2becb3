#include "storage/record_tables.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "google/protobuf/io/coded_stream.h"
#include "google/protobuf/io/zero_copy_stream_impl_lite.h"
#include "storage/record_audit.h"

namespace kvsweep {
namespace {

constexpr char kInsertStart[] =
    "INSERT INTO trial_start VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)";
constexpr char kInsertFact[] = "INSERT INTO trial_start_fact VALUES (?1, ?2, ?3)";
constexpr char kInsertRequest[] =
    "INSERT INTO request VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, "
    "?16, ?17, ?18, ?19, ?20, ?21, ?22, ?23, ?24, ?25)";
constexpr char kInsertCounter[] = "INSERT INTO counter VALUES (?1, ?2, ?3, ?4, ?5)";
constexpr char kInsertSample[] = "INSERT INTO sample VALUES (?1, ?2, ?3, ?4, ?5)";
constexpr char kInsertQuality[] =
    "INSERT INTO quality VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14)";
constexpr char kInsertPosition[] =
    "INSERT INTO quality_position VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)";
constexpr char kInsertPasskey[] =
    "INSERT INTO passkey VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)";
constexpr char kInsertOutcome[] =
    "INSERT INTO trial_outcome VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)";
constexpr char kInsertDiscard[] = "INSERT INTO discard VALUES (?1, ?2, ?3)";
constexpr char kInsertFinish[] = "INSERT INTO finish VALUES (?1, ?2, ?3, ?4)";
constexpr char kSelectFacts[] =
    "SELECT name, value FROM trial_start_fact WHERE record_id = ?1 ORDER BY name";
constexpr char kSelectPositions[] =
    "SELECT * FROM quality_position WHERE record_id = ?1 ORDER BY bucket";

absl::Status ReadStart(Database& database, const Statement& row, TrialStart* start) {
  start->set_backend(row.String(2));
  start->set_device(row.String(3));
  start->set_device_class(row.String(4));
  start->set_driver(row.String(5));
  start->set_runner_build(row.String(6));
  start->set_method_version(static_cast<uint32_t>(row.Int(7)));
  start->set_time_mode(row.String(8));
  start->set_started_unix_ns(row.Int(9));
  start->set_execution(static_cast<uint32_t>(row.Int(10)));
  ASSIGN_OR_RETURN(Statement * facts, database.Prepare(kSelectFacts));
  const StatementUse use(*facts);
  facts->BindInt(1, row.Int(0));
  while (true) {
    ASSIGN_OR_RETURN(const bool more, facts->Step());
    if (!more) return absl::OkStatus();
    (*start->mutable_facts())[facts->String(0)] = facts->String(1);
  }
}

absl::Status ReadRequest(const Statement& row, RequestRow* request) {
  request->set_index(static_cast<uint32_t>(row.Int(2)));
  request->set_status(static_cast<RequestRow::Status>(row.Int(3)));
  request->set_prompt_tokens(static_cast<uint32_t>(row.Int(4)));
  request->set_output_tokens(static_cast<uint32_t>(row.Int(5)));
  request->set_scheduled_ns(row.Int(6));
  request->set_issued_ns(row.Int(7));
  request->set_admitted_ns(row.Int(8));
  request->set_first_token_ns(row.Int(9));
  request->set_finished_ns(row.Int(10));
  RETURN_IF_ERROR(ReadVarints(row.Bytes(11), request->mutable_token_gap_ns()));
  request->set_preemptions(static_cast<uint32_t>(row.Int(12)));
  request->set_recomputed_tokens(static_cast<uint32_t>(row.Int(13)));
  request->set_entries_attended(row.Int(14));
  request->set_entries_full(row.Int(15));
  request->set_tokens_evicted(row.Int(16));
  request->set_entries_fetched(row.Int(17));
  request->set_kv_device_bytes_peak(row.Int(18));
  request->set_kv_host_bytes_peak(row.Int(19));
  request->set_output_digest(static_cast<uint64_t>(row.Int(20)));
  request->set_engaged(row.Int(21) != 0);
  request->set_engagement_expected(row.Int(22) != 0);
  request->set_session(static_cast<uint32_t>(row.Int(23)));
  request->set_turn(static_cast<uint32_t>(row.Int(24)));
  return absl::OkStatus();
}

absl::Status ReadCounter(const Statement& row, Counter* counter) {
  counter->set_name(row.String(2));
  counter->set_layer(static_cast<int32_t>(row.Int(3)));
  counter->set_value(row.Real(4));
  return absl::OkStatus();
}

absl::Status ReadSample(const Statement& row, Sample* sample) {
  sample->set_name(row.String(2));
  sample->set_time_ns(row.Int(3));
  sample->set_value(row.Real(4));
  return absl::OkStatus();
}

absl::Status ReadPositions(Database& database, int64_t record_id, QualityRow* quality) {
  ASSIGN_OR_RETURN(Statement * buckets, database.Prepare(kSelectPositions));
  const StatementUse use(*buckets);
  buckets->BindInt(1, record_id);
  while (true) {
    ASSIGN_OR_RETURN(const bool more, buckets->Step());
    if (!more) return absl::OkStatus();
    QualityPositions& positions = *quality->add_positions();
    positions.set_first_position(static_cast<uint32_t>(buckets->Int(2)));
    positions.set_scored_tokens(static_cast<uint32_t>(buckets->Int(3)));
    positions.set_nll_sum(buckets->Real(4));
    positions.set_reference_nll_sum(buckets->Real(5));
    positions.set_kl_sum(buckets->Real(6));
    positions.set_top1_matches(static_cast<uint32_t>(buckets->Int(7)));
  }
}

absl::Status ReadQuality(Database& database, const Statement& row, QualityRow* quality) {
  quality->set_window(static_cast<uint32_t>(row.Int(2)));
  quality->set_scored_tokens(static_cast<uint32_t>(row.Int(3)));
  quality->set_nll_sum(row.Real(4));
  quality->set_reference_nll_sum(row.Real(5));
  quality->set_kl_sum(row.Real(6));
  quality->set_top1_matches(static_cast<uint32_t>(row.Int(7)));
  quality->set_dropped_tokens(static_cast<uint32_t>(row.Int(8)));
  quality->set_dropped_nll_sum(row.Real(9));
  quality->set_dropped_reference_nll_sum(row.Real(10));
  quality->set_dropped_kl_sum(row.Real(11));
  quality->set_dropped_top1_matches(static_cast<uint32_t>(row.Int(12)));
  quality->set_attended_fraction(row.Real(13));
  return ReadPositions(database, row.Int(0), quality);
}

absl::Status ReadPasskey(const Statement& row, PasskeyRow* passkey) {
  passkey->set_index(static_cast<uint32_t>(row.Int(2)));
  passkey->set_depth(row.Real(3));
  passkey->set_context_tokens(static_cast<uint32_t>(row.Int(4)));
  passkey->set_digits(static_cast<uint32_t>(row.Int(5)));
  passkey->set_correct_digits(static_cast<uint32_t>(row.Int(6)));
  passkey->set_recalled(row.Int(7) != 0);
  passkey->set_reference_correct_digits(static_cast<uint32_t>(row.Int(8)));
  passkey->set_reference_recalled(row.Int(9) != 0);
  return absl::OkStatus();
}

absl::Status ReadOutcome(const Statement& row, TrialOutcome* outcome) {
  outcome->set_outcome(static_cast<Outcome>(row.Int(2)));
  outcome->set_evidence(row.String(3));
  outcome->set_asked_bytes(row.Int(4));
  outcome->set_available_bytes(row.Int(5));
  outcome->set_phase(row.String(6));
  outcome->set_duration_ns(row.Int(7));
  outcome->set_signal(static_cast<int32_t>(row.Int(8)));
  outcome->set_log_tail(row.String(9));
  return absl::OkStatus();
}

// The tables of records: how a row of each becomes a record's body.
struct RecordTable {
  const char* select;
  absl::Status (*read)(Database& database, const Statement& row, Record* record);
};

#define KVSWEEP_SELECT_RECORDS(table) \
  "SELECT * FROM " table " WHERE record_id BETWEEN ?1 AND ?2 ORDER BY record_id"

constexpr std::array<RecordTable, 9> kTables = {{
    {KVSWEEP_SELECT_RECORDS("trial_start"),
     [](Database& database, const Statement& row, Record* record) {
       return ReadStart(database, row, record->mutable_start());
     }},
    {KVSWEEP_SELECT_RECORDS("request"),
     [](Database&, const Statement& row, Record* record) {
       return ReadRequest(row, record->mutable_request());
     }},
    {KVSWEEP_SELECT_RECORDS("counter"),
     [](Database&, const Statement& row, Record* record) {
       return ReadCounter(row, record->mutable_counter());
     }},
    {KVSWEEP_SELECT_RECORDS("sample"),
     [](Database&, const Statement& row, Record* record) {
       return ReadSample(row, record->mutable_sample());
     }},
    {KVSWEEP_SELECT_RECORDS("quality"),
     [](Database& database, const Statement& row, Record* record) {
       return ReadQuality(database, row, record->mutable_quality());
     }},
    {KVSWEEP_SELECT_RECORDS("passkey"),
     [](Database&, const Statement& row, Record* record) {
       return ReadPasskey(row, record->mutable_passkey());
     }},
    {KVSWEEP_SELECT_RECORDS("trial_outcome"),
     [](Database&, const Statement& row, Record* record) {
       return ReadOutcome(row, record->mutable_outcome());
     }},
    {KVSWEEP_SELECT_RECORDS("discard"),
     [](Database&, const Statement& row, Record* record) {
       record->mutable_discard()->set_reason(row.String(2));
       return absl::OkStatus();
     }},
    {KVSWEEP_SELECT_RECORDS("finish"),
     [](Database&, const Statement& row, Record* record) {
       record->mutable_finish()->set_count(row.Int(2));
       record->mutable_finish()->set_digest(row.String(3));
       return absl::OkStatus();
     }},
}};

#undef KVSWEEP_SELECT_RECORDS

}  // namespace

absl::Status DeleteRecords(Database& database, Attempt attempt) {
  for (const char* table :
       {"trial_start_fact", "trial_start", "request", "counter", "sample", "quality_position",
        "quality", "passkey", "trial_outcome", "discard", "finish"}) {
    RETURN_IF_ERROR(database.Execute(absl::StrCat("DELETE FROM ", table,
                                                  " WHERE record_id BETWEEN ", RecordId(attempt, 0),
                                                  " AND ", RecordId(attempt, kMaxSequence))
                                         .c_str()));
  }
  return absl::OkStatus();
}

int64_t RecordId(Attempt attempt, uint64_t sequence) {
  KVSWEEP_CHECK_LE(attempt.value(), kMaxAttempt);
  KVSWEEP_CHECK_LE(sequence, kMaxSequence);
  return static_cast<int64_t>(attempt.value() << 32 | sequence);
}

void SerializeRecord(const Record& record, std::string* bytes) {
  bytes->resize(record.ByteSizeLong());
  google::protobuf::io::ArrayOutputStream array(bytes->data(), static_cast<int>(bytes->size()));
  google::protobuf::io::CodedOutputStream out(&array);
  out.SetSerializationDeterministic(true);
  record.SerializeWithCachedSizes(&out);
}

absl::StatusOr<RecordWriter> RecordWriter::Create(Database& database) {
  RecordWriter writer;
  ASSIGN_OR_RETURN(writer.start_, database.Prepare(kInsertStart));
  ASSIGN_OR_RETURN(writer.fact_, database.Prepare(kInsertFact));
  ASSIGN_OR_RETURN(writer.request_, database.Prepare(kInsertRequest));
  ASSIGN_OR_RETURN(writer.counter_, database.Prepare(kInsertCounter));
  ASSIGN_OR_RETURN(writer.sample_, database.Prepare(kInsertSample));
  ASSIGN_OR_RETURN(writer.quality_, database.Prepare(kInsertQuality));
  ASSIGN_OR_RETURN(writer.position_, database.Prepare(kInsertPosition));
  ASSIGN_OR_RETURN(writer.passkey_, database.Prepare(kInsertPasskey));
  ASSIGN_OR_RETURN(writer.outcome_, database.Prepare(kInsertOutcome));
  ASSIGN_OR_RETURN(writer.discard_, database.Prepare(kInsertDiscard));
  ASSIGN_OR_RETURN(writer.finish_, database.Prepare(kInsertFinish));
  return writer;
}

absl::Status RecordWriter::Insert(int64_t record_id, const Record& record) {
  const int64_t trial_id = static_cast<int64_t>(record.trial_id());
  switch (record.body_case()) {
    case Record::kRequest:
      return InsertRequest(record_id, record);
    case Record::kCounter:
      return counter_->BindInt(1, record_id)
          .BindInt(2, trial_id)
          .BindText(3, record.counter().name())
          .BindInt(4, record.counter().layer())
          .BindReal(5, record.counter().value())
          .Run();
    case Record::kSample:
      return sample_->BindInt(1, record_id)
          .BindInt(2, trial_id)
          .BindText(3, record.sample().name())
          .BindInt(4, record.sample().time_ns())
          .BindReal(5, record.sample().value())
          .Run();
    case Record::kQuality:
      return InsertQuality(record_id, record);
    case Record::kPasskey:
      return InsertPasskey(record_id, record);
    case Record::kStart:
      return InsertStart(record_id, record);
    case Record::kOutcome:
      return InsertOutcome(record_id, record);
    case Record::kDiscard:
      return discard_->BindInt(1, record_id)
          .BindInt(2, trial_id)
          .BindText(3, record.discard().reason())
          .Run();
    case Record::kFinish:
      return finish_->BindInt(1, record_id)
          .BindInt(2, trial_id)
          .BindInt(3, static_cast<int64_t>(record.finish().count()))
          .BindBlob(4, record.finish().digest())
          .Run();
    case Record::BODY_NOT_SET:
      break;
  }
  KVSWEEP_CHECK(false) << "a record without a body passed ParseRecord";
  return absl::OkStatus();
}

absl::Status RecordWriter::InsertStart(int64_t record_id, const Record& record) {
  const TrialStart& start = record.start();
  RETURN_IF_ERROR(start_->BindInt(1, record_id)
                      .BindInt(2, static_cast<int64_t>(record.trial_id()))
                      .BindText(3, start.backend())
                      .BindText(4, start.device())
                      .BindText(5, start.device_class())
                      .BindText(6, start.driver())
                      .BindText(7, start.runner_build())
                      .BindInt(8, start.method_version())
                      .BindText(9, start.time_mode())
                      .BindInt(10, start.started_unix_ns())
                      .BindInt(11, start.execution())
                      .Run());
  for (const auto& [name, value] : start.facts()) {
    RETURN_IF_ERROR(fact_->BindInt(1, record_id).BindText(2, name).BindText(3, value).Run());
  }
  return absl::OkStatus();
}

absl::Status RecordWriter::InsertRequest(int64_t record_id, const Record& record) {
  const RequestRow& row = record.request();
  token_gaps_.clear();
  AppendVarints(row.token_gap_ns(), &token_gaps_);
  return request_->BindInt(1, record_id)
      .BindInt(2, static_cast<int64_t>(record.trial_id()))
      .BindInt(3, row.index())
      .BindInt(4, row.status())
      .BindInt(5, row.prompt_tokens())
      .BindInt(6, row.output_tokens())
      .BindInt(7, row.scheduled_ns())
      .BindInt(8, row.issued_ns())
      .BindInt(9, row.admitted_ns())
      .BindInt(10, row.first_token_ns())
      .BindInt(11, row.finished_ns())
      .BindBlob(12, token_gaps_)
      .BindInt(13, row.preemptions())
      .BindInt(14, row.recomputed_tokens())
      .BindInt(15, static_cast<int64_t>(row.entries_attended()))
      .BindInt(16, static_cast<int64_t>(row.entries_full()))
      .BindInt(17, static_cast<int64_t>(row.tokens_evicted()))
      .BindInt(18, static_cast<int64_t>(row.entries_fetched()))
      .BindInt(19, static_cast<int64_t>(row.kv_device_bytes_peak()))
      .BindInt(20, static_cast<int64_t>(row.kv_host_bytes_peak()))
      .BindInt(21, static_cast<int64_t>(row.output_digest()))
      .BindInt(22, row.engaged())
      .BindInt(23, row.engagement_expected())
      .BindInt(24, row.session())
      .BindInt(25, row.turn())
      .Run();
}

absl::Status RecordWriter::InsertQuality(int64_t record_id, const Record& record) {
  const QualityRow& row = record.quality();
  for (int bucket = 0; bucket < row.positions_size(); ++bucket) {
    const QualityPositions& positions = row.positions(bucket);
    RETURN_IF_ERROR(position_->BindInt(1, record_id)
                        .BindInt(2, bucket)
                        .BindInt(3, positions.first_position())
                        .BindInt(4, positions.scored_tokens())
                        .BindReal(5, positions.nll_sum())
                        .BindReal(6, positions.reference_nll_sum())
                        .BindReal(7, positions.kl_sum())
                        .BindInt(8, positions.top1_matches())
                        .Run());
  }
  return quality_->BindInt(1, record_id)
      .BindInt(2, static_cast<int64_t>(record.trial_id()))
      .BindInt(3, row.window())
      .BindInt(4, row.scored_tokens())
      .BindReal(5, row.nll_sum())
      .BindReal(6, row.reference_nll_sum())
      .BindReal(7, row.kl_sum())
      .BindInt(8, row.top1_matches())
      .BindInt(9, row.dropped_tokens())
      .BindReal(10, row.dropped_nll_sum())
      .BindReal(11, row.dropped_reference_nll_sum())
      .BindReal(12, row.dropped_kl_sum())
      .BindInt(13, row.dropped_top1_matches())
      .BindReal(14, row.attended_fraction())
      .Run();
}

absl::Status RecordWriter::InsertPasskey(int64_t record_id, const Record& record) {
  const PasskeyRow& row = record.passkey();
  return passkey_->BindInt(1, record_id)
      .BindInt(2, static_cast<int64_t>(record.trial_id()))
      .BindInt(3, row.index())
      .BindReal(4, row.depth())
      .BindInt(5, row.context_tokens())
      .BindInt(6, row.digits())
      .BindInt(7, row.correct_digits())
      .BindInt(8, row.recalled())
      .BindInt(9, row.reference_correct_digits())
      .BindInt(10, row.reference_recalled())
      .Run();
}

absl::Status RecordWriter::InsertOutcome(int64_t record_id, const Record& record) {
  const TrialOutcome& outcome = record.outcome();
  return outcome_->BindInt(1, record_id)
      .BindInt(2, static_cast<int64_t>(record.trial_id()))
      .BindInt(3, outcome.outcome())
      .BindText(4, outcome.evidence())
      .BindInt(5, static_cast<int64_t>(outcome.asked_bytes()))
      .BindInt(6, static_cast<int64_t>(outcome.available_bytes()))
      .BindText(7, outcome.phase())
      .BindInt(8, outcome.duration_ns())
      .BindInt(9, outcome.signal())
      .BindText(10, outcome.log_tail())
      .Run();
}

absl::StatusOr<RecordCursor> RecordCursor::Open(Database& database, int64_t first, int64_t last) {
  RecordCursor cursor(database);
  for (size_t table = 0; table < kTables.size(); ++table) {
    ASSIGN_OR_RETURN(Statement * statement, database.Prepare(kTables[table].select));
    Source& source = *cursor.sources_.emplace_back(std::make_unique<Source>(*statement));
    source.table = table;
    ASSIGN_OR_RETURN(source.has_row, statement->BindInt(1, first).BindInt(2, last).Step());
  }
  return cursor;
}

absl::StatusOr<bool> RecordCursor::Next(int64_t* record_id, Record* record) {
  Source* next = nullptr;
  for (const std::unique_ptr<Source>& source : sources_) {
    if (!source->has_row) continue;
    if (next == nullptr || source->statement->Int(0) < next->statement->Int(0)) {
      next = source.get();
    }
  }
  if (next == nullptr) return false;
  record->Clear();
  *record_id = next->statement->Int(0);
  record->set_trial_id(static_cast<uint64_t>(next->statement->Int(1)));
  RETURN_IF_ERROR(kTables[next->table].read(*database_, *next->statement, record));
  ASSIGN_OR_RETURN(next->has_row, next->statement->Step());
  return true;
}

}  // namespace kvsweep
