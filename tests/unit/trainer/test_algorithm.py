"""Algorithm 2 of arXiv 2602.13949 on paper-sized numbers. Every expectation was computed by hand."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from math import sqrt
from typing import Any

import pytest

from mulligan.common.experience import SegmentKind
from mulligan.common.inference import SamplingParams
from mulligan.common.types import Outcome
from mulligan.trainer.data import Datum, Distillation, PolicyGradient
from mulligan.trainer.loss_settings import LossSettings
from mulligan.trainer.objectives.negative_aware import NegativeAware
from tests.support.fakes import FakeEnvironment, encode, timeout
from tests.support.loop import Loop, in_turn


def scripted(first: list[str], second: list[str]) -> Any:
    """Reflections stand between the environment's marks."""
    return in_turn(first, second, map("I think <prompt>rule {}</prompt>".format, count()))


async def test_one_step_of_the_paper() -> None:
    """Four chains: r1 = 1, 0, 0, 0 and r2 = –, 1, 0, 1."""
    loop = Loop(scripted(["go", "a", "b", "c"], ["go", "d", "go"]))
    solved, *failed = await loop.step()

    assert (
        solved.sample("reflection") is None and solved.sample("second") is None and solved.target("distilled") is None
    )
    assert [chain["reflection"].text for chain in failed] == ["rule 0", "rule 1", "rule 2"]
    assert [chain["second"].reward for chain in failed] == [1, 0, 1]
    assert [chain["reflection"].reward for chain in failed] == [1, 0, 1]
    # deviations divide by n − 1. first: mean 1/4, std 1/2; second and reflection: mean 2/3, std 1/√3
    high = 0.75 / 0.5
    low = -0.25 / 0.5
    assert loop.advantages("first") == pytest.approx([high, low, low, low], abs=1e-4)
    up = (1 / 3) * sqrt(3)
    down = (-2 / 3) * sqrt(3)
    assert loop.advantages("second") == pytest.approx([up, down, up], abs=1e-4)
    assert loop.advantages("reflection") == pytest.approx([up, down, up], abs=1e-4)
    # each branch is normalised by its own count
    assert {datum.weight for datum in loop.learner.branch("first")} == {1 / 4}
    assert {datum.weight for datum in loop.learner.branch("reflection")} == {1 / 3}
    assert {datum.weight for datum in loop.learner.branch("distilled")} == {1 / 2}
    assert [entry.text for entry in loop.memory.entries] == ["rule 0", "rule 2"]
    assert loop.metrics["success_first"] == 1 / 4 and loop.metrics["success_second"] == 2 / 3
    assert loop.metrics["rollouts"] == 4 + 3 + 3


async def test_branches_may_be_normalised_by_the_chains_instead() -> None:
    say = scripted(["go", "a", "b", "c"], ["go", "d", "go"])
    loop = Loop(say, algorithm={"branch_normalization": "chains", "distillation_weight": 2})
    await loop.step()
    weights = {datum.branch: datum.weight for step in loop.learner.steps for datum in step}
    assert weights == {"first": 1 / 4, "reflection": 1 / 4, "second": 1 / 4, "distilled": 2 / 4}


async def test_the_distilled_sample_is_the_second_attempt_without_the_reflection() -> None:
    environment = FakeEnvironment({"t0": "go"}, turns=3)
    loop = Loop(scripted(["a"] * 3, ["b", "c", "go"]), environment=environment, rollout={"rollouts_per_task": 1})
    (chain,) = await loop.step()
    (distilled,), (second,), (first,) = (
        chain.targets[0].sequences,
        chain["second"].sequences,
        chain["first"].sequences,
    )

    assert distilled.segments[0] == first.segments[0].__class__(SegmentKind.PROMPT, first.segments[0].token_ids)
    assert "rule" in bytes(second.segments[0].token_ids).decode()
    assert "rule" not in bytes(distilled.token_ids).decode()
    assert [(s.kind, s.token_ids) for s in distilled.segments[1:]] == [
        (s.kind, s.token_ids) for s in second.segments[1:]
    ]
    assert distilled.log_probs == [] and all(not s.policy_versions for s in distilled.segments)
    (datum,) = loop.learner.branch("distilled")
    assert datum.objective == Distillation(1.0), "no log-probability can reach the loss of this branch"
    trained = [token for token, loss in zip(datum.token_ids, datum.loss_mask, strict=True) if loss]
    assert trained == [*encode("b]"), *encode("c]"), *encode("go]")]


async def test_what_is_trained_on_is_what_was_sampled() -> None:
    environment = FakeEnvironment({"t0": "go", "t1": "go"}, turns=8)
    loop = Loop(lambda system, last: "a" if system == "solve" else "go", environment=environment)
    for chain in await loop.step(tasks=("t0", "t1")):
        (sequence,) = chain["first"].sequences
        assert sum(segment.kind is SegmentKind.SAMPLED for segment in sequence.segments) == 8
        prompts = [call for call, _ in loop.policy.calls if hasattr(call, "token_ids")]
        assert all(prompt.turn_closed for prompt in prompts)
        assert bytes(sequence.token_ids).decode() == (
            f"[system:solve][user:board {chain.task_id}][assistant:a]" + "[user:after a][assistant:a]" * 7
        )


@pytest.mark.parametrize("parts", [10, 49])
async def test_a_success_in_small_parts_is_a_success(parts: int) -> None:
    """Added one by one, ten times 0.1 stays below 1; 49 times 1/49 does even when it is added exactly."""
    loop = Loop(
        lambda system, last: "no" if system == "solve" else "go",
        environment=FakeEnvironment({"t0": "go"}, turns=parts, in_parts=True),
    )
    experiences = await loop.step()
    assert [chain["second"].reward for chain in experiences] == pytest.approx([1.0] * 4)
    assert loop.metrics["success_second"] == 1
    assert len(loop.memory.entries) == 4
    solved = Loop(lambda system, last: "go", environment=FakeEnvironment({"t0": "go"}, turns=parts, in_parts=True))
    assert all(chain.sample("reflection") is None for chain in await solved.step())


async def test_a_solved_first_attempt_makes_no_reflection() -> None:
    loop = Loop(lambda system, last: "go")
    experiences = await loop.step()
    assert all(chain.sample("reflection") is None and chain.sample("second") is None for chain in experiences)
    assert len(loop.policy.calls) == 4 and loop.memory.entries == []


@pytest.mark.parametrize(("first", "size"), [(["a"], 1), (["a", "b", "c"], 3)])
async def test_a_group_of_one_or_of_equal_rewards_has_no_advantage(first: list[str], size: int) -> None:
    loop = Loop(scripted(first, ["x"] * size), rollout={"rollouts_per_task": size}, loss={"kl_coefficient": 0.1})
    await loop.step()
    assert loop.advantages("first") == [0.0] * size
    assert loop.advantages("second") == [0.0] * size and loop.advantages("reflection") == [0.0] * size
    assert loop.learner.branch("distilled") == []


async def test_without_kl_a_sample_without_advantage_is_not_sent() -> None:
    loop = Loop(scripted(["a"] * 4, ["x"] * 4))
    await loop.step()
    assert loop.learner.steps == [] and loop.learner.state == 0


async def test_an_infrastructure_failure_is_no_sample() -> None:
    """The first chain's episodes all fail; it is started over twice under new ids, then left out and counted."""

    def fail(episode_id: str) -> None:
        if "-r0-first" in episode_id:
            raise timeout()

    environment = FakeEnvironment({"t0": "go"}, fail=fail)
    loop = Loop(lambda system, last: "go" if system != "solve" else "a", environment=environment)
    lost, *rest = await loop.step()
    assert lost["first"].outcome is Outcome.TIMEOUT and lost["first"].reward is None
    assert lost.sample("reflection") is None and lost["first"].restarts == 2
    assert [name for name in environment.started if "-r0-" in name] == [f"run-s0-t0-r0-first-x-{n}" for n in range(3)]
    assert {datum.datum_id.split("-")[3] for step in loop.learner.steps for datum in step} == {"r1", "r2", "r3"}
    assert len(rest) == 3 and loop.metrics["excluded"] == 1 and loop.metrics["success_first"] == 0


async def test_an_empty_reflection_is_not_remembered() -> None:
    loop = Loop(lambda system, last: {"reflect": "", "solve": "a"}.get(system, "go"))
    experiences = await loop.step()
    assert all(chain["second"].reward == 1 and chain["reflection"].text == "" for chain in experiences)
    assert loop.memory.entries == []


async def test_memory_is_read_as_it_was_at_the_start_of_the_step() -> None:
    loop = Loop(scripted(["a"] * 8, ["go"] * 8))
    await loop.step(0)
    assert all("memory=nothing yet" in call[1].content for call, _ in loop.policy.calls if call_is(call, "reflect"))
    second = await loop.step(1)
    shown = [call[1].content for call, _ in loop.policy.calls if call_is(call, "reflect")][4:]
    assert all("memory=rule 3" in text for text in shown), "the latest success of the step before"
    assert {chain.memory_entry_ids for chain in second} == {("run-s0-t0-r3-reflection",)}


def call_is(prompt: Any, system: str) -> bool:
    return isinstance(prompt, tuple) and prompt[0].content == system


async def test_the_reflector_sees_trace_feedback_and_reward_and_the_solver_does_not() -> None:
    loop = Loop(scripted(["a"], ["go"]), rollout={"rollouts_per_task": 1})
    await loop.step()
    first, reflect, second = (call for call, _ in loop.policy.calls)
    assert reflect[1].content == "trace=board t0>A;after a feedback=wrong reward=0 memory=nothing yet"
    assert first[1] == second[1] and "wrong" not in first[0].content + first[1].content
    assert second[0].content == "rule 0\nanswer with a word"


@pytest.mark.parametrize(
    ("second_attempt", "system"),
    [("raw_retry", "last time: board t0>A;after a wrong"), ("try_again", "that was wrong, try again")],
)
async def test_ablations_without_reflection(second_attempt: str, system: str) -> None:
    loop = Loop(lambda given, last: "a" if given == "solve" else "go", algorithm={"second_attempt": second_attempt})
    experiences = await loop.step()
    assert all(chain.sample("reflection") is None and chain.target("distilled") is not None for chain in experiences)
    assert loop.policy.calls[1][0][0].content == system and loop.memory.entries == []


async def test_ablations_of_memory_distillation_and_rlvr() -> None:
    without_memory = Loop(scripted(["a"] * 8, ["go"] * 8), algorithm={"memory_entries": 0})
    await without_memory.step(0)
    await without_memory.step(1)
    shown = [call[1].content for call, _ in without_memory.policy.calls if call_is(call, "reflect")]
    assert all("memory=nothing yet" in text for text in shown)
    without_distillation = Loop(scripted(["a"] * 4, ["go", "x", "x", "x"]), algorithm={"distillation_weight": 0})
    await without_distillation.step()
    assert without_distillation.learner.branch("distilled") == [] and without_distillation.learner.branch("second")
    rlvr = Loop(scripted(["go", "a", "a", "a"], []), algorithm={"second_attempt": "none"})
    assert all(chain.sample("second") is None for chain in await rlvr.step())
    assert {datum.branch for step in rlvr.learner.steps for datum in step} == {"first"}


async def test_several_optimizer_steps_share_the_old_policy() -> None:
    loop = Loop(scripted(["go", "a", "b", "c"], ["go", "d", "go"]), algorithm={"optimizer_steps": 2})
    await loop.step()
    assert len(loop.learner.steps) == 2 and loop.learner.state == 2 and len(loop.learner.forwards) == 1
    for step in loop.learner.steps:
        assert {"first", "reflection", "distilled"} <= {datum.branch for datum in step}
    gradients = [d.objective for step in loop.learner.steps for d in step if isinstance(d.objective, PolicyGradient)]
    assert len(gradients) == 4 + (3 + 1) + (3 + 1), "of three data, one stands in both steps with half its weight"
    assert all(set(objective.old_log_probs) == {-0.25} for objective in gradients)
    assert all(len(objective.old_log_probs) == len(objective.rollout_log_probs) for objective in gradients)
    total = sum(datum.weight for datum in loop.learner.branch("first"))
    assert total == pytest.approx(2.0), "each of the two steps estimates the whole branch's mean"


@pytest.mark.parametrize("optimizer_steps", [1, 2])
async def test_without_recomputing_the_policy_that_sampled_is_the_old_one(optimizer_steps: int) -> None:
    asked = {"optimizer_steps": optimizer_steps, "recompute_log_probs": False}
    loop = Loop(scripted(["go", "a", "b", "c"], ["go", "d", "go"]), algorithm=asked)
    report = loop.learner.forward_backward

    async def reporting(data: Sequence[Datum], loss: LossSettings) -> dict[str, float]:
        return await report(data, loss) | {"mismatch_kl": 0.0, "first/mismatch_kl": 0.0, "first/kl": 0.5}

    loop.learner.forward_backward = reporting  # type: ignore[method-assign]
    await loop.step()
    assert "first/kl" in loop.metrics and not any("mismatch" in name for name in loop.metrics), "nothing was compared"
    gradients = [d.objective for step in loop.learner.steps for d in step if isinstance(d.objective, PolicyGradient)]
    assert gradients and loop.learner.forwards == []
    assert all(one.old_log_probs == one.rollout_log_probs != () for one in gradients)


async def test_without_recomputing_an_objective_without_log_probs_of_sampling_asks_the_learner() -> None:
    loop = Loop(
        scripted(["go", "a", "b", "c"], []),
        algorithm={"name": "nft", "optimizer_steps": 2, "recompute_log_probs": False},
    )
    await loop.step()
    objectives = [datum.objective for step in loop.learner.steps for datum in step]
    assert len(loop.learner.forwards) == 1
    assert all(isinstance(one, NegativeAware) and set(one.old_log_probs) == {-0.25} for one in objectives)


async def test_a_template_that_rewrites_history_gives_one_sequence_per_turn() -> None:
    environment = FakeEnvironment({"t0": "go"}, turns=3)
    loop = Loop(
        scripted(["a"] * 3, ["b", "c", "go"]), environment=environment, rewrites=True, rollout={"rollouts_per_task": 1}
    )
    (chain,) = await loop.step()
    assert len(chain["first"].sequences) == len(chain.targets[0].sequences) == 3
    for distilled, second in zip(chain.targets[0].sequences, chain["second"].sequences, strict=True):
        assert [segment.kind for segment in distilled.segments] == [SegmentKind.PROMPT, SegmentKind.SAMPLED]
        assert distilled.segments[1].token_ids == second.segments[1].token_ids
        assert bytes(distilled.segments[0].token_ids).decode().startswith("[system:solve][user:board t0]")
    assert bytes(chain.targets[0].sequences[1].token_ids).decode().endswith("[assistant:b][user:after b][assistant:c]")


async def test_seeds_tell_every_turn_of_every_chain_apart() -> None:
    environment = FakeEnvironment({"t0": "go", "t1": "go"}, turns=2)
    loop = Loop(lambda system, last: "a", environment=environment)
    await loop.step(tasks=("t0", "t1"))
    seeds = [sampling.seed for _, sampling in loop.policy.calls]
    again = Loop(lambda system, last: "a", environment=FakeEnvironment({"t0": "go", "t1": "go"}, turns=2))
    await again.step(tasks=("t0", "t1"))
    assert len(set(seeds)) == len(seeds) == 8 * 5
    assert [sampling.seed for _, sampling in again.policy.calls] == seeds
    assert all(isinstance(sampling, SamplingParams) for _, sampling in loop.policy.calls)
