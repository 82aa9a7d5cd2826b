"""Checks with random and hostile actions: agents may write anything."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import chain, cycle

from mulligan.conformance.env import rules
from mulligan.conformance.env.game import ORDINARY, SIDE_BY_SIDE, Game, PlayedEpisode
from mulligan.conformance.report import Suite, Violation, demand
from mulligan.conformance.target import gathered
from mulligan.env.v1 import env_service_pb2 as pb

suite: Suite[Game] = Suite()
_MEGABYTE = 2**20
_PIECES = (
    *("```", "`", "\\boxed{", "}", "{", "[", "]", "(", ")", "<", ">", "</", "<tool_call>", "</tool_call>"),
    *("<function_calls>", "</function_calls>", "[TOOL_CALLS]", '{"name": ', '"arguments": ', "null", "true", "NaN"),
    *("\x00", "\n", "\r\n", "\t", "\x1b[2J", "\u202e", "\u200b", "\ufeff", "\ufffd", "é", "√", "\U0001f9ca", "𝕬"),
    *("{trace}", "{observation}", "%s", "$HOME", "'; DROP TABLE tasks; --", "../../etc/passwd", "__import__('os')"),
    *("Up", "0", "-1", "1e999", "99999999999999999999", "yes", "<|im_end|>", "<|endoftext|>", "\\", '"', "'"),
)
FIXED = (
    *("", " ", "\x00", "\n" * 100, "```", "``````", "null", "[]", "{}", '""', "\\boxed{}", "\\boxed{" * 50),
    *("[" * 5000, "{" * 5000, '{"a":' * 2000 + "1" + "}" * 2000, "(" * 5000 + ")" * 5000, "\\" * 5000, "`" * 5000),
    *("<tool_call>" * 500, "<tool_call>{</tool_call>", '<tool_call>{"name": 5, "arguments": []}</tool_call>'),
    *('<tool_call>{"name": "no_such_tool", "arguments": {}}</tool_call>', "<tool_call>null</tool_call>"),
    *('{"name": "' + "x" * 5000 + '", "arguments": {}}', "9" * 5000, "-" * 5000, "1" + "0" * 400, "e\u0301" * 2000),
)


def hostile(chance: random.Random, game: Game) -> str:
    """One action: a fixed one, random text, pieces of formats, or a call of one of the environment's tools."""
    kinds: list[Callable[[], str]] = [
        lambda: chance.choice(FIXED),
        lambda: chance.choice(tuple(game.options.known) or ORDINARY),
        lambda: "".join(chance.choices(_PIECES, k=chance.randint(1, 30))),
        lambda: "".join(chr(_code_point(chance)) for _ in range(chance.randint(0, 200))),
    ]
    if game.info.tools:
        name = chance.choice(game.info.tools).name
        arguments = chance.choice(("{}", "[]", "null", '"x"', '{"x": null}', '{"query": 5}', '{"query": ""}', "{"))
        kinds.append(lambda: f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>')
    return chance.choice(kinds)()


def _code_point(chance: random.Random) -> int:
    """Any character of UTF-8: no surrogates."""
    code = chance.choice((chance.randint(0, 127), chance.randint(0, 0x24FF), chance.randint(0, 0x10FFFF)))
    return code if not 0xD800 <= code <= 0xDFFF else 0xFFFD


async def _play(game: Game, actions: Iterator[str], tasks: Iterator[str]) -> list[PlayedEpisode]:
    """Plays all actions, in as many episodes as needed."""
    played: list[PlayedEpisode] = []
    for action in actions:
        if not played or played[-1].over or len(played[-1].steps) >= game.info.max_steps:
            if played:
                await game.end(played[-1])
            played.append(await game.start(next(tasks)))
        await played[-1].step(action)
    return played


async def plays(game: Game) -> list[PlayedEpisode]:
    """Episodes with random and hostile actions. They are played once."""
    if game.hostile is None:
        actions = chain(FIXED, (hostile(game.random, game) for _ in range(game.options.actions)))
        tasks = cycle([task.task_id for task in await game.tasks(100)])
        found = await gathered(_play(game, actions, tasks) for _ in range(SIDE_BY_SIDE))
        game.hostile = [episode for episodes in found for episode in episodes]
    return game.hostile


def _held(game: Game, episodes: list[PlayedEpisode], rule: rules.Rule, demanded: str) -> None:
    for episode in episodes:
        for wrong in rule(game.info, episode):
            last = ", ".join(repr(action[:100]) for action in episode.actions[-3:])
            came = f"in an episode of task {episode.task_id!r}, {wrong}"
            raise Violation(demanded, came, f"its last actions: {last}")


@suite.check("StepEpisode", "random and hostile actions break neither an episode nor the server")
async def random_actions(game: Game) -> None:
    for rule in (rules.unbroken, rules.failure):
        _held(game, await plays(game), rule, "any text is an action, if an invalid one: no ENV_ERROR or TIMEOUT")
    await game.session.ask("ListEnvironments", pb.ListEnvironmentsRequest())


@suite.check("StepEpisode", "under random and hostile actions, too, episodes go as they should")
async def random_rules(game: Game) -> None:
    """The rules that `play.py` checks one by one."""
    for rule in rules.ALL:
        if rule not in (rules.unbroken, rules.failure):
            _held(game, await plays(game), rule, (rule.__doc__ or "").strip())


@suite.check("StepEpisode", "an action of a megabyte is an action")
async def megabyte(game: Game) -> None:
    for filling in ("x", "`", "[", "√"):
        episode = await game.start()
        step = await episode.step(filling * (_MEGABYTE // len(filling.encode())))
        for wrong in rules.unbroken(game.info, episode):
            raise Violation("at most 4 MiB in UTF-8 are an action", wrong)
        length = f"{len(step.observation)} characters"
        demand(len(step.observation) < _MEGABYTE * 4, "an observation that can be read", length)
        await game.end(episode)
