"""What is exported computes elsewhere what it computes here: transformers, onnxruntime, and (where it is built) the real llama.cpp."""

import ctypes
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from anew import GPT, GPTConfig, Tokenizer, UserError
from anew.checkpoint import huggingface as weights
from anew.checkpoint.export import write_gguf
from anew.cli.main import main
from anew.config.schema import Config
from tests.support import shared

TEXT = "The king crosses the river, and 12 ships leave.\n  def it(self):"


def lively(**shape: int) -> GPT:
    """A model whose logits differ clearly, as a trained one's do."""
    model = GPT(
        GPTConfig(**{"n_layer": 2, "n_head": 2, "n_embd": 64, "n_positions": 64} | shape), seed=3
    ).eval()  # type: ignore[arg-type]
    for p in model.transformer.parameters():
        p.data.mul_(5 if p.ndim == 2 else 1)
    return model


@pytest.fixture(scope="module", params=["gpt2", "bytes"])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[GPT, Tokenizer, Path]:
    tokenizer = Tokenizer.named(request.param)
    gpt, folder = lively(vocab_size=tokenizer.n_vocab), tmp_path_factory.mktemp("model")
    weights.save_model(folder, gpt, tokenizer)
    return gpt, tokenizer, folder


def test_hugging_face_folder(model: tuple[GPT, Tokenizer, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gpt, tokenizer, folder = model
    out = tmp_path / "new" / "hf"
    main(["export", str(folder), "--to", "hf", "--out", str(out)])
    theirs, their_tokenizer = (
        AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(out),
    )
    ids = tokenizer.encode(TEXT)
    assert their_tokenizer(TEXT)["input_ids"] == ids
    assert their_tokenizer.decode(ids) == TEXT
    with torch.no_grad():
        assert (theirs(torch.tensor([ids])).logits - gpt(torch.tensor([ids]))).abs().max() <= 2e-5
    again = tmp_path / "again"
    main(["export", str(out), "--to", "hf", "--out", str(again)])
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (
            (again / name).read_bytes() == (out / name).read_bytes() == (folder / name).read_bytes()
        ), name
    assert "AutoModelForCausalLM" in (out / "README.md").read_text()
    assert [p.name for p in out.parent.iterdir()] == ["hf"], "nothing is left beside it"


def test_the_real_tiny_gpt2_goes_through_unchanged(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    source = shared("tiny_gpt2")
    main(["export", str(source), "--to", "hf", "--out", str(tmp_path / "hf")])
    before, after = (
        load_file(source / "model.safetensors"),
        load_file(tmp_path / "hf" / "model.safetensors"),
    )
    before = {
        name if name.startswith("transformer.") else f"transformer.{name}": t
        for name, t in before.items()
    }
    assert all(torch.equal(after[name], before[name]) for name in after)


def test_a_run_has_its_figures_on_the_card(
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


def test_onnx_for_any_batch_and_length(model: tuple[GPT, Tokenizer, Path], tmp_path: Path) -> None:
    import onnxruntime

    gpt, _, folder = model
    main(["export", str(folder), "--to", "onnx", "--out", str(tmp_path / "model.onnx")])
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for shape in ((1, 1), (1, 64), (3, 7), (5, 32)):
        ids = torch.randint(gpt.config.vocab_size, shape)
        [logits] = session.run(["logits"], {"ids": ids.numpy()})
        with torch.no_grad():
            assert np.abs(logits - gpt(ids).numpy()).max() <= 2e-5


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
def test_gguf_reads_back(model: tuple[GPT, Tokenizer, Path], dtype: str, tmp_path: Path) -> None:
    import gguf

    gpt, tokenizer, folder = model
    path = tmp_path / "model.gguf"
    main(["export", str(folder), "--to", "gguf", "--out", str(path), "--dtype", dtype])
    reader = gguf.GGUFReader(path)
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    spacing = {"f32": 0, "f16": 2**-10, "bf16": 2**-7, "q8_0": 2**-6}[dtype]
    own = dict(gpt.transformer.named_parameters())
    pairs = {
        "token_embd.weight": own["wte.weight"][: tokenizer.n_vocab], "output.weight": own["wte.weight"][: tokenizer.n_vocab],
        "position_embd.weight": own["wpe.weight"], "blk.1.attn_qkv.weight": own["h.1.attn.c_attn.weight"].t(),
        "blk.0.ffn_down.weight": own["h.0.mlp.c_proj.weight"].t(), "blk.1.ffn_up.bias": own["h.1.mlp.c_fc.bias"],
        "output_norm.weight": own["ln_f.weight"],
    }  # fmt: skip
    for name, expected in pairs.items():
        stored = tensors[name].reshape(expected.shape)
        assert (
            np.abs(stored - expected.detach().numpy()).max()
            <= spacing * expected.detach().abs().max().item()
        ), name
    assert len(tensors) == 5 + 12 * gpt.config.n_layer
    assert np.array_equal(tensors["position_embd.weight"], own["wpe.weight"].detach().numpy())
    value = {name: reader.fields[name].contents() for name in reader.fields}
    assert value["general.architecture"] == "gpt2"
    assert (
        value["gpt2.block_count"],
        value["gpt2.attention.head_count"],
        value["gpt2.context_length"],
    ) == (2, 2, 64)
    assert value["gpt2.attention.layer_norm_epsilon"] == pytest.approx(1e-5)
    assert value["tokenizer.ggml.tokens"][-1] == "<|endoftext|>"
    assert len(value["tokenizer.ggml.tokens"]) == tokenizer.n_vocab


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_the_real_llama_cpp_writes_the_same_tokens(
    model: tuple[GPT, Tokenizer, Path], dtype: str, tmp_path: Path
) -> None:
    llama_cpp = pytest.importorskip(
        "llama_cpp", reason="opt-in: pip install llama-cpp-python (it compiles for some minutes)"
    )
    gpt, tokenizer, _ = model
    write_gguf(tmp_path / "model.gguf", gpt, tokenizer, dtype, "test")
    llama = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=64, logits_all=True, verbose=False)
    ids = tokenizer.encode(TEXT)[:60]
    assert llama.tokenize(tokenizer.decode(ids).encode(), add_bos=False) == ids
    llama.eval(ids)
    theirs = np.array(llama.scores[: len(ids)])
    with torch.no_grad():
        ours = gpt(torch.tensor([ids]))[0].numpy()
    assert (
        np.abs(ours - theirs).max() <= {"f32": 0.02, "f16": 0.02, "bf16": 0.2}[dtype]
    )  # llama.cpp keeps its cache in f16
    second, first = np.sort(ours, axis=1)[:, -2:].T
    clear = first - second > {"f32": 0.02, "f16": 0.02, "bf16": 0.2}[dtype]
    assert clear.mean() > 0.2
    assert (ours.argmax(1) == theirs.argmax(1))[clear].all()


def test_q8_0_is_llama_cpps_own_bit_for_bit(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip(
        "llama_cpp", reason="opt-in: pip install llama-cpp-python (it compiles for some minutes)"
    )
    import gguf

    gpt, tokenizer = lively(n_embd=256, vocab_size=50257), Tokenizer.named("gpt2")
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
        {t.name: t for t in gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors}
        for name in ("q8_0", "theirs")
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.tensor_type == theirs[name].tensor_type
        assert np.array_equal(tensor.data, theirs[name].data), name


def test_wrong_wishes_are_refused(
    model: tuple[GPT, Tokenizer, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from anew.checkpoint.export import export

    _, _, folder = model
    with pytest.raises(UserError, match="no format"):
        export(str(folder), "tflite", tmp_path / "x")
    with pytest.raises(UserError, match="others keep f32"):
        export(str(folder), "hf", tmp_path / "x", "f16")
    with pytest.raises(UserError, match="exists already"):
        export(str(folder), "hf", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing_half_written(
    model: tuple[GPT, Tokenizer, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anew.checkpoint import export

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gguf.GGUFWriter.write_tensors_to_file", full)
    with pytest.raises(OSError, match="No space"):
        export.export(str(model[2]), "gguf", tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []
