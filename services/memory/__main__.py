"""`python -m mulligan.memory --database memory.db`: keeps reflections until SIGTERM."""

from __future__ import annotations

import sys

from mulligan.common.config import refuse
from mulligan.common.files import keep_files_private
from mulligan.common.server import run, serve
from mulligan.memory.config import BadSettings, MemorySettings
from mulligan.memory.embedder import CannotEmbed
from mulligan.memory.servicer import add_to_server
from mulligan.memory.store import StoreError


def main() -> None:
    keep_files_private()
    settings = MemorySettings.load(sys.argv[1:])

    async def serve_memory() -> None:
        try:
            embedder = settings.create_embedder()
            store = await settings.open_store()
        except (BadSettings, StoreError) as error:
            refuse(settings.service, str(error))
        try:
            try:
                await store.use_embedder(embedder)
            except CannotEmbed as error:
                refuse(settings.service, f"embedder: the database's entries need other embeddings ({error})")
            await serve(settings, lambda server: add_to_server(server, store, embedder, settings.guard))
        finally:
            await store.close()

    run(settings, serve_memory)


if __name__ == "__main__":
    main()
