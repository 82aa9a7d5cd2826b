"""The console in a real browser: keys, clicks, both themes, narrow windows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from mulligan.testing.recorded_runs import write_run
from mulligan.trainer.events import EventLog, StepEvent
from mulligan.trainer.folder import RunFolder
from tests.support.console import CONSOLE_KEY, browser, console, until


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    write_run(root, "run-1")
    write_run(root, "run-2", says="another legend")
    return root


@pytest.fixture(scope="module")
def address(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with console(runs, tmp_path_factory.mktemp("cache")) as found:
        yield found


@pytest.fixture(scope="module")
def shared_window(address: str) -> Iterator[Chrome]:
    with browser() as found:
        found.get(f"{address}/?key={CONSOLE_KEY}")
        yield found


@pytest.fixture
def window(shared_window: Chrome) -> Iterator[Chrome]:
    """Ends with a look at the browser's log: no error, nothing that the page's policy forbids."""
    shared_window.get_log("browser")  # type: ignore[no-untyped-call]
    yield shared_window
    log = shared_window.get_log("browser")  # type: ignore[no-untyped-call]
    assert [entry for entry in log if entry["level"] in ("SEVERE", "WARNING")] == []


def press(window: Chrome, *keys: str) -> None:
    for key in keys:
        window.switch_to.active_element.send_keys(key)


def open_charts(window: Chrome, address: str, path: str = "/runs/run-1") -> None:
    window.get(address + path)
    until(window, lambda found: found.find_elements(By.CSS_SELECTOR, ".reading .name"))


def text(window: Chrome) -> str:
    return window.find_element(By.TAG_NAME, "body").text


def test_from_a_point_to_the_failing_turn_in_four_keys(window: Chrome, address: str) -> None:
    open_charts(window, address)
    press(window, "j")  # the first chart; then its last point but one
    press(window, "j")
    press(window, Keys.ARROW_LEFT, Keys.ENTER)
    until(window, lambda found: "/experiences?step=" in found.current_url)
    until(window, lambda found: found.find_elements(By.CSS_SELECTOR, "tr[data-item]"))
    press(window, "j", "j", Keys.ENTER)
    until(window, lambda found: found.find_elements(By.CSS_SELECTOR, ".sample"))
    press(window, "f")
    focused = window.switch_to.active_element
    assert "failing" in (focused.get_attribute("class") or "") and "fell into hole" in focused.text
    press(window, "u")
    until(window, lambda found: found.find_elements(By.CSS_SELECTOR, "#filter"))
    assert "step=" in window.current_url, "back to where it was listed"


def test_charts_follow_a_run(window: Chrome, address: str, runs: Path) -> None:
    open_charts(window, address, "/runs/run-2?metric=entropy")
    assert "0.333" in text(window)
    EventLog(RunFolder(runs / "run-2").events_file).add(StepEvent(3, {"entropy": 0.0625}))
    press(window, "j")

    def is_there(found: Chrome) -> bool:
        press(found, Keys.ARROW_RIGHT)
        return "step 3" in text(found) and "0.0625" in text(found)

    until(window, is_there)


def test_filters_and_the_histogram(window: Chrome, address: str) -> None:
    window.get(f"{address}/runs/run-1/experiences")
    until(window, lambda found: "12 experiences" in text(found))
    press(window, "/")
    press(window, "legend")
    until(window, lambda found: "6 experiences" in text(found))
    assert "text=legend" in window.current_url
    window.refresh()
    until(window, lambda found: "6 experiences" in text(found))
    bars = window.find_elements(By.CSS_SELECTOR, ".histogram a")
    assert len(bars) == 1 and bars[0].size["height"] > 20
    window.get(f"{address}/runs/run-1/experiences")
    until(window, lambda found: found.find_elements(By.CSS_SELECTOR, ".histogram a"))[1].click()
    until(window, lambda found: "from=1.0" in found.current_url and "6 experiences" in text(found))
    assert "reflection" not in window.find_element(By.CSS_SELECTOR, "tbody").text


def test_runs_are_compared(window: Chrome, address: str) -> None:
    window.get(address)
    press(window, "j", "x", "j", "x", "c")
    until(window, lambda found: "/compare?run=" in found.current_url)
    until(window, lambda found: found.find_elements(By.CSS_SELECTOR, ".reading .name"))
    assert "run-1" in text(window) and "run-2" in text(window) and "None." in text(window)


def test_help_and_theme(window: Chrome, address: str) -> None:
    window.get(address)
    press(window, "?")
    assert window.find_element(By.ID, "help").is_displayed()
    press(window, Keys.ESCAPE)
    until(window, lambda found: not found.find_element(By.ID, "help").is_displayed())
    root = window.find_element(By.TAG_NAME, "html")
    before = root.get_attribute("data-theme")
    press(window, "t")
    assert root.get_attribute("data-theme") != before
    window.refresh()
    assert window.find_element(By.TAG_NAME, "html").get_attribute("data-theme") != before, "it is remembered"


def test_lines_are_smoothed_or_not(window: Chrome, address: str) -> None:
    """The choice is remembered; the numbers are those of the points."""
    open_charts(window, address, "/runs/run-1?metric=entropy")
    canvas = "return document.querySelector('.plot canvas').toDataURL()"
    before, said = window.execute_script(canvas), window.find_element(By.CSS_SELECTOR, ".reading").text
    assert window.find_element(By.ID, "smooth").is_selected()
    press(window, "s")
    until(window, lambda found: found.execute_script(canvas) != before)
    assert window.find_element(By.CSS_SELECTOR, ".reading").text == said
    open_charts(window, address, "/runs/run-2")
    assert not window.find_element(By.ID, "smooth").is_selected()
    press(window, "s")


FITTING = ["/", "/runs/run-1", "/runs/run-1/experiences", "/runs/run-1/experiences/run-1-s0-t0-r1"]
FITTING += ["/runs/run-1/settings", "/runs/run-1/groups/0/0", "/compare?run=run-1&run=run-2", "/services", "/chat"]


@pytest.mark.parametrize("path", FITTING)
@pytest.mark.parametrize("width", [400, 2560])
def test_pages_fit_any_window(window: Chrome, address: str, path: str, width: int) -> None:
    window.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )
    try:
        window.get(address + path)
        wide = window.execute_script("return document.documentElement.scrollWidth")
        assert wide <= width
    finally:
        window.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
