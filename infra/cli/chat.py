"""Chat with a version of the model, or with an exported model, in the terminal."""

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

# Answers go to stdout and everything else to stderr, so that a pipe receives only the answers.
stderr_console = Console(stderr=True, highlight=False)


def chat(address: str) -> None:
    """Load a model and answer each line of stdin, until end of file or `/exit`.

    Args:
        address: Version address as for `find_model`, or the folder of an export.

    Raises:
        GateError: The version does not exist, or its files differ from the registered ones.
    """
    silence_libraries()
    if (Path(address) / "config.json").is_file():
        stderr_console.print(f"exported model in {escape(address)}")
        model, tokenizer = load(Path(address), Path(address))
    else:
        version = find_model(address)
        with open_model(version) as folders:
            model, tokenizer = load(*folders)
        aliases = "".join(f", {alias}" for alias in version.aliases)
        stderr_console.print(f"version {version.version} of {version.name}{aliases}")
        stderr_console.print(f"adapter {version.tags[DIGEST]}, as registered")
    if sys.stdin.isatty():
        stderr_console.print("Ctrl-C stops an answer, Ctrl-D or /exit ends the chat")
    converse(model.to(fastest_device()), tokenizer)


def silence_libraries() -> None:
    """Disable progress bars and warnings of the libraries during the chat."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def converse(model: Any, tokenizer: Any) -> None:
    """Answer one question after another, with all previous turns as context."""
    turns: list[dict[str, str]] = []
    for question in questions():
        turns.append({"role": "user", "content": question})
        answer: list[str] = []
        try:
            with closing(stream(model, tokenizer, turns, MAX_NEW_TOKENS)) as pieces:
                for piece in pieces:
                    answer.append(piece)
                    sys.stdout.write(printable(piece))
                    sys.stdout.flush()
        except KeyboardInterrupt:
            stderr_console.print(" (interrupted)", end="")
        except TooLongError as err:
            stderr_console.print(f"{err} (the next question does)", end="")
            turns.clear()
            continue
        finally:
            sys.stdout.write("\n")
        turns.append({"role": "assistant", "content": "".join(answer).strip()})


def questions() -> Iterator[str]:
    """Yield the non-empty lines of stdin; show a prompt if stdin is a terminal."""
    prompt = ""
    if sys.stdin.isatty():
        import readline  # noqa: F401 - adds line editing and history to `input`

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
    r"""Remove control characters, with which a model could control the terminal.

    Example:
        >>> printable("\x1b[2Jone\ttwo\n")
        '[2Jone\ttwo\n'
    """
    return "".join(sign for sign in text if sign in "\n\t" or unicodedata.category(sign) != "Cc")
