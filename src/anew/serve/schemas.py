"""The requests of the server: their fields, limits and defaults, which /docs describes.

    request = CompletionRequest.model_validate({"prompt": "It was", "max_tokens": 40})
    job = request.job(engine)

A field that is null has its default. Values are not converted: "5" and true are not numbers.
"""

import secrets
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from anew.errors import UserError
from anew.serve.engine import Engine, Job

SEED_LIMIT = 2**63
StopText = Annotated[str, Field(max_length=200)]


class Sampling(BaseModel):
    """The fields that all requests have."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    model: str | None = Field(None, description="a name of /v1/models; by default the first")
    prompt: str | list[int] | list[str | list[int]] = Field(
        "",
        description="a text, a list of token ids, or a list of these",
    )
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

    def _job(self, engine: Engine, n_tokens: int, copies: int = 1) -> Job:
        """Return the job of continuing each prompt `copies` times; UserError if not possible."""
        served = engine.find(self.model)
        is_single = isinstance(self.prompt, str) or all(isinstance(i, int) for i in self.prompt)
        prompts: Sequence[Any] = [self.prompt] if is_single else self.prompt
        rows = []
        for prompt in prompts:
            ids = served.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            rows += [ids or [served.tokenizer.end_of_text]] * copies
        return Job(
            served=served,
            prompts=rows,
            n_tokens=n_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed % SEED_LIMIT,
        )


class PageRequest(Sampling):
    """A request of the page: a text, or the ids of a text whose end was changed."""

    n_tokens: int = Field(64, ge=0, le=1_000_000)

    def job(self, engine: Engine) -> Job:
        """Return what the engine has to do; raise UserError if it is impossible."""
        job = self._job(engine, self.n_tokens)
        if len(job.prompts) != 1:
            raise UserError("the page continues one text at a time.")
        return job


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    include_usage: bool | None = Field(default=False, strict=True)


class CompletionRequest(Sampling):
    """A request of OpenAI's completions API. Fields without a function here are refused."""

    model_config = ConfigDict(extra="forbid")

    max_tokens: int = Field(16, ge=0, le=1_000_000)
    n: int = Field(1, ge=1, le=16, description="texts for each prompt")
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] = Field(
        "", description="a text of up to 200 characters, or a list of up to 4 of these"
    )
    logprobs: int | None = Field(None, ge=0, le=10)
    echo: bool = Field(False, description="begin the answer with the prompt")
    stream: bool = False
    stream_options: StreamOptions = Field(
        StreamOptions(), description='an object such as {"include_usage": true}'
    )
    user: Any = Field(None, description="has no effect")
    best_of: int | None = Field(None, description="must be equal to n")
    presence_penalty: float = Field(0, description="must be 0")
    frequency_penalty: float = Field(0, description="must be 0")
    logit_bias: dict[str, Any] = Field({}, description="must be empty")
    suffix: str = Field("", description="must be empty")

    @field_validator("presence_penalty", "frequency_penalty", "logit_bias", "suffix")
    @classmethod
    def _refuse(cls, value: Any) -> Any:
        if value:
            raise ValueError("is not supported")
        return value

    @field_validator("best_of")
    @classmethod
    def _refuse_unless_n(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value != info.data.get("n"):
            raise ValueError("is not supported")
        return value

    @property
    def stops(self) -> list[str]:
        """The texts that end an answer."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        return [stop for stop in stops if stop]

    def job(self, engine: Engine) -> Job:
        """Return what the engine has to do; raise UserError if it is impossible."""
        return self._job(engine, self.max_tokens, copies=self.n)


def error_sentence(errors: Sequence[Any]) -> str:
    """Return the first error of pydantic's `errors()` for a request as a sentence."""
    _, *location = errors[0]["loc"]
    name = location[0] if location else None
    if not isinstance(name, str):
        return "the request is not a JSON object."
    if errors[0]["type"] == "extra_forbidden":
        return f"'{name[:40]}' is not a field of this request."
    if len(location) > 1:  # a part of a list or of alternative types
        return f"{name} should be {CompletionRequest.model_fields[name].description}."
    message = errors[0]["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{name} {message}."
