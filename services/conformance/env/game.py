"""One environment of a server, and the episodes that checks play in it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from typing import Any, TypeAlias
from uuid import uuid4

from mulligan.common.v1 import outcome_pb2
from mulligan.conformance.report import NotApplicable, Violation
from mulligan.conformance.target import CheckSession, Refusal, gathered
from mulligan.env.v1 import env_service_pb2 as pb

SPLITS = (pb.SPLIT_TRAIN, pb.SPLIT_TEST)
# Plausible answers of an agent, in one environment or another.
ORDINARY = ("```Up```", "```Left```", "I go ```Right``` now", "[0]", "1", "yes", "\\boxed{42}", "I am not sure.")
SIDE_BY_SIDE = 8  # episodes: few enough for a small server
SAMPLES = 6  # episodes that are played to their end for the rules of play
_FULL_WAITS = 20  # for a place at a full server


@dataclass(frozen=True, slots=True)
class EnvOptions:
    """`known` are valid actions of the environment, played among the others. `actions` is the number of random and
    hostile actions."""

    actions: int = 300
    seed: int = 0
    known: Sequence[str] = ()


@dataclass(slots=True)
class PlayedEpisode:
    """An episode, with the actions that were played and the answers to them."""

    session: CheckSession
    episode_id: str
    task_id: str
    begun: pb.StartEpisodeResponse
    actions: list[str] = field(default_factory=list)
    steps: list[pb.StepEpisodeResponse] = field(default_factory=list)

    def request(self, action: str, index: int | None = None) -> pb.StepEpisodeRequest:
        """The request for the next step, or for the step `index`."""
        at = len(self.steps) if index is None else index
        return pb.StepEpisodeRequest(episode_id=self.episode_id, step_index=at, action=action)

    def took(self, action: str, step: pb.StepEpisodeResponse) -> pb.StepEpisodeResponse:
        self.actions.append(action)
        self.steps.append(step)
        return step

    async def step(self, action: str) -> pb.StepEpisodeResponse:
        return self.took(action, await self.session.ask("StepEpisode", self.request(action)))

    @property
    def over(self) -> bool:
        return bool(self.steps) and self.steps[-1].done

    @property
    def broken(self) -> bool:
        broken = (outcome_pb2.OUTCOME_ENV_ERROR, outcome_pb2.OUTCOME_TIMEOUT)
        return bool(self.steps) and self.steps[-1].outcome in broken

    async def play(self, actions: Sequence[str]) -> PlayedEpisode:
        """Plays the actions until they or the episode end."""
        for action in actions:
            if self.over:
                break
            await self.step(action)
        return self

    def shows(self) -> list[Shown]:
        """What an agent sees: the first observation, then each step."""
        first: Shown = {"observation": self.begun.observation, "player": self.begun.player}
        return [first, *map(_shown, self.steps)]


Shown: TypeAlias = dict[str, Any]


def _shown(step: pb.StepEpisodeResponse) -> Shown:
    return {
        "observation": step.observation,
        "action": step.action,
        "reward": step.reward if step.HasField("reward") else None,
        "done": step.done,
        "outcome": outcome_pb2.Outcome.Name(step.outcome),
        "feedback": step.feedback,
        "tool": step.tool,
        "player": step.player,
        "rewards": tuple(step.rewards),
    }


def difference(found: Sequence[Shown], expected: Sequence[Shown]) -> str:
    """Where two plays differ, in words; empty if they are equal."""
    for number, (one, other) in enumerate(zip_longest(found, expected)):
        if one != other:
            when = f"after step {number - 1}" if number else "at the start"
            if one is None or other is None:
                return f"{when} one was over and the other went on"
            parts = (f"{key} {one[key]!r:.120} and {other[key]!r:.120}" for key in one if one[key] != other[key])
            return f"{when} {', '.join(parts)}"
    return ""


class Game:
    """The argument of the checks of one environment.

    `start` begins an episode and registers its end. `tasks`, `moves` and `samples` give tasks, actions and finished
    episodes. `available`, `deterministic` and `comparable` raise NotApplicable if the environment lacks what a check
    needs.
    """

    def __init__(self, session: CheckSession, info: pb.EnvironmentInfo, options: EnvOptions) -> None:
        self.session = session
        self.info = info
        self.options = options
        self.random = random.Random(f"{options.seed}/{info.name}")
        self._tasks: list[pb.TaskInfo] | None = None
        self._samples: list[PlayedEpisode] | None = None
        self.hostile: list[PlayedEpisode] | None = None  # what `hostile.py` played
        self._unplayable = ""
        self._varies: bool | None = None

    @property
    def name(self) -> str:
        return self.info.name

    async def clean_up(self) -> None:
        await self.session.clean_up()

    def available(self) -> None:
        """Raises NotApplicable if no episode can be started."""
        if self.info.unavailable:
            raise NotApplicable(f"the environment is unavailable here: {self.info.unavailable}")

    def deterministic(self) -> None:
        self.available()
        if not self.info.deterministic:
            raise NotApplicable("the environment does not say that it is deterministic")

    async def comparable(self) -> None:
        """Raises NotApplicable if plays cannot be compared: the environment is not deterministic, or only claims to be,
        which another check reports."""
        self.deterministic()
        if self._varies is None:
            plays = [(task.task_id, self.moves()) for task in await self.tasks(2)]
            first, again = [
                [await (await self.start(task_id)).play(moves) for task_id, moves in plays] for _ in range(2)
            ]
            parted = [difference(one.shows(), other.shows()) for one, other in zip(first, again, strict=True)]
            self._varies = any(parted)
        if self._varies:
            raise NotApplicable("episodes of one task with the same actions differ, so that nothing can be compared")

    async def tasks(self, count: int) -> list[pb.TaskInfo]:
        """At least one and at most `count` tasks, from both splits in turn."""
        self.available()
        if self._tasks is None:
            try:
                pages = [await self.page(split, 100) for split in SPLITS]
            except Violation:  # which the checks of ListTasks report
                raise NotApplicable("the environment's tasks cannot be listed") from None
            both = chain.from_iterable(zip_longest(*(page.tasks for page in pages)))
            self._tasks = [task for task in both if task is not None]
        if not self._tasks:
            raise NotApplicable("the environment lists no tasks")
        return self._tasks[:count]

    async def page(self, split: Any, size: int, token: str = "") -> pb.ListTasksResponse:
        request = pb.ListTasksRequest(environment=self.name, split=split, page_size=size, page_token=token)
        page: pb.ListTasksResponse = await self.session.ask("ListTasks", request)
        return page

    def start_request(self, task_id: str, episode_id: str = "") -> pb.StartEpisodeRequest:
        """A request with a new id if none is given. The episode is ended after the check."""
        episode_id = episode_id or f"conformance-{uuid4()}"
        self.session.later("EndEpisode", pb.EndEpisodeRequest(episode_id=episode_id))
        return pb.StartEpisodeRequest(episode_id=episode_id, environment=self.name, task_id=task_id)

    async def start(self, task_id: str = "", episode_id: str = "") -> PlayedEpisode:
        """Starts an episode of the task, or of the first task."""
        if not task_id:
            task_id = (await self.tasks(1))[0].task_id
        request = self.start_request(task_id, episode_id)
        begun = await self.place(request)
        return PlayedEpisode(self.session, request.episode_id, task_id, begun)

    async def place(self, request: pb.StartEpisodeRequest) -> pb.StartEpisodeResponse:
        """Starts the episode. If the server is full, it tries again as RetryInfo says."""
        for _ in range(_FULL_WAITS):
            answer = await self.session.attempt("StartEpisode", request)
            if not isinstance(answer, Refusal):
                begun: pb.StartEpisodeResponse = answer
                return begun
            if answer.code != "RESOURCE_EXHAUSTED":
                raise Violation("a task that is listed can be started", answer, request)
            if answer.reason != "CAPACITY_REACHED" or answer.retry_seconds is None:
                raise Violation("RESOURCE_EXHAUSTED CAPACITY_REACHED, with a RetryInfo", answer, request)
            await asyncio.sleep(min(answer.retry_seconds, 1.0))
        raise NotApplicable("the server is full: all its places are taken by others")

    async def end(self, episode: PlayedEpisode) -> None:
        await self.session.ask("EndEpisode", pb.EndEpisodeRequest(episode_id=episode.episode_id))

    def moves(self, count: int = 0) -> list[str]:
        """`count` actions, or as many as an episode may have. Known ones, if there are any. Every call gives the same
        actions."""
        kinds = self.options.known or ORDINARY
        return [kinds[(n * n + n // 3) % len(kinds)] for n in range(count or max(self.info.max_steps, 1))]

    async def samples(self) -> list[PlayedEpisode]:
        """Some finished episodes of different tasks and with different actions. They are played once."""
        self.available()
        if self._unplayable:
            raise NotApplicable(f"no episode could be played to its end: {self._unplayable}")
        if self._samples is None:
            try:
                self._samples = await self._play_samples()
            except Violation as error:
                self._unplayable = str(error)
                raise
        return self._samples

    async def _play_samples(self) -> list[PlayedEpisode]:
        played = []
        for number, task in enumerate(await self.tasks(SAMPLES)):
            moves = self.moves()
            if number % 2:
                self.random.shuffle(moves)
            episode = await self.start(task.task_id)
            played.append(await episode.play(moves))
            await self.end(episode)
        return played

    async def side_by_side(self, plays: Sequence[tuple[str, Sequence[str]]]) -> list[PlayedEpisode]:
        """Plays an episode for each (task id, actions), a few at a time."""
        places = asyncio.Semaphore(SIDE_BY_SIDE)

        async def one(task_id: str, actions: Sequence[str]) -> PlayedEpisode:
            async with places:
                episode = await (await self.start(task_id)).play(actions)
                await self.end(episode)
                return episode

        return await gathered(one(task_id, actions) for task_id, actions in plays)
