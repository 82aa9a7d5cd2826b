"""The transformers backend; see backend.py."""

from mulligan.policy.backends.transformers.backend import open_backend as open_backend
