"""The judge finds a bug of each kind in services that train, and nothing where there is none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from mulligan.testing.judge.access import NO_RUN, OTHER_RUN
from mulligan.testing.judge.intruders import LEARNER, MEMORY
from mulligan.testing.judge.verdict import judge
from tests.support import further_bugs, planted_bugs
from tests.support.judged import World, patched, short_run, world
from tests.support.planted_histories import HISTORIES, Recorded

# A bug of each kind that the judge judges; `python -m proof --only faults-judge-planted` has all.
FOUND_BY = {
    "repeated_step_played_again": "episodes",
    "write_lost": "memory",
    "version_of_the_past": "versions",
    "failure_is_reward_zero": "rewards",
    "optimizer_step_counted_twice": "learner",
    "role_not_checked": "access",
    "answer_of_another_episode": "episodes",
    "reward_given_to_each_repetition": "episodes",
    "text_cut": "memory",
    "lost_episode_counts_as_cut": "rewards",
    "snapshot_open_to_all": "access",
    "credential_of_any_run_counts": "access",
    "learner_without_credential": "access",
    "table_of_roles_is_too_kind": "access",
    "rewards_stored_wrongly": "memory",
    "labels_lost": "memory",
    "lesson_with_another_reward": "rewards",
    "same_reward_for_every_use": "rewards",
    "evaluation_invented": "evaluations",
    "evaluation_of_fewer_attempts": "evaluations",
    "entries_read_twice": "memory",
    "entry_hidden_from_queries": "memory",
    "gradient_added_twice": "learner",
}


# They show when entries are read, which the first step has none of.
_READING = ("same_reward_for_every_use", "entries_read_twice", "entry_hidden_from_queries")
_SHORT = ("write_lost", "credential_of_any_run_counts", "gradient_added_twice")


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A run without a bug, which kept every promise."""

    async def run() -> World:
        async with world(tmp_path_factory.mktemp("honest") / "world") as judged:
            assert await judged.run(short_run(), lose_episodes=1) == []
        return judged

    return asyncio.run(run())


def test_a_run_without_a_bug_keeps_every_promise(honest: World) -> None:
    assert honest.final is not None
    samples = [one for experience in honest.final.experiences for one in experience.samples]
    assert sum(one.restarts for one in samples) == 1, "a lost episode was played again"
    names = {call.name for call in honest.calls}
    assert {"StartEpisodes", "StepEpisodes", "UpdateWeights", "OptimStep", "SaveCheckpoint"} <= names
    assert names & {"AddReflection", "AddReflections"}
    assert sum(network.happened["lost_answers"] for network in honest.networks) > 10
    refused = [call for call in honest.calls if call.credential and call.code]
    assert {call.code for call in refused} >= {"UNAUTHENTICATED", "PERMISSION_DENIED"}
    outside = {(call.credential, call.method.split("/")[1]) for call in refused if call.reason == "RUN_CREDENTIAL"}
    assert outside == {(without, of) for without in (NO_RUN, OTHER_RUN) for of in (MEMORY, LEARNER)}


def test_the_judge_has_much_to_look_at(honest: World) -> None:
    """The rules for what is read and measured are not kept by having nothing to judge."""
    final = honest.final
    assert final is not None
    assert len(final.evaluations) == 2 and all(one.attempts for one in final.evaluations)
    assert any(one.memory_use_id and one.memory_entry_ids for one in final.experiences)
    assert {entry.provenance.success for entry in final.entries} == {True}
    calls = [call for call in honest.calls if call.whole and not call.credential]
    assert len({call.digest for call in calls if call.name == "ForwardBackward"}) < len(calls) - 1, "some are repeated"


@pytest.mark.parametrize("plant", HISTORIES, ids=lambda plant: plant.__name__)
def test_a_bug_in_a_history_is_found(honest: World, plant: Callable[[Recorded], Recorded]) -> None:
    """As if a service of that run had had the bug."""
    assert honest.final is not None
    recorded = plant(Recorded(honest.calls, honest.final))
    found = judge(recorded.calls, recorded.final, honest.environments)
    assert found and {violation.rule for violation in found} == HISTORIES[plant], "\n".join(map(str, found))


@pytest.mark.parametrize(
    ("bug", "rule"),
    [pytest.param(*pair, marks=[] if pair[0] in _SHORT else pytest.mark.long) for pair in FOUND_BY.items()],
)
async def test_a_bug_is_found(tmp_path: Path, bug: str, rule: str) -> None:
    with patched() as patch:
        (planted_bugs.BUGS | further_bugs.BUGS)[bug](patch)
        async with world(tmp_path) as judged:
            found = await judged.run(short_run(steps=2 if bug in _READING else 1), lose_episodes=1)
    assert rule in {violation.rule for violation in found}, "\n".join(map(str, found))
