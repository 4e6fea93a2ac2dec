"""Checks of a model folder or file: weights, architecture, tensors, tokenizer, other programs.

Each check reads its subject itself as far as possible, so that one defect is reported by the check
that is named after it, and the other checks still run.
"""

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anew.checkpoint import tensorflow
from anew.checkpoint.huggingface import load_model, read_config, read_tensors, save_model
from anew.config.schema import GPTConfig
from anew.config.values import tokenizer_matches
from anew.errors import UserError
from anew.evaluate.published import size_of
from anew.model.gpt import GPT
from anew.tokenizer import files
from anew.tokenizer.bpe import Tokenizer
from anew.tokenizer.files import TOKENIZER_JSON, Vocabulary
from anew.verify.result import Check, failed, not_run, passed

# SHA-256 of the tokenizer's files that OpenAI published (tokenizer/gpt2_bpe/PROVENANCE.md), under
# their names in a Hugging Face folder: encoder.json is vocab.json, vocab.bpe is merges.txt.
OPENAI_TOKENIZER = {
    "vocab.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "merges.txt": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
RELEASED_POSITIONS = 1024
ROUND_TRIPS = (
    "The quick brown fox can't jump over 12,345 lazy dogs.",
    "  two spaces,\ttabs\nand lines\r\n\n",
    "Grüße, Ελλάδα, Москва, 日本語, ‏שלום, 👩‍🔬 and <|endoftext|>",
)
# Largest difference of a logit. It grows with the largest logit above 5, because fp32 itself rounds
# OpenAI's logits of about 100 to steps of 1e-5.
TOLERANCE = 2e-5
MOST_TOKENS = 64


def released_size(config: GPTConfig) -> str | None:
    """Return which of GPT-2's released sizes this shape is, such as "124M", or None."""
    return size_of(config) if config.n_positions == RELEASED_POSITIONS else None


def check_weights(path: Path) -> Check:
    """Check that the weights can be read and that every value is a finite number."""
    name = "weights"
    try:
        tensors = read_tensors(path)
    except UserError as error:
        return failed(name, error)
    for tensor_name, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            return failed(name, f"{tensor_name} has values that are not finite numbers.")
    values = sum(tensor.numel() for tensor in tensors.values())
    return passed(name, f"{values:,} values, all finite")


def check_architecture(path: Path) -> Check:
    """Check that config.json describes GPT-2's arithmetic, and not another function."""
    name = "architecture"
    try:
        config = read_config(path)
    except UserError as error:
        return failed(name, error)
    size = released_size(config)
    shape = f"{config.n_layer} x {config.n_embd}, {config.n_head} heads"
    label = f"GPT-2 {size}" if size else "GPT-2"
    return passed(name, f"{label}: {shape}, tanh GELU, epsilon {config.layer_norm_epsilon:g}")


def check_tensors(path: Path) -> tuple[Check, GPT | None]:
    """Check names and shapes of all tensors, and that the head is `wte`; return the model too."""
    name = "tensors"
    try:
        model = load_model(path)
    except UserError as error:
        return failed(name, error), None
    count = len(list(model.parameters()))
    return passed(name, f"{count} names and shapes are GPT-2's, and the head is wte"), model


def check_tokenizer(path: Path, config: GPTConfig, wanted: str = "") -> Check:
    """Check the tokenizer files: their form, their ids, and texts there and back.

    A model of a released size must have OpenAI's vocabulary. `wanted` is the tokenizer that the
    model's run was configured with.
    """
    name = "tokenizer"
    try:
        tokenizer = Tokenizer.of_model(path, config.vocab_size)
    except UserError as error:
        return failed(name, error)
    if wanted and not tokenizer_matches(wanted, tokenizer.name):
        return failed(name, f"it is {tokenizer.name}, and the run was trained with {wanted}.")
    if released_size(config) and tokenizer.name != "gpt2":
        return failed(name, "its merges are not those that OpenAI published with GPT-2.")
    for text in ROUND_TRIPS:
        if tokenizer.decode(tokenizer.encode(text)) != text:
            return failed(name, f"{text!r} does not come back from its token ids.")
    if not files.has_tokenizer(path):
        return not_run(name, f"there are no tokenizer files; the built-in {tokenizer.name} is used")
    problem = _tokenizer_problem(path, tokenizer)
    if problem:
        return failed(name, problem)
    if tokenizer.name == "gpt2":
        return passed(name, "vocabulary and merges have the SHA-256 of OpenAI's files")
    return passed(name, f"{tokenizer.name}: {tokenizer.n_vocab:,} ids, texts come back unchanged")


def _tokenizer_problem(path: Path, tokenizer: Tokenizer) -> str:
    """Return how the tokenizer files of a folder differ from each other or from OpenAI's."""
    try:
        readings = {TOKENIZER_JSON: files.read(path)}
        if (path / "merges.txt").is_file():
            readings["merges.txt"] = files.read_vocab_and_merges(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its tokenizer files cannot be read ({error})."
    for file, vocabulary in readings.items():
        if vocabulary != tokenizer.vocabulary():
            return f"{file} is another tokenizer than {TOKENIZER_JSON}."
        if tokenizer.name == "gpt2" and _hashes(vocabulary) != OPENAI_TOKENIZER:
            return f"{file} gives another SHA-256 than OpenAI's vocabulary and merges."
    return ""


def _hashes(vocabulary: Vocabulary) -> dict[str, str]:
    """Return the SHA-256 of vocab.json and merges.txt as OpenAI writes this vocabulary."""
    by_id = sorted(vocabulary.ids.items(), key=lambda item: item[1])
    contents = files.contents(Vocabulary(dict(by_id), vocabulary.merges), RELEASED_POSITIONS)
    return {name: hashlib.sha256(contents[name]).hexdigest() for name in OPENAI_TOKENIZER}


def check_reload(model: GPT, tokenizer: Tokenizer) -> Check:
    """Save the model, load it again, and compare every tensor."""
    name = "reload"
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), model, tokenizer)
        again = dict(load_model(Path(folder)).named_parameters())
    for parameter_name, parameter in model.named_parameters():
        if not torch.equal(parameter, again[parameter_name]):
            return failed(name, f"{parameter_name} changes when it is saved and loaded.")
    return passed(name, f"{len(again)} tensors are equal after saving and loading")


def check_transformers(path: Path, model: GPT, tokenizer: Tokenizer) -> Check:
    """Compare the logits of 64 tokens with those that transformers computes from the same files."""
    name = "transformers"
    try:
        import transformers
    except ImportError:
        return not_run(name, "transformers is not installed")
    length = min(MOST_TOKENS, model.config.n_positions)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=generator)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        if path.is_file() or tensorflow.is_release(path):  # formats that transformers cannot open
            save_model(Path(folder), model, tokenizer)
            path = Path(folder)
        ours = model(ids)
        try:
            theirs = _transformers_logits(transformers, path, ids)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            return failed(name, f"transformers cannot open it: {error}")
    if ours.shape != theirs.shape:
        return failed(
            name, f"logits of shape {tuple(theirs.shape)} instead of {tuple(ours.shape)}."
        )
    difference = float((ours - theirs).abs().max())
    allowed = TOLERANCE * max(1.0, float(ours.abs().max()) / 5)
    detail = f"{length} tokens: logits differ by {difference:.1e}, allowed {allowed:.1e}"
    if not difference <= allowed:  # also for a difference that is not a number
        return failed(name, detail)
    return passed(name, detail)


def _transformers_logits(transformers: Any, path: Path, ids: Tensor) -> Tensor:
    """Return the logits that transformers computes, in fp32 and without its messages."""
    logging = transformers.utils.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model = transformers.GPT2LMHeadModel.from_pretrained(
            path, dtype=torch.float32, local_files_only=True
        )
        return model.eval()(ids).logits
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
