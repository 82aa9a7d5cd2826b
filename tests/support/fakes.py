"""In-process stand-ins for the four ports, small enough to compute expectations by hand.

Tokens are characters: the policy "samples" the characters of a scripted answer, each with log-probability -0.5.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mulligan.common.errors import CallFailed, DomainError, Reason
from mulligan.common.inference import (
    CallOptions,
    CanaryProbe,
    Completion,
    Continuation,
    Feature,
    Message,
    PolicyInfo,
    PolicyVersion,
    Prompt,
    PublishedWeights,
    SamplingParams,
    StopReason,
    Tool,
    VersionSpan,
    VersionState,
    WeightsKind,
)
from mulligan.common.reflections import (
    Addition,
    Labels,
    Provenance,
    ReflectionQuery,
    Retrieved,
    StoredReflection,
    Trial,
    Use,
    UseOutcome,
)
from mulligan.common.suggest import did_you_mean
from mulligan.common.types import EnvironmentInfo, EpisodeStep, Outcome, PromptSet, Split, TaskInfo
from mulligan.trainer.data import Datum, ModelLimits, datum_problem
from mulligan.trainer.settings import LossSettings

PROMPTS = PromptSet(
    solver="solve",
    action_reminder="answer with a word",
    reflection_system="reflect",
    reflection="trace={trace} feedback={feedback} reward={reward} memory={memory}",
    memory_empty="nothing yet",
    trace_turn="{observation}>{action};",
    retry="last time: {trace} {feedback}",
    try_again="that was wrong, try again",
)
LOG_PROB = -0.5


def encode(text: str) -> tuple[int, ...]:
    return tuple(map(ord, text))


def render(messages: Sequence[Message]) -> str:
    return "".join(f"[{message.role}:{message.content}]" for message in messages) + "[assistant:"


@dataclass
class FakeEnvironment:
    """One task "t0", "t1", … per answer; an episode ends after `turns` steps and pays 1 when the last answer is right;
    `in_parts`, each right answer pays 1 / `turns`.

    `fail` is asked before each step and may raise.
    """

    answers: dict[str, str]
    turns: int = 1
    fail: Callable[[str], None] = lambda episode_id: None
    tools: tuple[Tool, ...] = ()  # the first of them answers every step but the last
    unavailable: str = ""
    player_count: int = 1
    started: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    in_parts: bool = False
    shows: dict[str, str] = field(default_factory=dict)  # first observations, where they are not "board TASK"
    deterministic: bool = True

    async def describe(self, environment: str) -> EnvironmentInfo:
        return EnvironmentInfo(
            "fake",
            "",
            PROMPTS,
            self.turns,
            1.0,
            self.deterministic,
            {Split.TRAIN: len(self.answers), Split.TEST: 1},
            self.tools,
            self.unavailable,
            player_count=self.player_count,
        )

    async def list_tasks(self, environment: str, split: Split, limit: int) -> list[TaskInfo]:
        tasks = [TaskInfo(task_id, split, 1.0) for task_id in self.answers]
        return tasks[: limit or None]

    async def start(self, environment: str, task_id: str, episode_id: str) -> FakeEpisode:
        self.started.append(episode_id)
        return FakeEpisode(self, task_id, episode_id)


@dataclass
class FakeEnvironments:
    """Several of them, by name."""

    named: dict[str, FakeEnvironment]

    async def describe(self, environment: str) -> EnvironmentInfo:
        if environment not in self.named:
            near = did_you_mean(environment, self.named)
            raise DomainError(Reason.UNKNOWN_ENVIRONMENT, f"there is no environment {environment!r}{near}")
        return replace(await self.named[environment].describe(environment), name=environment)

    async def list_tasks(self, environment: str, split: Split, limit: int) -> list[TaskInfo]:
        return await self.named[environment].list_tasks(environment, split, limit)

    async def start(self, environment: str, task_id: str, episode_id: str) -> FakeEpisode:
        return await self.named[environment].start(environment, task_id, episode_id)


@dataclass
class FakeEpisode:
    environment: FakeEnvironment
    task_id: str
    episode_id: str
    played: int = 0
    seen: str = ""

    @property
    def observation(self) -> str:
        return self.seen or self.environment.shows.get(self.task_id, f"board {self.task_id}")

    async def step(self, action: str) -> EpisodeStep:
        self.environment.fail(self.episode_id)
        self.played += 1
        self.seen = f"after {action}"
        done = self.played == self.environment.turns
        matches = action == self.environment.answers[self.task_id]
        right = done and matches
        reward = matches / self.environment.turns if self.environment.in_parts else float(right)
        feedback = ("right" if right else "wrong") if done else ""
        outcome = Outcome.COMPLETED if done else None
        tool = self.environment.tools[0].name if self.environment.tools and not done else ""
        return EpisodeStep(f"after {action}", action.upper(), reward, done, outcome, feedback, tool=tool)

    def kept_alive(self) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    async def fork(self, new_episode_id: str) -> FakeEpisode:
        self.environment.started.append(new_episode_id)
        return FakeEpisode(self.environment, self.task_id, new_episode_id, self.played, self.seen)

    async def end(self) -> None:
        self.environment.ended.append(self.episode_id)


@dataclass
class FakePolicy:
    """`answer(system, text of the last user message, sampling)` is what the model says. `others` are further policies
    by name: none of them is trained."""

    answer: Callable[[str, str, SamplingParams], str]
    version: int = 0
    calls: list[tuple[Any, SamplingParams]] = field(default_factory=list)
    options: list[CallOptions] = field(default_factory=list)
    updates: list[PublishedWeights] = field(default_factory=list)
    uploads: list[Path] = field(default_factory=list)
    withdrawn: set[int] = field(default_factory=set)
    systems: dict[tuple[int, ...], str] = field(default_factory=dict)
    rewrites_history: bool = False
    fingerprint: str = "f"
    features: frozenset[Feature] = frozenset(Feature)
    frozen: bool = False
    dtype: str = ""
    canary_difference: float | None = None
    others: dict[str, FakePolicy] = field(default_factory=dict)
    context_length: int = 4096

    def named(self, policy: str) -> FakePolicy:
        if policy in ("", "actor"):
            return self
        if policy not in self.others:
            raise DomainError(Reason.UNKNOWN_POLICY, f"there is no policy {policy!r}")
        return self.others[policy]

    async def info(self, policy: str = "") -> PolicyInfo:
        found = self.named(policy)
        return PolicyInfo(
            "fake",
            found.fingerprint,
            found.version,
            found.context_length,
            2**16,
            (ord("]"),),
            found.rewrites_history,
            True,
            name=policy or "actor",
            backend="fake",
            features=found.features,
            frozen=found.frozen,
            dtype=found.dtype,
        )

    async def versions(self, policy: str = "") -> tuple[PolicyVersion, ...]:
        def record(version: int, state: VersionState) -> PolicyVersion:
            return PolicyVersion(version, WeightsKind.FULL, state, "0" * 64, "f", datetime.now(UTC))

        found = self.named(policy)
        gone = [record(version, VersionState.WITHDRAWN) for version in sorted(found.withdrawn, reverse=True)]
        return (*gone, record(found.version, VersionState.SERVING))

    async def tokenize(self, prompt: Prompt | str, options: CallOptions = CallOptions()) -> tuple[int, ...]:
        if isinstance(prompt, Continuation):
            return encode("".join(f"[{message.role}:{message.content}]" for message in prompt.messages) + "[assistant:")
        assert isinstance(prompt, tuple)
        return encode(render(prompt))

    async def generate(
        self, prompt: Prompt, sampling: SamplingParams, options: CallOptions = CallOptions()
    ) -> Completion:
        found = self.named(options.policy)
        if found is not self:
            return await found.generate(prompt, sampling, replace(options, policy=""))
        if options.min_policy_version is not None and self.version < options.min_policy_version:
            raise DomainError(Reason.POLICY_VERSION_TOO_OLD, "forgotten")
        if isinstance(prompt, Continuation) and self.rewrites_history:
            raise DomainError(Reason.TEMPLATE_REWRITES_HISTORY, "no continuations")
        self.calls.append((prompt, sampling))
        self.options.append(options)
        if isinstance(prompt, Continuation):
            ids = encode("".join(f"[{message.role}:{message.content}]" for message in prompt.messages) + "[assistant:")
            system = next(text for start, text in self.systems.items() if prompt.token_ids[: len(start)] == start)
            last = prompt.messages[-1].content
        elif isinstance(prompt, list):
            ids = tuple(prompt)
            system = next(text for start, text in self.systems.items() if ids[: len(start)] == start)
            self.systems[ids] = system
            last = ""
        else:
            assert isinstance(prompt, tuple)
            ids = encode(render(prompt))
            system = prompt[0].content
            last = prompt[-1].content
            self.systems[ids] = system
        length = len(ids) + (len(prompt.token_ids) if isinstance(prompt, Continuation) else 0)
        reported = () if isinstance(prompt, list) else ids
        if length >= self.context_length:
            raise DomainError(Reason.PROMPT_TOO_LONG, "no room", token_count=length, context_length=self.context_length)
        text = self.answer(system, last, sampling)
        tokens = encode(text + "]")
        stop_reason = StopReason.END_OF_TURN
        if len(tokens) > sampling.max_tokens:
            tokens = tokens[: sampling.max_tokens]
            text = text[: sampling.max_tokens]
            stop_reason = StopReason.MAX_TOKENS
        if Feature.TOKEN_IDS not in self.features:
            return Completion((), (), (), text, StopReason.END_OF_TURN, (VersionSpan(self.version, 0),))
        return Completion(
            reported,
            tokens,
            (LOG_PROB,) * len(tokens),
            text,
            stop_reason,
            (VersionSpan(self.version, len(tokens)),),
        )

    async def upload_weights(self, path: Path, kind: WeightsKind, sha256: str, policy: str = "") -> str:
        self.named(policy).uploads.append(path)
        return f"upload://{len(self.named(policy).uploads)}"

    async def update_weights(self, weights: PublishedWeights, policy: str = "") -> float | None:
        found = self.named(policy)
        if weights.policy_version in found.withdrawn:
            raise DomainError(Reason.VERSION_CONFLICT, f"version {weights.policy_version} was rolled back")
        found.updates.append(weights)
        found.version = weights.policy_version
        return found.canary_difference


@dataclass
class FakeMemory:
    """The latest entries of any strategy, as of a version, and of a key if one is asked for; each report makes a
    version, too. A use leaves out the entry at the place that `left_out(use key)` names; by default none does."""

    entries: list[StoredReflection] = field(default_factory=list)
    revisions: list[tuple[int, StoredReflection]] = field(default_factory=list)  # the later ones, by version
    revised_by: dict[str, str] = field(default_factory=dict)  # by entry: request id of the newest revision
    queries: list[tuple[ReflectionQuery, Trial | None]] = field(default_factory=list)
    left_out: Callable[[str], int | None] = lambda key: None
    drawn: dict[str, Use] = field(default_factory=dict)
    reported: dict[str, float] = field(default_factory=dict)  # by use id
    version: int = 0

    async def snapshot(self, scope: str) -> int:
        return self.version

    async def query(self, query: ReflectionQuery, trial: Trial | None = None) -> Retrieved:
        self.queries.append((query, trial))
        version = self.version if query.version is None else query.version
        seen = [self._as_of(entry, version) for entry in self.entries if entry.version <= version]
        found = tuple(entry for entry in reversed(seen) if _is_asked(query, entry, version))[: query.limit]
        keys = trial.use_keys if trial and found else ()
        return Retrieved(found, version, tuple(self._use(key, found) for key in keys))

    def _as_of(self, entry: StoredReflection, version: int) -> StoredReflection:
        revisions = [one for made, one in self.revisions if made <= version]
        return next((one for one in reversed(revisions) if one.reflection_id == entry.reflection_id), entry)

    def _use(self, key: str, found: Sequence[StoredReflection]) -> Use:
        place = self.left_out(key)
        left_out = found[place].reflection_id if place is not None else ""
        return self.drawn.setdefault(key, Use(f"use of {key}", key, left_out))

    async def add(
        self,
        request_id: str,
        scope: str,
        text: str,
        provenance: Provenance,
        labels: Labels | None = None,
        *,
        unless_known: bool = False,
    ) -> str:
        labels = labels or Labels()
        kind = labels.kind
        wanted = (provenance.environment, kind, text)
        same = [one for one in self.entries if (one.provenance.environment, one.kind, one.text) == wanted]
        if unless_known and same:
            return same[0].reflection_id
        if all(entry.reflection_id != request_id for entry in self.entries):
            self.version += 1
            now = datetime.now(UTC)
            entry = StoredReflection(request_id, scope, text, provenance, self.version, now, kind=kind)
            self.entries.append(replace(entry, key=labels.key, tags=labels.tags))
        return request_id

    async def add_all(self, additions: Sequence[Addition]) -> Sequence[str]:
        return [
            await self.add(
                one.request_id, one.scope, one.text, one.provenance, one.labels, unless_known=one.unless_known
            )
            for one in additions
        ]

    async def revise(
        self,
        reflection_id: str,
        request_id: str,
        expected_revision: int,
        *,
        text: str | None = None,
        tags: Sequence[str] | None = None,
    ) -> int:
        first = next((one for one in self.entries if one.reflection_id == reflection_id), None)
        old = self._as_of(first, self.version) if first else None
        if old is None or old.deleted_version is not None:
            raise DomainError(Reason.UNKNOWN_REFLECTION, reflection_id)
        if self.revised_by.get(reflection_id) == request_id:
            return old.revision
        if old.revision != expected_revision:
            raise DomainError(Reason.REVISION_CONFLICT, reflection_id, revision=old.revision)
        self._rewrite(replace(old, revision=old.revision + 1, text=text or old.text, tags=tuple(tags or old.tags)))
        self.revised_by[reflection_id] = request_id
        return expected_revision + 1

    def delete(self, reflection_id: str) -> None:
        (first,) = [one for one in self.entries if one.reflection_id == reflection_id]
        self._rewrite(replace(self._as_of(first, self.version), deleted_version=self.version + 1))

    def _rewrite(self, new: StoredReflection) -> None:
        self.version += 1
        self.revisions.append((self.version, new))

    async def report(self, outcomes: Sequence[UseOutcome]) -> int:
        new = {one.use_id: one.reward for one in outcomes if one.use_id not in self.reported}
        self.reported |= new
        self.version += bool(new)
        return len(new)


def _is_asked(query: ReflectionQuery, entry: StoredReflection, version: int) -> bool:
    is_there = entry.deleted_version is None or entry.deleted_version > version
    return is_there and query.key in ("", entry.key)


@dataclass
class FakeLearner:
    """Keeps what it was given, and refuses what any learner does. `state` counts optimizer steps, and is what
    checkpoints save, and what the files of published weights have: `files` are those that were not deleted."""

    steps: list[list[Datum]] = field(default_factory=list)
    forwards: list[list[Datum]] = field(default_factory=list)
    state: int = 0
    checkpoints: dict[str, int] = field(default_factory=dict)
    lose_at: int | None = None
    fingerprint: str = "f"
    limits: ModelLimits = ModelLimits(2**16, 4096)
    adapted_layers: tuple[str, ...] = ()
    kind: WeightsKind = WeightsKind.FULL
    share_done: float = 0.0
    files: dict[str, int] = field(default_factory=dict)  # state by URI
    keep_files: int = 3  # with the greatest versions

    async def forward(self, data: Sequence[Datum]) -> list[tuple[float, ...]]:
        self._check(data)
        self.forwards.append(list(data))
        return [(-0.25,) * sum(datum.loss_mask) for datum in data]

    async def forward_backward(self, data: Sequence[Datum], loss: LossSettings) -> dict[str, float]:
        self._check(data)
        if self.lose_at is not None and len(self.steps) == self.lose_at:
            self.lose_at = None
            raise DomainError(Reason.UNKNOWN_LEARNER, "restarted")
        self.steps.append(list(data))
        return {"loss": 1.0}

    def _check(self, data: Sequence[Datum]) -> None:
        for datum in data:
            if found := datum_problem(datum, self.limits):
                raise DomainError(Reason.INVALID_FIELD, f"{datum.datum_id}: {found}")

    async def optim_step(self) -> dict[str, float]:
        self.state += 1
        return {"grad_norm": 1.0}

    async def save_checkpoint(self, name: str) -> None:
        self.checkpoints[name] = self.state

    async def load_checkpoint(self, name: str) -> None:
        self.state = self.checkpoints[name]

    async def publish_weights(self, policy_version: int, keep: Collection[int] = ()) -> PublishedWeights:
        uri = f"file:///w%20{policy_version}"
        versions = {int(known.rpartition("%20")[2]): known for known in (*self.files, uri)}
        kept = {*sorted(versions)[-self.keep_files :], policy_version, *keep}
        self.files = {known: self.files.get(known, 0) for version, known in versions.items() if version in kept}
        self.files[uri] = self.state
        canary = (CanaryProbe((1, 2), (LOG_PROB,)),)
        return PublishedWeights(policy_version, self.kind, uri, "0" * 64, self.fingerprint, canary)

    async def close(self) -> None:
        return None

    def branch(self, name: str) -> list[Datum]:
        return [datum for step in self.steps for datum in step if datum.branch == name]


def timeout() -> CallFailed:
    return CallFailed("fake", "StepEpisode", "DEADLINE_EXCEEDED", "late")
