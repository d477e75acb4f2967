"""What was measured, in words: the table, the verdict, the examples.

In: evaluation.json and lines of scores.jsonl. Out: plain data and sentences that the page, its text and the command
line share. Invariants: every estimate is formatted by `cells`; a verdict says what its interval and its comparisons say
against it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

from ctxdistill.readers import count

Data = dict[str, Any]

ARMS = {"zero_shot": "zero-shot", "in_context": "in-context", "distilled": "distilled", "fine_tuned": "fine-tuned"}
METRICS: dict[str, tuple[str, float, int]] = {
    # name: (label, factor, digits after the point), in the order of the table
    "format": ("valid format %", 100, 1),
    "pass_at_1": ("pass@1 %", 100, 1),
    "exact_match": ("exact match %", 100, 1),
    "squad_contains": ("answer contained %", 100, 1),
    "squad_exact": ("exact match, normalised %", 100, 1),
    "squad_f1": ("F1 of words %", 100, 1),
    "field_accuracy": ("field accuracy %", 100, 1),
    "label_accuracy": ("label accuracy %", 100, 1),
    "macro_f1": ("macro-F1", 1, 3),
    "free_label": ("written freely, a label %", 100, 1),
    "free_accuracy": ("written freely, right %", 100, 1),
    "kl": ("KL per token", 1, 3),
    "kl_closed": ("KL closed %", 100, 1),
    "top1": ("top-1 agreement %", 100, 1),
    "prompt_tokens": ("prompt tokens per request", 1, 1),
    "latency_ms": ("ms per request", 1, 1),
    "gap_closed": ("gap closed %", 100, 1),
}
BY_DEFINITION = {
    "kl": {"in_context": {"mean": 0.0}},
    "top1": {"in_context": {"mean": 1.0}},
    "kl_closed": {"zero_shot": {"mean": 0.0}, "in_context": {"mean": 1.0}},
}
NO_VALUE = "–"
LEVELS = {"faithful": 0.95, "close": 0.8}  # smallest share of the KL that is closed
HEAT = (0.05, 0.2, 0.5, 1.0, 2.0)  # nats per token where the colour gets one step stronger


def cells(metric: str, estimate: Mapping[str, Any] | None, *, unit: str = "", sign: bool = False) -> str:
    """An estimate as text, such as `82.5 [75.0, 89.2]`: the only place where results are formatted.

    Args:
        metric: decides factor and digits; shares become per cent, a user's own metric is left as it is.
        estimate: `mean` and maybe `low` and `high`; None or a mean that is not finite gives a dash.
        unit: written between the mean and the interval.
        sign: write a plus before positive numbers (for differences).
    """
    _, factor, digits = METRICS.get(metric, ("", 1.0, 3))
    if metric == "latency_ms" and estimate and finite(estimate.get("mean")) and estimate["mean"] >= 100:
        digits = 0
    numbers = [(estimate or {}).get(key) for key in ("mean", "low", "high")]
    mean, *interval = [round(n * factor, digits) + 0.0 if finite(n) else None for n in numbers]
    if mean is None:
        return NO_VALUE
    style = f"{'+' if sign else ''},.{digits}f"
    text = f"{mean:{style}}{unit and f' {unit}'}"
    if metric == "prompt_tokens" or None in interval or interval == [mean, mean]:
        return text  # counted, or equal by definition: not an estimate
    return f"{text} [{interval[0]:{style}}, {interval[1]:{style}}]"


def result_table(evaluation: Mapping[str, Any]) -> list[Data]:
    """The results as rows of plain data: `metric` (its key), `label` (for people), `cells` (arm -> text).

    A metric that no arm has is left out; one that an arm lacks is a dash there.
    """
    arms, table = evaluation["arms"], evaluation["table"]
    own = [m for m in dict.fromkeys(m for arm in arms for m in table.get(arm, {})) if m not in METRICS]
    names = list(METRICS)
    names[names.index("kl") : names.index("kl")] = own
    rows = []
    for metric in names:
        values = {arm: table.get(arm, {}).get(metric) for arm in arms}
        if metric == "kl_closed":
            values = {"distilled": evaluation.get("kl_closed")}
        if any(values.values()):
            known = BY_DEFINITION.get(metric, {})
            found = {arm: cells(metric, values.get(arm) or known.get(arm)) for arm in arms}
            rows.append({"metric": metric, "label": metric_label(metric), "cells": found})
    return rows


ROUND = {
    # key of a line: (label, factor, digits after the point)
    "reverse_kl": ("KL(student‖teacher)", 1, 3),
    "student_entropy": ("entropy", 1, 3),
    "teacher_entropy": ("teacher's entropy", 1, 3),
    "tokens": ("tokens", 1, 1),
    "ended": ("ended %", 100, 1),
    "repeated": ("repeated %", 100, 1),
}


def round_table(metrics: Iterable[Mapping[str, Any]]) -> Data | None:
    """The rounds of on-policy training, as `columns` and `rows` of text; None where there were none."""
    lines = [line for line in metrics if line.get("event") == "round"]
    if not lines:
        return None
    rows = []
    for line in lines:
        numbers = ((line.get(key), factor, digits) for key, (_, factor, digits) in ROUND.items())
        texts = [f"{value * factor:,.{digits}f}" if finite(value) else NO_VALUE for value, factor, digits in numbers]
        rows.append([str(line["round"]), str(line["step"]), f"{line['student_rows']} of {line['rows']}", *texts])
    return {
        "columns": ["round", "from step", "by the student", *(label for label, _, _ in ROUND.values())],
        "rows": rows,
    }


def crosstalk_table(found: Mapping[str, Any] | None) -> Data | None:
    """The cross-talk matrix as `columns` and `rows` of text, the first cell of a row being its name."""
    if not found:
        return None
    columns = ["rows of", *(f"teacher of {name}" for name in found["names"]), "nearest to its own %", "KL closed %"]
    rows = [
        [
            i,
            *(cells("kl", found["kl"][i][j]) for j in found["names"]),
            cells("exact_match", found["nearest"][i]),
            cells("kl_closed", found["closed"][i]),
        ]
        for i in found["names"]
    ]
    return {"columns": columns, "rows": rows}


UNRELATED = 0.1
"""Share of the taught KL, or nats per token, above which a change on unrelated prompts is remarked upon."""
FREELY = 0.95
"""Share of answers that are label words below which it is remarked that they were chosen among these."""
FEW = 20
"""Held-out rows below which it is remarked that there are few."""


def unrelated_share(evaluation: Mapping[str, Any]) -> float | None:
    """KL to the base model on unrelated prompts, as a share of the KL that was to be taught."""
    found = (evaluation.get("behaviour") or {}).get("unrelated")
    taught = (evaluation["table"].get("zero_shot", {}).get("kl") or {}).get("mean")
    return found["kl"]["mean"] / taught if found and finite(taught) and taught > 0 else None


def behaviour_facts(evaluation: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the adapter does elsewhere, as pairs of text; empty where nothing was measured."""
    found = evaluation.get("behaviour") or {}
    facts = []

    def per_cent(estimate: Mapping[str, Any]) -> str:
        return cells("exact_match", estimate, unit="%")

    if one := found.get("unrelated"):
        share = unrelated_share(evaluation)
        text = f"KL to the base model {cells('kl', one['kl'])} nats per token"
        text += f", {100 * share:.1f} % of the KL that was taught" if share is not None else ""
        facts.append((f"{one['rows']} unrelated prompts", f"{text}; the same answer on {per_cent(one['same'])}"))
    if one := found.get("again"):
        text = f"KL to the teacher {cells('kl', one['kl'])} nats per token, {cells('kl', one['alone'])} without it"
        facts.append(
            ("with the context in its prompt again", f"{text}; the teacher's answer on {per_cent(one['same'])}")
        )
    if one := found.get("other"):
        text = f"the base model's answer there on {per_cent(one['obeys'])}, that of the taught context on"
        text += f" {per_cent(one['keeps'])} (the two are the same on {per_cent(one['base_keeps'])})"
        text += f"; KL to the base model {cells('kl', one['kl'])} nats per token"
        facts.append((f"behind another system prompt, “{one['system']}”", text))
    for point in found.get("strengths") or []:
        text = f"KL closed {cells('kl_closed', point['kl_closed'], unit='%')}"
        if point.get("unrelated_kl"):
            text += f"; KL on unrelated prompts {cells('kl', point['unrelated_kl'])}"
        facts.append((f"strength {point['strength']:g}", text))
    return facts


def metric_label(metric: str) -> str:
    """`exact_match` -> `exact match %`; a user's own metric keeps its name."""
    return METRICS[metric][0] if metric in METRICS else metric


def arm_label(arm: str) -> str:
    """`zero_shot` -> `zero-shot`."""
    return ARMS.get(arm, arm.replace("_", "-"))


def verdict(evaluation: Mapping[str, Any]) -> Data:
    """Did it work?

    Returns `level` (faithful, close, partial, no effect, not judged), `sentence`, and `remarks` that qualify it.
    """
    table, closed = evaluation["table"], evaluation.get("kl_closed")
    zero, teacher, student = (table.get(arm, {}) for arm in ("zero_shot", "in_context", "distilled"))
    if not closed or not finite(closed.get("mean")):
        level, claim = "not judged", "the share of the KL that the adapter closes is not defined for this run"
        if zero.get("kl"):
            claim += f" (KL without the context: {cells('kl', zero['kl'])} nats per token)"
    else:
        level = next((name for name, least in LEVELS.items() if closed["mean"] >= least), "partial")
        claim = f"the adapter closes {cells('kl_closed', closed, unit='%')} of the KL"
        if level == "partial" and not (finite(closed.get("low")) and closed["low"] > 0):
            level = "no effect"
            worse = finite(closed.get("high")) and closed["high"] < 0
            claim += (
                ", so it is further from its teacher than the base model is"
                if worse
                else ", which is not distinguishable from nothing"
            )
    metric = evaluation.get("main_metric")
    if level in LEVELS and _worse(evaluation, "distilled", "in_context"):
        # A KL that is mostly form (the right kind of answer) can be closed while the answers are not the teacher's.
        gap = (evaluation.get("gap_closed") or {}).get("mean")
        level = "close" if finite(gap) and gap >= LEVELS["close"] else "partial"
    apart = evaluation.get("crosstalk") or {"good": True}
    if level in LEVELS and not apart["good"]:
        level = "partial"
    if metric and student.get(metric) and teacher.get(metric):
        unit = " %" if metric_label(metric).endswith("%") else ""
        claim += f" and answers with {scored(metric, student[metric]['mean'])}"
        claim += f" against {mean_of(metric, teacher)}{unit} with the context in the prompt"
        claim += f" and {mean_of(metric, zero)}{unit} without it" if zero.get(metric) else ""
    if student.get("prompt_tokens") and teacher.get("prompt_tokens"):
        tokens = [f"{table[arm]['prompt_tokens']['mean']:,.0f}" for arm in ("distilled", "in_context")]
        claim += f", using {tokens[0]} instead of {tokens[1]} prompt tokens"
    return {
        "level": level,
        "sentence": f"{level.capitalize()}: {claim}.",
        "remarks": _remarks(evaluation, level, metric),
    }


def _remarks(evaluation: Mapping[str, Any], level: str, metric: str | None) -> list[str]:
    """What a reader of the verdict must also know."""
    remarks = []
    closed, gap, gate, constant = (evaluation.get(key) or {} for key in ("kl_closed", "gap_closed", "gate", "constant"))
    if level in LEVELS and finite(closed.get("low")) and closed["low"] < LEVELS[level]:
        remarks.append(f"The interval reaches below the {100 * LEVELS[level]:.0f} % that “{level}” asks for.")
    remarks += [said for said in (_against_teacher(evaluation), _against_no_context(evaluation)) if said]
    if "undefined" in gap:
        reason = str(gap["undefined"]).rstrip(".")
        remarks.append(f"How much of the teacher's gain the adapter keeps (gap closed) is undefined: {reason}.")
    elif gap and metric:
        gain = metric_label(metric).removesuffix(" %")
        remarks.append(f"It keeps {cells('gap_closed', gap, unit='%')} of the teacher's gain in {gain}.")
    elif not metric:
        remarks.append("Only fidelity to the teacher was measured: without reference answers, not whether it is right.")
    student = evaluation["table"].get("distilled", {}).get(constant.get("metric"))
    if student and student["mean"] <= constant["mean"]:
        floor = scored(constant["metric"], constant["mean"])
        remarks.append(f"Always answering “{constant['prediction']}” scores {floor}; the adapter does not beat that.")
    if not (evaluation.get("crosstalk") or {"good": True})["good"]:
        remarks.append(
            f"The contexts are not all learnt and kept apart: {'; '.join(evaluation['crosstalk']['reasons'])}."
        )
    free = {arm: part.get("free_label") for arm, part in evaluation["table"].items()}
    if free.get("distilled") and free["distilled"]["mean"] < FREELY:
        own, teacher = (cells("free_label", free.get(arm), unit="%") for arm in ("distilled", "in_context"))
        remarks.append(
            "Its answer was chosen among the label words. Written freely, as by a server that is not held to them, it is one of "
            f"them on {own} (in-context: {teacher})."
        )
    if (share := unrelated_share(evaluation)) is not None:
        kl = evaluation["behaviour"]["unrelated"]["kl"]
        if max(share, kl["mean"]) > UNRELATED:
            remarks.append(
                f"It changes unrelated prompts, too: KL to the base model {cells('kl', kl)} nats per token, {100 * share:.0f} % of "
                "the taught KL; train.retain_weight lowers that."
            )
    if (rows := evaluation.get("rows")) and rows < FEW:
        remarks.append(f"All this is measured on {rows} held-out rows, which are few: others may say something else.")
    if gate.get("verdict", "teach") != "teach":
        reasons = "; ".join(gate.get("reasons") or ["no reason recorded"])
        remarks.append(f"The gate had found nothing to teach: {reasons}.")
    if level not in LEVELS and evaluation.get("cost"):
        remarks.append(
            "What a request saves counts only if such answers will do in the place of those with the context."
        )
    return remarks


def _difference(evaluation: Mapping[str, Any], a: str, b: str) -> Data | None:
    """Arm `a` minus arm `b` in the main metric; None where they were not compared."""
    for pair in evaluation.get("comparisons") or []:
        if pair["metric"] == evaluation.get("main_metric") and {pair["a"], pair["b"]} == {a, b}:
            sign = 1 if pair["a"] == a else -1
            low, high = sorted(sign * pair["difference"][key] for key in ("low", "high"))
            return {"mean": sign * pair["difference"]["mean"], "low": low, "high": high}
    return None


def _minus(evaluation: Mapping[str, Any], a: str, b: str) -> str:
    metric = evaluation["main_metric"]
    label = metric_label(metric)
    unit = "points" if label.endswith("%") else ""
    difference = cells(metric, _difference(evaluation, a, b), unit=unit, sign=True)
    return f"{arm_label(a)} minus {arm_label(b)}, {label.removesuffix(' %')}: {difference}"


def _worse(evaluation: Mapping[str, Any], a: str, b: str) -> bool:
    """Whether arm `a` is shown to be below arm `b`."""
    difference = _difference(evaluation, a, b)
    return difference is not None and bool(difference["high"] < 0)


def _against_teacher(evaluation: Mapping[str, Any]) -> str | None:
    difference = _difference(evaluation, "distilled", "in_context")
    if difference is None:
        return None
    found = "worse" if difference["high"] < 0 else "better" if difference["low"] > 0 else ""
    end = f": the adapter is {found} than its teacher." if found else "; no difference shown."
    return _sentence(_minus(evaluation, "distilled", "in_context") + end)


def _against_no_context(evaluation: Mapping[str, Any]) -> str | None:
    """A context that makes it worse makes its adapter worse, however faithful that is."""
    worse = [arm for arm in ("in_context", "distilled") if _worse(evaluation, arm, "zero_shot")]
    if not worse:
        return None
    who = {"in_context": "the teacher", "distilled": "the adapter"}[worse[0]]
    who = "the adapter, as its teacher," if len(worse) == 2 else who
    found = "; ".join(_minus(evaluation, arm, "zero_shot") for arm in worse)
    return _sentence(f"{found}: {who} is worse than the model without the context.")


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def examples(scores: Sequence[Mapping[str, Any]], evaluation: Mapping[str, Any], count: int = 8) -> list[Data]:
    """The first `count` rows of scores.jsonl side by side, in their order and not chosen.

    Each: `row`, `query`, `answer` (text or None) and `arms`: `arm`, `label`, `prediction`, `mark` (`class`, `text`),
    `kl`, and `tokens` over the teacher's completion: `text`, `kl` in nats, `level` 0 to 5.
    """
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for line in scores:
        if line["row"] in rows or len(rows) < count:
            rows.setdefault(line["row"], []).append(line)
    found = []
    for row, lines in rows.items():
        by_arm = {line["arm"]: line for line in lines}
        arms = [
            {
                "arm": arm,
                "label": arm_label(arm),
                "prediction": by_arm[arm].get("prediction"),
                "mark": _mark(by_arm[arm], evaluation.get("main_metric")),
                "kl": cells("kl", {"mean": by_arm[arm].get("kl")}),
                "tokens": [
                    {"text": text, "kl": cells("kl", {"mean": kl}), "level": sum(kl >= limit for limit in HEAT)}
                    for text, kl in by_arm[arm].get("token_kl") or []
                ],
            }
            for arm in evaluation["arms"]
            if arm in by_arm
        ]
        found.append({"row": row, "query": lines[0].get("query"), "answer": lines[0].get("answer"), "arms": arms})
    return found


def _mark(line: Mapping[str, Any], main_metric: str | None) -> Data:
    metrics = line.get("metrics") or {}
    metric = next((m for m in (main_metric, "exact_match", "label_accuracy") if m and finite(metrics.get(m))), None)
    if metric is None or line.get("answer") is None:
        return {"class": "none", "text": ""}
    value = metrics[metric]
    if metric not in METRICS:
        return {"class": "part", "text": f"{metric} {cells(metric, {'mean': value})}"}
    if metric == "format" and value in (0, 1):  # well formed is not right
        return {"class": "good", "text": "✓ valid"} if value else {"class": "bad", "text": "✗ not valid"}
    if value in (0, 1):
        return {"class": "good", "text": "✓ correct"} if value else {"class": "bad", "text": "✗ incorrect"}
    return {"class": "part", "text": f"partly right: {cells(metric, {'mean': value})} %"}


def mean_of(metric: str, arm: Mapping[str, Any]) -> str:
    """The mean alone, of a metric in an arm's part of the table."""
    return cells(metric, {"mean": (arm.get(metric) or {}).get("mean")})


def scored(metric: str, value: float) -> str:
    """`81.7 % exact match`."""
    text, label = cells(metric, {"mean": value}), metric_label(metric)
    return f"{text} % {label.removesuffix(' %')}" if label.endswith("%") else f"{text} {label}"


def shorter(saved: float) -> str:
    """How much shorter a request's prompt is: `447 prompt tokens shorter`."""
    if saved > 0:
        return f"{saved:,.0f} prompt tokens shorter"
    why = "the chat template puts a system text of its own in the context's place (context.student_system)"
    return f"{-saved:,.0f} prompt tokens longer: {why}" if saved < 0 else f"as long: {why}"


def in_time(saved: Mapping[str, Any] | None) -> str | None:
    """What the timed requests say where they do not show that one is quicker, `never pays off: ...` or `is not shown to pay off: ...`;
    None where they do, or none was timed."""
    if not saved:
        return None
    several = saved["n"] > 1  # one row has no interval
    if several and saved["low"] > 0:
        return None
    found = "never pays off" if several and saved["high"] < 0 else "is not shown to pay off"
    return f"{found}: {cells('latency_ms', saved, unit='ms', sign=True)} saved by a request, {count(saved['n'], 'row')}"


def finite(value: Any) -> TypeGuard[float]:
    """A number that is neither missing nor NaN nor infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def tally(counts: Mapping[str, int]) -> str:
    """Numbers of cells by status, as words: `21 did not fit, 1 failed`."""
    words = {"infeasible": "did not fit"}
    return ", ".join(f"{count} {words.get(status, status)}" for status, count in counts.items() if count)


def in_one_line(reason: str) -> str:
    """A reason why a cell has no result, without line breaks."""
    return "; ".join(line.strip() for line in reason.splitlines())
