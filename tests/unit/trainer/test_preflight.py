"""What an algorithm declares to need, and what a run lacks."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import Feature
from mulligan.trainer.preflight import check_algorithm, idle_notices
from mulligan.trainer.settings import RunSettings
from tests.support.fakes import FakeEnvironment, FakePolicy


async def checked(
    needs: Any, *, rewrites: bool = False, speakers: Any = (), without: Any = (), **environment: Any
) -> None:
    algorithm = SimpleNamespace(NEEDS=needs)  # the object of an entry point may have no name
    policy = FakePolicy(lambda system, last, sampling: "", rewrites_history=rewrites)
    info = replace(await FakeEnvironment({}).describe("fake"), **({"can_fork": True} | environment))
    served = replace(await policy.info(), name="served", features=frozenset(Feature) - {*without})
    check_algorithm("acme.mine", algorithm, info, served, speakers)


async def test_a_run_that_has_what_its_algorithm_needs() -> None:
    await checked({"fork", "tokenize", "own_reflections", "token_ids", "score"}, speakers=("judge",))
    await checked(["fork"], without=(Feature.TOKEN_IDS, Feature.SCORE))
    await checked(set(), rewrites=True, can_fork=False, speakers=("reflector",), without=Feature)


@pytest.mark.parametrize(
    ("need", "lacking", "words"),
    [
        ("fork", {"can_fork": False}, "'acme.mine' forks episodes, and environment 'fake' has no forks"),
        ("fork", {"deterministic": False}, "'acme.mine' forks episodes, and environment 'fake' is not deterministic"),
        ("tokenize", {"rewrites": True}, "the chat template of policy 'served' rewrites earlier turns"),
        ("own_reflections", {"speakers": ("reflector",)}, "another one writes them (policies.reflector)"),
        (
            "tokenize",
            {"without": [Feature.TOKEN_IDS]},
            "one token sequence, and policy 'served' (fake) reports no token",
        ),
        ("score", {"without": [Feature.SCORE]}, "'acme.mine' needs score, and policy 'served' (fake) has none"),
        (
            "token_ids",
            {"without": [Feature.TOKEN_IDS]},
            "'acme.mine' needs token_ids, and policy 'served' (fake) has none",
        ),
        ("scroe", {}, "'acme.mine' declares an unknown need 'scroe'; did you mean 'score'?"),
        ("frok", {}, "'acme.mine' declares an unknown need 'frok'; did you mean 'fork'?"),
    ],
)
async def test_a_run_without_it_is_refused(need: str, lacking: dict[str, Any], words: str) -> None:
    with pytest.raises(DomainError) as caught:
        await checked({need}, **lacking)
    assert caught.value.reason is Reason.INVALID_SETTING and caught.value.metadata["field"] == "algorithm.name"
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("needs", "words"),
    [
        ("fork", "'acme.mine' has NEEDS = 'fork'; expected {'fork'}, a set"),
        (3, "'acme.mine' has NEEDS = 3; expected a set of texts"),
    ],
)
async def test_needs_that_are_no_set_are_told(needs: Any, words: str) -> None:
    with pytest.raises(DomainError, match=words) as caught:
        await checked(needs)
    assert caught.value.metadata["field"] == "algorithm.name"


@pytest.mark.parametrize(
    ("tables", "told"),
    [
        ({}, []),
        ({"algorithm": {"normalize_by_std": False}}, []),
        (
            {"algorithm": {"normalize_by_std": False, "advantage": "rloo"}},
            ['algorithm.normalize_by_std: it has no effect with algorithm.advantage = "rloo", only with "grpo"'],
        ),
        ({"algorithm": {"name": "critique_grpo", "advantage": "rloo"}}, []),
        (
            {"algorithm": {"normalize_by_std": False, "advantage_settings": {"normalize_by_std": True}}},
            ["algorithm.normalize_by_std: it has no effect, as algorithm.advantage_settings has it, too"],
        ),
        ({"algorithm": {"aggregation_constant": 9, "aggregation": "constant"}}, []),
        (
            {"algorithm": {"aggregation_constant": 9, "aggregation": "token_mean"}},
            [
                'algorithm.aggregation_constant: it has no effect with algorithm.aggregation = "token_mean", only with '
                '"constant"'
            ],
        ),
        ({"algorithm": {"advantage": "over_turn", "aggregation": "constant"}}, []),
        (
            {"algorithm": {"advantage": "over_turn", "aggregation": "token_mean"}},
            [
                'algorithm.aggregation: with "token_mean" and algorithm.advantage = "over_turn", the tokens of '
                "truncated samples count in the mean, which is not the paper's loss; that of another aggregation is"
            ],
        ),
        ({"loss": {"mismatch_limit": 3, "mismatch_correction": "masked"}}, []),
        ({"loss": {"reference_every": 3, "kl_reference": "moving"}}, []),
        (
            {"loss": {"mismatch_limit": 3, "mismatch_correction": "none", "reference_every": 3}},
            [
                'loss.mismatch_limit: it has no effect with loss.mismatch_correction = "none", only with "masked" or '
                '"sequence_masked" or "truncated"',
                'loss.reference_every: it has no effect with loss.kl_reference = "initial", only with "moving"',
            ],
        ),
    ],
)
def test_what_has_no_effect_is_told(tables: dict[str, Any], told: list[str]) -> None:
    settings = RunSettings.model_validate({"environment": "fake"} | tables)
    assert idle_notices(settings) == told
    assert idle_notices(RunSettings.model_validate(settings.model_dump(mode="json"))) == told, "as a run stores it"
