"""The tokens of a sample as the model had them, one of which is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from rich.cells import cell_len
from rich.text import Text
from textual.binding import Binding, BindingType

from mulligan.console.reading import number
from mulligan.console.terminal.items import ItemsView
from mulligan.console.terminal.layout import summary
from mulligan.console.terminal.text import folded, one_line
from mulligan.console.views import SequenceView, TokenView

LIKELY = ((0.9, "green"), (0.5, "yellow"), (0.1, "magenta"), (0.0, "red"))  # from this probability on


class TokensView(ItemsView):
    """Items are tokens, of all sequences of a sample in a row."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("right,l", "choose(1)"),
        Binding("left,h", "choose(-1)"),
    ]

    def __init__(self, sequences: Sequence[SequenceView]) -> None:
        super().__init__()
        self._sequences = sequences
        self._tokens = [token for sequence in sequences for token in sequence.tokens]
        self._width = 0
        self._lines: list[list[tuple[int, str]] | str] = []  # parts of tokens, or a heading
        self._places: list[tuple[int, int]] = []  # lines of each token
        self.chosen = next((place for place, one in enumerate(self._tokens) if one.kind == "sampled"), 0)

    @property
    def token(self) -> TokenView | None:
        return self._tokens[self.chosen] if self._tokens else None

    @property
    def item_count(self) -> int:
        return len(self._tokens)

    @property
    def line_count(self) -> int:
        self._lay_out()
        return len(self._lines)

    def lines_of(self, item: int) -> tuple[int, int]:
        self._lay_out()
        return self._places[item]

    def is_chosen(self, place: int) -> bool:
        return False  # the token itself is marked

    def on_resize(self) -> None:
        self.changed()
        self.choose(self.chosen)

    def _lay_out(self) -> None:
        if self._width == self.room:
            return
        self._width, self._lines, self._places = self.room, [], []
        for sequence in self._sequences:
            self._lines += [*folded(one_line(summary(sequence)), self._width), ""]
            self._sequence(sequence)
            self._lines.append("")

    def _sequence(self, sequence: SequenceView) -> None:
        line: list[tuple[int, str]] = []
        used = 0
        self._lines.append(line)
        for token in sequence.tokens:
            item, first = len(self._places), len(self._lines) - 1
            shown = written(token)
            if used and used + cell_len(shown) > self._width:
                line, used = [], 0
                self._lines.append(line)
                first += 1
            for part, text in enumerate(folded(shown, self._width)):
                if part:
                    line, used = [], 0
                    self._lines.append(line)
                line.append((item, text))
                used += cell_len(text)
            self._places.append((first, len(self._lines)))
            if token.text.endswith("\n"):
                line, used = [], 0
                self._lines.append(line)

    def line(self, place: int) -> Text:
        self._lay_out()
        line = self._lines[place]
        if isinstance(line, str):
            return Text(line, "bold")
        text = Text(no_wrap=True)
        for item, part in line:
            text.append(part, style_of(self._tokens[item], chosen=item == self.chosen))
        return text


def written(token: TokenView) -> str:
    """The text of a token, or its id with a space where there is none."""
    return token.text.replace("\n", "⏎").replace("\t", "⇥") if token.text else f"{token.token} "


def style_of(token: TokenView, *, chosen: bool) -> str:
    """Sampled tokens are coloured, less likely ones more; those that the learner was given are underlined."""
    style = "dim"
    if token.kind == "sampled":
        likely = token.probability
        style = next(color for least, color in LIKELY if likely is None or likely >= least)
    elif token.kind == "environment":
        style = "blue"
    style += " underline" if token.trained else ""
    return f"{style} reverse" if chosen else style


def told(token: TokenView) -> str:
    """What is known of a token."""
    facts = [f"id {token.token}", token.kind]
    if token.log_prob is not None:
        facts.append(f"log-probability {token.log_prob:.4f}")
    if token.version is not None:
        facts.append(f"version {token.version}")
    facts += [f"{name} {number(value, 4)}" for name, value in token.values.items()]
    if token.kind == "sampled":
        facts.append("trained" if token.trained else "not trained")
    return one_line(" · ".join([f"“{written(token).rstrip()}”" if token.text else "", *facts]).removeprefix(" · "))
