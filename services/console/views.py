"""What the pages show of an experience: its tree of samples, and each token as the model saw and learned it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import exp

from mulligan.common.experience import Experience, Sample, Segment, TokenSequence, Trained, TrainingTarget
from mulligan.common.text import safe
from mulligan.console.tokens import Texts


@dataclass(frozen=True, slots=True)
class TokenView:
    """A token. `log_prob` and `version` are those of its sampling, None for tokens that were not sampled. `trained`:
    the learner was given it as one to learn. `values` has what it was given with it, by name, such as "advantage"."""

    token: int
    text: str
    kind: str  # prompt, sampled or environment
    log_prob: float | None = None
    version: int | None = None
    trained: bool = False
    values: Mapping[str, float] = field(default_factory=dict)

    @property
    def probability(self) -> float | None:
        return None if self.log_prob is None else exp(min(self.log_prob, 0.0))


@dataclass(frozen=True, slots=True)
class SequenceView:
    """`trained` is what the learner was given of it, `others` in which other data it stood, and as what."""

    tokens: tuple[TokenView, ...]
    trained: tuple[Trained, ...]
    others: tuple[tuple[str, Trained], ...] = ()

    @property
    def sampled(self) -> int:
        return sum(token.kind == "sampled" for token in self.tokens)


@dataclass(frozen=True, slots=True)
class ObservationView:
    """An observation: its text, and the cells of the board that it ends with, if it does."""

    text: str
    board: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class TurnView:
    shown: ObservationView
    text: str
    action: str
    reward: float
    invalid: bool


@dataclass(frozen=True, slots=True)
class NodeView:
    """A sample, and what follows from it."""

    sample: Sample
    turns: tuple[TurnView, ...]
    final: ObservationView
    sequences: tuple[SequenceView, ...]
    depth: int


@dataclass(frozen=True, slots=True)
class TargetView:
    target: TrainingTarget
    role: str  # of the sample that it was made of
    sequences: tuple[SequenceView, ...]


@dataclass(frozen=True, slots=True)
class ExperienceView:
    experience: Experience
    nodes: tuple[NodeView, ...]
    targets: tuple[TargetView, ...]


def view_of(experience: Experience, texts: Texts | None) -> ExperienceView:
    """`texts` writes tokens as text; without it they have none."""
    trained: dict[tuple[str, int], list[Trained]] = {}
    for datum in experience.trained:
        trained.setdefault((datum.source_id, datum.sequence), []).append(datum)

    def sequences(source_id: str, found: Sequence[TokenSequence]) -> tuple[SequenceView, ...]:
        others = tuple(
            (name, datum) for datum in experience.trained for name, one in datum.others.items() if one == source_id
        )
        return tuple(
            _sequence(one, trained.get((source_id, place), []), others, texts) for place, one in enumerate(found)
        )

    nodes = tuple(
        NodeView(
            sample,
            tuple(
                TurnView(shown(turn.observation), turn.text, turn.action, turn.reward, turn.is_invalid)
                for turn in sample.turns
            ),
            shown(sample.final_observation),
            sequences(sample.sample_id, sample.sequences),
            depth,
        )
        for sample, depth in _tree(experience.samples)
    )
    targets = tuple(
        TargetView(target, experience.source(target).role, sequences(target.target_id, target.sequences))
        for target in experience.targets
    )
    return ExperienceView(experience, nodes, targets)


def _tree(samples: Sequence[Sample]) -> Iterator[tuple[Sample, int]]:
    """The samples in order, each with its distance from the root."""
    depths: dict[str, int] = {}
    for sample in samples:
        depths[sample.sample_id] = depths.get(sample.parent_id, -1) + 1
        yield sample, depths[sample.sample_id]


def shown(observation: str) -> ObservationView:
    """A board is what at least two last lines are: the same number of short cells each, parted by tabs or spaces."""
    lines = observation.rstrip("\n").split("\n")
    rows: list[tuple[str, ...]] = []
    while lines and (cells := _cells(lines[-1])) and (not rows or len(cells) == len(rows[0])):
        rows.insert(0, cells)
        lines.pop()
    return ObservationView("\n".join(lines), tuple(rows)) if len(rows) > 1 else ObservationView(observation, ())


def _cells(line: str) -> tuple[str, ...]:
    cells = tuple(line.split())
    return cells if len(cells) > 1 and all(len(cell) <= 2 for cell in cells) else ()


def _sequence(
    sequence: TokenSequence, trained: Sequence[Trained], others: tuple[tuple[str, Trained], ...], texts: Texts | None
) -> SequenceView:
    sampled = 0
    tokens: list[TokenView] = []
    for segment in sequence.segments:
        written = [safe(text) for text in texts(segment.token_ids)] if texts else [""] * len(segment.token_ids)
        versions = list(_versions(segment))
        for place, (token, text) in enumerate(zip(segment.token_ids, written, strict=True)):
            if not segment.loss:
                tokens.append(TokenView(token, text, str(segment.kind)))
                continue
            log_prob = segment.log_probs[place] if place < len(segment.log_probs) else None
            version = versions[place] if place < len(versions) else None
            values = dict(_values(trained, sampled))
            tokens.append(TokenView(token, text, str(segment.kind), log_prob, version, bool(trained), values))
            sampled += 1
    return SequenceView(tuple(tokens), tuple(trained), others)


def _values(trained: Sequence[Trained], place: int) -> Iterator[tuple[str, float]]:
    """Of the sampled token at this place. With several data their branch stands before the name."""
    for datum in trained:
        begin = f"{datum.branch} " if len(trained) > 1 else ""
        yield from ((f"{begin}{name}", value) for name, value in datum.numbers.items())
        for name, values in datum.values.items():
            if place < len(values):
                yield f"{begin}{name}", values[place]


def _versions(segment: Segment) -> Iterator[int]:
    """The policy version of each token."""
    for span in segment.policy_versions:
        yield from [span.policy_version] * span.token_count
