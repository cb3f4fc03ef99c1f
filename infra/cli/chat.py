"""Talk to a version of the model, or to an exported folder, in the terminal."""

import logging
import sys
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from nightshift.registry.served_model import MAX_NEW_TOKENS, TooLongError, fastest_device, load, stream
from nightshift.registry.versions import DIGEST, find_model, open_model

# Answers go to stdout, all else to stderr, so that a pipe gets the answers alone.
aside = Console(stderr=True, highlight=False)


def chat(address: str) -> None:
    """Load a model and answer what is asked on stdin, a line at a time, until its end or `/exit`.

    Args:
        address: What `find_model` takes, or the folder of an export.

    Raises:
        GateError: There is no such version, or its files are not those that were registered.
    """
    quieten()
    if (Path(address) / "config.json").is_file():
        aside.print(f"exported model in {escape(address)}")
        model, tokenizer = load(Path(address), Path(address))
    else:
        version = find_model(address)
        with open_model(version) as folders:
            model, tokenizer = load(*folders)
        also = "".join(f", {alias}" for alias in version.aliases)
        aside.print(f"version {version.version} of {version.name}{also}")
        aside.print(f"adapter {version.tags[DIGEST]}, as registered")
    if sys.stdin.isatty():
        aside.print("Ctrl-C ends an answer, Ctrl-D or /exit the chat")
    converse(model.to(fastest_device()), tokenizer)


def quieten() -> None:
    """Keep progress bars and notices of the libraries out of the conversation."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def converse(model: Any, tokenizer: Any) -> None:
    """Answer question after question, each with all before it in mind."""
    turns: list[dict[str, str]] = []
    for question in questions():
        turns.append({"role": "user", "content": question})
        said: list[str] = []
        try:
            with closing(stream(model, tokenizer, turns, MAX_NEW_TOKENS)) as pieces:
                for piece in pieces:
                    said.append(piece)
                    sys.stdout.write(printable(piece))
                    sys.stdout.flush()
        except KeyboardInterrupt:
            aside.print(" (ended)", end="")
        except TooLongError as err:
            aside.print(f"{err}; the next question starts one", end="")
            turns.clear()
            continue
        finally:
            sys.stdout.write("\n")
        turns.append({"role": "assistant", "content": "".join(said).strip()})


def questions() -> Iterator[str]:
    """Yield the lines of stdin that are not empty, with a prompt if it is a terminal."""
    prompt = ""
    if sys.stdin.isatty():
        import readline  # noqa: F401 - gives `input` its keys and its history

        prompt = "> "
    while True:
        try:
            line = input(prompt).strip()
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            continue
        except EOFError:
            return
        if line == "/exit":
            return
        if line:
            yield line


def printable(text: str) -> str:
    r"""Leave out control characters, with which a model could steer the terminal.

    Example:
        >>> printable("\x1b[2Jone\ttwo\n")
        '[2Jone\ttwo\n'
    """
    return "".join(sign for sign in text if sign in "\n\t" or unicodedata.category(sign) != "Cc")
