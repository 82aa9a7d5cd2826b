"""The services: whether each answers at its address, speaks TLS or not as it should, is the right one, and takes the
token; then what it says of itself."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from mulligan.cli.connection import DEFAULT_ADDRESSES, TLS, TOKEN, UnusableEndpoint, find_endpoint, program
from mulligan.cli.doctor.certificates import (
    Handshake,
    check_certificate,
    check_key_files,
    client_key_files,
    shake_hands,
    wants_certificate,
)
from mulligan.cli.doctor.clocks import judge_clock
from mulligan.cli.doctor.finding import Diagnosis, Finding, Topic
from mulligan.cli.doctor.proxied import goes_through_proxy
from mulligan.common.addresses import Addresses
from mulligan.common.channel import Endpoint, HealthAnswer, ask_health
from mulligan.common.errors import CallFailed, DomainError, Reason, ServiceUnavailable
from mulligan.common.proxies import host_of
from mulligan.common.tls import BadTls, ClientTls
from mulligan.env.client import EnvClient
from mulligan.memory.client import MemoryClient
from mulligan.policy.client import PolicyClient
from mulligan.trainer.client import RunClient

SERVICE_SECONDS = 12.0  # for all that is asked of one server
_SECONDS = 3.0  # for one question
_MOST = 8  # servers of a service that are looked at
# Their names in the contracts, and so for the health check.
CONTRACTS: Mapping[str, str] = {
    "env": "mulligan.env.v1.EnvService",
    "policy": "mulligan.policy.v1.PolicyService",
    "memory": "mulligan.memory.v1.MemoryService",
    "trainer": "mulligan.trainer.v1.RunService",
}


@dataclass(frozen=True, slots=True)
class Told:
    """What a service told: times that lie in its past, folders and models of its machine, what is not installed."""

    times: Sequence[datetime] = ()
    folders: Sequence[str] = ()
    models: Sequence[str] = ()
    troubles: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class ServiceReport:
    findings: Sequence[Finding]
    told: Told = field(default_factory=Told)


def flag(service: str) -> str:
    return "--policy-address" if service == "policy" else f"--{service}"


async def examine_service(service: str, text: str, now: datetime) -> ServiceReport:
    """Looks at each server of a service, at most at 8."""
    topic = Topic("address", service)
    try:
        addresses = await asyncio.wait_for(Addresses.parse(text).look_up(), _SECONDS)
    except ValueError as error:
        return ServiceReport([topic.problem(f"{error}.", f"Correct {flag(service)}.")])
    except TimeoutError:
        said = f"The name service did not answer for {text!r} within {_SECONDS:g} s."
        return ServiceReport([topic.problem(said, "Look at the name servers of this machine.")])
    except OSError as error:
        return ServiceReport([topic.problem(f"{error}.", f"Correct {flag(service)}, or look at the name servers.")])
    reports = await asyncio.gather(
        *(
            _examine_server(service if len(addresses) == 1 else f"{service} {address}", service, address, now)
            for address in addresses[:_MOST]
        )
    )
    findings = [finding for report in reports for finding in report.findings]
    if len(addresses) > _MOST:
        findings.append(topic.skipped(f"Of {len(addresses)} servers the first {_MOST} were looked at."))
    return ServiceReport(findings, reports[0].told)


async def _examine_server(subject: str, service: str, address: str, now: datetime) -> ServiceReport:
    topic = Topic("address", subject)
    try:
        endpoint = find_endpoint(address, outage_seconds=0.0)
    except UnusableEndpoint as error:
        return ServiceReport([topic.problem(f"{error}.", f"Correct {TLS}_…, {TOKEN}_FILE or {TOKEN}.")])
    secrets = check_key_files(client_key_files(endpoint.tls, endpoint.token_file))
    raw = not address.startswith("unix:") and not goes_through_proxy(host_of(address))
    unreachable = await knock(address) if raw or address.startswith("unix:") else None
    if unreachable is not None:
        return ServiceReport([judge_knock(topic, service, address, unreachable)])
    found = list(secrets)
    if raw:
        transport = await _check_transport(topic, address, endpoint.tls, now)
        found += transport
        if any(one.verdict is Diagnosis.PROBLEM for one in transport):
            return ServiceReport(found)
    health = await _check_health(topic, service, address, endpoint.tls)
    found.append(health)
    if health.verdict is Diagnosis.PROBLEM:
        return ServiceReport(found)
    access, told = await _check_access(Topic("token", subject), service, endpoint)
    found += [*access, judge_clock(Topic("clock", subject), host_of(address), told.times, now)]
    found += [Topic("service", subject).warning(f"{one}.", "See the log of that service.") for one in told.troubles]
    return ServiceReport(found, told)


async def knock(address: str) -> BaseException | None:
    """Opens a connection and closes it. The error if that fails."""
    try:
        async with asyncio.timeout(_SECONDS):
            if address.startswith("unix:"):
                path = address.removeprefix("unix:")
                _, writer = await asyncio.open_unix_connection(path.removeprefix("//"))
            else:
                _, writer = await asyncio.open_connection(*host_and_port(address))
    except (OSError, TimeoutError) as error:
        return error
    writer.close()
    return None


def judge_knock(topic: Topic, service: str, address: str, error: BaseException) -> Finding:
    """Says why no connection came about."""
    if isinstance(error, socket.gaierror):
        said = f"The host of {address} is not known: {error.strerror}."
        return topic.problem(said, f"Correct {flag(service)}, or look at the name servers of this machine.")
    if isinstance(error, TimeoutError):
        said = f"Nothing answers at {address} within {_SECONDS:g} s."
        return topic.problem(said, f"Correct {flag(service)}, or see whether a firewall stands between.")
    if isinstance(error, ConnectionRefusedError | FileNotFoundError):
        start = f"`{program()} up`" if address == DEFAULT_ADDRESSES[service] else f"`python -m mulligan.{service}`"
        said = f"Nothing listens at {address}."
        return topic.problem(said, f"Start the service with {start}, or say with {flag(service)} where it is.")
    said = f"{address} cannot be reached: {getattr(error, 'strerror', None) or error}."
    return topic.problem(said, f"Correct {flag(service)}, or look at the network of this machine.")


async def _check_transport(topic: Topic, address: str, tls: ClientTls | None, now: datetime) -> list[Finding]:
    """Whether the server speaks TLS if it should, and only then; and its certificate."""
    host, port = host_and_port(address)
    try:
        shown = await shake_hands(host, port, tls)
    except (OSError, ValueError) as error:
        said = f"The client's certificate cannot be used: {error}."
        return [topic.problem(said, f"Correct {TLS}_CERT and {TLS}_KEY.")]
    if tls is None:
        return [_unexpected_tls(topic, address)] if shown.speaks_tls else []
    if not shown.speaks_tls:
        return [_missing_tls(topic, address, shown)]
    found = await check_certificate(topic.subject, host, port, tls, shown, now)
    if wants_certificate(shown):
        said = f"{address} refuses the client: it asks for a certificate, and takes none or not this one."
        found.append(topic.problem(said, f"Let {TLS}_CERT and {TLS}_KEY name one that its authority issued."))
    return found


def _unexpected_tls(topic: Topic, address: str) -> Finding:
    said = f"{address} speaks TLS, and it is called without TLS."
    return topic.problem(said, f"Let {TLS}_CA name the PEM file of the authority that issued its certificate.")


def _missing_tls(topic: Topic, address: str, shown: Handshake) -> Finding:
    if wants_certificate(shown):
        said = f"{address} ended TLS: it asks for a certificate, and takes none or not this one."
        return topic.problem(said, f"Let {TLS}_CERT and {TLS}_KEY name one that its authority issued.")
    said = f"{address} does not speak TLS, and it is called with TLS ({shown.error or 'no certificate'})."
    return topic.problem(said, f"Unset {TLS}_…, or give the service `tls_certificate` and `tls_key`.")


async def _check_health(topic: Topic, service: str, address: str, tls: ClientTls | None) -> Finding:
    """Whether it is a server of this service, and serves."""
    try:
        answer = await ask_health(address, _SECONDS, tls, CONTRACTS[service])
    except BadTls as error:
        return topic.problem(f"{error}.", f"Correct {TLS}_….")
    if answer.status == "SERVING":
        return topic.ok(f"The {service} service serves at {address}.")
    if answer.status in ("NOT_FOUND", "SERVICE_UNKNOWN"):
        others = await _others(service, address, tls)
        what = f"the {others[0]} service" if others else "another gRPC server"
        return topic.problem(f"At {address} is {what}, not the {service} service.", f"Correct {flag(service)}.")
    return judge_health(topic, service, address, answer)


def judge_health(topic: Topic, service: str, address: str, answer: HealthAnswer) -> Finding:
    """Says what another answer than SERVING means."""
    correct = f"Correct {flag(service)}."
    said, remedy = {
        "NOT_SERVING": (
            f"The {service} service at {address} is there, and says that it does not serve.",
            "See its log; a service that starts, ends, or lost its engine says this.",
        ),
        "UNIMPLEMENTED": (
            f"At {address} is a gRPC server without a health check: no service of Mulligan.",
            correct,
        ),
        "DEADLINE_EXCEEDED": (
            f"{address} takes connections, and does not answer within {_SECONDS:g} s.",
            "See its log: it hangs, does too much, or is no gRPC server.",
        ),
    }.get(
        answer.status,
        (
            f"{address} takes connections, and does not answer as a gRPC server ({answer.status}: {answer.details}).",
            f"{correct} Something else listens there.",
        ),
    )
    return topic.problem(said, remedy)


async def _others(service: str, address: str, tls: ClientTls | None) -> list[str]:
    """The services of Mulligan that a server has."""
    others = [name for name in CONTRACTS if name != service]
    answers = await asyncio.gather(*(ask_health(address, _SECONDS, tls, CONTRACTS[name]) for name in others))
    return [name for name, one in zip(others, answers, strict=True) if one.status in ("SERVING", "NOT_SERVING")]


async def _check_access(topic: Topic, service: str, endpoint: Endpoint) -> tuple[list[Finding], Told]:
    """Makes a call that reads, with the token."""
    try:
        async with asyncio.timeout(_SECONDS):
            told = await _ASK[service](endpoint)
    except DomainError as error:
        return [_refused(topic, endpoint, error)], Told()
    except TimeoutError:
        said = f"The {service} service is healthy, and does not answer a call within {_SECONDS:g} s."
        return [topic.warning(said, "See its log and the load of its machine.")], Told()
    except (CallFailed, ServiceUnavailable) as error:
        said = f"A call failed: {error}."
        return [topic.problem(said, "See the log of the service, and whether it is of the same release.")], Told()
    return [
        topic.ok("The service takes calls." if has_token(endpoint) else "The service takes calls without a token.")
    ], told


def has_token(endpoint: Endpoint) -> bool:
    return bool(endpoint.token) or endpoint.token_file is not None


def _refused(topic: Topic, endpoint: Endpoint, error: DomainError) -> Finding:
    if error.reason is Reason.INSUFFICIENT_ROLE:
        return topic.warning(f"{error}.", f"Let {TOKEN}_FILE name a token of that role to use all commands.")
    if error.reason is not Reason.BAD_CREDENTIAL:
        return topic.problem(f"A call was refused: {error}.", "See the log of the service.")
    if has_token(endpoint):
        whence = endpoint.token_file or TOKEN
        said = f"{endpoint.address} refuses the token of {whence}: it is none of its own."
        return topic.problem(said, f"Let {TOKEN}_FILE name the file of a token that this service accepts.")
    said = f"{endpoint.address} wants a token, and none is set or found."
    remedy = f"Let {TOKEN}_FILE name its file; of `mulligan up` only the user who runs it has the tokens."
    return topic.problem(said, remedy)


async def _told_by_env(endpoint: Endpoint) -> Told:
    client = EnvClient(endpoint)
    try:
        found = await client.list_environments()
    finally:
        await client.close()
    return Told(
        troubles=[f"The environment {one.name} cannot be played: {one.unavailable}" for one in found if one.unavailable]
    )


async def _told_by_policy(endpoint: Endpoint) -> Told:
    client = PolicyClient(endpoint)
    try:
        found = await client.policies()
        versions = [one for info in found for one in await client.versions(info.name)]
    finally:
        await client.close()
    troubles = [f"The policy {one.name} is {one.state}: {one.problem}" for one in found if one.problem]
    times = [one.created_at for one in versions]
    return Told(times=times, models=[one.model for one in found if one.model], troubles=troubles)


async def _told_by_memory(endpoint: Endpoint) -> Told:
    client = MemoryClient(endpoint)
    try:
        found = await client.list("", 1)
    finally:
        await client.close()
    return Told(times=[one.created_at for one in found])


async def _told_by_trainer(endpoint: Endpoint) -> Told:
    client = RunClient(endpoint)
    try:
        found = await client.runs()
    finally:
        await client.close()
    troubles = [f"The run {one.run_id} is paused: {one.paused}" for one in found if one.paused]
    folders = dict.fromkeys(one.folder for one in found)
    return Told(times=[one.created_at for one in found], folders=list(folders), troubles=troubles)


_ASK: Mapping[str, Callable[[Endpoint], Awaitable[Told]]] = {
    "env": _told_by_env,
    "policy": _told_by_policy,
    "memory": _told_by_memory,
    "trainer": _told_by_trainer,
}


def host_and_port(address: str) -> tuple[str, int]:
    """Of HOST:PORT, and of [HOST]:PORT."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def away_by_default(reports: Mapping[str, ServiceReport], addresses: Mapping[str, str]) -> bool:
    """Whether nothing listens at any of the usual addresses, and none was given: no services are run here now."""
    return addresses == DEFAULT_ADDRESSES and all(
        len(one.findings) == 1 and one.findings[0].said.startswith("Nothing listens at") for one in reports.values()
    )


def not_started(reports: Mapping[str, ServiceReport]) -> list[Finding]:
    why = f"Nothing listens at the usual address: `{program()} up` starts the services."
    return [Topic("address", name).skipped(why) for name in reports]
