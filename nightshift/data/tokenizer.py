"""Token ids of texts, and the place of each token in its text.

`tokenizers` gives both. For byte-level BPE, `fastokens` gives the same ids some twenty times as fast, but no
places. They follow from the bytes of the tokens, which together are the text. That the ids are the same is
checked with `PROBES` and every special token before the first text, and with a few texts of each batch.
"""

import importlib.metadata
import importlib.util
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nightshift.core.errors import StageError

# A character has at most this many tokens, with a prefix space.
UNORDERED = 6
# Characters of a batch from which it pays to load fastokens, which takes as long as to tokenize two million
# with tokenizers: a batch of this size is one of many.
MANY_CHARACTERS = 2**19
# Texts of each batch that both libraries tokenize.
CHECKED = 4
# What tokenizers treat differently: white space, contractions, numbers, accents, scripts, emoji, code.
PROBES = (
    "Hello world, I'm sure they'LL say: it's 12345.67 (or 1,000,000)!",
    "  two   spaces\n\n\n  indented\t\ttabs\r\nlines \n \n end  ",
    "def f(x):\n    return x[0] != 'ok' and a->b << 2  # 100%\n\n\n",
    "naïve café Ünïcode İstanbul straße ½ ﬁne ²",
    "数学 日本語のテキスト ภาษาไทย 한국어 हिन्दी العربية עברית Ελληνικά русский",
    "🙂 👩\u200d👩\u200d👧 🇩🇪 \u00a0nbsp\u3000wide \u2028line \u200bzero",
    "<tag attr='1'> https://example.org/a?b=c&d=%20 _under_score__ CamelCaseWord ALLCAPS",
)
Ids = NDArray[np.int32]


class Tokens(Protocol):
    """The tokens of a text. Positions are in characters."""

    ids: Ids

    def inside(self, start: int, end: int, edge: int) -> Sequence[list[int] | slice]:
        """Return the tokens that start in [start, end) and end at `edge` at the latest."""

    def find(self, position: int) -> int:
        """Return the first token that starts at a position or after it."""


def find_tokens(tokenizer: Any, texts: Sequence[str]) -> list[Tokens]:
    """Tokenize texts on all CPU cores, without the special tokens of the tokenizer's post-processor.

    Args:
        tokenizer: `tokenizers.Tokenizer`.
        texts: The texts.

    Raises:
        StageError: fastokens and tokenizers differ.
    """
    is_large = sum(map(len, texts)) >= MANY_CHARACTERS
    fast = load_fast(tokenizer) if is_large else None
    if fast is None:
        return [_Offsets(one) for one in tokenizer.encode_batch(texts, add_special_tokens=False)]
    found: list[Tokens | None] = list(fast.find_tokens(texts))
    checked = range(0, len(texts), max(1, len(texts) // CHECKED))
    others = [i for i, tokens in enumerate(found) if tokens is None]
    again = sorted({*checked, *others})
    slow = tokenizer.encode_batch([texts[i] for i in again], add_special_tokens=False)
    for i, tokens in zip(again, slow, strict=True):
        one = found[i]
        if one is None:
            found[i] = _Offsets(tokens)
        elif one.ids.tolist() != tokens.ids:
            raise StageError(
                f"fastokens {importlib.metadata.version('fastokens')} tokenizes a text differently from "
                f"tokenizers: {texts[i][:200]!r}; uninstall fastokens (everything works without it, slower), "
                "and report the text to its authors"
            )
    return [one for one in found if one is not None]


class _Offsets:
    """Tokens with the offsets of `tokenizers`, which are read only where they are needed.

    They are in order, except that of a prefix space, which may be after the bytes of its character. The
    offset of a special token may include the white space after it (Phi-3's <|end|>).
    """

    def __init__(self, encoding: Any) -> None:
        self._encoding = encoding
        self.ids: Ids = np.array(encoding.ids, dtype=np.int32)

    def inside(self, start: int, end: int, edge: int) -> Sequence[list[int] | slice]:
        """See `Tokens`."""
        count, place = len(self.ids), self._encoding.token_to_chars
        first, stop = self.find(start), min(self.find(end), self._bisect(edge + 1, 1))
        edges = {*range(first - UNORDERED, first + UNORDERED), *range(stop - UNORDERED, stop + UNORDERED)}
        places = {i: place(i) for i in edges if 0 <= i < count}
        near = [i for i, (low, high) in places.items() if start <= low < end and high <= edge]
        return near, slice(first + UNORDERED, max(first, stop - UNORDERED))

    def find(self, position: int) -> int:
        """See `Tokens`."""
        return self._bisect(position, 0)

    def _bisect(self, position: int, side: int) -> int:
        place = self._encoding.token_to_chars
        return bisect_left(range(len(self.ids)), position, key=lambda i: place(i)[side])


class _Bytes:
    """Tokens whose bytes are those of the text, one after the other."""

    def __init__(self, text: str, ids: Ids, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> None:
        self._text, self._is_ascii = text, text.isascii()
        self.ids, self._starts, self._ends = ids, starts, ends

    def inside(self, start: int, end: int, edge: int) -> Sequence[list[int] | slice]:
        """See `Tokens`."""
        first, stop = self.find(start), self.find(end)
        return (slice(first, min(stop, bisect_right(self._ends, self._byte(edge)))),)

    def find(self, position: int) -> int:
        """See `Tokens`."""
        # Unlike numpy's search, which hands over to the thread that tokenizes the next batch.
        return bisect_left(self._starts, self._byte(position))

    def equals(self, encoding: Any, text: str) -> bool:
        """Return whether the ids, and the places in characters, are those of a `tokenizers.Encoding`."""
        # Number of characters that start before each byte, and whether it continues one.
        data = np.frombuffer(text.encode(), dtype=np.uint8)
        continues = np.append((data & 0xC0) == 0x80, False)
        before = np.append(0, np.cumsum(~continues[:-1]))
        low, high = before[self._starts] - continues[self._starts], before[self._ends]
        places = list(zip(low.tolist(), high.tolist(), strict=True))
        return bool(self.ids.tolist() == encoding.ids and places == encoding.offsets)

    def _byte(self, position: int) -> int:
        return position if self._is_ascii else len(self._text[:position].encode())


@dataclass(frozen=True, slots=True)
class FastTokenizer:
    """A byte-level BPE tokenizer of fastokens.

    Attributes:
        tokenizer: `fastokens.Tokenizer`.
        pieces: Bytes of each token.
        lengths: Number of bytes of each token, shape (n_tokens,).
        leading: White space at the start of each token that its place leaves out, shape (n_tokens,).
        trailing: White space at its end, likewise.
        keeps_first_space: Whether the place of the first token includes one space at its start.
    """

    tokenizer: Any
    pieces: Sequence[bytes]
    lengths: NDArray[np.int64]
    leading: NDArray[np.int64]
    trailing: NDArray[np.int64]
    keeps_first_space: bool

    def find_tokens(self, texts: Sequence[str]) -> list[_Bytes | None]:
        """Tokenize texts; None for a text that is not the bytes of its tokens, as after a normalization."""
        flat, edges = self.tokenizer.encode_batch_flat(list(texts))
        ids = np.frombuffer(flat, dtype=np.uint32).astype(np.int32)
        bounds = np.frombuffer(edges, dtype=np.uint64).astype(np.int64)
        pieces = list(map(self.pieces.__getitem__, ids.tolist()))
        # Positions in the texts, one after the other, like `process_offsets` of tokenizers' ByteLevel.
        sizes = self.lengths[ids]
        ends = sizes.cumsum()
        leading = self.leading[ids]
        if self.keeps_first_space:
            first = bounds[:-1][bounds[:-1] < bounds[1:]]
            leading[first] = np.maximum(leading[first] - 1, 0)
        low = np.minimum(ends - sizes + leading, ends)
        high = np.maximum(ends - self.trailing[ids], low)
        origins = np.append(0, ends)[bounds]
        return [
            _Bytes(text, ids[start:stop], low[start:stop] - origin, high[start:stop] - origin)
            if b"".join(pieces[start:stop]) == text.encode()
            else None
            for text, (start, stop), origin in zip(
                texts, pairwise(bounds.tolist()), origins[:-1].tolist(), strict=True
            )
        ]


@lru_cache(maxsize=4)
def load_fast(tokenizer: Any) -> FastTokenizer | None:
    """Load a tokenizer with fastokens.

    Args:
        tokenizer: `tokenizers.Tokenizer`.

    Returns:
        None if fastokens is not installed or cannot load it, if it is not byte-level BPE, or if the two
        libraries differ in the tokens of a probe or their places.
    """
    if importlib.util.find_spec("fastokens") is None:
        return None
    import fastokens

    try:
        fast = fastokens.Tokenizer.from_json_str(tokenizer.to_str())
    except (ValueError, NotImplementedError, RuntimeError):
        return None
    added = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}
    by_id = {i: name for name, i in tokenizer.get_vocab().items()} | added
    names = [by_id.get(i, "") for i in range(max(by_id, default=-1) + 1)]
    signs = _byte_signs()
    is_plain = [i in added or not signs.keys() >= set(name) for i, name in enumerate(names)]
    pieces = [
        name.encode() if plain else b"".join(map(signs.__getitem__, name))
        for name, plain in zip(names, is_plain, strict=True)
    ]
    leading = [len(piece) - len(piece.lstrip(b" ")) for piece in pieces]
    trailing = [len(piece) - len(piece.rstrip(b" ")) for piece in pieces]
    # Some post-processors trim the offsets, perhaps but for a prefix space.
    is_trimmed = not any(" " in "a a"[low:high] for low, high in _offsets("a a", tokenizer))
    loaded = FastTokenizer(
        fast,
        pieces,
        np.array([*map(len, pieces)]),
        np.array(leading) * is_trimmed,
        np.array(trailing) * is_trimmed,
        keeps_first_space=all(low == 0 for low, _ in _offsets(" a", tokenizer)[:1]),
    )
    special = "".join(f"{content}a {content} b\n{content}\n" for content in added.values())
    probes = [*PROBES, special]
    expected = tokenizer.encode_batch(probes, add_special_tokens=False)
    pairs = zip(loaded.find_tokens(probes), expected, probes, strict=True)
    return loaded if all(one is not None and one.equals(slow, text) for one, slow, text in pairs) else None


def _byte_signs() -> dict[str, bytes]:
    """Return the sign of each byte in a byte-level vocabulary (`bytes_to_unicode` of GPT-2)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [code for code in range(256) if code not in shown]
    signs = {chr(code): bytes([code]) for code in shown}
    return signs | {chr(256 + i): bytes([code]) for i, code in enumerate(hidden)}


def _offsets(text: str, tokenizer: Any) -> list[tuple[int, int]]:
    offsets: list[tuple[int, int]] = tokenizer.encode(text, add_special_tokens=False).offsets
    return offsets
