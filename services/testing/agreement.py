"""Whether an engine and the trainer say the same of the same weights, while a learner trains them step by step."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mulligan.common.inference import CallOptions, Completion, Message, Prompt, Role, SamplingParams, WeightsKind
from mulligan.models import EMBEDDED
from mulligan.policy.client import PolicyClient
from mulligan.trainer.data import Datum, PolicyGradient
from mulligan.trainer.learner.local import LocalLearner
from mulligan.trainer.learner.settings import LearnerServerSettings, LearnerSpec
from mulligan.trainer.losses import ppo
from mulligan.trainer.settings import LoraSettings, OptimizerSettings, TrainedModelSettings

TOLERANCE = 1e-4  # in float32, of a log-probability
MOVED = 1e-3  # what an update changes at least: with the weights of the version before, no comparison would pass
TEMPERATURES = (1.0, 1.0, 0.7, 0.7)  # of every other sequence a board is the prompt
_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")  # those that an SGLang server of the tests takes an adapter of
# the first ids are of special tokens
_ORDINARY = 5
_VOCABULARY = 319
_MAX_TOKENS = 48
_LEARNING_RATE = {WeightsKind.FULL: 1e-5, WeightsKind.LORA: 3e-4}
_LOSS = ppo.Settings(kl_coefficient=0.0)


@dataclass(frozen=True, slots=True)
class Compared:
    """Greatest absolute differences in log-probability under one version. `moved` is between this version and the one
    before it, by the trainer; None for the first."""

    policy_version: int
    tokens: int
    sampled: float  # engine while it sampled, trainer's forward pass
    scored: float  # engine's Score, trainer's forward pass
    canary: float | None
    moved: float | None


async def compare_while_training(
    client: PolicyClient, kind: WeightsKind, folder: Path, *, updates: int, sequences: int
) -> list[Compared]:
    """One result for the weights that the model came with, and one after each update. `folder / "weights"` is where
    the policy service loads from."""
    adapter = LoraSettings(rank=8, target_modules=_MODULES) if kind is WeightsKind.LORA else None
    spec = LearnerSpec(
        TrainedModelSettings(source=str(EMBEDDED), lora=adapter), OptimizerSettings(learning_rate=_LEARNING_RATE[kind])
    )
    server = LearnerServerSettings(folder / "weights", folder / "checkpoints", threads=1)
    learner = await LocalLearner.create(f"agreement-{kind}", spec, server)
    chance = random.Random(str(kind))
    version = (await client.info()).policy_version
    results = []
    canary = None
    moved = None
    try:
        while True:
            compared, data = await _compare(client, learner, version, sequences, chance)
            results.append(Compared(version, canary=canary, moved=moved, **compared))
            if len(results) > updates:
                return results
            before = await learner.forward(data)
            await learner.forward_backward(data, _LOSS)
            step = await learner.optim_step()
            assert not step["skipped"], step
            moved = greatest_difference(before, await learner.forward(data))
            version += 1
            canary = await client.update_weights(await learner.publish_weights(version))
    finally:
        await learner.close()


def assert_agreement(results: Sequence[Compared]) -> None:
    for one in results:
        assert one.sampled <= TOLERANCE and one.scored <= TOLERANCE, one
        assert one.canary is None or one.canary <= TOLERANCE, one
        assert one.moved is None or one.moved >= MOVED, one


async def _compare(
    client: PolicyClient, learner: LocalLearner, version: int, sequences: int, chance: random.Random
) -> tuple[dict[str, Any], list[Datum]]:
    """And what was sampled, to be trained on."""
    options = CallOptions(min_policy_version=version)
    temperatures = [TEMPERATURES[index % len(TEMPERATURES)] for index in range(sequences)]
    prompts = [_board(chance) if index % 2 else _random_tokens(chance) for index in range(sequences)]
    completions = await asyncio.gather(
        *(
            client.generate(prompt, SamplingParams(temperature=one, max_tokens=_MAX_TOKENS), options)
            for prompt, one in zip(prompts, temperatures, strict=True)
        )
    )
    for completion in completions:
        assert {span.policy_version for span in completion.policy_versions} == {version}, completion
    sampled = [_sampled(*parts, chance) for parts in zip(prompts, completions, temperatures, strict=True)]
    expected = await learner.forward(sampled)
    found = [completion.log_probs for completion in completions]
    everywhere = [_whole(datum) for datum in sampled]
    scored = await client.score([datum.token_ids for datum in everywhere], 1.0, options)
    assert scored.policy_version == version
    return {
        "tokens": sum(map(len, found)),
        "sampled": greatest_difference(expected, found),
        "scored": greatest_difference(await learner.forward(everywhere), scored.log_probs),
    }, sampled


def _board(chance: random.Random) -> tuple[Message, ...]:
    """As the embedded model was taught to see it, of some size and in some letters."""
    size = chance.randint(2, 6)
    rows = [" ".join(chance.choice("ABCDEFG") for _ in range(size)) for _ in range(size)]
    return (Message(Role.SYSTEM, chance.choice(["play", "explain"])), Message(Role.USER, "\n".join(rows)))


def _random_tokens(chance: random.Random) -> list[int]:
    """After which the model goes on for long."""
    return [chance.randrange(_ORDINARY, _VOCABULARY) for _ in range(chance.randint(5, 60))]


def _sampled(prompt: Prompt, completion: Completion, temperature: float, chance: random.Random) -> Datum:
    before = tuple(prompt) if isinstance(prompt, list) else completion.prompt_token_ids
    mask = (False,) * len(before) + (True,) * len(completion.token_ids)
    objective = PolicyGradient(chance.choice([-1.0, 1.0]), completion.log_probs)
    tokens = (*before, *completion.token_ids)
    return Datum(f"{chance.random()}", tokens, mask, 1.0, temperature, objective, "first")


def _whole(datum: Datum) -> Datum:
    """All its tokens after the first, at temperature 1."""
    count = len(datum.token_ids) - 1
    objective = PolicyGradient(0.0, (0.0,) * count)
    return Datum(datum.datum_id, datum.token_ids, (False,) + (True,) * count, 1.0, 1.0, objective, datum.branch)


def greatest_difference(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> float:
    """The greatest absolute one, between log-probabilities of the same tokens of some sequences."""
    return max(
        abs(left - right)
        for mine, others in zip(ours, theirs, strict=True)
        for left, right in zip(mine, others, strict=True)
    )
