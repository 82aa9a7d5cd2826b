"""One training step of any algorithm: sample, learn, memorise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import fmean
from types import ModuleType
from typing import Any

from mulligan.common.errors import CallFailed, DomainError, ServiceUnavailable
from mulligan.common.experience import Experience, Sample
from mulligan.common.reflections import (
    MAX_TEXT_BYTES,
    Addition,
    Labels,
    Provenance,
    ReflectionKind,
    Retrieved,
    UseOutcome,
)
from mulligan.common.rewards import reaches
from mulligan.common.tasks import PrioritySlots, gather_or_cancel
from mulligan.common.tracing import span
from mulligan.trainer.activity import Begin, CallsOfLearner, untold
from mulligan.trainer.batch import Group, groups_of, minibatches, trained
from mulligan.trainer.data import Datum, ModelLimits, datum_problem, token_count
from mulligan.trainer.document import RewrittenDocument, best_of
from mulligan.trainer.foreign import blaming
from mulligan.trainer.group_signal import moves, rounded
from mulligan.trainer.harness import Harness, NotRepeatable
from mulligan.trainer.idle import remembers
from mulligan.trainer.interfaces import LearnerPort, MemoryPort
from mulligan.trainer.member import Member, NoRecorder, Peers, Recorder
from mulligan.trainer.metrics import mean_metrics, rollout_metrics
from mulligan.trainer.objective import Objective
from mulligan.trainer.recall import Reader, Recall, outcome_of, scope_of, shown_in
from mulligan.trainer.run_environment import EnvironmentChanged
from mulligan.trainer.sampling import ForeignWeights, VersionLost
from mulligan.trainer.seeds import derive_seed
from mulligan.trainer.settings import ALGORITHMS, AlgorithmSettings, RunSettings
from mulligan.trainer.texts import episode_text
from mulligan.trainer.trainable import counted, trainable

# What an algorithm's helpers may raise: these pass through it as they are.
OUTSIDE = (
    DomainError,
    CallFailed,
    ServiceUnavailable,
    EnvironmentChanged,
    NotRepeatable,
    ForeignWeights,
    VersionLost,
    OSError,
)


class AlgorithmFailed(RuntimeError):
    """The algorithm's own code raised; the message has its traceback."""


@dataclass
class StepRunner:
    """Runs an algorithm's steps. `Run` calls `sample`, `learn` and `memorise` once per step, but `learn` only where
    there is a `learner`.

    `sample` queries the memory for each task (`Recall`), then runs the algorithm's `play` for every (task, rollout).
    `learn` drops what cannot be trained on (`trainable`), calls the algorithm's `train`, deals its data out to
    optimizer steps (`minibatches`), and calls the learner for each. `memorise` stores what the algorithm wants to be
    remembered, and reports what rewards the entries that were read led to.

    Every sample goes to the recorder as soon as it exists. A repeated step finds it there. `harness` plays in the run's
    own environment, `others` in further ones, by their names. `slots` limit the chains that run at a time, over all
    steps that are sampled at once, those of older steps first; None: `rollout.concurrency` of this step alone.
    """

    run_id: str
    settings: RunSettings
    harness: Harness
    memory: MemoryPort
    learner: LearnerPort | None
    recorder: Recorder = field(default_factory=NoRecorder)
    others: Mapping[str, Harness] = field(default_factory=dict)
    slots: PrioritySlots | None = None
    algorithm: ModuleType = field(init=False)
    memory_scope: str = field(init=False)
    has_moved: bool = field(init=False, default=False)  # whether what `learn` was given last has a gradient
    _played: dict[str, Member[AlgorithmSettings]] = field(init=False, default_factory=dict)  # by experience
    # What `has_signal` found, by the identities of a group's experiences, which are kept as long.
    _signals: dict[tuple[int, ...], tuple[Group, bool]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.algorithm = ALGORITHMS.find(self.settings.algorithm.name)
        self.memory_scope = scope_of(self.settings, self.run_id)

    async def sample(
        self,
        step: int,
        task_ids: Sequence[str],
        memory_version: int,
        *,
        environments: Sequence[str] = (),
        first_slot: int = 0,
        horizon: int | None = None,
    ) -> list[Experience]:
        """The experiences of some tasks of one step, in (task, rollout) order. They see the memory at `memory_version`.

        `environments` has one name per task; if empty, all tasks are those of the run's own environment. The groups
        have the numbers from `first_slot` on. `horizon` is how many turns an episode has at most, beside its
        environment's limit.
        """
        harnesses = [self.others.get(name, self.harness) for name in environments] or [self.harness] * len(task_ids)
        slots = self.slots or PrioritySlots(self.settings.rollout.concurrency)
        size = self.settings.rollout.rollouts_per_task
        groups = [f"{self.run_id}-s{step}-t{slot}" for slot in range(first_slot, first_slot + len(task_ids))]
        readers = [
            Reader(harness, task_id, f"{group}-o", tuple(f"{group}-r{rollout}" for rollout in range(size)))
            for group, task_id, harness in zip(groups, task_ids, harnesses, strict=True)
        ]
        recall = Recall(self.memory, self.settings, self.memory_scope, memory_version)
        found = await recall.read(readers, slots, step)
        groups_shown = enumerate(zip(readers, found, strict=True), first_slot)
        members = (
            member
            for slot, (reader, retrieved) in groups_shown
            for member in self._members(step, slot, reader, retrieved, slots, horizon)
        )
        return await gather_or_cancel(self._play(member) for member in members)

    def _members(
        self, step: int, slot: int, reader: Reader, retrieved: Retrieved, slots: PrioritySlots, horizon: int | None
    ) -> Iterator[Member[AlgorithmSettings]]:
        """Of one group."""
        peers = Peers(running=set(range(len(reader.keys))))
        for rollout, key in enumerate(reader.keys):
            memory, use = shown_in(retrieved, key)
            yield Member(
                experience_id=key,
                task_id=reader.task_id,
                rollout=rollout,
                step=step,
                steps=self.settings.steps,
                settings=self.settings.algorithm,
                sampling=self.settings.rollout,
                seed=derive_seed(self.settings.seed, step, reader.task_id, slot, rollout),
                harness=reader.harness,
                recorder=self.recorder,
                memory=memory,
                peers=peers,
                slots=slots,
                horizon=horizon,
                use=use,
            )

    async def _play(self, member: Member[AlgorithmSettings]) -> Experience:
        try:
            async with member.slots.held(member.step):
                with self._blame(), span("experience", experience_id=member.experience_id):
                    await self.algorithm.play(member)
        finally:
            member.ended()
        experience = Experience(
            experience_id=member.experience_id,
            run_id=self.run_id,
            step=member.step,
            environment=member.info.name,
            task_id=member.task_id,
            rollout=member.rollout,
            samples=tuple(member.samples),
            targets=tuple(member.targets),
            memory_entry_ids=tuple(member.shown),
            untrained=tuple(member.untrained),
            algorithm=self.settings.algorithm.name,
            memory_use_id=member.use.use_id if member.use and member.has_read else "",
            memory_left_out_id=member.use.left_out_id if member.use and member.has_read else "",
        )
        self._played[member.experience_id] = member
        self.recorder.complete(experience)
        return experience

    def training_data(self, experiences: Sequence[Experience]) -> tuple[list[Datum], dict[str, float]]:
        """What is trained on, and the metrics of what is not. Raises AlgorithmFailed."""
        algorithm = self.settings.algorithm
        kept, dropped = trainable(experiences, self._limits, train_cut_texts=algorithm.train_cut_reflections)
        with self._blame():
            data: list[Datum] = self.algorithm.train(groups_of(kept), algorithm)
            problem = self._problem(data)
        if problem:
            raise AlgorithmFailed(f"algorithm {algorithm.name!r} gave {problem}")
        return data, counted(dropped)

    def _problem(self, data: Any) -> str:
        """What is wrong with an algorithm's data; empty if nothing is."""
        if not isinstance(data, Sequence):
            return f"a {type(data).__name__}; expected a list of data"
        for datum in data:
            if not isinstance(datum, Datum):
                return f"a {type(datum).__name__} among its data; expected Datum alone"
            if not isinstance(datum.branch, str) or not datum.branch:
                return f"a datum of the branch {datum.branch!r}; expected a name"
            if found := datum_problem(datum, self._limits):
                said = f"{datum.datum_id}: {found.field}: expected {found.expected}, got {found.got}"
                return f"a datum that cannot be trained on: {said}"
        return ""

    async def learn(self, step: int, experiences: Sequence[Experience], begin: Begin = untold) -> dict[str, float]:
        """One loss over all branches, in `optimizer_steps` optimizer steps. Returns the means of the learner's metrics
        over these, but the number of those that were `not_finite`. `begin` is told what the learner does now."""
        assert self.learner is not None, "a run without a learner learns by its memory alone"
        data, left_out = self.training_data(experiences)
        with self._blame():
            self.recorder.train(trained(data, experiences))
            self.has_moved = moves(data, self.settings.loss)
            if not self.settings.loss.regularizes:
                data = [datum for datum in data if datum.weight and datum.objective.moves(self.settings.loss)]
        if not data:
            return left_out
        if not self.settings.algorithm.recompute_log_probs:
            data = [_as_sampled(datum) for datum in data]
        count = self.settings.algorithm.optimizer_steps
        if count > 1:
            data = await self._with_old_log_probs(data, begin)
        calls = CallsOfLearner(self.learner, token_count(data))
        begin("learning tokens", calls.count)
        metrics = []
        for minibatch in minibatches(data, count, derive_seed(self.settings.seed, step, "minibatch")):
            with calls.call(minibatch):
                losses = await self.learner.forward_backward(minibatch, self.settings.loss)
            metrics.append(losses | await self.learner.optim_step())
        not_finite = sum(one.get("not_finite", 0.0) for one in metrics)
        means = mean_metrics(metrics)
        if not self.settings.algorithm.recompute_log_probs:  # log-probabilities of sampling compared with themselves
            means = {name: value for name, value in means.items() if name.rpartition("/")[2] != "mismatch_kl"}
        return means | {"not_finite": not_finite} | left_out

    async def memorise(
        self, experiences: Sequence[Experience], replaced: Sequence[Experience] = (), *, rewrites: bool = True
    ) -> None:
        """Stores the lessons of the step, and first attempts with `memory_episodes`. With `memory_document` the best
        lesson rewrites the document instead, unless the step is known to have rewritten it: `rewrites`. Reports the
        rewards of what was read, also in groups that were `replaced`: evidence must not depend on the rewards.

        A repetition has the same ids, and adds nothing.
        """
        key = self.settings.algorithm.memory_document
        if key and rewrites:
            await self._rewrite(RewrittenDocument(self.memory, self.memory_scope, key, self.run_id), experiences)
        additions: list[Addition] = []
        for experience in experiences:
            for lesson in self._played[experience.experience_id].lessons if not key else ():
                before, after = lesson.reward_before, lesson.reward_after
                additions += self._addition(experience, lesson.text, lesson.text.text, before, after, Labels())
            first = experience.samples[0] if experience.samples else None
            if self.settings.algorithm.memory_episodes and first and first.reward is not None and first.is_episode:
                text = episode_text(first, self._harness_of(experience).info.prompts)
                labels = Labels(ReflectionKind.EPISODE)
                additions += self._addition(experience, first, text, first.reward, first.reward, labels)
        if additions:
            await self.memory.add_all(additions)
        if outcomes := self._outcomes([*experiences, *replaced]):
            await self.memory.report(outcomes)

    async def _rewrite(self, document: RewrittenDocument, experiences: Sequence[Experience]) -> None:
        lessons = [(one, lesson) for one in experiences for lesson in self._played[one.experience_id].lessons]
        for one, lesson in best_of(lessons):
            origin = self._origin(one, lesson.text, lesson.reward_before, lesson.reward_after)
            await document.rewrite(lesson.text.sample_id, lesson.text.text, origin, one.step)

    def _addition(
        self, experience: Experience, source: Sample, text: str, before: float, after: float, labels: Labels
    ) -> list[Addition]:
        """None for a text that the memory does not take."""
        if not 0 < len(text.encode()) <= MAX_TEXT_BYTES:
            return []
        origin = self._origin(experience, source, before, after)
        # Equal texts share their evidence, where a run goes by that.
        by_evidence = not self.settings.algorithm.by_claims
        return [Addition(source.sample_id, self.memory_scope, text, origin, labels, unless_known=by_evidence)]

    def _origin(self, experience: Experience, source: Sample, before: float, after: float) -> Provenance:
        return Provenance(
            run_id=self.run_id,
            experience_id=experience.experience_id,
            environment=experience.environment,
            task_id=experience.task_id,
            policy_version=source.policy_version,
            reward_before=before,
            reward_after=after,
            success=reaches(after, self.settings.algorithm.success_threshold),
        )

    def _outcomes(self, experiences: Sequence[Experience]) -> list[UseOutcome]:
        algorithm = self.settings.algorithm
        found = (outcome_of(one, algorithm, self._harness_of(one).info) for one in experiences)
        return [outcome for outcome in found if outcome is not None]

    def metrics(self, experiences: Sequence[Experience]) -> dict[str, float]:
        threshold = self.settings.algorithm.success_threshold
        metrics = rollout_metrics(experiences, threshold, self.harness.info.name, self.has_signal)
        return metrics | self._memory_metrics(experiences)

    def _memory_metrics(self, experiences: Sequence[Experience]) -> dict[str, float]:
        """The uses that were drawn, and the mean uplift of the entries that were shown, where it is known."""
        members = [self._played[experience.experience_id] for experience in experiences]
        uses = [member.use for member in members if member.use is not None]
        shown = [entry.uplift for member in members for entry in member.memory if entry.reflection_id in member.shown]
        uplifts = [known.uplift for known in shown if known is not None and known.uplift is not None]
        metrics = {"memory_uplift": fmean(uplifts)} if uplifts else {}
        if self.settings.holdout and self.settings.algorithm.memory_entries:
            metrics["memory_uses"] = float(len(uses))
            metrics["memory_left_out"] = float(sum(bool(use.left_out_id) for use in uses))
            metrics["memory_reported"] = float(len(self._outcomes(experiences)))
        return metrics

    def has_signal(self, group: Group) -> bool:
        """Whether the group teaches anything: what the algorithm's own `has_signal` says. Without that: with a learner,
        whether `train` gives data with a gradient for this group as a whole step; without a learner, whether the group
        leaves something in the memory. Raises AlgorithmFailed."""
        own = getattr(self.algorithm, "has_signal", None)
        if own is not None:
            with self._blame():
                return bool(own(group, self.settings.algorithm))
        if self.learner is None:
            return self.leaves(group)
        key = tuple(map(id, group))
        if key not in self._signals:  # a group is asked for after each round of the step, and for its metrics
            data, _ = self.training_data(rounded(group))
            self._signals[key] = (group, moves(data, self.settings.loss))
        return self._signals[key][1]

    def has_taught(self, experiences: Sequence[Experience]) -> bool:
        """Whether `learn` was given anything with a gradient; without a learner, whether these experiences may leave
        something in the memory: where the algorithm says that it remembers or does not, there is nothing to see."""
        if self.learner is not None:
            return self.has_moved
        return remembers(self.algorithm) is not None or self.leaves(experiences)

    def leaves(self, experiences: Sequence[Experience]) -> bool:
        """Whether they leave a lesson or an episode in the memory."""
        if self.settings.algorithm.memory_episodes:
            return True
        members = (self._played.get(one.experience_id) for one in experiences)
        return any(member.lessons for member in members if member is not None)

    def _harness_of(self, experience: Experience) -> Harness:
        return self.others.get(experience.environment, self.harness)

    async def _with_old_log_probs(self, data: Sequence[Datum], begin: Begin) -> list[Datum]:
        """The old policy is the learner itself, before the first of several optimizer steps."""
        assert self.learner is not None
        asking = [place for place, datum in enumerate(data) if _lacks_old(datum.objective)]
        asked = [data[place] for place in asking]
        calls = CallsOfLearner(self.learner, token_count(asked))
        begin("computing the log-probabilities of tokens", calls.count)
        with calls.call(asked):
            found = await self.learner.forward(asked) if asked else []
        filled = list(data)
        for place, old_log_probs in zip(asking, found, strict=True):
            objective: Any = data[place].objective
            filled[place] = replace(data[place], objective=replace(objective, old_log_probs=old_log_probs))
        return filled

    @contextmanager
    def _blame(self) -> Iterator[None]:
        """Tells the algorithm's own errors apart from those of services. Raises AlgorithmFailed."""
        with blaming(f"algorithm {self.settings.algorithm.name!r}", AlgorithmFailed, OUTSIDE):
            yield

    @property
    def _limits(self) -> ModelLimits:
        """The learner's limits, or the policy's where the learner reports none: both have the same model."""
        assert self.learner is not None
        learner = self.learner.limits
        policy = self.harness.policy_info
        return ModelLimits(
            learner.vocabulary_size or policy.vocabulary_size, learner.context_length or policy.context_length
        )


def _as_sampled(datum: Datum) -> Datum:
    """With the policy that sampled as the old one, where the objective knows its log-probabilities."""
    objective: Any = datum.objective
    sampled = getattr(objective, "rollout_log_probs", ())
    if not sampled or not _lacks_old(objective):
        return datum
    return replace(datum, objective=replace(objective, old_log_probs=sampled))


def _lacks_old(objective: Objective) -> bool:
    return objective.compares_with_old and not getattr(objective, "old_log_probs")  # noqa: B009 - not all have it
