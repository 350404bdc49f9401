"""The table of a family, as the console and the report show it, and numbers as people read them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

HEADERS = ("member", "ratio", "parameters", "of parent", "ppl factored", "ppl recovered", "x parent", "tokens seen")
ABSENT = "-"


def family_rows(parent: Mapping[str, Any], members: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Return the cells under HEADERS: the parent, then its members as family.json lists them. What was not measured
    shows as "-"."""
    base = perplexity(parent, "eval")
    rows: list[tuple[str, ...]] = [
        (
            "parent",
            "1.00",
            count(parent.get("params")),
            "100%",
            ABSENT,
            number(base),
            "1.00" if base else ABSENT,
            ABSENT,
        )
    ]
    for member in members:
        ppl = perplexity(member, "eval")
        share = (
            f"{100 * member['params'] / parent['params']:.0f}%"
            if member.get("params") and parent.get("params")
            else ABSENT
        )
        rows.append(
            (
                str(member.get("name", ABSENT)),
                f"{member['ratio']:.2f}" if "ratio" in member else ABSENT,
                count(member.get("params")),
                share,
                number(perplexity(member, "eval_factored")),
                number(ppl),
                f"{ppl / base:.2f}" if ppl and base else ABSENT,
                count(member.get("tokens_lineage")),
            )
        )
    return rows


def perplexity(entry: Mapping[str, Any], key: str) -> float | None:
    """The finite perplexity under `key` ("eval" or "eval_factored") of a parent or member; None where there is none."""
    value = (entry.get(key) or {}).get("ppl")
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def count(value: float | None) -> str:
    """1234567 -> "1.23M"; three significant digits."""
    if value is None:
        return ABSENT
    for unit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * unit:
            return _digits(value / unit) + suffix
    return f"{value:.0f}" if value == int(value) else _digits(value)


def number(value: float | None, digits: int = 4) -> str:
    """`digits` significant digits, whole above a thousand and without an exponent below a million."""
    if value is None:
        return ABSENT
    if abs(value) >= 1e6:
        return f"{value:.2e}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:#.{digits}g}".removesuffix(".")


def _digits(value: float) -> str:
    return f"{value:#.3g}".removesuffix(".")
