"""MLflow Model Registry: versions, the record of promotions, and the lineage of a version."""
