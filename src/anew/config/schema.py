"""Every setting of a training run, each with a line of help.

The command line is made from these dataclasses (`anew train --help-all`), a run stores its settings
as RUN/config.json, and Python users build them with `recipe` or by hand:

    config = anew.recipe("shakespeare", steps=200, out="runs/try")
    anew.train(config)

A config is checked as a whole (`Config.check`; the rules are in check.py), so the order in which
settings are given never matters.
"""

import contextlib
import dataclasses
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from anew.config.check import problems, type_problems
from anew.config.values import Reading, vocabulary_size
from anew.errors import UserError, unknown_name
from anew.utils.files import parse_json, read_json, similar_path
from anew.utils.words import counted

VOCAB_MULTIPLE = (
    128  # `wte` is stored with a multiple of this many rows: 50257 -> 50304 = 393 x 2^7
)


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
        "find hardware that computes wrongly: every so many steps, compute one micro-batch twice "
        "and compare all bits, and before each save compare the ranks; 0: never",
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


class BatchSplit(NamedTuple):
    """How one rank computes its share of a batch."""

    micro_batch: int  # sequences in one forward pass
    accumulation: int  # forward passes in a step


@dataclass(frozen=True)
class Config:
    """One training run."""

    recipe: str = "custom"
    model: GPTConfig = field(default_factory=GPTConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def batch_sequences(self) -> int:
        """The number of sequences in a step, over all ranks."""
        return self.run.batch_tokens // self.data.seq_len

    @property
    def total_tokens(self) -> int:
        """The number of tokens in the whole run."""
        return self.run.steps * self.batch_sequences * self.data.seq_len

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.run.out or f"runs/{self.recipe}")

    def value(self, name: str) -> Any:
        """Return the value of a setting."""
        return getattr(getattr(self, GROUP_OF[name]), name)

    def override(self, **settings: Any) -> Self:
        """Return the config with some settings replaced. Names are checked, values are not."""
        groups: dict[str, Any] = {}
        for name, value in settings.items():
            if name in REMOVED:
                raise UserError(f"{removed_because(name)}; leave it out.")
            if name in NAMES_ELSEWHERE:
                raise UserError(
                    f"there is no setting '{name}'; it is called {NAMES_ELSEWHERE[name]}."
                )
            if name not in GROUP_OF:
                advice = "`anew train --help-all` lists them all."
                raise unknown_name("setting", name, GROUP_OF, advice)
            if isinstance(value, Path):
                value = str(value)
            group = GROUP_OF[name]
            before = groups.get(group, getattr(self, group))
            groups[group] = dataclasses.replace(before, **{name: value})
        return dataclasses.replace(self, **groups)

    def adapted(self, given: set[str]) -> tuple[Self, list[str]]:
        """Return the config with dependent settings adjusted, and a line for each adjustment.

        `given` names the settings that the user chose. Those are never adjusted. Raises UserError
        for a value of the wrong type.
        """
        for problem in type_problems(self):
            raise UserError(problem)
        optim = self.optim
        steps = self.run.steps
        positions = self.model.n_positions
        adjusted: dict[str, Any] = {}
        lines = []
        tokenizer_ids = vocabulary_size(self.data.tokenizer)
        if tokenizer_ids is not None:
            adjusted["vocab_size"] = tokenizer_ids

        def adjust(name: str, value: float, line: str) -> None:
            if name not in given:
                adjusted[name] = value
                lines.append(line)

        tenth = steps // 10
        shorter = f"shortened to {counted(tenth, 'step')}, a tenth of the run"
        if tenth == 0:
            shorter = f"left out, because the run has only {counted(steps, 'step')}"
        if 2 * optim.warmup_steps > steps > 0:
            adjust("warmup_steps", tenth, f"warm-up of {optim.warmup_steps} steps {shorter}")
        if 2 * optim.muon_warmup > steps > 0:
            adjust("muon_warmup", tenth, f"muon_warmup of {optim.muon_warmup} steps {shorter}")
        if "lr" in given:
            line = f"min_lr set to {optim.lr / 10:g}, a tenth of the given lr"
            adjust("min_lr", optim.lr / 10, line)
        if self.data.seq_len > positions > 0:
            line = f"seq_len lowered from {self.data.seq_len} to {positions}, the model's positions"
            adjust("seq_len", positions, line)
        return self.override(**adjusted), lines

    def micro_batches(self, ranks: int, exact: bool = False) -> BatchSplit:
        """Return the micro-batch and the accumulation of one rank.

        The setting is an upper bound: the micro-batch is the largest number of sequences up to it
        that divides a rank's share of the batch. With `exact`, a setting that does not divide the
        share is refused. Raises UserError, with the arithmetic, if the batch cannot be split.
        """
        seq_len = self.data.seq_len
        tokens = self.run.batch_tokens
        ranks_text = "1 rank" if ranks == 1 else f"{ranks} ranks"
        if tokens % (ranks * seq_len):
            raise UserError(
                f"batch_tokens {tokens:,} is not a multiple of {ranks_text} x {seq_len} tokens "
                f"= {ranks * seq_len:,}; change --batch-tokens, --seq-len or the ranks."
            )
        sequences = tokens // (ranks * seq_len)
        largest = 16 if self.run.micro_batch == "auto" else self.run.micro_batch
        if exact and self.run.micro_batch != "auto" and sequences % largest:
            raise UserError(
                f"batch_tokens {tokens:,} = {ranks_text} x {sequences} sequences x {seq_len} "
                f"tokens, and {sequences} sequences cannot be cut into micro-batches of "
                f"{largest}; choose a --micro-batch that divides {sequences}."
            )
        micro_batch = max(n for n in range(1, min(largest, sequences) + 1) if sequences % n == 0)
        return BatchSplit(micro_batch, sequences // micro_batch)

    def check(self, given: Collection[str] = (), ranks: int = 1) -> Self:
        """Return this config if it can be run. Otherwise raise UserError with the first problem.

        `given` names the settings that the user chose. A micro-batch among them must divide a
        rank's share of the batch; any other micro-batch is an upper bound.
        """
        for problem in problems(self):
            raise UserError(problem)
        self.micro_batches(ranks, exact="micro_batch" in given)
        return self

    def differences(self, other: Self) -> list[str]:
        """Return 'name: value -> other value' for settings that make `other` a different run."""
        found = []
        for name in GROUP_OF:
            mine = self.value(name)
            theirs = other.value(name)
            if mine != theirs and not FIELDS[name].metadata["may_change"]:
                found.append(f"{name}: {mine} -> {theirs}")
        return found

    def to_json(self) -> str:
        """Return the text of RUN/config.json."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2) + "\n"

    @classmethod
    def of_run(cls, run: Path) -> Self:
        """Read the settings of the run in the folder `run`.

        Raises UserError, which names the folder that was probably meant, if it holds no run.
        """
        path = run / "config.json"
        if not run.exists():
            raise UserError(f"there is no run at {run}{similar_path(run)}")
        if not path.is_file():
            raise UserError(f"{run} is not a run folder: it has no config.json.")
        checkpoints = run.parent
        if checkpoints.name == "checkpoints" and (checkpoints.parent / "config.json").is_file():
            raise UserError(f"{run} is a checkpoint; name its run, {checkpoints.parent}.")
        content: Any = None
        with contextlib.suppress(OSError, ValueError):  # `read` reports a damaged file
            content = parse_json(path)
        if isinstance(content, dict) and "model_type" in content:
            raise UserError(f"{run} is a model, and not the folder of a training run.")
        return cls.read(path)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a RUN/config.json, also one that an earlier version wrote."""
        try:
            content, format = read_json(path, FORMAT)
            if format == 1:
                _migrate_from_format_1(path, content)
            groups = {name: kind(**content[name]) for name, kind in GROUPS.items()}
            return cls(recipe=str(content["recipe"]), **groups)
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not the config.json of a run ({error}).") from error


GROUPS: Mapping[str, Any] = {
    "model": GPTConfig,
    "data": DataConfig,
    "optim": OptimConfig,
    "run": RunConfig,
}
FIELDS = {f.name: f for kind in GROUPS.values() for f in dataclasses.fields(kind)}
GROUP_OF = {f.name: group for group, kind in GROUPS.items() for f in dataclasses.fields(kind)}

# The format of RUN/config.json. Files of format 1 do not state it.
FORMAT = 2


# What other trainers (nanoGPT, transformers) call a setting of this one.
NAMES_ELSEWHERE = {
    "batch_size": "micro_batch",
    "bf16": "precision",
    "block_size": "seq_len",
    "dataset": "data",
    "dtype": "precision",
    "epochs": "steps",
    "eval_interval": "evaluate_every",
    "eval_steps": "evaluate_every",
    "fp16": "precision",
    "grad_clip": "clip",
    "gradient_accumulation_steps": "batch_tokens",
    "init_from": "init",
    "learning_rate": "lr",
    "max_grad_norm": "clip",
    "max_iters": "steps",
    "max_steps": "steps",
    "num_train_epochs": "steps",
    "out_dir": "out",
    "output_dir": "out",
    "per_device_train_batch_size": "micro_batch",
    "save_steps": "save_every",
    "warmup_iters": "warmup_steps",
}


class Removed(NamedTuple):
    """A setting that earlier versions had."""

    group: str
    off: Any  # the value with which it had no effect
    reason: str


REMOVED = {
    "zero_init": Removed(
        "model", False, "starting residual projections at zero did not lower the loss"
    ),
    "average": Removed(
        "optim", 0.0, "averaging the weights of the last steps did not lower the loss"
    ),
    "batch_ramp": Removed("run", "", "growing batches did not reach a loss with fewer tokens"),
}


def removed_because(name: str) -> str:
    """Return the beginning of the sentence that refuses a removed setting."""
    return f"the setting {name} no longer exists: {REMOVED[name].reason} (docs/log.md, 13)"


def _migrate_from_format_1(path: Path, content: dict[str, Any]) -> None:
    """Bring the content of a config.json from format 1 to format 2.

    Raises UserError if this version cannot continue the run.
    """
    # Before `recut` existed, the sequences were the same in every epoch.
    content["data"].setdefault("recut", False)
    for name, removed in REMOVED.items():
        value = content[removed.group].pop(name, removed.off)
        if value != removed.off:
            raise UserError(f"{path}: {removed_because(name)}; continue this run with anew 0.1.")
    if content["run"]["spikes"] == "rollback":
        raise UserError(
            f"{path}: spikes=rollback no longer exists; continue this run with anew 0.1."
        )
