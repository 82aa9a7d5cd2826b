"""What services write: their user's alone, and in folders that no other service has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mulligan.testing.processes import ProcessFailed, ServiceProcesses


def test_services_keep_their_files_private_and_have_their_folders_alone(
    services: ServiceProcesses, tmp_path: Path
) -> None:
    folders = {name: tmp_path / name for name in ("runs_folder", "weights_folder", "checkpoint_folder")}
    settings: dict[str, dict[str, Any]] = {
        "env": {},
        "policy": {"threads": 1, "state_folder": tmp_path / "policy"},
        "memory": {"database": tmp_path / "memory" / "memory.sqlite"},
        "trainer": {"threads": 1, **folders},
    }
    for name, given in settings.items():
        process = services.start(name, **given).process
        assert process is not None
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert "Umask:\t0077" in status, name
    made = [path for path in tmp_path.rglob("*") if path.parent != tmp_path or path.is_dir()]
    assert len(made) > 6 and not [path for path in made if path.stat().st_mode & 0o077]
    for shared in ("runs_folder", "weights_folder"):
        others: dict[str, Any] = {name: tmp_path / "second" / name for name in folders} | {shared: folders[shared]}
        with pytest.raises(ProcessFailed, match=f"{shared}: {folders[shared]} is in use by another trainer"):
            services.start("trainer", threads=1, **others)
