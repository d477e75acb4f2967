"""A study's folder becomes a page (`report.html`) and the same in text (`report.md`).

In: what `analysis.analyse` finds in the folder. Out: files, written whole. Invariants: the claims and what cannot be
concluded come first; a table is about one task and one number of demonstrations; as in `report`, nothing is loaded from
anywhere, no script runs and text that comes from data is escaped by the environment.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ctxdistill.analysis import analyse
from ctxdistill.claims import p_text
from ctxdistill.report import environment
from ctxdistill.results import NO_VALUE, Data, cells, finite
from ctxdistill.rundir import reading, write_atomic
from ctxdistill.stats import MIN_SETS

TONES = {"yes": "good", "no": "bad", "not decidable": "none"}
READINGS = {"above": ("▲", "good"), "below": ("▼", "bad"), "open": ("·", "none")}
DOMAINS = {"in": "in domain", "out": "out of domain"}
COSTS = {
    "labelled": "labelled examples",
    "unlabelled": "unlabelled queries",
    "trained_tokens": "tokens trained",
    "teacher_flops": "teacher FLOPs",
    "train_flops": "training FLOPs",
    "seconds": "seconds",
    "peak_mb": "peak memory MB",
    "trainable": "trainable parameters",
    "adapter_bytes": "adapter bytes",
    "request_flops": "FLOPs per request",
    "prompt_tokens": "tokens per request",
    "latency_ms": "ms per request",
}
NARROW = "\u202f"  # a space where no line breaks
PAPER_N = 16
"""Demonstrations in the paper's Table 3, and what is shown unfolded where a study has them."""
PAPER_TASKS, PAPER_MODELS = ("mnli", "rte", "qqp"), ("opt-125m", "opt-350m", "opt-1.3b", "opt-2.7b")


def write_report(folder: str | Path, paper_csv: str | Path | None = None) -> Path:
    """Write `report.html`, `report.md` and `study.json` into a study's folder; returns the path of the page.

    Args:
        folder: a study's folder, finished or not.
        paper_csv: the paper's runs, shown beside ours where a cell is the same.

    Raises: as `analysis.analyse`, and `RunError` when the files cannot be written.
    """
    folder = Path(folder)
    with reading(folder):
        view = _view(analyse(folder, paper_csv))
        text = environment("md").get_template("study.md.j2").render(view)
        page = environment("html").get_template("study.html.j2").render(view)
    write_atomic(folder / "report.md", text)
    write_atomic(folder / "report.html", page)
    return folder / "report.html"


# ---- what the templates see


def _view(found: Data) -> Data:
    from ctxdistill.plots import arm_mark, arm_styles  # matplotlib takes a second to load

    styles = arm_styles(found["arms"])
    n: int = PAPER_N if PAPER_N in found["demos"] else max(found["demos"])
    arms = {arm["name"]: {**arm, "mark": arm_mark(styles[arm["name"]])} for arm in found["arms"]}
    parts = [
        _part(found, model, task, n, arms, styles, number)
        for number, (model, task) in enumerate((m, t) for m in found["models"] for t in found["tasks"])
    ]
    return {
        **{key: found[key] for key in ("name", "rows", "limits", "demos", "sets", "main")},
        **{"created": found["created"] or NO_VALUE, "versions": found["versions"] or {}, "n": n},
        "models": [m["label"] for m in found["models"]],
        "tasks": [t["title"] for t in found["tasks"]],
        "claims": [{**claim, "tone": TONES[claim["verdict"]], "tally": _tally(claim)} for claim in found["claims"]],
        "arms": list(arms.values()),
        "glance": _glance(found, arms),
        "controls": _controls(found, arms),
        "table3": (table3 := _table3(found, n)),
        "has_paper": found["paper"] is not None,
        "beside": (beside := any(row["paper"] for row in table3)),
        "of_paper": "" if beside else _of_paper(table3),
        "inverted": any(row["paper"] and row["task_name"] == "qqp" for row in table3),
        "parts": [part for part in parts if part["tables"]],
        "retention": _retention(found, arms),
        "formats": found["formats"],
        "missing": _missing(found["missing"]),
        "comparisons": len(found["comparisons"]),
        "over": _over([row["sets"] for row in found["table"] if row["n"]]),
    }


def _over(sets: Sequence[int]) -> str:
    """What the intervals are over, where lines rest on these numbers of demonstration sets."""
    if max(sets, default=0) < MIN_SETS:
        return f"rows, since there are fewer than {MIN_SETS} demonstration sets"
    some = f" (over rows where there are fewer than {MIN_SETS} sets)" if min(sets) < MIN_SETS else ""
    return f"demonstration sets and rows{some}"


def _few(row: Mapping[str, Any], sets: Sequence[int]) -> str:
    """`1 of 3 sets` where a line rests on fewer demonstration sets than the study has, else nothing."""
    return f"{row['sets']} of {len(sets)} sets" if row["n"] and row["sets"] < len(sets) else ""


def _tally(claim: Mapping[str, Any]) -> str:
    """`supported by 2 cells, contradicted by 1, left open by 1`."""
    words = {"yes": "supported by", "no": "contradicted by", "open": "left open by"}
    parts = [f"{words[key]} {count}" for key, count in claim["counts"].items() if count]
    cells_word = "cell" if sum(claim["counts"].values()) == 1 else "cells"
    return f"{', '.join(parts)} of {sum(claim['counts'].values())} {cells_word}" if parts else "no cell decides it"


def _glance(found: Data, arms: Mapping[str, Data]) -> Data:
    """Arms x yardsticks: how often above and below, in and out of domain."""
    rows = [row for row in found["summary"] if arms[row["arm"]]["family"] != "control"]
    wanted = ["zero_shot", "in_context", "in_context_mean", *(a for a in arms if arms[a]["family"] == "finetune")]
    columns = [
        (domain, against)
        for domain in DOMAINS
        for against in wanted
        if any((row["domain"], row["against"]) == (domain, against) for row in rows)
    ]
    counts = {(row["arm"], row["domain"], row["against"]): row for row in rows}
    lines = [
        {"arm": arm, "cells": [counts.get((name, *column)) for column in columns]}
        for name, arm in arms.items()
        if any((name, *column) in counts for column in columns)
    ]
    groups = [(title, sum(domain == key for key, _ in columns)) for domain, title in DOMAINS.items()]
    heads = [arms[against]["label"] for _, against in columns]
    return {"groups": [g for g in groups if g[1]], "heads": heads, "rows": lines}


def _controls(found: Data, arms: Mapping[str, Data]) -> list[Data]:
    """Each control's counts against the arm that it belongs to."""
    return [
        {
            "arm": arms[row["arm"]],
            "against": arms[row["against"]]["label"],
            "domain": DOMAINS[row["domain"]],
            "count": row,
        }
        for row in found["summary"]
        if arms[row["arm"]]["family"] == "control"
    ]


def _table3(found: Data, n: int) -> list[Data]:
    """The paper's Table 3: task x model, teacher on its queries, student in domain and out of domain."""
    paper = {(p["model"].lower(), p["task"].lower(), p["n"]): p for p in found["paper"] or []}
    rows = []
    for task in found["tasks"]:
        for model in found["models"]:
            cell = (model["name"], task["name"], n, "cd_one")
            mine = [r for r in found["table"] if (r["model"], r["task"], r["n"], r["arm"]) == cell]
            if not mine:
                continue
            by_domain = {domain: [r for r in mine if r["domain"] == domain] for domain in ("in", "out")}
            short = model["name"].split("/")[-1].lower()
            theirs = paper.get((short, task["name"].lower(), n))
            rows.append(
                {
                    **{"task": task["title"], "task_name": task["name"], "model": model["label"]},
                    "same": task["name"].lower() in PAPER_TASKS and short in PAPER_MODELS,
                    "teacher": cells("label_accuracy", {"mean": mine[0]["teacher"]}),
                    "in": "; ".join(map(accuracy, by_domain["in"])) or NO_VALUE,
                    "out": "; ".join(map(accuracy, by_domain["out"])) or NO_VALUE,
                    "paper": theirs
                    and [cells("label_accuracy", {"mean": theirs[key]}) for key in ("teacher", "in", "out")],
                }
            )
    return rows


def _of_paper(table3: Sequence[Data]) -> str:
    """What a table without the paper's numbers has to do with the paper."""
    same = "; ".join(f"{row['task']} with {row['model']}" for row in table3 if row["same"])
    cells_ = f"The paper's own tasks and models: {same}." if same else "No cell of this study is one of the paper's."
    return f"No number of the paper is in this table. {cells_}"


def accuracy(row: Mapping[str, Any]) -> str:
    """`62.3 ± 1.5 [58.0, 66.4]`: mean, sd over demonstration sets where there are several, interval; all in per cent."""
    mean, space, interval = cells("label_accuracy", row).partition(" ")
    sd = f"{NARROW}±{NARROW}{100 * row['sd']:.1f}" if finite(row.get("sd")) else ""
    return f"{mean}{sd}{space}{interval}"


# ---- one model on one task


def _part(
    found: Data, model: Data, task: Data, n: int, arms: Mapping[str, Data], styles: Mapping[str, Data], number: int
) -> Data:
    def mine(kind: str) -> list[Data]:
        return [row for row in found[kind] if (row["model"], row["task"]) == (model["name"], task["name"])]

    table, comparisons = mine("table"), mine("comparisons")
    names = list(dict.fromkeys(row["set"] for row in sorted(table, key=lambda r: r["domain"] != "in")))
    several = f" · {model['label']}" if len(found["models"]) > 1 else ""
    costs, even = mine("costs"), {(r["n"], r["arm"]): r for r in mine("break_even")}
    constants = [row for row in table if row["arm"] == "constant"]
    measured = [k for k in found["demos"] if any(row["n"] == k for row in table)]
    shown = n if n in measured else max(measured, default=n)
    return {
        "title": f"{task['title']}{several}",
        "id": f"part-{number}",
        "sets": [{"name": name, "rows": next(r["rows"] for r in table if r["set"] == name)} for name in names],
        "labels": len(task.get("labels") or ()),
        "pattern": task.get("pattern") or NO_VALUE,
        "untaught": [r for r in mine("taught") if not r["taught"]],
        "tables": [
            {
                "n": k,
                "open": k == shown,
                "rows": _rows(table, comparisons, names, k, arms, found["sets"]),
                "sets": names,
            }
            for k in measured
        ],
        "plots": _plots(table, costs, names, n, styles, constants, number),
        "legend": [arms[name] for name in arms if name != "constant" and any(row["arm"] == name for row in table)],
        "comparisons": [_comparison(row, arms, found["sets"]) for row in comparisons],
        "gap": _gap(mine("gap_closed"), names, arms),
        "costs": [
            {"n": k, **_cost_table([c for c in costs if c["n"] in (0, k)], even, k, arms, found["sets"])}
            for k in found["demos"]
            if any(c["n"] == k for c in costs)
        ],
    }


def _rows(
    table: Sequence[Data], comparisons: Sequence[Data], names: Sequence[str], n: int, arms: Mapping[str, Data],
    sets: Sequence[int],
) -> list[Data]:  # fmt: skip
    """One line for each arm: accuracy on each set, and how it stands against in-context."""
    lines = []
    for name, arm in arms.items():
        by_set = {row["set"]: row for row in table if row["arm"] == name and row["n"] in (0, n)}
        if not by_set:
            continue
        against = {
            row["set"]: _standing(row)
            for row in comparisons
            if (row["n"], row["a"], row["b"]) == (n, name, "in_context") and row["a"] != "in_context"
        }
        first = by_set.get(names[0], {})
        lines.append(
            {
                "arm": arm,
                "cells": [accuracy(by_set[s]) if s in by_set else NO_VALUE for s in names],
                "standing": [against.get(s) for s in names],
                "exact": cells("label_accuracy", {"mean": first.get("exact")}),
                "macro_f1": cells("macro_f1", {"mean": first.get("macro_f1")}),
                "few": _few(min(by_set.values(), key=lambda row: row["sets"]), sets),
            }
        )
    return lines


def _standing(row: Mapping[str, Any]) -> Data:
    sign, tone = READINGS[row["reading"]]
    difference = cells("label_accuracy", {"mean": row["difference"]}, sign=True)
    return {"text": f"{sign} {difference}", "tone": tone, "reading": row["reading"]}


def _comparison(row: Mapping[str, Any], arms: Mapping[str, Data], sets: Sequence[int]) -> Data:
    estimate = {"mean": row["difference"], "low": row["low"], "high": row["high"]}
    a, b = arms[row["a"]]["label"], arms[row["b"]]["label"]
    return {
        **{"n": row["n"], "set": row["set"], "pair": f"{a} minus {b}", "few": _few(row, sets)},
        "difference": cells("label_accuracy", estimate, sign=True),
        **{key: p_text(row[key]).replace(" ", NARROW) for key in ("p", "p_corrected")},
        "mcnemar": ", ".join(NO_VALUE if p is None else p_text(p).replace(" ", NARROW) for p in row["p_mcnemar"]),
        "reading": {"above": "higher", "below": "lower", "open": "no difference shown"}[row["reading"]],
        "tone": READINGS[row["reading"]][1],
    }


def _gap(rows: Sequence[Data], names: Sequence[str], arms: Mapping[str, Data]) -> Data:
    """Arms x (n, set) with the share of the teacher's gain, without the columns that are undefined, which are named."""
    columns = list(dict.fromkeys((row["n"], row["set"]) for row in rows))
    columns.sort(key=lambda c: (c[0], names.index(c[1])))
    reasons = {(row["n"], row["set"]): row["undefined"] for row in rows if "undefined" in row}
    kept = [column for column in columns if column not in reasons]
    values = {(row["arm"], row["n"], row["set"]): cells("gap_closed", row) for row in rows}
    return {
        "heads": [f"{name}, n = {n}" for n, name in kept],
        "rows": [
            {"arm": arm, "cells": [values.get((key, *column), NO_VALUE) for column in kept]}
            for key, arm in arms.items()
            if any((key, *column) in values for column in kept)
        ],
        "undefined": [f"{name}, n = {n}: {str(reason).rstrip('.')}." for (n, name), reason in reasons.items()],
    }


def _cost_table(
    costs: Sequence[Data], even: Mapping[tuple[int, str], Data], n: int, arms: Mapping[str, Data], sets: Sequence[int]
) -> Data:
    kinds = [key for key in COSTS if any(finite(cost.get(key)) for cost in costs)]
    rows = []
    for cost in costs:
        back = even.get((n, cost["arm"]))
        requests = (
            NO_VALUE if back is None else "never" if back["requests"] is None else count(math.ceil(back["requests"]))
        )
        numbers = [*(count(cost.get(key)) for key in kinds), requests]
        rows.append({"arm": arms[cost["arm"]], "cells": numbers, "few": _few(cost, sets)})
    return {"heads": [*(COSTS[key] for key in kinds), "pays off after requests"], "rows": rows}


def count(value: Any) -> str:
    """A count or a measure for people: 1234 -> 1,234; 5.1e12 -> 5.1T."""
    if not finite(value):
        return NO_VALUE
    for limit, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{letter}"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def _plots(
    table: Sequence[Data], costs: Sequence[Data], names: Sequence[str], n: int, styles: Mapping[str, Data],
    constants: Sequence[Data], number: int,
) -> list[tuple[str, Any]]:  # fmt: skip
    from ctxdistill.plots import cost_plot, demos_plot, domain_plot

    at = {(row["arm"], row["set"]): _ends(row) for row in table if row["n"] in (0, n) and row["arm"] != "constant"}
    level = {row["set"]: row["mean"] for row in constants}
    plots: list[tuple[str, Any]] = []
    for k, name in enumerate(names[1:]):
        points = [
            {"x": at[arm, names[0]], "y": at[arm, name], **styles[arm]}
            for arm in styles
            if (arm, names[0]) in at and (arm, name) in at
        ]
        constant = (level[names[0]], level[name]) if {names[0], name} <= level.keys() else None
        if points:
            plot = domain_plot(points, constant, f"domain-{number}-{k}")
            plots.append((f"{names[0]} against {name}, {n} demonstrations", plot))
    by_arm: dict[str, list[Any]] = {}
    for row in table:
        if row["set"] == names[0] and row["arm"] != "constant" and not styles[row["arm"]]["hollow"]:
            by_arm.setdefault(row["arm"], []).append((row["n"] or None, *_ends(row)))
    if len({p[0] for points in by_arm.values() for p in points} - {None}) > 1:
        series = [{"points": points, **styles[arm]} for arm, points in by_arm.items()]
        plots.append(("Accuracy over demonstrations", demos_plot(series, level.get(names[0]), f"demos-{number}")))
    for key, what in (("flops", "FLOPs of teacher and training"), ("labelled", "labelled examples")):
        points = [
            {"x": cost[key], "y": at[cost["arm"], names[0]], **styles[cost["arm"]]}
            for cost in costs
            if cost["n"] in (0, n) and finite(cost.get(key)) and (cost["arm"], names[0]) in at
        ]
        if len({point["x"] for point in points} - {0}) > 1:
            title = f"Accuracy against {what}, {n} demonstrations"
            plots.append((title, cost_plot(points, level.get(names[0]), what, f"{key}-{number}")))
    return plots


def _ends(row: Mapping[str, Any]) -> tuple[float, float, float]:
    return row["mean"], row["low"], row["high"]


# ---- over all tasks


def _retention(found: Data, arms: Mapping[str, Data]) -> list[Data]:
    """Trained arms: perplexity and format-following over all tasks and n, and the worst cell."""
    rows = []
    for name, arm in arms.items():
        mine = [row for row in found["retention"] if row["arm"] == name]
        if not mine:
            continue
        worst = max((r["perplexity"] for r in mine if finite(r["perplexity"])), default=None)
        rows.append(
            {
                "arm": arm,
                "cells": [
                    count(_mean(r["perplexity"] for r in mine)),
                    count(_mean(r["base_perplexity"] for r in mine)),
                    count(worst),
                    *(cells("format", {"mean": _mean(r[key] for r in mine)}) for key in ("format", "base_format")),
                    *(
                        cells("pass_at_1", {"mean": _mean(r.get(key) for r in mine)})
                        for key in ("pass_at_1", "base_pass_at_1")
                        if found["formats"].get("programs")
                    ),
                ],
            }
        )
    return rows


def _mean(values: Iterable[Any]) -> float | None:
    known = [value for value in values if finite(value)]
    return sum(known) / len(known) if known else None


def _missing(missing: Sequence[Mapping[str, Any]]) -> list[Data]:
    """Cells without scores, grouped by what is known about them: the first line of the reason but for its numbers."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for cell in missing:
        kind = re.sub(r"(?<![\w.-])\d[\d,.]*(?![\w-])", "…", (cell["reason"] or NO_VALUE).split("\n")[0])
        groups.setdefault((cell["status"], kind), []).append(cell)
    return [
        {
            **{"status": status, "cells": [cell["cell"] for cell in group], "first": group[0]["reason"] or NO_VALUE},
            "kind": kind
            if len({cell["reason"] for cell in group}) > 1
            else (group[0]["reason"] or NO_VALUE).split("\n")[0],
        }
        for (status, kind), group in groups.items()
    ]
