"""MLflow's registry: versions, the record of promotions, and what a version came from."""
