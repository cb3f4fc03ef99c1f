"""Training flags of a message: whether its tokens get labels."""

from collections.abc import Sequence

from nightshift.raw.faults import RowError
from nightshift.raw.formats import RawRow

# OpenAI and LLaMA-Factory give a weight, Axolotl and ms-swift a boolean.
FLAGS = ("weight", "loss_weight", "loss_scale", "loss_mask", "loss", "train", "training", "trainable")
# The same as a column of the row, where `loss` is often a measurement.
ROW_FLAGS = ("weight", "loss_weight", "train", "training")
# Axolotl's flags of parts of a text, which a label per turn cannot express.
SPANS = ("training_detail", "train_detail")


def pop_flag(rest: RawRow, where: str, flags: Sequence[str] = FLAGS) -> bool | None:
    """Remove the training flags from a message, a part of its content, or a row.

    Args:
        rest: Keys and values that were not read yet.
        where: Place in the row, for the error.
        flags: Names of the flags.

    Returns:
        Whether it is trained; None without a flag.

    Raises:
        RowError: A weight is not 0 or 1, or only a part of the text is to be trained.

    Example:
        >>> pop_flag({"weight": 0}, "turn 2"), pop_flag({"train": True}, "turn 2"), pop_flag({}, "turn 2")
        (False, True, None)
    """
    if any(rest.pop(key, None) for key in SPANS):
        raise RowError("partial_training", where)
    values = [rest.pop(key) for key in flags if key in rest]
    given = [value for value in values if value is not None]
    for value in given:
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            shown = value if isinstance(value, (int, float)) else type(value).__name__
            raise RowError("unsupported_weight", f"{shown}, {where}")
    return all(given) if given else None
