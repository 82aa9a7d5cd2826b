"""Settings of the memory: which go together, and what they are without being given."""

from __future__ import annotations

from typing import Any

import pytest

from mulligan.common.errors import DomainError, Reason
from mulligan.common.reflections import MixPart, RetrievalStrategy
from mulligan.trainer.algorithms import erl
from mulligan.trainer.preflight import idle_notices
from mulligan.trainer.settings import RunSettings
from mulligan.trainer.wire import settings_from_proto, settings_to_proto, validated
from tests.support.loop import refused

DOCUMENT = {"memory_document": "rules"}
MIX = [{"strategy": "similar_words", "limit": 2}, {"strategy": "explore"}]


@pytest.mark.parametrize(
    ("table", "field", "words"),
    [
        ({"memory_strategy": "mix"}, "memory_mix", "expected at least one part"),
        ({"memory_mix": MIX}, "memory_mix", 'expected nothing, as memory_strategy = "latest_success"'),
        ({"memory_strategy": "by_key"}, "memory_strategy", "a key to ask for in memory_document"),
        ({"memory_strategy": "best"}, "memory_strategy", "best_uplift"),
        ({"memory_strategy": "mix", "memory_mix": [{"strategy": "by_key"}]}, "memory_mix[0].strategy", "no key"),
        ({**DOCUMENT, "memory_writes": "none"}, "memory_document", 'expected nothing, as memory_writes = "none"'),
        ({**DOCUMENT, "memory_writes": "none", "memory_episodes": True}, "memory_document", "memory_writes"),
        ({**DOCUMENT, "memory_strategy": "latest_success"}, "memory_strategy", 'expected "by_key"'),
        ({**DOCUMENT, "memory_strategy": "top_gain"}, "memory_strategy", 'expected "by_key"'),
        ({**DOCUMENT, "memory_family": True}, "memory_family", "as memory_document is set"),
        (
            {**DOCUMENT, "memory_strategy": "mix", "memory_mix": [{"strategy": "by_key"}]},
            "memory_mix[0].strategy",
            "a mix has no key",
        ),
        ({"memory_document": "k" * 201}, "memory_document", "200"),
        ({"memory_strategy": "mix", "memory_mix": [*MIX, {"strategy": "mix"}]}, "memory_mix[2].strategy", "not nested"),
        ({"memory_strategy": "mix", "memory_mix": [{"strategy": "explore", "limit": 0}]}, "memory_mix[0].limit", "1"),
        ({"memory_strategy": "mix", "memory_mix": [*MIX, {"strategy": "explore", "limit": 98}]}, "memory_mix", "100"),
        ({"memory_strategy": "mix", "memory_mix": [*MIX] * 5}, "memory_mix", "8"),
        ({"memory_holdout": 0.6}, "memory_holdout", "0.5"),
        ({"memory_readers": "all"}, "memory_readers", "'both'"),
        ({"name": "dpo_pairs", "memory_readers": "first"}, "memory_readers", "reflector"),
        ({"name": "context_distillation", "memory_readers": "both"}, "memory_readers", "reflector"),
        ({"name": "ruscarl", "hints": ["h"], "memory_readers": "first"}, "memory_readers", "reflector"),
    ],
)
def test_what_does_not_go_together_is_refused_by_its_name(table: dict[str, Any], field: str, words: str) -> None:
    found, said = refused(table)
    assert found == f"algorithm.{field}" and words in said


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"deterministic": True, "algorithm": {"memory_holdout": 0.1}}, "algorithm.memory_holdout"),
        ({"learner": "none", "policies": {"evaluator": "e"}}, "policies.evaluator"),
        ({"learner": "none", "model": {"lora": {"rank": 2}}}, "model.lora"),
        ({"learner": "nobody"}, "learner"),
    ],
)
def test_a_run_that_would_mislead_is_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(DomainError) as caught:
        validated(RunSettings, {"environment": "fake", **changes})
    assert caught.value.reason is Reason.INVALID_SETTING and caught.value.metadata["field"] == field


def test_only_strategies_that_measure_draw_by_default() -> None:
    claims = {RetrievalStrategy.LATEST_SUCCESS, RetrievalStrategy.TOP_GAIN}
    for strategy in set(RetrievalStrategy) - {RetrievalStrategy.BY_KEY, RetrievalStrategy.MIX}:
        run = RunSettings(environment="e", algorithm=erl.Settings(memory_strategy=strategy))
        assert run.holdout == (0.0 if strategy in claims else 0.25), strategy
        assert run.model_copy(update={"deterministic": True}).holdout == 0.0
    assert erl.Settings(memory_holdout=0.1).holdout == 0.1
    assert erl.Settings(memory_strategy=RetrievalStrategy.EXPLORE, memory_holdout=0.0).holdout == 0.0


def test_all_of_them_survive_the_wire() -> None:
    table = {
        "memory_strategy": "mix",
        "memory_mix": MIX,
        "memory_tokens": 7,
        "memory_holdout": 0.5,
        "memory_readers": "both",
        "memory_writes": "all",
        "memory_episodes": True,
        "memory_family": True,
        "memory_scope": "global",
    }
    run = RunSettings.model_validate({"environment": "e", "algorithm": table, "learner": "none"})
    assert run.algorithm.mix == (
        MixPart(RetrievalStrategy.SIMILAR_WORDS, 2),
        MixPart(RetrievalStrategy.EXPLORE, 1),
    )
    assert settings_from_proto(settings_to_proto(run)) == run
    assert RunSettings.model_validate_json(run.model_dump_json()) == run


def test_a_document_is_read_unless_another_strategy_is_given() -> None:
    for given, asked in (({}, "by_key"), ({"memory_strategy": "best_uplift"}, "best_uplift")):
        run = RunSettings.model_validate({"environment": "e", "algorithm": DOCUMENT | given})
        assert run.algorithm.memory_strategy == asked and run.holdout == 0.25
        assert settings_from_proto(settings_to_proto(run)) == run
        assert RunSettings.model_validate_json(run.model_dump_json()) == run
    assert erl.Settings().memory_strategy == "latest_success", "without a document all is as it was"


def test_how_to_read_means_nothing_where_nothing_is_read() -> None:
    table = {"name": "erl", "memory_readers": "first", "memory_writes": "all", "memory_tokens": 9, "memory_entries": 0}
    told = idle_notices(RunSettings.model_validate({"environment": "e", "algorithm": table}))
    assert told == [
        "algorithm.memory_tokens: it has no effect with algorithm.memory_entries = 0",
        "algorithm.memory_readers: it has no effect with algorithm.memory_entries = 0",
    ]
    for reads in (table | {"memory_entries": 1}, DOCUMENT):
        assert idle_notices(RunSettings.model_validate({"environment": "e", "algorithm": reads})) == []
    unread = RunSettings.model_validate({"environment": "e", "algorithm": DOCUMENT | {"memory_entries": 0}})
    assert idle_notices(unread) == [
        "algorithm.memory_document: the run does not read it with algorithm.memory_entries = 0"
    ]
