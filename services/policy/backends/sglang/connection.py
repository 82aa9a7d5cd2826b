"""Where SGLang has what, as of 0.5.23: sglang.srt.entrypoints.http_server."""

from __future__ import annotations

from mulligan.policy.backends._servers.connection import HttpConnection


class SglangConnection(HttpConnection):
    engine = "SGLang"
    keys = "sglang.api_key and admin_api_key"
    generate_path = "/generate"
    alive_path = "/model_info"
