"""Why a row is removed: its content is lost, or an earlier row has it."""

from collections import Counter
from collections.abc import Mapping, Sequence

from tasks.dedupe.candidates import Removal

# Reasons with which no content is lost.
HARMLESS = ("repeat", "new_version")


def classify_removals(
    removals: Mapping[int, Removal], contents: Sequence[str], shards: Sequence[str]
) -> dict[int, str]:
    """Give each removal its reason, which depends on what else came in with the row.

    `repeat`: the row says word for word what an earlier one says. `new_version`: its shard mostly repeats
    earlier shards, as the export of a whole table each night does, and it is the one row there that is near
    to one of theirs. `exact_duplicate` and `near_duplicate`: a row with a content of its own is dropped.

    Args:
        removals: Index -> removal.
        contents: Digest of each row's content as it came, shape (n,).
        shards: Name of each row's shard, shape (n,).

    Returns:
        Index -> reason, in order of arrival.

    Example:
        >>> near = Removal(0, 0.9, "near_duplicate", (0,))
        >>> same = Removal(1, 1.0, "exact_duplicate", (1,))
        >>> classify_removals({2: near, 3: same}, ["a", "b", "A", "b"], ["s/1", "s/1", "s/2", "s/2"])
        {2: 'new_version', 3: 'repeat'}
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
            reasons[i] = "repeat"
        elif 2 * known[shard] >= rows[shard] and shards[removal.kept] != shard and pair not in replaced:
            reasons[i] = "new_version"
            replaced.add(pair)
    return reasons
