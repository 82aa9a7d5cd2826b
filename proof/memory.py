"""What a memory is worth where one attempt shows only part of the rules, and what becomes of one that was poisoned.

In `frozenlake-symbols` a failed attempt shows some of the eight symbols. The model `embedded-symbols` writes a legend
of those, and adds what the memory says of the others. No weights change, so the success of second attempts shows what
the memory is worth.

Two runs follow each other on one memory. Between them somebody poisons it: through the public API, with ten legends in
which every symbol has a wrong meaning, and whose claimed rewards go from -1 to 1.

`python -m proof.memory` writes the page and the chart from the results that are there.
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from mulligan.cli.recipes import recipe_file
from mulligan.common.channel import Endpoint
from mulligan.common.experience import Experience
from mulligan.common.reflections import Provenance, StoredReflection
from mulligan.memory.client import MemoryClient
from mulligan.models.build import ROLES
from mulligan.models.many_symbols.measure import legend
from mulligan.testing.loop import Loop
from mulligan.testing.processes import ServiceProcesses
from mulligan.trainer.settings import RunSettings

MODEL = "embedded-symbols"
MEANINGS = dict(line.split(" ") for line in legend().split("\n"))  # by the letter
POISON = 10
WINDOW = 10  # steps
STEPS = 40  # of each run
SEEDS = 3
SCOPE = "shared"
RUNS = ("before", "after")
RESULTS = Path(__file__).resolve().parents[1] / "docs" / "proof"


@dataclass(frozen=True)
class Arm:
    title: str
    algorithm: Mapping[str, Any] = field(default_factory=dict)
    poisoned: bool = False


_BY_CLAIMS = {"memory_strategy": "top_gain", "memory_mix": [], "memory_entries": 1}
_LATEST = {"memory_strategy": "latest_success", "memory_mix": [], "memory_entries": 1}
_EPISODES = {"memory_writes": "none", "memory_episodes": True}
ARMS = {
    "off": Arm("no memory", {"memory_entries": 0}),
    "episodes": Arm("raw episodes only", _EPISODES),
    "latest": Arm("the latest success (the paper's)", _LATEST),
    "claims": Arm("the greatest claimed gain", _BY_CLAIMS),
    "evidence": Arm("evidence"),
    "latest-poisoned": Arm("the latest success (the paper's)", _LATEST, poisoned=True),
    "claims-poisoned": Arm("the greatest claimed gain", _BY_CLAIMS, poisoned=True),
    "evidence-poisoned": Arm("evidence", poisoned=True),
}


def wrong_legends(seed: int, count: int = POISON) -> list[str]:
    """Different ones, each with all letters, each letter with a wrong meaning."""
    rng = random.Random(f"poison {seed}")
    found: dict[str, None] = {}
    while len(found) < count:
        words = rng.sample([*MEANINGS.values()], len(MEANINGS))
        mixed = dict(zip(MEANINGS, words, strict=True))
        if not mixed.items() & MEANINGS.items():
            groups = ("".join(letter for letter in mixed if mixed[letter] == role) for role in ROLES)
            found[legend(" ".join(groups))] = None
    return [*found]


def right_share(text: str) -> float:
    """Of the eight symbols, those with a line that says what they mean."""
    return len(set(text.splitlines()) & {f"{letter} {word}" for letter, word in MEANINGS.items()}) / len(MEANINGS)


def measure(arm: Arm, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """`steps` of each run. Begins anew after an interruption."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    plain = tomllib.loads(recipe_file(Path("frozenlake-symbols")).read_text())
    plain |= {"steps": steps, "algorithm": plain["algorithm"] | {"memory_scope": SCOPE} | arm.algorithm}
    services = ServiceProcesses(folder)
    try:
        loop = Loop.start(services, folder / "loop", policy={"model": MODEL})
        runs = [RunSettings.model_validate(plain | {"seed": 2 * seed + half}) for half in range(len(RUNS))]
        return asyncio.run(_measure(loop, arm, runs)) | {"seed": seed, "steps": [steps] * len(RUNS)}
    finally:
        services.end()


async def _measure(loop: Loop, arm: Arm, runs: Sequence[RunSettings]) -> dict[str, Any]:
    memory = MemoryClient(Endpoint(loop.memory.address))
    poison: set[str] = set()
    try:
        for name, settings in zip(RUNS, runs, strict=True):
            if arm.poisoned and name != RUNS[0]:
                poison = await _poison(memory, settings)
            await loop.train(name, settings, seconds=3600)
        entries = {entry.reflection_id: entry for entry in await memory.list(SCOPE)}
    finally:
        await memory.close()
    size = WINDOW * runs[0].rollout.tasks_per_step * runs[0].rollout.rollouts_per_task
    windows = [
        window(experiences[start : start + size], entries, poison)
        for experiences in map(loop.experiences, RUNS)
        for start in range(0, len(experiences), size)
    ]
    return {
        "windows": windows,
        "entries": len(entries),
        "poison": [_entry(entries[identity]) for identity in sorted(poison)],
        "best": [_entry(one) for one in sorted(entries.values(), key=_proved, reverse=True)[:3]],
    }


async def _poison(memory: MemoryClient, settings: RunSettings) -> set[str]:
    """Returns the ids of the wrong legends."""
    claims = Provenance("poison", "poison", settings.environment, "train/00000", 0, -1.0, 1.0, success=True)
    wrong = wrong_legends(settings.seed)
    return {await memory.add(f"poison-{number}", SCOPE, text, claims) for number, text in enumerate(wrong)}


def window(
    experiences: Sequence[Experience], entries: Mapping[str, StoredReflection], poison: set[str]
) -> dict[str, Any]:
    """What some steps say of second attempts, reflections, and the entries that their reflectors were shown."""
    told = [one for one in experiences if one.sample("second")]
    shown = [entry for one in told for entry in one.memory_entry_ids]
    first = [one.memory_entry_ids[0] for one in told if one.memory_entry_ids]
    return {
        "first_attempts": len(experiences),
        "first_success": _mean([one["first"].reward == 1 for one in experiences if one["first"].reward is not None]),
        "second_attempts": len(told),
        "second_success": _second(told),
        "right_in_reflections": _mean([right_share(one["reflection"].text) for one in told]),
        "right_in_first_entry": _mean([right_share(entries[one].text) for one in first]),
        "poison_shown": _mean([one in poison for one in shown]),
        "poison_shown_first": _mean([one in poison for one in first]),
    }


def _second(experiences: Sequence[Experience]) -> float | None:
    attempts = [one.sample("second") for one in experiences]
    return _mean([one.reward == 1 for one in attempts if one is not None and one.reward is not None])


def _mean(values: Sequence[float]) -> float | None:
    return round(fmean(values), 4) if values else None


def _proved(entry: StoredReflection) -> float:
    return entry.uplift.lower if entry.uplift else -1.0


def _entry(entry: StoredReflection) -> dict[str, Any]:
    known = entry.uplift
    evidence = known and {
        "uses": [known.uses_shown, known.uses_left_out],
        "uplift": known.uplift,
        "interval": [known.lower, known.upper],
    }
    return {"status": str(entry.status), "right": right_share(entry.text), "evidence": evidence}


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    f"memory/{name}-{seed}": partial(measure, arm, seed, STEPS) for seed in range(SEEDS) for name, arm in ARMS.items()
}


def main() -> None:
    results = {name: _results(name) for name in ARMS}
    found = {name: runs for name, runs in results.items() if runs}
    (RESULTS / "memory.md").write_text(page(found))
    draw(RESULTS / "memory.png", found)


def _results(name: str) -> list[dict[str, Any]]:
    files = (RESULTS / "memory" / f"{name}-{seed}.json" for seed in range(SEEDS))
    return [json.loads(file.read_text()) for file in files if file.exists()]


def page(arms: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Means over the seeds, with their range."""
    lines = [
        "# What a memory is worth, and what a poisoned one does",
        "",
        "`python -m proof --only memory/` runs the cases without a result; `python -m proof.memory` writes this page.",
        "The environment is `frozenlake-symbols`, the model `embedded-symbols`, and no weights change. Figures are the",
        f"success of second attempts, the mean over the seeds (least – greatest), in {WINDOW} steps of 8 chains. Each",
        f"case is two runs of {STEPS} steps on one memory. Between them, a poisoned one gets {POISON} wrong legends",
        "that claim a gain of 2.",
        "",
        "| the memory shows | poisoned | seeds | end of the first run | begin of the second | its end | wrong legends "
        "among the entries shown, at its end | symbols right in reflections, at its end |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in arms.items():
        half = len(runs[0]["windows"]) // 2
        ends = [[run["windows"][place] for run in runs] for place in (half - 1, half, -1)]
        cells = [
            ARMS[name].title,
            "yes" if ARMS[name].poisoned else "no",
            str(len(runs)),
            *(told([one["second_success"] for one in end]) for end in ends),
            told([one["poison_shown"] for one in ends[-1]]) if ARMS[name].poisoned else "-",
            told([one["right_in_reflections"] for one in ends[-1]]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "![Success of second attempts over steps](memory.png)", "", "The wrong legends at the end:", ""]
    for name, runs in arms.items():
        if ARMS[name].poisoned:
            count = Counter(entry["status"] for run in runs for entry in run["poison"])
            lines.append(f"- {ARMS[name].title}: {', '.join(f'{number} {status}' for status, number in count.items())}")
    return "\n".join(lines) + "\n"


def told(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{fmean(known):.2f} ({min(known):.2f} – {max(known):.2f})" if known else "-"


def draw(path: Path, arms: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Success of second attempts by windows of steps: mean over seeds, and a band from the least to the greatest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = dict.fromkeys(arm.title for arm in ARMS.values())
    colors = {title: f"C{number}" for number, title in enumerate(titles)}
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), dpi=120, sharey=True)
    for axes, poisoned in zip(panels, (False, True), strict=True):
        for name, runs in arms.items():
            if ARMS[name].poisoned is not poisoned:
                continue
            columns = list(zip(*([one["second_success"] for one in run["windows"]] for run in runs), strict=True))
            places = [WINDOW * (number + 1) for number in range(len(columns))]
            title = ARMS[name].title
            (line,) = axes.plot(places, [fmean(column) for column in columns], label=title, color=colors[title])
            axes.fill_between(places, [*map(min, columns)], [*map(max, columns)], alpha=0.12, color=line.get_color())
        if poisoned:
            axes.axvline(STEPS, color="black", linestyle=":", linewidth=1)
        axes.set(xlabel="steps", ylim=(0, 1), title=f"Poisoned after {STEPS} steps" if poisoned else "Clean")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right", fontsize="small")
    panels[0].set_ylabel("success of second attempts")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
