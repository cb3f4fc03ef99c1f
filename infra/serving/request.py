"""The requests that the API accepts: an unsupported parameter is an error, never ignored.

A parameter that is null, or has the value that changes nothing, counts as absent, because many clients
send every parameter that they know.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from nightshift.registry.served_model import MAX_NEW_TOKENS

# Values with which an unsupported parameter has no effect.
NEUTRAL = {
    "frequency_penalty": 0,
    "function_call": "none",
    "logit_bias": {},
    "logprobs": False,
    "n": 1,
    "parallel_tool_calls": True,
    "presence_penalty": 0,
    "response_format": {"type": "text"},
    "stop": [],
    "store": False,
    "tool_choice": "none",
    "tools": [],
}
# Parameters that describe the request and never change the answer.
DESCRIPTIVE = ("metadata", "user")


class Fields(BaseModel):
    """A JSON object: null counts as absent, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, values: Any) -> Any:
        """Drop the keys that are null."""
        if not isinstance(values, dict):
            return values
        return {key: value for key, value in values.items() if value is not None}


class Message(Fields):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str

    @field_validator("content", mode="before")
    @classmethod
    def join_text(cls, content: Any) -> Any:
        """Join the parts of a content that is a list; only text can be read."""
        if not isinstance(content, list):
            return content
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise ValueError("only parts of type text are supported")
        return "".join(str(part.get("text")) for part in content)

    @field_validator("content")
    @classmethod
    def require_unicode(cls, content: str) -> str:
        """Reject half a surrogate pair, which JSON can express and no tokenizer can read."""
        content.encode()
        return content


class StreamOptions(Fields):
    """Options of a streamed answer."""

    include_usage: bool = False


class ChatRequest(Fields):
    """A request for a chat completion. Without a temperature, decoding is greedy, as in the evaluation.

    Attributes:
        model: Name of the model, or name@version; None for whatever is served.
        messages: Conversation.
        max_tokens: Maximum number of new tokens.
        max_completion_tokens: The same under its newer name, which wins.
        temperature: Temperature of sampling; 0 decodes greedily.
        top_p: Share of the probability from which tokens are sampled.
        seed: Seed of sampling.
        stream: Whether to send the answer as it is generated.
        stream_options: Options of a streamed answer.
    """

    model: str | None = None
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @model_validator(mode="before")
    @classmethod
    def drop_neutral(cls, values: Any) -> Any:
        """Drop parameters without effect; what remains must be a field."""
        if not isinstance(values, dict):
            return values
        return {
            key: value
            for key, value in values.items()
            if key not in DESCRIPTIVE and not (key in NEUTRAL and value == NEUTRAL[key])
        }

    @property
    def turns(self) -> list[dict[str, str]]:
        """Role and content of each turn."""
        return [message.model_dump() for message in self.messages]

    @property
    def limit(self) -> int:
        """Maximum number of new tokens."""
        return self.max_completion_tokens or self.max_tokens or MAX_NEW_TOKENS

    @property
    def sampling(self) -> dict[str, Any]:
        """Arguments for `generate` of transformers; top_k would otherwise be 50."""
        if self.temperature == 0:
            return {}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
