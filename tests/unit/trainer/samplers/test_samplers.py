"""What holds for every sampler; one of somebody else's; choices that a run does not take; settings on the wire."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mulligan.common.errors import DomainError, Reason
from mulligan.trainer.journal import StepJournal
from mulligan.trainer.rounds import Chooser, SamplerFailed
from mulligan.trainer.samplers import SAMPLERS, Choice, Group, History, Round, SamplerSettings, Task
from mulligan.trainer.settings import RunSettings
from mulligan.trainer.wire import settings_from_proto, settings_to_proto, validated
from tests.support.sampling import numbered, request, sampled
from tests.unit.trainer.test_run import STEPS, World

untyped: Any = Choice
REQUIRED: dict[str, dict[str, Any]] = {"mixture": {"shares": {"lake": 1.0}}}
LAST_FIRST = '''
"""The last task of the list over and over, with the mean reward so far as the number of turns."""

from asyncio import CancelledError

from mulligan.trainer import Choice, SamplerSettings, Task, UnfitSetting


class Settings(SamplerSettings):
    name: str = "last_first"
    fault: str = ""
    turns: int = 1

    @property
    def environments(self):
        return {"quiz": "sampler.fault"} if self.fault == "quiz" else {}


def choose(request, history, settings):
    if settings.fault == "raise" and request.step == 1:
        raise KeyError("nothing here")
    if settings.fault == "cancel":
        raise CancelledError
    if settings.fault == "exit":
        raise SystemExit(3)
    if settings.fault == "unfit":
        raise UnfitSetting("fault", "it is one")
    task = Task(request.environment, request.tasks[request.environment][-1].task_id)
    if settings.fault == "unknown":
        task = Task(request.environment, "t33")
    return Choice([task] * (request.count - (settings.fault == "few")), settings.turns)
'''


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A sampler of somebody else's package; its name."""
    folder = tmp_path / "packages" / "acme"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "last_first.py").write_text(LAST_FIRST)
    monkeypatch.syspath_prepend(str(folder.parent))
    yield "acme.last_first"
    for name in [name for name in sys.modules if name.partition(".")[0] == "acme"]:
        del sys.modules[name]


@pytest.mark.parametrize("name", SAMPLERS.built_in)
@given(
    count=st.integers(1, 12),
    rounds=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2)), max_size=12),
    tasks=st.integers(1, 9),
    rewards=st.lists(st.none() | st.floats(-2, 2), max_size=3),
    overlapping=st.integers(0, 2),
)
def test_every_sampler_chooses_so_many_tasks_of_the_run_and_always_the_same(
    name: str,
    count: int,
    rounds: list[tuple[int, int]],
    tasks: int,
    rewards: list[float | None],
    overlapping: int,
) -> None:
    """Whatever was earned, and whatever rounds there were; also where there are no rewards yet."""
    sampler: ModuleType = SAMPLERS.find(name)
    settings: SamplerSettings = sampler.Settings(**REQUIRED.get(name, {}))
    listed = numbered(tasks)
    known = {Task("lake", info.task_id) for info in listed}
    history = History()
    for step, number in sorted(set(rounds)):
        gone = tuple(known)[:1] * count if number else ()
        asked = request(listed, step, round=number, replaced=gone, tasks_per_step=count, overlapping=overlapping)
        before = deepcopy(history.rounds)
        choice = sampler.choose(asked, history, settings)
        assert len(choice.tasks) == count and set(choice.tasks) <= known
        assert choice == sampler.choose(asked, history, settings) and history.rounds == before
        history.add(sampled(choice, step, lambda task: rewards, number))


@pytest.mark.parametrize("name", SAMPLERS.built_in)
@given(
    cuts=st.lists(st.integers(0, 4), min_size=1, max_size=8),
    rewards=st.lists(st.none() | st.floats(-2, 2), min_size=1, max_size=9),
)
def test_a_resumed_run_chooses_as_if_nothing_had_been(name: str, cuts: list[int], rewards: list[float | None]) -> None:
    """At each round, a history that is read from the journaled rounds says what the one that grew with them says.
    `cuts`: how many of the kept groups each round of a step replaces."""
    sampler: ModuleType = SAMPLERS.find(name)
    settings: SamplerSettings = sampler.Settings(**REQUIRED.get(name, {}))
    listed = [replace(info, difficulty=float(place % 3)) for place, info in enumerate(numbered(7))]
    earned = cycle(rewards)
    grown = History()
    for step in range(3):
        for number, count in enumerate([0, *cuts]):
            gone = tuple(group.task for group in grown.rounds[-1].groups[:count]) if number else ()
            if number and not gone:
                break
            asked = request(listed, step, round=number, replaced=gone)
            choice = sampler.choose(asked, grown, settings)
            resumed = History()
            for one in msgspec.json.decode(msgspec.json.encode(grown.rounds), type=list[Round]):
                resumed.add(one)
            assert sampler.choose(asked, resumed, settings) == choice
            grown.add(sampled(choice, step, lambda task: [next(earned), next(earned)], number))


@pytest.mark.parametrize("name", SAMPLERS.built_in)
def test_a_choice_does_not_read_all_that_was_sampled(name: str) -> None:
    """Late in a long run, in which many groups were replaced. What is read of a group is counted."""
    read = 0

    class Counted(tuple[Group, ...]):
        def __iter__(self) -> Iterator[Group]:
            nonlocal read
            read += len(self)
            return super().__iter__()

    sampler: ModuleType = SAMPLERS.find(name)
    settings: SamplerSettings = sampler.Settings(**REQUIRED.get(name, {}))
    listed = numbered(20)
    history = History()
    for step in range(200):
        for number in range(2):
            groups = Counted(Group("lake", info.task_id, (0.0, 1.0)) for info in listed)
            history.add(Round(step, number, groups))
    for one in history.rounds:
        assert one.mean_reward == 0.5  # which a round keeps
    read = 0
    sampler.choose(request(listed, 200), history, settings)
    assert read <= 40


def world(tmp_path: Path, name: str, **settings: Any) -> World:
    made = World(tmp_path, sampler={"name": name, **settings})
    made.environment.turns = 3
    return made


async def test_a_sampler_from_outside_the_tree(outside: str, tmp_path: Path) -> None:
    made = world(tmp_path, outside, turns=2)
    settings = made.folder.settings()
    assert settings_from_proto(settings_to_proto(settings)) == settings, "its own settings cross the wire"
    run = made.run()
    await run.train()
    for step in range(STEPS):
        journal = StepJournal(made.folder.journal, step)
        journal.close()
        assert journal.started is not None and journal.started.task_ids == ["t3", "t3"]
        assert journal.started.horizon == 2 and journal.started.environments == []
    chains, *_ = made.result()
    assert {turns for chain in chains for turns in chain[-1]} == {2}, "of three that the environment would allow"
    assert {step.metrics["horizon"] for step in run.events.steps().values()} == {2.0}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("unknown", "sampler 'acme.last_first' chose task 't33' of environment 'fake', which is no training task of "),
        ("unknown", "; did you mean 't3'?"),
        ("few", "chose 1 tasks, and the step needs 2"),
        ("raise", "sampler 'acme.last_first' raised\nTraceback"),
        ("raise", "KeyError: 'nothing here'"),
        ("cancel", "asyncio.exceptions.CancelledError"),
        ("exit", "SystemExit: 3"),
    ],
)
async def test_a_faulty_sampler_fails_its_run_and_says_what_it_did(
    outside: str, tmp_path: Path, fault: str, words: str
) -> None:
    made = world(tmp_path, outside, fault=fault)
    with pytest.raises(SamplerFailed) as caught:
        await made.run().train()
    assert words in str(caught.value)
    assert len(made.learner.steps) == (fault == "raise"), "what can be known before the first step is told before it"


@pytest.mark.parametrize(
    "chosen",
    [
        lambda count, task: untyped([tuple(task)] * count, np.int64(2)),
        lambda count, task: untyped((tuple(map(np.str_, task)) for _ in range(count)), np.array(2)),
        lambda count, task: untyped(np.array([task] * count), 2),
    ],
)
async def test_a_choice_in_types_of_another_library_is_journaled(
    outside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: Any
) -> None:
    made = world(tmp_path, outside)
    choose = lambda request, *_: chosen(request.count, Task("fake", "t3"))  # noqa: E731
    monkeypatch.setattr(sys.modules[outside], "choose", choose)
    await made.run().train()
    journal = StepJournal(made.folder.journal, 0)
    journal.close()
    assert journal.started is not None
    assert (journal.started.task_ids, journal.started.horizon) == (["t3", "t3"], 2)


async def test_a_horizon_is_at_least_one_turn(outside: str, tmp_path: Path) -> None:
    with pytest.raises(SamplerFailed, match="a horizon of 0 turns; expected at least 1, or None"):
        await world(tmp_path, outside, turns=0).run().train()


async def test_a_setting_that_does_not_fit_is_refused_before_anything_is_paid_for(outside: str, tmp_path: Path) -> None:
    made = world(tmp_path, outside, fault="unfit")
    with pytest.raises(DomainError) as caught:
        await made.run().train()
    assert caught.value.reason is Reason.INVALID_SETTING and caught.value.metadata["field"] == "sampler.fault"
    assert caught.value.message == "sampler.fault: it is one"
    assert not made.policy.calls and not made.learner.checkpoints


@pytest.mark.parametrize(
    ("table", "field", "words"),
    [
        ({"name": "unifrom"}, "sampler.name", "there is no sampler 'unifrom'; did you mean 'uniform'?"),
        ({"name": "json"}, "sampler.name", "'json' is no sampler: it has no `Settings`"),
        ({"name": "adarft", "rset": 1}, "sampler.rset", "no such setting of sampler 'adarft'; did you mean 'rest'?"),
        ({"name": "mixture"}, "sampler.shares", "Field required"),
        ({"name": "mixture", "shares": {"lake": -1}}, "sampler.shares.lake", "greater than 0"),
    ],
)
def test_settings_that_fit_no_sampler_are_named(table: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(DomainError) as caught:
        validated(RunSettings, {"environment": "lake", "sampler": table})
    assert caught.value.reason is Reason.INVALID_SETTING and caught.value.metadata["field"] == field
    assert words in caught.value.message


def test_a_group_of_one_cannot_be_replaced() -> None:
    with pytest.raises(DomainError, match="replace_rounds: expected 0, as a group of one"):
        validated(RunSettings, {"environment": "lake", "rollout": {"rollouts_per_task": 1, "replace_rounds": 1}})


def test_the_chooser_names_environments_only_where_there_are_several() -> None:
    settings = validated(RunSettings, {"environment": "lake", "rollout": {"tasks_per_step": 2}})
    chooser = Chooser(settings, {"lake": numbered(2)}, History())
    task_ids, environments = chooser.named(chooser.choose(0))
    assert sorted(task_ids) == ["t0000", "t0001"] and environments == []
