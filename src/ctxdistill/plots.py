"""Plots for the report, as SVG that sits inside the page.

In: lines of metrics.jsonl, evaluation.json. Out: `Markup` that starts with `<svg`, or nothing where there is nothing to
plot. Invariants: equal input gives equal bytes; ink is `currentColor` on no background, so that a plot is legible in a
light and in a dark page; no text from data is drawn; ids are unique in a page that holds several plots.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#0a0b0c"  # stands for currentColor until the SVG is written
STUDENT, TEACHER, FAINT = "#2f86de", "#d9822b", "#8b929c"
SIZE = (4.4, 3.1)  # inches; narrow, so that the letters stay readable on a phone


def training_plot(metrics: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Loss, KL and validation KL per step above the learning rate; None when no step was recorded."""
    steps = list({m["step"]: m for m in metrics if m.get("event") == "step"}.values())
    validations = list({m["step"]: m for m in metrics if m.get("event") == "validation"}.values())
    if not steps:
        return None
    figure = _figure()
    top, bottom = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [5, 2]})
    x = [m["step"] for m in steps]
    kl, loss = ([_number(m.get(key)) for m in steps] for key in ("kl", "loss"))
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
    bottom.plot(x, [_number(m.get("lr")) for m in steps], color=FAINT, linewidth=1.4)
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
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
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
