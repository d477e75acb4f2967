"""What a study found, on synthetic study folders: numbers against slow computations by hand, claims, limits, holes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctxdistill import claims
from ctxdistill.analysis import _reading, analyse
from ctxdistill.errors import DataError, RunError

ARMS = [
    {"name": "zero_shot", "label": "zero-shot", "about": "No demonstrations.", "family": "baseline"},
    {"name": "in_context", "label": "in-context", "about": "The demonstrations in the prompt.", "family": "prompt"},
    {"name": "ft_lora", "label": "fine-tuned, LoRA", "about": "LoRA trained on the labels.", "family": "finetune"},
    {"name": "cd_one", "label": "distilled, one context", "about": "A student of one context.", "family": "distill"},
    {"name": "cd_many", "label": "distilled, many contexts", "about": "A student of several.", "family": "distill"},
    {
        "name": "cd_one+shuffled_labels",
        "label": "control: shuffled labels",
        "about": "The teacher sees wrong labels.",
        "family": "control",
        "control_of": "cd_one",
    },
]
SKILL = {
    "zero_shot": 0.35,
    "in_context": 0.60,
    "ft_lora": 0.50,
    "cd_one": 0.60,
    "cd_many": 0.72,
    "cd_one+shuffled_labels": 0.30,
}
TASKS = [
    {"name": "trec", "title": "TREC", "labels": ["HUM", "LOC", "NUM"], "evaluation": "trec", "ood": [], "pattern": "default"},
    {"name": "sst2", "title": "SST-2", "labels": ["neg", "pos"], "evaluation": "sst2", "ood": ["cr"], "pattern": "default"},
]  # fmt: skip
COSTS = {
    # arm: labelled, unlabelled, teacher FLOPs, training FLOPs, FLOPs per request, prompt tokens
    "zero_shot": (0, 0, 0, 0, 1e10, 40),
    "in_context": (16, 0, 0, 0, 9e10, 400),
    "ft_lora": (16, 0, 0, 4e12, 1e10, 40),
}


def build_study(
    path: Path,
    *,
    demos: tuple[int, ...] = (4, 16),
    sets: tuple[int, ...] = (0, 1, 2, 3),
    rows: int = 240,
    models: tuple[str, ...] = ("tiny",),
    tasks: list[dict[str, Any]] | None = None,
    skill: dict[str, float] | None = None,
    spread: float = 0.01,
    change: Callable[[Any], Any] = lambda value: value,
) -> Path:
    """A study folder. `skill`: accuracy by arm; `spread`: how much it differs between demonstration sets."""
    tasks = TASKS if tasks is None else tasks
    recipe = {
        **{"name": "small study", "created": "2025-01-31T12:00:00+00:00", "versions": {"ctxdistill": "0.1.0"}},
        "models": [{"name": name, "label": name.split("/")[-1]} for name in models],
        "tasks": list(tasks),
        **{"demos": list(demos), "sets": list(sets), "arms": [{"control_of": None, **arm} for arm in ARMS]},
        **{"eval_rows": rows, "queries": 128},
    }
    path.mkdir(parents=True)
    (path / "study_recipe.json").write_text(json.dumps(change(recipe)), encoding="utf-8")
    random = np.random.default_rng(0)
    for task in tasks:
        names = [task["evaluation"], *task["ood"]]
        gold = {name: random.choice(task["labels"], rows) for name in names}
        hard = {name: random.random(rows) for name in names}
        for model, arm in itertools.product(models, ARMS):
            alone = arm["name"] == "zero_shot"
            for n, number in [(0, None)] if alone else itertools.product(demos, sets):
                level = (skill or SKILL)[arm["name"]] + (0 if alone else random.normal(0, spread)) + 0.002 * n
                write_cell(path, model, task, n, number, arm["name"], gold, hard, level, random, change)
    return path


def write_cell(path, model, task, n, number, arm, gold, hard, level, random, change) -> None:  # type: ignore[no-untyped-def]
    where = "" if number is None else f"-n{n}-set{number}"
    folder = path / "cells" / f"{model.split('/')[-1]}-{task['name']}{where}-{arm}"
    lines = []
    for name, labels in gold.items():
        for i, label in enumerate(labels):
            right = hard[name][i] * 0.7 + random.random() * 0.3 < level - 0.1 * (name != task["evaluation"])
            wrong = next(other for other in task["labels"] if other != label)
            said = str(label) if right else wrong
            lines.append(
                {"set": name, "row": f"{name}:{i}", "label": str(label), "prediction": said, "correct": float(right),
                 "exact": None if arm == "ft_head" else float(right and i % 10 != 0)}
            )  # fmt: skip
    labelled, unlabelled, teacher, training, request, tokens = COSTS.get(arm, (16, 128, 1e12, 5e12, 1e10, 40))
    trained = arm not in ("zero_shot", "in_context")
    cell = {
        **{"id": folder.name, "model": model, "task": task["name"], "n": n, "set": number, "arm": arm},
        **{"status": "done", "reason": None},
        "sets": {name: {"domain": "in" if name == task["evaluation"] else "out", "rows": len(gold[name])} for name in gold},
        "teacher": {"accuracy": 0.5 + 0.01 * (number or 0), "rows": 128} if arm.startswith("cd") else None,
        "cost": {
            **{"labelled": labelled * n / 16, "unlabelled": unlabelled, "trained_tokens": 5000 * trained},
            **{"teacher_flops": teacher, "train_flops": training * n / 16, "request_flops": request},
            **{"seconds": 12.5, "peak_mb": 900.0, "trainable": 4_884_480 * trained, "adapter_bytes": 19_561_328 * trained},
            **{"prompt_tokens": tokens, "latency_ms": 31.0},
        },
        "training": {"steps": 64, "loss_first": 0.9, "loss_last": 0.1} if trained else None,
        "retention": {"perplexity": 20.0 + trained, "format": 0.5 - 0.05 * trained, "format_rows": 16}
        if trained or arm == "zero_shot"
        else None,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "cell.json").write_text(json.dumps(change(cell)), encoding="utf-8")
    (folder / "scores.jsonl").write_text("".join(json.dumps(change(line)) + "\n" for line in lines), encoding="utf-8")


def scores(path: Path, arm: str, task: str, name: str, n: int, sets: tuple[int, ...], key: str = "correct") -> Any:
    """[S, N] straight from the files."""
    found = []
    for number in sets:
        where = "" if arm == "zero_shot" else f"-n{n}-set{number}"
        lines = (path / "cells" / f"tiny-{task}{where}-{arm}" / "scores.jsonl").read_text().splitlines()
        found.append([line[key] for line in map(json.loads, lines) if line["set"] == name])
    return np.array(found)


def only(rows: list[dict[str, Any]], **values: Any) -> dict[str, Any]:
    (found,) = [row for row in rows if all(row[key] == value for key, value in values.items())]
    return found


def edit(path: Path, cell: str, **values: Any) -> None:
    file = path / "cells" / cell / "cell.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_study(tmp_path_factory.mktemp("study") / "full")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    return analyse(folder)


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_the_table_has_what_the_files_say(folder: Path, found: dict[str, Any]) -> None:
    x = scores(folder, "cd_one", "sst2", "cr", 16, (0, 1, 2, 3))
    row = only(found["table"], task="sst2", set="cr", n=16, arm="cd_one")
    assert row["mean"] == pytest.approx(x.mean())
    assert row["per_set"] == pytest.approx(list(x.mean(1)))
    assert row["sd"] == pytest.approx(x.mean(1).std(ddof=1))
    assert row["exact"] == pytest.approx(scores(folder, "cd_one", "sst2", "cr", 16, (0, 1, 2, 3), "exact").mean())
    assert row["low"] < row["mean"] < row["high"]
    assert (row["domain"], row["sets"], row["rows"]) == ("out", 4, 240)
    assert row["teacher"] == pytest.approx(np.mean([0.50, 0.51, 0.52, 0.53]))
    zero = only(found["table"], task="sst2", set="cr", arm="zero_shot")
    assert (zero["n"], zero["sets"], zero["sd"]) == (0, 1, None)


def test_the_constant_answer_is_an_arm(folder: Path, found: dict[str, Any]) -> None:
    labels = list(scores(folder, "zero_shot", "trec", "trec", 0, (0,), "label")[0])
    row = only(found["table"], task="trec", arm="constant")
    assert row["mean"] == max(labels.count(label) for label in set(labels)) / 240
    assert found["arms"][0]["name"] == "constant"


def test_a_comparison_is_paired_by_set_and_row(folder: Path, found: dict[str, Any]) -> None:
    a, b = (scores(folder, arm, "trec", "trec", 16, (0, 1, 2, 3)) for arm in ("cd_many", "zero_shot"))
    row = only(found["comparisons"], task="trec", n=16, a="cd_many", b="zero_shot")
    assert row["difference"] == pytest.approx((a - b).mean())
    assert row["low"] < row["difference"] < row["high"]
    assert (row["reading"], row["sets"], len(row["p_mcnemar"])) == ("above", 4, 4)
    control = only(found["comparisons"], task="trec", n=16, a="cd_one+shuffled_labels")
    assert (control["b"], control["reading"]) == ("cd_one", "below")


def test_p_values_are_corrected_for_the_whole_study(found: dict[str, Any]) -> None:
    rows = sorted(found["comparisons"], key=lambda row: row["p"])
    # 3 arms against zero-shot and in-context, cd against ft, in-context against zero-shot and constant, 1 control
    assert len(rows) == 3 * 2 * (2 * 3 + 2 + 2 + 1)  # in domain twice and out of domain once, for two n
    step, expected = 0.0, []
    for i, row in enumerate(rows):
        step = max(step, min(1.0, row["p"] * (len(rows) - i)))
        expected.append(step)
    assert [row["p_corrected"] for row in rows] == pytest.approx(expected)


def test_a_difference_counts_only_where_p_and_interval_agree(found: dict[str, Any]) -> None:
    for row in found["comparisons"]:
        outside = row["low"] > 0 or row["high"] < 0
        assert (row["reading"] != "open") == (outside and row["p_corrected"] < 0.05)
    counts = only(found["summary"], arm="cd_many", against="in_context", domain="in")
    mine = [r for r in found["comparisons"] if (r["a"], r["b"], r["domain"]) == ("cd_many", "in_context", "in")]
    assert counts["above"] == sum(r["reading"] == "above" for r in mine)
    assert counts["above"] + counts["below"] + counts["open"] == len(mine) == 4


def test_gap_closed_is_a_ratio_of_means(folder: Path, found: dict[str, Any]) -> None:
    z, t, s = (
        scores(folder, a, "trec", "trec", 16, (0, 1, 2, 3)).mean() for a in ("zero_shot", "in_context", "cd_many")
    )
    row = only(found["gap_closed"], task="trec", n=16, arm="cd_many")
    assert row["mean"] == pytest.approx((s - z) / (t - z))
    assert row["low"] < row["mean"] < row["high"]


def test_costs_and_break_even(found: dict[str, Any]) -> None:
    cost = only(found["costs"], task="trec", n=16, arm="cd_one")
    assert (cost["labelled"], cost["flops"]) == (16, 6e12)
    even = only(found["break_even"], task="trec", n=16, arm="cd_one")
    assert (even["saved"], even["requests"], even["labels_more"]) == (8e10, 75, 0)
    kept = only(found["retention"], task="trec", n=16, arm="ft_lora")
    assert (kept["perplexity"], kept["base_perplexity"], kept["base_format"]) == (21, 20, 0.5)


def test_an_arm_that_saves_nothing_never_pays_off(tmp_path: Path) -> None:
    def expensive(value: Any) -> Any:
        if value.get("arm") == "cd_one":
            value["cost"] |= {"request_flops": 1e12, "labelled": 20}
        return value

    found = analyse(build_study(tmp_path / "s", demos=(4,), rows=30, tasks=TASKS[:1], change=expensive))
    even = only(found["break_even"], arm="cd_one")
    assert (even["requests"], even["labels_more"]) == (None, 20 - 4)


def test_what_training_did_is_held_against_the_cell_s_own_model(tmp_path: Path) -> None:
    def other(value: Any) -> Any:
        if value.get("model") == "other" and value["retention"]:
            value["retention"]["perplexity"] += 10
        return value

    options: dict[str, Any] = {"demos": (4,), "sets": (0,), "rows": 30, "tasks": TASKS[:1]}
    found = analyse(build_study(tmp_path / "s", models=("tiny", "other"), change=other, **options))
    kept = {row["model"]: row for row in found["retention"] if row["arm"] == "cd_one"}
    assert {m: (r["perplexity"], r["base_perplexity"]) for m, r in kept.items()} == {
        "tiny": (21, 20),
        "other": (31, 30),
    }


def test_scores_that_are_means_over_contexts(tmp_path: Path) -> None:
    def shares(value: Any) -> Any:
        if "correct" in value:
            value |= {"correct": (value["correct"] + 3) / 4, "prediction": None}
        return value

    found = analyse(build_study(tmp_path / "s", demos=(4,), rows=30, tasks=TASKS[:1], change=shares))
    row = found["comparisons"][0]
    assert row["p_mcnemar"] == [None] * 4
    assert 0 <= row["p"] <= 1
    assert {line["macro_f1"] for line in found["table"] if line["arm"] != "constant"} == {None}


# -- claims and limits ------------------------------------------------------------------------------------------------


def verdicts(found: dict[str, Any]) -> list[str]:
    return [claim["verdict"] for claim in found["claims"]]


def test_claims_that_the_numbers_support(tmp_path: Path) -> None:
    skill = {**SKILL, "in_context": 0.60, "cd_one": 0.75, "ft_lora": 0.95}

    def cheap(value: Any) -> Any:
        if value.get("arm") == "cd_one":
            value["cost"] |= {"teacher_flops": 1e9, "train_flops": 1e9}
        return value

    found = analyse(build_study(tmp_path / "s", demos=(16,), skill=skill, spread=0.002, change=cheap))
    assert verdicts(found) == ["yes", "yes", "yes", "yes"]
    assert [claim["counts"]["yes"] for claim in found["claims"]] == [2, 1, 2, 2]
    assert (
        "SST-2 → cr, 16 demonstrations: distilled, one context minus in-context +" in found["claims"][1]["evidence"][0]
    )
    said = (
        "2e+09 FLOPs (16 labelled examples and 128 unlabelled queries) against 4e+12 (16 labelled examples): supports"
    )
    assert said in found["claims"][3]["evidence"][0]


def test_claims_that_the_numbers_contradict(tmp_path: Path) -> None:
    skill = {**SKILL, "in_context": 0.85, "cd_one": 0.60, "ft_lora": 0.40}
    found = analyse(build_study(tmp_path / "s", demos=(16,), skill=skill, spread=0.002))
    assert verdicts(found) == ["no", "no", "no", "no"]


def test_equal_arms_decide_nothing_when_sets_differ(tmp_path: Path) -> None:
    found = analyse(
        build_study(
            tmp_path / "s",
            demos=(16,),
            sets=(0, 1, 2),
            spread=0.03,
            skill={**SKILL, "in_context": 0.75, "cd_one": 0.75},
        )
    )
    assert verdicts(found)[:2] == ["not decidable", "not decidable"]


def test_tasks_where_nothing_can_be_taught_are_named_and_decide_nothing(tmp_path: Path) -> None:
    skill = {**SKILL, "in_context": 0.35, "cd_one": 0.10, "ft_lora": 0.9}
    found = analyse(build_study(tmp_path / "s", demos=(16,), skill=skill, spread=0.002))
    assert not any(cell["taught"] for cell in found["taught"])
    assert verdicts(found)[:3] == ["not decidable"] * 3
    (said,) = [line for line in found["limits"] if line.startswith("TREC, 16 demonstrations: nothing to teach")]
    assert "not shown to be better than always giving one answer" in said
    assert "decides no claim about accuracy" in said  # that on compute is decided
    assert [claim["evidence"] for claim in found["claims"][:3]] == [
        ["Nothing to teach in any cell."], ["Nothing to teach in the only cell."], ["Nothing to teach in any cell."]
    ]  # fmt: skip


@pytest.mark.parametrize("sets", [(0,), (0, 1)])
def test_fewer_than_three_sets_decide_nothing(tmp_path: Path, sets: tuple[int, ...]) -> None:
    skill = {**SKILL, "in_context": 0.60, "cd_one": 0.80, "ft_lora": 0.95}
    found = analyse(build_study(tmp_path / "s", demos=(16,), sets=sets, skill=skill, spread=0.002))
    assert verdicts(found)[:3] == ["not decidable"] * 3
    assert found["limits"][0].startswith(f"With {len(sets)} demonstration set")
    assert "nothing can be concluded about other demonstrations" in found["limits"][0]
    assert "no claim about accuracy is decided" in found["limits"][0]
    assert found["claims"][0]["evidence"] == ["Fewer than 3 demonstration sets in every cell."]
    row = only(found["table"], task="trec", n=16, arm="cd_one")
    assert row["low"] < row["mean"] < row["high"]
    assert (row["sd"] is None) == (len(sets) == 1)


def test_arms_on_fewer_sets_than_the_study_has_are_named(tmp_path: Path) -> None:
    folder = build_study(tmp_path / "s", rows=30, tasks=TASKS[:1])
    assert not [line for line in analyse(folder)["limits"] if "fewer than" in line and "sets" in line]
    for number in (0, 1, 2):
        (folder / "cells" / f"tiny-trec-n4-set{number}-cd_one" / "cell.json").unlink()
    found = analyse(folder)
    (said,) = [line for line in found["limits"] if "fewer than" in line and "sets" in line]
    assert said.startswith("TREC, 4 demonstrations: on fewer than the study's 4 demonstration sets: ")
    assert "distilled, one context (1)" in said and "many contexts" not in said
    assert only(found["costs"], n=4, arm="cd_one")["sets"] == 1


def test_few_rows_are_said_aloud(tmp_path: Path) -> None:
    few = analyse(build_study(tmp_path / "few", demos=(16,), rows=100))["limits"]
    assert [line.split(" has ")[0] for line in few if "evaluation rows" in line] == ["TREC", "SST-2", "SST-2 → cr"]
    assert "± 10 points at best" in next(line for line in few if line.startswith("TREC has 100"))
    assert not [
        line for line in analyse(build_study(tmp_path / "enough", demos=(16,)))["limits"] if "evaluation rows" in line
    ]


def comparison(a: str, b: str, low: float, high: float, p: float = 0.001, domain: str = "in") -> dict[str, Any]:
    row = {
        **{
            "model": "m",
            "task": "trec",
            "n": 16,
            "set": "trec",
            "domain": domain,
            "a": a,
            "b": b,
            "sets": 4,
            "rows": 400,
        },
        **{"difference": (low + high) / 2, "low": low, "high": high, "p_corrected": p},
    }
    return {**row, "reading": _reading(row)}


@pytest.mark.parametrize(
    ("claim", "low", "high", "p", "verdict"),
    [
        (0, -0.019, 0.05, 1.0, "yes"),
        (0, -0.03, 0.05, 1.0, "not decidable"),  # the mean is inside of the margin, the interval is not
        (0, -0.06, -0.03, 0.01, "no"),
        (0, -0.06, -0.03, 0.30, "not decidable"),  # other comparisons weigh on this one
        (0, -0.06, -0.01, 0.01, "not decidable"),  # below, but maybe within the margin
        (1, 0.01, 0.05, 0.01, "yes"),
        (1, 0.01, 0.05, 0.06, "not decidable"),
        (1, -0.05, -0.01, 0.01, "no"),
        (2, -0.05, -0.01, 0.01, "yes"),
        (2, -0.01, 0.03, 1.0, "no"),
        (2, -0.05, 0.03, 1.0, "not decidable"),
    ],
)
def test_what_decides_a_claim(claim: int, low: float, high: float, p: float, verdict: str) -> None:
    words = claims.Words({"models": [{"name": "m"}], "tasks": [{"name": "trec"}]}, ARMS)
    gains = [comparison("in_context", b, 0.1, 0.2) for b in ("zero_shot", "constant")]
    against, domain = [("in_context", "in"), ("in_context", "out"), ("ft_lora", "in")][claim]
    rows = [*gains, comparison("cd_one", against, low, high, p, domain)]
    found = claims.verdicts(rows, [], claims.taught(rows), words)
    assert found[claim]["verdict"] == verdict
    assert all(other["verdict"] == "not decidable" for other in found if other is not found[claim])


@pytest.mark.parametrize(
    ("labelled", "flops", "verdict"), [(16, 1e9, "yes"), (8, 1e9, "yes"), (16, 1e12, "no"), (8, 2e12, "no"), (17, 1e9, "no")]
)  # fmt: skip
def test_less_compute_is_decided_by_flops_where_labels_are_not_more(labelled: int, flops: float, verdict: str) -> None:
    words = claims.Words({"models": [{"name": "m"}], "tasks": [{"name": "trec"}]}, ARMS)
    where = {"model": "m", "task": "trec", "n": 16}
    costs = [
        {**where, "arm": "ft_lora", "labelled": 16, "unlabelled": 0, "flops": 1e12},
        {**where, "arm": "cd_one", "labelled": labelled, "unlabelled": 128, "flops": flops},
    ]
    assert claims.verdicts([], costs, [], words)[3]["verdict"] == verdict


def test_a_claim_that_nothing_decides_says_why() -> None:
    recipe = {"models": [{"name": "m"}], "tasks": [{"name": "trec", "ood": []}]}
    gains = [comparison("in_context", b, 0.1, 0.2) for b in ("zero_shot", "constant")]
    taught = claims.taught(gains)

    def said(rows: list[dict[str, Any]], arms: list[dict[str, Any]] = ARMS, costs: Any = ()) -> list[str]:
        return [claim["evidence"][0] for claim in claims.verdicts(rows, costs, taught, claims.Words(recipe, arms))]

    apart = "Not measured on the same rows and demonstration sets in any cell."
    assert said(gains) == [
        apart,
        "The study has no out-of-domain set.",
        apart,
        "FLOPs of both are not known in any cell.",
    ]
    bare = [arm for arm in ARMS if arm["name"] == "in_context"]
    assert [said(gains, bare)[i] for i in (0, 3)] == ["The study has no arm cd_one."] * 2
    untuned = [arm for arm in ARMS if arm["family"] != "finetune"]
    assert [said(gains, untuned)[i] for i in (2, 3)] == ["The study has no fine-tuned arm."] * 2
    few = {**comparison("cd_one", "in_context", 0.1, 0.2), "sets": 2}
    other = {**comparison("cd_one", "in_context", 0.1, 0.2), "n": 4}
    assert said([*gains, few])[0] == "Fewer than 3 demonstration sets in the only cell."
    assert said([*gains, few, other])[0] == (
        "Fewer than 3 demonstration sets in 1 cell, not known whether there is anything to teach in 1 cell."
    )


def test_a_comparison_on_fewer_than_three_sets_decides_nothing(tmp_path: Path) -> None:
    folder = build_study(tmp_path / "s", demos=(16,), skill={**SKILL, "cd_one": 0.80}, tasks=TASKS[1:], spread=0.002)
    assert verdicts(analyse(folder))[:2] == ["yes", "yes"]
    for number in (0, 1):
        edit(folder, f"tiny-sst2-n16-set{number}-cd_one", status="infeasible", reason="too long")
        (folder / "cells" / f"tiny-sst2-n16-set{number}-cd_one" / "scores.jsonl").write_text("")
    found = analyse(folder)
    assert only(found["comparisons"], a="cd_one", b="in_context", domain="in")["sets"] == 2
    assert verdicts(found)[:3] == ["not decidable"] * 3
    assert found["claims"][0]["evidence"] == ["Fewer than 3 demonstration sets in the only cell."]


def test_fine_tuning_stays_ahead_where_one_arm_does_and_falls_behind_where_none_does() -> None:
    below, near, unclear = (
        comparison("cd_one", "ft_lora", *ends) for ends in ((-0.05, -0.01), (-0.01, 0.03), (-0.05, 0.03))
    )
    for rows, outcome in (([below, near], "yes"), ([near, near], "no"), ([near, unclear], "open")):
        assert claims._short_of_tuning(rows) == outcome
    many = {"name": "ft_lora_many", "label": "of many contexts", "family": "finetune", "context": "many"}
    words = claims.Words({"models": [], "tasks": []}, [*ARMS, many])
    assert words.tuned == ["ft_lora"]  # those of other demonstrations are another question


def test_a_gain_that_may_be_none_is_not_taught() -> None:
    (cell,) = claims.taught(
        [comparison("in_context", b, low, 0.2) for b, low in (("zero_shot", -0.01), ("constant", 0.1))]
    )
    assert not cell["taught"] and "not shown to be better than zero-shot" in cell["reason"]


def test_a_claim_falls_with_one_cell_and_stands_with_all() -> None:
    for outcomes, verdict in (
        (["yes", "yes"], "yes"), (["yes", "open"], "not decidable"), (["yes", "no", "open"], "no"), ([], "not decidable"),
    ):  # fmt: skip
        assert claims._decided("claim", outcomes, [], "scope")["verdict"] == verdict


# -- what is not there ------------------------------------------------------------------------------------------------


def test_missing_cells_are_rows_and_comparisons_use_what_is_common(tmp_path: Path) -> None:
    folder = build_study(tmp_path / "s", demos=(16,), tasks=TASKS[:1])
    edit(folder, "tiny-trec-n16-set0-cd_one", status="infeasible", reason="3,000 tokens do not fit 2,048")
    (folder / "cells" / "tiny-trec-n16-set3-in_context" / "cell.json").unlink()
    found = analyse(folder)
    assert found["missing"] == [
        {"cell": "tiny-trec-n16-set0-cd_one", "status": "infeasible", "reason": "3,000 tokens do not fit 2,048"},
        {"cell": "tiny trec in_context, n = 16, set 3", "status": "not run", "reason": "the study is not finished"},
    ]
    row = only(found["comparisons"], a="cd_one", b="in_context")
    a, b = (scores(folder, arm, "trec", "trec", 16, (1, 2)) for arm in ("cd_one", "in_context"))
    assert row["sets"] == 2
    assert row["difference"] == pytest.approx((a - b).mean())


def test_a_study_that_has_just_begun(tmp_path: Path) -> None:
    folder = build_study(tmp_path / "s", demos=(16,), tasks=TASKS[:1])
    for cell in (folder / "cells").iterdir():
        (cell / "cell.json").unlink()
    found = analyse(folder)
    assert (found["table"], found["comparisons"]) == ([], [])
    assert verdicts(found) == ["not decidable"] * 4
    assert {row["status"] for row in found["missing"]} == {"not run"}
    assert json.loads((folder / "study.json").read_text()) == found


def test_cells_of_a_larger_grid_in_the_same_folder_are_left_out(tmp_path: Path) -> None:
    folder = build_study(tmp_path / "s", demos=(4, 16), rows=30)
    recipe = json.loads((folder / "study_recipe.json").read_text())
    recipe |= {"demos": [16], "sets": [0, 1, 2], "tasks": recipe["tasks"][:1], "arms": recipe["arms"][:4]}
    (folder / "study_recipe.json").write_text(json.dumps(recipe))
    found = analyse(folder)
    assert {(r["task"], r["n"], r["sets"]) for r in found["table"] if r["n"]} == {("trec", 16, 3)}
    assert {row["arm"] for row in found["table"]} == {"constant", "zero_shot", "in_context", "ft_lora", "cd_one"}
    assert found["missing"] == []


def test_cells_on_other_rows_are_refused(tmp_path: Path) -> None:
    folder = build_study(tmp_path / "s", demos=(16,), tasks=TASKS[:1])
    file = folder / "cells" / "tiny-trec-n16-set2-cd_one" / "scores.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[1], lines[0], *lines[2:]]) + "\n")
    with pytest.raises(RunError, match=r"tiny-trec.* was measured on other rows of trec"):
        analyse(folder)


def test_arms_are_paired_only_on_the_same_rows(tmp_path: Path) -> None:
    """The authors' way: each demonstration set has rows of its own; the arm without demonstrations has those of the first."""

    def own_rows(value: Any) -> Any:
        return value | {"study": {"eval": {"choose": "paper"}}} if "arms" in value else value

    folder = build_study(tmp_path / "s", demos=(16,), tasks=TASKS[1:], change=own_rows)
    for file in (folder / "cells").glob("*/scores.jsonl"):
        number = next((part[3:] for part in file.parent.name.split("-") if part.startswith("set")), "0")
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for line in (line for line in lines if line["set"] == "cr"):  # all arms say "pos" to rows that differ
            line["row"] += f"@{number}"
            line["label"] = "pos" if (line["label"] == "pos") == (number == "0") else "neg"
            line["correct"] = line["exact"] = float(line["label"] == "pos")
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = analyse(folder)
    zero = only(found["comparisons"], a="cd_one", b="zero_shot", set="cr")
    assert (zero["sets"], zero["difference"]) == (1, 0.0)
    assert only(found["comparisons"], a="cd_one", b="zero_shot", set="sst2")["sets"] == 4
    assert only(found["comparisons"], a="cd_one", b="in_context", set="cr")["sets"] == 4
    constant = only(found["comparisons"], a="in_context", b="constant", set="cr")
    x = scores(folder, "in_context", "sst2", "cr", 16, (0, 1, 2, 3))
    labels = scores(folder, "in_context", "sst2", "cr", 16, (0, 1, 2, 3), "label")
    best = np.array([max((row == "pos").mean(), (row == "neg").mean()) for row in labels])
    assert constant["sets"] == 4 and constant["difference"] == pytest.approx(x.mean() - best.mean())
    assert only(found["table"], arm="constant", set="cr")["per_set"] == pytest.approx(best.tolist())
    (said,) = [line for line in found["limits"] if "rows of its own" in line]
    assert said.startswith("SST-2 → cr: ")
    alone = build_study(tmp_path / "plain", demos=(16,), tasks=TASKS[1:])
    assert not [line for line in analyse(alone)["limits"] if "rows of its own" in line]


def test_no_study_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"study_recipe\.json") as caught:
        analyse(tmp_path / "nothing")
    assert caught.value.found == "no such folder"


def test_the_papers_runs(tmp_path: Path) -> None:
    folder = build_study(tmp_path / "s", demos=(16,), tasks=TASKS[:1], rows=20)
    runs = tmp_path / "runs.csv"
    head = "model,context_set_id,dataset,context_size,accuracy_teacher,accuracy_indomain,accuracy_ood"
    runs.write_text(f"{head}\nopt-1.3b,0,mnli,16,0.5,0.4,0.3\nopt-1.3b,1,mnli,16,0.7,0.6,0.5\n")
    (row,) = analyse(folder, runs)["paper"]
    assert row == {"model": "opt-1.3b", "task": "mnli", "n": 16, "runs": 2, "teacher": 0.6, "in": 0.5, "out": 0.4}
    runs.write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="cannot read the paper's runs"):
        analyse(folder, runs)
