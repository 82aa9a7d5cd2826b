"""Domain types that services share. Frozen, without protobuf; `wire.py` converts them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from mulligan.common.inference import Tool


class Outcome(StrEnum):
    """How an attempt ended. Only COMPLETED and TRUNCATED attempts carry a reward; infrastructure errors never count as
    reward 0."""

    COMPLETED = "completed"
    TRUNCATED = "truncated"
    ENV_ERROR = "env_error"
    POLICY_ERROR = "policy_error"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"

    @property
    def has_reward(self) -> bool:
        return self in (Outcome.COMPLETED, Outcome.TRUNCATED)


class Split(StrEnum):
    TRAIN = "train"
    TEST = "test"


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The texts that an environment gives its agents; `{name}` marks a placeholder, which is replaced as plain text.

    Prompts belong to the environment, so an algorithm needs to know none. The trainer decides which text goes into
    which message (`services/trainer/harness.py`).
    """

    solver: str  # system prompt of a first attempt: x. No placeholders.
    action_reminder: str  # follows a reflection in the second attempt's system prompt. No placeholders.
    reflection_system: str  # system prompt of the reflector. No placeholders.
    reflection: str  # the reflector's user message: {trace} {feedback} {reward} {memory}
    memory_empty: str  # replaces {memory} while the memory is empty
    trace_turn: str  # one turn of {trace}: {observation} {action}
    retry: str  # "without reflection": second attempt's system prompt: {trace} {feedback}
    try_again: str  # unary feedback: second attempt's system prompt. No placeholders.
    reflection_open: str = "<prompt>"  # the reflection is the text between the last pair of these marks…
    reflection_close: str = "</prompt>"  # …or the whole answer if a mark is missing


@dataclass(frozen=True, slots=True)
class EnvironmentInfo:
    name: str
    description: str
    prompts: PromptSet
    max_steps: int  # an episode ends after this many steps
    max_reward: float
    deterministic: bool  # same task, same actions → same observations and rewards
    task_counts: dict[Split, int]
    tools: tuple[Tool, ...] = ()  # tools that the agent may call; the environment parses the calls in its answer
    unavailable: str = ""  # why no episode can be started; empty if one can
    can_fork: bool = False  # its episodes have `fork`
    player_count: int = 1  # players who take turns in an episode


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """One task. It can be reproduced from its id alone, on any machine."""

    task_id: str
    split: Split
    difficulty: float  # in the environment's own unit; FrozenLake, Sokoban: moves of the shortest solution
    tags: dict[str, str] = field(default_factory=dict, hash=False)  # known names: TaskInfo in mulligan.env.v1


@dataclass(frozen=True, slots=True)
class StepResult:
    """The result of one action.

    - `observation` is all that the agent sees during the attempt, including notices of actions without effect.
    - `action` is the action that the environment read in the agent's text ("Up", "Up (no effect)"). Traces for a
      reflector show it. Where it found none, it is "invalid" or ends in "(invalid)".
    - `feedback` is set on the last step only. It never enters the attempt's own context.
    - `tool` names the tool whose answer the observation is; if empty, the environment speaks as the user.
    - `player` is the player whose turn is next, and who sees the observation. `reward` belongs to the player who acted;
      `rewards` has one reward per player in a game of several.
    """

    observation: str
    action: str
    reward: float = 0.0  # of this step; an attempt's reward is the sum
    done: bool = False
    truncated: bool = False  # done because the step limit was reached
    feedback: str = ""
    tool: str = ""
    player: int = 0
    rewards: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class EpisodeStep:
    """A step as the environment service answers it. `reward` is None if the step failed. `outcome` and `feedback` are
    set when the episode is over."""

    observation: str
    action: str
    reward: float | None
    done: bool
    outcome: Outcome | None = None
    feedback: str = ""
    error: str = ""
    tool: str = ""
    player: int = 0  # whose turn it is next
    rewards: tuple[float, ...] = ()  # one per player in a game of several
