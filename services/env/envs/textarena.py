"""Any game of TextArena (https://github.com/LeonGuertler/TextArena, arXiv 2504.11442), of one player or many.

    [environments.tic-tac-toe]
    kind = "textarena"
    id = "TicTacToe-v0"
    players = 2

A player sees what TextArena queued for it since its last move, without its own moves; the first time this includes the
rules. Of an id's wrappers, those that read moves are used and those that sum up observations are not. All rewards come
with the game's last step. TextArena decides which moves are invalid and how many of them it tolerates.

The games draw from the global generators of Python and numpy, which concurrent episodes would share. So in TextArena's
modules these names are replaced by the generators of the episode that the thread is playing.
"""

from __future__ import annotations

import importlib
import random
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from mulligan.common.rewards import read_reward
from mulligan.env import numbered
from mulligan.env.base import (
    EnvironmentInfo,
    MissingExtra,
    Split,
    StepResult,
    TaskInfo,
)
from mulligan.env.numbered import MAX_TASKS
from mulligan.env.prompts import generic_prompts
from mulligan.env.tool_calls import printable

_FIRST_SEED = {Split.TRAIN: 0, Split.TEST: MAX_TASKS + 1}
_LOST = -1.0  # TextArena's default reward of an invalid move too many
_SHOWN = 200  # characters of a move in a reading
_LONG_NUMBER = re.compile(r"(\d{1000})\d+")  # no game has a use for it, and some would be stopped by Python's limit
_TASK = "You are playing a text game. The first message gives its rules; each later one says what happened since."
_FORMAT = "Answer with your move, written exactly as the rules of the game ask for it."
# Games in which a language model of an outside service answers or judges: no two plays are alike.
_JUDGED = ("Debate", "GuessWho", "ScenarioPlanning", "TwentyQuestions")


@dataclass(frozen=True, slots=True)
class Settings:
    """`arguments` are passed to the game's constructor and override those of its id. `max_steps` counts the moves of
    all players, including invalid ones. `max_reward` is the most that one player can get."""

    id: str
    players: int
    arguments: dict[str, Any] = field(default_factory=dict)
    max_steps: int = 100
    max_reward: float = 1.0
    train_tasks: int = 1000
    test_tasks: int = 100
    task: str = _TASK
    action_format: str = _FORMAT

    def __post_init__(self) -> None:
        for setting, number in (("players", self.players), ("max_steps", self.max_steps)):
            if number < 1:
                raise ValueError(f"{setting} must be at least 1, not {number}")
        for setting, number in (("train_tasks", self.train_tasks), ("test_tasks", self.test_tasks)):
            if not 0 <= number <= MAX_TASKS:
                raise ValueError(f"{setting} must be between 0 and {MAX_TASKS} (ids have five digits), not {number}")


class Chance:
    """The random generators of one episode."""

    def __init__(self, seed: int) -> None:
        import numpy

        self.python = random.Random(seed)
        self.numpy = numpy.random.RandomState(seed)

    @contextmanager
    def rules(self) -> Iterator[None]:
        """Within it, what this thread plays draws from these generators."""
        _playing.chance = self
        try:
            yield
        finally:
            _playing.chance = None


class _Playing(threading.local):
    chance: Chance | None = None


_playing = _Playing()
_beginning = threading.Lock()  # a game may draw up its board in global variables; Sokoban does


class TextArenaEpisode:
    """`game` is what TextArena made: wrapped, and not started."""

    def __init__(self, game: Any, seed: int, settings: Settings) -> None:
        self._wrapped = game
        self._chance = Chance(seed)
        self._settings = settings
        self._steps = 0
        with _beginning, self._chance.rules():
            game.reset(num_players=settings.players, seed=seed)
        self.player, self.observation = self._look()

    def step(self, action: str) -> StepResult:
        self._steps += 1
        acting = self.player
        state = self._game.state
        errors, out = self._errors(acting)
        with self._chance.rules():
            done, _ = self._wrapped.step(action=_LONG_NUMBER.sub(r"\1", action))
        now_errors, now_out = self._errors(acting)
        is_invalid = now_errors > errors or now_out > out
        reading = (printable(action, _SHOWN) or "(nothing)") + (" (invalid)" if is_invalid else "")
        truncated = not done and self._steps >= self._settings.max_steps
        rewards = self._rewards() if done else [0.0] * self._settings.players
        self.player, self.observation = self._look(at_end_of=acting if done else None)
        feedback = ""
        if done or truncated:
            reason = state.game_info.get(acting, {}).get("reason") if done else "The step limit was reached."
            feedback = str(reason or "The game is over.")
        several = self._settings.players > 1
        return StepResult(
            self.observation,
            reading,
            rewards[acting],
            done=bool(done) or truncated,
            truncated=truncated,
            feedback=feedback,
            player=self.player,
            rewards=tuple(rewards) if several else (),
        )

    def fork(self) -> TextArenaEpisode:
        return deepcopy(self)

    @property
    def _game(self) -> Any:
        """The game without its wrappers."""
        import textarena

        game = self._wrapped
        while isinstance(game, textarena.Wrapper):
            game = game.env
        return game

    def _errors(self, player: int) -> tuple[int, bool]:
        """The number of invalid moves in a row, and whether the player lost the game by one."""
        state = self._game.state
        return getattr(state, "error_count", 0), bool(state.game_info.get(player, {}).get("invalid_move"))

    def _look(self, at_end_of: int | None = None) -> tuple[int, str]:
        """Whose turn it is and what that player sees. If the game is over and it is nobody's turn: the last
        player's."""
        import textarena

        state = self._game.state
        if at_end_of is not None and state.current_player_id not in range(self._settings.players):
            state.current_player_id = at_end_of
        with self._chance.rules():
            player, messages = self._game.get_observation()
        names = state.role_mapping
        lines = (
            f"[{names.get(sender, f'Player {sender}')}] {text}"
            for sender, text, kind in messages
            if not (sender == player and kind is textarena.ObservationType.PLAYER_ACTION)
        )
        return int(player), "\n".join(lines)

    def _rewards(self) -> list[float]:
        """The rewards of a finished game, by player."""
        with self._chance.rules():
            rewards, _ = self._game.close()
        values = [(rewards or {}).get(player, 0.0) for player in range(self._settings.players)]
        # Where some games of TextArena 0.7.4 mean to end at an invalid move, they mix up its arguments.
        return [_LOST if isinstance(value, str) else read_reward(value) for value in values]


class TextArena:
    """`game` is copied for each episode."""

    def __init__(self, name: str, settings: Settings, game: Any) -> None:
        self._settings = settings
        self._game = game
        self._counts = {Split.TRAIN: settings.train_tasks, Split.TEST: settings.test_tasks}
        played = game.entry_point.split(":")[0] if isinstance(game.entry_point, str) else ""
        self.info = EnvironmentInfo(
            name=name,
            description=f"TextArena's {settings.id}, {settings.players} player{'s' * (settings.players > 1)}",
            prompts=generic_prompts(settings.task, settings.action_format),
            max_steps=settings.max_steps,
            max_reward=settings.max_reward,
            deterministic=not any(f".{judged}." in played for judged in _JUDGED),
            task_counts=self._counts,
            can_fork=True,
            player_count=settings.players,
        )

    def list_tasks(self, split: Split, offset: int, limit: int) -> Sequence[TaskInfo]:
        return [TaskInfo(task_id, split, 0.0) for task_id in numbered.ids(split, offset, limit, self._counts)]

    def start(self, task_id: str) -> TextArenaEpisode:
        return TextArenaEpisode(deepcopy(self._game), self._seed(task_id), self._settings)

    def _seed(self, task_id: str) -> int:
        split, number = numbered.read_id(task_id, self._counts, self.info.name)
        return _FIRST_SEED[split] + number


def create(name: str, settings: Settings) -> TextArena:
    """Raises MissingExtra, and ValueError for a game that cannot be played here: the
    game is made and started once."""
    try:
        import nltk  # noqa: F401 - needed below, as numpy is
        import numpy  # noqa: F401
        import textarena
    except ImportError as error:
        raise MissingExtra("textarena", error) from error
    _isolate()
    registered = textarena.envs.registration.ENV_REGISTRY
    if settings.id not in registered:
        near = sorted(each for each in registered if each.split("-")[0].lower() == settings.id.split("-")[0].lower())
        hint = f"there are: {', '.join(near)}" if near else f"there are {len(registered)}, such as TicTacToe-v0"
        raise ValueError(f"id: TextArena {textarena.__version__} has no {settings.id!r}; {hint}")
    environment = TextArena(name, settings, _make(settings))
    try:
        TextArenaEpisode(deepcopy(environment._game), 0, settings)
    except (AssertionError, ValueError) as error:  # how the games refuse a number of players
        raise ValueError(f"players: {settings.id} does not begin with {settings.players}: {error}") from error
    except Exception as error:
        raise ValueError(f"id: {settings.id} does not begin: {type(error).__name__}: {error}") from error
    return environment


def _make(settings: Settings) -> Any:
    import textarena

    wanted: list[str] = []
    with _without_downloads(wanted), Chance(0).rules():
        try:
            entry = textarena.envs.registration.ENV_REGISTRY[settings.id].entry_point
            if isinstance(entry, str):
                importlib.import_module(entry.partition(":")[0])
            _isolate()  # the game's own modules
            return textarena.make(settings.id, **settings.arguments)
        except LookupError as error:
            wanted += re.findall(r"nltk\.download\('(\w+)'\)", str(error))
            if type(error) is not LookupError or not wanted:
                raise _cannot_make(settings, error) from error
            data = " ".join(dict.fromkeys(wanted))
            raise ValueError(f"id: {settings.id} needs data of NLTK: python -m nltk.downloader {data}") from error
        except SyntaxError as error:
            version = f"{sys.version_info.major}.{sys.version_info.minor}"
            raise ValueError(f"id: {settings.id} is not written for Python {version}: {error}") from error
        except Exception as error:
            raise _cannot_make(settings, error) from error


def _cannot_make(settings: Settings, error: Exception) -> ValueError:
    given = f" with arguments {settings.arguments}" if settings.arguments else ""
    return ValueError(f"id: {settings.id} cannot be made{given}: {type(error).__name__}: {error}")


_importing = threading.RLock()


@contextmanager
def _without_downloads(wanted: list[str]) -> Iterator[None]:
    """Games download data when they are imported. A server downloads nothing at its start: the error names the data."""
    import nltk

    def note(packages: str | Sequence[str] = (), *args: Any, **kwargs: Any) -> bool:
        wanted.extend([packages] if isinstance(packages, str) else packages)
        return False

    with _importing:
        before = nltk.download
        nltk.download = note
        try:
            yield
        finally:
            nltk.download = before


def _isolate() -> None:
    """Gives all loaded modules of TextArena the generators of the episode, and takes away output and downloads."""
    import nltk
    import numpy

    draws = _OfEpisode(numpy.random, numpy.random.RandomState, lambda chance: chance.numpy, default_rng=_new_numpy)
    replaced: dict[int, object] = {
        id(random): _OfEpisode(random, random.Random, lambda chance: chance.python, Random=_new_random),
        id(numpy): _Instead(numpy, random=draws),
        id(nltk): _Instead(nltk, download=_nothing),
    }
    for name, module in tuple(sys.modules.items()):
        if name.partition(".")[0] == "textarena" and isinstance(module, ModuleType):
            names = vars(module)
            names.update({key: replaced[id(value)] for key, value in tuple(names.items()) if id(value) in replaced})
            names["print"] = _nothing


class _Instead:
    """A module with some of its names replaced."""

    def __init__(self, module: Any, **names: object) -> None:
        self.__dict__.update(names)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _OfEpisode(_Instead):
    """Replaces a module whose functions use one global generator: in an episode they use the episode's generator."""

    def __init__(self, module: Any, kind: type, generator: Callable[[Chance], object], **names: object) -> None:
        super().__init__(module, **names)
        self._kind = kind
        self._generator = generator

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if not hasattr(self._kind, name):
            return found

        def draw(*args: Any, **kwargs: Any) -> Any:  # a game may keep it: whose it is turns out in each call
            chance = _playing.chance
            return (found if chance is None else getattr(self._generator(chance), name))(*args, **kwargs)

        return draw


def _nothing(*args: object, **kwargs: object) -> None:
    pass


def _new_random(seed: Any = None) -> random.Random:
    """A generator; without a seed it is seeded by the episode's generator."""
    chance = _playing.chance
    return random.Random(chance.python.getrandbits(64) if seed is None and chance is not None else seed)


def _new_numpy(seed: Any = None) -> Any:
    import numpy

    chance = _playing.chance
    return numpy.random.default_rng(chance.python.getrandbits(64) if seed is None and chance is not None else seed)
