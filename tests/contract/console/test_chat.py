"""A chat with a policy that serves, in the browser and by forms that are wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from http.client import HTTPConnection
from urllib.parse import urlencode, urlsplit

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

from mulligan.common.text import safe
from mulligan.testing.processes import ServiceProcesses
from tests.support.console import browser, console, until, with_key

KEY = "a-key-of-the-console-in-a-file"


@pytest.fixture(scope="module")
def address(shared_services: ServiceProcesses, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("chat")
    env = shared_services.start("env")
    policy = shared_services.start("policy", weights_folder=folder / "weights", threads=1)
    (folder / "key").write_text(KEY)
    (folder / "key").chmod(0o600)
    options = [f"--env={env.address}", f"--policy-address={policy.address}", f"--key-file={folder / 'key'}"]
    (folder / "runs").mkdir()
    with console(folder / "runs", folder / "cache", *options, "--memory=127.0.0.1:1") as found:
        yield found


def test_a_policy_answers_under_the_prompt_of_an_environment(address: str) -> None:
    with browser() as chrome:
        chrome.get(f"{address}/chat")
        assert "needs the key of the console" in chrome.page_source
        chrome.get_log("browser")  # type: ignore[no-untyped-call]  # has the refusal
        chrome.get(f"{address}/chat?key={KEY}")
        Select(chrome.find_element(By.NAME, "environment")).select_by_visible_text("frozenlake-3x3")
        chrome.find_element(By.XPATH, "//button[text()='Begin anew']").click()
        until(chrome, lambda found: found.find_element(By.NAME, "system").get_attribute("value"))
        for number, text in enumerate(("<b>Hello</b>\nyou", "Again"), 1):
            chrome.find_element(By.NAME, "text").send_keys(text)
            chrome.find_element(By.XPATH, "//button[text()='Send']").click()
            until(chrome, lambda found: len(found.find_elements(By.CSS_SELECTOR, ".assistant .facts")) == number)  # noqa: B023
            assert not chrome.find_elements(By.CSS_SELECTOR, ".error")
        said = [one.text for one in chrome.find_elements(By.CSS_SELECTOR, ".said-by.user pre")]
        assert said == ["<b>Hello</b>\nyou", "Again"]
        notes = [one.text for one in chrome.find_elements(By.CSS_SELECTOR, ".said-by.assistant .facts")]
        assert len(notes) == 2 and all(note.endswith("version 0") and " tokens" in note for note in notes)
        assert chrome.get_log("browser") == []  # type: ignore[no-untyped-call]


def post(address: str, path: str, changes: Mapping[str, str]) -> tuple[int, str]:
    fields = {"policy": "", "text": "Hello", "history": "[]", "temperature": "1", "max_tokens": "4"} | dict(changes)
    connection = HTTPConnection(urlsplit(address).netloc, timeout=60)
    headers = {**with_key(address, KEY), "Origin": address, "Content-Type": "application/x-www-form-urlencoded"}
    connection.request("POST", path, urlencode(fields), headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def streamed(address: str) -> tuple[list[dict[str, str]], dict[str, str]]:
    """An answer of random tokens in two parts or more. Now and then all of them are halves of characters, or few."""
    for _ in range(20):
        status, text = post(address, "/chat/stream", {"text": "one", "max_tokens": "32", "temperature": "50"})
        *parts, end = [json.loads(line) for line in text.splitlines()]
        assert status == 200 and all(part.keys() == {"text"} for part in parts)
        if len(parts) > 1:
            return parts, end
    raise AssertionError("20 answers of up to 32 tokens came in one part each")


def test_an_answer_comes_in_parts(address: str) -> None:
    parts, end = streamed(address)
    history = json.loads(end["history"])
    assert [said["role"] for said in history] == ["user", "assistant"] and history[0]["text"] == "one"
    assert history[1]["note"] == end["note"] and "version 0" in end["note"]
    assert "".join(part["text"] for part in parts) == safe(history[1]["text"]), "control characters are written out"
    status, text = post(address, "/chat/stream", {"policy": "nobody"})
    assert status == 200 and "nobody" in json.loads(text)["error"]
    assert post(address, "/chat/stream", {"text": ""})[0] == 400


def test_a_wrong_value_is_told_in_the_browser(address: str) -> None:
    """What the policy service refuses stands above the form, which keeps the message."""
    with browser() as chrome:
        chrome.get(f"{address}/chat?key={KEY}")
        chrome.execute_script("document.querySelector('[name=policy][type=hidden]').value = 'nobody'")
        chrome.find_element(By.NAME, "text").send_keys("Hello")
        chrome.find_element(By.XPATH, "//button[text()='Send']").click()
        until(chrome, lambda found: any("nobody" in one.text for one in found.find_elements(By.CSS_SELECTOR, ".error")))
        assert chrome.find_element(By.NAME, "text").get_attribute("value") == "Hello"
        assert not chrome.find_elements(By.CSS_SELECTOR, ".said-by")


@pytest.mark.parametrize(
    ("changes", "status", "problem"),
    [
        ({"text": ""}, 400, "text: expected a message"),
        ({"history": "[{"}, 400, "history: expected messages as JSON"),
        ({"history": json.dumps([{"role": "king", "text": ""}])}, 400, "Invalid enum value"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"policy": "nobody"}, 200, "nobody"),
        ({"max_tokens": "0"}, 200, "max_tokens"),
        ({"text": "x" * 2**22}, 413, "longer than"),
    ],
)
def test_wrong_forms_are_named(address: str, changes: dict[str, str], status: int, problem: str) -> None:
    found, text = post(address, "/chat", changes)
    assert found == status and problem in text and 'role="alert"' in text
