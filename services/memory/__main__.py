"""`python -m services.memory --database memory.db`: keeps reflections until SIGTERM."""

from __future__ import annotations

import sys

from services.common.config import refuse
from services.common.server import run, serve
from services.memory.config import MemorySettings
from services.memory.servicer import add_to_server
from services.memory.store import StoreError


def main() -> None:
    settings = MemorySettings.load(sys.argv[1:])

    async def serve_memory() -> None:
        try:
            store = await settings.open_store()
        except StoreError as error:
            refuse(settings.service, str(error))
        try:
            await serve(settings, lambda server: add_to_server(server, store))
        finally:
            await store.close()

    run(settings, serve_memory)


if __name__ == "__main__":
    main()
