"""Columns of the files that stages exchange."""

import pyarrow as pa

# A turn: role is system, user, assistant or tool. A plain text, for continued pre-training, is one turn
# of the role "text". tool_calls: JSON list of {"name", "arguments"} of an assistant's turn, or null; name:
# the function that a tool's turn answers for, or null.
MESSAGES = pa.list_(
    pa.struct(
        [
            ("role", pa.string()),
            ("content", pa.string()),
            ("tool_calls", pa.string()),
            ("name", pa.string()),
        ]
    )
)

# One conversation. id: digest of origin and messages; origin: `source/arrival.suffix:line`; tools:
# JSON list of the functions that the assistant may call, or null.
EXAMPLES = pa.schema(
    [
        ("id", pa.string()),
        ("messages", MESSAGES),
        ("tools", pa.string()),
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
