"""Two or more finished runs side by side, with paired tests on the rows that they share.

In: run folders (recipe.json, evaluation.json, scores.jsonl, read only). Out: plain data and one page. Invariants: two runs
are paired by row id, which depends on a row's content alone, and only where a difference means something: task metrics on
the same rows, fidelity only against the same teacher on the same completions; what is not compared is said, with the
reason; the p-values of one page are corrected together (Holm); nothing here imports torch.
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np

from ctxdistill import stats
from ctxdistill.errors import RunError
from ctxdistill.plots import interval_plot
from ctxdistill.report import environment, read_run
from ctxdistill.results import METRICS, NO_VALUE, Data, cells, finite, metric_label, verdict
from ctxdistill.rundir import RunDir, reading, write_atomic

LEAST = 8
"""Shared rows below which no test is made."""
FEW = 30
"""Shared rows below which a difference that matters can easily be missed."""
RESAMPLES = 10_000
NAMES = {
    "model.name": "model", "context.kinds": "context", "completions.source": "completions", "train.loss": "loss",
    "train.epochs": "epochs", "train.lr": "learning rate", "lora.rank": "rank", "train.seed": "seed",
}  # fmt: skip
"""What some recipe keys are called on the page; the others have the names that they have in a recipe."""
ELSEWHERE = {"context", "gate", "cost", "behaviour", "teacher"}
"""Sections that are shown otherwise, or change nothing in the numbers of the page."""


def compare(folders: Sequence[str | Path]) -> Data:
    """`runs` (what each is and measured), `table` (rows of text, a cell per run), `pairs` (differences with tests),
    `refused` (what is not compared, and why) and `notes`.

    Raises: `RunError` for fewer than two runs, for one that is named twice, and for one that is not finished.
    """
    if len({Path(f).resolve() for f in folders}) < len(folders) or not 2 <= len(folders) <= 26:
        raise RunError(
            "these runs cannot be compared", expected="2 to 26 different run folders", found=" ".join(map(str, folders))
        )
    with reading(" and ".join(map(str, folders))):
        return _compare(folders)


def _compare(folders: Sequence[str | Path]) -> Data:
    runs = [_load(letter, folder) for letter, folder in zip(string.ascii_uppercase, folders, strict=False)]
    pairs: list[Data] = []
    refused: list[Data] = []
    for a, b in combinations(runs, 2):
        _pair(a, b, pairs, refused)
    for pair, p in zip(pairs, stats.holm([pair["p"] for pair in pairs]), strict=True):
        pair["p_holm"] = p
    return {
        "runs": [{key: value for key, value in run.items() if key != "scores"} for run in runs],
        "table": _table(runs),
        "pairs": [_in_words(pair) for pair in pairs],
        "refused": refused,
        "notes": _notes(runs, pairs),
    }


def write_page(found: Data, path: Path) -> Path:
    """Write the page of what `compare` found. Raises: `RunError` when it cannot be written."""
    points = [(run["letter"], run["evaluation"].get("kl_closed")) for run in found["runs"]]
    with reading(" and ".join(run["path"] for run in found["runs"])):
        view = {**found, "plot": interval_plot([p for p in points if p[1]], "KL closed %", "closed")}
        page = environment("html").get_template("compare.html.j2").render(view)
    write_atomic(path, page)
    return path


# -- one run ----------------------------------------------------------------------------------------------------------


def _load(letter: str, folder: str | Path) -> Data:
    run = RunDir.existing(folder)
    recipe, evaluation = read_run(run)
    scores = [line for line in run.read_jsonl("scores.jsonl") if line["arm"] in ("zero_shot", "distilled")]
    if "distilled" not in evaluation["arms"] or not any(line["arm"] == "distilled" for line in scores):
        raise RunError(f"{folder} has no distilled arm", fix=run.finish)
    model, context = recipe["model"], recipe.get("context") or {}
    found = verdict(evaluation)
    return {
        "letter": letter,
        "path": str(folder),
        "name": recipe["recipe"].get("name") or "unnamed",
        "model": model.get("name"),
        "weights": model.get("weights_sha256"),
        "teacher": [model.get(k) for k in ("weights_sha256", "template_sha256", "dtype")] + [context.get("sha256")],
        "context": context.get("sha256"),
        "context_tokens": context.get("tokens"),
        "rows": evaluation.get("rows"),
        "level": found["level"],
        "sentence": found["sentence"],
        "settings": _settings(recipe),
        "train_rows": (recipe.get("rows") or {}).get("train"),
        "evaluation": evaluation,
        "scores": {arm: {line["row"]: line for line in scores if line["arm"] == arm} for arm in ("zero_shot", "distilled")},
    }  # fmt: skip


def _settings(recipe: Data) -> dict[str, str]:
    """The recipe's values, as text by the name that the page has for their key."""
    kinds = " + ".join((recipe.get("context") or {}).get("kinds") or [])
    found = {NAMES["context.kinds"]: kinds or NO_VALUE}
    for section, values in recipe["recipe"].items():
        for key, value in values.items() if isinstance(values, dict) and section not in ELSEWHERE else ():
            place = f"{section}.{key}"
            found[NAMES.get(place, place)] = NO_VALUE if value is None else shorten(str(value), 60, placeholder=" …")
    return found


def _table(runs: Sequence[Data]) -> list[Data]:
    """Rows of the table: `label`, `group` and a cell per run."""
    rows = []

    def add(group: str, label: str, values: Sequence[str]) -> None:
        if any(value != NO_VALUE for value in values):
            rows.append({"group": group, "label": label, "cells": list(values)})

    def arm(run: Data, name: str, metric: str) -> Any:
        return run["evaluation"]["table"].get(name, {}).get(metric)

    add("what it is", "verdict", [str(run["level"]) for run in runs])
    for name in dict.fromkeys([*NAMES.values(), *(name for run in runs for name in run["settings"])]):
        values = [run["settings"].get(name, NO_VALUE) for run in runs]
        if len(set(values)) > 1:
            add("what it is", name, values)
    add("what it is", "context tokens", [_count(run["context_tokens"]) for run in runs])
    add("what it is", "training rows", [_count(run["train_rows"]) for run in runs])
    add("what it is", "held-out rows", [_count(run["rows"]) for run in runs])
    add(
        "fidelity",
        metric_label("kl_closed"),
        [cells("kl_closed", run["evaluation"].get("kl_closed")) for run in runs],
    )
    for metric in ("kl", "top1"):
        add("fidelity", metric_label(metric), [cells(metric, arm(run, "distilled", metric)) for run in runs])
    for metric in _task_metrics(runs):
        for name, who in (("distilled", ""), ("in_context", ", its teacher"), ("zero_shot", ", without context")):
            add("task", f"{metric_label(metric)}{who}", [cells(metric, arm(run, name, metric)) for run in runs])
    elsewhere = [(run["evaluation"].get("behaviour") or {}).get("unrelated") or {} for run in runs]
    add("retention", "KL to the base model, unrelated prompts", [cells("kl", one.get("kl")) for one in elsewhere])
    add("retention", "the same answer there %", [cells("exact_match", one.get("same")) for one in elsewhere])
    for metric in ("prompt_tokens", "latency_ms"):
        for name, who in (("distilled", ""), ("in_context", ", its teacher")):
            add("cost", f"{metric_label(metric)}{who}", [cells(metric, arm(run, name, metric)) for run in runs])
    costs = [run["evaluation"].get("cost") or {} for run in runs]
    add("cost", "seconds to distil", [_count((cost.get("seconds") or {}).get("total")) for cost in costs])
    for way, key in (("time", "break_even_requests"), ("tokens", "break_even_tokens")):
        requests = [
            math.ceil(n) if finite(n := cost.get(key)) else None for cost in costs
        ]  # not before the last one is done
        add("cost", f"pays off after requests ({way})", [_count(n) for n in requests])
    training = [run["evaluation"].get("training") or {} for run in runs]
    add("cost", "adapter parameters", [_count(part.get("trainable_parameters")) for part in training])
    return rows


def _task_metrics(runs: Sequence[Data]) -> list[str]:
    """Metrics of answers that any run has, in the order of the result table."""
    apart = {"kl", "kl_closed", "top1", "prompt_tokens", "latency_ms", "gap_closed"}
    there = dict.fromkeys(name for run in runs for name in run["evaluation"]["table"]["distilled"])
    known = [name for name in METRICS if name in there]
    return [name for name in [*known, *(name for name in there if name not in METRICS)] if name not in apart]


def _count(value: Any) -> str:
    return f"{round(value):,}" if finite(value) else NO_VALUE


# -- two runs ---------------------------------------------------------------------------------------------------------


def _pair(a: Data, b: Data, pairs: list[Data], refused: list[Data]) -> None:
    """Add the differences a - b, and what cannot be compared."""
    one, two = (run["scores"]["distilled"] for run in (a, b))
    shared = [row for row in one if row in two]
    names = f"{a['letter']} and {b['letter']}"
    if len(shared) < LEAST:
        why = f"they share {len(shared)} held-out rows (of {len(one)} and {len(two)}); at least {LEAST} are needed"
        refused.append({"runs": names, "what": "everything", "why": why})
        return
    if reason := _other_teacher(a, b, shared):
        refused.append({"runs": names, "what": "fidelity", "why": reason})
    else:
        pairs.append(_closed(a, b, shared))
    metrics = [m for m in _task_metrics([a, b]) if m != "macro_f1"]  # a statistic of all rows, not a row's
    for metric in metrics:
        values = [(one[row]["metrics"].get(metric), two[row]["metrics"].get(metric)) for row in shared]
        judged = [(x, y) for x, y in values if finite(x) and finite(y)]
        if len(judged) < LEAST:
            why = f"{len(judged)} shared rows have it in both runs; at least {LEAST} are needed"
            refused.append({"runs": names, "what": metric_label(metric), "why": why})
            continue
        x, y = np.array(judged, dtype=float).T
        binary = set(np.unique([x, y])) <= {0.0, 1.0}
        difference = stats.paired_difference(x, y, resamples=RESAMPLES, seed=stats.SEED)
        p = stats.mcnemar(x, y) if binary else stats.paired_p(x, y, resamples=RESAMPLES, seed=stats.SEED)
        pairs.append(_found(a, b, metric, difference, p, "McNemar" if binary else "sign flips"))


def _other_teacher(a: Data, b: Data, shared: Sequence[str]) -> str:
    """Why the two distances to a teacher are not distances to the same one; empty when they are."""
    if a["weights"] != b["weights"]:
        return "the models differ, so each is measured against a teacher of its own"
    if a["context"] != b["context"]:
        return "the contexts differ, so each is measured against a teacher of its own"
    if a["teacher"] != b["teacher"]:
        return "the chat templates or types of the weights differ, so each is measured against a teacher of its own"
    lines = [[run["scores"][arm].get(row) for row in shared] for run in (a, b) for arm in ("zero_shot", "distilled")]
    if any(line is None for column in lines for line in column):
        return "the base model was not scored on all shared rows"
    if any(len({line["tokens"] for line in at}) > 1 for at in zip(*lines, strict=True)):
        return "the teacher's completions have other lengths (eval.max_new_tokens may differ)"
    base = [np.array([line["kl"] for line in column]) for column in (lines[0], lines[2])]
    if not np.allclose(base[0], base[1], rtol=1e-2, atol=1e-3):
        return "the base model is not equally far from the teacher in both runs (prompts or completions differ)"
    if stats.RESOLUTION * sum(line["tokens"] for line in lines[0]) >= (base[0] * [x["tokens"] for x in lines[0]]).sum():
        return "the base model already is the teacher"
    return ""


def _closed(a: Data, b: Data, shared: Sequence[str]) -> Data:
    """Difference of the shares of the KL that are closed, a - b, over the same base: (KL of b - KL of a) / KL of base."""
    tokens = np.array([a["scores"]["distilled"][row]["tokens"] for row in shared], dtype=float)

    def sums(run: Data, arm: str) -> Any:
        return tokens * [run["scores"][arm][row]["kl"] for row in shared]

    base, x, y = sums(a, "zero_shot"), sums(a, "distilled"), sums(b, "distilled")
    # 1 - (base - (y - x)) / base is what is asked for, so the one estimator of `kl_closed` serves here, too
    difference = stats.kl_closed(base - (y - x), base, tokens, resamples=RESAMPLES, seed=stats.SEED)
    assert difference is not None  # `_other_teacher` has seen to it
    p = stats.paired_p(y, x, resamples=RESAMPLES, seed=stats.SEED)
    return _found(a, b, "kl_closed", difference, p, "sign flips")


def _found(a: Data, b: Data, metric: str, difference: stats.Estimate, p: float, test: str) -> Data:
    return {
        "a": a["letter"], "b": b["letter"], "metric": metric, "rows": difference.n, "difference": difference.to_dict(),
        "test": test, "p": p, "p_holm": 1.0,
    }  # fmt: skip


def _in_words(pair: Data) -> Data:
    """A difference with its test as text, too: `runs`, `label`, `text`, `p_text`, `p_holm_text` and `reading`."""
    metric, label, p = pair["metric"], metric_label(pair["metric"]), pair["p_holm"]
    mean = pair["difference"]["mean"]
    shown = p < 0.05 and mean != 0
    return {
        **pair,
        "runs": f"{pair['a']} minus {pair['b']}",
        "label": label,
        "text": cells(metric, pair["difference"], sign=True, unit="points" if label.endswith("%") else ""),
        "p_text": p_text(pair["p"]),
        "p_holm_text": p_text(p),
        "reading": f"{pair['a' if mean > 0 else 'b']} is higher" if shown else "no difference shown",
    }


def p_text(p: float) -> str:
    """`0.012`, `< 0.001`."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _notes(runs: Sequence[Data], pairs: Sequence[Data]) -> list[str]:
    """What a reader must know before believing a difference."""
    notes = []
    if len({run["weights"] for run in runs}) > 1:
        notes.append("The models differ: a difference is one of model and method together.")
    if len({run["context"] for run in runs}) > 1:
        notes.append("The contexts differ: a difference is one of context and method together.")
    ids = [set(run["scores"]["distilled"]) for run in runs]
    if any(found != ids[0] for found in ids):
        notes.append(
            "The held-out rows differ: the table's columns are over different rows; the tests use shared rows only."
        )
    if small := sorted({pair["rows"] for pair in pairs if pair["rows"] < FEW}):
        notes.append(f"With {small[0]} shared rows, only large differences can be shown.")
    if any("latency_ms" in run["evaluation"]["table"]["distilled"] for run in runs):
        notes.append("Times were measured in separate runs, maybe on other machines: compare them within a run.")
    notes.append("Each run is one training with one seed: intervals and tests are over rows, not over trainings.")
    return notes
