"""Requests: what is accepted, and the sentence that a wrong one is answered with."""

from typing import Any

import pytest
from pydantic import ValidationError

from anew import GPT, Tokenizer
from anew.serve.engine import Engine, Served
from anew.serve.schemas import ChatRequest, CompletionRequest, error_sentence
from tests.support.serving import CONFIG

ENGINE = Engine([Served("m", GPT(CONFIG).eval(), Tokenizer.named("bytes"))])

WRONG: list[tuple[Any, str]] = [
    ([], "the request is not a JSON object."),
    ({"temperature": -1}, "temperature should be greater than or equal to 0."),
    ({"temperature": float("nan")}, "temperature should be a finite number."),
    ({"temperature": "1"}, "temperature should be a valid number."),
    ({"top_p": 0}, "top_p should be greater than 0."),
    ({"n": 17}, "n should be less than or equal to 16."),
    ({"n": True}, "n should be a valid integer."),
    ({"prompt": [1, "a"]}, "prompt should be a text, a list of token ids, or a list of these."),
    ({"stop": ["x"] * 5}, "stop should be a text of up to 200 characters, or a list of up to 4 of"),
    ({"stream_options": {"include_usage": 3}}, "stream_options should be an object such as"),
    ({"logit_bias": {"5": 100}}, "logit_bias is not supported."),
    ({"best_of": 2}, "best_of is not supported."),
    ({"strange": 1}, "'strange' is not a field of this request."),
]


@pytest.mark.parametrize(("body", "sentence"), WRONG)
def test_wrong_request_is_named_in_a_sentence(body: Any, sentence: str) -> None:
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate(body)
    errors = [{**error, "loc": ("body", *error["loc"])} for error in caught.value.errors()]
    assert error_sentence(errors).startswith(sentence)


def test_null_and_neutral_values_are_defaults() -> None:
    neutral = {"presence_penalty": 0.0, "frequency_penalty": 0, "logit_bias": {}, "suffix": ""}
    nothing = dict.fromkeys(["seed", "stop", "temperature", "logprobs", "model", "prompt", "user"])
    request = CompletionRequest.model_validate({**neutral, **nothing, "n": 2, "best_of": 2})
    assert (request.temperature, request.max_tokens, request.logprobs) == (1.0, 16, None)
    assert request.stops == []
    assert request.job(ENGINE).prompts == [[256], [256]], "end of text begins a document"


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("ab", [[97, 98]]),
        ([97, 98], [[97, 98]]),
        (["ab", [5]], [[97, 98], [5]]),
        ([[5], [6]], [[5], [6]]),
    ],
)
def test_prompt_is_a_text_or_ids_or_a_list_of_these(prompt: Any, prompts: list[list[int]]) -> None:
    assert CompletionRequest.model_validate({"prompt": prompt}).job(ENGINE).prompts == prompts


@pytest.mark.parametrize("second", [{"role": "user"}, {"role": "user", "content": None}])
def test_message_without_a_text_is_named(second: dict[str, Any]) -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}, second]}
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate(body)
    errors = [{**error, "loc": ("body", *error["loc"])} for error in caught.value.errors()]
    assert error_sentence(errors) == "messages: the content of message 2 should be a text."
