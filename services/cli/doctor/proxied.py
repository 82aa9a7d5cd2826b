"""Proxies: variables that would send calls to services elsewhere."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from contextlib import suppress

from mulligan.cli.doctor.finding import Finding, Topic
from mulligan.common import proxies


def check_proxies(addresses: Mapping[str, str], environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """Does not show the proxy's URL, which may hold credentials."""
    variable = proxies.variable(environment)
    if not variable:
        return [Topic("proxy", "environment").ok("No variable sets an HTTP proxy.")]
    hosts: dict[str, list[str]] = {}
    for service, text in addresses.items():
        for one in text.split(","):
            hosts.setdefault(proxies.host_of(one.strip()), []).append(service)
    return [judge_proxy(Topic("proxy", ", ".join(dict.fromkeys(names))), variable, host, environment)
            for host, names in hosts.items() if host]  # fmt: skip


def judge_proxy(topic: Topic, variable: str, host: str, environment: Mapping[str, str]) -> Finding:
    """Mulligan's own clients call hosts of this machine and of private networks directly; others obey the variable."""
    if is_exempt(host, environment):
        return topic.ok(f"no_proxy has {host}, so the proxy of {variable} is not asked.")
    if proxies.is_direct(host):
        said = (
            f"{variable} sets a proxy, and no_proxy lacks {host}: clients of gRPC other than Mulligan's would use it."
        )
        return topic.warning(said, f"Add {host} to no_proxy.")
    said = f"Calls to {host} go through the proxy of {variable}."
    return topic.warning(said, f"Add {host} to no_proxy, unless the proxy alone reaches it and lets gRPC through.")


def goes_through_proxy(host: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether Mulligan's clients ask a proxy for this host."""
    return bool(proxies.variable(environment)) and not proxies.is_direct(host) and not is_exempt(host, environment)


def is_exempt(host: str, environment: Mapping[str, str]) -> bool:
    """Whether no_proxy names the host, a domain that it is in, or a network.
    https://github.com/grpc/grpc/blob/master/doc/environment_variables.md"""
    wanted = host.strip("[]").lower()
    listed = ",".join(environment.get(name, "") for name in ("no_grpc_proxy", "no_proxy", "NO_PROXY"))
    for entry in (one.strip().lower() for one in listed.split(",")):
        name = entry.removeprefix("*").lstrip(".")
        if entry == "*" or (name and (wanted == name or wanted.endswith(f".{name}"))):
            return True
        with suppress(ValueError):
            if ipaddress.ip_address(wanted) in ipaddress.ip_network(entry, strict=False):
                return True
    return False
