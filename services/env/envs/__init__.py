"""The built-in environments, a module or a package each. docs/environments.md says what one exports."""

from typing import Any

from mulligan.common.plugins import Plugins

ENVIRONMENTS = Plugins("environment", __name__, "mulligan.environments", ("create",))

# What the service serves whose settings name none.
DEFAULT_ENVIRONMENTS: dict[str, dict[str, Any]] = {
    "frozenlake": {"kind": "frozenlake"},
    "frozenlake-3x3": {"kind": "frozenlake", "size_min": 3, "size_max": 3, "prompts": "compact"},
    "frozenlake-symbols": {
        "kind": "frozenlake",
        "size_min": 3,
        "size_max": 3,
        "symbols": "A B CEG DFH",
        "prompts": "compact",
    },
    "sokoban": {"kind": "sokoban"},
    "sokoban-small": {
        "kind": "sokoban",
        "size_min": 5,
        "size_max": 5,
        "wall_share": 0.4,
        "max_steps": 4,
        "symbols": "AFBGCDE",
        "border": False,
        "prompts": "compact",
    },
    "hotpotqa": {"kind": "hotpotqa"},
    "gymnasium-frozenlake": {
        "kind": "gymnasium",
        "id": "FrozenLake-v1",
        "max_reward": 1.0,
        "actions": ["Left", "Down", "Right", "Up"],
    },
    "reasoning-gym": {"kind": "reasoning_gym"},
    "questions": {"kind": "questions"},
    "unanswerable": {"kind": "unanswerable"},
    "short-sentences": {"kind": "constrained_writing", "limit_min": 7, "limit_max": 7, "prompts": "short"},
}
