"""The harness: plays a policy in an environment, and has policies write texts. All messages are put together here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from mulligan.common.errors import CallFailed, DomainError, Reason
from mulligan.common.experience import ForkPoint, Sample, Segment, SegmentKind, TokenSequence, Turn
from mulligan.common.inference import (
    CallOptions,
    Completion,
    Continuation,
    Feature,
    Message,
    PolicyInfo,
    Role,
    SamplingParams,
    StopReason,
)
from mulligan.common.rewards import reaches, total
from mulligan.common.tasks import to_its_end
from mulligan.common.thoughts import without_thoughts
from mulligan.common.tracing import span
from mulligan.common.types import EnvironmentInfo, Outcome
from mulligan.trainer.conversation import Conversation, shown
from mulligan.trainer.interfaces import EnvironmentPort, EpisodeHandle, SamplingClient
from mulligan.trainer.sampling import NamedPolicy
from mulligan.trainer.seeds import derive_seed
from mulligan.trainer.texts import fill
from mulligan.trainer.trainable import (
    NO_PROMPT,
    OTHER_POLICY,
    REWRITTEN_HISTORY,
    NotDistilled,
    never_fits,
    with_usable_reward,
)


class NotRepeatable(RuntimeError):
    """An episode cannot be played again up to some step: the environment showed something else."""


@dataclass(frozen=True)
class Plan:
    """How an episode is played: which task, with what sampling.

    With `tries` above 1, an episode that did not reach `solved_at` is followed by another on the same task in the same
    conversation. Its first observation is put into `again`, together with what was said at the end: `{feedback}`,
    `{observation}`. `shown` stands in the place of the first observation, and `said` changes what the policy answers
    before the environment reads it. `horizon` limits the turns of each try beside the environment's own limit. `fork`
    is an episode, and the number of its turns after which this one goes on; the turns are those from the start of the
    task, although the tokens that were sampled for the first ones may be in its prompt.
    """

    task_id: str
    sampling: SamplingParams
    seed: int
    tries: int = 1
    again: str = "{observation}"
    solved_at: float = 1.0
    horizon: int | None = None
    fork: tuple[Sample, int] | None = None
    shown: str | None = None
    said: Callable[[str], str] | None = None


@dataclass
class _Play:
    """An episode while it is played: what is known of it so far."""

    conversation: Conversation
    turns: list[Turn] = field(default_factory=list)
    try_turns: list[int] = field(default_factory=list)  # of the tries that have ended
    observation: str = ""
    tool: str = ""
    outcome: Outcome = Outcome.TRUNCATED
    feedback: str = ""
    error: str = ""
    blame: Outcome = Outcome.ENV_ERROR  # the outcome of an exception now
    is_full: bool = False  # the conversation no longer fits the policy's context

    @property
    def reward(self) -> float:
        """Of the try that was played last."""
        return total(turn.reward for turn in self.turns[len(self.turns) - self.try_turns[-1] :])


@dataclass(frozen=True)
class Harness:
    """Plays episodes and has texts written.

    `attempt` starts an episode, then repeats: prompt the policy with the observation, send its answer to `step`. It
    starts over when the infrastructure fails. `write` prompts a policy with messages and keeps its answer. `prompts_of`
    gives the prompts that an episode would have had under another system prompt.

    `speakers` are other policies than the trained one, by what they are for: "reflector", "judge". `incarnation` is new
    in each process, so that a resumed run never meets its earlier episodes. Each episode and each text is one session
    at the policy service: it ends on the model that it began with.
    """

    environment: EnvironmentPort
    policy: SamplingClient
    info: EnvironmentInfo
    policy_info: PolicyInfo
    incarnation: str
    max_restarts: int
    speakers: Mapping[str, NamedPolicy] = field(default_factory=dict)

    async def attempt(self, blank: Sample, plan: Plan) -> Sample:
        """The sample `blank`, played: it has the id, role, parent and system prompt.

        After an infrastructure failure it starts over under a new episode id, at most `max_restarts` times. Raises
        ServiceUnavailable when a service stays unreachable.
        """
        restarts = 0
        while True:
            episode_id = f"{blank.sample_id}-{self.incarnation}-{restarts}"
            with span("attempt", episode_id=episode_id):
                attempt = await self._play(replace(blank, episode_id=episode_id, restarts=restarts), plan)
            if attempt.outcome.has_reward or restarts == self.max_restarts or never_fits(attempt):
                return attempt
            restarts += 1

    async def _play(self, blank: Sample, plan: Plan) -> Sample:
        by_messages = self.policy_info.rewrites_history or Feature.TOKEN_IDS not in self.policy_info.features
        play = _Play(Conversation([Message(Role.SYSTEM, blank.system)], by_messages))
        try:
            for number in range(plan.tries):
                episode_id = blank.episode_id if number == 0 else f"{blank.episode_id}-t{number}"
                await self._try(play, blank, episode_id, plan)
                if not play.outcome.has_reward or play.is_full or reaches(play.reward, plan.solved_at):
                    break
        except (DomainError, CallFailed) as failure:
            play.outcome = _outcome_of(failure, play.blame)
            play.error = str(failure)
        attempt = replace(
            blank,
            outcome=play.outcome,
            reward=play.reward if play.outcome.has_reward else None,
            temperature=plan.sampling.temperature,
            feedback=play.feedback,
            turns=tuple(play.turns),
            final_observation=play.observation,
            sequences=play.conversation.sequences,
            error=play.error,
            try_turns=tuple(play.try_turns) if plan.tries > 1 else (),
            forked_from=ForkPoint(plan.fork[0].episode_id, plan.fork[1]) if plan.fork else None,
        )
        return with_usable_reward(attempt)

    async def _try(self, play: _Play, blank: Sample, episode_id: str, plan: Plan) -> None:
        """Plays one episode to its end."""
        play.blame = Outcome.ENV_ERROR
        play.outcome = Outcome.TRUNCATED
        play.tool = ""
        before = len(play.turns)
        episode: EpisodeHandle | None = None
        limit = self.info.max_steps if plan.horizon is None else min(self.info.max_steps, plan.horizon)
        try:
            episode = await self._open(play, episode_id, plan)
            first = episode.observation if plan.shown is None else plan.shown
            play.observation = fill(plan.again, feedback=play.feedback, observation=first) if before else first
            for _ in range(limit - (plan.fork[1] if plan.fork else 0)):
                if not await self._turn(play, blank, episode, plan):
                    break
            play.try_turns.append(len(play.turns) - before)
        finally:
            if episode is not None and not (len(play.turns) > before and play.outcome is Outcome.COMPLETED):
                await _end(episode)

    async def _turn(self, play: _Play, blank: Sample, episode: EpisodeHandle, plan: Plan) -> bool:
        """One answer and its step. False where there is no other: the episode is over, or the conversation is full."""
        number = len(play.turns)
        play.conversation.messages.append(shown(play.observation, play.tool))
        play.blame = Outcome.POLICY_ERROR
        options = CallOptions(request_id=f"{blank.sample_id}-{number}", session_id=blank.episode_id)
        seeded = replace(plan.sampling, seed=derive_seed(plan.seed, number))
        async with episode.kept_alive():  # the policy may take longer than the episode's lease
            completion = await self._answer(play.conversation, seeded, options)
        if completion is None:
            play.is_full = True
            return False
        play.conversation.add(completion)
        play.blame = Outcome.ENV_ERROR
        text = completion.text
        sent = completion.marked_text if plan.said is None else plan.said(completion.marked_text)
        step = await episode.step(sent)
        changed = sent if sent != text else None
        play.turns.append(Turn(play.observation, text, step.action, step.reward or 0.0, play.tool, changed))
        play.observation = step.observation
        play.tool = step.tool
        if step.done:
            play.outcome = step.outcome or Outcome.ENV_ERROR
            play.feedback = step.feedback
            play.error = step.error
        return not step.done

    async def _open(self, play: _Play, episode_id: str, plan: Plan) -> EpisodeHandle:
        """A new episode; with `plan.fork`, one in the state of another after some of its turns."""
        if plan.fork is None or play.turns:
            return await self.environment.start(self.info.name, plan.task_id, episode_id)
        source, count = plan.fork
        play.conversation.recall(source.turns[:count])
        play.conversation.begun = _tokens_before(source, count)
        trunk = await self._replay(source, count, f"{episode_id}-trunk", plan.task_id)
        try:
            return await trunk.fork(episode_id)
        finally:
            await _end(trunk)

    async def _replay(self, source: Sample, count: int, episode_id: str, task_id: str) -> EpisodeHandle:
        """An episode that has played the first turns of another. Raises NotRepeatable unless it shows the same and
        reads the same actions."""
        episode = await self.environment.start(self.info.name, task_id, episode_id)
        place = f"task {task_id!r} of environment {self.info.name!r}"
        try:
            observation = episode.observation
            for number, turn in enumerate(source.turns[: count + 1]):
                if observation != turn.observation:
                    shown_now = f"showed {turn.observation!r} to {source.sample_id} and now {observation!r}"
                    raise NotRepeatable(f"{place} {shown_now}: it cannot be forked from an earlier step")
                if number < count:
                    step = await episode.step(turn.text if turn.sent is None else turn.sent)
                    if step.action != turn.action:
                        read_now = f"read {turn.action!r} in an answer of {source.sample_id} and now {step.action!r}"
                        raise NotRepeatable(f"{place} {read_now}: it cannot be forked from an earlier step")
                    observation = step.observation
        except BaseException:
            await _end(episode)
            raise
        return episode

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
        conversation = Conversation([message for message in messages if message.content], False)
        name = blank.sample_id
        options = CallOptions(request_id=f"{name}-0", session_id=f"{name}-{self.incarnation}")
        outcome = Outcome.COMPLETED
        text = ""
        error = ""
        turns: tuple[Turn, ...] = ()
        try:
            seeded = replace(sampling, seed=derive_seed(seed, 0))
            completion = await (speaker or self.policy).generate(conversation.prompt(), seeded, options)
            conversation.add(completion)
            turns = (Turn(user, completion.text, "", 0.0),)
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
            turns=turns,
            sequences=conversation.sequences,
            temperature=sampling.temperature,
            error=error,
            policy=speaker.name if speaker else "",
        )

    async def observe(self, task_id: str, name: str) -> str | None:
        """The first observation of the task. None where the environment failed. `name` begins the episode's id."""
        try:
            episode = await self.environment.start(self.info.name, task_id, f"{name}-{self.incarnation}")
        except (DomainError, CallFailed):
            return None
        await _end(episode)
        return episode.observation

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
            messages.append(shown(turn.observation, turn.tool))
            try:
                prompts.append(await self.policy.tokenize(tuple(messages), options))
            except (DomainError, CallFailed) as error:
                raise NotDistilled(NO_PROMPT) from error
            messages.append(Message(Role.ASSISTANT, turn.text))
        return prompts

    async def joined(self, samples: Sequence[Sample], between: Sequence[str], trained: Sequence[bool]) -> TokenSequence:
        """The tokens of several samples in a row, as one conversation: before each but the first stands the user's
        message from `between`. Only samples that are `trained` carry loss.

        Raises NotDistilled where a sample is not one token sequence with a prompt, or of another policy, or the policy
        cannot tell the tokens of a message.
        """
        if any(one.policy for one in samples):
            raise NotDistilled(OTHER_POLICY)
        if self.policy_info.rewrites_history or not all(
            len(one.sequences) == 1 and one.sequences[0].has_prompt for one in samples
        ):
            raise NotDistilled(REWRITTEN_HISTORY)
        first, *rest = samples[0].sequences[0].segments
        segments = [Segment(first.kind, first.token_ids), *_with_loss(rest, trained[0])]
        for sample, text, is_trained in zip(samples[1:], between, trained[1:], strict=True):
            tokens = tuple(token for segment in segments for token in segment.token_ids)
            closed = tokens[-1] in self.policy_info.end_of_turn_token_ids
            prompt = Continuation(tokens, closed, (Message(Role.USER, text),))
            try:
                joint = await self.policy.tokenize(prompt, CallOptions(session_id=samples[0].episode_id))
            except (DomainError, CallFailed) as error:
                raise NotDistilled(NO_PROMPT) from error
            segments += [Segment(SegmentKind.ENVIRONMENT, joint)]
            segments += _with_loss(sample.sequences[0].segments[1:], is_trained)
        return TokenSequence(tuple(segments))

    async def _answer(
        self, conversation: Conversation, sampling: SamplingParams, options: CallOptions
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

    async def _ask(self, conversation: Conversation, sampling: SamplingParams, options: CallOptions) -> Completion:
        shows_tools = replace(options, tools=self.info.tools)
        prompt = conversation.prompt()
        try:  # a continuation's tokens include the tools already
            return await self.policy.generate(
                prompt, sampling, options if isinstance(prompt, Continuation | list) else shows_tools
            )
        except DomainError as error:
            if error.reason is not Reason.TEMPLATE_REWRITES_HISTORY or conversation.by_messages:
                raise
        conversation.by_messages = True  # the policy has another model than when `policy_info` was read
        return await self.policy.generate(conversation.prompt(), sampling, shows_tools)


def _tokens_before(source: Sample, count: int) -> list[int]:
    """The tokens that turn `count` of an episode was prompted with; empty where it was prompted with messages."""
    if len(source.sequences) != 1:
        return []
    tokens: list[int] = []
    segments = source.sequences[0].segments
    count -= max(0, len(source.turns) - sum(segment.loss for segment in segments))  # the turns in a fork's prompt
    for segment in segments:
        if segment.kind is SegmentKind.SAMPLED:
            if count == 0:
                return tokens
            count -= 1
        tokens += segment.token_ids
    return []


def _with_loss(segments: Sequence[Segment], is_trained: bool) -> list[Segment]:
    """The segments without log-probabilities; only with `is_trained` do sampled tokens carry loss."""
    kind = SegmentKind.SAMPLED if is_trained else SegmentKind.ENVIRONMENT
    return [Segment(kind if one.loss else one.kind, one.token_ids) for one in segments]


def _outcome_of(failure: DomainError | CallFailed, blame: Outcome) -> Outcome:
    return Outcome.TIMEOUT if isinstance(failure, CallFailed) and failure.timed_out else blame


async def _end(episode: EpisodeHandle) -> None:
    """Ends an episode, also if the caller is cancelled meanwhile. One that cannot be reached expires by itself."""
    try:
        await to_its_end(episode.end())
    except (DomainError, CallFailed):
        return
