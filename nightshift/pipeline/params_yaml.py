"""Set values in params.yaml as a person would: comments, order and layout stay."""

from collections.abc import Mapping
from io import StringIO
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from nightshift.core.config import config_error


def edit(text: str, overrides: Mapping[str, Any]) -> str:
    r"""Set `section.key` values in YAML text, comments kept.

    Raises:
        ConfigError: A key is not of the form `section.key`.

    Example:
        >>> edit("sft:\n  seed: 0 # order\n", {"sft.seed": 7})
        'sft:\n  seed: 7 # order\n'
    """
    if wrong := [key for key in overrides if len(key.split(".")) < 2]:
        raise config_error([f"override {key!r}: must be section.key" for key in wrong])
    parser = YAML()
    parser.preserve_quotes = True
    parser.width = 4096
    # As the file writes it: ruamel's own choice for None is nothing at all.
    parser.representer.add_representer(
        type(None), lambda self, _: self.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    # Other readers of the file, PyYAML first, take `1e-05` for a text.
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
        _place(target, last, value)
    out = StringIO()
    parser.dump(values, out)
    return out.getvalue()


def _float_text(number: float) -> str:
    """Write a float so that YAML 1.1 and 1.2 read it as one.

    Example:
        >>> _float_text(1e-05), _float_text(1.5e-08), _float_text(0.1)
        ('1.0e-05', '1.5e-08', '0.1')
    """
    text = repr(number)
    return text if "." in text else text.replace("e", ".0e")


def _place(parent: Any, key: str, value: Any) -> None:
    """Set a value where another stood, which ends with the comment of the key that follows.

    A mapping stays a block if the old one was; every other collection goes on one line, where that comment
    cannot come between the key and its items.
    """
    old = parent.get(key)
    is_block = isinstance(old, CommentedMap) and not old.fa.flow_style() and isinstance(value, dict) and value
    holder, place = parent, key
    if isinstance(value, dict):
        value = CommentedMap(value)
    elif isinstance(value, list):
        value = CommentedSeq(value)
    if is_block:
        holder, place = value, list(value)[-1]
    elif isinstance(value, CommentedMap | CommentedSeq):
        value.fa.set_flow_style()
    parent[key] = value
    if comment := _end_comment(old):
        holder.ca.items[place] = [None, None, comment, None]


def _end_comment(node: Any) -> Any:
    """Return the comment behind the last item of a collection, None without one."""
    found = None
    while isinstance(node, CommentedMap | CommentedSeq) and node:
        last = list(node)[-1] if isinstance(node, CommentedMap) else len(node) - 1
        found = node.ca.items.get(last, [None] * 4)[2 if isinstance(node, CommentedMap) else 0] or found
        node = node[last]
    return found
