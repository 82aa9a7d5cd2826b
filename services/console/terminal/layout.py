"""An experience as lines of a given width: the tree of its samples, or several experiences side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rich.text import Text

from mulligan.console.reading import number, signed
from mulligan.console.terminal.text import folded, one_line, padded
from mulligan.console.views import ExperienceView, NodeView, ObservationView, SequenceView, TargetView

COLUMN = 36  # cells that an experience of a group has at least, so that it stands beside others
_INDENT = 2
_DEEPEST = 6
_SHORT = 3  # lines that are shown of a prompt that is folded


def outcome_style(outcome: str) -> str:
    return {"": "", "completed": "green", "truncated": "yellow"}.get(outcome, "red")


@dataclass
class Laid:
    """Lines, the first line of each item that can be chosen, and those of turns that failed."""

    width: int
    lines: list[Text] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    failing: list[int] = field(default_factory=list)

    def add(self, text: object, style: str = "", indent: int = 0) -> None:
        """Folds data to the width. They are never markup."""
        indent = min(indent, max(self.width // 3, 0))
        room = max(self.width - indent, 1)
        self.lines += [Text(" " * indent + line, style, no_wrap=True) for line in folded(text, room)]

    def add_parts(self, *parts: tuple[str, str], indent: int = 0) -> None:
        """Texts with styles of their own, one after another, folded."""
        plain = " ".join(text for text, _ in parts if text)
        indent = min(indent, max(self.width // 3, 0))
        styles = [style for text, style in parts if text for _ in f"{one_line(text)} "]
        place = 0
        shown = one_line(plain)
        for line in folded(shown, max(self.width - indent, 1)):
            place = shown.find(line, place) if line else place
            found = Text(" " * indent, no_wrap=True)
            for offset, character in enumerate(line):
                found.append(character, styles[min(place + offset, len(styles) - 1)])
            place += len(line)
            self.lines.append(found)


def laid_experience(view: ExperienceView, width: int, *, whole: bool) -> Laid:
    """`whole` shows all lines of system prompts and requests, else their first ones."""
    laid = Laid(width)
    one = view.experience
    laid.add(
        one_line(f"{one.environment} · task {one.task_id} · {one.algorithm} · step {one.step} · rollout {one.rollout}"),
        "bold",
    )
    if one.memory_entry_ids:
        laid.add(one_line(f"shown from the memory: {', '.join(one.memory_entry_ids)}"))
    if one.memory_left_out_id:
        laid.add(one_line(f"left out, to see what it is worth: {one.memory_left_out_id}"))
    for node in view.nodes:
        laid.add("")
        laid.starts.append(len(laid.lines))
        _node(laid, node, indent=_INDENT * min(node.depth, _DEEPEST), whole=whole)
        for sequence in node.sequences:
            laid.add(one_line(f"▸ {summary(sequence)}"), "dim", _INDENT * (min(node.depth, _DEEPEST) + 1))
    for target in view.targets:
        laid.add("")
        laid.starts.append(len(laid.lines))
        _target(laid, target, whole=whole)
    if one.untrained:
        laid.add("")
        laid.add(one_line(f"not trained: {', '.join(one.untrained)}"), "dim")
    return laid


def _target(laid: Laid, item: TargetView, *, whole: bool) -> None:
    laid.add_parts((item.target.role, "bold cyan"), (f"the tokens of {item.role}, under another prompt", "dim"))
    if item.target.system:
        _prompt(laid, "system prompt", item.target.system, _INDENT, whole=whole)
    for sequence in item.sequences:
        laid.add(one_line(f"▸ {summary(sequence)}"), "dim", _INDENT)


def _node(laid: Laid, node: NodeView, *, indent: int, whole: bool) -> None:
    sample = node.sample
    facts = [f"reward {number(sample.reward)}"]
    facts += [f"{name} {number(value)}" for name, value in sample.reward_parts.items()]
    facts.append(f"version {sample.policy_version}" + (f" of {sample.policy}" if sample.policy else ""))
    facts.append(f"temperature {number(sample.temperature)}")
    outcome = str(sample.outcome)
    laid.add_parts(
        (sample.role, "bold cyan"), (outcome, outcome_style(outcome)), (" · ".join(facts), "dim"), indent=indent
    )
    inner = indent + _INDENT
    if sample.system:
        _prompt(laid, "system prompt", sample.system, inner, whole=whole)
    if sample.is_episode:
        _episode(laid, node, inner)
        return
    if node.turns:
        _prompt(laid, "what it was asked", sample.turns[0].observation, inner, whole=whole)
    laid.add(sample.text or sample.error or "(empty)", indent=inner)


def _prompt(laid: Laid, name: str, text: str, indent: int, *, whole: bool) -> None:
    laid.add(f"{name}:", "dim", indent)
    begin = len(laid.lines)
    laid.add(text, "dim", indent + _INDENT)
    further = len(laid.lines) - begin - _SHORT
    if not whole and further > 1:
        del laid.lines[begin + _SHORT :]
        laid.add(f"… {further} more lines: o", "dim italic", indent + _INDENT)


def _episode(laid: Laid, node: NodeView, indent: int) -> None:
    for turn in node.turns:
        if turn.invalid:
            laid.failing.append(len(laid.lines))
        _observation(laid, turn.shown, indent)
        said = turn.text if turn.text != turn.action else ""
        laid.add(f"→ {turn.action}", "bold red" if turn.invalid else "bold", indent)
        if said:
            laid.add(said, "", indent + _INDENT)
        if turn.reward:
            laid.add(signed(turn.reward), "yellow", indent + _INDENT)
    sample = node.sample
    if (sample.reward is not None and sample.reward <= 0) or sample.error:
        laid.failing.append(len(laid.lines))
    _observation(laid, node.final, indent)
    if sample.feedback or sample.error:
        laid.add(sample.feedback or sample.error, "italic", indent)


def _observation(laid: Laid, shown: ObservationView, indent: int) -> None:
    if shown.text:
        laid.add(shown.text, "", indent)
    for row in shown.board:
        laid.add("  ".join(cell.ljust(2) for cell in row).rstrip(), "cyan", indent + 1)


def summary(sequence: SequenceView) -> str:
    """How many tokens, and what the learner was given of them."""
    found = f"{len(sequence.tokens)} tokens, {sequence.sampled} of them sampled"
    if sequence.trained:
        found += "; trained as " + ", ".join(
            f"{datum.branch} ({datum.objective}, weight {number(datum.weight)}"
            + "".join(f", {name} {number(value)}" for name, value in datum.numbers.items())
            + ")"
            for datum in sequence.trained
        )
    elif not sequence.others:
        found += "; not trained"
    return found + "".join(f"; {name} in {datum.branch} ({datum.objective})" for name, datum in sequence.others)


@dataclass(frozen=True, slots=True)
class Band:
    """Experiences that stand side by side: their places among all, and the lines that they take."""

    members: range
    first: int
    end: int


@dataclass
class LaidGroup:
    laid: Laid
    columns: int
    column: int  # cells of each
    bands: list[Band]


def laid_group(views: Sequence[ExperienceView], width: int) -> LaidGroup:
    """Side by side as far as each has COLUMN cells, the others below."""
    columns = max(1, min(len(views), (width + 2) // (COLUMN + 2)))
    column = max((width + 2) // columns - 2, 1)
    laid, bands = Laid(width), []
    for begin in range(0, len(views), columns):
        members = range(begin, min(begin + columns, len(views)))
        parts = [_member(views[place], column) for place in members]
        first = len(laid.lines)
        laid.starts += [first] * len(parts)
        laid.lines += _beside([part.lines for part in parts], column)
        laid.failing += sorted({first + line for part in parts for line in part.failing})
        laid.lines.append(Text())
        bands.append(Band(members, first, len(laid.lines)))
    return LaidGroup(laid, columns, column, bands)


def _member(view: ExperienceView, width: int) -> Laid:
    laid = Laid(width)
    laid.add(f"rollout {view.experience.rollout}", "bold underline")
    for node in view.nodes:
        outcome = str(node.sample.outcome)
        reward = f"reward {number(node.sample.reward)}"
        laid.add_parts((node.sample.role, "bold cyan"), (outcome, outcome_style(outcome)), (reward, "dim"))
        if node.sample.is_episode:
            _episode(laid, node, _INDENT)
        else:
            laid.add(node.sample.text or node.sample.error or "(empty)", indent=_INDENT)
    return laid


def _beside(parts: Sequence[Sequence[Text]], width: int) -> Iterator[Text]:
    for line in range(max(len(part) for part in parts)):
        found = Text(no_wrap=True)
        for place, part in enumerate(parts):
            found.append("  " if place else "")
            found.append_text(padded(part[line] if line < len(part) else Text(), width))
        yield found
