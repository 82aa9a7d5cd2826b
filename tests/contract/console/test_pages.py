"""The console's pages over HTTP: what they show, refuse and follow."""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from mulligan.common.channel import Endpoint
from mulligan.common.reflections import Labels, Provenance
from mulligan.memory.client import MemoryClient
from mulligan.testing.processes import ServiceProcesses
from mulligan.testing.recorded_runs import write_run
from mulligan.trainer.events import EventLog, StepEvent
from mulligan.trainer.folder import RunFolder
from tests.support.console import console, with_key

HOSTILE = "<script>alert(1)</script>\x1b[31m\u202e'\"&{{ 7*7 }}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    write_run(root, "run-1")
    write_run(root / "deep" / "runs", "run-2", steps=2, says=HOSTILE)
    damaged = write_run(root, "damaged", steps=1)
    (damaged.path / "run.json").write_text("{")
    return root


@pytest.fixture(scope="module")
def memory(shared_services: ServiceProcesses, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a memory service."""
    return shared_services.start("memory", database=tmp_path_factory.mktemp("memory") / "memory.db").address


@pytest.fixture(scope="module")
def address(runs: Path, memory: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    away = [f"--{name}=127.0.0.1:1" for name in ("env", "policy-address", "trainer")]
    with console(runs, tmp_path_factory.mktemp("cache"), f"--memory={memory}", *away) as found:
        yield found


def get(address: str, path: str, **headers: str) -> tuple[int, str]:
    try:
        with urlopen(Request(address + path, headers={**with_key(address), **headers}), timeout=30) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


def page(address: str, path: str) -> str:
    status, text = get(address, path)
    assert status == 200, text
    return text


class _Elements(HTMLParser):
    """The start tags of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_runs_of_all_folders_below_are_listed(address: str) -> None:
    text = page(address, "/")
    assert all(f'href="/runs/{run}"' in text for run in ("run-1", "run-2", "damaged"))
    assert text.count("state completed") == 2 and text.count("state damaged") == 1
    assert "0.8" in text, "success on the test tasks"
    assert "run.json is damaged" in page(address, "/runs/damaged")


def test_series_and_what_is_new(address: str, runs: Path) -> None:
    query = "run=run-1&metric=success_first&metric=entropy&metric=nothing"
    found = json.loads(page(address, f"/series?{query}"))["run-1"]
    assert found["metrics"] == {
        "success_first": [[0, 1, 2], [1 / 3, 2 / 3, 1.0]],
        "entropy": [[0, 1, 2], [1, 0.5, 1 / 3]],
    }
    assert json.loads(page(address, f"/series?{query}&after={found['after']}"))["run-1"]["metrics"] == {}
    host = address.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=30)
    connection.request("GET", f"/live?{query}&after={found['after']}", headers=with_key(address))
    answer = connection.getresponse()
    EventLog(RunFolder(runs / "run-1").events_file).add(StepEvent(3, {"entropy": 0.125}))
    data = next(line for line in iter(answer.readline, b"") if line.startswith(b"data:"))
    assert json.loads(data[5:])["run-1"]["metrics"] == {"entropy": [[3], [0.125]]}
    connection.close()


@pytest.mark.parametrize("name", ["step", "slot", "after", "from", "to"])
@pytest.mark.parametrize("value", ["9" * 30, "-" + "9" * 30, "nan", "1e999"])
def test_numbers_beyond_all_bounds_are_answered(address: str, name: str, value: str) -> None:
    page(address, f"/runs/run-1/experiences?{name}={value}")


def test_data_is_never_markup(address: str) -> None:
    """What a model wrote is text, its control characters are shown, and pages run the console's own files alone."""
    name = "run-2-s0-t0-r1"
    for path in ("/runs/run-2/experiences?text=alert", f"/runs/run-2/experiences/{name}", "/runs/run-2/groups/0/0"):
        text = page(address, path)
        found = _Elements(text)
        scripts = [attributes for tag, attributes in found.tags if tag == "script"]
        assert scripts and all((one["src"] or "").startswith("/static/") for one in scripts)
        assert not any(name.startswith("on") or name == "style" for _, one in found.tags for name in one)
        assert "\x1b" not in text and "\u202e" not in text
    for path in (f"/runs/run-2/experiences/{name}", "/runs/run-2/groups/0/0"):
        assert "<script>alert(1)</script>\\x1b[31m\\u202e'\"&{{ 7*7 }}" in _Elements(page(address, path)).text
    query = "/runs/run-2/experiences?text=%22%3E%3Cscript%3E&step=%3Cb%3E&from=x&role=%3Ci%3E"
    assert "<script>" not in page(address, query).replace('<script src="/static/', "").replace("</script>", "")


async def test_the_memory_and_services_that_are_away(address: str, memory: str) -> None:
    client = MemoryClient(Endpoint(memory))
    origin = Provenance("run-1", "run-1-s0-t0-r1", "lake", "train/00000", 3, 0.0, 1.0, True)
    added = await client.add("one", "run-1", HOSTILE, origin, labels=Labels(key="a key"))
    await client.close()

    def look() -> None:
        text = page(address, "/memory?scope=run-1&text=ALERT")
        assert f'href="/memory/{added}"' in text and "0 → 1" in text
        found = _Elements(page(address, f"/memory/{added}"))
        assert (
            "<script>alert(1)</script>\\x1b[31m" in found.text and "a key" in found.text and "None yet." in found.text
        )
        assert "The memory is empty" not in text and "No entry fulfils" in page(address, "/memory?text=nowhere")
        assert get(address, "/memory/nobody")[0] == 404
        services = page(address, "/services")
        assert services.count("does not answer") == 3 and services.count(">serves<") == 1
        assert "127.0.0.1:1" in page(address, "/policies"), "why there are none"

    await asyncio.to_thread(look)


def test_an_experience_shows_what_the_model_saw_and_learned(address: str) -> None:
    text = page(address, "/runs/run-1/experiences/run-1-s0-t0-r1")
    assert "fell into hole" in text and text.count('class="board"') == 4
    assert "trained as first (policy_gradient, weight 0.5, advantage 0.25)" in text
    assert "id 5 · log-probability -0.1000 · version 3 · advantage 0.25 · trained" in text
    assert 'rel="next"' in text and 'rel="prev"' in text and ">play<" in text, "the system prompt"


@pytest.mark.parametrize(
    "path",
    [
        "/runs/nobody",
        "/runs/run-1/experiences/run-1-s9-t0-r0",
        "/runs/run-1/experiences/..%2F..%2Frun.json",
        "/runs/run-1/experiences/x-s-1-t0-r0",
        "/runs/run-1/groups/0/99",
        "/runs/..%2f..%2fetc/experiences",
        "/static/..%2fapp.py",
        "/nowhere",
    ],
)
def test_what_is_not_there_is_not_found(address: str, path: str) -> None:
    status, text = get(address, path)
    assert status == 404 and "Traceback" not in text


def test_other_sites_are_refused(address: str) -> None:
    host = address.removeprefix("http://")
    assert get(address, "/", Host="evil.example")[0] == 403
    assert get(address, "/", Origin="http://evil.example")[0] == 403
    assert get(address, "/", Origin="null")[0] == 403
    assert get(address, "/", Origin=f"http://{host}")[0] == 200
    with urlopen(Request(address, headers=with_key(address)), timeout=30) as answer:
        policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "unsafe" not in policy
