"""Another model on a run's own validation windows: the only loss that a verdict can be given against.

score(Run.read(folder), "gpt2")     # writes RUN/baseline.json, which the page reads
"""

import logging

from anew.checkpoint import huggingface as weights
from anew.config.schema import RunConfig
from anew.config.values import bytes_of
from anew.data.dataset import open_data
from anew.errors import UserError
from anew.evaluate.loss import mean_loss
from anew.report.run import BASELINE_FORMAT, Run
from anew.tokenizer.bpe import Tokenizer
from anew.utils import device as runtime
from anew.utils.files import write_json

log = logging.getLogger("anew")


def score(run: Run, model: str) -> float:
    """Mean loss in nats a token, fp32, over the windows of the run's last validation; written to RUN/baseline.json."""
    c = run.config
    folder = weights.find(model)
    vocab_size = weights.read_config(folder).vocab_size
    rt = runtime.start(RunConfig(precision="fp32", device=c.run.device, compile="off"))
    gpt = weights.load_model(model, rt.device, rt.dtype)
    if gpt.config.n_positions < c.data.seq_len:
        raise UserError(
            f"{model} reads {gpt.config.n_positions} tokens at once, and the windows of {run.folder} have {c.data.seq_len}."
        )
    wanted = c.data.tokenizer
    tokenizer = wanted if wanted.startswith("train:") else Tokenizer.find(wanted, run.folder)
    with open_data(c.data.data, tokenizer, bytes_of(c.data.disk_budget)) as data:
        if (
            vocab_size != c.model.vocab_size
            or Tokenizer.of_model(folder, vocab_size).name != data.tokenizer
        ):
            raise UserError(
                f"{model} has other tokens than {run.folder}; only losses of the same tokens compare."
            )
        shards = data.splits["val"]
        limit = min(c.data.val_tokens, sum(s.n_tokens for s in shards))
        if limit < 2:
            raise UserError(f"{run.folder} has no validation text to score {model} on.")
        loss = mean_loss(gpt, shards, c.data.seq_len, limit, rt.dtype, c.micro_batches(1)[0])
    facts = {
        "model": model,
        "loss": loss,
        "tokens": limit - 1,
        "val_tokens": c.data.val_tokens,
        "seq_len": c.data.seq_len,
    }
    write_json(run.folder / "baseline.json", facts, BASELINE_FORMAT)
    log.info(
        f"{model}: {loss:.4f} nats a token on the {limit - 1:,} validation tokens of {run.folder}"
    )
    return loss
