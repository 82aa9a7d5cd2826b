"""Where vLLM has what, as of 0.32.0: vllm.entrypoints."""

from __future__ import annotations

from typing import Any

from mulligan.policy.backends._servers.connection import HttpConnection

# When a worker refuses a file, vLLM answers HTTP 500, and the server goes on.
_NOT_TAKEN = ("Call to add_lora method failed", "Call to collective_rpc method failed")


class VllmConnection(HttpConnection):
    engine = "vLLM"
    keys = "vllm.api_key"
    generate_path = "/inference/v1/generate"
    alive_path = "/health"

    def _decoded(self, answer: bytes) -> dict[str, Any]:
        """vLLM answers calls for adapters with words, not JSON."""
        return {} if answer.startswith(b"Success") else super()._decoded(answer)

    def _refuses(self, status: int, message: str) -> bool:
        return super()._refuses(status, message) or any(said in message for said in _NOT_TAKEN)
