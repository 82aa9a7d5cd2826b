"""Checks of StartEpisodes: the same as StartEpisode, for many episodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from google.rpc import code_pb2

from mulligan.conformance.env.game import Game
from mulligan.conformance.env.server import starts_together
from mulligan.conformance.report import NotApplicable, Suite, demand
from mulligan.env.v1 import env_service_pb2 as pb

suite: Suite[Game] = Suite()
_STARTED = 4


async def started(game: Game, starts: Sequence[pb.StartEpisodeRequest], max_wait: float | None = None) -> list[Any]:
    """The items. Raises NotApplicable where the server leaves the call out, or has no place for them all."""
    await starts_together(game.session)
    request = pb.StartEpisodesRequest(starts=starts)
    if max_wait is not None:
        request.max_wait.FromNanoseconds(int(max_wait * 1e9))
    items = list((await game.session.ask("StartEpisodes", request)).items)
    demand(len(items) == len(starts), f"{len(starts)} items, one per start", f"{len(items)}", request)
    for item in items:
        if item.error.reason == "CAPACITY_REACHED":
            demand(item.error.HasField("retry_delay"), "CAPACITY_REACHED with a retry_delay", item, request)
            raise NotApplicable("the server is full: its places are taken by others")
    return items


async def several(game: Game) -> list[pb.StartEpisodeRequest]:
    tasks = [task.task_id for task in await game.tasks(_STARTED)]
    return [game.start_request(tasks[n % len(tasks)]) for n in range(_STARTED)]


@suite.check("StartEpisodes", "items come in the order of the request, each with its episode or its error")
async def in_order(game: Game) -> None:
    starts = await several(game)
    for place in (1, len(starts) + 1):
        starts.insert(place, game.start_request(starts[0].task_id))
        starts[place].environment = f"no-such-environment-{uuid4()}"
    items = await started(game, starts)
    expected = ["episode", "error", *["episode"] * (_STARTED - 1), "error"]
    kinds = [item.WhichOneof("result") for item in items]
    demand(kinds == expected, f"{expected}", kinds, pb.StartEpisodesRequest(starts=starts))
    for item in (items[1], items[-1]):
        right = (item.error.code, item.error.reason) == (code_pb2.NOT_FOUND, "UNKNOWN_ENVIRONMENT")
        demand(right, f"an error with code {code_pb2.NOT_FOUND} (NOT_FOUND) and reason UNKNOWN_ENVIRONMENT", item.error)
    await game.place(game.start_request(starts[0].task_id, starts[1].episode_id))


@suite.check("StartEpisodes", "each item is the episode that StartEpisode gives under that id, and it can be played")
async def same_episodes(game: Game) -> None:
    starts = await several(game)
    for start, item in zip(starts, await started(game, starts), strict=True):
        demand(item.WhichOneof("result") == "episode", "an episode for each task that is listed", item, start)
        alone = await game.session.ask("StartEpisode", start)
        same = (item.episode.observation, item.episode.player) == (alone.observation, alone.player)
        demand(same, f"the episode of this id, {alone}", item.episode, start)
        lease = item.episode.lease.ToTimedelta().total_seconds()
        demand(lease > 0, "a lease of more than 0 seconds", item.episode, start)
        step = pb.StepEpisodeRequest(episode_id=start.episode_id, action=game.moves(1)[0])
        await game.session.ask("StepEpisode", step)


@suite.check(
    "StartEpisodes", "a repeated item returns the first answer; an item that is not done within max_wait is pending"
)
async def repeated(game: Game) -> None:
    starts = await several(game)
    at_once = await started(game, starts, 0.0)
    kinds = {item.WhichOneof("result") for item in at_once}
    demand(kinds <= {"episode", "pending"}, "an episode, or pending, for each item", kinds)
    waited = await started(game, starts)
    again = await started(game, starts, 60.0)
    for one, other, third, start in zip(at_once, waited, again, starts, strict=True):
        demand(other.WhichOneof("result") == "episode", "without max_wait each item has its answer", other, start)
        stored = third == other and (one == other or one.WhichOneof("result") == "pending")
        demand(stored, f"the first answer, {other}", third if third != other else one, start)


@suite.check("StartEpisodes", "an id that is in use for another task is EPISODE_CONFLICT for its item alone")
async def conflict(game: Game) -> None:
    tasks = await game.tasks(2)
    if len(tasks) < 2:
        raise NotApplicable("the environment has only one task")
    used = await game.start(tasks[0].task_id)
    starts = [game.start_request(tasks[1].task_id, used.episode_id), game.start_request(tasks[1].task_id)]
    items = await started(game, starts)
    kinds = [item.WhichOneof("result") for item in items]
    demand(kinds == ["error", "episode"], "['error', 'episode']", kinds, pb.StartEpisodesRequest(starts=starts))
    right = (items[0].error.code, items[0].error.reason) == (code_pb2.ALREADY_EXISTS, "EPISODE_CONFLICT")
    demand(right, "ALREADY_EXISTS EPISODE_CONFLICT", items[0].error, starts[0])
