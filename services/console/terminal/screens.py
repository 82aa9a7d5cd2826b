"""The screens of the browser. `BrowserScreen` has what all of them share: a head, a view of items, a foot."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import ClassVar, cast

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.widgets import Input, Static

from mulligan.common.suggest import did_you_mean
from mulligan.console.index import ExperienceFilter
from mulligan.console.reading import experience_of, members_of
from mulligan.console.terminal.browsed import BrowsedRun, BrowserApp
from mulligan.console.terminal.items import ItemsView, LaidView
from mulligan.console.terminal.layout import Laid, LaidGroup, laid_experience, laid_group
from mulligan.console.terminal.rows import RowsView
from mulligan.console.terminal.text import one_line
from mulligan.console.terminal.tokens_view import TokensView, told
from mulligan.console.terminal.words import NAMES, BadFilter, typed_of, wanted_by
from mulligan.console.tokens import texts_of
from mulligan.console.views import ExperienceView, SequenceView, view_of
from mulligan.trainer.journal import slot_of, step_of

KEYS = (
    ("j k", "next, previous; in the list also ↓ ↑"),
    ("Enter", "open: an experience, the tokens of a sample, a rollout of a group"),
    ("u, Esc", "up, to where this is listed"),
    ("/", "search and filter; an empty one shows all"),
    ("n p", "next, previous experience"),
    ("f", "to the turn that failed; again: to the next one"),
    ("g", "the group: all rollouts of the task in this step"),
    ("o", "all of the system prompts and requests, or their beginnings"),
    ("← →", "token by token: the token before, after"),
    ("↑ ↓ PgUp PgDn Home End", "scroll"),
    ("t", "colours: the terminal's own, light, dark"),
    ("?", "these keys"),
    ("q", "quit"),
)


class BrowserScreen(Screen[None]):
    BINDINGS: ClassVar[list[BindingType]] = [Binding("u,escape", "up"), Binding("question_mark", "help")]
    HINT = "j k choose · Enter opens · u up · ? keys · q quits"

    @property
    def browsed(self) -> BrowsedRun:
        return cast(BrowserApp, self.app).browsed

    def compose(self) -> ComposeResult:
        yield Static(id="head", markup=False)
        yield from self.body()
        yield Static(Text(self.HINT, "dim"), id="foot", markup=False)

    def body(self) -> Iterator[ItemsView]:
        raise NotImplementedError

    def head(self, *parts: object) -> None:
        self.query_one("#head", Static).update(Text(" · ".join(one_line(part) for part in parts if part), no_wrap=True))

    def foot(self, text: object, style: str = "") -> None:
        self.query_one("#foot", Static).update(Text(one_line(text), style))

    def action_up(self) -> None:
        if len(self.app.screen_stack) > 2:  # below all lies the empty one of the app
            self.app.pop_screen()

    def action_help(self) -> None:
        self.app.push_screen(HelpScreen())

    async def follow(self) -> None:
        """The run has grown."""


class HelpScreen(BrowserScreen):
    HINT = "u goes back"

    def body(self) -> Iterator[ItemsView]:
        yield LaidView(_help)

    def on_mount(self) -> None:
        self.head("Keys")

    def action_help(self) -> None:
        self.action_up()


def _help(width: int) -> Laid:
    laid = Laid(width)
    for keys, says in KEYS:
        laid.add_parts((keys, "bold"), (says, ""))
    laid.add("")
    laid.add("Filters, after /: words of observations, answers and feedback, and NAME=VALUE")
    for name, says in NAMES.items():
        laid.add_parts((f"{name}=", "bold"), (says, ""))
    laid.add("Such as: role=reflection to=0.5 fell into", "dim")
    return laid


class ListScreen(BrowserScreen):
    """All experiences that fulfil a filter."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("slash", "search"), Binding("g", "group")]

    def body(self) -> Iterator[ItemsView]:
        run = self.browsed.key
        yield RowsView(self.browsed.index, ExperienceFilter(run))

    def compose(self) -> ComposeResult:
        yield Static(id="head", markup=False)
        yield from self.body()
        yield Input(placeholder="words, step=3 role=first outcome=completed from=0 to=1")
        yield Static(Text(self.HINT, "dim"), id="foot", markup=False)

    @property
    def rows(self) -> RowsView:
        return self.query_one(RowsView)

    async def on_mount(self) -> None:
        self.rows.focus()
        await self.follow()

    async def follow(self) -> None:
        await self.rows.read_anew()

    def on_rows_view_counted(self) -> None:
        rows, browsed = self.rows, self.browsed
        found = f"{rows.count:,} experiences"
        if browsed.watcher.indexing:
            found += f" so far; {browsed.watcher.indexing} more steps are being read"
        filters = typed_of(rows.wanted)
        self.head(found, filters, browsed.key, browsed.state)
        if not rows.count and filters:
            self.foot(f"no experience fulfils all conditions{self._near(rows.wanted)}; / and Enter show all", "yellow")
        elif not rows.count:
            self.foot("the journal is being read" if browsed.watcher.indexing else "no experience is complete yet")
        else:
            self.foot(self.HINT, "dim")

    def _near(self, wanted: ExperienceFilter) -> str:
        """The values that a misspelt one may mean."""
        choices = self.browsed.index.choices(wanted.run)
        for name in ("role", "outcome", "environment"):
            value = getattr(wanted, name)
            if value and value not in choices[name]:
                near = did_you_mean(value, choices[name]) or f"; there are: {', '.join(choices[name])}"
                return f": none has the {name} {value!r}{near}"
        return ""

    def action_search(self) -> None:
        field = self.query_one(Input)
        field.value = typed_of(self.rows.wanted)
        field.add_class("open")
        field.focus()

    async def on_input_submitted(self, event: Input.Submitted) -> None:
        try:
            wanted = wanted_by(self.browsed.key, event.value)
        except BadFilter as error:
            self.foot(error, "red")
            return
        self._close_search()
        await self.rows.read_anew(wanted)

    def _close_search(self) -> None:
        self.query_one(Input).remove_class("open")
        self.rows.focus()

    def action_up(self) -> None:
        if self.query_one(Input).has_class("open"):
            self._close_search()
            self.foot(self.HINT, "dim")

    def on_items_view_opened(self) -> None:
        if (row := self.rows.row) is not None:
            self.app.push_screen(ExperienceScreen(row.experience_id, self.rows.wanted))

    def action_group(self) -> None:
        if (row := self.rows.row) is not None:
            self.app.push_screen(GroupScreen(row.step, row.slot))


class ExperienceScreen(BrowserScreen):
    """An experience as the tree of its samples. `wanted` filters its neighbours."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("n", "neighbour(1)"),
        Binding("p", "neighbour(0)"),
        Binding("f", "failing"),
        Binding("g", "group"),
        Binding("o", "whole"),
    ]
    HINT = "j k choose · Enter tokens · f failed turn · n p others · g group · u up · ? keys"

    def __init__(self, name: str, wanted: ExperienceFilter) -> None:
        super().__init__()
        self._experience = name
        self._wanted = wanted
        self._view: ExperienceView | None = None
        self._whole = False

    def body(self) -> Iterator[ItemsView]:
        yield LaidView(self._laid)

    def _laid(self, width: int) -> Laid:
        if self._view is None:
            return Laid(width)
        return laid_experience(self._view, width, whole=self._whole)

    @property
    def lines(self) -> LaidView:
        return self.query_one(LaidView)

    async def on_mount(self) -> None:
        self.lines.focus()
        self.head(self._experience, "…")
        await self._read()

    async def _read(self) -> None:
        """Anew from the journal."""
        name = self._experience
        one = await asyncio.to_thread(experience_of, self.browsed.journal, name)
        if name != self._experience:
            return
        if one is None:
            self.foot(f"the journal has no experience {name!r} any more", "red")
            return
        texts = await asyncio.to_thread(texts_of, self.browsed.model)
        self._view = await asyncio.to_thread(view_of, one, texts)
        self.head(name)
        self.lines.lay_out_anew()

    async def follow(self) -> None:
        if self._view is not None and not self._view.experience.trained:
            await self._read()

    def action_whole(self) -> None:
        self._whole = not self._whole
        self.lines.lay_out_anew()
        self.lines.choose(self.lines.chosen)

    def action_failing(self) -> None:
        if self._view is not None and not self.lines.go_to_failing():
            self.foot("no turn failed", "dim")

    async def action_neighbour(self, side: int) -> None:
        """The experience before (0) or after (1) this one in the list."""
        found = await asyncio.to_thread(self.browsed.index.neighbours, self._wanted, self._experience)
        if (name := found[side]) is None:
            self.foot("this is the last one" if side else "this is the first one", "dim")
            return
        self._experience = name
        await self._read()
        self.foot(self.HINT, "dim")
        self.lines.choose(0)
        self.lines.scroll_home(animate=False)

    def action_group(self) -> None:
        self.app.push_screen(GroupScreen(step_of(self._experience), slot_of(self._experience)))

    def on_items_view_opened(self) -> None:
        if self._view is None:
            return
        chosen, nodes = self.lines.chosen, self._view.nodes
        if chosen < len(nodes):
            role, sequences = nodes[chosen].sample.role, nodes[chosen].sequences
        else:
            target = self._view.targets[chosen - len(nodes)]
            role, sequences = target.target.role, target.sequences
        self.app.push_screen(TokensScreen(self._experience, role, sequences))


class GroupScreen(BrowserScreen):
    """The rollouts of one task in one step, side by side where the width allows it."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("f", "failing")]
    HINT = "j k choose a rollout · Enter opens it · f failed turn · u up · ? keys"

    def __init__(self, step: int, slot: int) -> None:
        super().__init__()
        self._step, self._slot = step, slot
        self._views: list[ExperienceView] = []

    def body(self) -> Iterator[ItemsView]:
        yield GroupView(self._views)

    async def on_mount(self) -> None:
        self.query_one(GroupView).focus()
        await self.follow()

    async def follow(self) -> None:
        members = await asyncio.to_thread(members_of, self.browsed.journal, self._step, self._slot)
        self._views[:] = [view_of(one, None) for one in members]
        self.query_one(GroupView).lay_out_anew()
        task = f"task {members[0].task_id}" if members else "no experience of it is in the journal"
        self.head(f"step {self._step}", f"group {self._slot}", task, f"{len(members)} rollouts" if members else "")

    def action_failing(self) -> None:
        if not self.query_one(GroupView).go_to_failing():
            self.foot("no turn failed", "dim")

    def on_items_view_opened(self) -> None:
        one = self._views[self.query_one(GroupView).chosen].experience
        wanted = ExperienceFilter(self.browsed.key, step=self._step, slot=self._slot)
        self.app.push_screen(ExperienceScreen(one.experience_id, wanted))


class GroupView(LaidView):
    """The heading of the chosen member is marked."""

    def __init__(self, views: Sequence[ExperienceView]) -> None:
        super().__init__(self._lay_out_group)
        self._views = views
        self._group: LaidGroup | None = None

    def _lay_out_group(self, width: int) -> Laid:
        if not self._views:
            return Laid(width)
        self._group = laid_group(self._views, width)
        return self._group.laid

    def lines_of(self, item: int) -> tuple[int, int]:
        _ = self.laid
        if self._group is None:
            return 0, 0
        band = self._group.bands[item // self._group.columns]
        return band.first, band.end

    def is_chosen(self, place: int) -> bool:
        return self._group is not None and self._group.columns == 1 and super().is_chosen(place)

    def line(self, place: int) -> Text:
        text = super().line(place)
        if self._group is None or not self.item_count or place != self.lines_of(self.chosen)[0]:
            return text
        begin = (self.chosen % self._group.columns) * (self._group.column + 2)
        marked = text.copy()
        marked.stylize("reverse", begin, begin + self._group.column)
        return marked


class TokensScreen(BrowserScreen):
    """All tokens of a sample or target."""

    HINT = "j k choose a token · u up"

    def __init__(self, name: str, role: str, sequences: Sequence[SequenceView]) -> None:
        super().__init__()
        self._experience, self._role, self._sequences = name, role, sequences

    def body(self) -> Iterator[ItemsView]:
        yield TokensView(self._sequences)

    def on_mount(self) -> None:
        self.query_one(TokensView).focus()
        self.head(self._role, "token by token", self._experience)
        self.on_items_view_chosen()

    def on_items_view_chosen(self) -> None:
        token = self.query_one(TokensView).token
        self.foot("it has no tokens" if token is None else told(token))
