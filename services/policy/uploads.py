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
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urlsplit

import structlog

from mulligan.common.disk import writing_to
from mulligan.common.errors import DomainError, Reason, invalid_field
from mulligan.common.files import file_sha256, make_folder, move_folder
from mulligan.common.inference import WeightsKind
from mulligan.policy.adapter_config import AdapterConfig
from mulligan.policy.sparse_weights import overwrite

log = structlog.get_logger()
_SCHEME = "upload"
_PART = ".part"
_KEPT_SECONDS = 3600.0
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


class Uploads:
    """Uploaded weights. `receive` writes an upload to a folder of its own and returns its URI, `path` finds it by the
    URI, `remove` deletes it after its update. One that nobody uses is deleted after an hour.

    Create it on the event loop that will use it. `folder` is its own; None: a temporary one.
    """

    def __init__(self, folder: Path | None, limit_bytes: int):
        self._temporary = None if folder else tempfile.TemporaryDirectory(prefix="mulligan-uploads-")
        self._folder = folder or Path(self._temporary.name)  # type: ignore[union-attr]
        self._limit = limit_bytes
        self._coming = 0  # bytes that were announced and are not complete
        self._timers: dict[str, asyncio.TimerHandle] = {}
        make_folder(self._folder)
        for path in self._folder.iterdir():
            if path.name.endswith(_PART):
                shutil.rmtree(path, ignore_errors=True)
            else:  # a restart gives it another hour, since the times of files are not reliable
                self._expire(path.name, _KEPT_SECONDS)

    def close(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
        if self._temporary is not None:
            self._temporary.cleanup()

    async def receive(self, header: UploadHeader, chunks: AsyncIterator[bytes], open_base: OpenBase) -> str:
        """Writes an upload to disk and returns its URI. Nothing is left of one that breaks off, or differs from what
        was announced. Raises DomainError as PolicyAdminService.UploadWeights does."""
        _check_header(header)
        if not header.base_sha256:
            return await self._receive(header, chunks, None)
        with await asyncio.to_thread(open_base, header.base_sha256) as base:
            return await self._receive(header, chunks, base)

    async def _receive(self, header: UploadHeader, chunks: AsyncIterator[bytes], base: IO[bytes] | None) -> str:
        size = header.size_bytes + (os.fstat(base.fileno()).st_size if base is not None else 0)
        with writing_to(self._folder):
            await asyncio.to_thread(self._check_room, size)
        name = uuid.uuid4().hex
        part = self._folder / f"{name}{_PART}"
        folder = self._folder / name
        self._coming += size
        try:
            with writing_to(self._folder, size):
                await asyncio.to_thread(part.mkdir)
                await _spool(header, part, chunks)
                if base is not None:
                    await asyncio.to_thread(_make_whole, part, base, header.sha256)
                await asyncio.to_thread(move_folder, part, folder)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        finally:
            self._coming -= size
        if base is not None:
            whole = size - header.size_bytes
            log.info("a whole file was made of a sparse one", sent_bytes=header.size_bytes, whole_bytes=whole)
        self._expire(name, _KEPT_SECONDS)
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

    def remove(self, uri: str) -> None:
        """Deletes an upload that was used. Other URIs are ignored."""
        if is_upload(uri):
            shutil.rmtree(self._folder / self._name(uri), ignore_errors=True)

    def _name(self, uri: str) -> str:
        name = uri.removeprefix(f"{_SCHEME}:///")
        try:
            return uuid.UUID(hex=name).hex
        except ValueError:
            raise DomainError(Reason.BAD_WEIGHTS_URI, "uri: not one that UploadWeights answered") from None

    def _expire(self, name: str, seconds: float) -> None:
        def remove() -> None:
            del self._timers[name]
            if (self._folder / name).exists():
                log.info("an upload was not used", upload=name)
                shutil.rmtree(self._folder / name, ignore_errors=True)

        self._timers[name] = asyncio.get_running_loop().call_later(seconds, remove)

    def _check_room(self, size: int) -> None:
        waiting = sum(path.stat().st_size for path in self._folder.glob("*/*.safetensors") if path.is_file())
        room = min(self._limit - waiting - self._coming, shutil.disk_usage(self._folder).free)
        if size > room:
            message = f"{size} bytes; there is room for {max(0, room)}"
            raise DomainError(Reason.UPLOAD_TOO_LARGE, message, size_bytes=size, room_bytes=max(0, room))


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


async def _spool(header: UploadHeader, folder: Path, chunks: AsyncIterator[bytes]) -> None:
    lora = header.kind is WeightsKind.LORA
    path = folder / ("adapter_model.safetensors" if lora else _SPARSE if header.base_sha256 else _WHOLE)
    digest = hashlib.sha256()
    written = 0
    head = b""

    def write(file: IO[bytes], chunk: bytes) -> None:
        file.write(chunk)
        digest.update(chunk)

    with await asyncio.to_thread(path.open, "wb") as file:
        async for chunk in chunks:
            if len(head) < _HEAD:
                head = (head + chunk)[:_HEAD]
                _check_head(head, header.size_bytes)
            written += len(chunk)
            if written > header.size_bytes:
                raise _incomplete(f"more than the {header.size_bytes} bytes that were announced")
            await asyncio.to_thread(write, file, chunk)
        if written < header.size_bytes:
            raise _incomplete(f"{written} of the {header.size_bytes} bytes that were announced")
        if not header.base_sha256 and digest.hexdigest() != header.sha256:
            message = f"the upload has sha256 {digest.hexdigest()}, not {header.sha256}"
            raise DomainError(Reason.CHECKSUM_MISMATCH, message)
    if lora:
        await asyncio.to_thread((folder / "adapter_config.json").write_bytes, header.adapter_config)


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
