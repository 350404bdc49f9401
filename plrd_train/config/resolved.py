"""run_dir/config.yaml: the resolved config of a run. Rank 0 writes it, and refuses to resume under another config."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from plrd_train.config.schema import Config, from_mapping
from plrd_train.errors import UserError
from plrd_train.runtime.files import write_atomically

# Keys that may change when a run is resumed: names, tracking, and what depends on the number of ranks.
# The stages are compared by `refuse_other`: ratios may be added.
# `skip_bad` may change, so that a run can resume past a bad line; it does not affect the lines before.
# A revision may be given as a branch or tag: `refuse_moved` compares the commits.
# `evaluation.prompt` changes nothing of the members.
_FREE = (
    "run_dir",
    "experiment",
    "recipe",
    "tracking.",
    "checkpoint.",
    "engine.replicas",
    "stages.",
    "data.skip_bad",
    "evaluation.prompt",
    "parent.revision",
    "data.revision",
)


def read(run_dir: Path) -> dict[str, Any] | None:
    """The config of the run in `run_dir`, or None where there is none yet."""
    path = run_dir / "config.yaml"
    if not path.exists():
        return None
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(
            f"{path}: cannot be read ({error.__class__.__name__}); restore it, or choose another run_dir"
        ) from None
    if not isinstance(content, dict) or not all(
        isinstance(content.get(group, {}), dict) for group in ("parent", "data")
    ):
        raise UserError(f"{path}: not a config; restore it, or choose another run_dir")
    return content


def pinned(source: dict[str, Any], before: Mapping[str, Any] | None) -> dict[str, Any]:
    """`source` with the revisions of `before`, the config that the run began with, wherever it gives none itself."""
    if before is None:
        return source
    copy = {**source}
    for group in ("parent", "data"):
        if copy[group].get("revision") is None:
            copy[group] = {**copy[group], "revision": before.get(group, {}).get("revision")}
    return copy


def refuse_other(source: Mapping[str, Any], before: Mapping[str, Any] | None, run_dir: Path) -> None:
    """Raise UserError that names the keys that differ where `run_dir` holds a run of another config. Ratios may be
    added at the end."""
    if before is None:
        return
    old, new = dict(_flat(before)), dict(_flat(source))
    differ = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key) and not key.startswith(_FREE)]
    try:
        stages_then, stages_now = _stages(from_mapping(before)), _stages(from_mapping(source))
    except UserError as error:
        raise UserError(
            f"{run_dir / 'config.yaml'}: not a config of this version ({error}); restore it, or choose another run_dir"
        ) from None
    said = [f"{key} ({old.get(key)!r} there, {new.get(key)!r} now)" for key in differ]
    if stages_now[: len(stages_then)] != stages_then:
        said.append(f"stages (ratios and tokens {stages_then} there, {stages_now} now)")
    if said:
        raise UserError(
            f"run_dir: {run_dir} holds a run of another config; different: {', '.join(said)}; choose another run_dir "
            "or these values"
        )


def refuse_moved(pins: Mapping[str, str | None], before: Mapping[str, Any] | None) -> None:
    """Raise UserError where `pins` (group -> commit; "parent", "data") differs from the commits that the run began
    with."""
    for group, commit in pins.items():
        then = before[group]["revision"] if before is not None else commit
        if commit != then:
            raise UserError(
                f"{group}.revision: this run began with {then}, not {commit}; give {group}.revision={then}, or "
                "choose another run_dir"
            )


def write(source: Mapping[str, Any], run_dir: Path) -> None:
    """Store the resolved config."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(run_dir / "config.yaml", yaml.safe_dump(dict(source), sort_keys=False))


def _stages(config: Config) -> list[tuple[float, int]]:
    return list(zip(config.stages.ratios, config.stages.budgets(), strict=True))


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
