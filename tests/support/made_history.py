"""Histories of runs that keep every promise, made by chance: calls that overlap, answers that are lost, repeated calls,
a trainer that is killed; and what the services then hold."""

from __future__ import annotations

import base64
import hashlib
import json
import random
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from types import SimpleNamespace
from typing import Any

from mulligan.common.experience import Experience, Sample, Segment, SegmentKind, TokenSequence, Turn
from mulligan.common.inference import PolicyVersion, VersionSpan, VersionState, WeightsKind
from mulligan.common.reflections import MemoryChange, Provenance, RecordedUse, StoredReflection, Uplift
from mulligan.common.types import Outcome
from mulligan.env.base import StepResult
from mulligan.testing.judge.gradients import MakeLearner
from mulligan.testing.judge.history import RecordedCall, numbered
from mulligan.testing.judge.state import Final, SavedLearner, ToldEvaluation

RUN = "run"
STEPS = 3  # of training
CHAINS = 2  # of a step
_TURNS = 3
_SHOWN = 2  # entries that a query finds
_METHODS = {
    "StartEpisode": "mulligan.env.v1.EnvService",
    "StepEpisode": "mulligan.env.v1.EnvService",
    "StepEpisodes": "mulligan.env.v1.EnvService",
    "Generate": "mulligan.policy.v1.PolicyService",
    "GenerateMany": "mulligan.policy.v1.PolicyService",
    "UpdateWeights": "mulligan.policy.v1.PolicyAdminService",
    "Rollback": "mulligan.policy.v1.PolicyAdminService",
    "AddReflection": "mulligan.memory.v1.MemoryService",
    "GetSnapshot": "mulligan.memory.v1.MemoryService",
    "QueryReflections": "mulligan.memory.v1.MemoryService",
    "ReportOutcome": "mulligan.memory.v1.MemoryService",
}
_LEARNER = "mulligan.trainer.v1.LearnerService"
NOW = datetime(2026, 1, 1, tzinfo=UTC)


class CountingEpisode:
    """Shows how often it was stepped, and a hash of all actions: a step that is played twice shows."""

    observation = "0"

    def __init__(self) -> None:
        self._played: list[str] = []

    def step(self, action: str) -> StepResult:
        self._played.append(action)
        shown = f"{len(self._played)} {_hash(self._played)}"
        done = len(self._played) == _TURNS
        return StepResult(shown, action, 1.0 if done else 0.0, done=done)


class Counting:
    """An environment with as much as the judge needs."""

    info: Any = SimpleNamespace(max_reward=2.0)

    def list_tasks(self, *_: Any) -> Any:
        raise NotImplementedError

    def start(self, task_id: str) -> CountingEpisode:
        return CountingEpisode()


class Summing:
    """A learner with as much as the judge needs: its gradient is the sum of the numbers that it was given, and its
    weight that of all gradients."""

    def __init__(self, checkpoints: dict[str, int], created: bytes):
        self._checkpoints = checkpoints
        self._weight = self._gradient = 0

    def forward_backward(self, request: bytes) -> dict[str, float]:
        gradient = json.loads(request)["gradient"]
        self._gradient += gradient
        return {"loss": self._weight + gradient / 2}

    def optim_step(self) -> dict[str, float]:
        gradient, self._gradient = self._gradient, 0
        self._weight += gradient
        return {"grad_norm": gradient, "skipped": 0.0}

    def save(self, name: str) -> None:
        self._checkpoints[name] = self._weight

    def load(self, name: str) -> None:
        self._weight, self._gradient = self._checkpoints[name], 0


@dataclass
class Made:
    calls: list[RecordedCall]
    final: Final
    environments: dict[str, Any] = field(default_factory=lambda: {"counting": Counting()})
    learner: MakeLearner = field(default_factory=lambda: partial(Summing, {}))


def made_history(seed: int) -> Made:
    return _Maker(random.Random(seed)).make()


class _Maker:
    def __init__(self, chance: random.Random):
        self._chance = chance
        self._calls: list[RecordedCall] = []
        self._now = 0.0
        self._version = 0
        self._updates: list[PolicyVersion] = []
        self._experiences: list[Experience] = []
        self._entries: list[StoredReflection] = []
        self._uses: dict[str, list[tuple[str, str, float]]] = {}  # entry → use, what it left out, reward
        self._changes: list[MemoryChange] = []
        self._evaluations: list[ToldEvaluation] = []
        self._learner = [1, 0, 0]  # number of the next call, optimizer steps, the weight
        self._saved: dict[str, list[int]] = {}

    def make(self) -> Made:
        self._learned("CreateLearner", {}, {"next_sequence": 1})
        self._publish()
        self._save(0)
        self._evaluate(0)
        for step in range(STEPS):
            self._step(step)
            if self._chance.random() < 0.4:
                self._restart(step)
        self._evaluate(STEPS)
        uses = {entry.reflection_id: self._recorded(entry.reflection_id) for entry in self._entries}
        final = Final(
            RUN,
            "completed",
            "",
            STEPS,
            CHAINS,
            self._experiences,
            dict.fromkeys(range(STEPS), 1),
            [(2 * step + 1, step) for step in range(STEPS)],
            [self._counted(entry) for entry in self._entries],
            uses,
            self._changes,
            self._updates,
            SavedLearner(f"run-{STEPS}", *self._saved[f"run-{STEPS}"][:2]),
            self._evaluations,
            readers_play=True,
        )
        return Made(numbered(map(self._overlapping, self._calls)), final)

    def _overlapping(self, call: RecordedCall) -> RecordedCall:
        """What takes effect in a call does so in a longer one, too. The learner's client makes one call at a time."""
        if _LEARNER in call.method:
            return call
        return replace(call, start=call.start - self._chance.uniform(0, 2), end=call.end + self._chance.uniform(0, 2))

    def _call(
        self, name: str, request: dict[str, Any], answer: dict[str, Any], *, again: bool = True, lost: bool = False
    ) -> RecordedCall:
        """Perhaps some tries whose answers are lost, or whose caller is killed; then the answer, perhaps twice."""
        tries = [*([None] * (self._chance.random() < 0.3)), answer, *([answer] * (self._chance.random() < 0.2))]
        tries = [None] if lost else tries
        method = f"/{_METHODS.get(name, _LEARNER)}/{name}"
        whole = _whole(request) if name in ("CreateLearner", "ForwardBackward") else ""
        for said in tries if again else [answer]:
            begin, self._now = self._now, self._now + self._chance.uniform(0.1, 1)
            call = RecordedCall(0, "trainer", "", method, request, _hash(request), begin, self._now, whole=whole)
            told = {"answer": said, "answer_digest": _hash(said)} if said is not None else {"code": "UNAVAILABLE"}
            if said is None and self._chance.random() < 0.3:
                told["code"] = ""
            end = float("inf") if not told.get("code", "x") else self._now
            self._calls.append(replace(call, end=end, **told))
            self._now += self._chance.uniform(0.01, 0.1)
        return self._calls[-1]

    def _learned(self, name: str, request: dict[str, Any], answer: dict[str, Any], *, again: bool = True) -> None:
        self._call(name, {"learner_id": RUN, "owner": RUN} | request, answer, again=again)

    def _publish(self) -> None:
        self._version += 1
        sha256 = _hash([self._version, self._learner])
        self._learned("PublishWeights", {"policy_version": self._version}, {"sha256": sha256})
        self._call("UpdateWeights", {"policy_version": self._version, "sha256": sha256}, {})
        self._updates = [replace(one, state=VersionState.KEPT) for one in self._updates]
        serving = PolicyVersion(self._version, WeightsKind.FULL, VersionState.SERVING, sha256, "f", NOW)
        self._updates.append(serving)

    def _save(self, step: int) -> None:
        self._saved[f"run-{step}"] = list(self._learner)
        self._learned("SaveCheckpoint", {"name": f"run-{step}"}, {"uri": "x"})

    def _restart(self, step: int) -> None:
        """The trainer was killed; it goes on from the checkpoint that was saved last."""
        self._learned("CreateLearner", {}, {"next_sequence": 1}, again=False)
        state = self._saved[f"run-{step + 1}"]
        answer = {"next_sequence": state[0]} | ({"optimizer_steps": state[1]} if state[1] else {})
        self._learned("LoadCheckpoint", {"name": f"run-{step + 1}"}, answer, again=False)
        self._learner = list(state)
        self._publish()

    def _step(self, step: int) -> None:
        counts = {"version": len(self._made), "reflection_count": len(self._entries)}
        self._call("GetSnapshot", {"scope": RUN}, counts if self._made else {})
        for rollout in range(CHAINS):
            self._chain(step, rollout)
        gradient = self._chance.randrange(1, 10)
        self._numbered("ForwardBackward", {"gradient": gradient}, {"loss": self._learner[2] + gradient / 2})
        self._numbered("OptimStep", {}, {"grad_norm": gradient, "skipped": 0.0})
        self._learner[1] += 1
        self._learner[2] += gradient
        self._publish()
        for experience in self._experiences[-CHAINS:]:
            self._remember(experience)
        self._report(self._experiences[-CHAINS:])
        self._save(step + 1)

    @property
    def _made(self) -> set[int]:
        return {change.version for change in self._changes}

    def _numbered(self, name: str, request: dict[str, Any], metrics: dict[str, float]) -> None:
        self._learned(name, {"sequence": self._learner[0]} | request, {"metrics": metrics})
        self._learner[0] += 1

    def _chain(self, step: int, rollout: int) -> None:
        experience_id = f"run-s{step}-t0-r{rollout}"
        use_id, left_out, shown = self._read(experience_id) if self._entries else ("", "", ())
        sample = self._attempt(f"{experience_id}-first")
        found = Experience(experience_id, RUN, step, "counting", "t", rollout, (sample,), memory_entry_ids=shown)
        self._experiences.append(replace(found, memory_use_id=use_id, memory_left_out_id=left_out))

    def _evaluate(self, step: int) -> None:
        """Perhaps it is broken off, and begun again. Of its two attempts one may be lost, and played again."""
        sample_id = f"{RUN}-evaluation-{step}-t0"
        if self._chance.random() < 0.3:
            self._attempt(f"{sample_id}-r0", "broken", turns=1)
        if self._chance.random() < 0.3:
            self._attempt(f"{sample_id}-r1", turns=1)
            self._call(
                "StepEpisode", {"episode_id": f"{sample_id}-r1-x-0", "step_index": 1, "action": "lost"}, {}, lost=True
            )
            self._attempt(f"{sample_id}-r1", restart=1)
        else:
            self._attempt(f"{sample_id}-r1")
        self._attempt(f"{sample_id}-r0")
        self._evaluations.append(ToldEvaluation(step, 1.0, 1.0, 2, 0))

    def _attempt(self, sample_id: str, incarnation: str = "x", restart: int = 0, turns: int = _TURNS) -> Sample:
        episode_id = f"{sample_id}-{incarnation}-{restart}"
        self._call(
            "StartEpisode",
            {"episode_id": episode_id, "environment": "counting", "task_id": "t"},
            {"observation": "0", "lease": {"seconds": 600}},
        )
        episode, played, segments, shown = CountingEpisode(), [], [], "0"
        for number in range(turns):
            asked = {"request_id": f"{sample_id}-{number}", "session_id": episode_id}
            asked["min_policy_version"] = self._version  # type: ignore[assignment]
            spans = [{"policy_version": self._version, "token_count": 2}]
            self._generated(asked, {"completions": [{"token_ids": [1, 2], "policy_versions": spans}]})
            segments.append(_segment(self._version))
            action = f"go {self._chance.random()}"
            result = episode.step(action)
            self._stepped(episode_id, number, action, result)
            played.append(Turn(shown, action, result.action, result.reward))
            shown = result.observation
        sequences = (TokenSequence(tuple(segments)),)
        return Sample(
            sample_id, "first", Outcome.COMPLETED, sequences, 1.0, 1.0, turns=tuple(played), episode_id=episode_id
        )

    def _generated(self, request: dict[str, Any], answer: dict[str, Any]) -> None:
        if self._chance.random() < 0.5:
            self._call("Generate", request, answer)
        else:
            self._call("GenerateMany", {"requests": [request]}, {"items": [{"response": answer}]})

    def _stepped(self, episode_id: str, index: int, action: str, result: StepResult) -> None:
        request = {"episode_id": episode_id, "action": action} | ({"step_index": index} if index else {})
        answer: dict[str, Any] = {
            "observation": result.observation,
            "action": result.action,
            "reward": result.reward,
        } | ({"done": True, "outcome": 1} if result.done else {})
        if self._chance.random() < 0.5:
            self._call("StepEpisode", request, answer)
        else:
            if self._chance.random() < 0.3:
                self._call("StepEpisodes", {"steps": [request]}, {"items": [{"pending": {}}]}, again=False)
            self._call("StepEpisodes", {"steps": [request]}, {"items": [{"step": answer}]})

    def _read(self, key: str) -> tuple[str, str, tuple[str, ...]]:
        """The use that was drawn, what it left out, and what was shown."""
        entry = self._chance.choice(self._entries[-_SHOWN:])
        left_out = entry.reflection_id if self._chance.random() < 0.5 else ""
        use = {"use_id": _hash(key), "use_key": key} | ({"left_out_id": left_out} if left_out else {})
        asked = {"scope": RUN, "environment": "counting", "strategy": 1, "limit": _SHOWN, "kinds": [1, 3]}
        asked |= {"as_of_version": len(self._made), "trial": {"use_keys": [key]}}
        shown = [_as_recorded(one) for one in reversed(self._entries[-_SHOWN:])]
        answer = {"reflections": shown, "version": len(self._made), "uses": [use]}
        self._call("QueryReflections", asked, answer)
        self._uses.setdefault(entry.reflection_id, []).append((use["use_id"], left_out, -1.0))
        return use["use_id"], left_out, tuple(one["reflection_id"] for one in shown if one["reflection_id"] != left_out)

    def _remember(self, experience: Experience) -> None:
        identity, version = _hash(experience.experience_id), len(self._made) + 1
        text = f"what {experience.experience_id} taught"
        origin = Provenance(RUN, experience.experience_id, "counting", "t", 1, 0.0, 1.0, success=True)
        tags = ("made", experience.task_id)
        entry = StoredReflection(identity, RUN, text, origin, version, NOW, key="counting", tags=tags)
        written = _as_recorded(entry)
        request = {name: written[name] for name in ("scope", "text", "provenance", "kind", "key", "tags")}
        request["request_id"] = experience.experience_id
        self._call("AddReflection", request, {"reflection_id": identity, "version": version})
        self._entries.append(entry)
        self._changes.append(MemoryChange(RUN, version, "add", identity, "trainer", NOW))

    def _report(self, experiences: list[Experience]) -> None:
        ids = {one.memory_use_id for one in experiences} - {""}
        if not ids:
            return
        rewards = dict.fromkeys(sorted(ids), 0.5)  # half of what can be earned
        outcomes = [{"use_id": one, "reward": reward} for one, reward in rewards.items()]
        version = len(self._made) + 1
        self._changes.append(MemoryChange(RUN, version, "report", "", "trainer", NOW))
        # Only the answer that counts is told; a repeated one counts nothing.
        self._call("ReportOutcome", {"outcomes": outcomes}, {"counted": len(outcomes)}, again=False)
        for identity, uses in self._uses.items():
            self._uses[identity] = [(use, left, rewards.get(use, reward)) for use, left, reward in uses]

    def _recorded(self, identity: str) -> list[RecordedUse]:
        return [
            RecordedUse(use, use, left != identity, 1, 0.3, None if reward < 0 else reward, NOW)
            for use, left, reward in self._uses.get(identity, ())
        ]

    def _counted(self, entry: StoredReflection) -> StoredReflection:
        uses = [use for use in self._uses.get(entry.reflection_id, ()) if use[2] >= 0]
        if not uses:
            return entry
        shown = sum(not left for _, left, _ in uses)
        return replace(entry, uplift=Uplift(shown, len(uses) - shown, 0.0, 0.0, None, -1.0, 1.0))


def _as_recorded(entry: StoredReflection) -> dict[str, Any]:
    """The fields that are set, as the recorder writes them."""
    origin = {name: value for name, value in asdict(entry.provenance).items() if value}
    said = {name: getattr(entry, name) for name in ("reflection_id", "scope", "text", "version", "key")}
    return said | {"provenance": origin, "kind": 1, "tags": list(entry.tags)}


def _whole(request: dict[str, Any]) -> str:
    return base64.b64encode(json.dumps(request).encode()).decode()


def _segment(version: int) -> Segment:
    return Segment(SegmentKind.SAMPLED, (1, 2), (-1.0, -1.0), (VersionSpan(version, 2),))


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
