"""What a file imports, read from its syntax tree."""

import ast
from collections.abc import Iterator
from pathlib import Path


def imports(file: Path) -> Iterator[str]:
    """Yield the modules that a file imports, and the names it takes from them, at any nesting level."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
