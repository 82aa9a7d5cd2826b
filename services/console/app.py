"""The pages of the console, and their addresses. Each view has a URL that says all of what it shows."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from mulligan.console.access import Access
from mulligan.console.actions import Actions
from mulligan.console.charts import Chart, first_charts, matching_charts
from mulligan.console.chat import ChatPages
from mulligan.console.guard import Guard
from mulligan.console.histogram import Bin
from mulligan.console.index import ExperienceFilter, ExperienceIndex
from mulligan.console.library import ShownRun
from mulligan.console.reading import experience_of, members_of, wanted_of, whole
from mulligan.console.service_pages import ServicePages
from mulligan.console.services import ServicesPort
from mulligan.console.settings import differences, flat, grouped
from mulligan.console.templating import STATIC, query, templates
from mulligan.console.tokens import texts_of
from mulligan.console.views import view_of
from mulligan.console.watcher import Watcher
from mulligan.trainer.journal import slot_of

PAGE = 50  # experiences


def make_app(
    watcher: Watcher, index: ExperienceIndex, services: ServicesPort, access: Access, recording: str = ""
) -> Starlette:
    """`recording` is what each page says where a recording is shown."""
    pages = Pages(watcher, index, recording)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with watcher.running():
            yield

    routes = [
        Route("/", pages.runs, name="runs"),
        Route("/compare", pages.compare, name="compare"),
        Route("/series", pages.series, name="series"),
        Route("/live", pages.live, name="live"),
        Route("/runs/{run}", pages.charts, name="run"),
        Route("/runs/{run}/settings", pages.settings, name="settings"),
        Route("/runs/{run}/experiences", pages.experiences, name="experiences"),
        Route("/runs/{run}/experiences/{experience}", pages.experience, name="experience"),
        Route("/runs/{run}/groups/{step:int}/{slot:int}", pages.group, name="group"),
        *ServicePages(services, pages.page).routes,
        *Actions(services, pages.run).routes,
        *ChatPages(services, pages.page).routes,
        Mount("/static", StaticFiles(directory=STATIC), name="static"),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, access=access)],
        exception_handlers={HTTPException: pages.failed, Exception: pages.failed},
        lifespan=lifespan,
    )


class Pages:
    def __init__(self, watcher: Watcher, index: ExperienceIndex, recording: str = "") -> None:
        self._watcher = watcher
        self._index = index
        self._recording = recording
        self._templates = templates()

    # Pages

    async def runs(self, request: Request) -> Response:
        return self.page(request, "runs.html", runs=self._watcher.runs, indexing=self._watcher.indexing)

    async def charts(self, request: Request) -> Response:
        run = self.run(request)
        wanted = request.query_params.get("metric", "")
        return self.page(request, "run.html", run=run, tab="charts", metric=wanted, charts=_charts([run], wanted))

    async def settings(self, request: Request) -> Response:
        run = self.run(request)
        groups = {} if run.record is None else grouped(flat(run.record.settings))
        return self.page(request, "settings.html", run=run, tab="settings", groups=groups)

    async def compare(self, request: Request) -> Response:
        chosen = [run for key in request.query_params.getlist("run") if (run := self._watcher.run(key))]
        wanted = request.query_params.get("metric", "")
        rows = differences([{} if run.record is None else run.record.settings for run in chosen])
        return self.page(
            request, "compare.html", runs=chosen, metric=wanted, charts=_charts(chosen, wanted), differences=rows
        )

    async def experiences(self, request: Request) -> Response:
        run = self.run(request)
        wanted = wanted_of(run.key, request.query_params)
        after = max(whole(request.query_params.get("after")) or 0, 0)
        found = await asyncio.to_thread(self._index.page, wanted, after=after, limit=PAGE)
        choices = await asyncio.to_thread(self._index.choices, run.key)
        given = {name: value for name, value in request.query_params.items() if value and name != "after"}
        values: dict[str, Any] = {"run": run, "tab": "experiences", "wanted": wanted, "found": found}
        values |= {"bins": found.bins, "choices": choices, "given": given, "after": after, "page": PAGE}
        begin = f"/runs/{quote(run.key)}/experiences/"
        values["hrefs"] = [f"{begin}{quote(row.experience_id)}{query(given)}" for row in found.rows]
        values["links"] = [_of_bin(given, wanted, one) for one in found.bins]
        values["indexing"] = self._watcher.indexing
        return self.page(request, "experiences.html", **values)

    async def experience(self, request: Request) -> Response:
        run = self.run(request)
        name = request.path_params["experience"]
        experience = await asyncio.to_thread(experience_of, run.folder.journal, name)
        if experience is None:
            raise HTTPException(404, f"Run {run.key} has no experience {name!r} in its journal.")
        view = await asyncio.to_thread(view_of, experience, texts_of(str(run.setting("model", "source") or "")))
        wanted = wanted_of(run.key, request.query_params)
        before, following = await asyncio.to_thread(self._index.neighbours, wanted, name)
        given = dict(request.query_params)
        return self.page(
            request,
            "experience.html",
            run=run,
            tab="experiences",
            view=view,
            slot=slot_of(name),
            given=given,
            before=before,
            following=following,
        )

    async def group(self, request: Request) -> Response:
        run = self.run(request)
        step, slot = request.path_params["step"], request.path_params["slot"]
        members = await asyncio.to_thread(members_of, run.folder.journal, step, slot)
        if not members:
            raise HTTPException(404, f"Step {step} of run {run.key} has no group {slot} in its journal.")
        views = [view_of(one, None) for one in members]
        return self.page(request, "group.html", run=run, tab="experiences", views=views, step=step, slot=slot)

    # Data

    async def series(self, request: Request) -> Response:
        """Points of metrics of runs, as JSON: those of later events than `after`, if there is one."""
        keys, names = request.query_params.getlist("run"), request.query_params.getlist("metric")
        after = whole(request.query_params.get("after")) or 0
        return JSONResponse(self._points(keys, names, dict.fromkeys(keys, after)))

    async def live(self, request: Request) -> Response:
        """The same as server-sent events, whenever there is something new. `after` has a number for each run."""
        keys = request.query_params.getlist("run")
        names = request.query_params.getlist("metric")
        cursors = {key: whole(one) or 0 for key, one in zip(keys, request.query_params.getlist("after"), strict=False)}

        async def events() -> AsyncIterator[str]:
            yield "retry: 2000\n\n"
            async for _ in self._watcher.changes():
                newest = {key: run.series.cursor for key in keys if (run := self._watcher.run(key))}
                if all(cursor <= cursors.get(key, 0) for key, cursor in newest.items()):
                    yield ": nothing new\n\n"  # notices a browser that has left
                    continue
                points = self._points(keys, names, cursors)
                cursors.update(newest)
                yield f"data: {json.dumps(points)}\n\n"

        return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    def _points(self, keys: Sequence[str], names: Sequence[str], cursors: Mapping[str, int]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key in keys:
            if run := self._watcher.run(key):
                after = cursors.get(key, 0)
                metrics = {name: one.after(after) for name in names if (one := run.series.series.get(name))}
                metrics = {name: points for name, points in metrics.items() if points[0]}
                found[key] = {
                    "after": run.series.cursor,
                    "state": run.state,
                    "steps": run.series.steps,
                    "metrics": metrics,
                }
        return found

    # Helpers

    async def failed(self, request: Request, error: Exception) -> Response:
        code = error.status_code if isinstance(error, HTTPException) else 500
        message = (
            error.detail if isinstance(error, HTTPException) else "This is a fault of the console; its log has it."
        )
        return self.page(request, "failed.html", status_code=code, title=code, message=message)

    def run(self, request: Request) -> ShownRun:
        key = request.path_params["run"]
        run = self._watcher.run(key)
        if run is None:
            raise HTTPException(404, f"There is no run {key!r} below {self._watcher.root}.")
        return run

    def page(self, request: Request, template: str, *, status_code: int = 200, **values: Any) -> HTMLResponse:
        own = {"request": request, "root": self._watcher.root, "recording": self._recording}
        own["may_act"] = request.scope.get("may_act", False) and not self._recording
        text = self._templates.get_template(template).render(**own, **values)
        return HTMLResponse(text, status_code=status_code, headers={"Cache-Control": "no-store"})


def _of_bin(given: Mapping[str, str], wanted: ExperienceFilter, one: Bin) -> tuple[str, bool]:
    """The address that chooses a bin, or no longer if it is chosen; and whether it is."""
    chosen = (wanted.reward_from, wanted.reward_to) == (one.low, one.high)
    bounds = (None, None) if chosen else (one.low, one.high)
    return query(given, **dict(zip(("from", "to"), bounds, strict=True))) or "?", chosen


def _charts(runs: Sequence[ShownRun], wanted: str) -> list[Chart]:
    names = {name for run in runs for name in run.series.series}
    return matching_charts(names, wanted) if wanted.strip() else first_charts(names)
