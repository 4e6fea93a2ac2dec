"""`anew serve` as its clients meet it: a real process, the openai client, and hostile requests."""

import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from torch import Tensor

from anew import GPT, Tokenizer, generate
from anew.checkpoint.huggingface import load_model
from anew.inference.interpret import Part, logit_lens, trace_of, without
from tests.support.hostile import FIELDS, PATHS, hostile_body
from tests.support.serving import models, post, request, served

__all__ = ["models"]  # a fixture
END_OF_TEXT = 256


@pytest.fixture(scope="module")
def address(models: list[Path]) -> Iterator[str]:
    with served(*map(str, models), "--waiting", "1") as found:
        yield found


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def log_probabilities(folder: Path, ids: list[int]) -> Tensor:
    """Return what the model says of the tokens after each one, (T, 257)."""
    with torch.no_grad():
        return GPT.from_pretrained(str(folder)).eval()(torch.tensor([ids]))[0].log_softmax(-1)


def completion_body(**fields: Any) -> bytes:
    return json.dumps({"prompt": "x", "max_tokens": 1, **fields}).encode()


def test_openai_client_gets_what_generate_returns(
    client: openai.OpenAI, models: list[Path]
) -> None:
    names = [m.id for m in client.models.list()]
    assert names == [str(m) for m in models]
    assert client.models.retrieve(names[1]).id == names[1]
    for name, folder in zip(names, models, strict=True):
        model = GPT.from_pretrained(str(folder)).eval()
        [ids] = generate(model, [list(b"It was")], 40, temperature=0.7, seed=3)
        settings: dict[str, Any] = {
            "model": name,
            "prompt": "It was",
            "max_tokens": 40,
            "temperature": 0.7,
            "seed": 3,
        }
        answer = client.completions.create(**settings)
        expected = Tokenizer.named("bytes").decode([i for i in ids if i != END_OF_TEXT])
        assert answer.choices[0].text == expected
        assert answer.choices[0].finish_reason == ("stop" if END_OF_TEXT in ids else "length")
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 40)
        parts = list(
            client.completions.create(
                **settings, stream=True, stream_options={"include_usage": True}
            )
        )
        assert "".join(p.choices[0].text for p in parts if p.choices) == expected
        assert len(parts) > 20, "a piece at a time"
        assert parts[-1].usage.total_tokens == 46


def test_several_prompts_and_copies_are_choices_in_order(
    client: openai.OpenAI, models: list[Path]
) -> None:
    # The client's types allow texts or lists of ids, not both.
    prompt: Any = ["One", [84, 119, 111]]
    several = client.completions.create(
        model=str(models[0]), prompt=prompt, n=2, max_tokens=5, seed=1
    )
    assert [c.index for c in several.choices] == [0, 1, 2, 3]
    assert several.usage is not None
    assert several.usage.completion_tokens == 20


def test_logprobs_stop_and_echo(client: openai.OpenAI, models: list[Path]) -> None:
    settings: dict[str, Any] = {"model": str(models[0]), "prompt": "The", "temperature": 0}
    greedy = client.completions.create(**settings, max_tokens=12, logprobs=3)
    logprobs = greedy.choices[0].logprobs
    assert len(logprobs.tokens) == 12
    for token, log_p, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert 1 <= len(top) <= 3
        assert log_p == pytest.approx(max(top.values()))
        assert token in top
    text = greedy.choices[0].text
    stop = text[4:6]
    expected = text[: text.find(stop)]
    cut = client.completions.create(**settings, max_tokens=12, stop=[stop, "zzzz"])
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == (expected, "stop")
    streamed = client.completions.create(**settings, max_tokens=12, stop=stop, stream=True)
    sent = "".join(p.choices[0].text for p in streamed)
    assert sent == expected, "no part of a stop text is sent"
    echoed = client.completions.create(**settings, max_tokens=3, echo=True)
    assert echoed.choices[0].text == "The" + text[:3]


def test_prompt_has_the_scores_of_the_model(client: openai.OpenAI, models: list[Path]) -> None:
    answer = client.completions.create(
        model=str(models[0]), prompt="A tower", max_tokens=0, echo=True, logprobs=1
    )
    ids = list(b"A tower")
    log_p = log_probabilities(models[0], ids)
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.token_logprobs is not None
    assert found.token_logprobs[0] is None
    assert found.token_logprobs[1:] == pytest.approx(
        [log_p[n, i].item() for n, i in enumerate(ids[1:])], abs=1e-4
    )
    assert found.text_offset == list(range(7))


def test_lm_eval_reads_the_scores_of_a_prompt(client: openai.OpenAI, models: list[Path]) -> None:
    """lm-eval asks for one more token, echoes the prompt and sums the scores after the context."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    ids = list(b"A tower of stone")
    settings: dict[str, Any] = {"model": str(models[0]), "prompt": [ids], "echo": True}
    answer = client.completions.create(**settings, max_tokens=1, logprobs=1, temperature=0, seed=1)
    [(total, greedy)] = LocalCompletionsAPI.parse_logprobs(
        answer.model_dump(), tokens=[ids], ctxlens=[8]
    )
    log_p = log_probabilities(models[0], ids)
    ending = range(8, len(ids))
    assert total == pytest.approx(sum(log_p[n - 1, ids[n]].item() for n in ending), abs=1e-3)
    assert greedy == all(log_p[n - 1].argmax() == ids[n] for n in ending)
    assert answer.choices[0].logprobs.text_offset == list(range(len(ids) + 1))
    streamed = list(client.completions.create(**settings, max_tokens=0, logprobs=0, stream=True))
    assert streamed[0].choices[0].text == "A tower of stone"
    assert len(streamed[0].choices[0].logprobs.token_logprobs) == len(ids)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": "gpt-5"}, "no model 'gpt-5'"),
        ({"max_tokens": 300}, "than the 256 that"),
        ({"temperature": -1}, "temperature should be greater than or equal to 0"),
        ({"logit_bias": {"5": 100}}, "logit_bias is not supported"),
        ({"prompt": [[999]]}, "a token id is outside"),
        ({"n": 17}, "n should be less than or equal to 16"),
    ],
)
def test_error_is_one_sentence(
    settings: dict[str, Any], words: str, client: openai.OpenAI, models: list[Path]
) -> None:
    fields = {"model": str(models[0]), "prompt": "x", "max_tokens": 4, **settings}
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(**fields)
    body: Any = error.value.body  # JSON
    assert words in body["message"]


def test_too_long_request_is_refused(address: str) -> None:
    status, answer = post(address, "/v1/completions", completion_body(prompt="x" * 300_000))
    assert status == 400
    assert json.loads(answer)["error"]["message"] == "the request has more than 262,144 bytes."


def test_500_hostile_bodies_cause_no_server_error(address: str) -> None:
    generator = random.Random(7)
    statuses: dict[int, int] = {}
    for i in range(500):
        body = hostile_body(generator)
        status, answer = post(address, PATHS[i % 3], body)
        statuses[status] = statuses.get(status, 0) + 1
        assert status < 500, (status, body[:200], answer[:500])
        if status != 200:
            assert json.loads(answer)["error"]["message"], answer
        assert b"server_error" not in answer, (body[:200], answer[:500])
    assert statuses[400] > 200
    assert statuses.get(200, 0) > 5


def test_half_a_surrogate_pair_causes_no_server_error(address: str) -> None:
    for name in FIELDS:
        for path in PATHS:
            for value in ("\ud800", ["\ud800"], {"\ud800": "\ud800"}):
                body = completion_body(**{"n_tokens": 1, name: value})
                status, answer = post(address, path, body)
                assert status < 500, (name, value, path, answer[:300])
                assert b"server_error" not in answer, (name, value, path, answer[:300])


def test_inside_has_the_attention_of_the_model(address: str, models: list[Path]) -> None:
    ids = list(b"The tower of the king")
    parts = [{"block": 0, "kind": "head", "head": 1}, {"block": 1, "kind": "mlp"}]
    model = load_model(models[0])
    changed = without(model, [Part(0, "head", 1), Part(1, "mlp")])
    for served_model, switched_off in ((model, []), (changed, parts)):
        body = {"prompt": ids, "token": 6, "block": 1, "head": 1, "without": switched_off}
        status, answer = post(address, "/api/inside", json.dumps(body).encode())
        assert status == 200, answer
        found = json.loads(answer)
        trace = trace_of(served_model, ids)
        for i, row in enumerate(found["matrix"]):
            assert row == pytest.approx(
                (10_000 * trace.attention[1, 1, i, : i + 1]).tolist(), abs=1
            )
        rows = torch.tensor(found["rows"])
        assert rows.shape == (2, 2, 7)
        assert (rows - 10_000 * trace.attention[:, :, 6, :7]).abs().max() <= 1
        lens = logit_lens(served_model, trace.residual[:, 6])
        for layer, expected in zip(found["layers"], lens, strict=True):
            likeliest = [choice["id"] for choice in layer["likeliest"]]
            assert likeliest == expected.topk(10).indices.tolist()
        norm = trace.mlp_added[1, 6].norm().item()
        assert found["layers"][2]["mlp_norm"] == pytest.approx(norm, abs=1e-6)
        written = {"prompt": ids, "n_tokens": 12, "temperature": 0, "without": switched_off}
        status, answer = post(address, "/api/write", json.dumps(written).encode())
        lines = [json.loads(line[6:]) for line in answer.decode().split("\n\n") if line]
        [expected_ids] = generate(served_model, [ids], 12, stop=256, temperature=0)
        assert [line["id"] for line in lines[1:] if line["id"] != 256] == expected_ids


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": "x" * 257}, "257 tokens cannot be shown; the page shows 1 to 256"),
        ({"prompt": [257]}, "a token id is outside 0 to 256"),
        ({"token": 4}, "there is no token 4; the text has 4, from 0"),
        ({"block": 2}, "there is no head 0 in a block 2"),
        ({"head": -1}, "there is no head -1 in a block 0"),
        ({"without": [{"block": 0, "kind": "head", "head": 2}]}, "there is no head 2 in a block 0"),
        ({"without": [{"block": 0, "kind": "norm"}]}, "without: kind should be 'head', 'attention"),
        ({"prompt": ["a", "b"]}, "the page shows one text at a time"),
    ],
)
def test_impossible_look_inside_is_refused(
    fields: dict[str, Any], words: str, address: str
) -> None:
    status, answer = post(address, "/api/inside", json.dumps({"prompt": "abcd", **fields}).encode())
    assert status == 400
    assert words in json.loads(answer)["error"]["message"]


def test_other_hosts_and_forms_are_refused(address: str) -> None:
    body = completion_body()
    assert post(address, "/v1/completions", body)[0] == 200
    foreign_name = post(address, "/v1/completions", body, host="evil.example")
    assert foreign_name[0] == 403
    form = post(address, "/v1/completions", body, **{"content-type": "text/plain"})
    assert form[0] == 415, "a form of another page could send this"


def test_page_loads_nothing_from_elsewhere(address: str) -> None:
    answer = request(address, "GET", "/")
    page = answer.body.decode()
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "http" not in page.replace("http-equiv", "")
    for path in ("/page.css", "/page.js", "/inside.js"):
        assert request(address, "GET", path).status == 200


@pytest.mark.parametrize(
    "path", ["/nothing", "/v1/models/none", "/page.html", "/../pyproject.toml"]
)
def test_other_paths_are_not_found(path: str, address: str) -> None:
    answer = request(address, "GET", path)
    assert answer.status in (400, 404)
    assert json.loads(answer.body)["error"]["message"]


def test_server_listens_on_one_address_only(address: str) -> None:
    port = int(address.rsplit(":", 1)[1])
    other_loopback_address = "127.0.0.2"
    with (
        pytest.raises(OSError),  # noqa: PT011
        socket.create_connection((other_loopback_address, port), timeout=2),
    ):
        pass


def test_openapi_document_describes_the_fields(address: str) -> None:
    document = json.loads(request(address, "GET", "/openapi.json").body)
    body = document["paths"]["/v1/completions"]["post"]["requestBody"]
    [schema] = [content["schema"]["$ref"] for content in body["content"].values()]
    described = document["components"]["schemas"][schema.rsplit("/", 1)[1]]["properties"]
    assert sorted(described) == FIELDS
    assert described["max_tokens"]["default"] == 16
    assert described["temperature"]["maximum"] == 100
    statuses = document["paths"]["/v1/completions"]["post"]["responses"]
    assert sorted(statuses) == ["200", "4XX"]
    docs = request(address, "GET", "/docs")
    assert docs.status == 200
    assert "/openapi.json" in docs.body.decode()
    assert "https://cdn.jsdelivr.net" in docs.headers["content-security-policy"]


def test_client_that_leaves_frees_its_place(address: str) -> None:
    """Three clients may be there at once. After all three have left, the next one is answered."""
    body = json.dumps({"prompt": "", "n_tokens": 250, "temperature": 0}).encode()
    head = (
        "POST /api/write HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    ).encode()
    host, port = address.removeprefix("http://").split(":")
    for _ in range(3):
        clients = [socket.create_connection((host, int(port))) for _ in range(3)]
        for client in clients:
            client.sendall(head + body)
        clients[0].recv(100)
        for client in clients:
            client.close()
    deadline = time.monotonic() + 20
    while post(address, "/v1/completions", completion_body())[0] != 200:
        assert time.monotonic() < deadline, "places were lost"
        time.sleep(0.2)


def test_texts_are_equal_with_a_seed_and_different_without(client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    texts = []
    for seed in (None, None, 7, 7):
        answer = client.completions.create(model=model, prompt="It", max_tokens=20, seed=seed)
        texts.append(answer.choices[0].text)
    assert texts[0] != texts[1]
    assert texts[2] == texts[3]


def test_taken_port_is_a_user_error(models: list[Path]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-m", "anew", "serve", str(models[0]), "--port", port],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 2, done.stderr
    assert "choose another --port" in done.stderr
