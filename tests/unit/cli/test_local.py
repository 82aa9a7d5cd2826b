"""What `mulligan up` and `mulligan demo` start the policy service with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mulligan.cli.local import LocalServices
from mulligan.policy.config import PolicySettings

CONFIG = """
model = "from/the-file"

[policies.wise]
backend = "openai"
model = "large"
openai = {base_url = "http://127.0.0.1:8000/v1"}
"""


def policy_settings(folder: Path, **options: Any) -> PolicySettings:
    """As the policy service reads them."""
    command = LocalServices(folder, **options)._processes["policy"].command
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
    settings = policy_settings(tmp_path, policy_config=config)
    assert settings.model == "from/the-file"
    assert settings.policies["wise"].backend == "openai"
    assert policy_settings(tmp_path, policy_config=config, model="mine").model == "mine"
