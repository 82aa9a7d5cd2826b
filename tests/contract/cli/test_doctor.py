"""What `mulligan doctor` says of real servers: as they should be, and with one thing wrong at a time."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mulligan.cli.app import app
from mulligan.cli.connection import TLS, TOKEN
from mulligan.cli.doctor import services as doctored
from mulligan.cli.doctor.finding import Finding
from mulligan.cli.doctor.services import examine_service
from mulligan.common import certificates
from mulligan.common.access import AccessRole
from mulligan.testing.processes import ServiceProcesses
from tests.support.certificate import Authority
from tests.support.small_disk import SmallDisk
from tests.support.tokens import token_of, write_tokens


class Secured:
    """An env service with TLS and tokens, whose certificate a test replaces: new connections get the new one."""

    def __init__(self, services: ServiceProcesses, folder: Path):
        self.folder = folder
        self._made = certificates.Authority.make(datetime.now(UTC))
        self.ca = folder / "ca.crt"
        self.ca.write_bytes(certificates.certificate_pem(self._made.certificate))
        self.key, self.certificate = folder / "tls.key", folder / "tls.crt"
        self.show("127.0.0.1")
        self.tokens = write_tokens(folder)
        for file in self.tokens.iterdir():
            file.chmod(0o600)
        self.address = services.start(
            "env", tls_certificate=self.certificate, tls_key=self.key, tokens_folder=self.tokens
        ).address

    def show(self, name: str, *, begins: float = 0.0, days: int = 100) -> None:
        """Replaces the certificate by one that begins so many days from now."""
        pair = self._made.issue("env", [name], datetime.now(UTC) + timedelta(days=begins), days=days)
        self.key.write_bytes(pair[0])
        self.certificate.write_bytes(pair[1])


@pytest.fixture(scope="module")
def secured(shared_services: ServiceProcesses, tmp_path_factory: pytest.TempPathFactory) -> Secured:
    return Secured(shared_services, tmp_path_factory.mktemp("secured"))


@pytest.fixture(scope="module")
def plain(shared_services: ServiceProcesses) -> str:
    """The address of an env service without TLS and tokens."""
    return shared_services.start("env").address


@pytest.fixture
def knows(monkeypatch: pytest.MonkeyPatch, secured: Secured) -> Iterator[None]:
    """The command has the authority and a token of the server, which shows a good certificate afterwards, too."""
    monkeypatch.setenv(f"{TLS}_CA", str(secured.ca))
    monkeypatch.setenv(f"{TOKEN}_FILE", str(secured.tokens / AccessRole.ADMIN))
    yield
    secured.show("127.0.0.1")


async def found_at(address: str, service: str = "env") -> list[Finding]:
    """All findings about one service."""
    return list((await examine_service(service, address, datetime.now(UTC))).findings)


def verdicts(findings: list[Finding]) -> dict[str, str]:
    """The worst verdict of each check."""
    order = ("skipped", "ok", "warning", "problem")
    found: dict[str, str] = {}
    for one in findings:
        found[one.check] = max(found.get(one.check, "skipped"), str(one.verdict), key=order.index)
    return found


def problem(findings: list[Finding]) -> Finding:
    """The one problem."""
    (found,) = [one for one in findings if one.verdict == "problem"]
    assert found.remedy.endswith(".")
    return found


async def test_a_service_that_is_well(plain: str) -> None:
    assert verdicts(await found_at(plain)) == {"address": "ok", "token": "ok", "clock": "ok"}


@pytest.mark.usefixtures("knows")
async def test_a_service_with_tls_and_tokens_that_is_well(secured: Secured) -> None:
    expected = dict.fromkeys(("permissions", "certificate", "address", "token", "clock"), "ok")
    assert verdicts(await found_at(secured.address)) == expected


@pytest.mark.usefixtures("knows")
@pytest.mark.parametrize(
    ("name", "begins", "days", "said"),
    [
        ("127.0.0.1", -30, 20, "The certificate expired at"),
        ("127.0.0.1", 5, 20, "and the clock here says"),
        ("other.example.com", 0, 20, "The certificate is for other.example.com, not for 127.0.0.1"),
    ],
)
async def test_a_bad_certificate(secured: Secured, name: str, begins: float, days: int, said: str) -> None:
    secured.show(name, begins=begins, days=days)
    found = problem(await found_at(secured.address))
    assert found.check == "certificate" and said in found.said


@pytest.mark.usefixtures("knows")
async def test_a_certificate_that_ends_soon_is_a_warning(secured: Secured) -> None:
    secured.show("127.0.0.1", begins=-90, days=100)
    found = await found_at(secured.address)
    assert verdicts(found) | {"certificate": "warning"} == verdicts(found) and verdicts(found)["address"] == "ok"


@pytest.mark.usefixtures("knows")
async def test_an_unknown_authority(secured: Secured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{TLS}_CA", str(Authority(tmp_path, "stranger").ca))
    found = problem(await found_at(secured.address))
    assert f"not among {tmp_path}" in found.said and f"{TLS}_CA" in found.remedy


async def test_tls_is_spoken_to_a_plain_service(plain: str, secured: Secured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{TLS}_CA", str(secured.ca))
    found = problem(await found_at(plain))
    assert f"{plain} does not speak TLS" in found.said and f"Unset {TLS}" in found.remedy


async def test_a_service_with_tls_is_called_without(secured: Secured) -> None:
    found = problem(await found_at(secured.address))
    assert f"{secured.address} speaks TLS, and it is called without" in found.said and f"{TLS}_CA" in found.remedy


async def test_a_service_that_asks_for_a_certificate(
    services: ServiceProcesses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority(tmp_path, "authority")
    key, certificate = authority.issue("env", "127.0.0.1")
    server = services.start("env", tls_certificate=certificate, tls_key=key, tls_client_ca=authority.ca)
    monkeypatch.setenv(f"{TLS}_CA", str(authority.ca))
    assert "asks for a certificate" in problem(await found_at(server.address)).said
    mine = authority.client(AccessRole.ADMIN)
    assert mine.key is not None
    mine.key.chmod(0o600)
    for part, file in (("CERT", mine.cert), ("KEY", mine.key)):
        monkeypatch.setenv(f"{TLS}_{part}", str(file))
    assert verdicts(await found_at(server.address))["token"] == "ok"
    mine.key.chmod(0o644)
    found = problem(await found_at(server.address))
    assert found.check == "permissions" and f"chmod go-rwx {mine.key}" in found.remedy


@pytest.mark.usefixtures("knows")
async def test_tokens(secured: Secured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "token"
    other.write_text("0123456789abcdef0123\n")
    other.chmod(0o600)
    monkeypatch.setenv(f"{TOKEN}_FILE", str(other))
    refused = problem(await found_at(secured.address))
    assert refused.check == "token" and f"refuses the token of {other}" in refused.said
    assert "0123456789abcdef0123" not in refused.said + refused.remedy
    monkeypatch.setenv(f"{TOKEN}_FILE", str(tmp_path / "away"))
    assert f"{tmp_path / 'away'}: no such file" in problem(await found_at(secured.address)).said
    monkeypatch.delenv(f"{TOKEN}_FILE")
    assert "wants a token, and none is set or found" in problem(await found_at(secured.address)).said
    monkeypatch.setenv(TOKEN, token_of(AccessRole.READER))
    assert verdicts(await found_at(secured.address))["token"] in ("ok", "warning")


async def test_another_service_is_behind_the_address(plain: str) -> None:
    found = problem(await found_at(plain, "memory"))
    assert found.said == f"At {plain} is the env service, not the memory service." and "--memory" in found.remedy


async def test_nothing_listens_and_a_host_that_is_unknown() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{held.getsockname()[1]}"
        found = problem(await found_at(address, "policy"))
    assert found.said == f"Nothing listens at {address}." and "--policy-address" in found.remedy
    assert "is not known" in problem(await found_at("no-such-host.invalid:1")).said


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", None])
async def test_something_else_listens(answer: bytes | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A web server, and a program that never answers."""
    monkeypatch.setattr(doctored, "_SECONDS", 1.0)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if answer is not None:
            writer.write(answer)
            await writer.drain()
        else:
            await reader.read()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        found = problem(await found_at(f"{host}:{port}"))
    assert f"{host}:{port} takes connections, and does not answer" in found.said


def test_the_command_with_a_full_disk_a_proxy_and_a_service_that_is_away(
    plain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("http_proxy", "http://me:secret@127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    SmallDisk(monkeypatch, 0)
    arguments = ["doctor", "--json", "--env", plain, "--policy-address", "127.0.0.1:1", "--folder", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    report = json.loads(result.stdout)
    found = {(one["check"], one["subject"]): one for one in report["findings"]}
    assert result.exit_code == 1 and not report["ok"], result.output
    assert found["address", "env"]["verdict"] == "ok"
    assert "Nothing listens at 127.0.0.1:1" in found["address", "policy"]["said"]
    assert found["disk", "runs"]["verdict"] == "problem" and "is full" in found["disk", "runs"]["said"]
    (proxy,) = [one for one in report["findings"] if one["check"] == "proxy"]
    assert proxy["verdict"] == "warning" and "http_proxy sets a proxy" in proxy["said"]
    assert "secret" not in result.output
    assert report["counts"]["problem"] == len([one for one in report["findings"] if one["verdict"] == "problem"])
