"""Splits of a data set, recognized by the paths of its files, as the library `datasets` does."""

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from nightshift.core.errors import DataError

ALL = "all"
KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
CANONICAL = {word: split for split, words in KEYWORDS.items() for word in words}
KEYWORD = re.compile(rf"(?:^|[-._ 0-9])({'|'.join(CANONICAL)})(?=[-._ 0-9]|$)")
# Files of the Hub: data/train_sft-00000-of-00003.parquet; with a hash at the end in older data sets.
SHARDED = re.compile(r"(?P<split>\w+(?:\.\w+)*)-\d{5}-of-\d{5}")
# Files of the branch refs/convert/parquet: default/train_sft/0000.parquet.
CONVERTED = re.compile(r"\d{4}\.parquet")


def find_split(name: str) -> str | None:
    """Return the split that a path below the location names: train, validation, test, or another one.

    Example:
        >>> find_split("data/train-00000-of-00002.parquet"), find_split("en/dev.jsonl"), find_split("a.csv")
        ('train', 'validation', None)
        >>> find_split("data/train_sft-00000-of-00001-0a1b.parquet"), find_split("test/part-1.json")
        ('train_sft', 'test')
    """
    path = PurePosixPath(name)
    folders = path.parts[:-1]
    if (found := SHARDED.match(path.name)) and (folders[-1:] == ("data",) or KEYWORD.match(path.name)):
        return CANONICAL.get(found["split"], found["split"])
    if folders and CONVERTED.fullmatch(path.name):
        return CANONICAL.get(folders[-1], folders[-1])
    for part in (path.name, *reversed(folders)):
        if found := KEYWORD.search(part.lower()):
            return CANONICAL[found[1]]
    return None


def choose_split(names: Sequence[str], split: str | None, location: str) -> list[str]:
    """Return the files of a split. Without one, the files must not name several, nor test next to others.

    Args:
        names: Names of the files, as in `Offer`.
        split: Name of the split, `all`, or None.
        location: Location in params.yaml.

    Raises:
        DataError: No file belongs to the split, or a split has to be chosen.
    """
    splits = {name: find_split(name) for name in names}
    labels = sorted({one for one in splits.values() if one})
    where = f"snapshot.sources: {location}"
    if split == ALL:
        return list(names)
    if split is None:
        rest = None in splits.values()
        if len(labels) > 1 or (rest and labels not in ([], ["train"])):
            likely = next((one for one in labels if one.startswith("train")), labels[0])
            raise DataError(
                f"{where} has the splits {', '.join(labels)}{' and other files' if rest else ''}; set "
                f"`split: {likely}` for this source, or `split: all` to train on everything"
            )
        return list(names)
    wanted = CANONICAL.get(split, split)
    if wanted not in labels:
        known = f"choose one of {', '.join(labels)}" if labels else "no path names a split, so remove `split`"
        raise DataError(f"{where} has no file of the split {split!r}; {known}")
    return [name for name in names if splits[name] == wanted]
