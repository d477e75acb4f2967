"""What a study found: tables, paired comparisons, costs, and what the paper's claims come to.

In: study_recipe.json and cells/*/{cell.json, scores.jsonl}. Out: plain data, also written as study.json. Invariants:
arms are compared on the same rows and the same demonstration sets; an interval is over both (stats.crossed_mean) and a
p-value is over rows, corrected for all comparisons of the study (Holm); a difference counts only where both agree; what
the data cannot decide is called that.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ctxdistill import claims, files
from ctxdistill.errors import DataError, RunError
from ctxdistill.results import finite
from ctxdistill.rundir import RunDir
from ctxdistill.stats import (
    SEED,
    Estimate,
    constant_baseline,
    crossed_closed,
    crossed_difference,
    crossed_mean,
    holm,
    macro_f1,
    mcnemar,
    sign_flip,
)

Data = dict[str, Any]
Key = tuple[str, str, int, str]
"""Model, task, number of demonstrations (0: none), arm."""

RESAMPLES = 2000
RETAINED = ("perplexity", "format", "pass_at_1")
CONSTANT: Data = {
    "name": "constant",
    "label": "constant answer",
    "about": "Always the answer that is right most often.",
    "family": "baseline",
    "control_of": None,
}


def analyse(folder: str | Path, paper_csv: str | Path | None = None) -> Data:
    """Everything that the page of a study shows; also written to `study.json` in the folder.

    Args:
        folder: a study's folder, finished or not.
        paper_csv: the paper's runs, one a line (`model,context_set_id,dataset,context_size,accuracy_teacher,
            accuracy_indomain,accuracy_ood`), to be shown beside ours.

    Raises: `RunError` when the folder is no study's or its cells do not fit together, `DataError` for a broken CSV.
    """
    study = Study.read(Path(folder))
    paper = papers_runs(Path(paper_csv)) if paper_csv else None
    comparisons, table, costs = _comparisons(study), _table(study), _costs(study)
    taught = claims.taught(comparisons)
    words = claims.Words(study.recipe, study.arms)
    found = {
        "name": study.recipe["name"],
        **{key: study.recipe.get(key) for key in ("created", "versions", "models", "tasks", "demos", "sets")},
        "arms": study.arms,
        "main": study.recipe.get("main", "correct"),
        "rows": sum(len(scores.rows) for scores in study.reference.values()),
        "table": table,
        "comparisons": comparisons,
        "summary": _summary(study, comparisons),
        "gap_closed": _gap_closed(study),
        "costs": costs,
        "break_even": _break_even(study, costs),
        "retention": _retention(study),
        "formats": _formats(study),
        "taught": taught,
        "claims": claims.verdicts(comparisons, costs, taught, words),
        "limits": claims.limits(table, taught, words, len(study.recipe["sets"]), study.drawn_anew),
        "missing": study.missing,
        "paper": paper,
    }
    RunDir(folder).write_json("study.json", found)
    return found


# ---- reading


@dataclass(frozen=True)
class Scores:
    """One arm's answers on one set of rows, all of the same length."""

    rows: tuple[str, ...]
    labels: tuple[str, ...]
    predictions: tuple[str, ...] | None
    """None for an arm that is a mean over several contexts."""
    correct: NDArray[np.float64]  # [N], 0 or 1, or a share for an arm that is a mean over several contexts
    exact: NDArray[np.float64] | None  # [N], or None where there is no text to compare (a classification head)


@dataclass
class Study:
    """The grid and what its cells hold. `cells` and `scores` are by key and demonstration set (None: has none)."""

    recipe: Data
    arms: list[Data]
    cells: dict[Key, dict[int | None, Data]] = field(default_factory=dict)
    scores: dict[Key, dict[int | None, dict[str, Scores]]] = field(default_factory=dict)
    reference: dict[tuple[str, str, int | None], Scores] = field(default_factory=dict)
    """By task, name of the rows, and demonstration set where the rows depend on it (the paper's way of choosing them)."""
    missing: list[Data] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> Study:
        """Raises `RunError` when the folder is no study's, or rows differ between cells."""
        if not (folder / "study_recipe.json").is_file():
            raise RunError(
                f"{folder} is not a study's folder: study_recipe.json is missing",
                expected="a folder written by `ctxdistill study`",
                found="no such folder" if not folder.is_dir() else "other files",
            )
        recipe = RunDir(folder).read_json("study_recipe.json")
        recipe["demos"] = sorted(recipe["demos"])
        arms = [*([] if any(a["name"] == "constant" for a in recipe["arms"]) else [CONSTANT]), *recipe["arms"]]
        study = cls(recipe, arms)
        for path in sorted((folder / "cells").glob("*/cell.json")):
            study._add(RunDir(path.parent))
        study._add_constants()
        study._find_holes()
        return study

    def _add(self, folder: RunDir) -> None:
        cell = folder.read_json("cell.json")
        if not self._in_grid(cell):
            return  # left from a larger grid in the same folder
        lines = folder.read_jsonl("scores.jsonl") if cell["status"] == "done" else []
        if not lines:
            reason = cell.get("reason") or ("no scores" if cell["status"] == "done" else None)
            self.missing.append({"cell": cell["id"], "status": cell["status"], "reason": reason})
        key = (cell["model"], cell["task"], int(cell["n"] or 0), cell["arm"])
        self.cells.setdefault(key, {})[cell.get("set")] = cell
        by_set: dict[str, list[Data]] = {}
        for line in lines:
            by_set.setdefault(line["set"], []).append(line)
        for name, part in by_set.items():
            scores = _scores(part, self.recipe.get("main", "correct"))
            known = self.reference.setdefault((cell["task"], name, cell.get("set") if self.rows_vary else None), scores)
            if (known.rows, known.labels) != (scores.rows, scores.labels):
                raise RunError(
                    f"cell {cell['id']} was measured on other rows of {name} than the cells before it",
                    expected=f"{len(known.rows)} rows, first {known.rows[0]}",
                    found=f"{len(scores.rows)} rows, first {scores.rows[0]}",
                    fix=f"delete {folder.path} and run the study again: it measures what is missing",
                )
            self.scores.setdefault(key, {}).setdefault(cell.get("set"), {})[name] = scores

    def _in_grid(self, cell: Mapping[str, Any]) -> bool:
        grid = self.recipe
        named = all(any(known["name"] == cell[key] for known in grid[f"{key}s"]) for key in ("model", "task", "arm"))
        return named and (cell.get("set") is None or (cell["n"] in grid["demos"] and cell["set"] in grid["sets"]))

    def _add_constants(self) -> None:
        own = {(task, name) for task, name, which in self.reference if which is not None}
        for (task, name, which), rows in self.reference.items():
            if which is None and (task, name) in own:
                continue  # those of one of the demonstration sets
            answer = constant_baseline(rows.labels)[0]
            right = np.array([label == answer for label in rows.labels], dtype=np.float64)
            scores = Scores(rows.rows, rows.labels, (answer,) * len(right), right, None)
            for model in self.recipe["models"]:
                self.scores.setdefault((model["name"], task, 0, "constant"), {}).setdefault(which, {})[name] = scores

    @property
    def rows_vary(self) -> bool:
        """Whether each demonstration set has evaluation rows of its own."""
        return bool(((self.recipe.get("study") or {}).get("eval") or {}).get("choose") == "paper")

    def _find_holes(self) -> None:
        """Cells of the grid that nothing was written for yet."""
        for model, task in self.pairs():
            for arm in (a["name"] for a in self.recipe["arms"] if a["name"] != "constant"):
                if (model, task, 0, arm) in self.cells:
                    continue
                for n in self.recipe["demos"]:
                    there = self.cells.get((model, task, n, arm), {})
                    absent = [s for s in self.recipe["sets"] if s not in there]
                    if absent and None not in there:
                        cell = f"{model} {task} {arm}, n = {n}, set {', '.join(map(str, absent))}"
                        self.missing.append({"cell": cell, "status": "not run", "reason": "the study is not finished"})

    def pairs(self) -> Iterator[tuple[str, str]]:
        for model in self.recipe["models"]:
            for task in self.recipe["tasks"]:
                yield model["name"], task["name"]

    def set_names(self, task: str) -> list[str]:
        """The task's evaluation sets that were measured, in domain first."""
        names = list(dict.fromkeys(name for of, name, _ in self.reference if of == task))
        return sorted(names, key=lambda name: (self.domain(task, name) != "in", names.index(name)))

    def domain(self, task: str, name: str) -> Literal["in", "out"]:
        known = next(t for t in self.recipe["tasks"] if t["name"] == task)
        return "out" if name in known.get("ood", ()) else "in"

    def names(self, *families: str) -> list[str]:
        return [arm["name"] for arm in self.arms if arm["family"] in families]

    def ordered(self, rows: Sequence[Data]) -> list[Data]:
        """Rows with model, task, n and arm, in the order of the grid."""
        names = [[x["name"] for x in part] for part in (self.recipe["models"], self.recipe["tasks"], self.arms)]
        models, tasks, arms = ({name: i for i, name in enumerate(part)} for part in names)
        return sorted(rows, key=lambda r: (models[r["model"]], tasks[r["task"]], r["n"], arms[r["arm"]]))

    def key(self, model: str, task: str, n: int, arm: str) -> Key:
        """The arm's key at n demonstrations: that without demonstrations for arms that use none."""
        bare = (model, task, 0, arm)
        return bare if bare in self.scores or bare in self.cells else (model, task, n, arm)

    def matched(
        self, model: str, task: str, n: int, name: str, *arms: str
    ) -> tuple[list[int], list[NDArray[np.float64]]] | None:
        """Demonstration sets that all arms have, on the same rows, and each arm's scores [S, N]; an arm without
        demonstrations has the same ones for all sets that were measured on its rows.

        None when an arm was not measured or they have no demonstration set in common.
        """
        found = [
            {s: by[name] for s, by in self.scores.get(self.key(model, task, n, arm), {}).items() if name in by}
            for arm in arms
        ]
        if not all(found):
            return None
        with_sets = [set(by) for by in found if None not in by]
        sets = sorted(s for s in set.intersection(*with_sets) if s is not None) if with_sets else []
        pairs = {s: [by[s] if s in by else by[None] for by in found] for s in sets}
        pairs = {s: scores for s, scores in pairs.items() if len({one.rows for one in scores}) == 1}
        if not pairs:
            return None
        return list(pairs), [np.stack([one.correct for one in same]) for same in zip(*pairs.values(), strict=True)]

    @property
    def drawn_anew(self) -> list[tuple[str, str]]:
        """Tasks and names of rows that are other ones for another demonstration set."""
        rows: dict[tuple[str, str], set[tuple[str, ...]]] = {}
        for (task, name, _), scores in self.reference.items():
            rows.setdefault((task, name), set()).add(scores.rows)
        return [where for where, different in rows.items() if len(different) > 1]


def _scores(lines: Sequence[Mapping[str, Any]], main: str) -> Scores:
    """`main`: what counts as right, `correct` or `exact` (which a classification head has not)."""
    exact, predictions = ([line.get(key) for line in lines] for key in ("exact", "prediction"))
    return Scores(
        tuple(str(line["row"]) for line in lines),
        tuple(str(line["label"]) for line in lines),
        None if None in predictions else tuple(map(str, predictions)),
        np.array([line["correct"] if None in exact else line[main] for line in lines], dtype=np.float64),
        None if None in exact else np.array(exact, dtype=np.float64),
    )


# ---- tables


def _table(study: Study) -> list[Data]:
    """Every arm on every set of rows: interval over demonstration sets and rows, sd over demonstration sets."""
    rows = []
    for (model, task, n, arm), by_set in study.scores.items():
        for name in study.set_names(task):
            parts = {s: by[name] for s, by in sorted(by_set.items(), key=lambda item: item[0] or 0) if name in by}
            if not parts:
                continue
            scores = list(parts.values())
            estimate = crossed_mean([s.correct for s in scores], resamples=RESAMPLES, seed=SEED)
            means = [float(s.correct.mean()) for s in scores]
            exact = [float(s.exact.mean()) for s in scores if s.exact is not None]
            f1 = [macro_f1(s.labels, s.predictions) for s in scores if s.predictions is not None]
            of_teacher = [
                cell["teacher"]["accuracy"] for cell in study.cells.get((model, task, n, arm), {}).values()
                if (cell.get("teacher") or {}).get("accuracy") is not None
            ]  # fmt: skip
            rows.append(
                {
                    **{"model": model, "task": task, "n": n, "arm": arm, "set": name},
                    "domain": study.domain(task, name),
                    **{"mean": estimate.mean, "low": estimate.low, "high": estimate.high},
                    "sd": float(np.std(means, ddof=1)) if len(means) > 1 else None,
                    "exact": float(np.mean(exact)) if exact else None,
                    "macro_f1": float(np.mean(f1)) if f1 else None,
                    **{"sets": len(parts), "rows": estimate.n, "per_set": means},
                    "teacher": float(np.mean(of_teacher)) if of_teacher else None,
                }
            )
    return study.ordered(rows)


def _pairs(study: Study) -> list[tuple[str, str]]:
    """Which arms are compared: what was decided before looking, so that the correction counts all of it."""
    tuned, prompts = study.names("finetune"), study.names("prompt")
    pairs = [(a, b) for a in study.names("distill") for b in ("zero_shot", *prompts, *tuned)]
    pairs += [(a, b) for i, a in enumerate(tuned) for b in ("zero_shot", "in_context", *tuned[:i])]
    pairs += [(a, b) for a in prompts for b in ("constant", "zero_shot", "in_context") if a != b]
    pairs += [(arm["name"], arm["control_of"]) for arm in study.arms if arm.get("control_of")]
    return pairs


def _comparisons(study: Study) -> list[Data]:
    rows = []
    for model, task in study.pairs():
        for name in study.set_names(task):
            for n in study.recipe["demos"]:
                for a, b in _pairs(study):
                    matched = study.matched(model, task, n, name, a, b)
                    if not matched:
                        continue
                    x, y = matched[1]  # [S, N]
                    difference = crossed_difference(x, y, resamples=RESAMPLES, seed=SEED)
                    rows.append(
                        {
                            **{"model": model, "task": task, "n": n, "set": name},
                            **{"domain": study.domain(task, name), "a": a, "b": b},
                            **{"difference": difference.mean, "low": difference.low, "high": difference.high},
                            "p": sign_flip(x - y),
                            "p_mcnemar": [_mcnemar(one, other) for one, other in zip(x, y, strict=True)],
                            **{"sets": len(x), "rows": difference.n},
                        }
                    )
    for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_corrected"] = p
        row["reading"] = _reading(row)
    return rows


def _mcnemar(x: NDArray[np.float64], y: NDArray[np.float64]) -> float | None:
    """None for scores that are means over several contexts."""
    return mcnemar(x, y) if np.isin([x, y], (0.0, 1.0)).all() else None


def _reading(row: Data) -> str:
    """`above` or `below` when corrected p-value (over rows) and interval (over sets, too) agree; else `open`."""
    if row["p_corrected"] >= claims.LEVEL:
        return "open"
    return "above" if row["low"] > 0 else "below" if row["high"] < 0 else "open"


def _summary(study: Study, comparisons: Sequence[Data]) -> list[Data]:
    """How often each arm was above and below its yardsticks, over all models, tasks and n."""
    counts: dict[tuple[str, str, str], Data] = {}
    for row in comparisons:
        key = (row["a"], row["b"], row["domain"])
        count = counts.setdefault(
            key, {"arm": key[0], "against": key[1], "domain": key[2], "above": 0, "below": 0, "open": 0}
        )
        count[row["reading"]] += 1
    return list(counts.values())


def _gap_closed(study: Study) -> list[Data]:
    """(arm - zero-shot) / (in-context - zero-shot), for every arm that is neither."""
    rows = []
    for model, task in study.pairs():
        for name in study.set_names(task):
            for n in study.recipe["demos"]:
                for arm in study.names("prompt", "finetune", "distill", "control"):
                    if arm in ("in_context", "zero_shot"):
                        continue
                    matched = study.matched(model, task, n, name, arm, "zero_shot", "in_context")
                    if not matched:
                        continue
                    got = crossed_closed(*matched[1], resamples=RESAMPLES, seed=SEED)
                    where = {"model": model, "task": task, "n": n, "set": name, "domain": study.domain(task, name)}
                    if isinstance(got, Estimate):
                        rows.append({**where, "arm": arm, "mean": got.mean, "low": got.low, "high": got.high})
                    else:
                        rows.append({**where, "arm": arm, "undefined": got})
    return rows


def _costs(study: Study) -> list[Data]:
    """Means over demonstration sets of what each arm cost; `flops` is teacher's and training together."""
    rows = []
    for (model, task, n, arm), cells in study.cells.items():
        costs = [cell["cost"] for cell in cells.values() if cell["status"] == "done" and cell.get("cost")]
        names = dict.fromkeys(name for cost in costs for name, value in cost.items() if finite(value))
        means = {name: float(np.mean([c[name] for c in costs if finite(c.get(name))])) for name in names}
        if means:
            paid = [means[name] for name in ("teacher_flops", "train_flops") if name in means]
            where = {"model": model, "task": task, "n": n, "arm": arm, "sets": len(costs)}
            rows.append({**where, **means, "flops": sum(paid) if paid else None})
    return study.ordered(rows)


def _break_even(study: Study, costs: Sequence[Data]) -> list[Data]:
    """After how many requests an arm has cost fewer FLOPs than the context in every prompt."""
    of = {(c["model"], c["task"], c["n"], c["arm"]): c for c in costs}
    rows = []
    for cost in costs:
        key = (cost["model"], cost["task"], cost["n"])
        teacher = of.get((*key, "in_context"))
        if cost["arm"] not in study.names("finetune", "distill") or not teacher:
            continue
        with_context, without = teacher.get("request_flops"), cost.get("request_flops")
        if not (finite(cost["flops"]) and finite(with_context) and finite(without)):
            continue
        saved = with_context - without
        rows.append(
            {
                **{"model": key[0], "task": key[1], "n": key[2], "arm": cost["arm"], "against": "in_context"},
                **{"flops": cost["flops"], "saved": saved, "requests": cost["flops"] / saved if saved > 0 else None},
                "labels_more": cost.get("labelled", 0.0) - teacher.get("labelled", 0.0),
            }
        )
    return rows


def _retention(study: Study) -> list[Data]:
    """What training did to unrelated text: perplexity, format-following and programs, beside those of the base model."""
    measured: dict[Key, Data] = {}
    for key, cells in study.cells.items():
        found = [cell["retention"] for cell in cells.values() if cell.get("retention")]
        columns = {name: [r[name] for r in found if finite(r.get(name))] for name in RETAINED}
        if found:
            measured[key] = {name: float(np.mean(values)) if values else None for name, values in columns.items()}
    base = {key[0]: value for key, value in reversed(measured.items()) if key[3] == "zero_shot"}
    nothing = dict.fromkeys(RETAINED)
    rows: list[Data] = [
        {
            **{"model": model, "task": task, "n": n, "arm": arm, **value},
            **{f"base_{name}": number for name, number in base.get(model, nothing).items()},
        }
        for (model, task, n, arm), value in measured.items()
        if arm != "zero_shot"
    ]
    return study.ordered(rows)


def _formats(study: Study) -> Data:
    """How many prompts with instructions every cell was given, and how many were passed over to find these."""
    records = [c["retention"] for cells in study.cells.values() for c in cells.values() if c.get("retention")]
    names = {"rows": "format_rows", "passed_over": "format_passed_over", "programs": "program_rows"}
    return {name: max((r.get(key) or 0 for r in records), default=0) for name, key in names.items()}


def papers_runs(path: Path) -> list[Data]:
    """Means over the paper's runs, by model, data set and number of demonstrations. Raises `DataError` for a broken CSV."""
    columns = {"teacher": "accuracy_teacher", "in": "accuracy_indomain", "out": "accuracy_ood"}
    groups: dict[tuple[str, str, int], list[Mapping[str, str]]] = {}
    try:
        with io.TextIOWrapper(files.open_regular(path), encoding="utf-8", newline="") as file:
            for line in csv.DictReader(file):
                groups.setdefault((line["model"], line["dataset"], int(line["context_size"])), []).append(line)
        return [
            {
                **{"model": model, "task": task, "n": n, "runs": len(lines)},
                **{name: float(np.mean([float(line[column]) for line in lines])) for name, column in columns.items()},
            }
            for (model, task, n), lines in groups.items()
        ]
    except (OSError, KeyError, ValueError, TypeError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read the paper's runs from {path}",
            expected=f"a CSV with the columns model, dataset, context_size, {', '.join(columns.values())}",
            found=f"{type(error).__name__} {error}",
            fix="name another file with --paper, or leave it out",
        ) from None
