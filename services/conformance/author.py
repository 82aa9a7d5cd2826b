"""For the author of an environment: checks of the class itself, and titles and hints for the checks of the server."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, get_type_hints

from pydantic import TypeAdapter, ValidationError

from mulligan.conformance.env import episodes, forks, hostile, listing, play
from mulligan.conformance.env.game import EnvOptions
from mulligan.conformance.replay import ReplayFailed, play_elsewhere
from mulligan.conformance.replay import play as play_here
from mulligan.conformance.report import NotApplicable, Suite, Violation, demand
from mulligan.env.base import Environment, EnvironmentInfo, PromptSet, Split, TaskInfo

SUITE: Suite[Made]
_ID_CHARACTERS = 200  # as in the contract
_ORDINARY = ("```Up```", "[0]", "1", "yes", "I am not sure.")


@dataclass(frozen=True, slots=True)
class Made:
    """An environment, and the settings that it was made with."""

    kind: str
    settings: Mapping[str, Any]
    environment: Environment
    options: EnvOptions

    @property
    def info(self) -> EnvironmentInfo:
        return self.environment.info

    async def clean_up(self) -> None:
        """There is nothing to undo."""

    def hint(self, body: Any) -> str:
        return WORDS[body].hint if body in WORDS else ""


class Words(NamedTuple):
    title: str
    hint: str = ""


SUITE = Suite()


async def listed(made: Made, split: Split, offset: int, limit: int) -> list[TaskInfo]:
    """The tasks that list_tasks returns. Raises Violation if it raises."""
    try:
        return [*await asyncio.to_thread(made.environment.list_tasks, split, offset, limit)]
    except Exception as error:  # noqa: BLE001 - an environment may raise anything
        asked = f"list_tasks({str(split)!r}, {offset}, {limit})"
        raise Violation("list_tasks returns tasks", f"{asked} raised {type(error).__name__}: {error}") from None


@SUITE.check("", "info is an EnvironmentInfo with values of the declared types")
async def typed_info(made: Made) -> None:
    kind = type(made.info)
    demand(isinstance(made.info, EnvironmentInfo), "info is an EnvironmentInfo", f"info is of type {kind.__name__}")
    demand(
        isinstance(made.info.prompts, PromptSet), "info.prompts is a PromptSet", f"{type(made.info.prompts).__name__}"
    )
    for holder, prefix in ((made.info, "info"), (made.info.prompts, "info.prompts")):
        hints = get_type_hints(type(holder))
        for field in fields(holder):
            value = getattr(holder, field.name)
            try:
                TypeAdapter(hints[field.name]).validate_python(value, strict=True)
            except ValidationError as error:
                wrong = error.errors()[0]["msg"]
                raise Violation(
                    f"{prefix}.{field.name}: {hints[field.name]}", f"{prefix}.{field.name}: {wrong}"
                ) from None
    demand(set(made.info.task_counts) == set(Split), "info.task_counts has both splits", f"{made.info.task_counts}")
    demand(bool(made.info.description.strip()), "info.description says what it is", "info.description is empty")


@SUITE.check("", "list_tasks(split, offset, limit) gives slices of one list")
async def slices(made: Made) -> None:
    for split in Split:
        count = made.info.task_counts[split]
        whole = await listed(made, split, 0, 40)
        for task in whole:
            demand(isinstance(task, TaskInfo), "list_tasks returns TaskInfo", f"a {type(task).__name__} is in the list")
            texts = all(isinstance(text, str) for pair in task.tags.items() for text in pair)
            demand(texts, "the tags of a task are texts by name", f"{task.task_id}: {task.tags}")
        expected = f"{min(count, 40)} tasks, as info.task_counts says"
        demand(len(whole) == min(count, 40), expected, f"list_tasks({str(split)!r}, 0, 40) has {len(whole)} tasks")
        for offset, limit in ((0, 1), (1, 3), (7, 5), (max(len(whole) - 2, 0), 2)):
            part = await listed(made, split, offset, limit)
            asked = f"list_tasks({str(split)!r}, {offset}, {limit})"
            came = f"{asked} gave {[task.task_id for task in part]}"
            demand(
                part == whole[offset : offset + limit], f"elements {offset} to {offset + limit - 1} of the list", came
            )
        beyond = await listed(made, split, count, 5)
        demand(
            not beyond, "nothing after the last task", f"list_tasks({str(split)!r}, {count}, 5) has {len(beyond)} tasks"
        )


@SUITE.check("", "there are tasks to train on, and tasks to test with")
async def both_splits(made: Made) -> None:
    for split, missing in ((Split.TRAIN, "no training tasks"), (Split.TEST, "no test tasks")):
        count = made.info.task_counts[split]
        said = f"there are {missing}: info.task_counts[Split.{split.name}] is {count}"
        demand(count > 0, f"at least one task in Split.{split.name}", said)


@SUITE.check("", "task ids are text of 1 to 200 characters")
async def ids(made: Made) -> None:
    for split in Split:
        try:
            tasks = await listed(made, split, 0, listing.LISTED)
        except Violation:  # told above
            raise NotApplicable("the tasks cannot be listed") from None
        for task in tasks:
            wrong = _wrong_id(getattr(task, "task_id", None))
            demand(not wrong, "TaskInfo.task_id, such as train/00001", f"in Split.{split.name}, {wrong}")


def _wrong_id(task_id: object) -> str:
    """What is wrong with the id; empty if nothing."""
    if not isinstance(task_id, str):
        return f"the id {task_id!r:.200} is a {type(task_id).__name__}, not text"
    if not 1 <= len(task_id) <= _ID_CHARACTERS:
        shown = f"{task_id[:60]!r}…" if task_id else "''"
        return f"the id {shown} has {len(task_id)} characters"
    try:
        task_id.encode()
    except UnicodeError as error:
        return f"the id {task_id!a} cannot be sent: {error}"
    return ""


@SUITE.check("", "a task looks the same in another process")
async def other_process(made: Made) -> None:
    tasks = [task for split in Split for task in await listed(made, split, 0, 3)]
    if not tasks:
        raise NotApplicable("it lists no tasks")
    actions = [*(made.options.known or _ORDINARY)][: max(made.info.max_steps, 1)] if made.info.deterministic else []
    plays = [(task.task_id, actions) for task in tasks]
    here = await asyncio.to_thread(play_here, made.environment, plays)
    try:
        there = await asyncio.to_thread(play_elsewhere, made.kind, made.settings, plays)
    except ReplayFailed as error:
        raise Violation(
            "it can be made in another process", f"in another process it could not be played: {error}"
        ) from None
    if not made.info.deterministic:
        raise NotApplicable("it does not say that it is deterministic; it can be made and played there")
    for (task_id, _), one, other in zip(plays, here, there, strict=True):
        for number, (mine, theirs) in enumerate(zip(one, other, strict=False)):
            if mine != theirs:
                when = f"after step {number - 1}" if number else "at the start"
                parts = (f"{key} {mine[key]!r:.200} here and {theirs.get(key)!r:.200} there" for key in mine)
                raise Violation(
                    "a task is reproducible from its id alone", f"task {task_id!r}, {when}: {', '.join(parts)}"
                )


@SUITE.check("", "each step says how the action was read")
async def readings(made: Made) -> None:
    tasks = await listed(made, Split.TRAIN, 0, 3)
    actions = [*(made.options.known or _ORDINARY)][: max(made.info.max_steps, 1)]
    for seen in await asyncio.to_thread(play_here, made.environment, [(task.task_id, actions) for task in tasks]):
        if "error" in seen[-1]:
            raise NotApplicable(f"an episode raised {seen[-1]['error']}: see below")
        for number, step in enumerate(seen[1:]):
            demand(
                bool(step["action"]), 'StepResult.action, such as "Up" or "invalid"', f"it is empty in step {number}"
            )


_SEED = "Draw everything random from a generator that is seeded with the task id, or set deterministic=False."
_STATE = "Keep what changes in the episode object; share nothing between episodes that is written."
WORDS: dict[Any, Words] = {
    typed_info: Words("", "See EnvironmentInfo in services/common/types.py."),
    slices: Words(
        "", "tasks[offset : offset + limit] of a list that never changes will do; info.task_counts has its length."
    ),
    both_splits: Words(
        "", "A run trains on one split and is evaluated on the other. task_counts counts what list_tasks lists."
    ),
    ids: Words("", "Shorten an id that is made of the task's content, with a hash for instance."),
    other_process: Words("", f"{_SEED} hash() of a text differs between processes."),
    readings: Words("", "StepResult.action is shown to whoever reflects on the attempt."),
    listing.numbers: Words("info has limits, counts and players that make sense"),
    listing.prompts: Words(
        "info.prompts has each text, with its placeholders",
        "mulligan.env.generic_prompts makes them for any task.",
    ),
    listing.tools: Words(
        "each tool has a name, and a JSON schema of an object as its parameters",
        'parameters is text: \'{"type": "object", "properties": {}}\'.',
    ),
    listing.whole: Words("list_tasks lists as many tasks as info.task_counts says, each in its split"),
    listing.once: Words(
        "each task is listed once, in one split",
        "Training must never see a task of the test split: keep the ids apart.",
    ),
    listing.sizes: Words("list_tasks gives the same tasks in the same order, however many are asked for"),
    episodes.listed_tasks_start: Words("tasks that are listed can be started"),
    episodes.unknown_task: Words(
        "start raises UnknownTask for an id that is not one of its tasks",
        "from mulligan.env import UnknownTask; look the id up before anything else.",
    ),
    episodes.second_attempt: Words("a task begins with the same observation each time", _SEED),
    episodes.side_by_side: Words("episodes side by side do not disturb each other", _STATE),
    play.unbroken: Words(
        "ordinary actions do not raise", "An action that cannot be read is answered with a StepResult that says so."
    ),
    play.ends: Words(
        "an episode ends after info.max_steps steps at the latest",
        "Return done=True, truncated=True on step number max_steps, unless the episode reaches its own end there.",
    ),
    play.rewards: Words("rewards are finite and add up to at most info.max_reward"),
    play.of_players: Words(
        "players and rewards are as info.player_count says",
        "With several players each StepResult has `player` and a reward of each in `rewards`.",
    ),
    play.tools: Words("StepResult.tool is one of info.tools, or empty"),
    play.deterministic: Words("the same task and actions lead to the same observations and rewards", _SEED),
    forks.exact: Words(
        "a fork plays on exactly as the episode does", "Copy all state, that of random generators included."
    ),
    forks.independent: Words("what is played in a fork changes nothing in the episode", _STATE),
    forks.outlives: Words("a fork goes on when the episode is ended", _STATE),
    hostile.random_actions: Words(
        "no text makes step raise or hang",
        "Agents write anything. What cannot be read is an invalid action: return a StepResult that says so.",
    ),
    hostile.random_rules: Words("whatever an agent writes, episodes go as they should"),
    hostile.megabyte: Words("an action of a megabyte is an action, too"),
}
