"""What the project installs: its licences, its known vulnerabilities, and a bill of materials.

    python tools/supply_chain.py licences           # write docs/licences.md
    python tools/supply_chain.py licences --check   # end with 1 if a licence is unknown or refused
    python tools/supply_chain.py audit              # end with 1 if a vulnerability is known
    python tools/supply_chain.py bill > anew.cdx.json

All of them are about the versions in constraints.txt. A licence is the one that a package states in
its metadata. For packages that are not installed here, such as those for GPUs, docs/licences.md
keeps its line. The bill of materials is in the format CycloneDX, with the hashes of constraints.txt
and without the addresses of files.
"""

import argparse
import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "licences.md"
UNKNOWN = "unknown"
LONGEST_LICENCE = 100  # characters; some packages state the whole text
# A program that is linked with such a package must have the same licence.
REFUSED = re.compile(r"\b(A?GPL|GNU (Affero )?General Public License)", re.IGNORECASE)
NETWORK_ERRORS = ("ConnectionError", "ConnectTimeout", "ReadTimeout", "ServiceError", "SSLError")
ACCEPTED = {"docutils": "its parts under the GPL are a tool for Emacs, which is not used"}
INTRODUCTION = """\
# Licences of the packages

The packages that `make setup` may install, with the versions of `constraints.txt`, and the licences
that they state in their metadata. `make lint` refuses a package whose licence is unknown or is the
GPL or AGPL. After a change of `constraints.txt`, run `python tools/supply_chain.py licences`.

Users of a wheel need the packages of `dependencies` in `pyproject.toml` only. `make setup` does not
install the packages for GPUs if a CPU build of torch is at hand.

| Package | Version | Licence |
|---|---|---|
"""


class Package(NamedTuple):
    """A line of constraints.txt with its hashes."""

    name: str
    version: str
    sha256: tuple[str, ...]


def main() -> None:
    """Run one of the commands that the module docstring describes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["licences", "audit", "bill"])
    parser.add_argument("--check", action="store_true", help="licences: compare, do not write")
    arguments = parser.parse_args()
    if arguments.command == "bill":
        print(bill_of_materials())
    elif arguments.command == "audit":
        sys.exit(audit())
    else:
        sys.exit(licences(is_check=arguments.check))


def locked_packages() -> list[Package]:
    """Return the packages of constraints.txt. Several versions of one are several packages."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    lines = re.findall(r"^([\w.-]+)==([^\s;]+)((?:.*\\\n)*.*)$", text, re.MULTILINE)
    return [
        Package(name, version, tuple(re.findall(r"sha256:(\w+)", rest)))
        for name, version, rest in lines
    ]


def licences(is_check: bool) -> int:
    """Write the page of licences, or compare it; return the exit code."""
    known = known_licences()
    rows = {package: known.get(normalised(package.name), UNKNOWN) for package in locked_packages()}
    lines = [f"| {package.name} | {package.version} | {text} |" for package, text in rows.items()]
    page = INTRODUCTION + "\n".join(lines) + "\n"
    problems = []
    for package, text in rows.items():
        is_refused = REFUSED.search(text) and package.name not in ACCEPTED
        if text == UNKNOWN or is_refused:
            problems.append(f"{package.name} {package.version}: {text}")
    if is_check and page != PAGE.read_text(encoding="utf-8"):
        problems.append(f"{PAGE.name} is out of date; run: python tools/supply_chain.py licences")
    if not is_check:
        PAGE.write_text(page, encoding="utf-8")
    for problem in problems:
        print(f"licence: {problem}")
    return 1 if problems else 0


def known_licences() -> dict[str, str]:
    """Return the licence of each pinned package, from the page if it is not installed here."""
    found = {}
    if PAGE.exists():
        page = PAGE.read_text(encoding="utf-8")
        for name, text in re.findall(r"^\| ([\w.-]+) \| [^|]+ \| (.+) \|$", page, re.M):
            found[normalised(name)] = text
    versions = {normalised(package.name): package.version for package in locked_packages()}
    for distribution in metadata.distributions():
        name = normalised(distribution.metadata["Name"])
        if distribution.version.partition("+")[0] == versions.get(name):  # as in 2.13.0+cpu
            found[name] = stated_licence(distribution)
    return found


def stated_licence(distribution: metadata.Distribution) -> str:
    """Return the licence that a package states: an expression, classifiers or a line of text."""
    fields = distribution.metadata
    if fields.get("License-Expression"):
        return fields["License-Expression"]
    classifiers = fields.get_all("Classifier") or []
    names = [line.rpartition(" :: ")[2] for line in classifiers if line.startswith("License ::")]
    if names:
        return " / ".join(names)
    text = (fields.get("License") or "").strip()
    return text.splitlines()[0][:LONGEST_LICENCE] if text else UNKNOWN


def normalised(name: str) -> str:
    """Return a package's name as all spellings of it are compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def audit() -> int:
    """Look the pinned versions up in a database of vulnerabilities; return the exit code.

    Without a connection to the database nothing is known, and the exit code is 0.
    """
    command = [sys.executable, "-m", "pip_audit", "--requirement", "constraints.txt"]
    command += ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if not done.stdout:
        last_line = (done.stderr.strip().splitlines() or [""])[-1]
        is_network_error = any(words in last_line for words in NETWORK_ERRORS)
        print(f"not audited: pip-audit has ended with an error ({last_line})")
        return 0 if is_network_error else 1
    entries = json.loads(done.stdout)["dependencies"]
    audited = [entry for entry in entries if "vulns" in entry]
    if not audited:
        print("not audited: no package was found in the database of vulnerabilities from here")
        return 0
    vulnerable = [entry for entry in audited if entry["vulns"]]
    for entry in vulnerable:
        for found in entry["vulns"]:
            fixed = ", ".join(found["fix_versions"]) or "no version"
            print(f"{entry['name']} {entry['version']}: {found['id']}, fixed in {fixed}")
    print(f"{len(audited)} of {len(entries)} packages audited, {len(vulnerable)} vulnerable")
    return 1 if vulnerable else 0


def bill_of_materials() -> str:
    """Return the packages, their hashes and licences in CycloneDX's JSON."""
    from cyclonedx.model import HashAlgorithm, HashType
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.model.license import DisjunctiveLicense
    from cyclonedx.output.json import JsonV1Dot5
    from packageurl import PackageURL

    bom = Bom()
    version = metadata.version("anew")
    bom.metadata.component = Component(
        name="anew", version=version, type=ComponentType.APPLICATION, bom_ref="anew"
    )
    known = known_licences()
    for package in locked_packages():
        url = PackageURL("pypi", name=package.name, version=package.version)
        component = Component(
            name=package.name,
            version=package.version,
            purl=url,
            bom_ref=url.to_string(),
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=hash) for hash in package.sha256],
            licenses=[DisjunctiveLicense(name=known.get(normalised(package.name), UNKNOWN))],
        )
        bom.components.add(component)
    bom.register_dependency(bom.metadata.component, bom.components)
    return JsonV1Dot5(bom).output_as_string(indent=2)


if __name__ == "__main__":
    main()
