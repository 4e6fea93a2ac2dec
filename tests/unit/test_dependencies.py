"""pyproject.toml, constraints.txt and the imports of the package agree."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from anew.checkpoint.export import FORMATS
from tests.support import ROOT
from tests.unit.test_layout import FILES, imported_packages

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8")
# Imported only where they are installed: Triton comes with torch, the others are compared with.
NOT_DECLARED = {"triton", "transformers", "llama-cpp"}
SERVICES = {"wandb", "trackio"}  # of --track


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def locked() -> dict[str, list[Requirement]]:
    """Return the lines of constraints.txt by package, without their hashes."""
    found: dict[str, list[Requirement]] = {}
    for line in re.findall(r"^[a-zA-Z].*?(?= \\$)", CONSTRAINTS, re.MULTILINE):
        requirement = Requirement(line)
        found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def test_every_import_is_a_dependency_or_an_extra() -> None:
    declared = names(PROJECT["dependencies"]) | NOT_DECLARED
    for extra in EXTRAS.values():
        declared |= names(extra)
    distributions = packages_distributions()
    for path in FILES:
        for package in imported_packages(path) - sys.stdlib_module_names - {"anew"}:
            known = {canonicalize_name(name) for name in distributions.get(package, [package])}
            assert known & declared, f"{path.relative_to(ROOT)} imports {package}"


def test_extra_all_has_every_extra() -> None:
    [everything] = [Requirement(text) for text in EXTRAS["all"]]
    assert everything.extras == set(EXTRAS) - {"all"}


def test_packages_named_in_messages_are_those_of_an_extra() -> None:
    optional = set().union(*(names(extra) for extra in EXTRAS.values())) | SERVICES
    named = {canonicalize_name(package) for packages in FORMATS.values() for package in packages}
    for path in FILES:
        source = path.read_text(encoding="utf-8")
        assert "pip install -e" not in source, path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "missing_packages":
                words = [word.value for word in node.args[1:] if isinstance(word, ast.Constant)]
                named |= {canonicalize_name(str(word)) for word in words}
    assert len(named) > 6
    assert named <= optional


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
@pytest.mark.parametrize("python", ["3.11.7", "3.13.0"])
def test_constraints_have_one_version_of_every_dependency(platform: str, python: str) -> None:
    environment = {
        "sys_platform": platform,
        "os_name": "nt" if platform == "win32" else "posix",
        "platform_machine": "arm64" if platform == "darwin" else "x86_64",
        "platform_system": {"linux": "Linux", "darwin": "Darwin", "win32": "Windows"}[platform],
        "python_version": python.rpartition(".")[0],
        "python_full_version": python,
    }

    def applies(requirement: Requirement) -> bool:
        return not requirement.marker or requirement.marker.evaluate(environment)

    groups = PYPROJECT["dependency-groups"].values()
    texts = [text for group in [*EXTRAS.values(), *groups] for text in group]
    texts += PROJECT["dependencies"] + PYPROJECT["build-system"]["requires"]
    versions = locked()
    for text in texts:
        if isinstance(text, dict) or text.startswith("anew["):
            continue
        wanted = Requirement(text)
        if applies(wanted):
            lines = versions.get(canonicalize_name(wanted.name), [])
            [line] = [line for line in lines if applies(line)]
            [pin] = line.specifier
            assert wanted.specifier.contains(pin.version, prereleases=True), text


def test_constraints_pin_and_hash_every_package_and_name_no_registry() -> None:
    assert "://" not in CONSTRAINTS
    blocks = re.split(r"\n(?=[a-zA-Z])", re.sub(r"^#.*\n", "", CONSTRAINTS, flags=re.MULTILINE))
    assert len(blocks) > 200
    for block in blocks:
        first, *hashes = block.strip().split(" \\\n")
        [pin] = Requirement(first).specifier
        assert pin.operator == "=="
        assert hashes, first
        for line in hashes:
            assert re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}", line), block
