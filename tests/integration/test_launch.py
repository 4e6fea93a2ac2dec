"""Where people run it: each launcher as its platform would use it, with real processes and real clients."""

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
from anew.checkpoint import folder as checkpoint
from anew.training import run_log as metrics
from anew.training.trainer import train
from tests.faults.common import flags, losses, tiny
from tests.support.aws import AWS, serving
from tests.support.ranks import run_ranks

if os.name == "nt":
    pytest.skip("launchers are for Linux", allow_module_level=True)

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"


@pytest.fixture
def aws() -> Iterator[AWS]:
    with serving(AWS()) as found:
        yield found


def plain(config: Config) -> None:
    train(config)


def settings_of(config: Config, *left_out: str) -> list[str]:
    """Flags but for data, out and `left_out`."""
    given = flags(config)
    pairs = dict(zip(given[::2], given[1::2], strict=True))
    return [
        word
        for name, value in pairs.items()
        if name not in ("--data", "--out", *left_out)
        for word in (name, value)
    ]


def run(
    command: list[Any], environment: dict[str, str], seconds: float = 120
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(c) for c in command],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def step_of(run_folder: Path) -> int:
    """The last step that a run has written down."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(json.loads((run_folder / "metrics.jsonl").read_text().splitlines()[-1])["step"])
    return 0


# --- SageMaker -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The run that nothing happened to, on two ranks."""
    config = tiny(
        tmp_path_factory.mktemp("whole") / "run", steps=150, save_every=25, warmup_steps=2
    )
    assert [status for status, _ in run_ranks(2, plain, config)] == ["ok", "ok"]
    return config


def container(base: Path, job: dict[str, Any], text: Path) -> dict[str, str]:
    """/opt/ml as SageMaker fills it for a job, under `base`."""
    for folder in (
        "input/config",
        "input/data/training",
        "checkpoints",
        "model",
        "output/data",
        "code",
    ):
        (base / folder).mkdir(parents=True, exist_ok=True)
    shutil.copy2(text, base / "input/data/training")
    config = base / "input/config"
    (config / "hyperparameters.json").write_text(json.dumps(job["HyperParameters"]))
    hosts = {
        "current_host": "localhost",
        "hosts": ["localhost"],
        "current_instance_type": "ml.m5.large",
        "network_interface_name": "lo",
    }
    (config / "resourceconfig.json").write_text(json.dumps(hosts))
    (config / "inputdataconfig.json").write_text(
        json.dumps({c["ChannelName"]: {} for c in job["InputDataConfig"]})
    )
    return {
        "SAGEMAKER_BASE_DIR": str(base),
        "TRAINING_JOB_NAME": job["TrainingJobName"],
        "OMP_NUM_THREADS": "1",
    }


def started(aws: AWS, config: Config, *more: str) -> dict[str, Any]:
    """What the documented command asks SageMaker for."""
    command = [
        sys.executable,
        LAUNCH / "sagemaker_start.py",
        "shakespeare",
        "--role",
        "arn:aws:iam::1:role/r",
        "--bucket",
        "mine",
    ]
    command += [
        "--image",
        "some/image:1",
        "--spot",
        "--processes",
        "2",
        "--data",
        "s3://mine/text",
        "--",
        *settings_of(config),
        *more,
    ]
    done = run(command, aws.environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == aws.jobs[-1]["TrainingJobName"]
    return aws.jobs[-1]


def test_sagemaker_with_its_own_launcher_and_a_spot_interruption(
    aws: AWS, whole: Config, tmp_path: Path
) -> None:
    pytest.importorskip(
        "sagemaker_training",
        reason="AWS's launcher is not installed (make test does it where it compiles)",
    )
    job = started(aws, whole)
    assert job["CheckpointConfig"]["S3Uri"] == "s3://mine/anew/shakespeare/checkpoints"
    assert job["StoppingCondition"] == {
        "MaxRuntimeInSeconds": 86_400,
        "MaxWaitTimeInSeconds": 172_800,
    }
    base = tmp_path / "ml"
    environment = {**aws.environment, **container(base, job, Path(whole.data.data))}
    launcher = [sys.executable, "-m", "sagemaker_training.cli.train"]
    kept = base / "checkpoints" / "shakespeare"
    with (tmp_path / "first.log").open("w") as log:
        first = subprocess.Popen(
            launcher,
            env={**os.environ, **environment},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        wait_for(lambda: step_of(kept) >= 60 or first.poll() is not None)
        assert first.poll() is None, (tmp_path / "first.log").read_text()
        os.killpg(first.pid, signal.SIGKILL)  # the machine is gone; torchrun's processes notice
        first.wait()
    with FileLock(kept / ".lock", timeout=30):
        pass
    done = run(launcher, environment)
    assert done.returncode == 0, done.stdout + done.stderr
    said = (kept / "log.txt").read_text()
    assert "resumed from step-" in said
    assert "2 ranks x 4 sequences" in said
    assert losses(kept) == losses(whole.folder)
    assert {"model.safetensors", "config.json"} <= {p.name for p in (base / "model").iterdir()}
    assert not {"optimizer.safetensors", "manifest.json"} & {
        p.name for p in (base / "model").iterdir()
    }
    assert len(metrics.read_metrics(base / "output" / "data")) == len(
        metrics.read_metrics(whole.folder)
    )
    assert not (base / "output" / "failure").exists()
    with tarfile.open(
        fileobj=io.BytesIO(aws.objects["/mine/anew/shakespeare/source.tar.gz"])
    ) as tar:
        assert {"src/anew/training/trainer.py", "launch/sagemaker.py", "pyproject.toml"} <= set(
            tar.getnames()
        )


def test_sagemaker_says_why_a_job_failed(aws: AWS, tmp_path: Path) -> None:
    whole = tiny(tmp_path / "run")
    pytest.importorskip(
        "sagemaker_training",
        reason="AWS's launcher is not installed (make test does it where it compiles)",
    )
    base = tmp_path / "ml"
    environment = {
        **aws.environment,
        **container(base, started(aws, whole, "--n-head", "3"), Path(whole.data.data)),
    }
    done = run([sys.executable, "-m", "sagemaker_training.cli.train"], environment)
    assert done.returncode != 0
    assert "torch.distributed.run" not in done.stderr, "no process was started for it"
    assert (
        base / "output" / "failure"
    ).read_text() == "n_embd 32 cannot be cut into 3 heads: 32 / 3 is not whole."


def test_sagemaker_sdk_v3_starts_torchrun_itself(whole: Config, tmp_path: Path) -> None:
    """Its drivers export SM_* with values decoded, and give the same settings as arguments, which are spelt in their own way."""
    base = tmp_path / "ml"
    given = settings_of(whole, "--compile")
    settings: dict[str, Any] = {
        "recipe": "shakespeare",
        "compile": False,
        "one_batch": False,
        "init": None,
    }
    for name, value in zip(given[::2], given[1::2], strict=True):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
        settings[name[2:].replace("-", "_")] = value
    job = {
        "HyperParameters": {},
        "TrainingJobName": "x",
        "InputDataConfig": [{"ChannelName": "train"}],
    }
    environment = container(base, job, Path(whole.data.data))
    environment |= {
        "SM_HPS": json.dumps(settings), "SM_CHANNELS": json.dumps(["code", "sm_drivers", "train"]), "SM_HOSTS": '["algo-1"]',
        "SM_CHANNEL_TRAIN": str(base / "input/data/training"), "SM_CHANNEL_CODE": "/code", "SM_CHANNEL_SM_DRIVERS": "/drivers",
        "SM_MODEL_DIR": str(base / "model"), "SM_OUTPUT_DATA_DIR": str(base / "output/data"),
        "SM_CURRENT_HOST": "algo-1", "SM_NUM_GPUS": "0",
    }  # fmt: skip
    argv = [
        word
        for name, value in settings.items()
        for word in (f"--{name}", value if isinstance(value, str) else json.dumps(value))
    ]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=1",
        "--nproc_per_node=2",
        LAUNCH / "sagemaker.py",
    ]
    done = run([*torchrun, *argv], environment)
    assert done.returncode == 0, done.stderr
    assert losses(base / "checkpoints" / "shakespeare") == losses(whole.folder)
    assert (base / "model" / "model.safetensors").exists()


# --- EC2 -------------------------------------------------------------------------------------------------------------------------------


def poll(aws: AWS, *more: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        LAUNCH / "ec2.py",
        "shakespeare",
        "--bucket",
        "mine",
        "--regions",
        "us-east-1",
        "--every",
        "0.05",
    ]
    return run([*command, *more], aws.environment)


def test_ec2_takes_the_cheapest_zone_that_has_a_machine_below_the_cap(aws: AWS) -> None:
    aws.refuse = lambda zone: "InsufficientInstanceCapacity" if zone.endswith("b") else ""
    done = poll(aws, "--max-price", "12", "--", "--steps", "7", "--sample-prompt", "it's")
    assert done.returncode == 0, done.stderr
    assert [form["Placement.AvailabilityZone"] for form in aws.launches] == [
        "us-east-1b",
        "us-east-1c",
    ]
    asked = aws.launches[-1]
    assert asked["InstanceMarketOptions.SpotOptions.MaxPrice"] == "12.0000"
    assert asked["InstanceInitiatedShutdownBehavior"] == "terminate"
    assert asked["ClientToken"] != aws.launches[0]["ClientToken"]
    script = base64.b64decode(asked["UserData"]).decode()
    assert script.startswith("#!/bin/bash\n")
    assert "export ANEW_S3=s3://mine/anew/shakespeare" in script
    printed = subprocess.run(
        [
            "bash",
            "-c",
            script.split("set -uo")[0] + 'eval "a=($ANEW_TRAIN)"; printf "%s|" "${a[@]}"',
        ],
        capture_output=True,
    )
    assert printed.stdout.decode() == "shakespeare|--steps|7|--sample-prompt|it's|"
    again = poll(aws, "--max-price", "12")
    assert again.returncode == 0
    assert "i-1 (us-east-1) is running shakespeare" in again.stdout
    assert len(aws.launches) == 2, "a run has one machine"


def test_ec2_waits_for_the_price_and_asks_again(aws: AWS) -> None:
    aws.prices = lambda asked: {"us-east-1a": 20.0 if asked < 4 else 5.0}
    done = poll(aws, "--max-price", "6")
    assert done.returncode == 0, done.stderr
    assert aws.price_questions == 4
    assert len(aws.launches) == 1
    assert "us-east-1a: $20.00 an hour, above $6.00" in done.stdout


def test_ec2_stops_at_what_waiting_cannot_change(aws: AWS) -> None:
    aws.refuse = lambda _: "MaxSpotInstanceCountExceeded"
    done = poll(aws, "--max-price", "12")
    assert done.returncode == 2
    assert "ask AWS for a higher quota" in done.stderr
    assert len(aws.launches) == 1
    aws.prices = lambda _: {}
    assert "choose another --instance" in poll(aws, "--max-price", "12").stderr
    aws.objects["/mine/anew/shakespeare/run/run_state.json"] = b'{"status": "complete"}'
    assert "the run shakespeare is complete" in poll(aws, "--max-price", "12").stdout
    assert "Traceback" not in done.stderr


FAKES = {
    "aws": """#!/usr/bin/env python3
import fnmatch, os, shutil, sys
from pathlib import Path
where = lambda name: Path(os.environ["FAKE_S3"] + name[4:]) if name.startswith("s3:/") else Path(name)
kind, source, target = sys.argv[2], where(sys.argv[3]), where(sys.argv[4])
if kind == "cp":
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target)
elif source.exists():
    out = [a for b, a in zip(sys.argv, sys.argv[1:]) if b == "--exclude"]
    here = {p.relative_to(source) for p in source.rglob("*") if p.is_file()}
    here = {name for name in here if not any(fnmatch.fnmatch(str(name), o) for o in out)}
    for name in here:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / name, target / name)
    for p in [p for p in target.rglob("*") if p.is_file()] if "--delete" in sys.argv else []:
        if p.relative_to(target) not in here:
            p.unlink()
""",
    "shutdown": '#!/bin/bash\necho "$@" >> "$FAKE_SHUTDOWN"\n',
    "srun": '#!/bin/bash\nshift\nexec "$@"\n',
    "scontrol": '#!/bin/bash\n[ "$1" = show ] && echo localhost || echo "$@" >> "$FAKE_REQUEUE"\n',
    "scancel": "#!/bin/bash\nexit 1\n",
}


@pytest.fixture
def path_with_fakes(tmp_path: Path) -> str:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in FAKES.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_ec2_machine_saves_when_it_is_taken_away_and_another_finishes(
    aws: AWS, whole: Config, path_with_fakes: str, tmp_path: Path
) -> None:
    """The machine's script, run as it is; the metadata service is a server that announces the interruption."""
    bucket = tmp_path / "s3" / "mine" / "anew" / "shakespeare"
    bucket.mkdir(parents=True)
    with tarfile.open(bucket / "source.tar.gz", "w:gz") as tar:
        tar.add(LAUNCH / "source.py", "source.py")
    train_line = ["shakespeare", "--data", whole.data.data, *settings_of(whole, "--parallel")]
    environment = {
        "PATH": path_with_fakes, "FAKE_S3": str(tmp_path / "s3"), "FAKE_SHUTDOWN": str(tmp_path / "shutdown"), "OMP_NUM_THREADS": "1",
        "ANEW_S3": "s3://mine/anew/shakespeare", "ANEW_MINUTES": "60", "ANEW_TRAIN": shlex.join(train_line), "ANEW_PYTHON": sys.executable,
        "ANEW_PROCESSES": "2", "ANEW_METADATA": aws.url, "ANEW_EVERY": "0.1", "ANEW_COPY_EVERY": "1", "NO_PROXY": "*",
    }  # fmt: skip
    saved = []
    for machine in ("first", "second"):
        home = tmp_path / machine
        with subprocess.Popen(
            ["bash", LAUNCH / "ec2_user_data.sh"],
            env={**os.environ, **environment, "ANEW_HOME": str(home)},
            stdout=subprocess.DEVNULL,
        ) as booted:
            if machine == "first":
                wait_for(lambda home=home: step_of(home / "run") >= 40)
                assert booted.poll() is None
                aws.objects |= {
                    "/latest/api/token": b"t",
                    "/latest/meta-data/spot/instance-action": b'{"action": "terminate"}',
                }
            assert booted.wait(90) == 0, (home / "boot.log").read_text()
        saved.append(json.loads((bucket / "run" / "run_state.json").read_text()))
        aws.objects.clear()
    assert (saved[0]["status"], saved[1]["status"]) == ("preempted", "complete")
    assert saved[0]["saved_step"] == saved[0]["step"] or saved[0]["saved_step"] >= 40
    assert losses(bucket / "run") == losses(whole.folder)
    assert checkpoint.newest(bucket / "run")[1] == []
    assert (tmp_path / "shutdown").read_text().splitlines() == ["-h +60", "-h now"] * 2
    assert f"resumed from step-{saved[0]['saved_step']:08}" in (bucket / "boot.log").read_text()


# --- Slurm -----------------------------------------------------------------------------------------------------------------------------


def test_slurm_requeues_a_job_whose_time_is_up_and_goes_on(
    whole: Config, path_with_fakes: str, tmp_path: Path
) -> None:
    config = whole.override(out=str(tmp_path / "run"))
    environment = {
        **os.environ, "PATH": path_with_fakes, "FAKE_REQUEUE": str(tmp_path / "requeue"), "ANEW_PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1", "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1",
        "SLURM_GPUS_ON_NODE": "2", "SLURM_CPUS_PER_TASK": "2",
    }  # fmt: skip
    command = ["bash", str(LAUNCH / "slurm.sbatch"), "shakespeare", *flags(config)]
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log) as job,
    ):
        wait_for(lambda: step_of(config.folder) >= 40 or job.poll() is not None)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(60) == 0, (tmp_path / "log").read_text()
    assert (tmp_path / "requeue").read_text() == "requeue 77\n"
    stopped = json.loads((config.folder / "run_state.json").read_text())
    assert (stopped["status"], stopped["saved_step"]) == ("preempted", step_of(config.folder))
    done = run(command, {**environment, "SLURM_RESTART_COUNT": "1"})
    assert done.returncode == 0, done.stderr
    assert losses(config.folder) == losses(whole.folder)
    assert (tmp_path / "requeue").read_text() == "requeue 77\n", "a complete run stays complete"
