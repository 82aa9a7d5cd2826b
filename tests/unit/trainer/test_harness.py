"""Several tries in one conversation, and episodes that go on from the state of another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from mulligan.common.experience import Experience, ForkPoint, Sample, SegmentKind
from mulligan.common.experience_wire import experience_from_proto, experience_to_proto
from mulligan.common.inference import Completion, SamplingParams
from mulligan.common.tasks import PrioritySlots
from mulligan.common.types import Outcome
from mulligan.trainer.algorithms.rlvr import Settings
from mulligan.trainer.harness import Harness, NotRepeatable, Plan
from mulligan.trainer.member import Member, NoRecorder, Peers
from mulligan.trainer.metrics import rollout_metrics
from mulligan.trainer.settings import RolloutSettings
from mulligan.trainer.trainable import NotDistilled
from tests.support.fakes import LOG_PROB, FakeEnvironment, FakePolicy, timeout

SAMPLING = SamplingParams()


async def harness(environment: FakeEnvironment, policy: FakePolicy) -> Harness:
    return Harness(environment, policy, await environment.describe("fake"), await policy.info(), "x", 1)


async def member_of(made: Harness) -> Member[Settings]:
    """The only member of a group."""
    settings, rollout = Settings(), RolloutSettings()
    return Member("e", "t0", 0, 0, 1, settings, rollout, 0, made, NoRecorder(), (), Peers(), PrioritySlots(1))


def planned(system: str = "solve") -> Sample:
    return Sample.planned("a", "first", system)


def text_of(sample: Sample) -> str:
    return "".join(bytes(sequence.token_ids).decode() for sequence in sample.sequences)


@pytest.mark.parametrize("rewrites", [False, True])
@pytest.mark.parametrize(("right_at", "tries", "turns"), [(1, 3, 1), (2, 3, 2), (3, 3, 2), (9, 3, 1)])
async def test_what_did_not_solve_the_task_is_tried_again_in_the_same_conversation(
    right_at: int, tries: int, turns: int, rewrites: bool
) -> None:
    environment = FakeEnvironment({"t0": "go"}, turns=turns)
    said = iter(range(100))

    def say(system: str, last: str, sampling: SamplingParams) -> str:
        return "go" if next(said) // turns + 1 >= right_at else "no"

    policy = FakePolicy(say, rewrites_history=rewrites)
    plan = Plan("t0", SAMPLING, 0, tries, "{feedback}, again: {observation}")
    sample = await (await harness(environment, policy)).attempt(planned(), plan)
    played = min(right_at, tries)
    assert sample.outcome is Outcome.COMPLETED and sample.reward == float(right_at <= tries)
    assert sample.try_turns == (turns,) * played and len(sample.turns) == played * turns
    assert sample.try_rewards == [float(number + 1 == right_at) for number in range(played)]
    assert environment.started == [f"a-x-0{'' if number == 0 else f'-t{number}'}" for number in range(played)]
    shown = [turn.observation for turn in sample.turns[::turns]]
    assert shown == ["board t0"] + ["wrong, again: board t0"] * (played - 1)
    assert len(sample.sequences) == (len(sample.turns) if rewrites else 1)
    assert text_of(sample).count("wrong, again: board t0") >= played - 1
    experience = Experience("a", "run", 0, "fake", "t0", 0, (sample,))
    metrics = rollout_metrics([experience], 1.0, "fake", lambda group: True)
    assert metrics["rollouts"] == metrics["tries_first"] == played, "each try costs an episode"
    seeds = [sampling.seed for _, sampling in policy.calls]
    assert len(set(seeds)) == len(seeds) == len(sample.turns)


async def test_a_failure_in_a_later_try_starts_the_whole_sample_over() -> None:
    environment = FakeEnvironment({"t0": "go"})
    failing = iter([False, True, False, False])

    def fail(episode_id: str) -> None:
        if next(failing, False):
            raise timeout()

    environment.fail = fail
    policy = FakePolicy(lambda system, last, sampling: "no")
    sample = await (await harness(environment, policy)).attempt(planned(), Plan("t0", SAMPLING, 0, tries=2))
    assert (sample.outcome, sample.restarts, sample.try_turns) == (Outcome.COMPLETED, 1, (1, 1))
    assert environment.started == ["a-x-0", "a-x-0-t1", "a-x-1", "a-x-1-t1"]


async def test_a_conversation_without_room_for_another_try_ends() -> None:
    environment = FakeEnvironment({"t0": "go"})
    policy = FakePolicy(lambda system, last, sampling: "no")
    policy.context_length = 60
    sample = await (await harness(environment, policy)).attempt(planned(), Plan("t0", SAMPLING, 0, tries=9))
    assert sample.outcome is Outcome.TRUNCATED and sample.reward == 0.0
    assert sample.try_turns[-1] == 0 and 0 < len(sample.turns) < 9


@pytest.mark.parametrize("horizon", [1, 2, 3, 9])
async def test_a_horizon_limits_the_turns(horizon: int) -> None:
    environment = FakeEnvironment({"t0": "go"}, turns=3)
    policy = FakePolicy(lambda system, last, sampling: "go")
    sample = await (await harness(environment, policy)).attempt(planned(), Plan("t0", SAMPLING, 0, horizon=horizon))
    assert len(sample.turns) == min(horizon, 3)
    assert sample.outcome is (Outcome.COMPLETED if horizon >= 3 else Outcome.TRUNCATED)


@pytest.mark.parametrize("rewrites", [False, True])
@pytest.mark.parametrize("turn", [0, 1, 2])
async def test_a_fork_goes_on_from_the_state_and_the_conversation_of_its_source(turn: int, rewrites: bool) -> None:
    environment = FakeEnvironment({"t0": "go"}, turns=3)
    answers = iter(["a", "b", "c", "x", "y", "go"])
    policy = FakePolicy(lambda system, last, sampling: next(answers), rewrites_history=rewrites)
    made = await harness(environment, policy)
    source = await made.attempt(planned(), Plan("t0", SAMPLING, 0))
    blank = Sample.planned("b", "fork", source.system, source.sample_id)
    fork = await made.attempt(blank, Plan("t0", SAMPLING, 1, fork=(source, turn)))
    assert fork.forked_from == ForkPoint(source.episode_id, turn) and fork.parent_id == source.sample_id
    assert len(fork.turns) == 3 - turn and [one.text for one in fork.turns] == ["x", "y", "go"][: 3 - turn]
    assert fork.reward == float(turn == 0), "the last of three answers pays"
    assert fork.turns[0].observation == source.turns[turn].observation
    assert environment.started[-2:] == ["b-x-0-trunk", "b-x-0"]
    before = text_of(source)[: text_of(source).index(f"{'abc'[turn]}]")] if not rewrites else ""
    if rewrites:
        assert len(fork.sequences) == 3 - turn
    else:
        (sequence,) = fork.sequences
        assert bytes(sequence.token_ids).decode().startswith(before + "x]")
        assert [one.kind for one in sequence.segments[:2]] == [SegmentKind.PROMPT, SegmentKind.SAMPLED]
        assert sequence.log_probs == [LOG_PROB] * sequence.sampled_count, "the source's tokens carry no loss"


@pytest.mark.parametrize("rewrites", [False, True])
@pytest.mark.parametrize("turn", [1, 2, 3])
async def test_a_fork_of_a_fork_goes_on_from_the_whole_path(turn: int, rewrites: bool) -> None:
    environment = FakeEnvironment({"t0": "go"}, turns=4)
    answers = iter("abcd" + "xyz" + "uvw")
    policy = FakePolicy(lambda system, last, sampling: next(answers), rewrites_history=rewrites)
    made = await harness(environment, policy)
    alone = await member_of(made)
    first = await alone.attempt("first")
    fork = await alone.fork("fork", first, 1)
    again = await alone.fork("fork", fork, turn)
    path = "axyz"[:turn] + "uvw"[: 4 - turn]
    assert "".join(one.text for one in alone.turns_of(again)) == path and len(again.turns) == 4 - turn
    assert again.forked_from == ForkPoint(fork.episode_id, turn) and again.parent_id == fork.sample_id
    assert (fork.sample_id, again.sample_id) == ("e-fork", "e-fork-2")
    if not rewrites:
        (sequence,) = again.sequences
        assert "".join(text.rpartition(":")[2] for text in text_of(again).split("]")[2::2]) == path
        assert sequence.sampled_count == 2 * (4 - turn), "only what was sampled last carries loss"
    with pytest.raises(ValueError, match="turn: expected 1 to 4, those of e-fork; got 0"):
        await alone.fork("fork", fork, 0)


async def test_an_episode_that_does_not_repeat_itself_cannot_be_forked() -> None:
    environment = FakeEnvironment({"t0": "go", "t1": "go"}, turns=2)
    policy = FakePolicy(lambda system, last, sampling: "a")
    made = await harness(environment, policy)
    source = await made.attempt(planned(), Plan("t0", SAMPLING, 0))
    plan: Any = Plan("t1", SAMPLING, 1, fork=(source, 1))
    with pytest.raises(NotRepeatable, match="showed 'board t0' to a and now 'board t1'"):
        await made.attempt(Sample.planned("b", "fork", "solve"), plan)


@pytest.mark.parametrize("trained", [(False, True), (True, True)])
async def test_samples_are_joined_to_one_conversation(trained: tuple[bool, bool]) -> None:
    environment = FakeEnvironment({"t0": "go"}, turns=2)
    answers = iter(["a", "b", "c", "go"])
    policy = FakePolicy(lambda system, last, sampling: next(answers))
    made = await harness(environment, policy)
    first = await made.attempt(planned(), Plan("t0", SAMPLING, 0))
    second = await made.attempt(Sample.planned("b", "second", "be wise"), Plan("t0", SAMPLING, 1))
    sequence = await made.joined([first, second], ["wrong. board t0"], trained)
    assert bytes(sequence.token_ids).decode() == (
        "[system:solve][user:board t0][assistant:a][user:after a][assistant:b]"
        "[user:wrong. board t0][assistant:c][user:after c][assistant:go]"
    )
    carried = [token for token, loss in zip(sequence.token_ids, sequence.loss_mask, strict=True) if loss]
    assert bytes(carried).decode() == ("a]b]" if trained[0] else "") + "c]go]"
    assert sequence.log_probs == []


async def test_what_cannot_be_joined_is_told() -> None:
    environment = FakeEnvironment({"t0": "go"}, turns=2)
    policy = FakePolicy(lambda system, last, sampling: "a", rewrites_history=True)
    made = await harness(environment, policy)
    first = await made.attempt(planned(), Plan("t0", SAMPLING, 0))
    with pytest.raises(NotDistilled, match="rewritten_history"):
        await made.joined([first, first], ["again"], (False, True))


async def test_tokens_of_another_policy_are_not_joined() -> None:
    environment = FakeEnvironment({"t0": "go"})
    made = await harness(environment, FakePolicy(lambda system, last, sampling: "a"))
    first = await made.attempt(planned(), Plan("t0", SAMPLING, 0))
    with pytest.raises(NotDistilled, match="other_policy"):
        await made.joined([first, replace(first, policy="wise")], ["again"], (False, True))


class Thinking(FakePolicy):
    """Its template opens a thought, which only the marked text shows."""

    async def generate(self, *arguments: Any) -> Completion:
        completion = await super().generate(*arguments)
        return replace(completion, raw_text=f"<think>{completion.text}")


async def test_a_fork_replays_what_the_environment_was_given() -> None:
    environment = FakeEnvironment({"t0": "go"}, turns=3)
    said = iter(["hm</think>a", "b", "c", "d"])
    made = await harness(environment, Thinking(lambda system, last, sampling: next(said)))
    source = await made.attempt(planned(), Plan("t0", SAMPLING, 0))
    assert [(turn.text, turn.sent) for turn in source.turns[:2]] == [
        ("hm</think>a", "<think>hm</think>a"),
        ("b", "<think>b"),
    ]
    fork = await made.attempt(Sample.planned("b", "fork", "solve"), Plan("t0", SAMPLING, 1, fork=(source, 2)))
    assert [turn.text for turn in fork.turns] == ["d"] and fork.turns[0].observation == "after <think>b"


async def test_what_is_sent_is_kept_only_where_it_is_not_the_text() -> None:
    environment = FakeEnvironment({"t0": "go"}, turns=2)
    made = await harness(environment, FakePolicy(lambda system, last, sampling: "a"))
    plain = await made.attempt(planned(), Plan("t0", SAMPLING, 0))
    changed = await made.attempt(planned(), Plan("t0", SAMPLING, 0, said=lambda answer: ""))
    assert [turn.sent for turn in plain.turns] == [None] * 2
    assert [turn.sent for turn in changed.turns] == [""] * 2
    for sample in (plain, changed):
        experience = Experience("a", "run", 0, "fake", "t0", 0, (sample,))
        assert experience_from_proto(experience_to_proto(experience)) == experience
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(sample), type=Sample) == sample


async def test_a_turn_that_is_read_otherwise_cannot_be_forked_from_and_its_episode_is_ended() -> None:
    """As in journals from before turns kept what was sent: thoughts are not marked there."""
    environment = FakeEnvironment({"t0": "go"}, turns=2)
    policy = FakePolicy(lambda system, last, sampling: "a")
    made = await harness(environment, policy)
    source = await made.attempt(planned(), Plan("t0", SAMPLING, 0))
    other = replace(source, turns=(replace(source.turns[0], action="B"), *source.turns[1:]))
    with pytest.raises(NotRepeatable, match="read 'B' in an answer of a and now 'A'"):
        await made.attempt(Sample.planned("b", "fork", "solve"), Plan("t0", SAMPLING, 1, fork=(other, 1)))
    assert environment.started[-1] == environment.ended[-1] == "b-x-0-trunk"


async def test_the_episode_of_a_fork_ends_when_replaying_fails() -> None:
    environment = FakeEnvironment({"t0": "go"}, turns=2)
    policy = FakePolicy(lambda system, last, sampling: "a")
    made = await harness(environment, policy)
    source = await made.attempt(planned(), Plan("t0", SAMPLING, 0))

    def fail(episode_id: str) -> None:
        raise timeout()

    environment.fail = fail
    fork = await made.attempt(Sample.planned("b", "fork", "solve"), Plan("t0", SAMPLING, 1, fork=(source, 1)))
    assert fork.outcome is Outcome.TIMEOUT and fork.reward is None
    assert environment.ended[-2:] == ["b-x-0-trunk", "b-x-1-trunk"]
