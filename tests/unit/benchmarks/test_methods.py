"""The comparison of methods: what is read off learning curves, and what a table of them says."""

from __future__ import annotations

from math import sqrt
from typing import Any

import pytest

from benchmarks.methods import at, compare, interval, page, rollouts_to
from proof.methods import others
from tests.support.paths import ROOT


def result(*curve: tuple[int, float], **more: Any) -> dict[str, Any]:
    points = [{"step": 0, "rollouts": rollouts, "success": success} for rollouts, success in curve]
    plain: dict[str, Any] = {
        "rate": "1e-4",
        "entropy": "",
        "optimizer_steps": 8,
        "sampled_tokens": 9,
        "train_seconds": 1.0,
    }
    plain["groups_with_signal"] = [0.75] * 40 + [0.5] * 10 + [0.25] * 40
    ends = {"evaluations": points, "rollouts": curve[-1][0], "test_success_after": curve[-1][1]}
    return plain | ends | more


ERL = [result((0, 0.2), (100, 0.6), (200, 1.0)), result((0, 0.2), (100, 0.8), (200, 0.8))]
RLVR = [result((0, 0.2), (400, 0.6)), result((0, 0.2), (400, 0.8))]


def test_a_curve_is_read_between_its_points() -> None:
    assert [at(ERL[0], rollouts) for rollouts in (0, 50, 100, 150, 200)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert at(ERL[0], 201) is None
    assert [rollouts_to(ERL[0], success) for success in (0.1, 0.4, 0.8, 1.0)] == pytest.approx([0, 50, 150, 200])
    assert rollouts_to(ERL[1], 0.9) is None
    assert rollouts_to(result((0, 0.5), (10, 0.4), (20, 0.4), (30, 0.6)), 0.5) == 25


def test_intervals_are_those_of_students_t() -> None:
    assert interval([0.5]) == (0.5, None)
    mean, half = interval([0.9, 1.0, 0.8])
    assert mean == pytest.approx(0.9) and half == pytest.approx(4.303 * 0.1 / sqrt(3))


def test_the_claim_is_about_means_over_seeds() -> None:
    claim = compare(ERL, RLVR)
    assert claim["frozenlake_erl"] == pytest.approx(0.9) and claim["frozenlake_rlvr"] == pytest.approx(0.7)
    assert claim["difference"] == pytest.approx(0.2)
    # both have a variance of 0.02, over two seeds, and one degree of freedom
    assert claim["difference_interval"] == pytest.approx(12.706 * sqrt(0.02 / 2 + 0.02 / 2))
    assert claim["seeds"] == {"erl": 2, "rlvr": 2}
    assert claim["rollouts_to_threshold_ratio"] is None, "one seed of RLVR never reaches it"
    # ERL reaches 0.7 after 125 and 83 1/3 rollouts, and RLVR spent 400
    assert claim["rollouts_to_rlvr_final_ratio"] == pytest.approx((125 + 250 / 3) / 2 / 400)


def test_the_table_has_a_row_for_each_arm_the_best_first() -> None:
    table, _ = page({"rlvr": RLVR, "erl": ERL}).split("## ERL and RLVR")
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[1:]] == ["| erl", "| rlvr"]
    assert "success at 200 rollouts" in rows[0], "the budget that every seed of every arm has spent"
    assert "0.90 ± 1.27" in rows[1]


def test_arms_that_differ_in_one_thing_have_a_table_of_their_own() -> None:
    table, changed = page({"rlvr": RLVR, "erl": ERL, "why-no-first": RLVR}).split("## ERL and RLVR")
    assert "why-no-first" not in table
    rows = [line for line in changed.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[1:]] == ["| erl", "| rlvr", "| why-no-first"]
    assert "ERL, no gradient of first attempts" in rows[3]
    assert "| 0.75, 0.25 |" in rows[1]


def test_every_algorithm_is_compared_and_nothing_else() -> None:
    by_other_names = {"raw_retry": "without-reflection", "try_again": "try-again"}
    files = (ROOT / "services/trainer/algorithms").glob("[a-z]*.py")
    assert {*others(), "erl", "rlvr", *by_other_names.values()} == {
        by_other_names.get(file.stem, file.stem) for file in files
    }
