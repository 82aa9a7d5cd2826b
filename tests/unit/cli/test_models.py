"""`mulligan models`, with an empty cache."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from mulligan.cli import models
from mulligan.cli.app import app
from mulligan.models.catalog import CATALOG, FetchableModel
from mulligan.models.fetch import FetchFailed, Progress


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "400")
    return tmp_path / "mulligan" / "models"


def test_the_list_says_what_can_be_fetched_and_what_is_damaged(empty_cache: Path) -> None:
    listed = CliRunner().invoke(app, ["models", "list"]).stdout
    for model in CATALOG.values():
        assert all(said in listed for said in (model.name, model.licence, "MB unpacked")), listed
    assert "damaged" not in listed
    (empty_cache / "smollm2-135m").mkdir(parents=True)
    assert (
        f"damaged: remove {empty_cache / 'smollm2-135m'} and fetch it again"
        in CliRunner().invoke(app, ["models", "list"]).stdout
    )


def test_an_unknown_model_is_refused_with_the_nearest_name() -> None:
    result = CliRunner().invoke(app, ["models", "fetch", "smolm2-135m"])
    assert result.exit_code == 2 and "did you mean 'smollm2-135m'" in result.stderr


def test_fetching_says_licence_size_and_progress_and_prints_the_folder(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetched(model: FetchableModel, folder: Path, progress: Progress) -> bool:
        progress("downloading", 10**6, 10**8)
        progress("unpacking", 0, 0)
        return True

    monkeypatch.setattr(models, "fetch", fetched)
    result = CliRunner().invoke(app, ["models", "fetch", "smollm2-135m"])
    assert result.exit_code == 0 and result.stdout.strip() == str(empty_cache / "smollm2-135m")
    for said in ("licence Apache-2.0", "93 MB, 273 MB unpacked", "up --model smollm2-135m"):
        assert said in result.stderr, result.stderr


def test_a_failure_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(model: FetchableModel, folder: Path, progress: Progress) -> bool:
        raise FetchFailed("no index")

    monkeypatch.setattr(models, "fetch", failing)
    result = CliRunner().invoke(app, ["models", "fetch", "smollm2-135m"])
    assert result.exit_code == 1 and result.stderr.splitlines()[-1] == "error: no index"
