"""The README's commands are those that CI and the end-to-end tests run."""

import re

from tests.helpers.checkouts import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_first_commands_are_make_run_and_make_test() -> None:
    (block,) = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    assert block.splitlines() == ["make run", "make test"]
    targets = re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert {"run", "test", "down"} <= set(targets)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_all_links_in_the_readme_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert len(links) >= 5
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_quick_start_fits_on_one_screen() -> None:
    assert len(README.splitlines()) < 120
    assert len(README[: README.index("make run")].splitlines()) < 30
