"""Another environment in which some tasks have no right answer: the agent should refuse these and solve the others.

The reward is 1 for a refusal of an unanswerable task and for a right answer to an answerable one, that is, the largest
reward of the wrapped environment; else 0. As published in arXiv 2505.13988, a share of the tasks is replaced by their
unanswerable versions. How a task is made unanswerable is up to the wrapped environment, which is a
`CanBeUnanswerable` (`services/env/base.py`): FrozenLake's lakes lose their goal, questions have such versions in their
data. One without such versions is refused when the server starts.

A task with an answer has its id of the wrapped environment, an unanswerable one has `/unanswerable` after it. So an id
is the same task under every share and seed. Either version of a task can be started; the list has one of each task.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mulligan.common.rewards import reaches, read_reward, total
from mulligan.common.suggest import did_you_mean
from mulligan.common.thoughts import without_thoughts
from mulligan.env.answers import boxed, fenced, marked
from mulligan.env.base import (
    CanBeUnanswerable,
    Environment,
    EnvironmentInfo,
    Episode,
    PromptSet,
    Split,
    StepResult,
    TaskInfo,
    UnknownTask,
    Versions,
    close,
    fork,
    own_settings,
    reads_thoughts,
)
from mulligan.env.envs import ENVIRONMENTS

SUFFIX = "/unanswerable"
OVER = "The episode is over."
REFUSED = "refused"
_NOT_WORDS = str.maketrans("\u2019", "'", '.!,;:"`*_')


@dataclass(frozen=True, slots=True)
class Settings:
    """`wrapped` is the table of another environment, with its `kind`. `share` of its training tasks and `test_share` of
    its test tasks (the same by default) are unanswerable, rounded to whole tasks; `seed` decides which. `refusal` is
    what an agent writes to refuse (`RefusalMark`); `hint` tells it, and is added to the prompts unless it is empty.
    `transformation` is one of the wrapped environment's ways to make a task unanswerable, its usual one by default."""

    wrapped: dict[str, Any] = field(default_factory=lambda: {"kind": "questions"})
    share: float = 0.5
    test_share: float | None = None
    refusal: str = "\\boxed{I don't know.}"
    hint: str = "If you don't know the answer, reply with {refusal}"
    transformation: str = ""
    seed: int = 0
    name: str = "unanswerable"

    def __post_init__(self) -> None:
        for setting, number in (("share", self.share), ("test_share", self.test_share)):
            if number is not None and not 0 <= number <= 1:
                raise ValueError(f"{setting} must be from 0 to 1, not {number}")
        if not isinstance(self.wrapped.get("kind"), str) or not self.wrapped["kind"]:
            raise ValueError('wrapped.kind: names the wrapped environment, such as {kind = "questions"}')
        if "feedback" in self.wrapped:
            raise ValueError("wrapped.feedback: belongs in the outer table")
        RefusalMark(self.refusal)

    def share_of(self, split: Split) -> float:
        return self.share if split is Split.TRAIN or self.test_share is None else self.test_share


class RefusalMark:
    r"""Recognises refusals. `\boxed{…}`, triple backticks and `<answer>…</answer>` are marks: the last such mark of a
    reply must have the same content. A refusal without marks must be the whole reply, or all that stands in its last
    triple backticks, else in its last `<answer>` or box. Thoughts, case and punctuation are ignored."""

    def __init__(self, text: str) -> None:
        """Raises ValueError if the text has no words outside of thoughts."""
        marks: tuple[Callable[[str], str | None], ...] = (fenced, boxed, marked)
        self._read: Callable[[str], str | None] = next((read for read in marks if read(text) is not None), _whole)
        self._wanted = _words(self._read(text) or "")
        if not self._wanted:
            raise ValueError(f"refusal must be a text such as \\boxed{{I don't know.}} or nothing, not {text!r}")

    def is_in(self, reply: str) -> bool:
        found = self._read(reply)
        return found is not None and _words(found) == self._wanted


class UnanswerableEpisode:
    def __init__(self, episode: Episode, game: Unanswerable, has_answer: bool, rewards: Sequence[float] = ()) -> None:
        self.observation = episode.observation
        self.reads_thoughts = reads_thoughts(episode)
        self._episode = episode
        self._game = game
        self._has_answer = has_answer
        self._rewards = list(rewards)

    def step(self, action: str) -> StepResult:
        if self._game.refusal.is_in(action):
            return self._refused()
        result = self._episode.step(action)
        if not isinstance(result, StepResult):  # invalid; the server reports it
            return result
        self._rewards.append(read_reward(result.reward))
        if not result.done:
            return replace(result, reward=0.0)
        if not self._has_answer:
            return replace(result, reward=0.0, feedback=_joined(result.feedback, UNANSWERABLE, "A refusal was right."))
        is_right = reaches(total(self._rewards), self._game.wrapped.info.max_reward)
        return replace(result, reward=float(is_right), feedback=_joined(result.feedback, ANSWERABLE))

    def fork(self) -> UnanswerableEpisode:
        return UnanswerableEpisode(fork(self._episode), self._game, self._has_answer, self._rewards)

    def close(self) -> None:
        close(self._episode)

    def _refused(self) -> StepResult:
        if self._has_answer:
            return StepResult(OVER, REFUSED, done=True, feedback=f"Wrong: you refused. {ANSWERABLE}")
        return StepResult(OVER, REFUSED, 1.0, done=True, feedback=f"Right: you refused. {UNANSWERABLE}")


class Unanswerable:
    def __init__(self, wrapped: CanBeUnanswerable, settings: Settings) -> None:
        """Raises ValueError, which names the setting."""
        self.settings = settings
        self.wrapped = wrapped
        self.refusal = RefusalMark(settings.refusal)
        self._way = settings.transformation or wrapped.transformations[0]
        if self._way not in wrapped.transformations:
            near = did_you_mean(self._way, wrapped.transformations)
            known = ", ".join(wrapped.transformations)
            raise ValueError(
                f"transformation: {settings.wrapped['kind']!r} has no {self._way!r}{near}; there are: {known}"
            )
        self._unanswerable = {split: self._choose(split) for split in Split}
        self._single = dict(self._single_versions())

    @property
    def info(self) -> EnvironmentInfo:
        info = self.wrapped.info
        shares = ", ".join(f"{self.settings.share_of(split):.0%} of {split}" for split in Split)
        return replace(
            info,
            name=self.settings.name,
            description=f"{info.description}; without an answer: {shares}",
            prompts=_prompts(info.prompts, self.settings),
            max_reward=1.0,
        )

    def list_tasks(self, split: Split, offset: int, limit: int) -> Sequence[TaskInfo]:
        first = max(offset, 0)
        tasks = self.wrapped.list_tasks(split, first, limit)
        chosen = self._unanswerable[split]
        return [_tagged(task, index not in chosen) for index, task in enumerate(tasks, start=first)]

    def start(self, task_id: str) -> UnanswerableEpisode:
        own = task_id.removesuffix(SUFFIX)
        has_answer = own == task_id
        wanted = Versions.ANSWERABLE if has_answer else Versions.UNANSWERABLE
        if wanted not in self._single.get(own, Versions.BOTH):
            raise UnknownTask(f"{task_id[:80]!r} is not a task of {self.settings.name}")
        episode = self.wrapped.start(own) if has_answer else self.wrapped.start_unanswerable(own, self._way)
        return UnanswerableEpisode(episode, self, has_answer)

    def close(self) -> None:
        close(self.wrapped)

    def _choose(self, split: Split) -> frozenset[int]:
        """The positions of the unanswerable tasks of a split. Those of a smaller share are among those of a larger one.
        Raises ValueError if the share cannot be had."""
        count = self.wrapped.info.task_counts[split]
        versions = self.wrapped.versions(split, self._way)
        if versions is None:
            versions = [Versions.BOTH] * count
        only = [index for index, found in enumerate(versions) if found is Versions.UNANSWERABLE]
        either = [index for index, found in enumerate(versions) if found is Versions.BOTH]
        wanted = int(count * self.settings.share_of(split) + 0.5)
        if not len(only) <= wanted <= len(only) + len(either):
            setting = "share" if split is Split.TRAIN or self.settings.test_share is None else "test_share"
            raise ValueError(
                f"{setting}: {wanted} of the {count} {split} tasks cannot be without an answer: {len(only)} tasks have "
                f"no version with an answer, and {len(only) + len(either)} have one without; expected from "
                f"{len(only) / count:.3g} to {(len(only) + len(either)) / count:.3g}"
            )
        ranked = sorted(either, key=lambda index: _rank(self.settings.seed, split, index))
        return frozenset((*only, *ranked[: wanted - len(only)]))

    def _single_versions(self) -> Mapping[str, Versions]:
        """The tasks that do not have both versions."""
        found: dict[str, Versions] = {}
        for split in Split:
            versions = self.wrapped.versions(split, self._way)
            if versions is not None and any(one is not Versions.BOTH for one in versions):
                tasks = self.wrapped.list_tasks(split, 0, len(versions))
                found.update({task.task_id: one for task, one in zip(tasks, versions, strict=True)})
        return found


def create(name: str, settings: Settings) -> Unanswerable:
    """Makes the wrapped environment. Raises ValueError, which names the setting, and MissingExtra."""
    table = dict(settings.wrapped)
    kind = table.pop("kind")
    try:
        plugin = ENVIRONMENTS.find(kind)
        wrapped: Environment = plugin.create(f"{name}-wrapped", own_settings(plugin, table))
    except (ValueError, TypeError) as error:
        raise ValueError(f"wrapped: {error}") from error
    try:
        if not isinstance(wrapped, CanBeUnanswerable):
            raise ValueError(
                f"wrapped.kind: the tasks of {kind!r} cannot be made unanswerable: it has no `start_unanswerable` "
                "(docs/environments.md says what is needed)"
            )
        if wrapped.info.player_count > 1:
            raise ValueError(f"wrapped.kind: {kind!r} is a game of several players, which nobody can refuse alone")
        return Unanswerable(wrapped, replace(settings, name=name))
    except BaseException:
        close(wrapped)
        raise


def _tagged(task: TaskInfo, has_answer: bool) -> TaskInfo:
    """The task in one version. The choices may be others without an answer."""
    if has_answer:
        return replace(task, tags=task.tags | {"answerable": "true"})
    tags = {name: value for name, value in task.tags.items() if name != "choices"}
    return replace(task, task_id=task.task_id + SUFFIX, tags=tags | {"answerable": "false"})


def _rank(seed: int, split: Split, index: int) -> bytes:
    return hashlib.sha256(f"{seed}/{split}/{index}".encode()).digest()


def _whole(reply: str) -> str:
    block = fenced(reply)
    found = marked(reply) if block is None else block
    return without_thoughts(reply) if found is None else found


def _words(text: str) -> str:
    return " ".join(text.casefold().translate(_NOT_WORDS).split())


def _joined(*texts: str) -> str:
    return " ".join(filter(None, texts))


def _prompts(prompts: PromptSet, settings: Settings) -> PromptSet:
    if not settings.hint:
        return prompts
    hint = "\n\n" + settings.hint.replace("{refusal}", settings.refusal)
    return replace(
        prompts,
        solver=prompts.solver + hint,
        action_reminder=prompts.action_reminder + hint,
        reflection_system=f"{prompts.reflection_system}\n\n{_TO_THE_REFLECTOR}",
        retry=prompts.retry + hint,
        try_again=prompts.try_again + hint,
    )


ANSWERABLE = "This task had an answer."
UNANSWERABLE = "This task had no answer."
_TO_THE_REFLECTOR = """\
Some tasks of this kind have no answer; the agent should refuse these, and these alone. The feedback says whether this \
one had an answer. The instruction should help to tell the difference."""
