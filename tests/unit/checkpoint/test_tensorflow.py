"""OpenAI's release format is read bit for bit, and damage is noticed.

TensorFlow wrote tests/fixtures/tf_release; make.py there says how and with which values.
"""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from anew import GPT, UserError
from anew.checkpoint.tensorflow import read_arrays
from anew.cli.main import main
from tests.support import ROOT

RELEASE = ROOT / "tests" / "fixtures" / "tf_release"


@pytest.fixture(scope="module")
def written() -> dict[str, np.ndarray]:
    """Return what TensorFlow wrote."""
    spec = importlib.util.spec_from_file_location("make", RELEASE / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.tensors()


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """Return a copy of the release, which a test may change."""
    return Path(shutil.copytree(RELEASE, tmp_path / "release"))


def assert_equal_arrays(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert np.array_equal(found[name], array), name


def test_arrays_are_those_that_tensorflow_wrote(written: dict[str, np.ndarray]) -> None:
    assert_equal_arrays(read_arrays(RELEASE / "model.ckpt"), written)


def test_release_is_a_model(written: dict[str, np.ndarray]) -> None:
    model = GPT.from_pretrained(str(RELEASE))
    own = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert model.config.n_head == 2
    c_fc = written["model/h1/mlp/c_fc/w"][0]
    assert np.array_equal(own["transformer.h.1.mlp.c_fc.weight"], c_fc)
    assert np.array_equal(own["transformer.ln_f.bias"], written["model/ln_f/b"])
    assert np.array_equal(own["transformer.wte.weight"][:257], written["model/wte"])


def test_release_is_the_same_model_after_an_export(tmp_path: Path) -> None:
    main(["export", str(RELEASE), "--to", "hf", "--out", str(tmp_path / "hf")])
    model = GPT.from_pretrained(str(RELEASE))
    exported = GPT.from_pretrained(str(tmp_path / "hf"))
    for ours, theirs in zip(model.parameters(), exported.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["model.ckpt.index", "model.ckpt.data-00000-of-00001"])
def test_flipped_bits_are_noticed(name: str, release: Path, written: dict[str, np.ndarray]) -> None:
    path = release / name
    good = path.read_bytes()
    for position in np.random.RandomState(1).choice(len(good), 60, replace=False):
        bad = bytearray(good)
        bad[position] ^= 16
        path.write_bytes(bad)
        try:
            found = read_arrays(release / "model.ckpt")
        except UserError:
            continue
        # Nothing uses this byte, such as one of a restart point, so nothing may be different.
        assert_equal_arrays(found, written)


@pytest.mark.parametrize("name", ["model.ckpt.index", "model.ckpt.data-00000-of-00001"])
def test_truncated_files_are_refused(name: str, release: Path) -> None:
    path = release / name
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        read_arrays(release / "model.ckpt")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_layer": 3}, "lacks"),
        ({"n_layer": 1}, "unknown"),
        ({"n_ctx": 8}, "has shape"),
        ({"n_embd": None}, "hparams"),
    ],
)
def test_hparams_of_another_model_are_refused(
    change: dict[str, object], words: str, release: Path
) -> None:
    path = release / "hparams.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=words):
        GPT.from_pretrained(str(release))
