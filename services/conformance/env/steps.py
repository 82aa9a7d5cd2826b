"""Checks that every step is played exactly once: repeated, skipped, contradicting, concurrent and batched steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from google.rpc import code_pb2

from mulligan.conformance.env.game import SIDE_BY_SIDE, Game, PlayedEpisode, difference
from mulligan.conformance.report import NotApplicable, Suite, demand
from mulligan.conformance.target import Refusal, gathered
from mulligan.env.v1 import env_service_pb2 as pb

suite: Suite[Game] = Suite()
OTHER = "conformance: another action than the one that was played"


async def first_step(game: Game) -> PlayedEpisode:
    episode = await game.start()
    await episode.step(game.moves(1)[0])
    return episode


async def unfinished(game: Game) -> PlayedEpisode:
    """An episode that is not over after its first step."""
    for task in await game.tasks(SIDE_BY_SIDE):
        episode = await game.start(task.task_id)
        await episode.step(game.moves(1)[0])
        if not episode.over:
            return episode
        await game.end(episode)
    raise NotApplicable("every episode that was tried is over after one step")


@suite.check("StepEpisode", "a repeated step returns the stored answer")
async def repeated(game: Game) -> None:
    episode = await first_step(game)
    for _ in range(3):
        again = await game.session.ask("StepEpisode", episode.request(episode.actions[0], 0))
        demand(again == episode.steps[0], f"the stored answer, {episode.steps[0]}", again, episode.request("…", 0))


@suite.check("StepEpisode", "an earlier step, repeated after later ones, returns its stored answer")
async def repeated_later(game: Game) -> None:
    episode = await unfinished(game)
    await episode.play(game.moves()[1:4])
    for index, (action, step) in enumerate(zip(episode.actions, episode.steps, strict=True)):
        request = episode.request(action, index)
        again = await game.session.ask("StepEpisode", request)
        demand(again == step, f"the stored answer, {step}", again, request)


@suite.check("StepEpisode", "a repeated step is not played again: the episode goes on as if it had come once")
async def played_once(game: Game) -> None:
    await game.comparable()
    moves = game.moves()
    for task in await game.tasks(3):
        plain = await (await game.start(task.task_id)).play(moves)
        stuttering = await game.start(task.task_id)
        for action in moves:
            if stuttering.over:
                break
            request = stuttering.request(action)
            await stuttering.step(action)
            await game.session.ask("StepEpisode", request)
        _demand_same(stuttering, plain, "each step was sent twice")


@suite.check("StepEpisode", "copies of a step that come at the same time are played once and answered alike")
async def concurrent(game: Game) -> None:
    moves = game.moves()
    played = []
    for task in await game.tasks(3):
        episode = await game.start(task.task_id)
        for action in moves[:6]:
            if episode.over:
                break
            request = episode.request(action)
            answers = await gathered(game.session.ask("StepEpisode", request) for _ in range(SIDE_BY_SIDE))
            different = [answer for answer in answers if answer != answers[0]]
            demand(not different, f"{SIDE_BY_SIDE} times {answers[0]}", different[:1], request)
            episode.took(action, answers[0])
        played.append(episode)
    await game.comparable()
    for episode in played:
        plain = await (await game.start(episode.task_id)).play(episode.actions)
        _demand_same(episode, plain, f"{SIDE_BY_SIDE} copies of each step were sent at the same time")


def _demand_same(found: PlayedEpisode, plain: PlayedEpisode, how: str) -> None:
    parted = difference(found.shows(), plain.shows())
    came = f"task {found.task_id!r} was played so and, for comparison, plainly: {parted}"
    demand(not parted, f"the same episode, although {how}", came, found.actions)


@suite.check("StepEpisode", "an index that was played with another action is FAILED_PRECONDITION STEP_CONFLICT")
async def conflict(game: Game) -> None:
    episode = await first_step(game)
    request = episode.request(OTHER, 0)
    answer = await game.session.attempt("StepEpisode", request)
    allowed = ["STEP_CONFLICT", "EPISODE_FINISHED"] if episode.over else ["STEP_CONFLICT"]
    refused = isinstance(answer, Refusal) and answer.code == "FAILED_PRECONDITION" and answer.reason in allowed
    demand(refused, f"FAILED_PRECONDITION {' or '.join(allowed)}", answer, request)
    await game.session.ask("StepEpisode", episode.request(episode.actions[0], 0))


@suite.check("StepEpisode", "a skipped step is FAILED_PRECONDITION STEP_SKIPPED, with next_step_index")
async def skipped(game: Game) -> None:
    episode = await game.start()
    for ahead in (1, 2, 2**31 - 1):
        request = episode.request(game.moves(1)[0], ahead)
        found = await game.session.refused(
            "StepEpisode", request, "FAILED_PRECONDITION", "STEP_SKIPPED", "next_step_index"
        )
        demand(found.metadata["next_step_index"] == "0", "next_step_index is 0", found, request)
    await episode.step(game.moves(1)[0])


@suite.check("StepEpisode", "after steps, next_step_index is how many there were, and the next step is played")
async def skipped_later(game: Game) -> None:
    episode = await unfinished(game)
    request = episode.request(game.moves(1)[0], 2)
    found = await game.session.refused("StepEpisode", request, "FAILED_PRECONDITION", "STEP_SKIPPED", "next_step_index")
    demand(found.metadata["next_step_index"] == "1", "next_step_index is 1", found, request)
    await episode.step(game.moves(1)[0])


@suite.check("StepEpisode", "after its end an episode is FAILED_PRECONDITION EPISODE_FINISHED, its answers repeatable")
async def finished(game: Game) -> None:
    episode = await (await game.start()).play(game.moves())
    demand(episode.over, f"an episode is over after {game.info.max_steps} steps (max_steps)", "it goes on")
    for ahead in (0, 1):
        request = episode.request(game.moves(1)[0], len(episode.steps) + ahead)
        await game.session.refused("StepEpisode", request, "FAILED_PRECONDITION", "EPISODE_FINISHED")
    for index, (action, step) in enumerate(zip(episode.actions, episode.steps, strict=True)):
        request = episode.request(action, index)
        again = await game.session.ask("StepEpisode", request)
        demand(again == step, f"the stored answer, {step}", again, request)


async def batch(game: Game, steps: Sequence[pb.StepEpisodeRequest], max_wait: float | None = None) -> list[Any]:
    request = pb.StepEpisodesRequest(steps=steps)
    if max_wait is not None:
        request.max_wait.FromNanoseconds(int(max_wait * 1e9))
    items = list((await game.session.ask("StepEpisodes", request)).items)
    demand(len(items) == len(steps), f"{len(steps)} items, one per step", f"{len(items)}", request)
    return items


@suite.check("StepEpisodes", "items come in the order of the request, each with its result or its error")
async def batch_in_order(game: Game) -> None:
    tasks = [task.task_id for task in await game.tasks(4)]
    episodes = [await game.start(tasks[n % len(tasks)]) for n in range(4)]
    action = game.moves(1)[0]
    steps = [episode.request(action) for episode in episodes]
    steps.insert(1, pb.StepEpisodeRequest(episode_id="conformance-nobody", action=action))
    steps.append((await game.start()).request(action, 5))
    items = await batch(game, steps)
    expected = ["step", "error", "step", "step", "step", "error"]
    kinds = [item.WhichOneof("result") for item in items]
    demand(kinds == expected, f"{expected}", kinds, pb.StepEpisodesRequest(steps=steps))
    for item, code, reason in (
        (items[1], code_pb2.NOT_FOUND, "UNKNOWN_EPISODE"),
        (items[5], code_pb2.FAILED_PRECONDITION, "STEP_SKIPPED"),
    ):
        right = (item.error.code, item.error.reason) == (code, reason)
        demand(right, f"an error with code {code} ({code_pb2.Code.Name(code)}) and reason {reason}", item.error)
    skip = dict(items[5].error.metadata)
    demand(skip.get("next_step_index") == "0", "metadata next_step_index of the skipped step is 0", items[5].error)
    del items[1]
    for episode, item in zip(episodes, items, strict=False):
        alone = await game.session.ask("StepEpisode", episode.request(action, 0))
        demand(item.step == alone, f"the item of this episode, {alone}", item.step, episode.request(action, 0))


@suite.check("StepEpisodes", "a batch plays what single steps would, in a deterministic environment")
async def batch_plays(game: Game) -> None:
    await game.comparable()
    moves = game.moves()
    tasks = [task.task_id for task in await game.tasks(3)]
    plain = [await (await game.start(task_id)).play(moves) for task_id in tasks]
    episodes = [await game.start(task_id) for task_id in tasks]
    for action in moves:
        going = [episode for episode in episodes if not episode.over]
        if not going:
            break
        items = await batch(game, [episode.request(action) for episode in going])
        for episode, item in zip(going, items, strict=True):
            demand(item.WhichOneof("result") == "step", "a step for each item", item, episode.request(action))
            episode.took(action, item.step)
    for found, expected in zip(episodes, plain, strict=True):
        _demand_same(found, expected, "its steps came in batches")


@suite.check(
    "StepEpisodes", "a repeated item returns the stored answer; an item that is not done within max_wait is pending"
)
async def batch_repeated(game: Game) -> None:
    tasks = [task.task_id for task in await game.tasks(4)]
    episodes = [await game.start(tasks[n % len(tasks)]) for n in range(4)]
    steps = [episode.request(game.moves(1)[0]) for episode in episodes]
    at_once = await batch(game, steps, 0.0)
    kinds = {item.WhichOneof("result") for item in at_once}
    demand(kinds <= {"step", "pending"}, "a step, or pending, for each item", kinds)
    waited = await batch(game, steps)
    again = await batch(game, steps, 60.0)
    for one, other, third, step in zip(at_once, waited, again, steps, strict=True):
        demand(other.WhichOneof("result") == "step", "without max_wait each item has its answer", other, step)
        stored = third == other and (one == other or one.WhichOneof("result") == "pending")
        demand(stored, f"the stored answer, {other}", third if third != other else one, step)


@suite.check("StepEpisodes", "one bad item does not affect the others")
async def one_bad_item(game: Game) -> None:
    """A server may also refuse the whole call; then it plays nothing."""
    episode = await game.start()
    action = game.moves(1)[0]
    bad = pb.StepEpisodeRequest(episode_id=(await game.start()).episode_id, step_index=-1, action=action)
    request = pb.StepEpisodesRequest(steps=[episode.request(action), bad])
    answer = await game.session.attempt("StepEpisodes", request)
    if isinstance(answer, Refusal):
        right = (answer.code, answer.reason) == ("INVALID_ARGUMENT", "INVALID_FIELD")
        demand(right, "INVALID_ARGUMENT INVALID_FIELD, or an error in that item alone", answer, request)
    else:
        kinds = [item.WhichOneof("result") for item in answer.items]
        demand(kinds == ["step", "error"], "['step', 'error']", kinds, request)
    await episode.step(action)
