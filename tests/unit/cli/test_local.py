"""What `mulligan up` and `mulligan demo` start services with."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mulligan.cli import local
from mulligan.cli.connection import addresses_from
from mulligan.cli.local import LocalServices
from mulligan.cli.out import Heartbeat
from mulligan.cli.up import _addresses, _configs
from mulligan.common.config import SERVICES
from mulligan.env.config import EnvSettings
from mulligan.memory.config import MemorySettings
from mulligan.policy.config import PolicySettings
from mulligan.trainer.config import TrainerSettings
from tests.support.waiting import until

CONFIG = """
model = "from/the-file"

[policies.wise]
backend = "openai"
model = "large"
openai = {base_url = "http://127.0.0.1:8000/v1"}
"""


def local_services(folder: Path, **options: Any) -> LocalServices:
    """With the tokens, which are made when they start."""
    services = LocalServices(folder, **options)
    services.tokens.make()
    return services


def policy_settings(folder: Path, **options: Any) -> PolicySettings:
    """As the policy service reads them."""
    command = local_services(folder, **options)._processes["policy"].command
    return PolicySettings.load(command[command.index("mulligan.policy") + 1 :])


def test_everything_that_survives_lies_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = policy_settings(Path("here"))
    assert settings.state_folder == tmp_path / "here" / "policy"
    assert settings.weights_folder == tmp_path / "here" / "weights"
    assert (settings.model, settings.models_folder, settings.policies) == ("embedded", tmp_path, {})
    assert policy_settings(Path("here"), models_folder=Path("models")).models_folder == tmp_path / "models"


def test_a_file_names_further_policies_and_a_flag_wins_over_it(tmp_path: Path) -> None:
    config = tmp_path / "policy.toml"
    config.write_text(CONFIG)
    settings = policy_settings(tmp_path, configs={"policy": config})
    assert settings.model == "from/the-file"
    assert settings.policies["wise"].backend == "openai"
    assert policy_settings(tmp_path, configs={"policy": config}, model="mine").model == "mine"


ALL = """
[env.environments.mine]
kind = "my_game"

[policy]
model = "from/the-file"

[trainer]
keep_weights = 7
"""


def test_one_file_holds_the_settings_of_all(tmp_path: Path) -> None:
    config = tmp_path / "mulligan.toml"
    config.write_text(ALL)
    processes = local_services(tmp_path, configs=_configs(config, None, None))._processes
    arguments = {name: process.command[3:] for name, process in processes.items()}
    assert EnvSettings.load(arguments["env"]).environments == {"mine": {"kind": "my_game"}}
    assert PolicySettings.load(arguments["policy"]).model == "from/the-file"
    assert MemorySettings.load(arguments["memory"]).database == str(tmp_path / "memory.sqlite")
    trainer = TrainerSettings.load(arguments["trainer"])
    assert trainer.keep_weights == 7
    assert trainer.endpoint("env").token_file == tmp_path / "env-tokens" / "actor"
    folders = {name: arguments[name][arguments[name].index("--tokens-folder") + 1] for name in SERVICES}
    assert folders == dict.fromkeys(SERVICES, f"{tmp_path}/tokens") | {"env": f"{tmp_path}/env-tokens"}


def test_several_env_processes_take_the_ports_behind_the_other_services(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "mulligan.toml"
    config.write_text("[env]\nprocesses = 3")
    addresses = _addresses(7000, config)
    assert addresses == addresses_from(7000) | {"env": "127.0.0.1:7004-7006"}
    processes = local_services(tmp_path, configs={"env": config}, addresses=addresses)._processes
    arguments = {name: process.command[3:] for name, process in processes.items()}
    env = EnvSettings.load(arguments["env"])
    assert (env.port, env.processes) == (7004, 3)
    assert TrainerSettings.load(arguments["trainer"]).env_address == "127.0.0.1:7004-7006"
    assert processes["env"].servers == ("127.0.0.1:7004", "127.0.0.1:7005", "127.0.0.1:7006")
    monkeypatch.setenv("MULLIGAN_ENV_PROCESSES", "2")
    assert _addresses(7000, None)["env"] == "127.0.0.1:7004-7005"
    alone = local_services(tmp_path)._processes["env"].command[3:]
    assert EnvSettings.load(alone).processes == 1, "one port was given"


def test_a_file_of_one_service_goes_to_that_service_alone(tmp_path: Path) -> None:
    env = tmp_path / "env.toml"
    env.write_text("max_episodes = 3")
    assert _configs(None, env, None) == {"env": env}
    with pytest.raises(ValueError, match=r"--config .*env.toml: none of \[env\], \[policy\]"):
        _configs(env, None, None)


def test_two_files_with_settings_of_one_service_are_refused(tmp_path: Path) -> None:
    config = tmp_path / "mulligan.toml"
    config.write_text(ALL)
    env = tmp_path / "env.toml"
    env.write_text("max_episodes = 3")
    with pytest.raises(ValueError, match=r"has the table \[env\], too"):
        _configs(config, env, None)
    config.write_text("[policy]\nmodel = 'embedded'")
    assert _configs(config, env, None) == {name: env if name == "env" else config for name in SERVICES}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[env]\n[polcy]\nmodel = 'embedded'", "'polcy' stands beside a table of a service; did you mean 'policy'?"),
        ("port = 3\n[env]", "'port' stands beside a table of a service"),
        ("env = 3", "'env' must be a table of settings, \\[env\\]"),
    ],
)
def test_a_file_that_is_neither_is_refused(tmp_path: Path, text: str, said: str) -> None:
    config = tmp_path / "mulligan.toml"
    config.write_text(text)
    with pytest.raises(ValueError, match=said):
        _configs(config, None, None)


async def test_whom_the_start_waits_for_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = ""

    def shown() -> bool:
        nonlocal told
        told += capsys.readouterr().err
        return "starting trainer … " in told

    async def healthy(self: LocalServices, process: Any) -> None:
        if process.name == "trainer":
            await until(shown)

    monkeypatch.setattr(local, "Heartbeat", partial(Heartbeat, first=0.0, every=0.01))
    monkeypatch.setattr(LocalServices, "_wait_until_healthy", healthy)
    await LocalServices(tmp_path)._wait_for_all()


async def test_a_long_log_begins_anew_and_loses_nothing_that_comes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "LOG_BYTES", 1000)
    go_on = tmp_path / "go on"
    program = (
        "import os, sys, time; os.write(2, b'x' * 2000 + b'\\n')\n"
        "while not os.path.exists(sys.argv[1]): time.sleep(0.01)\n"
        "os.write(2, b'after\\n')"
    )
    log = tmp_path / "memory.log"
    process = local._Process("memory", "127.0.0.1:1", [sys.executable, "-c", program, str(go_on)], log)
    log.write_bytes(b"before\n")
    process.start()
    await until(lambda: log.stat().st_size > 2000)
    process.rotate_log()
    assert (log.stat().st_size, (tmp_path / "memory.log.1").read_bytes()) == (0, b"before\n" + b"x" * 2000 + b"\n")
    process.rotate_log()
    go_on.touch()
    assert process.process is not None and process.process.wait(60) == 0
    assert log.read_bytes() == b"after\n" and process.log_end() == "after"
    assert (tmp_path / "memory.log.1").stat().st_size > 2000, "a short log is left as it is"


async def test_what_is_written_is_private_whatever_the_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In folders that are new, and in logs that an earlier release made for everybody."""

    async def no_wait(_: LocalServices) -> None:
        return None

    monkeypatch.setattr(LocalServices, "_wait_for_all", no_wait)
    monkeypatch.setattr(local, "LOG_BYTES", 0)
    before = os.umask(0o022)
    try:
        services = LocalServices(tmp_path / "runs" / "local")
        monkeypatch.setattr(services, "_announce", lambda: None)
        for process in services._processes.values():
            process.command = ["sh", "-c", "echo said; sleep 60"]
        (tmp_path / "runs" / "local" / "logs").mkdir(parents=True)
        (tmp_path / "runs" / "local" / "logs" / "memory.log").write_text("from before\n")
        async with services:
            log = services.folder / "logs" / "memory.log"
            await until(lambda: log.stat().st_size > len("from before\n"))
            services._processes["memory"].rotate_log()
    finally:
        os.umask(before)
    open_to_others = {path.name for path in services.folder.rglob("*") if path.stat().st_mode & 0o077}
    assert open_to_others == {"logs"}, "a folder that was there keeps its mode"
    assert (services.folder / "logs" / "memory.log.1").read_text() == "from before\nsaid\n"
    assert (tmp_path / "runs").stat().st_mode & 0o077, "the umask is as it is for everything else"


@pytest.mark.parametrize("words", [["up", "--config", "missing"], ["demo", "--recipe", "missing"]])
def test_commands_that_run_services_keep_private_what_they_write(words: list[str], tmp_path: Path) -> None:
    """Also what they write themselves, such as a chart."""
    (tmp_path / "missing").write_text("no = settings")
    program = (
        "import os, sys\n"
        "from mulligan.cli.__main__ import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code, end\n"
        "print('umask', oct(os.umask(0)))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, *words], cwd=tmp_path, umask=0o022, capture_output=True, text=True, check=True
    )
    assert ended.stdout.splitlines()[-1] == "umask 0o77", ended.stderr
