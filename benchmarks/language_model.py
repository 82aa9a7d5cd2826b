"""ERL, RLVR and no training with a real language model: `python -m benchmarks.language_model [--report-only]`.

Runs what has no result yet (`proof/language_model.py`, case by case, one process for each core, hours), then writes
into docs/proof: `language-model.md` (means with 95 % intervals, the least and the greatest of the seeds, a verdict) and
`language-model.png` (learning curves with bands). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from benchmarks.common import print_result
from benchmarks.methods import Result, at, difference_interval, draw, interval, run_cells, told
from proof.language_model import EVERY, SECOND_TRIES
from proof.methods import RESULTS

UNTRAINED = "untrained"
TRAINED = ("rlvr", "erl")
_EARLY = 8  # steps, in which many first attempts fail


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report-only", action="store_true", help="run nothing, report what there is")
    if not parser.parse_args().report_only:
        run_cells("language-model/")
    arms = {arm: _results(arm) for arm in (UNTRAINED, *TRAINED)}
    if lacking := [arm for arm, results in arms.items() if not results]:
        sys.exit(f"no result yet of {', '.join(lacking)}: run it without --report-only")
    (RESULTS / "language-model.md").write_text(page(arms, _results("second-tries")))
    draw(RESULTS / "language-model.png", curves(arms), "success on the test tasks")
    print((RESULTS / "language-model.md").read_text())
    print_result("language_model", compare(arms))


def _results(arm: str) -> list[Result]:
    files = sorted((RESULTS / "language-model").glob(f"{arm}-*.json"))
    return [json.loads(file.read_text()) for file in files]


def budget(arms: Mapping[str, Sequence[Result]]) -> int:
    """Rollouts that every trained seed has spent, or all of it."""
    return int(min(result["rollouts"] for arm in TRAINED for result in arms[arm]))


def curves(arms: Mapping[str, Sequence[Result]]) -> dict[str, list[Result]]:
    """The arms, each with learning curves. That of the untrained model is flat."""
    ends = (0, budget(arms))
    flat: list[Result] = [
        {"rollouts": ends[1], "evaluations": [{"rollouts": end, "success": one["test_success"]} for end in ends]}
        for one in arms[UNTRAINED]
    ]
    return {UNTRAINED: flat, **{arm: list(arms[arm]) for arm in TRAINED}}


def spread(values: Sequence[float]) -> str:
    """Mean with its interval, and the least and the greatest."""
    return f"{told(values)} ({min(values):.2f} to {max(values):.2f})"


def page(arms: Mapping[str, Sequence[Result]], second: Sequence[Result]) -> str:
    """The table of all arms, and what follows from it and from second tries."""
    spent = budget(arms)
    attempts = " or ".join(sorted({str(result["attempts"]) for result in arms[UNTRAINED]}))
    untrained = [result["test_success"] for result in arms[UNTRAINED]]
    lines = [
        "# A real language model on short sentences",
        "",
        "SmolLM2-135M-Instruct with an adapter of rank 16, by `recipes/short-sentences-smollm2.toml` and its RLVR arm,",
        f"measured every {EVERY} steps. Success is that of first attempts without a reflection in context,",
        f"{attempts} each time. Means over seeds with 95 % intervals (Student's t), and the least and the greatest.",
        "Rollouts are episodes and reflections. Untrained is the model as it comes, with other seeds than the runs",
        "have. Made by `python -m benchmarks.language_model` from the files in [language-model/](language-model/),",
        "each with its commit and command.",
        "",
        f"| method | seeds | success before | success at {spent:,} rollouts | success at the end | rollouts "
        "| sampled tokens | seconds |",
        "|---|---|---|---|---|---|---|---|",
        f"| {UNTRAINED} | {len(untrained)} | {spread(untrained)} | | | | | |",
    ]
    for arm in TRAINED:
        results = arms[arm]
        middle = _after(results, spent)
        row = [
            *(arm, str(len(results))),
            *(spread([one["test_success_before"] for one in results]), spread(middle)),
            spread([one["test_success_after"] for one in results]),
            *(told([one[name] for one in results], 0) for name in ("rollouts", "sampled_tokens", "train_seconds")),
        ]
        lines.append(f"| {' | '.join(row)} |")
    said = [verdict(arms), reasons(arms), *([tries(second)] if second else [])]
    return "\n".join(
        [*lines, *(line for text in said for line in ("", text)), "", "![Learning curves](language-model.png)", ""]
    )


def verdict(arms: Mapping[str, Sequence[Result]]) -> str:
    """What the ends of the runs say, in words: each trained arm beside the untrained model, and ERL beside RLVR."""
    values = _ends(arms)
    rlvr, erl = (_difference(arm.upper(), values[arm], "the untrained model", values[UNTRAINED]) for arm in TRAINED)
    return f"{rlvr} {erl} {_difference('ERL', values['erl'], 'RLVR', values['rlvr'])}"


def reasons(arms: Mapping[str, Sequence[Result]]) -> str:
    """Where ERL's end comes from, beside RLVR's: the budgets, and what a reflection does for a second try."""
    spent = budget(arms)
    erl, rlvr = (fmean(_after(arms[arm], spent)) for arm in ("erl", "rlvr"))
    first, second = (
        fmean(rate for result in arms["erl"] for rate in result[curve][:_EARLY])
        for curve in ("train_success", "second_success")
    )
    more = "which is more" if second - first > 0.05 else "which is not more; their tasks are harder ones, though"
    return (
        f"After {spent:,} rollouts each, ERL is at {erl:.2f} and RLVR at {rlvr:.2f}: ERL writes no reflection where a "
        "first attempt succeeds, so its 24 steps have fewer rollouts. "
        f"In the first {_EARLY} steps of ERL {first:.2f} of the first attempts succeed. Of the second ones, each of "
        f"which follows a failure and a reflection, it is {second:.2f}, {more}."
    )


def tries(results: Sequence[Result]) -> str:
    """What a reflection is worth to the model as it comes, beside another try without one."""
    rates = {
        way: [one["ways"][way]["second_solved"] / one["ways"][way]["second_attempts"] for one in results]
        for way in SECOND_TRIES
    }
    count = sum(one["ways"]["erl"]["second_attempts"] for one in results)
    gain = fmean(rates["erl"]) - fmean(rates["try_again"])
    half = difference_interval(rates["erl"], rates["try_again"])
    if half is not None and gain > half:
        so = "So its reflections help."
    elif half is not None and gain < -half:
        so = "So its reflections do harm: ERL's second attempts are worse than RLVR's further first ones."
    else:
        so = "So nothing shows that its reflections are worth more than another try, and RLVR tries again without them."
    return (
        f"The model as it comes, after a first attempt that failed ({count:,} times in {len(results)} seeds): told "
        f"that alone, it succeeds at {told(rates['try_again'])}; told its attempt and the feedback, at "
        f"{told(rates['raw_retry'])}; after a reflection on them, as in ERL, at {told(rates['erl'])}. {so}"
    )


def _after(results: Sequence[Result], rollouts: int) -> list[float]:
    return [found for result in results if (found := at(result, rollouts)) is not None]


def _difference(name: str, one: Sequence[float], other_name: str, other: Sequence[float]) -> str:
    """A sentence about the means, whose difference shows if its 95 % interval leaves out 0."""
    gain = fmean(one) - fmean(other)
    half = difference_interval(one, other)
    means = f"{name} ends at {fmean(one):.2f}, {other_name} at {fmean(other):.2f}"
    if half is None:
        return f"{means}; with a single seed nothing says how much of that is chance."
    size = f"a difference of {gain:+.2f} ± {half:.2f}"
    if abs(gain) <= half:
        return f"{means}: {size}, so these seeds do not show which is better."
    return f"{means}: {size}, so {name if gain > 0 else other_name} is better."


def _ends(arms: Mapping[str, Sequence[Result]]) -> dict[str, list[float]]:
    """Test success of the model as it comes, and of both methods at the end; of each seed."""
    values = {UNTRAINED: [one["test_success"] for one in arms[UNTRAINED]]}
    return values | {arm: [one["test_success_after"] for one in arms[arm]] for arm in TRAINED}


def compare(arms: Mapping[str, Sequence[Result]]) -> dict[str, Any]:
    """The headline: test success of the model as it comes, and of both methods at the end."""
    values = _ends(arms)
    means = {f"short_sentences_{arm}": fmean(found) for arm, found in values.items()}
    halves = {f"short_sentences_{arm}_interval": interval(found)[1] for arm, found in values.items()}
    return means | halves | {"seeds": {arm: len(found) for arm, found in values.items()}}


if __name__ == "__main__":
    main()
