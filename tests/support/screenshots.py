"""Makes the pictures of the console in the documents: `make screenshots`, or `python -m tests.support.screenshots`.

They are of the recording (`mulligan ui --demo`) in headless Chromium, with 128 colours each.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from urllib.request import urlopen

from PIL import Image
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from tests.support.console import browser, demo_console
from tests.support.paths import ROOT
from tests.support.waiting import wait_until

FOLDER = ROOT / "docs" / "images"
WIDTH = 1440
_LIGHT, _DARK = "light", "dark"


def charts_are_drawn(chrome: Chrome) -> None:
    figures = len(chrome.find_elements(By.CSS_SELECTOR, "figure.chart"))
    wait_until(lambda: len(chrome.find_elements(By.CSS_SELECTOR, ".reading .name")) >= figures > 0)


def tokens_are_open(chrome: Chrome) -> None:
    """Those that were distilled."""
    chrome.find_element(By.CSS_SELECTOR, ".target .sequence summary").click()
    chrome.execute_script("scrollTo(0, 0)")


def nothing(chrome: Chrome) -> None:
    pass


# Name, address, theme, height, and what is done before the picture is taken.
PICTURES: tuple[tuple[str, str, str, int, Callable[[Chrome], None]], ...] = (
    ("console-comparison", "/compare?run=erl&run=rlvr", _LIGHT, 830, charts_are_drawn),
    ("console-experience", "/runs/erl/experiences/erl-s3-t0-r0", _LIGHT, 1285, tokens_are_open),
    ("console-experiences", "/runs/erl/experiences", _DARK, 780, nothing),
    ("console-memory", "/memory?scope=memory-alone", _DARK, 560, nothing),
)


def take(chrome: Chrome, address: str, theme: str, height: int, prepare: Callable[[Chrome], None]) -> bytes:
    chrome.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    )
    size = {"width": WIDTH, "height": height, "deviceScaleFactor": 1, "mobile": True}  # mobile: without scroll bars
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    chrome.get(address)
    prepare(chrome)
    found: bytes = chrome.get_screenshot_as_png()
    return found


def optimised(png: bytes) -> bytes:
    """With fewer colours, which a page does not need."""
    written = io.BytesIO()
    with Image.open(io.BytesIO(png)) as image:
        image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(written, "PNG", optimize=True)
    return written.getvalue()


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, demo_console(Path(temporary)) as address, browser() as chrome:
        wait_until(lambda: b"reading the experiences" not in urlopen(address, timeout=30).read())
        for name, path, theme, height, prepare in PICTURES:
            file = FOLDER / f"{name}.png"
            file.write_bytes(optimised(take(chrome, address + path, theme, height, prepare)))
            print(f"{file.relative_to(ROOT)}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
