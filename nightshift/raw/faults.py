"""Reasons why a row cannot be used, and how to fix each of them."""

from nightshift.data.faults import FAULTS

ROLES = ("system", "user", "assistant", "tool")
REMEDIES = {
    "empty_file": "add rows to the file or remove it from snapshot.sources",
    "not_utf8": "save the file as UTF-8",
    "malformed_json": "write one JSON object per line, or one JSON array of objects",
    "malformed_csv": "quote a field that contains a comma, a quote or a line break",
    "wrong_columns": "give the row as many fields as the header",
    "lone_surrogate": r"write the character as UTF-8, or as a complete pair of \ud... escapes",
    "too_deep": "reduce the nesting of lists and objects",
    "too_large": "split the row, or raise ingest.max_row_bytes",
    "not_an_object": 'write an object such as {"messages": [...]}',
    "duplicate_key": "write each key of an object once",
    "unknown_format": (
        "use messages, conversations, instruction and output, prompt and completion, or text, or map the "
        "columns of the source, such as `columns: {instruction: question, output: best_answer}`; keys seen"
    ),
    "no_answer": (
        "add the answer, or name its column in `columns` of the source, such as `columns: {output: reply}`; "
        "keys seen"
    ),
    "ambiguous_columns": (
        "keep one of the columns, or name the right one in `columns` of the source, such as "
        "`columns: {instruction: question, output: answer}`"
    ),
    "choices": "write the choices into the question, as the model is to read them",
    "revised": (
        "the row has a corrected answer: name the right one in `columns` of the source, such as "
        "`columns: {output: corrected}`, or remove the column"
    ),
    "labelled_text": (
        "a text with a label is a task, not a document: map the columns of the source, such as "
        "`columns: {prompt: text, completion: label}`, or remove the label"
    ),
    "one_message": "write all messages of a conversation as a list into one row; keys seen",
    "conversation_tree": "write each path through the tree as a list of messages",
    "pretokenized": "give the text: token ids belong to one tokenizer",
    "preference": (
        "the answers are compared or rated: set `preference: chosen` to train on the chosen ones "
        "(with numeric ratings, on all rows), or `preference: compare` to tune on both, or remove the columns"
    ),
    "rated": (
        "a number compares nothing: give `chosen` and `rejected`, or a label, or set `preference: chosen`"
    ),
    "same_answer": "give a rejected answer that differs from the chosen one",
    "other_prompt": (
        "the chosen and the rejected answer need the same prompt, and may differ in the last turn only"
    ),
    "rejected_answer": "nothing to fix: a bad answer is not trained",
    "unsupported_weight": (
        "a token is trained or not: give a message the weight 0 or 1, and a whole source another weight"
    ),
    "partial_training": "train a turn as a whole, or split it; labels of parts of a text are not supported",
    "no_messages": "give the turns as a list of objects with role and content",
    "not_text": "give each content as text; images, audio and video are not supported",
    "unknown_role": (
        f"use one of {', '.join(ROLES)}, or map the speakers in `roles` of the source, such as "
        "`roles: {Customer: user}`"
    ),
    "empty_content": "add text or remove the turn",
    "malformed_tool_call": "give each call a name and a JSON object as arguments; give tools as a list",
    "unpaired_tool_answer": "place a tool turn after the assistant turn that calls it, with the call's id",
    "unanswered_tool_call": "add one tool turn for each call before the next turn",
    "control_character": "remove the character; if it comes from a wrong decoding, set ingest.fix_encoding",
    "special_token": "remove the chat markup from the text",
    "wrong_order": "alternate user and assistant turns, with tool turns between two assistant turns",
    "no_final_answer": "end with an assistant turn",
    "pii": "remove the personal data, or set ingest.pii to redact",
    **FAULTS,
    "too_many_tokens": "shorten the example, or raise ingest.max_tokens",
}


class RowError(Exception):
    """One row cannot be used. It goes to quarantine; processing continues with the next row.

    Attributes:
        reason: Key of `REMEDIES`.
        detail: Finding, without any text of the row.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail

    @property
    def remedy(self) -> str:
        """Fix for the reason, with the detail.

        Example:
            >>> RowError("empty_content", "turn 2").remedy
            'add text or remove the turn (turn 2)'
        """
        return f"{REMEDIES[self.reason]} ({self.detail})" if self.detail else REMEDIES[self.reason]
