-- The store file. docs/STORAGE.md describes it; the views at the end are the public interface, the
-- tables are ours. `storage/sqlite_store.cc` sets application_id and user_version.
--
-- Record keys: record_id = attempt * 2^32 + sequence. So rows are appended in key order, an attempt
-- is one range of keys, and, as the records of a trial follow each other, so is a trial: the range
-- [first_record, last_record] of its row, which exists only once the attempt is accepted.
--
-- Type ANY holds floating-point numbers where REAL would turn -0.0 into 0. Unsigned 64-bit counts
-- are refused above 2^63 - 1; output_digest is stored as the signed number of the same bits.

CREATE TABLE meta (
  key   TEXT PRIMARY KEY,
  value BLOB NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE file (
  digest  BLOB PRIMARY KEY CHECK (length(digest) = 32),  -- SHA-256 of the content
  bytes   INTEGER NOT NULL,
  content BLOB NOT NULL                                  -- compressed with zstd
) STRICT;

CREATE TABLE experiment (
  experiment_id     INTEGER PRIMARY KEY,
  client_id         TEXT NOT NULL UNIQUE,
  name              TEXT NOT NULL,
  spec_text         TEXT NOT NULL,   -- as the person wrote it
  spec              BLOB NOT NULL,   -- message Experiment
  reference_arm     INTEGER NOT NULL,
  model_name        TEXT NOT NULL,
  model_digest      BLOB NOT NULL,
  submitted_unix_ns INTEGER NOT NULL,
  regime            TEXT NOT NULL    -- memory regime that its comparison claims
) STRICT;

CREATE TABLE experiment_file (
  experiment_id INTEGER NOT NULL REFERENCES experiment,
  path          TEXT NOT NULL,
  digest        BLOB NOT NULL,
  bytes         INTEGER NOT NULL,
  PRIMARY KEY (experiment_id, path)
) STRICT, WITHOUT ROWID;

CREATE TABLE arm (
  experiment_id INTEGER NOT NULL REFERENCES experiment,
  arm_index     INTEGER NOT NULL,
  name          TEXT NOT NULL,
  strategy      TEXT NOT NULL,
  PRIMARY KEY (experiment_id, arm_index)
) STRICT, WITHOUT ROWID;

CREATE TABLE cell (
  experiment_id INTEGER NOT NULL REFERENCES experiment,
  cell_index    INTEGER NOT NULL,
  name          TEXT NOT NULL,
  axes          TEXT NOT NULL,  -- JSON object: dotted path to value
  PRIMARY KEY (experiment_id, cell_index)
) STRICT, WITHOUT ROWID;

CREATE TABLE round (
  round_id          INTEGER PRIMARY KEY,
  experiment_id     INTEGER NOT NULL REFERENCES experiment,
  cell_index        INTEGER NOT NULL,
  repeat            INTEGER NOT NULL,
  kind              TEXT NOT NULL CHECK (kind IN ('load', 'quality')),
  devices           INTEGER NOT NULL,
  uses_host_tier    INTEGER NOT NULL,
  backend           TEXT NOT NULL,     -- '' any
  modelled_time     INTEGER NOT NULL,
  state             TEXT NOT NULL CHECK (
    state IN ('queued', 'running', 'done', 'served', 'failed', 'cancelled', 'poisoned')),
  reason            TEXT NOT NULL DEFAULT '',
  poisoned_trial_id INTEGER,
  served_by         INTEGER REFERENCES round,    -- a round that is done; set while state = 'served'
  attempt           INTEGER REFERENCES attempt,  -- the open one while running, the accepted one when done
  finished_unix_ns  INTEGER
) STRICT;
CREATE INDEX round_by_experiment ON round (experiment_id);
CREATE INDEX round_unfinished ON round (round_id) WHERE state IN ('queued', 'running');

CREATE TABLE trial (
  trial_id          INTEGER PRIMARY KEY,
  round_id          INTEGER NOT NULL REFERENCES round,
  position          INTEGER NOT NULL,  -- in running order
  arm_index         INTEGER NOT NULL,
  content_key       BLOB NOT NULL,
  quality_key       BLOB NOT NULL,     -- content key of its quality trial; empty: none
  spec              BLOB NOT NULL,     -- message TrialSpec
  canonical_spec    TEXT NOT NULL,     -- JSON
  measured_trial_id INTEGER,           -- in a served round: the trial whose rows answer it
  first_record      INTEGER,           -- accepted: its records, from trial_start to trial_outcome
  last_record       INTEGER
) STRICT;
CREATE UNIQUE INDEX trial_by_round ON trial (round_id, position);
CREATE INDEX trial_accepted_by_key ON trial (content_key) WHERE first_record IS NOT NULL;

CREATE TABLE worker (
  worker_id      TEXT PRIMARY KEY,
  incarnation    INTEGER NOT NULL,
  machine        TEXT NOT NULL,
  runner_build   TEXT NOT NULL,
  method_version INTEGER NOT NULL,
  facts          TEXT NOT NULL,    -- JSON object
  seen_unix_ns   INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE attempt (
  attempt          INTEGER PRIMARY KEY CHECK (attempt BETWEEN 1 AND 2147483647),
  round_id         INTEGER NOT NULL REFERENCES round,
  worker_id        TEXT NOT NULL,
  incarnation      INTEGER NOT NULL,
  machine          TEXT NOT NULL,
  slot             INTEGER NOT NULL,
  neighbours       INTEGER NOT NULL,
  state            TEXT NOT NULL CHECK (state IN ('open', 'accepted', 'void')),
  reason           TEXT NOT NULL DEFAULT '',
  worker_lost      INTEGER NOT NULL DEFAULT 0,
  running_trial_id INTEGER,
  last_sequence    INTEGER NOT NULL DEFAULT 0,  -- every sequence up to here is stored
  finished         INTEGER NOT NULL DEFAULT 0,  -- the finish record is stored
  granted_unix_ns  INTEGER NOT NULL,
  ended_unix_ns    INTEGER
) STRICT;
CREATE INDEX attempt_by_round ON attempt (round_id);

-- ---------------------------------------------------------------- records, one table for each kind

CREATE TABLE trial_start (
  record_id       INTEGER PRIMARY KEY,
  trial_id        INTEGER NOT NULL,
  backend         TEXT NOT NULL,
  device          TEXT NOT NULL,
  device_class    TEXT NOT NULL,
  driver          TEXT NOT NULL,
  runner_build    TEXT NOT NULL,
  method_version  INTEGER NOT NULL,
  time_mode       TEXT NOT NULL,
  started_unix_ns INTEGER NOT NULL,
  execution       INTEGER NOT NULL
) STRICT;

CREATE TABLE trial_start_fact (
  record_id INTEGER NOT NULL,
  name      TEXT NOT NULL,
  value     TEXT NOT NULL,
  PRIMARY KEY (record_id, name)
) STRICT, WITHOUT ROWID;

CREATE TABLE request (
  record_id            INTEGER PRIMARY KEY,
  trial_id             INTEGER NOT NULL,
  request_index        INTEGER NOT NULL,
  status               INTEGER NOT NULL,  -- 0 completed, 1 infeasible, 2 unfinished
  prompt_tokens        INTEGER NOT NULL,
  output_tokens        INTEGER NOT NULL,
  scheduled_ns         INTEGER NOT NULL,
  issued_ns            INTEGER NOT NULL,
  admitted_ns          INTEGER NOT NULL,
  first_token_ns       INTEGER NOT NULL,
  finished_ns          INTEGER NOT NULL,
  token_gaps_ns        BLOB NOT NULL,     -- each gap as a base-128 varint, lowest group first
  preemptions          INTEGER NOT NULL,
  recomputed_tokens    INTEGER NOT NULL,
  entries_attended     INTEGER NOT NULL,
  entries_full         INTEGER NOT NULL,
  tokens_evicted       INTEGER NOT NULL,
  entries_fetched      INTEGER NOT NULL,
  kv_device_bytes_peak INTEGER NOT NULL,
  kv_host_bytes_peak   INTEGER NOT NULL,
  output_digest        INTEGER NOT NULL,
  engaged              INTEGER NOT NULL,
  engagement_expected  INTEGER NOT NULL,
  session              INTEGER NOT NULL,  -- chat session that the request is a turn of
  turn                 INTEGER NOT NULL
) STRICT;

CREATE TABLE counter (
  record_id INTEGER PRIMARY KEY,
  trial_id  INTEGER NOT NULL,
  name      TEXT NOT NULL,
  layer     INTEGER NOT NULL,  -- -1: the whole trial
  value     ANY NOT NULL CHECK (typeof(value) = 'real')
) STRICT;

CREATE TABLE sample (
  record_id INTEGER PRIMARY KEY,
  trial_id  INTEGER NOT NULL,
  name      TEXT NOT NULL,
  time_ns   INTEGER NOT NULL,
  value     ANY NOT NULL CHECK (typeof(value) = 'real')
) STRICT;

CREATE TABLE quality (
  record_id                 INTEGER PRIMARY KEY,
  trial_id                  INTEGER NOT NULL,
  window                    INTEGER NOT NULL,
  scored_tokens             INTEGER NOT NULL,
  nll_sum                   ANY NOT NULL CHECK (typeof(nll_sum) = 'real'),
  reference_nll_sum         ANY NOT NULL CHECK (typeof(reference_nll_sum) = 'real'),
  kl_sum                    ANY NOT NULL CHECK (typeof(kl_sum) = 'real'),
  top1_matches              INTEGER NOT NULL,
  dropped_tokens            INTEGER NOT NULL,
  dropped_nll_sum           ANY NOT NULL CHECK (typeof(dropped_nll_sum) = 'real'),
  dropped_reference_nll_sum ANY NOT NULL CHECK (typeof(dropped_reference_nll_sum) = 'real'),
  dropped_kl_sum            ANY NOT NULL CHECK (typeof(dropped_kl_sum) = 'real'),
  dropped_top1_matches      INTEGER NOT NULL,
  attended_fraction         ANY NOT NULL CHECK (typeof(attended_fraction) = 'real')
) STRICT;

-- Sums of a window's record over a part of its positions.
CREATE TABLE quality_position (
  record_id         INTEGER NOT NULL,
  bucket            INTEGER NOT NULL,  -- 0, 1, ...: in the order of the record
  first_position    INTEGER NOT NULL,
  scored_tokens     INTEGER NOT NULL,
  nll_sum           ANY NOT NULL CHECK (typeof(nll_sum) = 'real'),
  reference_nll_sum ANY NOT NULL CHECK (typeof(reference_nll_sum) = 'real'),
  kl_sum            ANY NOT NULL CHECK (typeof(kl_sum) = 'real'),
  top1_matches      INTEGER NOT NULL,
  PRIMARY KEY (record_id, bucket)
) STRICT, WITHOUT ROWID;

CREATE TABLE passkey (
  record_id                INTEGER PRIMARY KEY,
  trial_id                 INTEGER NOT NULL,
  prompt_index             INTEGER NOT NULL,
  depth                    ANY NOT NULL CHECK (typeof(depth) = 'real'),
  context_tokens           INTEGER NOT NULL,
  digits                   INTEGER NOT NULL,
  correct_digits           INTEGER NOT NULL,
  recalled                 INTEGER NOT NULL,
  reference_correct_digits INTEGER NOT NULL,
  reference_recalled       INTEGER NOT NULL
) STRICT;

CREATE TABLE trial_outcome (
  record_id       INTEGER PRIMARY KEY,
  trial_id        INTEGER NOT NULL,
  outcome         INTEGER NOT NULL,  -- enum Outcome
  evidence        TEXT NOT NULL,
  asked_bytes     INTEGER NOT NULL,
  available_bytes INTEGER NOT NULL,
  phase           TEXT NOT NULL,
  duration_ns     INTEGER NOT NULL,
  signal          INTEGER NOT NULL,
  log_tail        TEXT NOT NULL
) STRICT;

CREATE TABLE discard (
  record_id INTEGER PRIMARY KEY,
  trial_id  INTEGER NOT NULL,
  reason    TEXT NOT NULL
) STRICT;

CREATE TABLE finish (
  record_id INTEGER PRIMARY KEY,
  trial_id  INTEGER NOT NULL,
  count     INTEGER NOT NULL,
  digest    BLOB NOT NULL
) STRICT;

-- ------------------------------------------------------------------------------- what is made of it

-- One row for each accepted trial. A column for each metric of experiments/metrics is added when
-- the file is opened.
CREATE TABLE summary (
  trial_id       INTEGER PRIMARY KEY REFERENCES trial,
  outcome        TEXT NOT NULL,
  evidence       TEXT NOT NULL,
  duration_ns    INTEGER NOT NULL,
  engagement     TEXT NOT NULL,  -- '-', 'engaged', 'not engaged'
  backend        TEXT NOT NULL,
  device         TEXT NOT NULL,
  device_class   TEXT NOT NULL,
  driver         TEXT NOT NULL,
  time_mode      TEXT NOT NULL,
  runner_build   TEXT NOT NULL,
  method_version INTEGER NOT NULL,
  executions     INTEGER NOT NULL
) STRICT;

-- Why a metric has no value.
CREATE TABLE summary_note (
  trial_id INTEGER NOT NULL REFERENCES trial,
  metric   TEXT NOT NULL,
  reason   TEXT NOT NULL,
  PRIMARY KEY (trial_id, metric)
) STRICT, WITHOUT ROWID;

CREATE TABLE log_line (
  log_id   INTEGER PRIMARY KEY,
  round_id INTEGER NOT NULL REFERENCES round,
  trial_id INTEGER,
  attempt  INTEGER,
  unix_ns  INTEGER NOT NULL,
  text     TEXT NOT NULL
) STRICT;
CREATE INDEX log_line_by_round ON log_line (round_id);
