"""The report on a real language model, from results of all arms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.language_model import compare, curves, page, reasons, tries, verdict
from benchmarks.methods import draw


def untrained(success: float) -> dict[str, Any]:
    return {"test_success": success, "attempts": 100}


def trained(*curve: tuple[int, float]) -> dict[str, Any]:
    points = [{"rollouts": rollouts, "success": success} for rollouts, success in curve]
    ends = {"test_success_before": curve[0][1], "test_success_after": curve[-1][1], "rollouts": curve[-1][0]}
    rates = {"train_success": [0.1, 0.3], "second_success": [0.2, 0.4]}
    return {"evaluations": points, "sampled_tokens": 9, "train_seconds": 1.0, **rates, **ends}


ARMS = {
    "untrained": [untrained(0.1), untrained(0.2), untrained(0.3)],
    "rlvr": [trained((0, 0.2), (1000, 0.4)), trained((0, 0.2), (1200, 0.8))],
    "erl": [trained((0, 0.1), (500, 0.9)), trained((0, 0.3), (1000, 0.9))],
}


def cells(text: str) -> list[list[str]]:
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows]


def test_the_table_has_the_mean_and_the_spread_of_each_arm() -> None:
    head, *rows = cells(page(ARMS, []))
    assert head[3] == "success at 500 rollouts", "what every seed of every trained arm has spent"
    assert [row[:2] for row in rows] == [["untrained", "3"], ["rlvr", "2"], ["erl", "2"]]
    assert {len(row) for row in [head, *rows]} == {8}
    assert rows[0][2] == "0.20 ± 0.25 (0.10 to 0.30)"  # 4.303 * 0.1 / sqrt(3)
    # RLVR is at 0.3 and 0.45 after 500 rollouts, on the lines between its evaluations, and ERL at 0.9 and 0.6.
    assert [row[3].split(" ± ")[0] for row in rows[1:]] == ["0.38", "0.75"]
    assert rows[1][4].endswith("(0.40 to 0.80)") and rows[2][4] == "0.90 ± 0.00 (0.90 to 0.90)"
    assert "100 each time" in page(ARMS, [])


def test_the_claim_is_of_means() -> None:
    claim = compare(ARMS)
    means = [claim[f"short_sentences_{arm}"] for arm in ("untrained", "rlvr", "erl")]
    assert means == pytest.approx([0.2, 0.6, 0.9]) and claim["seeds"] == {"untrained": 3, "rlvr": 2, "erl": 2}


def test_the_page_says_why() -> None:
    found = reasons(ARMS)
    assert found in page(ARMS, []) and "After 500 rollouts each, ERL is at 0.75 and RLVR at 0.38" in found
    assert "0.20 of the first attempts succeed" in found and "it is 0.30, which is more." in found
    alike = {**ARMS, "erl": [{**result, "second_success": [0.2, 0.2]} for result in ARMS["erl"]]}
    assert "it is 0.20, which is not more" in reasons(alike)


def test_the_page_says_what_a_reflection_is_worth() -> None:
    def second(again: int, reflected: int) -> dict[str, Any]:
        solved = {"try_again": again, "raw_retry": 30, "erl": reflected}
        return {"ways": {way: {"second_attempts": 100, "second_solved": count} for way, count in solved.items()}}

    found = tries([second(20, 40), second(22, 42)])
    assert found in page(ARMS, [second(20, 40), second(22, 42)]) and found.endswith("So its reflections help.")
    assert "(200 times in 2 seeds): told that alone, it succeeds at 0.21" in found
    assert "nothing shows that its reflections are worth more" in tries([second(20, 21), second(22, 19)])
    assert "do harm" in tries([second(40, 20), second(41, 21)])


def test_the_page_says_what_the_seeds_show_and_what_they_do_not() -> None:
    # RLVR ends at 0.4 and 0.8: 12.706 * sqrt(0.08 / 2 + 0.01 / 3) = 2.646
    assert verdict(ARMS) in page(ARMS, [])
    assert "RLVR ends at 0.60, the untrained model at 0.20: a difference of +0.40 ± 2.64, so these seeds" in verdict(
        ARMS
    )
    assert verdict(ARMS).endswith(
        "ERL ends at 0.90, RLVR at 0.60: a difference of +0.30 ± 2.54, so these seeds do not show which is better."
    )
    more = {
        **ARMS,
        "untrained": [untrained(0.2)] * 5,
        "rlvr": [trained((0, 0.2), (9, 0.1 + n / 500)) for n in range(5)],
    }
    more["erl"] = [trained((0, 0.2), (9, 0.9 + n / 500)) for n in range(5)]
    assert "the untrained model at 0.20: a difference of -0.10 ± 0.00, so the untrained model is better." in verdict(
        more
    )
    assert "RLVR at 0.10: a difference of +0.80 ± 0.01, so ERL is better." in verdict(more)
    alone = {arm: results[:1] for arm, results in ARMS.items()}
    assert "with a single seed nothing says how much of that is chance" in verdict(alone)


def test_the_chart_has_a_flat_line_for_the_untrained_model(tmp_path: Path) -> None:
    flat = curves(ARMS)["untrained"]
    assert [[point["success"] for point in one["evaluations"]] for one in flat] == [[0.1] * 2, [0.2] * 2, [0.3] * 2]
    assert {one["evaluations"][-1]["rollouts"] for one in flat} == {500}
    draw(tmp_path / "chart.png", curves(ARMS), "success on the test tasks")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
