"""Evaluation results as MLflow metrics."""

from nightshift.tracking.evaluation import evaluation_metrics

ENDS = {"mean": 0.4, "low": 0.3, "high": 0.5}


def test_a_gain_of_accuracy_and_a_lower_loss_have_different_names() -> None:
    accuracy = {"gain": {"unit": "accuracy", **ENDS}}
    assert dict(evaluation_metrics({}, accuracy)) == {
        "eval/gain": 0.4,
        "eval/gain_low": 0.3,
        "eval/gain_high": 0.5,
    }
    loss = {"gain": {"unit": "nats per token", **ENDS}}
    assert dict(evaluation_metrics({}, loss)) == {
        "eval/test/gain": 0.4,
        "eval/test/gain_low": 0.3,
        "eval/test/gain_high": 0.5,
    }


def test_a_verdict_without_a_gain_has_none() -> None:
    assert dict(evaluation_metrics({}, {"gain": None})) == {}
    assert dict(evaluation_metrics({}, {})) == {}
