"""What the numbers of a study say about the paper's claims, and what they cannot say.

In: the tables of `analysis` as plain data. Out: verdicts with their evidence, and limits, as sentences. Invariants: only
cells where the context teaches something decide; a claim holds when every such cell supports it, falls when one
contradicts it, and is not decidable otherwise; fewer than `MIN_SETS` demonstration sets decide nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from ctxdistill.results import cells, finite
from ctxdistill.stats import MIN_SETS, Z95

Data = dict[str, Any]
Outcome = Literal["yes", "no", "open"]
Judge = Callable[[Sequence[Mapping[str, Any]]], Outcome | str]

MARGIN = 0.02
"""Two points of accuracy: a student closer than this to its teacher matches it."""
LEVEL = 0.05
MIN_ROWS = 200
"""Below this many rows, differences that matter are lost in the interval."""
STUDENT, TEACHER = "cd_one", "in_context"


class Words:
    """Labels of models, tasks and arms, for sentences."""

    def __init__(self, recipe: Mapping[str, Any], arms: Sequence[Mapping[str, Any]]) -> None:
        self.models = {m["name"]: str(m.get("label") or m["name"]) for m in recipe["models"]}
        self.tasks = {t["name"]: str(t.get("title") or t["name"]) for t in recipe["tasks"]}
        self.arms = {a["name"]: str(a.get("label") or a["name"]) for a in arms}
        self.outside = any(t.get("ood") for t in recipe["tasks"])
        # on the same n demonstrations: fine-tuning on those of many contexts is another question
        self.tuned = [a["name"] for a in arms if a["family"] == "finetune" and a.get("context") != "many"]

    def where(self, row: Mapping[str, Any]) -> str:
        """`TREC, 16 demonstrations`, with the model where there are several and the set where it is out of domain."""
        model = f"{self.models.get(row['model'], row['model'])}, " if len(self.models) > 1 else ""
        task = self.tasks.get(row["task"], row["task"])
        return f"{model}{task}{' → ' + row['set'] if row.get('domain') == 'out' else ''}, {row['n']} demonstrations"

    def difference(self, row: Mapping[str, Any]) -> str:
        """`TREC, 16 demonstrations: distilled minus in-context +1.2 points [-0.5, +2.9], corrected p 0.21`."""
        estimate = {"mean": row["difference"], "low": row["low"], "high": row["high"]}
        pair = " minus ".join(self.arms.get(row[side], row[side]) for side in ("a", "b"))
        points = cells("label_accuracy", estimate, unit="points", sign=True)
        return f"{self.where(row)}: {pair} {points}, corrected p {p_text(row['p_corrected']).replace('< ', 'below ')}"


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def taught(comparisons: Iterable[Mapping[str, Any]]) -> list[Data]:
    """Where the context teaches something: in domain, in-context is above zero-shot and above the constant answer.

    Each: `model`, `task`, `n`, `sets`, `rows`, `taught`, and `reason` where it is not.
    """
    found: dict[tuple[str, str, int], Data] = {}
    for row in comparisons:
        if row["a"] != TEACHER or row["domain"] != "in" or row["b"] not in ("zero_shot", "constant"):
            continue
        where = {name: row[name] for name in ("model", "task", "n", "sets", "rows")}
        cell = found.setdefault((row["model"], row["task"], row["n"]), {**where, "taught": True, "reason": None})
        if row["low"] <= 0:
            gain = cells("label_accuracy", {**row, "mean": row["difference"]}, unit="points", sign=True)
            than = {"zero_shot": "zero-shot", "constant": "always giving one answer"}[row["b"]]
            reasons = [*filter(None, [cell["reason"]]), f"in-context is not shown to be better than {than}: {gain}"]
            cell |= {"taught": False, "reason": "; ".join(reasons)}
    return list(found.values())


def verdicts(
    comparisons: Sequence[Mapping[str, Any]],
    costs: Sequence[Mapping[str, Any]],
    where_taught: Sequence[Mapping[str, Any]],
    words: Words,
) -> list[Data]:
    """The claims of the paper's abstract, each with `verdict` (yes, no, not decidable), `evidence` and `scope`.

    "Below" and "above" mean that interval (over demonstration sets and rows) and corrected p-value (over rows) agree.

    1. In domain, distillation matches in-context learning. Yes in a cell whose interval lies above -`MARGIN`; no in one
       that is below and whose interval lies below -`MARGIN`.
    2. Out of domain, it beats in-context learning. Yes in a cell that is above; no in one that is below.
    3. In domain, few-shot fine-tuning stays ahead of it (the paper: it does not reach fine-tuning). Yes in a cell that is
       below one of the fine-tuned arms; no in one whose intervals lie above -`MARGIN` against all of them.
    4. At the same number of labelled examples, it needs less compute than few-shot fine-tuning. Counted, not estimated: yes
       where FLOPs (teacher's included) are fewer and labelled examples not more, else no.
    """
    taught = {(t["model"], t["task"], t["n"]): t for t in where_taught}
    student = words.arms.get(STUDENT, "distilled")

    def claim(text: str, domain: str, against: Sequence[str], judge: Judge, scope: str) -> Data:
        rows = [r for r in comparisons if r["a"] == STUDENT and r["b"] in against and r["domain"] == domain]
        found = [(group, _hindrance(group, taught)) for group in _by_cell(rows)]
        outcomes = [(judge(group), group) for group, hindrance in found if not hindrance]
        evidence = [f"{words.difference(row)}: {_said(outcome)}." for outcome, group in outcomes for row in group]
        why = _absent(words, domain, against) or _hindrances([hindrance for _, hindrance in found])
        return _decided(text, [outcome for outcome, _ in outcomes], evidence or [why], scope)

    scope = f"{student}, one demonstration set per student; cells where the context teaches something decide"
    return [
        claim(
            f"In domain, a student matches in-context learning (within {100 * MARGIN:.0f} points).",
            "in", [TEACHER], _matches, scope,
        ),
        claim(
            "Out of domain, a student beats in-context learning.",
            "out", [TEACHER], lambda r: {"above": "yes", "below": "no"}.get(_only(r)["reading"], "open"), scope,
        ),
        claim(
            "In domain, few-shot fine-tuning stays ahead of a student.",
            "in", words.tuned, _short_of_tuning, f"{scope}; against every fine-tuned arm",
        ),
        _cost_claim(costs, words),
    ]  # fmt: skip


def limits(
    table: Sequence[Mapping[str, Any]],
    where_taught: Sequence[Mapping[str, Any]],
    words: Words,
    planned: int,
    drawn_anew: Sequence[tuple[str, str]] = (),
) -> list[str]:
    """What must not be concluded, as sentences.

    Args:
        planned: demonstration sets of the study.
        drawn_anew: tasks and sets whose rows differ between demonstration sets.
    """
    found = []
    sets = max((row["sets"] for row in table if row["n"]), default=0)
    some = f"{sets} demonstration set{'s' * (sets != 1)}"
    if 0 < sets < MIN_SETS:
        found.append(
            f"With {some}, how much results change from one choice of demonstrations to the next is not known: intervals "
            "and p-values are over rows only, nothing can be concluded about other demonstrations, and no claim about "
            "accuracy is decided."
        )
    elif 0 < sets < 6:
        found.append(
            f"There are {some}. P-values are over rows and speak of these sets; intervals are over sets and rows, and wide "
            "where sets differ, because so few say little about the next one. A difference counts only where both agree."
        )
    behind: dict[str, dict[str, int]] = {}
    for row in table:
        if row["n"] and row["sets"] < planned:
            arms = behind.setdefault(words.where({**row, "domain": "in"}), {})
            arms[words.arms.get(row["arm"], row["arm"])] = row["sets"]
    for where, arms in behind.items():
        named = "; ".join(f"{arm} ({count})" for arm, count in arms.items())
        found.append(f"{where}: on fewer than the study's {planned} demonstration sets: {named}.")
    few: dict[str, int] = {}
    for row in table:
        if row["rows"] < MIN_ROWS:
            name = words.tasks.get(row["task"], row["task"])
            few[f"{name} → {row['set']}" if row["domain"] == "out" else name] = row["rows"]
    for name, rows in few.items():
        half = 100 * Z95 * math.sqrt(0.25 / rows)
        found.append(
            f"{name} has {rows} evaluation rows, fewer than {MIN_ROWS}: an accuracy near one half is known to ± {half:.0f} "
            f"points at best, and that two arms match within {100 * MARGIN:.0f} points cannot be shown."
        )
    found += [
        f"{words.tasks.get(task, task)} → {name}: each demonstration set has rows of its own, so that an arm without "
        "demonstrations is compared only with the sets that were measured on its rows."
        for task, name in drawn_anew
    ]
    found += [
        f"{words.where(cell)}: nothing to teach, so that it decides no claim about accuracy ({cell['reason']})."
        for cell in where_taught
        if not cell["taught"]
    ]
    return found


# ---- one claim


def _only(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    (row,) = rows
    return row


def _matches(rows: Sequence[Mapping[str, Any]]) -> Outcome:
    row = _only(rows)
    if row["low"] > -MARGIN:
        return "yes"
    return "no" if row["reading"] == "below" and row["high"] < -MARGIN else "open"


def _short_of_tuning(rows: Sequence[Mapping[str, Any]]) -> Outcome:
    if any(row["reading"] == "below" for row in rows):
        return "yes"
    return "no" if all(row["low"] > -MARGIN for row in rows) else "open"


def _by_cell(rows: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The comparisons of each cell."""
    groups: dict[tuple[str, str, int, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["task"], row["n"], row["set"]), []).append(row)
    return list(groups.values())


def _hindrance(
    rows: Sequence[Mapping[str, Any]], taught: Mapping[tuple[str, str, int], Mapping[str, Any]]
) -> str | None:
    """Why a cell decides nothing, if so."""
    cell = taught.get((rows[0]["model"], rows[0]["task"], rows[0]["n"]))
    if any(row["sets"] < MIN_SETS for row in (*rows, *filter(None, [cell]))):
        return f"fewer than {MIN_SETS} demonstration sets"
    if not cell:
        return "not known whether there is anything to teach"
    return None if cell["taught"] else "nothing to teach"


def _hindrances(found: Sequence[str | None]) -> str:
    """What keeps all the cells of a claim from deciding it, as a sentence."""
    reasons = Counter(filter(None, found))
    if not reasons:
        text = "not measured on the same rows and demonstration sets in any cell"
    elif len(reasons) > 1:
        text = ", ".join(f"{reason} in {count} cell{'s' * (count != 1)}" for reason, count in reasons.items())
    else:
        (reason,) = reasons
        text = f"{reason} in {'the only' if len(found) == 1 else 'any' if reason.startswith('no') else 'every'} cell"
    return f"{text[0].upper()}{text[1:]}."


def _absent(words: Words, domain: str, against: Sequence[str]) -> str | None:
    """What a study would need to say anything about a claim, if it lacks it."""
    for name in [STUDENT, *([TEACHER] if TEACHER in against else [])]:
        if name not in words.arms:
            return f"The study has no arm {name}."
    if not against:
        return "The study has no fine-tuned arm."
    return "The study has no out-of-domain set." if domain == "out" and not words.outside else None


def _decided(claim: str, outcomes: Sequence[str], evidence: list[str], scope: str) -> Data:
    counts = {name: sum(o == name for o in outcomes) for name in ("yes", "no", "open")}
    verdict = "no" if counts["no"] else "yes" if outcomes and not counts["open"] else "not decidable"
    return {
        **{"claim": claim, "verdict": verdict, "counts": counts},
        "evidence": evidence,
        "scope": scope,
    }


def _said(outcome: str) -> str:
    return {"yes": "supports the claim", "no": "contradicts it", "open": "leaves it open"}[outcome]


def _cost_claim(costs: Sequence[Mapping[str, Any]], words: Words) -> Data:
    of = {(c["model"], c["task"], c["n"], c["arm"]): c for c in costs}
    outcomes, evidence = [], []
    for (model, task, n, arm), tuned in of.items():
        mine = of.get((model, task, n, STUDENT))
        if arm not in words.tuned or not mine:
            continue
        pairs = {name: (mine.get(name), tuned.get(name)) for name in ("labelled", "flops")}
        if not all(finite(value) for pair in pairs.values() for value in pair):
            continue
        less = mine["flops"] < tuned["flops"] and mine["labelled"] <= tuned["labelled"]
        outcomes.append("yes" if less else "no")
        evidence.append(
            f"{words.where({'model': model, 'task': task, 'n': n})}, against {words.arms[arm]}: {mine['flops']:.2g} FLOPs "
            f"({_data(mine)}) against {tuned['flops']:.2g} ({_data(tuned)}): {_said(outcomes[-1])}."
        )
    scope = "FLOPs of teacher and training together, whatever accuracy they buy"
    claim = "At the same number of labelled examples, a student needs less compute than few-shot fine-tuning."
    why = _absent(words, "in", words.tuned) or "FLOPs of both are not known in any cell."
    return _decided(claim, outcomes, evidence or [why], scope)


def _data(cost: Mapping[str, Any]) -> str:
    """`16 labelled examples and 128 unlabelled queries`."""
    unlabelled = f" and {cost['unlabelled']:,.0f} unlabelled queries" if cost.get("unlabelled") else ""
    return f"{cost['labelled']:,.0f} labelled examples{unlabelled}"
