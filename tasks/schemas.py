"""Columns of the files that stages exchange."""

import pyarrow as pa

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))

# One conversation. id: digest of origin and messages; origin: `source/arrival.jsonl:line`.
EXAMPLES = pa.schema(
    [
        ("id", pa.string()),
        ("messages", MESSAGES),
        ("source", pa.string()),
        ("origin", pa.string()),
        ("arrival", pa.int32()),
    ]
)
# group_id: digest of the canonical text of the survivor; its paraphrases inherit it.
GROUPED = EXAMPLES.append(pa.field("group_id", pa.string()))
# A paraphrase names its parent, the rule that made it, and its number; an original has none.
AUGMENTED = (
    GROUPED.append(pa.field("parent_id", pa.string()))
    .append(pa.field("style", pa.string()))
    .append(pa.field("ordinal", pa.int32()))
)
