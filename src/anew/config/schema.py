"""Every setting of anew, with a help line each.

The command line is made from these dataclasses (`anew train --help`), a run keeps its own as RUN/config.json, and Python users
build them by hand:

    config = anew.recipe("shakespeare", steps=200, out="runs/try")
    anew.train(config)

A setting is judged only when all are known (`Config.check`), so that the order in which flags are given never matters.
"""

import dataclasses
import json
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from anew.config.values import ids_of
from anew.errors import UserError

VOCAB_MULTIPLE = 128  # rows of `wte` are stored to a multiple of this: 50257 -> 50304 = 393 x 2^7


def rounded_up(n: int, multiple: int = VOCAB_MULTIPLE) -> int:
    """The next multiple of 128, or of another number."""
    return -(-n // multiple) * multiple


def setting(default: Any, help: str, may_change: bool = False, **metadata: Any) -> Any:
    """A field with its help line. `may_change`: a resumed run may set it anew without becoming another run."""
    return field(default=default, metadata={"help": help, "may_change": may_change, **metadata})


@dataclass(frozen=True)
class GPTConfig:
    """The shape of the network. The defaults are GPT-2 124M."""

    n_layer: int = setting(12, "number of blocks")
    n_head: int = setting(12, "attention heads a block; must divide n_embd")
    n_embd: int = setting(768, "width of the residual stream")
    n_positions: int = setting(1024, "longest context the model can read, in tokens")
    vocab_size: int = setting(50257, "token ids; follows from the tokenizer", flag=False)
    layer_norm_epsilon: float = setting(1e-5, "added to the variance in layer norm", flag=False)
    dropout: float = setting(
        0.0, "share of activations dropped in training; GPT-2 reproductions use none"
    )
    wpe_std: float = setting(
        0.01, "initial std of the position embedding; OpenAI's is 0.01, many reproductions use 0.02"
    )
    attention: Literal["auto", "flash", "cudnn", "plain"] = setting(
        "auto",
        "kernel on NVIDIA GPUs: flash: FlashAttention; cudnn: cuDNN's; auto: torch's choice; plain, on any device: the formula",
        may_change=True,
    )
    head: Literal["chunked", "plain"] = setting(
        "chunked", "loss: in chunks of rows, never all logits at once; plain: all, for comparison"
    )
    recompute: bool = setting(
        False,
        "keep each block's input only and compute the rest again going backward: less memory, a third more work",
        may_change=True,
    )
    pad_vocabulary: bool = setting(
        True, "store `wte` with rows to a multiple of 128; padding takes no part in anything"
    )

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        """Rows of `wte` in memory: vocab_size rounded up to a multiple of 128."""
        return rounded_up(self.vocab_size) if self.pad_vocabulary else self.vocab_size


@dataclass(frozen=True)
class DataConfig:
    """What is read, and in which pieces."""

    data: str = setting(
        "stdlib",
        "a data folder, a file, a folder, a glob, or a source: stdlib, tinyshakespeare, fineweb-edu, ...",
    )
    tokenizer: str = setting(
        "gpt2",
        "gpt2: OpenAI's 50,257 tokens; bytes: 256 and end of text; train:N: learn N from the data; or a folder that has one",
    )
    seq_len: int = setting(1024, "tokens a training sequence (T); at most n_positions")
    disk_budget: str = setting(
        "0",
        "web data: most bytes of disk, e.g. 30GB; shards behind kept checkpoints go",
        may_change=True,
    )
    val_tokens: int = setting(
        10_485_760, "score at most this many tokens of the validation split", may_change=True
    )
    recut: bool = setting(
        True,
        "cut sequences elsewhere in each epoch: better on unseen text. --no-recut learns by heart sooner",
    )
    one_batch: bool = setting(
        False, "train on the first batch for ever: the classic check that a model can learn"
    )

    @property
    def unit(self) -> str:
        """What a loss is a mean over, in a word."""
        return "byte" if self.tokenizer == "bytes" else "token"


@dataclass(frozen=True)
class OptimConfig:
    """How a gradient becomes an update."""

    optimizer: Literal["adamw", "muon"] = setting(
        "adamw", "muon: orthogonalised momentum for the matrices of the blocks, AdamW for the rest"
    )
    lr: float = setting(6e-4, "peak learning rate of AdamW")
    min_lr: float = setting(6e-5, "learning rate that the schedule ends on")
    muon_lr: float = setting(0.02, "peak learning rate of Muon; follows the same schedule")
    muon_warmup: int = setting(0, "steps in which Muon's momentum rises from 0.85 to 0.95")
    newton_schulz: Literal["bf16", "fp32"] = setting(
        "bf16",
        "arithmetic of Muon's orthogonalisation in a run that computes in bf16; fp32: the same on any number of ranks",
    )
    wte_lr: float = setting(0.0, "peak learning rate of `wte`; 0: lr")
    schedule: Literal["cosine", "linear"] = setting("cosine", "shape of the decay after warm-up")
    decay_share: float = setting(
        1.0,
        "share of the steps after warm-up, at the end, in which the rate falls; it is constant before",
    )
    warmup_steps: int = setting(
        715, "steps of linear warm-up; the first step already has 1/warmup_steps of the peak"
    )
    weight_decay: float = setting(0.1, "decoupled weight decay, on matrices only")
    beta1: float = setting(0.9, "AdamW's decay of the mean gradient")
    beta2: float = setting(0.95, "AdamW's decay of the mean squared gradient")
    eps: float = setting(1e-8, "AdamW's epsilon")
    fused: bool = setting(
        True, "AdamW as one kernel over all parameters; off: torch's default, for comparison"
    )
    clip: float = setting(1.0, "largest global gradient norm; larger ones are scaled down to it")


@dataclass(frozen=True)
class RunConfig:
    """How long, where, and what is written down on the way."""

    steps: int = setting(19_073, "optimizer steps in the whole run")
    batch_tokens: int = setting(524_288, "tokens a step, over all ranks and micro-batches")
    micro_batch: int | Literal["auto"] = setting(
        16,
        "sequences in one forward pass; changes speed and memory, never the batch; auto: as many as fit into memory, tried before training",
        may_change=True,
    )
    seed: int = setting(1337, "decides initial weights, order of the data and dropout")
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = setting(
        "auto",
        "arithmetic of the forward and backward pass; auto: the fastest that is safe on the device",
    )
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = setting(
        "auto",
        "where to compute; auto: the accelerator that torch finds, else cpu; cuda is also AMD's in a ROCm build",
        may_change=True,
    )
    compile: Literal["auto", "on", "blocks", "off"] = setting(
        "auto",
        "torch.compile for the training step; auto: where a compiler is at hand; blocks: one graph for all blocks instead of one for "
        "the model, which starts minutes sooner for large models (several ranks always do so)",
        may_change=True,
    )
    deterministic: bool = setting(
        False, "CUDA: resume bit for bit, at some cost in speed; a CPU always does"
    )
    init: str = setting(
        "",
        "start from this MODEL instead of random weights; its shape and tokenizer are taken over",
    )
    out: str = setting("", "run folder; by default runs/RECIPE", may_change=True)
    save_every: int = setting(
        250, "steps between checkpoints; the last step is always saved", may_change=True
    )
    save_minutes: float = setting(
        10.0, "also save when the last checkpoint is this old; 0: only by steps", may_change=True
    )
    keep: int = setting(3, "newest verified checkpoints to keep; 0 keeps all", may_change=True)
    keep_every: int = setting(
        0, "keep also each checkpoint whose step is a multiple of this; 0: none", may_change=True
    )
    parallel: Literal["ddp", "fsdp"] = setting(
        "ddp",
        "several ranks: ddp: all have the whole model; fsdp: each has a part of it, for models larger than a card",
        may_change=True,
    )
    timeout_seconds: float = setting(
        600.0, "several ranks: one that the others wait for this long is lost", may_change=True
    )
    spikes: Literal["keep", "skip"] = setting(
        "keep", "a step whose loss or gradient norm is far above the usual: apply it, or skip it"
    )
    spike_z: float = setting(6.0, "standard deviations above the usual that make a spike")
    bad_steps: int = setting(
        10,
        "steps in a row that are not finite or spikes, after which the run stops",
        may_change=True,
    )
    evaluate_every: int = setting(
        250, "steps between validations; 0: only at the end", may_change=True
    )
    evaluate_tasks: str = setting(
        "",
        "tasks to score at each validation, e.g. hellaswag,lambada (see anew evaluate)",
        may_change=True,
    )
    evaluate_limit: int = setting(
        0, "only the first N examples of each task while training; 0: all", may_change=True
    )
    evaluate_train: bool = setting(
        False, "at the end, score the training text too", may_change=True
    )
    sample_every: int = setting(0, "steps between samples; 0: never", may_change=True)
    sample_prompt: str = setting("\n", "text that the samples continue", may_change=True)
    sample_tokens: int = setting(128, "tokens a sample", may_change=True)
    profile: int = setting(
        0,
        "record this many steps, from the third on, into trace.json for ui.perfetto.dev",
        may_change=True,
    )
    log_every: int = setting(
        10, "steps between lines on the console; metrics.jsonl has every step", may_change=True
    )


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
        """Sequences a step, over all ranks."""
        return self.run.batch_tokens // self.data.seq_len

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole run."""
        return self.run.steps * self.batch_sequences * self.data.seq_len

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.run.out or f"runs/{self.recipe}")

    def override(self, **settings: Any) -> Self:
        """The same config with flat settings replaced. Unknown names are refused; nothing is judged yet."""
        groups: dict[str, dict[str, Any]] = {}
        for name, value in settings.items():
            if sentence := removed_setting(name):
                raise UserError(sentence)
            if name not in GROUP_OF:
                raise UserError(
                    f"there is no setting '{name}'; `anew train --help` lists them all."
                )
            groups.setdefault(GROUP_OF[name], {})[name] = value
        return dataclasses.replace(
            self,
            **{g: dataclasses.replace(getattr(self, g), **values) for g, values in groups.items()},
        )

    def adapted(self, given: set[str]) -> tuple[Self, list[str]]:
        """Settings that only follow from others (`given` are those the user chose), and a line for each that moved."""
        config, said = (
            self.override(vocab_size=ids_of(self.data.tokenizer) or self.model.vocab_size),
            [],
        )
        steps, sequences, micro = self.run.steps, self.batch_sequences, self.run.micro_batch
        if "warmup_steps" not in given and self.optim.warmup_steps >= steps > 0:
            config = config.override(warmup_steps=steps // 10)
            said.append(
                f"warm-up shortened from {self.optim.warmup_steps} to {steps // 10} steps, a tenth of this run"
            )
        if "muon_warmup" not in given and self.optim.muon_warmup >= steps > 0:
            config = config.override(muon_warmup=steps // 10)
            said.append(
                f"the rise of Muon's momentum shortened from {self.optim.muon_warmup} to {steps // 10} steps"
            )
        if "min_lr" not in given and "lr" in given:
            config = config.override(min_lr=self.optim.lr / 10)
            said.append(f"min_lr set to {self.optim.lr / 10:g}, a tenth of the given lr")
        if (
            "micro_batch" not in given
            and isinstance(micro, int)
            and sequences > 0
            and micro > sequences
        ):
            config = config.override(micro_batch=sequences)
            said.append(f"micro-batch lowered from {micro} to {sequences}, all sequences of a step")
        if "seq_len" not in given and self.data.seq_len > self.model.n_positions > 0:
            config = config.override(seq_len=self.model.n_positions)
            said.append(
                f"seq_len lowered from {self.data.seq_len} to {self.model.n_positions}, the model's positions"
            )
        return config, said

    def micro_batches(self, ranks: int) -> tuple[int, int]:
        """(micro-batch, accumulation) of one rank. A batch that cannot be split evenly is refused, with the arithmetic."""
        T, tokens, wanted = self.data.seq_len, self.run.batch_tokens, self.run.micro_batch
        if tokens % (ranks * T):
            per = f"{ranks} rank{'s' * (ranks > 1)} x {T} tokens = {ranks * T:,}"
            raise UserError(
                f"batch_tokens {tokens:,} is not a multiple of {per}; change --batch-tokens, --seq-len or the ranks."
            )
        sequences = tokens // (ranks * T)
        micro = (
            wanted
            if isinstance(wanted, int)
            else max(n for n in range(1, min(16, sequences) + 1) if sequences % n == 0)
        )
        if sequences % micro:
            raise UserError(
                f"batch_tokens {tokens:,} = {ranks} rank{'s' * (ranks > 1)} x {sequences} sequences x {T} tokens, "
                f"and {sequences} sequences cannot be cut into micro-batches of {micro}; choose a --micro-batch that divides {sequences}."
            )
        return micro, sequences // micro

    def check(self) -> Self:
        """This config, if it can be run; otherwise UserError names the settings at fault."""
        m, d, o, r = self.model, self.data, self.optim, self.run
        for group in (m, d, o, r):
            for f in dataclasses.fields(group):
                value = getattr(group, f.name)
                if needed := _wrong_kind(type(group), f, value):
                    raise UserError(f"{f.name} is {value!r}; it must be {needed}.")
        refuse_if = [
            (
                m.vocab_size != (ids_of(d.tokenizer) or m.vocab_size),
                f"vocab_size {m.vocab_size:,} is not that of the tokenizer {d.tokenizer}, {ids_of(d.tokenizer) or 0:,}.",
            ),
            (
                min(m.n_layer, m.n_head, m.n_embd, m.n_positions) < 1,
                "n_layer, n_head, n_embd and n_positions must all be at least 1.",
            ),
            (
                m.n_head > 0 and m.n_embd % m.n_head != 0,
                f"n_embd {m.n_embd} cannot be cut into {m.n_head} heads: {m.n_embd} / {m.n_head} is not whole.",
            ),
            (not 0 <= m.dropout < 1, f"dropout {m.dropout} is not in [0, 1)."),
            (m.wpe_std < 0, f"wpe_std {m.wpe_std} is negative."),
            (d.seq_len < 1, f"seq_len {d.seq_len} must be at least 1."),
            (
                d.seq_len > m.n_positions,
                f"seq_len {d.seq_len} is longer than the model's {m.n_positions} positions; lower --seq-len or raise --n-positions.",
            ),
            (d.val_tokens < 0, f"val_tokens {d.val_tokens} is negative; 0 means no validation."),
            (
                o.lr <= 0 or o.muon_lr <= 0,
                f"learning rates must be above 0, not lr {o.lr:g} and muon_lr {o.muon_lr:g}.",
            ),
            (o.wte_lr < 0 or o.muon_warmup < 0, "wte_lr and muon_warmup cannot be negative."),
            (
                not 0 < o.decay_share <= 1,
                f"decay_share {o.decay_share:g} is a share of the steps, above 0 and at most 1.",
            ),
            (not 0 <= o.min_lr <= o.lr, f"min_lr {o.min_lr:g} is not between 0 and lr {o.lr:g}."),
            (
                not (0 <= o.beta1 < 1 and 0 <= o.beta2 < 1),
                f"beta1 {o.beta1} and beta2 {o.beta2} must lie in [0, 1).",
            ),
            (
                o.eps <= 0 or o.clip <= 0 or o.weight_decay < 0,
                "eps and clip must be above 0, and weight_decay not negative.",
            ),
            (r.steps < 1, f"steps {r.steps} must be at least 1."),
            (
                not 0 <= o.warmup_steps < max(r.steps, 1),
                f"a warm-up of {o.warmup_steps} steps does not fit in a run of {r.steps} steps; lower --warmup-steps.",
            ),
            (
                isinstance(r.micro_batch, int) and r.micro_batch < 1,
                f"micro_batch {r.micro_batch} must be at least 1.",
            ),
            (
                r.batch_tokens < d.seq_len,
                f"batch_tokens {r.batch_tokens:,} is less than one sequence of {d.seq_len} tokens.",
            ),
            (
                min(r.save_every, r.log_every, r.bad_steps) < 1,
                "save_every, log_every and bad_steps must be at least 1 step.",
            ),
            (r.save_minutes < 0, f"save_minutes {r.save_minutes:g} is negative."),
            (
                r.timeout_seconds <= 0 or r.spike_z <= 0,
                "timeout_seconds and spike_z must be above 0.",
            ),
            (
                min(
                    r.keep,
                    r.keep_every,
                    r.evaluate_every,
                    r.evaluate_limit,
                    r.sample_every,
                    r.sample_tokens,
                    r.profile,
                )
                < 0,
                "keep, keep_every, evaluate_every, evaluate_limit, sample_every, sample_tokens and profile cannot be negative.",
            ),
            (not 0 <= r.seed < 2**63, f"seed {r.seed} must be between 0 and 2^63 - 1."),
            (
                r.parallel == "fsdp" and r.precision == "fp16",
                "fsdp has no loss scaling here; use --precision bf16, or --parallel ddp.",
            ),
            (
                self.recipe == "finetune" and not r.init,
                "the finetune recipe needs a model to start from: add --init MODEL.",
            ),
        ]
        for wrong, sentence in refuse_if:
            if wrong:
                raise UserError(sentence)
        self.micro_batches(1)
        return self

    def differences(self, other: Self) -> list[str]:
        """Settings that would make `other` a different run than this one, as 'name: mine -> theirs'."""
        found = []
        for name, group in GROUP_OF.items():
            mine, theirs = getattr(getattr(self, group), name), getattr(getattr(other, group), name)
            if mine != theirs and not FIELDS[name].metadata["may_change"]:
                found.append(f"{name}: {mine} -> {theirs}")
        return found

    def to_json(self) -> str:
        """The text of RUN/config.json."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> Self:
        """The config a run was started with (RUN/config.json), also of earlier versions."""
        try:
            raw = migrated(path, json.loads(path.read_text(encoding="utf-8")))
            groups = {g: t(**raw[g]) for g, t in GROUPS.items()}
            return cls(recipe=str(raw["recipe"]), **groups)
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not the config.json of a run ({error}).") from error


FORMAT = (
    2  # of RUN/config.json; files without a format were written before there was one and count as 1
)
# Settings that earlier versions had: their group, the value that meant "off", and why they were removed.
REMOVED: dict[str, tuple[str, Any, str]] = {
    "zero_init": (
        "model",
        False,
        "starting residual projections at zero did not lower the loss (docs/log.md, 13)",
    ),
    "average": (
        "optim",
        0.0,
        "averaging the weights of the last steps did not lower the loss (docs/log.md, 13)",
    ),
    "batch_ramp": (
        "run",
        "",
        "growing batches did not reach a loss with fewer tokens (docs/log.md, 13)",
    ),
}


def removed_setting(name: str) -> str:
    """The sentence that refuses a setting which earlier versions had; empty for any other name."""
    if name not in REMOVED:
        return ""
    return f"the setting {name} no longer exists: {REMOVED[name][2]}; leave it out."


def migrated(path: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """Bring the content of a stored config.json to the present format. UserError if a run cannot be continued by this version."""
    version = int(raw.pop("format", 1))
    if version > FORMAT:
        raise UserError(
            f"{path} has format {version}, and this version of anew reads formats up to {FORMAT}; update anew."
        )
    if version == 1:
        raw["data"].setdefault(
            "recut", False
        )  # before this setting existed, every epoch had the same windows
        for name, (group, off, _) in REMOVED.items():
            if raw[group].pop(name, off) != off:
                raise UserError(
                    f"{path}: {removed_setting(name)[: -len('; leave it out.')]}; continue this run with anew 0.1."
                )
        if raw["run"]["spikes"] == "rollback":
            raise UserError(
                f"{path}: spikes=rollback no longer exists; continue this run with anew 0.1."
            )
    return raw


GROUPS = {"model": GPTConfig, "data": DataConfig, "optim": OptimConfig, "run": RunConfig}
FIELDS = {f.name: f for t in GROUPS.values() for f in dataclasses.fields(t)}
GROUP_OF = {f.name: g for g, t in GROUPS.items() for f in dataclasses.fields(t)}


def _wrong_kind(group: type, f: dataclasses.Field[Any], value: Any) -> str:
    """What the value of a setting must be, if it is something else."""
    kind = typing.get_type_hints(group)[f.name]
    choices = [
        choice
        for part in (kind, *typing.get_args(kind))
        if typing.get_origin(part) is Literal
        for choice in typing.get_args(part)
    ]
    if value in choices:
        return ""
    number = type(f.default)
    if choices and not isinstance(f.default, int):
        return "one of " + ", ".join(choices)
    if number is float:
        right = (
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        )
        return "" if right else "a finite number"
    return (
        ""
        if type(value) is number
        else {int: "a whole number", str: "text", bool: "true or false"}[number]
    )
