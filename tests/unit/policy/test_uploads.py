"""Uploads on disk: complete or absent, and only weights."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import pickle
import shutil
import time
from collections import namedtuple
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import WeightsKind
from mulligan.policy.uploads import UploadHeader, Uploads, find_weights

_TENSORS = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
FILE = len(_TENSORS).to_bytes(8, "little") + _TENSORS + bytes(8)
FULL = UploadHeader(WeightsKind.FULL, len(FILE), hashlib.sha256(FILE).hexdigest())
CONFIG = b'{"r": 4, "lora_alpha": 8}'
LORA = replace(FULL, kind=WeightsKind.LORA, adapter_config=CONFIG)


async def pieces(*content: bytes) -> AsyncIterator[bytes]:
    for piece in content:
        yield piece


@pytest.fixture
async def uploads(tmp_path: Path) -> AsyncIterator[Uploads]:
    uploads = Uploads(tmp_path / "uploads", 10 * len(FILE))
    yield uploads
    uploads.close()


@pytest.fixture
def nothing_left(tmp_path: Path) -> Iterator[None]:
    yield
    assert list((tmp_path / "uploads").iterdir()) == []


async def fails(uploads: Uploads, header: UploadHeader, *content: bytes) -> DomainError:
    with pytest.raises(DomainError) as caught:
        await uploads.receive(header, pieces(*content))
    return caught.value


async def test_a_file_arrives_in_pieces(uploads: Uploads) -> None:
    uri = await uploads.receive(FULL, pieces(*(FILE[i : i + 3] for i in range(0, len(FILE), 3))))
    path = find_weights(uri, None, uploads)
    assert path.name == "model.safetensors" and path.read_bytes() == FILE
    uploads.remove(uri)
    with pytest.raises(DomainError) as caught:
        uploads.path(uri)
    assert caught.value.reason is Reason.WEIGHTS_NOT_FOUND
    uploads.remove(uri)
    uploads.remove("file:///etc/passwd")  # not its business


async def test_an_adapter_is_a_folder(uploads: Uploads) -> None:
    folder = uploads.path(await uploads.receive(LORA, pieces(FILE)))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "adapter_model.safetensors": FILE,
        "adapter_config.json": CONFIG,
    }


@pytest.mark.parametrize("header", [FULL, LORA])
async def test_one_that_was_answered_is_there_after_a_loss_of_power(
    uploads: Uploads, monkeypatch: pytest.MonkeyPatch, header: UploadHeader
) -> None:
    """Content and names are on the disk, those of its folder too."""
    synced: set[int] = set()
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        sync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", fsync)
    path = uploads.path(await uploads.receive(header, pieces(FILE)))
    folder = path if path.is_dir() else path.parent
    assert {each.stat().st_ino for each in (folder.parent, folder, *folder.iterdir())} <= synced


@pytest.mark.usefixtures("nothing_left")
async def test_what_was_not_announced_leaves_nothing(uploads: Uploads) -> None:
    evil = pickle.dumps({"x": 1})
    cases = [
        (FULL, [FILE[:-1]], Reason.UPLOAD_INCOMPLETE),
        (FULL, [], Reason.UPLOAD_INCOMPLETE),
        (FULL, [FILE, b"x"], Reason.UPLOAD_INCOMPLETE),
        (replace(FULL, sha256="0" * 64), [FILE], Reason.CHECKSUM_MISMATCH),
        (replace(FULL, size_bytes=10 * len(FILE) + 1), [FILE], Reason.UPLOAD_TOO_LARGE),
        (UploadHeader(WeightsKind.FULL, len(evil), hashlib.sha256(evil).hexdigest()), [evil], Reason.MODEL_MISMATCH),
        (UploadHeader(WeightsKind.FULL, 3, hashlib.sha256(b"abc").hexdigest()), [b"abc"], Reason.MODEL_MISMATCH),
        (replace(LORA, adapter_config=b""), [FILE], Reason.INVALID_FIELD),
        (replace(LORA, adapter_config=b"[]"), [FILE], Reason.INVALID_FIELD),
        (replace(LORA, adapter_config=b"\xff"), [FILE], Reason.INVALID_FIELD),
        (replace(LORA, adapter_config=b"[" * 100_000), [FILE], Reason.INVALID_FIELD),
        (replace(LORA, adapter_config=b'{"r": 4}'), [FILE], Reason.MODEL_MISMATCH),
        (replace(LORA, kind=WeightsKind.FULL), [FILE], Reason.INVALID_FIELD),
    ]
    for header, content, reason in cases:
        error = await fails(uploads, header, *content)
        assert error.reason is reason, f"{header} {error}"


@pytest.mark.usefixtures("nothing_left")
async def test_one_that_breaks_off_leaves_nothing(uploads: Uploads) -> None:
    begun = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        yield FILE[:20]
        begun.set()
        await asyncio.sleep(3600)

    receiving = asyncio.create_task(uploads.receive(FULL, endless()))
    await begun.wait()
    receiving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await receiving


async def test_what_waits_counts_towards_the_limit(uploads: Uploads) -> None:
    uris = [await uploads.receive(FULL, pieces(FILE)) for _ in range(10)]
    error = await fails(uploads, FULL, FILE)
    assert error.reason is Reason.UPLOAD_TOO_LARGE and error.metadata["room_bytes"] == "0"
    uploads.remove(uris[3])
    await uploads.receive(FULL, pieces(FILE))


async def test_what_is_announced_counts_already(uploads: Uploads) -> None:
    begun = asyncio.Event()
    go_on = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield FILE[:20]
        begun.set()
        await go_on.wait()
        yield FILE[20:]

    for _ in range(9):
        await uploads.receive(FULL, pieces(FILE))
    receiving = asyncio.create_task(uploads.receive(FULL, slow()))
    await begun.wait()
    assert (await fails(uploads, FULL, FILE)).reason is Reason.UPLOAD_TOO_LARGE
    go_on.set()
    await receiving


async def test_a_full_disk_is_noticed_before_it_is_full(uploads: Uploads, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1000, 990, 10))
    error = await fails(uploads, FULL, FILE)
    assert error.reason is Reason.UPLOAD_TOO_LARGE and error.metadata["room_bytes"] == "10"


async def test_a_folder_that_was_removed_is_named(uploads: Uploads, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "uploads")
    error = await fails(uploads, FULL, FILE)
    assert error.reason is Reason.FOLDER_REMOVED and error.metadata == {"folder": str(tmp_path / "uploads")}


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("header", [FULL, LORA])
async def test_a_disk_that_becomes_full_meanwhile_is_named(
    uploads: Uploads, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, header: UploadHeader
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    error = await fails(uploads, header, FILE)
    assert error.reason is Reason.DISK_FULL and error.metadata["folder"] == str(tmp_path / "uploads")
    assert error.metadata["needed_bytes"] == str(len(FILE))


@pytest.mark.parametrize("seconds", [-1e9, 0, 1e9])
async def test_a_restart_finds_what_is_complete_whatever_its_time_says(tmp_path: Path, seconds: float) -> None:
    """A clock that was set, or a file system with a clock of its own, must not take away what a trainer just sent."""
    folder = tmp_path / "uploads"
    before = Uploads(folder, 10**6)
    uri = await before.receive(FULL, pieces(FILE))
    before.close()
    os.utime(before.path(uri).parent, (time.time() + seconds,) * 2)
    (folder / "broken.part").mkdir()
    after = Uploads(folder, 10**6)
    assert after.path(uri).read_bytes() == FILE
    assert [path.name for path in folder.iterdir()] == [after.path(uri).parent.name]
    after.close()


@pytest.mark.parametrize("seconds", [-1e9, 1e9])
async def test_what_a_restart_found_and_nobody_used_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    monkeypatch.setattr("mulligan.policy.uploads._KEPT_SECONDS", 0.05)
    before = Uploads(tmp_path, 10**6)
    uri = await before.receive(FULL, pieces(FILE))
    before.close()
    os.utime(before.path(uri).parent, (time.time() + seconds,) * 2)
    after = Uploads(tmp_path, 10**6)
    async with asyncio.timeout(20):
        while os.listdir(tmp_path):  # noqa: ASYNC110 - a timer removes it
            await asyncio.sleep(0.01)
    after.close()


async def test_what_is_not_used_is_removed(uploads: Uploads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mulligan.policy.uploads._KEPT_SECONDS", 0.05)
    uri = await uploads.receive(FULL, pieces(FILE))
    for _ in range(200):
        try:
            uploads.path(uri)
        except DomainError:
            return
        await asyncio.sleep(0.02)
    pytest.fail("the upload is still there")


async def test_no_other_path_is_an_upload(uploads: Uploads, tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    for uri in ("upload:///../secret", "upload:///", "upload:///" + "g" * 32, "upload:///%2e%2e/secret", "upload:x"):
        with pytest.raises(DomainError) as caught:
            find_weights(uri, None, uploads)
        assert caught.value.reason is Reason.BAD_WEIGHTS_URI, uri
    with pytest.raises(DomainError) as caught:
        find_weights("upload:///" + "0" * 32, None, uploads)
    assert caught.value.reason is Reason.WEIGHTS_NOT_FOUND
