"""A teacher that thinks before it answers: what is taught of it, behind what, and what is rejected."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import tiny
from ctxdistill import pipeline
from ctxdistill.dataset import prepare
from ctxdistill.errors import DataError, RecipeError
from ctxdistill.lm import LM
from ctxdistill.policy import Rounds
from ctxdistill.prompts import Prompter, join
from ctxdistill.recipe import Recipe
from ctxdistill.rundir import RunDir, no_progress
from ctxdistill.store import TargetStore
from ctxdistill.targets import label

THINK = {"scratchpad": "Think, then write Answer: and the answer.", "extract": r"Answer:([^\n]*)", "max_new_tokens": 40}


def recipe(job: Path, **completions: Any) -> Recipe:
    return Recipe.from_dict(tiny.recipe_dict(job, completions=THINK | completions, eval__format=None), base_dir=job)


def bpe() -> Any:
    """A tokenizer with long tokens, spaces at their starts."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=tiny.SPECIAL, initial_alphabet=alphabet)
    backend.train_from_iterator(["so it is heavy. Answer: forty two tons. Answer: [forty]."] * 9, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    fast.chat_template = tiny.TEMPLATE
    return fast


@pytest.mark.parametrize("make", [tiny.tokenizer, bpe])
@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so it is heavy. Answer: forty two tons", " forty two tons"), ("Answer: forty\nAnswer: two tons ", " two tons"),
        ("Answer:é tons", "é tons"), ("it is heavy", None), ("Answer:  ", None), ("Answer:", None),
        ("Answer: 東京", "東京"), ("木 Answer: 20 ½\nyes", "20 ½"), ("Answer:👍🏽 ", "👍🏽"),
    ],
)  # fmt: skip
def test_the_teachers_own_tokens_are_split(job: Path, make: Any, text: str, answer: str | None) -> None:
    p = Prompter(recipe(job), make())
    ids = [*p.tokenizer(text, add_special_tokens=False)["input_ids"], *p.end]
    found = p.split_answer(ids, re.compile(r"Answer:([^\n]*)"))
    if answer is None:
        assert found is None and p.answer(ids) == text.strip()
        return
    assert found is not None
    thoughts, taught = found
    assert [*thoughts, *taught] == [*ids[: len(thoughts) + len(taught) - 1], *p.end]  # no token was made anew
    assert p.tokenizer.decode(taught).strip() == answer.strip() + "</s>"
    assert p.tokenizer.decode(thoughts).rstrip().endswith("Answer:")
    if make is bpe and answer.startswith(" "):  # " forty" is one token and stays one
        assert p.tokenizer.decode(taught).startswith(" ")
    assert p.answer(ids) == answer.strip()


def test_an_answer_inside_a_token_is_none(job: Path) -> None:
    p = Prompter(recipe(job), bpe())
    ids = p.tokenizer("so it is heavy", add_special_tokens=False)["input_ids"]
    assert [p.tokenizer.decode(i) for i in ids][-1] == " heavy"
    assert p.split_answer(ids, re.compile("(eavy)")) is None and p.split_answer(ids, re.compile("(hea)")) is None
    assert p.split_answer(ids, re.compile("(heavy)")) is not None


def written(monkeypatch: pytest.MonkeyPatch, texts: dict[str, str]) -> None:
    """A teacher that says what `texts` has for the word that it is asked for; all others think without an answer."""

    def write(self: LM, prompts: Any, **_: Any) -> tuple[list[list[int]], list[torch.Tensor]]:
        rows = []
        for prompt in prompts:
            asked = self.tokenizer.decode(prompt).rsplit("<|user|>", 1)[-1]
            word = asked.split("say ")[-1].split("<")[0].split("\n")[0]
            ids = self.tokenizer(texts.get(word, "hm"), add_special_tokens=False)["input_ids"]
            rows.append([*ids, self.tokenizer.eos_token_id])
        return rows, []  # no states: all is read

    monkeypatch.setattr(LM, "write", write)


def test_what_the_student_thinks_itself_is_judged_whole(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher reads the student's thoughts where its own were: the teacher's full forward, a row at a time."""
    own = {"on_policy": 1.0, "on_policy_temperature": 2.0, "batch_size": 4}
    r = Recipe.from_dict(
        tiny.recipe_dict(job, completions=THINK | {"teach": "all"}, eval__format=None, train=own), base_dir=job
    )
    lm, p, data = prepare(r)
    with monkeypatch.context() as patch:
        written(patch, {"ant": "big. Answer: ANT", "cat": "Answer: CAT", "owl": "Answer: OWL", "pig": "Answer: PIG"})
        examples = pipeline.make_examples(r, lm, p, data.pairs["train"], TargetStore(job / "t"), no_progress)
    lm.add_adapter(r.lora, 0)
    tiny.disturb(lm)
    batch = Rounds(lm, p, data.pairs["train"], examples, r, RunDir(job / "run"))(0)
    teachers = {pair.id: pair.teacher for pair in data.pairs["train"]}
    assert {e.target.ids for e in batch}.isdisjoint(e.target.ids for e in examples)
    for example in batch:
        with torch.no_grad(), lm.adapter(False):
            whole, n = join(teachers[example.id], example.target.ids)
            slow = lm.model(input_ids=torch.tensor([whole])).logits[0, -n - 1 : -1].log_softmax(-1)
        fast = lm.head(example.target.tensors["hidden"]).log_softmax(-1)
        torch.testing.assert_close(fast, slow, rtol=1e-3, atol=1e-3)


def test_bare_answers_of_the_students_are_refused(job: Path) -> None:
    """Behind the teacher's prompt they would be judged without any thoughts."""
    raw = tiny.recipe_dict(job, completions=THINK, eval__format=None, train__on_policy=0.5)
    with pytest.raises(RecipeError, match=r'train\.on_policy.*completions\.extract.*teach = "all"'):
        Recipe.from_dict(raw, base_dir=job)
    Recipe.from_dict(raw | {"completions": THINK | {"extract": None}}, base_dir=job)  # the thoughts are taught


@pytest.mark.parametrize("teach", ["answer", "all"])
def test_the_answer_is_scored_behind_the_thoughts(job: Path, monkeypatch: pytest.MonkeyPatch, teach: str) -> None:
    r = recipe(job, teach=teach)
    lm, p, data = prepare(r)
    written(monkeypatch, {"ant": "big. Answer: ANT", "cat": "Answer: CAT"})
    pairs = [pair for found in data.pairs.values() for pair in found if pair.query in {"say ant", "say cat", "say owl"}]
    made = dict(zip([pair.query for pair in pairs], label(lm, p, pairs, r, TargetStore(job / "t")), strict=True))
    thoughts, answer = {"answer": ("big. Answer: ", "ANT"), "all": ("", "big. Answer: ANT")}[teach]
    (target,) = made["say ant"]
    pair = next(pair for pair in pairs if pair.query == "say ant")
    assert p.tokenizer.decode(target.ids) == answer + "</s>"
    before = [*pair.teacher, *p.tokenizer(thoughts, add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        slow = lm.hidden([join(before, target.ids)])[0]
    torch.testing.assert_close(target.tensors["hidden"], slow, rtol=1e-3, atol=1e-3)
    assert made["say owl"][0].ids == ()
    assert "Think, then" in p.tokenizer.decode(pair.teacher) and "Think" not in p.tokenizer.decode(pair.student)
    kept = label(lm, p, pairs, r, TargetStore(job / "e"), whole=True)
    assert {p.tokenizer.decode(t[0].ids) for t in kept} >= {"hm</s>"}


def test_a_run_counts_what_it_rejects(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTXDISTILL_ALLOW_CODE", "1")
    (job / "mine.py").write_text("def check(prediction, answer, row):\n    return prediction == answer\n")
    words = [row["prompt"].split()[-1] for row in tiny.read_jsonl(recipe(job).path("queries.jsonl"))]
    texts = {w: f"Answer: {w.upper()}" for w in words} | {
        words[0]: "hm",
        words[1]: "Answer: NO",
        words[2]: "Answer: NO",
    }
    written(monkeypatch, texts)
    run = pipeline.distill(recipe(job, checker="mine:check"), job / "run")
    assert run.evaluation["completions"] == {
        "accepted": 13, "no answer found by completions.extract": 1, "rejected by mine:check": 2,
    }  # fmt: skip
    (note,) = [note for note in run.evaluation["notes"] if "accepted" in note]
    assert note.startswith("13 of the teacher's 16 completions were accepted (81.2 %)")
    assert "81.2 %" in (run.path / "report.md").read_text()
    teacher = [s for s in RunDir(run.path).read_jsonl("scores.jsonl") if s["arm"] == "in_context"]
    assert {s["prediction"] for s in teacher} == {w.upper() for w in words[3:8]} | {"hm", "NO"}
    written(monkeypatch, {})
    with pytest.raises(DataError, match="none of the teacher's completions is accepted") as caught:
        pipeline.distill(recipe(job, checker="mine:check", max_new_tokens=41), job / "other")
    assert "scores.jsonl" in caught.value.fix and "try" not in caught.value.fix
    teacher = [s for s in RunDir(job / "other").read_jsonl("scores.jsonl") if s["arm"] == "in_context"]
    assert {s["prediction"] for s in teacher} == {"hm"}
    with pytest.raises(RecipeError, match=r"completions\.checker: cannot load 'mine:nope'"):
        pipeline.distill(recipe(job, checker="mine:nope"), job / "third")


def test_contradictions(job: Path) -> None:
    for completions, complaint in [
        ({"extract": "Answer: .*"}, "expected one group"), ({"extract": "(a)(b)"}, "expected one group"),
        ({"extract": "("}, "not a regular expression"), ({"source": "data"}, 'need completions.source = "teacher"'),
        ({"checker": "mine"}, "expected module:function"),
    ]:  # fmt: skip
        with pytest.raises(RecipeError, match=re.escape(complaint)):
            recipe(job, **completions)
