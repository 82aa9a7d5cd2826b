"""How SGLang is started."""

from __future__ import annotations

from collections.abc import Sequence

from mulligan.policy.backends._servers.launch import LaunchedServer


class LaunchedSglang(LaunchedServer):
    ready_path = "/ready"

    def _arguments(self, port: int) -> Sequence[str]:
        arguments = ["-m", "sglang.launch_server", "--model-path", self._source]
        arguments += ["--host", "127.0.0.1", "--port", str(port), "--weight-version", self._label]
        if "--incremental-streaming-output" not in self._settings.flags:  # without it a stream repeats what came before
            arguments.append("--incremental-streaming-output")
        return [*arguments, *self._settings.flags]
