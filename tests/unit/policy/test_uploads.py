"""Uploads on disk: complete or absent, and only weights."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import pickle
import shutil
import struct
import threading
import time
from collections import namedtuple
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pytest

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import WeightsKind
from mulligan.policy.uploads import UploadHeader, Uploads, _steady, find_weights
from tests.support.virtual_time import run_in_virtual_time
from tests.support.waiting import until

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


async def receive(uploads: Uploads, header: UploadHeader, chunks: AsyncIterator[bytes], *kept: tuple[str, Path]) -> str:
    """`kept`: the files that sparse ones may build on, by their checksums."""

    def open_base(sha256: str) -> IO[bytes]:
        if sha256 not in dict(kept):
            raise DomainError(Reason.VERSION_NOT_KEPT, sha256)
        return dict(kept)[sha256].open("rb")

    return await uploads.receive(header, chunks, open_base)


async def fails(
    uploads: Uploads, header: UploadHeader, *content: bytes, kept: Sequence[tuple[str, Path]] = ()
) -> DomainError:
    with pytest.raises(DomainError) as caught:
        await receive(uploads, header, pieces(*content), *kept)
    return caught.value


async def test_a_file_arrives_in_pieces(uploads: Uploads) -> None:
    uri = await receive(uploads, FULL, pieces(*(FILE[i : i + 3] for i in range(0, len(FILE), 3))))
    path = find_weights(uri, None, uploads)
    assert path.name == "model.safetensors" and path.read_bytes() == FILE
    await uploads.remove(uri)
    with pytest.raises(DomainError) as caught:
        uploads.path(uri)
    assert caught.value.reason is Reason.WEIGHTS_NOT_FOUND
    await uploads.remove(uri)
    await uploads.remove("file:///etc/passwd")  # not its business


async def test_an_adapter_is_a_folder(uploads: Uploads) -> None:
    folder = uploads.path(await receive(uploads, LORA, pieces(FILE)))
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
    path = uploads.path(await receive(uploads, header, pieces(FILE)))
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
        (replace(LORA, base_sha256="0" * 64), [FILE], Reason.INVALID_FIELD),
        (replace(FULL, base_sha256="0" * 64), [FILE], Reason.VERSION_NOT_KEPT),
    ]
    for header, content, reason in cases:
        error = await fails(uploads, header, *content)
        assert error.reason is reason, f"{header} {error}"


# Of the two values of x, the second becomes 1.0.
_CHANGE = json.dumps(
    {
        "x.positions": {"dtype": "I32", "shape": [1], "data_offsets": [0, 4]},
        "x.values": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
    }
).encode()
CHANGE = len(_CHANGE).to_bytes(8, "little") + _CHANGE + struct.pack("<if", 1, 1.0)
CHANGED = FILE[:-4] + struct.pack("<f", 1.0)
SPARSE = UploadHeader(
    WeightsKind.FULL, len(CHANGE), hashlib.sha256(CHANGED).hexdigest(), base_sha256=hashlib.sha256(FILE).hexdigest()
)


@pytest.fixture
def base(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A file that is kept, which nobody changes."""
    path = tmp_path / "base"
    path.write_bytes(FILE)
    yield SPARSE.base_sha256, path
    assert path.read_bytes() == FILE


async def test_a_sparse_file_becomes_the_whole_one(uploads: Uploads, base: tuple[str, Path]) -> None:
    for _ in range(2):  # it may be sent again
        path = uploads.path(
            await receive(uploads, SPARSE, pieces(*(CHANGE[i : i + 3] for i in range(0, 999, 3))), base)
        )
        assert path.read_bytes() == CHANGED
        assert [each.name for each in path.parent.iterdir()] == ["model.safetensors"]


async def test_a_base_that_is_removed_meanwhile_is_read_to_its_end(uploads: Uploads, tmp_path: Path) -> None:
    path = tmp_path / "base"
    path.write_bytes(FILE)

    async def slow() -> AsyncIterator[bytes]:
        yield CHANGE[:20]
        path.unlink()
        yield CHANGE[20:]

    uri = await receive(uploads, SPARSE, slow(), (SPARSE.base_sha256, path))
    assert uploads.path(uri).read_bytes() == CHANGED


@pytest.mark.usefixtures("nothing_left")
async def test_a_sparse_file_that_does_not_make_what_was_announced_leaves_nothing(
    uploads: Uploads, base: tuple[str, Path], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.write_bytes(FILE[:-8] + bytes([1]) * 8)
    evil = pickle.dumps({"x": 1})
    for header, content, kept, reason in (
        (SPARSE, CHANGE, ("f" * 64, base[1]), Reason.VERSION_NOT_KEPT),
        (SPARSE, CHANGE, (base[0], other), Reason.CHECKSUM_MISMATCH),
        (replace(SPARSE, sha256="0" * 64), CHANGE, base, Reason.CHECKSUM_MISMATCH),
        (SPARSE, CHANGE[:-1], base, Reason.UPLOAD_INCOMPLETE),
        (SPARSE, CHANGE.replace(b'"x.', b'"y.'), base, Reason.MODEL_MISMATCH),
        (replace(SPARSE, size_bytes=len(evil)), evil, base, Reason.MODEL_MISMATCH),
        (replace(SPARSE, size_bytes=9 * len(FILE) + 1), CHANGE, base, Reason.UPLOAD_TOO_LARGE),
    ):
        error = await fails(uploads, header, content, kept=[kept])
        assert error.reason is reason, f"{header} {error}"


@pytest.mark.usefixtures("nothing_left")
async def test_one_that_breaks_off_leaves_nothing(uploads: Uploads) -> None:
    begun = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        yield FILE[:20]
        begun.set()
        await asyncio.sleep(3600)

    receiving = asyncio.create_task(receive(uploads, FULL, endless()))
    await begun.wait()
    receiving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await receiving


async def test_what_waits_counts_towards_the_limit(uploads: Uploads) -> None:
    uris = [await receive(uploads, FULL, pieces(FILE)) for _ in range(10)]
    error = await fails(uploads, FULL, FILE)
    assert error.reason is Reason.UPLOAD_TOO_LARGE and error.metadata["room_bytes"] == "0"
    await uploads.remove(uris[3])
    await receive(uploads, FULL, pieces(FILE))


async def test_what_is_announced_counts_already(uploads: Uploads) -> None:
    begun = asyncio.Event()
    go_on = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield FILE[:20]
        begun.set()
        await go_on.wait()
        yield FILE[20:]

    for _ in range(9):
        await receive(uploads, FULL, pieces(FILE))
    receiving = asyncio.create_task(receive(uploads, FULL, slow()))
    await begun.wait()
    assert (await fails(uploads, FULL, FILE)).reason is Reason.UPLOAD_TOO_LARGE
    go_on.set()
    await receiving


async def test_a_full_disk_is_noticed_before_it_is_full(uploads: Uploads, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1000, 990, 10))
    error = await fails(uploads, FULL, FILE)
    assert error.reason is Reason.DISK_FULL and error.metadata["free_bytes"] == "10"
    assert error.metadata["needed_bytes"] == str(len(FILE))


async def test_a_part_of_the_disk_stays_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while others, which reserved their bytes, have not written them yet."""
    usage = namedtuple("usage", "total used free")
    free = 100 + 2 * len(FILE)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 0, free))
    uploads = Uploads(tmp_path / "uploads", 10**6, spare_bytes=100)
    begun = asyncio.Semaphore(0)
    go_on = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        begun.release()
        await go_on.wait()
        yield FILE

    receiving = [asyncio.create_task(receive(uploads, FULL, slow())) for _ in range(2)]
    for _ in receiving:
        await begun.acquire()
    error = await fails(uploads, FULL, FILE)
    assert error.reason is Reason.DISK_FULL and error.metadata["needed_bytes"] == str(100 + 3 * len(FILE))
    free = 100 + len(FILE)  # as if the disk had what comes now
    go_on.set()
    await asyncio.gather(*receiving)
    await receive(uploads, FULL, pieces(FILE))
    free = 99 + len(FILE)
    assert (await fails(uploads, FULL, FILE)).reason is Reason.DISK_FULL
    uploads.close()


@pytest.mark.parametrize("header", [FULL, LORA])
async def test_of_many_at_once_as_many_pass_as_the_limit_allows(tmp_path: Path, header: UploadHeader) -> None:
    uploads = Uploads(tmp_path / "uploads", len(FILE) + len(header.adapter_config))
    results = await asyncio.gather(*(receive(uploads, header, pieces(FILE)) for _ in range(5)), return_exceptions=True)
    refused = [result.reason for result in results if isinstance(result, DomainError)]
    assert refused == [Reason.UPLOAD_TOO_LARGE] * 4
    [uri] = [result for result in results if isinstance(result, str)]
    assert uploads.path(uri).exists() and uploads.reserved_bytes == 0
    uploads.close()


async def test_small_uploads_are_counted_too(uploads: Uploads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mulligan.policy.uploads._MOST", 2)
    await receive(uploads, FULL, pieces(FILE))
    uri = await receive(uploads, FULL, pieces(FILE))
    error = await fails(uploads, FULL, FILE)
    assert error.reason is Reason.UPLOAD_TOO_LARGE and error.metadata["room_bytes"] == "0"
    await uploads.remove(uri)
    await receive(uploads, FULL, pieces(FILE))


async def trickling(*sizes: int) -> AsyncIterator[bytes]:
    for size in sizes:
        yield bytes(size)
        await asyncio.sleep(50)


def test_one_that_comes_slowly_and_steadily_is_taken() -> None:
    async def sizes() -> list[int]:
        return [len(chunk) async for chunk in _steady(trickling(*[2**20] * 20), 60)]

    assert run_in_virtual_time(sizes()) == [2**20] * 20


def test_one_of_which_hardly_anything_comes_is_given_up() -> None:
    """Each piece in time, but all together too little."""
    found: list[int] = []

    async def arrive() -> None:
        async for chunk in _steady(trickling(2**20, *[1000] * 20), 60):
            found.append(len(chunk))  # noqa: PERF401 - it raises, and what came before counts

    async def seconds() -> float:
        with pytest.raises(DomainError) as caught:
            await arrive()
        assert caught.value.reason is Reason.UPLOAD_STALLED and caught.value.retry_after is not None
        return asyncio.get_running_loop().time()

    assert run_in_virtual_time(seconds()) == pytest.approx(60)
    assert found == [2**20, 1000]


@pytest.mark.usefixtures("nothing_left")
async def test_one_that_stalls_frees_what_it_reserved(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path / "uploads", len(FILE), stall_seconds=0.05)

    async def stalled() -> AsyncIterator[bytes]:
        yield FILE[:20]
        await asyncio.Event().wait()

    with pytest.raises(DomainError) as caught:
        await receive(uploads, FULL, stalled())
    assert caught.value.reason is Reason.UPLOAD_STALLED and uploads.reserved_bytes == 0
    await uploads.remove(await receive(uploads, FULL, pieces(FILE)))
    uploads.close()


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(("header", "content", "calls"), [(FULL, FILE, 4), (LORA, FILE, 5), (SPARSE, CHANGE, 6)])
async def test_a_caller_that_leaves_while_a_thread_works_leaves_nothing(
    tmp_path: Path,
    base: tuple[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    header: UploadHeader,
    content: bytes,
    calls: int,
) -> None:
    """At each of the calls: the thread goes on, and what it makes is removed when it has ended."""
    uploads = Uploads(tmp_path / "uploads", 10**6)
    plain = asyncio.to_thread
    for place in range(calls):
        begun = asyncio.Event()
        go_on = threading.Event()
        seen = 0

        async def held(work: Callable[..., Any], *arguments: Any, begun: Any = begun, go_on: Any = go_on) -> Any:
            nonlocal seen
            seen += 1
            if seen == place + 1:  # noqa: B023 - it is called within this turn
                begun.set()
                await plain(go_on.wait)
            return await plain(work, *arguments)

        monkeypatch.setattr(asyncio, "to_thread", held)
        half = len(content) // 2
        receiving = asyncio.create_task(receive(uploads, header, pieces(content[:half], content[half:]), base))
        await begun.wait()
        receiving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await receiving
        reserved = uploads.reserved_bytes
        assert bool(reserved) == (place > 0 or header is not SPARSE)  # the disk may still be written to
        go_on.set()
        await until(lambda: uploads.reserved_bytes == 0)
        assert list((tmp_path / "uploads").iterdir()) == [], place
    monkeypatch.setattr(asyncio, "to_thread", plain)
    uri = await receive(uploads, header, pieces(content), base)
    assert uploads.path(uri).exists()
    await uploads.remove(uri)
    uploads.close()


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
    assert error.metadata["needed_bytes"] == str(len(FILE) + len(header.adapter_config))


@pytest.mark.parametrize("seconds", [-1e9, 0, 1e9])
async def test_a_restart_finds_what_is_complete_whatever_its_time_says(tmp_path: Path, seconds: float) -> None:
    """A clock that was set, or a file system with a clock of its own, must not take away what a trainer just sent."""
    folder = tmp_path / "uploads"
    before = Uploads(folder, 10**6)
    uri = await receive(before, FULL, pieces(FILE))
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
    uri = await receive(before, FULL, pieces(FILE))
    before.close()
    os.utime(before.path(uri).parent, (time.time() + seconds,) * 2)
    after = Uploads(tmp_path, 10**6)
    async with asyncio.timeout(20):
        while os.listdir(tmp_path):  # noqa: ASYNC110 - a timer removes it
            await asyncio.sleep(0.01)
    after.close()


async def test_what_is_not_used_is_removed(uploads: Uploads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mulligan.policy.uploads._KEPT_SECONDS", 0.05)
    uri = await receive(uploads, FULL, pieces(FILE))
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
