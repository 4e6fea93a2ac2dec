"""Other projects' checkpoints compute here what they compute there."""

import dataclasses
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from anew import GPT, UserError
from anew.checkpoint import tensorflow as tf_checkpoint
from anew.cli.main import main
from tests.support import ROOT

RELEASE = ROOT / "tests" / "fixtures" / "tf_release"


@dataclasses.dataclass
class GPTConfig:
    """The config object that build-nanogpt pickles, from its `__main__`."""

    block_size: int = 16
    vocab_size: int = 50304
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 16


GPTConfig.__module__, GPTConfig.__qualname__ = "__main__", "GPTConfig"


class Theirs(nn.Module):
    """A GPT-2 as nanoGPT and build-nanogpt lay it out: nn.Linear, (out, in)."""

    def __init__(self, c: GPTConfig, bias: bool = True, gelu: str = "tanh") -> None:
        super().__init__()
        self.gelu = gelu
        C = c.n_embd
        self.n_head = c.n_head
        blocks = [
            nn.ModuleDict({
                "ln_1": nn.LayerNorm(C, bias=bias), "ln_2": nn.LayerNorm(C, bias=bias),
                "attn": nn.ModuleDict({"c_attn": nn.Linear(C, 3 * C, bias=bias), "c_proj": nn.Linear(C, C, bias=bias)}),
                "mlp": nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C, bias=bias), "c_proj": nn.Linear(4 * C, C, bias=bias)}),
            })
            for _ in range(c.n_layer)
        ]  # fmt: skip
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(c.vocab_size, C), "wpe": nn.Embedding(c.block_size, C), "h": nn.ModuleList(blocks),
            "ln_f": nn.LayerNorm(C, bias=bias),
        })  # fmt: skip
        self.lm_head = nn.Linear(C, c.vocab_size, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        t = self.transformer
        B, T = ids.shape
        x = t["wte"](ids) + t["wpe"](torch.arange(T))
        for block in t["h"]:
            q, k, v = (
                part.view(B, T, self.n_head, -1).transpose(1, 2)
                for part in block["attn"]["c_attn"](block["ln_1"](x)).chunk(3, dim=-1)
            )
            y = (
                F.scaled_dot_product_attention(q, k, v, is_causal=True)
                .transpose(1, 2)
                .reshape(B, T, -1)
            )
            x = x + block["attn"]["c_proj"](y)
            x = x + block["mlp"]["c_proj"](
                F.gelu(block["mlp"]["c_fc"](block["ln_2"](x)), approximate=self.gelu)
            )
        return self.lm_head(t["ln_f"](x))[..., :50257]


def checkpoint(kind: str) -> tuple[Theirs, dict]:
    torch.manual_seed(7)
    config = GPTConfig()
    model = Theirs(
        config,
        bias=kind != "nanogpt without biases",
        gelu="tanh" if kind == "build-nanogpt" else "none",
    ).eval()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    if kind == "build-nanogpt":
        return model, {"model": weights, "config": config, "step": 19072, "val_loss": 3.07}
    weights = {f"_orig_mod.{name}": tensor for name, tensor in weights.items()}
    weights["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    arguments = {**dataclasses.asdict(config), "bias": kind == "nanogpt", "dropout": 0.0}
    optimizer = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}},
        "param_groups": [{"lr": 6e-4}],
    }
    best = torch.tensor(2.85)
    return model, {
        "model": weights,
        "optimizer": optimizer,
        "model_args": arguments,
        "iter_num": 5,
        "best_val_loss": best,
        "config": {},
    }


def save(content: object, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "GPTConfig", GPTConfig, raising=False)
    torch.save(content, path)
    monkeypatch.delattr(sys.modules["__main__"], "GPTConfig")


@pytest.mark.parametrize("kind", ["nanogpt", "nanogpt without biases", "build-nanogpt"])
def test_pt_files_compute_the_same(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, content = checkpoint(kind)
    save(content, tmp_path / "ckpt.pt", monkeypatch)
    ours = GPT.from_pretrained(str(tmp_path / "ckpt.pt"))
    ids = torch.randint(50257, (2, 16))
    with torch.no_grad():
        far = (ours(ids) - theirs(ids)).abs().max()
        if kind != "build-nanogpt":  # nanoGPT's GELU is another one: it must be the only difference
            assert 2e-5 < far < 2e-3
            theirs.gelu = "tanh"
            far = (ours(ids) - theirs(ids)).abs().max()
        assert far <= 2e-5


def test_a_pt_file_becomes_a_hugging_face_folder_and_can_be_trained_further(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    theirs, content = checkpoint("build-nanogpt")
    save(content, tmp_path / "model_19072.pt", monkeypatch)
    main(["export", str(tmp_path / "model_19072.pt"), "--to", "hf", "--out", str(tmp_path / "hf")])
    ids = torch.randint(50257, (2, 16))
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
        assert (again(ids).logits - theirs(ids)).abs().max() <= 2e-5
    flags = [
        "--steps",
        "2",
        "--seq-len",
        "16",
        "--batch-tokens",
        "64",
        "--micro-batch",
        "4",
        "--evaluate-every",
        "0",
        "--precision",
        "fp32",
    ]
    main(
        [
            "train",
            "finetune",
            "--init",
            str(tmp_path / "model_19072.pt"),
            "--data",
            str(text_file),
            "--out",
            str(tmp_path / "run"),
            *flags,
        ]
    )
    assert (tmp_path / "run" / "checkpoints" / "step-00000002" / "model.safetensors").is_file()


def rename(weights: dict, old: str, new: str) -> None:
    weights[new] = weights.pop(old)


FC = "_orig_mod.transformer.h.1.mlp.c_fc.weight"


@pytest.mark.parametrize(("harm", "words"), [
    (lambda c: c.pop("model"), "no 'model' in it"),
    (lambda c: c.pop("model_args"), "which shape"),
    (lambda c: c["model"].pop(FC), "lacks transformer.h.1.mlp.c_fc.weight"),
    (lambda c: c["model"].update(extra=torch.ones(1)), "unknown extra"),
    (lambda c: c["model"].update({FC: c["model"][FC].t()}), "has shape"),
    (lambda c: c["model"][FC].fill_(torch.inf), "not finite"),
    (lambda c: c["model_args"].update(n_layer=3), "lacks"),
    (lambda c: c["model_args"].update(n_embd="wide"), "which shape"), (lambda c: c["model_args"].update(n_head=0), "describes no GPT-2"),
    (lambda c: c["model_args"].update(n_head=5), "describes no GPT-2"), (lambda c: c["model_args"].update(vocab_size=65), "has shape"),
    (lambda c: c["model_args"].update(n_layer=12, n_embd=768, n_head=24), "n_head 24, and these weights were made with 12"),
    (lambda c: c.update(model={"a": 1}), "is not a tensor"),
])  # fmt: skip
def test_wrong_pt_files_are_refused(
    harm: object, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, content = checkpoint("nanogpt")
    harm(content)  # type: ignore[operator]
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=words):
        GPT.from_pretrained(str(tmp_path / "ckpt.pt"))


class Malicious:
    """Unpickling this would run a command."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch executed",)


def test_code_in_a_pt_file_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Malicious(), "model_args": {}}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="more than tensors and plain values"):
        GPT.from_pretrained("ckpt.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint at all")
    with pytest.raises(UserError, match=r"cannot be read as a checkpoint|more than tensors"):
        GPT.from_pretrained("text.pt")
    assert not (tmp_path / "executed").exists()


# --- OpenAI's TensorFlow release -----------------------------------------------------------------------------------------------------


def written() -> dict[str, np.ndarray]:
    """What TensorFlow was given when it wrote the fixture."""
    spec = importlib.util.spec_from_file_location("make", RELEASE / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.tensors()


def test_a_checkpoint_written_by_tensorflow_is_read_bit_for_bit() -> None:
    found, expected = tf_checkpoint.read(RELEASE / "model.ckpt"), written()
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_the_release_is_a_model(tmp_path: Path) -> None:
    model, values = GPT.from_pretrained(str(RELEASE)), written()
    own = dict(model.named_parameters())
    assert model.config.n_head == 2
    assert np.array_equal(
        own["transformer.h.1.mlp.c_fc.weight"].detach(), values["model/h1/mlp/c_fc/w"][0]
    )
    assert np.array_equal(own["transformer.ln_f.bias"].detach(), values["model/ln_f/b"])
    assert np.array_equal(own["transformer.wte.weight"].detach()[:257], values["model/wte"])
    main(["export", str(RELEASE), "--to", "hf", "--out", str(tmp_path / "hf")])
    again = GPT.from_pretrained(str(tmp_path / "hf"))
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )


def test_every_flipped_byte_and_every_cut_of_the_release_is_noticed(tmp_path: Path) -> None:
    shutil.copytree(RELEASE, tmp_path / "release")
    random = np.random.RandomState(1)
    for name in ("model.ckpt.index", "model.ckpt.data-00000-of-00001"):
        path = tmp_path / "release" / name
        good = path.read_bytes()
        for at in random.choice(len(good), 60, replace=False):
            bad = bytearray(good)
            bad[at] ^= 16
            path.write_bytes(bad)
            try:
                found = tf_checkpoint.read(tmp_path / "release" / "model.ckpt")
            except UserError:
                continue
            expected = (
                written()
            )  # a byte that nothing points to, or a restart point: then nothing is different
            assert found.keys() == expected.keys()
            assert all(np.array_equal(found[key], expected[key]) for key in expected)
        path.write_bytes(good[: len(good) // 2])
        with pytest.raises(UserError, match="cannot be read"):
            tf_checkpoint.read(tmp_path / "release" / "model.ckpt")
        path.write_bytes(good)


def test_a_release_with_other_hparams_is_refused(tmp_path: Path) -> None:
    shutil.copytree(RELEASE, tmp_path / "release")
    path = tmp_path / "release" / "hparams.json"
    hparams = json.loads(path.read_text())
    for change, words in (
        ({"n_layer": 3}, "lacks"),
        ({"n_layer": 1}, "unknown"),
        ({"n_ctx": 8}, "has shape"),
        ({"n_embd": None}, "hparams"),
    ):
        path.write_text(json.dumps(hparams | change))
        with pytest.raises(UserError, match=words):
            GPT.from_pretrained(str(tmp_path / "release"))


@pytest.mark.parametrize("size", [0, 1, 9, 4095, 4096, 4097, 20_000])
def test_crc32c_is_the_published_one(size: int) -> None:
    def slowly(data: bytes) -> int:
        register = 0xFFFFFFFF
        for byte in data:
            register ^= byte
            for _ in range(8):
                register = (register >> 1) ^ (0x82F63B78 if register & 1 else 0)
        return register ^ 0xFFFFFFFF

    assert tf_checkpoint.crc32c(b"123456789") == 0xE3069283  # RFC 3720, appendix B.4's check value
    data = np.random.RandomState(size).bytes(size)
    assert tf_checkpoint.crc32c(data) == slowly(data)
