"""Export a model for other programs: a Hugging Face folder, a GGUF file, an ONNX graph, a web page.

    anew export runs/mine --to hf --out my-gpt2                 # transformers
    anew export gpt2 --to gguf --out gpt2-q8.gguf --dtype q8_0  # llama.cpp, ollama, LM Studio
    anew export runs/mine --to onnx --out model.onnx            # onnxruntime
    anew export runs/demo --to web --out page --dtype int8      # a browser

To add a format: write a module with a function that writes the file, as gguf.py does; add the name
of the format to FORMATS here and to the flag `--to` in cli/export.py; add a branch to `export`.
"""

from importlib.util import find_spec
from pathlib import Path

from anew.checkpoint import web
from anew.checkpoint.gguf import DTYPES, write_gguf
from anew.checkpoint.huggingface import find_model, load_model, save_for_sharing
from anew.checkpoint.onnx import write_onnx
from anew.errors import UserError, missing_packages, unknown_name
from anew.tokenizer.bpe import Tokenizer
from anew.tokenizer.chat import is_chat_model
from anew.tokenizer.files import END_OF_TEXT
from anew.utils.files import atomic_file, atomic_folder

# The form of tokenizer/chat.py in the language of Go's templates. They cannot replace characters of
# a message, such as those of the end-of-text token.
OLLAMA_CHAT_TEMPLATE = (
    f'"""{{{{- range .Messages }}}}{END_OF_TEXT}{{{{ .Role }}}}\n{{{{ .Content }}}}'
    f'{{{{- end }}}}{END_OF_TEXT}assistant\n"""'
)
# Format -> the packages that it needs, which are in the extra "export".
FORMATS: dict[str, list[str]] = {
    "hf": [],
    "gguf": ["gguf"],
    "onnx": ["onnx", "onnxscript"],
    "web": ["onnx", "onnxscript"],
}
DTYPES_OF = {"gguf": list(DTYPES), "web": list(web.GRAPHS)}  # the other formats keep fp32


def export_model(model: str, to: str, out: Path, dtype: str = "f32", readme: str = "") -> None:
    """Write a model to `out` in the format `to`; `out` appears only when it is complete.

    `dtype` is the type of the matrices in a GGUF file or a web page; the other formats keep fp32.
    `readme` is the README.md of a Hugging Face folder.
    """
    _check(to, out, dtype)
    path = find_model(model).resolve()
    gpt = load_model(path)
    tokenizer = Tokenizer.of_model(path, gpt.config.vocab_size)
    is_chat = is_chat_model(path)
    out.parent.mkdir(parents=True, exist_ok=True)
    if to == "hf":
        with atomic_folder(out) as folder:
            save_for_sharing(folder, gpt, tokenizer, readme, is_chat)
    elif to == "gguf":
        with atomic_file(out) as file:
            write_gguf(file, gpt, tokenizer, dtype, out.stem, is_chat)
        with atomic_file(modelfile(out)) as file:
            text = _modelfile_text(out, gpt.config.n_positions, is_chat)
            file.write_text(text, encoding="utf-8")
    elif to == "onnx":
        write_onnx(out, gpt)
    elif to == "web":
        with atomic_folder(out) as folder:
            web.write_web(folder, gpt, tokenizer, dtype, Path(model).resolve().name)


def modelfile(out: Path) -> Path:
    """Return the path of the Modelfile beside a GGUF file, for `ollama create NAME -f PATH`."""
    return out.with_name(f"{out.name}.Modelfile")


def _modelfile_text(out: Path, n_positions: int, is_chat: bool) -> str:
    """Return what Ollama needs to continue a text or, with `is_chat`, a conversation.

    FROM is relative to the Modelfile (https://docs.ollama.com/modelfile).
    """
    template = OLLAMA_CHAT_TEMPLATE if is_chat else "{{ .Prompt }}"
    stop = f'PARAMETER stop "{END_OF_TEXT}"\n' if is_chat else ""
    return f"FROM ./{out.name}\nTEMPLATE {template}\nPARAMETER num_ctx {n_positions}\n{stop}"


def _check(to: str, out: Path, dtype: str) -> None:
    """Raise UserError if the export cannot work."""
    if to not in FORMATS:
        raise unknown_name("format", to, FORMATS)
    dtypes = DTYPES_OF.get(to, ["f32"])
    if dtype not in dtypes:
        raise UserError(
            f"--dtype {dtype} cannot be exported to {to}, which supports {', '.join(dtypes)}."
        )
    for path in [out, modelfile(out)] if to == "gguf" else [out]:
        if path.exists():
            raise UserError(f"{path} exists already; choose another --out or remove it.")
    packages = FORMATS[to] + ["onnxruntime"] * (dtype == "int8")
    if not all(find_spec(package) for package in packages):
        raise missing_packages(f"--to {to}", *packages)
