"""Who may see the console, and who may change something with it."""

from __future__ import annotations

import os
import re
import select
import socket
import ssl
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from mulligan.common.certificates import Certificates
from mulligan.console.reading import index_file
from mulligan.console.web_server import CONNECTIONS
from mulligan.testing.loop import Loop, small_run
from mulligan.testing.processes import ServiceProcesses
from mulligan.testing.recorded_runs import write_run
from mulligan.trainer.folder import RunState
from tests.support.console import browser, console, until, with_key
from tests.support.paths import IMPORT_ROOTS
from tests.support.waiting import wait_until

KEY = "a-key-of-the-console-in-a-file"
AWAY = [f"--{name}=127.0.0.1:1" for name in ("env", "policy-address", "trainer", "memory")]


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    file.chmod(0o600)
    return file


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    write_run(tmp_path / "runs", "run-1", steps=1)
    return tmp_path / "runs"


def index_file_of(runs: Path, cache: Path) -> Path:
    return cache / "mulligan" / "console" / index_file(runs.resolve()).name


def answer(
    address: str, path: str, headers: Mapping[str, str], method: str = "GET", ca: Path | None = None
) -> HTTPResponse:
    """Redirects are not followed."""
    parts = urlsplit(address)
    if ca is None:
        connection = HTTPConnection(parts.netloc, timeout=30)
    else:
        connection = HTTPSConnection(parts.netloc, timeout=30, context=ssl.create_default_context(cafile=ca))
    connection.request(method, path, headers=dict(headers))
    found = connection.getresponse()
    found.read()
    return found


def cookie_of(address: str, ca: Path | None = None) -> str:
    """What the browser gets for the right key."""
    found = answer(address, f"/runs/run-1?metric=a+b&key={KEY}", {}, ca=ca)
    assert (found.status, found.headers["Location"]) == (303, "/runs/run-1?metric=a+b")
    cookie = found.headers["Set-Cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and ("Secure" in cookie) == (ca is not None)
    return cookie.partition(";")[0]


def test_the_key_is_needed_to_see_and_to_act(runs: Path, key_file: Path, tmp_path: Path) -> None:
    """On this machine, too: it reads with its user's tokens, and other users reach its port."""
    with console(runs, tmp_path / "cache", "--key-file", str(key_file), *AWAY) as address:
        own = {"Origin": address}
        for path in ("/", "/runs/run-1", "/series?run=run-1", "/live?run=run-1", "/memory", "/services"):
            assert answer(address, path, {}).status == 401
            assert answer(address, path, {"Cookie": f"mulligan-console-{urlsplit(address).port}=x"}).status == 401
        connection = HTTPConnection(urlsplit(address).netloc, timeout=30)
        connection.request("GET", "/")
        files = re.findall(r'(?:href|src)="(/[^"]+)"', connection.getresponse().read().decode())
        assert "/static/icon.svg" in files, "without one a browser asks for /favicon.ico, which is refused"
        assert [answer(address, file, {}).status for file in files] == [200] * len(files)
        assert answer(address, "/runs/run-1", {"Cookie": cookie_of(address)}).status == 200
        assert answer(address, "/?key=another", {}).status == 401
        for path in ("/runs/run-1/stop", "/runs/run-1/resume", "/policies/actor/versions/1/serve"):
            assert answer(address, path, own, "POST").status == 401
            assert answer(address, path, {**own, "Cookie": "mulligan-console=x"}, "POST").status == 401
        cookie = {"Cookie": cookie_of(address)}
        assert answer(address, "/runs/run-1/stop", cookie, "POST").status == 403, "no Origin"
        assert answer(address, "/runs/run-1/stop", {**cookie, "Origin": "http://example.com"}, "POST").status == 403
        assert answer(address, "/runs/run-1/stop", {**cookie, **own}, "POST").status == 409, "the trainer is away"
        assert answer(address, "/runs/run-2/stop", {**cookie, **own}, "POST").status == 404
        assert answer(address, "/runs/run-1/stop", {**cookie, **own}).status == 405


def test_the_printed_address_opens_it_and_its_files_are_private(runs: Path, tmp_path: Path) -> None:
    """Whatever the umask, also where an earlier release made the index for all."""
    index = index_file_of(runs, tmp_path)
    index.parent.mkdir(parents=True)
    index.touch(0o644)
    command = [sys.executable, "-m", "mulligan.cli", "ui", str(runs), "--port", "0", *AWAY]
    environment = {**os.environ, "PYTHONPATH": IMPORT_ROOTS, "XDG_CACHE_HOME": str(tmp_path)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, umask=0o022) as process:
        try:
            assert process.stderr is not None
            said = process.stderr.readline()
            address, _, query = said.split()[-1].partition("/?")
            assert "with the console's key: http://127.0.0.1:" in said and len(query) > 20
            cookie = answer(address, f"/?{query}", {}).headers["Set-Cookie"].partition(";")[0]
            assert answer(address, "/runs/run-1", {"Cookie": cookie}).status == 200
            files = list(index.parent.iterdir())
            assert {file.stat().st_mode & 0o777 for file in files} == {0o600} and len(files) == 3
        finally:
            process.terminate()
            process.communicate()


def test_beyond_this_machine_everything_needs_the_key_and_goes_over_tls(
    runs: Path, key_file: Path, tmp_path: Path
) -> None:
    Certificates(tmp_path / "certs").update()
    tls = tmp_path / "certs" / "services" / "env"
    options = ["--host", "0.0.0.0", "--name", "localhost", "--key-file", str(key_file)]
    options += ["--tls-certificate", str(tls / "tls.crt"), "--tls-key", str(tls / "tls.key")]
    with console(runs, tmp_path / "cache", *options, *AWAY) as address:
        assert address.startswith("https://localhost:")
        ca = tls / "ca.crt"
        for path in ("/", "/runs/run-1", "/series?run=run-1", "/live?run=run-1", "/memory", "/services"):
            assert answer(address, path, {}, ca=ca).status == 401
        assert answer(address, "/static/console.css", {}, ca=ca).status == 200, "the page that asks for the key has it"
        assert answer(address, "/runs/run-1", {"Cookie": cookie_of(address, ca)}, ca=ca).status == 200
        assert answer(address, "/", {"Host": "console.example.com"}, ca=ca).status == 403


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0: without TLS others could read the key on its way"),
        (["--tls-key", "key"], "--tls-certificate and --tls-key: expected both, or none"),
        (["--host", "a b"], "--host a b: expected a name or an address of this machine"),
        (["--key-file", "short"], "--key-file short: expected at least 20 letters, digits, - and _"),
        (["--key-file", "open"], "--key-file: open: other users may use it (mode 644)"),
        (["--host", "192.0.2.1", "--port", "1"], "--host 192.0.2.1: without TLS"),
    ],
)
def test_bad_options_are_named(runs: Path, key_file: Path, tmp_path: Path, options: list[str], problem: str) -> None:
    for name, mode in (("short", 0o600), ("open", 0o644)):
        (tmp_path / name).write_text("short")
        (tmp_path / name).chmod(mode)
    command = [sys.executable, "-m", "mulligan.cli", "ui", str(runs), "--port", "0", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and problem in done.stderr


async def test_a_run_is_stopped_and_resumed(services: ServiceProcesses, key_file: Path, tmp_path: Path) -> None:
    """By the buttons, with the token that `mulligan ui` has."""
    loop = Loop.start(services, tmp_path / "loop")
    client = loop.client()
    await client.start("long", small_run(steps=1000))
    options = [f"--trainer={loop.trainer.address}", f"--key-file={key_file}", *AWAY[:2], AWAY[3]]
    with console(tmp_path / "loop", tmp_path / "cache", *options) as address, browser() as chrome:

        def button(text: str) -> WebElement | None:
            for one in chrome.find_elements(By.CSS_SELECTOR, ".heading button"):
                if one.text == text:
                    return one
            chrome.refresh()
            return None

        def pressed(text: str) -> bool:
            if found := button(text):
                found.click()
            return found is not None

        def press(text: str) -> None:
            until(chrome, lambda _: pressed(text))
            chrome.switch_to.alert.accept()

        chrome.get(f"{address}/runs/long?key={KEY}")
        press("Stop")
        until(chrome, lambda _: button("Resume"))
        assert (await client.get("long")).state is RunState.STOPPED
        press("Resume")
        until(chrome, lambda _: button("Stop"))
        press("Stop")
        until(chrome, lambda _: button("Resume"))
    await client.close()


def test_connections_without_a_request_leave_room(runs: Path, tmp_path: Path) -> None:
    """Half-sent ones, ones that say nothing, and what is no HTTP. A page that is followed goes on."""
    with console(runs, tmp_path / "cache", *AWAY) as address, ExitStack() as stack:
        following = HTTPConnection(urlsplit(address).netloc, timeout=30)
        stack.callback(following.close)
        following.request("GET", "/live", headers=with_key(address))
        followed = following.getresponse()
        assert followed.status == 200 and followed.readline() == b"retry: 2000\n"
        host, _, port = urlsplit(address).netloc.rpartition(":")
        made = []
        for number in range(CONNECTIONS + 100):
            one = stack.enter_context(socket.create_connection((host, int(port)), timeout=10))
            one.sendall((b"", b"GET / HTTP/1.1\r\nX: ", b"POST /x HTTP/1.1\r\n", b"\xff\r\n\r\n")[number % 4])
            made.append(one)
        ended: set[socket.socket] = set()

        def most_have_ended() -> bool:
            for one in select.select([one for one in made if one not in ended], [], [], 0)[0]:
                with suppress(ConnectionError):
                    one.recv(1_000)
                ended.add(one)
            return len(ended) >= 200  # 89 that were no HTTP among them

        wait_until(most_have_ended, 30)
        assert answer(address, "/", with_key(address)).status == 200
        assert following.sock is not None
        while select.select([following.sock], [], [], 0)[0]:
            assert following.sock.recv(1_000), "it has not ended"
