"""Edit values in params.yaml; comments, order and layout stay."""

import re
from collections.abc import Mapping
from io import StringIO
from typing import Any

import yaml
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from nightshift.core.config import config_error

# Text that needs no quotes inside brackets.
PLAIN = re.compile(r"[A-Za-z_./~][\w./@~-]*")


def edit(text: str, overrides: Mapping[str, Any]) -> str:
    r"""Set `section.key` values in YAML text; comments stay.

    Raises:
        ConfigError: A key does not have the form `section.key`, or names a part of a plain value.

    Example:
        >>> edit("sft:\n  seed: 0 # order\n", {"sft.seed": 7})
        'sft:\n  seed: 7 # order\n'
    """
    if wrong := [key for key in overrides if len(key.split(".")) < 2]:
        raise config_error([f"override {key!r}: must be section.key" for key in wrong])
    parser = YAML()
    parser.preserve_quotes = True
    parser.width = 4096
    # Write None as the file does; ruamel's default is an empty value.
    parser.representer.add_representer(
        type(None), lambda self, _: self.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    # Other YAML parsers, such as PyYAML, read `1e-05` as a string.
    parser.representer.add_representer(
        float,
        lambda self, number: self.represent_scalar("tag:yaml.org,2002:float", _float_text(number)),
    )
    values = parser.load(text)
    for key, value in overrides.items():
        *sections, last = key.split(".")
        target = values
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise config_error([f"override {key!r}: {section} has no keys, its value is {target!r}"])
        _place(target, last, value)
    out = StringIO()
    parser.dump(values, out)
    return out.getvalue()


def _float_text(number: float) -> str:
    """Format a float so that YAML 1.1 and 1.2 parse it as a float.

    Example:
        >>> _float_text(1e-05), _float_text(1.5e-08), _float_text(0.1)
        ('1.0e-05', '1.5e-08', '0.1')
    """
    text = repr(number)
    return text if "." in text else text.replace("e", ".0e")


def _place(parent: Any, key: str, value: Any) -> None:
    """Replace a value; keep the comment of the next key, which ruamel attaches to the old value.

    A mapping stays in block style if the old one was. Every other collection goes on one line, where
    that comment cannot come between the key and its items.
    """
    old = parent.get(key)
    is_block = isinstance(old, CommentedMap) and not old.fa.flow_style() and isinstance(value, dict) and value
    holder, place = parent, key
    if is_block:
        value = CommentedMap({_on_one_line(name): _on_one_line(one) for name, one in value.items()})
        holder, place = value, list(value)[-1]
    elif not isinstance(value, str) or parent.fa.flow_style() or yaml.safe_load(value) != value:
        value = _on_one_line(value)
    parent[key] = value
    if comment := _end_comment(old):
        holder.ca.items[place] = [None, None, comment, None]


def _on_one_line(value: Any) -> Any:
    """Return a value as it is written inside brackets.

    There, YAML 1.2 parsers such as DVC's end a plain text at a colon, also in a URL. YAML 1.1 parsers such
    as PyYAML read a plain `yes` as true.
    """
    if isinstance(value, str):
        is_plain = PLAIN.fullmatch(value) and yaml.safe_load(value) == value
        return value if is_plain else DoubleQuotedScalarString(value)
    if isinstance(value, dict):
        mapping = CommentedMap({_on_one_line(name): _on_one_line(one) for name, one in value.items()})
        mapping.fa.set_flow_style()
        return mapping
    if isinstance(value, list):
        items = CommentedSeq(map(_on_one_line, value))
        items.fa.set_flow_style()
        return items
    return value


def _end_comment(node: Any) -> Any:
    """Return the comment after the last item of a collection, or None."""
    found = None
    while isinstance(node, CommentedMap | CommentedSeq) and node:
        last = list(node)[-1] if isinstance(node, CommentedMap) else len(node) - 1
        found = node.ca.items.get(last, [None] * 4)[2 if isinstance(node, CommentedMap) else 0] or found
        node = node[last]
    return found
