"""Arms on the same rows, fidelity against a slow reference, metrics, the gate's verdict."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from ctxdistill.accounts import cost
from ctxdistill.dataset import prepare
from ctxdistill.errors import RecipeError
from ctxdistill.evaluate import (
    constant,
    field_accuracy,
    freely,
    gate_verdict,
    latency,
    macro_f1_estimate,
    main_metric,
    metrics_of,
    same,
    score_arm,
    tables,
    teacher_targets,
)
from ctxdistill.recipe import Recipe
from ctxdistill.store import TargetStore
from ctxdistill.targets import score_labels


def ready(job: Path, **overrides: Any) -> tuple[Any, ...]:
    recipe = Recipe.from_dict(tiny.recipe_dict(job, **overrides), base_dir=job)
    return (recipe, *prepare(recipe))


def test_scores_are_those_of_the_slow_reference(job: Path) -> None:
    recipe, lm, prompter, data = ready(job)
    pairs = data.pairs["train"]
    assert (lengths := [len(p.teacher) for p in pairs]) != sorted(lengths)  # they are not batched in their own order
    targets = teacher_targets(lm, prompter, pairs, recipe, TargetStore(job / "t"))
    base = score_arm("zero_shot", lm, prompter, pairs, targets, recipe)
    teacher = score_arm("in_context", lm, prompter, pairs, targets, recipe)
    assert [s["row"] for s in base] == [s["row"] for s in teacher] == [p.id for p in pairs]
    for pair, target, score, other in zip(pairs, targets, base, teacher, strict=True):
        n = len(target.ids)
        with torch.no_grad():
            p, q = (
                lm.model(input_ids=torch.tensor([[*prompt, *target.ids]])).logits[0, -n - 1 : -1].softmax(-1)
                for prompt in (pair.teacher, pair.student)
            )
        kl = (p * (p / q).log()).sum(-1)
        assert score["kl"] == pytest.approx(kl.mean().item(), rel=1e-3, abs=1e-5)
        assert [v for _, v in score["token_kl"]] == pytest.approx(kl.tolist(), rel=1e-2, abs=1e-4)
        assert score["top1"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).float().mean().item())
        assert (score["prompt_tokens"], other["prompt_tokens"]) == (len(pair.student), len(pair.teacher))
        assert other["prediction"] == prompter.text(target.ids) and other["kl"] == 0
        assert target.ids[0] == p[0].argmax().item()  # the teacher's answer is greedy


def test_labels_are_scored_by_their_whole_sequence(job: Path) -> None:
    _, lm, prompter, data = ready(job)
    prompts = [p.teacher for p in data.pairs["eval"]]
    labels = {"ANT": prompter.completion("ANT"), "BEE": prompter.completion("BEE"), "OXEN": prompter.completion("OXEN")}
    with torch.no_grad():
        fast = score_labels(lm, prompts, labels, prefix=lm.prefix(prompts), batch_size=5)
        assert fast.first.shape == (len(prompts), 32)
        for i, prompt in enumerate(prompts):
            first = lm.hidden([([*prompt, 5], 1)])[0][0]
            assert torch.allclose(fast.first[i], first, atol=1e-4)
            for j, ids in enumerate(labels.values()):
                logprobs = lm.model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0].log_softmax(-1)
                slow = sum(logprobs[len(prompt) - 1 + t, token].item() for t, token in enumerate(ids))
                assert fast.logprobs[i, j].item() == pytest.approx(slow, rel=1e-4, abs=1e-3)


def test_label_tasks_are_measured_by_label(job: Path) -> None:
    words = ["ant", "bee", "cat", "dog", "eel", "fox"]
    ready(job)
    for name, prefix in (("q2", "which"), ("e2", "tell")):
        rows = [{"prompt": f"{prefix} {w}", "answer": "ANT" if i % 2 else "BEE"} for i, w in enumerate(words)]
        tiny.write_jsonl(job / f"{name}.jsonl", rows)
    recipe, lm, prompter, data = ready(
        job, prompt={"label_words": ["ANT", "BEE"]}, context={"system": "Answer ANT or BEE."},
        queries={"data": "q2.jsonl"}, eval={"data": "e2.jsonl", "max_new_tokens": 4},
    )  # fmt: skip
    pairs = data.pairs["eval"]
    targets = teacher_targets(lm, prompter, pairs, recipe, TargetStore(job / "t"))
    scores = {arm: score_arm(arm, lm, prompter, pairs, targets, recipe) for arm in ("zero_shot", "in_context")}
    assert {s["prediction"] for arm in scores.values() for s in arm} <= {"ANT", "BEE"}
    for score in scores["zero_shot"]:
        said = score["greedy"].strip().casefold()
        assert score["metrics"]["free_label"] == (said in ("ant", "bee"))
        assert score["metrics"]["free_accuracy"] == (said == score["answer"].casefold())
    result = tables(scores, {}, recipe.eval)
    assert result["main_metric"] == "label_accuracy" and "macro_f1" in result["table"]["zero_shot"]
    asked = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"metrics": ["macro_f1"]})})
    scores = {"zero_shot": score_arm("zero_shot", lm, prompter, pairs, targets, asked)}
    assert tables(scores, {}, asked.eval)["table"]["zero_shot"]["macro_f1"] == result["table"]["zero_shot"]["macro_f1"]
    assert result["constant"] == {
        "prediction": result["constant"]["prediction"],
        "metric": "label_accuracy",
        "mean": 0.5,
    }


@pytest.mark.parametrize(("metric", "prediction", "mean"), [("exact_match", "yes", 0.6), ("label_accuracy", "No", 0.4)])
def test_the_constant_answer_scores_what_the_metric_says(metric: str, prediction: str, mean: float) -> None:
    answers = ["Yes", "yes", " yes\n", "yes", "YES", "yes", "No", "No", "No", "No"]
    rows = [{"answer": answer, "metrics": {metric: 0.0}} for answer in answers]
    assert constant(rows) == {"prediction": prediction, "metric": metric, "mean": mean}


def test_what_is_written_freely_is_judged_as_it_is() -> None:
    words = ["ANT", "BEE"]
    assert freely(" bee\n", "BEE", words) == {"free_label": 1.0, "free_accuracy": 1.0}
    assert freely("ANT", "BEE", words) == {"free_label": 1.0, "free_accuracy": 0.0}
    assert freely("ANT!", None, words) == {"free_label": 0.0, "free_accuracy": None}


def test_time_is_saved_where_the_timed_rows_show_it() -> None:
    score = {
        "row": "1",
        "query": "q",
        "answer": None,
        "prediction": "p",
        "metrics": {},
        "prompt_tokens": 9,
        "kl": 1.0,
        "top1": 1.0,
        "tokens": 2,
    }
    scores = {arm: [{**score, "arm": arm}] for arm in ("zero_shot", "in_context", "distilled")}
    recipe = Recipe.from_dict({"model": {"name": "x"}, "context": {"system": "s"}, "queries": {"data": "q"}})
    for teacher, student, shown in (
        ([90.0, 100.0, 110.0], [50.0, 61.0, 70.0], True),
        ([90.0, 200.0, 30.0], [50.0, 60.0, 110.0], False),
        ([90.0, 110.0], [80.0, 70.0], False),  # both are quicker, by 10 and 40: two rows do not show it
        ([90.0], [50.0], False),
    ):
        found = tables(scores, {"in_context": teacher, "distilled": student}, recipe.eval)
        saved = found["ms_saved"]
        n = len(teacher)
        assert saved["mean"] == pytest.approx(sum(teacher) / n - sum(student) / n) and saved["n"] == n
        times = found["table"]["in_context"]["latency_ms"]
        assert 0 <= times["low"] <= min(teacher) and times["high"] >= max(
            teacher
        )  # so few of them do not narrow it down
        paid = cost(recipe, found, {"total": 4.0}, 100)
        assert paid["ms_saved"] == saved
        assert paid["break_even_requests"] == (4000 / saved["mean"] if shown else None)
    assert tables(scores, {}, recipe.eval)["ms_saved"] is None


def test_tables_and_the_gate() -> None:
    def score(arm: str, i: int, hit: float, kl: float) -> dict[str, Any]:
        return {"arm": arm, "row": str(i), "query": "q", "answer": "a", "prediction": "p", "metrics": {"exact_match": hit},
                "prompt_tokens": 10, "kl": kl * (i % 3), "top1": 0.5, "tokens": 1 + i % 3}  # fmt: skip

    rows = range(60)
    scores = {
        "zero_shot": [score("zero_shot", i, 0.0, 2.0) for i in rows],
        "in_context": [score("in_context", i, float(i % 4 > 0), 0.0) for i in rows],
        "distilled": [score("distilled", i, float(i % 2), 0.1) for i in rows],
    }
    recipe = Recipe.from_dict({"model": {"name": "x"}, "context": {"system": "s"}, "queries": {"data": "q"}})
    result = tables(scores, {}, recipe.eval)
    assert result["kl_closed"]["mean"] == pytest.approx(0.95)
    assert result["gap_closed"]["mean"] == pytest.approx(0.5 / 0.75)
    assert result["table"]["in_context"]["exact_match"]["mean"] == 0.75
    low, high = (result["table"]["in_context"]["exact_match"][k] for k in ("low", "high"))
    assert 0.6 < low < 0.75 < high < 0.9
    kl = result["table"]["zero_shot"]["kl"]
    assert kl["mean"] == pytest.approx((2 * 2 + 3 * 4) / (1 + 2 + 3))  # per token: long answers count for their tokens
    residuals = [0 - 8 / 3, 4 - 16 / 3, 12 - 8]  # of the ratio, 20 times each
    half = 1.96 * np.sqrt(20 * np.square(residuals).sum()) / 120
    assert (kl["low"], kl["high"]) == (
        pytest.approx(kl["mean"] - half, abs=0.08),
        pytest.approx(kl["mean"] + half, abs=0.08),
    )
    pairs = {(c["a"], c["b"]): c for c in result["comparisons"]}
    assert pairs["in_context", "zero_shot"]["p_mcnemar"] < 1e-6
    shares = {arm: [s | {"metrics": {"exact_match": 0.5}} for s in found] for arm, found in scores.items()}
    assert {c["p_mcnemar"] for c in tables(shares, {}, recipe.eval)["comparisons"]} == {None}

    class FakeLM:
        window = 100

    class FakePair:
        teacher, student = (0,) * 20, (0,) * 5

    def verdict(zero: float, kl: float, teacher: float = 0.75, n: int = 60) -> dict[str, Any]:
        found = {
            arm: [score(arm, i, float(np.floor(share * (i + 1)) > np.floor(share * i)), kl) for i in range(n)]
            for arm, share in (("zero_shot", zero), ("in_context", teacher))
        }
        return gate_verdict(found, [FakePair()] * n, FakeLM(), recipe)  # type: ignore[list-item, arg-type]

    assert verdict(0.0, 2.0)["verdict"] == "teach"
    assert verdict(0.0, 2.0)["context_tokens"] == 15
    seeds = [Recipe.from_dict({**recipe.to_dict(), "train": {"seed": seed}}) for seed in (0, 7)]
    found = [gate_verdict(scores, [FakePair()] * len(scores["zero_shot"]), FakeLM(), r) for r in seeds]  # type: ignore[list-item, arg-type]
    assert (
        found[0] == found[1] and found[0]["kl"]["low"] < found[0]["kl"]["high"]
    )  # the training's seed moves no interval
    assert verdict(0.0, 0.001)["verdict"] == "nothing to teach"
    assert verdict(0.75, 2.0)["verdict"] == "nothing to teach"  # no gain
    assert verdict(1.0, 2.0)["gain"]["mean"] == pytest.approx(-0.25)  # the context hurts
    unclear = verdict(0.6, 2.0)
    assert unclear["gain"]["low"] < 0 < unclear["gain"]["mean"] and unclear["verdict"] == "nothing to teach"
    assert verdict(0.6, 2.0, n=20)["verdict"] == "teach"  # so few rows cannot show it
    assert verdict(0.3, 2.0, teacher=0.3)["verdict"] == "nothing to teach"
    assert verdict(0.0, 2.0, teacher=0.02)["verdict"] == "teach"  # exact match says nothing there


@pytest.mark.parametrize(
    ("base", "teacher", "gate", "verdict", "said"),
    [
        ([1], [1], {}, "teach", "whether it helps cannot be told with 1 row: +0.0 [-92.4, +92.4]"),
        ([0, 1] * 4, [1, 0] * 4, {}, "teach", "whether it helps cannot be told with 8 rows: +0.0"),
        ([0, 1] * 10, [1] * 20, {}, "teach", "the context helps: +50.0"),
        ([1] * 20, [0, 1] * 10, {}, "nothing to teach", "the context makes it worse on 20 rows: -50.0"),
        ([1] * 40, [0, 1] * 20, {}, "nothing to teach", "the context makes it worse on 40 rows: -50.0"),
        ([0, 1] * 20, [1, 0] * 20, {}, "nothing to teach", "the context is not shown to help on 40 rows: +0.0"),
        (
            [0, 1] * 10,
            [1, 0] * 10,
            {"min_gain": 0.9},
            "nothing to teach",
            "not shown to help by more than 90 points on 20 rows",
        ),
        (
            [0, 1] * 20,
            [1] * 40,
            {"min_gain": 0.4},
            "nothing to teach",
            "not shown to help by more than 40 points on 40 rows",
        ),
        ([0.5], [0.5], {}, "teach", "whether it helps cannot be told with 1 row: +0.0"),  # one share has no interval
        (
            [0, 1] * 4,
            [1, 0] * 4,
            {"min_kl": 9.0},
            "nothing to teach",
            "whether it helps cannot be told with 8 rows: +0.0",
        ),
    ],
)
def test_the_gate_says_what_is_shown(
    base: list[float], teacher: list[float], gate: dict[str, float], verdict: str, said: str
) -> None:
    def scores(values: list[float]) -> list[dict[str, Any]]:
        return [{"metrics": {"squad_f1": float(value)}, "kl": 1.0, "tokens": 1} for value in values]

    raw = {"model": {"name": "x"}, "context": {"system": "s"}, "queries": {"data": "q"}, "gate": gate}
    prompts: Any = [SimpleNamespace(teacher=(0,) * 20, student=(0,) * 5)]
    lm: Any = SimpleNamespace(window=100)
    arms = {"zero_shot": scores(base), "in_context": scores(teacher)}
    found = gate_verdict(arms, prompts, lm, Recipe.from_dict(raw))
    assert found["verdict"] == verdict
    assert said in found["reasons"][1]
    assert ("going on" in found["reasons"][1]) == (verdict == "teach" and "cannot be told" in said)


def test_arms_are_compared_on_the_rows_that_both_can_be_judged_on() -> None:
    def scores(values: list[float | None]) -> list[dict[str, Any]]:
        return [{"row": str(i), "answer": None, "metrics": {"mine:f": value}, "prompt_tokens": 1, "kl": 1.0, "top1": 1.0,
                 "tokens": 1} for i, value in enumerate(values * 40)]  # fmt: skip

    def judged(base: list[float | None], teacher: list[float | None], student: list[float | None]) -> Any:
        arms = {"zero_shot": scores(base), "in_context": scores(teacher), "distilled": scores(student)}
        found = tables(arms, {}, recipe.eval)
        pairs = {(c["a"], c["b"]): (c["difference"]["mean"], c["difference"]["n"]) for c in found["comparisons"]}
        lm: Any = SimpleNamespace(window=100)
        prompts: Any = [SimpleNamespace(teacher=(0,) * 20, student=(0,) * 5)]
        return gate_verdict(arms, prompts, lm, recipe), pairs, found["gap_closed"]

    recipe = Recipe.from_dict({"model": {"name": "x"}, "context": {"system": "s"}, "queries": {"data": "q"}})
    # of five rows, all arms have a value on the first and the last
    gate, pairs, gap = judged([0, None, 1, 1, 0], [1, 0, None, 1, 1], [1, 0, 1, None, 0])
    assert (gate["gain"]["mean"], gate["gain"]["n"]) == (pytest.approx(2 / 3), 120)
    assert pairs["in_context", "zero_shot"] == (pytest.approx(2 / 3), 120)
    assert pairs["distilled", "zero_shot"] == (pytest.approx(1 / 3), 120)
    assert pairs["distilled", "in_context"] == (pytest.approx(-1 / 3), 120)
    assert (gap["mean"], gap["n"]) == (pytest.approx(0.5), 80)
    gate, pairs, gap = judged([0, None], [None, 1], [1, None])
    assert gate["gain"] is None and gate["verdict"] == "teach" and "no row" in gate["reasons"][1]
    assert pairs == {("distilled", "zero_shot"): (1.0, 40)} and "no row" in gap["undefined"]
    assert judged([None], [None], [None])[1:] == ({}, gap)


def test_macro_f1_has_the_interval_of_a_share_where_labels_are_balanced() -> None:
    rows = [{"answer": "ab"[i % 2], "prediction": "ab"[(i + (i // 2 % 4 == 0)) % 2]} for i in range(400)]
    found = macro_f1_estimate([*rows, {"answer": None, "prediction": "a"}], resamples=500, seed=0)
    half = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert (found["mean"], found["n"]) == (pytest.approx(0.75), 400)
    assert (found["low"], found["high"]) == (pytest.approx(0.75 - half, abs=0.01), pytest.approx(0.75 + half, abs=0.01))


def test_latency_is_that_of_each_arm_s_own_request() -> None:
    asked: list[Any] = []

    class FakeLM:
        on = False

        @contextlib.contextmanager
        def adapter(self, on: bool) -> Iterator[None]:
            self.on = on
            yield

        def generate(self, prompts: Any, **options: Any) -> None:
            asked.append((self.on, prompts[0], options["max_new_tokens"]))

    raw = {"model": {"name": "x"}, "context": {"system": "s"}, "queries": {"data": "q"}}
    recipe = Recipe.from_dict({**raw, "eval": {"latency_rows": 2, "max_new_tokens": 9}})
    pairs: Any = [SimpleNamespace(teacher=f"teacher {i}", student=f"student {i}") for i in range(3)]
    prompter: Any = SimpleNamespace(ends=None)
    lm: Any = FakeLM()
    for arm, side in (("zero_shot", "student"), ("in_context", "teacher"), ("distilled", "student")):
        asked.clear()
        assert len(latency(arm, lm, prompter, pairs, recipe)) == 2  # and one that warms up
        assert asked == [(arm == "distilled", f"{side} {i}", 9) for i in (0, 0, 1)]


def test_metrics() -> None:
    pattern = re.compile(r"(?P<a>\w+) \| (?P<b>\w+)")
    assert same("Call  Mom\n", "call mom") and not same("call", "call mom")
    assert field_accuracy(pattern, "x | y", "X | z") == 0.5
    assert field_accuracy(pattern, "x, y", "x | y") == 0.0


def test_own_metrics_and_their_errors(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTXDISTILL_ALLOW_CODE", "1")
    (job / "mymetrics.py").write_text(
        "def long(prediction, answer, row):\n    return len(prediction) + len(row['prompt'])\n"
    )
    recipe, _, _, data = ready(job, eval__metrics=["mymetrics:long", "format"])
    metrics = metrics_of(recipe, data.pairs["eval"])
    assert list(metrics) == ["mymetrics:long", "format"]
    assert metrics["mymetrics:long"]("abc", None, {"prompt": "xy"}) == 5
    assert main_metric([{"metrics": {"mymetrics:long": 1.0, "format": 1.0}}]) == "mymetrics:long"
    for name, message in (("mymetrics:nothing", "cannot load"), ("macro_f1", "cannot be measured")):
        broken = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"metrics": [name]})})
        with pytest.raises(RecipeError, match=message):
            metrics_of(broken, data.pairs["eval"])
