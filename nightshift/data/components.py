"""Connected components of rows that have a key in common."""

from collections.abc import Iterable


def connect(keys: Iterable[Iterable[str]]) -> list[int]:
    """Return the component of each row: rows are connected if they have a key in common, or by other rows.

    Args:
        keys: Keys of each row, in order of arrival.

    Returns:
        Number of the earliest row of each row's component, shape (n_rows,).

    Example:
        >>> connect([["a"], ["b"], ["c"], ["a", "d"], ["d", "c"]])
        [0, 1, 0, 0, 0]
    """
    parents: list[int] = []
    first: dict[str, int] = {}

    def root(row: int) -> int:
        while parents[row] != row:
            parents[row] = row = parents[parents[row]]
        return row

    for row, of_row in enumerate(keys):
        parents.append(row)
        for key in of_row:
            one, other = root(row), root(first.setdefault(key, row))
            parents[max(one, other)] = min(one, other)
    return [root(row) for row in range(len(parents))]
