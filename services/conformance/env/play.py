"""Checks of finished episodes: the rules of `rules.py`, and determinism."""

from __future__ import annotations

from mulligan.conformance.env import rules
from mulligan.conformance.env.game import Game, PlayedEpisode, difference
from mulligan.conformance.report import NotApplicable, Suite, Violation, demand

suite: Suite[Game] = Suite()


async def holds(game: Game, rule: rules.Rule, demanded: str) -> None:
    for episode in await game.samples():
        for wrong in rule(game.info, episode):
            raise Violation(demanded, f"in an episode of task {episode.task_id!r}, {wrong}", f"{episode.actions}")


@suite.check("StepEpisode", "ordinary actions do not break an episode")
async def unbroken(game: Game) -> None:
    await holds(game, rules.unbroken, "an answer to every text, and no ENV_ERROR or TIMEOUT")


@suite.check("StepEpisode", "a step that failed has no reward, is the last, and says what went wrong")
async def failure(game: Game) -> None:
    if not any(episode.broken for episode in await game.samples()):
        raise NotApplicable("no step failed")
    await holds(game, rules.failure, "a failed step is the last, without reward, with an error")


@suite.check("StepEpisode", "an episode ends by itself as COMPLETED, or after max_steps steps as TRUNCATED")
async def ends(game: Game) -> None:
    await holds(game, rules.ends, "an episode ends after max_steps steps, TRUNCATED unless it reaches its own end")


@suite.check("StepEpisode", "the last step has an outcome, and no other")
async def outcomes(game: Game) -> None:
    await holds(game, rules.outcomes, "COMPLETED or TRUNCATED with done, OUTCOME_UNSPECIFIED while the episode goes on")


@suite.check("StepEpisode", "feedback comes with the last step only, an error with a failed one only")
async def closing_words(game: Game) -> None:
    await holds(game, rules.closing_words, "closing words on the last step only")


@suite.check("StepEpisode", "each step has a reward, and together they are at most max_reward")
async def rewards(game: Game) -> None:
    await holds(game, rules.rewards, "a finite reward of each step that did not fail, in sum at most max_reward")


@suite.check("StepEpisode", "there are as many rewards as players, none where there is one, and players are in range")
async def of_players(game: Game) -> None:
    await holds(game, rules.of_players, "players from 0 to player_count - 1, and a reward for each of several")


@suite.check("StepEpisode", "a tool that answers is one that the environment lists")
async def tools(game: Game) -> None:
    await holds(game, rules.tools, "the name of a tool in EnvironmentInfo.tools, or none")


@suite.check("StepEpisode", "the same task and actions lead to the same answers, in a deterministic environment")
async def deterministic(game: Game) -> None:
    game.deterministic()
    samples = await game.samples()
    again = await game.side_by_side([(episode.task_id, episode.actions) for episode in samples])
    for first, second in zip(samples, again, strict=True):
        same_play(first, second)


def same_play(first: PlayedEpisode, second: PlayedEpisode) -> None:
    """Raises Violation if they differ."""
    parted = difference(first.shows(), second.shows())
    came = f"task {first.task_id!r} was played twice with the same actions: {parted}"
    demand(not parted, "the same task and actions lead to the same observations and rewards", came, first.actions)
