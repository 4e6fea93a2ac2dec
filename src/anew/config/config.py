"""The settings of one training run as one object.

    config = anew.recipe("shakespeare", steps=200, out="runs/try")
    anew.train(config)

The settings themselves are in schema.py. They are checked as a whole (`Config.check`; the rules are
in check.py), so the order in which they are given never matters.
"""

import contextlib
import dataclasses
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

from anew.config.check import problems, type_problems
from anew.config.refused_names import NAMES_ELSEWHERE, REMOVED, removed_because
from anew.config.schema import (
    FIELDS,
    GROUP_OF,
    GROUPS,
    DataConfig,
    GPTConfig,
    OptimConfig,
    RunConfig,
)
from anew.config.values import vocabulary_size
from anew.errors import UserError, unknown_name
from anew.utils.files import parse_json, read_json, similar_path
from anew.utils.words import counted

FORMAT = 2  # of RUN/config.json; files of format 1 do not state it


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
