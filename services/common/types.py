"""Domain types that services share. Frozen; none knows protobuf. Conversions are in `wire.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from mulligan.common.inference import Tool, VersionSpan


class Outcome(StrEnum):
    """How an attempt ended. Only the first two carry a reward: an infrastructure failure is never reward 0."""

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
    """A run of tokens of one origin. Only sampled ones carry loss, and log-probabilities in the context of sampling."""

    kind: SegmentKind
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...] = ()
    policy_versions: tuple[VersionSpan, ...] = ()

    @property
    def loss(self) -> bool:
        return self.kind is SegmentKind.SAMPLED


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """What went through the policy, start to end: only ever appended to, never decoded and encoded again."""

    segments: tuple[Segment, ...]

    @property
    def token_ids(self) -> list[int]:
        return [token for segment in self.segments for token in segment.token_ids]

    @property
    def loss_mask(self) -> list[bool]:
        return [segment.loss for segment in self.segments for _ in segment.token_ids]

    @property
    def log_probs(self) -> list[float]:
        """Of the sampled tokens, in order."""
        return [value for segment in self.segments for value in segment.log_probs]

    @property
    def sampled_count(self) -> int:
        return sum(len(segment.token_ids) for segment in self.segments if segment.loss)

    @property
    def has_prompt(self) -> bool:
        """Whether it begins with one, as all do that the policy reported the tokens of."""
        return bool(self.segments) and self.segments[0].kind is SegmentKind.PROMPT

    def with_prompt(self, prompt_token_ids: Sequence[int]) -> TokenSequence:
        """The same tokens after another prompt, without log-probabilities: they belong to the old context."""
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
    text: str  # the agent's answer, decoded, for people; training reads the token sequences
    action: str  # the environment's reading of it
    reward: float
    tool: str = ""  # whose answer the observation was; empty: the environment spoke as the user


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at a task. `reward` is None unless the outcome carries one. `sequences` has one element, or one per turn
    when the chat template rewrites earlier turns."""

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
    """`outcome` is of the generation; `reward` is the second attempt's, None until that has one. `policy` names the
    policy that wrote it, where that is not the one that is trained."""

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
        """The version that wrote its last token; 0 when nothing was sampled."""
        spans = [
            span for sequence in self.sequences for segment in sequence.segments for span in segment.policy_versions
        ]
        return spans[-1].policy_version if spans else 0


@dataclass(frozen=True, slots=True)
class DistilledTarget:
    """A successful second attempt under the first attempt's prompt. Its segments carry no log-probabilities."""

    distilled_id: str
    source_attempt_id: str
    sequences: tuple[TokenSequence, ...]
    reward: float


@dataclass(frozen=True, slots=True)
class Experience:
    """One chain y1 → f1 → Δ → y2 → distillation. Parts that are None did not happen. `not_distilled` is why a second
    attempt that succeeded has no distilled copy, in a word."""

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
        """What the policy sampled, in order."""
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
    """The texts with which an agent is addressed; `{name}` marks a placeholder, filled by plain substitution.

    Prompts belong to the environment, so that an algorithm needs to know none. Which text goes into which message is
    the trainer's business (`services/trainer/harness.py`).
    """

    solver: str  # system prompt of a first attempt: x. No placeholders.
    action_reminder: str  # follows a reflection in the second attempt's system prompt. No placeholders.
    reflection_system: str  # system prompt of the reflector. No placeholders.
    reflection: str  # the reflector's user message: {trace} {feedback} {reward} {memory}
    memory_empty: str  # stands for {memory} while the memory holds nothing
    trace_turn: str  # one turn of {trace}: {observation} {action}
    retry: str  # "without reflection": second attempt's system prompt: {trace} {feedback}
    try_again: str  # unary feedback: second attempt's system prompt. No placeholders.
    reflection_open: str = "<prompt>"  # the reflection is the text between the last such pair of marks…
    reflection_close: str = "</prompt>"  # …or, when either is absent, the reflector's whole answer


@dataclass(frozen=True, slots=True)
class EnvironmentInfo:
    name: str
    description: str
    prompts: PromptSet
    max_steps: int  # the true limit: an episode ends at this many steps
    max_reward: float
    deterministic: bool  # same task, same actions → same observations and rewards
    task_counts: dict[Split, int]
    tools: tuple[Tool, ...] = ()  # what the agent may call; the environment finds the calls in its answer
    unavailable: str = ""  # why no episode can be started here
    can_fork: bool = False  # its episodes have `fork`
    player_count: int = 1  # how many take turns in an episode


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """A task is reproducible from its id alone, on any machine."""

    task_id: str
    split: Split
    difficulty: float  # in the environment's own unit; FrozenLake, Sokoban: moves of the shortest solution


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one action led to.

    `observation` is all that the agent sees during the attempt, no-effect notices included. `action` is the
    environment's reading of the agent's text ("Up", "Up (no effect)", "invalid"): it appears in traces shown to a
    reflector. `feedback` is set on the last step only and never enters the attempt's own context. `tool` names the tool
    whose answer the observation is; empty: it speaks as the user. In a game of several players `player` is whose turn
    it is next, and who sees the observation; `reward` is of the one who acted, and `rewards` has one of each player.
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
    """A step as the environment service answers it. `reward` is None when the step failed; `outcome` and `feedback`
    are set once the episode is over."""

    observation: str
    action: str
    reward: float | None
    done: bool
    outcome: Outcome | None = None
    feedback: str = ""
    error: str = ""
    tool: str = ""
    player: int = 0  # whose turn it is next
    rewards: tuple[float, ...] = ()  # of each player, where there are several


class RetrievalStrategy(StrEnum):
    LATEST_SUCCESS = "latest_success"  # the paper's
    TOP_GAIN = "top_gain"  # greatest reward_after - reward_before; among equals the latest


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a reflection comes from and what it did."""

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
    """`version` is the scope's version that the write made; `deleted_version` the one from which it is forgotten."""

    reflection_id: str
    scope: str
    text: str
    provenance: Provenance
    version: int
    created_at: datetime
    deleted_version: int | None = None
