"""Paths that the stages read and write, defined once for all programs, relative to the checkout."""

from pathlib import Path

DATA = Path("data")

RAW = DATA / "raw"

BENCHMARKS = DATA / "benchmarks"

CHAMPION = DATA / "champion"
CHAMPION_RECORD = DATA / "champion" / "champion.json"
BEST = DATA / "champion" / "best.parquet"

START = DATA / "start"
START_RECORD = DATA / "start" / "start.json"
START_MODEL = DATA / "start" / "model"
START_ROWS = DATA / "start" / "rows.parquet"

BASE = DATA / "base" / "model"
BASE_RECORD = DATA / "base" / "base.json"

INGESTED = DATA / "ingest" / "examples.parquet"
REPAIRS = DATA / "ingest" / "repairs.jsonl"
QUARANTINE = DATA / "ingest" / "quarantine.jsonl"
PII = DATA / "ingest" / "pii.jsonl"
COMPARED = DATA / "ingest" / "preferences.parquet"

DEDUPED = DATA / "dedupe" / "examples.parquet"
REMOVED = DATA / "dedupe" / "removed.parquet"
CONFLICTS = DATA / "dedupe" / "conflicts.parquet"

TRAIN = DATA / "split" / "train.parquet"
VALIDATION = DATA / "split" / "validation.parquet"
TEST = DATA / "split" / "test.parquet"
BRIDGES = DATA / "split" / "bridges.parquet"
PLACED = DATA / "split" / "preferences.parquet"

AUGMENTED_TRAIN = DATA / "augment" / "train.parquet"
REJECTED = DATA / "augment" / "rejected.parquet"
SIMILARITY = DATA / "augment" / "scores.parquet"

CLEAN_TRAIN = DATA / "decontaminate" / "train.parquet"
HITS = DATA / "decontaminate" / "hits.parquet"
CLUSTERS = DATA / "decontaminate" / "clusters.parquet"
PREFERENCES = DATA / "decontaminate" / "preferences.parquet"

PACKED = DATA / "pack" / "train.parquet"

MODEL = DATA / "sft" / "model"
PLAN = DATA / "sft" / "plan.json"
EFFECTIVE = DATA / "sft" / "effective.json"
SELFTEST = DATA / "sft" / "selftest.json"
TRAINING_RUN = DATA / "sft" / "mlflow_run.json"

TUNED = DATA / "prefer" / "model"
TUNING = DATA / "prefer" / "record"
TUNING_RECORD = DATA / "prefer" / "record" / "prefer.json"

SCORES = DATA / "evaluate" / "scores.parquet"
METRICS = DATA / "evaluate" / "metrics.json"
MODELS = DATA / "evaluate" / "models.json"

GATE = DATA / "gate" / "gate.json"

VERSION = DATA / "register" / "version.json"
BASE_REFERENCE = DATA / "register" / "base_reference.json"
LINEAGE = DATA / "register" / "lineage"
CARD = DATA / "register" / "README.md"

OUTCOME = DATA / "promote" / "outcome.json"

JUDGED = DATA / "judge" / "judge.json"

PAGE = DATA / "report" / "report.html"
SHORT = DATA / "report" / "report.md"
