"""`python -m mulligan.policy --config policy.toml`: serves language models until SIGTERM."""

from __future__ import annotations

import sys

from mulligan.common.config import refuse
from mulligan.common.files import keep_files_private
from mulligan.common.metrics import collected
from mulligan.common.server import run, serve
from mulligan.policy.config import PolicySettings
from mulligan.policy.policies import Policies
from mulligan.policy.servicer import add_to_server, health

# The event loop and the engine's thread take turns in the interpreter; each forward pass needs it hundreds of times.
_SWITCH_SECONDS = 2e-4


def main() -> None:
    keep_files_private()
    settings = PolicySettings.load(sys.argv[1:])
    sys.setswitchinterval(_SWITCH_SECONDS)

    async def serve_policies() -> None:
        try:
            policies = await Policies.open(settings)
        except ExceptionGroup as failed:
            refuse(settings.service, *map(str, failed.exceptions))
        except OSError as error:
            refuse(settings.service, str(error))
        try:
            with collected(policies):
                await serve(
                    settings,
                    lambda server: add_to_server(server, policies),
                    health_of_parts=lambda: health(policies),
                )
        finally:
            await policies.close()

    run(settings, serve_policies)


if __name__ == "__main__":
    main()
