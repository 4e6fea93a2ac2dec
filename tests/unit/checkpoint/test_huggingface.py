"""A folder of ours is a Hugging Face folder and the other way round, and nothing else passes for one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from anew import GPT, GPTConfig, Tokenizer, UserError
from anew.checkpoint import huggingface as weights
from tests.support import shared

SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=32, n_positions=24, vocab_size=257)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    out = tmp_path / "model"
    out.mkdir()
    weights.save_model(out, GPT(SMALL, seed=4), Tokenizer.named("bytes"))
    return out


def test_logits_of_the_124m_configuration_equal_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = GPT(GPTConfig(), seed=6).eval()
    weights.save_model(tmp_path, model, Tokenizer.named("gpt2"))
    other = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.randint(50257, (1, 256), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = model(ids), other(ids).logits
        assert ours.shape == theirs.shape == (1, 256, 50257)
        assert (ours - theirs).abs().max() <= 2e-5
        loss = other(input_ids=ids, labels=ids).loss
        assert model(ids[:, :-1], ids[:, 1:]).item() == pytest.approx(loss.item(), rel=1e-6)


def test_a_wrong_gelu_would_be_noticed(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = GPT.from_pretrained(str(folder))
    for p in model.transformer.h.parameters():
        p.data.mul_(6)  # activations as large as in a trained model
    weights.save_model(folder, model, Tokenizer.named("bytes"))
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(24)[None]
    with torch.no_grad():
        right = (model(ids) - other(ids).logits).abs().max().item()
        monkeypatch.setattr("anew.model.gpt.gelu", torch.nn.functional.gelu)
        wrong = (model(ids) - other(ids).logits).abs().max().item()
    assert wrong > 20 * right


def test_the_real_tiny_gpt2_loads_from_either_file(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = shared("tiny_gpt2")
    ids = torch.randint(50257, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model = GPT.from_pretrained(str(source))
        theirs = (
            AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()(ids).logits
        )
        assert (model(ids) - theirs).abs().max() <= 1e-6
    for name in ("config.json", "pytorch_model.bin"):
        shutil.copy(source / name, tmp_path / name)
    from_bin = GPT.from_pretrained(str(tmp_path))
    for a, b in zip(model.parameters(), from_bin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_round_trip_is_the_identity(folder: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    again.mkdir()
    weights.save_model(again, GPT.from_pretrained(str(folder)), Tokenizer.named("bytes"))
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert load_file(folder / "model.safetensors")["transformer.wte.weight"].shape == (257, 32)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_other_writers_names_are_understood(folder: Path) -> None:
    original = GPT.from_pretrained(str(folder))

    def old_style(t: dict[str, torch.Tensor]) -> None:
        for name in list(t):
            t[name.removeprefix("transformer.")] = t.pop(name)
        t["h.0.attn.bias"] = torch.ones(1, 1, 24, 24)
        t["h.0.attn.masked_bias"] = torch.tensor(-1e4)
        t["lm_head.weight"] = t["wte.weight"].clone()

    edit(folder, old_style)
    for a, b in zip(
        original.parameters(), GPT.from_pretrained(str(folder)).parameters(), strict=True
    ):
        assert torch.equal(a, b)


C_FC = "transformer.h.1.mlp.c_fc.weight"


@pytest.mark.parametrize(("harm", "words"), [
    (lambda t: t.pop(C_FC), C_FC),
    (lambda t: t.update(extra=torch.ones(1)), "transformer.extra"),
    (lambda t: t.update({C_FC: t[C_FC].t().contiguous()}), r"c_fc.weight has shape \(128, 32\)"),
    (lambda t: t[C_FC].__setitem__((0, 0), float("nan")), "c_fc.weight holds values that are not finite"),
    (lambda t: t.update({C_FC: t[C_FC].to(torch.int32)}), "c_fc.weight holds values"),
    (lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"] + 1}), "lm_head.weight differs"),
    (lambda t: t.update({"transformer.wte.weight": t["transformer.wte.weight"][:200].clone()}), r"wte.weight has shape \(200, 32\)"),
    (lambda t: t[C_FC].__setitem__((0, 0), float("inf")), "c_fc.weight holds values that are not finite"),
    (lambda t: [t.update({name.replace("transformer.h.", "model.layers."): t.pop(name)}) for name in list(t)], "lacks transformer.h.0"),
    (lambda t: t.pop("transformer.wte.weight"), "lacks transformer.wte.weight"),
    (lambda t: t.update({"h.1.mlp.c_fc.weight": t[C_FC] + 1}), "c_fc.weight twice"),
    (lambda t: t.update({"transformer.wpe.weight": t["transformer.wpe.weight"][:8].clone()}), r"wpe.weight has shape \(8, 32\)"),
    (lambda t: t.clear(), "lacks"),
])  # fmt: skip
def test_wrong_tensors_are_refused_by_name(
    folder: Path, harm: Callable[[dict[str, torch.Tensor]], object], words: str
) -> None:
    edit(folder, harm)
    with pytest.raises(UserError, match=words):
        GPT.from_pretrained(str(folder))


@pytest.mark.parametrize(("change", "words"), [
    ({"activation_function": "gelu"}, "activation_function"), ({"model_type": "gptj"}, "model_type"), ({"n_inner": 99}, "n_inner"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"), ({"scale_attn_weights": False}, "scale_attn_weights"),
    ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"), ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"n_head": 4}, "says n_head 4, and these weights were made with 2"), ({"n_layer": 3}, "lacks"), ({"n_layer": 1}, "unknown"),
    ({"vocab_size": 300}, "wte.weight has shape"), ({"n_positions": 12}, "wpe.weight has shape"), ({"n_head": 5}, "describes no GPT-2"),
    ({"n_embd": 0}, "describes no GPT-2"), ({"n_embd": "wide"}, "cannot be used"),
])  # fmt: skip
def test_configs_that_are_no_gpt2_are_refused(
    folder: Path, change: dict[str, object], words: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=words):
        GPT.from_pretrained(str(folder))


def test_folders_that_are_no_model(folder: Path, tmp_path: Path) -> None:
    for name in ("nowhere", str(tmp_path)):
        with pytest.raises(UserError, match="is not a model"):
            GPT.from_pretrained(name)
    (folder / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(UserError, match="cannot be read"):
        GPT.from_pretrained(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        GPT.from_pretrained(str(folder))


def test_heads_of_openais_own_shapes_are_known(tmp_path: Path) -> None:
    """Nothing in a tensor's shape says how many heads there are; transformers computes another function without a word."""
    config = weights.hf_config(GPTConfig(n_head=16))
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="n_head 16, and these weights were made with 12"):
        weights.read_config(tmp_path)


def test_weights_in_several_files(folder: Path) -> None:
    original = GPT.from_pretrained(str(folder))
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {
        "model-00001-of-00002.safetensors": names[:9],
        "model-00002-of-00002.safetensors": names[9:],
    }
    (folder / "model.safetensors").unlink()
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    for a, b in zip(
        original.parameters(), GPT.from_pretrained(str(folder)).parameters(), strict=True
    ):
        assert torch.equal(a, b)
    path.write_text(json.dumps({"weight_map": {**index["weight_map"], "more": next(iter(parts))}}))
    with pytest.raises(UserError, match="more is not where"):
        GPT.from_pretrained(str(folder))
    path.write_text(
        json.dumps({"weight_map": {**index["weight_map"], names[0]: "model-00003.safetensors"}})
    )
    with pytest.raises(UserError, match=r"lacks model-00003\.safetensors"):
        GPT.from_pretrained(str(folder))
    first, second = parts
    swapped = {
        name: second if file == first else first for name, file in index["weight_map"].items()
    }
    path.write_text(json.dumps({"weight_map": swapped}))
    with pytest.raises(UserError, match="is not where"):
        GPT.from_pretrained(str(folder))
    path.write_text(json.dumps({"weight_map": {**index["weight_map"], names[0]: None}}))
    with pytest.raises(UserError, match="cannot be read"):
        GPT.from_pretrained(str(folder))
    path.write_text(json.dumps(index))
    before = weights.sha256(folder)
    edited = load_file(folder / first)
    edited[names[0]][0] += 1
    save_file(edited, folder / first)
    assert weights.sha256(folder) != before, (
        "other weights are another model, also in several files"
    )
    path.write_text("[]")
    with pytest.raises(UserError, match="cannot be read"):
        GPT.from_pretrained(str(folder))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matrices_are_cast_once_for_use(folder: Path, dtype: torch.dtype) -> None:
    model = weights.load_model(str(folder), dtype=dtype)
    kinds = {name.split(".")[-2]: p.dtype for name, p in model.named_parameters()}
    assert {kinds[name] for name in ("wte", "c_attn", "c_proj", "c_fc")} == {dtype}
    assert {kinds[name] for name in ("wpe", "ln_1", "ln_f")} == {torch.float32}
    slow = GPT.from_pretrained(str(folder))
    slow.compute_dtype = dtype
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert (model(ids).float() - slow(ids).float()).abs().max() < 0.02


class Malicious:
    """Unpickling this would run a command."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, ("touch executed",)


def test_pickled_code_is_refused_and_not_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"wte.weight": Malicious()}, folder / "pytorch_model.bin")
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match="no plain file of tensors"):
        GPT.from_pretrained(str(folder))
    assert not (folder / "executed").exists()
