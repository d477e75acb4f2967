"""Every arm on the same rows: zero-shot (no context, no adapter), in-context (the teacher), distilled (the student).

In: pairs of prompts, the model, the teacher's targets on these pairs. Out: one score per arm and row, the tables made of
them, the gate's verdict. Invariants: all arms share rows, prompts, decoding and scoring; fidelity is measured on the
teacher's own greedy completions with exact targets; every estimate comes with a 95 % interval.
"""

from __future__ import annotations

import importlib
import math
import numbers
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ctxdistill import losses, programs, sandbox, stats
from ctxdistill.answers import METRICS as answer_metrics
from ctxdistill.errors import RecipeError
from ctxdistill.lm import LM
from ctxdistill.prompts import Pair, Prompter, join
from ctxdistill.readers import count
from ctxdistill.recipe import CompletionsSection, EvalSection, Recipe, TargetsSection
from ctxdistill.rundir import Progress, no_progress
from ctxdistill.spool import Lazy
from ctxdistill.store import Target, TargetStore
from ctxdistill.targets import label, score_labels
from ctxdistill.trust import need_code

FEW_ROWS = 30
"""Below this, a gain that is possible but not proven does not stop a run."""
ARMS = ("zero_shot", "in_context", "distilled")
Score = dict[str, Any]
Metric = Callable[[str, str | None, Mapping[str, Any]], float | None]
"""(prediction, answer, the row's columns) -> a number, or None where the row cannot be judged."""


# -- metrics ----------------------------------------------------------------------------------------------------------


def folded(text: str) -> str:
    """Without case, and with single spaces."""
    return " ".join(text.split()).casefold()


def same(prediction: str, answer: str) -> bool:
    """Equal but for case and white space."""
    return folded(prediction) == folded(answer)


def freely(text: str, answer: str | None, words: Sequence[str]) -> dict[str, float | None]:
    """What an answer is worth that was written, and not chosen among the label words: whether it is one of them, and the right one."""
    return {
        "free_label": float(any(same(text, word) for word in words)),
        "free_accuracy": None if answer is None else float(same(text, answer)),
    }


def field_accuracy(pattern: re.Pattern[str], prediction: str, answer: str) -> float:
    """Share of the named groups of `pattern` that prediction and answer have in common; 0 for another format."""
    right, found = pattern.fullmatch(answer), pattern.fullmatch(prediction)
    if not right or not found:
        return 0.0
    return statistics.fmean(same(found[name] or "", right[name] or "") for name in pattern.groupindex)


def metrics_of(recipe: Recipe, pairs: Sequence[Pair]) -> dict[str, Metric]:
    """The row metrics that the recipe names, or all that its data allows. `macro_f1` is made from the predictions later,
    where there is label accuracy.

    Raises: `RecipeError` for a metric that lacks what it needs.
    """
    e = recipe.eval
    pattern = re.compile(e.format, re.DOTALL) if e.format else None
    answers = any(pair.answer is not None for pair in pairs)
    with_answer: dict[str, Metric] = {}
    if recipe.prompt.label_words:
        with_answer["label_accuracy"] = lambda p, a, _: None if a is None else float(p == a)
    else:
        with_answer["exact_match"] = lambda p, a, _: None if a is None else float(same(p, a))
    available: dict[str, Metric] = dict(with_answer) if answers else {}
    if recipe.code.run and any(programs.tests_of(pair.fields, recipe.code)[0] for pair in pairs):
        sandbox.isolation()  # says now whether it works here
        available = {programs.METRIC: lambda p, _a, row: programs.pass_at_1(p, row, recipe.code), **available}
    if pattern is not None:
        available["format"] = lambda p, _a, _r: float(pattern.fullmatch(p) is not None)
        if pattern.groupindex and answers:
            available["field_accuracy"] = lambda p, a, _: None if a is None else field_accuracy(pattern, p, a)
    if programs.METRIC in e.metrics and not recipe.code.run:
        raise RecipeError(
            f"eval.metrics: {programs.METRIC} runs code that the model wrote, which nobody has allowed",
            expected="code.run=true",
            found="code.run=false",
            fix="read in docs/howto-code.md what the sandbox protects from and what not, then set code.run=true",
        )
    if not e.metrics:
        return available
    available |= answer_metrics if answers else {}
    chosen: dict[str, Metric] = {}
    for name in e.metrics:
        if ":" in name:
            chosen[name] = load_function(name, recipe)
        elif name in available:
            chosen[name] = available[name]
        elif name == "macro_f1" and "label_accuracy" in available:
            chosen["label_accuracy"] = available["label_accuracy"]
        else:
            needs = {
                "format": "eval.format", "field_accuracy": "eval.format with named groups, and reference answers",
                "exact_match": "reference answers (column eval.answer) and no prompt.label_words",
                **dict.fromkeys(answer_metrics, "reference answers"),
                programs.METRIC: f"held-out rows with tests (column {recipe.code.tests!r}, which code.tests names)",
                "label_accuracy": "prompt.label_words and reference answers", "macro_f1": "prompt.label_words and reference answers",
            }  # fmt: skip
            raise RecipeError(
                f"eval.metrics: {name} cannot be measured here", expected=needs[name], fix="add it, or drop the metric"
            )
    return chosen


def load_function(name: str, recipe: Recipe, key: str = "eval.metrics") -> Metric:
    """A user's own function, `module:function`; modules beside the recipe are found. `key` names it in messages.

    Raises: `RecipeError` when it cannot be loaded, or nobody has allowed that (`trust`)."""
    need_code(f"{key} = {name!r}")
    module, _, function = name.partition(":")
    folder = str(recipe.base_dir)
    sys.path.insert(0, folder)
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # the user's module raises what it likes
        raise RecipeError(
            f"{key}: cannot load {name!r}: {type(error).__name__}: {error}",
            expected="a module beside the recipe or installed, and a function in it",
        ) from None
    finally:
        sys.path.remove(folder)

    def metric(prediction: str, answer: str | None, row: Mapping[str, Any]) -> float | None:
        given = f"prediction {prediction!r:.60}, answer {answer!r:.60}"
        try:
            value = found(prediction, answer, row)
        except Exception as error:
            raise RecipeError(f"{name} failed: {type(error).__name__}: {error}", found=given) from error
        if value is not None and not (isinstance(value, numbers.Real) and math.isfinite(value)):
            raise RecipeError(f"{name} returned {value!r}", expected="a finite number, or None", found=given)
        return None if value is None else float(value)

    return metric


# -- arms -------------------------------------------------------------------------------------------------------------


def teacher_limit(recipe: Recipe) -> int:
    """Longest answer of the teacher on a held-out row, its thoughts included."""
    thinks = recipe.completions.scratchpad or recipe.completions.extract
    return max(recipe.eval.max_new_tokens, recipe.completions.max_new_tokens if thinks else 0)


def teacher_targets(
    lm: LM,
    prompter: Prompter,
    pairs: Sequence[Pair],
    recipe: Recipe,
    store: TargetStore,
    progress: Progress = no_progress,
) -> Sequence[Target]:
    """The teacher's own answers on held-out rows (greedy, or its label), with its exact hidden states."""
    completions = CompletionsSection(
        source="label" if recipe.prompt.label_words else "teacher",
        max_new_tokens=teacher_limit(recipe),
        extract=recipe.completions.extract,
        teach=recipe.completions.teach,
    )
    kind = TargetsSection(kind="hidden", batch_size=recipe.targets.batch_size)
    made = label(
        lm,
        prompter,
        pairs,
        recipe,
        store,
        completions=completions,
        kind=kind,
        whole=True,
        progress=progress,
        stage="in-context answers",
    )
    return Lazy.over(made, lambda row: row[0])


@torch.no_grad()
def score_arm(
    arm: str,
    lm: LM,
    prompter: Prompter,
    pairs: Sequence[Pair],
    targets: Sequence[Target],
    recipe: Recipe,
    *,
    progress: Progress = no_progress,
) -> list[Score]:
    """One score per row; see `docs/concepts.md` for what each number is."""
    metrics = metrics_of(recipe, pairs)
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i].teacher))  # a batch is padded to its longest row
    pairs, targets = [pairs[i] for i in order], [targets[i] for i in order]
    scores: list[Score] = []
    with lm.adapter(arm == "distilled"):
        prompts = Lazy.over(pairs, lambda pair: pair.teacher if arm == "in_context" else pair.student)
        prefix = lm.prefix(prompts)
        tokens = max(map(len, prompts), default=0) + recipe.eval.max_new_tokens
        batch = lm.rows_at_once(recipe.targets.batch_size, tokens, len(prefix.ids) if prefix else 0)
        for start in range(0, len(pairs), batch):
            some = slice(start, start + batch)
            if arm == "in_context" and not recipe.prompt.label_words:
                written = [list(target.ids) for target in targets[some]]
            else:
                written = lm.generate(
                    prompts[some], max_new_tokens=recipe.eval.max_new_tokens, ends=prompter.ends, prefix=prefix
                )
            greedy = [prompter.answer(ids) for ids in written]
            predictions = greedy
            if recipe.prompt.label_words:
                logprobs = score_labels(lm, prompts[some], prompter.labels, prefix=prefix, batch_size=batch).logprobs
                predictions = [recipe.prompt.label_words[i] for i in logprobs.argmax(1).tolist()]
            rows = [join(prompt, target.ids) for prompt, target in zip(prompts[some], targets[some], strict=True)]
            hiddens = [None] * len(rows) if arm == "in_context" else lm.hidden(rows, prefix)
            for pair, target, prediction, text, hidden in zip(
                pairs[some], targets[some], predictions, greedy, hiddens, strict=True
            ):
                answer = prompter.reference(pair.answer)
                score = {
                    "arm": arm, "row": pair.id, "query": pair.query, "answer": answer, "prediction": prediction,
                    "metrics": {name: metric(prediction, answer, pair.fields) for name, metric in metrics.items()},
                    "prompt_tokens": len(pair.teacher if arm == "in_context" else pair.student),
                    **fidelity(lm, prompter, target, hidden),
                }  # fmt: skip
                if words := recipe.prompt.label_words:
                    score["greedy"] = text
                    score["metrics"] |= freely(text, answer, words)
                scores.append(score)
            progress(f"evaluate {arm.replace('_', '-')}", len(scores), len(pairs))
    return [scores[place] for place in np.argsort(order)]


def fidelity(lm: LM, prompter: Prompter, target: Target, hidden: torch.Tensor | None) -> Score:
    """How far hidden states [T, d] at the teacher's completion are from the teacher's; None is the teacher itself."""
    n = len(target.ids)
    if hidden is None:
        return {"kl": 0.0, "top1": 1.0, "tokens": n}
    teacher = lm.head(target.tensors["hidden"].to(lm.device))  # [T, V]
    own = lm.head(hidden)  # [T, V]
    kl = losses.divergence("forward_kl", teacher, own).clamp(min=0)  # [T]
    top1 = (teacher.argmax(-1) == own.argmax(-1)).float().mean().item()
    tokens = [[piece, round(value, 5)] for piece, value in zip(prompter.pieces(target.ids), kl.tolist(), strict=True)]
    return {"kl": kl.mean().item(), "top1": top1, "tokens": n, "token_kl": tokens}


@torch.no_grad()
def latency(
    arm: str, lm: LM, prompter: Prompter, pairs: Sequence[Pair], recipe: Recipe, progress: Progress = no_progress
) -> list[float]:
    """Milliseconds per request, one request at a time, the whole prompt read each time (a server without prefix cache)."""
    times = []
    rows = pairs[: recipe.eval.latency_rows]
    limit = teacher_limit(recipe) if arm == "in_context" else recipe.eval.max_new_tokens
    with lm.adapter(arm == "distilled"):
        for number, pair in enumerate([*rows[:1], *rows]):  # the first one warms up
            prompt = pair.teacher if arm == "in_context" else pair.student
            started = time.perf_counter()
            lm.generate(
                [prompt], max_new_tokens=limit, ends=prompter.ends, record=False
            )  # which is not for one request
            times.append(1000 * (time.perf_counter() - started))
            progress(f"time {arm.replace('_', '-')}", number, len(rows))
    return times[1:]


# -- tables -----------------------------------------------------------------------------------------------------------


def main_metric(scores: Sequence[Score]) -> str | None:
    """The metric that the gate and `gap_closed` look at: accuracy where there are answers, else the user's first one."""
    names: list[str] = list(scores[0]["metrics"]) if scores else []
    for name in ("label_accuracy", programs.METRIC, "exact_match", *(n for n in names if n in answer_metrics)):
        if name in names and any(s["metrics"][name] is not None for s in scores):
            return name
    return next((n for n in names if ":" in n), next((n for n in names if n == "format"), None))


def column(scores: Sequence[Score], metric: str) -> np.ndarray[Any, Any]:
    """A metric's values over the rows where it is defined, [N]."""
    return np.array([s["metrics"][metric] for s in scores if s["metrics"].get(metric) is not None], dtype=float)


def shared(metric: str, *arms: Sequence[Score]) -> list[np.ndarray[Any, Any]]:
    """A metric's values in each arm over the rows where all of them have one, [N] each; a user's metric may judge a row in
    one arm and not in another."""
    rows = zip(*([s["metrics"].get(metric) for s in scores] for scores in arms), strict=True)
    judged = [values for values in rows if None not in values]
    return list(np.array(judged, dtype=float).reshape(-1, len(arms)).T)


def tables(
    scores: Mapping[str, Sequence[Score]], latencies: Mapping[str, Sequence[float]], section: EvalSection
) -> dict[str, Any]:
    """`evaluation.json` but for gate, training and cost."""
    options = {"resamples": section.bootstrap, "seed": stats.SEED}
    arms = [arm for arm in ARMS if arm in scores]
    first = scores[arms[0]]
    main = main_metric(first)
    table: dict[str, Any] = {}
    for arm in arms:
        rows = scores[arm]
        cells = {
            m: stats.bootstrap_mean(column(rows, m), **options).to_dict()
            for m in first[0]["metrics"]
            if len(column(rows, m))
        }
        if "label_accuracy" in cells:
            cells["macro_f1"] = macro_f1_estimate(rows, **options)
        if arm != "in_context":
            cells["kl"] = kl_estimate(rows, **options)
            cells["top1"] = stats.bootstrap_mean([s["top1"] for s in rows], **options).to_dict()
        lengths = [s["prompt_tokens"] for s in rows]
        cells["prompt_tokens"] = {
            "mean": statistics.fmean(lengths),
            "low": min(lengths),
            "high": max(lengths),
            "n": len(lengths),
        }
        if latencies.get(arm):
            times = stats.t_mean(latencies[arm]).to_dict()
            cells["latency_ms"] = times | {"low": max(0.0, times["low"])}
        table[arm] = cells
    result: dict[str, Any] = {
        "arms": arms,
        "rows": len(first),
        "answers": sum(s["answer"] is not None for s in first),
        "main_metric": main,
        "table": table,
        "kl_closed": None,
        "gap_closed": None,
        "ms_saved": None,
        "comparisons": comparisons(scores, arms, main, options) if main else [],
        "constant": constant(first),
    }
    if latencies.get("in_context") and latencies.get("distilled"):
        saved = np.array(latencies["in_context"]) - np.array(latencies["distilled"])  # [N], of the same rows
        result["ms_saved"] = stats.t_mean(saved).to_dict()
    if "distilled" in scores:
        tokens = [s["tokens"] for s in first]
        sums = {arm: [s["kl"] * s["tokens"] for s in scores[arm]] for arm in ("distilled", "zero_shot")}
        closed = stats.kl_closed(sums["distilled"], sums["zero_shot"], tokens, **options)
        result["kl_closed"] = closed.to_dict() if closed else None
        if main:
            columns = shared(main, *(scores[arm] for arm in ("distilled", "zero_shot", "in_context")))
            gap = stats.closed(*columns, **options) if len(columns[0]) else "no row could be judged in all arms"
            result["gap_closed"] = {"undefined": gap} if isinstance(gap, str) else gap.to_dict()
    return result


def kl_estimate(rows: Sequence[Score], *, resamples: int, seed: int) -> dict[str, float]:
    """Mean KL per token (long answers count for their tokens), with an interval over rows."""
    sums, tokens = np.array([s["kl"] * s["tokens"] for s in rows]), np.array([s["tokens"] for s in rows])
    draws = np.random.default_rng(seed).integers(0, len(rows), (resamples, len(rows)))
    low, high = np.quantile(sums[draws].sum(1) / tokens[draws].sum(1), [0.025, 0.975])
    return {"mean": float(sums.sum() / tokens.sum()), "low": float(low), "high": float(high), "n": len(rows)}


def macro_f1_estimate(rows: Sequence[Score], *, resamples: int, seed: int) -> dict[str, float]:
    """Macro-F1 with a bootstrap interval over rows."""
    judged = [(s["answer"], s["prediction"]) for s in rows if s["answer"] is not None]
    answers, predictions = np.array([a for a, _ in judged]), np.array([p for _, p in judged])
    random = np.random.default_rng(seed)
    draws = [random.integers(0, len(judged), len(judged)) for _ in range(min(resamples, 500))]
    low, high = np.quantile([stats.macro_f1(answers[d], predictions[d]) for d in draws], [0.025, 0.975])
    return {"mean": stats.macro_f1(answers, predictions), "low": float(low), "high": float(high), "n": len(judged)}


def constant(rows: Sequence[Score]) -> dict[str, Any] | None:
    """What always giving the most frequent answer would score: the floor for every accuracy."""
    answers = [s["answer"] for s in rows if s["answer"] is not None]
    if not answers:
        return None
    metric = "label_accuracy" if "label_accuracy" in rows[0]["metrics"] else "exact_match"
    form = folded if metric == "exact_match" else str  # what counts as one answer
    most, accuracy = stats.constant_baseline([form(answer) for answer in answers])
    prediction, _ = stats.constant_baseline([answer for answer in answers if form(answer) == most])
    return {"prediction": prediction, "metric": metric, "mean": accuracy}


def comparisons(
    scores: Mapping[str, Sequence[Score]], arms: Sequence[str], metric: str, options: dict[str, int]
) -> list[dict[str, Any]]:
    """Every pair of arms on the rows that could be judged in both; none where there are no such rows."""
    result = []
    for i, b in enumerate(arms):
        for a in arms[i + 1 :]:
            x, y = shared(metric, scores[a], scores[b])
            if not len(x):
                continue
            binary = set(np.unique(np.concatenate([x, y]))) <= {0.0, 1.0}
            difference = stats.paired_difference(x, y, **options).to_dict()
            result.append(
                {
                    "a": a,
                    "b": b,
                    "metric": metric,
                    "difference": difference,
                    "p_mcnemar": stats.mcnemar(x, y) if binary else None,
                }
            )
    return result


# -- the gate ---------------------------------------------------------------------------------------------------------


def gate_verdict(
    scores: Mapping[str, Sequence[Score]], pairs: Sequence[Pair], lm: LM, recipe: Recipe
) -> dict[str, Any]:
    """Is there anything to teach? From the zero-shot and in-context arms on the same rows."""
    options = {"resamples": recipe.eval.bootstrap, "seed": stats.SEED}
    base, teacher = scores["zero_shot"], scores["in_context"]
    kl = kl_estimate(base, **options)
    metric, gain = main_metric(base), None
    reasons, teach = [], True
    if kl["mean"] < recipe.gate.min_kl:
        teach = False
        reasons.append(
            f"the context hardly changes the model: KL {kl['mean']:.4f} nats per token, below {recipe.gate.min_kl}"
        )
    else:
        reasons.append(
            f"the context changes the model: KL {kl['mean']:.3f} [{kl['low']:.3f}, {kl['high']:.3f}] nats per token"
        )
    with_context, without = shared(metric or "", teacher, base)
    if metric and not len(without):
        reasons.append(f"no row could be judged by {metric} in both arms; judged by the KL alone")
    elif metric:
        gain = stats.paired_difference(with_context, without, **options).to_dict()
        text = f"{100 * gain['mean']:+.1f} [{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}] points of {metric}"
        best = max(float(values.mean()) for values in (with_context, without))
        n, least = len(without), recipe.gate.min_gain
        undecided = n == 1 or gain["low"] <= least < gain["high"]  # one share has no interval
        if gain["low"] > least and not undecided:
            reasons.append(f"the context helps: {text}")
        elif metric == "exact_match" and best < 0.05 and not recipe.eval.metrics:
            reasons.append(f"exact match says nothing here, both arms are below 5 %: {text}; judged by the KL alone")
        elif n < FEW_ROWS and undecided:
            end = "; going on" if teach else ""
            reasons.append(f"whether it helps cannot be told with {count(n, 'row')}: {text}{end}")
        else:
            teach = False
            more = f" by more than {100 * least:g} points" if least else ""
            shown = "makes it worse" if gain["high"] < 0 else f"is not shown to help{more}"
            reasons.append(f"the context {shown} on {count(n, 'row')}: {text}")
    lengths = [len(pair.student) for pair in pairs]
    extra = [len(pair.teacher) - len(pair.student) for pair in pairs]
    return {
        "verdict": "teach" if teach else "nothing to teach",
        "reasons": reasons,
        "gain": gain,
        "metric": metric,
        "kl": kl,
        "context_tokens": round(statistics.median(extra)),
        "query_tokens": {"mean": statistics.fmean(lengths), "max": max(lengths)},
        "window": lm.window,
        "fits": True,  # prompts that do not fit were refused before
    }
