"""MLflow's runs: which one a stage tells, and what it is told."""
