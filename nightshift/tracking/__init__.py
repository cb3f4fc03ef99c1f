"""MLflow runs: which run a stage logs to, and what it logs."""
