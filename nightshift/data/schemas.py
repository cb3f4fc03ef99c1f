"""Schemas of the files that stages exchange."""

import pyarrow as pa

# One turn. role: system, user, assistant or tool; plain text for continued pretraining is one turn with
# the role "text". tool_calls: JSON list of {"name", "arguments"} of an assistant turn, or null. name:
# function that a tool turn answers, or null.
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
# JSON list of functions available to the assistant, or null.
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
# group_id: digest of the canonical text of the surviving row; its paraphrases inherit it.
GROUPED = EXAMPLES.append(pa.field("group_id", pa.string()))
# Of a paraphrase: id of its parent row, rule that made it, and number. Null for an original row.
AUGMENTED = (
    GROUPED.append(pa.field("parent_id", pa.string()))
    .append(pa.field("style", pa.string()))
    .append(pa.field("ordinal", pa.int32()))
)
