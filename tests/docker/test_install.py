"""Where an image's build takes torch from: docker/install.sh with the real pip, at indexes of this machine."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mulligan.common.files import file_sha256
from tests.support.paths import ROOT

VERSION = "2.13.0"
CPU = f"{VERSION}+cpu"


class Index:
    """A folder of wheels behind HTTP, as pip asks for them; it remembers what was asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []
        folder.mkdir()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self.asked, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def add(self, name: str, version: str, tag: str = "py3-none-any", needs: Sequence[str] = ()) -> None:
        (self.folder / name).mkdir(exist_ok=True)
        wheel(self.folder / name, name, version, tag, needs)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, asked: list[str], *arguments: object, **settings: object) -> None:
        self._asked = asked
        super().__init__(*arguments, **settings)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        self._asked.append(self.path)
        super().do_GET()

    def log_message(self, format: str, *arguments: object) -> None:
        """Says nothing."""


def wheel(folder: Path, name: str, version: str, tag: str = "py3-none-any", needs: Sequence[str] = ()) -> None:
    about = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-{tag}.whl", "w") as archive:
        archive.writestr(f"{name}.py", f"__version__ = {version!r}\n")
        required = "".join(f"Requires-Dist: {need}\n" for need in needs)
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{required}")
        archive.writestr(f"{about}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{about}/RECORD", "")


class Build:
    """A build's folder, and pip's own index, which has torch with CUDA and another package."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.wheels = folder / "wheels"
        self.wheels.mkdir()
        (folder / "constraints.txt").write_text(f"numpy==1.0\ntorch=={VERSION}\n")
        self.own = Index(folder / "own")
        self.own.add("torch", VERSION)
        self.own.add("numpy", "1.0")
        self.lock("numpy", "1.0")
        self.torch = Index(folder / "torch")

    def install(self, *requirements: str, index: str = "", seconds: int = 30) -> subprocess.CompletedProcess[str]:
        """`seconds`: how long an index may take to answer."""
        surroundings = {name: value for name, value in os.environ.items() if not name.lower().startswith("pip_")}
        return subprocess.run(
            ["sh", str(ROOT / "docker/install.sh"), str(self.folder / "venv"), *requirements],
            cwd=self.folder,
            env={
                **surroundings,
                "PATH": f"{self._programs()}:{os.environ['PATH']}",
                "PIP_CONFIG_FILE": os.devnull,
                "PIP_INDEX_URL": self.own.url,
                "PIP_NO_CACHE_DIR": "1",
                "NO_PROXY": "127.0.0.1",
                "no_proxy": "127.0.0.1",
                "WHEELS": "wheels",
                "TORCH_INDEX": index,
                "TORCH_INDEX_SECONDS": str(seconds),
            },
            capture_output=True,
            text=True,
            check=False,
        )

    def lock(self, name: str, version: str) -> None:
        """What the index has now is what may be installed."""
        [file] = (self.own.folder / name).glob("*.whl")
        content = f"{name}=={version} \\\n    --hash=sha256:{file_sha256(file)}\n"
        (self.folder / "requirements.lock").write_text(f"# A lock.\nabc==1.0 \\\n    --hash=sha256:{0:064}\n{content}")

    def installed(self, name: str) -> str:
        """The version; empty when it is not there."""
        found = list((self.folder / "venv").glob(f"lib/python*/site-packages/{name}-*.dist-info"))
        return found[0].name.removesuffix(".dist-info").partition("-")[2] if found else ""

    def _programs(self) -> Path:
        """`python` and `pip` of the interpreter that the tests run with."""
        folder = self.folder / "bin"
        folder.mkdir(exist_ok=True)
        for name, module in (("python", ""), ("pip", "-m pip ")):
            (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {module}"$@"\n')
            (folder / name).chmod(0o755)
        return folder


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Build]:
    if shutil.which("timeout") is None:
        pytest.skip("images are built with coreutils' timeout, which is not here")
    made = Build(tmp_path)
    yield made
    made.own.close()
    made.torch.close()


def test_torch_comes_from_its_index_and_the_rest_from_pips_own(build: Build) -> None:
    build.torch.add("torch", CPU)
    done = build.install("torch", "numpy", index=build.torch.url)
    assert done.returncode == 0, done.stderr
    assert build.installed("torch") == CPU and build.installed("numpy") == "1.0"
    assert f"torch {VERSION}: from {build.torch.url}" in done.stdout
    assert not [path for path in build.own.asked if path.endswith(".whl") and "torch" in path]


def refused(build: Build, done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 1 and build.installed("torch") == "", done.stdout
    assert f"no torch {VERSION}" in done.stderr
    for remedy in ("TORCH_INDEX=https://", "docker/wheels/", "TORCH_INDEX= docker compose up --build"):
        assert remedy in done.stderr
    assert build.own.asked == []  # where the build with CUDA is


def test_where_its_index_is_away_no_other_is_asked(build: Build) -> None:
    build.torch.close()
    done = build.install("torch", "numpy", index=build.torch.url.replace("//", "//someone:secret@"))
    refused(build, done)
    assert "Could not fetch URL" in done.stderr and "secret" not in done.stdout + done.stderr


@pytest.mark.long
def test_an_index_that_accepts_and_says_nothing_is_away_too(build: Build) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        refused(build, build.install("torch", index=f"http://127.0.0.1:{silent.getsockname()[1]}", seconds=2))


@pytest.mark.long
def test_an_index_that_pip_does_not_trust_is_said_to_be_one(build: Build) -> None:
    done = build.install("torch", index="http://someone:secret@index.invalid/whl/cpu")
    refused(build, done)
    assert "not a trusted or secure host" in done.stderr and "secret" not in done.stdout + done.stderr


@pytest.mark.long
def test_an_index_without_this_version_is_no_reason_to_look_elsewhere(build: Build) -> None:
    build.torch.add("torch", "2.6.0+cpu")
    refused(build, build.install("torch", index=build.torch.url))


def test_a_wheel_in_the_folder_is_preferred_and_no_index_is_asked_for_torch(build: Build) -> None:
    wheel(build.wheels, "torch", CPU)
    done = build.install("torch", "numpy", index="http://127.0.0.1:9")
    assert done.returncode == 0 and build.installed("torch") == CPU, done.stderr
    assert "127.0.0.1:9" not in done.stdout + done.stderr


@pytest.mark.long
def test_a_wheel_that_does_not_fit_is_refused(build: Build) -> None:
    wheel(build.wheels, "torch", CPU, "cp27-cp27m-win32")
    done = build.install("torch", index=build.torch.url)
    refused(build, done)
    assert f"torch-{CPU}-cp27-cp27m-win32.whl" in done.stderr and build.torch.asked == []


@pytest.mark.long
def test_with_an_empty_index_it_is_pips_own_and_that_is_said(build: Build) -> None:
    done = build.install("torch", index="")
    assert done.returncode == 0 and build.installed("torch") == VERSION, done.stderr
    assert "from pip's own index" in done.stdout and "CUDA" in done.stdout


@pytest.mark.long
def test_an_image_without_torch_does_not_ask_its_index(build: Build) -> None:
    done = build.install("numpy", index="http://127.0.0.1:9")
    assert done.returncode == 0 and build.installed("numpy") == "1.0", done.stderr
    assert done.stdout + done.stderr == ""


def test_a_file_with_another_hash_is_refused(build: Build) -> None:
    """As an index serves it that somebody has broken into: the version is right."""
    with (build.own.folder / "numpy" / "numpy-1.0-py3-none-any.whl").open("ab") as file:
        file.write(b"more")
    done = build.install("numpy")
    assert done.returncode != 0 and build.installed("numpy") == ""
    assert "HASH" in done.stderr.upper(), done.stderr


def test_what_the_lock_lacks_is_refused(build: Build) -> None:
    build.own.add("extra", "2.0")
    build.own.add("other", "3.0", needs=("extra",))
    for wanted, missing in (("extra", "extra==2.0"), ("other", "extra==2.0, other==3.0")):
        done = build.install("numpy", wanted)
        assert done.returncode != 0 and build.installed("numpy") == build.installed("extra") == ""
        assert f"requirements.lock has no hash of {missing}:" in done.stderr, done.stderr


@pytest.mark.parametrize("before", [False, pytest.param(True, marks=pytest.mark.long)])
def test_what_torch_alone_brings_may_lack_a_hash(build: Build, before: bool) -> None:
    """Its builds for GPUs bring packages of their own, also where torch itself was installed before."""
    source = build.torch if before else build.own
    (build.own.folder / "torch" / f"torch-{VERSION}-py3-none-any.whl").unlink()
    source.add("torch", VERSION, needs=("gpu-library>=1", "numpy", 'extra; extra == "more"'))
    build.own.add("gpu_library", "12.1", needs=("gpu-kernels",))
    build.own.add("gpu_kernels", "7")
    (build.own.folder / "gpu_library").rename(build.own.folder / "gpu-library")
    (build.own.folder / "gpu_kernels").rename(build.own.folder / "gpu-kernels")
    done = build.install("torch", "numpy", index=build.torch.url if before else "")
    assert done.returncode == 0, done.stderr
    told = next(line for line in done.stdout.splitlines() if line.startswith("without a hash"))
    assert set(told.partition(": ")[2].split()) == {"gpu-library==12.1", "gpu-kernels==7"} | (
        set() if before else {f"torch=={VERSION}"}
    )
    assert build.installed("gpu_kernels") == "7" and build.installed("numpy") == "1.0"
    build.own.add("extra", "2.0")
    refused = build.install("torch", "extra", index=build.torch.url if before else "")
    assert refused.returncode != 0 and "no hash of extra==2.0" in refused.stderr, "of torch, but not what it brings"
