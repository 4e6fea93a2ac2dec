"""Score another model on a run's own validation windows.

    score(Run.read(folder), "gpt2")     # writes RUN/baseline.json, which the page reads

A validation loss has a verdict only beside such a loss: losses on other windows, texts or tokens do
not compare.
"""

import logging

from anew.checkpoint.huggingface import find_model, load_model, read_config
from anew.config.schema import RunConfig
from anew.config.values import parse_bytes
from anew.data.conversations import validation_windows
from anew.data.dataset import open_data
from anew.errors import UserError
from anew.evaluate.loss import mean_loss
from anew.report.run import BASELINE_FORMAT, Run
from anew.tokenizer.bpe import Tokenizer
from anew.utils.device import set_up_device
from anew.utils.files import write_json

log = logging.getLogger("anew")


def score(run: Run, model: str) -> float:
    """Return a model's mean loss in nats a token, in fp32, and write it to RUN/baseline.json.

    The text is the windows of the run's last validation. Raises UserError where the model cannot
    read windows of this length or has other tokens, or where there is no validation text.
    """
    data_config = run.config.data
    seq_len = data_config.seq_len
    folder = find_model(model)
    vocab_size = read_config(folder).vocab_size
    runtime = set_up_device(
        RunConfig(precision="fp32", device=run.config.run.device, compile="off")
    )
    gpt = load_model(model, runtime.device, runtime.dtype)
    if gpt.config.n_positions < seq_len:
        raise UserError(
            f"{model} reads at most {gpt.config.n_positions} tokens, "
            f"and the windows of {run.folder} have {seq_len}."
        )
    tokenizer: str | Tokenizer = data_config.tokenizer
    if not data_config.tokenizer.startswith("train:"):
        tokenizer = Tokenizer.find(data_config.tokenizer, run.folder)
    budget = parse_bytes(data_config.disk_budget)
    with open_data(data_config.data, tokenizer, budget, **data_config.reading) as data:
        has_same_tokens = (
            vocab_size == run.config.model.vocab_size
            and Tokenizer.of_model(folder, vocab_size).name == data.tokenizer
        )
        if not has_same_tokens:
            raise UserError(
                f"{model} has other tokens than {run.folder}; "
                "only losses of the same tokens compare."
            )
        tokens = min(data_config.val_tokens, data.n_tokens("val"))
        if tokens < 2:
            raise UserError(f"{run.folder} has no validation text to score {model} on.")
        micro_batch, _ = run.config.micro_batches(1)
        windows = validation_windows(data, "val", seq_len, tokens, micro_batch)
        loss = mean_loss(gpt, windows, runtime.dtype)
    facts = {
        "model": model,
        "loss": loss,
        "tokens": tokens - 1,
        "val_tokens": data_config.val_tokens,
        "seq_len": seq_len,
    }
    write_json(run.folder / "baseline.json", facts, BASELINE_FORMAT)
    scored = f"the {tokens - 1:,} validation tokens of {run.folder}"
    log.info(f"{model}: {loss:.4f} nats a token on {scored}")
    return loss
