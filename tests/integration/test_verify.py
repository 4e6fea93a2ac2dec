"""`anew verify` passes healthy models and runs, and names what is wrong with the others."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from anew.checkpoint.folder import publish
from anew.checkpoint.huggingface import save_model
from anew.config.schema import GPTConfig
from anew.model.gpt import GPT
from anew.report import html
from anew.report.run import Run
from anew.tokenizer.bpe import Tokenizer
from anew.tokenizer.files import contents
from anew.training.trainer import train
from anew.utils.files import temporary_name
from anew.verify.published_logits import GPT2_124M, REFERENCES, check_published, read_reference
from tests.faults.common import tiny
from tests.support.commands import Finished, run
from tests.support.pages import text_of

GPT2 = Tokenizer.named("gpt2")
SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=16, n_positions=32)
TEXTS = ("Data visualization empowers users to", "The quick brown fox")


def write_reference(folder: Path, path: Path) -> None:
    """Write the logits that transformers computes as a file of published logits."""
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    readings = []
    for text in TEXTS:
        ids = GPT2.encode(text)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].double()
        top = logits.topk(20)
        readings.append(
            {
                "text": text,
                "token_ids": ids,
                "tolerance": 2e-5,
                "top": list(zip(top.indices.tolist(), top.values.tolist(), strict=True)),
                "sample": [(token, float(logits[token])) for token in range(0, 50257, 2500)],
                "log_sum_exp": float(logits.logsumexp(0)),
                "mean_logit": float(logits.mean()),
            }
        )
    path.write_text(json.dumps({"format": 1, "readings": readings}))


@pytest.fixture(scope="module")
def healthy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GPT-2 with GPT-2's tokenizer, and beside it logits.json with its logits."""
    path = tmp_path_factory.mktemp("healthy")
    model = GPT(SMALL, seed=7)
    with torch.no_grad():
        for parameter in model.transformer.h.parameters():
            parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(parameter.numel()))
        model.transformer.wpe.weight.mul_(10)
    (path / "model").mkdir()
    save_model(path / "model", model, GPT2)
    write_reference(path / "model", path / "logits.json")
    return path


@pytest.fixture
def model_folder(healthy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the healthy model, which counts as a released size with published logits."""
    monkeypatch.setattr("anew.verify.model.released_size", lambda config: "small")
    monkeypatch.setitem(REFERENCES, "small", healthy_model / "logits.json")
    return Path(shutil.copytree(healthy_model / "model", tmp_path / "model"))


@pytest.fixture(scope="module")
def healthy_run(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A run of six steps with checkpoints after three and after six."""
    folder = tmp_path_factory.mktemp("runs") / "healthy"
    config = tiny(
        folder,
        data=str(text_file),
        steps=6,
        batch_tokens=128,
        micro_batch=8,
        save_every=3,
    )
    train(config)
    return folder


@pytest.fixture
def run_folder(healthy_run: Path, tmp_path: Path) -> Path:
    """A copy of the healthy run."""
    return Path(shutil.copytree(healthy_run, tmp_path / "run"))


def results(done: Finished) -> dict[str, dict[str, str]]:
    """Return the checks of `verify --json` by name."""
    last = json.loads(done.stdout.splitlines()[-1])
    return {check["name"]: check for check in last["checks"]}


def statuses(done: Finished) -> dict[str, str]:
    return {name: check["status"] for name, check in results(done).items()}


def files_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return content and time of change of every file of a run but the results of `verify`."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and path.name != "verifications.jsonl"
    }


def test_healthy_model_passes(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = run(capsys, "verify", model_folder, "--json")
    assert done.code == 0
    assert statuses(done) == dict.fromkeys(
        ["weights", "architecture", "tensors", "tokenizer", "transformers", "reload", "logits"],
        "PASS",
    )
    assert "all 7 checks passed." in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()[:-1]) <= 80


def test_healthy_run_passes_and_is_not_changed(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_of(run_folder)
    done = run(capsys, "verify", run_folder, "--json")
    assert done.code == 0
    checks = results(done)
    assert {check["status"] for check in checks.values()} == {"PASS"}
    assert re.search(r"steps 4 to 6: losses and state equal bit", checks["replay"]["detail"])
    assert files_of(run_folder) == before
    assert max(len(line) for line in done.stdout.splitlines()[:-1]) <= 80


def test_first_checkpoint_is_reached_again_from_the_beginning(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run(capsys, "verify", run_folder / "checkpoints" / "step-00000003", "--json")
    assert done.code == 0
    assert "steps 1 to 3" in results(done)["replay"]["detail"]


# Damage to a model folder


def change_config(folder: Path, key: str, value: Any) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, key: value}), encoding="utf-8")


def change_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors in a safetensors file, keeping its metadata."""
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def swap_heads(tensors: dict[str, torch.Tensor]) -> None:
    """Exchange queries, keys and values of the two heads of the first block."""
    weight = tensors["transformer.h.0.attn.c_attn.weight"]  # (C, 3 C)
    width = weight.size(0)
    by_head = weight.view(width, 3, 2, width // 2)
    tensors["transformer.h.0.attn.c_attn.weight"] = by_head.flip(2).reshape(weight.shape)


def shift_positions(tensors: dict[str, torch.Tensor]) -> None:
    tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"].roll(1, 0)


def transpose_square(tensors: dict[str, torch.Tensor]) -> None:
    name = "transformer.h.1.attn.c_proj.weight"
    tensors[name] = tensors[name].T


def drop_tensor(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["transformer.h.1.ln_2.bias"]


def untie_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1e-3


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def use_other_tokenizer(folder: Path) -> None:
    """Write a tokenizer of the same size, in which the last two merges have changed places."""
    words = [merge.split(" ") for merge in GPT2.vocabulary().merges]
    words[-2:] = [words[-1], words[-2]]
    Tokenizer.of_words((left, right) for left, right in words).save(folder)


def change_merges_only(folder: Path) -> None:
    """Change merges.txt and leave tokenizer.json, which takes precedence, as it was."""
    lines = contents(GPT2.vocabulary(), 32)["merges.txt"].decode().splitlines()
    lines[-2:] = [lines[-1], lines[-2]]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def in_weights(
    change: Callable[[dict[str, torch.Tensor]], None],
) -> Callable[[Path], None]:
    return lambda folder: change_tensors(folder / "model.safetensors", change)


MODEL_DAMAGE: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "exact GELU": (
        lambda folder: change_config(folder, "activation_function", "gelu"),
        "architecture",
        "activation_function 'gelu' instead of 'gelu_new'",
    ),
    "layer-norm epsilon": (
        lambda folder: change_config(folder, "layer_norm_epsilon", 1e-6),
        "architecture",
        "layer_norm_epsilon 1e-06 instead of 1e-05",
    ),
    "swapped heads": (in_weights(swap_heads), "logits", "published figure"),
    "shifted positions": (in_weights(shift_positions), "logits", "published figure"),
    "transposed square matrix": (in_weights(transpose_square), "logits", "published figure"),
    "missing tensor": (in_weights(drop_tensor), "tensors", "lacks transformer.h.1.ln_2.bias"),
    "untied head": (in_weights(untie_head), "tensors", "lm_head.weight differs"),
    "truncated file": (
        lambda folder: truncate(folder / "model.safetensors"),
        "weights",
        "the file is damaged",
    ),
    "another tokenizer": (use_other_tokenizer, "tokenizer", "not those that OpenAI published"),
    "other merges": (change_merges_only, "tokenizer", "merges.txt is another tokenizer"),
}


@pytest.mark.parametrize("damage", MODEL_DAMAGE)
def test_damaged_model_fails_by_the_right_check(
    damage: str, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    break_it, name, reason = MODEL_DAMAGE[damage]
    break_it(model_folder)
    done = run(capsys, "verify", model_folder, "--json")
    assert done.code == 1
    found = results(done)
    assert [check for check in found if found[check]["status"] == "FAIL"] == [name]
    assert reason in found[name]["detail"]
    assert f"is not verified: {name} failed" in " ".join(done.stdout.split())


# Damage to a run


def newest(folder: Path) -> Path:
    return folder / "checkpoints" / "step-00000006"


def flip_bit(path: Path) -> None:
    """Flip the lowest bit of the last value: a change of one part in eight million."""
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)


def write_manifest_again(checkpoint: Path) -> None:
    """Give a changed checkpoint a manifest that its files match."""
    temporary = temporary_name(checkpoint)
    checkpoint.rename(temporary)
    (temporary / "manifest.json").unlink()
    publish(temporary, checkpoint)


def flip_bit_with_new_manifest(folder: Path) -> None:
    flip_bit(newest(folder) / "model.safetensors")
    write_manifest_again(newest(folder))


def change_loss(folder: Path) -> None:
    """Change the last digit of the loss of step 5."""
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if row["step"] == 5 and "train/loss" in row:
            row["train/loss"] = float(torch.nextafter(*torch.tensor([row["train/loss"], 9.0])))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def change_optimizer(checkpoint: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["exp_avg.transformer.h.0.mlp.c_fc.weight"] *= 1.01

    change_tensors(checkpoint / "optimizer.safetensors", change)
    write_manifest_again(checkpoint)


def swap_heads_in_checkpoint(folder: Path) -> None:
    change_tensors(newest(folder) / "model.safetensors", swap_heads)
    write_manifest_again(newest(folder))


RUN_DAMAGE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "flipped bit in the weights": (
        lambda folder: flip_bit(newest(folder) / "model.safetensors"),
        "manifest",
        "model.safetensors is missing or does not match",
    ),
    "flipped bit in the weights, new manifest": (
        flip_bit_with_new_manifest,
        "replay",
        "model.safetensors of step-00000006 is not what the steps give",
    ),
    "truncated optimizer": (
        lambda folder: truncate(newest(folder) / "optimizer.safetensors"),
        "manifest",
        "optimizer.safetensors is missing or does not match",
    ),
    "altered loss": (change_loss, "replay", "step 5 has loss"),
    "altered optimizer state": (
        lambda folder: change_optimizer(newest(folder)),
        "replay",
        "exp_avg.transformer.h.0.mlp.c_fc.weight differs",
    ),
    "altered optimizer state before": (
        lambda folder: change_optimizer(folder / "checkpoints" / "step-00000003"),
        "replay",
        "step 5 has loss",
    ),
    "swapped heads, new manifest": (
        swap_heads_in_checkpoint,
        "replay",
        "transformer.h.0.attn.c_attn.weight differs",
    ),
    "missing row": (
        lambda folder: (folder / "metrics.jsonl").write_text(
            "".join((folder / "metrics.jsonl").read_text().splitlines(keepends=True)[1:])
        ),
        "metrics",
        "no loss of step 1",
    ),
    "newer format": (
        lambda folder: change_config(folder, "format", 99),
        "formats",
        "update anew",
    ),
}


@pytest.mark.parametrize("damage", RUN_DAMAGE)
def test_damaged_run_fails_by_the_right_check(
    damage: str, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    break_it, name, reason = RUN_DAMAGE[damage]
    break_it(run_folder)
    done = run(capsys, "verify", run_folder, "--json")
    assert done.code == 1
    found = results(done)
    assert found[name]["status"] == "FAIL"
    assert reason in found[name]["detail"]


# What cannot be checked


def test_replay_without_the_data_is_not_run(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_folder / "config.json"
    content = json.loads(path.read_text())
    content["data"]["data"] = str(run_folder / "gone.txt")
    path.write_text(json.dumps(content))
    done = run(capsys, "verify", run_folder, "--json")
    assert done.code == 0
    replay = results(done)["replay"]
    assert replay["status"] == "not run"
    assert "there is no data" in replay["detail"]
    assert "1 could not be run" in done.stdout


def test_on_other_software_losses_must_only_be_close(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_folder / "run_state.json"
    content = json.loads(path.read_text())
    content["environment"]["torch"] = "2.11.0"
    path.write_text(json.dumps(content))
    change_loss(run_folder)
    done = run(capsys, "verify", run_folder, "--json")
    assert done.code == 0
    assert "torch 2.11.0 in the run" in results(done)["replay"]["detail"]
    metrics = run_folder / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    for row in rows:
        row["train/loss"] = 1.02 * row.get("train/loss", 1.0)
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert statuses(run(capsys, "verify", run_folder, "--json"))["replay"] == "FAIL"


def test_what_is_no_model_is_invalid_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("nothing", "."):
        done = run(capsys, "verify", tmp_path / name)
        assert done.code == 2
        assert len(done.stderr.splitlines()) == 1


def test_page_of_a_run_shows_its_last_verification(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "Verification" not in text_of(html.page([Run.read(run_folder)]))
    assert run(capsys, "verify", run_folder).code == 0
    change_loss(run_folder)
    assert run(capsys, "verify", run_folder).code == 1
    text = text_of(html.page([Run.read(run_folder)]))
    assert "anew verify of step 6, 20" in text
    assert "step 5 has loss" in text
    assert "equal bit for bit" not in text, "only the newest result is shown"


def test_random_124m_is_not_openais_but_equals_its_own_logits(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    model = GPT(GPTConfig(), seed=1).eval()
    save_model(folder, model, GPT2)
    write_reference(folder, tmp_path / "logits.json")
    own = check_published(model, GPT2, read_reference(tmp_path / "logits.json"))
    assert own.status == "PASS"
    assert own.detail.startswith("86 published figures of 2 texts")
    openais = check_published(model, GPT2, read_reference(GPT2_124M))
    assert openais.status == "FAIL"
    assert "after 'Data visualization empowers users to'" in openais.detail
