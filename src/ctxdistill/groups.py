"""Results by part: what each chunk of the documents contributed, and each value of a column that the recipe names.

In: the held-out pairs, their scores, the training examples. Out: for each part its rows and supervised tokens in training,
its held-out rows, their mean KL per token before and after training, and the metrics of every arm. Invariants: the parts
of a table share no row and leave none out; means are over tokens for the KL and over rows for metrics, as in the main table.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ctxdistill.dataset import Data
from ctxdistill.evaluate import Score
from ctxdistill.objective import Example
from ctxdistill.prompts import Prompter

NONE = "none"


def parts(prompter: Prompter, rows: Data) -> dict[str, dict[str, str]]:
    """Title -> (row id -> part): `chunk` where rows have one, and the column `eval.group`."""
    found: dict[str, dict[str, str]] = {}
    column = prompter.recipe.context.chunk_column
    bound = bool(prompter.context.chunks)
    if bound or prompter.recipe.queries.synthesize:
        found["chunk"] = {}
        for chosen, section in rows.splits.values():
            for row in chosen:
                chunk = prompter.chunk_of(row, section) if bound else None
                found["chunk"][row.id] = chunk.name if chunk else str(row.fields.get(column) or NONE)
        if not bound and set(found["chunk"].values()) == {NONE}:
            del found["chunk"]
    if name := prompter.recipe.eval.group:
        found[name] = {row.id: str(row.fields.get(name, NONE)) for row in rows.splits["eval"][0]}
        trained = (row for split, (chosen, _) in rows.splits.items() if split != "eval" for row in chosen)
        found[name] |= {row.id: str(row.fields[name]) for row in trained if name in row.fields}
    return found


def by_part(
    part: Mapping[str, str],
    scores: Mapping[str, Sequence[Score]],
    examples: Sequence[Example],
    order: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """One entry per part, in `order` and then as they occur.

    Args:
        part: row id -> part.
        scores: arm -> its scores on the held-out rows.
        examples: what was trained on.
    """
    names = list(dict.fromkeys([*order, *(part[i] for i in part)]))
    trained_rows, trained_tokens, last = Counter[str | None](), Counter[str | None](), ""
    for e in examples:  # those of a row come one after the other
        trained_rows[part.get(e.id)] += e.id != last
        trained_tokens[part.get(e.id)] += len(e.target.ids)
        last = e.id
    known_rows = any(name is not None for name in trained_rows)  # the training rows may lack the column
    table = []
    for name in names:
        mine = {arm: [s for s in rows if part.get(s["row"]) == name] for arm, rows in scores.items()}
        held = next(iter(mine.values()), [])
        metrics = {
            arm: {
                metric: statistics.fmean(known)
                for metric in (rows[0]["metrics"] if rows else ())
                if (known := [s["metrics"][metric] for s in rows if s["metrics"][metric] is not None])
            }
            for arm, rows in mine.items()
        }
        table.append({
            "part": name,
            "train_rows": trained_rows[name] if known_rows else None,
            "train_tokens": trained_tokens[name] if known_rows else None,
            "rows": len(held),
            "tokens": sum(s["tokens"] for s in held),
            "kl_before": mean_kl(mine.get("zero_shot", [])),
            "kl_after": mean_kl(mine.get("distilled", [])),
            "metrics": metrics,
        })  # fmt: skip
    return table


def mean_kl(scores: Sequence[Score]) -> float | None:
    """Mean over tokens of the KL to the teacher, in nats; None without rows."""
    tokens = sum(s["tokens"] for s in scores)
    return sum(s["kl"] * s["tokens"] for s in scores) / tokens if tokens else None


def tables(
    prompter: Prompter, rows: Data, scores: Mapping[str, Sequence[Score]], examples: Sequence[Example]
) -> dict[str, list[dict[str, Any]]]:
    """Title -> table, for everything in `parts`; the chunks in the order of the documents, those without rows, too."""
    chunks = [chunk.name for chunk in prompter.context.chunks]
    return {
        title: by_part(part, scores, examples, chunks if title == "chunk" else ())
        for title, part in parts(prompter, rows).items()
    }
