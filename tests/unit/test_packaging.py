"""What `pip install .[extra]` brings, followed through the metadata of the packages that are installed here."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distributions, requires

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.made import installed
from tests.support.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINNED = {
    canonicalize_name(line.split("==")[0])
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
}


def brings(extra: str) -> set[str]:
    """Names of all packages, direct and indirect, that an extra of ours installs on this platform."""
    seen: set[tuple[str, str]] = set()
    waiting = [("mulligan", ""), ("mulligan", extra)]
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        for requirement in _requirements(*current):
            name = canonicalize_name(requirement.name)
            waiting += [(name, wanted) for wanted in ("", *requirement.extras)]
    return {name for name, _ in seen} - {"mulligan"}


def _requirements(name: str, extra: str) -> list[Requirement]:
    if name == "mulligan":
        lines = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    else:
        lines = requires(name) or []
    parsed = [Requirement(line) for line in lines]
    return [one for one in parsed if one.marker is None or one.marker.evaluate({"extra": extra})]


@pytest.mark.parametrize("extra", ["env", "memory", "hotpotqa"])
def test_environment_and_memory_bring_no_torch(extra: str) -> None:
    packages = brings(extra)
    assert {"grpcio", "protobuf", "protovalidate", "structlog"} <= packages
    assert packages.isdisjoint({"torch", "transformers"})
    assert ("numpy" in packages) is (extra == "memory"), "for evidence and search"


@pytest.mark.parametrize("extra", ["policy", "trainer", "hotpotqa-dense", "all"])
def test_policy_and_trainer_bring_it(extra: str) -> None:
    assert {"torch", "transformers"} <= brings(extra)


def test_each_package_is_pinned() -> None:
    # The accelerator libraries of torch's default build are pinned by torch itself, see docs/dependencies.md.
    unpinned = {name for name in brings("dev") - PINNED if not name.startswith(("nvidia-", "cuda-", "triton"))}
    assert unpinned - {"setuptools"} == set()


def test_each_pinned_package_but_torch_is_locked_by_hash() -> None:
    """`make lock` has run after the last change of the versions."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    blocks = re.split(r"\n(?=[a-zA-Z0-9])", (ROOT / "requirements.lock").read_text())[1:]
    locked = {canonicalize_name(block.split("==")[0]): block.split()[0].split("==")[1] for block in blocks}
    pinned = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    assert locked == {name: version for name, version in pinned.items() if name != "torch"}
    assert all(re.findall(r"--hash=sha256:[0-9a-f]{64}\b", block) for block in blocks)


@pytest.mark.parametrize(
    ("pins", "lock", "brings_along"),
    [
        ("requirements-tools.txt", "requirements-tools.lock", True),
        ("benchmarks/openenv/requirements.txt", "benchmarks/openenv/requirements.lock", False),
    ],
)
def test_what_has_an_environment_of_its_own_is_locked_by_hash(pins: str, lock: str, brings_along: bool) -> None:
    lines = [line for line in (ROOT / pins).read_text().splitlines() if line and not line.startswith("#")]
    blocks = re.split(r"\n(?=[a-zA-Z0-9])", (ROOT / lock).read_text())[1:]
    locked = {canonicalize_name(block.split("==")[0]): block.split()[0].split("==")[1] for block in blocks}
    pinned = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    assert pinned.items() <= locked.items() and (brings_along or pinned == locked)
    assert all(re.findall(r"--hash=sha256:[0-9a-f]{64}\b", block) for block in blocks)


def test_all_that_is_installed_is_checked_by_hash() -> None:
    """But for torch and the project itself: pip gets `--require-hashes`, npm a lock file, which it does not change."""
    for file in ("Makefile", "docker/install.sh"):
        for line in (ROOT / file).read_text().replace("\\\n", " ").splitlines():
            if re.search(r"\b(pip|npm) (-\S+ )*(install|ci)\b", line) and not line.lstrip().startswith(("#", "echo")):
                allowed = ("--require-hashes", "npm ci", "--editable '.[dev]'", '$venv/bin/python" install')
                assert any(word in line for word in allowed), f"{file}: {line}"
    lock = json.loads((ROOT / "proto/lint/package-lock.json").read_text())["packages"]
    wanted = json.loads((ROOT / "proto/lint/package.json").read_text())["devDependencies"]
    assert {name: lock[f"node_modules/{name}"]["version"] for name in wanted} == wanted
    assert all(found["integrity"].startswith("sha512-") for name, found in lock.items() if name)


@pytest.mark.long
def test_the_list_of_what_is_installed_has_every_pin() -> None:
    """What `make sbom` writes, by CycloneDX's own tool, where `make lock` or `make sbom` has installed it."""
    program = installed("CYCLONEDX", "sbom")
    written = subprocess.run(
        [program, "environment", "--output-reproducible", sys.executable], capture_output=True, check=True
    ).stdout
    listed = {canonicalize_name(one["name"]): one["version"] for one in json.loads(written)["components"]}
    # Once setuptools is imported, the path has what comes along in it, too.
    own = [found for found in distributions() if not str(found.locate_file("")).endswith("_vendor")]
    here = {canonicalize_name(found.metadata["Name"]): found.version for found in own}
    present = {name: here[name] for name in PINNED if name in here}
    assert len(present) > 0.9 * len(PINNED), "`make install` installs all pins"
    assert {name: version for name, version in present.items() if listed.get(name) != version} == {}


def test_no_second_index_is_asked_for_packages() -> None:
    """Of two indexes pip takes the newest file, whoever put it there."""
    builds = [ROOT / "Makefile", ROOT / "pyproject.toml", *(ROOT / "docker").rglob("*"), *(ROOT / "docs").glob("*.md")]
    found = [path for path in builds if path.suffix != ".whl" and path.is_file() and "extra-index" in path.read_text()]
    assert found == []


def test_the_licence_is_whole_and_goes_with_the_package() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    assert PROJECT["license-files"] == ["LICENSE", "NOTICE"]
    licence = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in licence and "END OF TERMS AND CONDITIONS" in licence


def test_what_the_notice_names_is_there() -> None:
    named = re.findall(r"(?:proto|services|examples|recipes|tests|models)/[\w./*-]+", (ROOT / "NOTICE").read_text())
    assert len(named) > 5
    assert [path for path in named if not list(ROOT.glob(path.rstrip(".")))] == []


def test_every_vendored_contract_is_in_the_notice() -> None:
    notice = (ROOT / "NOTICE").read_text()
    foreign = [
        path
        for folder in ("proto", "examples")
        for path in (ROOT / folder).rglob("*.proto")
        if "package mulligan." not in path.read_text() and "node_modules" not in path.parts
    ]
    assert foreign and [path for path in foreign if str(path.relative_to(ROOT)) not in notice] == []


def test_hooks_before_a_commit_call_tools_of_this_repository_alone() -> None:
    hooks = [
        (repository["repo"], hook)
        for repository in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
        for hook in repository["hooks"]
    ]
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert len(hooks) > 1
    for source, hook in hooks:
        program, target = hook["entry"].split()
        assert (source, hook["language"], program) == ("local", "system", "make") and target in targets
