"""Nights in MLflow whose champions age."""

import random

from mlflow import MlflowClient

from nightshift.registry.freshness import CHAMPION_AGE, Night
from nightshift.tracking.runs import experiment_id


def age_by(half_life: float, ages: list[float], noise: float = 0.0) -> list[Night]:
    """Return nights whose champions lose their advantage of 1 nat per token with a half-life."""
    chance = random.Random(0)
    return [
        Night(number, age, 3.0, 3.0 - 2 ** (-age / half_life) + chance.gauss(0, noise), 2.0)
        for number, age in enumerate(ages, start=1)
    ]


def log_nights(client: MlflowClient, nights: list[Night]) -> None:
    """Log nights to MLflow as the report does, one run each, in order."""
    for hour, night in enumerate(nights, start=1):
        run = client.create_run(
            experiment_id(client), start_time=hour, tags={"nightshift.version": str(night.version)}
        )
        for key, value in (
            (CHAMPION_AGE, night.age),
            ("eval/test/new_loss_base", night.base),
            ("eval/test/new_loss_champion", night.champion),
            ("eval/test/new_loss", night.candidate),
        ):
            client.log_metric(run.info.run_id, key, value)
