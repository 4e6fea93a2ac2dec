"""What runs inside a SageMaker training job: a recipe of anew, on every GPU of every host, going on where an interrupted job stopped.

    python launch/sagemaker_start.py gpt2-124m ...      # starts such a job; any other way to start one works as well

It is the entry point of the source folder that holds the repository. Settings are hyperparameters (`recipe`, `batch_tokens`, ...);
`processes` says how many a host, if not one a GPU. It follows the contract of both generations of SageMaker's software:

| where | what |
|---|---|
| SM_HPS | the hyperparameters as JSON; the arguments are not read, because their spelling differs from one toolkit to the other |
| SM_CHANNEL_TRAINING, or the only channel | `data`, unless that is a hyperparameter; without any, what the recipe downloads |
| /opt/ml/checkpoints | the run folder: SageMaker keeps it in S3 and brings it back to a spot job that starts again |
| SM_MODEL_DIR | the newest checkpoint as a Hugging Face folder |
| SM_OUTPUT_DATA_DIR | metrics.jsonl, samples.jsonl, log.txt, config.json, run_state.json |
| /opt/ml/output/failure | one sentence, if something went wrong |

SageMaker does not pass SIGTERM on to a script: what a spot interruption can cost is what `save_minutes` says, 10 if nothing is said.
"""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BASE = Path(os.environ.get("SAGEMAKER_BASE_DIR", "/opt/ml"))
NOT_SETTINGS = ("recipe", "processes", "model_dir")  # SageMaker adds model_dir
NOT_DATA = ("code", "sm_drivers", "model")  # channels that carry the job itself


def arguments(hyperparameters: dict[str, Any], channels: dict[str, str], base: Path) -> list[str]:
    """The command line of `anew train` that a job's settings mean. Raises ValueError with a sentence for what cannot be one."""
    from anew.cli.args import SWITCHES as settings_switches

    settings = {
        name.replace("-", "_"): value
        for name, value in hyperparameters.items()
        if not name.startswith("sagemaker_")
    }
    recipe = str(settings.get("recipe", "gpt2-124m"))
    line = [recipe]
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if name in NOT_SETTINGS or value is None:
            continue
        if isinstance(value, (list, dict)):
            raise ValueError(
                f"the hyperparameter {name} is {json.dumps(value)}; it must be one value."
            )
        if name in settings_switches | {"memorise", "json"}:
            line.append(flag if str(value).lower() in ("true", "1", "yes") else f"--no-{flag[2:]}")
        else:
            line += [
                flag,
                {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value),
            ]
    data = {name: path for name, path in channels.items() if name not in NOT_DATA}
    if "data" not in settings and data:
        named = [name for name in ("training", "train") if name in data] or list(data)
        if len(data) > 1 and named == list(data):
            raise ValueError(
                f"there are the channels {', '.join(data)}; call one of them training."
            )
        line += ["--data", data[named[0]]]
    if "out" not in settings:
        kept = base / "checkpoints"
        line += ["--out", str((kept if kept.is_dir() else base / "output" / "data") / recipe)]
    return line


def torchrun(processes: int, hosts: list[str], me: str) -> list[str]:
    """The command that starts `processes` on this host and waits for those on the others."""
    several = [
        "--node-rank",
        str(hosts.index(me)),
        "--master-addr",
        hosts[0],
        "--master-port",
        "7777",
    ]
    how = ["--nnodes", str(len(hosts)), *several] if len(hosts) > 1 else ["--standalone"]
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *how,
        "--nproc-per-node",
        str(processes),
        "--max-restarts",
        "3",
        __file__,
    ]


def main() -> None:
    """Train, or become the torchrun that starts the processes which do."""
    hyperparameters = json.loads(os.environ.get("SM_HPS", "{}"))
    hosts = sorted(json.loads(os.environ.get("SM_HOSTS", "[]"))) or ["localhost"]
    processes = (
        int(hyperparameters.get("processes") or os.environ.get("SM_NUM_GPUS", "0") or 0) or 1
    )
    install()
    os.environ.setdefault("ANEW_CACHE", str(BASE / "anew-cache"))

    from anew.cli.main import console
    from anew.cli.train import run_train
    from anew.errors import LostRank, Preempted

    channels = {
        name: os.environ[f"SM_CHANNEL_{name.upper()}"]
        for name in json.loads(os.environ.get("SM_CHANNELS", "[]"))
    }
    try:
        with console():
            line = arguments(hyperparameters, channels, BASE)
            if "RANK" not in os.environ and processes * len(hosts) > 1:
                run_train(
                    [*line, "--dry-run"]
                )  # wrong settings are said once, and not by each process and each restart
                command = torchrun(processes, hosts, os.environ.get("SM_CURRENT_HOST", hosts[0]))
                os.execv(command[0], command)
            run_train(line)
            if os.environ.get("RANK", "0") == "0":
                publish(
                    Path(line[line.index("--out") + 1])
                    if "--out" in line
                    else Path(hyperparameters["out"])
                )
    except Preempted as error:
        print(f"anew: {error}", file=sys.stderr)
        sys.exit(75)
    except LostRank as error:
        print(f"anew: {error}", file=sys.stderr)
        time.sleep(5)  # the rank that was lost may have better to say
        fail(str(error), 1)
    except ValueError as error:  # UserError, or a hyperparameter
        fail(str(error), 2)
    except Exception as error:
        fail(f"{type(error).__name__}: {error}", 0)
        raise


def publish(run: Path) -> None:
    """Put what the job is for where SageMaker takes it from."""
    from anew.checkpoint import folder as checkpoint

    newest, _ = checkpoint.newest(run)
    model, output = (
        Path(os.environ.get(name, BASE / other))
        for name, other in (("SM_MODEL_DIR", "model"), ("SM_OUTPUT_DATA_DIR", "output/data"))
    )
    if newest is not None:
        ours = shutil.ignore_patterns("optimizer.safetensors", "trainer.json", "manifest.json")
        shutil.copytree(newest, model, dirs_exist_ok=True, ignore=ours)
    output.mkdir(parents=True, exist_ok=True)
    for name in ("metrics.jsonl", "samples.jsonl", "log.txt", "config.json", "run_state.json"):
        if (run / name).exists() and run.resolve() != output.resolve():
            shutil.copy2(run / name, output / name)


def fail(sentence: str, code: int) -> None:
    """Say why, also in the file from which SageMaker takes the job's FailureReason; the first to fail is right. Leaves with `code`."""
    print(f"anew: {sentence}", file=sys.stderr)
    failure = Path(os.environ.get("SM_OUTPUT_FAILURE", BASE / "output" / "failure"))
    failure.parent.mkdir(parents=True, exist_ok=True)
    if not failure.exists():
        failure.write_text(sentence[:1024], encoding="utf-8")  # the API shows no more
    if code:
        sys.exit(code)


def install() -> None:
    """Make `import anew` work: from the source folder, with what it needs installed by one process a host."""
    sys.path.insert(0, str(ROOT / "src"))
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH")))
    )
    with (ROOT / ".install.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if subprocess.run(
            [sys.executable, "-c", "import anew.cli.main, torch.utils.tensorboard"],
            stderr=subprocess.DEVNULL,
        ).returncode:
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "pip",
                    "install",
                    "--quiet",
                    f"{ROOT}[tensorboard,vocabulary]",
                ],
                check=True,
            )


if __name__ == "__main__":
    main()
