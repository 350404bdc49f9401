"""Made-up entries of family.json."""

from typing import Any


def member(name: str, **more: Any) -> dict[str, Any]:
    """A member, complete and inside its family."""
    return {
        "name": name,
        "ratio_requested": 2.0,
        "ratio": 2.0,
        "params": 1_000_000,
        "linear_params": 900_000,
        "form": "lowrank",
        "ranks": {"model.layers.0.mlp.up_proj": 3},
        "path": f"members/{name}",
        **more,
    }
