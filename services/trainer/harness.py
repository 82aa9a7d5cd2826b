"""The harness: plays a policy in an environment, and has it reflect on what happened.

All messages are put together here. Sampled tokens are kept as segments and never rendered again: a later turn is
prompted with a `Continuation`, which holds the tokens so far and the new messages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from mulligan.common.errors import CallFailed, DomainError, Reason
from mulligan.common.experience import Sample, Segment, SegmentKind, TokenSequence, Turn
from mulligan.common.inference import (
    CallOptions,
    Completion,
    Continuation,
    Feature,
    Message,
    PolicyInfo,
    Prompt,
    Role,
    SamplingParams,
    StopReason,
)
from mulligan.common.rewards import total
from mulligan.common.thoughts import without_thoughts
from mulligan.common.types import EnvironmentInfo, Outcome, PromptSet
from mulligan.trainer.interfaces import EnvironmentPort, EpisodeHandle, SamplingClient
from mulligan.trainer.sampling import NamedPolicy
from mulligan.trainer.seeds import derive_seed
from mulligan.trainer.trainable import NO_PROMPT, REWRITTEN_HISTORY, NotDistilled, never_fits, with_usable_reward


def fill(template: str, **values: str) -> str:
    """Replaces each `{name}` in one pass, so that braces inside a value stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), template)


def trace_of(attempt: Sample, prompts: PromptSet) -> str:
    """An episode as text for the reflection: every observation and action, then the last observation."""
    turns = (fill(prompts.trace_turn, observation=turn.observation, action=turn.action) for turn in attempt.turns)
    return "".join(turns) + attempt.final_observation


def reflection_request(episode: Sample, prompts: PromptSet, texts: Sequence[str]) -> str:
    """The user message to a reflector: what happened in the episode, and `texts` from the memory."""
    return fill(
        prompts.reflection,
        trace=trace_of(episode, prompts),
        feedback=episode.feedback,
        reward=f"{episode.reward:g}",
        memory="\n\n".join(texts) or prompts.memory_empty,
    )


def guided_by(text: str, prompts: PromptSet) -> str:
    """The system prompt of an attempt that is given a reflection: its text, then the reminder of the action format."""
    return f"{text}\n{prompts.action_reminder}"


def reflection_in(answer: str, prompts: PromptSet) -> str:
    """The text between the last pair of marks, or the whole answer without a pair. Thoughts are removed before."""
    said = without_thoughts(answer)
    _, opened, tail = said.rpartition(prompts.reflection_open)
    text, closed, _ = tail.partition(prompts.reflection_close)
    return (text if opened and closed else said).strip()


@dataclass
class _Conversation:
    """The messages and token segments of one attempt, turn by turn.

    `sequences` is one token sequence. With `by_messages` it is one per turn: each turn is then prompted with all
    messages, because the chat template rewrites earlier turns or the engine takes no token ids.
    """

    messages: list[Message]
    by_messages: bool
    segments: list[Segment] = field(default_factory=list)
    finished: list[TokenSequence] = field(default_factory=list)
    turn_closed: bool = True

    def prompt(self) -> Prompt:
        if not self.segments or self.by_messages:
            return tuple(self.messages)
        tokens = tuple(token for segment in self.segments for token in segment.token_ids)
        return Continuation(tokens, self.turn_closed, (self.messages[-1],))

    def add(self, completion: Completion) -> None:
        if self.segments and self.by_messages:
            self.finished.append(TokenSequence(tuple(self.segments)))
            self.segments = []
        kind = SegmentKind.ENVIRONMENT if self.segments else SegmentKind.PROMPT
        self.segments.append(Segment(kind, completion.prompt_token_ids))
        self.segments.append(
            Segment(SegmentKind.SAMPLED, completion.token_ids, completion.log_probs, completion.policy_versions)
        )
        self.by_messages = self.by_messages or not completion.token_ids
        self.turn_closed = completion.stop_reason is StopReason.END_OF_TURN
        self.messages.append(Message(Role.ASSISTANT, completion.text))

    @property
    def sequences(self) -> tuple[TokenSequence, ...]:
        return (*self.finished, TokenSequence(tuple(self.segments))) if self.segments else ()


@dataclass(frozen=True)
class Harness:
    """Plays episodes and has texts written.

    `attempt` starts an episode, then repeats: prompt the policy with the observation, send its answer to `step`. It
    starts over when the infrastructure fails. `write` prompts a policy with messages and keeps its answer. `prompts_of`
    gives the prompts that an episode would have had under another system prompt.

    `incarnation` is new in each process, so that a resumed run never meets its earlier episodes. Each episode and each
    text is one session at the policy service: it ends on the model that it began with.
    """

    environment: EnvironmentPort
    policy: SamplingClient
    info: EnvironmentInfo
    policy_info: PolicyInfo
    incarnation: str
    max_restarts: int
    reflector: NamedPolicy | None = None

    async def attempt(
        self,
        attempt_id: str,
        task_id: str,
        system: str,
        sampling: SamplingParams,
        seed: int,
        role: str = "first",
        parent_id: str = "",
    ) -> Sample:
        """Plays a task. After an infrastructure failure it starts over under a new episode id, at most `max_restarts`
        times. Raises ServiceUnavailable when a service stays unreachable."""
        restarts = 0
        while True:
            episode_id = f"{attempt_id}-{self.incarnation}-{restarts}"
            blank = Sample(
                attempt_id,
                role,
                Outcome.TRUNCATED,
                (),
                sampling.temperature,
                parent_id=parent_id,
                system=system,
                episode_id=episode_id,
                restarts=restarts,
            )
            attempt = await self._play(blank, task_id, sampling, seed)
            if attempt.outcome.has_reward or restarts == self.max_restarts or never_fits(attempt):
                return attempt
            restarts += 1

    async def _play(self, blank: Sample, task_id: str, sampling: SamplingParams, seed: int) -> Sample:
        """The sample `blank`, played."""
        episode_id = blank.episode_id
        turns: list[Turn] = []
        by_messages = self.policy_info.rewrites_history or Feature.TOKEN_IDS not in self.policy_info.features
        conversation = _Conversation([Message(Role.SYSTEM, blank.system)], by_messages)
        observation = ""
        tool = ""
        outcome = Outcome.TRUNCATED
        feedback = ""
        error = ""
        blame = Outcome.ENV_ERROR  # the outcome of an exception here
        episode: EpisodeHandle | None = None
        try:
            episode = await self.environment.start(self.info.name, task_id, episode_id)
            observation = episode.observation
            for turn in range(self.info.max_steps):
                conversation.messages.append(_shown(observation, tool))
                blame = Outcome.POLICY_ERROR
                options = CallOptions(request_id=f"{blank.sample_id}-{turn}", session_id=episode_id)
                seeded = replace(sampling, seed=derive_seed(seed, turn))
                async with episode.kept_alive():  # the policy may take longer than the episode's lease
                    completion = await self._answer(conversation, seeded, options)
                if completion is None:
                    break
                conversation.add(completion)
                blame = Outcome.ENV_ERROR
                step = await episode.step(completion.marked_text)
                turns.append(Turn(observation, completion.text, step.action, step.reward or 0.0, tool))
                observation = step.observation
                tool = step.tool
                if step.done:
                    outcome = step.outcome or Outcome.ENV_ERROR
                    feedback = step.feedback
                    error = step.error
                    break
        except (DomainError, CallFailed) as failure:
            outcome = _outcome_of(failure, blame)
            error = str(failure)
        finally:
            if episode is not None and not (turns and outcome is Outcome.COMPLETED):
                await _end(episode)
        attempt = replace(
            blank,
            outcome=outcome,
            reward=total(turn.reward for turn in turns) if outcome.has_reward else None,
            feedback=feedback,
            turns=tuple(turns),
            final_observation=observation,
            sequences=conversation.sequences,
            error=error,
        )
        return with_usable_reward(attempt)

    async def write(
        self,
        blank: Sample,
        user: str,
        sampling: SamplingParams,
        seed: int,
        speaker: NamedPolicy | None = None,
        read: Callable[[str], str] = without_thoughts,
    ) -> Sample:
        """The text sample `blank`, written: the policy's answer to its system prompt and the message `user`.

        `speaker` is another policy than the trained one. `read` takes the text out of the answer, which has its
        thoughts marked. With an outcome other than COMPLETED and TRUNCATED there is no text.
        """
        messages = [Message(Role.SYSTEM, blank.system), Message(Role.USER, user)]
        conversation = _Conversation([message for message in messages if message.content], False)
        name = blank.sample_id
        options = CallOptions(request_id=f"{name}-0", session_id=f"{name}-{self.incarnation}")
        outcome = Outcome.COMPLETED
        text = ""
        error = ""
        try:
            seeded = replace(sampling, seed=derive_seed(seed, 0))
            completion = await (speaker or self.policy).generate(conversation.prompt(), seeded, options)
            conversation.add(completion)
            text = read(completion.marked_text)
            if completion.stop_reason is not StopReason.END_OF_TURN:
                outcome = Outcome.TRUNCATED
        except (DomainError, CallFailed) as failure:
            outcome = _outcome_of(failure, Outcome.POLICY_ERROR)
            error = str(failure)
        return replace(
            blank,
            outcome=outcome,
            text=text,
            sequences=conversation.sequences,
            temperature=sampling.temperature,
            error=error,
            policy=speaker.name if speaker else "",
        )

    async def prompts_of(self, episode: Sample, system: str, like: Sample | None = None) -> list[tuple[int, ...]]:
        """The token ids of the prompt that each sequence of an episode has under the system prompt `system`.

        `like` is an episode that was played under it: where both began with the same observation, its prompt is the
        answer. Raises NotDistilled when a sequence's first turn is unknown, or the policy reports no prompt tokens.
        """
        count = len(episode.sequences)
        known = like.sequences[:1] if like is not None else ()
        if count not in (1, len(episode.turns)) or not all(one.has_prompt for one in (*known, *episode.sequences)):
            raise NotDistilled(REWRITTEN_HISTORY)
        same = like is not None and known and like.turns[0].observation == episode.turns[0].observation
        if count == 1 and same and not self.policy_info.rewrites_history:
            return [known[0].segments[0].token_ids]
        messages = [Message(Role.SYSTEM, system)]
        options = CallOptions(session_id=episode.episode_id, tools=self.info.tools)
        prompts = []
        for turn in episode.turns[: len(episode.sequences)]:
            messages.append(_shown(turn.observation, turn.tool))
            try:
                prompts.append(await self.policy.tokenize(tuple(messages), options))
            except (DomainError, CallFailed) as error:
                raise NotDistilled(NO_PROMPT) from error
            messages.append(Message(Role.ASSISTANT, turn.text))
        return prompts

    async def _answer(
        self, conversation: _Conversation, sampling: SamplingParams, options: CallOptions
    ) -> Completion | None:
        """None when the conversation no longer fits the policy's context. Raises DomainError PROMPT_TOO_LONG when the
        first prompt does not fit."""
        try:
            return await self._ask(conversation, sampling, options)
        except DomainError as error:
            if error.reason is not Reason.PROMPT_TOO_LONG:
                raise
            if conversation.segments:
                return None
            tokens = error.metadata.get("token_count", "too many")
            context = error.metadata.get("context_length", self.policy_info.context_length)
            message = f"the first prompt has {tokens} tokens, and the policy's context is {context}: {error.message}"
            raise DomainError(error.reason, message) from error

    async def _ask(self, conversation: _Conversation, sampling: SamplingParams, options: CallOptions) -> Completion:
        shows_tools = replace(options, tools=self.info.tools)
        prompt = conversation.prompt()
        try:  # a continuation's tokens include the tools already
            return await self.policy.generate(
                prompt, sampling, options if isinstance(prompt, Continuation) else shows_tools
            )
        except DomainError as error:
            if error.reason is not Reason.TEMPLATE_REWRITES_HISTORY or conversation.by_messages:
                raise
        conversation.by_messages = True  # the policy has another model than when `policy_info` was read
        return await self.policy.generate(conversation.prompt(), sampling, shows_tools)


def _shown(observation: str, tool: str) -> Message:
    """The observation as a message: of the tool, or of the user."""
    return Message(Role.TOOL, observation, name=tool) if tool else Message(Role.USER, observation)


def _outcome_of(failure: DomainError | CallFailed, blame: Outcome) -> Outcome:
    return Outcome.TIMEOUT if isinstance(failure, CallFailed) and failure.timed_out else blame


async def _end(episode: EpisodeHandle) -> None:
    """Ends an episode. One that cannot be reached expires by itself."""
    try:
        await episode.end()
    except (DomainError, CallFailed):
        return
