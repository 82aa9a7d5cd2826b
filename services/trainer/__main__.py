"""`python -m mulligan.trainer --config trainer.toml`: serves runs, and a learner for them, until SIGTERM.

`torchrun --nproc-per-node 8 -m mulligan.trainer …` runs the learner in 8 processes, of which the first one serves.
`learner_processes = 8` does that for one machine.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import chain
from tempfile import TemporaryDirectory
from typing import Protocol
from weakref import WeakSet

from mulligan.common.config import refuse
from mulligan.common.files import keep_files_private
from mulligan.common.logs import configure_logging
from mulligan.common.metrics import collected
from mulligan.common.server import run, serve
from mulligan.env import replicas as env_replicas
from mulligan.memory.client import MemoryClient
from mulligan.policy import replicas as policy_replicas
from mulligan.trainer import servicer as runs
from mulligan.trainer.client import LearnerAdminClient
from mulligan.trainer.config import TrainerSettings, processes_of_torchrun
from mulligan.trainer.interfaces import LearnerPort, MemoryPort
from mulligan.trainer.learner import servicer as learners
from mulligan.trainer.learner.allocator import return_freed_memory
from mulligan.trainer.learner.client import LearnerClient
from mulligan.trainer.learner.devices import device_problem
from mulligan.trainer.learner.folders import claim
from mulligan.trainer.learner.ranks import BadLaunch, Ranks, launch, launched, refusals_are_final
from mulligan.trainer.learner.settings import LearnerSpec, LearnerUse
from mulligan.trainer.manager import RunManager
from mulligan.trainer.run import ServicePorts
from mulligan.trainer.run_metrics import RunGauges
from mulligan.trainer.settings import RunSettings


class _Client(Protocol):
    @property
    def waiting_for(self) -> str: ...


def main() -> None:
    keep_files_private()
    with refusals_are_final():
        settings = TrainerSettings.load(sys.argv[1:])
        _refuse_absent_device(settings)
    if not launched() and settings.learner_processes > 1:
        launch("mulligan.trainer", sys.argv[1:], settings.learner_processes, settings.drain_seconds)
    return_freed_memory()
    with refusals_are_final():
        ranks = _join(settings) if launched() else Ranks()
    if ranks.is_first:
        run(settings, partial(_serve, settings, ranks))
    else:
        configure_logging(settings)
        learners.follow(settings.learner, ranks)
        ranks.leave()


def _refuse_absent_device(settings: TrainerSettings) -> None:
    processes, setting = settings.learner_processes, "learner_processes"
    if launched():
        processes, setting = processes_of_torchrun(), "--nproc-per-node"
    if problem := device_problem(settings.device, processes, setting):
        refuse(settings.service, problem)


def _join(settings: TrainerSettings) -> Ranks:
    try:
        return Ranks.join(settings.device)
    except BadLaunch as error:
        refuse(settings.service, str(error))


async def _serve(settings: TrainerSettings, ranks: Ranks) -> None:
    with TemporaryDirectory(prefix="mulligan-") as folder:
        # For a server with TLS: its certificate is for another name than the address that it is bound to.
        private = f"unix:{folder}/trainer" if settings.tls_certificate is not None else ""
        await _serve_with(settings, ranks, private)


async def _serve_with(settings: TrainerSettings, ranks: Ranks, private_address: str) -> None:
    learner_servicer = learners.LearnerServicer(settings.learner, ranks, settings.guard)
    own_address = ""
    opened: WeakSet[LearnerClient] = WeakSet()

    def notice(text: str) -> None:
        manager.notice(text)

    async def open_learner(run_id: str, run_settings: RunSettings) -> LearnerPort:
        spec = _spec(run_settings)
        endpoint = settings.endpoint("learner") if settings.learner_address else settings.own_endpoint(own_address)
        endpoint = replace(endpoint, run_credential=settings.run_credential(run_id))
        client = LearnerClient(endpoint, run_id, run_id, notice)
        opened.add(client)
        await client.open(spec)
        return client

    env = env_replicas.connect(settings.endpoint("env"), lost_seconds=settings.lost_seconds, on_outage=notice)
    policy = policy_replicas.connect(settings.endpoint("policy"), on_outage=notice)
    memory = MemoryClient(settings.endpoint("memory"), on_outage=notice)

    def memory_of(run_id: str, scope: str) -> MemoryPort:
        credential = settings.run_credential(run_id, scope)
        return memory if credential is None else memory.with_run_credential(credential)

    admission = settings.admission(memory.snapshot, partial(_learner_use, settings, learner_servicer))
    try:
        # With another trainer's learner, this one's folders may be those of that trainer: it writes nothing there.
        folders = ExitStack() if settings.learner_address else claim(settings.learner)
        upload = policy.upload_weights if settings.weights_transfer == "upload" else None
        waiting = partial(_waiting, (env, policy, memory), opened)
        services = ServicePorts(env, policy, memory, open_learner, upload, memory_of, waiting)
        manager = RunManager(settings.runs_folder, services)
    except OSError as error:
        refuse(settings.service, str(error))

    async def go_on(address: str) -> None:
        nonlocal own_address
        own_address = private_address or address
        manager.go_on()

    try:
        with collected(RunGauges(lambda: manager.active)):
            await serve(
                settings,
                lambda server: [
                    *runs.add_to_server(server, manager, admission),
                    *learners.add_to_server(server, learner_servicer),
                ],
                on_started=go_on,
                on_drain=partial(manager.drain, settings.drain_seconds),
                own_address=private_address,
            )
    finally:
        await manager.close()
        for client in (env, policy, memory):
            await client.close()
        await learner_servicer.close()
        folders.close()


def _waiting(*clients: Iterable[_Client]) -> list[str]:
    return [text for client in chain(*clients) if (text := client.waiting_for)]


def _spec(settings: RunSettings) -> LearnerSpec:
    return LearnerSpec(
        model=settings.model,
        optimizer=settings.optimizer,
        seed=settings.seed,
        deterministic=settings.deterministic,
        keep_checkpoints=settings.keep_checkpoints,
    )


async def _learner_use(settings: TrainerSettings, own: learners.LearnerServicer, learner_id: str) -> LearnerUse:
    """At this server, and at the one that runs of this trainer use: the credential is good for both."""
    if own.has(learner_id):
        return LearnerUse.IN_USE
    if not settings.learner_address:
        return LearnerUse.FREE
    client = LearnerAdminClient(settings.endpoint("learner"))
    try:
        return await client.use(learner_id)
    finally:
        await client.close()


if __name__ == "__main__":
    main()
