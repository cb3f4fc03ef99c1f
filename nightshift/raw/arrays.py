"""Split a JSON document into its rows without loading it whole."""

import io
import re
from collections.abc import Iterator
from typing import Literal

# Structural characters of JSON outside strings, and the inside of a string up to its closing quote.
SIGN = re.compile(rb'["\[\]{},]')
TEXT = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
DEPTH = {b"[": 1, b"{": 1, b"]": -1, b"}": -1}
CHUNK = 1 << 18
# Keys whose list contains the rows of a file: {"data": [...]}.
WRAPPER = re.compile(rb'"(data|train|rows|examples|instances|items|records|samples|dataset)"\s*:\s*\[\Z')
Pieces = Iterator[tuple[bytes, bytes]]
Elements = Iterator[bytes | None]
Shape = Literal["lines", "array", "objects", "wrapped"]


def find_shape(file: io.BufferedReader) -> Shape:
    """Return how a JSON file contains its rows; reads its first value.

    Returns:
        `array`: one array of rows; `wrapped`: an object with such an array; `objects`: one object or
        several, over many lines; `lines`: JSON Lines.

    Raises:
        ValueError: An object contains several lists of rows.
    """
    pieces, text, depth, broken, lists = _pieces(file), b"", 0, False, set[bytes]()
    for piece, sign in pieces:
        text += piece
        if not sign:
            # A long string is no key of a wrapper.
            text = text[-1000:]
            continue
        if depth == 0 and sign != b"{":
            return "array" if sign == b"[" else "lines"
        if sign == b"[" and depth == 1 and (found := WRAPPER.search(text)):
            lists.add(found[1])
        broken = broken or (depth > 0 and b"\n" in text)
        depth, text = depth + DEPTH.get(sign, 0), b""
        if depth == 0:
            break
    else:
        # Its first row is malformed, or it is empty.
        return "lines"
    if lists and not any(piece.strip() for piece, _ in pieces):
        if len(lists) > 1:
            names = ", ".join(sorted(name.decode() for name in lists))
            raise ValueError(f"several lists of rows ({names}); keep one list in a file")
        return "wrapped"
    return "objects" if broken else "lines"


def split_rows(file: io.BufferedReader, shape: Shape, limit: int) -> Elements:
    """Yield the bytes of each row of a JSON document, None for a row above the limit.

    Rows are not parsed, so a malformed one does not affect the others as long as its quotes and brackets
    are balanced.

    Args:
        file: Stream positioned before the document.
        shape: `array`, `wrapped` or `objects`; see `find_shape`.
        limit: Maximum size of a row, bytes.

    Raises:
        ValueError: The array is not closed, or data follows it.
    """
    pieces = _pieces(file)
    if shape == "objects":
        yield from _objects(pieces, limit)
        return
    if shape == "wrapped":
        _skip_to_list(pieces)
    yield from _elements(pieces, limit, is_open=shape == "wrapped")
    if shape == "array" and any(piece.strip() for piece, _ in pieces):
        raise ValueError("unexpected data after the array")


def _skip_to_list(pieces: Pieces) -> None:
    """Read up to the opening bracket of the rows."""
    text, depth = b"", 0
    for piece, sign in pieces:
        text = (text + piece)[-1000:]
        if sign == b"[" and depth == 1 and WRAPPER.search(text):
            return
        depth += DEPTH.get(sign, 0)
        text = b"" if sign else text


def _elements(pieces: Pieces, limit: int, *, is_open: bool) -> Elements:
    """Yield the elements of an array, whose opening bracket may have been read."""
    depth, element, too_large, empty = int(is_open), bytearray(), False, True
    for piece, sign in pieces:
        depth += DEPTH.get(sign, 0)
        if sign == b"[" and depth == 1 and empty and not element.strip():
            element.clear()
            continue
        too_large = too_large or len(element) + len(piece) > limit
        if not too_large:
            element += piece
        if depth == 0 or (depth == 1 and sign == b","):
            text = bytes(element[:-1]).strip()
            if text or too_large or not (empty and depth == 0):
                yield None if too_large else text
            element, too_large, empty = bytearray(), False, False
        if depth == 0:
            return
    raise ValueError("the array is not closed")


def _objects(pieces: Pieces, limit: int) -> Elements:
    """Yield objects that follow each other, each over one line or many."""
    depth, element, too_large = 0, bytearray(), False
    for piece, sign in pieces:
        depth += DEPTH.get(sign, 0)
        too_large = too_large or len(element) + len(piece) > limit
        if not too_large:
            element += piece
        if depth == 0 and sign == b"}":
            yield None if too_large else bytes(element).strip()
            element, too_large = bytearray(), False
    if too_large or element.strip():
        yield None if too_large else bytes(element).strip()


def _pieces(file: io.BufferedReader) -> Pieces:
    """Yield (piece, structural character that ends it); the character is empty at the end of a chunk.

    Characters inside strings do not count.
    """
    inside, rest = False, b""
    while chunk := file.read(CHUNK):
        chunk, start, position = rest + chunk, 0, 0
        while position < len(chunk):
            if inside:
                text = TEXT.match(chunk, position)
                position = text.end() if text else position
                if chunk[position:] == b"\\":
                    break
                inside = position == len(chunk)
                position += not inside
                continue
            found = SIGN.search(chunk, position)
            position = found.end() if found else len(chunk)
            if found and found[0] == b'"':
                inside = True
            elif found:
                yield chunk[start:position], found[0]
                start = position
        rest = chunk[position:]
        yield chunk[start:position], b""
