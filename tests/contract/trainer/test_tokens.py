"""What is trained on is what was sampled, id by id, over eight turns, with a tokenizer that never encodes text back to
the tokens it was sampled as.

The environment service is a process, the policy a real engine behind real gRPC; the harness, the algorithm, the journal
and the data of the optimizer step are those of every run.
"""

from __future__ import annotations

import random
import string
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from uuid import uuid4

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from mulligan.common.channel import Endpoint
from mulligan.common.experience import Experience, Sample
from mulligan.common.inference import Message, Role, StopReason
from mulligan.common.types import Split
from mulligan.env.client import EnvClient
from mulligan.policy.backend import Ask, Sampled
from mulligan.testing.processes import ServiceProcesses
from mulligan.trainer.data import Datum
from mulligan.trainer.harness import Harness
from mulligan.trainer.journal import StepJournal, StepStarted, journal_file, read_experiences
from mulligan.trainer.learner.wire import data_from_proto, data_to_proto
from mulligan.trainer.member import NoRecorder
from mulligan.trainer.settings import RunSettings
from mulligan.trainer.step import StepRunner
from tests.support.fakes import FakeLearner, FakeMemory
from tests.support.policy import Serving, serving
from tests.support.second_try import MAX_STEPS, TASKS

LETTERS = string.ascii_lowercase[:12]
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
END = SPECIAL.index("<|end|>")
TURN = "'<|' + message['role'] + '|>' + {text} + '<|end|>'"
TEMPLATES = {
    "only appends": TURN.format(text="message['content']"),
    "drops earlier thoughts": TURN.format(
        text="(message['content'] if loop.last else message['content'].split('</think>')[-1] | trim)"
    ),
}
SETTINGS = RunSettings.model_validate(
    {
        "environment": "second-try",
        "algorithm": {"train_cut_reflections": True},
        "rollout": {"concurrency": 1, "rollouts_per_task": 2, "max_tokens": 24, "reflection_max_tokens": 24},
    }
)


def write_lossy_model(folder: Path, template: str) -> Path:
    """A token for every printable character and for every pair of twelve letters. Which pairs an encoder merges depends
    on their ranks; a random model samples them in any division."""
    pairs = ["".join(pair) for pair in product(LETTERS, repeat=2)]
    random.Random(0).shuffle(pairs)
    pieces = [*SPECIAL, "\n", *map(chr, range(32, 127)), *pairs]
    ids = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(ids, [(pair[0], pair[1]) for pair in pairs]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(SPECIAL)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template="{% for message in messages %}{{ "
        + template
        + " }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=len(pieces),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@dataclass
class Recorded:
    """What the engine was asked and what it sampled, call by call: the truth to which everything else is compared."""

    prompts: list[list[int]] = field(default_factory=list)
    answers: list[Sampled] = field(default_factory=list)

    def take(self, count: int) -> list[tuple[list[int], Sampled]]:
        taken = list(zip(self.prompts[:count], self.answers[:count], strict=True))
        del self.prompts[:count], self.answers[:count]
        assert len(taken) == count
        return taken


@pytest.fixture(scope="module")
def env_address(shared_services: ServiceProcesses) -> str:
    environments = {"second-try": {"kind": "tests.support.second_try"}}
    return shared_services.start("env", environments=environments).address


@pytest.fixture(params=list(TEMPLATES))
async def policy(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Serving]:
    model = write_lossy_model(tmp_path / "model", TEMPLATES[request.param])
    async with serving(model) as running:
        assert running.backend.model.rewrites_history == (request.param != "only appends")
        yield running


@pytest.fixture
def recorded(policy: Serving, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    recorded = Recorded()
    generate = policy.backend.generate

    async def recording(ask: Ask) -> Sampled:
        answer: Sampled = await generate(ask)
        recorded.prompts.append(list(ask.token_ids))
        recorded.answers.append(answer)
        return answer

    monkeypatch.setattr(policy.backend, "generate", recording)
    return recorded


async def one_step(policy: Serving, env_address: str, folder: Path) -> tuple[list[Experience], list[Datum]]:
    """The chains as the journal holds them, and the data as the learner's service reads them off the wire."""
    environment = EnvClient(Endpoint(env_address))
    info = await environment.describe(SETTINGS.environment)
    harness = Harness(environment, policy.client, info, await policy.client.info(), uuid4().hex, max_restarts=0)
    journal = StepJournal(folder, 0)
    learner = FakeLearner()
    journal.start(StepStarted(0, list(TASKS[Split.TRAIN]), 0, 0))
    algorithm = StepRunner("run", SETTINGS, harness, FakeMemory(), learner, journal)
    await algorithm.sample(0, TASKS[Split.TRAIN], 0)
    journal.close()
    await environment.close()
    chains = read_experiences(journal_file(folder, 0))
    await replace(algorithm, recorder=NoRecorder()).learn(0, chains)
    (data,) = learner.steps
    return chains, data_from_proto(data_to_proto(data))


def trained(data: Sequence[Datum], part_id: str) -> list[Datum]:
    """The data of one part: one, or one per turn."""
    found = [datum for datum in data if datum.datum_id.partition(".")[0] == part_id]
    assert found, part_id
    return found


def trained_ids(datum: Datum) -> list[int]:
    return [token for token, loss in zip(datum.token_ids, datum.loss_mask, strict=True) if loss]


async def test_over_eight_turns_the_ids_trained_on_are_the_ids_sampled(
    policy: Serving, recorded: Recorded, env_address: str, tmp_path: Path
) -> None:
    rewrites = policy.backend.model.rewrites_history
    chains, data = await one_step(policy, env_address, tmp_path)
    assert len(chains) == 4
    closed: list[bool] = []
    for chain in chains:
        first = chain.sample("first")
        reflection = chain.sample("reflection")
        second = chain.sample("second")
        distilled = chain.target("distilled")
        assert first is not None and reflection is not None and second is not None and distilled is not None
        assert (first.reward, second.reward, len(first.turns), len(second.turns)) == (0.0, 1.0, MAX_STEPS, MAX_STEPS)
        second_data = trained(data, second.sample_id)
        first_calls = recorded.take(MAX_STEPS)
        check(trained(data, first.sample_id), first_calls, one_per_turn=rewrites)
        check(trained(data, reflection.sample_id), recorded.take(1), one_per_turn=True)
        second_calls = recorded.take(MAX_STEPS)
        check(second_data, second_calls, one_per_turn=rewrites)
        check_distilled(trained(data, distilled.target_id), second_data, second_calls, first_calls[0][0])
        for attempt, calls in ((first, first_calls), (second, second_calls)):
            await check_that_text_would_not_do(policy, attempt, calls, rewrites)
        closed += [answer.stop_reason is StopReason.END_OF_TURN for _, answer in first_calls + second_calls]
    assert not recorded.answers, "every call belongs to a part"
    assert {True, False} == set(closed), "turns that the model closed and turns that were cut"


def check(data: list[Datum], calls: list[tuple[list[int], Sampled]], *, one_per_turn: bool) -> None:
    """All ids of a datum are those that were in the engine, and those with loss, in order, the ones it sampled."""
    assert len(data) == (len(calls) if one_per_turn else 1)
    for datum, turns in zip(data, [[call] for call in calls] if one_per_turn else [calls], strict=True):
        assert trained_ids(datum) == [token for _, answer in turns for token in answer.token_ids]
        last_prompt, last = turns[-1]
        assert list(datum.token_ids) == [*last_prompt, *last.token_ids]
        for prompt, answer in turns:
            whole = [*prompt, *answer.token_ids]
            assert list(datum.token_ids[: len(whole)]) == whole
            assert not any(datum.loss_mask[len(prompt) - 1 : len(prompt)]) and all(
                datum.loss_mask[len(prompt) : len(whole)]
            )


def check_distilled(
    data: list[Datum], second: list[Datum], calls: list[tuple[list[int], Sampled]], first_prompt: list[int]
) -> None:
    """The second attempt's own ids, all that came after its first prompt, under the first attempt's prompt."""
    sampled = [token for _, answer in calls for token in answer.token_ids]
    assert [token for datum in data for token in trained_ids(datum)] == sampled
    assert list(data[0].token_ids[: len(first_prompt)]) == first_prompt
    for datum, source in zip(data, second, strict=True):
        start = datum.loss_mask.index(True)
        source_start = source.loss_mask.index(True)
        assert datum.token_ids[start:] == source.token_ids[source_start:]
        assert datum.loss_mask[start:] == source.loss_mask[source_start:]
        assert datum.token_ids[:start] != source.token_ids[:source_start], "the reflection is gone"


async def check_that_text_would_not_do(
    policy: Serving, attempt: Sample, calls: list[tuple[list[int], Sampled]], rewrites: bool
) -> None:
    """Decoding and encoding again gives other ids: for most turns alone, and for the conversation rendered anew."""
    messages = [Message(Role.SYSTEM, "any")]
    lossy = 0
    for turn, (_, answer) in zip(attempt.turns, calls, strict=True):
        lossy += policy.backend.encode(turn.text) != [token for token in answer.token_ids if token != END]
        messages += [Message(Role.USER, turn.observation), Message(Role.ASSISTANT, turn.text)]
    assert lossy > MAX_STEPS / 2
    if not rewrites:
        rendered = await policy.client.tokenize(tuple(messages[:-1]))
        (prompt, _), user = calls[-1], SPECIAL.index("<|user|>")
        assert list(rendered[rendered.index(user) :]) != prompt[prompt.index(user) :]
