"""The pages about services: their health, the policies and their versions, the memory and its evidence."""

from __future__ import annotations

from collections.abc import Callable

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mulligan.common.reflections import StoredReflection
from mulligan.console.services import ServicesPort

PAGE = 200  # entries
LATEST = 20  # versions of a policy that are shown at first


class ServicePages:
    """`page` renders a template with values."""

    def __init__(self, services: ServicesPort, page: Callable[..., Response]) -> None:
        self._services = services
        self._page = page

    @property
    def routes(self) -> list[Route]:
        return [
            Route("/services", self.health, name="services"),
            Route("/policies", self.policies, name="policies"),
            Route("/memory", self.entries, name="memory"),
            Route("/memory/{entry}", self.entry, name="entry"),
        ]

    async def health(self, request: Request) -> Response:
        return self._page(request, "services.html", found=await self._services.health())

    async def policies(self, request: Request) -> Response:
        found, every = await self._services.policies(), bool(request.query_params.get("all"))
        return self._page(request, "policies.html", found=found, every=every, latest=LATEST)

    async def entries(self, request: Request) -> Response:
        given = {name: value for name, value in request.query_params.items() if value}
        scope, status, text = (given.get(name, "") for name in ("scope", "status", "text"))
        answer = await self._services.entries(scope)
        found = [one for one in answer.found or [] if _is_wanted(one, status, text)]
        values = {"shown": found[:PAGE], "count": len(found), "scope": scope, "status": status, "text": text}
        return self._page(request, "memory.html", error=answer.error, **values)

    async def entry(self, request: Request) -> Response:
        answer = await self._services.entry(request.path_params["entry"])
        if answer.found is None:
            raise HTTPException(404, answer.error)
        return self._page(request, "entry.html", explained=answer.found, entry=answer.found.reflection)


def _is_wanted(entry: StoredReflection, status: str, text: str) -> bool:
    said = f"{entry.text}\n{entry.key}\n{' '.join(entry.tags)}\n{entry.reflection_id}".lower()
    return (not status or entry.status.value == status) and all(word in said for word in text.lower().split())
