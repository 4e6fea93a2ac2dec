"""Faults of files: kills while saving, full disks, damage, malice, nonsense."""

import gzip
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anew import Tokenizer, UserError
from anew.checkpoint import folder as checkpoint
from anew.checkpoint import huggingface as weights
from anew.data.dataset import open_data
from anew.data.shards import DataFolder
from anew.training.trainer import train
from tests.faults.common import Tally, tiny

FORK = multiprocessing.get_context("fork")


# --- SIGKILL during a save -------------------------------------------------------------------------------------------------------------


def _content(step: int) -> dict[str, bytes]:
    return {
        name: bytes([step % 251]) * size
        for name, size in (("model.safetensors", 300_000), ("optimizer.safetensors", 600_000))
    }


def _save_for_ever(run: Path, first: int, acknowledge: int) -> None:
    for step in range(first, first + 1000):
        with checkpoint.writing(run, step) as folder:
            for name, content in _content(step).items():
                (folder / name).write_bytes(content)
        os.write(acknowledge, step.to_bytes(4, "little"))
        checkpoint.prune(run, 2)


def _save_in_place(folder: Path, first: int, acknowledge: int) -> None:
    """How it is commonly done: the same files again and again."""
    for step in range(first, first + 1000):
        for name, content in _content(step).items():
            with (folder / name).open("wb") as file:
                for start in range(0, len(content), 4096):
                    file.write(content[start : start + 4096])
                file.flush()
                os.fsync(file.fileno())
        os.write(acknowledge, step.to_bytes(4, "little"))


def _killed(target: Any, place: Path, first: int, rng: random.Random) -> int:
    """A forked writer, killed somewhere in its second save or later; the last step that it acknowledged."""
    read, write = os.pipe()
    process = FORK.Process(target=target, args=(place, first, write))
    process.start()
    os.close(write)
    acknowledged = int.from_bytes(os.read(read, 4), "little")
    time.sleep(rng.random() * 0.02)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    while more := os.read(read, 4):
        acknowledged = int.from_bytes(more, "little")
    os.close(read)
    return acknowledged


def kill_while_saving(n: int, rng: random.Random, place: Path) -> Tally:
    """SIGKILL during a save (forked writer)"""
    tally = Tally()
    run, step = place / "run", 1
    for _ in range(n):
        acknowledged = _killed(_save_for_ever, run, step, rng)
        checkpoint.clean(run)
        newest, skipped = checkpoint.newest(run)
        found = int(newest.name[5:]) if newest else -1
        tally.check(not skipped, f"corrupt: {skipped}")
        tally.check(
            found >= acknowledged, f"step {acknowledged} was acknowledged and {found} is there"
        )
        if newest:
            tally.check(
                all((newest / k).read_bytes() == v for k, v in _content(found).items()),
                f"step {found} holds other bytes",
            )
        step = found + 1
        tally.runs += 1
    control, broken, arms = place / "control", 0, max(20, n // 5)
    control.mkdir()
    for i in range(arms):
        _killed(_save_in_place, control, 1000 * i + 1, rng)
        parts = [(control / name).read_bytes() for name in _content(0)]
        whole = any(parts == list(_content(s).values()) for s in {p[0] for p in parts if p})
        broken += not whole
    tally.facts["in-place control broken"] = f"{broken} of {arms}"
    tally.check(
        broken >= arms / 2,
        f"the control arm broke only {broken} of {arms} times, so this proves little",
    )
    return tally


# --- a full disk -----------------------------------------------------------------------------------------------------------------------


def full_disk(n: int, rng: random.Random, place: Path) -> Tally:
    """Disk full (tmpfs sweep)"""
    tally = Tally()
    whole = tiny(place / "whole", steps=12, save_every=3, keep=2)
    train(whole)
    takes = sum(f.stat().st_size for f in (place / "whole").rglob("*") if f.is_file())
    for i in range(n):
        disk = place / "disk"
        disk.mkdir(exist_ok=True)
        size = int(takes * (0.25 + 2.25 * i / max(1, n - 1)))
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], capture_output=True
        )
        if mounted.returncode:
            tally.skipped = "mounting a tmpfs takes rights that this process has not"
            return tally
        try:
            config = whole.override(out=str(disk / "run"))
            try:
                train(config)
                said = ""
            except UserError as error:
                said = str(error)
            tally.check(
                not said or ("the disk of" in said and "is full" in said), f"another error: {said}"
            )
            saved, skipped = checkpoint.newest(disk / "run")
            tally.check(not skipped, f"a damaged checkpoint was published: {skipped}")
            shutil.copytree(
                disk / "run", place / f"rescued-{i}", ignore=shutil.ignore_patterns(".lock")
            )
            train(
                whole.override(out=str(place / f"rescued-{i}"))
            )  # with room it goes on, to the same end
            for name in ("model.safetensors", "optimizer.safetensors"):
                a, b = (
                    place / r / "checkpoints" / "step-00000012" / name
                    for r in ("whole", f"rescued-{i}")
                )
                tally.check(
                    a.read_bytes() == b.read_bytes(),
                    f"{name} differs after {size} bytes, resumed from {saved}",
                )
            tally.facts[f"stopped at {size // 1000} kB"] = "yes" if said else "no"
        finally:
            subprocess.run(["umount", str(disk)], check=True)
            shutil.rmtree(place / f"rescued-{i}", ignore_errors=True)
        tally.runs += 1
    small = sum(v == "yes" for v in tally.facts.values())
    tally.facts = {"disks that were too small": small}
    tally.check(0 < small < n, f"{small} of {n} disks were too small: the sweep missed the edge")
    return tally


# --- damage ----------------------------------------------------------------------------------------------------------------------------


def _damage(path: Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    kind = rng.choice(["flip", "truncate", "zero", "grow"])
    at = rng.randrange(len(content))
    if kind == "flip":
        content[at] ^= 1 << rng.randrange(8)
    elif kind == "truncate":
        del content[at:]
    elif kind == "grow":
        content += b"\0" * rng.randint(1, 100)
    else:
        end = min(len(content), at + rng.randint(1, 512))
        content[at:end] = (b"\0" if any(content[at:end]) else b"\xff") * (end - at)
    path.write_bytes(bytes(content))
    return f"{kind} of {path.name} at {at}"


def damage(n: int, rng: random.Random, place: Path) -> Tally:
    """Flipped, truncated, zeroed bytes in checkpoint and shard"""
    tally = Tally()
    config = tiny(place / "run", steps=10, save_every=5, keep=0)
    train(config)
    checkpoints = checkpoint.steps(config.folder)
    data = open_data(config.data.data, "bytes")
    for i in range(n):
        if i % 4 == 3:
            copy = place / "data"
            shutil.copytree(data.path, copy, dirs_exist_ok=True)
            what = _damage(copy / "train-00000.bin", rng)
            try:
                _ = DataFolder.open(copy).splits["train"][0].tokens
                tally.check(False, f"not noticed: {what}")
            except UserError:
                pass
        else:
            victim = rng.choice(
                [p for p in checkpoints[1].iterdir() if p.name != "manifest.json" or i % 8 == 0]
            )
            before = victim.read_bytes()
            what = _damage(victim, rng)
            newest, skipped = checkpoint.newest(config.folder)
            harmless = (
                victim.name == "manifest.json" and newest == checkpoints[1]
            )  # white space, or a digit of its version
            tally.check(newest == checkpoints[0] or harmless, f"not noticed: {what}")
            tally.check(len(skipped) == 1 or harmless, f"not said: {what}")
            victim.write_bytes(before)
        tally.runs += 1
    return tally


# --- malice ----------------------------------------------------------------------------------------------------------------------------


class Bomb:
    """What pickle would run on loading."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


def malice(n: int, rng: random.Random, place: Path) -> Tally:
    """Malicious pickles and archives (`.pt`, DCP metadata, `.npy`, traversal, bombs)"""
    import pickle

    tally, canary = Tally(), place / "canary"
    good = place / "good"
    good.mkdir(parents=True)
    weights.save_model(good, tiny_model(), Tokenizer.named("bytes"))
    data = open_data(tiny(place / "x").data.data, "bytes")

    def folder(name: str) -> Path:
        path = place / name
        shutil.copytree(good, path)
        return path

    def without_weights(name: str) -> Path:
        path = folder(name)
        (path / "model.safetensors").unlink()
        return path

    attacks: list[tuple[str, Any]] = []
    for name, content in {
        "pt": {"model": Bomb(canary), "model_args": {}},
        "pt-config": {"model": {}, "config": Bomb(canary)},
        "pt-optimizer": {
            "model": {"transformer.wte.weight": torch.zeros(2, 2)},
            "optimizer": Bomb(canary),
            "model_args": {},
        },
    }.items():
        torch.save(content, place / f"{name}.pt")
        attacks.append((name, lambda name=name: weights.load_model(str(place / f"{name}.pt"))))
    raw = place / "raw.pt"
    raw.write_bytes(pickle.dumps(Bomb(canary)))
    attacks.append(("bare pickle", lambda: weights.load_model(str(raw))))
    bare = without_weights("bin")
    torch.save({"wte.weight": Bomb(canary)}, bare / "pytorch_model.bin")
    attacks.append(("pytorch_model.bin", lambda: weights.load_model(str(bare))))
    legacy = without_weights("legacy")
    (legacy / "pytorch_model.bin").write_bytes(pickle.dumps({"wte.weight": Bomb(canary)}))
    attacks.append(("legacy .bin", lambda: weights.load_model(str(legacy))))
    dcp = without_weights("dcp")
    (dcp / ".metadata").write_bytes(pickle.dumps(Bomb(canary)))
    attacks.append(("DCP metadata", lambda: weights.load_model(str(dcp))))
    traversal = without_weights("traversal")
    shutil.copy(good / "model.safetensors", place / "outside.safetensors")
    (traversal / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"transformer.wte.weight": "../outside.safetensors"}})
    )
    attacks.append(("index that leads outside", lambda: weights.load_model(str(traversal))))
    header = folder("header")
    (header / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    attacks.append(("header of 2^62 bytes", lambda: weights.load_model(str(header))))
    huge = folder("huge")
    entry = json.dumps(
        {"wte.weight": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}}
    ).encode()
    (huge / "model.safetensors").write_bytes(len(entry).to_bytes(8, "little") + entry)
    attacks.append(("tensor of 2^62 bytes", lambda: weights.load_model(str(huge))))
    config = folder("config")
    (config / "config.json").write_text(
        json.dumps({**json.loads((good / "config.json").read_text()), "n_layer": 10**9})
    )
    attacks.append(("a billion layers", lambda: limited(lambda: weights.load_model(str(config)))))
    npy = place / "npy"
    npy.mkdir()
    np.save(npy / "x_train_000000.npy", np.array([Bomb(canary)], dtype=object), allow_pickle=True)
    attacks.append((".npy of objects", lambda: open_data(str(npy), "gpt2")))
    outside = place / "data-outside"
    shutil.copytree(data.path, outside)
    index = json.loads((outside / "index.json").read_text())
    index["shards"][0]["name"] = "../../etc/passwd"
    (outside / "index.json").write_text(json.dumps(index))
    attacks.append(("shard name that leads outside", lambda: DataFolder.open(outside)))
    bomb = place / "bomb.jsonl.gz"
    with gzip.open(bomb, "wb", compresslevel=9) as file:
        for _ in range(300):
            file.write(b"0" * 1_000_000)
    attacks.append(
        ("300 MB of one line in 300 kB", lambda: limited(lambda: open_data(str(bomb), "bytes")))
    )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02.")
        archive.writestr("../../canary", b"out")
        archive.writestr("archive/data/0", b"\0" * 50_000_000)
    (place / "zip.pt").write_bytes(buffer.getvalue())
    attacks.append(
        ("zip with a path that leads outside", lambda: weights.load_model(str(place / "zip.pt")))
    )
    for name, attack in attacks:
        try:
            attack()
            tally.check(False, f"{name}: accepted")
        except UserError:
            pass
        except BaseException as error:  # noqa: BLE001 (that is the finding)
            tally.check(False, f"{name}: {type(error).__name__} {error}")
        tally.runs += 1
    tally.check(
        not canary.exists() and not (place.parent / "canary").exists(),
        "something was executed or written outside",
    )
    return tally


def tiny_model() -> Any:
    from anew import GPT, GPTConfig

    return GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, n_positions=8, vocab_size=257), seed=1)


def limited(work: Any) -> Any:
    """`work` with at most 4 GB more address space than now: what would take more fails instead of filling the machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (4 << 30), before[1]))
    try:
        return work()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# --- nonsense --------------------------------------------------------------------------------------------------------------------------


def fuzz(n: int, rng: random.Random, place: Path) -> Tally:
    """Header and config fuzz"""
    tally = Tally()
    good = place / "good"
    good.mkdir(parents=True)
    weights.save_model(good, tiny_model(), Tokenizer.named("bytes"))
    data = open_data(tiny(place / "x").data.data, "bytes")
    copy = place / "data"
    shutil.copytree(data.path, copy)
    run = place / "run"
    tiny(run)
    run.mkdir()
    (run / "config.json").write_text(tiny(run).to_json())
    from anew import Config

    targets = [
        (good / "model.safetensors", 2000, lambda: weights.load_model(good)),
        (good / "config.json", 10**6, lambda: weights.read_config(good)),
        (good / "tokenizer.json", 3000, lambda: Tokenizer.of_folder(good)),
        (copy / "index.json", 10**6, lambda: DataFolder.open(copy).splits["train"][0].tokens[:1]),
        (run / "config.json", 10**6, lambda: Config.read(run / "config.json").check()),
    ]
    slowest, before = 0.0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(n):
        path, within, use = targets[i % len(targets)]
        original = path.read_bytes()
        path.write_bytes(_mutated(original, within, rng))
        began = time.perf_counter()
        try:
            use()
        except UserError:
            pass
        except BaseException as error:  # noqa: BLE001 (that is the finding)
            tally.check(False, f"{path.name}: {type(error).__name__} {error}"[:300])
        slowest = max(slowest, time.perf_counter() - began)
        path.write_bytes(original)
        tally.runs += 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000
    tally.check(grown < 200, f"memory grew by {grown:.0f} MB")
    tally.check(slowest < 1, f"one took {slowest:.2f} s")
    tally.facts = {"slowest": f"{1000 * slowest:.0f} ms", "memory": f"+{grown:.0f} MB"}
    return tally


NUMBERS = [b"-1", b"0", b"1e308", b"NaN", b"null", b"[]", b"{}", b'"x"', b"9" * 30, b"true", b"3.5"]


def _mutated(content: bytes, within: int, rng: random.Random) -> bytes:
    """Bytes flipped, runs cut or repeated, numbers replaced, within the first `within`."""
    result = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(min(within, max(1, len(result))))
        kind = rng.randrange(5)
        if kind == 0:
            result[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del result[at : at + rng.randint(1, 20)]
        elif kind == 2:
            result[at:at] = result[at : at + rng.randint(1, 20)]
        elif kind == 3:
            result[at : at + 1] = bytes([rng.randrange(256)])
        else:  # a number, whole
            end = at
            while end < len(result) and chr(result[end]).isdigit():
                end += 1
            if end > at:
                while at > 0 and chr(result[at - 1]).isdigit():
                    at -= 1
                result[at:end] = rng.choice(NUMBERS)
    return bytes(result)


if sys.platform == "win32":  # the programme needs POSIX signals
    raise ImportError("the fault programme needs a POSIX system")
