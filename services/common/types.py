"""Domain types that services share. Frozen, without protobuf; `wire.py` converts them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from mulligan.common.inference import Tool, VersionSpan


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


class SegmentKind(StrEnum):
    PROMPT = "prompt"
    SAMPLED = "sampled"
    ENVIRONMENT = "environment"


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens of one origin. Only sampled tokens carry loss, and the log-probabilities from when they were
    sampled."""

    kind: SegmentKind
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...] = ()
    policy_versions: tuple[VersionSpan, ...] = ()

    @property
    def loss(self) -> bool:
        return self.kind is SegmentKind.SAMPLED


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """All tokens of a conversation in order. It is only appended to, and never decoded and encoded again."""

    segments: tuple[Segment, ...]

    @property
    def token_ids(self) -> list[int]:
        return [token for segment in self.segments for token in segment.token_ids]

    @property
    def loss_mask(self) -> list[bool]:
        return [segment.loss for segment in self.segments for _ in segment.token_ids]

    @property
    def log_probs(self) -> list[float]:
        """Log-probabilities of the sampled tokens, in order."""
        return [value for segment in self.segments for value in segment.log_probs]

    @property
    def sampled_count(self) -> int:
        return sum(len(segment.token_ids) for segment in self.segments if segment.loss)

    @property
    def has_prompt(self) -> bool:
        """Whether it begins with a prompt. It does unless the policy reported no prompt tokens."""
        return bool(self.segments) and self.segments[0].kind is SegmentKind.PROMPT

    def with_prompt(self, prompt_token_ids: Sequence[int]) -> TokenSequence:
        """The same tokens after another prompt. Log-probabilities are dropped: they belong to the old context."""
        first, *rest = self.segments
        assert first.kind is SegmentKind.PROMPT
        return TokenSequence(
            (
                Segment(SegmentKind.PROMPT, tuple(prompt_token_ids)),
                *(Segment(segment.kind, segment.token_ids) for segment in rest),
            )
        )


@dataclass(frozen=True, slots=True)
class Turn:
    observation: str
    text: str  # the agent's answer as text, for people; training uses the token sequences
    action: str  # the action that the environment read in it
    reward: float
    tool: str = ""  # the tool that the observation comes from; empty: the environment, as the user


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at a task. `reward` is None unless the outcome carries one. `sequences` has one element; if the chat
    template rewrites earlier turns, it has one per turn."""

    attempt_id: str
    episode_id: str
    outcome: Outcome
    reward: float | None
    feedback: str
    turns: tuple[Turn, ...]
    final_observation: str
    sequences: tuple[TokenSequence, ...]
    temperature: float
    error: str = ""
    restarts: int = 0


@dataclass(frozen=True, slots=True)
class Reflection:
    """What a policy learns from a first attempt. `outcome` is that of its generation. `reward` is the reward of the
    second attempt, None before that. `policy` names the policy that wrote it, if that is not the trained one."""

    reflection_id: str
    text: str
    sequences: tuple[TokenSequence, ...]
    temperature: float
    outcome: Outcome
    reward: float | None = None
    error: str = ""
    policy: str = ""

    @property
    def policy_version(self) -> int:
        """The version that sampled its last token; 0 if nothing was sampled."""
        spans = [
            span for sequence in self.sequences for segment in sequence.segments for span in segment.policy_versions
        ]
        return spans[-1].policy_version if spans else 0


@dataclass(frozen=True, slots=True)
class DistilledTarget:
    """A successful second attempt under the prompt of the first attempt. Its segments carry no log-probabilities."""

    distilled_id: str
    source_attempt_id: str
    sequences: tuple[TokenSequence, ...]
    reward: float


@dataclass(frozen=True, slots=True)
class Experience:
    """One chain: first attempt → reflection → second attempt → distillation. Parts that did not happen are None.
    `not_distilled` is a keyword that says why a successful second attempt was not distilled."""

    experience_id: str
    run_id: str
    step: int
    environment: str
    task_id: str
    rollout: int
    first_attempt: Attempt
    reflection: Reflection | None = None
    second_attempt: Attempt | None = None
    distilled: DistilledTarget | None = None
    memory_entry_ids: tuple[str, ...] = ()
    not_distilled: str = ""

    def parts(self) -> Iterator[Attempt | Reflection]:
        """The attempts and the reflection, in the order of sampling."""
        yield self.first_attempt
        if self.reflection is not None:
            yield self.reflection
        if self.second_attempt is not None:
            yield self.second_attempt


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


@dataclass(frozen=True, slots=True)
class StepResult:
    """The result of one action.

    - `observation` is all that the agent sees during the attempt, including notices of actions without effect.
    - `action` is the action that the environment read in the agent's text ("Up", "Up (no effect)", "invalid"). Traces
      for a reflector show it.
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


class RetrievalStrategy(StrEnum):
    LATEST_SUCCESS = "latest_success"  # as in the paper
    TOP_GAIN = "top_gain"  # largest reward_after - reward_before; ties: the latest


@dataclass(frozen=True, slots=True)
class Provenance:
    """Origin of a reflection, and the rewards before and after it."""

    run_id: str
    experience_id: str
    environment: str
    task_id: str
    policy_version: int
    reward_before: float
    reward_after: float
    success: bool


@dataclass(frozen=True, slots=True)
class StoredReflection:
    """A reflection in the memory. `version` is the version of the scope after the write; `deleted_version` is the
    version from which it is deleted."""

    reflection_id: str
    scope: str
    text: str
    provenance: Provenance
    version: int
    created_at: datetime
    deleted_version: int | None = None
