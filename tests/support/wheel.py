"""The wheel in a virtual environment of its own, and an empty folder in which a user works."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from mulligan.cli.local import free_ports
from tests.support.paths import ROOT

SOURCES = ("pyproject.toml", "LICENSE", "NOTICE", "README.md", "services", "models", "recipes", "src")


@dataclass(frozen=True)
class Installed:
    """A virtual environment with the wheel, and an empty folder in which a user works."""

    python: Path
    folder: Path

    def run(self, *arguments: str | Path, variables: Mapping[str, str] | None = None) -> str:
        """What `python ARGUMENT…` prints there."""
        environment = surroundings() | dict(variables or {})
        done = subprocess.run(
            [self.python, *arguments],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def mulligan(self, *arguments: str | Path, variables: Mapping[str, str] | None = None) -> str:
        return self.run(self.python.with_name("mulligan"), *arguments, variables=variables)


def surroundings() -> dict[str, str]:
    """Environment variables without a way to this repository."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def install(folder: Path) -> Installed:
    """Builds the wheel and installs it, alone, into a virtual environment below `folder`."""
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source], check=True, cwd=folder
    )
    (wheel,) = folder.glob("*.whl")
    shutil.rmtree(source)
    venv.create(folder / "venv")
    python = folder / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True, cwd=folder)
    # What it depends on is that of this environment, whose own links to the source are not followed from there.
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "venv")}))
    here = [path for path in sys.path if path.endswith("site-packages")] or [sysconfig.get_path("purelib")]
    (packages / "dependencies.pth").write_text("\n".join(here))
    empty = folder / "empty"
    empty.mkdir()
    return Installed(python, empty)


@contextmanager
def up(installed: Installed) -> Iterator[dict[str, str]]:
    """`mulligan up`, ready; the variables that tell other commands where."""
    base = free_port_base()
    command = [str(installed.python.with_name("mulligan")), "up", "--config", "mulligan.toml", "--port-base", str(base)]
    with subprocess.Popen(
        command, cwd=installed.folder, env=surroundings(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            assert process.stdout is not None
            told = ""
            while "commands find them by: export " not in told:
                line = process.stdout.readline()
                assert line, told
                told += line
            yield dict(one.split("=", 1) for one in told.rpartition("export ")[2].split())
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=100)
    assert process.returncode == 0


def free_port_base() -> int:
    """Four free ports in a row."""
    while True:
        base = free_ports()["env"]
        with ExitStack() as held:
            try:
                for port in range(base, base + 4):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except (OSError, OverflowError):
                continue
        return base
