"""The table of a family for console and report, and the format of numbers."""

from collections.abc import Sequence

from plrd_train.family.records import Member, ParentRecord

HEADERS = ("member", "ratio", "parameters", "of parent", "ppl factored", "ppl recovered", "x parent", "tokens seen")
ABSENT = "-"


def family_rows(parent: ParentRecord, members: Sequence[Member]) -> list[tuple[str, ...]]:
    """The cells under HEADERS: a row for the parent, and one for each member in the order of family.json. A perplexity
    that was not measured shows as "-"."""
    base = parent.ppl
    against = "1.00" if base else ABSENT
    rows: list[tuple[str, ...]] = [
        ("parent", "1.00", count(parent.params), "100%", ABSENT, number(base), against, ABSENT)
    ]
    rows += [
        (
            member.name,
            f"{member.ratio:.2f}",
            count(member.params),
            f"{100 * member.params / parent.params:.0f}%" if parent.params else ABSENT,
            number(member.ppl_factored),
            number(member.ppl),
            f"{member.ppl / base:.2f}" if member.ppl and base else ABSENT,
            count(member.tokens_lineage),
        )
        for member in members
    ]
    return rows


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
