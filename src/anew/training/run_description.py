"""Lines for the log that describe a run before its first step: model, batch, length and data."""

from collections.abc import Iterator

from anew.config.config import Config
from anew.data.conversations import Conversations
from anew.model.flops import count_parameters
from anew.utils.words import counted, short_count


def describe_run(config: Config, ranks: int) -> Iterator[str]:
    """Yield lines that describe the model and the batch of a run before it starts."""
    model = config.model
    seq_len = config.data.seq_len
    micro_batch, accumulation = config.micro_batches(ranks)
    padded = model.padded_vocab_size
    exponent = (padded & -padded).bit_length() - 1  # the largest power of two that divides it
    yield (
        f"model: vocabulary {model.vocab_size:,} padded to {padded:,} = "
        f"{padded >> exponent} x 2^{exponent}, context {model.n_positions:,}"
    )
    yield (
        f"       {model.n_layer} layers, width {model.n_embd:,}, {model.n_head} heads of "
        f"{model.head_dim}, feed-forward {4 * model.n_embd:,}"
    )
    yield f"       {count_parameters(model):,} parameters"
    yield (
        f"batch: {ranks} rank{'s' * (ranks > 1)} x {micro_batch} sequences x {seq_len:,} tokens "
        f"x {accumulation} accumulated"
    )
    yield f"       = {config.run.batch_tokens:,} tokens a step"
    total = short_count(config.total_tokens)
    warm_up_steps = config.optim.warmup_steps
    warm_up = short_count(warm_up_steps * config.batch_sequences * seq_len)
    yield (
        f"steps: {config.run.steps:,} = {total} tokens, of which {warm_up_steps:,} = {warm_up} "
        "warm up"
    )


def describe_data(
    config: Config, train_tokens: int, val_tokens: int, epoch_sequences: int, dropped: int
) -> Iterator[str]:
    """Yield lines that describe the data of a run.

    `dropped` is the number of tokens at the ends of shards that fill no sequence.
    """
    epochs = config.run.steps * config.batch_sequences / epoch_sequences
    yield f"data:  {config.data.data} as {config.data.tokenizer}"
    if config.data.val_tokens < 2:
        yield f"       {train_tokens:,} training tokens; val_tokens 0: nothing is validated"
    else:
        yield f"       {train_tokens:,} training and {val_tokens:,} validation tokens"
    shifted = ", each with other windows" if config.data.recut and epochs > 1 else ""
    yield f"       {epoch_sequences:,} sequences an epoch, {epochs:.2f} epochs in all{shifted}"
    yield f"       {dropped:,} tokens at the ends of shards are left out of the first epoch"


def describe_conversations(config: Config, conversations: Conversations) -> Iterator[str]:
    """Yield lines that describe the conversations of a run."""
    count = conversations.epoch_sequences
    epochs = config.run.steps * config.batch_sequences / count
    inputs, targets = conversations.places[:, 2:].sum(axis=0).tolist()
    yield f"data:  {config.data.data} as {config.data.tokenizer}"
    yield f"       {counted(count, 'conversation')} of {inputs / count:,.0f} tokens on average,"
    yield f"       {targets / inputs:.0%} of them answers, which are learnt; {epochs:.2f} epochs"
    if conversations.n_cut:
        cut = counted(conversations.n_cut, "conversation")
        yield f"       {cut} longer than {config.data.seq_len:,} tokens cut at the end"
    if conversations.n_left_out:
        left_out = counted(conversations.n_left_out, "conversation")
        yield f"       {left_out} left out, because no answer begins within them"
