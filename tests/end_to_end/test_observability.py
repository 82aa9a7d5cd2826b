"""Four real services train, and tell of it: metrics of the documents and of the dashboard, and one trace per step."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mulligan.common.experience import Experience
from mulligan.testing.loop import Loop, small_run
from mulligan.testing.processes import ServiceProcess, ServiceProcesses
from tests.support.collector import Received, collector
from tests.support.paths import ROOT

SERVICES = ("env", "policy", "memory", "trainer")
TABLE = re.compile(r"^\| `((?:grpc|mulligan)_\w+)` \| (\w+) \| (.*?)\| (\w+) \| (.+) \|$", re.MULTILINE)
RUN = "observed"
STEPS = 3


@dataclass
class Scraped:
    """What a service exports: families by name, and labels and their values by the name of the series."""

    families: dict[str, tuple[str, str]] = field(default_factory=dict)  # type and help
    series: dict[str, dict[str, set[str]]] = field(default_factory=dict)

    def add(self, text: str) -> None:
        for family in text_string_to_metric_families(text):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            self.families[name] = (family.type, family.documentation)
            for sample in family.samples:
                labels = self.series.setdefault(sample.name, {})
                for label, value in sample.labels.items():
                    labels.setdefault(label, set()).add(value)

    def labels(self, family: str) -> set[str] | None:
        """None if it has no series."""
        found = self.series.get(family, self.series.get(f"{family}_count"))
        return None if found is None else set(found)


@dataclass
class Observed:
    loop: Loop
    scraped: dict[str, Scraped]
    spans: list[Received]
    raw: list[bytes]


def scrape(service: ServiceProcess) -> str:
    [address] = [line["address"] for line in service.log_lines if line["event"] == "metrics"]
    with urlopen(f"http://{address}/metrics", timeout=30) as response:
        return str(response.read().decode())


async def scrape_while_it_runs(loop: Loop, scraped: dict[str, Scraped]) -> None:
    while True:
        scraped["trainer"].add(await asyncio.to_thread(scrape, loop.trainer))
        await asyncio.sleep(0.05)


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcesses]:
    """Not forked: each has imported its own metrics alone."""
    running = ServiceProcesses(tmp_path_factory.mktemp("services"))
    yield running
    running.end()


@pytest.fixture(scope="module")
def observed(processes: ServiceProcesses, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    scraped = {name: Scraped() for name in SERVICES}

    async def train(loop: Loop) -> None:
        scraping = asyncio.create_task(scrape_while_it_runs(loop, scraped))
        try:
            await loop.train(RUN, small_run(steps=STEPS))
        finally:
            scraping.cancel()
            with suppress(asyncio.CancelledError):
                await scraping

    with collector() as collected:
        settings: dict[str, Any] = {"metrics_port": 0, "otlp_endpoint": f"http://{collected.address}"}
        folder = tmp_path_factory.mktemp("observed")
        loop = Loop.start(processes, folder, env=settings, policy=settings, memory=settings, trainer=settings)
        asyncio.run(train(loop))
        for process in processes.started:
            scraped[process.name].add(scrape(process))
        for process in processes.started:
            assert process.stop() == 0  # sends its last spans
        yield Observed(loop, scraped, list(collected.spans), list(collected.raw))


def documented() -> dict[str, tuple[str, set[str], str, str]]:
    """Type, labels, service and text by name."""
    rows = TABLE.findall((ROOT / "docs" / "observability.md").read_text())
    return {
        name: (kind, set(re.findall(r"`(\w+)`", labels)), service, text) for name, kind, labels, service, text in rows
    }


def test_the_table_is_what_the_services_export(observed: Observed) -> None:
    expected = {
        (service, name): (kind, labels, text)
        for name, (kind, labels, whose, text) in documented().items()
        for service in (SERVICES if whose == "all" else (whose,))
    }
    found = {
        (service, name): (kind, scraped.labels(name), text)
        for service, scraped in observed.scraped.items()
        for name, (kind, text) in scraped.families.items()
        if name.startswith(("grpc_", "mulligan_"))
    }
    assert {key: found.get(key) for key in expected} == expected
    assert found.keys() == expected.keys()


def test_names_have_base_units(observed: Observed) -> None:
    for scraped in observed.scraped.values():
        for name, (kind, text) in scraped.families.items():
            assert text, f"{name} has no help"
            assert (kind == "counter") == name.endswith("_total"), name
            assert not re.search(r"milli|micro|_ms|minutes|hours|percent|_kb|_mb", name)


SELECTOR = re.compile(r"\b((?:grpc_server|mulligan|process|python)_\w+)(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"([^"]*)"')
OF_PROMETHEUS = {"job", "instance"}


def flaws(expression: str, legend: str, all_scraped: Sequence[Scraped]) -> list[str]:
    """What of a query no service exports."""
    found = []
    labels: set[str] = set()
    for name, matchers in SELECTOR.findall(expression):
        series = [scraped.series[name] for scraped in all_scraped if name in scraped.series]
        if not series:
            found.append(f"no series {name}")
        for each in series:
            labels |= each.keys()
        for label, value in MATCHER.findall(matchers):
            if not any(value in each.get(label, ()) for each in series):
                found.append(f"{name} has no {label}={value}")
    if not SELECTOR.search(expression):
        found.append("no metric")
    grouped = [name for group in re.findall(r"\bby \(([^)]*)\)", expression) for name in re.findall(r"\w+", group)]
    shown = re.findall(r"\{\{(\w+)\}\}", legend)
    found += [f"no label {name}" for name in (*grouped, *shown) if name not in labels | OF_PROMETHEUS]
    if expression.count("(") != expression.count(")"):
        found.append("parentheses")
    kept = set(grouped) if re.search(r"\bby \(", expression) else labels | OF_PROMETHEUS
    if re.match(r"(sum|max|min|avg)\(", expression):
        kept = set()
    return found + [f"{name} is shown and not kept" for name in shown if name not in kept]


def queries() -> list[tuple[str, str, str]]:
    """Panel, expression, legend."""
    dashboard = json.loads((ROOT / "docker" / "grafana" / "mulligan.json").read_text())
    return [
        (panel["title"], target["expr"], target["legendFormat"])
        for panel in dashboard["panels"]
        for target in panel.get("targets", ())
    ]


def test_the_dashboard_shows_what_is_exported(observed: Observed) -> None:
    found = list(observed.scraped.values())
    assert len(queries()) > 40
    assert [(title, flaw) for title, query, legend in queries() for flaw in flaws(query, legend, found)] == []


def test_the_dashboard_shows_all_metrics() -> None:
    shown = " ".join(query for _, query, _ in queries())
    assert [name for name in documented() if not re.search(rf"\b{name}(_bucket|_count|_sum)?\b", shown)] == []


@pytest.mark.parametrize(
    ("query", "legend"),
    [
        ("rate(mulligan_requests_total[1m])", ""),
        ("sum by (run_id) (mulligan_trainer_run_step)", ""),
        ("mulligan_policy_version", "{{environment}}"),
        ("sum(mulligan_policy_version)", "{{policy}}"),
        ('mulligan_policy_state{state="SERVING"}', ""),
        ("sum(mulligan_policy_version", ""),
        ("up", ""),
    ],
)
def test_a_bad_query_is_noticed(observed: Observed, query: str, legend: str) -> None:
    assert flaws(query, legend, list(observed.scraped.values()))


def traces(observed: Observed) -> dict[int, list[Received]]:
    """The spans of each step's trace."""
    roots = {span.trace_id: span.attributes["mulligan.step"] for span in observed.spans if span.name == "run.step"}
    found: dict[int, list[Received]] = {step: [] for step in roots.values()}
    for span in observed.spans:
        if span.trace_id in roots:
            found[roots[span.trace_id]].append(span)
    return found


def path_of(span: Received, spans: Sequence[Received]) -> list[str]:
    """Names from the root to the span, with the service where that changes."""
    by_id = {one.span_id: one for one in spans}
    found = [span]
    while found[0].parent_id:
        found.insert(0, by_id[found[0].parent_id])
    return [f"{one.service.removeprefix('mulligan-')} {one.name.rpartition('.')[2]}" for one in found]


def test_one_trace_holds_a_step_through_all_four_services(observed: Observed) -> None:
    found = traces(observed)
    assert sorted(found) == list(range(STEPS))
    for step, spans in found.items():
        assert {span.service for span in spans} == {f"mulligan-{name}" for name in SERVICES}
        (root,) = [span for span in spans if not span.parent_id]
        assert (root.name, root.attributes) == ("run.step", {"mulligan.run_id": RUN, "mulligan.step": step})
        paths = [path_of(span, spans) for span in spans]
        many = ["policy PolicyService/GenerateMany", "policy generate", "policy generate"]
        assert ["trainer step", "trainer PolicyService/GenerateMany", *many] in paths
        updated = ["trainer PolicyAdminService/UpdateWeights", "policy PolicyAdminService/UpdateWeights"]
        assert ["trainer step", "trainer publish", *updated] in paths
        learned = ["trainer LearnerService/ForwardBackward", "trainer LearnerService/ForwardBackward"]
        assert ["trainer step", "trainer learn", *learned] in paths
        started = ["trainer EnvService/StartEpisodes", "env EnvService/StartEpisodes"]
        assert ["trainer step", *started] in paths
        assert ["trainer step", "trainer experience", "trainer attempt", "trainer start"] in paths
        queried = ["trainer MemoryService/QueryReflections", "memory MemoryService/QueryReflections"]
        assert ["trainer step", *queried] in paths
    alone = ["trainer PolicyService/Generate", "policy PolicyService/Generate", "policy generate"]
    own = ["trainer step", "trainer experience", "trainer attempt", "trainer generate"]
    assert any([*own, *alone] == path_of(span, spans) for spans in found.values() for span in spans)


def test_calls_for_several_are_linked_with_each(observed: Observed) -> None:
    by_id = {span.span_id: span for span in observed.spans}
    for name, kind in (
        ("EnvService/StartEpisodes", "episode.start"),
        ("EnvService/StepEpisodes", "episode.step"),
        ("PolicyService/GenerateMany", "generate"),
    ):
        calls = [span for span in observed.spans if span.name.endswith(name) and span.kind == 3 and span.links]
        assert calls
        for call in calls:
            linked = [by_id[identity] for identity in call.links]
            assert len(linked) == call.attributes["mulligan.batch_size"] > 1
            assert {span.name for span in linked} == {kind}
            assert {span.trace_id for span in linked} == {call.trace_id}


def test_the_ids_are_those_of_the_journal(observed: Observed) -> None:
    chains = observed.loop.experiences(RUN)
    named: dict[str, set[str]] = {}
    for spans in traces(observed).values():
        for span in spans:
            for name in ("experience_id", "episode_id", "request_id"):
                if found := span.attributes.get(f"mulligan.{name}"):
                    named.setdefault(name, set()).add(found)
    assert {chain.experience_id for chain in chains} == named["experience_id"]
    assert {sample.episode_id for chain in chains for sample in chain.samples if sample.is_episode} <= named[
        "episode_id"
    ]
    assert named["request_id"]


def texts_of(chains: Sequence[Experience]) -> set[str]:
    found = {sample.text for chain in chains for sample in chain.samples}
    found |= {turn.observation for chain in chains for sample in chain.samples for turn in sample.turns}
    found |= {sample.system for chain in chains for sample in chain.samples}
    return {text for text in found if len(text) > 10}


def test_no_text_is_in_a_span(observed: Observed) -> None:
    """Nor an attribute that is longer than an id."""
    sent = b"".join(observed.raw)
    texts = texts_of(observed.loop.experiences(RUN))
    assert texts and not [text for text in texts if text.encode() in sent]
    for span in observed.spans:
        assert all(len(str(value)) <= 128 for value in span.attributes.values()), span
    assert not [span for span in observed.spans if span.is_error and span.name == "run.step"]


def test_log_lines_name_their_trace(observed: Observed) -> None:
    known = {span.trace_id for span in observed.spans}
    for process in (observed.loop.env, observed.loop.policy, observed.loop.memory):
        lines = [line for line in process.log_lines if line["event"] == "request"]
        assert lines and {line["trace_id"] for line in lines} <= known


def test_no_span_was_lost(observed: Observed) -> None:
    for name in SERVICES:
        assert [span for span in observed.spans if span.service == f"mulligan-{name}"]
    known = {span.span_id for span in observed.spans}
    assert not [span for span in observed.spans if span.parent_id and span.parent_id not in known]
