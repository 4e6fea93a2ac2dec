"""The server as its visitors meet it: a real process, the real openai client, a real browser, and people who send rubbish or leave."""

import contextlib
import http.client
import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from anew import GPT, GPTConfig, Tokenizer, generate
from anew.checkpoint import huggingface as weights
from anew.errors import UserError
from anew.serve import schemas as wanted
from anew.serve.engine import Busy, Engine, Rules, Served

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=64, n_positions=256, vocab_size=257)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folders = []
    for seed in (1, 2):
        folder = tmp_path_factory.mktemp("models") / f"model-{seed}"
        folder.mkdir()
        model = GPT(CONFIG, seed=seed)
        with torch.no_grad():
            model.transformer.wte.weight.mul_(8)  # some choices are clear, and end of text is rare
        weights.save_model(folder, model, Tokenizer.named("bytes"))
        folders.append(folder)
    return folders


@contextlib.contextmanager
def served(*arguments: str) -> Iterator[str]:
    """`anew serve` in a process of its own; its address."""
    command = [
        sys.executable,
        "-m",
        "anew",
        "serve",
        *arguments,
        "--port",
        "0",
        "--precision",
        "fp32",
        "--device",
        "cpu",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        try:
            assert address.startswith("http://127.0.0.1:"), address
            yield address
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(20) in (0, 130, -signal.SIGINT)


@pytest.fixture(scope="module")
def address(models: list[Path]) -> Iterator[str]:
    with served(*map(str, models), "--waiting", "2") as found:
        yield found


@pytest.fixture
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def post(address: str, path: str, body: bytes, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    connection.request("POST", path, body, {"content-type": "application/json", **headers})
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_the_openai_client_gets_what_generate_writes(
    client: openai.OpenAI, models: list[Path]
) -> None:
    names = [m.id for m in client.models.list()]
    assert names == [str(m) for m in models]
    assert client.models.retrieve(names[1]).id == names[1]
    for name, folder in zip(names, models, strict=True):
        model = GPT.from_pretrained(str(folder)).eval()
        [ids] = generate(model, [list(b"It was")], 40, temperature=0.7, seed=3)
        answer = client.completions.create(
            model=name, prompt="It was", max_tokens=40, temperature=0.7, seed=3
        )
        expected = Tokenizer.named("bytes").decode([i for i in ids if i != 256])
        assert answer.choices[0].text == expected
        assert answer.choices[0].finish_reason == ("stop" if 256 in ids else "length")
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 40)
        parts = list(client.completions.create(model=name, prompt="It was", max_tokens=40, temperature=0.7, seed=3, stream=True,
                                               stream_options={"include_usage": True}))  # fmt: skip
        assert "".join(p.choices[0].text for p in parts if p.choices) == expected
        assert len(parts) > 20, "a piece at a time"
        assert parts[-1].usage.total_tokens == 46


def test_settings_of_the_completions_api(client: openai.OpenAI, models: list[Path]) -> None:
    name = str(models[0])
    several = client.completions.create(
        model=name, prompt=["One", [84, 119, 111]], n=2, max_tokens=5, seed=1
    )
    assert [c.index for c in several.choices] == [0, 1, 2, 3]
    assert several.usage.completion_tokens == 20
    greedy = client.completions.create(
        model=name, prompt="The", max_tokens=12, temperature=0, logprobs=3
    )
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
    cut = client.completions.create(
        model=name, prompt="The", max_tokens=12, temperature=0, stop=[stop, "zzzz"]
    )
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == (text[: text.find(stop)], "stop")
    streamed = client.completions.create(
        model=name, prompt="The", max_tokens=12, temperature=0, stop=stop, stream=True
    )
    assert "".join(p.choices[0].text for p in streamed) == text[: text.find(stop)], (
        "nothing of a stop sequence is shown"
    )
    echoed = client.completions.create(
        model=name, prompt="The", max_tokens=3, temperature=0, echo=True
    )
    assert echoed.choices[0].text == "The" + text[:3]


def test_a_prompt_is_scored_as_the_model_scores_it(
    client: openai.OpenAI, models: list[Path]
) -> None:
    answer = client.completions.create(
        model=str(models[0]), prompt="A tower", max_tokens=0, echo=True, logprobs=1
    )
    ids = torch.tensor([list(b"A tower")])
    with torch.no_grad():
        log_p = GPT.from_pretrained(str(models[0])).eval()(ids)[0].log_softmax(-1)
    found = answer.choices[0].logprobs
    assert found.token_logprobs[0] is None
    assert found.token_logprobs[1:] == pytest.approx(
        [log_p[n, i].item() for n, i in enumerate(ids[0, 1:])], abs=1e-4
    )
    assert found.text_offset == list(range(7))


def test_lm_evals_own_reading_of_an_answer(client: openai.OpenAI, models: list[Path]) -> None:
    """It asks for one token more, echoes the prompt and sums the log-probabilities behind the context."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    ids = list(b"A tower of stone")
    answer = client.completions.create(
        model=str(models[0]),
        prompt=[ids],
        max_tokens=1,
        echo=True,
        logprobs=1,
        temperature=0,
        seed=1,
    )
    [(total, greedy)] = LocalCompletionsAPI.parse_logprobs(
        answer.model_dump(), tokens=[ids], ctxlens=[8]
    )
    with torch.no_grad():
        log_p = GPT.from_pretrained(str(models[0])).eval()(torch.tensor([ids]))[0].log_softmax(-1)
    assert total == pytest.approx(
        sum(log_p[n - 1, ids[n]].item() for n in range(8, len(ids))), abs=1e-3
    )
    assert greedy == all(log_p[n - 1].argmax() == ids[n] for n in range(8, len(ids)))
    offsets = answer.choices[0].logprobs.text_offset
    assert offsets == list(range(len(ids) + 1))
    streamed = list(
        client.completions.create(
            model=str(models[0]), prompt=[ids], max_tokens=0, echo=True, logprobs=0, stream=True
        )
    )
    assert streamed[0].choices[0].text == "A tower of stone"
    assert len(streamed[0].choices[0].logprobs.token_logprobs) == len(ids)


def test_what_is_wrong_is_said_in_a_sentence(client: openai.OpenAI, models: list[Path]) -> None:
    for settings, words in (
        ({"model": "gpt-5"}, "no model 'gpt-5'"), ({"max_tokens": 300}, "than the 256 that"),
        ({"temperature": -1}, "temperature is not a number"),
        ({"logit_bias": {"5": 100}}, "logit_bias is not supported"), ({"prompt": [[999]]}, "a token id is outside"),
        ({"n": 17}, "n is not a whole"),
    ):  # fmt: skip
        with pytest.raises(openai.BadRequestError) as error:
            client.completions.create(
                **{"model": str(models[0]), "prompt": "x", "max_tokens": 4, **settings}
            )
        assert words in str(error.value)


def hostile(generator: random.Random) -> bytes:
    """A body that somebody might send who means no good, or whose program has a fault."""
    values: list[Any] = [None, True, -1, 10**400, 1e308, "", "\ud800", "x" * 3000, [], [[]], {}, {"a": {}}, [1, "a"], [[1, 2], "b"], "\x00",
                         [2**70],
                         -0.0, [None], "<script>", {"$ref": "#"}, ["a"] * 40]  # fmt: skip
    names = sorted([*wanted.COMPLETION, "n_tokens", "__proto__", "constructor"])
    kind = generator.randrange(6)
    if kind == 0:
        return bytes(generator.randrange(256) for _ in range(generator.randrange(200)))
    if kind == 1:
        return (generator.choice("[{") * generator.choice([10, 1000, 100_000])).encode()
    if kind == 2:
        return json.dumps({"prompt": "x" * generator.choice([10, 300_000])}).encode()[
            : generator.choice([5, 100, 400_000])
        ]
    if kind == 3:
        return generator.choice([b"NaN", b"Infinity", b'{"temperature": NaN}', b'{"n": 1e999}', b'"text"', b"[]", b"null", b"9" * 5000,
                                 b'{"prompt": "\\ud83d"}', b'{"max_tokens": 1, "max_tokens": []}', b"\xef\xbb\xbf{}"])  # fmt: skip
    body = {
        name: generator.choice(values)
        for name in generator.sample(names, generator.randrange(1, 5))
    }
    if kind == 5:
        body |= {"prompt": generator.choice(values), "max_tokens": 2, "n_tokens": 2}
    return json.dumps(body).encode()


def test_500_hostile_bodies_get_an_answer_and_never_an_error_of_the_server(address: str) -> None:
    generator = random.Random(7)
    statuses: dict[int, int] = {}
    for i in range(500):
        body = hostile(generator)
        status, answer = post(address, ("/v1/completions", "/api/write")[i % 2], body)
        statuses[status] = statuses.get(status, 0) + 1
        assert status < 500, (status, body[:200], answer[:500])
        if status != 200:
            assert json.loads(answer)["error"]["message"], answer
        assert b"server_error" not in answer, (body[:200], answer[:500])
    assert statuses[400] > 200
    assert statuses.get(200, 0) > 5


def test_half_a_surrogate_pair_is_no_error_of_the_server(address: str) -> None:
    for name in wanted.COMPLETION:
        for path in ("/v1/completions", "/api/write"):
            for value in ("\ud800", ["\ud800"], {"\ud800": "\ud800"}):
                status, answer = post(
                    address,
                    path,
                    json.dumps(
                        {"prompt": "x", "max_tokens": 1, "n_tokens": 1} | {name: value}
                    ).encode(),
                )
                assert status < 500, (name, value, path, answer[:300])
                assert b"server_error" not in answer, (name, value, path, answer[:300])


def test_only_this_machine_and_its_own_page_may_ask(address: str) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
    assert post(address, "/v1/completions", body)[0] == 200
    assert post(address, "/v1/completions", body, host="evil.example")[0] == 403, (
        "a name that points here"
    )
    assert post(address, "/v1/completions", body, **{"content-type": "text/plain"})[0] == 415, (
        "what another page's form could send"
    )
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=10)
    connection.request("GET", "/")
    answer = connection.getresponse()
    page = answer.read().decode()
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "http" not in page.replace("http-equiv", ""), "nothing from elsewhere"
    for path in ("/nothing", "/v1/models/none", "/docs", "/openapi.json", "/../pyproject.toml"):
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=10)
        connection.request("GET", path)
        assert connection.getresponse().status in (400, 404), path
    port = int(address.rsplit(":", 1)[1])
    with pytest.raises(OSError), socket.create_connection((_other_address(), port), timeout=2):  # noqa: PT011
        pass


def _other_address() -> str:
    """An address of this machine that is not loopback's first."""
    return "127.0.0.2"


def test_a_visitor_who_leaves_frees_the_place(address: str, models: list[Path]) -> None:
    """Three may be there at once. When all three have left in the middle of long texts, the next one is served."""
    body = json.dumps({"prompt": "", "n_tokens": 250, "temperature": 0}).encode()
    head = f"POST /api/write HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    host, port = address.removeprefix("http://").split(":")
    for _ in range(3):
        visitors = [socket.create_connection((host, int(port))) for _ in range(3)]
        for visitor in visitors:
            visitor.sendall(head + body)
        visitors[0].recv(100)
        for visitor in visitors:
            visitor.close()
    deadline = time.monotonic() + 20
    while (
        post(address, "/v1/completions", json.dumps({"prompt": "x", "max_tokens": 1}).encode())[0]
        != 200
    ):
        assert time.monotonic() < deadline, "places were lost"
        time.sleep(0.2)


def test_without_a_seed_two_answers_differ_and_with_one_they_are_the_same(
    client: openai.OpenAI,
) -> None:
    model = client.models.list().data[0].id
    asked = [
        client.completions.create(model=model, prompt="It", max_tokens=20, seed=seed)
        .choices[0]
        .text
        for seed in (None, None, 7, 7)
    ]
    assert asked[0] != asked[1]
    assert asked[2] == asked[3]


def test_places_are_counted_and_come_back() -> None:
    engine = Engine([Served("m", GPT(CONFIG).eval(), Tokenizer.named("bytes"))], waiting=1)
    first, second = engine.take_place(), engine.take_place()
    with pytest.raises(Busy):
        engine.take_place()
    writing = engine.write(first, engine.find("m"), [[65]], Rules(5, seed=1), threading.Event())
    assert len(list(writing)) <= 5
    third = engine.take_place()
    never = engine.write(third, engine.find("m"), [[65]], Rules(5), threading.Event())
    del never, third, second  # nobody ever listened
    assert [engine.take_place(), engine.take_place()]
    waiting = engine.write(
        engine.take_place(), engine.find("m"), [[65]], Rules(5), gone := threading.Event()
    )
    gone.set()
    with engine.device:  # another's text is being written
        assert list(waiting) == [], "who leaves while waiting does not wait on"
    assert [engine.take_place(), engine.take_place()]
    stop = threading.Event()
    writing = engine.write(
        engine.take_place(), engine.find("m"), [[65]], Rules(200, temperature=0.0), stop
    )
    next(writing)
    stop.set()
    assert len(list(writing)) <= 1
    with pytest.raises(UserError, match="at once are more"):
        engine.check(engine.find("m"), [[65]] * 17, Rules(5))


def test_bad_arguments_of_serve(models: list[Path]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "anew", "serve", str(models[0]), "--port", str(port)],
            capture_output=True,
            text=True,
            check=False,
        )
    assert (done.returncode, "choose another --port" in done.stderr) == (2, True), done.stderr
