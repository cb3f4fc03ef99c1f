"""Digests of the code and library versions that decide a result, for cache keys.

Comments, docstrings and formatting do not change a digest.
"""

import ast
import importlib.metadata
import sys
from collections.abc import Collection, Iterable
from functools import cache
from pathlib import Path

import yaml

from nightshift.core.files import text_digest

ROOT = Path(__file__).parents[2]
PACKAGES = ("nightshift/", "tasks/")
# Suffixes of files with code.
LANGUAGES = (".py", ".c")
# Libraries that a model runs on; the last two lines are optional dependencies.
MODEL_ENGINES = (
    *("accelerate", "datasets", "fastokens", "jinja2", "numpy", "peft", "safetensors", "tokenizers"),
    *("torch", "transformers"),
    *("bitsandbytes", "flash-attn", "flash-attn-3", "flash-attn-4", "kernels", "liger-kernel"),
    *("triton", "xformers"),
)


def code_digest(stage: str, engines: Iterable[str], without: Collection[str] = ()) -> str:
    """Hash a stage's code, as listed in dvc.yaml, and the versions of its libraries.

    Args:
        stage: Stage name in dvc.yaml.
        engines: Libraries whose versions can change the result; see `versions`.
        without: Excluded code files, which do not affect the result, relative to the project root.
    """
    graph = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
    code = [ROOT / path for path in graph["stages"][stage]["deps"] if path.startswith(PACKAGES)]
    files = [file for path in code for file in ([path] if path.is_file() else path.rglob("*"))]
    names = {file.relative_to(ROOT).as_posix() for file in files if file.suffix in LANGUAGES}
    return text_digest(source_digest(*names.difference(without)), *versions(*engines))


def source_digest(*names: str) -> str:
    """Hash code files by name, relative to the project root, and Python by syntax tree."""
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in sorted(names)}
    code = {name: syntax(text) if name.endswith(".py") else text for name, text in texts.items()}
    return text_digest(*(text for pair in code.items() for text in pair))


@cache
def syntax(code: str) -> str:
    r"""Return code as a dumped syntax tree, without comments and docstrings.

    Example:
        >>> syntax('def f():\n    "Say."\n    return 1  # why') == syntax("def f(): return 1")
        True
    """
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
    return ast.dump(tree)


def versions(*names: str) -> list[str]:
    """Return `name=version` of Python and of each distribution; `name=none` if it is not installed."""
    found = [f"python={sys.version_info.major}.{sys.version_info.minor}"]
    for name in sorted(names):
        try:
            found.append(f"{name}={importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name}=none")
    return found
