"""What a policy experienced: samples with their tokens, the tree that they form, and what was trained on.

Frozen, without protobuf; `experience_wire.py` converts them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import chain, repeat

from mulligan.common.inference import VersionSpan
from mulligan.common.rewards import total
from mulligan.common.types import Outcome


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
        return [*chain.from_iterable(segment.token_ids for segment in self.segments)]

    @property
    def loss_mask(self) -> list[bool]:
        return [*chain.from_iterable(repeat(segment.loss, len(segment.token_ids)) for segment in self.segments)]

    @property
    def log_probs(self) -> list[float]:
        """Log-probabilities of the sampled tokens, in order."""
        return [*chain.from_iterable(segment.log_probs for segment in self.segments)]

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
    sent: str | None = None  # what the environment was given, such as marked thoughts, if that is not `text`

    @property
    def is_invalid(self) -> bool:
        """Whether the environment found no action in the answer. It then reads "invalid" or "… (invalid)"."""
        return self.action == "invalid" or self.action.endswith("(invalid)")


@dataclass(frozen=True, slots=True)
class ForkPoint:
    """The state of an episode after `step_index` steps."""

    episode_id: str
    step_index: int


@dataclass(frozen=True, slots=True)
class Sample:
    """What a policy sampled for one role of an experience: an episode that it played, or a text that it wrote.

    - `sample_id` is unique in the run. `role` names the purpose, such as "first" or "reflection"; an experience may
      have several samples of one role. `parent_id` is the sample that this one follows from: which was reflected on,
      tried again, or forked.
    - `reward` of an episode is that of the environment, None unless the outcome carries one. A text has the reward that
      the algorithm credits it with, None before that. `reward_parts` are the addends or components, by name.
    - `sequences` has one element; if the chat template rewrites earlier turns, it has one per turn. `system` is the
      system prompt.
    - `policy` names the policy that sampled it, if that is not the trained one.
    """

    sample_id: str
    role: str
    outcome: Outcome
    sequences: tuple[TokenSequence, ...]
    temperature: float
    reward: float | None = None
    reward_parts: Mapping[str, float] = field(default_factory=dict)
    parent_id: str = ""
    policy: str = ""
    system: str = ""
    error: str = ""
    turns: tuple[Turn, ...] = ()  # of a text one: the message that asked for it, and the whole answer
    # Of a text:
    text: str = ""
    # Of an episode:
    episode_id: str = ""
    feedback: str = ""
    final_observation: str = ""
    restarts: int = 0
    forked_from: ForkPoint | None = None
    try_turns: tuple[int, ...] = ()  # turns of each try, where one conversation holds several; the last one's reward

    @classmethod
    def planned(cls, sample_id: str, role: str, system: str, parent_id: str = "") -> Sample:
        """One that is still to be sampled."""
        return cls(sample_id, role, Outcome.TRUNCATED, (), 1.0, system=system, parent_id=parent_id)

    @property
    def tries(self) -> list[tuple[Turn, ...]]:
        """The turns of each try; all turns, where there was a single one."""
        counts = self.try_turns or (len(self.turns),)
        starts = [sum(counts[:index]) for index in range(len(counts))]
        return [self.turns[start : start + count] for start, count in zip(starts, counts, strict=True)]

    @property
    def try_rewards(self) -> list[float]:
        """The reward of each try."""
        return [total(turn.reward for turn in turns) for turns in self.tries]

    @property
    def is_episode(self) -> bool:
        return bool(self.episode_id)

    @property
    def policy_version(self) -> int:
        """The version that sampled its last token; 0 if nothing was sampled."""
        spans = [
            span for sequence in self.sequences for segment in sequence.segments for span in segment.policy_versions
        ]
        return spans[-1].policy_version if spans else 0


@dataclass(frozen=True, slots=True)
class TrainingTarget:
    """Tokens to train on that were not sampled as they stand here: those of a sample under another prompt, or of
    several samples in a row. Its segments carry no log-probabilities. `system` is the system prompt that it stands
    under."""

    target_id: str
    role: str
    source_id: str  # the sample whose tokens are trained
    sequences: tuple[TokenSequence, ...]
    system: str = ""


@dataclass(frozen=True, slots=True)
class Trained:
    """What one datum of the learner was: the tokens of a sample or target, the objective and its numbers.

    `values` has the arrays of one value per trained token that the algorithm gave, such as advantages. `others` names
    the sample or target of each further token sequence of the objective, such as "rejected".
    """

    datum_id: str
    source_id: str  # of the sample or target
    sequence: int  # which of its sequences
    branch: str
    objective: str
    weight: float
    numbers: Mapping[str, float] = field(default_factory=dict)
    values: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    others: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Experience:
    """One member of a group: a tree of samples in the order of sampling, and the targets that were made of them.

    `memory_entry_ids` are the entries of the reflection memory that its samples were shown. `memory_use_id` is the use
    of them that was drawn for it and read, `memory_left_out_id` the entry that this use left out; both may be empty.
    `untrained` has keywords that say why a target could not be made. `trained` is what the learner was given of it;
    empty while its step runs.
    """

    experience_id: str
    run_id: str
    step: int
    environment: str
    task_id: str
    rollout: int
    samples: tuple[Sample, ...]
    targets: tuple[TrainingTarget, ...] = ()
    memory_entry_ids: tuple[str, ...] = ()
    untrained: tuple[str, ...] = ()
    algorithm: str = "erl"
    trained: tuple[Trained, ...] = ()
    memory_use_id: str = ""
    memory_left_out_id: str = ""

    def __getitem__(self, role: str) -> Sample:
        """The first sample of the role. Raises KeyError."""
        sample = self.sample(role)
        if sample is None:
            raise KeyError(role)
        return sample

    def sample(self, role: str) -> Sample | None:
        """The first sample of the role."""
        return next((sample for sample in self.samples if sample.role == role), None)

    def target(self, role: str) -> TrainingTarget | None:
        """The first target of the role."""
        return next((target for target in self.targets if target.role == role), None)

    def source(self, target: TrainingTarget) -> Sample:
        return next(sample for sample in self.samples if sample.sample_id == target.source_id)
