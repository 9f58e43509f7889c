"""The catalog's tables, as ordered migrations. Each is applied in one transaction together with its record."""

import duckdb

_TABLES = """
CREATE TABLE datasets (
    kind VARCHAR, name VARCHAR, fingerprint VARCHAR, identity JSON, description JSON, PRIMARY KEY (kind, name));
CREATE TABLE parts (
    kind VARCHAR, name VARCHAR, part INTEGER, counts JSON, stored_bytes BIGINT, seconds DOUBLE, host VARCHAR, committed_at TIMESTAMP);
CREATE TABLE corpora (
    corpus VARCHAR, documents BIGINT, duplicates BIGINT, empty BIGINT, text_bytes BIGINT, parts BIGINT);
CREATE TABLE documents (
    corpus VARCHAR, doc_id BIGINT, split VARCHAR, domain VARCHAR, sha256 VARCHAR, n_bytes BIGINT, part INTEGER, source_split VARCHAR,
    source_row BIGINT);
CREATE TABLE models (
    model VARCHAR, source VARCHAR, weights VARCHAR, tokenizer VARCHAR, model_type VARCHAR, vocab_size BIGINT, parameters BIGINT);
CREATE TABLE tokenizers (
    tokenizer VARCHAR, vocab_size BIGINT, bos BIGINT, eos BIGINT, prepends_bos BOOLEAN);
CREATE TABLE segments (
    kind VARCHAR, name VARCHAR, model VARCHAR, corpus VARCHAR, part INTEGER, doc_id BIGINT, segment BIGINT, n_bytes BIGINT,
    n_tokens BIGINT, n_scored BIGINT, scored_bytes BIGINT, nll DOUBLE, ce DOUBLE, bpb DOUBLE);
CREATE TABLE quarantine (
    kind VARCHAR, name VARCHAR, model VARCHAR, corpus VARCHAR, part INTEGER, doc_id BIGINT, reason VARCHAR);
CREATE TABLE vocab_maps (
    name VARCHAR, rule VARCHAR, tokens BIGINT);
CREATE TABLE alignment_coverage (
    name VARCHAR, corpus VARCHAR, part INTEGER, doc_id BIGINT, segment BIGINT, n_positions BIGINT, n_aligned BIGINT);
CREATE TABLE targets (
    name VARCHAR, corpus VARCHAR, part INTEGER, doc_id BIGINT, segment BIGINT, source VARCHAR, n_positions BIGINT, lost_mass DOUBLE);
CREATE TABLE runs (
    run VARCHAR, stage VARCHAR, dataset VARCHAR, status VARCHAR, started_at TIMESTAMP, ended_at TIMESTAMP, host VARCHAR, fuseline VARCHAR,
    parameters JSON, metrics JSON);
CREATE TABLE checkpoints (
    training VARCHAR, step BIGINT, path VARCHAR);
CREATE TABLE metrics (
    training VARCHAR, step BIGINT, steps BIGINT, loss DOUBLE, clm_loss DOUBLE, fusion_loss DOUBLE, grad_norm DOUBLE,
    learning_rate DOUBLE, tokens BIGINT, tokens_per_second DOUBLE, data_wait_seconds DOUBLE);
CREATE VIEW evaluations AS
    SELECT model, split, domain, count(DISTINCT doc_id) AS documents, sum(n_scored)::BIGINT AS n_tokens,
        sum(scored_bytes)::BIGINT AS n_bytes, sum(nll) AS nll, exp(sum(nll) / sum(n_scored)) AS perplexity,
        sum(nll) / (ln(2) * sum(scored_bytes)) AS bpb
    FROM segments JOIN documents USING (corpus, doc_id) WHERE kind = 'evaluations' GROUP BY model, split, domain;
"""

# `targets` is now the lazy table of positions.
_TARGET_SEGMENTS = "ALTER TABLE targets RENAME TO target_segments"

# What each source contributes to each segment. It may have a distribution at more positions than n_aligned of `alignment_coverage`, which
# counts those where both have read the same. Targets in the catalog are removed here, so that the next fold reads them again.
_TARGET_SOURCES = """
CREATE TABLE target_sources (
    name VARCHAR, corpus VARCHAR, part INTEGER, doc_id BIGINT, segment BIGINT, source VARCHAR, place INTEGER, cost DOUBLE, weight DOUBLE,
    share DOUBLE, chosen BOOLEAN, n_positions BIGINT, n_spoken BIGINT, mapped DOUBLE, merged DOUBLE, lost DOUBLE, tail DOUBLE,
    agreement DOUBLE, nll DOUBLE, gold_nll DOUBLE, n_gold BIGINT);
ALTER TABLE target_segments ADD COLUMN gold_nll DOUBLE;
ALTER TABLE target_segments ADD COLUMN n_gold BIGINT;
DELETE FROM target_segments;
DELETE FROM parts WHERE kind = 'targets';
DELETE FROM datasets WHERE kind = 'targets';
"""

_TRAINING_EVALUATIONS = """
CREATE TABLE training_evaluations (
    training VARCHAR, step BIGINT, domain VARCHAR, nll DOUBLE, n_scored BIGINT, scored_bytes BIGINT, bpb DOUBLE);
ALTER TABLE metrics ADD COLUMN clm_weight DOUBLE;
ALTER TABLE metrics ADD COLUMN held_out_bpb DOUBLE;
ALTER TABLE metrics ADD COLUMN mfu DOUBLE;
ALTER TABLE metrics ADD COLUMN peak_memory_bytes BIGINT;
ALTER TABLE metrics ADD COLUMN warning VARCHAR;
"""

_ENSEMBLES = """
CREATE OR REPLACE VIEW evaluations AS
    SELECT model, split, domain, count(DISTINCT doc_id) AS documents, sum(n_scored)::BIGINT AS n_tokens,
        sum(scored_bytes)::BIGINT AS n_bytes, sum(nll) AS nll, exp(sum(nll) / sum(n_scored)) AS perplexity,
        sum(nll) / (ln(2) * sum(scored_bytes)) AS bpb
    FROM segments JOIN documents USING (corpus, doc_id) WHERE kind IN ('evaluations', 'ensembles') GROUP BY model, split, domain;
"""

MIGRATIONS = (_TABLES, _TARGET_SEGMENTS, _TARGET_SOURCES, _TRAINING_EVALUATIONS, _ENSEMBLES)


def migrate(connection: duckdb.DuckDBPyConnection, *, n_migrations: int = len(MIGRATIONS)) -> None:
    """Apply the first `n_migrations` migrations, except those that this catalog already has."""
    connection.execute("CREATE TABLE IF NOT EXISTS migrations (version INTEGER PRIMARY KEY, applied_at TIMESTAMP)")
    (done,) = connection.execute("SELECT count(*) FROM migrations").fetchone() or (0,)
    for version, statements in enumerate(MIGRATIONS[done:n_migrations], start=done + 1):
        connection.begin()
        connection.execute(statements)
        connection.execute("INSERT INTO migrations VALUES (?, now()::TIMESTAMP)", [version])
        connection.commit()
