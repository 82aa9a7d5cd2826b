"""Generates the Python stubs from the .proto files, into the package: `make proto` runs it.

Package = directory = import root: the contract in proto/mulligan/env/v1 becomes services/env/v1, which is imported as
`from mulligan.env.v1 import env_service_pb2`. Three plugins write a contract's files: protoc (messages), the gRPC
plugin (stubs and servicers) and mypy-protobuf (types; gRPC ones for grpc.aio alone, as every service here is
asynchronous).

The stub of buf/validate goes to services/common/buf/validate, and the contracts' stubs import it from there: a
top-level package `buf` would collide with the one that a user has.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import sysconfig
import tempfile
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

PROTO = Path(__file__).resolve().parent
PACKAGE = PROTO.parent / "services"  # imported as `mulligan`
# buf/validate is a copy (see NOTICE): its stub is generated too, because the contracts' stubs import it.
SOURCES = ("mulligan", "buf")


def contracts() -> list[Path]:
    """All .proto files, relative to proto/, in a fixed order."""
    return sorted(path.relative_to(PROTO) for source in SOURCES for path in (PROTO / source).rglob("*.proto"))


def generate(out: Path) -> None:
    """Writes the stubs of every contract below `out`, at the places that they have in the package."""
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder)
        _run_protoc(written)
        for path in sorted(written.rglob("*.py*")):
            place = out / _place(path.relative_to(written))
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(path.read_text().replace("from buf.validate import", "from mulligan.common.buf import"))


def _place(stub: Path) -> Path:
    """mulligan/env/v1/x_pb2.py lies in env/v1 of the package, buf/validate/x_pb2.py in common/buf/validate."""
    return stub.relative_to("mulligan") if stub.parts[0] == "mulligan" else "common" / stub


def _run_protoc(out: Path) -> None:
    files = contracts()
    services = [path for path in files if re.search(r"^service ", (PROTO / path).read_text(), re.MULTILINE)]
    plugins = Path(sysconfig.get_path("scripts"))
    run = [
        "protoc",
        f"-I{PROTO}",
        f"-I{resources.files('grpc_tools') / '_proto'}",
        f"--plugin=protoc-gen-mypy={plugins / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={plugins / 'protoc-gen-mypy_grpc'}",
    ]
    _protoc([*run, f"--python_out={out}", f"--mypy_out=quiet:{out}", *map(str, files)])
    if services:
        # The gRPC plugins would write an empty module for a file without services.
        _protoc([*run, f"--grpc_python_out={out}", f"--mypy_grpc_out=quiet,only_async:{out}", *map(str, services)])


def differences(fresh: Path, committed: Path) -> list[str]:
    """Paths that are missing, left over or different in `committed`, compared with `fresh`."""
    left = _contents(fresh)
    right = _contents(committed)
    return sorted(str(path) for path in left.keys() | right.keys() if left.get(path) != right.get(path))


def _replace(old: Path, new: Path) -> None:
    """Only files that differ are touched: programs that use the stubs may be running."""
    if not new.exists():
        old.unlink()
        return
    old.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(new, old)


def _protoc(arguments: list[str]) -> None:
    if protoc.main(arguments) != 0:
        raise SystemExit("protoc failed; its message is above")


def _contents(root: Path) -> dict[Path, bytes]:
    """All stubs below the package's root, by their path in it."""
    folders = [*root.glob("*/v1"), root / "common" / "buf" / "validate"]
    files = (path for folder in folders for path in folder.rglob("*.py*"))
    return {path.relative_to(root): path.read_bytes() for path in files if "__pycache__" not in path.parts}


def main() -> None:
    parser = argparse.ArgumentParser(description="Generate the stubs of the contracts.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a stub is not fresh")
    check: bool = parser.parse_args().check
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        generate(fresh)
        stale = differences(fresh, PACKAGE)
        if check:
            if stale:
                sys.exit("stubs are not fresh; run `make proto`:\n  " + "\n  ".join(stale))
            return
        for path in stale:
            _replace(PACKAGE / path, fresh / path)
        print(f"stubs: {len(contracts())} contracts, {len(stale)} files changed")


if __name__ == "__main__":
    main()
