"""HTTP proxies of the environment do not come between services of ours."""

from __future__ import annotations

import pytest

from mulligan.common.proxies import hint, host_of, is_direct


@pytest.mark.parametrize(
    ("address", "host", "direct"),
    [
        ("127.0.0.1:50051", "127.0.0.1", True),
        ("127.8.9.1:1", "127.8.9.1", True),
        ("localhost:1", "localhost", True),
        ("[::1]:50051", "::1", True),
        ("10.1.2.3:50051", "10.1.2.3", True),
        ("192.168.0.9:1", "192.168.0.9", True),
        ("trainer:50054", "trainer", True),  # a container
        ("dns:///policy:50052", "policy", True),
        ("env.mulligan.svc:50051", "env.mulligan.svc", True),
        ("unix:/tmp/socket", "", True),
        ("8.8.8.8:50051", "8.8.8.8", False),
        ("env.example.com:443", "env.example.com", False),
        ("[2001:4860:4860::8888]:443", "2001:4860:4860::8888", False),
    ],
)
def test_which_addresses_are_reached_without_a_proxy(address: str, host: str, direct: bool) -> None:
    assert host_of(address) == host and is_direct(host) is direct


@pytest.mark.parametrize("variable", ["http_proxy", "HTTPS_PROXY", "grpc_proxy", "all_proxy"])
def test_a_hint_names_the_variable_and_not_its_value(variable: str) -> None:
    environment = {"PATH": "x", variable: "http://user:secret@proxy:3128"}
    said = hint("env.example.com:443", environment)
    assert variable in said and "no_proxy" in said and "secret" not in said
    assert hint("127.0.0.1:1", environment) == hint("env.example.com:443", {"PATH": "x", variable: ""}) == ""
