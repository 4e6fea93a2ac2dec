"""A model learns to answer: its loss and gradients, resuming, ranks, and the programs that talk."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch

import anew
from anew import GPT, Config, Tokenizer, UserError
from anew.checkpoint.folder import newest_valid
from anew.checkpoint.huggingface import save_model
from anew.data.conversation_files import conversations_in
from anew.data.conversations import Conversations
from anew.data.dataset import open_data
from anew.tokenizer.chat import Message, encode, from_json
from anew.training import run_log
from anew.training.trainer import train
from tests.support.commands import start
from tests.support.conversations import as_dicts, numbered, write_talks
from tests.support.ranks import run_ranks
from tests.support.serving import served

BYTES = Tokenizer.named("bytes")
QUESTION = Message("user", "What is 7 times 1?")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of bytes that has learnt nothing."""
    folder = tmp_path_factory.mktemp("base") / "model"
    folder.mkdir()
    shape = anew.GPTConfig(n_layer=2, n_head=2, n_embd=64, n_positions=256, vocab_size=257)
    save_model(folder, GPT(shape, seed=5), BYTES)
    return folder


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_talks(tmp_path_factory.mktemp("talks") / "talks.jsonl", numbered(60))


def chat_config(base: Path, talks: Path, out: Path, **settings: Any) -> Config:
    usual = {
        "init": str(base),
        "data": str(talks),
        "out": str(out),
        "seq_len": 256,
        "batch_tokens": 8 * 256,
        "micro_batch": 2,
        "steps": 6,
        "warmup_steps": 1,
        "evaluate_every": 3,
        "save_every": 2,
        "keep": 0,
        "lr": 3e-3,
        "device": "cpu",
        "precision": "fp32",
    }
    return anew.recipe("chat", **{**usual, **settings})


@pytest.fixture(scope="module")
def run(base: Path, talks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learnt to say something."""
    out = tmp_path_factory.mktemp("chat") / "run"
    train(chat_config(base, talks, out, steps=60, save_every=30, evaluate_every=0))
    return out


def losses(run: Path) -> list[float]:
    rows = [row for row in run_log.read_metrics(run) if "train/loss" in row]
    return [row["train/loss"] for row in rows]


def weights(run: Path) -> bytes:
    checkpoint, _ = newest_valid(run)
    assert checkpoint is not None
    return (checkpoint / "model.safetensors").read_bytes()


# --- Loss and gradients


@pytest.mark.guarantee("chat")
def test_nothing_is_learnt_from_what_the_user_says(base: Path, talks: Path) -> None:
    folder = open_data(str(talks), "bytes", conversations=True)
    conversations = Conversations(folder.splits["train"], BYTES, 256, seed=1)
    [(ids, targets)] = conversations.micro_batches(first=0, count=4, size=4)
    model = GPT.from_pretrained(str(base)).train()
    hidden: list[torch.Tensor] = []

    def keep(_: Any, __: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        hidden.append(output)

    model.transformer.ln_f.register_forward_hook(keep)
    model(torch.from_numpy(ids), torch.from_numpy(targets)).backward()
    gradient = hidden[0].grad
    assert gradient is not None
    has_gradient = gradient.abs().sum(-1) > 0
    assert has_gradient.tolist() == (targets != -100).tolist()
    # Other words of the user in rows that are not read by any answer change nothing.
    padding = np.arange(ids.shape[1])[None] > [
        [int(np.flatnonzero(row != -100)[-1])] for row in targets
    ]
    ids[padding] = 65
    again = GPT.from_pretrained(str(base)).train()
    again(torch.from_numpy(ids), torch.from_numpy(targets)).backward()
    for (name, one), (_, other) in zip(
        model.named_parameters(), again.named_parameters(), strict=True
    ):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-8, msg=name)


@pytest.mark.parametrize("micro_batch", [1, 2, 8])
def test_loss_of_a_step_is_the_mean_over_all_its_answers(
    base: Path, talks: Path, tmp_path: Path, micro_batch: int
) -> None:
    from transformers import AutoModelForCausalLM

    train(
        chat_config(
            base,
            talks,
            tmp_path / "run",
            steps=1,
            warmup_steps=0,
            micro_batch=micro_batch,
            evaluate_every=0,
        )
    )
    folder = open_data(str(talks), "bytes", conversations=True)
    conversations = Conversations(folder.splits["train"], BYTES, 256, seed=1337)
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for number in range(8):
            inputs, targets = (torch.from_numpy(part) for part in conversations.row(number))
            logits = theirs(inputs[None]).logits[0]
            total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
            count += int((targets != -100).sum())
    assert losses(tmp_path / "run") == [pytest.approx(total / count, rel=1e-5)]


def test_micro_batches_and_ranks_give_the_same_run(base: Path, talks: Path, tmp_path: Path) -> None:
    whole = chat_config(base, talks, tmp_path / "whole", micro_batch=8)
    train(whole)
    train(chat_config(base, talks, tmp_path / "parts", micro_batch=1))
    shared = chat_config(base, talks, tmp_path / "ranks", micro_batch=2)
    assert [status for status, _ in run_ranks(2, train, shared)] == ["ok", "ok"]
    sharded = chat_config(base, talks, tmp_path / "sharded", micro_batch=2, parallel="fsdp")
    assert [status for status, _ in run_ranks(2, train, sharded)] == ["ok", "ok"]
    for other in ("parts", "ranks", "sharded"):
        pairs = zip(
            run_log.read_metrics(whole.folder), run_log.read_metrics(tmp_path / other), strict=True
        )
        for one, two in pairs:
            for key in ("tokens", "train/loss", "train/grad_norm", "val/loss"):
                if key in one:
                    assert two[key] == pytest.approx(one[key], rel=2e-5), (one["step"], key)


# --- Resuming


@pytest.mark.guarantee("resume")
def test_killed_run_goes_on_bit_for_bit(base: Path, talks: Path, tmp_path: Path) -> None:
    arguments = ["train", "chat", "--init", base, "--data", talks, "--seq-len", "256"]
    arguments += ["--batch-tokens", "2048", "--micro-batch", "2", "--steps", "40", "--save-every"]
    arguments += ["5", "--evaluate-every", "0", "--device", "cpu", "--precision", "fp32"]
    whole = start(*arguments, "--out", tmp_path / "whole")
    assert whole.wait(120) == 0, whole.communicate()
    killed = start(*arguments, "--out", tmp_path / "killed")
    saved = tmp_path / "killed" / "checkpoints" / "step-00000010"
    while not saved.is_dir():
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait(20)
    assert len(losses(tmp_path / "killed")) < 40
    again = start(*arguments, "--out", tmp_path / "killed")
    assert again.wait(120) == 0, again.communicate()
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    last = [losses(tmp_path / name)[-10:] for name in ("whole", "killed")]
    assert last[0] == last[1]
    for process in (whole, killed, again):
        process.communicate()


# --- What users see


def test_run_says_what_it_learns_and_what_it_forgets(
    base: Path, talks: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    train(chat_config(base, talks, out, general_data=str(text_file)))
    log = (out / "log.txt").read_text()
    assert "conversations of" in log
    assert "of them answers, which are learnt" in log
    assert "nats (" in log
    assert "a token of the answers" in log
    rows = [row for row in run_log.read_metrics(out) if "general/loss" in row]
    assert [row["step"] for row in rows] == [3, 6]
    tokens = [row["tokens"] for row in run_log.read_metrics(out) if "train/loss" in row]
    assert tokens == sorted(tokens)
    assert tokens[0] < 2048, "padding is not counted"


@pytest.mark.guarantee("chat")
def test_checkpoint_has_the_template_in_transformers(run: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    exported = tmp_path / "exported"
    done = start("export", run, "--to", "hf", "--out", exported)
    assert done.wait(60) == 0, done.communicate()
    done.communicate()
    checkpoint, _ = newest_valid(run)
    for folder in (checkpoint, exported):
        assert folder is not None
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        talk = [*numbered(3)[2], QUESTION]
        ids = tokenizer.apply_chat_template(
            as_dicts(talk), add_generation_prompt=True, return_dict=False
        )
        assert ids == encode(BYTES, talk, asks_reply=True)
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
        answer = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)
        ours = anew.generate(GPT.from_pretrained(str(run)).eval(), [ids], 8, None, temperature=0)
        assert answer[0, len(ids) :].tolist() == ours[0][: answer.size(1) - len(ids)]


def talk_to(run: Path, typed: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "anew", "chat", str(run), "--temperature", "0"]
    command += ["--device", "cpu", "--precision", "fp32", *arguments]
    return subprocess.run(command, input=typed, capture_output=True, text=True, timeout=120)


def test_conversation_in_a_terminal(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    typed = f"{QUESTION.content}\n/save {file}\n/reset\n{QUESTION.content}\nAnd 8?\n\nnot read\n"
    done = talk_to(run, typed)
    assert done.returncode == 0, done.stderr
    [line] = conversations_in(file)
    question, answer = from_json(line)
    assert question == QUESTION
    assert answer.role == "assistant"
    # A new conversation begins as the first one did.
    assert done.stdout.startswith(f"{answer.content}\n{answer.content}\n")
    assert "2 messages added to" in done.stderr
    assert "A new conversation." in done.stderr


def test_long_conversation_goes_on_without_its_oldest_messages(run: Path) -> None:
    done = talk_to(run, "Hello there, how are you?\n" * 9, "--tokens", "16")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 9
    assert "(the model does not see the" in done.stderr
    done = talk_to(run, "x" * 400 + "\nHello\n")
    assert "the message is too long" in done.stderr
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 1


def test_model_of_texts_does_not_chat(base: Path) -> None:
    done = talk_to(base, "Hello\n")
    assert done.returncode == 2
    assert "was not trained to chat" in done.stderr


def test_evaluation_scores_the_answers(run: Path) -> None:
    done = start("evaluate", run, "--task", "val", "--json", "--device", "cpu")
    out, err = done.communicate(timeout=120)
    assert done.returncode == 0, err
    figures = json.loads(out.splitlines()[-1])["tasks"]["val"]
    result = [row for row in run_log.read_metrics(run) if "val/loss" in row][-1]
    assert figures["loss"] == pytest.approx(result["val/loss"], rel=1e-5)


def test_recipe_needs_a_model_and_conversations(
    base: Path, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="the chat recipe needs a model"):
        anew.recipe("chat", data="x.jsonl")
    with pytest.raises(UserError, match="there is no conversation in"):
        train(chat_config(base, text_file, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# --- The server


@pytest.fixture(scope="module")
def client(run: Path, base: Path) -> Iterator[openai.OpenAI]:
    with (
        served(str(run), str(base)) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as opened,
    ):
        yield opened


def test_openai_client_talks(client: openai.OpenAI, run: Path) -> None:
    talk = [*numbered(3)[2], QUESTION]
    settings: Any = {
        "model": str(run),
        "messages": as_dicts(talk),
        "max_tokens": 20,
        "temperature": 0.7,
        "seed": 3,
    }
    answer = client.chat.completions.create(**settings)
    ids = encode(BYTES, talk, asks_reply=True)
    model = GPT.from_pretrained(str(run)).eval()
    [expected] = anew.generate(model, [ids], 20, 256, temperature=0.7, seed=3)
    is_ended = len(expected) < 20
    text = BYTES.decode(expected)
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content == text
    assert choice.finish_reason == ("stop" if is_ended else "length")
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.object == "chat.completion"
    parts = list(
        client.chat.completions.create(
            **settings, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(part.choices[0].delta.content for part in parts if part.choices) == text
    assert parts[0].object == "chat.completion.chunk"
    assert parts[-1].usage.prompt_tokens == len(ids)
    two = client.chat.completions.create(**{**settings, "n": 2})
    assert len(two.choices) == 2


def test_parts_of_a_message_and_a_developer_are_understood(
    client: openai.OpenAI, run: Path
) -> None:
    common: Any = {"model": str(run), "temperature": 0, "max_completion_tokens": 10}
    plain = client.chat.completions.create(
        **common,
        messages=[{"role": "system", "content": "Hi"}, {"role": "user", "content": "What is 4?"}],
    )
    parts: Any = [{"type": "text", "text": "What is"}, {"type": "text", "text": " 4?"}]
    other = client.chat.completions.create(
        **common,
        messages=[{"role": "developer", "content": "Hi"}, {"role": "user", "content": parts}],
    )
    assert plain.choices[0].message.content == other.choices[0].message.content


def test_long_conversation_is_answered_and_says_what_was_left_out(
    client: openai.OpenAI, run: Path
) -> None:
    talk = [message for one in numbered(20) for message in one] + [QUESTION]
    request: Any = {"model": str(run), "messages": as_dicts(talk), "max_tokens": 10}
    answer: Any = client.chat.completions.create(**request)
    assert answer.messages_left_out > 0
    assert answer.usage.prompt_tokens <= 246


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"messages": []}, "messages should be a list of objects"),
        (
            {"messages": [{"role": "robot", "content": "x"}]},
            "messages: role should be 'system', 'developer', 'user' or 'assistant'.",
        ),
        ({"messages": [{"role": "user"}]}, "the content of message 1 should be a text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "the content of message 1 should be a text",
        ),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "message is too long"),
        ({"logprobs": True}, "logprobs is not supported"),
        ({"tools": [{"type": "function"}]}, "'tools' is not a field"),
    ],
)
def test_invalid_request_is_one_sentence(
    client: openai.OpenAI, run: Path, settings: dict[str, Any], words: str
) -> None:
    request: Any = {"model": str(run), "messages": as_dicts([QUESTION]), "max_tokens": 4}
    extra = {name: value for name, value in settings.items() if name == "tools"}
    known = {name: value for name, value in settings.items() if name != "tools"}
    with pytest.raises(openai.BadRequestError, match=words) as error:
        client.chat.completions.create(**{**request, **known}, extra_body=extra)
    assert "\n" not in str(error.value.body)


def test_model_of_texts_refuses_a_conversation(client: openai.OpenAI, base: Path) -> None:
    messages: Any = as_dicts([QUESTION])
    with pytest.raises(openai.BadRequestError, match="was not trained to chat; use /v1/complet"):
        client.chat.completions.create(model=str(base), messages=messages)
