"""What a name of a plug-in means, and where its settings stand."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from mulligan.common.extras import MissingExtra
from mulligan.common.plugins import Plugins, PluginSettings, UnusablePlugin, chosen_settings, place_of, with_tables
from mulligan.env.encoders import ENCODERS
from mulligan.env.envs import ENVIRONMENTS
from mulligan.memory.stores import STORES
from mulligan.policy.backends import BACKENDS
from mulligan.policy.config import PolicyModelSettings
from mulligan.trainer.advantages import ADVANTAGES
from mulligan.trainer.samplers import SAMPLERS
from tests.support.distribution import install
from tests.support.paths import IMPORT_ROOTS

KINDS = (BACKENDS, ENVIRONMENTS, STORES, ENCODERS, ADVANTAGES, SAMPLERS)
ALL = [(plugins, name) for plugins in KINDS for name in plugins.built_in]


@pytest.fixture
def acme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(install(tmp_path / "installed"))
    yield tmp_path / "installed"
    for name in [name for name in sys.modules if name.partition(".")[0] in ("acme", "solo")]:
        del sys.modules[name]


@pytest.mark.parametrize(("plugins", "name"), ALL, ids=[f"{plugins.noun} {name}" for plugins, name in ALL])
def test_all_that_come_along_are_whole(plugins: Plugins, name: str) -> None:
    """Each has settings, whatever it needs besides; none is a helper of another."""
    found = plugins.find(name)
    assert all(hasattr(found, export) for export in (*plugins.exports, "Settings"))


@pytest.mark.parametrize(
    "helper", ["sokoban_boards", "gymnasium_actions", "gymnasium_spaces", "hotpotqa_world", "boards"]
)
def test_helpers_are_no_kinds(helper: str) -> None:
    with pytest.raises(UnusablePlugin, match=f"there is no environment '{helper}'"):
        ENVIRONMENTS.find(helper)


def test_the_nearest_name_and_all_that_there_are_are_told() -> None:
    with pytest.raises(UnusablePlugin) as caught:
        STORES.find("sqlit")
    assert str(caught.value) == "there is no store 'sqlit'; did you mean 'sqlite'?; there are postgres, sqlite"


@pytest.mark.parametrize("name", ["", ".", "..", "a..b", "../x", "sqlite.", "a b", "__main__"])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(UnusablePlugin):
        STORES.find(name)


def test_a_name_is_built_in_before_it_is_installed_before_it_is_a_module(
    acme: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ENVIRONMENTS.find("countdown").__name__ == "acme.countdown"
    assert "countdown" in ENVIRONMENTS.names and "countdown" not in ENVIRONMENTS.built_in
    assert ENVIRONMENTS.find("acme.countdown") is ENVIRONMENTS.find("countdown")
    for name in ("sokoban", "countdown", "solo"):
        (tmp_path / f"{name}.py").write_text("def create(name, settings): ...")
    monkeypatch.syspath_prepend(tmp_path)
    assert ENVIRONMENTS.find("sokoban").__name__ == "mulligan.env.envs.sokoban"
    assert ENVIRONMENTS.find("countdown").__name__ == "acme.countdown"
    assert ENVIRONMENTS.find("solo").__name__ == "solo"


def test_two_distributions_with_one_name_are_told_apart_by_nobody(
    acme: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = install(tmp_path / "other", "[mulligan.stores]\nnotes = acme.parrot\n")
    monkeypatch.syspath_prepend(other)
    (other / "acme-1.0.dist-info").rename(other / "bcme-1.0.dist-info")
    (other / "bcme-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: bcme\nVersion: 1.0\n")
    with pytest.raises(UnusablePlugin, match=r"several distributions have a store 'notes': acme\.notes, acme\.parrot"):
        STORES.find("notes")


def test_what_a_module_raises_is_told(acme: Path) -> None:
    (acme / "acme" / "raises.py").write_text("raise RuntimeError('not today')")
    (acme / "acme" / "exits.py").write_text("raise SystemExit('bye')")
    with pytest.raises(UnusablePlugin, match=r"'acme\.exits' is no store: SystemExit: bye"):
        STORES.find("acme.exits")
    with pytest.raises(UnusablePlugin, match=r"'acme\.raises' is no store: RuntimeError: not today"):
        STORES.find("acme.raises")
    (acme / "acme" / "lacks.py").write_text(
        "from mulligan.env import MissingExtra\nraise MissingExtra('gymnasium', ImportError('no gym'))"
    )
    with pytest.raises(MissingExtra, match="needs the extra 'gymnasium'"):
        ENVIRONMENTS.find("acme.lacks")


def service() -> Any:
    """Settings of a service, read with what is installed now."""

    @with_tables(BACKENDS)
    class Service(BaseModel):
        backend_settings: dict[str, Any] = {}
        model: str = "m"

    return Service


def test_settings_have_a_place_by_how_the_plugin_is_named(acme: Path) -> None:
    made = service()
    assert [
        place_of(made, BACKENDS, name) for name in ("transformers", "sglang", "parrot", "acme.parrot", "broken")
    ] == [
        "",
        "sglang.",
        "parrot.",
        "backend_settings.",
        "backend_settings.",
    ]
    settings = made(threads=2, sglang={"launch": 3}, parrot={"loudness": 3}, backend_settings={"loudness": 2})
    assert chosen_settings(settings, BACKENDS, "transformers").threads == 2
    assert chosen_settings(settings, BACKENDS, "sglang").launch == 3
    assert chosen_settings(settings, BACKENDS, "parrot").loudness == 3
    assert chosen_settings(settings, BACKENDS, "acme.parrot").loudness == 2
    with pytest.raises(ValueError, match=r"greting: no such setting; did you mean 'greeting'\?"):
        chosen_settings(made(backend_settings={"greting": ""}), BACKENDS, "acme.parrot")
    with pytest.raises(ValidationError, match="loudness"):
        made(parrot={"loudness": 4})


def test_a_plugin_with_a_setting_that_has_no_default(acme: Path) -> None:
    parrot = acme / "acme" / "parrot.py"
    parrot.write_text(parrot.read_text().replace('greeting: str = Field("", ', "greeting: str = Field("))
    made = service()
    assert made().parrot is None, "whoever names another backend needs none"
    with pytest.raises(ValueError, match="greeting: Field required"):
        chosen_settings(made(), BACKENDS, "parrot")
    assert chosen_settings(made(parrot={"greeting": "Ahoy!"}), BACKENDS, "parrot").greeting == "Ahoy!"


@pytest.mark.parametrize(
    ("name", "plugin"), [("lacking", "acme.lacking"), ("model_copy", "acme.parrot"), ("_hidden", "acme.parrot")]
)
def test_nothing_that_is_installed_breaks_a_service_that_does_not_name_it(acme: Path, name: str, plugin: str) -> None:
    (acme / "acme" / "lacking.py").write_text(
        "from mulligan.env import MissingExtra\nraise MissingExtra('vllm', ImportError('no engine'))"
    )
    (acme / "acme-1.0.dist-info" / "entry_points.txt").write_text(f"[mulligan.backends]\n{name} = {plugin}\n")
    settings = service()(threads=2, backend_settings={"loudness": 2})
    assert settings.model_copy().threads == 2
    assert place_of(type(settings), BACKENDS, name) == "backend_settings."
    if plugin == "acme.parrot":
        assert chosen_settings(settings, BACKENDS, name).loudness == 2


def test_a_bad_setting_of_the_default_plugin_is_named(acme: Path) -> None:
    """Without its value, which may be a secret."""
    with pytest.raises(ValueError, match=r"^threads: Input should be a valid integer") as caught:
        chosen_settings(service()().model_copy(update={"threads": "hunter2"}), BACKENDS, "transformers")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("name", BACKENDS.built_in)
def test_what_a_backend_says_of_its_settings_are_settings(name: str) -> None:
    settings = BACKENDS.find(name).Settings
    assert issubclass(settings, PluginSettings)
    named = {*settings.local_only, *settings.exclusive, *settings.credentials}
    named |= {credential for credentials in settings.credentials.values() for credential in credentials}
    assert named <= set(settings.model_fields)
    assert PolicyModelSettings(backend=name).own == settings()


WITHOUT = """
import asyncio, sys
from pathlib import Path
sys.modules[sys.argv[2]] = None  # importing it fails as if it were not installed
from mulligan.common.extras import MissingExtra
from mulligan.policy.backends import BACKENDS
from mulligan.policy.config import PolicyModelSettings
try:
    asyncio.run(BACKENDS.find(sys.argv[1]).open(PolicyModelSettings(backend=sys.argv[1]), Path(sys.argv[3]), 0))
except MissingExtra as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("openai", "openai", "openai"),
        ("sglang", "aiohttp", "sglang"),
        ("transformers", "torch", "policy"),
        ("vllm", "aiohttp", "vllm"),
    ],
)
def test_a_backend_without_its_packages_names_the_extra(name: str, package: str, extra: str, tmp_path: Path) -> None:
    """In a fresh interpreter: here most of the modules are loaded already."""
    command = [sys.executable, "-c", WITHOUT, name, package, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": IMPORT_ROOTS}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert f"needs the extra '{extra}'" in done.stdout, done.stderr
