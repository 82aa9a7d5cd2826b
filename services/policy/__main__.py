"""`python -m services.policy --config policy.toml`: serves a language model until SIGTERM."""

from __future__ import annotations

import sys

from services.common.config import refuse
from services.common.server import run, serve
from services.policy.backend import UnsupportedModel
from services.policy.config import PolicySettings
from services.policy.policy import Policy
from services.policy.servicer import add_to_server, credentials

# The event loop and the engine's thread take turns in the interpreter; each forward pass needs it hundreds of times.
_SWITCH_SECONDS = 2e-4


def main() -> None:
    settings = PolicySettings.load(sys.argv[1:])
    sys.setswitchinterval(_SWITCH_SECONDS)

    async def serve_policy() -> None:
        from services.policy.backends.transformers import TransformersBackend

        try:
            backend = TransformersBackend(settings)
        except UnsupportedModel as error:
            refuse(settings.service, f"model: {error}")
        policy = Policy(backend, settings.weights_folder)
        try:
            await serve(settings, lambda server: add_to_server(server, policy), credentials=credentials(settings))
        finally:
            await policy.close()

    run(settings, serve_policy)


if __name__ == "__main__":
    main()
