"""`mulligan ui --demo`: the recording of the package, over HTTP and in a browser."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
from collections import deque
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urljoin
from urllib.request import Request, urlopen

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from mulligan.console.recording import FILE
from tests.support.console import browser, demo_console, until
from tests.support.paths import ROOT
from tests.support.waiting import wait_until

MOST_PAGES = 150  # that are followed


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def address(temporary: Path) -> Iterator[str]:
    with demo_console(temporary) as found:
        wait_until(lambda: "reading the experiences" not in page(found, "/"))
        yield found


def page(address: str, path: str) -> str:
    with urlopen(address + path, timeout=30) as answer:
        text: str = answer.read().decode()
    return text


def links(address: str) -> dict[str, str]:
    """Pages that can be reached, by their paths; at most MOST_PAGES, the nearest first, and of each kind a few."""
    found: dict[str, str] = {}
    waiting = deque(["/"])
    kinds: dict[str, int] = {}
    while waiting and len(found) < MOST_PAGES:
        path = waiting.popleft()
        kind = re.sub(r"[0-9]+|=[^&]*", "", path)
        if path in found or kinds.get(kind, 0) >= 5:
            continue
        kinds[kind] = kinds.get(kind, 0) + 1
        found[path] = page(address, path)  # raises HTTPError
        for target in re.findall(r'<a [^>]*href="([^"]*)"', found[path]):
            if not target.startswith("#"):
                waiting.append(urljoin(path, unescape(target)))
    return found


def test_every_link_leads_to_a_page_that_says_it_is_recorded(address: str) -> None:
    found = links(address)
    assert len(found) > 40
    for path, text in found.items():
        assert "This is a recording of 20" in text and "Nothing runs." in text, path
        assert '<form method="post"' not in text, path
    kinds = ("/memory/", "/runs/erl/experiences/", "/runs/erl/groups/", "/runs/rlvr", "/policies", "/services", "/chat")
    for kind in kinds:
        assert any(path.startswith(kind) for path in found), kind


def test_what_the_services_said_is_shown(address: str) -> None:
    memory = page(address, "/memory?scope=memory-alone&status=active")
    entries = re.findall(r'<a href="(/memory/[^"]+)"', memory)
    assert entries and " … +" in memory, "with intervals"
    of_one = page(address, entries[0])
    assert "uplift " in of_one and ">left out<" in of_one and ">shown<" in of_one, "with its uses"
    assert ">serving</span>" in page(address, "/policies")
    assert page(address, "/services").count(">answered<") == 4
    assert "mulligan up" in page(address, "/chat")


def test_nothing_can_be_changed(address: str) -> None:
    for path in ("/runs/erl/resume", "/policies/actor/versions/1/serve", "/chat"):
        with pytest.raises(HTTPError) as refused:
            urlopen(Request(address + path, b"", {"Origin": address}), timeout=30)
        assert refused.value.code == 401


def test_in_a_browser(address: str) -> None:
    with browser() as chrome:

        def there(selector: str) -> bool:
            return bool(chrome.find_elements(By.CSS_SELECTOR, selector))

        def press(*keys: str) -> None:
            for key in keys:
                chrome.switch_to.active_element.send_keys(key)

        chrome.get(address)
        press("j", "x", "j", "x", "j", "x", "c")
        until(chrome, lambda _: there(".reading .name"))
        text = chrome.find_element(By.TAG_NAME, "main").text
        assert "algorithm.name" in text and "Success on test tasks" in text
        chrome.get(f"{address}/runs/erl")
        until(chrome, lambda _: there(".reading .name"))
        press("j", Keys.ARROW_LEFT, Keys.ENTER)
        until(chrome, lambda _: there("tr[data-item]"))
        chrome.get(f"{address}/runs/erl/experiences?role=second")
        press("j", Keys.ENTER)
        until(chrome, lambda _: there(".sample .board"))
        roles = [one.text.split()[0] for one in chrome.find_elements(By.CSS_SELECTOR, ".sample > h2")]
        assert roles[:3] == ["first", "reflection", "second"] and there(".token.trained")
        assert errors_of(chrome) == []


def errors_of(chrome: Chrome) -> list[object]:
    log = chrome.get_log("browser")  # type: ignore[no-untyped-call]
    return [entry for entry in log if entry["level"] in ("SEVERE", "WARNING")]


def test_the_recording_is_small_and_names_no_folder_of_its_machine() -> None:
    file = ROOT / "services" / "console" / FILE
    assert file.stat().st_size < 1_500_000
    with tarfile.open(file) as archive:
        contents = [found.read() for member in archive if (found := archive.extractfile(member)) is not None]
    assert len(contents) > 400 and not any(re.search(rb"/(tmp|home|root|work)/", content) for content in contents)


def test_it_leaves_nothing_behind(tmp_path: Path) -> None:
    with demo_console(tmp_path) as address:
        page(address, "/")
        assert [path.name[:14] for path in tmp_path.iterdir()] == ["mulligan-demo-"]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_beside_it_is_refused(tmp_path: Path) -> None:
    for options, problem in (
        ([str(tmp_path), "--demo"], f"--demo: expected without a folder, not with {tmp_path}"),
        ([], "there is no folder runs here: expected FOLDER, or --demo for recorded runs"),
    ):
        command = [sys.executable, "-m", "mulligan.cli", "ui", *options]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and problem in done.stderr
