-- The public interface of a store file (docs/STORAGE.md): safe to read from anywhere while it is
-- written. Views of measurements show accepted attempts only. A trial that was served from an
-- earlier round shows that round's rows under its own id.
--
-- Made anew whenever this text changes. {{metrics}} and {{quality_metrics}} are the columns of
-- experiments/metrics.

CREATE VIEW v_experiments AS
SELECT e.experiment_id, e.name,
       CASE WHEN r.unfinished > 0 THEN CASE WHEN r.running > 0 THEN 'running' ELSE 'queued' END
            WHEN r.cancelled > 0 THEN 'cancelled' ELSE 'finished' END AS state,
       r.rounds, r.done, r.served, r.failed, r.poisoned, r.cancelled, r.running,
       (SELECT count(*) FROM arm a WHERE a.experiment_id = e.experiment_id) AS arms,
       (SELECT count(*) FROM cell c WHERE c.experiment_id = e.experiment_id) AS cells,
       r.repeats, e.model_name AS model,
       datetime(e.submitted_unix_ns / 1000000000, 'unixepoch') AS submitted_utc,
       e.client_id, e.reference_arm, e.spec_text, e.spec, e.regime
FROM experiment e LEFT JOIN (
  SELECT experiment_id, count(*) AS rounds, max(repeat) + 1 AS repeats,
         sum(state IN ('queued', 'running')) AS unfinished, sum(state = 'running') AS running,
         sum(state = 'done') AS done, sum(state = 'served') AS served,
         sum(state = 'failed') AS failed, sum(state = 'poisoned') AS poisoned,
         sum(state = 'cancelled') AS cancelled
  FROM round GROUP BY experiment_id) r USING (experiment_id);

CREATE VIEW v_arms AS
SELECT a.experiment_id, a.arm_index, a.name, a.strategy,
       a.arm_index = e.reference_arm AS is_reference
FROM arm a JOIN experiment e USING (experiment_id);

CREATE VIEW v_cells AS SELECT experiment_id, cell_index, name, axes FROM cell;

CREATE VIEW v_rounds AS
SELECT r.round_id, r.experiment_id, r.cell_index, c.name AS cell, r.repeat, r.kind, r.state,
       r.reason, r.served_by, r.attempt, a.worker_id, a.machine, a.slot, a.neighbours, r.devices,
       r.uses_host_tier,
       datetime(a.granted_unix_ns / 1000000000, 'unixepoch') AS granted_utc,
       datetime(r.finished_unix_ns / 1000000000, 'unixepoch') AS finished_utc
FROM round r JOIN cell c USING (experiment_id, cell_index)
LEFT JOIN attempt a ON a.attempt = r.attempt;

-- One row for each trial, wide: what was asked, where it ran, what came out, every metric.
CREATE VIEW v_trials AS
SELECT t.trial_id, r.experiment_id, e.name AS experiment, t.round_id, r.cell_index, c.name AS cell,
       c.axes, r.repeat, r.kind, t.position, t.arm_index, a.name AS arm, a.strategy,
       r.state, r.reason,
       CASE WHEN r.state = 'poisoned' AND (r.poisoned_trial_id IS NULL OR
                                           r.poisoned_trial_id = t.trial_id) THEN 'poisoned'
            WHEN r.state IN ('cancelled', 'poisoned') THEN 'cancelled'
            WHEN r.state = 'failed' AND s.outcome IS NULL THEN 'crashed'
            ELSE s.outcome END AS outcome,
       coalesce(s.evidence, r.reason) AS evidence,
       s.duration_ns, s.engagement, s.backend, s.device, s.device_class, s.driver, s.time_mode,
       s.runner_build, s.method_version, s.executions,
       n.worker_id, n.machine, n.slot, n.neighbours,
       -- Which preflight of its node its predictions are from; its figures stand in v_facts.
       (SELECT f.value FROM trial m JOIN trial_start_fact f
          ON f.record_id BETWEEN m.first_record AND m.last_record AND f.name = 'preflight'
        WHERE m.trial_id = coalesce(t.measured_trial_id, t.trial_id)
        ORDER BY f.record_id DESC LIMIT 1) AS preflight,
       coalesce(t.measured_trial_id, t.trial_id) AS measured_trial_id,
       t.measured_trial_id IS NOT NULL AS served,
       lower(hex(t.content_key)) AS content_key, lower(hex(t.quality_key)) AS quality_key,
       e.regime,
       -- Why its outputs may depend on the load, so that the joined quality need not be theirs. Each
       -- name belongs to one strategy and defaults are left out; functions of JSON are no part of a
       -- view that any reader can trust.
       CASE WHEN instr(t.canonical_spec, '"preemption":"recompute"') > 0
              THEN 'recompute'
            WHEN instr(t.canonical_spec, '"prefill_evict":"chunk"') > 0
              THEN 'chunks'
            WHEN instr(t.canonical_spec, '"count_scope":"batch"') > 0
              THEN 'batch'
            ELSE '' END AS load_dependence,
       t.canonical_spec AS spec{{metrics}}{{quality_metrics}}
FROM trial t
JOIN round r USING (round_id)
JOIN experiment e USING (experiment_id)
JOIN cell c ON c.experiment_id = r.experiment_id AND c.cell_index = r.cell_index
JOIN arm a ON a.experiment_id = r.experiment_id AND a.arm_index = t.arm_index
LEFT JOIN summary s ON s.trial_id = coalesce(t.measured_trial_id, t.trial_id)
LEFT JOIN attempt n ON n.attempt = (
  SELECT m.first_record >> 32 FROM trial m
  WHERE m.trial_id = coalesce(t.measured_trial_id, t.trial_id))
LEFT JOIN summary q ON q.trial_id =
  CASE r.kind WHEN 'quality' THEN coalesce(t.measured_trial_id, t.trial_id)
  ELSE coalesce(  -- that of the experiment itself, or else the newest there is
    (SELECT max(coalesce(x.measured_trial_id, x.trial_id)) FROM trial x JOIN round y ON y.round_id = x.round_id
     WHERE x.content_key = t.quality_key AND y.experiment_id = r.experiment_id
       AND (x.first_record IS NOT NULL OR x.measured_trial_id IS NOT NULL)),
    (SELECT max(x.trial_id) FROM trial x
     WHERE x.content_key = t.quality_key AND x.first_record IS NOT NULL)) END;

-- Why a metric of a trial has no value.
CREATE VIEW v_notes AS
SELECT t.trial_id, n.metric, n.reason
FROM trial t JOIN summary_note n ON n.trial_id = coalesce(t.measured_trial_id, t.trial_id);

CREATE VIEW v_requests AS
SELECT t.trial_id, q.request_index,
       CASE q.status WHEN 0 THEN 'completed' WHEN 1 THEN 'infeasible' ELSE 'unfinished' END
         AS status,
       q.prompt_tokens, q.output_tokens, q.scheduled_ns, q.issued_ns, q.admitted_ns,
       q.first_token_ns, q.finished_ns, q.token_gaps_ns, q.preemptions, q.recomputed_tokens,
       q.entries_attended, q.entries_full, q.tokens_evicted, q.entries_fetched,
       q.kv_device_bytes_peak, q.kv_host_bytes_peak, q.output_digest, q.engaged,
       q.engagement_expected, q.session, q.turn
FROM trial t JOIN trial m ON m.trial_id = coalesce(t.measured_trial_id, t.trial_id)
JOIN request q ON q.record_id BETWEEN m.first_record AND m.last_record;

CREATE VIEW v_counters AS
SELECT t.trial_id, q.name, q.layer, q.value
FROM trial t JOIN trial m ON m.trial_id = coalesce(t.measured_trial_id, t.trial_id)
JOIN counter q ON q.record_id BETWEEN m.first_record AND m.last_record;

CREATE VIEW v_samples AS
SELECT t.trial_id, q.name, q.time_ns, q.value
FROM trial t JOIN trial m ON m.trial_id = coalesce(t.measured_trial_id, t.trial_id)
JOIN sample q ON q.record_id BETWEEN m.first_record AND m.last_record;

CREATE VIEW v_quality AS
SELECT t.trial_id, q.window, q.scored_tokens, q.nll_sum, q.reference_nll_sum, q.kl_sum,
       q.top1_matches, q.dropped_tokens, q.dropped_nll_sum, q.dropped_reference_nll_sum,
       q.dropped_kl_sum, q.dropped_top1_matches, q.attended_fraction
FROM trial t JOIN trial m ON m.trial_id = coalesce(t.measured_trial_id, t.trial_id)
JOIN quality q ON q.record_id BETWEEN m.first_record AND m.last_record;

-- The same sums by part of the window, in nats; the part ends where the next begins.
CREATE VIEW v_quality_positions AS
SELECT t.trial_id, q.window, p.first_position, p.scored_tokens, p.nll_sum, p.reference_nll_sum,
       p.kl_sum, p.top1_matches
FROM trial t JOIN trial m ON m.trial_id = coalesce(t.measured_trial_id, t.trial_id)
JOIN quality q ON q.record_id BETWEEN m.first_record AND m.last_record
JOIN quality_position p ON p.record_id = q.record_id;

-- One row for each pass key that was asked for: digits that count, of them right in place, by the
-- arm and by the full cache.
CREATE VIEW v_passkeys AS
SELECT t.trial_id, q.prompt_index, q.depth, q.context_tokens, q.digits, q.correct_digits,
       q.recalled, q.reference_correct_digits, q.reference_recalled
FROM trial t JOIN trial m ON m.trial_id = coalesce(t.measured_trial_id, t.trial_id)
JOIN passkey q ON q.record_id BETWEEN m.first_record AND m.last_record;

-- The context of an accepted trial beyond the columns of v_trials: flags, threads, clocks, ….
CREATE VIEW v_facts AS
SELECT t.trial_id, f.name, f.value
FROM trial t JOIN trial m ON m.trial_id = coalesce(t.measured_trial_id, t.trial_id)
JOIN trial_start_fact f ON f.record_id BETWEEN m.first_record AND m.last_record;

CREATE VIEW v_outcomes AS
SELECT t.trial_id, o.evidence, o.asked_bytes, o.available_bytes, o.phase, o.duration_ns, o.signal,
       o.log_tail
FROM trial t JOIN trial m ON m.trial_id = coalesce(t.measured_trial_id, t.trial_id)
JOIN trial_outcome o ON o.record_id BETWEEN m.first_record AND m.last_record;

-- Every lease of every round, those that came to nothing too.
CREATE VIEW v_attempts AS
SELECT attempt, round_id, state, reason, worker_id, machine, slot, neighbours, worker_lost,
       running_trial_id, last_sequence AS records, finished,
       datetime(granted_unix_ns / 1000000000, 'unixepoch') AS granted_utc,
       datetime(ended_unix_ns / 1000000000, 'unixepoch') AS ended_utc
FROM attempt;

CREATE VIEW v_workers AS
SELECT worker_id, machine, runner_build, method_version, facts,
       datetime(seen_unix_ns / 1000000000, 'unixepoch') AS seen_utc
FROM worker;

CREATE VIEW v_logs AS
SELECT log_id, round_id, trial_id, attempt, unix_ns,
       datetime(unix_ns / 1000000000, 'unixepoch') AS utc, text
FROM log_line;

CREATE VIEW v_files AS
SELECT experiment_id, path, lower(hex(digest)) AS sha256, bytes FROM experiment_file;
