#include "kernels/cpu/stream_scheduler.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/clock.h"

namespace kvsweep::cpu {
namespace {

constexpr int kCompute = static_cast<int>(Stream::kCompute);
constexpr const char* kStreamNames[kStreams] = {"compute", "speculation", "host to device",
                                                "device to host"};

int Index(Stream stream) { return static_cast<int>(stream); }

}  // namespace

StreamScheduler::StreamScheduler(Executor* executor, std::optional<uint64_t> seed)
    : executor_(executor) {
  if (!seed.has_value()) return;
  random_.emplace(*seed);
  ranking_lasts_ = uint64_t{1} << (3 * random_->Uniform(4));
  std::iota(rank_.begin(), rank_.end(), 0);
  random_->Shuffle<int>(rank_);
}

StreamScheduler::~StreamScheduler() = default;

// -------------------------------------------------------------------------------------- enqueueing

void StreamScheduler::Push(Entry entry, Stream stream) {
  entry.sequence = next_sequence_++;
  entry.enqueued_ns = host_ns_;
  entry.part = part_;
  if (capture_ == nullptr) {
    queue_[Index(stream)].Push(entry);
    return;
  }
  entry.enqueued_ns = 0;  // a graph's entries are on the device when the launch starts
  std::vector<Entry>& entries = capture_->graph->entries[Index(stream)];
  entries.push_back(entry);
  capture_->joined[Index(stream)][Index(stream)] = entries.size();
}

void StreamScheduler::Enqueue(const Operation& operation, Stream stream) {
  Push({.what = operation}, stream);
}

Event StreamScheduler::CreateEvent() {
  event_record_.push_back(-1);
  return {static_cast<int32_t>(event_record_.size()) - 1};
}

void StreamScheduler::RecordEvent(Event event, Stream stream) {
  KVSWEEP_CHECK(event.index >= 0 && event.index < static_cast<int>(event_record_.size()));
  if (capture_ != nullptr) {
    const int32_t record = capture_->graph->records++;
    Push({.what = RecordEntry{record}}, stream);
    capture_->record_joined.push_back(capture_->joined[Index(stream)]);
    capture_->event_record.resize(event_record_.size(), -1);
    capture_->event_record[event.index] = record;
    return;
  }
  const int32_t record = NewRecord();
  record_[record].references = 2;  // the event and the entry
  if (event_record_[event.index] >= 0) Release(event_record_[event.index]);
  event_record_[event.index] = record;
  Push({.what = RecordEntry{record}}, stream);
}

void StreamScheduler::WaitEvent(Event event, Stream stream) {
  KVSWEEP_CHECK(event.index >= 0 && event.index < static_cast<int>(event_record_.size()));
  const int32_t outside = event_record_[event.index];
  if (capture_ == nullptr) {
    if (outside < 0) return;
    ++record_[outside].references;
    Push({.what = WaitEntry{outside}}, stream);
    return;
  }
  capture_->event_record.resize(event_record_.size(), -1);
  const int32_t record = capture_->event_record[event.index];
  if (record >= 0) {
    Push({.what = WaitEntry{record}}, stream);
    Joined& joined = capture_->joined[Index(stream)];
    for (int s = 0; s < kStreams; ++s) {
      joined[s] = std::max(joined[s], capture_->record_joined[record][s]);
    }
  } else if (outside >= 0 && capture_->error.ok()) {
    capture_->error = absl::FailedPreconditionError(absl::StrCat(
        "a captured stream (", kStreamNames[Index(stream)], ") waits for event ", event.index,
        ", which was recorded before the capture: a replay could not wait for it again"));
  }
}

int32_t StreamScheduler::NewRecord() {
  if (free_records_.empty()) {
    const size_t old = record_.size();
    record_.resize(std::max<size_t>(64, 2 * old));
    free_records_.reserve(record_.size());
    for (size_t i = record_.size(); i > old; --i) {
      free_records_.push_back(static_cast<int32_t>(i - 1));
    }
    ++table_growths_;
  }
  const int32_t record = free_records_.back();
  free_records_.pop_back();
  record_[record] = {};
  return record;
}

void StreamScheduler::Release(int32_t record) {
  if (--record_[record].references == 0) free_records_.push_back(record);
}

// ------------------------------------------------------------------------------------------ graphs

void StreamScheduler::BeginCapture() {
  KVSWEEP_CHECK(capture_ == nullptr) << "BeginCapture inside a capture";
  capture_ = std::make_unique<Capture>();
  capture_->graph = std::make_unique<CapturedGraph>();
  ++table_growths_;
}

absl::StatusOr<Graph> StreamScheduler::EndCapture() {
  KVSWEEP_CHECK(capture_ != nullptr) << "EndCapture without BeginCapture";
  const std::unique_ptr<Capture> capture = std::move(capture_);
  if (!capture->error.ok()) return capture->error;
  for (int stream = 0; stream < kStreams; ++stream) {
    if (capture->joined[kCompute][stream] == capture->graph->entries[stream].size()) continue;
    return absl::FailedPreconditionError(
        absl::StrCat("the captured work of stream \"", kStreamNames[stream],
                     "\" is not waited for by the compute stream at the end of the capture"));
  }
  capture->graph->record.resize(capture->graph->records);
  graph_.push_back(std::move(capture->graph));
  return Graph{static_cast<int32_t>(graph_.size()) - 1};
}

void StreamScheduler::Launch(Graph graph) {
  KVSWEEP_CHECK(capture_ == nullptr) << "Launch inside a capture";
  KVSWEEP_CHECK(graph.index >= 0 && graph.index < static_cast<int>(graph_.size()));
  KVSWEEP_CHECK(graph_[graph.index] != nullptr) << "Launch of a destroyed graph";
  ++graph_[graph.index]->pending_launches;
  Push({.what = LaunchEntry{graph.index}}, Stream::kCompute);
}

void StreamScheduler::DestroyGraph(Graph graph) {
  KVSWEEP_CHECK(graph.index >= 0 && graph.index < static_cast<int>(graph_.size()));
  if (graph_[graph.index] == nullptr) return;
  KVSWEEP_CHECK_EQ(graph_[graph.index]->pending_launches, 0);
  graph_[graph.index] = nullptr;
}

// ----------------------------------------------------------------------------------------- running

void StreamScheduler::RunUntil(Event event) {
  KVSWEEP_CHECK(event.index >= 0 && event.index < static_cast<int>(event_record_.size()));
  KVSWEEP_CHECK(capture_ == nullptr) << "Wait inside a capture";
  const int32_t record = event_record_[event.index];
  if (record < 0) return;
  while (!record_[record].reached) KVSWEEP_CHECK(RunOne()) << "no stream can go on";
  host_ns_ = std::max(host_ns_, record_[record].time_ns);
}

bool StreamScheduler::Reached(Event event) {
  KVSWEEP_CHECK(capture_ == nullptr) << "Reached inside a capture";
  const int32_t record = event_record_.at(static_cast<size_t>(event.index));
  if (record < 0) return true;
  while (!record_[record].reached) KVSWEEP_CHECK(RunOne()) << "no stream can go on";
  return record_[record].time_ns <= host_ns_;
}

bool StreamScheduler::Lags(Event event) {
  const int32_t record = event_record_.at(static_cast<size_t>(event.index));
  if (!random_.has_value() || record < 0 || record_[record].reached) return false;
  return random_->Uniform(ranking_lasts_) != 0;
}

const StreamScheduler::Record& StreamScheduler::ReachedRecord(Event event) const {
  const int32_t record = event_record_.at(static_cast<size_t>(event.index));
  KVSWEEP_CHECK(record >= 0 && record_[record].reached) << "event " << event.index;
  return record_[record];
}

void StreamScheduler::RunAll() {
  KVSWEEP_CHECK(capture_ == nullptr) << "WaitAll inside a capture";
  while (RunOne()) {
  }
  for (int stream = 0; stream < kStreams; ++stream) {
    KVSWEEP_CHECK(queue_[stream].empty()) << "no stream can go on";
    host_ns_ = std::max(host_ns_, clock_ns_[stream]);
  }
}

bool StreamScheduler::Runnable(const Entry& entry, const std::vector<Record>& records) const {
  const WaitEntry* const wait = std::get_if<WaitEntry>(&entry.what);
  return wait == nullptr || records[wait->record].reached;
}

bool StreamScheduler::RunOne() {
  std::array<Candidate, 2 * kStreams> candidates;
  int count = 0;
  for (int stream = 0; stream < kStreams; ++stream) {
    const bool occupied = stream == kCompute && running_ != nullptr;
    if (occupied || queue_[stream].empty()) continue;
    const Entry& entry = queue_[stream].front();
    if (Runnable(entry, record_)) candidates[count++] = {false, stream, entry.sequence};
  }
  for (int stream = 0; running_ != nullptr && stream < kStreams; ++stream) {
    const std::vector<Entry>& entries = running_->entries[stream];
    if (running_->next[stream] == entries.size()) continue;
    const Entry& entry = entries[running_->next[stream]];
    if (Runnable(entry, running_->record)) candidates[count++] = {true, stream, entry.sequence};
  }
  if (count == 0) return false;

  int chosen = 0;
  if (random_.has_value()) {
    chosen = Draw(std::span(candidates).first(static_cast<size_t>(count)));
  } else {
    // A graph's entries stand where its launch does, and among themselves in the order of capture.
    const auto order = [&](const Candidate& candidate) {
      return std::pair(candidate.in_graph ? running_sequence_ : candidate.sequence,
                       candidate.sequence);
    };
    for (int i = 1; i < count; ++i) {
      if (order(candidates[i]) < order(candidates[chosen])) chosen = i;
    }
  }
  if (candidates[chosen].in_graph) {
    RunGraphEntry(candidates[chosen].stream);
  } else {
    RunQueued(candidates[chosen].stream);
  }
  return true;
}

int StreamScheduler::Draw(std::span<const Candidate> candidates) {
  if (random_->Uniform(ranking_lasts_) == 0) random_->Shuffle<int>(rank_);
  const auto rank = [&](const Candidate& candidate) {
    return rank_[static_cast<size_t>(candidate.stream + (candidate.in_graph ? kStreams : 0))];
  };
  const auto best = std::ranges::min_element(candidates, {}, rank);
  return static_cast<int>(best - candidates.begin());
}

void StreamScheduler::RunQueued(int stream) {
  const Entry& entry = queue_[stream].front();
  double& clock_ns = clock_ns_[stream];
  clock_ns = std::max(clock_ns, entry.enqueued_ns);
  if (const LaunchEntry* const launch = std::get_if<LaunchEntry>(&entry.what)) {
    running_ = graph_[launch->graph].get();
    running_sequence_ = entry.sequence;
    running_->next = {};
    running_->clock_ns.fill(clock_ns);
    std::fill(running_->record.begin(), running_->record.end(), Record{});
    FinishLaunch();  // at once, if the graph is empty
    return;
  }
  RunEntry(entry, stream, record_, clock_ns);
  if (const RecordEntry* const record = std::get_if<RecordEntry>(&entry.what)) {
    Release(record->record);
  } else if (const WaitEntry* const wait = std::get_if<WaitEntry>(&entry.what)) {
    Release(wait->record);
  }
  queue_[stream].Pop();
}

void StreamScheduler::RunGraphEntry(int stream) {
  const Entry& entry = running_->entries[stream][running_->next[stream]++];
  RunEntry(entry, stream, running_->record, running_->clock_ns[stream]);
  FinishLaunch();
}

void StreamScheduler::FinishLaunch() {
  for (int stream = 0; stream < kStreams; ++stream) {
    if (running_->next[stream] < running_->entries[stream].size()) return;
  }
  // Every stream of a graph has been joined by its compute stream.
  clock_ns_[kCompute] = running_->clock_ns[kCompute];
  --running_->pending_launches;
  running_ = nullptr;
  queue_[kCompute].Pop();
}

void StreamScheduler::Execute(const Entry& entry, int stream, double& clock_ns) {
  const Operation& operation = std::get<Operation>(entry.what);
  if (times_ == nullptr) {
    clock_ns += executor_->Execute(operation);
    return;
  }
  OperationTime time{.name = OperationName(operation),
                     .part = entry.part,
                     .stream = static_cast<Stream>(stream)};
  const auto now_ns = [&] {
    return modelled_times_ ? clock_ns : static_cast<double>(RealClock::Get().NowNs());
  };
  time.begin_ns = now_ns();
  clock_ns += executor_->Execute(operation);
  time.end_ns = now_ns();
  times_->push_back(time);
}

void StreamScheduler::RunEntry(const Entry& entry, int stream, std::vector<Record>& records,
                               double& clock_ns) {
  if (std::holds_alternative<Operation>(entry.what)) {
    Execute(entry, stream, clock_ns);
  } else if (const RecordEntry* const record = std::get_if<RecordEntry>(&entry.what)) {
    records[record->record].reached = true;
    records[record->record].time_ns = clock_ns;
    records[record->record].wall_ns = RealClock::Get().NowNs();
  } else {
    const WaitEntry& wait = std::get<WaitEntry>(entry.what);
    clock_ns = std::max(clock_ns, records[wait.record].time_ns);
  }
}

int64_t StreamScheduler::growths() const {
  int64_t growths = table_growths_;
  for (const Ring<Entry>& queue : queue_) growths += queue.growths();
  return growths;
}

}  // namespace kvsweep::cpu
