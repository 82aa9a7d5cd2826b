"""A console process, and a browser to look at it with."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeVar
from urllib.parse import urlsplit

from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.support.wait import WebDriverWait

from tests.support.found import require_chromium
from tests.support.paths import IMPORT_ROOTS

CONSOLE_KEY = "the-key-of-every-console-of-tests"
T = TypeVar("T")


@contextmanager
def console(folder: Path, cache: Path, *options: str, **variables: str) -> Iterator[str]:
    """`mulligan ui FOLDER`, with CONSOLE_KEY unless the options have another one. Its address."""
    if not any(option.startswith("--key-file") for option in options):
        cache.mkdir(parents=True, exist_ok=True)
        key = cache / "console-key"
        key.touch(0o600)
        key.write_text(CONSOLE_KEY)
        options = (*options, f"--key-file={key}")
    environment = {**os.environ, "PYTHONPATH": IMPORT_ROOTS, "XDG_CACHE_HOME": str(cache), **variables}
    command = [sys.executable, "-m", "mulligan.cli", "ui", str(folder), "--port", "0", *options]
    with started(command, environment) as address:
        yield address


def with_key(address: str, key: str = CONSOLE_KEY) -> dict[str, str]:
    """The headers of a browser that was given the key."""
    return {"Cookie": f"mulligan-console-{urlsplit(address).port}={key}"}


@contextmanager
def demo_console(temporary: Path, *options: str) -> Iterator[str]:
    """`mulligan ui --demo`, with a folder for temporary files, in which it works. Its address."""
    away = {"TMPDIR": str(temporary), "XDG_CACHE_HOME": str(temporary / "cache")}
    command = [sys.executable, "-m", "mulligan.cli", "ui", "--demo", "--port", "0", *options]
    with started(command, {**os.environ, "PYTHONPATH": IMPORT_ROOTS, **away}, temporary) as address:
        yield address


@contextmanager
def started(command: Sequence[str], environment: Mapping[str, str], folder: Path | None = None) -> Iterator[str]:
    """The address of the console that a command starts."""
    with subprocess.Popen(command, env=environment, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            yield _address(process.stderr)
        finally:
            process.terminate()
            process.communicate()


def _address(lines: IO[str]) -> str:
    read = ""
    for line in lines:
        read += line
        if found := re.search(r"https?://[^\s/?]+", line):
            return found[0]
    raise AssertionError(f"the console did not start:\n{read}")


def until(chrome: Chrome, condition: Callable[[Chrome], T]) -> T:
    """What the condition returns, once it is true. Meanwhile the page may change, and another one may come."""
    changing = (NoSuchElementException, StaleElementReferenceException)
    return WebDriverWait(chrome, 60, 0.05, ignored_exceptions=changing).until(condition)


@contextmanager
def browser() -> Iterator[Chrome]:
    """Headless Chromium, 1,400 by 900 pixels. Skips the test, or fails it, where there is none."""
    driver = shutil.which("chromedriver")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    require_chromium("" if driver and program else "no Chromium with ChromeDriver on the PATH: no browser to test with")
    options = ChromeOptions()
    options.binary_location = str(program)
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = Chrome(options=options, service=ChromeService(str(driver)))
    try:
        yield found
    finally:
        found.quit()
