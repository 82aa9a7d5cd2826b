"""PEM files, and what a change of them does; the name that a certificate is compared with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mulligan.common.access import AccessRole, role_of_names
from mulligan.common.addresses import Addresses
from mulligan.common.channel import Endpoint, for_servers
from mulligan.common.tls import BadTls, ClientTls, PemFiles, read_client_tls
from mulligan.trainer.config import TrainerSettings
from tests.support.certificate import Authority


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"), "ours")


def test_a_pair_is_used_when_both_parts_have_come(authority: Authority, tmp_path: Path) -> None:
    pairs = [authority.issue(name) for name in ("one", "two")]
    key, cert = tmp_path / "key", tmp_path / "cert"
    shutil.copyfile(pairs[0][0], key)
    shutil.copyfile(pairs[0][1], cert)
    files = PemFiles(authority.ca, cert, key)
    first = files.content
    assert files.content is first and first.ca == authority.ca.read_bytes()
    shutil.copyfile(pairs[1][1], cert)
    assert files.content is first, "its key is missing"
    shutil.copyfile(pairs[1][0], key)
    assert (files.content.cert, files.content.key) == (pairs[1][1].read_bytes(), pairs[1][0].read_bytes())
    second = files.content
    key.unlink()
    cert.write_text("nothing")
    assert files.content is second


@pytest.mark.parametrize("broken", ["ca", "cert", "key"])
def test_files_that_are_wrong_at_first_are_named(authority: Authority, tmp_path: Path, broken: str) -> None:
    key, cert = authority.issue("whole")
    paths = {"ca": authority.ca, "cert": cert, "key": key}
    for planted in (tmp_path / "gone.pem", tmp_path / "nothing.pem"):
        if planted.stem == "nothing":
            planted.write_text("nothing")
        with pytest.raises(BadTls, match=planted.name):
            PemFiles(**paths | {broken: planted})


def test_what_identifies_a_client_is_two_files(authority: Authority) -> None:
    key, cert = authority.issue("client")
    assert read_client_tls(None, "", None, None) is None
    assert read_client_tls(None, "env", None, None) == ClientTls(name="env")
    assert read_client_tls(authority.ca, "", cert, key) == ClientTls(authority.ca, "", cert, key)
    with pytest.raises(ValueError, match="cert and key belong together"):
        read_client_tls(authority.ca, "", cert, None)


def test_servers_of_a_dns_name_have_certificates_for_it() -> None:
    endpoint = Endpoint("", tls=ClientTls())
    named = for_servers(endpoint, Addresses.parse("dns:///env.example.org:50051"))
    assert named.tls == ClientTls(name="env.example.org")
    own = Endpoint("", tls=ClientTls(name="own"))
    assert for_servers(own, Addresses.parse("dns:///a:1,dns:///b:1")) is own
    assert for_servers(endpoint, Addresses.parse("a:1,b:1")) is endpoint, "each has its own host's"
    with pytest.raises(ValueError, match="set the TLS name"):
        for_servers(endpoint, Addresses.parse("dns:///a:1,dns:///b:1"))


def test_names_of_a_certificate_give_a_role() -> None:
    assert role_of_names(["env", "10.0.0.1", "urn:mulligan:role:actor"]) is AccessRole.ACTOR
    assert role_of_names(["urn:mulligan:role:reader", "urn:mulligan:role:trainer"]) is AccessRole.TRAINER
    assert role_of_names(["actor", "urn:mulligan:role:", "urn:mulligan:role:actors"]) is None


def test_bad_settings_of_a_client_are_named(authority: Authority, capsys: pytest.CaptureFixture[str]) -> None:
    _, cert = authority.issue("trainer")
    for flags, said in (
        (["--env-tls-cert", str(cert)], "env_tls_…: cert and key belong together"),
        (["--policy-tls-ca", "/no/such.pem"], "policy_tls_…: /no/such.pem: No such file"),
        (["--tls-client-ca", str(authority.ca)], "tls_client_ca: needs tls_certificate and tls_key"),
    ):
        with pytest.raises(SystemExit):
            TrainerSettings.load(flags)
        assert said in capsys.readouterr().err
    settings = TrainerSettings.load(["--memory-tls-ca", str(authority.ca), "--memory-tls-name", "memory"])
    assert settings.endpoint("memory").tls == ClientTls(authority.ca, "memory")
    assert settings.endpoint("env").tls is None
