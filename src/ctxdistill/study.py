"""A study: every cell of a grid, one after the other or on a cluster, and what they come to.

In: a `Study`. Out: a folder with `study_recipe.json`, `draws/` (which rows were used), `cells/*/{cell.json, scores.jsonl}`,
`study.json` and the page. Invariants: a finished cell is never computed again, unless something that it depends on
changed; a cell that cannot be computed becomes a row with its reason and stops no other; the weights are loaded once for
each model, and every cell leaves them as it found them.
"""

from __future__ import annotations

import csv
import functools
import gc
import importlib.metadata
import io
import json
import logging
import os
import platform
import shlex
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ctxdistill import study_report
from ctxdistill.analysis import papers_runs
from ctxdistill.arms import Arm
from ctxdistill.cells import Bench, run_cell
from ctxdistill.cluster import fan_out
from ctxdistill.draws import Draw, draw, held_out, without
from ctxdistill.errors import CtxDistillError, FitError, ModelError, RunError, TrainError
from ctxdistill.grid import Cell, Study, cell_key, model_label
from ctxdistill.lm import LM
from ctxdistill.recipe import ModelSection
from ctxdistill.results import in_one_line, tally
from ctxdistill.retention import Format, format_following, formats, perplexity, problems, texts
from ctxdistill.rows import Row
from ctxdistill.rundir import Progress, RunDir, fingerprint, no_progress, reading, write_atomic
from ctxdistill.tasks import TASKS, Pattern, Task, load

log = logging.getLogger("ctxdistill")
GROWS = {"model.names", "tasks.names", "grid.demos", "grid.sets", "grid.arms"}
"""What may change without changing a cell."""


@dataclass(frozen=True)
class TaskRows:
    """A task's rows, as the study uses them."""

    task: Task
    pattern: Pattern
    train: list[Row]
    dropped: int
    """Training rows whose text occurs among the evaluation rows, or occurred before."""
    evaluation: dict[str, list[Row]]
    """Set name -> all its rows; the in-domain set first, under the task's name."""


def study(
    grid: Study,
    out: str | Path | None = None,
    *,
    retry: bool = False,
    paper_csv: str | Path | None = None,
    ray: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Run every cell of `grid` that is not finished, then write the page; returns its path.

    Args:
        out: the study's folder. Unset: `runs/<name>`.
        retry: compute cells again that failed or did not fit.
        paper_csv: the paper's runs, to be shown beside ours (see `analysis.analyse`).
        ray: the address of a Ray cluster that computes the cells, or `local`; unset: this process.

    Raises: `RunError` when the folder holds another study, or something else; `CtxDistillError` when the data or a model
    cannot be had; a cell's own trouble becomes its row. `RunError` in the end when no cell has a result.
    """
    if paper_csv:
        papers_runs(Path(paper_csv))  # an error now, and not when all is computed
    progress = progress or no_progress
    folder = RunDir(out or Path("runs") / name_of(grid))
    folder.lock()
    try:
        before = check_owner(folder, grid)
        tasks = {name: read_task(grid, name) for name in grid.tasks.names}
        cells = grid.cells()
        kept, stale = read_records(folder, grid)
        if stale:
            names = ", ".join(changed(before, grid.to_dict()))
            log.info("finished cells of other settings%s, computed again: %d", names and f" ({names})", len(stale))
        folder.write_json("study_recipe.json", describe(grid, tasks))
        todo = [cell for cell in cells if cell.id not in kept or (retry and kept[cell.id]["status"] != "done")]
        done = len(cells) - len(todo)
        if done:
            counts = Counter(record["status"] for record in kept.values() if record["status"] != "done")
            holes = "" if retry else tally(counts)
            log.info("%d of %d cells are finished%s", done, len(cells), holes and f" ({holes}: --retry)")
        if todo:
            progress(f"cells ({shown(grid, todo[0])})", done, len(cells))
        work = spread(ray, grid, folder, todo) if ray else alone(grid, folder, tasks, todo, progress)
        for number, cell in enumerate(work, 1):
            named = cell if ray else todo[min(number, len(todo) - 1)]  # alone, the one that comes next
            progress(f"cells ({shown(grid, named)})", done + number, len(cells))
        if grid.grid.draw == "paper":
            write_authors_table(folder, grid)
        page = study_report.write_report(folder.path, paper_csv)
    finally:
        folder.release()
    found = outcome(grid, folder.path)
    if not found["cells"]["done"]:
        first = next(iter(found["reasons"].values()))
        raise RunError(
            "no cell of the study has a result",
            found=f"{tally(found['cells'])}; the first: {in_one_line(first['reason'])}",
            fix=f"change what the reasons speak of, or compute the cells again with --retry; {page} lists all",
        )
    return page


def outcome(grid: Study, folder: str | Path) -> dict[str, Any]:
    """What came out of a study: `cells`, how many have a result (done), did not fit (infeasible) and failed; `reasons`, by
    these words the first `cell` without a result and its `reason`; `claims`, what the paper's come to (see `analysis`)."""
    by: dict[str, list[dict[str, Any]]] = {"done": [], "infeasible": [], "failed": []}
    for record in read_records(RunDir(folder), grid)[0].values():
        by[record["status"]].append(record)
    return {
        "cells": {status: len(some) for status, some in by.items()},
        "reasons": {
            status: {"cell": some[0]["id"], "reason": some[0]["reason"]}
            for status, some in by.items()
            if some and status != "done"
        },
        "claims": RunDir(folder).read_json("study.json")["claims"],
    }


def shown(grid: Study, cell: Cell) -> str:
    """The cell's id, without the model's name where there is one model."""
    return cell.id if len(grid.model.names) > 1 else cell.id.removeprefix(f"{model_label(cell.model)}-")


def alone(
    grid: Study, folder: RunDir, tasks: dict[str, TaskRows], todo: Sequence[Cell], progress: Progress
) -> Iterator[Cell]:
    """Compute the cells one after the other; each is yielded when its files are there."""
    runner = Runner(grid, folder, tasks, progress)
    for cell in todo:
        runner.run(cell)
        yield cell


def spread(address: str, grid: Study, folder: RunDir, todo: Sequence[Cell]) -> Iterator[Cell]:
    """Compute the cells on a Ray cluster; each is yielded when its files are there."""
    places = {cell.id: number for number, cell in enumerate(grid.cells())}
    spec = json.dumps({"study": grid.to_dict(), "base_dir": str(grid.base_dir.resolve())}, default=str)
    work = functools.partial(_computed, spec)
    for number, files in fan_out(address, work, [places[cell.id] for cell in todo]):
        take(folder, todo[number], files)
        yield todo[number]


def take(folder: RunDir, cell: Cell, files: dict[str, bytes]) -> None:
    """Put what a worker made of a cell into the study's folder, the cell's own files all at once."""
    place, beside = folder / "cells" / cell.id, folder / f".{cell.id}.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    for name, raw in files.items():
        own = Path(name)
        if own.parent.as_posix() == f"cells/{cell.id}":
            write_atomic(beside / own.name, raw)
        elif own.parent.as_posix() == "draws":
            write_atomic(folder / name, raw)
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(exist_ok=True)
    os.replace(beside, place)


@functools.lru_cache(maxsize=1)
def _runner(spec: str) -> Runner:
    """In a worker: the study, with a folder of its own."""
    given = json.loads(spec)
    grid = Study.from_dict(given["study"], given["base_dir"])
    tasks = {name: read_task(grid, name) for name in grid.tasks.names}
    return Runner(grid, RunDir(tempfile.mkdtemp(prefix="ctxdistill-study-")), tasks, no_progress)


def _computed(spec: str, number: int) -> dict[str, bytes]:
    """The files of a cell: path in the study's folder -> bytes."""
    runner = _runner(spec)
    cell = runner.grid.cells()[number]
    runner.run(cell)
    files = [*(runner.folder / "cells" / cell.id).iterdir(), *(runner.folder / "draws").glob("*.json")]
    found = {file.relative_to(runner.folder.path).as_posix(): file.read_bytes() for file in files if file.is_file()}
    shutil.rmtree(runner.folder / "cells" / cell.id)
    return found


class Runner:
    """Computes cells, and keeps what neighbours share: the model, and the bench of a demonstration set."""

    def __init__(self, grid: Study, folder: RunDir, tasks: dict[str, TaskRows], progress: Progress) -> None:
        self.grid, self.folder, self.tasks, self.progress = grid, folder, tasks, progress
        self.models: dict[str, LM] = {}
        self.bench: tuple[Any, Bench] | None = None
        self.retention = Retention(grid)

    def run(self, cell: Cell) -> None:
        """Compute one cell and write it down, whatever becomes of it."""
        run = RunDir(self.folder / "cells" / cell.id)
        shutil.rmtree(run.path, ignore_errors=True)
        record: dict[str, Any] = {
            "id": cell.id, "key": cell_key(self.grid, cell), "model": model_label(cell.model), "task": cell.task,
            "n": cell.n, "set": cell.set, "arm": cell.arm, "status": "done", "reason": None, "sets": {}, "cost": None,
        }  # fmt: skip
        scores: list[dict[str, Any]] = []
        bench: Bench | None = None
        try:
            bench = self.prepared(cell)
            arm = self.grid.arm(cell.arm)
            bench.after_training = self.retention.after(cell)
            found, scores = run_cell(bench, arm, run, self.progress)
            if cell.arm == "zero_shot" and bench.after_training:
                found["retention"] = bench.after_training(bench.lm)
            domains = {name: "in" if name == cell.task else "out" for name in bench.evaluation}
            record["sets"] = {
                name: {"domain": domains[name], "rows": len(rows)} for name, rows in bench.evaluation.items()
            }
            record |= found
        except FitError as error:
            record |= {"status": "infeasible", "reason": str(error)}
        except CtxDistillError as error:
            if isinstance(error, ModelError) and bench is None:
                raise  # no cell of this model could be computed
            record |= {"status": "failed", "reason": str(error)}
        except torch.OutOfMemoryError as error:
            said = TrainError(
                "the device's memory does not hold this cell",
                found=str(error).split("\n")[0],
                fix="lower micro_batch in train and finetune, or eval.batch_size; set gradient_checkpointing; leave the arm "
                "out; or make room on the device and compute it again with --retry",
            )
            record |= {"status": "failed", "reason": str(said)}
        if record["status"] != "done":  # only now is the error gone, whose frames hold what the cell had computed
            gc.collect()
            torch.cuda.empty_cache()
        run.write_jsonl("scores.jsonl", scores)
        run.write_json("cell.json", record)

    def prepared(self, cell: Cell) -> Bench:
        """The bench of the cell's demonstration set."""
        key = (cell.model, cell.task, cell.n, cell.set)
        if self.bench is None or self.bench[0] != key:
            self.bench = (key, self.make_bench(cell))
        return self.bench[1]

    def make_bench(self, cell: Cell) -> Bench:
        grid, rows, seed = self.grid, self.tasks[cell.task], cell.set or 0
        drawn = draw_of(grid, rows, cell.n, seed) if cell.n else Draw((), ())
        limits = {name: grid.eval.rows if name == cell.task else grid.eval.ood_rows for name in rows.evaluation}
        evaluation = {name: measured(grid, name, found, limits[name], seed) for name, found in rows.evaluation.items()}
        if cell.n:
            self.dump(cell, drawn, evaluation)
        irrelevant = []
        if cell.n and any(grid.arm(name).control == "irrelevant_context" for name in grid.grid.arms):
            other = self.tasks[grid.other_task(cell.task)]
            irrelevant = [(other.pattern, demos) for demos in draw_of(grid, other, cell.n, seed).contexts]
        teacher = self.model(grid.model.teacher) if grid.model.teacher else None
        lm = self.model(cell.model)
        if teacher and teacher.tokenizer.get_vocab() != lm.tokenizer.get_vocab():
            raise ModelError(
                "the bigger teacher has another tokenizer",
                expected=f"that of {cell.model}",
                found=str(grid.model.teacher),
            )
        return Bench(grid, lm, rows.task, rows.pattern, drawn, evaluation, seed, teacher, tuple(irrelevant))

    def dump(self, cell: Cell, drawn: Draw, evaluation: dict[str, list[Row]]) -> None:
        """Which rows were used, by their numbers in the data set."""

        def numbers(rows: Any) -> list[int]:
            return [row.fields["index"] for row in rows]

        self.folder.write_json(
            f"draws/{cell.task}-n{cell.n}-set{cell.set}.json",
            {
                "contexts": [numbers(rows) for rows in drawn.contexts], "queries": numbers(drawn.queries),
                "evaluation": {name: numbers(rows) for name, rows in evaluation.items()},
            },
        )  # fmt: skip

    def model(self, name: str) -> LM:
        """The loaded model; one at a time, beside the bigger teacher."""
        if name not in self.models:
            keep = self.grid.model.teacher
            self.models = {kept: lm for kept, lm in self.models.items() if kept == keep}
            self.bench = None  # it holds the model that has to go
            m = self.grid.model
            section = ModelSection(name=name, dtype=m.dtype, device=m.device, window=m.window)
            key = "model.teacher" if name == m.teacher else "model.names"
            lm = self.models[name] = LM.load(section, self.grid.base_dir, dropout=m.dropout, key=key)
            count, size = lm.info["parameters"], next(lm.model.parameters()).element_size()
            line = (
                f"{model_label(name)} on {lm.device}: {count / 1e6:.0f} million parameters, {count * size / 1e9:.1f} GB"
            )
            if any(self.grid.arm(arm).trains in ("full", "head") for arm in self.grid.grid.arms):
                line += f"; arms that train all weights take about {5 * count * size / 1e9:.1f} GB"
            log.info("%s", line)
        return self.models[name]


class Retention:
    """What is measured on each trained arm beside the task."""

    def __init__(self, grid: Study) -> None:
        self.grid = grid
        root = grid.path(grid.tasks.root) if grid.tasks.root else None
        r = grid.retention
        self.texts = texts(root, r.texts) if r.texts else []
        self.formats: list[Format] = []
        self.passed_over = 0  # prompts whose instructions a program cannot check, or that need longer answers
        if r.formats:
            self.formats, self.passed_over = formats(root, r.formats)
        self.programs = problems(root, r.programs) if r.programs else []

    def after(self, cell: Cell) -> Callable[[LM], dict[str, Any]] | None:
        """What to do after training the arm of `cell`."""
        if not (self.texts or self.formats or self.programs):
            return None
        slow = cell.set is None or cell.set in self.grid.grid.sets[: self.grid.retention.sets]
        return lambda lm: self.measure(lm, slow)

    def measure(self, lm: LM, slow: bool) -> dict[str, Any]:
        """Perplexity and, where `slow`, format following and pass@1, of the model as it is."""
        passed = format_following(lm, self.programs, max_new_tokens=192) if slow and self.programs else None
        followed = format_following(lm, self.formats) if slow and self.formats else None
        return {
            "perplexity": perplexity(lm, self.texts) if self.texts else None,
            "pass_at_1": passed,
            "program_rows": 0 if passed is None else len(self.programs),
            "format": followed,
            "format_rows": 0 if followed is None else len(self.formats),
            "format_passed_over": 0 if followed is None else self.passed_over,
        }


# -- rows -------------------------------------------------------------------------------------------------------------


def read_task(grid: Study, name: str) -> TaskRows:
    """A task's rows, checked; training rows that occur in an evaluation set are left out."""
    task = TASKS[name]
    root = grid.path(grid.tasks.root) if grid.tasks.root else None
    known = {**task.ood, **task.extra_ood}
    wanted = list(task.ood) if grid.tasks.ood is None else [o for o in grid.tasks.ood if o in known]
    pattern = task.patterns.get(grid.tasks.pattern or task.default_pattern) or task.patterns[task.default_pattern]
    sources = {name: task.evaluation, **{o: known[o] for o in wanted}}
    evaluation = {where: load(source, root) for where, source in sources.items()}
    train = load(task.train, root)
    if grid.grid.draw == "paper":  # as it is, repeated rows and all
        return TaskRows(task, pattern, train, 0, evaluation)
    evaluation = {where: without(rows, ())[0] for where, rows in evaluation.items()}
    kept, dropped = without(train, [row for rows in evaluation.values() for row in rows])
    return TaskRows(task, pattern, kept, dropped, evaluation)


def draw_of(grid: Study, rows: TaskRows, n: int, seed: int) -> Draw:
    """Demonstrations and queries of a demonstration set."""
    contexts, queries = grid.drawn()
    return draw(rows.train, rows.task.labels, n=n, queries=queries, seed=seed, contexts=contexts, mode=grid.grid.draw)


def measured(grid: Study, name: str, rows: list[Row], limit: int, seed: int) -> list[Row]:
    """The rows of an evaluation set that are measured: the same ones in all cells, unless the paper's way is asked for."""
    if grid.eval.choose == "paper":
        return held_out(
            rows, limit=limit, seed=seed, mode="paper-shuffled" if name.startswith("hans") else "paper-first"
        )
    return held_out(rows, limit=limit, seed=0)


# -- the folder -------------------------------------------------------------------------------------------------------


def name_of(grid: Study) -> str:
    return grid.name or "study"


def check_owner(folder: RunDir, grid: Study) -> dict[str, Any]:
    """The values that the folder's study had; none for a new folder. A grid may grow, and its settings may change.

    Raises: `RunError` for a folder of something else: a study of another name, or one none of whose cells is in `grid`.
    """
    if not (folder / "study_recipe.json").is_file():
        strangers = [p.name for p in folder.path.iterdir() if p.name != ".lock" and not p.name.endswith(".tmp")]
        if strangers:
            raise RunError(
                f"{folder.path} is not empty and is not a study's folder",
                found=", ".join(sorted(strangers)[:5]),
                fix="choose a new folder with --out",
            )
        return {}
    with reading(folder.path):
        stored = folder.read_json("study_recipe.json")
        name, values = str(stored["name"]), dict(stored["study"])
    there = sorted(path.parent.name for path in (folder / "cells").glob("*/cell.json"))
    strange = bool(there) and not {cell.id for cell in grid.cells()}.intersection(there)
    if name != name_of(grid) or strange:
        raise RunError(
            f"{folder.path} belongs to another study",
            expected=f"the study {name_of(grid)!r}" + (", with cells of its grid" if strange else ""),
            found=f"the study {name!r}" + (f", with cells such as {there[0]}" if strange else ""),
            fix="choose another folder with --out, or delete this one"
            + ("" if strange else f"; if it only has another name now: name={shlex.quote(name)}"),
        )
    return values


def read_records(folder: RunDir, grid: Study) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was written down of the cells of `grid`, by id: of those made with the same values, and of others."""
    kept: dict[str, Any] = {}
    stale: dict[str, Any] = {}
    for cell in grid.cells():
        run = RunDir(folder / "cells" / cell.id)
        if (run / "cell.json").is_file():
            record = run.read_json("cell.json")
            (kept if record["key"] == cell_key(grid, cell) else stale)[cell.id] = record
    return kept, stale


def changed(old: Any, new: Any, name: str = "") -> list[str]:
    """The keys of a study whose values differ, but for those by which a grid grows."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = {**old, **new}
        return [k for key in keys for k in changed(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))]
    return [] if old == new or name in GROWS else [name]


def describe(grid: Study, tasks: dict[str, TaskRows]) -> dict[str, Any]:
    """`study_recipe.json`: what is compared."""
    arms: list[tuple[str, Arm]] = [(name, grid.arm(name)) for name in grid.grid.arms]
    versions = {n: importlib.metadata.version(n) for n in ("ctxdistill", "torch", "transformers", "peft")}
    return {
        "name": name_of(grid),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {**versions, "python": platform.python_version()},
        "models": [{"name": model_label(name), "label": model_label(name)} for name in grid.model.names],
        "tasks": [
            {
                "name": name, "title": rows.task.title, "labels": list(rows.task.labels), "evaluation": name,
                "ood": [where for where in rows.evaluation if where != name], "version": rows.task.version,
                "pattern": next(key for key, pattern in rows.task.patterns.items() if pattern is rows.pattern),
                "train_rows": len(rows.train), "dropped": rows.dropped,
                "rows": {where: len(found) for where, found in rows.evaluation.items()},
            }
            for name, rows in tasks.items()
        ],
        "demos": grid.grid.demos,
        "sets": grid.grid.sets,
        "arms": [
            {
                "name": name, "label": arm.label or name, "about": arm.about, "family": arm.family,
                "context": arm.context, "control_of": arm.control_of,
            }
            for name, arm in arms
        ],
        "contexts": grid.grid.contexts,
        "queries": grid.grid.queries,
        "eval_rows": grid.eval.rows,
        "main": grid.eval.main,
        "study": grid.to_dict(),
        "fingerprint": fingerprint(grid.to_dict()),
    }  # fmt: skip


def write_authors_table(folder: RunDir, grid: Study) -> None:
    """`all_runs.csv` in the columns of the authors' own file, for the arm `cd_one`, by the rule `eval.main`."""
    rows = []
    for cell in grid.cells():
        run = RunDir(folder / "cells" / cell.id)
        record = run.read_json("cell.json")
        if cell.arm != "cd_one" or record["status"] != "done":
            continue
        scores = run.read_jsonl("scores.jsonl")

        def mean(domain: str, record: dict[str, Any] = record, scores: list[dict[str, Any]] = scores) -> float:
            found = [s[grid.eval.main] for s in scores if record["sets"][s["set"]]["domain"] == domain]
            return sum(found) / len(found) if found else float("nan")

        rows.append(
            {
                "model": record["model"], "context_set_id": cell.set, "dataset": cell.task, "context_size": cell.n,
                "accuracy_teacher": record["teacher"]["accuracy"], "accuracy_indomain": mean("in"), "accuracy_ood": mean("out"),
                "trainable_parameters": record["cost"]["trainable"],
                "all_parameters": record["cost"]["trainable"] + record["cost"]["parameters"],
            }
        )  # fmt: skip
    if not rows:
        return  # the page says why there are none
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(folder / "all_runs.csv", text.getvalue())
