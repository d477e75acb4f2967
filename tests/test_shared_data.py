"""Real rows: public data sets from a folder beside the checkout, where there is one."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import tiny
from ctxdistill import pipeline
from ctxdistill.recipe import DataSection, Recipe
from ctxdistill.rows import read

DATA = Path(__file__).parents[2] / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the folder with public data sets is not there")


def rows(name: str, **section: Any) -> list[Any]:
    recipe = Recipe.from_dict(
        {
            "model": {"name": "x"},
            "context": {"system": "s"},
            "queries": {"data": name},
            "prompt": {"pattern": section.pop("pattern")},
        },
        base_dir=DATA,
    )
    return read(DataSection(data=str(DATA / name), **section), recipe, "queries").rows


@pytest.mark.parametrize(
    ("name", "pattern", "count"),
    [
        ("rte_train.jsonl", "{sentence1} {sentence2}", 2490),
        ("rte_dev.jsonl", "{sentence1} {sentence2}", 277),
        ("paws_qqp_dev_test.jsonl", "{sentence1} {sentence2}", 677),
        ("cola_ood.jsonl", "{sentence}", 516),
        ("mrpc_test.jsonl", "{sentence1} {sentence2}", 1725),
        ("banking77/test.csv", "{text}", 3080),
    ],
)
def test_published_row_counts(name: str, pattern: str, count: int) -> None:
    found = rows(name, pattern=pattern, answer="category" if "banking" in name else "label")
    assert len(found) == count
    if name == "paws_qqp_dev_test.jsonl":
        assert Counter(str(r.fields["label"]) for r in found)["1"] == 191


def test_a_classifier_of_real_rows_end_to_end_on_opt(tmp_path: Path) -> None:
    """Few-shot entailment in the text style of base models: labels scored, label position taught."""
    tiny.save(tmp_path / "model", "opt-350m", chat=False)
    words = {"entailment": "yes", "not_entailment": "no"}
    lines = [json.loads(line) for line in (DATA / "rte_train.jsonl").read_text().splitlines()]
    short = [r for r in lines if len(r["sentence1"]) + len(r["sentence2"]) < 110]
    parts = {"demos": short[:2], "queries": short[2:26], "eval": short[26:38]}
    for name, part in parts.items():
        made = [{"premise": r["sentence1"], "hypothesis": r["sentence2"], "answer": words[r["label"]]} for r in part]
        tiny.write_jsonl(tmp_path / f"{name}.jsonl", made)
    recipe = Recipe.from_dict(
        {
            "name": "rte",
            "model": {"name": "model"},
            "prompt": {
                "style": "text", "pattern": "{premise}\nSo: {hypothesis}\nyes or no?", "answer_pattern": " {answer}",
                "instruction": "Does one follow from the other?", "label_words": ["yes", "no"], "shared_first_token": "allow",
            },
            "context": {"demos": "demos.jsonl"},
            "queries": {"data": "queries.jsonl"},
            "completions": {"source": "label"},
            "train": {"epochs": 2, "lr": 0.01, "batch_size": 4},
            "eval": {"data": "eval.jsonl", "max_new_tokens": 4, "latency_rows": 0, "bootstrap": 200},
            "gate": {"on_fail": "warn"},
        },
        base_dir=tmp_path,
    )  # fmt: skip
    run = pipeline.distill(recipe, tmp_path / "run")
    table = run.evaluation["table"]
    assert run.evaluation["main_metric"] == "label_accuracy" and run.evaluation["rows"] == 12
    assert set(table["distilled"]) >= {"label_accuracy", "macro_f1", "kl", "top1"}
    assert table["distilled"]["kl"]["mean"] < table["zero_shot"]["kl"]["mean"]
    scores = tiny.read_jsonl(run.path / "scores.jsonl")
    assert {s["prediction"] for s in scores} <= {"yes", "no"}
