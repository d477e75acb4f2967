"""What the adapter does elsewhere, and holding it to the base model there."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from ctxdistill import generic, pipeline
from ctxdistill.behaviour import Check, base_targets, behaviour, other, unrelated
from ctxdistill.dataset import Data, prepare
from ctxdistill.evaluate import teacher_targets
from ctxdistill.lm import LM
from ctxdistill.pipeline import keep_examples, make_examples
from ctxdistill.prompts import Prompter, join
from ctxdistill.recipe import LoraSection, Recipe, TrainSection
from ctxdistill.results import behaviour_facts, unrelated_share, verdict
from ctxdistill.rundir import RunDir, no_progress
from ctxdistill.store import Target, TargetStore
from ctxdistill.train import mean_kl, retained_at, train

Ready = tuple[Recipe, LM, Prompter, Data]
CHECKS = {"unrelated": 4, "rows": 5, "strengths": [0.0, 0.5, 1.0]}


@pytest.fixture
def ready(job: Path) -> Ready:
    """With a student that is not the base model."""
    recipe = Recipe.from_dict(tiny.recipe_dict(job, behaviour=CHECKS), base_dir=job)
    lm, prompter, data = prepare(recipe)
    lm.add_adapter(LoraSection(rank=4), 0)
    tiny.disturb(lm)
    lm.training(False)
    return recipe, lm, prompter, data


def slow_kl(lm: LM, prompt: Any, ids: Any, teacher_prompt: Any, strength: float = 1.0) -> torch.Tensor:
    """KL(base behind `teacher_prompt` || student behind `prompt`) at each token of `ids`, by full forwards."""
    logs = []
    for side, on in ((teacher_prompt, 0.0), (prompt, strength)):
        whole, n = join(side, ids)
        with torch.no_grad(), lm.adapter(on > 0, on):
            logs.append(lm.model(input_ids=torch.tensor([whole])).logits[0, -n - 1 : -1].log_softmax(-1))
    return (logs[0].exp() * (logs[0] - logs[1])).sum(-1)


def test_generic_prompts_are_apart() -> None:
    assert len(set(generic.TRAINED)) == 40 and len(set(generic.HELD_OUT)) == 24
    assert not {t.casefold() for t in generic.TRAINED} & {t.casefold() for t in generic.HELD_OUT}


def test_unrelated_prompts_hold_nothing_of_the_recipe(ready: Ready) -> None:
    _, lm, prompter, _ = ready
    (pair,) = unrelated(prompter, ["Why?"])
    assert lm.tokenizer.decode(pair.teacher) == "<s><|system|>be kind</s><|user|>Why?</s><|assistant|>"
    assert pair.student == pair.teacher
    kept = prompter.recipe.model_copy(
        update={"context": prompter.recipe.context.model_copy(update={"student_system": "Be brief."})}
    )
    (pair,) = unrelated(Prompter(kept, lm.tokenizer), ["Why?"])
    assert lm.tokenizer.decode(pair.student) == "<s><|system|>Be brief.</s><|user|>Why?</s><|assistant|>"


def test_numbers_equal_the_slow_way(ready: Ready, tmp_path: Path) -> None:
    recipe, lm, prompter, data = ready
    found = behaviour(recipe, lm, prompter, data, TargetStore(tmp_path / "t"))
    plain = unrelated(prompter, generic.HELD_OUT[:4])
    with lm.adapter(False):
        said = [lm.generate([p.student], max_new_tokens=32, ends=prompter.ends)[0] for p in plain]
    kl = torch.cat([slow_kl(lm, p.student, ids, p.student) for p, ids in zip(plain, said, strict=True)])
    assert found["unrelated"]["kl"]["mean"] == pytest.approx(kl.mean().item(), rel=1e-3)
    assert found["unrelated"]["rows"] == 4 and 0 <= found["unrelated"]["same"]["mean"] <= 1

    pairs = data.pairs["eval"][:5]
    with lm.adapter(False):
        taught = [lm.generate([p.teacher], max_new_tokens=6, ends=prompter.ends)[0] for p in pairs]
    again = torch.cat([slow_kl(lm, p.teacher, ids, p.teacher) for p, ids in zip(pairs, taught, strict=True)])
    alone = torch.cat([slow_kl(lm, p.student, ids, p.teacher) for p, ids in zip(pairs, taught, strict=True)])
    assert found["again"]["kl"]["mean"] == pytest.approx(again.mean().item(), rel=1e-3)
    assert found["again"]["alone"]["mean"] == pytest.approx(alone.mean().item(), rel=1e-3)

    system = recipe.behaviour.other_system
    rows = [f"<s><|system|>{system}</s><|user|>{p.query}</s><|assistant|>" for p in pairs]
    prompts = [lm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in rows]
    base, own = [], []
    for on, into in ((False, base), (True, own)):
        with lm.adapter(on):
            into += [lm.generate([p], max_new_tokens=6, ends=prompter.ends)[0] for p in prompts]
    other = torch.cat([slow_kl(lm, p, ids, p) for p, ids in zip(prompts, base, strict=True)])
    assert found["other"]["kl"]["mean"] == pytest.approx(other.mean().item(), rel=1e-3)
    same = [prompter.text(a).casefold() == prompter.text(b).casefold() for a, b in zip(base, own, strict=True)]
    assert found["other"]["obeys"]["mean"] == pytest.approx(sum(same) / 5)
    for who, key in ((own, "keeps"), (base, "base_keeps")):
        same = [prompter.text(a).casefold() == prompter.text(b).casefold() for a, b in zip(who, taught, strict=True)]
        assert found["other"][key]["mean"] == pytest.approx(sum(same) / 5)

    points = {p["strength"]: p for p in found["strengths"]}
    assert points[0.0]["kl_closed"]["mean"] == 0.0
    assert points[0.0]["unrelated_kl"]["mean"] == pytest.approx(0.0, abs=1e-6)
    assert points[1.0]["unrelated_kl"]["mean"] == pytest.approx(found["unrelated"]["kl"]["mean"])
    none, half, full = (
        sum(slow_kl(lm, p.student, ids, p.teacher, strength).sum().item() for p, ids in zip(pairs, taught, strict=True))
        for strength in (0.0, 0.5, 1.0)
    )
    assert points[0.5]["kl_closed"]["mean"] == pytest.approx(1 - half / none, rel=1e-3)
    assert points[1.0]["kl_closed"]["mean"] == pytest.approx(1 - full / none, rel=1e-3)


@pytest.mark.parametrize(
    ("unrelated", "rows", "written", "scored"),
    [
        (6, 0, [4, 6], [(4, 6), (6, 6)]),  # four rows at once
        (0, 2, [2], [(n, 10) for n in (2, 4, 6, 8, 10)]),  # base, strength 1, again, alone, other
    ],
)
def test_progress_counts_rows_to_the_last_one(
    ready: Ready, tmp_path: Path, unrelated: int, rows: int, written: list[int], scored: list[tuple[int, int]]
) -> None:
    recipe, lm, prompter, data = ready
    some = recipe.behaviour.model_copy(update={"unrelated": unrelated, "rows": rows, "strengths": [1.0]})
    told: list[tuple[str, int, int]] = []
    behaviour(
        recipe.model_copy(update={"behaviour": some}), lm, prompter, data, TargetStore(tmp_path / "t"),
        progress=lambda *call: told.append(call),
    )  # fmt: skip
    assert [(done, total) for stage, done, total in told if stage == "behaviour"] == scored
    assert [done for stage, done, _ in told if stage == "base answers"] == written
    assert told[-1][0] == "behaviour"


def test_the_untrained_adapter_changes_nothing(job: Path) -> None:
    recipe = Recipe.from_dict(tiny.recipe_dict(job, behaviour=CHECKS), base_dir=job)
    lm, prompter, data = prepare(recipe)
    lm.add_adapter(LoraSection(rank=4), 0)
    lm.training(False)
    found = behaviour(recipe, lm, prompter, data, TargetStore(job / "t"))
    assert found["unrelated"]["kl"]["mean"] == pytest.approx(0.0, abs=1e-6)
    assert found["unrelated"]["same"]["mean"] == 1.0
    assert found["other"]["obeys"]["mean"] == 1.0 and found["other"]["kl"]["mean"] == pytest.approx(0.0, abs=1e-6)
    assert found["again"]["same"]["mean"] == 1.0 and found["again"]["alone"]["mean"] > 0.01


def test_prompts_that_do_not_fit_are_not_counted(ready: Ready, tmp_path: Path) -> None:
    recipe, lm, prompter, data = ready
    longest = sorted(len(p.teacher) for p in unrelated(prompter, generic.HELD_OUT[:4]))
    lm.info["window"] = longest[2] + 32
    recipe = recipe.model_copy(update={"behaviour": recipe.behaviour.model_copy(update={"rows": 0})})
    found = behaviour(recipe, lm, prompter, data, TargetStore(tmp_path / "t"))
    assert found["unrelated"]["rows"] == 3 and longest[3] > longest[2]


def test_an_answer_that_goes_on_is_another_answer(ready: Ready, tmp_path: Path) -> None:
    recipe, lm, prompter, _ = ready
    check = Check(recipe, lm, prompter, TargetStore(tmp_path / "t"))
    pairs = unrelated(prompter, generic.HELD_OUT[:1])
    with lm.adapter(True):
        ids = tuple(lm.generate([pairs[0].student], max_new_tokens=5, ends=prompter.ends)[0])
    assert ids[-1] != 1  # it goes on
    (target,) = check.base(pairs, 5)
    fits = dataclasses.replace(target, ids=ids)
    ended = dataclasses.replace(target, ids=(*ids[:-1], 1))
    same = [check.scores(pairs, [t], write=6)[0]["same"] for t in (fits, ended)]
    assert same == [1.0, 0.0]


@pytest.mark.parametrize(("teach", "asked"), [("answer", False), ("all", True)])
def test_a_teacher_behind_its_thoughts_is_not_asked_again(job: Path, teach: str, asked: bool) -> None:
    thinks = {"max_new_tokens": 6, "scratchpad": "Think first.", "extract": "^.(.+)$", "teach": teach}
    raw = tiny.recipe_dict(job, behaviour={**CHECKS, "unrelated": 0, "strengths": []}, completions=thinks)
    recipe = Recipe.from_dict(raw, base_dir=job)
    lm, prompter, data = prepare(recipe)
    lm.add_adapter(LoraSection(rank=4), 0)
    lm.training(False)
    told: list[tuple[str, int, int]] = []
    found = behaviour(recipe, lm, prompter, data, TargetStore(job / "t"), progress=lambda *call: told.append(call))
    assert (found["again"] is not None) == asked and found["other"] is not None
    assert told[-1][1] == told[-1][2]  # nothing is awaited that does not come
    if asked:  # an untrained student behind the teacher's prompt is the teacher
        assert found["again"]["kl"]["mean"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_keeps_looks_at_the_whole_answer(job: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int) -> None:
    """Behind another system prompt, the student says what it was taught, and the base model something short."""
    recipe = Recipe.from_dict(
        tiny.recipe_dict(job, targets__batch_size=batch_size, eval__max_new_tokens=12), base_dir=job
    )
    lm, prompter, data = prepare(recipe)
    lm.add_adapter(LoraSection(rank=4), 0)  # the base model: it says what was taught behind the teacher's prompt
    lm.training(False)
    check, pairs = Check(recipe, lm, prompter, TargetStore(job / "t")), data.pairs["eval"]
    targets = teacher_targets(lm, prompter, pairs, recipe, check.store)
    assert min(len(t.ids) for t in targets) > 6

    def base(there: Any, limit: int) -> list[Target]:
        said = [prompter.completion("OK." if i % 2 else "No way.") for i in range(len(there))]
        with torch.no_grad(), lm.adapter(False):
            hidden = [lm.hidden([join(p.teacher, ids)])[0] for p, ids in zip(there, said, strict=True)]
        return [Target("", ids, {"hidden": states}) for ids, states in zip(said, hidden, strict=True)]

    monkeypatch.setattr(check, "base", base)
    teachers = iter([pair.teacher for pair in pairs])
    monkeypatch.setattr(prompter, "served_query", lambda *_: next(teachers))
    found = other(check, data, pairs, targets)
    assert (found["keeps"]["mean"], found["obeys"]["mean"], found["base_keeps"]["mean"]) == (1.0, 0.0, 0.0)


def test_the_text_style_has_no_other_system_prompt(job: Path) -> None:
    raw = tiny.recipe_dict(
        job, behaviour=CHECKS, context={"demos": "demos.jsonl"}, prompt={"style": "text", "answer_pattern": " {answer}"}
    )
    run = pipeline.distill(Recipe.from_dict(raw, base_dir=job), job / "run")
    found = run.evaluation["behaviour"]
    assert found["other"] is None and found["again"]["rows"] == 5 and found["unrelated"]["rows"] == 4


# -- holding the student to the base model ----------------------------------------------------------------------------


def test_retained_rows_come_in_turn(ready: Ready, tmp_path: Path) -> None:
    recipe, lm, prompter, _ = ready
    recipe = recipe.model_copy(update={"train": TrainSection(retain_weight=1.0, batch_size=8)})
    kept = keep_examples(recipe, lm, prompter, TargetStore(tmp_path / "t"))
    seen = [e.id for step in range(20) for e in retained_at(step, kept, recipe.train)]
    assert len(kept) == 40 and sorted(seen) == sorted(e.id for e in kept)
    assert keep_examples(recipe.model_copy(update={"train": TrainSection()}), lm, prompter, TargetStore(tmp_path)) == []


@pytest.mark.parametrize("micro", [0, 1])
def test_the_retained_loss_is_the_kl_to_the_base(ready: Ready, tmp_path: Path, micro: int) -> None:
    """The gradient of one step, against the two losses written out."""
    recipe, lm, prompter, data = ready
    store = TargetStore(tmp_path / "t")
    section = TrainSection(
        retain_weight=0.7, batch_size=16, micro_batch=micro, epochs=1, lr=1e-12, clip=1e9, ce_weight=0.2
    )
    recipe = recipe.model_copy(update={"train": section})
    examples = make_examples(recipe, lm, prompter, data.pairs["train"], store, no_progress)
    kept = keep_examples(recipe, lm, prompter, store)
    run = RunDir(tmp_path / f"run{micro}")
    before = {n: p.detach().clone() for n, p in lm.trainable().items()}
    train(lm, examples, [], section, run, retained=kept)
    got = {n: p.grad.clone() for n, p in lm.trainable().items() if p.grad is not None}
    with torch.no_grad():
        for n, p in lm.trainable().items():
            p.copy_(before[n])
    teachers = {p.id: p.teacher for p in data.pairs["train"]}

    def part(rows: Any, ce: float) -> torch.Tensor:
        total, tokens = torch.zeros(()), 0
        for e in rows:
            ids = e.target.ids
            sides = [(teachers.get(e.id, e.prompt), False), (e.prompt, True)]
            logs = []
            for prompt, on in sides:
                whole, n = join(prompt, ids)
                with lm.adapter(on):
                    logs.append(lm.model(input_ids=torch.tensor([whole])).logits[0, -n - 1 : -1].log_softmax(-1))
            p, q = logs[0].detach(), logs[1]
            total = total + (1 - ce) * (p.exp() * (p - q)).sum() - ce * q[range(len(ids)), list(ids)].sum()
            tokens += len(ids)
        return total / tokens

    loss = part(examples, 0.2) + 0.7 * part(retained_at(0, kept, section), 0.0)
    names = list(lm.trainable())
    for name, slow in zip(names, torch.autograd.grad(loss, [lm.trainable()[n] for n in names]), strict=True):
        torch.testing.assert_close(got[name], slow, rtol=1e-2, atol=1e-5)
    (line,) = run.read_jsonl("metrics.jsonl")
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert line["retain"] == pytest.approx(part(retained_at(0, kept, section), 0.0).item(), rel=1e-3)


def test_retaining_keeps_the_base_model_where_it_is(job: Path) -> None:
    found = {}
    for weight in (0.0, 2.0):
        train_ = {"epochs": 6, "batch_size": 4, "lr": 0.01, "validation": 0.2, "retain_weight": weight}
        raw = tiny.recipe_dict(job, train=train_, behaviour={"unrelated": 8})
        run = pipeline.distill(Recipe.from_dict(raw, base_dir=job), job / f"run{weight}")
        found[weight] = run.evaluation
    kl = {w: e["behaviour"]["unrelated"]["kl"]["mean"] for w, e in found.items()}
    assert kl[2.0] < 0.5 * kl[0.0]
    assert found[2.0]["kl_closed"]["mean"] > 0.2


def test_the_pages_say_it(job: Path) -> None:
    raw = tiny.recipe_dict(job, behaviour={**CHECKS, "other_system": "Answer <b>in one word</b>."})
    run = pipeline.distill(Recipe.from_dict(raw, base_dir=job), job / "run")
    facts = dict(behaviour_facts(run.evaluation))
    share = unrelated_share(run.evaluation)
    assert share is not None and f"{100 * share:.1f} % of the KL that was taught" in facts["4 unrelated prompts"]
    assert "strength 0.5" in facts and "with the context in its prompt again" in facts
    remarks = " ".join(verdict(run.evaluation)["remarks"])
    seen = max(share, run.evaluation["behaviour"]["unrelated"]["kl"]["mean"]) > 0.1
    assert ("changes unrelated prompts" in remarks) == ("train.retain_weight lowers that" in remarks) == seen
    page, text = ((job / "run" / name).read_text() for name in ("report.html", "report.md"))
    assert "Behaviour elsewhere" in page and "Strength of the adapter" in page and "Behaviour elsewhere" in text
    assert "<b>in one word</b>" not in page and "&lt;b&gt;in one word&lt;/b&gt;" in page
    again = pipeline.evaluate(job / "run")
    assert again["behaviour"]["unrelated"]["kl"] == run.evaluation["behaviour"]["unrelated"]["kl"]


def test_facts_name_each_number() -> None:
    again, other = ({key: {"mean": value} for key, value in numbers.items()} for numbers in (
        {"kl": 0.1, "alone": 0.2, "same": 0.3}, {"kl": 0.4, "obeys": 0.5, "keeps": 0.6, "base_keeps": 0.7},
    ))  # fmt: skip
    found = {"behaviour": {"again": again, "other": {**other, "system": "Sing."}}, "table": {}}
    assert dict(behaviour_facts(found)) == {
        "with the context in its prompt again": "KL to the teacher 0.100 nats per token, 0.200 without it; "
        "the teacher's answer on 30.0 %",
        "behind another system prompt, “Sing.”": "the base model's answer there on 50.0 %, that of the taught context on "
        "60.0 % (the two are the same on 70.0 %); KL to the base model 0.400 nats per token",
    }


def test_a_student_is_loaded_with_a_strength(job: Path) -> None:
    run = pipeline.distill(Recipe.from_dict(tiny.recipe_dict(job, eval__latency_rows=0), base_dir=job), job / "run")
    ids = torch.tensor([[0, 5, 6, 7, 8]])
    with torch.no_grad():
        none, half, full = (pipeline.load_student(run.path, strength=s)[0](ids).logits for s in (0.0, 0.5, 1.0))
        base = LM.load(Recipe.from_dict(tiny.recipe_dict(job), base_dir=job).model).model(ids).logits
        merged = pipeline.load_student(run.path, strength=0.5, merge=True)[0](ids).logits
    assert torch.equal(none, base)
    assert 0 < (half - base).norm() < (full - base).norm()
    torch.testing.assert_close(merged, half, rtol=1e-3, atol=1e-3)
    said = ["".join(piece for arm, piece in pipeline.try_text(run.path, "say emu", max_new_tokens=4, strength=0.0) if arm == which)
            for which in ("zero_shot", "distilled")]  # fmt: skip
    assert said[0] == said[1]


def test_mean_kl_of_the_untrained_on_retained_rows_is_0(job: Path) -> None:
    recipe = Recipe.from_dict(tiny.recipe_dict(job, train={"retain_weight": 1.0}), base_dir=job)
    lm, prompter, _ = prepare(recipe)
    kept = keep_examples(recipe, lm, prompter, TargetStore(job / "t"))
    lm.add_adapter(LoraSection(rank=4), 0)
    assert mean_kl(lm, kept, 8) == pytest.approx(0.0, abs=1e-6)
    assert all(len(t.ids) <= 32 for t in base_targets(lm, prompter, unrelated(prompter, generic.TRAINED[:3]), recipe,
                                                        TargetStore(job / "t"), recipe.targets))  # fmt: skip
