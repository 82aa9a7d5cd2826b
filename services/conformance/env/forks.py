"""Checks of ForkEpisode: exact and independent copies, or a refusal."""

from __future__ import annotations

from uuid import uuid4

from mulligan.conformance.env.game import Game, PlayedEpisode, difference
from mulligan.conformance.env.steps import unfinished
from mulligan.conformance.report import NotApplicable, Suite, demand
from mulligan.env.v1 import env_service_pb2 as pb

suite: Suite[Game] = Suite()


def forks(game: Game) -> None:
    game.available()
    if not game.info.can_fork:
        raise NotApplicable("the environment does not say that it can be forked (can_fork)")


def request_of(game: Game, episode: PlayedEpisode, index: int | None = None, new_id: str = "") -> pb.ForkEpisodeRequest:
    """A request to fork the episode at its end, or after `index` steps. The copy is ended after the check."""
    new_id = new_id or f"conformance-{uuid4()}"
    game.session.later("EndEpisode", pb.EndEpisodeRequest(episode_id=new_id))
    at = len(episode.steps) if index is None else index
    return pb.ForkEpisodeRequest(episode_id=episode.episode_id, step_index=at, new_episode_id=new_id)


async def fork(game: Game, episode: PlayedEpisode) -> PlayedEpisode:
    """Forks the episode. The copy has the steps of the episode."""
    request = request_of(game, episode)
    answer = await game.session.ask("ForkEpisode", request)
    last = episode.steps[-1] if episode.steps else episode.begun
    same = (answer.observation, answer.player) == (last.observation, last.player)
    demand(same, f"what the agent saw last, {last.observation!r}, and whose turn it is", answer, request)
    demand(answer.lease.ToTimedelta().total_seconds() > 0, "a lease of more than 0 seconds", answer, request)
    copy = PlayedEpisode(game.session, request.new_episode_id, episode.task_id, episode.begun)
    copy.actions = list(episode.actions)
    copy.steps = list(episode.steps)
    return copy


@suite.check("ForkEpisode", "an environment that cannot fork says so: UNIMPLEMENTED FORK_UNSUPPORTED")
async def unsupported(game: Game) -> None:
    game.available()
    if game.info.can_fork:
        raise NotApplicable("the environment can be forked")
    episode = await game.start()
    await game.session.refused("ForkEpisode", request_of(game, episode), "UNIMPLEMENTED", "FORK_UNSUPPORTED")
    await episode.step(game.moves(1)[0])


@suite.check("ForkEpisode", "a copy has the steps that were played before, and they are repeatable in it")
async def shares_the_past(game: Game) -> None:
    forks(game)
    episode = await (await unfinished(game)).play(game.moves()[1:2])
    if episode.over:
        episode = await unfinished(game)
    copy = await fork(game, episode)
    for index, (action, step) in enumerate(zip(episode.actions, episode.steps, strict=True)):
        request = copy.request(action, index)
        again = await game.session.ask("StepEpisode", request)
        demand(again == step, f"the stored answer, {step}", again, request)
    request = copy.request("conformance: another", 0)
    await game.session.refused("StepEpisode", request, "FAILED_PRECONDITION", "STEP_CONFLICT")


@suite.check("ForkEpisode", "from there on both answer the same actions alike, in a deterministic environment")
async def exact(game: Game) -> None:
    forks(game)
    await game.comparable()
    moves = game.moves()
    for depth, task in enumerate(await game.tasks(4)):
        episode = await (await game.start(task.task_id)).play(moves[:depth])
        if episode.over:
            continue
        first = await fork(game, episode)
        second = await fork(game, episode)
        for played in (first, episode, second):
            await played.play(moves[depth:])
        for copy in (first, second):
            parted = difference(copy.shows(), episode.shows())
            came = f"forked after {depth} steps of task {task.task_id!r}, copy and original played: {parted}"
            demand(not parted, "exact copies", came, episode.actions)


@suite.check("ForkEpisode", "a copy is independent: what is played in one changes nothing in the other")
async def independent(game: Game) -> None:
    forks(game)
    await game.comparable()
    moves = game.moves()
    task_id = (await unfinished(game)).task_id
    plain = await (await game.start(task_id)).play(moves)
    episode = await (await game.start(task_id)).play(moves[:1])
    copy = await fork(game, episode)
    await copy.play(list(reversed(moves)))
    await game.end(copy)
    await episode.play(moves[1:])
    parted = difference(episode.shows(), plain.shows())
    came = f"a copy of an episode of task {task_id!r} was played and ended; the original and one like it: {parted}"
    demand(not parted, "the original goes on as if it had not been forked", came, episode.actions)


@suite.check("ForkEpisode", "ending the original leaves the copy")
async def outlives(game: Game) -> None:
    forks(game)
    episode = await unfinished(game)
    copy = await fork(game, episode)
    await game.end(episode)
    await copy.step(game.moves(1)[0])


@suite.check("ForkEpisode", "a repeated fork returns the first answer; a new id in use is EPISODE_CONFLICT")
async def repeated(game: Game) -> None:
    forks(game)
    episode = await unfinished(game)
    request = request_of(game, episode)
    first, again = [await game.session.ask("ForkEpisode", request) for _ in range(2)]
    same = (first.observation, first.player) == (again.observation, again.player)
    demand(same, f"the first answer, {first}", again, request)
    other = await game.start()
    taken = request_of(game, episode, new_id=other.episode_id)
    await game.session.refused("ForkEpisode", taken, "ALREADY_EXISTS", "EPISODE_CONFLICT")


@suite.check("ForkEpisode", "a fork after fewer or more steps than were played, or after the end, is refused")
async def at_the_right_place(game: Game) -> None:
    forks(game)
    episode = await unfinished(game)
    for index, reason in ((2, "STEP_SKIPPED"), (0, "STEP_CONFLICT")):
        request = request_of(game, episode, index)
        await game.session.refused("ForkEpisode", request, "FAILED_PRECONDITION", reason)
    await episode.play(game.moves())
    if episode.over:
        request = request_of(game, episode)
        await game.session.refused("ForkEpisode", request, "FAILED_PRECONDITION", "EPISODE_FINISHED")
