"""The harness: plays a policy in an environment, and has it reflect on what happened.

All messages are put together here. Sampled tokens are kept as segments and never rendered again: a later turn is
prompted with a `Continuation`, which holds the tokens so far and the new messages.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from mulligan.common.errors import CallFailed, DomainError, Reason
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
from mulligan.common.types import (
    Attempt,
    EnvironmentInfo,
    Outcome,
    PromptSet,
    Reflection,
    Segment,
    SegmentKind,
    TokenSequence,
    Turn,
)
from mulligan.trainer.interfaces import EnvironmentPort, EpisodeHandle, SamplingClient
from mulligan.trainer.sampling import NamedPolicy
from mulligan.trainer.seeds import derive_seed
from mulligan.trainer.trainable import NO_PROMPT, REWRITTEN_HISTORY, NotDistilled, never_fits, with_usable_reward


def fill(template: str, **values: str) -> str:
    """Replaces each `{name}` in one pass, so that braces inside a value stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), template)


def trace_of(attempt: Attempt, prompts: PromptSet) -> str:
    """The attempt as text for the reflection: every observation and action, then the last observation."""
    turns = (fill(prompts.trace_turn, observation=turn.observation, action=turn.action) for turn in attempt.turns)
    return "".join(turns) + attempt.final_observation


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
    """Plays attempts and writes reflections.

    `attempt` starts an episode, then repeats: prompt the policy with the observation, send its answer to `step`. It
    starts over when the infrastructure fails. `reflect` prompts `reflector`, or `policy` if that is None, with the
    trace of an attempt. `first_prompts` gives the prompts under which a second attempt is distilled.

    `incarnation` is new in each process, so that a resumed run never meets its earlier episodes. Each episode and each
    reflection is one session at the policy service: it ends on the model that it began with.
    """

    environment: EnvironmentPort
    policy: SamplingClient
    info: EnvironmentInfo
    policy_info: PolicyInfo
    incarnation: str
    max_restarts: int
    reflector: NamedPolicy | None = None

    async def attempt(self, attempt_id: str, task_id: str, system: str, sampling: SamplingParams, seed: int) -> Attempt:
        """Plays a task. After an infrastructure failure it starts over under a new episode id, at most `max_restarts`
        times. Raises ServiceUnavailable when a service stays unreachable."""
        restarts = 0
        while True:
            episode_id = f"{attempt_id}-{self.incarnation}-{restarts}"
            attempt = await self._play(attempt_id, episode_id, task_id, system, sampling, seed)
            if attempt.outcome.has_reward or restarts == self.max_restarts or never_fits(attempt):
                return replace(attempt, restarts=restarts)
            restarts += 1

    async def _play(
        self, attempt_id: str, episode_id: str, task_id: str, system: str, sampling: SamplingParams, seed: int
    ) -> Attempt:
        turns: list[Turn] = []
        by_messages = self.policy_info.rewrites_history or Feature.TOKEN_IDS not in self.policy_info.features
        conversation = _Conversation([Message(Role.SYSTEM, system)], by_messages)
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
                options = CallOptions(request_id=f"{attempt_id}-{turn}", session_id=episode_id)
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
        reward = total(turn.reward for turn in turns) if outcome.has_reward else None
        attempt = Attempt(
            attempt_id=attempt_id,
            episode_id=episode_id,
            outcome=outcome,
            reward=reward,
            feedback=feedback,
            turns=tuple(turns),
            final_observation=observation,
            sequences=conversation.sequences,
            temperature=sampling.temperature,
            error=error,
        )
        return with_usable_reward(attempt)

    async def reflect(
        self, reflection_id: str, first: Attempt, memory: str, sampling: SamplingParams, seed: int
    ) -> Reflection:
        """Δ ~ π(·|x, y1, f1, r1, m). With an outcome other than COMPLETED and TRUNCATED there is no text."""
        prompts = self.info.prompts
        request = fill(
            prompts.reflection,
            trace=trace_of(first, prompts),
            feedback=first.feedback,
            reward=f"{first.reward:g}",
            memory=memory or prompts.memory_empty,
        )
        conversation = _Conversation(
            [Message(Role.SYSTEM, prompts.reflection_system), Message(Role.USER, request)], False
        )
        options = CallOptions(request_id=f"{reflection_id}-0", session_id=f"{reflection_id}-{self.incarnation}")
        speaker, writer = (self.reflector, self.reflector.name) if self.reflector else (self.policy, "")
        outcome = Outcome.COMPLETED
        text = ""
        error = ""
        try:
            sampling = replace(sampling, seed=derive_seed(seed, 0))
            completion = await speaker.generate(conversation.prompt(), sampling, options)
            conversation.add(completion)
            text = reflection_in(completion.marked_text, prompts)
            if completion.stop_reason is not StopReason.END_OF_TURN:
                outcome = Outcome.TRUNCATED
        except (DomainError, CallFailed) as failure:
            outcome = _outcome_of(failure, Outcome.POLICY_ERROR)
            error = str(failure)
        return Reflection(
            reflection_id, text, conversation.sequences, sampling.temperature, outcome, error=error, policy=writer
        )

    def second_system(self, reflection: Reflection) -> str:
        """The system prompt of the second attempt: the reflection, then the reminder of the action format."""
        return f"{reflection.text}\n{self.info.prompts.action_reminder}"

    async def first_prompts(self, first: Attempt, second: Attempt) -> list[tuple[int, ...]]:
        """The token ids of the prompt that each sequence of the second attempt has under x, without the reflection.

        Raises NotDistilled when a sequence's first turn is unknown, or the policy reports no prompt tokens.
        """
        count = len(second.sequences)
        if count not in (1, len(second.turns)) or not all(
            one.has_prompt for one in (*first.sequences[:1], *second.sequences)
        ):
            raise NotDistilled(REWRITTEN_HISTORY)
        same = first.sequences and first.turns[0].observation == second.turns[0].observation
        if count == 1 and same and not self.policy_info.rewrites_history:
            return [first.sequences[0].segments[0].token_ids]
        messages = [Message(Role.SYSTEM, self.info.prompts.solver)]
        options = CallOptions(session_id=second.episode_id, tools=self.info.tools)
        prompts = []
        for turn in second.turns[: len(second.sequences)]:
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
