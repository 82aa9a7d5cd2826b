"""Clients of servers that speak HTTP: which authority they trust, and the certificate that identifies them."""

from __future__ import annotations

import asyncio
import json
import shutil
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from websockets.sync.server import ServerConnection, serve

from mulligan.common.errors import DomainError
from mulligan.common.tls import ClientTls, HttpsContext
from mulligan.env.base import Faulted
from mulligan.env.envs import openenv
from mulligan.policy.backend import HttpSettings
from mulligan.policy.backends._servers import ServerSettings
from mulligan.policy.backends._servers.connection import Unreachable, new_session
from mulligan.policy.backends.openai import Settings as OpenAISettings
from mulligan.policy.backends.sglang import Settings as SglangSettings
from mulligan.policy.backends.sglang.connection import SglangConnection
from mulligan.policy.backends.vllm import Settings as VllmSettings
from tests.support.certificate import Authority
from tests.support.endpoint import MODELS, Asked, Reply, answer, asks, backend, scripted


@pytest.fixture(scope="module")
def authorities(tmp_path_factory: pytest.TempPathFactory) -> tuple[Authority, Authority]:
    """That of the server, and that of its callers."""
    folder = tmp_path_factory.mktemp("authorities")
    return Authority(folder, "servers"), Authority(folder, "callers")


@pytest.fixture
def server_tls(authorities: tuple[Authority, Authority]) -> ssl.SSLContext:
    """Every caller needs a certificate."""
    servers, callers = authorities
    key, certificate = servers.issue("server", "127.0.0.1")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=callers.ca)
    context.load_cert_chain(certificate, key)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


@pytest.fixture
def known(authorities: tuple[Authority, Authority]) -> dict[str, Path]:
    """The settings of a caller that the server knows, and that knows the server."""
    servers, callers = authorities
    key, certificate = callers.issue("caller")
    return {"tls_ca": servers.ca, "tls_cert": certificate, "tls_key": key}


def unknown(known: dict[str, Path], other: Authority) -> list[dict[str, Path]]:
    """The same without one part, or with another authority."""
    return [{"tls_ca": known["tls_ca"]}, {**known, "tls_ca": other.ca}]


def replies(asked: Asked) -> Reply:
    return MODELS if asked.method == "GET" else answer()


async def test_an_endpoint(
    server_tls: ssl.SSLContext, known: dict[str, Path], authorities: tuple[Authority, Authority]
) -> None:
    async with scripted(replies, server_tls) as endpoint:
        async with backend(endpoint, openai=known) as opened:
            assert (await opened.generate(asks())).text == "fine"
        for settings in unknown(known, authorities[1]):
            async with backend(endpoint, openai=settings) as opened:
                with pytest.raises(DomainError):
                    await opened.generate(asks())
        assert len(endpoint.chats) == 1


async def test_an_engine(
    server_tls: ssl.SSLContext, known: dict[str, Path], authorities: tuple[Authority, Authority]
) -> None:
    async with scripted(replies, server_tls) as endpoint:
        for settings, answers in ((known, True), *((one, False) for one in unknown(known, authorities[1]))):
            chosen = ServerSettings(servers=(endpoint.address,), **settings)
            async with new_session(chosen.https()) as session:
                connection = SglangConnection(session, endpoint.address)
                if answers:
                    assert "data" in await connection.get("/models")
                else:
                    with pytest.raises(Unreachable):
                        await connection.get("/models")


async def test_a_new_certificate_is_taken_at_the_next_connection(
    server_tls: ssl.SSLContext, authorities: tuple[Authority, Authority], tmp_path: Path
) -> None:
    servers, callers = authorities
    key, certificate = tmp_path / "key", tmp_path / "cert"

    def use(authority: Authority) -> None:
        for made, path in zip(authority.issue("caller"), (key, certificate), strict=True):
            shutil.copyfile(made, path)

    use(servers)  # which the server does not know as one of callers
    https = HttpsContext(ClientTls(servers.ca, "", certificate, key))
    async with scripted(replies, server_tls) as endpoint, new_session(https) as session:
        connection = SglangConnection(session, endpoint.address)
        with pytest.raises(Unreachable):
            await connection.get("/models")
        use(callers)
        assert "data" in await connection.get("/models")


@contextmanager
def game(tls: ssl.SSLContext) -> Iterator[str]:
    """The address of a server that answers each message with an observation."""

    def serves(connection: ServerConnection) -> None:
        for message in connection:
            if json.loads(message)["type"] != "close":
                connection.send(json.dumps({"type": "observation", "data": {"observation": {"text": "a lake"}}}))

    with serve(serves, "127.0.0.1", 0, ssl=tls) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"https://127.0.0.1:{server.socket.getsockname()[1]}"
        finally:
            server.shutdown()
            thread.join()


async def test_an_openenv_server(
    server_tls: ssl.SSLContext, known: dict[str, Path], authorities: tuple[Authority, Authority]
) -> None:
    def play(settings: dict[str, Any]) -> object:
        session = openenv.Session(openenv.Settings(url, **settings))
        try:
            return session.ask("reset", {})["observation"]
        finally:
            session.close()

    with game(server_tls) as url:
        assert await asyncio.to_thread(play, known) == {"text": "a lake"}
        for settings in unknown(known, authorities[1]):
            with pytest.raises(Faulted):
                await asyncio.to_thread(play, settings)


MAKERS: list[tuple[str, str, Callable[..., object]]] = [
    ("servers", "https://192.0.2.7", lambda url, **tls: SglangSettings(servers=(url,), **tls)),
    ("router", "https://192.0.2.7", lambda url, **tls: SglangSettings(router=url, **tls)),
    ("servers", "https://192.0.2.7", lambda url, **tls: VllmSettings(servers=(url,), **tls)),
    ("base_url", "https://192.0.2.7/v1", lambda url, **tls: OpenAISettings(base_url=url, **tls)),
    ("url", "wss://192.0.2.7/ws", openenv.Settings),
]


@pytest.mark.parametrize(("field", "url", "make"), MAKERS)
def test_settings_that_do_not_fit_are_named(
    field: str, url: str, make: Callable[..., object], known: dict[str, Path], tmp_path: Path
) -> None:
    make(url, **known)
    for tls, said in (
        ({"tls_cert": known["tls_cert"]}, "cert and key belong together"),
        ({"tls_ca": tmp_path / "none.pem"}, "none.pem"),
    ):
        with pytest.raises((ValidationError, ValueError), match=said):
            make(url, **tls)
    plain = url.replace("https:", "http:").replace("wss:", "ws:")
    with pytest.raises((ValidationError, ValueError), match=f"{field}: with tls_… set, expected .* https://"):
        make(plain, **known)


def test_callers_of_load_model_name_no_files() -> None:
    for kind in (SglangSettings, VllmSettings, OpenAISettings):
        assert issubclass(kind, HttpSettings) and {"tls_ca", "tls_cert", "tls_key"} <= kind.local_only
