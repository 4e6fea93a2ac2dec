"""The queue in front of the models, without a server."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from anew import GPT, Tokenizer
from anew.errors import UserError
from anew.serve.engine import Busy, Engine, Job, Served, Token, Turns
from anew.serve.openai_api import chunks
from anew.serve.schemas import CompletionRequest
from tests.support.serving import CONFIG


def engine_of_two_places() -> Engine:
    served = Served("m", GPT(CONFIG).eval(), Tokenizer.named("bytes"))
    return Engine([served], waiting=0)


def job(engine: Engine, n_tokens: int, temperature: float = 1.0, seed: int = 0) -> Job:
    return Job(engine.find("m"), [[65]], n_tokens, temperature=temperature, seed=seed)


def assert_all_places_are_free(engine: Engine) -> None:
    assert [engine.take_place(), engine.take_place()]


def test_place_is_free_after_its_text() -> None:
    engine = engine_of_two_places()
    first, second = engine.take_place(), engine.take_place()
    with pytest.raises(Busy):
        engine.take_place()
    writing = engine.write(first, job(engine, 5, seed=1), threading.Event())
    assert len(list(writing)) <= 5
    third = engine.take_place()
    never_begun = engine.write(third, job(engine, 5), threading.Event())
    del never_begun, third, second
    assert_all_places_are_free(engine)


def test_client_that_leaves_while_waiting_frees_its_place() -> None:
    engine = engine_of_two_places()
    stop = threading.Event()
    waiting = engine.write(engine.take_place(), job(engine, 5), stop)
    stop.set()
    with engine.writers, engine.writers:  # as if two other texts were being generated
        assert list(waiting) == []
    assert_all_places_are_free(engine)


def test_two_texts_are_written_at_once_and_are_those_of_each_alone() -> None:
    engine = engine_of_two_places()

    def write(seed: int) -> Iterator[tuple[int, Token]]:
        return engine.write(engine.take_place(), job(engine, 60, seed=seed), threading.Event())

    alone = [list(write(1)), list(write(2))]
    first, second = write(1), write(2)
    begun = [next(first), next(second)]  # with one at a time, the second would wait for ever
    written: list[list[tuple[int, Token]]] = [[begun[0]], [begun[1]]]

    def finish(texts: Iterator[tuple[int, Token]], into: list[tuple[int, Token]]) -> None:
        into.extend(texts)

    threads = [
        threading.Thread(target=finish, args=pair)
        for pair in zip((first, second), written, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert written == alone
    assert_all_places_are_free(engine)


def test_turns_are_taken_in_order() -> None:
    turns = Turns()
    order: list[str] = []

    def work(name: str) -> None:
        with turns:
            order.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcdef"]
    with turns:
        for number, thread in enumerate(threads, start=1):
            thread.start()
            while turns.drawn <= number:  # until it waits
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert order == list("abcdef")


def test_text_ends_at_the_next_token_after_stop() -> None:
    engine = engine_of_two_places()
    stop = threading.Event()
    writing = engine.write(engine.take_place(), job(engine, 200, temperature=0.0), stop)
    next(writing)
    stop.set()
    assert len(list(writing)) <= 1


def test_impossible_jobs_are_refused() -> None:
    served = engine_of_two_places().find("m")
    with pytest.raises(UserError, match="at once are more"):
        Job(served, [[65]] * 17, 5)
    with pytest.raises(UserError, match="more than the 256 that m reads at once"):
        Job(served, [[65]], 256)
    with pytest.raises(UserError, match="a token id is outside 0 to 256"):
        Job(served, [[257]], 5)


def test_last_part_of_a_name_names_a_model_if_only_one_has_it() -> None:
    model = GPT(CONFIG).eval()
    names = ("runs/demo", "runs/bard", "old/bard")
    engine = Engine([Served(name, model, Tokenizer.named("bytes")) for name in names])
    assert engine.find("demo").name == "runs/demo"
    assert engine.find("old/bard").name == "old/bard"
    with pytest.raises(UserError, match="no model 'bard'"):
        engine.find("bard")
    with pytest.raises(UserError, match="did you mean runs/demo"):
        engine.find("run/demo")


@pytest.mark.parametrize(
    ("ids", "texts"),
    [([195, 169], ["", "é"]), ([65, 195], ["A", "\ufffd"]), ([195, 256], ["", "\ufffd"])],
)
def test_incomplete_character_at_the_end_is_not_lost(
    ids: list[int], texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of_two_places()
    steps = [([token], torch.zeros(1, 257)) for token in ids]
    monkeypatch.setattr("anew.serve.engine.stream_with_logits", lambda *_, **__: iter(steps))
    written = engine.write(engine.take_place(), job(engine, 2), threading.Event())
    assert [token.text for _, token in written] == texts


def test_failed_echo_frees_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> list[Token]:
        raise RuntimeError("the device has failed")

    engine = engine_of_two_places()
    monkeypatch.setattr(engine, "score", fail)
    body = CompletionRequest.model_validate(
        {"prompt": "A", "echo": True, "logprobs": 1, "max_tokens": 2}
    )
    place = engine.take_place()
    parts = chunks(engine, place, body.job(engine), body, threading.Event())
    with pytest.raises(RuntimeError, match="device"):
        next(parts)
    assert_all_places_are_free(engine)
