#ifndef KVSWEEP_BASE_LIMITS_H_
#define KVSWEEP_BASE_LIMITS_H_

#include <cstdint>

// Every bound of the project, in one place. What comes from outside (files, messages, flags) is
// held to these before it is parsed or allocated for; queues, windows and spills are held to them
// at all times. An error names the bound that was passed. Sizes are in bytes, the rest are counts
// unless the name says otherwise.

namespace kvsweep::limits {

inline constexpr int64_t kKiB = int64_t{1} << 10;
inline constexpr int64_t kMiB = int64_t{1} << 20;
inline constexpr int64_t kGiB = int64_t{1} << 30;

// Specs and the matrix they expand to. The count of trials is known before any is made.
inline constexpr int64_t kSpecFileBytes = 1 * kMiB;
inline constexpr int64_t kSpecNestingDepth = 32;
inline constexpr int64_t kAxes = 16;
inline constexpr int64_t kValuesPerAxis = 4096;
inline constexpr int64_t kArms = 256;
inline constexpr int64_t kTrialsPerExperiment = 1'000'000;
inline constexpr int64_t kNameLength = 128;  // experiments, arms, workers, labels: characters

// One trial.
inline constexpr int64_t kRequestsPerTrial = 1'000'000;
inline constexpr int64_t kContextTokens = 1 << 20;  // prompt and output of one request together
inline constexpr int64_t kSamplesPerTrial = 1'000'000;
inline constexpr int64_t kCountersPerTrial = 4096;
inline constexpr int64_t kEvidenceBytes =
    16 * kKiB;  // text that explains an outcome, end of stderr included

// Files that a spec names.
inline constexpr int64_t kTravellingFileBytes =
    8 * kMiB;  // larger ones must be on the worker already
inline constexpr int64_t kTravellingFilesPerExperiment = 1024;
inline constexpr int64_t kTraceFileBytes = 1 * kGiB;
inline constexpr int64_t kTraceRows = 10'000'000;
inline constexpr int64_t kTraceLineBytes = 1 * kMiB;
inline constexpr int64_t kTextFileBytes = 1 * kGiB;

// Model folders.
inline constexpr int64_t kModelConfigBytes = 1 * kMiB;
inline constexpr int64_t kModelIndexBytes = 64 * kMiB;
inline constexpr int64_t kSafetensorsHeaderBytes = 100'000'000;  // as the format's own library
inline constexpr int64_t kTensors = 100'000;
inline constexpr int64_t kTensorDimensions = 8;
inline constexpr int64_t kModelShards = 1024;
inline constexpr int64_t kModelBytes = int64_t{4} << 40;
inline constexpr int64_t kLayers = 1024;
inline constexpr int64_t kHeads = 1024;
inline constexpr int64_t kHiddenSize = 131'072;
inline constexpr int64_t kTokenizerFileBytes = 64 * kMiB;
inline constexpr int64_t kVocabulary = 1 << 20;

// Worker <-> coordinator.
inline constexpr int64_t kMessageBytes = 1 * kMiB;
inline constexpr int64_t kBatchRows = 256;
inline constexpr int64_t kSlotsPerWorker = 64;
inline constexpr int64_t kDevicesPerSlot = 64;
inline constexpr int64_t kLabelsPerWorker = 64;
inline constexpr int64_t kDigestsPerWorker = 4096;  // files and models that a worker says it holds
inline constexpr int64_t kWorkers = 10'000;

// The worker's window of rows that are not yet acknowledged, for each slot: in memory up to the
// first pair; past it on disk up to the second; past that the trial ends as recorder_overflow.
inline constexpr int64_t kOutboxRows = 65'536;
inline constexpr int64_t kOutboxBytes = 64 * kMiB;
inline constexpr int64_t kOutboxSpillRows = 2'000'000;
inline constexpr int64_t kOutboxSpillBytes = 4 * kGiB;

// Worker <-> runner: one length-prefixed frame.
inline constexpr int64_t kFrameBytes = 16 * kMiB;

// Measurements between the engine and the thread that packs them into frames.
inline constexpr int64_t kRecorderRows = 262'144;

// The coordinator.
inline constexpr int64_t kEventQueueLength = 65'536;
inline constexpr int64_t kQueuedTrials = 1'000'000;  // not done, of all experiments together
inline constexpr int64_t kWatchers = 1'000;
inline constexpr int64_t kQueryRows = 100'000;  // of one remote query's answer
inline constexpr int64_t kQueryTextBytes = 64 * kKiB;
inline constexpr int64_t kQuerySeconds = 30;

// Tries. A trial whose runner dies is repeated at most twice; the third death is its outcome. A
// round is leased at most this often before it fails with what its attempts left behind.
inline constexpr int64_t kRunnerDeathsPerTrial = 3;
inline constexpr int64_t kAttemptsPerRound = 16;

}  // namespace kvsweep::limits

#endif  // KVSWEEP_BASE_LIMITS_H_
