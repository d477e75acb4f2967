"""All rows of a run as prompt pairs, checked before anything slow begins, and the record of what made the run.

In: a recipe. Out: the model, a `Prompter` and `Data`; the manifest that becomes `recipe.json`. Invariants: no query occurs
twice, none is in two of demonstrations, queries and evaluation; no query holds the context; every prompt fits with its
answer; the manifest's fingerprint covers all that the result depends on.
"""

from __future__ import annotations

import importlib.metadata
import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from ctxdistill import evaluate as evaluation
from ctxdistill import losses, synthesis
from ctxdistill import rows as data
from ctxdistill.conversations import CONVERSATION, turns
from ctxdistill.errors import DataError, RecipeError, several
from ctxdistill.lm import LM, check_fit
from ctxdistill.prompts import Pair, Prompter
from ctxdistill.recipe import DataSection, Recipe
from ctxdistill.rows import Row, Rows
from ctxdistill.rundir import LOADING, Progress, RunDir, fingerprint, no_progress, reading
from ctxdistill.spool import Lazy, joined
from ctxdistill.trust import need_code, outside
from ctxdistill.weights import load_tokenizer

log = logging.getLogger("ctxdistill")
PARTS = ("system", "system_file", "documents", "chunk_tokens", "messages", "demos", "column", "teacher_prompt")
"""Keys of `context` that say that there is something of their kind."""


@dataclass(frozen=True)
class Data:
    """All rows of a run, as prompt pairs, with the sections that say how to read them."""

    splits: Mapping[str, tuple[Sequence[Row], DataSection]]
    """`train`, `validation` (may be empty) and `eval`."""
    pairs: Mapping[str, Sequence[Pair]]
    counts: Mapping[str, Any]


def prepare(
    recipe: Recipe, folder: Path | None = None, progress: Progress = no_progress, *, lm: LM | None = None
) -> tuple[LM, Prompter, Data]:
    """Read and check everything that can be wrong before anything slow begins: rows first, then the model, unless that is
    given. Queries that the model shall write, and that are not in `folder` (the run's) or where the recipe says, are
    written in between."""
    prompter = prompter_of(recipe, lm)
    if recipe.queries.synthesize and not synthesis.queries_file(recipe, folder).exists():
        lm = lm or LM.load(recipe.model, recipe.base_dir)
        summary = synthesize(recipe, prompter, lm, synthesis.queries_file(recipe, folder), progress)
        log.info("%s queries are written: %s", f"{summary['written']:,}", summary["file"])
    splits, counts = read_rows(recipe, prompter, folder)
    pairs = {split: prompter.pairs(found, section) for split, (found, section) in splits.items()}
    lm = lm or LM.load(recipe.model, recipe.base_dir)
    if lm.peft is None and recipe.lora.method != "cartridge":
        lm.adapted_by(recipe.lora)  # what it cannot sit on should not cost the labelling first
    room = {"teacher": recipe.completions.max_new_tokens}
    room["label"] = max(map(len, prompter.labels.values()), default=0)
    own = recipe.completions.max_new_tokens if recipe.train.on_policy else 0  # what the student may write
    if recipe.completions.checker:
        evaluation.load_function(recipe.completions.checker, recipe, "completions.checker")
    evaluation.metrics_of(recipe, pairs["eval"])  # a metric that cannot be measured should not cost minutes first

    def needed(pair: Pair, evaluated: bool) -> int:
        if evaluated:
            answer = evaluation.teacher_limit(recipe)
        else:
            given = len(prompter.completion(pair.answer)) if pair.answer is not None else 0
            answer = max(own, room.get(recipe.completions.source, given))
        return max(len(pair.teacher), len(pair.student)) + answer

    for split, found in pairs.items():
        lengths = ((pair.origin, needed(pair, split == "eval")) for pair in found)
        check_fit(lengths, lm.window, f"a prompt of context, {split} query and answer")
    progress(LOADING, 1, 1)
    return lm, prompter, Data(splits, pairs, counts)


def prompter_of(recipe: Recipe, lm: LM | None = None) -> Prompter:
    """The recipe's prompter; its files are looked for before a tokenizer is, which may be far away."""
    data.require_files(recipe)
    return Prompter(recipe, lm.tokenizer if lm else load_tokenizer(recipe.model, recipe.base_dir))


def given_rows(recipe: Recipe) -> tuple[Sequence[Row], Sequence[Row], dict[str, int]]:
    """(queries, held-out rows) that the recipe names, either maybe empty, and what was left out: by a limit, and turns of
    conversations without text."""
    queries = held = Rows([], 0, "")
    if recipe.queries.data is not None:
        needed = recipe.completions.source == "data" and recipe.queries.taught == "last"
        answers: Literal["optional", "required"] = "required" if needed else "optional"
        queries = data.read(recipe.queries, recipe, "queries", answers=answers)
    if recipe.eval.data is not None:
        held = data.read(recipe.eval, recipe, "eval")
    asked, silent = turns(queries.rows, recipe.queries)
    held_out, more = turns(held.rows, recipe.eval)
    left = {"left_out_by_limit": queries.left_out + held.left_out}
    return asked, held_out, left | ({"turns_without_text": silent + more} if silent + more else {})


def synthesize(
    recipe: Recipe, prompter: Prompter, lm: LM | None, file: Path, progress: Progress = no_progress
) -> dict[str, Any]:
    """Let the model write queries into `file`, none like the rows that are given; returns the summary."""
    queries, held, _ = given_rows(recipe)
    known = [prompter.query_text(row, recipe.queries) for row in queries]
    known += [prompter.query_text(row, recipe.eval) for row in held]
    known += [prompter.query_text(row, prompter.demo_section) for row in prompter.context.demos]
    progress(LOADING, 1, 1)
    return synthesis.write_queries(recipe, prompter, lm, file, known, progress)


def read_rows(
    recipe: Recipe, prompter: Prompter, folder: Path | None = None
) -> tuple[dict[str, tuple[Sequence[Row], DataSection]], dict[str, Any]]:
    """Rows by split, checked: no duplicates, no overlap between demonstrations, queries and evaluation, no context in a
    query. Written queries are in the run's `folder` or where the recipe says."""
    found, held, left = given_rows(recipe)
    more: dict[str, Any] = {}
    if recipe.queries.synthesize:
        file = synthesis.queries_file(recipe, folder)
        found = joined(found, synthesis.read_written(recipe, file))
        more = {"written": synthesis.described(recipe, prompter, file)}
    queries, dropped = unique(found, recipe.queries, prompter)
    if recipe.eval.data is not None:
        held_out, n = unique(held, recipe.eval, prompter)
        dropped += n
        section: DataSection = recipe.eval
    else:
        queries, held_out = data.split(queries, recipe.eval.share, recipe.train.seed, group_of(recipe))
        section = recipe.queries
    for what, part, found_rows in (("queries", recipe.queries, queries), ("eval", section, held_out)):
        if "answer" in part.model_fields_set and not any(part.answer in r.fields for r in found_rows):
            raise DataError(
                f"{what}.answer names the column {part.answer!r}, and no row has it",
                found=", ".join(sorted(found_rows[0].fields)) if found_rows else "no rows",
                fix=f"name an existing column, or leave {what}.answer out if there are no answers",
            )
    groups = {
        "context.demos": [(r, identity(prompter, r, prompter.demo_section)) for r in prompter.context.demos],
        "queries": Lazy.over(queries, lambda r: (r, identity(prompter, r, recipe.queries))),
        "eval": Lazy.over(held_out, lambda r: (r, identity(prompter, r, section))),
    }
    data.check_overlap(groups)
    for rows, part in ((queries, recipe.queries), (held_out, section)):
        for row in rows:
            prompter.check_no_leak(row, part)
    training, validation = data.split(queries, recipe.train.validation, recipe.train.seed + 1, group_of(recipe))
    splits = {
        "train": (training, recipe.queries),
        "validation": (validation, recipe.queries),
        "eval": (held_out, section),
    }
    for name in ("train", "eval"):
        if not splits[name][0]:
            none = name == "eval" and recipe.eval.data is None and recipe.eval.share == 0
            raise DataError(
                f"no rows are left for {name}",
                found=f"{len(found)} queries" + (" and eval.share = 0" if none else ""),
                fix="set eval.share above 0, or give eval.data" if none else "give more queries, or eval.data",
            )
    counts = {name: len(part) for name, (part, _) in splits.items()}
    hashes = fingerprint([(r.id for r in part) for part, _ in splits.values()])
    counts |= {"demos": len(prompter.context.demos), "dropped_duplicates": dropped, **left}
    return splits, {**counts, "sha256": hashes, **more}


def group_of(recipe: Recipe) -> Callable[[Row], str]:
    """What decides on which side of a split a row is: rows of one group stay together."""
    if recipe.queries.synthesize and recipe.synthesis.held_out == "chunk":
        return lambda row: str(row.fields.get(recipe.context.chunk_column) or row.id)
    return lambda row: str(row.fields.get(CONVERSATION) or row.id) if recipe.queries.taught == "every" else row.id


def unique(rows: Sequence[Row], section: DataSection, prompter: Prompter) -> tuple[Sequence[Row], int]:
    """Rows without repeated queries, if the section says to drop them; else as they are (`check_overlap` will refuse)."""
    if section.duplicates != "drop":
        return rows, 0
    return data.drop_duplicates(rows, lambda row: data.query_key(identity(prompter, row, section)))


def identity(prompter: Prompter, row: Row, section: DataSection) -> str:
    """What makes a row a repetition of another: its query, and its own context if it has one."""
    c = prompter.recipe.context
    own = [str(row.fields.get(name)) for name in (c.column, c.teacher_prompt) if name]
    return "\n".join([prompter.query_identity(row, section), *own])


def decisive(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a recipe on which the result depends. The others may change between two attempts at one run, such as
    gate.on_fail after the gate said no."""
    free = {"name", "gate", "cost", "behaviour", "teacher"}
    kept = {name: value for name, value in values.items() if name not in free}
    if values["teacher"]["engine"] != "local":  # who labels matters, not how they are reached
        kept["teacher"] = [values["teacher"]["engine"], values["teacher"]["endpoint_model"]]
    return kept | {"train": {k: v for k, v in values["train"].items() if k not in {"report_to", "shard"}}}


def describe(recipe: Recipe, lm: LM, prompter: Prompter, rows: Data) -> dict[str, Any]:
    """`recipe.json`: what made this run. Its fingerprint covers everything that the result depends on."""
    values = recipe.to_dict()
    counts = {name: value for name, value in rows.counts.items() if name != "written"}
    written = rows.counts.get("written") or {}
    identity = [written["sha256"], written["held_out_by"]] if written else []
    prompts = fingerprint([p.teacher, p.student] for found in rows.pairs.values() for p in found)
    c = recipe.context
    context = {
        "sha256": prompter.fingerprint,
        "kinds": [k for k in PARTS if getattr(c, k)],
    }
    preview = "\n".join(
        text
        for text, kind in prompter.parts(rows.splits["train"][0][0], recipe.queries, teacher=True)
        if kind == "context"
    )
    facts = {
        "tokens": len(rows.pairs["train"][0].teacher) - len(rows.pairs["train"][0].student),
        "preview": preview[:2000],
    }
    versions = {
        name: importlib.metadata.version(name) for name in ("ctxdistill", "torch", "transformers", "peft", "accelerate")
    }
    return {
        "recipe": values,
        "typed": recipe.typed,
        "base_dir": str(recipe.base_dir),
        "explicit": explicit(recipe),
        "fingerprint": fingerprint(
            [decisive(values), lm.fingerprint, prompter.fingerprint, counts, prompts, *identity]
        ),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {**versions, "python": platform.python_version()},
        "model": lm.info,
        "context": context | facts,
        "rows": counts,
        **({"written_queries": written} if written else {}),
        "student_prompt": prompter.student_prompt(),
        "loss": f"{recipe.train.loss} = {losses.LOSSES[recipe.train.loss].formula}",
    }


def differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """What keeps the fingerprints of two manifests apart, for people: `train.epochs: 2 there, 3 here`. Looks at what a person
    can change first."""
    found: list[str] = []

    def compare(old: Any, new: Any, name: str) -> None:
        if isinstance(old, dict) and isinstance(new, dict):
            for key in {**old, **new}:
                compare(old.get(key), new.get(key), f"{name}.{key}" if name else key)
        elif old != new:
            found.append(f"{name}: {old!s:.60} there, {new!s:.60} here")

    compare(decisive(there["recipe"]), decisive(here["recipe"]), "")
    if there["context"]["sha256"] != here["context"]["sha256"] and not found:
        found.append("the text of the context")
    compare(there["rows"] | {"sha256": ""}, here["rows"] | {"sha256": ""}, "rows")
    compare(there["model"], here["model"], "the model's")
    for library in ("torch", "transformers"):
        compare(there["versions"][library], here["versions"][library], library)
    return (
        "; ".join(found[:4]) + (f"; {len(found) - 4} more" if len(found) > 4 else "") or "other texts in as many rows"
    )


def claim(run: RunDir, manifest: dict[str, Any], *, resume: bool) -> None:
    """Make the run folder this process's, for what the manifest describes. Raises: see `RunDir.claim`."""
    run.claim(manifest["fingerprint"], resume=resume, differs=lambda stored: differences(stored, manifest))


def explicit(section: Any, prefix: str = "") -> list[str]:
    """Dotted names of the values that the user gave."""
    names = []
    for name in sorted(section.model_fields_set - {"base_dir"}):
        value = getattr(section, name)
        nested = hasattr(value, "model_fields_set")
        names += explicit(value, f"{prefix}{name}.") if nested else [f"{prefix}{name}"]
    return names


def stored_recipe(run: RunDir) -> Recipe:
    """The recipe that a run was made with. The run may be somebody else's: what it may do is bounded (`trust`)."""
    stored = run.read_json("recipe.json")
    with reading(run.path):
        recipe = recipe_of(stored)
    for key, asked in (("model.trust_remote_code", recipe.model.trust_remote_code), ("code.run", recipe.code.run)):
        if asked:
            need_code(f"{key} in the recipe of {run.path}")
    if problems := outside(recipe.written(), run.path, Path.cwd()):
        raise several(
            RecipeError, f"the recipe of {run.path}", problems, fix="start in a folder that holds these files"
        )
    return recipe


def recipe_of(stored: dict[str, Any]) -> Recipe:
    """The recipe in what `describe` wrote down."""
    full = Recipe.from_dict(stored["recipe"], base_dir=stored["base_dir"])
    return Recipe.from_dict(_without_defaults(full, set(stored["explicit"])), base_dir=stored["base_dir"])


def _without_defaults(section: Any, given: set[str], prefix: str = "") -> dict[str, Any]:
    """The values of a section but for defaults that the user did not give: some checks ask whether a value was given."""
    values = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if hasattr(value, "model_fields_set"):
            values[name] = _without_defaults(value, given, f"{prefix}{name}.")
        elif name != "base_dir" and (f"{prefix}{name}" in given or value != field.get_default()):
            values[name] = value
    return values
