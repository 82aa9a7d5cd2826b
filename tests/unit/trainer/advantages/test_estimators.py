"""What holds for every estimator, how one is found, and bases of estimators."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
from hypothesis import given
from pydantic import ValidationError

from mulligan.common.plugins import PluginSettings, UnusablePlugin
from mulligan.common.rewards import LARGEST_REWARD
from mulligan.trainer.advantages import ADVANTAGES, Return
from mulligan.trainer.advantages.improvement import Settings as Improvement
from mulligan.trainer.advantages.over_turn import Settings as OverTurn
from mulligan.trainer.advantages.over_turn import estimate as over_turn
from tests.support.returns import flat, group, groups, per_token, sample

OUTSIDE = """
from mulligan.common.plugins import PluginSettings


class Settings(PluginSettings):
    factor: float = 2.0


def estimate(groups, settings):
    return [[settings.factor * sample.reward for sample in group] for group in groups]
"""


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "doubled_rewards.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "doubled_rewards", raising=False)
    return "doubled_rewards"


@given(batch=groups(min_size=0, min_tokens=0))
def test_results_have_the_shape_of_the_groups_and_are_finite(batch: list[list[Return]]) -> None:
    for name in ADVANTAGES.built_in:  # to draw a batch takes longer than all of them
        plugin = ADVANTAGES.find(name)
        found = plugin.estimate(batch, plugin.Settings())
        numbers = [number for items in per_token(batch, found) for item in items for number in item]
        assert all(math.isfinite(number) for number in (*numbers, *flat(found))), name


@pytest.mark.parametrize("name", ADVANTAGES.built_in)
def test_no_groups_have_no_advantages(name: str) -> None:
    plugin = ADVANTAGES.find(name)
    assert plugin.estimate([], plugin.Settings()) == []


@pytest.mark.parametrize("name", ADVANTAGES.built_in)
def test_the_largest_rewards_stay_finite(name: str) -> None:
    plugin = ADVANTAGES.find(name)
    ends = [sample(sign * LARGEST_REWARD, before=-sign * LARGEST_REWARD) for sign in (1.0, -1.0)]
    found = plugin.estimate([ends, group(LARGEST_REWARD), group(0.1, math.nextafter(0.1, 1))], plugin.Settings())
    assert all(math.isfinite(number) for number in flat(found))


@pytest.mark.parametrize("name", ADVANTAGES.built_in)
def test_settings_refuse_what_they_do_not_know(name: str) -> None:
    settings = ADVANTAGES.find(name).Settings
    assert issubclass(settings, PluginSettings)
    with pytest.raises(ValidationError):
        settings(no_such_setting=1)


def test_a_module_outside_the_tree_is_found_and_is_a_base(outside: str) -> None:
    plugin = ADVANTAGES.find(outside)
    assert plugin.estimate([group(1.0, 0.5)], plugin.Settings()) == [[2.0, 1.0]]
    settings = OverTurn(base=outside, base_settings={"factor": 4.0})
    assert over_turn([[sample(1.0), sample(1.0, truncated=True)]], settings) == [[8.0, 0.0]]


def test_helpers_are_no_estimators() -> None:
    assert ADVANTAGES.default in ADVANTAGES.built_in
    assert not [name for name in ADVANTAGES.built_in if name.startswith("_")]


@pytest.mark.parametrize("settings", [Improvement, OverTurn])
def test_a_base_is_checked_with_the_settings(settings: type[Improvement] | type[OverTurn]) -> None:
    with pytest.raises(ValidationError, match="no advantage estimator 'rlo'; did you mean 'rloo'"):
        settings(base="rlo")
    with pytest.raises(ValidationError, match=r"base_settings\.normalise_by_std\n.*did you mean 'normalize_by_std'"):
        settings(base="grpo", base_settings={"normalise_by_std": False})


def test_an_unknown_name_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(UnusablePlugin, match="no advantage estimator 'gpro'; did you mean 'grpo'"):
        ADVANTAGES.find("gpro")


def test_a_reward_per_turn_needs_a_number_of_tokens() -> None:
    with pytest.raises(ValueError, match="one reward and one number of tokens per turn, got 2 and 1"):
        Return(1.0, (0.5, 0.5), (3,))
