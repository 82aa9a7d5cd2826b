"""What the papers predict of single methods beyond the success of first attempts, measured: `docs/methods.md` says what
was predicted.

Each case trains a method of `proof/methods.py` at half the budget, with the settings that its search found, and
evaluates it on the test boards before and after training:

- `rlef`, `ufo` and `rlvr`: success within three tries, apart from each other (`pass@3`) and in one conversation, where
  the policy is told what the environment says of a failed try, only that it was wrong, or what is not so.
- `hindsight`: success under the deployed prompt and under the prompt of bad attempts.
- `spar` and `dpo_pairs`: environment steps, and texts, for each pair that is trained on.

`python -m proof.predictions` writes the page.
"""

from __future__ import annotations

import json
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from mulligan.cli.recipes import recipe_file
from mulligan.common.experience import Experience
from mulligan.trainer.algorithms import dpo_pairs, spar
from mulligan.trainer.folder import RunFolder
from mulligan.trainer.journal import journal_file, journaled_steps, read_experiences
from proof.methods import ARMS, RESULTS, STEPS, chosen, others, train

SEEDS = 3
SAMPLES = 4  # attempts at each of the 100 test boards
TRIES = 3
WINDOW = 20  # steps
_WRONG_FEEDBACK = "reached goal"  # of a try that failed: the words with which the environment praises
CONVERSATIONS = {
    "told": "{feedback}\n{observation}",  # as RLEF trains
    "wrong": "wrong\n{observation}",  # as UFO trains
    "misled": f"{_WRONG_FEEDBACK}\n{{observation}}",
}


def protocols(method: str) -> list[dict[str, Any]]:
    """What is measured of a method, as settings of an evaluation."""
    if method in ("rlvr", "rlef", "ufo"):
        turns = {"name": "turns", "tries": TRIES, "samples": SAMPLES}
        return [
            {"name": "pass_at_k", "k": [1, TRIES], "samples": SAMPLES},
            {**turns, "label": "told", "guided": CONVERSATIONS["told"], "unguided": CONVERSATIONS["wrong"]},
            {**turns, "label": "misled", "guided": CONVERSATIONS["misled"], "unguided": CONVERSATIONS["wrong"]},
        ]
    if method == "hindsight":
        bad = tomllib.loads(recipe_file(Path("frozenlake-3x3-hindsight")).read_text())["algorithm"]["bad"]
        return [{"name": "proof.prompted", "label": "bad", "system": bad, "samples": SAMPLES}]
    return []


def measure(method: str, seed: int, folder: Path) -> dict[str, Any]:
    """One run of half the budget, which goes on where it was interrupted."""
    arm = {**ARMS, **others()}[method]
    best = chosen(method, arm)
    steps = STEPS // 2
    settings = [f"steps={steps}", f"seed={seed}", f"optimizer.learning_rate={best['rate']}"]
    settings += [f"loss.entropy_coefficient={best['entropy']}"] if best["entropy"] else []
    settings += [f"evaluation.every={steps}", f"evaluation.protocols={as_toml(protocols(method))}"]
    run = train(arm, settings, folder)
    summary = json.loads((run / "summary.json").read_text())
    found: dict[str, Any] = {
        "method": method,
        "seed": seed,
        "rate": best["rate"],
        "evaluations": [
            {"step": point["step"], "success": point["success"], **point.get("metrics", {})}
            for point in summary["evaluations"]
        ],
    }
    if method in PAIRS:
        found["pairs"] = pairs(RunFolder(run).journal, method, arm_settings(method))
    return found


def arm_settings(method: str) -> spar.Settings | dpo_pairs.Settings:
    settings: type[spar.Settings | dpo_pairs.Settings] = spar.Settings if method == "spar" else dpo_pairs.Settings
    return settings(**tomllib.loads(recipe_file(Path(f"frozenlake-3x3-{method}")).read_text())["algorithm"])


def pairs(journal: Path, method: str, settings: spar.Settings | dpo_pairs.Settings) -> list[dict[str, Any]]:
    """What the pairs cost, in windows of 20 steps."""
    windows: defaultdict[int, list[Experience]] = defaultdict(list)
    for step in journaled_steps(journal):
        windows[step // WINDOW * WINDOW] += read_experiences(journal_file(journal, step))
    return [
        {"from_step": step, **cost(found, PAIRS[method](found, settings))} for step, found in sorted(windows.items())
    ]


def cost(experiences: Sequence[Experience], count: int) -> dict[str, Any]:
    """Of `count` pairs: turns that the environment played, texts that were written, tokens that were sampled. A fork
    begins where it was forked, so the turns before it count once."""
    samples = [sample for experience in experiences for sample in experience.samples]
    turns = sum(len(sample.turns) for sample in samples if sample.is_episode)
    texts = sum(not sample.is_episode for sample in samples)
    tokens = sum(sequence.sampled_count for sample in samples for sequence in sample.sequences)
    return {
        "pairs": count,
        "environment_steps": turns,
        "texts": texts,
        "environment_steps_per_pair": round(turns / count, 2) if count else None,
        "sampled_tokens_per_pair": round(tokens / count, 2) if count else None,
    }


def _spar_pairs(experiences: Iterable[Experience], settings: Any) -> int:
    return sum(1 for one in experiences for _ in spar.pairs_of(one, settings))


def _dpo_pairs(experiences: Iterable[Experience], _: Any) -> int:
    return sum(one.target(dpo_pairs.BETTER) is not None for one in experiences)


PAIRS: Mapping[str, Callable[[Sequence[Experience], Any], int]] = {"spar": _spar_pairs, "dpo_pairs": _dpo_pairs}


def as_toml(tables: Sequence[Mapping[str, Any]]) -> str:
    """As the value of a setting on the command line. JSON's strings, numbers and lists are TOML's, too."""
    inline = (
        "{" + ", ".join(f"{name} = {json.dumps(value)}" for name, value in table.items()) + "}" for table in tables
    )
    return f"[{', '.join(inline)}]"


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    f"predictions/{method}-{seed}": partial(measure, method, seed)
    for seed in range(SEEDS)
    for method in ("rlvr", "rlef", "ufo", "hindsight", "spar", "dpo_pairs")
}


def page(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The results of each method as Markdown."""
    return "\n".join([*_INTRODUCTION, *_tries(results), *_hindsight(results), *_cost(results), *_READ]) + "\n"


_INTRODUCTION = (
    "# What was predicted of single methods, measured",
    "",
    "`python -m proof --only predictions/` runs the cases without a result; `python -m proof.predictions` writes",
    "this page. All runs have 100 steps, half of the budget, and the settings of [the comparison](methods.md). Figures",
    f"are means over the seeds (least – greatest), of {SAMPLES} attempts or conversations at each of 100 test boards.",
    "",
)


_READ = (
    "",
    "## What follows",
    "",
    "- **Several tries.** Neither `rlef` nor `ufo`, which train on conversations of several tries, succeeds more",
    "  often within three tries than the policy of `rlvr`, which trains on single ones and learns more in half of the",
    "  budget. In a conversation the policy of `rlvr` succeeds more often than in three tries apart. We think that",
    "  there it does something else after a failure, and apart repeats it.",
    "- **Feedback.** What the conversation says after a failure makes no difference to any policy, also not to that",
    '  of `rlef`: "wrong" alone, and praise for a try that failed, do as well. We think that the model cannot read the',
    "  environment's words.",
    "- **The prompt of bad attempts.** After training with `hindsight` success is the same under both prompts.",
    "- **Pairs.** A pair of `spar` costs more environment steps than one of `dpo_pairs`, four times as many at first.",
    "  As `dpo_pairs` learns, fewer attempts fail, so it has fewer pairs, and each costs more.",
)


def _tries(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    columns = {
        "one try": "pass_at_k/pass@1",
        "three tries, apart": f"pass_at_k/pass@{TRIES}",
        "in one conversation: told what the environment says": f"told/guided_success@{TRIES}",
        'told "wrong"': f"told/unguided_success@{TRIES}",
        f'told "{_WRONG_FEEDBACK}", which is not so': f"misled/guided_success@{TRIES}",
    }
    lines = [
        "## Within three tries",
        "",
        f"| policy | seeds | {' | '.join(columns)} |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for method in ("rlvr", "rlef", "ufo"):
        if found := results.get(method):
            trained = [spread([one["evaluations"][-1].get(name) for one in found]) for name in columns.values()]
            lines.append(f"| `{method}` | {len(found)} | {' | '.join(trained)} |")
    if found := results.get("rlvr"):
        untrained = [spread([one["evaluations"][0].get(name) for one in found]) for name in columns.values()]
        lines.append(f"| before training | {len(found)} | {' | '.join(untrained)} |")
    return [*lines, ""]


def _hindsight(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    found = results.get("hindsight", ())
    lines = [
        "## `hindsight` under its two prompts",
        "",
        "| | seeds | deployed prompt | prompt of bad attempts |",
        "|---|---|---|---|",
    ]
    for title, place in (("before training", 0), ("after", -1)):
        points = [one["evaluations"][place] for one in found]
        values = [spread([point.get(name) for point in points]) for name in ("success", "bad/success")]
        lines.append(f"| {title} | {len(points)} | {' | '.join(values)} |")
    return [*lines, ""]


def _cost(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    lines = ["## What a preference pair costs", ""]
    lines += [
        "| method | seeds | steps | pairs | environment steps per pair | sampled tokens per pair |",
        "|---" * 6 + "|",
    ]
    for method in PAIRS:
        found = results.get(method, ())
        for title, place in (("first 20", 0), ("last 20", -1)):
            windows = [one["pairs"][place] for one in found]
            names = ("pairs", "environment_steps_per_pair", "sampled_tokens_per_pair")
            values = [spread([window[name] for window in windows]) for name in names]
            lines.append(f"| `{method}` | {len(found)} | {title} | {' | '.join(values)} |")
    return lines


def spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{fmean(known):.2f} ({min(known):.2f} – {max(known):.2f})" if known else "-"


def main() -> None:
    results: dict[str, list[Mapping[str, Any]]] = {}
    for case in CASES:
        file = RESULTS / f"{case}.json"
        if file.exists():
            result = json.loads(file.read_text())
            results.setdefault(result["method"], []).append(result)
    (RESULTS / "predictions.md").write_text(page(results))
    print((RESULTS / "predictions.md").read_text())


if __name__ == "__main__":
    main()
