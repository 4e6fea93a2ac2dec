"""The command line: one function a verb.

    anew train shakespeare --out runs/bard
    anew sample runs/bard --prompt "ROMEO:" --tokens 200
    anew prepare my-texts/ --out data/mine

Exit codes: 0 complete; 2 the input is wrong (one sentence, no traceback); 75 stopped by a signal after a save; 1 anything else.
"""

import codecs
import dataclasses
import json
import logging
import sys
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from loguru import logger

from anew import config as settings
from anew import runtime, weights
from anew.config import RECIPES, Config, UserError
from anew.data import prepare, sources
from anew.data.shards import DataFolder
from anew.demo import show_demo
from anew.generate import stream
from anew.metrics import Row
from anew.tokenizer import Tokenizer
from anew.train import Preempted, Result, train

Device = Literal["auto", "cpu", "cuda", "mps"]
SWITCHES = {"help", "json", "memorise"} | {name for name, f in settings.FIELDS.items() if f.type is bool or isinstance(f.default, bool)}


def main(argv: list[str] | None = None) -> None:
    """Run one verb and leave with its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    verb, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    for stream_, errors in ((sys.stdin, "replace"), (sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if hasattr(stream_, "reconfigure"):  # a model may write any character, and Windows pipes are not UTF-8 by themselves
            stream_.reconfigure(encoding="utf-8", errors=errors)
    try:
        with _console():
            if verb in VERBS:
                VERBS[verb](rest)
            elif verb in ("-h", "--help"):
                print(_overview())
            else:
                raise UserError(f"there is no verb '{verb}'; choose one of {', '.join(VERBS)}.")
    except UserError as error:
        print(f"anew: {error}", file=sys.stderr)
        sys.exit(2)
    except Preempted as error:
        print(f"anew: {error}", file=sys.stderr)
        sys.exit(75)
    except KeyboardInterrupt:
        sys.exit(130)
    except (PermissionError, FileExistsError, FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        print(f"anew: {error.filename or 'a file'} cannot be used: {error.strerror}.", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `anew sample ... | head` is no fault
        sys.stderr.close()
        sys.exit(0)


def _overview() -> str:
    lines = ["anew: GPT-2 from scratch, again, and proven.", "", "usage: anew VERB ...    (anew VERB --help tells more)", ""]
    lines += [f"  {name:<9} {(function.__doc__ or '').splitlines()[0]}" for name, function in VERBS.items()]
    lines += ["", "recipes of `anew train`:"] + [f"  {name:<22} {text}" for name, (text, _) in RECIPES.items()]
    return "\n".join(lines)


# --- train -------------------------------------------------------------------------------------------------------------------------


def run_train(argv: list[str]) -> None:
    """Train a recipe, or go on with a run that stopped."""
    name, given = _recipe_and_flags(argv)
    resume = given.get("resume")
    if resume == "":
        raise UserError("--resume needs the run folder to go on with.")
    if given.get("memorise") and resume:
        raise UserError("--memorise chooses a recipe, and --resume goes on with the one that the run has; leave one out.")
    if given.get("memorise"):
        name = f"{name or 'shakespeare'}-memorise"
        if name not in RECIPES:
            raise UserError("--memorise is a variant of the shakespeare recipe only.")
    if resume and name:
        raise UserError(f"--resume {resume} already says which run to go on with; leave out the recipe {name}.")
    base = Config.read(Path(resume) / "config.json") if resume else _recipe(name or "demo")
    arguments = _parse_train(argv, base)
    chosen = {key: value for key, value in vars(arguments).items() if key in given and key in settings.FIELDS}
    taken = {"n_layer", "n_head", "n_embd", "n_positions", "tokenizer"} & set(chosen)
    if arguments.init and taken and not resume:
        raise UserError(f"--{min(taken).replace('_', '-')} contradicts --init, whose model has its own; leave it out.")
    changed = base.override(**chosen)
    if resume:
        changed = changed.override(out=resume)
        said: list[str] = []
    else:
        changed, said = changed.adapted(set(chosen))
    for line in said:
        logger.info(line)
    with _progress(changed.run.steps) as progress:
        result = train(changed.check(), progress)
    _report(changed, result)
    extra = show_demo(result.folder) if changed.recipe == "demo" else {}
    if arguments.json:
        print(json.dumps({**dataclasses.asdict(result), "folder": str(result.folder), **extra}))


def _recipe(name: str) -> Config:
    if name not in RECIPES:
        raise UserError(f"there is no recipe '{name}'; choose one of {', '.join(RECIPES)}.")
    return dataclasses.replace(RECIPES[name][1], recipe=name)


def _recipe_and_flags(argv: list[str]) -> tuple[str, dict[str, str]]:
    """The one bare word, wherever it stands, and the flags that were given: known before defaults can be."""
    recipe, given, tokens = "", {}, iter(argv)
    for token in tokens:
        if not token.startswith("-"):
            if recipe:
                raise UserError(f"'{token}' is one word too many; `anew train` takes one recipe, and it has {recipe}.")
            recipe = token
            continue
        name, _, value = token.lstrip("-").partition("=")
        name = name.replace("-", "_")
        if name in SWITCHES or name == "h":
            given[name] = "yes"
        elif name.removeprefix("no_") in SWITCHES:
            given[name.removeprefix("no_")] = ""
        else:
            given[name] = value if "=" in token else next(tokens, "")
    return recipe, given


def _parse_train(argv: list[str], base: Config) -> Any:
    """argv through tyro, into one flat dataclass made from the settings, with the recipe's values as defaults."""
    fields: list[Any] = [
        ("recipe", Annotated[str, tyro.conf.Positional, tyro.conf.arg(help=f"one of {', '.join(RECIPES)}")], base.recipe),
        ("resume", Annotated[str, tyro.conf.arg(help="go on with this run folder (the recipe is then not needed)")], ""),
        ("memorise", Annotated[bool, tyro.conf.arg(help="shakespeare: train until the text is known by heart")], False),
        ("json", Annotated[bool, tyro.conf.arg(help="the last line of standard output is one JSON object")], False),
    ]
    for group, kind in settings.GROUPS.items():
        hints = typing.get_type_hints(kind)
        for f in dataclasses.fields(kind):
            if f.metadata.get("flag", True):
                fields.append(
                    (f.name, Annotated[hints[f.name], tyro.conf.arg(help=f.metadata["help"])], getattr(getattr(base, group), f.name))
                )
    flat = dataclasses.make_dataclass("Train", [(name, kind, dataclasses.field(default=value)) for name, kind, value in fields])
    about = f"Train a GPT-2. Example: anew train shakespeare --steps 200 --out runs/try\n\nRecipes: {', '.join(RECIPES)}."
    about += " `anew --help` says what each is; the defaults below are those of "
    about += "the run." if base.run.out else f"{base.recipe}."
    return tyro.cli(flat, args=argv, prog="anew train", description=about)


def _report(config: Config, result: Result) -> None:
    """The end of a run, in words."""
    print(f"\n{config.recipe}: {result.step:,} steps, {result.tokens:,} tokens in {result.seconds:.1f} s of training")
    if config.data.one_batch:
        print(f"loss of the one batch: {result.train_loss:.4f} nats a token")
    if result.val_loss is not None:
        print(f"validation loss: {result.val_loss:.4f} nats a token on held-out text")
    if result.train_text_loss is not None:
        print(f"training-text loss: {result.train_text_loss:.4f} nats a token on the text it was trained on")
        print("The two differ because the model has learnt its training text by heart, which does not help it with text it has never seen.")
    print(f"run folder: {result.folder}    try: anew sample {result.folder}")


@contextmanager
def _progress(steps: int) -> Iterator[Any]:
    """A bar with loss, speed and time left on a terminal; elsewhere plain lines are enough."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(bar_width=16), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=steps)
        logger.remove()
        logger.add(lambda text: bar.console.print(text.rstrip("\n"), markup=False, highlight=False), format="{message}", level="INFO")

        def update(row: Row) -> None:
            text = f"loss {row['train/loss']:.3f}  {row['speed/tokens_per_second']:,.0f} tok/s  MFU {100 * row['speed/mfu']:.0f}%"
            bar.update(task, completed=row["step"], description=text)

        yield update


# --- sample ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SampleArgs:
    """Let a model write. Example: anew sample runs/demo --prompt "def " --tokens 200"""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(help="a run folder, a checkpoint folder or a Hugging Face GPT-2 folder")]
    prompt: Annotated[str, tyro.conf.arg(help="text to continue; none: start a new document")] = ""
    prompt_file: Annotated[str, tyro.conf.arg(help="read the prompt from this file; - is standard input")] = ""
    interactive: Annotated[bool, tyro.conf.arg(help="ask for prompts, one a line, until an empty one")] = False
    tokens: Annotated[int, tyro.conf.arg(help="most new tokens a sample; it also ends at end of text")] = 128
    count: Annotated[int, tyro.conf.arg(help="samples of the prompt")] = 1
    temperature: Annotated[float, tyro.conf.arg(help="0: always the likeliest token; 1: as the model says")] = 0.8
    top_k: Annotated[int, tyro.conf.arg(help="draw among this many likeliest tokens; 0: all")] = 50
    top_p: Annotated[float, tyro.conf.arg(help="draw among the likeliest tokens that hold this share")] = 1.0
    seed: Annotated[int, tyro.conf.arg(help="the same seed draws the same text")] = 1337
    device: Annotated[Device, tyro.conf.arg(help="where to compute; auto: cuda, else mps, else cpu")] = "auto"
    precision: Annotated[
        Literal["auto", "fp32", "tf32", "bf16", "fp16"], tyro.conf.arg(help="auto: the fastest that is safe on the device")
    ] = "auto"
    json: Annotated[bool, tyro.conf.arg(help="the last line of standard output is one JSON object")] = False


def run_sample(argv: list[str]) -> None:
    """Let a model write: from a prompt, a file, or a conversation of prompts."""
    a = tyro.cli(SampleArgs, args=argv, prog="anew sample")
    if a.count < 1:
        raise UserError(f"count {a.count} must be at least 1.")
    device = runtime.pick_device(a.device)
    precision, _ = runtime.pick_precision(a.precision, device)
    torch.set_float32_matmul_precision(runtime.MATMUL[precision])
    model = weights.load_model(a.model, device, runtime.DTYPES[precision])
    tokenizer = Tokenizer.of_size(model.config.vocab_size)
    prompts = iter(input, "") if a.interactive else iter([_prompt(a)])
    texts: list[str] = []
    try:
        for prompt in prompts:
            texts = _write_samples(model, tokenizer, prompt, a)
    except EOFError:
        pass
    if a.json:
        print(json.dumps({"model": a.model, "prompt": a.prompt, "samples": texts}))


def _prompt(a: SampleArgs) -> str:
    if a.prompt and a.prompt_file:
        raise UserError("give --prompt or --prompt-file, not both.")
    if not a.prompt_file:
        return a.prompt
    try:
        return sys.stdin.read() if a.prompt_file == "-" else Path(a.prompt_file).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"the prompt file {a.prompt_file} cannot be read ({error.strerror}).") from error


def _write_samples(model: Any, tokenizer: Tokenizer, prompt: str, a: SampleArgs) -> list[str]:
    """Print the samples and return their texts. A single one appears as it is drawn; several are drawn together."""
    ids = tokenizer.encode(prompt) or [tokenizer.end_of_text]
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in range(a.count)]
    texts, open_rows = [prompt] * a.count, set(range(a.count))
    if a.count == 1:
        print(prompt, end="", flush=True)
    for row_ids in stream(model, [ids] * a.count, a.tokens, a.temperature, a.top_k, a.top_p, a.seed):
        for i in sorted(open_rows):
            if row_ids[i] == tokenizer.end_of_text:
                open_rows.discard(i)
                continue
            piece = decoders[i].decode(tokenizer.decode_bytes([row_ids[i]]))
            texts[i] += piece
            if a.count == 1:
                print(piece, end="", flush=True)
        if not open_rows:
            break
    if a.count == 1:
        print()
    else:
        for i, text in enumerate(texts, 1):
            print(f"--- {i} of {a.count} ---\n{text}")
    return texts


# --- prepare -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PrepareArgs:
    """Turn text into a folder of tokens. Example: anew prepare my-texts/ --out data/mine --tokenizer gpt2"""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(help="a file, folder, glob, stdlib or tinyshakespeare")]
    out: Annotated[str, tyro.conf.arg(help="data folder to write; it must not exist yet")]
    tokenizer: Annotated[Literal["gpt2", "bytes"], tyro.conf.arg(help="gpt2: 50,257 tokens; bytes: 257")] = "gpt2"
    json: Annotated[bool, tyro.conf.arg(help="the last line of standard output is one JSON object")] = False


def run_prepare(argv: list[str]) -> None:
    """Turn text into a folder of tokens that training reads."""
    a = tyro.cli(PrepareArgs, args=argv, prog="anew prepare")
    out = Path(a.out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists already; choose another --out or remove it.")
    source = sources.find(a.source)
    prepare.prepare(source, source.revision(), Tokenizer.named(a.tokenizer), out)
    folder = DataFolder.open(out)
    counts = {split: folder.n_tokens(split) for split in ("train", "val")}
    print(f"{out}: {counts['train']:,} training and {counts['val']:,} validation tokens ({a.tokenizer}) of {source.name}")
    if a.json:
        print(json.dumps({"out": str(out), "tokenizer": a.tokenizer, "revision": folder.revision, **counts}))


VERBS = {"train": run_train, "sample": run_sample, "prepare": run_prepare}


@contextmanager
def _console() -> Iterator[None]:
    """Lines of the package's log go to standard error through loguru; results go to standard output."""

    class Forward(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logger.log(record.levelname, record.getMessage())

    logger.remove()
    logger.add(lambda text: print(text, end="", file=sys.stderr), format="{message}", level="INFO")
    forward, log = Forward(), logging.getLogger("anew")
    log.addHandler(forward)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(forward)
