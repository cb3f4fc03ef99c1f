"""Filters of the templates: how a text is shown in HTML and in Markdown."""

import html
import re

from markupsafe import Markup

# Characters shown of a text.
TEXT_LENGTH = 800


def cut(text: object, length: int = TEXT_LENGTH) -> str:
    """Truncate a long text and append the number of omitted characters.

    Example:
        >>> cut("abcdef", 4), cut("abcd", 4)
        ('abcd … (2 more characters)', 'abcd')
    """
    whole = str(text)
    return whole if len(whole) <= length else f"{whole[:length]} … ({len(whole) - length:,} more characters)"


def cell(text: object) -> str:
    r"""Escape a text for a cell of a Markdown table.

    Example:
        >>> cell("a | b\nc")
        'a \\| b c'
    """
    return " ".join(str(text).split()).replace("|", r"\|")


def line(text: object) -> Markup:
    r"""Put a text on one line of Markdown; tags are escaped, quotes and code stay.

    Example:
        >>> str(line("the model's\n`code` <b>"))
        "the model's `code` &lt;b&gt;"
    """
    return Markup(html.escape(" ".join(str(text).split()), quote=False))


def code(text: object) -> Markup:
    """Escape a text for HTML and show what is in backticks as code.

    Example:
        >>> str(code("type `make run` <b>"))
        'type <code>make run</code> &lt;b&gt;'
    """
    return Markup(re.sub("`([^`]*)`", r"<code>\1</code>", html.escape(str(text))))
