"""The licences, vulnerabilities and hashes of what is installed (tools/supply_chain.py)."""

import base64
import hashlib
import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.support import ROOT


@pytest.fixture
def supply_chain() -> ModuleType:
    path = ROOT / "tools" / "supply_chain.py"
    spec = importlib.util.spec_from_file_location("supply_chain", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def audited(*dependencies: dict[str, Any]) -> str:
    return json.dumps({"dependencies": dependencies, "fixes": []})


NOT_FOUND = {"name": "a", "skip_reason": "not found"}
SOUND = {"name": "b", "version": "1.0", "vulns": []}
VULNERABLE = {
    "name": "c",
    "version": "2.0",
    "vulns": [{"id": "PYSEC-1", "fix_versions": ["2.1"], "aliases": [], "description": ""}],
}


@pytest.mark.parametrize(
    ("output", "exit_code", "words"),
    [
        ("", 1, "not audited: pip-audit has ended with an error (No module named pip_audit)"),
        (audited(NOT_FOUND), 0, "not audited: no package was found"),
        (audited(NOT_FOUND, SOUND), 0, "1 of 2 packages audited, 0 vulnerable"),
        (audited(SOUND, VULNERABLE), 1, "c 2.0: PYSEC-1, fixed in 2.1"),
    ],
)
def test_audit_fails_only_for_a_known_vulnerability(
    output: str,
    exit_code: int,
    words: str,
    supply_chain: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    done = SimpleNamespace(stdout=output, stderr="No module named pip_audit\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    assert supply_chain.audit() == exit_code
    assert words in capsys.readouterr().out


def test_audit_without_a_network_is_no_failure(
    supply_chain: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = "Traceback\nrequests.exceptions.ConnectionError: Failed to resolve a name\n"
    done = SimpleNamespace(stdout="", stderr=error)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    assert supply_chain.audit() == 0
    assert "not audited" in capsys.readouterr().out


@pytest.mark.parametrize(
    "licence", ["unknown", "GPL-3.0-only", "GNU Affero General Public License"]
)
def test_unknown_and_copyleft_licences_are_refused(
    licence: str,
    supply_chain: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    known = {**supply_chain.known_licences(), "numpy": licence}
    monkeypatch.setattr(supply_chain, "known_licences", lambda: known)
    assert supply_chain.licences(is_check=True) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("licence: numpy ")
    assert lines[0].endswith(licence)
    assert "licences.md is out of date" in lines[1]


def test_lesser_licences_are_accepted(supply_chain: ModuleType) -> None:
    assert not supply_chain.REFUSED.search(
        "GNU Lesser General Public License v2 or later (LGPLv2+)"
    )


def test_bill_of_materials_has_every_package_and_no_address(supply_chain: ModuleType) -> None:
    bill = json.loads(supply_chain.bill_of_materials())
    packages = supply_chain.locked_packages()
    assert len(packages) > 200
    assert len(bill["components"]) == len(packages)
    [numpy] = [entry for entry in bill["components"] if entry["name"] == "numpy"]
    [locked] = [package for package in packages if package.name == "numpy"]
    assert numpy["version"] == locked.version
    assert {entry["content"] for entry in numpy["hashes"]} == set(locked.sha256)
    assert numpy["licenses"][0]["license"]["name"].startswith("BSD-3-Clause")
    assert "://" not in json.dumps(bill["components"])


def write_wheel(folder: Path) -> Path:
    """Write a package with one module and return the path of its wheel."""
    path = folder / "toy-1.0-py3-none-any.whl"
    info = "toy-1.0.dist-info"
    files = {
        "toy.py": b"",
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = [f"{info}/RECORD,,"]
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record.append(f"{name},sha256={digest},{len(content)}")
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
        wheel.writestr(f"{info}/RECORD", "\n".join(record) + "\n")
    return path


@pytest.mark.parametrize("is_locked", [True, False])
def test_package_with_another_hash_is_not_installed(is_locked: bool, tmp_path: Path) -> None:
    """`make setup` passes the hashes to pip as constraints, as here."""
    wheel = write_wheel(tmp_path)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest() if is_locked else "0" * 64
    constraints = tmp_path / "constraints.txt"
    constraints.write_text(f"toy==1.0 --hash=sha256:{digest}\n")
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--quiet", "toy"]
    command += ["--find-links", str(tmp_path), "--target", str(tmp_path / "installed")]
    done = subprocess.run(
        [*command, "--constraint", str(constraints)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert (tmp_path / "installed" / "toy.py").exists() == is_locked, done.stderr
    assert ("DO NOT MATCH THE HASHES" in done.stderr) == (not is_locked)
