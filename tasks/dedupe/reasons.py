"""Reasons for removing a row: its content is lost, or an earlier row has it."""

from collections import Counter
from collections.abc import Mapping, Sequence

from tasks.dedupe.candidates import Removal

# Reasons that lose no content.
HARMLESS = ("exact_duplicate", "new_version")


def classify_removals(
    removals: Mapping[int, Removal], contents: Sequence[str], shards: Sequence[str]
) -> dict[int, str]:
    """Assign each removal a reason, which depends on the other rows of its shard.

    `exact_duplicate`: the content equals that of an earlier row exactly. `new_version`: the shard mostly
    repeats earlier shards, like a nightly export of a whole table, and the row is the first one there near
    its earlier row. `normalized_duplicate` and `near_duplicate`: a row with distinct content is dropped.

    Args:
        removals: Index -> removal.
        contents: Digest of each row's content before canonicalisation, shape (n,).
        shards: Name of each row's shard, shape (n,).

    Returns:
        Index -> reason, in order of arrival.

    Example:
        >>> near = Removal(0, 0.9, "near_duplicate", (0,))
        >>> same = Removal(1, 1.0, "normalized_duplicate", (1,))
        >>> classify_removals({2: near, 3: same}, ["a", "b", "A", "b"], ["s/1", "s/1", "s/2", "s/2"])
        {2: 'new_version', 3: 'exact_duplicate'}
        >>> classify_removals({1: near}, ["a", "A"], ["s/1", "s/2"])
        {1: 'near_duplicate'}
    """
    first: dict[str, int] = {}
    earliest = [first.setdefault(content, i) for i, content in enumerate(contents)]
    rows = Counter(shards)
    known = Counter(shards[i] for i, j in enumerate(earliest) if shards[j] != shards[i])
    replaced: set[tuple[str, int]] = set()
    reasons = {}
    for i, removal in sorted(removals.items()):
        shard, pair = shards[i], (shards[i], removal.kept)
        reasons[i] = removal.reason
        if earliest[i] != i:
            reasons[i] = "exact_duplicate"
        elif 2 * known[shard] >= rows[shard] and shards[removal.kept] != shard and pair not in replaced:
            reasons[i] = "new_version"
            replaced.add(pair)
    return reasons
