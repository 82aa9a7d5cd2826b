"""Any environment of Gymnasium (https://gymnasium.farama.org), its spaces put into words.

A task is a seed with which the environment is reset. Train and test seeds differ. The reward of a step is the
environment's own. An answer that is no valid action changes nothing and costs a step. Each episode has its own
environment. A fork plays the same actions again in a new environment, which is exact if the environment is
deterministic. Environments that say they are not (`spec.nondeterministic`) cannot be forked.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from mulligan.common.rewards import read_reward, total
from mulligan.env import numbered
from mulligan.env.base import (
    EnvironmentInfo,
    MissingExtra,
    PromptSet,
    Split,
    StepResult,
    TaskInfo,
)
from mulligan.env.numbered import MAX_TASKS
from mulligan.env.prompts import generic_prompts

if TYPE_CHECKING:
    import gymnasium

INVALID = "invalid"
_SEEDS = 2 * (MAX_TASKS + 1)  # of one `seed` setting: first those of training, then those of testing
_MAX_SEED = 10_000
_EMPTY = "(empty)"
_COLORS = ("black", "red", "green", "yellow", "blue", "magenta", "cyan", "white")
_ESCAPE = re.compile(r"\x1b\[([0-9;]*)m")


@dataclass(frozen=True, slots=True)
class Settings:
    """`id` and `arguments` are what `gymnasium.make` takes; `module` is imported before, to register the environment.

    `max_reward` is the largest sum of an episode's rewards, which Gymnasium does not tell (`reward_threshold` is the
    mean that counts as solved). `max_steps` defaults to the environment's own limit. `actions` names the discrete
    actions in order, `components` the parts of an observation. `observation` is what the agent sees: `render`, the
    environment's drawing as text; `values`, its observation in words; `auto`, the drawing if there is one. `task` tells
    the agent what to do. `prompts` replaces texts of the PromptSet."""

    id: str
    arguments: dict[str, Any] = field(default_factory=dict)
    module: str = ""
    max_reward: float | None = None
    max_steps: int = 0
    train_tasks: int = 10_000
    test_tasks: int = 100
    seed: int = 0
    actions: tuple[str, ...] = ()
    components: tuple[str, ...] = ()
    observation: str = "auto"
    digits: int = 4
    task: str = ""
    prompts: dict[str, str] = field(default_factory=dict)
    name: str = "gymnasium"

    def __post_init__(self) -> None:
        for setting, number in (("train_tasks", self.train_tasks), ("test_tasks", self.test_tasks)):
            if not 0 <= number <= MAX_TASKS:
                raise ValueError(f"{setting} must be between 0 and {MAX_TASKS} (ids have five digits), not {number}")
        if not 0 <= self.seed <= _MAX_SEED:
            raise ValueError(f"seed must be between 0 and {_MAX_SEED}, not {self.seed}")
        if self.max_steps < 0:
            raise ValueError(f"max_steps must be at least 1, or 0 for the environment's own, not {self.max_steps}")
        if not 1 <= self.digits <= 17:
            raise ValueError(f"digits must be between 1 and 17, not {self.digits}")
        if self.observation not in ("auto", "render", "values"):
            raise ValueError(f'observation must be "auto", "render" or "values", not {self.observation!r}')
        known = [one.name for one in fields(PromptSet)]
        if unknown := sorted(set(self.prompts) - set(known)):
            raise ValueError(f"prompts.{unknown[0]}: no such text; there are: {', '.join(known)}")
        folded = [name.casefold() for name in self.actions]
        if len(set(folded)) < len(folded):
            raise ValueError(f"actions must have different names, not {', '.join(self.actions)}")


class GymnasiumEpisode:
    def __init__(self, game: Gymnasium, seed: int) -> None:
        self._game = game
        self._seed = seed
        self._taken: list[Any] = []  # what a fork plays again
        self._steps = 0
        self._rewards: list[float] = []
        self._env = game.make()
        try:
            observed, _ = self._env.reset(seed=seed)
            self.observation = game.show(self._env, observed)
        except BaseException:
            self._env.close()
            raise

    def step(self, action: str) -> StepResult:
        self._steps += 1
        is_last = self._steps >= self._game.info.max_steps
        try:
            taken, reading = self._game.read(action)
        except ValueError as problem:
            shown = f"That is no valid action: {problem}. Nothing happened.\n\n{self.observation}"
            return StepResult(
                shown, INVALID, done=is_last, truncated=is_last, feedback=self._feedback(True) if is_last else ""
            )
        reward, terminated, truncated = self._take(taken)
        self._rewards.append(reward)
        over = terminated or truncated or is_last
        cut = not terminated
        return StepResult(
            self.observation,
            reading,
            reward,
            done=over,
            truncated=over and cut,
            feedback=self._feedback(cut) if over else "",
        )

    def fork(self) -> GymnasiumEpisode:
        """Raises RuntimeError if the same actions lead to another observation."""
        copied = GymnasiumEpisode(self._game, self._seed)
        try:
            for taken in self._taken:
                copied._take(taken)
            if copied.observation != self.observation:
                raise RuntimeError(f"{self._game.settings.id} is not deterministic: the same actions led elsewhere")
        except BaseException:
            copied.close()
            raise
        copied._steps = self._steps
        copied._rewards = list(self._rewards)
        return copied

    def close(self) -> None:
        self._env.close()

    def _take(self, action: Any) -> tuple[float, bool, bool]:
        """Takes the action. Returns reward, terminated and truncated."""
        self._taken.append(action)
        observed, reward, terminated, truncated, _ = self._env.step(action)
        self.observation = self._game.show(self._env, observed)
        return read_reward(reward), bool(terminated), bool(truncated)

    def _feedback(self, cut: bool) -> str:
        ended = "The step limit was reached." if cut else "The episode came to its end."
        return f"{ended} Steps: {self._steps}. Sum of rewards: {total(self._rewards):g}."


class Gymnasium:
    """Makes an environment once to see its spaces. Raises ValueError, which names the setting."""

    def __init__(self, settings: Settings) -> None:
        import gymnasium

        from mulligan.env.envs.gymnasium import actions, spaces

        self.settings = settings
        self._gymnasium = gymnasium
        self._words = spaces
        self._answers = actions
        self._draws = False
        self._arguments = dict(settings.arguments)
        self._max_steps: int | None = None  # the environment's own
        probe = self._first()
        try:
            spec = probe.spec
            self._actions = probe.action_space
            self._observations = probe.observation_space
            self._choose_view(probe)
        finally:
            probe.close()
        assert spec is not None
        self._max_steps = max_steps = settings.max_steps or spec.max_episode_steps or 0
        self._check(spec)
        is_deterministic = not spec.nondeterministic
        self.info = EnvironmentInfo(
            name=settings.name,
            description=f"{settings.id} of Gymnasium, {self._max_steps} steps",
            prompts=self._prompts(),
            max_steps=max_steps,
            max_reward=float(settings.max_reward or 0.0),
            deterministic=is_deterministic,
            task_counts={Split.TRAIN: settings.train_tasks, Split.TEST: settings.test_tasks},
            can_fork=is_deterministic,
        )
        if is_deterministic:
            self._check_start()

    def list_tasks(self, split: Split, offset: int, limit: int) -> Sequence[TaskInfo]:
        """All tasks have difficulty 1, since Gymnasium has no difficulties."""
        return [TaskInfo(task_id, split, 1.0) for task_id in numbered.ids(split, offset, limit, self.info.task_counts)]

    def start(self, task_id: str) -> GymnasiumEpisode:
        split, number = numbered.read_id(task_id, self.info.task_counts, self.info.name)
        return GymnasiumEpisode(self, self._seed(split, number))

    def make(self) -> gymnasium.Env[Any, Any]:
        """A new environment, for one episode."""
        return self._gymnasium.make(
            self.settings.id, max_episode_steps=self._max_steps, disable_env_checker=True, **self._arguments
        )

    def show(self, env: gymnasium.Env[Any, Any], observed: Any) -> str:
        text = without_escapes(str(env.render())).strip("\n") if self._draws else self._in_words(observed)
        return text if text.strip() else _EMPTY

    def read(self, answer: str) -> tuple[Any, str]:
        """The action, and its form in a trace. Raises ValueError with a message for the agent."""
        action = self._answers.read(self._actions, answer, self.settings.actions)
        return action, self._answers.tell(self._actions, action, self.settings.actions)

    def _in_words(self, observed: Any) -> str:
        names = self.settings.components
        digits = self.settings.digits
        if names:
            return self._words.show_named(self._observations, observed, digits, names)
        return self._words.show(self._observations, observed, digits)

    def _seed(self, split: Split, index: int) -> int:
        return self.settings.seed * _SEEDS + (0 if split is Split.TRAIN else MAX_TASKS + 1) + index

    def _first(self) -> gymnasium.Env[Any, Any]:
        if self.settings.module:
            try:
                importlib.import_module(self.settings.module)
            except ImportError as error:
                raise ValueError(f"module: {self.settings.module!r} cannot be imported: {error}") from error
        try:
            return self.make()
        except self._gymnasium.error.DependencyNotInstalled as error:
            raise ValueError(f"id: {self.settings.id!r} needs more than Gymnasium itself: {error}") from error
        except (self._gymnasium.error.Error, ImportError) as error:
            raise ValueError(f"id: {self.settings.id!r}: {error}") from error
        except Exception as error:  # an environment may raise anything at what it is given
            shown = ", ".join(f"{key}={value!r}" for key, value in self._arguments.items()) or "none"
            raise ValueError(f"arguments: {self.settings.id!r} cannot be made with {shown}: {error}") from error

    def _choose_view(self, probe: gymnasium.Env[Any, Any]) -> None:
        """Whether the agent sees what the environment draws, or its observation in words."""
        given = self._arguments.get("render_mode")
        can_draw = given in (None, "ansi") and "ansi" in probe.unwrapped.metadata.get("render_modes", ())
        if self.settings.observation == "render" and not can_draw:
            raise ValueError(
                f'observation: {self.settings.id!r} does not draw itself as text: "values" is what there is'
            )
        self._draws = can_draw and self.settings.observation != "values"
        if self._draws:
            self._arguments["render_mode"] = "ansi"

    def _check(self, spec: gymnasium.envs.registration.EnvSpec) -> None:
        settings = self.settings
        if not self._max_steps:
            raise ValueError(f"max_steps: {settings.id!r} has no limit of its own: set one")
        if settings.max_reward is None:
            known = f" (its reward_threshold is {spec.reward_threshold:g})" if spec.reward_threshold is not None else ""
            raise ValueError(f"max_reward: set the largest sum of an episode's rewards in {settings.id!r}{known}")
        try:
            self._answers.check(self._actions)
            if not self._draws:
                self._words.check_observations(self._observations)
        except ValueError as error:
            raise ValueError(f"id: {settings.id!r}: {error}") from error
        count = int(getattr(self._actions, "n", 0)) if isinstance(self._actions, self._gymnasium.spaces.Discrete) else 0
        if settings.actions and len(settings.actions) != count:
            there_are = f"{count} to name" if count else "none to name: its actions are not discrete"
            raise ValueError(f"actions: {len(settings.actions)} names, and of {settings.id!r} there are {there_are}")
        parts = 0 if self._draws else self._words.component_count(self._observations)
        if settings.components and len(settings.components) != parts:
            raise ValueError(
                f"components: {len(settings.components)} names, and the observation has {parts} that can be named"
            )

    def _check_start(self) -> None:
        """Checks that the start depends on the seed alone. Some arguments make an environment ignore it."""
        seed = self._seed(Split.TRAIN, 0)
        episodes = [GymnasiumEpisode(self, seed), GymnasiumEpisode(self, seed)]
        for episode in episodes:
            episode.close()
        if episodes[0].observation != episodes[1].observation:
            raise ValueError(
                f"arguments: with them {self.settings.id!r} begins differently under the same seed, so that no task "
                "could be repeated"
            )

    def _prompts(self) -> PromptSet:
        settings = self.settings
        action = self._answers.form(self._actions, settings.actions)
        if isinstance(self._actions, self._gymnasium.spaces.Text):
            form = f"Your whole answer is the action: {action}."
        else:
            form = f"End every answer with one action between triple backticks: {action}."
        view = "a drawing" if self._draws else self._words.words(self._observations)
        task = settings.task or (
            f"You act in the environment {settings.id}. Each turn shows you its state ({view}). Gain as much reward as "
            "you can."
        )
        limit = f"You have at most {self._max_steps} steps; an answer without a valid action only costs one."
        return replace(generic_prompts(task, f"{form} {limit}"), **settings.prompts)


def create(name: str, settings: Settings) -> Gymnasium:
    """Raises MissingExtra, and ValueError that names the setting."""
    settings = replace(settings, name=name)
    try:
        import gymnasium  # noqa: F401 - to see whether it is there
    except ImportError as error:
        raise MissingExtra("gymnasium", error) from error
    return Gymnasium(settings)


def without_escapes(text: str) -> str:
    """Replaces the colours of a terminal by words: `[S on red]`, `[R in blue]`."""
    pieces: list[str] = []
    opened: list[str] = []
    at = 0
    for match in _ESCAPE.finditer(text):
        pieces.append(text[at : match.start()])
        at = match.end()
        color = _color(match.group(1))
        if color:
            pieces.append("[")
            opened.append(color)
        else:
            pieces += [f" {opened.pop()}]" for _ in range(len(opened))]
    return "".join([*pieces, text[at:], *(f" {color}]" for color in reversed(opened))])


def _color(codes: str) -> str:
    """The colour in words; empty if the codes set none, which ends the colours before."""
    for code in codes.split(";"):
        for base, preposition in ((30, "in"), (40, "on")):
            if code.isdigit() and 0 <= int(code) - base < len(_COLORS):
                return f"{preposition} {_COLORS[int(code) - base]}"
    return ""
