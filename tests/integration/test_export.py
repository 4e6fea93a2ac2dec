"""Exported models compute the same in transformers, onnxruntime and (if installed) llama.cpp."""

import ctypes
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from anew import GPT, Tokenizer
from anew.checkpoint.gguf import write_gguf
from anew.cli.main import main
from anew.config.config import Config
from tests.support import shared
from tests.support.exports import (
    GGUF_DTYPES,
    TEXT,
    check_gguf_reads_back,
    lively_model,
    saved_model,
)

NEEDS_LLAMA_CPP = "opt-in: pip install llama-cpp-python (it compiles for some minutes)"


@pytest.fixture(scope="module", params=["gpt2", "bytes"])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[GPT, Tokenizer, Path]:
    tokenizer = Tokenizer.named(request.param)
    folder = tmp_path_factory.mktemp("model")
    return saved_model(folder, tokenizer), tokenizer, folder


def test_hugging_face_folder_computes_the_same_in_transformers(
    model: tuple[GPT, Tokenizer, Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gpt, tokenizer, folder = model
    out = tmp_path / "new" / "hf"
    main(["export", str(folder), "--to", "hf", "--out", str(out)])
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    their_tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer.encode(TEXT)
    assert their_tokenizer(TEXT)["input_ids"] == ids
    assert their_tokenizer.decode(ids) == TEXT
    batch = torch.tensor([ids])
    with torch.no_grad():
        assert (theirs(batch).logits - gpt(batch)).abs().max() <= 2e-5
    assert "AutoModelForCausalLM" in (out / "README.md").read_text()
    assert [path.name for path in out.parent.iterdir()] == ["hf"], "no temporary folder is left"


def test_exporting_an_export_gives_equal_files(
    model: tuple[GPT, Tokenizer, Path], tmp_path: Path
) -> None:
    _, _, folder = model
    once = tmp_path / "once"
    twice = tmp_path / "twice"
    main(["export", str(folder), "--to", "hf", "--out", str(once)])
    main(["export", str(once), "--to", "hf", "--out", str(twice)])
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        content = (folder / name).read_bytes()
        assert (once / name).read_bytes() == content, name
        assert (twice / name).read_bytes() == content, name


def test_export_of_a_published_model_leaves_its_weights_unchanged(tmp_path: Path) -> None:
    source = shared("tiny_gpt2")
    main(["export", str(source), "--to", "hf", "--out", str(tmp_path / "hf")])
    before = {
        f"transformer.{name.removeprefix('transformer.')}": tensor
        for name, tensor in load_file(source / "model.safetensors").items()
    }
    after = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_model_card_of_a_run_has_its_figures(
    tiny: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from anew.training.trainer import train

    result = train(tiny)
    main(["evaluate", str(result.folder), "--task", "val", "--json"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])["tasks"]["val"]
    assert figures["loss"] == pytest.approx(result.val_loss, rel=1e-6)
    main(["export", str(result.folder), "--to", "hf", "--out", str(tmp_path / "hf")])
    card = (tmp_path / "hf" / "README.md").read_text()
    assert f"| validation loss | {result.val_loss:.4f} nats a token at step 12 (fp32) |" in card
    assert "| tokens | 1,536 (128 a step) |" in card
    assert f"| val | loss | {figures['loss']:.4f} |" in card


def test_onnx_computes_the_same_for_any_batch_and_length(
    model: tuple[GPT, Tokenizer, Path], tmp_path: Path
) -> None:
    import onnxruntime

    gpt, _, folder = model
    main(["export", str(folder), "--to", "onnx", "--out", str(tmp_path / "model.onnx")])
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for shape in ((1, 1), (1, 64), (3, 7), (5, 32)):
        ids = torch.randint(gpt.config.vocab_size, shape)
        [logits] = session.run(["logits"], {"ids": ids.numpy()})
        with torch.no_grad():
            assert np.abs(logits - gpt(ids).numpy()).max() <= 2e-5


@pytest.mark.parametrize("dtype", GGUF_DTYPES)
def test_gguf_with_the_vocabulary_of_gpt2_reads_back(dtype: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.named("gpt2")
    gpt = saved_model(tmp_path, tokenizer)
    check_gguf_reads_back(gpt, tokenizer, tmp_path, tmp_path / "model.gguf", dtype)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_llama_cpp_computes_the_same_logits(
    model: tuple[GPT, Tokenizer, Path], dtype: str, tmp_path: Path
) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason=NEEDS_LLAMA_CPP)
    gpt, tokenizer, _ = model
    write_gguf(tmp_path / "model.gguf", gpt, tokenizer, dtype, "test")
    llama = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=64, logits_all=True, verbose=False)
    ids = tokenizer.encode(TEXT)[:60]
    assert llama.tokenize(tokenizer.decode(ids).encode(), add_bos=False) == ids
    llama.eval(ids)
    theirs = np.array(llama.scores[: len(ids)])
    with torch.no_grad():
        ours = gpt(torch.tensor([ids]))[0].numpy()
    # llama.cpp keeps its cache in f16.
    tolerance = {"f32": 0.02, "f16": 0.02, "bf16": 0.2}[dtype]
    assert np.abs(ours - theirs).max() <= tolerance
    second, first = np.sort(ours, axis=1)[:, -2:].T
    is_clear = first - second > tolerance
    assert is_clear.mean() > 0.2
    assert (ours.argmax(1) == theirs.argmax(1))[is_clear].all()


def test_q8_0_equals_the_quantization_of_llama_cpp_bit_for_bit(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason=NEEDS_LLAMA_CPP)
    import gguf

    tokenizer = Tokenizer.named("gpt2")
    gpt = lively_model(tokenizer.n_vocab, n_embd=256)
    for dtype in ("f32", "q8_0"):
        write_gguf(tmp_path / f"{dtype}.gguf", gpt, tokenizer, dtype, "test")
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
    outcome = llama_cpp.llama_model_quantize(
        str(tmp_path / "f32.gguf").encode(),
        str(tmp_path / "theirs.gguf").encode(),
        ctypes.byref(settings),
    )
    assert outcome == 0
    ours, theirs = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors}
        for name in ("q8_0", "theirs")
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.tensor_type == theirs[name].tensor_type
        assert np.array_equal(tensor.data, theirs[name].data), name
