"""Folders of tokens for servers under test."""

from __future__ import annotations

from pathlib import Path

from mulligan.common.access import AccessRole


def token_of(role: AccessRole) -> str:
    return f"the-token-of-a-{role}"


def write_tokens(folder: Path, *roles: AccessRole) -> Path:
    """A folder below `folder` with a token for each of these roles, or of all. `token_of` is the token."""
    tokens = folder / "tokens"
    tokens.mkdir(exist_ok=True)
    for role in roles or AccessRole:
        (tokens / role).write_text(f"{token_of(role)}\n")
    return tokens
