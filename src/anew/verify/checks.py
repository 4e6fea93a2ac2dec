"""Which checks a model gets, in the order in which they are made.

    subject = find_subject("runs/demo")
    for check in all_checks(subject):
        print(check.status, check.name, check.detail)

| model | checks |
|---|---|
| every | weights, architecture, tensors, tokenizer, transformers |
| a checkpoint of a run | and manifest, formats, metrics, reload (with optimizer), replay |
| another of a released size | and reload, logits |
| any other | and reload |
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from anew.checkpoint.folder import MANIFEST, list_checkpoints, step_of
from anew.checkpoint.huggingface import find_model
from anew.config.config import Config
from anew.errors import UserError
from anew.model.gpt import GPT
from anew.tokenizer.bpe import Tokenizer
from anew.verify import model as of_model
from anew.verify import run as of_run
from anew.verify.published_logits import REFERENCES, check_published, read_reference
from anew.verify.replay import check_replay
from anew.verify.result import FAIL, NOT_RUN, PASS, Check, not_run

WEIGHT_FILES = (".pt", ".pth", ".ckpt", ".bin")


@dataclass(frozen=True)
class Subject:
    """The model to verify."""

    name: str  # as the user typed it
    path: Path  # the folder or file of the model
    run: Path | None = None  # the run folder that it is a checkpoint of
    checkpoints: tuple[Path, ...] = ()  # those whose manifests are checked

    @property
    def step(self) -> int:
        """The step of a checkpoint."""
        return step_of(self.path)


def find_subject(name: str) -> Subject:
    """Return the model called `name`; of a run, the newest checkpoint, damaged or not.

    Raises UserError if there is no model.
    """
    path = Path(name).expanduser()
    if (path / "checkpoints").is_dir():
        checkpoints = list_checkpoints(path)
        if not checkpoints:
            raise UserError(f"run {name} has no checkpoint yet.")
        return Subject(name, checkpoints[-1], path, tuple(checkpoints))
    resolved = path.resolve()
    run = resolved.parent.parent
    if resolved in list_checkpoints(run):
        return Subject(name, resolved, run, (resolved,))
    if (path / MANIFEST).is_file():
        return Subject(name, path, None, (path,))
    if path.is_file() and path.suffix not in WEIGHT_FILES:
        raise UserError(f"{name} is not a model: it is neither a folder nor a .pt file.")
    return Subject(name, find_model(name))


def all_checks(subject: Subject) -> Iterator[Check]:
    """Yield the result of each check when it is known.

    A check that needs what an earlier one has found to be wrong is not run.
    """
    is_intact = True
    if subject.checkpoints:
        manifest = of_run.check_manifests(list(subject.checkpoints))
        is_intact = manifest.status == PASS
        yield manifest
    weights = of_model.check_weights(subject.path)
    yield weights
    model = None
    if weights.status == FAIL:
        yield from left_out(["architecture", "tensors"], "the weights cannot be read")
    else:
        architecture = of_model.check_architecture(subject.path)
        yield architecture
        if architecture.status == FAIL:
            yield from left_out(["tensors"], "the architecture check failed")
        else:
            tensors, model = of_model.check_tensors(subject.path)
            yield tensors
    yield from model_checks(subject, model)
    if subject.run is not None:
        yield from run_checks(subject, subject.run, is_intact)


def left_out(names: list[str], reason: str) -> Iterator[Check]:
    """Yield these checks as not run."""
    for name in names:
        yield not_run(name, reason)


def model_checks(subject: Subject, model: GPT | None) -> Iterator[Check]:
    """Yield the checks that need the loaded model."""
    names = ["tokenizer", "transformers"]
    if subject.run is None:
        names.append("reload")
    if model is None:
        yield from left_out(names, "the model cannot be loaded")
        return
    wanted = configured_tokenizer(subject)
    tokenizer_check = of_model.check_tokenizer(subject.path, model.config, wanted)
    yield tokenizer_check
    if tokenizer_check.status == FAIL:
        yield from left_out(names[1:], "the tokenizer check failed")
        return
    tokenizer = Tokenizer.of_model(subject.path, model.config.vocab_size)
    yield of_model.check_transformers(subject.path, model, tokenizer)
    if subject.run is None:
        yield of_model.check_reload(model, tokenizer)
        yield from published_checks(model, tokenizer)


def configured_tokenizer(subject: Subject) -> str:
    """Return the tokenizer in the settings of the model's run; empty if they are not known."""
    if subject.run is None:
        return ""
    try:
        return Config.read(subject.run / "config.json").data.tokenizer
    except UserError:  # the formats check reports it
        return ""


def published_checks(model: GPT, tokenizer: Tokenizer) -> Iterator[Check]:
    """Yield the comparison with OpenAI's weights, for a model of a size that OpenAI released."""
    size = of_model.released_size(model.config)
    if size in REFERENCES:
        yield check_published(model, tokenizer, read_reference(REFERENCES[size]))
    elif size is not None:
        yield not_run("logits", f"no published logits of GPT-2 {size} are known")


def run_checks(subject: Subject, run: Path, is_intact: bool) -> Iterator[Check]:
    """Yield the checks of a checkpoint that need the run folder around it.

    `is_intact` says that the files match their manifests.
    """
    formats = of_run.check_formats(run, subject.path)
    yield formats
    if formats.status == FAIL:
        yield from left_out(["metrics", "reload", "replay"], "the formats check failed")
        return
    yield of_run.check_metrics(run, subject.step)
    if not is_intact:
        yield from left_out(["reload", "replay"], "the manifest check failed")
        return
    yield of_run.check_state(run, subject.path)
    yield check_replay(run, subject.path)


def conclusion(subject: Subject, checks: Sequence[Check]) -> str:
    """Return the closing sentence about all checks."""
    bad = [check.name for check in checks if check.status == FAIL]
    good = sum(check.status == PASS for check in checks)
    unknown = sum(check.status == NOT_RUN for check in checks)
    rest = f", and {unknown} could not be run" if unknown else ""
    if bad:
        return f"{subject.name} is not verified: {', '.join(bad)} failed{rest}."
    logits = [check.status for check in checks if check.name == "logits"]
    if logits == [PASS]:
        return f"{subject.name} is OpenAI's GPT-2: all {good} checks passed{rest}."
    end = ""
    if logits == [NOT_RUN]:
        end = " Whether the weights are OpenAI's is not known."
    return f"{subject.name} is sound: {good} checks passed{rest}.{end}"
