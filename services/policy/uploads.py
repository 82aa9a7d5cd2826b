"""Where the weights of an update are: below the server's weights folder, or uploaded if no file system is shared.

An upload is a whole file, or a sparse one (`sparse_weights.py`). Of a sparse one the whole file is made here, so all
that follows is the same.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import unquote, urlsplit

import structlog

from mulligan.common.disk import disk_full, free_bytes, writing_to
from mulligan.common.errors import DomainError, Reason, invalid_field
from mulligan.common.files import file_sha256, make_folder, move_folder
from mulligan.common.inference import WeightsKind
from mulligan.policy.adapter_config import AdapterConfig
from mulligan.policy.sparse_weights import overwrite

log = structlog.get_logger()
T = TypeVar("T")
_SCHEME = "upload"
_PART = ".part"
_KEPT_SECONDS = 3600.0
_MOST = 1024  # uploads that are under way or wait for their update
_STEADY_BYTES = 2**20
_RETRY_AFTER = timedelta(seconds=1)
_WHOLE = "model.safetensors"
_SPARSE = "sparse.safetensors"
_HEAD = 9  # bytes that tell a safetensors file: the length of its header, and the brace that the header begins with


@dataclass(frozen=True, slots=True)
class UploadHeader:
    """What will be uploaded. `size_bytes` are those that are sent. `sha256` is of the safetensors file. With
    `base_sha256` a sparse file is sent, and `sha256` is of the whole file that it makes of that base."""

    kind: WeightsKind
    size_bytes: int
    sha256: str
    adapter_config: bytes = b""
    base_sha256: str = ""


# Opens the base of a sparse file by its SHA-256. Raises DomainError VERSION_NOT_KEPT.
OpenBase = Callable[[str], IO[bytes]]


class _Part:
    """The folder of an upload that is not complete. What is done there runs in threads, one call at a time."""

    def __init__(self, path: Path):
        self.path = path
        self.size = 0  # bytes that are reserved for it
        self.left = 0  # those of them that are not on the disk yet
        self.base: IO[bytes] | None = None  # of a sparse file
        self._work: asyncio.Future[Any] | None = None

    async def do(self, work: Callable[..., T], *arguments: Any) -> T:
        """In a thread. It goes on when the caller leaves."""
        self._work = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
        return await asyncio.shield(self._work)

    def when_idle(self, end: Callable[[], None]) -> None:
        """Calls `end` as soon as no thread works in the folder."""
        if self._work is None or self._work.done():
            end()
            return

        def ended(work: asyncio.Future[Any]) -> None:
            if not work.cancelled():
                work.exception()  # nobody waits for it any more
            end()

        self._work.add_done_callback(ended)


class Uploads:
    """Uploaded weights. `receive` writes an upload to a folder of its own and returns its URI, `path` finds it by the
    URI, `remove` deletes it after its update. One that nobody uses is deleted after an hour.

    An upload reserves its bytes before its first one is taken. What is reserved, or waits for its update, is never more
    than `limit_bytes`, and leaves `spare_bytes` of the disk free: the records of versions are on it. A reservation ends
    with the upload, however that ends. One that stalls, so that less than a mebibyte comes within `stall_seconds`, is
    given up.

    Create it on the event loop that will use it. `folder` is its own; None: a temporary one.
    """

    def __init__(
        self,
        folder: Path | None,
        limit_bytes: int,
        *,
        spare_bytes: int = 0,
        stall_seconds: float = 60.0,
    ):
        self._temporary = None if folder else tempfile.TemporaryDirectory(prefix="mulligan-uploads-")
        self._folder = folder or Path(self._temporary.name)  # type: ignore[union-attr]
        self._limit = limit_bytes
        self._spare = spare_bytes
        self._stall_seconds = stall_seconds
        self._coming: set[_Part] = set()
        self._waiting: dict[str, tuple[int, asyncio.TimerHandle]] = {}  # by name: bytes, and what removes it
        make_folder(self._folder)
        for path in self._folder.iterdir():
            if path.name.endswith(_PART):
                shutil.rmtree(path, ignore_errors=True)
            else:  # a restart gives it another hour, since the times of files are not reliable
                self._keep(path.name, sum(file.stat().st_size for file in path.rglob("*") if file.is_file()))

    def close(self) -> None:
        for _, timer in self._waiting.values():
            timer.cancel()
        if self._temporary is not None:
            self._temporary.cleanup()

    @property
    def reserved_bytes(self) -> int:
        """Of the uploads that are under way."""
        return sum(part.size for part in self._coming)

    async def first(self, requests: AsyncIterator[T]) -> T | None:
        """What a caller sends first; None if nothing. Raises UPLOAD_STALLED."""
        try:
            async with asyncio.timeout(self._stall_seconds):
                return await anext(requests, None)
        except TimeoutError:
            raise _stalled(0, self._stall_seconds) from None

    async def receive(self, header: UploadHeader, chunks: AsyncIterator[bytes], open_base: OpenBase) -> str:
        """Writes an upload to disk and returns its URI. Nothing is left of one that breaks off, or differs from what
        was announced. Raises DomainError as PolicyAdminService.UploadWeights does."""
        _check_header(header)
        name = uuid.uuid4().hex
        part = _Part(self._folder / f"{name}{_PART}")
        try:
            if header.base_sha256:

                def hold_base() -> None:
                    part.base = open_base(header.base_sha256)

                await part.do(hold_base)
            self._reserve(part, header)
            with writing_to(self._folder, part.size):
                await part.do(part.path.mkdir)
                async with aclosing(_steady(chunks, self._stall_seconds)) as steady:
                    await _spool(header, part, steady)
                if part.base is not None:
                    await part.do(_make_whole, part.path, part.base, header.sha256)
                await part.do(move_folder, part.path, self._folder / name)
        except BaseException:
            part.when_idle(partial(self._give_up, part, name))
            raise
        if part.base is not None:
            part.base.close()
            whole = part.size - header.size_bytes
            log.info("a whole file was made of a sparse one", sent_bytes=header.size_bytes, whole_bytes=whole)
        self._coming.discard(part)
        self._keep(name, part.size)
        return f"{_SCHEME}:///{name}"

    def path(self, uri: str) -> Path:
        """The safetensors file, or the adapter's folder. Raises DomainError WEIGHTS_NOT_FOUND."""
        folder = self._folder / self._name(uri)
        file = folder / _WHOLE
        if file.is_file():
            return file
        if not folder.is_dir():
            raise DomainError(
                Reason.WEIGHTS_NOT_FOUND, "uri: there is no such upload; it may have been used, or expired"
            )
        return folder

    async def remove(self, uri: str) -> None:
        """Deletes an upload that was used. Other URIs are ignored."""
        if not is_upload(uri):
            return
        name = self._name(uri)
        if name in self._waiting:
            _, timer = self._waiting.pop(name)
            timer.cancel()
        await asyncio.to_thread(shutil.rmtree, self._folder / name, ignore_errors=True)

    def _name(self, uri: str) -> str:
        name = uri.removeprefix(f"{_SCHEME}:///")
        try:
            return uuid.UUID(hex=name).hex
        except ValueError:
            raise DomainError(Reason.BAD_WEIGHTS_URI, "uri: not one that UploadWeights answered") from None

    def _keep(self, name: str, size: int) -> None:
        def remove() -> None:
            del self._waiting[name]
            log.info("an upload was not used", upload=name)
            shutil.rmtree(self._folder / name, ignore_errors=True)

        self._waiting[name] = size, asyncio.get_running_loop().call_later(_KEPT_SECONDS, remove)

    def _reserve(self, part: _Part, header: UploadHeader) -> None:
        """Checks and reserves in one go: nothing is awaited between the two. Raises UPLOAD_TOO_LARGE and DISK_FULL."""
        size = header.size_bytes + len(header.adapter_config)
        if part.base is not None:
            size += os.fstat(part.base.fileno()).st_size
        room = self._limit - self.reserved_bytes - sum(waiting for waiting, _ in self._waiting.values())
        if len(self._coming) + len(self._waiting) >= _MOST:
            room = 0
        if size > room:
            message = f"{size} bytes; there is room for {max(0, room)}"
            raise DomainError(Reason.UPLOAD_TOO_LARGE, message, size_bytes=size, room_bytes=max(0, room))
        needed = size + sum(other.left for other in self._coming) + self._spare
        if needed > free_bytes(self._folder):
            raise disk_full(self._folder, needed)
        part.size = part.left = size
        self._coming.add(part)

    def _give_up(self, part: _Part, name: str) -> None:
        if part.base is not None:
            part.base.close()
        for path in (part.path, self._folder / name):
            shutil.rmtree(path, ignore_errors=True)
        self._coming.discard(part)


def is_upload(uri: str) -> bool:
    return uri.startswith(f"{_SCHEME}:")


def find_weights(uri: str, weights_folder: Path | None, uploads: Uploads | None) -> Path:
    """Where the weights are. Raises DomainError BAD_WEIGHTS_URI for what is not below the folder, symbolic links
    resolved, and WEIGHTS_NOT_FOUND for an upload that is gone."""
    if uploads is not None and is_upload(uri):
        return uploads.path(uri)
    if weights_folder is None:
        raise DomainError(Reason.BAD_WEIGHTS_URI, "uri: this server loads uploads alone: it has no weights_folder")
    try:
        parts = urlsplit(uri)
        path = Path(unquote(parts.path)).resolve()
    except (ValueError, OSError, RuntimeError) as error:
        raise DomainError(Reason.BAD_WEIGHTS_URI, f"uri: {error}") from error
    if parts.scheme != "file" or parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise DomainError(Reason.BAD_WEIGHTS_URI, "uri: expected file:///…")
    root = weights_folder.resolve()
    content = [path / "adapter_model.safetensors", path / "adapter_config.json"] if path.is_dir() else []
    for each in (path, *(entry.resolve() for entry in content)):
        if each == root or not each.is_relative_to(root):
            raise DomainError(Reason.BAD_WEIGHTS_URI, "uri: not below the server's weights folder")
    return path


def _check_header(header: UploadHeader) -> None:
    if header.base_sha256 and header.kind is not WeightsKind.FULL:
        raise invalid_field("header.base_sha256", "nothing with an adapter")
    if header.kind is WeightsKind.FULL:
        if header.adapter_config:
            raise invalid_field("header.adapter_config", "nothing with full weights")
        return
    try:
        config = json.loads(header.adapter_config)
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise invalid_field("header.adapter_config", "a JSON object")
    AdapterConfig.parse(header.adapter_config)


async def _steady(chunks: AsyncIterator[bytes], seconds: float) -> AsyncGenerator[bytes, None]:
    """The chunks. Raises UPLOAD_STALLED after so many seconds of waiting in which less than `_STEADY_BYTES` came."""
    clock = asyncio.get_running_loop().time
    total = 0
    recent = 0
    left = seconds
    while True:
        begun = clock()
        try:
            async with asyncio.timeout(left):
                chunk = await anext(chunks, None)
        except TimeoutError:
            raise _stalled(total, seconds) from None
        if chunk is None:
            return
        total += len(chunk)
        recent += len(chunk)
        left -= clock() - begun
        if recent >= _STEADY_BYTES:
            recent = 0
            left = seconds
        yield chunk


async def _spool(header: UploadHeader, part: _Part, chunks: AsyncIterator[bytes]) -> None:
    lora = header.kind is WeightsKind.LORA
    path = part.path / ("adapter_model.safetensors" if lora else _SPARSE if header.base_sha256 else _WHOLE)
    digest = hashlib.sha256()
    written = 0
    head = b""

    def append(chunk: bytes) -> None:
        with path.open("ab") as file:
            file.write(chunk)
        digest.update(chunk)

    async for chunk in chunks:
        if len(head) < _HEAD:
            head = (head + chunk)[:_HEAD]
            _check_head(head, header.size_bytes)
        written += len(chunk)
        if written > header.size_bytes:
            raise _incomplete(f"more than the {header.size_bytes} bytes that were announced")
        await part.do(append, chunk)
        part.left -= len(chunk)
    if written < header.size_bytes:
        raise _incomplete(f"{written} of the {header.size_bytes} bytes that were announced")
    if not header.base_sha256 and digest.hexdigest() != header.sha256:
        message = f"the upload has sha256 {digest.hexdigest()}, not {header.sha256}"
        raise DomainError(Reason.CHECKSUM_MISMATCH, message)
    if lora:
        await part.do((part.path / "adapter_config.json").write_bytes, header.adapter_config)


def _make_whole(folder: Path, base: IO[bytes], sha256: str) -> None:
    """Makes the whole file of a base and the sparse file in the folder, which it deletes."""
    whole = folder / _WHOLE
    with whole.open("wb") as file:
        shutil.copyfileobj(base, file, 2**20)
    overwrite(whole, folder / _SPARSE)
    found = file_sha256(whole)
    if found != sha256:
        message = f"the sparse file makes one with sha256 {found} of its base, not {sha256}"
        raise DomainError(Reason.CHECKSUM_MISMATCH, message)
    (folder / _SPARSE).unlink()


def _check_head(head: bytes, size: int) -> None:
    """Only safetensors files are written: other formats that loaders accept can hold code."""
    length = int.from_bytes(head[:8], "little")
    if size < _HEAD or (len(head) == _HEAD and (head[8:] != b"{" or length + 8 > size)):
        raise DomainError(Reason.MODEL_MISMATCH, "the upload is not a safetensors file")


def _incomplete(message: str) -> DomainError:
    return DomainError(Reason.UPLOAD_INCOMPLETE, message)


def _stalled(written: int, seconds: float) -> DomainError:
    message = f"after {written} bytes, less than {_STEADY_BYTES} came within {seconds:g} s: send it again"
    return DomainError(Reason.UPLOAD_STALLED, message, retry_after=_RETRY_AFTER)
