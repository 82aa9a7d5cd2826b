"""The backend for OpenAI-compatible endpoints; see backend.py."""

from mulligan.policy.backends.openai.backend import open_backend as open_backend
