"""The judge finds a bug of each kind in services that train, and nothing where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from mulligan.testing.judge.access import NO_RUN, OTHER_RUN
from mulligan.testing.judge.intruders import LEARNER, MEMORY
from tests.support import further_bugs, planted_bugs
from tests.support.judged import patched, short_run, world

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
}


async def test_a_run_without_a_bug_keeps_every_promise(tmp_path: Path) -> None:
    async with world(tmp_path) as judged:
        assert await judged.run(short_run(), lose_episodes=1) == []
    assert judged.final is not None
    samples = [one for experience in judged.final.experiences for one in experience.samples]
    assert sum(one.restarts for one in samples) == 1, "a lost episode was played again"
    names = {call.name for call in judged.calls}
    assert {"StartEpisodes", "StepEpisodes", "UpdateWeights", "OptimStep", "SaveCheckpoint"} <= names
    assert names & {"AddReflection", "AddReflections"}
    assert sum(network.happened["lost_answers"] for network in judged.networks) > 10
    refused = [call for call in judged.calls if call.credential and call.code]
    assert {call.code for call in refused} >= {"UNAUTHENTICATED", "PERMISSION_DENIED"}
    outside = {(call.credential, call.method.split("/")[1]) for call in refused if call.reason == "RUN_CREDENTIAL"}
    assert outside == {(without, of) for without in (NO_RUN, OTHER_RUN) for of in (MEMORY, LEARNER)}


_SHORT = ("write_lost", "role_not_checked", "lost_episode_counts_as_cut", "credential_of_any_run_counts")


@pytest.mark.parametrize(
    ("bug", "rule"),
    [pytest.param(*pair, marks=[] if pair[0] in _SHORT else pytest.mark.long) for pair in FOUND_BY.items()],
)
async def test_a_bug_is_found(tmp_path: Path, bug: str, rule: str) -> None:
    with patched() as patch:
        (planted_bugs.BUGS | further_bugs.BUGS)[bug](patch)
        async with world(tmp_path) as judged:
            found = await judged.run(short_run(steps=1), lose_episodes=1)
    assert rule in {violation.rule for violation in found}, "\n".join(map(str, found))
