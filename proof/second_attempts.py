"""Why ERL's second attempts succeed less often late in a run: three runs of the demo, and what their journals say.

In 3×3 FrozenLake a reflection is a legend of four lines. Here it is right, wrong (four letters for four words, but not
all right) or broken (anything else). At each evaluation the policy also plays the test boards with the right legend in
its system prompt (protocol `guided`), so that the boards are the same each time.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from mulligan.common.experience import Experience
from mulligan.env.envs.frozenlake.boards import LakeBoard
from mulligan.trainer.folder import RunFolder
from mulligan.trainer.journal import journal_file, journaled_steps, read_experiences
from proof.methods import ARMS, STEPS, chosen, train

RIGHT = {"player": "A", "goal": "B", "hole": "C", "floor": "D"}
LEGEND = "\n".join(f"{letter} {word}" for word, letter in RIGHT.items())
WINDOW = 20  # steps


def measure(seed: int, folder: Path) -> dict[str, Any]:
    """One run with the settings of `methods/erl-SEED`, and its journal in windows of 20 steps."""
    rate = chosen("erl", ARMS["erl"])["rate"]
    protocol = json.dumps(LEGEND)
    settings = [f"steps={STEPS}", f"seed={seed}", f"optimizer.learning_rate={rate}", f"evaluation.every={WINDOW}"]
    settings += [f'evaluation.protocols=[{{name = "guided", text = {protocol}}}]']
    run = train(ARMS["erl"], settings, folder)
    summary = json.loads((run / "summary.json").read_text())
    points = [
        {"step": point["step"], "plain": point["success"], "with_right_legend": point["metrics"]["guided/success"]}
        for point in summary["evaluations"]
    ]
    journal = RunFolder(run).journal
    windows: defaultdict[int, list[Experience]] = defaultdict(list)
    for step in journaled_steps(journal):
        windows[step // WINDOW * WINDOW] += read_experiences(journal_file(journal, step))
    return {
        "seed": seed,
        "rate": rate,
        "test_boards": points,
        "windows": [{"from_step": step, **window(experiences)} for step, experiences in sorted(windows.items())],
    }


def window(experiences: Sequence[Experience]) -> dict[str, Any]:
    """What the experiences of some steps say of reflections, memory and boards. Shares are null where there is nothing
    to share."""
    tried = [one for one in experiences if one.sample("second") and one.sample("reflection")]
    kinds = {one.experience_id: kind(one["reflection"].text) for one in tried}
    shown = {one.experience_id: memory(one) for one in tried}
    by_reflection, by_memory, by_path = (defaultdict(list) for _ in range(3))
    for one in tried:
        is_solved = solved(one, "second")
        by_reflection[kinds[one.experience_id]].append(is_solved)
        by_memory[kind(shown[one.experience_id])].append(kinds[one.experience_id] == "right")
        if kinds[one.experience_id] == "right":
            by_path[path(one)].append(is_solved)
    return {
        "first_attempts": len(experiences),
        "first_success": share(solved(one, "first") for one in experiences),
        "second_attempts": len(tried),
        "second_success": share(solved(one, "second") for one in tried),
        "reflections": dict(Counter(kinds.values())),
        "second_success_by_reflection": _shares(by_reflection),
        "memory_shown": dict(Counter(map(kind, shown.values()))),
        "right_reflections_by_memory": _shares(by_memory),
        "reflections_equal_to_memory": share(one["reflection"].text == shown[one.experience_id] for one in tried),
        "remembered": dict(Counter(kinds[one.experience_id] for one in tried if solved(one, "second"))),
        "moves_needed": fmean(map(path, experiences)) if experiences else None,
        "moves_needed_in_second_attempts": fmean(map(path, tried)) if tried else None,
        "second_success_with_right_legend_by_moves_needed": _shares(by_path),
        "second_attempts_with_right_legend_by_moves_needed": {
            str(moves): len(solved) for moves, solved in sorted(by_path.items())
        },
    }


def kind(legend: str) -> str:
    """ "right", "wrong", "broken", or "none" for the text that stands for an empty memory."""
    if legend == "nothing":
        return "none"
    pairs = [line.split(" ") for line in legend.splitlines()]
    if [pair[1:] for pair in pairs] != [[word] for word in RIGHT] or len({pair[0] for pair in pairs}) < len(pairs):
        return "broken"
    return "right" if [pair[0] for pair in pairs] == list(RIGHT.values()) else "wrong"


def memory(experience: Experience) -> str:
    """What the reflection was shown of the memory: the request's text after trace and feedback."""
    request = experience["reflection"].turns[0].observation
    return request.rpartition(f"\n{experience['first'].feedback}\n")[2]


def path(experience: Experience) -> int:
    """Moves from the player to the goal on the first board. The environment only has boards with a way."""
    rows = experience["first"].turns[0].observation.splitlines()
    moves = LakeBoard(tuple(row.replace("\t", "") for row in rows)).shortest_path()
    assert moves is not None
    return moves


def share(values: Iterable[bool]) -> float | None:
    known = list(values)
    return round(fmean(known), 4) if known else None


def _shares(groups: Mapping[Any, list[bool]]) -> dict[str, float | None]:
    return {str(name): share(values) for name, values in sorted(groups.items())}


def solved(experience: Experience, role: str) -> bool:
    """False also without a sample of the role."""
    sample = experience.sample(role)
    return sample is not None and sample.reward is not None and sample.reward >= 1


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    f"second-attempts-{seed}": partial(measure, seed) for seed in range(3)
}
