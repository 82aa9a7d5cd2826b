"""The SGLang backend: requests, servers, the pool of them, weights as folders, launched processes."""

from mulligan.policy.backends.sglang.backend import open_backend as open_backend
