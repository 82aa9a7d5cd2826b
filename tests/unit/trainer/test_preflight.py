"""What an algorithm declares to need, and what a run lacks."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from mulligan.common.errors import DomainError, Reason
from mulligan.trainer.preflight import check_algorithm, idle_notices
from mulligan.trainer.settings import RunSettings
from tests.support.fakes import FakeEnvironment, FakePolicy


async def checked(needs: set[str], *, rewrites: bool = False, speakers: Any = (), **environment: Any) -> None:
    algorithm = SimpleNamespace(NEEDS=needs)  # the object of an entry point may have no name
    policy = FakePolicy(lambda system, last, sampling: "", rewrites_history=rewrites)
    info = replace(await FakeEnvironment({}).describe("fake"), **({"can_fork": True} | environment))
    check_algorithm("acme.mine", algorithm, info, replace(await policy.info(), name="served"), speakers)


async def test_a_run_that_has_what_its_algorithm_needs() -> None:
    await checked({"fork", "tokenize", "own_reflections"}, speakers=("judge",))
    await checked(set(), rewrites=True, can_fork=False, speakers=("reflector",))


@pytest.mark.parametrize(
    ("need", "lacking", "words"),
    [
        ("fork", {"can_fork": False}, "'acme.mine' forks episodes, and environment 'fake' has no forks"),
        ("fork", {"deterministic": False}, "'acme.mine' forks episodes, and environment 'fake' is not deterministic"),
        ("tokenize", {"rewrites": True}, "the chat template of policy 'served' rewrites earlier turns"),
        ("own_reflections", {"speakers": ("reflector",)}, "another one writes them (policies.reflector)"),
        ("frok", {}, "'acme.mine' declares an unknown need 'frok'; did you mean 'fork'?"),
    ],
)
async def test_a_run_without_it_is_refused(need: str, lacking: dict[str, Any], words: str) -> None:
    with pytest.raises(DomainError) as caught:
        await checked({need}, **lacking)
    assert caught.value.reason is Reason.INVALID_SETTING and caught.value.metadata["field"] == "algorithm.name"
    assert words in caught.value.message


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
