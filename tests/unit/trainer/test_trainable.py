"""What cannot be trained on is left out and counted, wherever it comes from, and never ends a run."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mulligan.common.errors import DomainError, Reason
from mulligan.common.experience import Sample, Segment, SegmentKind, TokenSequence, Turn
from mulligan.common.inference import Feature, SamplingParams, VersionSpan
from mulligan.common.types import Outcome, Split, TaskInfo
from mulligan.trainer.data import ModelLimits
from mulligan.trainer.evaluation import evaluate
from mulligan.trainer.harness import Harness
from mulligan.trainer.journal import StepJournal, StepStarted, journal_file, read_experiences
from mulligan.trainer.member import NoRecorder
from mulligan.trainer.player import Player
from mulligan.trainer.settings import EvaluationSettings, RolloutSettings, RunSettings
from mulligan.trainer.step import StepRunner
from mulligan.trainer.trainable import prompt_notices
from tests.support.effort import examples
from tests.support.fakes import FakeEnvironment, FakeLearner, FakeMemory, FakePolicy

CONTEXT = 200
VOCABULARY = 2**16


@dataclass
class Loop:
    """One step after another of one run, over fakes."""

    policy: FakePolicy
    settings: RunSettings
    environment: FakeEnvironment
    memory: FakeMemory
    learner: FakeLearner

    @classmethod
    def over(cls, policy: FakePolicy, *, turns: int = 1, tasks: tuple[str, ...] = ("t0",), **changes: Any) -> Loop:
        rollout = {"rollouts_per_task": 2, "concurrency": 1, "max_restarts": 2} | changes.pop("rollout", {})
        plain = {"environment": "fake", "rollout": rollout, "loss": {"kl_coefficient": 0.1}} | changes
        environment = FakeEnvironment(dict.fromkeys(tasks, "go"), turns=turns)
        return cls(policy, RunSettings.model_validate(plain), environment, FakeMemory(), FakeLearner())

    async def harness(self) -> Harness:
        restarts = self.settings.rollout.max_restarts
        info = await self.environment.describe("fake")
        return Harness(self.environment, self.policy, info, await self.policy.info(), "x", restarts)

    async def step(self, recorder: Any = None) -> list[Any]:
        algorithm = StepRunner(
            "run", self.settings, await self.harness(), self.memory, self.learner, recorder or NoRecorder()
        )
        chains = await algorithm.sample(0, list(self.environment.answers), 0)
        self.metrics = algorithm.metrics(chains) | await algorithm.learn(0, chains)
        await algorithm.memorise(chains)
        return chains

    @property
    def dropped(self) -> dict[str, float]:
        return {name: value for name, value in self.metrics.items() if name.startswith("dropped_")}

    def trained(self) -> set[str]:
        return {datum.branch for step in self.learner.steps for datum in step}


def says(first: str, second: str = "go", reflection: str = "<prompt>rules</prompt>") -> FakePolicy:
    said = {"solve": first, "reflect": reflection}
    return FakePolicy(lambda system, last, sampling: said.get(system, second))


# Anything that an older version of the trainer, or a policy in any language, may have left in a journal.

NUMBERS = st.one_of(st.sampled_from([0.0, 1.0, -0.5]), st.floats(allow_nan=True, allow_infinity=True, width=64))
ODD = st.lists(st.integers(-2, 2**40), max_size=2)


def ids(fewest: int, most: int) -> st.SearchStrategy[list[int]]:
    """Token ids of the vocabulary. Their number is drawn, and the first; the others follow: to draw each takes long."""
    drawn = st.tuples(st.integers(0, VOCABULARY - 1), st.integers(fewest, most))
    return drawn.map(lambda run: [(run[0] + index) % VOCABULARY for index in range(run[1])])


TURN = ids(1, CONTEXT // 4).map(tuple)
TOKENS = st.tuples(ODD, ids(0, CONTEXT // 2), ODD).map(lambda parts: [*parts[0], *parts[1], *parts[2]])


@st.composite
def segments(draw: st.DrawFn) -> Segment:
    kind = draw(st.sampled_from(SegmentKind))
    tokens = tuple(draw(TOKENS))
    log_probs = draw(st.one_of(st.just([-0.5] * len(tokens)), st.just([]), st.lists(NUMBERS, max_size=4)))
    return Segment(kind, tokens, tuple(log_probs), (VersionSpan(1, len(tokens)),))


@st.composite
def turn_segments(draw: st.DrawFn, kind: SegmentKind) -> tuple[Segment, Segment]:
    """As every policy should report a turn."""
    tokens = draw(TURN)
    asked = draw(TURN)
    return Segment(kind, asked), Segment(SegmentKind.SAMPLED, tokens, (-0.5,) * len(tokens))


@st.composite
def good_sequences(draw: st.DrawFn) -> tuple[TokenSequence, ...]:
    first = draw(turn_segments(SegmentKind.PROMPT))
    later = draw(st.lists(turn_segments(SegmentKind.ENVIRONMENT), max_size=2))
    return (TokenSequence((*first, *(segment for turn in later for segment in turn))),)


BROKEN = st.lists(st.lists(segments(), max_size=4).map(lambda found: TokenSequence(tuple(found))), max_size=3).map(
    tuple
)
BOTH = st.tuples(good_sequences(), BROKEN).map(lambda both: both[0] + both[1])
SEQUENCES = st.one_of(good_sequences(), BROKEN, BOTH)
TURNS = st.lists(st.builds(Turn, st.sampled_from(["a", "b"]), st.just("t"), st.just("A"), NUMBERS), max_size=3)
ATTEMPTS = st.builds(
    Sample,
    sample_id=st.just(""),
    role=st.just(""),
    episode_id=st.just("e"),
    outcome=st.sampled_from(Outcome),
    reward=st.one_of(st.none(), NUMBERS),
    feedback=st.just(""),
    turns=TURNS.map(tuple),
    final_observation=st.just(""),
    sequences=SEQUENCES,
    temperature=st.one_of(st.just(0.7), NUMBERS),
)
REFLECTIONS = st.builds(
    Sample,
    sample_id=st.just(""),
    role=st.just("reflection"),
    text=st.sampled_from(["", "rules"]),
    sequences=SEQUENCES,
    temperature=st.one_of(st.just(0.5), NUMBERS),
    outcome=st.sampled_from(Outcome),
)
CHAINS = st.lists(st.tuples(ATTEMPTS, REFLECTIONS, ATTEMPTS), min_size=1, max_size=4)
ALGORITHM = st.fixed_dictionaries(
    {
        "branch_normalization": st.sampled_from(["own_count", "chains", "trainable"]),
        "optimizer_steps": st.integers(1, 3),
        "normalize_by_std": st.booleans(),
        "train_cut_reflections": st.booleans(),
        "distillation_loss": st.sampled_from(["raft", "cross_entropy"]),
        "distillation_baseline": st.booleans(),
    }
)


@settings(max_examples=examples(200), suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(chains=CHAINS, algorithm=ALGORITHM, rewrites=st.booleans())
def test_whatever_a_journal_holds_can_be_resumed_and_trained_on(
    tmp_path_factory: pytest.TempPathFactory, chains: list[Any], algorithm: dict[str, Any], rewrites: bool
) -> None:
    folder = tmp_path_factory.mktemp("journal")
    journal = StepJournal(folder, 0)
    journal.start(StepStarted(0, ["t0"], 0, 0))
    for number, (first, reflection, second) in enumerate(chains):
        chain_id = f"run-s0-t0-r{number}"
        journal.add(replace(first, sample_id=f"{chain_id}-first", role="first"))
        journal.add(replace(reflection, sample_id=f"{chain_id}-reflection"))
        journal.add(replace(second, sample_id=f"{chain_id}-second", role="second"))
    journal.close()
    policy = says("no")
    policy.rewrites_history = rewrites
    lives = []
    for _ in range(2):
        loop = Loop.over(policy, algorithm=algorithm, rollout={"rollouts_per_task": len(chains)})
        loop.learner.limits = ModelLimits(VOCABULARY, CONTEXT)
        journal = StepJournal(folder, 0)
        asyncio.run(loop.step(journal))
        journal.close()
        assert all(map(math.isfinite, loop.metrics.values())), loop.metrics
        assert loop.metrics["dropped"] == sum(loop.dropped.values())
        read_experiences(journal_file(folder, 0))
        lives.append((loop.learner.steps, loop.dropped))
    assert lives[0] == lives[1], "a resumed step trains on the same data"


# Each example is told apart by the word under which it is counted.


async def test_a_distilled_copy_may_be_too_long_where_its_source_is_not() -> None:
    """x is longer than the reflection that stood in its place."""
    loop = Loop.over(FakePolicy(answers({"solve" * 30: "no", "reflect": "<prompt>r</prompt>"}, "go")))
    loop.environment.describe = with_solver(loop.environment, "solve" * 30)  # type: ignore[assignment,method-assign]
    chain, *_ = await loop.step()
    second, copy = (len(part.sequences[0].token_ids) for part in (chain.sample("second"), chain.target("distilled")))
    assert second < copy and not loop.dropped
    loop.learner = FakeLearner(limits=ModelLimits(VOCABULARY, copy - 1))
    chain, *_ = await loop.step()
    assert chain.target("distilled") is not None, "what was sampled stays in the journal"
    assert loop.dropped == {"dropped_too_long": 4}, "two first attempts, two copies"
    assert loop.trained() == {"reflection", "second"}


def answers(said: dict[str, str], otherwise: str) -> Callable[[str, str, SamplingParams], str]:
    return lambda system, last, sampling: said.get(system, otherwise)


def with_solver(environment: FakeEnvironment, solver: str) -> Callable[[str], Any]:
    describe = environment.describe

    async def changed(name: str) -> Any:
        info = await describe(name)
        return replace(info, prompts=replace(info.prompts, solver=solver))

    return changed


async def test_where_the_learner_states_no_limits_the_policys_hold() -> None:
    loop = Loop.over(FakePolicy(answers({"solve" * 30: "no", "reflect": "<prompt>r</prompt>"}, "go")))
    loop.environment.describe = with_solver(loop.environment, "solve" * 30)  # type: ignore[assignment,method-assign]
    loop.learner = FakeLearner(limits=ModelLimits(0, 0))
    chain, *_ = await loop.step()
    assert not loop.dropped
    longest = max(len(part.sequences[0].token_ids) for part in (chain.target("distilled"), chain.sample("reflection")))
    assert longest == len(chain.targets[0].sequences[0].token_ids)
    loop.policy.context_length = longest - 1
    await loop.step()
    assert loop.dropped == {"dropped_too_long": 4}


async def test_a_sample_that_is_dropped_leaves_its_reward_in_the_group() -> None:
    """Three first attempts: 1, 0 and one that is too long, which earned 0."""
    said = iter(["go", "no", "n" * 150])
    policy = FakePolicy(lambda system, last, sampling: next(said))
    loop = Loop.over(policy, rollout={"rollouts_per_task": 3}, algorithm={"second_attempt": "none"})
    loop.learner.limits = ModelLimits(VOCABULARY, 120)
    await loop.step()
    assert loop.dropped == {"dropped_too_long": 1}
    good, bad = (datum.objective.advantage for datum in loop.learner.steps[0])  # type: ignore[attr-defined]
    mean = 1 / 3
    deviation = math.sqrt(1 / 3)
    assert (good, bad) == (pytest.approx((1 - mean) / deviation, 1e-4), pytest.approx(-mean / deviation, 1e-4))
    assert {datum.weight for datum in loop.learner.steps[0]} == {1 / 2}


@pytest.mark.parametrize(("turns", "from_call"), [(2, 1), (3, 1), (3, 2), (5, 1), (5, 2), (5, 4)])
async def test_a_policy_that_begins_to_rewrite_history_in_the_middle(turns: int, from_call: int) -> None:
    """Second attempts are prompted with all messages from some turn on: some have a copy, none has a wrong one."""
    policy = says("no")
    generate = policy.generate
    seen = {"second": 0}

    async def changing(prompt: Any, sampling: Any, options: Any) -> Any:
        if "-second-" in options.request_id:
            seen["second"] += 1
            policy.rewrites_history = int(options.request_id.rpartition("-")[2]) >= from_call
        return await generate(prompt, sampling, options)

    policy.generate = changing  # type: ignore[assignment,method-assign]
    loop = Loop.over(policy, turns=turns, rollout={"rollouts_per_task": 1})
    (chain,) = await loop.step()
    assert seen["second"] > 0
    sequences = chain["second"].sequences
    if len(sequences) < turns:  # a sequence holds several turns, and another begins anew
        assert chain.target("distilled") is None and loop.dropped == {"dropped_rewritten_history": 1}
    else:
        for place, sequence in enumerate(chain.targets[0].sequences):
            shown = bytes(sequence.segments[0].token_ids).decode()
            assert shown.count("[assistant:go]") == place and shown.startswith("[system:solve]")
    assert "second" in loop.trained(), "its own tokens are what the policy saw"


async def test_a_policy_that_cannot_tell_the_first_prompt() -> None:
    policy = says("no")
    policy.rewrites_history = True

    async def tokenize(prompt: Any, options: Any = None) -> Any:
        raise DomainError(Reason.PROMPT_TOO_LONG, "no room")

    policy.tokenize = tokenize  # type: ignore[method-assign]
    loop = Loop.over(policy)
    chains = await loop.step()
    assert all(chain.target("distilled") is None and chain.untrained == ("no_prompt",) for chain in chains)
    assert loop.dropped == {"dropped_no_prompt": 2} and loop.trained() == {"first", "reflection", "second"}


async def test_what_was_answered_without_token_ids_is_no_sample() -> None:
    policy = says("no")
    policy.features -= {Feature.TOKEN_IDS}
    loop = Loop.over(policy)
    await loop.step()
    assert loop.metrics["dropped"] == 8 and not loop.learner.steps


# A first prompt that does not fit.


async def test_a_first_prompt_that_never_fits_is_no_sample() -> None:
    policy = says("no")
    policy.context_length = 10
    loop = Loop.over(policy)
    chains = await loop.step()
    for chain in chains:
        first = chain.sample("first")
        assert (first.outcome, first.reward, first.restarts) == (Outcome.POLICY_ERROR, None, 0)
        assert "first prompt has 40 tokens, and the policy's context is 10" in first.error
        assert chain.sample("reflection") is None and chain.sample("second") is None
    assert loop.metrics["excluded"] == loop.metrics["excluded_prompt_too_long"] == 2
    assert "success_first" not in loop.metrics and not loop.learner.steps


async def test_a_reflection_that_is_too_long_for_a_second_attempt_earns_nothing() -> None:
    policy = says("no", reflection=f"<prompt>{'r' * 300}</prompt>")
    policy.context_length = 330
    loop = Loop.over(policy)
    chains = await loop.step()
    assert {chain["second"].outcome for chain in chains} == {Outcome.POLICY_ERROR}
    assert {chain["reflection"].reward for chain in chains} == {None}
    assert loop.metrics["excluded_prompt_too_long"] == 2 and loop.trained() == {"first"}


async def test_an_attempt_that_is_too_long_to_reflect_on_is_counted() -> None:
    loop = Loop.over(says("no"))
    loop.policy.context_length = 100
    chains = await loop.step()
    assert {chain["reflection"].outcome for chain in chains} == {Outcome.POLICY_ERROR}
    assert loop.metrics["excluded_prompt_too_long"] == 2 and loop.trained() == {"first"}
    firsts = [chain.sample("first") for chain in chains]
    parts = [part for chain in chains for part in chain.samples]
    (notice,) = prompt_notices(firsts, parts)
    assert "a reflection, because PROMPT_TOO_LONG" in notice and prompt_notices(firsts) == []


async def test_a_conversation_that_outgrows_the_context_is_a_sample() -> None:
    policy = says("no")
    policy.context_length = 60
    loop = Loop.over(policy, turns=5, algorithm={"second_attempt": "none"})
    for chain in await loop.step():
        first = chain.sample("first")
        assert (first.outcome, first.reward) == (Outcome.TRUNCATED, 0) and 0 < len(first.turns) < 5
    assert loop.metrics["excluded"] == 0 and loop.trained() == {"first"}


async def test_with_a_larger_context_the_same_journal_goes_on(tmp_path: Path) -> None:
    policy = says("no")
    policy.context_length = 10
    for length, rewards in ((10, {None}), (4096, {0.0})):
        policy.context_length = length
        loop = Loop.over(policy)
        journal = StepJournal(tmp_path, 0)
        chains = await loop.step(journal)
        journal.close()
        assert {chain["first"].reward for chain in chains} == rewards
        read = read_experiences(journal_file(tmp_path, 0))
        assert [chain["first"].reward for chain in read] == [chain["first"].reward for chain in chains]
        assert [chain.sample("second") is None for chain in read] == [
            chain.sample("second") is None for chain in chains
        ]


# Reflections that were cut.


@pytest.mark.parametrize("text", ["<prompt>rules that go on", "<prompt>rules</prompt> and on", "no marks at all"])
@pytest.mark.parametrize("train", [False, True])
async def test_a_cut_reflection_is_not_memorised(text: str, train: bool) -> None:
    cut: dict[str, Any] = {
        "rollout": {"reflection_max_tokens": len(text)},
        "algorithm": {"train_cut_reflections": train},
    }
    loop = Loop.over(says("no", reflection=text), **cut)
    chains = await loop.step()
    assert {chain["reflection"].outcome for chain in chains} == {Outcome.TRUNCATED}
    assert {chain["second"].reward for chain in chains} == {1.0} and not loop.memory.entries
    assert ("reflection" in loop.trained()) is train
    assert loop.dropped == ({} if train else {"dropped_cut_reflection": 2})
    assert {"second", "distilled"} <= loop.trained(), "what it led to was sampled as it was"


async def test_a_reflection_that_the_policy_ended_without_marks_is_memorised_whole() -> None:
    loop = Loop.over(says("no", reflection="rules without marks"))
    await loop.step()
    assert [entry.text for entry in loop.memory.entries] == ["rules without marks"] * 2


async def test_a_reflection_that_the_memory_would_refuse_is_not_memorised() -> None:
    loop = Loop.over(says("no", reflection="é" * (2**19 + 1)), rollout={"reflection_max_tokens": 2**20})
    loop.policy.context_length = 2**22
    await loop.step()
    assert not loop.memory.entries


# Ids.


@pytest.mark.parametrize("task_id", ["x" * 200, "ü" * 200, "a/b", "日本/語" * 40])
async def test_ids_fit_the_contract_whatever_the_tasks_id(task_id: str) -> None:
    tasks = (task_id, task_id.replace("/", "-"), "t0") if "/" in task_id else (task_id, "t0")
    loop = Loop.over(says("no"), tasks=tasks)
    await loop.step()
    sampled = list(loop.environment.started)
    name = f"{'r' * 64}-evaluation-{10**9}"
    lives = []
    for _ in range(2):
        loop.environment.started.clear()
        harness = await loop.harness()
        rollout = RolloutSettings(concurrency=1)
        listed = [TaskInfo(one, Split.TEST, 1.0) for one in tasks]
        attempts = await evaluate(Player(harness, listed, EvaluationSettings(samples=2), rollout, 0, name=name))
        lives.append([attempt.sample_id for attempt in attempts])
        assert len(set(loop.environment.started)) == len(loop.environment.started) == 2 * len(tasks)
        assert all(len(episode_id) <= 200 for episode_id in loop.environment.started + sampled)
    assert lives[0] == lives[1] and len(set(lives[0])) == 2 * len(tasks)
    ids = [text for options in loop.policy.options for text in (options.request_id, options.session_id)]
    assert all(0 < len(text) <= 200 for text in ids)
