"""How vLLM is started."""

from __future__ import annotations

from collections.abc import Sequence

from mulligan.policy.backends._servers.launch import LaunchedServer

# Only with these vLLM has /pause, /collective_rpc, /update_weight_version and others, and /v1/load_lora_adapter.
_ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}


class LaunchedVllm(LaunchedServer):
    ready_path = "/health"

    def _arguments(self, port: int) -> Sequence[str]:
        arguments = ["-m", "vllm.entrypoints.openai.api_server", "--model", self._source]
        arguments += ["--host", "127.0.0.1", "--port", str(port)]
        return [*arguments, "--enable-scale-out", "--logprobs-mode", "processed_logprobs", *self._settings.flags]

    def _environment(self) -> dict[str, str]:
        return _ENVIRONMENT | super()._environment()
