"""Several contexts in one adapter: does the student keep them apart?

In: groups of held-out rows, one for each context, and what each context's teacher answers to the rows of every group. Out: the
cross-talk matrix, KL(teacher of context j || student on a row of context i) per token, and whether it may be called good.
Invariants: the student's prompt of a row is always its own; a teacher is judged on its own completions; where the contexts
are not told apart, or not learnt, the matrix is not called good, and says why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ctxdistill.behaviour import Check
from ctxdistill.dataset import Data
from ctxdistill.errors import DataError
from ctxdistill.evaluate import Score, kl_estimate, teacher_targets
from ctxdistill.prompts import Pair, Prompter
from ctxdistill.recipe import Recipe
from ctxdistill.rundir import Progress, no_progress

OWN = 0.9
"""Share of a context's rows on which the student must be nearest to their own teacher."""
CLOSED = 0.8
"""Share of each context's KL that the student must close."""
MOST = 12
"""Contexts that are compared with each other; each adds a row and a column."""

Group = Mapping[str, Sequence[Pair]]
"""Rows of one context: for each context's name the same rows with that context's teacher prompt."""


def groups_of(recipe: Recipe, prompter: Prompter, rows: Data) -> dict[str, Group]:
    """The first `behaviour.rows` held-out rows of each context, by the name in the column `behaviour.contexts`.

    Raises: `DataError` for a row without a name, a name with two contexts, and too many or too few names.
    """
    column, own = recipe.behaviour.contexts or "", recipe.context.column or ""
    held_out, section = rows.splits["eval"]
    contexts: dict[str, Any] = {}
    for row in held_out:
        name = str(row.fields.get(column) or "")
        if not name or contexts.setdefault(name, row.fields[own]) != row.fields[own]:
            raise DataError(
                f"{row.origin}: the column {column!r} does not name the row's context",
                expected=f"one name for each text in {own!r}, the same in all rows",
                found=repr(name) if name else "no name",
                fix="mend the column, or leave behaviour.contexts out",
            )
    if not 2 <= len(contexts) <= MOST:
        raise DataError(
            f"behaviour.contexts: {len(contexts)} contexts among the held-out rows",
            expected=f"2 to {MOST}",
            fix="give rows of several contexts, or leave behaviour.contexts out",
        )
    found: dict[str, Group] = {}
    for name in sorted(contexts):
        some = [row for row in held_out if str(row.fields[column]) == name][: recipe.behaviour.rows or None]
        found[name] = {
            other: [prompter.pair(dataclasses.replace(row, fields={**row.fields, own: text}), section) for row in some]
            for other, text in contexts.items()
        }
    return found


def matrix(
    checks: Mapping[str, Check], groups: Mapping[str, Group], progress: Progress = no_progress
) -> dict[str, Any]:
    """`names`; `kl`, `nearest` and `closed` by name (and by name of the teacher for `kl`); `good` and `reasons`. Each teacher
    answers as the recipe of its own check says."""
    names = list(groups)
    kl: dict[str, dict[str, Any]] = {}
    nearest, closed = {}, {}
    for number, i in enumerate(names):
        own = groups[i][i]
        scores: dict[str, list[Score]] = {}
        for j, check in checks.items():
            pairs = [dataclasses.replace(p, student=o.student) for p, o in zip(groups[i][j], own, strict=True)]
            targets = teacher_targets(check.lm, check.prompter, pairs, check.recipe, check.store)
            scores[j] = check.scores(pairs, targets)
            if i == j:
                with check.lm.adapter(False):
                    closed[i] = check.closed(scores[j], check.scores(pairs, targets))
        kl[i] = {j: kl_estimate(scores[j], **checks[i].options) for j in names}
        rest = np.min([[s["kl"] for s in scores[j]] for j in names if j != i], axis=0)  # [rows]
        nearest[i] = checks[i].share([float(s["kl"] < least) for s, least in zip(scores[i], rest, strict=True)])
        progress("cross-talk", number + 1, len(names))
    reasons = [
        f"{i}: the student is nearest to its own teacher on {100 * nearest[i]['mean']:.0f} % of the rows only"
        for i in names
        if nearest[i]["mean"] < OWN
    ]
    for i in names:
        share = closed[i]
        if share is None or share["mean"] < CLOSED:
            text = "is not defined" if share is None else f"is {100 * share['mean']:.0f} %"
            reasons.append(f"{i}: the share of the KL that the adapter closes {text}")
    return {"names": names, "kl": kl, "nearest": nearest, "closed": closed, "good": not reasons, "reasons": reasons}
