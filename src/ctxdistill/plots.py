"""Plots for the reports, as SVG that sits inside the page.

In: lines of metrics.jsonl, evaluation.json; points of a study. Out: `Markup` that starts with `<svg`, or nothing where
there is nothing to plot. Invariants: equal input gives equal bytes; ink is `currentColor` on no background, so that a
plot is legible in a light and in a dark page; no text from data is drawn; ids are unique in a page that holds several
plots.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#0a0b0c"  # stands for currentColor until the SVG is written
STUDENT, TEACHER, FAINT = "#2f86de", "#d9822b", "#8b929c"
SIZE = (4.4, 3.1)  # inches; narrow, so that the letters stay readable on a phone
HUES = {
    "baseline": ("#8b929c", "#a8793f"),
    "prompt": ("#d9822b", "#b59a1f", "#c9622f", "#8f7a35"),
    "finetune": ("#3c9f57", "#1f8f86", "#7d9a2a"),
    "distill": ("#2f86de", "#7a5fe0", "#1fa3c4", "#a04fd0", "#4a6bc0", "#c552b4"),
    "control": ("#d0506a", "#b5607a", "#c0453c"),
}
"""Colours of a study's arms, by family."""
SHAPES = "osD^vP"


def training_plot(metrics: Iterable[Mapping[str, Any]]) -> Markup | None:
    """Loss, KL and validation KL per step above the learning rate; None when no step was recorded."""
    steps, by_step = {}, {}  # a step that was taken again counts as it was the last time
    for m in metrics:
        if m.get("event") == "step":
            steps[m["step"]] = [_number(m.get(key)) for key in ("kl", "loss", "lr")]
        elif m.get("event") == "validation":
            by_step[m["step"]] = m
    if not steps:
        return None
    x, validations = list(steps), list(by_step.values())
    kl, loss, lr = zip(*steps.values(), strict=True)
    figure = _figure()
    top, bottom = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [5, 2]})
    same = all(abs(a - b) <= 1e-6 + 1e-3 * abs(b) for a, b in zip(kl, loss, strict=True))
    top.plot(x, loss, color=FAINT if not same else STUDENT, linewidth=1.2, label="loss" if not same else "loss (= KL)")
    if not same:
        top.plot(x, kl, color=STUDENT, linewidth=1.2, label="KL")
    held_out = [_number(m.get("kl")) for m in validations]
    if validations:
        top.plot(
            [m["step"] for m in validations],
            held_out,
            "o--",
            color=TEACHER,
            markersize=5,
            linewidth=1,
            label="KL, held-out",
        )
        best = [m for m in validations if m.get("best")][-1:]
        top.plot(
            [m["step"] for m in best],
            [_number(m.get("kl")) for m in best],
            "*",
            color=TEACHER,
            markersize=13,
            label="best, kept" if best else None,
        )
    values = [v for v in [*kl, *loss, *held_out] if math.isfinite(v)]
    if values and min(values) > 0 and max(values) / min(values) > 20:
        top.set_yscale("log")
    _style(top, "", "nats per token")
    top.legend(frameon=False, labelcolor=INK)
    bottom.plot(x, lr, color=FAINT, linewidth=1.4)
    _style(bottom, "step", "lr")
    return _svg(figure, "training", "Loss, KL and validation KL per training step, and the learning rate")


def break_even_plots(evaluation: Mapping[str, Any]) -> list[Markup]:
    """Cumulative prompt tokens, and time where it was measured, over requests: with the context against distilled."""
    cost, table = evaluation.get("cost") or {}, evaluation["table"]
    kinds = (
        ("prompt_tokens", 1.0, cost.get("training_tokens"), cost.get("break_even_tokens"), "tokens"),
        ("latency_ms", 1e-3, (cost.get("seconds") or {}).get("total"), cost.get("break_even_requests"), "seconds"),
    )
    plots = []
    for metric, factor, paid, crossing, unit in kinds:
        teacher, student = (
            _number((table.get(arm, {}).get(metric) or {}).get("mean")) * factor for arm in ("in_context", "distilled")
        )
        if all(map(math.isfinite, (teacher, student, _number(paid)))):
            plots.append(_break_even(teacher, student, _number(paid), _number(crossing), unit))
    return plots


def strength_plot(points: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Share of the KL that the adapter closes, with its band, over its strength, and the KL on unrelated prompts below it;
    None for fewer than two points."""
    known = [p for p in points if p["kl_closed"]]
    if len(known) < 2:
        return None
    figure = _figure()
    elsewhere = [p for p in known if p.get("unrelated_kl")]
    if elsewhere:
        top, bottom = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [5, 3]})
        bottom.plot(
            [p["strength"] for p in elsewhere],
            [p["unrelated_kl"]["mean"] for p in elsewhere],
            "o-",
            color=TEACHER,
            markersize=4,
            linewidth=1.4,
        )
        _style(bottom, "strength", "unrelated KL")
    else:
        top = figure.subplots()
    x = [p["strength"] for p in known]
    mean, low, high = ([100 * p["kl_closed"][key] for p in known] for key in ("mean", "low", "high"))
    top.plot(x, mean, "o-", color=STUDENT, markersize=4, linewidth=1.6)
    top.fill_between(x, low, high, color=STUDENT, alpha=0.12, linewidth=0)
    top.axvline(1.0, color=INK, linestyle=":", linewidth=1)
    _style(top, "" if elsewhere else "strength", "KL closed %")
    top.set_xticks(x, [f"{value:g}" for value in x])
    return _svg(figure, "strength", "Share of the KL that is closed, over the strength of the adapter")


def _break_even(teacher: float, student: float, paid: float, crossing: float, unit: str) -> Markup:
    figure = _figure()
    axes = figure.subplots()
    crosses = math.isfinite(crossing) and crossing > 0
    end = 2 * crossing if crosses else max(100.0, 2 * paid / max(teacher, 1e-9))
    scale = 1
    if unit == "seconds":
        scale, unit = next(
            (s, u) for s, u in ((3600, "hours"), (60, "minutes"), (1, unit)) if s == 1 or paid + student * end > 3 * s
        )
    axes.plot([0, end], [0, teacher * end / scale], color=TEACHER, linewidth=1.8, label="context in the prompt")
    axes.plot(
        [0, end],
        [paid / scale, (paid + student * end) / scale],
        color=STUDENT,
        linewidth=1.8,
        label="distilled, training included",
    )
    if crosses:
        height = teacher * crossing / scale
        axes.plot([crossing, crossing], [0, height], ":", color=INK, linewidth=1)
        axes.plot([crossing], [height], "o", color=INK, markersize=5)
        axes.annotate(
            f"{math.ceil(crossing):,} requests", (crossing, height), (8, -14), textcoords="offset points", color=INK
        )
    _style(axes, "requests", "prompt " + unit if unit == "tokens" else unit)
    axes.set_xlim(0, end)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, labelcolor=INK, loc="upper left")
    return _svg(
        figure, f"even-{unit}", f"Cumulative {unit} over requests, with the context in the prompt and distilled"
    )


def arm_styles(arms: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Arm -> `color`, `marker` and `hollow`, different for all arms of a family while colours and shapes last."""
    seen: dict[str, int] = {}
    styles = {}
    for arm in arms:
        family = arm["family"] if arm["family"] in HUES else "distill"
        i = seen[family] = seen.get(family, -1) + 1
        hues = HUES[family]
        shape = SHAPES[(i + i // len(hues)) % len(SHAPES)]
        styles[arm["name"]] = {"color": hues[i % len(hues)], "marker": shape, "hollow": family == "control"}
    return styles


def arm_mark(style: Mapping[str, Any]) -> Markup:
    """The marker of an arm, for a legend in the page."""
    path = {
        "o": "M6 1.6a4.4 4.4 0 1 0 .01 0z", "s": "M2 2h8v8H2z", "D": "M6 1l5 5-5 5-5-5z", "^": "M6 1.5l5 9H1z",
        "v": "M6 10.5l5-9H1z", "P": "M4.4 1h3.2v3.4H11v3.2H7.6V11H4.4V7.6H1V4.4h3.4z",
    }[style["marker"]]  # fmt: skip
    fill = "none" if style["hollow"] else style["color"]
    return Markup(
        f'<svg class="mark" viewBox="0 0 12 12" aria-hidden="true"><path d="{path}" fill="{fill}" '
        f'stroke="{style["color"]}" stroke-width="1.4"/></svg>'
    )


def domain_plot(points: Sequence[Mapping[str, Any]], constant: tuple[float, float] | None, name: str) -> Markup:
    """Accuracy in domain (x) against out of domain (y), both from 0 to 100 %, with intervals.

    Args:
        points: `x` and `y` as (mean, low, high), `color`, `marker`, `hollow`.
        constant: accuracy of the constant answer in domain and out of domain: dotted lines.
        name: prefix of the plot's ids, unique in the page.
    """
    figure = _figure()
    figure.set_size_inches(SIZE[0], SIZE[0])
    axes = figure.subplots()
    axes.plot([0, 100], [0, 100], color=INK, alpha=0.25, linewidth=1)
    for value, line in zip(constant or (), (axes.axvline, axes.axhline), strict=False):
        line(100 * value, color=INK, linestyle=":", linewidth=1.1)
    for point in points:
        (x, *x_ends), (y, *y_ends) = ([100 * v for v in point[side]] for side in ("x", "y"))
        axes.plot(x_ends, [y, y], color=point["color"], alpha=0.45, linewidth=1.1)
        axes.plot([x, x], y_ends, color=point["color"], alpha=0.45, linewidth=1.1)
        _marker(axes, x, y, point)
    _style(axes, "in domain, accuracy %", "out of domain, accuracy %")
    _per_cent(axes, "xy")
    axes.set_aspect("equal")
    return _svg(figure, name, "Accuracy in domain against out of domain")


def demos_plot(series: Sequence[Mapping[str, Any]], constant: float | None, name: str) -> Markup:
    """Accuracy over the number of demonstrations, with bands; an arm without demonstrations is a horizontal line.

    Args:
        series: `points` as [(n, mean, low, high), ...], with n None for an arm that has no demonstrations.
        constant, name: as for `domain_plot`.
    """
    figure = _figure()
    axes = figure.subplots()
    numbers = sorted({p[0] for s in series for p in s["points"] if p[0] is not None})
    for one in series:
        points = [(i, *p[1:]) for p in one["points"] for i, n in enumerate(numbers) if p[0] in (None, n)]
        x, mean, low, high = ([p[0] if k == 0 else 100 * p[k] for p in points] for k in range(4))
        flat = one["points"][0][0] is None
        axes.plot(x, mean, color=one["color"], linewidth=1.5, linestyle="--" if flat else "-")
        if not flat:
            axes.fill_between(x, low, high, color=one["color"], alpha=0.1, linewidth=0)
            for where, value in zip(x, mean, strict=True):
                _marker(axes, where, value, one)
    if constant is not None:
        axes.axhline(100 * constant, color=INK, linestyle=":", linewidth=1.1)
    _style(axes, "demonstrations", "accuracy %")
    axes.set_xticks(range(len(numbers)), [str(n) for n in numbers])
    _per_cent(axes, "y")
    return _svg(figure, name, "Accuracy against the number of demonstrations")


def cost_plot(points: Sequence[Mapping[str, Any]], constant: float | None, what: str, name: str) -> Markup:
    """Accuracy against what it cost, on a logarithmic axis with a place for nothing at its left end.

    Args:
        points: `x` (a count, 0 or more) and `y` as (mean, low, high), `color`, `marker`, `hollow`.
        what: label of the axis. constant, name: as for `domain_plot`.
    """
    figure = _figure()
    axes = figure.subplots()
    costs = [p["x"] for p in points if p["x"] > 0] or [1.0]
    nothing = 10.0 ** (math.floor(math.log10(min(costs))) - 1)
    for point in points:
        x, (y, *ends) = max(point["x"], nothing), [100 * v for v in point["y"]]
        axes.plot([x, x], ends, color=point["color"], alpha=0.45, linewidth=1.1)
        _marker(axes, x, y, point)
    if constant is not None:
        axes.axhline(100 * constant, color=INK, linestyle=":", linewidth=1.1)
    _style(axes, what, "accuracy %")
    axes.set_xscale("log")
    last = math.ceil(math.log10(max(costs)) + 0.05)
    decades = list(range(round(math.log10(nothing)) + 1, last + 1))
    decades = decades[:: max(1, math.ceil(len(decades) / 5))]
    axes.set_xticks([nothing, *(10.0**d for d in decades)], ["0", *(_short(10.0**d) for d in decades)])
    axes.set_xticks([], minor=True)
    axes.set_xlim(nothing / 1.6, 10.0**last)
    _per_cent(axes, "y")
    return _svg(figure, name, f"Accuracy against {what}")


def interval_plot(points: Sequence[tuple[str, Mapping[str, Any]]], what: str, name: str) -> Markup | None:
    """Shares with their intervals, one line each from top to bottom; None when there are none.

    Args:
        points: (letter, estimate) pairs, the estimate with `mean`, `low` and `high`.
        what: label of the axis, in per cent. name: prefix of ids in the SVG.
    """
    if not points:
        return None
    figure = _figure()
    axes = figure.subplots()
    for height, (_, estimate) in enumerate(points):
        mean, low, high = (100 * _number(estimate.get(key)) for key in ("mean", "low", "high"))
        axes.plot([low, high], [height, height], color=STUDENT, alpha=0.6, linewidth=2.2)
        axes.plot([mean], [height], "o", color=STUDENT, markersize=6.5)
    _style(axes, what, "")
    axes.set_yticks(range(len(points)), [letter for letter, _ in points])
    axes.set_ylim(len(points) - 0.5, -0.5)
    return _svg(figure, name, f"{what} of each run, with 95 % intervals")


def _marker(axes: Axes, x: float, y: float, look: Mapping[str, Any]) -> None:
    face = "none" if look["hollow"] else look["color"]
    axes.plot([x], [y], look["marker"], color=look["color"], markerfacecolor=face, markersize=6.5, zorder=3)


def _per_cent(axes: Axes, which: str) -> None:
    """The whole range, so that no difference looks larger than it is."""
    for side in which:
        getattr(axes, f"set_{side}ticks")(range(0, 101, 20))
        getattr(axes, f"set_{side}lim")(0, 100)


def _figure() -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=SIZE, layout="constrained")


def _style(axes: Axes, x: str, y: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogFormatter, MaxNLocator

    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.tick_params(colors=INK, which="both")
    axes.grid(color=INK, alpha=0.12)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    if x:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(_short))
    if axes.get_yscale() == "log":
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
        axes.yaxis.set_major_formatter(FuncFormatter(_short))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(FuncFormatter(_short))


def _short(value: float, _position: int | None = None) -> str:
    """A tick label: 1500 -> 1.5k, 0.0005 -> 5e-4."""
    for limit, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:g}{letter}"
    if 0 < abs(value) < 1e-2:
        return re.sub(r"\.0e|e", lambda m: "e", f"{value:.1e}").replace("e-0", "e-")
    return f"{value:.4g}"


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _svg(figure: Figure, name: str, title: str) -> Markup:
    """The figure as an SVG element with the page's font and ink."""
    import matplotlib as mpl

    file = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ctxdistill"}):
        figure.savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(
        r"<defs>\s*<style.*?</style>\s*</defs>|<metadata>.*?</metadata>", "", text, count=2, flags=re.DOTALL
    )  # its style would reach the page
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(
        r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", re.sub(r'(<svg [^>]*?)height="[^"]*"', r"\1", text, count=1), count=1
    )
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1))
