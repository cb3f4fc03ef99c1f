"""How fast champions age, and when a training is not worth the night."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient

from nightshift.core.files import write_json, write_rows
from nightshift.data.schemas import AUGMENTED
from nightshift.registry import freshness, versions
from nightshift.registry.freshness import Night, expect_gain, find_half_life, read_nights
from nightshift.tracking.runs import experiment_id, tracking_uri
from tests.helpers.nights import age_by, log_nights

DAY = 86_400


@given(st.floats(0.5, 1000), st.lists(st.floats(0.1, 1.0), min_size=5, max_size=30))
def test_the_half_life_is_recovered(half_life: float, shares: list[float]) -> None:
    found = find_half_life(age_by(half_life, [share * half_life for share in shares]))
    assert found == pytest.approx(half_life, rel=0.02)


def test_noise_of_a_tenth_of_the_advantage_moves_the_half_life_little() -> None:
    nights = age_by(20, [1 + number % 14 for number in range(60)], noise=0.1)
    assert find_half_life(nights) == pytest.approx(20, rel=0.25)


def test_a_champion_that_loses_no_advantage_has_no_half_life() -> None:
    assert find_half_life([Night(number, 3.0, 3.0, 2.0, 2.0) for number in range(9)]) is None
    # The champion is even better on the new examples than the candidate.
    assert find_half_life([Night(number, 3.0, 3.0, 1.9, 2.0) for number in range(9)]) is None


def test_four_nights_are_too_few() -> None:
    assert find_half_life(age_by(8, [1, 2, 4, 8])) is None
    assert find_half_life(age_by(8, [1, 2, 4, 8, 8])) == pytest.approx(8, rel=0.02)


@given(st.floats(0.5, 100), st.floats(0.1, 50), st.floats(0.1, 50))
def test_an_older_champion_leaves_more_to_gain(half_life: float, age: float, more: float) -> None:
    nights = age_by(half_life, [1, 1, 1, 1, 1])
    assert (
        0 <= expect_gain(nights, half_life, age) <= expect_gain(nights, half_life, age + more) < 1 / 3 + 1e-9
    )


@pytest.fixture
def client(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """Create a registry whose version 1 is the champion; tonight, nothing but the data has changed."""
    for name in ("NIGHTSHIFT_HOME", "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    configure(0.02)
    client, name = versions.open_registry()
    client.create_registered_model(name)
    client.create_model_version(name, str(in_tmp), tags={versions.DIGEST: "a" * 64})
    client.set_registered_model_alias(name, "champion", "1")
    write_json(Path("data/champion/champion.json"), {"arrival": 4})
    row = {"messages": [], "tools": None, "source": "s", "origin": "o", "group": None, "group_id": "g"}
    rows = [
        {**row, "id": str(n), "arrival": n, "parent_id": None, "style": None, "ordinal": 0} for n in range(8)
    ]
    write_rows(Path("data/decontaminate/train.parquet"), rows, AUGMENTED)
    monkeypatch.setattr(freshness, "changed_paths", lambda _: {"data/pack/train.parquet"})
    return client


def configure(least: float) -> None:
    Path("params.yaml").write_text(
        f"nightly: {{min_expected_gain: {least}}}\n"
        "registry: {experiment: nights, model_name: model, approval: auto}\n",
        encoding="utf-8",
    )


def today(client: MlflowClient, age: float) -> float:
    """Return the time at which the champion has an age in days."""
    born: int = client.get_model_version("model", "1").creation_timestamp
    return born / 1000 + age * DAY


def test_nights_are_read_in_order_and_each_version_once(client: MlflowClient) -> None:
    first, second = Night(1, 1.0, 3.0, 2.5, 2.0), Night(2, 2.0, 3.0, 2.7, 2.0)
    log_nights(client, [first, second, Night(2, 2.0, 3.0, 2.6, 2.0)])
    # A night on which nothing was new has no age, and the first one no champion.
    client.log_metric(client.create_run(experiment_id(client)).info.run_id, "eval/test/new_loss", 2.0)
    assert read_nights(client) == [first, Night(2, 2.0, 3.0, 2.6, 2.0)]


def test_a_training_that_would_gain_too_little_is_skipped_with_the_figures(client: MlflowClient) -> None:
    log_nights(client, age_by(20, [1, 2, 4, 8, 16]))
    assert freshness.find_reason_to_skip(today(client, 1.0)) == (
        "a training on 3 new examples is expected to lower the loss on new examples by 1.7%, less than "
        "nightly.min_expected_gain (2.0%): version 1, the champion, is 1.0 days old, and champions lose half "
        "of their advantage over the base in 20.0 days (measured over 5 nights)"
    )
    assert freshness.find_reason_to_skip(today(client, 3.0)) is None


@pytest.mark.parametrize("least", [0.0, 0.01])
def test_a_training_that_would_gain_enough_is_not_skipped(client: MlflowClient, least: float) -> None:
    configure(least)
    log_nights(client, age_by(20, [1, 2, 4, 8, 16]))
    assert freshness.find_reason_to_skip(today(client, 1.0)) is None


@pytest.mark.parametrize(
    "changed", [set(), {"tasks/sft"}, {"data/pack/train.parquet", "params.yaml"}, {"data/sft/model"}]
)
def test_only_new_data_is_a_reason_to_look(
    client: MlflowClient, changed: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log_nights(client, age_by(20, [1, 2, 4, 8, 16]))
    monkeypatch.setattr(freshness, "changed_paths", lambda _: changed)
    assert freshness.find_reason_to_skip(today(client, 1.0)) is None


def test_what_is_not_known_is_no_reason_to_skip(client: MlflowClient) -> None:
    log_nights(client, age_by(20, [1, 2, 4, 8]))
    assert freshness.find_reason_to_skip(today(client, 1.0)) is None
    log_nights(client, [Night(9, 16.0, 3.0, 3.0 - 2 ** (-16 / 20), 2.0)])
    assert freshness.find_reason_to_skip(today(client, 1.0)) is not None
    client.delete_registered_model_alias("model", "champion")
    assert freshness.find_reason_to_skip(today(client, 1.0)) is None


def test_without_mlflow_the_night_trains(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert tracking_uri() == client.tracking_uri
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert freshness.find_reason_to_skip(0.0) is None
    assert "what a training would gain is unknown" in caplog.text
