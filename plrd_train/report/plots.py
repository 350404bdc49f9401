"""The two pictures of a run: perplexity against parameters, and loss against tokens."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, pairwise
from statistics import fmean

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import Bbox

from plrd_train.family import Family, Member, ParentRecord
from plrd_train.tracking.rows import Row
from plrd_train.tracking.table import count, number

# Okabe and Ito's colours, which the colour-blind tell apart; series differ by marker too.
RECOVERED, FACTORED, PARENT, FAINT = "#0072B2", "#D55E00", "#222222", "#8a8a8a"
FAR_OFF = 3.0  # perplexities straight after factoring this many times the largest other one get a panel of their own

# Where a label may stand: offset in points, horizontal and vertical alignment; nearest first, right above where a
# falling curve leaves room.
_PLACES = [
    (7, 6, "left", "bottom"),
    (0, 9, "center", "bottom"),
    (9, 0, "left", "center"),
    (-7, -6, "right", "top"),
    (0, -9, "center", "top"),
]
_PLACES += [(7, -6, "left", "top"), (-7, 6, "right", "bottom"), (-9, 0, "right", "center")]
_PLACES += [(x * k, y * k, h, v) for k in (3, 5, 7) for x, y, h, v in _PLACES[:8]]


def family_figure(family: Family) -> Figure:
    """Perplexity against parameters: the parent, and the members straight after factoring and after recovery."""
    parent, members = family.parent, sorted(family.members, key=lambda member: member.params)
    base = parent.ppl
    recovered = [(m.params, m.ppl, _label(m, m.ppl)) for m in members if m.ppl is not None]
    factored = [(m.params, m.ppl_factored, _label(m, m.ppl_factored)) for m in members if m.ppl_factored is not None]
    if factored == recovered:  # made without training: one series
        recovered = []
    near = [ppl for _, ppl, _ in recovered] + ([base] if base else [])
    far_off = bool(near and factored) and max(ppl for _, ppl, _ in factored) > FAR_OFF * max(near)
    apart = far_off and bool(recovered)

    figure = _figure(8.0, 6.4 if apart else 5.2)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1, 1.6]) if apart else [figure.subplots()] * 2
    if far_off:
        top.set_yscale("log")
    marks = []
    if base is not None:
        bottom.axhline(base, color=PARENT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        bottom.plot([parent.params], [base], "*", color=PARENT, markersize=14, label="parent", zorder=4)
        marks.append((parent.params, base, f"parent\n{number(base, 3)}"))
    if factored:
        top.plot(
            *_xy(factored),
            "--^",
            color=FACTORED,
            markerfacecolor="white",
            markersize=7,
            label="straight after factoring",
            zorder=2,
        )
    if recovered:
        bottom.plot(*_xy(recovered), "-o", color=RECOVERED, markersize=7, label="after recovery", zorder=3)
    for axes in dict.fromkeys((top, bottom)):
        _style(axes)
        axes.margins(x=0.12, y=0.22)
        axes.set_ylabel("held-out perplexity")
        if axes.get_yscale() == "log":
            _log_ticks(axes)
    bottom.set_xlabel("parameters")
    bottom.xaxis.set_major_locator(MaxNLocator(7))
    bottom.xaxis.set_major_formatter(FuncFormatter(_tick))
    top.set_title("One parent, a family: perplexity against parameters", loc="left", fontweight="bold", pad=12)
    figure.align_ylabels()
    if not (marks or recovered or factored):
        bottom.text(
            0.5, 0.5, "nothing measured yet", transform=bottom.transAxes, ha="center", va="center", color="#666666"
        )
        bottom.set(xticks=[], yticks=[])
        return figure
    if base:
        times = bottom.secondary_yaxis(
            "right", functions=(lambda ppl: np.divide(ppl, base), lambda ratio: np.multiply(ratio, base))
        )
        times.set_ylabel("times the parent's")
        times.spines["right"].set_visible(False)
        times.tick_params(color="#999999")
        if bottom.get_yscale() == "log":
            times.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            times.yaxis.set_minor_locator(NullLocator())
    figure.legend(loc="outside lower center", ncol=3, frameon=False)
    figure.canvas.draw()  # labels are placed in pixels
    if apart or not recovered:
        _place_labels(top, factored if apart else marks + factored)
        if apart:
            _place_labels(bottom, marks + recovered)
    else:  # one panel: the name stands at the recovered point
        _place_labels(bottom, marks + recovered + [(x, y, number(y, 3)) for x, y, _ in factored])
    return figure


def losses_figure(parent: ParentRecord, rows: Sequence[Row], events: Sequence[Row]) -> Figure | None:
    """Training and held-out loss against the run's tokens, stages marked, the token budget shown; None where no row has
    a training loss."""
    rows = [row for row in rows if row.get("train/loss") is not None and row.get("tokens/total") is not None]
    if not rows:
        return None
    figure = _figure(9.0, 5.2)
    axes = figure.subplots()
    stages = [
        (key, list(group)) for key, group in groupby(rows, lambda row: (row.get("stage/index"), row.get("stage/ratio")))
    ]
    start, labels = 0.0, []
    for number_, ((_, ratio), stage) in enumerate(stages):
        tokens, losses = [row["tokens/total"] for row in stage], [row["train/loss"] for row in stage]
        axes.axvspan(start, tokens[-1], color="#f1f4f7" if number_ % 2 else "#ffffff", zorder=0, linewidth=0)
        if number_:
            axes.axvline(start, color="#c5ccd3", linewidth=1, zorder=1)
        axes.plot(tokens, losses, color=RECOVERED, alpha=0.3, linewidth=0.8, zorder=2)
        smooth = _smooth(losses, max(1, len(losses) // 15))
        axes.plot(
            tokens, smooth, color=RECOVERED, linewidth=1.8, zorder=3, label="training loss" if number_ == 0 else None
        )
        labels.append(((start + tokens[-1]) / 2, f"{ratio:g}x" if ratio else ""))
        start = tokens[-1]
    held_out = [
        row for row in [*rows, *events] if row.get("val/loss") is not None and row.get("tokens/total") is not None
    ]
    held_out = [row for row in held_out if row.get("stage/index", 1) > 0]
    for factored, marker, face, color, label in (
        (True, "^", "white", FACTORED, "held-out loss, straight after factoring"),
        (False, "D", RECOVERED, PARENT, "held-out loss"),
    ):
        points = [
            (row["tokens/total"], row["val/loss"])
            for row in held_out
            if ("factoring" in str(row.get("when"))) == factored
        ]
        if points:
            axes.plot(
                *_xy(points),
                marker,
                color=color,
                markerfacecolor=face,
                markersize=6.5,
                linestyle="none",
                label=label,
                zorder=5,
                clip_on=False,
            )
    if base := parent.ppl:
        axes.axhline(
            math.log(base), color=PARENT, linewidth=1, linestyle=(0, (4, 3)), label="parent, held-out", zorder=1
        )
    budget = next((row["tokens/budget"] for row in reversed(rows) if row.get("tokens/budget")), None)
    if budget:
        axes.axvline(
            budget,
            color=FACTORED,
            linewidth=1.4,
            linestyle=(0, (1, 1.5)),
            label=f"token budget: {_tick(budget)}",
            zorder=1,
        )
    axes.set_xlim(0, max(budget or 0, start) * 1.02)
    axes.margins(y=0.08)
    _style(axes)
    axes.set_xlabel("tokens trained on, whole run")
    axes.set_ylabel("loss, nats per token")
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))
    axes.set_title("Loss against tokens; each band is a stage, with its ratio", loc="left", fontweight="bold", pad=26)
    figure.legend(loc="outside lower center", ncol=3, frameon=False)
    figure.canvas.draw()
    _label_stages(axes, labels)
    return figure


def _figure(width: float, height: float) -> Figure:
    figure = Figure(
        figsize=(width, height), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1), facecolor="white"
    )
    FigureCanvasAgg(figure)
    return figure


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(color="#999999")
    axes.grid(axis="y", color="#e3e6e9", linewidth=0.8)
    axes.set_axisbelow(True)


def _log_ticks(axes: Axes) -> None:
    low, high = axes.get_ylim()
    decades = math.log10(high / low)
    axes.yaxis.set_major_locator(
        LogLocator(10, subs=(1,) if decades > 2.5 else (1, 2, 5) if decades > 0.6 else (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9))
    )
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())


def _label(member: Member, ppl: float) -> str:
    """Name, ratio where the name does not say it, and perplexity."""
    name, ratio = member.name, member.ratio_requested
    if f"{ratio:g}" not in name:
        name = f"{name} ({ratio:.3g}x)"
    return f"{name}\n{number(ppl, 3)}"


def _xy(points: Sequence[tuple]) -> tuple[list[float], list[float]]:
    return [point[0] for point in points], [point[1] for point in points]


def _place_labels(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Write each label beside its point, where it covers no other label or point, if possible no line either, and stays
    inside the axes."""
    taken = [_box(x, y, 7) for x, y in axes.transData.transform([point[:2] for point in points])] if points else []
    strokes = [_box(x, y, 1) for line in axes.lines for x, y in _along(line)]
    inside = axes.get_window_extent()
    for x, y, label in points:
        text = axes.annotate(
            label.replace("$", r"\$"),
            (x, y),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=8.5,
            linespacing=1.05,
            zorder=6,
        )
        text.set_path_effects([patheffects.withStroke(linewidth=3, foreground="white")])

        def move(place: tuple, text: Annotation = text) -> Bbox:
            text.set_position(place[:2])
            text.set(horizontalalignment=place[2], verticalalignment=place[3])
            return text.get_window_extent()

        def cost(rank: int, move: Callable[..., Bbox] = move) -> float:
            box = move(_PLACES[rank])
            outside = box.x0 < inside.x0 or box.y0 < inside.y0 or box.x1 > inside.x1 or box.y1 > inside.y1 + 10
            crossed = min(1, box.count_overlaps(strokes))
            return 10 * box.count_overlaps(taken) + 5 * outside + 2 * crossed + rank / 20

        taken.append(move(_PLACES[min(range(len(_PLACES)), key=cost)]))


def _box(x: float, y: float, half: float) -> Bbox:
    return Bbox.from_extents(x - half, y - half, x + half, y + half)


def _along(line: Line2D) -> Iterator[tuple[float, float]]:
    """Yield points in pixels every few pixels along a drawn line."""
    corners = line.get_transform().transform(line.get_xydata())
    for (x0, y0), (x1, y1) in pairwise(corners):
        steps = max(1, int(math.hypot(x1 - x0, y1 - y0) / 6))
        yield from ((x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps) for i in range(steps + 1))


def _label_stages(axes: Axes, labels: Sequence[tuple[float, str]]) -> None:
    """Write each stage's ratio above its band, every second or third one only where all would not fit."""
    texts = [
        axes.annotate(
            label,
            (x, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
        for x, label in labels
    ]
    shown = -math.inf
    for text in texts:
        box = text.get_window_extent()
        text.set_visible(box.x0 > shown)
        shown = box.x1 + 4 if box.x0 > shown else shown


def _tick(value: float, _: int = 0) -> str:
    """1500000 -> "1.5M"."""
    text = count(value)
    digits, suffix = (text[:-1], text[-1]) if text[-1].isalpha() else (text, "")
    return (digits.rstrip("0").rstrip(".") if "." in digits else digits) + suffix


def _smooth(values: Sequence[float], window: int) -> list[float]:
    """The mean of `window` values around each, of fewer at the ends."""
    half = window // 2
    return [fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
