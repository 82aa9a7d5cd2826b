"""How long a sequence of a model may be, by its configuration."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from mulligan.common.model_files import context_length

LONG = {"rope_type": "longrope", "original_max_position_embeddings": 4096, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_position_embeddings": 8192}, 8192),
        ({}, 0),
        ({"max_position_embeddings": None}, 0),
        ({"max_position_embeddings": 131072, "rope_parameters": LONG}, 4096),
        ({"max_position_embeddings": 2048, "rope_parameters": LONG}, 2048),
        ({"max_position_embeddings": 131072, "rope_parameters": LONG | {"rope_type": "yarn"}}, 131072),
        ({"max_position_embeddings": 131072, "rope_parameters": {"full_attention": LONG, "other": None}}, 4096),
    ],
)
def test_positions_that_depend_on_the_longest_sequence_end_it(config: dict[str, Any], expected: int) -> None:
    assert context_length(SimpleNamespace(**config)) == expected


def test_a_configuration_of_phi_with_older_names_is_read() -> None:
    scaling = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    positions = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "rope_scaling": scaling}
    shape: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2, **positions}
    config: Any = CONFIG_MAPPING["phi3"](**shape)
    assert context_length(config) == 4096
