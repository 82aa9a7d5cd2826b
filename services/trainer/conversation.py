"""A conversation of a policy with an environment: its messages, and the tokens that were sampled.

Sampled tokens are kept as segments and never rendered again: a later turn is prompted with a `Continuation`, which
holds the tokens so far and the new messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mulligan.common.experience import Segment, SegmentKind, TokenSequence, Turn
from mulligan.common.inference import Completion, Continuation, Message, Prompt, Role, StopReason


def shown(observation: str, tool: str) -> Message:
    """The observation as a message: of the tool, or of the user."""
    return Message(Role.TOOL, observation, name=tool) if tool else Message(Role.USER, observation)


@dataclass
class Conversation:
    """The messages and token segments of one attempt, turn by turn.

    `sequences` is one token sequence. With `by_messages` it is one per turn: each turn is then prompted with all
    messages, because the chat template rewrites earlier turns or the engine takes no token ids. `begun` are the tokens
    of an earlier episode that the conversation goes on from; they are part of its prompt.
    """

    messages: list[Message]
    by_messages: bool
    segments: list[Segment] = field(default_factory=list)
    finished: list[TokenSequence] = field(default_factory=list)
    turn_closed: bool = True
    begun: list[int] = field(default_factory=list)

    def recall(self, turns: Sequence[Turn]) -> None:
        """Adds the messages of earlier turns."""
        for turn in turns:
            self.messages += [shown(turn.observation, turn.tool), Message(Role.ASSISTANT, turn.text)]

    def prompt(self) -> Prompt:
        if self.begun and not self.segments and not self.by_messages:
            return self.begun
        if not self.segments or self.by_messages:
            return tuple(self.messages)
        tokens = tuple(token for segment in self.segments for token in segment.token_ids)
        return Continuation(tokens, self.turn_closed, (self.messages[-1],))

    def add(self, completion: Completion) -> None:
        if self.segments and self.by_messages:
            self.finished.append(TokenSequence(tuple(self.segments)))
            self.segments = []
        was_begun = self.prompt() is self.begun  # the policy does not report tokens that it was given
        kind = SegmentKind.ENVIRONMENT if self.segments else SegmentKind.PROMPT
        self.segments.append(Segment(kind, tuple(self.begun) if was_begun else completion.prompt_token_ids))
        self.segments.append(
            Segment(SegmentKind.SAMPLED, completion.token_ids, completion.log_probs, completion.policy_versions)
        )
        self.by_messages = self.by_messages or not completion.token_ids
        self.turn_closed = completion.stop_reason is StopReason.END_OF_TURN
        self.messages.append(Message(Role.ASSISTANT, completion.text))

    @property
    def sequences(self) -> tuple[TokenSequence, ...]:
        return (*self.finished, TokenSequence(tuple(self.segments))) if self.segments else ()
