"""Reasons why a row cannot be used, and how to fix each of them."""

from nightshift.data.encode import FAULTS

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
    "unknown_format": (
        "use messages, conversations, instruction and output, prompt and completion, or text; keys seen"
    ),
    "no_messages": "give the turns as a list of objects with role and content",
    "not_text": "give each content as text; images and audio are not supported",
    "unknown_role": f"use one of {', '.join(ROLES)}",
    "empty_content": "add text or remove the turn",
    "malformed_tool_call": "give each call a name and a JSON object as arguments; give tools as a list",
    "unpaired_tool_answer": "place a tool turn after the assistant turn that calls it, with the call's id",
    "unanswered_tool_call": "add one tool turn for each call before the next turn",
    "control_character": "remove the character",
    "special_token": "remove the chat markup from the text",
    "wrong_order": "write the system turn first, then alternate user and assistant turns",
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
