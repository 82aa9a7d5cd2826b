"""`mulligan certs`: what it makes, what it makes again, and the replacement of its authority."""

from __future__ import annotations

import shutil
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError
from typer.testing import CliRunner, Result

from mulligan.cli.app import app
from mulligan.common.access import AccessRole, role_of_names
from mulligan.common.certificates import BadCertificates, Certificates, RotationStep
from mulligan.common.config import SERVICES
from mulligan.common.file_lock import lock_file
from mulligan.common.run_credentials import RunGrant, RunKeys
from mulligan.common.tls import PemFiles

NOW = datetime(2026, 6, 1, tzinfo=UTC)
ALL = [f"services/{name}" for name in SERVICES] + [f"clients/{role}" for role in AccessRole]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def certificate(folder: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / "tls.crt").read_bytes())


def later(folder: Path, days: float, **settings: object) -> list[str]:
    return Certificates(folder, now=NOW + timedelta(days=days), **settings).update()  # type: ignore[arg-type]


def trusts(folder: Path, other: Path, name: str = "localhost", day: float = 1) -> bool:
    """Whether the holder of a folder trusts the server of another one, under this name, on this day."""
    store = Store(x509.load_pem_x509_certificates((folder / "ca.crt").read_bytes()))
    verifier = PolicyBuilder().store(store).time(NOW + timedelta(days=day)).build_server_verifier(x509.DNSName(name))
    try:
        verifier.verify(certificate(other), [])
    except VerificationError:
        return False
    return True


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "certs"
    assert Certificates(folder, {"env": ["env.example.org", "10.0.0.7"]}, now=NOW).update() == ALL
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of another authority."""
    folder = tmp_path_factory.mktemp("other") / "certs"
    Certificates(folder, now=NOW).update()
    return folder


@pytest.fixture
def made(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "certs")


def test_services_have_names_and_callers_have_roles(made: Path) -> None:
    for name in SERVICES:
        folder = made / "services" / name
        PemFiles(folder / "ca.crt", folder / "tls.crt", folder / "tls.key")  # as services read them
        for known in (name, f"mulligan-{name}", "localhost"):
            assert trusts(made / "clients/actor", folder, known), known
        assert not trusts(made / "clients/actor", folder, "elsewhere")
    assert trusts(made / "services/trainer", made / "services/env", "env.example.org")
    for role in AccessRole:
        names = certificate(made / "clients" / role).extensions.get_extension_for_class(x509.SubjectAlternativeName)
        assert role_of_names([str(each.value) for each in names.value]) is role
        assert not trusts(made / "services/env", made / "clients" / role, "localhost"), "it is no server"


@pytest.mark.parametrize("group", [False, True])
def test_its_user_alone_reads_the_files_or_its_group_too(tmp_path: Path, group: bool) -> None:
    Certificates(tmp_path, group=group, now=NOW).update()
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.name != ".lock"}
    assert {mode for path, mode in modes.items() if path.suffix in (".key", ".crt")} == {0o640 if group else 0o600}
    assert modes[tmp_path / "authority"] == 0o700 and modes[tmp_path / "authority/current.pem"] == 0o600


def test_what_is_good_stays(made: Path) -> None:
    before = contents(made)
    assert later(made, 0) == later(made, 200) == []
    assert contents(made) == before
    assert later(made, 0, names={"policy": ["policy.example.org"]}) == ["services/policy"]
    assert {name for name, content in contents(made).items() if before[name] != content} == {
        "services/policy/tls.crt",
        "services/policy/tls.key",
    }


def test_what_ends_soon_is_made_again_by_the_same_authority_and_keeps_its_names(made: Path) -> None:
    before = contents(made)
    old = shutil.copytree(made / "services/memory", made.parent / "old")
    assert later(made, 300) == ALL
    assert contents(made)["authority/current.pem"] == before["authority/current.pem"]
    assert trusts(old, made / "services/env", "env.example.org", 301)
    assert trusts(made / "services/env", old, "memory", 301)
    assert certificate(made / "services/env").not_valid_after_utc == NOW + timedelta(days=665)


@pytest.mark.parametrize("damage", ["gone", "damaged", "foreign"])
@pytest.mark.parametrize("name", ["tls.crt", "tls.key", "ca.crt"])
def test_what_is_missing_or_wrong_is_made_again(made: Path, other: Path, damage: str, name: str) -> None:
    """So is the half of a pair that a process left behind when it was killed."""
    before, path = contents(made), made / "services/policy" / name
    match damage:
        case "gone":
            path.unlink()
        case "damaged":
            path.write_bytes(path.read_bytes()[:100])
        case _:
            shutil.copyfile(other / "services/policy" / name, path)
    assert later(made, 0) == ([] if name == "ca.crt" else ["services/policy"])
    changed = {name for name, content in contents(made).items() if before[name] != content}
    pair = {"services/policy/tls.crt", "services/policy/tls.key"}
    assert changed == (set() if name == "ca.crt" else pair)
    assert trusts(made / "services/policy", made / "services/policy", "policy")


def test_the_trainer_signs_credentials_of_runs_and_the_memory_verifies_them(made: Path, other: Path) -> None:
    private, public = (made / "services" / name / "run-keys.pem" for name in ("trainer", "memory"))
    credential = RunKeys(private).sign(RunGrant("run"), 60)
    assert RunKeys(public).verify(credential).run_id == "run" and not RunKeys(public).can_sign
    assert not (made / "services/env/run-keys.pem").exists() and not (made / "services/policy/run-keys.pem").exists()
    # Replacing a key: the new private one comes first, and both public ones verify for a while.
    private.write_bytes((other / "services/trainer/run-keys.pem").read_bytes() + private.read_bytes())
    later(made, 0)
    assert all(
        RunKeys(public).verify(one).run_id == "run" for one in (credential, RunKeys(private).sign(RunGrant("run"), 60))
    )
    before = contents(made)
    later(made, 0)
    assert contents(made) == before
    private.write_bytes(b"nothing")
    with pytest.raises(BadCertificates, match=r"trainer/run-keys\.pem: expected a private key first"):
        later(made, 0)


def test_an_authority_is_never_made_in_place_of_another(made: Path) -> None:
    authority = made / "authority/current.pem"
    whole = authority.read_bytes()
    before = contents(made)
    authority.write_bytes(whole[:200])
    with pytest.raises(BadCertificates, match=r"current\.pem: expected the key and the certificate of an authority"):
        later(made, 0)
    authority.unlink()
    with pytest.raises(BadCertificates, match=r"current\.pem: missing, but services/env has a certificate"):
        later(made, 0)
    authority.write_bytes(whole)
    assert contents(made) == before
    with pytest.raises(BadCertificates, match=r"the authority ended on 2036-05-29: replace it, with --rotate"):
        later(made, 4000)


def test_certificates_end_with_their_authority_at_the_latest(made: Path) -> None:
    assert later(made, 3600) == ALL
    ends = Certificates(made).ends()
    assert set(ends.values()) == {ends["authority"]} and set(ends) == {*ALL, "authority"}


def test_the_authority_is_replaced_in_three_steps(made: Path) -> None:
    """After each, callers with the files from before it and those with new ones still trust one another."""
    generations = [made]
    for step in RotationStep:
        before = shutil.copytree(made, made.parent / f"before-{step}")
        assert Certificates(made, now=NOW).update(step) == (ALL if step is RotationStep.ISSUE else [])
        after = contents(made)
        assert Certificates(made, now=NOW).update(step) == later(made, 0) == [] and contents(made) == after
        for one, other in ((before, made), (made, before), (made, made)):
            assert trusts(one / "services/trainer", other / "services/env", "env"), (step, one, other)
        generations.append(before)
    first = generations[1]
    assert not trusts(made / "services/trainer", first / "services/env", "env")
    assert not trusts(first / "services/trainer", made / "services/env", "env")
    assert sorted(path.name for path in (made / "authority").glob("*.pem")) == ["current.pem"]


def test_a_step_that_comes_too_early_changes_nothing(made: Path) -> None:
    def refused(step: RotationStep, said: str) -> None:
        before = contents(made)
        with pytest.raises(BadCertificates, match=said):
            Certificates(made, now=NOW).update(step)
        assert contents(made) == before

    refused(RotationStep.ISSUE, "--rotate trust comes first")
    Certificates(made, now=NOW).update(RotationStep.TRUST)
    refused(RotationStep.RETIRE, "--rotate issue comes first")
    Certificates(made, now=NOW).update(RotationStep.ISSUE)
    refused(RotationStep.TRUST, "--rotate retire comes first")


def test_a_step_that_was_broken_off_is_completed(made: Path) -> None:
    """Killed between the two renames of `issue`, and before the first certificate was made."""
    Certificates(made, now=NOW).update(RotationStep.TRUST)
    authority = made / "authority"
    (authority / "previous.pem").write_bytes(certificate_of(authority / "current.pem"))
    assert later(made, 0) == []
    assert Certificates(made, now=NOW).update(RotationStep.ISSUE) == ALL
    (made / "services/env/tls.crt").unlink()
    with pytest.raises(BadCertificates, match="services/env has none of the new authority"):
        Certificates(made, now=NOW).update(RotationStep.RETIRE)
    assert Certificates(made, now=NOW).update(RotationStep.ISSUE) == ["services/env"]


def certificate_of(path: Path) -> bytes:
    content = path.read_bytes()
    return content[content.index(b"-----BEGIN CERTIFICATE") :]


def test_an_authority_that_ended_can_still_be_replaced(made: Path) -> None:
    ended = Certificates(made, now=NOW + timedelta(days=4000))
    assert ended.update(RotationStep.TRUST) == []
    assert ended.update(RotationStep.ISSUE) == ALL
    assert ended.update(RotationStep.RETIRE) == []


def test_one_process_makes_them_at_a_time(made: Path) -> None:
    with lock_file(made / "authority" / ".lock"), pytest.raises(BadCertificates, match="another process"):
        later(made, 0)


def certs(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["certs", *map(str, arguments)], env={"COLUMNS": "200"})


def test_the_command_says_what_it_made(tmp_path: Path) -> None:
    first = certs(tmp_path / "new", "--name", "env=env.example.org", "--days", 30)
    assert first.exit_code == 0 and first.stdout.count("made ") == len(ALL), first.output
    env = tmp_path / "new/services/env"
    lasts = certificate(env).not_valid_after_utc - datetime.now(UTC)
    assert timedelta(days=29) < lasts <= timedelta(days=30)
    assert trusts(tmp_path / "new/clients/actor", env, "env.example.org", (datetime.now(UTC) - NOW).days + 1)
    again = certs(tmp_path / "new")
    assert "nothing to make" in again.stdout and "made " not in again.stdout
    step = certs(tmp_path / "new", "--rotate", "trust")
    assert step.exit_code == 0 and "then --rotate issue" in step.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--name", "evn=x"], "expected SERVICE=NAME"),
        (["--name", "env=not a name"], "'not a name' is no host name and no IP address"),
        (["--rotate", "isue"], "invalid RotationStep value: 'isue'"),
        (["--days", "0"], "expected 1 to 3,650 days, not '0'"),
        (["--nme", "env=x"], "unrecognized arguments: --nme"),
    ],
)
def test_a_bad_option_is_refused_before_anything_is_made(tmp_path: Path, arguments: list[str], said: str) -> None:
    result = certs(tmp_path / "new", *arguments)
    assert result.exit_code == 2 and said in result.stderr and not (tmp_path / "new").exists()


def test_other_servers_have_certificates_of_their_own_and_are_remembered(tmp_path: Path) -> None:
    folder = tmp_path / "certs"
    later(folder, 0)
    assert later(folder, 1, others=["jaeger"]) == ["others/jaeger"]
    assert trusts(folder / "services" / "env", folder / "others" / "jaeger", "jaeger")
    assert not trusts(folder / "services" / "env", folder / "others" / "jaeger", "env")
    assert later(folder, 2) == []
    assert "others/jaeger" in later(folder, 300), "it is renewed without being named again"


@pytest.mark.parametrize("name", ["../env", "a b", ".hidden", "urn:x", ""])
def test_a_bad_name_of_another_server_is_refused(tmp_path: Path, name: str) -> None:
    result = CliRunner().invoke(app, ["certs", str(tmp_path / "certs"), "--other", name])
    assert result.exit_code == 2 and "no host name and no IP address" in " ".join(result.output.split())
    assert not (tmp_path / "certs").exists()
