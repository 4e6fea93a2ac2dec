"""Export a model for other programs: a Hugging Face folder, a GGUF file or an ONNX graph.

    anew export runs/mine --to hf --out my-gpt2                 # transformers
    anew export gpt2 --to gguf --out gpt2-q8.gguf --dtype q8_0  # llama.cpp, ollama, LM Studio
    anew export runs/mine --to onnx --out model.onnx            # onnxruntime

To add a format: write a module with a function that writes the file, as gguf.py does; add the name
of the format to FORMATS here and to the flag `--to` in cli/export.py; add a branch to `export`.
"""

from importlib.util import find_spec
from pathlib import Path

from anew.checkpoint.gguf import DTYPES, write_gguf
from anew.checkpoint.huggingface import find_model, load_model, save_for_sharing
from anew.checkpoint.onnx import write_onnx
from anew.errors import UserError, missing_packages, unknown_name
from anew.tokenizer.bpe import Tokenizer
from anew.utils.files import atomic_file, atomic_folder

# Format -> the packages that it needs, which are in the extra "export".
FORMATS: dict[str, list[str]] = {
    "hf": [],
    "gguf": ["gguf"],
    "onnx": ["onnx", "onnxscript"],
}


def export_model(model: str, to: str, out: Path, dtype: str = "f32", readme: str = "") -> None:
    """Write a model to `out` in the format `to`; `out` appears only when it is complete.

    `dtype` is the type of the matrices in a GGUF file; the other formats keep fp32. `readme` is the
    README.md of a Hugging Face folder.
    """
    _check(to, out, dtype)
    path = find_model(model).resolve()
    gpt = load_model(path)
    tokenizer = Tokenizer.of_model(path, gpt.config.vocab_size)
    out.parent.mkdir(parents=True, exist_ok=True)
    if to == "hf":
        with atomic_folder(out) as folder:
            save_for_sharing(folder, gpt, tokenizer, readme)
    elif to == "gguf":
        with atomic_file(out) as file:
            write_gguf(file, gpt, tokenizer, dtype, name=out.stem)
        with atomic_file(modelfile(out)) as file:
            file.write_text(_modelfile_text(out, gpt.config.n_positions), encoding="utf-8")
    elif to == "onnx":
        write_onnx(out, gpt)


def modelfile(out: Path) -> Path:
    """Return the path of the Modelfile beside a GGUF file, for `ollama create NAME -f PATH`."""
    return out.with_name(f"{out.name}.Modelfile")


def _modelfile_text(out: Path, n_positions: int) -> str:
    """Return what Ollama needs to continue a text, with no frame of a conversation around it.

    FROM is relative to the Modelfile (https://docs.ollama.com/modelfile).
    """
    return f"FROM ./{out.name}\nTEMPLATE {{{{ .Prompt }}}}\nPARAMETER num_ctx {n_positions}\n"


def _check(to: str, out: Path, dtype: str) -> None:
    """Raise UserError if the export cannot work."""
    if to not in FORMATS:
        raise unknown_name("format", to, FORMATS)
    dtypes = list(DTYPES) if to == "gguf" else ["f32"]
    if dtype not in dtypes:
        raise UserError(
            f"--dtype {dtype} cannot be exported to {to}, which supports {', '.join(dtypes)}."
        )
    for path in [out, modelfile(out)] if to == "gguf" else [out]:
        if path.exists():
            raise UserError(f"{path} exists already; choose another --out or remove it.")
    if not all(find_spec(package) for package in FORMATS[to]):
        raise missing_packages(f"--to {to}", *FORMATS[to])
