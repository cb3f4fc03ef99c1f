"""Prefect flows: when and where the work runs. Nothing here imports torch."""
