"""What an algorithm plays with: one member of a group, and the helpers that its `play` calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

from mulligan.common.experience import Experience, Sample, TokenSequence, Trained, TrainingTarget, Turn
from mulligan.common.inference import SamplingParams
from mulligan.common.reflections import MAX_TEXT_BYTES, StoredReflection, Use
from mulligan.common.rewards import reaches
from mulligan.common.tasks import Broadcast, PrioritySlots
from mulligan.common.types import EnvironmentInfo, Outcome, PromptSet
from mulligan.trainer.harness import Harness, Plan
from mulligan.trainer.roles import check_role, check_speaker
from mulligan.trainer.seeds import derive_seed
from mulligan.trainer.settings import AlgorithmSettings, RolloutSettings
from mulligan.trainer.texts import first_system, reflection_in, reflection_request
from mulligan.trainer.trainable import NotDistilled, never_fits, with_usable_reward

S_co = TypeVar("S_co", bound=AlgorithmSettings, covariant=True)


class Recorder(Protocol):
    """Stores samples when they are sampled, and finds those from before a restart."""

    def find(self, sample_id: str) -> Sample | None: ...

    def add(self, sample: Sample) -> None: ...

    def complete(self, experience: Experience) -> None: ...

    def train(self, data: Sequence[Trained]) -> None: ...


class NoRecorder:
    """Stores nothing: for loops that are never resumed."""

    def find(self, sample_id: str) -> Sample | None:
        return None

    def add(self, sample: Sample) -> None:
        return None

    def complete(self, experience: Experience) -> None:
        return None

    def train(self, data: Sequence[Trained]) -> None:
        return None


@dataclass(frozen=True)
class Lesson:
    """A text for the memory, and the rewards before and after it."""

    text: Sample
    reward_before: float
    reward_after: float


@dataclass
class Peers:
    """The members of one group: what each has sampled so far, and which have ended."""

    samples: dict[int, list[Sample]] = field(default_factory=dict)  # by rollout
    running: set[int] = field(default_factory=set)
    changed: Broadcast = field(default_factory=Broadcast)


@dataclass
class Member(Generic[S_co]):
    """One member of a group. It plays one experience: what its helpers sample is recorded, and found again after a
    restart, so `play` must call them in an order that depends on nothing but their results.

    `rollout` is its index in the group, from 0. `step` counts from 0 to `steps` - 1. `memory` are the entries of the
    reflection memory that it may be shown, as they were at the start of the step; `use` is the use of them that was
    drawn for it, and the entry that this leaves out is not among them. `info` is what the environment says of itself.

    A role is a name of letters, digits and '_'. It may be that of several samples, or of several targets, of a member,
    but not of both: they have their ids by it. Other roles and unknown speakers raise ValueError.
    """

    experience_id: str
    task_id: str
    rollout: int
    step: int
    steps: int
    settings: S_co
    sampling: RolloutSettings
    seed: int
    harness: Harness
    recorder: Recorder
    memory: Sequence[StoredReflection]
    peers: Peers
    slots: PrioritySlots
    horizon: int | None = None  # turns of an episode at most, beside the environment's limit
    use: Use | None = None
    has_read: bool = False  # what `memory` has, or has not
    targets: list[TrainingTarget] = field(default_factory=list)
    lessons: list[Lesson] = field(default_factory=list)
    untrained: list[str] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)  # ids of memory entries

    @property
    def info(self) -> EnvironmentInfo:
        return self.harness.info

    @property
    def prompts(self) -> PromptSet:
        return self.harness.info.prompts

    @property
    def samples(self) -> list[Sample]:
        return self.peers.samples.setdefault(self.rollout, [])

    def solves(self, sample: Sample) -> bool:
        """Whether its reward reaches `success_threshold`."""
        return sample.reward is not None and reaches(sample.reward, self.settings.success_threshold)

    async def attempt(
        self,
        role: str,
        *,
        system: str | None = None,
        parent: Sample | None = None,
        tries: int = 1,
        again: str = "{observation}",
    ) -> Sample:
        """Plays the task from its start, under the system prompt `system`: the environment's solver prompt if None. The
        member's first sample then reads the memory, if first attempts do (`memory_readers`).

        With `tries` above 1, what did not solve the task is followed by another try in the same conversation; `again`
        is its first message, with `{feedback}` and `{observation}`. The reward is that of the last try, and None where
        the infrastructure failed. Raises ServiceUnavailable when a service stays unreachable.
        """
        solved_at = self.settings.success_threshold
        plan = Plan(self.task_id, self._attempt_sampling, 0, tries, again, solved_at, self.horizon)
        if system is None:
            reads = self.settings.memory_readers.play and not self.samples
            system = first_system(self._read(), self.prompts) if reads else self.prompts.solver
        return await self._play(role, system, parent, plan)

    async def fork(self, role: str, episode: Sample, turn: int, *, parent: Sample | None = None) -> Sample:
        """Plays on from the state that `episode` was in after `turn` turns from the start of the task, in its
        conversation up to there. Only what is sampled now is trained on. `episode` may be a fork, too.

        Raises DomainError FORK_UNSUPPORTED, NotRepeatable where the environment does not repeat those turns, and
        ValueError for a turn that is not among the episode's own.
        """
        turns = self.turns_of(episode)
        before = len(turns) - len(episode.turns)
        if not before <= turn <= len(turns):
            raise ValueError(f"turn: expected {before} to {len(turns)}, those of {episode.sample_id}; got {turn}")
        fork = (replace(episode, turns=turns), turn)
        plan = Plan(self.task_id, self._attempt_sampling, 0, horizon=self.horizon, fork=fork)
        return await self._play(role, episode.system, parent or episode, plan)

    def turns_of(self, episode: Sample) -> tuple[Turn, ...]:
        """The turns of an episode from the start of the task: for a fork, also those that were played before it."""
        point = episode.forked_from
        if point is None:
            return episode.turns
        source = next(one for one in self.samples if one.episode_id == point.episode_id)
        return self.turns_of(source)[: point.step_index] + episode.turns

    async def _play(self, role: str, system: str, parent: Sample | None, plan: Plan) -> Sample:
        name, sample_id = self._next(role)
        episode = self.recorder.find(sample_id)
        if episode is None or never_fits(episode):  # the policy's context may be larger now
            blank = Sample.planned(sample_id, role, system, parent.sample_id if parent else "")
            episode = await self.harness.attempt(blank, replace(plan, seed=derive_seed(self.seed, name)))
            self.recorder.add(episode)
        return self._keep(with_usable_reward(episode))

    async def reflect(self, role: str, on: Sample, *, texts: Sequence[str] | None = None) -> Sample:
        """Δ ~ π(·|x, y, f, r, m): what the reflector (`policies.reflector`, else the policy itself) learns from the
        episode `on`. `texts` stand in its prompt as memory; if None the entries of `memory`, if reflectors read them
        (`memory_readers`)."""
        if texts is None:
            texts = self._read() if self.settings.memory_readers.reflect else ()
        user = reflection_request(on, self.prompts, texts)
        return await self.write(role, user, system=self.prompts.reflection_system, parent=on)

    def _read(self) -> list[str]:
        """The texts of the memory, which a sample is now shown."""
        self.has_read = True
        self.shown = [entry.reflection_id for entry in self.memory]
        return [entry.text for entry in self.memory]

    async def write(
        self, role: str, user: str, *, system: str = "", parent: Sample | None = None, speaker: str = "reflector"
    ) -> Sample:
        """A text: the answer to `system` and the message `user`, sampled as `rollout.reflection_*` say.

        `speaker` is "reflector" or "judge": the policy of that name in `policies`, or the trained one if it is not set.
        Where the answer has a pair of the environment's reflection marks, the text is what stands between them.
        """
        check_speaker(speaker)
        name, sample_id = self._next(role)
        text = self.recorder.find(sample_id)
        if text is None:
            blank = Sample.planned(sample_id, role, system, parent.sample_id if parent else "")
            rollout = self.sampling
            sampling = SamplingParams(
                rollout.reflection_temperature, rollout.reflection_top_p, max_tokens=rollout.reflection_max_tokens
            )
            seed = derive_seed(self.seed, name)
            by = self.harness.speakers.get(speaker)
            text = await self.harness.write(
                blank, user, sampling, seed, by, lambda answer: reflection_in(answer, self.prompts)
            )
            self.recorder.add(text)
        return self._keep(text)

    async def under(
        self, role: str, episode: Sample, *, system: str | None = None, like: Sample | None = None
    ) -> TrainingTarget | None:
        """The episode's tokens under another system prompt, the solver prompt if None, for training. Where `like` is an
        episode that was played under that prompt, its prompt is the same.

        None where an episode's prompts cannot be known; the reason is counted.
        """
        system = self.prompts.solver if system is None else system
        if like is not None and like.system not in (system, ""):  # in journals of old it is not known: the deployed one
            like = None
        try:
            prompts = await self.harness.prompts_of(episode, system, like)
        except NotDistilled as error:
            self.untrained.append(error.problem)
            return None
        if not episode.sequences:
            return None
        pairs = zip(episode.sequences, prompts, strict=True)
        sequences = tuple(sequence.with_prompt(prompt) for sequence, prompt in pairs)
        return self._target(role, episode, sequences, system)

    async def joined(
        self, role: str, samples: Sequence[Sample], between: Sequence[str], *, trained: Sequence[bool]
    ) -> TrainingTarget | None:
        """The tokens of several samples as one conversation, for training: before each but the first stands the user's
        message from `between`. Only the samples that are `trained` carry loss. An algorithm that calls it has
        "tokenize" among its `NEEDS`.

        None where the tokens cannot be known; the reason is counted.
        """
        try:
            sequence = await self.harness.joined(samples, between, trained)
        except NotDistilled as error:
            self.untrained.append(error.problem)
            return None
        return self._target(role, samples[-1], (sequence,), samples[0].system)

    def _target(self, role: str, source: Sample, sequences: tuple[TokenSequence, ...], system: str) -> TrainingTarget:
        name = self._numbered(role, [target.role for target in self.targets], self.samples)
        target = TrainingTarget(f"{self.experience_id}-{name}", role, source.sample_id, sequences, system)
        self.targets.append(target)
        return target

    def credit(self, text: Sample, reward: float | None, parts: Mapping[str, float] | None = None) -> Sample:
        """The text with a reward. The later of two credits holds. An episode has that of its environment."""
        assert not text.is_episode, f"{text.role!r} is an episode"
        place = next(index for index, one in enumerate(self.samples) if one.sample_id == text.sample_id)
        reward = None if reward is None else float(reward)  # the numbers may be those of another library
        parts = {name: float(part) for name, part in (parts or {}).items()}
        self.samples[place] = replace(self.samples[place], reward=reward, reward_parts=parts)
        return self.samples[place]

    def remember(self, text: Sample, *, before: float | None, after: float | None) -> None:
        """Puts the text into the memory at the end of the step, if the attempt after it solved the task; with
        `memory_writes = "all"` in any case. The text must be complete (the policy ended it, not a limit), not empty,
        and no longer than the memory's contract allows."""
        if before is None or after is None or text.outcome is not Outcome.COMPLETED:
            return
        wanted = self.settings.memory_writes.takes(reaches(after, self.settings.success_threshold))
        if wanted and 0 < len(text.text.encode()) <= MAX_TEXT_BYTES:
            self.lessons.append(Lesson(text, before, after))

    def ended(self) -> None:
        """Called when `play` is over: nobody waits for this member any more."""
        self.peers.running.discard(self.rollout)
        self.peers.changed.wake_all()

    async def siblings(self, role: str) -> list[Sample]:
        """The samples of this role of the group's other members, in their order. Waits until each has one or has ended.

        Meanwhile it leaves its place among the `rollout.concurrency` members that run.
        """
        self.slots.release()
        try:
            while any(self._sampled(other, role) is None for other in self.peers.running - {self.rollout}):
                await self.peers.changed.wait()
        finally:
            await self.slots.acquire(self.step)
        others = sorted(self.peers.samples.keys() - {self.rollout})
        return [found for other in others if (found := self._sampled(other, role)) is not None]

    def _sampled(self, rollout: int, role: str) -> Sample | None:
        return next((one for one in self.peers.samples.get(rollout, ()) if one.role == role), None)

    def _keep(self, sample: Sample) -> Sample:
        self.samples.append(sample)
        self.peers.changed.wake_all()
        return sample

    def _next(self, role: str) -> tuple[str, str]:
        """Name and id of the next sample of this role: the second and later ones are numbered."""
        name = self._numbered(role, [sample.role for sample in self.samples], self.targets)
        return name, f"{self.experience_id}-{name}"

    @staticmethod
    def _numbered(role: str, roles: Sequence[str], others: Sequence[Sample | TrainingTarget]) -> str:
        """The name of the next one of a role. `roles` are those so far; `others` have ids of the same form."""
        check_role(role)
        if any(other.role == role for other in others):
            raise ValueError(f"role: a sample and a target would be {role!r}, and share an id; expected two roles")
        count = roles.count(role)
        return f"{role}-{count + 1}" if count else role

    @property
    def _attempt_sampling(self) -> SamplingParams:
        rollout = self.sampling
        return SamplingParams(rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_tokens)
