"""Every setting of a training run, each with a line of help.

The command line is made from these dataclasses (`anew train --help-all`). A `Config` (config.py)
has one of each, and a run stores them as RUN/config.json.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from anew.config.values import Reading

# `wte` is stored with a multiple of this many rows: 50257 -> 50304 = 393 x 2^7.
VOCAB_MULTIPLE = 128


def rounded_up(n: int, multiple: int = VOCAB_MULTIPLE) -> int:
    """Return the smallest multiple of `multiple` that is at least `n`."""
    return -(-n // multiple) * multiple


def setting(
    default: Any, help: str, *, basic: bool = False, may_change: bool = False, flag: bool = True
) -> Any:
    """Return a dataclass field with its help line.

    `basic` settings are shown by `anew train --help`, the others only by `--help-all`. A setting
    that `may_change` may differ when a run is resumed. `flag=False` keeps a setting off the
    command line.
    """
    metadata = {"help": help, "basic": basic, "may_change": may_change, "flag": flag}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class GPTConfig:
    """The shape of the network. The defaults are GPT-2 124M."""

    n_layer: int = setting(12, "number of transformer blocks", basic=True)
    n_head: int = setting(12, "attention heads in each block; must divide n_embd", basic=True)
    n_embd: int = setting(768, "width of the residual stream", basic=True)
    n_positions: int = setting(1024, "longest context of the model, in tokens")
    vocab_size: int = setting(
        50257, "number of token ids, which follows from the tokenizer", flag=False
    )
    layer_norm_epsilon: float = setting(
        1e-5, "value added to the variance in layer normalisation", flag=False
    )
    dropout: float = setting(
        0.0,
        "share of activations set to zero in training; reproductions of GPT-2 use none",
        basic=True,
    )
    wpe_std: float = setting(
        0.01,
        "initial standard deviation of the position embedding; OpenAI's is 0.01, many "
        "reproductions use 0.02",
    )
    attention: Literal["auto", "flash", "cudnn", "plain"] = setting(
        "auto",
        "attention kernel. flash: FlashAttention; cudnn: cuDNN's kernel; auto: the choice of "
        "PyTorch; plain: the softmax formula without a fused kernel, on any device",
        may_change=True,
    )
    head: Literal["chunked", "plain"] = setting(
        "chunked",
        "how the loss is computed. chunked: for some rows at a time, so the logits of all rows "
        "never exist at once; plain: for all rows, for comparison",
    )
    recompute: bool = setting(
        False,
        "keep only the input of each block and compute its activations again in the backward "
        "pass: less memory, about a third more work",
        may_change=True,
    )
    pad_vocabulary: bool = setting(
        True,
        "store `wte` with a multiple of 128 rows; the padding rows take no part in the softmax",
    )

    @property
    def head_dim(self) -> int:
        """The width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        """The number of rows of `wte` in memory."""
        return rounded_up(self.vocab_size) if self.pad_vocabulary else self.vocab_size


@dataclass(frozen=True)
class DataConfig:
    """The text a run reads, its tokenizer, and the sequences it is cut into."""

    data: str = setting(
        "stdlib",
        "a data folder, a file, a folder, a glob, or the name of a source: stdlib, "
        "tinyshakespeare, fineweb-edu, ...",
        basic=True,
    )
    tokenizer: str = setting(
        "gpt2",
        "gpt2: OpenAI's 50,257 tokens; bytes: 256 bytes and end of text; train:N: learn N tokens "
        "from the data; or a folder with a tokenizer",
        basic=True,
    )
    seq_len: int = setting(
        1024, "tokens in a training sequence (T); at most n_positions", basic=True
    )
    column: str = setting(
        "text", "column of .csv, .tsv and .parquet files, or key of .jsonl files, with the text"
    )
    encoding: str = setting(
        "", "encoding of files that are not UTF-8 and have no byte-order mark, such as latin-1"
    )
    disk_budget: str = setting(
        "0",
        "largest size on disk of data from the web, such as 30GB; shards that all kept "
        "checkpoints have read are removed; 0: no limit",
        may_change=True,
    )
    val_tokens: int = setting(
        10_485_760,
        "largest number of tokens of the validation split that are scored",
        may_change=True,
    )
    recut: bool = setting(
        True,
        "cut the text into sequences at other places in each epoch, which gives a lower loss on "
        "unseen text; with --no-recut a model memorises its text sooner",
    )
    conversations: bool = setting(
        False,
        "the data has conversations, and only what the assistant says in them is learnt; the "
        "recipe chat sets this",
    )
    general_data: str = setting(
        "",
        "text whose validation loss is measured beside that of the data, to see what a model "
        "forgets while it is fine-tuned",
        may_change=True,
    )
    one_batch: bool = setting(
        False, "train on the first batch only, to check that the model can learn"
    )

    @property
    def reading(self) -> Reading:
        """How documents are read from files."""
        return Reading(column=self.column, encoding=self.encoding, conversations=self.conversations)

    @property
    def unit(self) -> str:
        """The word for what the loss is a mean over."""
        token = "byte" if self.tokenizer == "bytes" else "token"
        return f"{token} of the answers" if self.conversations else token


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule."""

    optimizer: Literal["adamw", "muon"] = setting(
        "adamw",
        "muon: orthogonalised momentum for the matrices of the blocks, AdamW for the rest",
        basic=True,
    )
    lr: float = setting(6e-4, "peak learning rate of AdamW", basic=True)
    min_lr: float = setting(6e-5, "learning rate at the end of the schedule")
    muon_lr: float = setting(0.02, "peak learning rate of Muon, which follows the same schedule")
    muon_warmup: int = setting(0, "steps in which Muon's momentum rises from 0.85 to 0.95")
    newton_schulz: Literal["bf16", "fp32"] = setting(
        "bf16",
        "precision of Muon's orthogonalisation in a run that computes in bf16; with fp32 the "
        "result is the same on any number of ranks",
    )
    wte_lr: float = setting(0.0, "peak learning rate of `wte`; 0: the same as lr")
    schedule: Literal["cosine", "linear"] = setting("cosine", "shape of the decay after warm-up")
    decay_share: float = setting(
        1.0,
        "share of the steps after warm-up in which the learning rate decays; it is constant "
        "before them",
    )
    warmup_steps: int = setting(
        715,
        "steps in which the learning rate rises linearly; the first step has 1/warmup_steps of "
        "the peak",
    )
    weight_decay: float = setting(0.1, "decoupled weight decay, applied to matrices only")
    beta1: float = setting(0.9, "AdamW's decay rate of the mean gradient")
    beta2: float = setting(0.95, "AdamW's decay rate of the mean squared gradient")
    eps: float = setting(1e-8, "AdamW's epsilon")
    fused: bool = setting(
        True,
        "run AdamW as one kernel over all parameters; --no-fused: PyTorch's default, for "
        "comparison",
    )
    clip: float = setting(1.0, "gradients with a larger global norm are scaled down to this norm")


@dataclass(frozen=True)
class RunConfig:
    """The length of a run, where it computes, and what it writes."""

    steps: int = setting(19_073, "optimizer steps of the whole run", basic=True)
    batch_tokens: int = setting(
        524_288, "tokens in a step, over all ranks and micro-batches", basic=True
    )
    micro_batch: int | Literal["auto"] = setting(
        16,
        "sequences in one forward pass, which affects speed and memory but not the batch; auto: "
        "as many as fit into memory, found by trying before training",
        basic=True,
        may_change=True,
    )
    seed: int = setting(
        1337, "determines the initial weights, the order of the data and dropout", basic=True
    )
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = setting(
        "auto",
        "arithmetic of the forward and backward pass; auto: the fastest that trains reliably on "
        "the device",
        basic=True,
    )
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = setting(
        "auto",
        "device to compute on; auto: the accelerator that PyTorch finds, otherwise the CPU; "
        "cuda: also AMD GPUs in a ROCm build",
        basic=True,
        may_change=True,
    )
    compile: Literal["auto", "on", "blocks", "off"] = setting(
        "auto",
        "torch.compile for the training step; auto: on if there is a compiler and the run is long "
        "enough for compiling to save time; blocks: one graph for all blocks instead of one for "
        "the model, which starts minutes sooner for large models (always used with several ranks)",
        basic=True,
        may_change=True,
    )
    deterministic: bool = setting(
        False,
        "on CUDA, make a resumed run equal bit for bit, at some cost in speed; a CPU always "
        "computes this way",
    )
    check_every: int = setting(
        0,
        "find hardware that computes wrongly: every so many steps, compute one micro-batch once "
        "more and compare all bits, and before each save compare the ranks; 0: never",
        may_change=True,
    )
    on_corruption: Literal["stop", "rollback"] = setting(
        "stop",
        "when --check-every finds a difference: end the run, or continue from its last "
        "checkpoint; if a difference is found again before a later step, the run ends",
        may_change=True,
    )
    init: str = setting(
        "",
        "start from the weights of this MODEL; its shape and tokenizer are used too",
        basic=True,
    )
    out: str = setting("", "run folder; the default is runs/RECIPE", basic=True, may_change=True)
    save_every: int = setting(
        250,
        "steps between checkpoints; the last step is always saved",
        basic=True,
        may_change=True,
    )
    save_minutes: float = setting(
        10.0,
        "also save when the last checkpoint is this many minutes old; 0: only by steps",
        may_change=True,
    )
    keep: int = setting(
        3, "number of newest verified checkpoints to keep; 0: keep all", may_change=True
    )
    keep_every: int = setting(
        0,
        "also keep checkpoints whose step is a multiple of this number; 0: none",
        may_change=True,
    )
    parallel: Literal["ddp", "fsdp"] = setting(
        "ddp",
        "with several ranks: ddp: each rank has the whole model; fsdp: each rank has a part of "
        "it, for models larger than the memory of one GPU",
        basic=True,
        may_change=True,
    )
    timeout_seconds: float = setting(
        600.0,
        "with several ranks: a rank for which the others have waited this long counts as lost",
        may_change=True,
    )
    spikes: Literal["keep", "skip"] = setting(
        "keep",
        "whether to apply or skip a step whose loss or gradient norm is far above the recent mean",
    )
    spike_z: float = setting(6.0, "standard deviations above the recent mean that count as a spike")
    bad_steps: int = setting(
        10,
        "consecutive steps that are spikes or not finite, after which the run stops",
        may_change=True,
    )
    evaluate_every: int = setting(
        250, "steps between validations; 0: only at the end", basic=True, may_change=True
    )
    evaluate_tasks: str = setting(
        "",
        "tasks to score at each validation, such as hellaswag,core (see anew evaluate)",
        basic=True,
        may_change=True,
    )
    evaluate_limit: int = setting(
        0,
        "number of examples of each task that are scored during training; 0: all, and 100 of each "
        "task in core",
        may_change=True,
    )
    evaluate_train: bool = setting(
        False, "also score the training text at the end of the run", may_change=True
    )
    sample_every: int = setting(
        0, "steps between samples; 0: no samples", basic=True, may_change=True
    )
    sample_prompt: str = setting("\n", "text that the samples continue", may_change=True)
    sample_tokens: int = setting(128, "tokens in a sample", may_change=True)
    profile: int = setting(
        0,
        "record this many steps, from the third on, into trace.json for ui.perfetto.dev",
        may_change=True,
    )
    track: Literal["none", "wandb", "trackio"] = setting(
        "none",
        "also send metrics to this service; a failure of the service never stops or slows the run",
        may_change=True,
    )
    log_every: int = setting(
        10, "steps between lines on the console; metrics.jsonl has every step", may_change=True
    )


GROUPS: Mapping[str, Any] = {
    "model": GPTConfig,
    "data": DataConfig,
    "optim": OptimConfig,
    "run": RunConfig,
}
FIELDS = {f.name: f for kind in GROUPS.values() for f in dataclasses.fields(kind)}
GROUP_OF = {f.name: group for group, kind in GROUPS.items() for f in dataclasses.fields(kind)}
