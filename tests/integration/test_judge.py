"""A judge behind a real HTTP server: asked in both orders, cached, never a reason to stop."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from nightshift.core.errors import StageError
from nightshift.core.files import jsonl, read_json, write_json, write_rows, write_text
from nightshift.data.schemas import ALL_SCORES
from tasks import judge
from tests.helpers.checkouts import ROOT

# Item -> answers of the candidate and the base.
ANSWERS = {
    "q1": ("a long and right answer", "short"),
    "q2": ("brief", "a long and right answer"),
    "q3": ("the same", "the same"),
    "q4": ("first!", "other!"),
    "q5": ("silence, please", "quiet"),
}


class Judge(BaseHTTPRequestHandler):
    """A judge that prefers the longer answer, or the first one if both are equally long."""

    prompts: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][-1]["content"]
        self.prompts.append(prompt)
        first, second = prompt.split("\n\nAnswer A:\n")[1].split("\n\nAnswer B:\n")
        letter = "A" if len(first) >= len(second) else "B"
        text = "I would rather not." if "silence" in prompt else f"{letter}."
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": text},
        }
        answer = {"id": "1", "object": "chat.completion", "created": 0, "model": "judge", "choices": [choice]}
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Suppress request logging."""


@pytest.fixture
def server() -> Iterator[str]:
    """Yield the base URL of the judge."""
    Judge.prompts.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Judge) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{found.server_address[1]}/v1"
        found.shutdown()
        thread.join()


def make_checkout(base_url: str, **changes: Any) -> None:
    """Turn the current folder into a checkout after the gate, with one generation benchmark."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["judge"] |= {"model": "judge", **changes}
    params["judge"]["endpoint"] |= {"base_url": base_url, "max_retries": 0, "timeout_seconds": 5}
    write_text(Path("params.yaml"), yaml.safe_dump(params))
    items = [{"id": item, "question": f"{item}?", "references": ["x"]} for item in ANSWERS]
    task = {"kind": "generation", "metric": "contains", "max_new_tokens": 8}
    write_text(judge.BENCHMARKS / "written" / "task.yaml", yaml.safe_dump(task))
    write_text(judge.BENCHMARKS / "written" / "items.jsonl", jsonl(items))
    write_json(judge.GATE, {"reference": "base", "candidate": "c" * 64})
    empty = dict.fromkeys(ALL_SCORES.names)
    rows = [
        {**empty, "benchmark": "written", "slice": "written", "score": 1.0, "status": "ok"}
        | {"model": model, "item": item, "question": f"{item}?", "answer": answer}
        for item, both in ANSWERS.items()
        for model, answer in zip(("candidate", "base"), both, strict=True)
    ]
    write_rows(judge.SCORES, rows, ALL_SCORES)


@pytest.mark.usefixtures("in_tmp")
def test_only_a_preference_in_both_orders_counts(server: str) -> None:
    make_checkout(server)
    judge.main()
    found = read_json(judge.JUDGED)
    assert {row["item"]: row["verdict"] for row in found["judged"]} == {
        "q1": "better",
        "q2": "worse",
        "q4": "undecided",
        "q5": "unanswered",
    }
    assert found["counts"] == {"written": {"better": 1, "worse": 1, "undecided": 1, "unanswered": 1}}
    assert len(Judge.prompts) == 8
    # Replies are cached, so nothing is asked again.
    judge.main()
    assert len(Judge.prompts) == 8


@pytest.mark.usefixtures("in_tmp")
def test_the_limit_is_per_benchmark_and_no_judge_means_no_request(server: str) -> None:
    make_checkout(server, limit=1)
    judge.main()
    assert [row["item"] for row in read_json(judge.JUDGED)["judged"]] == ["q1"]
    judge.JUDGED.unlink()
    make_checkout(server, model=None)
    judge.main()
    assert not judge.JUDGED.exists()


@pytest.mark.usefixtures("in_tmp")
def test_an_unreachable_judge_is_an_error_with_its_url() -> None:
    make_checkout("http://127.0.0.1:9/v1")
    with pytest.raises(
        StageError, match=r"judge: http://127\.0\.0\.1:9/v1: .*check that the server is running"
    ):
        judge.main()
