"""Checks of how an episode begins and ends."""

from __future__ import annotations

import asyncio
from uuid import uuid4

from mulligan.conformance.env.game import SIDE_BY_SIDE, Game, difference
from mulligan.conformance.report import NotApplicable, Suite, demand
from mulligan.conformance.target import as_demanded, gathered
from mulligan.env.v1 import env_service_pb2 as pb

suite: Suite[Game] = Suite()
STARTED = 6  # tasks
LONGEST_LEASE = 5.0  # seconds that a check waits for


@suite.check("StartEpisode", "an environment that is unavailable says so: FAILED_PRECONDITION ENVIRONMENT_UNAVAILABLE")
async def unavailable(game: Game) -> None:
    if not game.info.unavailable:
        raise NotApplicable("the environment is available")
    request = game.start_request("a task")
    await game.session.refused("StartEpisode", request, "FAILED_PRECONDITION", "ENVIRONMENT_UNAVAILABLE")


@suite.check("StartEpisode", "tasks that are listed can be started, with a lease and a player")
async def listed_tasks_start(game: Game) -> None:
    tasks = await game.tasks(100)
    chosen = tasks[:2] + game.random.sample(tasks[2:], min(len(tasks) - 2, STARTED - 2)) if len(tasks) > 2 else tasks
    for task in chosen:
        episode = await game.start(task.task_id)
        lease = episode.begun.lease.ToTimedelta().total_seconds()
        demand(lease > 0, "a lease of more than 0 seconds", episode.begun)
        players = game.info.player_count
        demand(0 <= episode.begun.player < players, f"player is 0 to {players - 1}", episode.begun)


@suite.check("StartEpisode", "a repeated start returns the first answer, also while it runs and after a step")
async def repeated_start(game: Game) -> None:
    request = game.start_request((await game.tasks(1))[0].task_id)
    await game.place(request)
    many = await gathered(game.session.ask("StartEpisode", request) for _ in range(SIDE_BY_SIDE))
    await game.session.ask("StepEpisode", pb.StepEpisodeRequest(episode_id=request.episode_id, action=game.moves(1)[0]))
    many.append(await game.session.ask("StartEpisode", request))
    for answer in many[1:]:
        same = (answer.observation, answer.player) == (many[0].observation, many[0].player)
        demand(same, "the first answer again", f"{answer.observation!r}, not {many[0].observation!r}", request)


@suite.check("StartEpisode", "starts of one id that come at the same time make one episode")
async def concurrent_starts(game: Game) -> None:
    request = game.start_request((await game.tasks(1))[0].task_id)
    answers = await gathered(game.place(request) for _ in range(SIDE_BY_SIDE))
    shown = {(answer.observation, answer.player) for answer in answers}
    demand(len(shown) == 1, "the same answer to each", f"{len(shown)} different ones", request)


@suite.check("StartEpisode", "an id that is in use for another task is ALREADY_EXISTS EPISODE_CONFLICT")
async def conflict(game: Game) -> None:
    tasks = await game.tasks(2)
    if len(tasks) < 2:
        raise NotApplicable("the environment has only one task")
    episode = await game.start(tasks[0].task_id)
    request = game.start_request(tasks[1].task_id, episode.episode_id)
    await game.session.refused("StartEpisode", request, "ALREADY_EXISTS", "EPISODE_CONFLICT")
    await episode.step(game.moves(1)[0])


@suite.check("StartEpisode", "an unknown task is NOT_FOUND UNKNOWN_TASK, and the episode's id stays free")
async def unknown_task(game: Game) -> None:
    good = (await game.tasks(1))[0].task_id
    for task_id in (f"no-such-task-{uuid4()}", "../../etc/passwd", "\x00", "train/-0001", "é🧊"):
        request = game.start_request(task_id)
        await game.session.refused("StartEpisode", request, "NOT_FOUND", "UNKNOWN_TASK")
    await game.start(good, request.episode_id)


@suite.check("StartEpisode", "a second attempt at a task begins as the first did, in a deterministic environment")
async def second_attempt(game: Game) -> None:
    game.deterministic()
    for task in await game.tasks(STARTED):
        first, again = [await game.start(task.task_id) for _ in range(2)]
        parted = difference(first.shows(), again.shows())
        came = f"two episodes of task {task.task_id!r} were started: {parted}"
        demand(not parted, "the same task begins with the same observation", came)


@suite.check("EndEpisode", "ending twice succeeds, and a step after the end is NOT_FOUND UNKNOWN_EPISODE")
async def ended(game: Game) -> None:
    episode = await game.start()
    await episode.step(game.moves(1)[0])
    for _ in range(2):
        await game.end(episode)
    for request in (episode.request(game.moves(1)[0]), episode.request(game.moves(1)[0], 0)):
        await game.session.refused("StepEpisode", request, "NOT_FOUND", "UNKNOWN_EPISODE")


@suite.check("EndEpisode", "an episode that was ended is gone for StepEpisodes, too")
async def ended_in_batch(game: Game) -> None:
    episode = await game.start()
    other = await game.start()
    await game.end(episode)
    request = pb.StepEpisodesRequest(steps=[e.request(game.moves(1)[0]) for e in (episode, other)])
    items = (await game.session.ask("StepEpisodes", request)).items
    kinds = [item.WhichOneof("result") for item in items]
    demand(kinds == ["error", "step"], "an error for the ended episode, a step for the other", kinds, request)
    demand(items[0].error.reason == "UNKNOWN_EPISODE", "UNKNOWN_EPISODE", items[0], request)


@suite.check("StepEpisode", "an episode that is idle for longer than its lease is NOT_FOUND EPISODE_EXPIRED")
async def lease(game: Game) -> None:
    episode = await game.start()
    seconds = episode.begun.lease.ToTimedelta().total_seconds()
    if seconds > LONGEST_LEASE:
        raise NotApplicable(f"the lease is {seconds:g} s, and the check waits for at most {LONGEST_LEASE:g} s")
    await asyncio.sleep(seconds * 1.5 + 0.5)
    request = episode.request(game.moves(1)[0])
    answer = await game.session.attempt("StepEpisode", request)
    as_demanded(answer, request, "NOT_FOUND", "EPISODE_EXPIRED")


@suite.check("StartEpisode", "episodes side by side do not mix, in a deterministic environment")
async def side_by_side(game: Game) -> None:
    await game.comparable()
    plays = [(task.task_id, game.moves()) for task in await game.tasks(SIDE_BY_SIDE)]
    alone = {task_id: await (await game.start(task_id)).play(moves) for task_id, moves in plays}
    await game.session.clean_up()
    for played in await game.side_by_side(plays * 3):
        parted = difference(played.shows(), alone[played.task_id].shows())
        came = f"task {played.task_id!r} was played beside others and alone: {parted}"
        demand(not parted, "an episode's answers are its own", came)
