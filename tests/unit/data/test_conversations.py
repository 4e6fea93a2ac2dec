"""Reading conversations, and cutting them into training sequences."""

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from anew import Tokenizer, UserError
from anew.cli.main import main
from anew.data import prepare, sources
from anew.data.conversation_files import conversations_in, parse
from anew.data.conversations import Conversations, validation_windows
from anew.data.dataset import open_data
from anew.data.holdout import Settings
from anew.data.shards import DataFolder
from anew.tokenizer.chat import Message, encode, from_json
from tests.support.conversations import as_dicts, numbered, write_talks

GPT2 = Tokenizer.named("gpt2")
TALK = [Message("user", "Hello"), Message("assistant", "Hi!")]


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepared(talks: list[list[Message]], folder: Path, **settings: Any) -> DataFolder:
    path = write_talks(folder / "talks.jsonl", talks)
    source = sources.find(str(path), conversations=True)
    return prepare.prepare_data(source, Settings("gpt2", **settings), folder / "data")


# --- reading --------------------------------------------------------------------------------------


def test_every_format_gives_the_same_conversations(tmp_path: Path) -> None:
    rows = [{"messages": as_dicts(TALK)}]
    write_rows(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    write_rows(tmp_path / "b.jsonl", [{"prompt": "Hello", "response": "Hi!"}])
    write_rows(tmp_path / "c.jsonl", [{"question": "Hello", "answer": "Hi!"}])
    (tmp_path / "d.csv").write_text("id,prompt,response\n1,Hello,Hi!\n")
    (tmp_path / "e.txt").write_text("User: Hello\nAssistant: Hi!\n")
    (tmp_path / "f.txt").write_text("---\nuser:\nHello\n\nassistant:\nHi!\n---\n\n")
    for path in sorted(tmp_path.iterdir()):
        [line] = conversations_in(path)
        talk = [Message(role, content.strip()) for role, content in from_json(line)]
        assert talk == TALK, path.name


def test_text_may_hold_several_conversations_and_turns(tmp_path: Path) -> None:
    path = tmp_path / "talks.txt"
    path.write_text(
        "system: Be kind.\nuser: a: b\nassistant: c\nd\nuser: e\nassistant: f\n---\n"
        "user: g\nassistant: h\n"
    )
    first, second = (from_json(line) for line in conversations_in(path))
    roles = [message.role for message in first]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert first[1].content.strip() == "a: b"
    assert first[2].content.strip() == "c\nd"
    assert second[1].content.strip() == "h"
    assert len(list(conversations_in(path, skip=1))) == 1


MALFORMED: dict[str, list[Any]] = {
    "no messages": [None, [], "Hello", {"role": "user"}, 5],
    "a message without a role": [[{"content": "Hello"}], ["Hello"], [{"role": 3, "content": ""}]],
    "the role 'tool' where it cannot be": [[{"role": "tool", "content": "x"}]],
    "the role 'system' where it cannot be": [as_dicts([*TALK, Message("system", "x")])],
    "a message that is not text": [
        [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "image"}]}],
    ],
    "an empty message": [[{"role": "user", "content": " \n"}]],
    "no answer of the assistant": [as_dicts(TALK[:1])],
}


@pytest.mark.parametrize(
    ("reason", "row"), [(reason, row) for reason, rows in MALFORMED.items() for row in rows]
)
def test_malformed_conversation_is_left_out_and_counted(
    reason: str, row: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match=reason):
        parse(row)
    good = {"messages": as_dicts(TALK)}
    path = write_rows(tmp_path / "talks.jsonl", [good, {"messages": row}, good])
    with caplog.at_level("WARNING", "anew"):
        assert len(list(conversations_in(path))) == 2
    assert f"left out 1 conversation (1: {reason})" in caplog.text


@pytest.mark.parametrize("content", ["not JSON\n", '{"text": "Hello"}\n', '["a"]\n'])
def test_file_without_a_conversation_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "talks.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match='no conversation in talks: a row needs "messages"'):
        open_data(str(path), "gpt2", conversations=True)


def test_text_without_turns_is_refused_with_the_form_of_a_text(tmp_path: Path) -> None:
    path = tmp_path / "talks.txt"
    path.write_text("Once upon a time\n")
    with pytest.raises(UserError, match='each turn of a text begins with a line "user:"'):
        open_data(str(path), "gpt2", conversations=True)


def test_keys_of_rows_without_messages_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"dialogue": [{"role": "user", "content": "Hello"}], "id": 3}
    path = write_rows(tmp_path / "talks.jsonl", [{"messages": as_dicts(TALK)}, row])
    assert len(list(conversations_in(path))) == 1
    assert "left out 1 conversation (1: no messages among dialogue, id)" in caplog.text


def test_rows_of_sharegpt_are_read(tmp_path: Path) -> None:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    turns = [{"from": names[message.role], "value": message.content} for message in TALK]
    path = write_rows(tmp_path / "talks.jsonl", [{"conversations": turns}, {"conversations": 3}])
    [line] = conversations_in(path)
    assert from_json(line) == TALK


def test_null_columns_of_other_forms_are_ignored(tmp_path: Path) -> None:
    rows = [
        {"messages": None, "conversations": None, "prompt": "Hello", "response": "Hi!"},
        {"messages": as_dicts(TALK), "conversations": None, "prompt": None, "response": None},
    ]
    path = write_rows(tmp_path / "talks.jsonl", rows)
    assert [from_json(line) for line in conversations_in(path)] == [TALK, TALK]


@pytest.mark.parametrize("name", [["human"], {"a": 1}, 3, None])
def test_name_of_a_speaker_that_is_no_text_is_left_out_and_counted(
    name: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"conversations": [{"from": name, "value": "x"}]}
    path = write_rows(tmp_path / "talks.jsonl", [row, {"messages": as_dicts(TALK)}])
    assert len(list(conversations_in(path))) == 1
    assert "left out 1 conversation (1: a message without a role)" in caplog.text


def test_line_that_is_nested_too_deeply_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "talks.jsonl"
    good = json.dumps({"messages": as_dicts(TALK)})
    path.write_text("[" * 200_000 + "\n" + good + "\n")
    assert len(list(conversations_in(path))) == 1


def test_conversations_that_are_read_as_texts_are_named(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "talks.jsonl", [{"messages": as_dicts(TALK)}])
    with pytest.raises(UserError, match="has conversations; prepare it with --conversations"):
        list(sources.find(str(path)).documents())


def test_folder_may_have_files_without_conversations(tmp_path: Path) -> None:
    folder = tmp_path / "talks"
    folder.mkdir()
    (folder / "README.md").write_text("About these talks\n")
    write_talks(folder / "a.jsonl", numbered(20))
    assert open_data(str(folder), "gpt2", conversations=True).n_tokens("train")


def test_text_of_windows_and_input_of_an_instruction_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"user: Hello\r\nassistant: Hi!\r\n---\r\nuser: a\r\nassistant: b\r\n")
    first, second = (from_json(line) for line in conversations_in(path))
    assert first == [Message("user", "Hello\n"), Message("assistant", "Hi!\n")]
    assert second[1].content.strip() == "b"
    row = {"instruction": "Translate.", "input": "Hello", "output": "Hallo"}
    [line] = conversations_in(write_rows(tmp_path / "b.jsonl", [row]))
    assert from_json(line)[0] == Message("user", "Translate.\n\nHello")


def test_bytes_of_another_encoding_are_not_replaced_in_silence(tmp_path: Path) -> None:
    row = json.dumps({"prompt": "Wie?", "response": "schön"}, ensure_ascii=False)
    good = json.dumps({"prompt": "How?", "response": "well"})
    path = tmp_path / "a.jsonl"
    path.write_bytes(f"{good}\n".encode() * 2000 + f"{row}\n".encode("latin-1"))
    with pytest.raises(UserError, match="line 2001 is not in the encoding of the file"):
        list(conversations_in(path))


# --- preparing ------------------------------------------------------------------------------------


def test_folder_has_every_conversation_once(tmp_path: Path) -> None:
    talks = numbered(60)
    folder = prepared(talks, tmp_path)
    found = []
    for split in ("train", "val"):
        for shard in folder.splits[split]:
            text = GPT2.decode(shard.tokens.tolist())
            found += [part for part in text.split("<|endoftext|><|endoftext|>") if part]
    whole = [GPT2.decode(encode(GPT2, talk)) for talk in talks]
    expected = [text.removeprefix("<|endoftext|>").removesuffix("<|endoftext|>") for text in whole]
    trimmed = [text.removeprefix("<|endoftext|>").removesuffix("<|endoftext|>") for text in found]
    assert sorted(trimmed) == sorted(expected)
    assert folder.conversations


def test_prepare_command_prepares_and_shows_conversations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_talks(tmp_path / "talks.jsonl", numbered(60))
    out = str(tmp_path / "data")
    main(["prepare", str(path), "--conversations", "--out", out])
    printed = capsys.readouterr().out
    assert "60 documents" in printed
    assert f"anew train chat --init MODEL --data {out}" in printed
    main(["prepare", "--show", out, "--json"])
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    folder = DataFolder.open(tmp_path / "data")
    conversations = Conversations(folder.splits["train"], GPT2, 1024, seed=0)
    assert sum(facts["lengths"].values()) == conversations.epoch_sequences - 1


def test_texts_and_conversations_are_not_taken_for_one_another(
    text_file: Path, tmp_path: Path
) -> None:
    talks = prepared(numbered(30), tmp_path)
    with pytest.raises(UserError, match="has conversations; train on them with anew train chat"):
        open_data(str(talks.path), "gpt2")
    assert open_data(str(talks.path), "gpt2", conversations=True).n_tokens("train")
    texts = prepare.prepare_data(sources.find(str(text_file)), Settings("gpt2"), tmp_path / "texts")
    with pytest.raises(UserError, match="anew prepare FILE --conversations"):
        open_data(str(texts.path), "gpt2", conversations=True)


def test_a_preparation_is_not_continued_in_another_form(tmp_path: Path) -> None:
    folder = prepared(numbered(30), tmp_path)
    progress = {"settings": {}, "source": "x", "revision": "y", "threshold": 0, "format": 1}
    (folder.path / "index.json").unlink()
    source = sources.find(str(tmp_path / "talks.jsonl"), conversations=True)
    progress |= {"source": source.name, "revision": source.revision}
    progress["settings"] = dataclasses.asdict(Settings("gpt2"))
    (folder.path / prepare.PROGRESS).write_text(json.dumps(progress))
    with pytest.raises(UserError, match="was begun with other settings or another text"):
        prepare.prepare_data(source, Settings("gpt2"), folder.path)
    with pytest.raises(UserError, match="conversations are held out whole"):
        prepare.prepare_data(source, Settings("gpt2", validation="first"), tmp_path / "new")


def test_the_same_file_is_kept_apart_as_text_and_as_conversations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANEW_CACHE", str(tmp_path / "cache"))
    rows = [{"text": f"text {n}", "messages": as_dicts(TALK)} for n in range(40)]
    path = write_rows(tmp_path / "both.jsonl", rows)
    talks = open_data(str(path), "gpt2", conversations=True)
    texts = open_data(str(path), "gpt2")
    assert talks.path != texts.path
    assert talks.identity != texts.identity
    assert open_data(str(path), "gpt2", conversations=True).path == talks.path


# --- training sequences ---------------------------------------------------------------------------


def rows_of_epoch(conversations: Conversations, epoch: int) -> list[list[int]]:
    first = epoch * conversations.epoch_sequences
    numbers = range(first, first + conversations.epoch_sequences)
    return [conversations.row(number)[0].tolist() for number in numbers]


def test_epoch_has_every_conversation_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    folder = prepared(numbered(60), tmp_path)
    conversations = Conversations(folder.splits["train"], GPT2, 1024, seed=3)
    first, second = rows_of_epoch(conversations, 0), rows_of_epoch(conversations, 1)
    assert first != second
    assert sorted(first) == sorted(second)
    again = Conversations(folder.splits["train"], GPT2, 1024, seed=3)
    assert rows_of_epoch(again, 1) == second
    other = Conversations(folder.splits["train"], GPT2, 1024, seed=4)
    assert rows_of_epoch(other, 0) != first
    talks = {tuple(encode(GPT2, talk)[:-1]) for talk in numbered(60)}
    assert {tuple(row) for row in first} <= talks
    assert len(first) == conversations.epoch_sequences > 40


@pytest.mark.guarantee("chat")
def test_only_answers_are_targets(tmp_path: Path) -> None:
    folder = prepared(numbered(30), tmp_path)
    conversations = Conversations(folder.splits["train"], GPT2, 1024, seed=3)
    for number in range(conversations.epoch_sequences):
        inputs, targets = conversations.row(number)
        parts = GPT2.decode([*inputs.tolist(), GPT2.end_of_text]).split("<|endoftext|>")
        answers = [part.removeprefix("assistant\n") for part in parts if part.startswith("assist")]
        scored = GPT2.decode(targets[targets != -100].tolist())
        assert scored == "".join(f"{answer}<|endoftext|>" for answer in answers)
        position = np.flatnonzero(targets != -100)
        following = [*inputs.tolist()[1:], GPT2.end_of_text]
        assert [following[i] for i in position] == targets[position].tolist()


@pytest.mark.parametrize("equal_groups", [True, False])
@pytest.mark.parametrize("size", [1, 2, 8])
def test_micro_batches_have_the_rows_of_the_step_padded(
    size: int, equal_groups: bool, tmp_path: Path
) -> None:
    folder = prepared(numbered(60), tmp_path)
    conversations = Conversations(folder.splits["train"], GPT2, 256, seed=3)
    micro_batches = conversations.micro_batches(16, 8, size, equal_groups)
    assert len(micro_batches) == 8 // size or not equal_groups
    assert len(micro_batches) <= 8 // size
    rows = []
    widths = []
    for ids, targets in micro_batches:
        assert ids.shape == targets.shape
        assert ids.size <= size * 256
        assert len(ids) == size or not equal_groups
        widths.append(ids.shape[1])
        for row, row_targets in zip(ids.tolist(), targets.tolist(), strict=True):
            n_inputs = max(i for i, target in enumerate(row_targets) if target != -100) + 1
            assert set(row[n_inputs:]) <= {GPT2.end_of_text}
            rows.append(row[:n_inputs])
    assert widths == sorted(widths), "rows of similar length are together"
    assert all(width % 16 == 0 for width in widths)
    expected = [conversations.row(number)[0].tolist() for number in range(16, 24)]
    assert sorted(rows) == sorted(expected)
    n_inputs, n_targets = conversations.sizes(16, 8)
    assert n_inputs == sum(map(len, expected))
    assert n_targets == sum(int((targets != -100).sum()) for _, targets in micro_batches)


def test_long_conversations_are_cut_and_those_without_an_answer_left_out(tmp_path: Path) -> None:
    talks = [
        [Message("user", "short"), Message("assistant", "yes")],
        [Message("user", "word " * 40), Message("assistant", "too late")],
        [Message("user", "hi"), Message("assistant", "long answer " * 40)],
    ]
    folder = prepared(talks, tmp_path, val_tokens=0)
    conversations = Conversations(folder.splits["train"], GPT2, 32, seed=1)
    assert conversations.epoch_sequences == 2
    assert conversations.n_left_out == 1
    assert conversations.n_cut == 2
    longest = max(rows_of_epoch(conversations, 0), key=len)
    assert longest == encode(GPT2, talks[2])[:32]
    assert Conversations(folder.splits["train"], GPT2, 3, seed=1).epoch_sequences == 0


def test_message_of_ten_megabytes_is_cut(tmp_path: Path) -> None:
    talks = [
        [Message("user", "short"), Message("assistant", "yes")],
        [Message("user", "Tell me."), Message("assistant", "word " * 2_000_000)],
        [Message("user", "a" * 10_000_000), Message("assistant", "too late")],
    ]
    folder = prepared(talks, tmp_path, val_tokens=0)
    conversations = Conversations(folder.splits["train"], GPT2, 64, seed=1)
    assert (conversations.epoch_sequences, conversations.n_cut) == (2, 2)
    assert conversations.n_left_out == 1


@pytest.mark.parametrize("shard_tokens", [50, 51, 64, 77, 1000])
def test_conversations_cut_by_the_end_of_a_shard_are_left_out(
    shard_tokens: int, tmp_path: Path
) -> None:
    talks = numbered(40)
    folder = prepared(talks, tmp_path, shard_tokens=shard_tokens, val_tokens=0)
    conversations = Conversations(folder.splits["train"], GPT2, 1024, seed=1)
    whole = {tuple(encode(GPT2, talk)[:-1]) for talk in talks}
    found = [tuple(row) for row in rows_of_epoch(conversations, 0)]
    assert set(found) <= whole
    assert len(set(found)) == len(found)
    n_cut = len(folder.splits["train"]) - 1
    assert len(whole) - n_cut <= len(found)


def test_validation_has_each_conversation_once(tmp_path: Path) -> None:
    folder = prepared(numbered(200), tmp_path)
    rows = []
    for ids, targets in validation_windows(folder, "val", 256, 10**9, batch=4):
        assert ids.shape == targets.shape
        rows += ids.tolist()
    talks = Conversations(folder.splits["val"], GPT2, 256, seed=0)
    assert len(rows) == talks.epoch_sequences
    some = list(validation_windows(folder, "val", 256, 60, batch=4))
    assert 1 <= sum(len(ids) for ids, _ in some) < len(rows)
