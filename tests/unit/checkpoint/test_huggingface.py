"""Model folders are written and read without loss, and what is not a GPT-2 is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from anew import GPT, GPTConfig, Tokenizer, UserError
from anew.checkpoint.huggingface import (
    find_model,
    load_model,
    model_sha256,
    read_config,
    save_model,
    to_hf_config,
)

Tensors = dict[str, torch.Tensor]

C_FC = "transformer.h.1.mlp.c_fc.weight"
WTE = "transformer.wte.weight"
WPE = "transformer.wpe.weight"
SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=32, n_positions=24, vocab_size=257)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    out = tmp_path / "model"
    out.mkdir()
    save_model(out, GPT(SMALL, seed=4), Tokenizer.named("bytes"))
    return out


def assert_same_weights(a: GPT, b: GPT) -> None:
    for ours, theirs in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_reading_and_writing_gives_an_equal_file(folder: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    again.mkdir()
    save_model(again, GPT.from_pretrained(str(folder)), Tokenizer.named("bytes"))
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert load_file(folder / "model.safetensors")["transformer.wte.weight"].shape == (257, 32)


def edit(folder: Path, change: Callable[[Tensors], object]) -> None:
    """Change the weights in `folder`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_names_and_masks_of_older_transformers_are_read(folder: Path) -> None:
    original = GPT.from_pretrained(str(folder))

    def old_style(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 24, 24)
        tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["lm_head.weight"] = tensors["wte.weight"].clone()

    edit(folder, old_style)
    assert_same_weights(original, GPT.from_pretrained(str(folder)))


def rename_layers(tensors: Tensors) -> None:
    for name in list(tensors):
        tensors[name.replace("transformer.h.", "model.layers.")] = tensors.pop(name)


@pytest.mark.guarantee("gpt2")
@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda t: t.pop(C_FC), C_FC),
        (lambda t: t.pop(WTE), "lacks transformer.wte.weight"),
        (lambda t: t.clear(), "lacks"),
        (rename_layers, "lacks transformer.h.0"),
        (lambda t: t.update(extra=torch.ones(1)), "transformer.extra"),
        (lambda t: t.update({"h.1.mlp.c_fc.weight": t[C_FC] + 1}), "c_fc.weight twice"),
        (lambda t: t.update({"lm_head.weight": t[WTE] + 1}), "lm_head.weight differs"),
        (
            lambda t: t.update({C_FC: t[C_FC].t().contiguous()}),
            r"c_fc.weight has shape \(128, 32\)",
        ),
        (lambda t: t.update({WTE: t[WTE][:200].clone()}), r"wte.weight has shape \(200, 32\)"),
        (lambda t: t.update({WPE: t[WPE][:8].clone()}), r"wpe.weight has shape \(8, 32\)"),
        (lambda t: t[C_FC][0, 0].fill_(torch.nan), "c_fc.weight has values that are not finite"),
        (lambda t: t[C_FC][0, 0].fill_(torch.inf), "c_fc.weight has values that are not finite"),
        (lambda t: t.update({C_FC: t[C_FC].to(torch.int32)}), "c_fc.weight has values"),
    ],
)
def test_wrong_tensors_are_refused_by_name(
    folder: Path, harm: Callable[[Tensors], object], words: str
) -> None:
    edit(folder, harm)
    with pytest.raises(UserError, match=words):
        GPT.from_pretrained(str(folder))


@pytest.mark.guarantee("gpt2")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"activation_function": "gelu"}, "activation_function"),
        ({"model_type": "gptj"}, "model_type"),
        ({"n_inner": 99}, "n_inner"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"n_head": 4}, "has n_head 4, and its weights were trained with 2"),
        ({"n_head": 5}, "does not describe a GPT-2"),
        ({"n_layer": 3}, "lacks"),
        ({"n_layer": 1}, "unknown"),
        ({"vocab_size": 300}, "wte.weight has shape"),
        ({"n_positions": 12}, "wpe.weight has shape"),
        ({"n_embd": 0}, "does not describe a GPT-2"),
        ({"n_embd": "wide"}, "cannot be used"),
    ],
)
def test_configs_that_do_not_describe_a_gpt2_are_refused(
    folder: Path, change: dict[str, object], words: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=words):
        GPT.from_pretrained(str(folder))


def test_folders_without_a_model_are_refused(folder: Path, tmp_path: Path) -> None:
    for name, words in (("nowhere", "no model at nowhere"), (str(tmp_path), "is not a model")):
        with pytest.raises(UserError, match=words):
            GPT.from_pretrained(name)
    (folder / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(UserError, match="cannot be read"):
        GPT.from_pretrained(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        GPT.from_pretrained(str(folder))


def test_wrong_number_of_heads_is_refused_for_the_shapes_of_openai(tmp_path: Path) -> None:
    """No tensor's shape depends on n_head, so transformers silently computes another function."""
    config = to_hf_config(GPTConfig(n_head=16))
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="n_head 16, and its weights were trained with 12"):
        read_config(tmp_path)


FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"


@pytest.fixture
def weight_map(folder: Path) -> dict[str, str]:
    """Split the weights in `folder` into two files and return which tensor is in which."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    for file, part in ((FIRST, names[:9]), (SECOND, names[9:])):
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = dict.fromkeys(names[:9], FIRST) | dict.fromkeys(names[9:], SECOND)
    write_index(folder, {"weight_map": weight_map})
    return weight_map


def write_index(folder: Path, content: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def test_weights_in_several_files_are_read(folder: Path, request: pytest.FixtureRequest) -> None:
    original = GPT.from_pretrained(str(folder))
    request.getfixturevalue("weight_map")
    assert_same_weights(original, GPT.from_pretrained(str(folder)))


def test_wrong_indexes_of_weights_are_refused(folder: Path, weight_map: dict[str, str]) -> None:
    name = min(weight_map)
    other = {FIRST: SECOND, SECOND: FIRST}
    swapped = {name: other[file] for name, file in weight_map.items()}
    for content, words in (
        ({"weight_map": {**weight_map, "more": FIRST}}, "more is not in the file"),
        (
            {"weight_map": {**weight_map, name: "model-3.safetensors"}},
            r"lacks model-3\.safetensors",
        ),
        ({"weight_map": swapped}, "is not in the file"),
        ({"weight_map": {**weight_map, name: None}}, "cannot be read"),
        ([], "cannot be read"),
    ):
        write_index(folder, content)
        with pytest.raises(UserError, match=words):
            GPT.from_pretrained(str(folder))


def test_sha256_depends_on_every_file_of_weights(folder: Path, weight_map: dict[str, str]) -> None:
    before = model_sha256(folder)
    tensors = load_file(folder / FIRST)
    tensors[min(tensors)][0] += 1
    save_file(tensors, folder / FIRST)
    assert model_sha256(folder) != before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matrices_are_cast_when_the_model_is_loaded(folder: Path, dtype: torch.dtype) -> None:
    model = load_model(str(folder), dtype=dtype)
    dtypes = {name.split(".")[-2]: p.dtype for name, p in model.named_parameters()}
    assert {dtypes[name] for name in ("wte", "c_attn", "c_proj", "c_fc")} == {dtype}
    assert {dtypes[name] for name in ("wpe", "ln_1", "ln_f")} == {torch.float32}
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
    with pytest.raises(UserError, match="not a plain file of tensors"):
        GPT.from_pretrained(str(folder))
    assert not (folder / "executed").exists()


def test_mistyped_run_is_refused_with_the_run_that_was_meant_and_without_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "shakespeare").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("anew.checkpoint.hub.download", lambda _: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match=r"did you mean runs/shakespeare\?"):
        find_model("runs/shakespear")


def test_path_of_a_run_is_looked_up_as_its_name_is(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="has no checkpoint yet"):
        GPT.from_pretrained(run)
    with pytest.raises(UserError, match="no model at"):
        GPT.from_pretrained(tmp_path / "runs" / "other")
    assert GPT.from_pretrained(folder).config == GPT.from_pretrained(str(folder)).config


def test_weights_are_readable_by_whom_other_files_are(folder: Path) -> None:
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1
