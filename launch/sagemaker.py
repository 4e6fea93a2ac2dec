"""Train a recipe inside a SageMaker training job, on every GPU of every host.

    python launch/sagemaker_start.py gpt2-124m ...      # starts a job with this entry point

The script is the entry point of a source folder that holds the repository; any other way to start
such a job works as well. Settings are hyperparameters (`recipe`, `batch_tokens`, ...). The
hyperparameter `processes` is the number of processes on each host, by default one for each GPU. A
job that was interrupted continues from its last checkpoint. The script works with both generations
of SageMaker's software:

| where | what |
|---|---|
| SM_HPS | the hyperparameters as JSON; arguments are ignored, toolkits spell them differently |
| SM_CHANNEL_TRAINING, or the only channel | value of `data`, unless it is a hyperparameter |
| /opt/ml/checkpoints | the run folder; SageMaker keeps it in S3 for an interrupted spot job |
| SM_MODEL_DIR | the newest checkpoint, as a Hugging Face folder |
| SM_OUTPUT_DATA_DIR | metrics.jsonl, samples.jsonl, log.txt, config.json, run_state.json |
| /opt/ml/output/failure | one sentence, if the job failed |

Without a channel and without `data`, the job downloads the recipe's data. SageMaker does not
forward SIGTERM to the script, so a spot interruption costs at most `save_minutes` minutes of
training (10 by default).
"""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SAGEMAKER = Path(os.environ.get("SAGEMAKER_BASE_DIR", "/opt/ml"))
NOT_SETTINGS = ("recipe", "processes", "model_dir")  # SageMaker adds model_dir
NOT_DATA = ("code", "sm_drivers", "model")  # channels that carry the job itself
RECORDS = ("metrics.jsonl", "samples.jsonl", "log.txt", "config.json", "run_state.json")
MESSAGE_LIMIT = 1024  # characters of a failure message that SageMaker's API shows


def main() -> None:
    """Train, and report an error in the way that SageMaker expects."""
    install()
    os.environ.setdefault("ANEW_CACHE", str(SAGEMAKER / "anew-cache"))

    from anew.errors import LostRank, Preempted

    try:
        train_and_publish(json.loads(os.environ.get("SM_HPS", "{}")))
    except Preempted as error:
        print(f"anew: {error}", file=sys.stderr)
        sys.exit(75)
    except LostRank as error:
        print(f"anew: {error}", file=sys.stderr)
        time.sleep(5)  # lets the lost rank record its own, more precise error first
        report_failure(str(error))
        sys.exit(1)
    except ValueError as error:  # a UserError, or an invalid hyperparameter
        report_failure(str(error))
        sys.exit(2)
    except Exception as error:
        report_failure(f"{type(error).__name__}: {error}")
        raise


def train_and_publish(hyperparameters: dict[str, Any]) -> None:
    """Train in this process, or replace it by a torchrun that starts the training processes."""
    from anew.cli.main import console
    from anew.cli.train import run_train

    hosts = sorted(json.loads(os.environ.get("SM_HOSTS", "[]"))) or ["localhost"]
    gpus = os.environ.get("SM_NUM_GPUS") or 0
    processes = int(hyperparameters.get("processes") or gpus) or 1
    channel_names = json.loads(os.environ.get("SM_CHANNELS", "[]"))
    channels = {name: os.environ[f"SM_CHANNEL_{name.upper()}"] for name in channel_names}
    with console():
        arguments = train_arguments(hyperparameters, channels)
        is_launched_by_torchrun = "RANK" in os.environ
        if not is_launched_by_torchrun and processes * len(hosts) > 1:
            # The dry run reports invalid settings once instead of in each process and restart.
            run_train([*arguments, "--dry-run"])
            this_host = os.environ.get("SM_CURRENT_HOST", hosts[0])
            command = torchrun_command(processes, hosts, this_host)
            os.execv(command[0], command)
        run_train(arguments)
        if os.environ.get("RANK", "0") == "0":
            publish(Path(arguments[arguments.index("--out") + 1]))


def train_arguments(hyperparameters: dict[str, Any], channels: dict[str, str]) -> list[str]:
    """Return the arguments of `anew train` for a job's hyperparameters and data channels.

    Raises ValueError for a hyperparameter that has no equivalent, and for an ambiguous channel.
    """
    settings = {
        name.replace("-", "_"): value
        for name, value in hyperparameters.items()
        if not name.startswith("sagemaker_")
    }
    recipe = str(settings.get("recipe", "gpt2-124m"))
    arguments = [recipe]
    for name, value in settings.items():
        if name not in NOT_SETTINGS and value is not None:
            arguments += setting_arguments(name, value)
    if "data" not in settings:
        folder = data_channel(channels)
        if folder:
            arguments += ["--data", folder]
    if settings.get("out") is None:
        out = SAGEMAKER / "checkpoints"
        if not out.is_dir():
            out = SAGEMAKER / "output" / "data"
        arguments += ["--out", str(out / recipe)]
    return arguments


def setting_arguments(name: str, value: Any) -> list[str]:
    """Return one hyperparameter as arguments of `anew train`."""
    from anew.cli.args import SWITCHES

    if isinstance(value, (list, dict)):
        raise ValueError(
            f"the hyperparameter {name} is {json.dumps(value)}; it must be a single value."
        )
    flag = name.replace("_", "-")
    if name in SWITCHES | {"memorise", "json"}:
        is_on = str(value).lower() in ("true", "1", "yes")
        return [f"--{flag}" if is_on else f"--no-{flag}"]
    if isinstance(value, bool):
        value = "on" if value else "off"
    return [f"--{flag}", str(value)]


def data_channel(channels: dict[str, str]) -> str:
    """Return the folder of the channel that holds the training data, or "" without one."""
    data = {name: path for name, path in channels.items() if name not in NOT_DATA}
    for name in ("training", "train"):
        if name in data:
            return data[name]
    if len(data) > 1:
        raise ValueError(f"the channels are {', '.join(data)}; name one of them training.")
    return next(iter(data.values()), "")


def torchrun_command(processes: int, hosts: list[str], this_host: str) -> list[str]:
    """Return the command that starts this host's processes and connects them to other hosts'."""
    command = [sys.executable, "-m", "torch.distributed.run"]
    if len(hosts) == 1:
        command += ["--standalone"]
    else:
        command += ["--nnodes", str(len(hosts)), "--node-rank", str(hosts.index(this_host))]
        command += ["--master-addr", hosts[0], "--master-port", "7777"]
    return [*command, "--nproc-per-node", str(processes), "--max-restarts", "3", __file__]


def publish(run: Path) -> None:
    """Copy the model and the run's records to the folders that SageMaker uploads."""
    from anew.checkpoint.folder import newest_valid

    model = Path(os.environ.get("SM_MODEL_DIR", SAGEMAKER / "model"))
    output = Path(os.environ.get("SM_OUTPUT_DATA_DIR", SAGEMAKER / "output" / "data"))
    checkpoint, _ = newest_valid(run)
    if checkpoint is not None:
        ignore = shutil.ignore_patterns("optimizer.safetensors", "trainer.json", "manifest.json")
        shutil.copytree(checkpoint, model, dirs_exist_ok=True, ignore=ignore)
    output.mkdir(parents=True, exist_ok=True)
    if run.resolve() == output.resolve():
        return
    for name in RECORDS:
        if (run / name).exists():
            shutil.copy2(run / name, output / name)


def report_failure(message: str) -> None:
    """Print an error, and write it to the file that becomes the job's FailureReason.

    The first process that fails writes the file, because later errors are usually consequences.
    """
    print(f"anew: {message}", file=sys.stderr)
    failure = Path(os.environ.get("SM_OUTPUT_FAILURE", SAGEMAKER / "output" / "failure"))
    failure.parent.mkdir(parents=True, exist_ok=True)
    if not failure.exists():
        failure.write_text(message[:MESSAGE_LIMIT], encoding="utf-8")


def install() -> None:
    """Make `import anew` work from the source folder.

    One process on each host installs the packages that anew needs; the others wait for it.
    """
    source = str(ROOT / "src")
    sys.path.insert(0, source)
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = source if not inherited else source + os.pathsep + inherited
    imports = "import anew.cli.train, torch.utils.tensorboard"
    with (Path(tempfile.gettempdir()) / "anew-install.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        check = subprocess.run([sys.executable, "-c", imports], stderr=subprocess.DEVNULL)
        if check.returncode != 0:
            pip = [sys.executable, "-m", "pip", "install", "--quiet"]
            subprocess.run([*pip, f"{ROOT}[tensorboard,vocabulary]"], check=True)


if __name__ == "__main__":
    main()
