"""Checks of an environment's description and of its lists of tasks."""

from __future__ import annotations

import json
import math
import re
from functools import partial
from typing import Any

from mulligan.conformance.env.game import SPLITS, Game
from mulligan.conformance.report import Suite, Violation, demand
from mulligan.conformance.target import all_pages
from mulligan.env.v1 import env_service_pb2 as pb

suite: Suite[Game] = Suite()
LISTED = 2000  # tasks of a split that are checked
_SHOWN = 3  # tasks with choices of which the observation is checked
_CHOICE = re.compile(r"[A-Z]\. ")
_PLACEHOLDERS = {
    "solver": (),
    "reflection_system": (),
    "reflection": ("{trace}", "{feedback}"),
    "trace_turn": ("{observation}", "{action}"),
    "retry": ("{trace}", "{feedback}"),
    "try_again": (),
}


@suite.check("ListEnvironments", "limits, counts and players are valid numbers")
async def numbers(game: Game) -> None:
    game.available()
    info = game.info
    demand(info.max_steps >= 1, "max_steps is at least 1", f"max_steps is {info.max_steps}")
    demand(math.isfinite(info.max_reward), "max_reward is finite", f"max_reward is {info.max_reward}")
    demand(
        info.player_count >= 1,
        "player_count is at least 1: one agent is one player",
        f"player_count is {info.player_count}",
    )
    counts = (info.train_task_count, info.test_task_count)
    demand(min(counts) >= 0, "task counts are not negative", f"the counts are {counts}")


@suite.check("ListEnvironments", "each prompt is there and has its placeholders")
async def prompts(game: Game) -> None:
    game.available()
    for name, placeholders in _PLACEHOLDERS.items():
        text = getattr(game.info.prompts, name)
        demand(bool(text), f"prompts.{name} is not empty", f"prompts.{name} is empty")
        missing = [placeholder for placeholder in placeholders if placeholder not in text]
        demand(not missing, f"prompts.{name} contains {' and '.join(missing)}", f"prompts.{name} is {text!r:.200}")


@suite.check("ListEnvironments", "tools have a name and a JSON schema of an object")
async def tools(game: Game) -> None:
    names = [tool.name for tool in game.info.tools]
    demand(all(names) and len(set(names)) == len(names), "each tool has a name of its own", names)
    for tool in game.info.tools:
        try:
            schema: Any = json.loads(tool.parameters)
        except ValueError as error:
            raise Violation(f"parameters of {tool.name!r} are JSON", f"{tool.parameters!r}: {error}") from None
        an_object = isinstance(schema, dict) and schema.get("type") == "object"
        demand(an_object, f'parameters of {tool.name!r} are a JSON schema of type "object"', tool.parameters)


async def walk(game: Game, split: Any, size: int) -> tuple[list[pb.TaskInfo], bool]:
    """The tasks of a split, at most LISTED, and whether there are no more."""
    tasks: list[pb.TaskInfo] = []
    limit = size or 100
    async for page in all_pages(partial(game.page, split, size)):
        demand(len(page.tasks) <= limit, f"a page of at most {limit} tasks", f"{len(page.tasks)} tasks")
        tasks += page.tasks
        if page.next_page_token and len(tasks) >= LISTED:
            return tasks, False
    return tasks, True


def _split(split: Any) -> str:
    return str(pb.Split.Name(split))


@suite.check("ListTasks", "page by page it lists as many tasks as it counts, each in its split")
async def whole(game: Game) -> None:
    for split, count in zip(SPLITS, (game.info.train_task_count, game.info.test_task_count), strict=True):
        tasks, all_of_them = await walk(game, split, 50)
        if all_of_them:
            demand(
                len(tasks) == count,
                f"{count} tasks in {_split(split)}, as EnvironmentInfo says",
                f"it lists {len(tasks)}",
            )
        else:
            demand(
                count >= len(tasks), f"{_split(split)} has at least as many tasks as it lists", f"its count is {count}"
            )
        for task in tasks:
            demand(task.split == split, f"the split of each task is {_split(split)}, which was asked for", task)
            demand(math.isfinite(task.difficulty), "a difficulty is a finite number", task)


@suite.check("ListTasks", "no task is listed twice, and none in both splits")
async def once(game: Game) -> None:
    ids = [task.task_id for split in SPLITS for task in (await walk(game, split, 1000))[0]]
    wrong = [task_id for task_id in ids if not 0 < len(task_id) <= 200]
    demand(
        not wrong, "a task id has 1 to 200 characters", ", ".join(f"{one[:60]!r} has {len(one)}" for one in wrong[:3])
    )
    twice = sorted({task_id for task_id in ids if ids.count(task_id) > 1}) if len(set(ids)) < len(ids) else []
    demand(not twice, "each task is listed once, in one split", f"{', '.join(twice[:5])} more than once")


@suite.check("ListTasks", "tags that evaluations read have the values that the contract names")
async def tags(game: Game) -> None:
    tasks = [task for split in SPLITS for task in (await walk(game, split, 1000))[0]]
    for task in tasks:
        if "answerable" in task.tags:
            known = task.tags["answerable"] in ("true", "false")
            demand(known, "the tag `answerable` is true or false", task)
        if "choices" in task.tags:
            number = task.tags["choices"]
            demand(number.isdecimal() and int(number) > 1, "the tag `choices` is a number above 1", task)
        both = bool(task.tags.get("context")) == bool(task.tags.get("question"))
        demand(both, "a task with one of the tags `context` and `question` has the other, too", task)
    if game.info.unavailable:
        return
    for task in [task for task in tasks if "choices" in task.tags][:_SHOWN]:
        lines = (await game.start(task.task_id)).begun.observation.splitlines()
        letters = [line[0] for line in lines if _CHOICE.match(line)]
        expected = [chr(ord("A") + number) for number in range(int(task.tags["choices"]))]
        wanted = f"the first observation of a task with {len(expected)} `choices` has a line for each, from `A. ` on"
        demand(letters[-len(expected) :] == expected, wanted, "\n".join(lines)[:400])


@suite.check("ListTasks", "pages of any size list the same tasks in the same order")
async def sizes(game: Game) -> None:
    for split in SPLITS:
        expected = [task.task_id for task in (await game.page(split, 1000)).tasks]
        few = expected[:20]
        default = [task.task_id for task in (await game.page(split, 0)).tasks]
        demand(len(default) <= 100, "page_size 0 means 100", f"{len(default)} tasks")
        demand(default == expected[: len(default)], "the same order under page_size 0 and 1000", default[:5])
        for size in (1, 7):
            found: list[str] = []
            async for page in all_pages(partial(game.page, split, size)):
                demand(len(page.tasks) <= size, f"a page of at most {size} tasks", f"{len(page.tasks)} tasks")
                found += [task.task_id for task in page.tasks]
                if len(found) >= len(few):
                    break
            same = found[: len(few)] == few
            demand(same, f"pages of {size} list the tasks that a page of 1000 does", f"{found[:5]}, not {few[:5]}")


@suite.check("ListTasks", "a page token that it did not make is INVALID_ARGUMENT BAD_PAGE_TOKEN")
async def bad_tokens(game: Game) -> None:
    for token in ("no such token", "é🧊", "\x00", "bnVsbA=="):
        request = pb.ListTasksRequest(environment=game.name, split=pb.SPLIT_TRAIN, page_token=token)
        await game.session.refused("ListTasks", request, "INVALID_ARGUMENT", "BAD_PAGE_TOKEN")
