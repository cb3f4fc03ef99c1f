"""When and where the work runs. Prefect; nothing here imports torch."""
