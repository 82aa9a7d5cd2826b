"""What `pip install .[extra]` brings, followed through the metadata of the packages that are installed here."""

from __future__ import annotations

import tomllib
from importlib.metadata import requires

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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
    assert packages.isdisjoint({"torch", "transformers", "numpy"})


@pytest.mark.parametrize("extra", ["policy", "trainer", "hotpotqa-dense", "all"])
def test_policy_and_trainer_bring_it(extra: str) -> None:
    assert {"torch", "transformers"} <= brings(extra)


def test_each_package_is_pinned() -> None:
    # The accelerator libraries of torch's default build are pinned by torch itself, see docs/dependencies.md.
    unpinned = {name for name in brings("dev") - PINNED if not name.startswith(("nvidia-", "cuda-", "triton"))}
    assert unpinned - {"setuptools"} == set()
