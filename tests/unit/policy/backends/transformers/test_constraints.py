"""Completions that must match a regular expression or a JSON schema."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from tokenizers import Tokenizer as Inner
from tokenizers import decoders
from tokenizers import models as kinds
from transformers import PreTrainedTokenizerFast

from mulligan import models
from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import Feature, SamplingParams, StopReason
from mulligan.common.model_files import UnsupportedModel
from mulligan.policy.backend import Ask
from mulligan.policy.backends.transformers.backend import TransformersBackend
from mulligan.policy.backends.transformers.constraints import Constraints
from mulligan.policy.huggingface.tokenizer import Tokenizer
from tests.support.llama_model import write_llama_model
from tests.support.settings import model_settings
from tests.unit.policy.backends.transformers.test_engine import SHORT, request, running

REGEXES = (
    r"(Up|Down|Left|Right)(, (Up|Down))?",
    r"[0-9]{3}-[a-f]{2,4}",
    r"(é|ü|x){1,5}",
    r"Yes|No\.?",
    r"[^a-z<]{4,8}",
)
SCHEMA = {
    "type": "object",
    "properties": {
        "move": {"enum": ["Up", "Down"]},
        "sure": {"type": "boolean"},
        "steps": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 3},
    },
    "required": ["move", "sure", "steps"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},  # an untrained model would put any number of spaces
}


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def backend(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[TransformersBackend]:
    model = write_llama_model(tmp_path_factory.mktemp("model"))
    opened = TransformersBackend(model_settings(model=str(model), threads=1, cache_gib=0.1))
    assert opened.model.features >= {Feature.REGEX, Feature.JSON_SCHEMA}
    yield opened
    await opened.close()


def ask(seed: int, **sampling: Any) -> Ask:
    return Ask([10 + seed % 50, 11, 12], SamplingParams(**({"max_tokens": 200, "seed": seed} | sampling)))


@pytest.mark.parametrize("regex", REGEXES)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.0}, {"temperature": 20.0}, {"top_p": 0.3}, {"top_k": 1}])
async def test_all_of_the_text_matches_the_regular_expression(
    backend: TransformersBackend, regex: str, sampling: dict[str, Any]
) -> None:
    found = await asyncio.gather(*(backend.generate(ask(seed, regex=regex, **sampling)) for seed in range(8)))
    for sampled in found:
        assert sampled.stop_reason is StopReason.END_OF_TURN
        assert re.fullmatch(regex, backend.decode(sampled.token_ids))
    if sampling.get("temperature") == 20.0:
        assert len({sampled.token_ids for sampled in found}) > 1


async def test_the_text_follows_the_schema(backend: TransformersBackend) -> None:
    asks = [ask(seed, json_schema=json.dumps(SCHEMA), temperature=2.0) for seed in range(10)]
    for sampled in await asyncio.gather(*map(backend.generate, asks)):
        assert sampled.stop_reason is StopReason.END_OF_TURN
        value = json.loads(backend.decode(sampled.token_ids))
        assert set(value) == {"move", "sure", "steps"}
        assert value["move"] in ("Up", "Down") and isinstance(value["sure"], bool)
        assert len(value["steps"]) <= 3 and all(step in range(10) for step in value["steps"])


async def test_the_log_probs_are_of_the_model_without_the_constraint(backend: TransformersBackend) -> None:
    for temperature in (0.5, 1.0, 3.0):
        one = ask(3, regex=REGEXES[1], temperature=temperature)
        sampled = await backend.generate(one)
        scored = await backend.score([[*one.token_ids, *sampled.token_ids]], temperature)
        assert sampled.log_probs == pytest.approx(scored.log_probs[0][len(one.token_ids) - 1 :], abs=1e-4)
    assert sum(sampled.log_probs) < -5, "the model alone would hardly have said that"


async def test_those_beside_it_are_sampled_as_without_it_and_parts_are_the_whole(backend: TransformersBackend) -> None:
    free = [ask(seed, temperature=2.0, max_tokens=40) for seed in range(4)]
    alone = await asyncio.gather(*map(backend.generate, free))
    bound = ask(7, regex=REGEXES[1])
    whole, *beside = await asyncio.gather(backend.generate(bound), *map(backend.generate, free))
    assert [sampled.token_ids for sampled in beside] == [sampled.token_ids for sampled in alone]
    parts = [part async for part in backend.stream(bound)]
    assert tuple(token for part in parts for token in part.token_ids) == whole.token_ids


@pytest.mark.parametrize(
    ("sampling", "field"),
    [
        ({"regex": "("}, "regex"),
        ({"regex": "(?=a)b"}, "regex"),
        ({"regex": r"[^\x00-\U0010FFFF]"}, "regex"),
        ({"regex": "(" * 5000 + "a" + ")" * 5000}, "regex"),
        ({"json_schema": '{"items":' * 3000 + "{}" + "}" * 3000}, "json_schema"),
        ({"json_schema": '{"$ref": "file:///nowhere.json"}'}, "json_schema"),
        ({"json_schema": "{"}, "json_schema"),
        ({"json_schema": "[1]"}, "json_schema"),
        ({"json_schema": '{"type": "nope"}'}, "json_schema"),
    ],
)
async def test_what_is_not_understood_is_refused_by_name(
    backend: TransformersBackend, sampling: dict[str, str], field: str
) -> None:
    for _ in range(2):
        with pytest.raises(DomainError) as caught:
            await backend.generate(ask(0, **sampling))
        assert caught.value.reason is Reason.INVALID_FIELD
        assert caught.value.metadata["field"] == f"sampling.{field}"


async def test_one_that_cannot_go_on_fails_alone() -> None:
    class Broken:
        problem = "planned"
        steps = 0

        def allowed(self) -> None:
            return None

        def advance(self, token: int) -> None:
            raise AssertionError

    async with running() as it:
        bad = request(SHORT)
        bad.constraint = Broken()  # type: ignore[assignment]
        results = await asyncio.gather(it.ask(SHORT), it.engine.generate(bad), it.ask(SHORT), return_exceptions=True)
        assert isinstance(results[1], DomainError) and "planned" in str(results[1])
        assert results[0] == results[2] == await it.ask(SHORT)
        assert it.runner.running == 0


async def test_where_a_text_is_not_its_tokens_in_bytes_there_are_no_constraints() -> None:
    inner = Inner(kinds.BPE({"<end>": 0, "a": 1, "b": 2}, []))
    inner.decoder = decoders.Fuse()
    unknown = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>"))
    spacing = Tokenizer.load(str(models.EMBEDDED))
    for tokenizer, end_of_turn, words in (
        (unknown, [0], "bytes"),
        (spacing, [1], "decoded to"),
        (spacing, [], "ends a turn"),
    ):
        with pytest.raises(UnsupportedModel, match=words):
            Constraints(tokenizer, 319, end_of_turn)
