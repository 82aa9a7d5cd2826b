"""The example programs, each built in a folder that holds nothing of this repository but itself and `proto/`."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.made import installed
from tests.support.paths import ROOT

RUN_SECONDS = 240.0
BUILT = ("node_modules", "gen", "dist", "build", "go.sum")  # what a developer's checkout may hold


@dataclass(frozen=True)
class Program:
    """`run("play")` waits until it ends; `start("train")` does not."""

    command: Sequence[str]
    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.command, *arguments],
            cwd=self.folder,
            env={**os.environ, **self.environment, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=RUN_SECONDS,
            check=False,
        )

    def output(self, *arguments: str, **variables: str) -> str:
        """What it prints when it succeeds."""
        result = self.run(*arguments, **variables)
        assert result.returncode == 0, f"{' '.join(arguments)}: {result.returncode}\n{result.stdout}{result.stderr}"
        return result.stdout

    def refusal(self, *arguments: str, **variables: str) -> str:
        """What it says when it fails."""
        result = self.run(*arguments, **variables)
        assert result.returncode == 1, result.stdout + result.stderr
        return result.stderr

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.command, *arguments],
            cwd=self.folder,
            env={**os.environ, **self.environment, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def copied(name: str, folder: Path) -> tuple[Path, Path]:
    """The folders of the example and of the contracts, which are not where the repository has them."""
    program = folder / "program"
    contracts = folder / "contracts"
    # `client` is a folder of the TypeScript example, and what `go build` writes in the other.
    built = (*BUILT, "client") if name == "go" else BUILT
    shutil.copytree(ROOT / "examples" / name, program, ignore=shutil.ignore_patterns(*built))
    for package in ("mulligan", "buf"):
        shutil.copytree(ROOT / "proto" / package, contracts / package)
    return program, contracts


def typescript(folder: Path) -> Path:
    """Generates and builds what the TypeScript example has; the types are checked on the way."""
    program, contracts = copied("typescript", folder)
    (program / "node_modules").symlink_to(modules())
    Program(["npm", "run", "build"], program, {"PROTO": str(contracts)}).output()
    return program


def modules() -> Path:
    """The packages that the TypeScript example needs."""
    return installed("TYPESCRIPT_MODULES", "typescript")


def go(folder: Path) -> Path:
    """Generates and builds the Go example with Debian's packages, without a network."""
    needs_go()
    program, contracts = copied("go", folder)
    Program(["./build-debian.sh"], program, {"PROTO": str(contracts)}).output()
    return program


def needs_go() -> None:
    tools = ("go", "protoc", "protoc-gen-go", "protoc-gen-go-grpc")
    missing = [tool for tool in tools if shutil.which(tool) is None]
    missing += [] if Path("/usr/share/gocode/src/google.golang.org/grpc").is_dir() else ["golang-google-grpc-dev"]
    if not missing:
        return
    message = f"the Go example needs Debian's packages (examples/go/debian-packages.txt); missing: {', '.join(missing)}"
    if os.environ.get("MULLIGAN_TEST_GO_REQUIRED") == "1":
        pytest.fail(message)
    pytest.skip(message)
