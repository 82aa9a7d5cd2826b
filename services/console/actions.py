"""What the console changes, with its key alone (`guard`): a run is stopped or resumed, a policy rolled back."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import quote

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from mulligan.console.library import ShownRun
from mulligan.console.services import ServiceAnswer, ServicesPort


class Actions:
    """`run` finds the run of a request."""

    def __init__(self, services: ServicesPort, run: Callable[[Request], ShownRun]) -> None:
        self._services = services
        self._run = run

    @property
    def routes(self) -> list[Route]:
        return [
            Route("/runs/{run}/stop", self.stop, methods=["POST"]),
            Route("/runs/{run}/resume", self.resume, methods=["POST"]),
            Route("/policies/{policy}/versions/{version:int}/serve", self.roll_back, methods=["POST"]),
        ]

    async def stop(self, request: Request) -> Response:
        run = self._run(request)
        return _back(await self._services.stop(_run_id(run)), f"/runs/{quote(run.key)}")

    async def resume(self, request: Request) -> Response:
        run = self._run(request)
        return _back(await self._services.resume(_run_id(run)), f"/runs/{quote(run.key)}")

    async def roll_back(self, request: Request) -> Response:
        policy, version = request.path_params["policy"], request.path_params["version"]
        return _back(await self._services.roll_back(policy, version), "/policies")


def _run_id(run: ShownRun) -> str:
    if run.record is None:
        raise HTTPException(409, f"The settings of run {run.key} cannot be read: {run.error}")
    return run.record.run_id


def _back(answer: ServiceAnswer[object], path: str) -> Response:
    if answer.error:
        raise HTTPException(409, answer.error)
    return RedirectResponse(path, 303)
