"""A hub model at a revision, as it lies in the cache of huggingface_hub: nothing is asked of the hub here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from mulligan import models
from tests.support.paths import IMPORT_ROOTS

COMMIT = "1234567890" * 4
LOCATE = """
import json, sys
from mulligan import models
from mulligan.common.model_files import UnsupportedModel

def located(model, revision):
    try:
        return models.locate(model, revision)
    except UnsupportedModel as error:
        return str(error)

print(json.dumps([located(*each) for each in json.loads(sys.argv[1])]))
"""


def test_a_revision_is_the_folder_of_its_commit(tmp_path: Path) -> None:
    cache = tmp_path / "hub" / "models--owner--name"
    snapshot = cache / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (cache / "refs").mkdir()
    (cache / "refs" / "v1").write_text(COMMIT)
    asked = [
        ("owner/name", COMMIT),
        ("owner/name", "v1"),
        ("owner/name", ""),
        ("owner/name", "v2"),
        ("embedded", "v1"),
        (str(tmp_path), "v1"),
        ("smollm2-135m", "v1"),
    ]
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": IMPORT_ROOTS}
    command = [sys.executable, "-c", LOCATE, json.dumps(asked)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    commit, tag, plain, unknown, *none = json.loads(done.stdout)
    assert commit == tag == str(snapshot) and plain == "owner/name"
    assert unknown.startswith("owner/name at revision 'v2' cannot be downloaded: ")
    assert none == [f"revision 'v1': {name} is no model of the hub, and has none" for name, _ in asked[4:]]


def test_without_a_revision_nothing_is_looked_up() -> None:
    assert models.locate("owner/name") == "owner/name"
