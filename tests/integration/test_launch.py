"""Run each launcher as its platform does, with real training processes and AWS's own clients."""

import base64
import contextlib
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from anew import Config
from anew.checkpoint.folder import newest_valid
from anew.training import run_log
from tests.faults.common import flags, losses, tiny, train_run
from tests.support import ROOT
from tests.support.aws import AWS, serving
from tests.support.ranks import run_ranks

if os.name == "nt":
    pytest.skip("launchers are for Linux", allow_module_level=True)

LAUNCH = ROOT / "launch"


@pytest.fixture
def aws() -> Iterator[AWS]:
    with serving(AWS()) as service:
        yield service


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Return the config of an uninterrupted run on two ranks."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    config = tiny(folder, steps=400, save_every=25, warmup_steps=2)
    assert run_ranks(2, train_run, config) == [("ok", "done")] * 2
    return config


def settings_of(config: Config, *left_out: str) -> dict[str, str]:
    """Return the flags of a config and their values, without --data, --out and `left_out`."""
    words = flags(config)
    values = dict(zip(words[::2], words[1::2], strict=True))
    return {
        name: value for name, value in values.items() if name not in ("--data", "--out", *left_out)
    }


def as_words(settings: dict[str, str]) -> list[str]:
    """Return flags and values as words of a command line."""
    return [word for pair in settings.items() for word in pair]


def run(
    command: list[Any], environment: dict[str, str], seconds: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run a command with additional environment variables."""
    return subprocess.run(
        [str(word) for word in command],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"the condition is not true after {seconds} s"
        time.sleep(0.02)


def recorded_step(run_folder: Path) -> int:
    """Return the last step in a run's metrics.jsonl, or 0."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        rows = (run_folder / "metrics.jsonl").read_text().splitlines()
        return int(json.loads(rows[-1])["step"])
    return 0


def run_state(run_folder: Path) -> dict[str, Any]:
    """Return the content of a run's run_state.json."""
    state: dict[str, Any] = json.loads((run_folder / "run_state.json").read_text())
    return state


# --- SageMaker ------------------------------------------------------------------------------------


SAGEMAKER_LAUNCHER = [sys.executable, "-m", "sagemaker_training.cli.train"]
NO_LAUNCHER = "AWS's launcher is not installed (make test installs it where it compiles)"


def fill_container(base: Path, job: dict[str, Any], text: Path) -> dict[str, str]:
    """Fill `base` as SageMaker fills /opt/ml for a job. Return the environment variables."""
    for folder in ("input/data/training", "checkpoints", "model", "output/data", "code"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    shutil.copy2(text, base / "input/data/training")
    channels: dict[str, Any] = {channel["ChannelName"]: {} for channel in job["InputDataConfig"]}
    resources = {
        "current_host": "localhost",
        "hosts": ["localhost"],
        "current_instance_type": "ml.m5.large",
        "network_interface_name": "lo",
    }
    config = base / "input/config"
    config.mkdir(exist_ok=True)
    (config / "hyperparameters.json").write_text(json.dumps(job["HyperParameters"]))
    (config / "resourceconfig.json").write_text(json.dumps(resources))
    (config / "inputdataconfig.json").write_text(json.dumps(channels))
    return {
        "SAGEMAKER_BASE_DIR": str(base),
        "TRAINING_JOB_NAME": job["TrainingJobName"],
        "OMP_NUM_THREADS": "1",
    }


def start_job(aws: AWS, config: Config, *settings: str) -> dict[str, Any]:
    """Run the documented command. Return the job that it requests from SageMaker."""
    command = [sys.executable, LAUNCH / "sagemaker_start.py", "shakespeare"]
    command += ["--role", "arn:aws:iam::1:role/r", "--bucket", "mine", "--image", "some/image:1"]
    command += ["--spot", "--processes", "2", "--data", "s3://mine/text"]
    command += ["--", *as_words(settings_of(config)), *settings]
    started = run(command, aws.environment)
    assert started.returncode == 0, started.stderr
    job = aws.jobs[-1]
    assert started.stdout.strip() == job["TrainingJobName"]
    return job


def test_sagemaker_job_continues_after_a_spot_interruption(
    aws: AWS, reference: Config, tmp_path: Path
) -> None:
    """The job is started twice by AWS's own launcher; the first start is killed."""
    pytest.importorskip("sagemaker_training", reason=NO_LAUNCHER)
    job = start_job(aws, reference)
    assert job["CheckpointConfig"]["S3Uri"] == "s3://mine/anew/shakespeare/checkpoints"
    stopping_condition = {"MaxRuntimeInSeconds": 86_400, "MaxWaitTimeInSeconds": 172_800}
    assert job["StoppingCondition"] == stopping_condition
    base = tmp_path / "ml"
    environment = aws.environment | fill_container(base, job, Path(reference.data.data))
    kept = base / "checkpoints" / "shakespeare"
    first_log = tmp_path / "first.log"
    with first_log.open("w") as log:
        first = subprocess.Popen(
            SAGEMAKER_LAUNCHER,
            env={**os.environ, **environment},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        wait_for(lambda: recorded_step(kept) >= 60 or first.poll() is not None)
        assert first.poll() is None, first_log.read_text()
        os.killpg(first.pid, signal.SIGKILL)  # torchrun's processes notice it and end
        first.wait()
    with FileLock(kept / ".lock", timeout=30):
        pass
    second = run(SAGEMAKER_LAUNCHER, environment)
    assert second.returncode == 0, second.stdout + second.stderr
    log_text = (kept / "log.txt").read_text()
    assert "resumed from step-" in log_text
    assert "2 ranks x 4 sequences" in log_text
    assert losses(kept) == losses(reference.folder)
    published = {path.name for path in (base / "model").iterdir()}
    assert {"model.safetensors", "config.json"} <= published
    assert not {"optimizer.safetensors", "manifest.json"} & published
    rows = run_log.read_metrics(base / "output" / "data")
    assert len(rows) == len(run_log.read_metrics(reference.folder))
    assert not (base / "output" / "failure").exists()
    source = io.BytesIO(aws.objects["/mine/anew/shakespeare/source.tar.gz"])
    with tarfile.open(fileobj=source) as tar:
        names = set(tar.getnames())
    assert {"src/anew/training/trainer.py", "launch/sagemaker.py", "pyproject.toml"} <= names


def test_sagemaker_job_with_an_invalid_setting_writes_the_reason(aws: AWS, tmp_path: Path) -> None:
    pytest.importorskip("sagemaker_training", reason=NO_LAUNCHER)
    config = tiny(tmp_path / "run")
    job = start_job(aws, config, "--n-head", "3")
    base = tmp_path / "ml"
    environment = aws.environment | fill_container(base, job, Path(config.data.data))
    done = run(SAGEMAKER_LAUNCHER, environment)
    assert done.returncode != 0
    assert "torch.distributed.run" not in done.stderr, "no training process is started"
    reason = (base / "output" / "failure").read_text()
    assert reason == "n_embd 32 cannot be cut into 3 heads: 32 / 3 is not whole."


def test_sagemaker_sdk_v3_job_is_the_same_run(reference: Config, tmp_path: Path) -> None:
    """The drivers of SDK v3 start torchrun themselves.

    They export the hyperparameters as decoded JSON in SM_HPS, and pass them a second time as
    arguments with a spelling of their own, which the script ignores.
    """
    base = tmp_path / "ml"
    hyperparameters: dict[str, Any] = {
        "recipe": "shakespeare",
        "compile": False,
        "one_batch": False,
        "init": None,
    }
    for flag, text in settings_of(reference, "--compile").items():
        value: Any = text
        with contextlib.suppress(ValueError):
            value = json.loads(text)
        hyperparameters[flag.removeprefix("--").replace("-", "_")] = value
    job = {
        "HyperParameters": {},
        "TrainingJobName": "x",
        "InputDataConfig": [{"ChannelName": "train"}],
    }
    environment = fill_container(base, job, Path(reference.data.data))
    environment |= {
        "SM_HPS": json.dumps(hyperparameters),
        "SM_CHANNELS": json.dumps(["code", "sm_drivers", "train"]),
        "SM_CHANNEL_TRAIN": str(base / "input/data/training"),
        "SM_CHANNEL_CODE": "/code",
        "SM_CHANNEL_SM_DRIVERS": "/drivers",
        "SM_MODEL_DIR": str(base / "model"),
        "SM_OUTPUT_DATA_DIR": str(base / "output/data"),
        "SM_HOSTS": '["algo-1"]',
        "SM_CURRENT_HOST": "algo-1",
        "SM_NUM_GPUS": "0",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc_per_node=2"]
    command.append(str(LAUNCH / "sagemaker.py"))
    for name, value in hyperparameters.items():
        command += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    done = run(command, environment)
    assert done.returncode == 0, done.stderr
    assert losses(base / "checkpoints" / "shakespeare") == losses(reference.folder)
    assert (base / "model" / "model.safetensors").exists()


# --- EC2 ------------------------------------------------------------------------------------------


def run_ec2(aws: AWS, *words: str) -> subprocess.CompletedProcess[str]:
    """Run launch/ec2.py for one region, without pauses between its requests."""
    command = [sys.executable, LAUNCH / "ec2.py", "shakespeare", "--bucket", "mine"]
    command += ["--regions", "us-east-1", "--every", "0.05"]
    return run([*command, *words], aws.environment)


def test_ec2_starts_one_machine_in_the_cheapest_zone_with_capacity(aws: AWS) -> None:
    aws.refuse = lambda zone: "InsufficientInstanceCapacity" if zone.endswith("b") else ""
    done = run_ec2(aws, "--max-price", "12", "--", "--steps", "7", "--sample-prompt", "it's")
    assert done.returncode == 0, done.stderr
    zones = [form["Placement.AvailabilityZone"] for form in aws.launches]
    assert zones == ["us-east-1b", "us-east-1c"]
    refused, accepted = aws.launches
    assert accepted["InstanceMarketOptions.SpotOptions.MaxPrice"] == "12.0000"
    assert accepted["InstanceInitiatedShutdownBehavior"] == "terminate"
    assert accepted["ClientToken"] != refused["ClientToken"]
    script = base64.b64decode(accepted["UserData"]).decode()
    assert script.startswith("#!/bin/bash\n")
    assert "export ANEW_S3=s3://mine/anew/shakespeare" in script
    exports = script.split("set -uo")[0]
    print_words = exports + 'eval "words=($ANEW_TRAIN)"; printf "%s|" "${words[@]}"'
    printed = subprocess.run(["bash", "-c", print_words], capture_output=True)
    assert printed.stdout.decode() == "shakespeare|--steps|7|--sample-prompt|it's|"
    again = run_ec2(aws, "--max-price", "12")
    assert again.returncode == 0
    assert "i-1 (us-east-1) is running shakespeare" in again.stdout
    assert len(aws.launches) == 2, "a run that has a machine gets no second one"


def test_ec2_repeats_the_request_until_the_price_is_low_enough(aws: AWS) -> None:
    aws.prices = lambda requests: {"us-east-1a": 20.0 if requests < 4 else 5.0}
    done = run_ec2(aws, "--max-price", "6")
    assert done.returncode == 0, done.stderr
    assert aws.price_requests == 4
    assert len(aws.launches) == 1
    assert "us-east-1a: $20.00 an hour, above $6.00" in done.stdout


def test_ec2_stops_at_errors_that_waiting_does_not_change(aws: AWS) -> None:
    aws.refuse = lambda _: "MaxSpotInstanceCountExceeded"
    done = run_ec2(aws, "--max-price", "12")
    assert done.returncode == 2
    assert "ask AWS for a higher quota" in done.stderr
    assert len(aws.launches) == 1
    aws.prices = lambda _: {}
    assert "choose another --instance" in run_ec2(aws, "--max-price", "12").stderr
    aws.objects["/mine/anew/shakespeare/run/run_state.json"] = b'{"status": "complete"}'
    assert "the run shakespeare is complete" in run_ec2(aws, "--max-price", "12").stdout
    assert "Traceback" not in done.stderr


# Imitated commands. `aws` copies from and to a folder; `shutdown` and `scontrol` record calls.
AWS_COMMAND = """#!/usr/bin/env python3
import fnmatch, os, shutil, sys
from pathlib import Path

def local(name):
    return Path(os.environ["FAKE_S3"] + name[4:]) if name.startswith("s3:/") else Path(name)

def files(folder):
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}

action, source, target = sys.argv[2], local(sys.argv[3]), local(sys.argv[4])
if action == "cp":
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target)
elif source.exists():
    options = list(zip(sys.argv, sys.argv[1:]))
    excluded = [value for option, value in options if option == "--exclude"]
    names = {
        name
        for name in files(source)
        if not any(fnmatch.fnmatch(str(name), pattern) for pattern in excluded)
    }
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / name, target / name)
    if "--delete" in sys.argv:
        for name in files(target) - names:
            (target / name).unlink()
"""
SCONTROL_COMMAND = """#!/bin/bash
[ "$1" = show ] && echo localhost || echo "$@" >> "$FAKE_REQUEUE"
"""
FAKE_COMMANDS = {
    "aws": AWS_COMMAND,
    "shutdown": '#!/bin/bash\necho "$@" >> "$FAKE_SHUTDOWN"\n',
    "srun": '#!/bin/bash\nshift\nexec "$@"\n',
    "scontrol": SCONTROL_COMMAND,
    "scancel": "#!/bin/bash\nexit 1\n",
}


@pytest.fixture
def path_with_fakes(tmp_path: Path) -> str:
    """Return a PATH on which the imitated commands come first."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in FAKE_COMMANDS.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@contextlib.contextmanager
def booted(home: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run ec2_user_data.sh as a machine with this home; it ends by itself after the block."""
    with subprocess.Popen(
        ["bash", LAUNCH / "ec2_user_data.sh"],
        env={**os.environ, **environment, "ANEW_HOME": str(home)},
        stdout=subprocess.DEVNULL,
    ) as process:
        yield process
        assert process.wait(90) == 0, (home / "boot.log").read_text()


def test_ec2_machine_saves_when_interrupted_and_the_next_one_finishes(
    aws: AWS, reference: Config, path_with_fakes: str, tmp_path: Path
) -> None:
    """Two machines run ec2_user_data.sh; a metadata service interrupts the first one."""
    bucket = tmp_path / "s3" / "mine" / "anew" / "shakespeare"
    bucket.mkdir(parents=True)
    with tarfile.open(bucket / "source.tar.gz", "w:gz") as tar:
        tar.add(LAUNCH / "source.py", "source.py")
    settings = as_words(settings_of(reference, "--parallel"))
    environment = {
        "PATH": path_with_fakes,
        "FAKE_S3": str(tmp_path / "s3"),
        "FAKE_SHUTDOWN": str(tmp_path / "shutdown"),
        "OMP_NUM_THREADS": "1",
        "ANEW_S3": "s3://mine/anew/shakespeare",
        "ANEW_MINUTES": "60",
        "ANEW_TRAIN": shlex.join(["shakespeare", "--data", reference.data.data, *settings]),
        "ANEW_PYTHON": sys.executable,
        "ANEW_PROCESSES": "2",
        "ANEW_METADATA": aws.url,
        "ANEW_EVERY": "0.1",
        "ANEW_COPY_EVERY": "1",
        "NO_PROXY": "*",
    }
    with booted(tmp_path / "first", environment) as machine:
        wait_for(lambda: recorded_step(tmp_path / "first" / "run") >= 40)
        assert machine.poll() is None
        aws.objects["/latest/api/token"] = b"t"
        aws.objects["/latest/meta-data/spot/instance-action"] = b'{"action": "terminate"}'
    interrupted = run_state(bucket / "run")
    assert interrupted["status"] == "preempted"
    aws.objects.clear()
    with booted(tmp_path / "second", environment):
        pass
    assert run_state(bucket / "run")["status"] == "complete"
    saved_step = interrupted["saved_step"]
    assert saved_step == interrupted["step"] or saved_step >= 40
    assert losses(bucket / "run") == losses(reference.folder)
    _, skipped = newest_valid(bucket / "run")
    assert skipped == []
    assert (tmp_path / "shutdown").read_text().splitlines() == ["-h +60", "-h now"] * 2
    assert f"resumed from step-{saved_step:08}" in (bucket / "boot.log").read_text()


# --- Slurm ----------------------------------------------------------------------------------------


def test_slurm_job_is_requeued_at_its_time_limit_and_continues(
    reference: Config, path_with_fakes: str, tmp_path: Path
) -> None:
    config = reference.override(out=str(tmp_path / "run"))
    environment = {
        "PATH": path_with_fakes,
        "FAKE_REQUEUE": str(tmp_path / "requeue"),
        "ANEW_PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_CPUS_PER_TASK": "2",
    }
    command = ["bash", str(LAUNCH / "slurm.sbatch"), "shakespeare", *flags(config)]
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(command, env={**os.environ, **environment}, stdout=log, stderr=log) as job,
    ):
        wait_for(lambda: recorded_step(config.folder) >= 40 or job.poll() is not None)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(60) == 0, (tmp_path / "log").read_text()
    assert (tmp_path / "requeue").read_text() == "requeue 77\n"
    stopped = run_state(config.folder)
    assert stopped["status"] == "preempted"
    assert stopped["saved_step"] == recorded_step(config.folder)
    done = run(command, environment | {"SLURM_RESTART_COUNT": "1"})
    assert done.returncode == 0, done.stderr
    assert losses(config.folder) == losses(reference.folder)
    requeues = (tmp_path / "requeue").read_text()
    assert requeues == "requeue 77\n", "a complete run is not requeued"
