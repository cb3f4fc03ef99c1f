"""Split a JSON array into its elements without loading it whole."""

import io
import re
from collections.abc import Iterator

# Structural characters of JSON outside strings, and the inside of a string up to its closing quote.
SIGN = re.compile(rb'["\[\]{},]')
TEXT = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
DEPTH = {b"[": 1, b"{": 1, b"]": -1, b"}": -1}
CHUNK = 1 << 18


def split_array(file: io.BufferedReader, limit: int) -> Iterator[bytes | None]:
    """Yield the bytes of each element of a JSON array, None for an element above the limit.

    Elements are not parsed, so a malformed one does not affect the others as long as its quotes and
    brackets are balanced.

    Args:
        file: Stream positioned before the opening bracket.
        limit: Maximum size of an element, bytes.

    Raises:
        ValueError: The array is not closed, or data follows it.
    """
    depth, element, too_large, empty = 0, bytearray(), False, True
    pieces = _pieces(file)
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
            break
    else:
        raise ValueError("the array is not closed")
    if any(piece.strip() for piece, _ in pieces):
        raise ValueError("unexpected data after the array")


def _pieces(file: io.BufferedReader) -> Iterator[tuple[bytes, bytes]]:
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
