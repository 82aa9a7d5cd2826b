"""`python -m mulligan.env --config env.toml`: serves environments until SIGTERM."""

from __future__ import annotations

import asyncio
import sys
from functools import partial

import structlog

from mulligan.common.config import refuse
from mulligan.common.files import keep_files_private
from mulligan.common.metrics import collected
from mulligan.common.server import run, serve
from mulligan.env import processes
from mulligan.env.config import EnvSettings
from mulligan.env.episodes import EpisodeTable
from mulligan.env.metrics import EpisodeGauges
from mulligan.env.servicer import add_to_server
from mulligan.env.workers import WorkerPool

log = structlog.get_logger()
_CLOSING_SECONDS = 5.0  # for closing episodes and environments after the drain


def main() -> None:
    keep_files_private()
    settings = EnvSettings.load(sys.argv[1:])
    if settings.processes > 1:
        run(settings, partial(processes.serve, settings, sys.argv[1:]))
        return
    processes.name_process()
    try:
        environments = settings.create_environments()
    except ValueError as error:
        refuse(settings.service, str(error))

    async def serve_environments() -> None:
        workers = WorkerPool(settings.worker_threads, settings.step_timeout_seconds, settings.max_hanging_threads)
        for name, environment in environments.items():
            if environment.info.unavailable:
                log.warning("environment unavailable", environment=name, reason=environment.info.unavailable)
            elif (log_protection := getattr(environment, "log_protection", None)) is not None:  # it is untrusted
                log_protection()
        table = EpisodeTable(environments, workers, settings.limits)
        sweeping = asyncio.create_task(table.keep_expiring(min(settings.lease_seconds / 4, 10.0)))
        with collected(EpisodeGauges(lambda: table.live_count, lambda: table.answer_bytes)):
            await serve(settings, lambda server: add_to_server(server, table), on_started=processes.served)
        sweeping.cancel()
        await table.close(_CLOSING_SECONDS)
        workers.close()

    run(settings, serve_environments)


if __name__ == "__main__":
    main()
