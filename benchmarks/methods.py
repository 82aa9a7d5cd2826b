"""Compares all methods on 3×3 FrozenLake with the embedded model: `python -m benchmarks.methods [--report-only]`.

Runs what has no result yet (`proof/methods.py`, cell by cell, one process for each core, about seven hours of two
cores), then writes into docs/proof: `methods.md` (means with 95 % intervals), `methods.png` (learning curves with
bands) and `erl_vs_rlvr.json`. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import sqrt
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from benchmarks.common import print_result
from proof.methods import ARMS, RESULTS, ROOT, Arm, others

THRESHOLD = 0.8  # of test success
# Two-sided 95 % quantiles of Student's t distribution, by degrees of freedom.
T_QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}

_SHARES = (0.25, 0.5, 1.0)  # of ERL's rollouts, at which success is compared
_FIRST_STEPS = 40

Result = Mapping[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report-only", action="store_true", help="run nothing, report what there is")
    if not parser.parse_args().report_only:
        run_cells("methods/")
    arms = {name: results for name, arm in {**ARMS, **others()}.items() if (results := _results(name, arm))}
    if not {"erl", "rlvr"} <= arms.keys():
        sys.exit("no result of erl and rlvr yet: run it without --report-only")
    (RESULTS / "methods.md").write_text(page(arms))
    shown = {name: results for name, results in arms.items() if not name.startswith("why-")}
    draw(RESULTS / "methods.png", shown, "success on the test boards")
    claim = compare(arms["erl"], arms["rlvr"])
    made = {"command": "python -m benchmarks.methods --report-only", "made_from": "docs/proof/methods/*.json"}
    (RESULTS / "erl_vs_rlvr.json").write_text(json.dumps(made | claim, indent=2) + "\n")
    print((RESULTS / "methods.md").read_text())
    print_result("methods", claim)


def run_cells(prefix: str) -> None:
    """Runs the cases of that name that have no result: each on one core, and one for each core of this process at a
    time."""
    command = [sys.executable, "-m", "proof", "--only", prefix, "--core"]
    cores = sorted(os.sched_getaffinity(0))
    processes = [subprocess.Popen([*command, str(core)], cwd=ROOT) for core in cores]
    if failed := [core for core, process in zip(cores, processes, strict=True) if process.wait()]:
        sys.exit(f"cells failed on core {', '.join(map(str, failed))}: see above; what is done is kept")


def _results(name: str, arm: Arm) -> list[Result]:
    files = [RESULTS / "methods" / f"{name}-{seed}.json" for seed in range(arm.seeds)]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def at(result: Result, rollouts: float) -> float | None:
    """Test success after so many rollouts, on the line between two evaluations; None beyond the last."""
    curve = [(point["rollouts"], point["success"]) for point in result["evaluations"]]
    for (left, low), (right, high) in pairwise(curve):
        if left <= rollouts <= right:
            return float(low + (high - low) * (rollouts - left) / (right - left))
    return None


def rollouts_to(result: Result, success: float) -> float | None:
    """Rollouts until the test success, on the line between two evaluations; None where it was never reached."""
    curve = [(point["rollouts"], point["success"]) for point in result["evaluations"]]
    for (left, low), (right, high) in pairwise(curve):
        if high >= success:
            return float(right if high == low else left + (right - left) * max(0.0, (success - low) / (high - low)))
    return None


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95 % interval over seeds (Student's t); None for a single seed."""
    if len(values) < 2:
        return fmean(values), None
    return fmean(values), T_QUANTILES[min(len(values) - 1, 4)] * stdev(values) / sqrt(len(values))


def difference_interval(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Half the width of the 95 % interval of the difference of two means (Welch; its degrees of freedom rounded down to
    those of the smaller group); None for a single seed."""
    fewest = min(len(one), len(other))
    if fewest < 2:
        return None
    return T_QUANTILES[min(fewest - 1, 4)] * sqrt(stdev(one) ** 2 / len(one) + stdev(other) ** 2 / len(other))


def told(values: Sequence[float], digits: int = 2) -> str:
    mean, half = interval(values)
    return f"{mean:,.{digits}f}" + ("" if half is None else f" ± {half:,.{digits}f}")


def compare(erl: Sequence[Result], rlvr: Sequence[Result]) -> dict[str, Any]:
    """The headline: final test success of both, and how many rollouts ERL needs for what RLVR needs."""
    ends = {name: [result["test_success_after"] for result in arm] for name, arm in (("erl", erl), ("rlvr", rlvr))}

    def ratio(success: float) -> float | None:
        """Mean rollouts of ERL over those of RLVR until the success; None where a seed never reaches it."""
        needed = [[rollouts_to(result, success) for result in arm] for arm in (erl, rlvr)]
        known = [[one for one in arm if one is not None] for arm in needed]
        if [len(arm) for arm in known] != [len(erl), len(rlvr)]:
            return None
        return fmean(known[0]) / fmean(known[1])

    final = fmean(ends["rlvr"])
    reached = [rollouts_to(result, final) for result in erl]
    spent = fmean(result["rollouts"] for result in rlvr)
    needed = [one for one in reached if one is not None]
    return {
        "frozenlake_erl": fmean(ends["erl"]),
        "frozenlake_erl_interval": interval(ends["erl"])[1],
        "frozenlake_rlvr": final,
        "frozenlake_rlvr_interval": interval(ends["rlvr"])[1],
        "difference": fmean(ends["erl"]) - final,
        "difference_interval": difference_interval(ends["erl"], ends["rlvr"]),
        "rollouts_to_threshold_ratio": ratio(THRESHOLD),
        "rollouts_to_rlvr_final_ratio": fmean(needed) / spent if len(needed) == len(erl) else None,
        "seeds": {"erl": len(erl), "rlvr": len(rlvr)},
    }


def page(arms: Mapping[str, Sequence[Result]]) -> str:
    """The table of all arms. The budget of a column is what every seed of every arm has spent, or all of it."""
    half = min(result["rollouts"] for results in arms.values() for result in results)
    methods = {name: results for name, results in arms.items() if name not in ARMS or not ARMS[name].like}
    lines = [
        "# Methods on 3×3 FrozenLake",
        "",
        "Embedded model, 100 test boards, first attempts without a reflection in context. Each arm has the best of",
        "three learning rates (100 steps, one seed, training boards only); RLVR has that and the best of three",
        "entropy bonuses. Each run has one core. Means over seeds with 95 % intervals (Student's t). Rollouts are",
        f"episodes and texts. In the order of the success at {half:,} rollouts, which every seed of every arm has",
        "spent. Seconds are the median over seeds, evaluations included. Other work ran on the machine, so that some",
        "runs took several times as long as others: compare tokens and optimizer steps instead. Made by",
        "`python -m benchmarks.methods` from the files in [methods/](methods/), each with its commit and command.",
        "",
        f"| method | seeds | learning rate | success at {half:,} rollouts | success at the end | rollouts "
        "| optimizer steps | sampled tokens | seconds (median) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, results in _best_first(methods, half):
        early = [found for result in results if (found := at(result, half)) is not None]
        entropy = f", entropy {results[0]['entropy']}" if results[0]["entropy"] else ""
        row = [
            name,
            str(len(results)),
            results[0]["rate"] + entropy,
            told(early) if early else "",
            told([result["test_success_after"] for result in results]),
            told([result["rollouts"] for result in results], 0),
            f"{results[0]['optimizer_steps']:,}",
            told([result["sampled_tokens"] for result in results], 0),
            f"{median(result['train_seconds'] for result in results):,.0f}",
        ]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join([*lines, "", "![Learning curves](methods.png)", "", *parts(arms)])


def parts(arms: Mapping[str, Sequence[Result]]) -> list[str]:
    """The section on arms that differ from ERL or RLVR in one thing. Successes are at shares of ERL's rollouts."""
    compared = {name: arms[name] for name in ARMS if name in arms}
    whole = min(result["rollouts"] for result in arms["erl"])
    places = [int(whole * share) for share in _SHARES]
    successes = " | ".join(f"success at {place:,} rollouts" for place in places)
    lines = [
        "## ERL and RLVR with one thing changed",
        "",
        "The arms named `why-` have the learning rate of ERL or RLVR, the others their own. Groups with signal are",
        f"those whose first attempts differ in reward, of the first {_FIRST_STEPS} steps and of the last.",
        "What follows from this: [why-erl.md](why-erl.md).",
        "",
        f"| arm | what it is | seeds | groups with signal | {successes} | success at the end | rollouts |",
        "|---" * (6 + len(places)) + "|",
    ]
    for name, results in _best_first(compared, whole):
        signal = [_signal(result["groups_with_signal"]) for result in results]
        early = [[found for result in results if (found := at(result, place)) is not None] for place in places]
        row = [
            name,
            ARMS[name].differs or name.upper(),
            str(len(results)),
            f"{fmean(first for first, _ in signal):.2f}, {fmean(last for _, last in signal):.2f}",
            *(told(found) if found else "" for found in early),
            told([result["test_success_after"] for result in results]),
            told([result["rollouts"] for result in results], 0),
        ]
        lines.append(f"| {' | '.join(row)} |")
    return [*lines, ""]


def _best_first(arms: Mapping[str, Sequence[Result]], rollouts: int) -> list[tuple[str, Sequence[Result]]]:
    """By their mean success at so many rollouts, or at the end where a run has fewer."""
    return sorted(arms.items(), key=lambda arm: -fmean(_success(result, rollouts) for result in arm[1]))


def _success(result: Result, rollouts: int) -> float:
    found = at(result, rollouts)
    return float(result["test_success_after"] if found is None else found)


def _signal(shares: Sequence[float]) -> tuple[float, float]:
    return fmean(shares[:_FIRST_STEPS]), fmean(shares[-_FIRST_STEPS:])


def draw(path: Path, arms: Mapping[str, Sequence[Result]], success: str) -> None:
    """Test success over rollouts: the mean over seeds, and a band from the least to the greatest. `success` names its
    axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5), dpi=120)
    for name, results in sorted(arms.items()):
        last = min(result["rollouts"] for result in results)
        places = [last * index / 40 for index in range(41)]
        values = [[at(result, place) or 0.0 for result in results] for place in places]
        (line,) = axes.plot(places, [fmean(column) for column in values], label=name)
        axes.fill_between(places, [*map(min, values)], [*map(max, values)], alpha=0.12, color=line.get_color())
    axes.set(xlabel="rollouts: episodes + texts", ylabel=success, ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize="small", ncols=2)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
