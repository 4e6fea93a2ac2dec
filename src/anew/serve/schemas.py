"""The requests of the server: their fields, limits and defaults, which /docs describes.

    request = CompletionRequest.model_validate({"prompt": "It was", "max_tokens": 40})
    job = request.job(engine)

A field that is null has its default. Values are not converted: "5" and true are not numbers.
"""

import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from anew.errors import UserError
from anew.inference.interpret import Part, without
from anew.serve.engine import Engine, Job, Served
from anew.serve.inside import look_inside
from anew.tokenizer.chat import SYSTEM, Message, prompt_of

SEED_LIMIT = 2**63
DEFAULT_ANSWER_TOKENS = 256
StopText = Annotated[str, Field(max_length=200)]


class Sampling(BaseModel):
    """The fields that all requests have."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    model: str | None = Field(None, description="a name of /v1/models; by default the first")
    temperature: float = Field(1.0, ge=0, le=100)
    top_k: int = Field(0, ge=0, le=10**9, description="0: all tokens")
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int = Field(
        default_factory=lambda: secrets.randbits(32),
        ge=-SEED_LIMIT,
        lt=SEED_LIMIT,
        description="by default another one for each request",
    )

    @model_validator(mode="before")
    @classmethod
    def _leave_out_null(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {name: value for name, value in body.items() if value is not None}

    def _job_of(self, served: Served, rows: list[list[int]], n_tokens: int) -> Job:
        """Return the job of continuing rows of ids; UserError if that is not possible."""
        return Job(
            served=served,
            prompts=rows,
            n_tokens=n_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed % SEED_LIMIT,
        )


class Prompted(Sampling):
    """A request to continue texts."""

    prompt: str | list[int] | list[str | list[int]] = Field(
        "",
        description="a text, a list of token ids, or a list of these",
    )

    def _rows(self, served: Served) -> list[list[int]]:
        """Return the ids of each prompt; an empty one is end of text."""
        is_single = isinstance(self.prompt, str) or all(isinstance(i, int) for i in self.prompt)
        prompts: Sequence[Any] = [self.prompt] if is_single else self.prompt
        rows = []
        for prompt in prompts:
            ids = served.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            rows.append(ids or [served.tokenizer.end_of_text])
        return rows


class TextPart(BaseModel):
    """A part of a message. Images and sounds are refused."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: Any = Field(None, description="has no effect")

    def message(self) -> Message:
        """Return the message in the form of tokenizer/chat.py. A developer is the system."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return Message(SYSTEM if self.role == "developer" else self.role, text)


def ids_of_chat(
    served: Served, messages: Sequence[ChatMessage], n_tokens: int
) -> tuple[list[int], int]:
    """Return the ids before an answer of `n_tokens`, and how many messages were left out.

    At most half of the positions are kept free for the answer.

    Raises UserError if the model was not trained on conversations, or if a message is too long.
    """
    if not served.is_chat:
        raise UserError(
            f"{served.name} continues texts and was not trained to chat; use /v1/completions, or "
            "serve a model of anew train chat."
        )
    positions = served.model.config.n_positions
    most_ids = positions - min(n_tokens, positions // 2)
    return prompt_of(served.tokenizer, [message.message() for message in messages], most_ids)


class PartOfModel(BaseModel):
    """A part of one block that adds nothing: the attention, one head of it, or the MLP."""

    model_config = ConfigDict(strict=True, extra="forbid")

    block: int = Field(description="from 0")
    kind: Literal["head", "attention", "mlp"]
    head: int = Field(0, description="from 0, if the part is a head")


class OfPage(Prompted):
    """The fields of both requests of the page."""

    without: list[PartOfModel] = Field(
        [],
        max_length=2000,
        description='parts of the model that are switched off: {"block": 0, "kind": "mlp"}',
    )

    def served_by(self, engine: Engine) -> Served:
        """Return the model without the parts that are switched off.

        Raises UserError if the model has no such part.
        """
        served = engine.find(self.model)
        if not self.without:
            return served
        parts = {Part(part.block, part.kind, part.head) for part in self.without}
        return replace(served, model=without(served.model, parts))


class InsideRequest(OfPage):
    """A request to look inside a model while it reads a text."""

    token: int = Field(-1, ge=-1, description="the token that is chosen, from 0; -1: the last one")
    block: int = Field(0, description="the block that is chosen, from 0")
    head: int = Field(0, description="the head that is chosen, from 0")

    def inside(self, engine: Engine) -> dict[str, Any]:
        """Return what `look_inside` does; raise UserError if it is impossible."""
        served = self.served_by(engine)
        rows = self._rows(served)
        if len(rows) != 1:
            raise UserError("the page shows one text at a time.")
        token = self.token if self.token >= 0 else len(rows[0]) - 1
        with engine.device:
            return look_inside(served, rows[0], token, self.block, self.head)


class PageRequest(OfPage):
    """A request of the page: a text, a conversation, or the ids of one whose end was changed."""

    n_tokens: int = Field(64, ge=0, le=1_000_000)
    messages: list[ChatMessage] = Field([], description="a conversation, instead of a prompt")

    def job(self, engine: Engine) -> tuple[Job, int]:
        """Return what the engine has to do, and how many messages do not fit and are left out.

        Raises UserError if it is impossible.
        """
        served = self.served_by(engine)
        if self.messages:
            ids, n_left_out = ids_of_chat(served, self.messages, self.n_tokens)
            n_tokens = min(self.n_tokens, served.model.config.n_positions - len(ids))
            return self._job_of(served, [ids], n_tokens), n_left_out
        rows = self._rows(served)
        if len(rows) != 1:
            raise UserError("the page continues one text at a time.")
        # The page does not know how many tokens its prompt has.
        n_tokens = min(self.n_tokens, max(1, served.model.config.n_positions - len(rows[0])))
        return self._job_of(served, rows, n_tokens), 0


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    include_usage: bool | None = Field(default=False, strict=True)


class Streamed(Sampling):
    """The fields that OpenAI's two APIs share. Fields without a function here are refused."""

    model_config = ConfigDict(extra="forbid")

    n: int = Field(1, ge=1, le=16, description="texts for each prompt")
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] = Field(
        "", description="a text of up to 200 characters, or a list of up to 4 of these"
    )
    stream: bool = False
    stream_options: StreamOptions = Field(
        StreamOptions(), description='an object such as {"include_usage": true}'
    )
    user: Any = Field(None, description="has no effect")
    presence_penalty: float = Field(0, description="must be 0")
    frequency_penalty: float = Field(0, description="must be 0")
    logit_bias: dict[str, Any] = Field({}, description="must be empty")

    @field_validator("presence_penalty", "frequency_penalty", "logit_bias")
    @classmethod
    def _refuse(cls, value: Any) -> Any:
        if value:
            raise ValueError("is not supported")
        return value

    @property
    def stops(self) -> list[str]:
        """The texts that end an answer."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        return [stop for stop in stops if stop]


class CompletionRequest(Streamed, Prompted):
    """A request of OpenAI's completions API."""

    max_tokens: int = Field(16, ge=0, le=1_000_000)
    logprobs: int | None = Field(None, ge=0, le=10)
    echo: bool = Field(False, description="begin the answer with the prompt")
    best_of: int | None = Field(None, description="must be equal to n")
    suffix: str = Field("", description="must be empty")

    @field_validator("suffix")
    @classmethod
    def _refuse_suffix(cls, value: str) -> str:
        if value:
            raise ValueError("is not supported")
        return value

    @field_validator("best_of")
    @classmethod
    def _refuse_unless_n(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value != info.data.get("n"):
            raise ValueError("is not supported")
        return value

    def job(self, engine: Engine) -> Job:
        """Return what the engine has to do; raise UserError if it is impossible."""
        served = engine.find(self.model)
        rows = [row for row in self._rows(served) for _ in range(self.n)]
        return self._job_of(served, rows, self.max_tokens)


class ChatRequest(Streamed):
    """A request of OpenAI's chat completions API."""

    messages: list[ChatMessage] = Field(
        min_length=1, description='a list of objects such as {"role": "user", "content": "Hello"}'
    )
    max_tokens: int = Field(0, ge=0, le=1_000_000, description="0: at most 256")
    max_completion_tokens: int = Field(0, ge=0, le=1_000_000, description="as max_tokens")
    logprobs: bool = Field(False, description="must be false")

    @field_validator("logprobs")
    @classmethod
    def _refuse_logprobs(cls, value: bool) -> bool:
        if value:
            raise ValueError("is not supported")
        return value

    def job(self, engine: Engine) -> tuple[Job, int]:
        """Return what the engine has to do, and how many messages do not fit and are left out.

        Raises UserError if it is impossible.
        """
        served = engine.find(self.model)
        n_tokens = self.max_completion_tokens or self.max_tokens
        n_tokens = n_tokens or min(DEFAULT_ANSWER_TOKENS, served.model.config.n_positions // 2)
        ids, n_left_out = ids_of_chat(served, self.messages, n_tokens)
        n_tokens = min(n_tokens, served.model.config.n_positions - len(ids))
        return self._job_of(served, [ids] * self.n, n_tokens), n_left_out


def error_sentence(errors: Sequence[Any]) -> str:
    """Return the first error of pydantic's `errors()` for a request as a sentence."""
    _, *location = errors[0]["loc"]
    name = location[0] if location else None
    if not isinstance(name, str):
        return "the request is not a JSON object."
    if errors[0]["type"] == "extra_forbidden":
        return f"'{name[:40]}' is not a field of this request."
    if len(location) > 1 and errors[0]["type"] == "literal_error":
        return f"{name}: {location[-1]} should be {errors[0]['ctx']['expected']}."
    if name == "messages" and len(location) > 2:
        return f"messages: the {location[2]} of message {location[1] + 1} should be a text."
    # A part of a list or of alternative types, or a list that is needed.
    if len(location) > 1 or errors[0]["type"] in ("missing", "too_short"):
        fields = CompletionRequest.model_fields | ChatRequest.model_fields
        fields |= InsideRequest.model_fields
        return f"{name} should be {fields[name].description}."
    message = errors[0]["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{name} {message}."
