"""The local stack: Prefect, MLflow and a worker as processes on this machine."""
