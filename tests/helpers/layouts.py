"""Rows and files as users have them: what each of them is, and the file that contains it."""

import bz2
import gzip
import io
import json
import lzma
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq


class Layout(NamedTuple):
    """A file of a source.

    Attributes:
        name: What the rows or the file are.
        file: Name of the file.
        content: Its bytes.
        options: Options of the source.
    """

    name: str
    file: str
    content: bytes
    options: dict[str, Any]


def rows(name: str, *values: Any, **options: Any) -> Layout:
    """Return a layout of rows, as JSON Lines."""
    return Layout(name, "rows.jsonl", b"".join(json.dumps(v).encode() + b"\n" for v in values), options)


def file(name: str, path: str, content: bytes | str, **options: Any) -> Layout:
    """Return a layout of a file."""
    return Layout(name, path, content.encode() if isinstance(content, str) else content, options)


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    """Return an OpenAI message."""
    return {"role": role, "content": content, **more}


def say(speaker: str, value: str, **more: Any) -> dict[str, Any]:
    """Return a ShareGPT message."""
    return {"from": speaker, "value": value, **more}


def table(values: list[dict[str, Any]], kind: str) -> bytes:
    """Return rows as a Parquet file, an Arrow file, an Arrow stream or a Feather file."""
    made, sink = pa.Table.from_pylist(values), io.BytesIO()
    if kind == "parquet":
        pq.write_table(made, sink)
    elif kind == "feather":
        pyarrow.feather.write_feather(made, sink)
    else:
        with (pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file)(sink, made.schema) as writer:
            writer.write_table(made)
    return sink.getvalue()


ASK, ANSWER = turn("user", "2+2?"), turn("assistant", "4")
PAIR = [ASK, ANSWER]
ADD = {"name": "add", "description": "Adds", "parameters": {"type": "object", "properties": {}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
CHAT = b'{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}'
HERMES = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'
LISTED = 'You may call functions: <tools>[{"name": "add"}]</tools>'
LINE = b'{"text": "One"}\n{"text": "Two"}\n'
WEIGHTED = [turn("user", "1+1?"), turn("assistant", "3", weight=0), ASK, turn("assistant", "4", weight=1)]

MESSAGES = [
    rows("OpenAI messages", {"messages": PAIR}),
    rows(
        "OpenAI messages, the last answer",
        {"messages": [turn("user", "1+1?"), turn("assistant", "2"), *PAIR]},
        train_on="last",
    ),
    rows(
        "OpenAI: content as text parts",
        {"messages": [turn("user", [{"type": "text", "text": "2+2?"}]), ANSWER]},
    ),
    rows("OpenAI: developer role", {"messages": [turn("developer", "Be short"), *PAIR]}),
    rows("OpenAI: refusal", {"messages": [ASK, turn("assistant", None, refusal="I can't.")]}),
    rows(
        "OpenAI: tool calls, tools",
        {
            "tools": [{"type": "function", "function": ADD}],
            "messages": [
                ASK,
                turn("assistant", None, tool_calls=[CALL]),
                turn("tool", "4", tool_call_id="c1"),
                turn("assistant", "It is 4"),
            ],
        },
    ),
    rows(
        "OpenAI: legacy functions and function_call",
        {
            "functions": [ADD],
            "messages": [
                ASK,
                turn("assistant", None, function_call={"name": "add", "arguments": '{"a": 2}'}),
                turn("function", "4", name="add"),
                turn("assistant", "It is 4"),
            ],
        },
    ),
    rows("OpenAI: weight of a message", {"messages": WEIGHTED}),
    rows("OpenAI: weight 0 only", {"messages": [ASK, turn("assistant", "5", weight=0)]}),
    rows("OpenAI: weight 0.5", {"messages": [ASK, turn("assistant", "4", weight=0.5)]}),
    rows("OpenAI: name of a user", {"messages": [turn("user", "2+2?", name="ada"), ANSWER]}),
    rows(
        "OpenAI: image part",
        {"messages": [turn("user", [{"type": "image_url", "image_url": {"url": "x"}}]), ANSWER]},
    ),
    rows("OpenAI: audio answer", {"messages": [ASK, turn("assistant", None, audio={"id": "a1"})]}),
    rows("messages in one string (CSV export)", {"messages": json.dumps(PAIR)}),
    rows("messages as Python text", {"messages": str(PAIR)}),
    rows("messages: list of strings", {"messages": ["2+2?", "4"]}),
    rows("reasoning_content", {"messages": [ASK, turn("assistant", "4", reasoning_content="Two and two")]}),
    rows("thinking (Harmony)", {"messages": [ASK, turn("assistant", "4", thinking="Two and two")]}),
    rows("<think> in the text", {"messages": [ASK, turn("assistant", "<think>2, 4</think>4")]}),
    rows("images column", {"messages": PAIR, "images": ["1.jpg"]}),
    rows("empty images column", {"messages": PAIR, "images": []}),
    rows("videos column", {"messages": PAIR, "videos": ["1.mp4"]}),
    rows("audios column", {"messages": PAIR, "audios": ["1.mp3"]}),
    rows("assistant first", {"messages": [turn("assistant", "Hello!"), *PAIR]}),
    rows("two user turns in a row", {"messages": [turn("user", "Hi"), *PAIR]}),
    rows("two assistant turns in a row", {"messages": [ASK, ANSWER, turn("assistant", "Or 2*2.")]}),
    rows("empty system turn", {"messages": [turn("system", ""), *PAIR]}),
    rows("system turn in the middle", {"messages": [*PAIR, turn("system", "Be short"), *PAIR]}),
    rows("empty answer", {"messages": [ASK, turn("assistant", " ")]}),
    rows("user last", {"messages": [*PAIR, turn("user", "Thanks")]}),
    rows("unknown speaker", {"messages": [turn("Kunde", "2+2?"), turn("Berater", "4")]}),
    rows(
        "speakers mapped",
        {"messages": [turn("Kunde", "2+2?"), turn("Berater", "4")]},
        roles={"Kunde": "user", "Berater": "assistant"},
    ),
    rows("ShareGPT", {"conversations": [say("human", "2+2?"), say("gpt", "4")], "system": "Be short"}),
    rows(
        "ShareGPT: function_call, observation",
        {
            "conversations": [
                say("human", "2+2?"),
                say("function_call", '{"name": "add", "arguments": {"a": 2}}'),
                say("observation", ""),
                say("gpt", "It is 4"),
            ],
            "tools": json.dumps([ADD]),
        },
    ),
    rows("Axolotl: train", {"conversations": [say("human", "2+2?"), say("gpt", "5", train=False)]}),
    rows("Axolotl: training", {"messages": [*PAIR, ASK, turn("assistant", "5", training=False)]}),
    rows(
        "Axolotl: training_detail",
        {"messages": [ASK, turn("assistant", "4.", training_detail=[{"begin_offset": 0, "train": True}])]},
    ),
    rows(
        "Axolotl: parts with different flags",
        {
            "messages": [
                ASK,
                turn(
                    "assistant",
                    [{"type": "text", "text": "Hm", "train": False}, {"type": "text", "text": "4"}],
                ),
            ]
        },
    ),
    rows("Pygmalion (role, value)", {"conversations": [{"role": "user", "value": "2+2?"}, say("gpt", "4")]}),
    rows(
        "LLaMA-Factory v1: value parts, loss_weight",
        {
            "messages": [
                turn("user", [{"type": "text", "value": "1+1?"}], loss_weight=0.0),
                turn("assistant", [{"type": "text", "value": "3"}], loss_weight=0.0),
                turn("user", [{"type": "text", "value": "2+2?"}], loss_weight=0.0),
                turn("assistant", [{"type": "text", "value": "4"}], loss_weight=1.0),
            ]
        },
    ),
    rows(
        "LLaMA-Factory v1: reasoning part",
        {
            "messages": [
                ASK,
                turn("assistant", [{"type": "reasoning", "value": "Hm"}, {"type": "text", "value": "4"}]),
            ]
        },
    ),
    rows(
        "Hermes: calls in the text",
        {
            "conversations": [
                say("system", LISTED),
                say("human", "2+2?"),
                say("gpt", HERMES),
                say("tool", "<tool_response>4</tool_response>"),
                say("gpt", "It is 4"),
            ],
            "tools": json.dumps([ADD]),
        },
    ),
    rows(
        "ToolACE: calls in the text",
        {
            "system": "You may call functions: add(a)",
            "conversations": [
                say("user", "2+2?"),
                say("assistant", "[add(a=2)]"),
                say("tool", '[{"result": 4}]'),
                say("assistant", "It is 4"),
            ],
        },
    ),
    rows(
        "Anthropic: tool_use and tool_result blocks",
        {
            "system": [{"type": "text", "text": "Be short"}],
            "tools": [{"name": "add", "input_schema": {"type": "object"}}],
            "messages": [
                ASK,
                turn("assistant", [{"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 2}}]),
                turn("user", [{"type": "tool_result", "tool_use_id": "t1", "content": "4"}]),
                turn("assistant", [{"type": "text", "text": "It is 4"}]),
            ],
        },
    ),
    rows(
        "Anthropic: image block",
        {
            "messages": [
                turn("user", [{"type": "image", "source": {}}, {"type": "text", "text": "?"}]),
                ANSWER,
            ]
        },
    ),
    rows(
        "Gemini: contents with parts",
        {
            "systemInstruction": {"parts": [{"text": "Be short"}]},
            "contents": [
                {"role": "user", "parts": [{"text": "2+2?"}]},
                {"role": "model", "parts": [{"text": "4"}]},
            ],
        },
    ),
    rows("WildChat: conversation", {"conversation": PAIR, "turn": 1, "toxic": False, "language": "English"}),
    rows("dialog: list of strings", {"dialog": ["Hi", "Hello"]}),
    rows(
        "turns: list of objects",
        {"turns": [{"speaker": "user", "text": "2+2?"}, {"speaker": "bot", "text": "4"}]},
    ),
    rows(
        "tool answer without a call", {"messages": [ASK, ANSWER, turn("tool", "4"), turn("assistant", "4")]}
    ),
    rows("chat markup in a text", {"messages": [ASK, turn("assistant", "4<|im_end|>")]}),
]

PAIRS = [
    rows("Alpaca", {"instruction": "Add", "input": "2, 2", "output": "4", "text": "### Instruction: Add"}),
    rows("Alpaca: system_prompt", {"system_prompt": "Be short", "instruction": "2+2?", "output": "4"}),
    rows("Alpaca: history", {"instruction": "2+2?", "output": "4", "history": [["1+1?", "2"]]}),
    rows("Alpaca: two answers in a list", {"instruction": "2+2?", "output": ["4", "5"]}),
    rows("Alpaca: rendered prompt", {"instruction": "2+2?", "output": "4", "prompt": "### 2+2?\n###"}),
    rows("Alpaca: corrected answer", {"instruction": "2+2?", "output": "5", "corrected": "4"}),
    rows(
        "Alpaca: corrected answer, mapped",
        {"instruction": "2+2?", "output": "5", "corrected": "4"},
        columns={"output": "corrected"},
    ),
    rows("prompt and completion", {"prompt": "2+2?", "completion": " 4"}),
    rows(
        "conversational prompt and completion, tools",
        {"prompt": [ASK], "completion": [ANSWER], "tools": [ADD]},
    ),
    rows("prompt only", {"prompt": "2+2?"}),
    rows("conversational prompt only", {"prompt": [ASK]}),
    rows("prompt as Python text", {"prompt": str([ASK]), "completion": "4"}),
    rows("Dolly", {"instruction": "Sum?", "context": "2, 2", "response": "4", "category": "qa"}),
    rows("GSM8K", {"question": "2+2?", "answer": "2+2=<<2+2=4>>4\n#### 4"}),
    rows("Orca", {"id": "1", "system_prompt": "Be short", "question": "2+2?", "response": "4"}),
    rows("MetaMath", {"query": "2+2?", "response": "4", "type": "GSM", "original_question": "1+1?"}),
    rows("prompt and response", {"prompt": "2+2?", "response": "4"}),
    rows("input and output", {"input": "2+2?", "output": "4"}),
    rows("problem and solution", {"problem": "2+2?", "solution": "4"}),
    rows("problem, solution and answer", {"problem": "2+2?", "solution": "2+2=4", "answer": "4"}),
    rows("Capitals (spreadsheet)", {"Question": "2+2?", "Answer": "4"}),
    rows(
        "SQuAD", {"context": "It is 4.", "question": "2+2?", "answers": {"text": ["4"], "answer_start": [6]}}
    ),
    rows("SQuAD: unanswerable", {"context": "x", "question": "2+2?", "answers": {"text": []}}),
    rows("RAG: list of contexts", {"question": "2+2?", "contexts": ["It is 4.", "Even."], "answer": "4"}),
    rows(
        "xLAM",
        {"query": "2+2?", "tools": json.dumps([ADD]), "answers": '[{"name": "add", "arguments": {"a": 2}}]'},
    ),
    rows("multiple choice", {"question": "2+2?", "choices": ["3", "4"], "answer": "B"}),
    rows("several questions", {"prompt": "2+2?", "question": "1+1?", "answer": "4"}),
    rows("OpenMathInstruct: wrong answer", {"question": "2+2?", "answer": "5", "is_correct": False}),
    rows("HelpSteer: ratings", {"prompt": "2+2?", "response": "5", "helpfulness": 0, "correctness": 0}),
    rows("rated answer, chosen", {"prompt": "2+2?", "response": "4", "score": 9.5}, preference="chosen"),
    rows("row weight 0", {"prompt": "2+2?", "completion": "5", "weight": 0}),
    rows("own columns", {"frage": "2+2?", "antwort": {"text": "4"}}),
    rows(
        "own columns, mapped",
        {"frage": "2+2?", "antwort": {"text": "4"}},
        columns={"instruction": "frage", "output": "antwort.text"},
    ),
    rows("mapped column missing", {"frage": "2+2?", "antwort": "4"}, columns={"output": "answer"}),
    rows("unknown column", {"question": "2+2?", "answer": "4", "hint": "even"}),
    rows("NaN in a column that is not read", {"question": "2+2?", "answer": "4", "p": float("nan")}),
    rows("NaN as answer", {"question": "2+2?", "answer": float("nan")}),
    rows("Glaive v2", {"system": "SYSTEM: You add.", "chat": "USER: 2+2?\n\nASSISTANT: 4 <|endoftext|>"}),
]

LLAMA_DPO = {"conversations": [say("human", "2+2?")], "chosen": say("gpt", "4"), "rejected": say("gpt", "5")}
WRONG = [ASK, turn("assistant", "5")]
ALPACA_DPO = {"instruction": "Add", "input": "2, 2", "chosen": "4", "rejected": "5"}
ULTRA = {"prompt": "2+2?", "chosen": PAIR, "rejected": WRONG, "score_chosen": 9.0}
KTO = [
    {"prompt": "2+2?", "completion": "4", "label": True},
    {"prompt": "2+2?", "completion": "5", "label": False},
]
TAGGED = [{"messages": PAIR, "kto_tag": True}, {"messages": WRONG, "kto_tag": False}]
V1 = {"chosen_messages": PAIR, "rejected_messages": WRONG}
COMPARED: list[tuple[str, list[dict[str, Any]]]] = [
    ("DPO", [{"prompt": "2+2?", "chosen": "4", "rejected": "5"}]),
    ("DPO: conversations", [{"chosen": PAIR, "rejected": WRONG}]),
    ("DPO: prompt and conversations (UltraFeedback)", [ULTRA]),
    ("DPO: LLaMA-Factory ranking", [LLAMA_DPO]),
    ("DPO: LLaMA-Factory ranking (Alpaca)", [ALPACA_DPO]),
    ("DPO: LLaMA-Factory v1", [V1]),
    ("DPO: hh-rlhf transcripts", [{"chosen": "\n\nHuman: Hi\n\nAssistant: Ho", "rejected": "x"}]),
    ("KTO", KTO),
    ("KTO: LLaMA-Factory kto_tag", TAGGED),
    ("rated answers", [{"prompt": "2+2?", "response": "4", "score": 9.5}]),
]
PREFERENCES = [
    rows("DPO", *COMPARED[0][1]),
    rows("KTO", *KTO),
    *(rows(f"{name}, chosen", *values, preference="chosen") for name, values in COMPARED[:-1]),
    *(rows(f"{name}, compare", *values, preference="compare") for name, values in COMPARED),
    rows("stepwise supervision", {"prompt": "2+2?", "completions": ["2+2", "4"], "labels": [True, True]}),
]

TEXTS = [
    rows("plain text", {"text": "Once upon a time", "url": "https://example.org"}),
    rows("classification: text and label", {"text": "Great!", "label": 1}),
    rows(
        "classification, mapped",
        {"text": "Great!", "label": "good"},
        columns={"prompt": "text", "completion": "label"},
    ),
    rows("summarization: text and summary", {"text": "Long", "summary": "Short"}),
    rows("text with a score (FineWeb-Edu)", {"text": "Once", "score": 3.2}),
    rows("OpenAssistant: flat", {"text": "Hi", "role": "prompter", "parent_id": None, "message_id": "m1"}),
    rows("OpenAssistant: flat reply", {"text": "Ho", "role": "assistant", "parent_id": "m1"}),
    rows(
        "OpenAssistant: tree",
        {"message_tree_id": "t1", "prompt": {"text": "Hi", "role": "prompter", "replies": [{"text": "Ho"}]}},
    ),
    rows("one message per row", {"role": "user", "content": "Hi"}),
    rows("token ids", {"input_ids": [1, 2], "attention_mask": [1, 1], "labels": [1, 2]}),
    rows("segments (Axolotl input_output)", {"segments": [{"label": True, "text": "<s>Hi"}]}),
    rows("Windows line endings", {"text": "One\r\nTwo"}),
    rows("wrongly decoded text", {"text": "Caf\u00c3\u00a9"}),
    rows("key twice", {"text": "One"})._replace(content=b'{"text": "One", "text": "Two"}\n'),
]

PADDED = [
    {"messages": [ASK, turn("assistant", "", tool_calls=[{"name": "go", "arguments": arguments}])]}
    for arguments in ({"city": "Rome"}, {"to": "Oslo", "n": 2})
]
FILES = [
    file("JSON Lines", "a.jsonl", CHAT),
    file("JSON Lines as .ndjson", "a.ndjson", LINE),
    file("JSON Lines as .json", "a.json", LINE),
    file("JSON array", "a.json", b"[" + CHAT + b"]"),
    file("JSON: one object over many lines", "a.json", json.dumps(json.loads(CHAT), indent=2)),
    file("JSON: objects over many lines", "a.json", '{\n "text": "One"\n}\n{\n "text": "Two"\n}\n'),
    file("JSON: rows in `data`", "a.json", '{"version": 1, "data": [{"text": "One"}, {"text": "Two"}]}'),
    file("JSON: rows in `train`", "a.json", '{"train": [{"text": "One"}]}'),
    file("JSON: train and test in one file", "a.json", '{"train": [{"text": "1"}], "data": [{"text": "2"}]}'),
    file("JSON: bad line", "a.jsonl", b'{"text": "One"\n' + LINE),
    file("JSON: UTF-16", "a.json", '[{"text": "One"}]'.encode("utf-16")),
    file("JSON Lines: UTF-16 without mark", "a.jsonl", '{"text": "One"}'.encode("utf-16-le")),
    file("JSON Lines: Latin-1", "a.jsonl", '{"text": "Café"}'.encode("latin-1")),
    file("JSON Lines: byte order mark", "a.jsonl", b"\xef\xbb\xbf" + LINE),
    file("gzip", "a.jsonl.gz", gzip.compress(LINE, mtime=0)),
    file("bzip2", "a.jsonl.bz2", bz2.compress(LINE)),
    file("xz", "a.json.xz", lzma.compress(LINE)),
    file("Zstandard", "a.jsonl.zst", pa.compress(LINE, codec="zstd", asbytes=True)),
    file("truncated xz", "a.jsonl.xz", lzma.compress(LINE)[:-9]),
    file("CSV", "a.csv", 'prompt,completion\n2+2?,"4,\nfour"\n'),
    file("CSV with semicolons", "a.csv", "prompt;completion\n2+2?;4\n"),
    file("CSV: Latin-1 header", "a.csv", "Größe,text\n1,One\n".encode("latin-1")),
    file("CSV: UTF-16 (Excel Unicode)", "a.csv", "text\nOne\n".encode("utf-16")),
    file("TSV", "a.tsv", "question\tanswer\n2+2?\t4\n"),
    file("text: blank lines separate documents", "a.txt", "One\ntwo\n\nThree\n"),
    file("compressed text", "a.txt.gz", gzip.compress(b"One\n\nTwo\n", mtime=0)),
    file("Parquet", "a.parquet", table([{"messages": PAIR}], "parquet")),
    file("Parquet: nulls that pad tool calls", "a.parquet", table(PADDED, "parquet")),
    file("Arrow stream (datasets)", "a.arrow", table([{"messages": PAIR}], "stream")),
    file("Arrow file", "a.arrow", table([{"messages": PAIR}], "file")),
    file("Arrow: nulls that pad tool calls", "a.arrow", table(PADDED, "stream")),
    file("Feather", "a.feather", table([{"text": "One"}], "feather")),
    file("damaged Arrow", "a.arrow", b"ARROW1\0\0no more"),
    file("empty file", "a.jsonl", b""),
    file("not data", "a.docx", b"PK"),
]

LAYOUTS = {
    "Rows with a list of messages": MESSAGES,
    "Rows with a question and an answer": PAIRS,
    "Rows that compare answers": PREFERENCES,
    "Rows of text": TEXTS,
    "Files": FILES,
}
