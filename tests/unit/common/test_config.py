"""Settings: which source wins, and that every bad one stops the start with its name and status 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mulligan.common.access import AccessRole
from mulligan.common.config import ServiceSettings
from mulligan.common.secret_flags import has_setting, secret_fields
from mulligan.env.base import Split, UnknownTask
from mulligan.env.config import EnvSettings
from mulligan.memory.config import MemorySettings
from mulligan.memory.store import StoreError
from mulligan.policy.backends.openai import Settings as OpenAISettings
from mulligan.policy.backends.vllm import Settings as VllmSettings
from mulligan.policy.config import PolicySettings
from mulligan.trainer.config import TrainerSettings
from tests.support.paths import IMPORT_ROOTS
from tests.support.run_keys import write_keys
from tests.support.tokens import token_of, write_tokens


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "env.toml"
    path.write_text(
        """
        max_episodes = 1
        lease_seconds = 1.5
        drain_seconds = 1
        [environments.lake]
        kind = "frozenlake"
        size_max = 4
        """
    )
    return path


def test_flags_win_over_variables_over_toml_over_defaults(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MULLIGAN_ENV_MAX_EPISODES", "2")
    monkeypatch.setenv("MULLIGAN_ENV_LEASE_SECONDS", "2.5")
    settings = EnvSettings.load(["--config", str(toml), "--max-episodes", "3"])
    assert (settings.max_episodes, settings.lease_seconds, settings.drain_seconds) == (3, 2.5, 1.0)
    assert settings.step_timeout_seconds == 60.0
    assert settings.environments == {"lake": {"kind": "frozenlake", "size_max": 4}}
    assert settings.create_environments()["lake"].info.name == "lake"


def test_each_service_reads_its_own_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MULLIGAN_ENV_PORT", "1111")
    assert EnvSettings.load([]).port == 1111
    assert MemorySettings.load([]).port == 0


def test_the_defaults_serve_the_published_tasks_and_an_example_of_each_adapter() -> None:
    environments = EnvSettings.load([]).create_environments()
    adapted = ["gymnasium-frozenlake", "reasoning-gym"]
    own = ["questions", "unanswerable", "short-sentences"]
    games = ["frozenlake", "frozenlake-3x3", "frozenlake-symbols", "sokoban", "sokoban-small"]
    assert list(environments) == [*games, "hotpotqa", *adapted, *own]
    assert all(environment.info.name == name for name, environment in environments.items())
    assert not any(environment.info.unavailable for environment in environments.values())


def test_an_environment_whose_packages_are_missing_is_listed_with_the_extra_that_installs_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "tantivy", None)
    environments = EnvSettings.load([]).create_environments()
    missing = environments["hotpotqa"]
    assert "pip install -e '.[hotpotqa]'" in missing.info.unavailable
    assert not environments["sokoban"].info.unavailable
    assert not missing.list_tasks(Split.TRAIN, 0, 10)
    with pytest.raises(UnknownTask):
        missing.start("train/00000")


def test_tokens_are_in_files_alone(tmp_path: Path) -> None:
    folder = write_tokens(tmp_path)
    settings = TrainerSettings.load(
        ["--tokens-folder", str(folder), "--policy-token-file", str(folder / AccessRole.TRAINER)]
    )
    assert settings.tokens is not None and settings.tokens is settings.tokens
    assert settings.endpoint("policy").token_file == folder / AccessRole.TRAINER
    assert settings.endpoint("env").token_file is None
    assert token_of(AccessRole.TRAINER) not in repr(settings)
    assert EnvSettings.load([]).tokens is None
    for flag in ("--token", "--client-token", "--env-token"):
        with pytest.raises(SystemExit):
            TrainerSettings.load([flag, "a-token-that-all-could-see"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokens-folder", "/no/such"], "tokens_folder: /no/such: cannot be read: No such file"),
        (["--memory-token-file", "/no/such"], "/no/such: no such file"),
    ],
)
def test_bad_tokens_are_named(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        TrainerSettings.load(flags)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("settings", [EnvSettings, PolicySettings, MemorySettings, TrainerSettings])
def test_a_service_that_others_reach_asks_for_credentials(
    settings: type[ServiceSettings], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_tokens(tmp_path)
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        with pytest.raises(SystemExit):
            settings.load(["--host", host])
        assert f"host {host}: others could reach it, and make every call" in capsys.readouterr().err
        with_tokens = ["--host", host, "--tokens-folder", str(folder)]
        with pytest.raises(SystemExit):
            settings.load(with_tokens)
        said = capsys.readouterr().err
        assert f"host {host}: others could read the tokens of calls on their way" in said
        assert "set tls_certificate and tls_key, or allow it with --insecure" in said
        for protected in (["--tls-certificate", "tls.crt", "--tls-key", "tls.key"], ["--insecure"]):
            assert settings.load([*with_tokens, *protected]).tokens is not None
        assert settings.load(["--host", host, "--insecure"]).tokens is None
    for host in ("localhost", "127.0.0.1", "127.0.0.2", "::1", "[::1]"):
        assert settings.load(["--host", host]).tokens is None


@pytest.mark.parametrize("settings", [MemorySettings, TrainerSettings])
def test_a_service_that_others_reach_warns_where_no_run_has_a_credential(
    settings: type[ServiceSettings], tmp_path: Path
) -> None:
    beyond = ["--host", "0.0.0.0", "--tls-certificate", "tls.crt", "--tls-key", "tls.key"]
    beyond += ["--tokens-folder", str(write_tokens(tmp_path))]
    (warning,) = settings.load(beyond).warnings
    assert warning.startswith("run_keys is not set: ")
    assert settings.load([*beyond, "--run-keys", str(write_keys(tmp_path)[0])]).warnings == []
    assert settings.load([]).warnings == [], "this machine alone reaches it"
    assert EnvSettings.load(beyond).warnings == [], "runs have nothing of their own there"


def test_what_settings_warn_of_is_in_the_log_at_the_start() -> None:
    program = (
        "import asyncio\n"
        "from mulligan.common.server import run\n"
        "from mulligan.memory.config import MemorySettings\n"
        "run(MemorySettings(host='0.0.0.0', insecure=True), lambda: asyncio.sleep(0))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": IMPORT_ROOTS},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "run_keys is not set: " in ended.stdout + ended.stderr


def test_a_trainer_sends_tokens_to_other_machines_over_tls_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token = ["--memory-token-file", str(write_tokens(tmp_path) / AccessRole.TRAINER)]
    for address in ("memory:50053", "10.0.0.7:50053"):
        flags = ["--memory-address", address, *token]
        with pytest.raises(SystemExit):
            TrainerSettings.load(flags)
        assert f"the token for {address} would cross the network without TLS" in capsys.readouterr().err
        assert TrainerSettings.load([*flags, "--memory-tls-name", "memory"]).endpoint("memory").tls is not None
        assert TrainerSettings.load([*flags, "--insecure"]).endpoint("memory").insecure
        assert TrainerSettings.load(["--memory-address", address]).endpoint("memory").token_file is None
    for address in ("localhost:50053", "127.0.0.1:50053", "[::1]:50053"):
        assert TrainerSettings.load(["--memory-address", address, *token]).endpoint("memory").tls is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "70000"], "port: Input should be less than or equal to 65535"),
        (["--port", "x"], "port: Input should be a valid integer"),
        (["--max-episodes", "0"], "max_episodes: Input should be greater than or equal to 1"),
        (["--lease-seconds", "-1"], "lease_seconds: Input should be greater than 0"),
        (["--log-level", "loud"], "log_level: Input should be 'debug', 'info'"),
        (["--tls-key", "key.pem"], "tls_certificate and tls_key belong together"),
        (["--environments", "{}"], "environments: Dictionary should have at least 1 item"),
        (["--config", "/no/such.toml"], "--config /no/such.toml: no such file"),
        (["--config"], "--config: needs a file"),
    ],
)
def test_a_bad_flag_is_named(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused(flags, message, capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_epsiodes = 3", "max_epsiodes: no such setting; did you mean 'max_episodes'?"),
        ("max_episodes = 'many'", "max_episodes: Input should be a valid integer"),
        ("max_episodes = ", "bad.toml: Invalid value"),
        ("[environments]\nlake = 3", "environments.lake: Input should be a valid dictionary"),
    ],
)
def test_a_bad_line_of_toml_is_named(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    refused([f"--config={path}"], message, capsys)


def test_a_file_is_utf_8_whatever_the_locale_says(tmp_path: Path) -> None:
    path = tmp_path / "env.toml"
    path.write_text("[environments.'Übung']\nkind = 'frozenlake'", encoding="utf-8")
    program = "import sys; from mulligan.env.config import EnvSettings; print(ascii(EnvSettings.load(sys.argv[1:])))"
    ascii_locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONPATH": IMPORT_ROOTS}
    done = subprocess.run(
        [sys.executable, "-c", program, "--config", str(path)],
        env={**os.environ, **ascii_locale},
        capture_output=True,
        text=True,
        check=False,
    )
    assert r"{'\xdcbung': {'kind': 'frozenlake'}}" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("MULLIGAN_ENV_MAX_EPSIODES", "MULLIGAN_ENV_MAX_EPSIODES: no such setting"),
        ("MULLIGAN_ENV_MAX_EPISODES", "max_episodes: Input should be a valid integer"),
        ("MULLIGAN_ENV_ENVIRONMENTS", "environments"),
    ],
)
def test_a_bad_variable_is_named(
    variable: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, "many")
    refused([], message, capsys)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (
            {"kind": "frozenlake", "size_mni": 3},
            r"environments\.x: size_mni: no such setting; did you mean 'size_min'\?",
        ),
        ({"kind": "frozenlake", "size_min": "three"}, r"environments\.x: size_min: Input should be a valid integer"),
        ({"kind": "frozenlake", "max_steps": 0}, r"environments\.x: .*max_steps must be at least 1"),
        (
            {"kind": "no_such_game"},
            r"environments\.x\.kind: there is no environment 'no_such_game'; there are constrained_writing, frozenlake",
        ),
        ({"kind": "json.decoder"}, r"environments\.x\.kind: 'json\.decoder' is no environment"),
        ({"size_min": 3}, r"environments\.x\.kind: names the environment: constrained_writing, frozenlake"),
        ({"kind": "frozenlake", "feedback": "loud"}, r"environments\.x\.feedback: expected full, unary, silent, not"),
        ({"kind": "sokoban", "boxes": 9}, r"environments\.x: .*boxes must be between 1 and 4, not 9"),
        (
            {"kind": "hotpotqa", "test_file": "/no/such.json"},
            r"environments\.x: test_file: no such file: /no/such.json",
        ),
    ],
)
def test_a_bad_setting_of_an_environment_is_named(table: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EnvSettings(environments={"x": table}).create_environments()


def test_an_environment_may_live_anywhere() -> None:
    settings = EnvSettings(environments={"x": {"kind": "tests.support.environments", "hang_seconds": 1}})
    assert settings.create_environments()["x"].info.name == "x"


async def test_a_plugin_whose_packages_are_missing_is_named_with_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lacking = "from mulligan.env import MissingExtra\nraise MissingExtra('parquet', ImportError('no pyarrow'))"
    (tmp_path / "lacking.py").write_text(lacking)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(StoreError, match=r"^database: the store lacking needs the extra 'parquet'"):
        await MemorySettings.load(["--database", "lacking:here"]).open_store()
    with pytest.raises(SystemExit):
        PolicySettings.load(["--backend", "lacking"])
    assert "backend: the backend lacking needs the extra 'parquet'" in capsys.readouterr().err


def test_an_unknown_flag_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        EnvSettings.load(["--max-epsiodes", "3"])
    assert ended.value.code == 2
    assert "--max-epsiodes" in capsys.readouterr().err


def refused(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        EnvSettings.load(flags)
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("env: bad settings\n")
    assert message in shown


def test_a_gpu_computes_more_tokens_at_once_unless_set() -> None:
    given = {
        (): 768,
        ("--device", "cuda:1"): 4096,
        ("--microbatch-tokens", "50"): 50,
        ("--microbatch-tokens", "50", "--device", "cuda"): 50,
    }
    assert {one: TrainerSettings.load(list(one)).learner.microbatch_tokens for one in given} == given


def test_a_process_under_torchrun_has_no_numbered_gpu_if_others_run_beside_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert TrainerSettings.load(["--device", "cuda:1"]).device == "cuda:1"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        TrainerSettings.load(["--device", "cuda:1"])
    assert "device: expected cuda without a number" in capsys.readouterr().err


def test_several_learner_processes_have_no_numbered_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert TrainerSettings.load(["--learner-processes", "2", "--device", "cuda"]).learner_processes == 2
    with pytest.raises(SystemExit):
        TrainerSettings.load(["--learner-processes", "2", "--device", "cuda:1"])
    assert "device: expected cuda without a number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--openai.api-key", "sk-SECRET"], "openai.api_key"),
        (["--openai", '{"api_key": "sk-SECRET"}'], "openai.api_key"),
        (["--sglang.api-key=sk-SECRET"], "sglang.api_key"),
        (["--vllm.api-key", "sk-SECRET"], "vllm.api_key"),
        (["--policies", '{"judge": {"openai": {"api_key": "sk-SECRET"}}}'], "policies.judge.openai.api_key"),
        (["--policies", 'judge={"sglang": {"admin_api_key": "sk-SECRET"}}'], "policies.judge.sglang.admin_api_key"),
    ],
)
def test_a_secret_is_no_flag(flags: list[str], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Other users see flags in the list of processes."""
    with pytest.raises(SystemExit) as caught:
        PolicySettings.load(flags)
    said = capsys.readouterr().err
    assert caught.value.code == 2 and "SECRET" not in said
    variable = f"MULLIGAN_POLICY_{name.upper().replace('.', '__')}"
    assert f"{name}: is a secret, and other users see flags: expected the variable {variable}" in said
    assert f", or {name} in the file of --config, or {name}_file" in said


@pytest.mark.parametrize(
    "flags",
    [
        ["--vllm.environment", '{"VLLM_API_KEY": "SECRET"}'],
        ["--vllm.environment", "VLLM_API_KEY=SECRET"],
        ["--policies", '{"judge": {"vllm": {"environment": {"VLLM_API_KEY": "SECRET"}}}}'],
    ],
)
def test_a_variable_of_an_engine_that_has_a_secret_is_no_flag(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """No variable of ours can say it: their names lose the difference of small and large letters."""
    with pytest.raises(SystemExit):
        PolicySettings.load(flags)
    said = capsys.readouterr().err
    assert "vllm.environment.VLLM_API_KEY: is a secret, and other users see flags: expected " in said
    assert "vllm.environment.VLLM_API_KEY in the file of --config" in said
    assert "SECRET" not in said and "variable" not in said


def test_other_variables_of_an_engine_may_be_flags() -> None:
    variables = '{"OMP_NUM_THREADS": "1", "HF_TOKEN_PATH": "/f"}'
    settings = PolicySettings.load(["--backend", "vllm", "--model", "x", "--vllm.environment", variables])
    assert settings.own_as(VllmSettings).environment["HF_TOKEN_PATH"] == "/f"


def test_the_name_of_a_policy_is_no_variable() -> None:
    policies = '{"TOKEN": {"model": "embedded"}, "MONKEY": {"model": "embedded"}}'
    assert set(PolicySettings.load(["--policies", policies]).policies) == {"TOKEN", "MONKEY"}


def test_each_secret_can_be_in_a_file_and_no_help_has_it_as_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    for settings in (EnvSettings, PolicySettings, MemorySettings, TrainerSettings):
        secrets = secret_fields(settings)
        assert all(has_setting(settings, f"{name}_file") for name in secrets), secrets
        with pytest.raises(SystemExit):
            settings.load(["--help"])
        help_ = capsys.readouterr().out.split()
        assert not {f"--{name.replace('_', '-')}" for name in secrets} & set(help_)
    assert {"openai.api_key", "sglang.api_key", "sglang.admin_api_key", "vllm.api_key"} <= secret_fields(PolicySettings)


def test_secrets_come_from_files_and_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("of-the-file\n")
    address = ["--backend", "openai", "--openai.base-url", "https://example.com/v1"]
    given = PolicySettings.load([*address, "--openai.api-key-file", str(tmp_path / "key")])
    found = given.own_as(OpenAISettings).key
    assert found is not None and found.get_secret_value() == "of-the-file"
    monkeypatch.setenv("MULLIGAN_POLICY_OPENAI__API_KEY", "of-the-variable")
    found = PolicySettings.load(address).own_as(OpenAISettings).key
    assert found is not None and found.get_secret_value() == "of-the-variable"


@pytest.mark.parametrize("location", ["postgresql://u:SECRET@h/db", "postgresql://u@h/db?user=u&password=SECRET"])
def test_a_flag_has_no_password(
    location: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        MemorySettings.load(["--database", f"postgres:{location}"])
    said = capsys.readouterr().err
    assert "database: has a password, and other users see flags: expected the variable MULLIGAN_MEMORY_DATABASE" in said
    assert "SECRET" not in said
    monkeypatch.setenv("MULLIGAN_MEMORY_DATABASE", f"postgres:{location}")
    assert location in MemorySettings.load([]).database


@pytest.mark.parametrize(
    ("headers", "endpoint", "more", "refused"),
    [
        ("OTEL_EXPORTER_OTLP_HEADERS", "http://192.0.2.2:4317", {}, True),
        ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "HTTP://collector:4317", {}, True),
        ("OTEL_EXPORTER_OTLP_HEADERS", "collector:4317", {"OTEL_EXPORTER_OTLP_INSECURE": "true"}, True),
        ("OTEL_EXPORTER_OTLP_HEADERS", "collector:4317", {}, False),  # OpenTelemetry takes TLS
        ("OTEL_EXPORTER_OTLP_HEADERS", "https://192.0.2.2:4317", {"OTEL_EXPORTER_OTLP_INSECURE": "true"}, False),
        ("OTEL_EXPORTER_OTLP_HEADERS", "http://127.0.0.1:4317", {}, False),
        ("OTHER_HEADERS", "http://192.0.2.2:4317", {}, False),
    ],
)
def test_headers_for_a_collector_of_traces_go_over_tls(
    headers: str,
    endpoint: str,
    more: dict[str, str],
    refused: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in {
        headers: "authorization=Bearer SECRET",
        "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
        **more,
    }.items():
        monkeypatch.setenv(name, value)
    assert MemorySettings.load(["--insecure"]).traces_to == endpoint
    if not refused:
        assert MemorySettings.load([]).traces_to == endpoint
        return
    with pytest.raises(SystemExit):
        MemorySettings.load([])
    said = capsys.readouterr().err
    assert f"{headers}: the headers, which may have a key, would go to " in said and "SECRET" not in said


def test_the_address_of_a_collector_holds_no_credentials(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "https://me:SECRET@192.0.2.2:4317")
    with pytest.raises(SystemExit):
        MemorySettings.load([])
    said = capsys.readouterr().err
    assert "the collector of traces: 192.0.2.2:4317: expected an address without a user or a password" in said
    assert "SECRET" not in said


@pytest.mark.parametrize("setting", ["env_address", "policy_address", "memory_address", "learner_address"])
def test_no_address_of_a_service_holds_credentials(
    setting: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(f"MULLIGAN_TRAINER_{setting.upper()}", "me:SECRET@192.0.2.2:50051")
    with pytest.raises(SystemExit):
        TrainerSettings.load([])
    said = capsys.readouterr().err
    assert setting in said and "an address holds no user and no password" in said and "SECRET" not in said
