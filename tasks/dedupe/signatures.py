"""MinHash signatures as the band keys of an LSH index, computed by Daft once per text.

A signature of 128 values is stored as one 64-bit key per band (16 x 8 bytes): two texts are
candidates if they share a key in the same band, so nothing else is needed.

Sources: Broder (1997) for MinHash; Leskovec et al., Mining of Massive Datasets, ch. 3, for banding.
"""

from collections.abc import Callable, Iterable, Sequence

import daft
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from nightshift.core.code_digest import source_digest, versions
from nightshift.core.memo import Memo
from nightshift.data.text import CHARACTER_SHINGLE, Shingles, is_short
from tasks.dedupe import DedupeParams

HASH_FUNCTION = "xxhash3_64"
# Texts per Daft task: a fraction of a second of work.
TEXTS_PER_TASK = 10_000
# Texts that are copied to Daft at once.
TEXTS_PER_CALL = 40_000
# Replaces the space inside a character shingle; no canonical text contains it.
SPACE = "▁"
# Odd constants of splitmix64 (Steele et al., 2014), for mixing the values of a band into one key.
GOLDEN, MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)
Keys = NDArray[np.uint64]
Sign = Callable[[Sequence[str], DedupeParams], Keys]


def open_memo(params: DedupeParams) -> Memo:
    """Open the cache of band keys for these parameters."""
    return Memo(
        "signatures",
        {
            "code": source_digest("tasks/dedupe/signatures.py", "nightshift/data/text.py"),
            "engines": versions("daft", "numpy"),
            "num_perm": params.num_perm,
            "bands": params.bands,
            "shingle_size": params.shingle_size,
            "seed": params.seed,
        },
    )


def sign_cached(
    texts: Iterable[str], digests: Sequence[str], params: DedupeParams, memo: Memo, sign: Sign
) -> Keys:
    """Return the band keys of texts, computing only those that are not cached.

    Args:
        texts: Texts for `sign`, shape (n,).
        digests: Keys of the texts in the cache, shape (n,).
        params: MinHash parameters.
        memo: Cache from `open_memo`.
        sign: `sign_texts` or `sign_passages`.

    Returns:
        Band keys, shape (n, bands), uint64.
    """
    keys = np.empty((len(digests), params.bands), dtype=np.uint64)
    remaining = iter(texts)
    for start in range(0, len(digests), TEXTS_PER_CALL):
        some = digests[start : start + TEXTS_PER_CALL]
        known = memo.read(list(dict.fromkeys(some)))
        new = {digest: text for digest, text in zip(some, remaining, strict=False) if digest not in known}
        computed = [row.tobytes() for row in sign(list(new.values()), params)]
        memo.write(zip(new, computed, strict=True))
        known |= zip(new, computed, strict=True)
        values = np.frombuffer(b"".join(known[digest] for digest in some), dtype=np.uint64)
        keys[start : start + TEXTS_PER_CALL] = values.reshape(len(some), params.bands)
    return keys


def sign_texts(texts: Sequence[str], params: DedupeParams) -> Keys:
    """Compute band keys with Daft from word shingles, or character shingles if a text is short.

    Long and short texts never share a key: their shingles are not comparable.

    Returns:
        Band keys, shape (n, bands), uint64.
    """
    short = np.fromiter((is_short(text) for text in texts), dtype=bool, count=len(texts))
    keys = np.empty((len(texts), params.bands), dtype=np.uint64)
    words = [text for text, is_char in zip(texts, short, strict=True) if not is_char]
    grams = [_spell(text) for text, is_char in zip(texts, short, strict=True) if is_char]
    keys[~short] = _band_keys(_minhash(words, params.shingle_size, params), params.bands)
    keys[short] = ~_band_keys(_minhash(grams, 1, params), params.bands)
    return keys


def sign_passages(texts: Sequence[str], params: DedupeParams) -> Keys:
    """Compute band keys from the words of texts, each of them a shingle (see `spell_shingles`).

    Returns:
        Band keys, shape (n, bands), uint64.
    """
    return _band_keys(_minhash(list(texts), 1, params), params.bands)


def _minhash(texts: list[str], ngram_size: int, params: DedupeParams) -> NDArray[np.uint32]:
    """Compute MinHash signatures over word n-grams, shape (n, num_perm)."""
    if not texts:
        return np.empty((0, params.num_perm), dtype=np.uint32)
    table = pa.table({"number": np.arange(len(texts)), "text": pa.array(texts, pa.large_string())})
    signature = daft.col("text").minhash(
        num_hashes=params.num_perm,
        ngram_size=ngram_size,
        seed=params.seed,
        hash_function=HASH_FUNCTION,
    )
    frame = daft.from_arrow(table).into_batches(TEXTS_PER_TASK)
    signed = frame.select(daft.col("number"), signature.alias("signature")).to_arrow().combine_chunks()
    values = signed["signature"].combine_chunks().flatten().to_numpy().reshape(len(texts), params.num_perm)
    # Daft may return its batches in any order.
    ordered = np.empty((len(texts), params.num_perm), dtype=np.uint32)
    ordered[signed["number"].to_numpy()] = values
    return ordered


def _band_keys(signatures: NDArray[np.uint32], bands: int) -> Keys:
    """Mix the values of each band into one 64-bit key.

    A key collision of two different bands costs one verification, nothing else.
    """
    values = signatures.reshape(len(signatures), bands, signatures.shape[1] // bands).astype(np.uint64)
    keys = np.zeros(values.shape[:2], dtype=np.uint64)
    for column in range(values.shape[2]):
        keys = (keys ^ values[:, :, column]) * MIX + GOLDEN
        keys ^= keys >> np.uint64(31)
    return keys


def spell_shingles(shingles: Shingles) -> str:
    """Format a set of word shingles as one text, each as a word.

    Example:
        >>> spell_shingles(frozenset(["who are", "are you"]))
        'are▁you who▁are'
    """
    return " ".join(sorted(shingle.replace(" ", SPACE) for shingle in shingles))


def _spell(text: str) -> str:
    """Format the character shingles of a short text as words.

    Example:
        >>> _spell("who am")
        'who▁a ho▁am'
    """
    solid = text.replace(" ", SPACE)
    count = max(1, len(solid) - CHARACTER_SHINGLE + 1)
    return " ".join(solid[i : i + CHARACTER_SHINGLE] for i in range(count))
