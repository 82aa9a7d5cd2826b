"""Names of samples, targets and speakers: what would make two ids one, or be taken for another, is refused."""

from __future__ import annotations

import pytest

from mulligan.common.tasks import PrioritySlots
from mulligan.trainer.algorithms.rlvr import Settings
from mulligan.trainer.harness import Harness
from mulligan.trainer.member import Member, NoRecorder, Peers
from mulligan.trainer.settings import RolloutSettings
from tests.support.fakes import FakeEnvironment, FakePolicy


@pytest.fixture
async def member() -> Member[Settings]:
    environment, policy = FakeEnvironment({"t0": "go"}), FakePolicy(lambda system, last, sampling: "go")
    made = Harness(environment, policy, await environment.describe("fake"), await policy.info(), "x", 1)
    rollout = RolloutSettings()
    return Member("e", "t0", 0, 0, 1, Settings(), rollout, 0, made, NoRecorder(), (), Peers(), PrioritySlots(1))


@pytest.mark.parametrize("role", ["", "x-2", "a/b c", "1st", "two words", "x.1", "é", "x\n", "x" * 65])
async def test_a_role_that_no_id_can_have_is_refused(member: Member[Settings], role: str) -> None:
    first = await member.attempt("first")
    words = r"role: expected 1 to 64 letters, digits and '_', the first a letter; got "
    with pytest.raises(ValueError, match=words):
        await member.attempt(role)
    with pytest.raises(ValueError, match=words):
        await member.write(role, "well?")
    with pytest.raises(ValueError, match=words):
        await member.reflect(role, first)
    with pytest.raises(ValueError, match=words):
        await member.under(role, first)
    with pytest.raises(ValueError, match=words):
        await member.joined(role, [first], [], trained=[True])
    assert [sample.sample_id for sample in member.samples] == ["e-first"] and not member.targets


async def test_no_two_of_a_member_have_the_same_id(member: Member[Settings]) -> None:
    for role in ("x", "x", "x_2", "X"):
        await member.attempt(role)
    await member.under("y", member.samples[0])
    await member.under("y", member.samples[1])
    ids = [*(one.sample_id for one in member.samples), *(one.target_id for one in member.targets)]
    assert ids == ["e-x", "e-x-2", "e-x_2", "e-X", "e-y", "e-y-2"]


async def test_a_role_is_of_samples_or_of_targets(member: Member[Settings]) -> None:
    first = await member.attempt("first")
    said = r"role: a sample and a target would be '{}', and share an id; expected two roles"
    with pytest.raises(ValueError, match=said.format("first")):
        await member.under("first", first)
    await member.under("again", first)
    with pytest.raises(ValueError, match=said.format("again")):
        await member.write("again", "well?")
    with pytest.raises(ValueError, match=said.format("again")):
        await member.fork("again", first, 0)


async def test_an_unknown_speaker_is_refused_with_the_nearest_one(member: Member[Settings]) -> None:
    with pytest.raises(ValueError, match=r"speaker: expected 'reflector' or 'judge'; got 'juge'; did you mean 'judge'"):
        await member.write("verdict", "well?", speaker="juge")
    assert not member.samples
    assert (await member.write("verdict", "well?", speaker="judge")).role == "verdict"
