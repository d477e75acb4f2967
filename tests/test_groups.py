"""Documents in chunks: which chunk a row sees, and what each chunk contributed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from ctxdistill import groups, pipeline
from ctxdistill.dataset import prepare
from ctxdistill.errors import DataError, FitError, RecipeError
from ctxdistill.lm import LM
from ctxdistill.objective import Example
from ctxdistill.prompts import Prompter, join
from ctxdistill.recipe import Recipe
from ctxdistill.rundir import RunDir
from ctxdistill.store import Target, TargetStore
from ctxdistill.targets import label
from ctxdistill.weights import load_tokenizer

WORDS = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay", "kid", "lynx"]


def recipe(job: Path, **overrides: Any) -> Recipe:
    """A document longer than the tiny model's window of 512, and queries about its sentences."""
    text = "\n\n".join(f"The {w} lives in house {i} and says nothing all day long." for i, w in enumerate(WORDS))
    (job / "zoo.md").write_text(text)
    name = {w: f"zoo.md:{1 + i // 3}" for i, w in enumerate(WORDS)}
    tiny.write_jsonl(job / "q.jsonl", [{"prompt": f"where is the {w}", "chunk": name[w]} for w in WORDS])
    tiny.write_jsonl(
        job / "e.jsonl",
        [
            {"prompt": f"tell: {w}?", "answer": w, "chunk": name[w], "sort": "ab"[i % 2]}
            for i, w in enumerate(WORDS[:9])
        ],
    )
    raw = tiny.recipe_dict(
        job,
        context={"system": "Answer.", "documents": ["zoo.md"], "chunk_tokens": 180, "chunk_overlap": 0},
        queries={"data": "q.jsonl"},
        eval__data="e.jsonl",
        eval__group="sort",
    )
    for key, value in overrides.items():
        section, _, key = key.partition("__")
        raw[section][key] = value
    return Recipe.from_dict(raw, base_dir=job)


def text(r: Recipe, row: int, side: str) -> str:
    return "".join(part["text"] for part in pipeline.show(r, row)[side])


def test_the_teacher_reads_the_rows_own_chunk_and_the_student_none(job: Path) -> None:
    r = recipe(job, train__validation=0.0)
    p = Prompter(r, load_tokenizer(r.model, r.base_dir))
    assert [c.name for c in p.context.chunks] == [f"zoo.md:{i}" for i in (1, 2, 3, 4)]
    for i, word in enumerate(WORDS):
        teacher, student = text(r, i, "teacher"), text(r, i, "student")
        mine = p.context.chunks[i // 3]
        assert f"# zoo.md (part {1 + i // 3} of 4)\n\n{mine.text}" in teacher and "Answer." in teacher
        assert sum(c.text in teacher for c in p.context.chunks) == 1 and f"The {word} lives" in teacher
        assert "lives in" not in student and "zoo" not in student
    with pytest.raises(FitError, match="chunk_tokens"):  # whole, it does not fit, and that is said
        prepare(recipe(job, context__chunk_tokens=0))


@pytest.mark.parametrize(("given", "complaint"), [(None, "no such column"), ("zoo.md:9", "'zoo.md:9'")])
def test_a_query_without_a_chunk_is_refused_or_bound_by_its_words(job: Path, given: str | None, complaint: str) -> None:
    r = recipe(job)
    rows = [{"prompt": f"where is the {w}", **({"chunk": given} if given else {})} for w in WORDS]
    tiny.write_jsonl(job / "q.jsonl", rows)
    with pytest.raises(DataError, match=r"zoo.md:1, zoo.md:2") as caught:
        prepare(r)
    assert complaint in str(caught.value)
    bound = recipe(job, context__chunk_bind="words", train__validation=0.0)
    tiny.write_jsonl(job / "q.jsonl", rows)
    if given:  # a name that does not exist is never passed over
        with pytest.raises(DataError, match=r"zoo\.md:9"):
            prepare(bound)
        return
    _, p, data = prepare(bound)
    for row in data.splits["train"][0]:
        chunk = p.chunk_of(row, bound.queries)
        assert chunk and f"The {row.fields['prompt'].split()[-1]} lives" in chunk.text
    typed = p.pair_of_text("what does the lynx say")
    assert "The lynx lives" in p.tokenizer.decode(typed.teacher)


def test_a_chunk_is_read_once_for_all_its_rows(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    r = recipe(job, train__validation=0.0, targets__batch_size=2)
    lm, p, data = prepare(r)
    pairs, read = data.pairs["train"], list[str]()
    slow = LM._read_prefix

    def counted(self: LM, ids: Sequence[int]) -> Any:
        read.append(self.tokenizer.decode(list(ids)))
        return slow(self, ids)

    monkeypatch.setattr(LM, "_read_prefix", counted)
    made = label(lm, p, pairs, r, TargetStore(job / "t"))
    assert len(read) == 4 and all(f"(part {i} of 4)" in "".join(read) for i in (1, 2, 3, 4))
    with torch.no_grad():
        for pair, (target,) in zip(pairs, made, strict=True):
            (alone,) = lm.generate([pair.teacher], max_new_tokens=6, ends=p.ends)
            assert list(target.ids) == alone
            reference = lm.hidden([join(pair.teacher, target.ids)])[0]
            torch.testing.assert_close(target.tensors["hidden"], reference, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> pipeline.Run:
    folder = tmp_path_factory.mktemp("zoo")
    (folder / "model").symlink_to(llama)
    return pipeline.distill(recipe(folder), folder / "run")


def test_what_each_chunk_contributed(run: pipeline.Run) -> None:
    table = run.evaluation["parts"]["chunk"]
    scores = RunDir(run.path).read_jsonl("scores.jsonl")
    names = {json.dumps(row["prompt"]): row["chunk"] for row in tiny.read_jsonl(run.path.parent / "e.jsonl")}
    for row in table:
        mine = {
            arm: [s for s in scores if s["arm"] == arm and names[json.dumps(s["query"])] == row["part"]]
            for arm in ("zero_shot", "distilled")
        }
        assert row["rows"] == len(mine["distilled"])
        for key, arm in (("kl_before", "zero_shot"), ("kl_after", "distilled")):
            values = [value for s in mine[arm] for _, value in s.get("token_kl", [])]
            assert row[key] == (pytest.approx(sum(values) / len(values), abs=1e-4) if values else None)
    assert [row["part"] for row in table] == [f"zoo.md:{i}" for i in (1, 2, 3, 4)]
    assert [row["rows"] for row in table] == [3, 3, 3, 0] and table[3]["kl_before"] is None
    assert sum(row["train_rows"] for row in table) == RunDir(run.path).read_json("recipe.json")["rows"]["train"]
    assert sum(row["train_tokens"] for row in table) == 6 * sum(row["train_rows"] for row in table)  # max_new_tokens
    closed = 1 - sum(r["kl_after"] * r["tokens"] for r in table[:3]) / sum(
        r["kl_before"] * r["tokens"] for r in table[:3]
    )
    assert closed == pytest.approx(run.evaluation["kl_closed"]["mean"], abs=1e-6)


def test_results_by_a_column(run: pipeline.Run) -> None:
    table = {row["part"]: row for row in run.evaluation["parts"]["sort"]}
    assert {part: row["rows"] for part, row in table.items()} == {"a": 5, "b": 4}
    for arm, found in run.evaluation["table"].items():
        both = [(table[part]["metrics"][arm]["exact_match"], table[part]["rows"]) for part in "ab"]
        assert sum(m * n for m, n in both) / 9 == pytest.approx(found["exact_match"]["mean"])
    page, plain = (run.path / "report.html").read_text(), (run.path / "report.md").read_text()
    first = run.evaluation["parts"]["chunk"][0]
    assert f" | {first['kl_before']:.3f} | {first['kl_after']:.3f} | " in plain
    assert "By chunk" in page and "zoo.md:4" in page and "By sort" in plain and "| zoo.md:4 | " in plain
    again = pipeline.evaluate(run.path)
    for title in ("chunk", "sort"):
        for old, new in zip(run.evaluation["parts"][title], again["parts"][title], strict=True):
            assert {k: v for k, v in new.items() if "kl" not in k} == {k: v for k, v in old.items() if "kl" not in k}


@pytest.mark.parametrize("there", [True, False])
def test_a_column_counts_training_rows_only_if_they_have_it(job: Path, there: bool) -> None:
    r = recipe(job)
    rows = [{"prompt": f"where is the {w}", "chunk": f"zoo.md:{1 + i // 3}"} for i, w in enumerate(WORDS)]
    tiny.write_jsonl(job / "q.jsonl", [row | ({"sort": "b"} if there else {}) for row in rows])
    _, prompter, data = prepare(r)
    part = groups.parts(prompter, data)["sort"]
    pairs = data.pairs["train"]
    made = [Example(pair.id, pair.student, Target("", (1, 2), {})) for pair in pairs for _ in range(3)]  # samples
    table = {row["part"]: row for row in groups.by_part(part, {}, made)}
    assert set(table) == {"a", "b"}
    assert table["b"]["train_rows"] == (len(pairs) if there else None)
    assert table["b"]["train_tokens"] == (6 * len(pairs) if there else None)
    assert table["a"]["train_tokens"] == (0 if there else None)


def test_a_part_has_means_over_tokens_and_over_the_rows_with_a_value() -> None:
    made = ((1, 3.0, None), (3, 1.0, 0.0), (4, 0.5, 1.0), (9, 9.0, None))
    scores = [{"row": str(i), "tokens": t, "kl": kl, "metrics": {"m": m}} for i, (t, kl, m) in enumerate(made)]
    part = {"0": "a", "1": "a", "2": "a", "3": "b"}
    a, b = groups.by_part(part, {"distilled": scores}, [])  # type: ignore[dict-item, list-item]
    assert (a["rows"], a["tokens"], a["kl_after"], a["kl_before"]) == (3, 8, 1.0, None)
    assert (a["metrics"], b["metrics"]) == ({"distilled": {"m": 0.5}}, {"distilled": {}})


def test_contradictions(job: Path) -> None:
    for overrides, complaint in [
        ({"context__documents": []}, "there are none"),
        ({"context__chunk_tokens": 8}, "at least 32"),
        ({"context__chunk_overlap": 100}, "at most half"),
    ]:
        with pytest.raises(RecipeError, match=complaint):
            recipe(job, **overrides)
    assert groups.mean_kl([]) is None
