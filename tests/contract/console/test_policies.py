"""Policies of several servers: what the pages show of each, and rollbacks of real policy services by the button."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from safetensors.torch import load_file
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

from mulligan.cli.local_tokens import LocalTokens
from mulligan.common.access import AccessRole
from mulligan.common.channel import Endpoint
from mulligan.models import locate
from mulligan.policy.client import PolicyClient
from mulligan.testing.processes import ServiceProcess, ServiceProcesses
from mulligan.testing.weights import full_weights
from tests.support.console import browser, console, until, with_key

KEY = "a-key-of-the-console-in-a-file"
LATEST = 3  # version


@dataclass
class TwoServers:
    """Of one policy, each with its own state, both with versions up to LATEST of weights, of which they keep some."""

    folder: Path
    tokens: LocalTokens
    servers: list[ServiceProcess]

    @property
    def address(self) -> str:
        return ",".join(server.address for server in self.servers)

    def client(self, server: ServiceProcess) -> PolicyClient:
        return PolicyClient(Endpoint(server.address, token_file=self.tokens.of("policy") / AccessRole.ADMIN))

    async def publish(self, version: int) -> None:
        tensors = load_file(Path(locate("embedded")) / "model.safetensors")
        changed = {name: tensor + 1e-4 * version for name, tensor in tensors.items()}
        for server in self.servers:
            client = self.client(server)
            fingerprint = (await client.info()).fingerprint
            path = self.folder / "weights" / f"{version}.safetensors"
            await client.update_weights(full_weights(path, changed, version, fingerprint))
            await client.close()

    async def versions(self) -> list[int]:
        """That serve at each."""
        clients = [self.client(server) for server in self.servers]
        found = [(await client.info()).policy_version for client in clients]
        for client in clients:
            await client.close()
        return found

    @contextmanager
    def console(self, role: AccessRole, policy_address: str = "") -> Iterator[str]:
        key = self.folder / "key"
        key.write_text(KEY)
        key.chmod(0o600)
        runs = self.folder / "shown"
        runs.mkdir(exist_ok=True)
        options = [f"--policy-address={policy_address or self.address}", f"--key-file={key}"]
        away = [f"--{name}=127.0.0.1:1" for name in ("env", "memory", "trainer")]
        token = str(self.tokens.of("policy") / role)
        with console(runs, self.folder / "cache", *options, *away, MULLIGAN_CLI_TOKEN_FILE=token) as address:
            yield address


@pytest.fixture
async def two(services: ServiceProcesses, tmp_path: Path) -> TwoServers:
    tokens = LocalTokens(tmp_path)
    tokens.make()
    (tmp_path / "weights").mkdir()
    settings: dict[str, Any] = {"weights_folder": tmp_path / "weights", "tokens_folder": tokens.of("policy")}

    def start(number: int) -> ServiceProcess:
        return services.start("policy", threads=1, state_folder=tmp_path / f"state-{number}", **settings)

    with ThreadPoolExecutor() as pool:
        servers = await asyncio.to_thread(lambda: list(pool.map(start, range(2))))
    found = TwoServers(tmp_path, tokens, servers)
    for version in range(1, LATEST + 1):
        await found.publish(version)
    return found


def text(chrome: Chrome) -> str:
    """Of the page; "" while the next one comes."""
    found: str = chrome.execute_script("return document.querySelector('main')?.innerText ?? ''")
    return re.sub("[ \t]+", " ", found)


def serve_again(chrome: Chrome, version: int) -> str:
    """Presses the button of a version, and says yes. What was asked."""
    row = next(row for row in chrome.find_elements(By.CSS_SELECTOR, "tbody tr") if row.text.startswith(f"{version} "))
    row.find_element(By.TAG_NAME, "button").click()
    asked = chrome.switch_to.alert.text
    chrome.switch_to.alert.accept()
    return asked


async def test_a_version_is_rolled_back_at_all_servers_with_the_key_and_the_role(two: TwoServers) -> None:
    """Without the console's key there is no button; without the services' role they refuse."""

    def as_reader() -> None:
        with two.console(AccessRole.READER) as address, browser() as chrome:
            chrome.get(f"{address}/policies?key={KEY}")
            serve_again(chrome, 2)
            until(chrome, lambda found: "PERMISSION_DENIED" in text(found) or "role" in text(found))
            assert all(server.address in text(chrome) for server in two.servers)

    def as_admin() -> None:
        with two.console(AccessRole.ADMIN) as address, browser() as chrome:
            chrome.get(f"{address}/policies")
            assert "needs the key of the console" in text(chrome) and "version 3" not in text(chrome)
            chrome.get(f"{address}/policies?key={KEY}")
            servers = chrome.find_elements(By.CSS_SELECTOR, ".servers tbody tr")
            assert [one.text for one in servers] == [f"{server.address} serving 3 0" for server in two.servers]
            assert "at all 2 servers" in serve_again(chrome, 2)
            until(chrome, lambda found: f"{two.servers[1].address} serving 2 0" in text(found))
            assert re.search(r"^3 withdrawn", text(chrome), re.MULTILINE)

    await asyncio.to_thread(as_reader)
    assert await two.versions() == [LATEST, LATEST]
    await asyncio.to_thread(as_admin)
    assert await two.versions() == [2, 2]


@pytest.mark.long
async def test_nothing_is_rolled_back_where_a_server_is_away_or_lacks_the_version(two: TwoServers) -> None:
    first, second = two.servers

    def with_one_away() -> None:
        with two.console(AccessRole.ADMIN, f"{two.address},127.0.0.1:1") as address, browser() as chrome:
            chrome.get(f"{address}/policies?key={KEY}")
            assert "127.0.0.1:1" in text(chrome) and first.address in text(chrome)
            serve_again(chrome, 2)
            until(chrome, lambda found: "No server was rolled back: 127.0.0.1:1" in text(found))
            assert text(chrome).startswith("409")

    def with_one_behind() -> None:
        with two.console(AccessRole.ADMIN) as address, browser() as chrome:
            chrome.get(f"{address}/policies?key={KEY}")
            found = [one.text for one in chrome.find_elements(By.CSS_SELECTOR, ".servers tbody tr")]
            assert found == [f"{first.address} serving 3 0", f"{second.address} serving 1 0"]
            rows = [one.text for one in chrome.find_elements(By.CSS_SELECTOR, "table:not(.servers) tbody tr")]
            assert any(re.match("3 serving at 1 withdrawn at 1 ", row) for row in rows), rows
            with_button = [row.split()[0] for row in rows if row.endswith("Serve again")]
            assert with_button == ["1", "0"], "not those that one server has withdrawn"
            serve_again(chrome, 1)
            until(chrome, lambda found: f"{first.address} serving 1 0" in text(found))

    await asyncio.to_thread(with_one_away)
    assert await two.versions() == [LATEST, LATEST]
    client = two.client(second)
    await client.rollback(1)
    await client.close()
    await asyncio.to_thread(with_one_behind)
    assert await two.versions() == [1, 1]


async def test_each_server_has_its_health_and_a_chat_goes_to_one_that_serves(two: TwoServers) -> None:
    """Also when another one is away."""

    def look() -> None:
        address = f"127.0.0.1:1,{two.address}"
        with two.console(AccessRole.ACTOR, address) as shown, browser() as chrome:
            chrome.get(f"{shown}/services?key={KEY}")
            rows = [one.text for one in chrome.find_elements(By.CSS_SELECTOR, "tbody tr")]
            assert "policy 127.0.0.1:1 does not answer" in rows
            assert all(f"policy {server.address} serves 0" in rows for server in two.servers)
            chrome.get(f"{shown}/chat")
            Select(chrome.find_element(By.NAME, "policy"))
            chrome.find_element(By.NAME, "text").send_keys("Hello")
            chrome.find_element(By.XPATH, "//button[text()='Send']").click()
            until(chrome, lambda found: found.find_elements(By.CSS_SELECTOR, ".said-by.assistant .facts"))
            assert f"version {LATEST}" in chrome.find_element(By.CSS_SELECTOR, ".said-by.assistant .facts").text

    await asyncio.to_thread(look)


def test_several_servers_of_any_service_are_shown(tmp_path: Path) -> None:
    addresses = [f"--{name}=127.0.0.1:1-2" for name in ("env", "policy-address", "memory", "trainer")]
    with (
        console(tmp_path, tmp_path / "cache", *addresses) as found,
        urlopen(Request(f"{found}/services", headers=with_key(found)), timeout=60) as answer,
    ):
        page = answer.read().decode()
    assert page.count("does not answer") == 8 and page.count("<code>127.0.0.1:2</code>") == 4
