"""Exports of small models; tests/integration/test_export.py runs them in other programs."""

from pathlib import Path

import pytest

from anew import Tokenizer, UserError
from anew.checkpoint.export import export_model
from tests.support.exports import GGUF_DTYPES, check_gguf_reads_back, saved_model

BYTES = Tokenizer.named("bytes")


@pytest.mark.parametrize("dtype", GGUF_DTYPES)
def test_gguf_reads_back(dtype: str, tmp_path: Path) -> None:
    gpt = saved_model(tmp_path, BYTES)
    check_gguf_reads_back(gpt, BYTES, tmp_path, tmp_path / "model.gguf", dtype)


def test_unknown_formats_and_dtypes_and_existing_targets_are_refused(tmp_path: Path) -> None:
    saved_model(tmp_path, BYTES)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UserError, match="no format"):
        export_model(str(tmp_path), "tflite", out / "x")
    with pytest.raises(UserError, match="hf, which supports f32"):
        export_model(str(tmp_path), "hf", out / "x", "f16")
    with pytest.raises(UserError, match="exists already"):
        export_model(str(tmp_path), "hf", out)
    assert list(out.iterdir()) == []


def test_gguf_has_a_modelfile_and_overwrites_none(tmp_path: Path) -> None:
    gpt = saved_model(tmp_path, BYTES)
    out = tmp_path / "new" / "mine.gguf"
    export_model(str(tmp_path), "gguf", out)
    beside = tmp_path / "new" / "mine.gguf.Modelfile"
    instructions = dict(line.split(maxsplit=1) for line in beside.read_text().splitlines())
    assert (beside.parent / instructions["FROM"]).samefile(out)
    assert instructions["TEMPLATE"] == "{{ .Prompt }}"
    assert instructions["PARAMETER"] == f"num_ctx {gpt.config.n_positions}"
    out.unlink()
    with pytest.raises(UserError, match=r"mine\.gguf\.Modelfile exists already"):
        export_model(str(tmp_path), "gguf", out)
    assert not out.exists()


def test_missing_package_of_a_format_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anew.checkpoint.export.find_spec", lambda package: None)
    with pytest.raises(UserError, match="needs gguf; run: pip install gguf"):
        export_model(str(tmp_path), "gguf", tmp_path / "x.gguf")


def test_full_disk_leaves_no_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    saved_model(tmp_path, BYTES)
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr("gguf.GGUFWriter.write_tensors_to_file", fail)
    with pytest.raises(OSError, match="No space"):
        export_model(str(tmp_path), "gguf", out / "x.gguf")
    assert list(out.iterdir()) == []
