"""`mulligan report`: one HTML file that needs nobody, in which data are never markup."""

from __future__ import annotations

import base64
import hashlib
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By

from mulligan.testing.recorded_runs import write_run
from tests.support.console import browser, until

HOSTILE = "</script><script>alert(1)</script>\x1b[31m\u202e<!--'\"&{{ 7*7 }}"


def report(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mulligan.cli", "report", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_run(folder / "runs" / "deep", "run-1", steps=4, says=HOSTILE)
    done = report(folder, "run-1")
    assert (done.returncode, done.stdout) == (0, "run-1.html\n"), done.stderr
    return folder / "run-1.html"


class _Page(HTMLParser):
    """Start tags, texts of scripts, and all other text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[str, str]] = []
        self.text = ""
        self._script: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._script = dict(attrs).get("type") or "" if tag == "script" else None

    def handle_endtag(self, tag: str) -> None:
        self._script = None

    def handle_data(self, data: str) -> None:
        if self._script is None:
            self.text += data
        else:
            self.scripts.append((self._script, data))


def test_data_are_never_markup_and_nobody_is_asked(file: Path) -> None:
    text = file.read_text()
    page = _Page(text)
    assert HOSTILE.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e") in page.text
    assert "\x1b" not in text and "\u202e" not in text
    [policy] = [one["content"] or "" for tag, one in page.tags if one.get("http-equiv") == "Content-Security-Policy"]
    allowed = set(re.findall("'sha256-([^']+)'", policy))
    run = [script for kind, script in page.scripts if kind != "application/json"]
    assert {base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in run} == allowed
    assert len(run) == 4 and policy.startswith("default-src 'none'; ")
    for _, attributes in page.tags:
        assert not any(name.startswith("on") or name in ("src", "style") for name in attributes)
        assert (attributes.get("href") or "#").startswith("#")


def test_it_is_used_with_keys_in_a_browser(file: Path) -> None:
    with browser() as chrome:
        chrome.get(file.as_uri())
        until(chrome, lambda found: len(found.find_elements(By.CSS_SELECTOR, ".chart canvas")) > 1)

        def press(*keys: str) -> None:
            for key in keys:
                ActionChains(chrome).send_keys(key).perform()

        def here() -> Any:
            return chrome.execute_script("return document.querySelector('.here')?.dataset.href ?? ''")

        charts = len(chrome.find_elements(By.CSS_SELECTOR, ".chart"))
        press(*["j"] * (charts + 2))
        assert here() == "#e2"
        press("\ue007")
        until(chrome, lambda found: found.current_url.endswith("#e2"))
        before = chrome.find_element(By.TAG_NAME, "html").get_attribute("data-theme")
        press("t")
        assert chrome.find_element(By.TAG_NAME, "html").get_attribute("data-theme") != before
        press("?")
        assert chrome.find_element(By.ID, "help").is_displayed()
        assert chrome.get_log("browser") == []  # type: ignore[no-untyped-call]


def test_without_tokens_it_has_none(file: Path) -> None:
    done = report(file.parent, "runs/deep/run-1", "--output", "short.html", "--experiences", "1", "--no-tokens")
    assert done.returncode == 0, done.stderr
    text = (file.parent / "short.html").read_text()
    assert 'data-probability="' not in text and 'data-probability="' in file.read_text()
    assert text.count('data-href="#e') == 1


def test_a_damaged_run_is_told(tmp_path: Path) -> None:
    (write_run(tmp_path, "run", steps=1).path / "run.json").write_text("{")
    done = report(tmp_path, "run", "-o", "it.html")
    assert done.returncode == 0 and "run.json is damaged" in (tmp_path / "it.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["run-2"], "error: run-2: no run below runs has this id; did you mean 'run-1'?"),
        (["."], "error: . has 2 runs: name one of their folders, such as "),
        (["empty"], "error: empty: this folder has no run (a run has run.json)"),
        (["runs/run-1", "-o", "nowhere/it.html"], "error: --output nowhere/it.html: No such file or directory"),
    ],
)
def test_bad_arguments_are_named(tmp_path: Path, arguments: list[str], problem: str) -> None:
    for name in ("run-1", "other"):
        write_run(tmp_path / "runs", name, steps=1)
    (tmp_path / "empty").mkdir()
    done = report(tmp_path, *arguments)
    assert done.returncode == 2 and problem in done.stderr and done.stdout == ""
