"""Evaluations: the player, protocols of somebody else's, and where their metrics go."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mulligan.common.errors import DomainError, Reason, fault
from mulligan.common.experience import Sample
from mulligan.common.inference import SamplingParams
from mulligan.common.tasks import PrioritySlots
from mulligan.trainer import protocols
from mulligan.trainer.evaluation import EvaluationFailed, ProtocolFailed, check_attempts, evaluate, measure
from mulligan.trainer.events import EvaluationEvent, EventLog
from mulligan.trainer.folder import RunState
from mulligan.trainer.manager import RunManager
from mulligan.trainer.metrics import EvaluationProgress
from mulligan.trainer.run import ServicePorts
from mulligan.trainer.settings import EvaluationSettings, RolloutSettings, RunSettings
from mulligan.trainer.wire import evaluation_from_proto, evaluation_to_proto, validated
from tests.support.fakes import FakeEnvironment, FakeLearner, FakeMemory, FakePolicy, timeout
from tests.support.measuring import measured, player, seed_of
from tests.support.waiting import until

FIRST_AND_HINTED = '''
"""Attempts with and without a hint in the system prompt."""

import asyncio

from mulligan.common.tasks import gather_or_cancel
from mulligan.trainer.protocols import ProtocolSettings


class Settings(ProtocolSettings):
    name: str = "acme.hinted"
    hint: str


def lacks(environment, tasks, settings):
    if settings.hint == "lacks":
        return len(environment.nothing)
    return "there is a task without a number" if any(not task.task_id[1:].isdigit() for task in tasks) else ""


async def run(player, tasks, settings):
    if settings.hint == "break":
        raise KeyError("nothing here")
    if settings.hint == "cancel":
        raise asyncio.CancelledError
    if settings.hint == "exit":
        raise SystemExit(3)
    if settings.hint == "nan":
        return {"share": float("nan")}
    if settings.hint == "none":
        return None
    plain = await gather_or_cancel(player.attempt(task) for task in tasks)
    hinted = await gather_or_cancel(player.attempt(task, system=settings.hint) for task in tasks)
    text = await player.write(tasks[0], "opinion", "well?", system="judge")
    better = [player.solves(two) - player.solves(one) for one, two in zip(plain, hinted, strict=True)]
    return {"better": sum(better) / len(better), "said": len(text.text)}
'''


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A protocol of somebody else's package; its name."""
    folder = tmp_path / "packages" / "acme"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "hinted.py").write_text(FIRST_AND_HINTED)
    monkeypatch.syspath_prepend(str(folder.parent))
    yield "acme.hinted"
    for name in [name for name in sys.modules if name.partition(".")[0] == "acme"]:
        del sys.modules[name]


def says(system: str, last: str, sampling: SamplingParams) -> str:
    if system == "judge":
        return "good"
    return "go" if system == "hint" or "t0" in last else "no"


def board(count: int = 4, **others: Any) -> FakeEnvironment:
    return FakeEnvironment({f"t{number}": "go" for number in range(count)}, **others)


async def test_a_protocol_from_outside_the_tree(outside: str) -> None:
    policy = FakePolicy(says)
    found = await measured(board(), policy, {"name": outside, "hint": "hint", "label": "with-hint"})
    assert found == EvaluationEvent(0, 0.25, 0.25, 4, 0, {"with-hint/better": 0.75, "with-hint/said": 4.0})
    assert len(policy.calls) == 4 + 4 + 1, "the plain attempts are those of the evaluation"
    with pytest.raises(DomainError, match="cannot be measured in 'fake': there is a task without a number"):
        await measured(FakeEnvironment({"lake": "go"}), policy, {"name": outside, "hint": "hint"})


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        ("break", ["raised", "KeyError: 'nothing here'", "hinted.py"]),
        ("cancel", ["raised", "asyncio.exceptions.CancelledError", "hinted.py"]),
        ("exit", ["raised", "SystemExit: 3", "hinted.py"]),
        ("lacks", ["raised", "has no attribute 'nothing'", "hinted.py"]),
        ("nan", ["returned 'share': nan; expected finite numbers by name"]),
        ("none", ["returned a NoneType"]),
    ],
)
async def test_a_protocol_that_fails_is_named(outside: str, hint: str, words: list[str]) -> None:
    with pytest.raises(ProtocolFailed) as caught:
        await measured(board(), FakePolicy(says), {"name": outside, "hint": hint})
    assert all(word in str(caught.value) for word in ["protocol 'acme.hinted'", *words])


async def test_an_evaluation_repeats_and_its_samples_differ() -> None:
    async def seeds(seed: int) -> list[Any]:
        policy = FakePolicy(says)
        await measured(board(), policy, {"name": "pass_at_k"}, {"name": "misled"}, seed=seed)
        return [(prompt, sampling.seed) for prompt, sampling in policy.calls]

    assert await seeds(0) == await seeds(0)
    assert {seed for _, seed in await seeds(0)}.isdisjoint(seed for _, seed in await seeds(1))
    policy = FakePolicy(says)
    await measured(board(1), policy, samples=3, seed=7)
    assert [sampling.seed for _, sampling in policy.calls] == [seed_of("t0", number, seed=7) for number in range(3)]


async def test_ids_are_all_different() -> None:
    policy = FakePolicy(says)
    environment = board()
    tables = ({"name": "turns", "tries": 2}, {"name": "variants", "operators": ["length", "paraphrase"]})
    await measured(environment, policy, *tables, samples=2)
    assert len(set(environment.started)) == len(environment.started)
    ids = [options.request_id for options in policy.options]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("limit", [1, 3])
async def test_no_more_run_at_a_time_than_the_limit(limit: int) -> None:
    running = set[str]()
    most = 0

    class Slow(FakeEnvironment):
        async def start(self, environment: str, task_id: str, episode_id: str) -> Any:
            nonlocal most
            running.add(episode_id)
            most = max(most, len(running))
            await asyncio.sleep(0)
            running.discard(episode_id)
            return await super().start(environment, task_id, episode_id)

    answers = dict.fromkeys(map(str, range(6)), "go")
    await measured(Slow(answers), FakePolicy(says), {"name": "turns"}, samples=2, concurrency=limit)
    assert most == limit


PROTOCOLS = [
    {"name": "guided", "text": "hint"},
    {"name": "misled"},
    {"name": "pass_at_k", "k": [3]},
    {"name": "refusal", "samples": 3},
    {"name": "steerability"},
    {"name": "turns", "tries": 2},
    {"name": "variants", "operators": ["format"]},
]


@pytest.mark.parametrize("table", [None, *PROTOCOLS], ids=lambda table: table["name"] if table else "own")
async def test_attempts_are_made_as_slots_become_free(table: dict[str, Any] | None) -> None:
    """What waits is not made yet: a caller says how many there are."""
    begun: dict[str, int] = {}  # by protocol, the most that had begun and not ended

    class Slow(FakeEnvironment):
        async def start(self, environment: str, task_id: str, episode_id: str) -> Any:
            await asyncio.sleep(0)
            return await super().start(environment, task_id, episode_id)

    def tell(progress: EvaluationProgress) -> None:
        most = begun.get(progress.protocol, 0)
        begun[progress.protocol] = max(most, progress.asked - progress.ended)

    contexts = ["none", "some"]
    tags = {
        f"t{number}": {"answerable": "false", "question": str(number // 2), "context": contexts[number % 2]}
        for number in range(40)
    }
    tables = [table] if table else []
    places = Slow(dict.fromkeys(tags, "go"))
    await measured(places, FakePolicy(says), *tables, tags=tags, samples=2, concurrency=3, tell=tell)
    assert set(begun) == {"", *(table["name"] for table in tables)}
    assert all(0 < most <= 2 * 3 * 2 for most in begun.values()), "variants has two attempts of a task at once"


async def test_attempts_come_before_rollouts_that_wait_for_the_same_slots() -> None:
    slots = PrioritySlots(2)
    order: list[str] = []

    async def rollout() -> None:
        async with slots.held(0):
            order.append("rollout")
            await asyncio.sleep(0)

    def tell(progress: EvaluationProgress) -> None:
        order.extend(["attempt"] * (progress.ended - order.count("attempt")))

    await slots.acquire()
    await slots.acquire()
    rollouts = [asyncio.create_task(rollout()) for _ in range(5)]
    await asyncio.sleep(0)
    made = await player(board(20), FakePolicy(says), concurrency=2, slots=slots, tell=tell)
    evaluating = asyncio.create_task(evaluate(made))
    for _ in range(5):
        await asyncio.sleep(0)
    slots.release()
    slots.release()
    await evaluating
    await asyncio.gather(*rollouts)
    assert order[:18] == ["attempt"] * 18, "the last ones leave slots that no attempt waits for"


async def test_what_is_kept_of_attempts_is_small() -> None:
    long = "x" * 10_000
    policy = FakePolicy(lambda *_: long)
    for found in await evaluate(await player(board(2), policy)):
        assert not found.sequences and len(repr(found)) < 1_000
    made = await player(board(2), policy, [{"name": "misled"}])
    await evaluate(made)
    attempt = await made.attempt(made.tasks[0])
    assert len(policy.calls) == 4, "a protocol has it with its words"
    assert not attempt.sequences and len(attempt.turns[0].text) >= 1_000


@pytest.mark.parametrize(
    ("tables", "samples", "field", "limit"),
    [
        ([], 26, "samples", 25),
        ([{"name": "misled", "samples": 13}], 1, "protocols[0].samples", 12),
        ([{"name": "guided", "text": "hint", "samples": 13}], 1, "protocols[0].samples", 12),
        ([{"name": "turns", "samples": 13}], 1, "protocols[0].samples", 12),
        ([{"name": "refusal", "samples": 26}], 1, "protocols[0].samples", 25),
        ([{"name": "misled"}, {"name": "pass_at_k", "k": [1, 26]}], 1, "protocols[1].k", 25),
        ([{"name": "pass_at_k", "samples": 26}], 1, "protocols[0].samples", 25),
    ],
)
async def test_an_evaluation_has_only_so_many_attempts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tables: list[dict[str, Any]],
    samples: int,
    field: str,
    limit: int,
) -> None:
    monkeypatch.setattr("mulligan.trainer.evaluation.MOST_ATTEMPTS", 100)
    policy = FakePolicy(says)
    runs = manager(tmp_path, board(), policy)
    settings = validated(EvaluationSettings, {"samples": samples, "protocols": tables})
    with pytest.raises(DomainError, match=re.escape(f"{field}: expected at most {limit}, as 4 test tasks")) as caught:
        await runs.evaluate("fake", settings, RolloutSettings(), 0, 1.0)
    assert caught.value.reason is Reason.INVALID_SETTING and caught.value.metadata["field"] == field
    assert not policy.calls
    await runs.close()


@pytest.mark.parametrize(
    ("table", "times"),
    [
        ({"name": "guided", "text": "hint", "samples": 2}, 4),
        ({"name": "misled", "samples": 2}, 4),
        ({"name": "turns", "samples": 2}, 4),
        ({"name": "variants", "operators": ["length", "format"]}, 3),
        ({"name": "pass_at_k", "k": [2]}, 2),
    ],
)
async def test_the_attempts_that_are_checked_are_those_that_are_played(
    monkeypatch: pytest.MonkeyPatch, table: dict[str, Any], times: int
) -> None:
    environment = board()
    made = await player(environment, FakePolicy(says), [table])
    (settings,) = made.settings.protocols
    monkeypatch.setattr("mulligan.trainer.evaluation.MOST_ATTEMPTS", 4 * times)
    check_attempts([(made.info, made.tasks)], made.settings)
    monkeypatch.setattr("mulligan.trainer.evaluation.MOST_ATTEMPTS", 4 * times - 1)
    with pytest.raises(DomainError, match=r"as 4 test tasks of 'fake' are played"):
        check_attempts([(made.info, made.tasks)], made.settings)
    await protocols.PROTOCOLS.find(settings.name).run(made, made.tasks, settings)
    assert made.progress.ended == 4 * times


async def test_what_is_too_much_at_one_sample_is_a_matter_of_the_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mulligan.trainer.evaluation.MOST_ATTEMPTS", 19)
    made = await player(board(), FakePolicy(says), [{"name": "variants"}])
    with pytest.raises(DomainError) as caught:
        check_attempts([(made.info, made.tasks)], made.settings, "evaluation.")
    assert caught.value.metadata["field"] == "evaluation.tasks"
    assert caught.value.message == (
        "evaluation.tasks: expected at most 3, as 4 test tasks of 'fake' are played, 5 attempts for each sample of "
        "protocols[0] ('variants'), and 19 attempts are the most; got 4"
    )


async def test_of_attempts_that_all_failed_each_kind_of_cause_is_told_once() -> None:
    """Each attempt has an incident of its own."""
    errors = [fault(error("secret")) for error in (*[RuntimeError] * 9, ValueError, *[KeyError] * 9)]
    failed = [replace(Sample.planned("s", "first", ""), error=error) for error in errors]
    made = await player(board(), FakePolicy(says))
    with pytest.raises(EvaluationFailed) as caught:
        await measure(made, 0, failed)
    causes = str(caught.value).removeprefix("no attempt could be finished: ").split("; ")
    assert [cause.partition(",")[0] for cause in causes] == ["KeyError", "RuntimeError", "ValueError"]
    assert set(causes) <= set(errors), "the log has one of the incidents of each kind"


async def test_progress_is_told_of_each_protocol() -> None:
    told: list[tuple[str, int, int, float | None]] = []

    def tell(progress: EvaluationProgress) -> None:
        told.append((progress.protocol, progress.ended, progress.total, progress.success))

    made = await player(board(2), FakePolicy(says), samples=2, tell=tell)
    await evaluate(made)
    assert told[0] == ("", 0, 4, None) and [one[1] for one in told] == [0, 1, 2, 3, 4] and told[-1] == ("", 4, 4, 0.5)
    told.clear()
    await measured(board(2), FakePolicy(says), {"name": "misled"}, tell=tell)
    own = [one for one in told if one[0] == "misled"]
    assert own[0] == ("misled", 0, 0, None) and own[-1] == ("misled", 4, 4, 0.5)
    assert all(ended <= total for _, ended, total, _ in told)


async def test_a_failing_environment_excludes_and_fails_nothing() -> None:
    def fails(episode_id: str) -> None:
        if "-t1-" in episode_id:
            raise timeout()

    made = await player(board(2, fail=fails), FakePolicy(says))
    attempt = await made.attempt(made.tasks[1])
    assert attempt.reward is None and not made.solves(attempt) and made.progress.excluded == 1
    assert await made.observe(made.tasks[0]) == "board t0"


async def test_a_purpose_that_would_give_two_texts_one_id_is_refused() -> None:
    made = await player(board(2), FakePolicy(says))
    ids = [(await made.write(made.tasks[0], "opinion", "well?")).sample_id for _ in range(2)]
    assert len({*ids}) == 2
    with pytest.raises(ValueError, match=r"purpose: expected 1 to 64 letters, .*; got 'opinion-n2'"):
        await made.write(made.tasks[0], "opinion-n2", "well?")


def manager(folder: Path, environment: FakeEnvironment, policy: FakePolicy) -> RunManager:
    async def open_learner(run_id: str, settings: RunSettings) -> FakeLearner:
        return FakeLearner()

    return RunManager(folder, ServicePorts(environment, policy, FakeMemory(), open_learner))


def run_settings(*protocols: Any) -> RunSettings:
    plain = {
        "environment": "fake",
        "steps": 2,
        "algorithm": {"name": "rlvr"},
        "rollout": {"tasks_per_step": 1, "rollouts_per_task": 2},
        "evaluation": {"every": 1, "samples": 1, "protocols": list(protocols)},
    }
    return validated(RunSettings, plain)


async def test_a_run_measures_at_each_evaluation(tmp_path: Path) -> None:
    runs = manager(tmp_path, board(), FakePolicy(says))
    runs.start("r", run_settings({"name": "pass_at_k", "k": [2]}))
    await until(lambda: runs.record("r").state is not RunState.RUNNING)
    assert runs.record("r").error == "" and runs.record("r").state is RunState.COMPLETED
    await runs.close()
    read = EventLog(tmp_path / "r" / "events.jsonl").evaluations()
    assert [event.metrics for event in read.values()] == [{"pass_at_k/pass@2": 0.25}] * 3
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert [one["metrics"] for one in summary["evaluations"]] == [{"pass_at_k/pass@2": 0.25}] * 3


async def test_what_does_not_fit_ends_a_run_before_anything_is_sampled(tmp_path: Path) -> None:
    policy = FakePolicy(says)
    environment = board()
    runs = manager(tmp_path, environment, policy)
    for name, table, words in (
        ("unfit", {"name": "refusal"}, "evaluation.protocols[0].name: 'refusal' cannot be measured in 'fake'"),
        ("nobody", {"name": "variants", "operators": ["length"], "writer": "nobody"}, "there is no policy 'nobody'"),
    ):
        runs.start(name, run_settings(table))
        await until(lambda name=name: runs.record(name).state is not RunState.RUNNING)  # type: ignore[misc]
        assert runs.record(name).state is RunState.FAILED and words in runs.record(name).error
    assert not policy.calls and not policy.updates
    settings = validated(EvaluationSettings, {"protocols": [{"name": "turns"}, {"name": "refusal"}]})
    with pytest.raises(DomainError) as caught:
        await runs.evaluate("fake", settings, RolloutSettings(), 0, 1.0)
    assert caught.value.reason is Reason.INVALID_SETTING and caught.value.metadata == {"field": "protocols[1].name"}
    assert not policy.calls
    await runs.close()


def test_events_of_former_versions_are_read(tmp_path: Path) -> None:
    old = b'{"number":1,"time":"2026-01-02T03:04:05Z","event":{"type":"evaluation","step":0,"success":0.5,'
    old += b'"mean_reward":0.25,"attempts":4,"excluded":1}}\n'
    (tmp_path / "events.jsonl").write_bytes(old)
    log = EventLog(tmp_path / "events.jsonl")
    assert log.evaluations() == {0: EvaluationEvent(0, 0.5, 0.25, 4, 1, {})}
    log.add(EvaluationEvent(5, 0.5, 0.25, 4, 1, {"turns/gain": 0.25}))
    assert EventLog(tmp_path / "events.jsonl").evaluations()[5].metrics == {"turns/gain": 0.25}
    event = log.evaluations()[5]
    assert evaluation_from_proto(evaluation_to_proto(event)) == event
