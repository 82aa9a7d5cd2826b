"""From settings to servers that serve what the model came with."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import TypeVar

from pydantic import SecretStr

from mulligan import models
from mulligan.common.errors import DomainError
from mulligan.common.inference import Feature, LoraLimits
from mulligan.common.model_files import UnsupportedModel
from mulligan.common.tasks import gather_or_cancel
from mulligan.policy.backend import ModelInfo
from mulligan.policy.backends._servers import ServerSettings
from mulligan.policy.backends._servers.backend import ServersBackend
from mulligan.policy.backends._servers.connection import (
    HttpConnection,
    RequestRefused,
    Unreachable,
    first_to_answer,
    new_session,
)
from mulligan.policy.backends._servers.folders import Folders
from mulligan.policy.backends._servers.launch import LaunchedServer
from mulligan.policy.backends._servers.pool import ServerPool
from mulligan.policy.backends._servers.server import EngineServer, Unsuitable
from mulligan.policy.backends._servers.skeleton import Skeleton
from mulligan.policy.chat import Chat
from mulligan.policy.model_settings import ModelSettings

B = TypeVar("B", bound=ServersBackend)


async def open_servers(
    backend: type[B],
    settings: ModelSettings,
    folder: Path,
    first_version: int,
    without: frozenset[Feature] = frozenset(),
) -> B:
    """Returns when all launched servers, or one of those that ran already, are ready. `without`: features of the
    servers that requests cannot use. Raises UnsupportedModel."""
    kind = backend.server_type
    engine = kind.connection_type.engine
    chosen = settings.own_as(ServerSettings)
    source = await asyncio.to_thread(models.locate, settings.model, settings.revision)
    load = partial(Skeleton, source, weights=not chosen.servers, name=settings.model)
    skeleton = await asyncio.to_thread(load)
    folders = await asyncio.to_thread(Folders, chosen, folder, skeleton, first_version)
    fixed, paths = await asyncio.to_thread(_fixed_adapters, settings, folders)
    async with AsyncExitStack() as stack:
        stack.callback(folders.close)
        session = new_session(chosen.https())
        stack.push_async_callback(session.close)

        key = chosen.key
        if key is None and not chosen.servers and kind.takes_key_file:
            key = SecretStr(secrets.token_hex(32))  # which never begins as a flag does

        def connect(address: str) -> HttpConnection:
            return kind.connection_type(session, address, key, chosen.admin_key)

        make = partial(kind, request_seconds=chosen.request_seconds, fixed=paths, guest=chosen.is_guest)
        servers = [make(connect(address)) for address in chosen.servers or ("http://127.0.0.1",) * chosen.launch]
        launched = [
            LaunchedServer(
                server, connect, chosen, source, folders.original_label, folder / f"{engine.lower()}-{index}.log", key
            )
            for index, server in enumerate(servers)
            if not chosen.servers
        ]
        for process in launched:
            stack.push_async_callback(process.stop)
        _raise_first(await asyncio.gather(*(process.start() for process in launched), return_exceptions=True))
        present = await _look_at_all(servers, skeleton, chosen.start_seconds)
        chat = skeleton.tokenizer.chat(skeleton.end_of_turn)
        info = await _describe(settings, skeleton, chat, present, fixed, without)
        pool = ServerPool(
            servers,
            folders.original(first_version),
            lambda server: _look(server, skeleton, info),
            folders,
            probe_seconds=chosen.probe_seconds,
            wait_seconds=chosen.wait_seconds,
        )
        stack.push_async_callback(pool.close)
        await _load(pool, present, loaded=bool(launched))
        for process, server in zip(launched, servers, strict=False):
            pool.run(process.supervise(partial(pool.take_out, server)))
        pool.start()
        stack.pop_all()
    return backend(settings, session, skeleton, folders, pool, launched, fixed, info, chat)


def _fixed_adapters(settings: ModelSettings, folders: Folders) -> tuple[dict[str, str], dict[str, str]]:
    """For each adapter the name that the servers use, and for each of these names its path."""
    names = {}
    paths = {}
    for name, folder in settings.adapters.items():
        names[name] = f"{folders.prefix}{name}-{secrets.token_hex(4)}"
        try:
            paths[names[name]] = folders.put_adapter(Path(folder), names[name])
        except DomainError as error:
            raise UnsupportedModel(f"adapters.{name}: {error.message}") from error
    return names, paths


async def _look_at_all(servers: Sequence[EngineServer], skeleton: Skeleton, seconds: float) -> list[EngineServer]:
    """The servers that answer. Raises UnsupportedModel if none does, or if one must not serve the policy."""
    try:
        await first_to_answer([server.connection for server in servers], seconds)
    except Unreachable as error:
        raise UnsupportedModel(f"no {servers[0].engine} server answers: {error}") from error
    results = await asyncio.gather(*(server.look(skeleton) for server in servers), return_exceptions=True)
    for server, result in zip(servers, results, strict=True):
        server.problem = str(result)
        if isinstance(result, Unsuitable | RequestRefused):
            raise UnsupportedModel(f"{server.address}: {result}") from result
    _raise_first([result for result in results if not isinstance(result, Unreachable)])
    present = [server for server, result in zip(servers, results, strict=True) if result is None]
    if not present:
        raise UnsupportedModel("; ".join(str(result) for result in results))
    return present


async def _describe(
    settings: ModelSettings,
    skeleton: Skeleton,
    chat: Chat,
    servers: Sequence[EngineServer],
    fixed: Mapping[str, str],
    without: frozenset[Feature],
) -> ModelInfo:
    """The policy's ModelInfo: only what all servers can do."""
    engine = servers[0].engine
    features = frozenset.intersection(*(server.features for server in servers)) - without
    is_guest = servers[0].guest
    if is_guest:
        features -= {Feature.FULL_WEIGHTS, Feature.MEMORY_RELEASE}  # they are the other policy's
    if (fixed or is_guest) and Feature.LORA_WEIGHTS not in features:
        field = "adapters_only" if is_guest else "adapters"
        needs = f"start them with {servers[0].lora_needs}"
        raise UnsupportedModel(f"{field}: the {engine} servers take no LoRA adapters: {needs}")
    if Feature.SEED in features and not all(await gather_or_cancel(server.repeats() for server in servers)):
        features -= {Feature.SEED}
    if chat.has_tools:
        features |= {Feature.TOOLS}
    lengths = [server.context_length for server in servers]
    [dtype, *others] = {server.dtype(skeleton) for server in servers}
    if others:
        raise UnsupportedModel(f"the {engine} servers compute in {', '.join([dtype, *others])}: expected one --dtype")
    return ModelInfo(
        model=settings.model_name,
        fingerprint=skeleton.fingerprint,
        context_length=min([*lengths, settings.context_length or lengths[0]]),
        vocabulary_size=skeleton.vocabulary_size,
        end_of_turn_token_ids=skeleton.end_of_turn,
        rewrites_history=chat.rewrites_history,
        deterministic=all(server.deterministic for server in servers),
        dtype=dtype,
        features=features,
        adapters=tuple(fixed),
        lora=_common_limits(servers) if Feature.LORA_WEIGHTS in features else LoraLimits(),
        capacity=settings.max_queue,
    )


def _common_limits(servers: Sequence[EngineServer]) -> LoraLimits:
    """The LoRA limits that hold on all servers. Raises UnsupportedModel if no layer can be adapted on all of them."""
    ranks = [server.lora.max_rank for server in servers if server.lora.max_rank]
    modules = [set(server.lora.target_modules) for server in servers if server.lora.target_modules]
    common = set.intersection(*modules) if modules else set()
    if modules and not common:
        raise UnsupportedModel(
            f"the {servers[0].engine} servers have no layer in common in their --lora-target-modules"
        )
    return LoraLimits(min(ranks, default=0), tuple(sorted(common)))


async def _look(server: EngineServer, skeleton: Skeleton, info: ModelInfo) -> None:
    """Checks that a server can do what the policy's ModelInfo says. Raises as `EngineServer.look` does."""
    await server.look(skeleton)
    missing = info.features - server.features - {Feature.TOOLS}
    if missing:
        raise Unsuitable(f"it lacks {', '.join(sorted(missing))}, which the other servers have")
    if server.context_length < info.context_length:
        raise Unsuitable(f"it takes {server.context_length} tokens, the others {info.context_length}")
    if Feature.LORA_WEIGHTS in info.features and _narrower(server.lora, info.lora):
        raise Unsuitable(f"it takes LoRA as {server.lora}, the others as {info.lora}")
    if server.dtype(skeleton) != info.dtype:
        raise Unsuitable(f"it computes in {server.dtype(skeleton)}, the others in {info.dtype}")


def _narrower(one: LoraLimits, other: LoraLimits) -> bool:
    rank = bool(one.max_rank) and not 0 < other.max_rank <= one.max_rank
    modules = bool(one.target_modules) and not (
        other.target_modules and set(other.target_modules) <= set(one.target_modules)
    )
    return rank or modules


async def _load(pool: ServerPool, present: Sequence[EngineServer], *, loaded: bool) -> None:
    """Has the servers load the target. With `loaded` they were just launched, and already hold it under its label."""
    target = pool.target

    async def load(server: EngineServer) -> None:
        if loaded:
            await server.was_launched(target.label)
            if Feature.LORA_WEIGHTS in server.features:
                await server.load_adapters(target)
            server.held = target
        else:
            await pool.load(server, target)
        await server.unload_others(target)
        pool.let_in(server)

    results = await asyncio.gather(*(load(server) for server in present), return_exceptions=True)
    for server, result in zip(present, results, strict=True):
        server.problem = str(result or "")
        if isinstance(result, RequestRefused):
            raise UnsupportedModel(f"{server.address} does not take what the model came with: {result}") from result
        if isinstance(result, Unsuitable):
            raise UnsupportedModel(f"{server.address}: {result}") from result
        if isinstance(result, BaseException) and not isinstance(result, Unreachable):
            raise result
    if not any(server.serving for server in present):
        raise UnsupportedModel("; ".join(str(result) for result in results))
    for server in pool.servers:
        if not server.serving:
            pool.take_out(server, server.problem)


def _raise_first(results: Sequence[object]) -> None:
    for result in results:
        if isinstance(result, BaseException):
            raise result
