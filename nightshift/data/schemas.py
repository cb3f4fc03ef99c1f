"""Tables that stages exchange: the Arrow schema of each file, and the type of its rows."""

from typing import NotRequired, TypedDict

import pyarrow as pa


class Message(TypedDict):
    """One turn of a conversation; plain text for continued pretraining is one turn.

    Attributes:
        role: system, user, assistant, tool or text.
        content: Text of the turn.
        reasoning: What the assistant thought before its answer, or None.
        tool_calls: JSON list of {"name", "arguments"} of an assistant turn, or None.
        name: Function that a tool turn answers, or None.
        train: False for an assistant turn without labels; None for the default: assistant turns have them.
    """

    role: str
    content: str
    reasoning: str | None
    tool_calls: str | None
    name: str | None
    train: bool | None


class Example(TypedDict):
    """One conversation.

    Attributes:
        id: Digest of origin and messages; of source and messages if the source has the mode `replace`.
        messages: Turns.
        tools: JSON list of functions available to the assistant, or None.
        source: Name of the source in params.yaml.
        origin: `source/arrival.suffix:line`.
        arrival: Number of the shard, in order of arrival.
        group: Digest of the value of the source's `group_by` column, or None.
    """

    id: str
    messages: list[Message]
    tools: str | None
    source: str
    origin: str
    arrival: int
    group: str | None


class GroupedExample(Example):
    """An example after deduplication.

    Attributes:
        group_id: Digest of the canonical text of the surviving row; its paraphrases inherit it.
    """

    group_id: str


class ConnectedExample(GroupedExample):
    """A survivor of deduplication, with what connects it with others in the split.

    Attributes:
        prompts: Digests of its prompts (see `nightshift.data.prompts`).
    """

    prompts: list[str]


class AugmentedExample(GroupedExample):
    """An original example, or one of its paraphrases.

    Attributes:
        parent_id: Id of the paraphrased row; None for an original, like the other two.
        style: Style of the paraphrase.
        ordinal: Number of the paraphrase, from 1.
    """

    parent_id: str | None
    style: str | None
    ordinal: int | None


class Preference(TypedDict):
    """A prompt with a good answer, a bad one, or both; the messages are TRL's preference format.

    Attributes:
        id: Digest of origin and messages.
        example_id: Id of the example that trains the good answer, or None without a good answer.
        prompt: Turns before the answer.
        chosen: The good answer, as a list of one turn, or None.
        rejected: The bad answer, as a list of one turn, or None.
        tools: JSON list of functions available to the assistant, or None.
        source: Name of the source in params.yaml.
        origin: `source/arrival.suffix:line`.
        arrival: Number of the shard, in order of arrival.
        group: Digest of the value of the source's `group_by` column, or None.
    """

    id: str
    example_id: str | None
    prompt: list[Message]
    chosen: list[Message] | None
    rejected: list[Message] | None
    tools: str | None
    source: str
    origin: str
    arrival: int
    group: str | None


class PlacedPreference(Preference):
    """A comparison after the split.

    Attributes:
        side: train, validation or test: that of its example, or of the examples with the same prompt.
    """

    side: str


class ItemScore(TypedDict):
    """The result of a model on one benchmark item or held-out example.

    Attributes:
        benchmark: Name of the benchmark; `test` for held-out examples.
        item: Id of the item.
        slice: Slice of the benchmark, or source of a held-out example.
        score: 0 to 1 for an item; summed negative log-likelihood in nats for a held-out example. None
            unless status is ok: such rows are left out before scores are used.
        tokens: Labelled tokens of a held-out example; None for an item.
        choices: Number of choices, for the chance level, or None.
        written: 1 if the answer that the model writes to a multiple-choice question starts with the right
            choice, else 0; None for the questions, all but a sample, that it does not write an answer to.
        status: ok, error (the model returned no number) or skipped (the model was not run).
        question: Question, or the last turn of the item.
        expected: Reference answer, or None.
        answer: Chosen or generated answer, or the reason for a missing score; None for a held-out example.
    """

    benchmark: str
    item: str
    slice: str
    score: float
    tokens: int
    choices: int | None
    written: NotRequired[float | None]
    status: str
    question: str
    expected: str | None
    answer: str


class Score(ItemScore):
    """A row of the table of all scores.

    Attributes:
        model: base, candidate, champion, best (the best champion so far, if it is another) or retrieval.
        cluster: Name that related items share, in all benchmarks; None for an item on its own.
        is_new: Whether a test example arrived after the champion's data; None for an item.
        paraphrase_of: Id of the item that this one asks in other words, or None.
    """

    model: str
    cluster: NotRequired[str | None]
    is_new: NotRequired[bool | None]
    paraphrase_of: NotRequired[str | None]


MESSAGES = pa.list_(
    pa.struct(
        [
            ("role", pa.string()),
            ("content", pa.string()),
            ("reasoning", pa.string()),
            ("tool_calls", pa.string()),
            ("name", pa.string()),
            ("train", pa.bool_()),
        ]
    )
)

# Of each row that was read: its tools, where it comes from, and its group, if it names one.
READ = [
    ("tools", pa.string()),
    ("source", pa.string()),
    ("origin", pa.string()),
    ("arrival", pa.int32()),
    ("group", pa.string()),
]
EXAMPLES = pa.schema([("id", pa.string()), ("messages", MESSAGES), *READ])
GROUPED = EXAMPLES.append(pa.field("group_id", pa.string()))
PROMPTS = pa.list_(pa.string())
CONNECTED = GROUPED.append(pa.field("prompts", PROMPTS))
AUGMENTED = (
    GROUPED.append(pa.field("parent_id", pa.string()))
    .append(pa.field("style", pa.string()))
    .append(pa.field("ordinal", pa.int32()))
)
PREFERENCES = pa.schema(
    [
        ("id", pa.string()),
        ("example_id", pa.string()),
        ("prompt", MESSAGES),
        ("chosen", MESSAGES),
        ("rejected", MESSAGES),
        *READ,
    ]
)
PLACED_PREFERENCES = PREFERENCES.append(pa.field("side", pa.string()))
# See ItemScore and Score.
SCORES = pa.schema(
    [
        ("benchmark", pa.string()),
        ("item", pa.string()),
        ("slice", pa.string()),
        ("score", pa.float64()),
        ("tokens", pa.int32()),
        ("choices", pa.int32()),
        ("written", pa.float64()),
        ("status", pa.string()),
        ("question", pa.string()),
        ("expected", pa.string()),
        ("answer", pa.string()),
    ]
)
ALL_SCORES = pa.schema(
    [
        ("model", pa.string()),
        *SCORES,
        ("cluster", pa.string()),
        ("is_new", pa.bool_()),
        ("paraphrase_of", pa.string()),
    ]
)
