"""On-policy rounds: the student's completions, judged by the teacher, and resumed at any moment with the same bits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from ctxdistill import pipeline, policy, replay
from ctxdistill import train as loop
from ctxdistill.dataset import Data, prepare
from ctxdistill.errors import FitError, RecipeError, RunError, TrainError
from ctxdistill.lm import LM
from ctxdistill.objective import Example, batch_loss
from ctxdistill.pipeline import make_examples
from ctxdistill.policy import Habits, Rounds, check, chosen, repeated, rounds, share
from ctxdistill.prompts import Prompter, join
from ctxdistill.recipe import LoraSection, Recipe, TrainSection
from ctxdistill.replay import Replay
from ctxdistill.rundir import RunDir, no_progress
from ctxdistill.store import TargetStore
from ctxdistill.train import rows_of, train

Ready = tuple[Recipe, LM, Prompter, Data]
TRAIN: dict[str, Any] = {
    "epochs": 2, "batch_size": 4, "lr": 0.01, "validation": 0.2, "checkpoint_every": 3, "loss": "reverse_kl",
    "on_policy": 0.5, "round_steps": 3,
}  # fmt: skip


def ready_for(job: Path, **overrides: Any) -> Ready:
    raw = tiny.recipe_dict(job, train={**TRAIN, **overrides}, lora={"rank": 4, "dropout": 0.1})
    raw["prompt"] = {"pattern": "Please {prompt}"}  # long enough for the student's prompts to share their start, too
    recipe = Recipe.from_dict(raw, base_dir=job)
    return (recipe, *prepare(recipe))


def examples_of(ready: Ready, folder: Path) -> list[Example]:
    recipe, lm, prompter, data = ready
    return make_examples(recipe, lm, prompter, data.pairs["train"], TargetStore(folder), no_progress)


@pytest.fixture
def student(job: Path) -> tuple[Ready, list[Example]]:
    """A student that is not the base model and is being trained, with a run's worth of examples."""
    ready = ready_for(job, on_policy=1.0, on_policy_temperature=2.0)
    examples = examples_of(ready, job / "t")
    ready[1].add_adapter(LoraSection(rank=4, dropout=0.3), 0)
    tiny.disturb(ready[1])
    ready[1].training(True)
    return ready, examples


def test_the_student_writes_and_both_sides_see_the_same_ids(student: tuple[Ready, list[Example]], job: Path) -> None:
    """Against the slow way: the student's own samples one at a time, the teacher's full forward on them."""
    (recipe, lm, prompter, data), examples = student
    source = Rounds(lm, prompter, data.pairs["train"], examples, recipe, RunDir(job / "run"))
    batch = source(0)
    rows = rows_of(0, len(examples), recipe.train)
    assert [e.id for e in batch] == [examples[i].id for i in rows]
    teachers = {p.id: p.teacher for p in data.pairs["train"]}
    assert lm.peft.training  # as before
    assert lm.prefix([e.prompt for e in examples])
    lm.training(False)
    for place, (example, row) in enumerate(zip(batch, rows, strict=True)):
        seed = source._seed(0, policy.Item(0, row))
        with lm.adapter(True):
            (alone,) = lm.generate(
                [example.prompt], max_new_tokens=6, ends=prompter.ends, temperature=2.0, seeds=[seed]
            )
        assert tuple(alone) == example.target.ids, place
        with torch.no_grad(), lm.adapter(False):
            whole, n = join(teachers[example.id], example.target.ids)
            slow = lm.model(input_ids=torch.tensor([whole])).logits[0, -n - 1 : -1].log_softmax(-1)
        fast = lm.head(example.target.tensors["hidden"]).log_softmax(-1)
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)
    assert {e.target.ids for e in batch} != {examples[i].target.ids for i in rows}


def test_every_row_of_every_round_is_drawn_anew(student: tuple[Ready, list[Example]], job: Path) -> None:
    (recipe, lm, prompter, data), examples = student
    seeds = []
    for seed in (0, 1):
        other = recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": seed})})
        source = Rounds(lm, prompter, data.pairs["train"], examples, other, RunDir(job / "run"))
        places = [policy.Item(step, row) for step in (0, source.per_epoch) for row in (0, 1)]  # in two epochs
        seeds += [source._seed(number, place) for number in (0, 1) for place in places]
    assert len(set(seeds)) == 16


def test_the_line_of_a_round_says_how_the_student_is(student: tuple[Ready, list[Example]], job: Path) -> None:
    (recipe, lm, prompter, data), examples = student
    source = Rounds(lm, prompter, data.pairs["train"], examples, recipe, RunDir(job / "run"))
    own = [e for step in range(3) for e in source(step)]
    (line,) = rounds(RunDir(job / "run"))
    assert (line["round"], line["step"], line["rows"], line["student_rows"]) == (1, 1, 12, 12)
    assert line["tokens"] == pytest.approx(sum(len(e.target.ids) for e in own) / 12)
    assert line["ended"] == pytest.approx(sum(e.target.ids[-1] == 1 for e in own) / 12)
    tokens, kl, entropy = 0, 0.0, 0.0
    lm.training(False)
    for e in own:
        ids, n = join(e.prompt, e.target.ids)
        with torch.no_grad(), lm.adapter(True):
            q = lm.model(input_ids=torch.tensor([ids])).logits[0, -n - 1 : -1].softmax(-1)
        p = lm.head(e.target.tensors["hidden"]).softmax(-1)
        kl += float((q * (q / p).log()).sum())
        entropy -= float((q * q.log()).sum())
        tokens += n
    assert line["reverse_kl"] == pytest.approx(kl / tokens, rel=1e-3)
    assert line["student_entropy"] == pytest.approx(entropy / tokens, rel=1e-3)


def test_a_share_of_each_round_is_the_students(job: Path) -> None:
    ready = ready_for(job)
    recipe, lm, prompter, data = ready
    examples = examples_of(ready, job / "t")
    lm.add_adapter(LoraSection(rank=4), 0)
    source = Rounds(lm, prompter, data.pairs["train"], examples, recipe, RunDir(job / "run"))
    batches = [source(step) for step in range(8)]
    theirs = {e.target.key for e in examples}
    given = [sum(e.target.key in theirs for e in batch) for batch in batches]
    own = [line["student_rows"] for line in rounds(RunDir(job / "run"))]
    assert own[0] == 6 and own[1] in (4, 5) and own[2] in (2, 3)  # of rounds of 12, 9 and 5 places; 26 in all
    assert [sum(given[:3]), sum(given[3:6]), sum(given[6:])] == [12 - own[0], 9 - own[1], 5 - own[2]]


def test_what_is_drawn_depends_on_seed_and_round_alone() -> None:
    assert chosen(40, 3, 0.5, 1) == chosen(40, 3, 0.5, 1) != chosen(40, 4, 0.5, 1) != chosen(40, 4, 0.5, 2)
    assert len(chosen(40, 0, 0.3, 0)) == 12 and chosen(40, 0, 0.0, 0) == [] and chosen(3, 0, 1.0, 0) == [0, 1, 2]


@pytest.mark.parametrize(("n", "part"), [(1, 0.5), (4, 0.1), (5, 0.5), (1, 0.9)])
def test_the_share_is_right_over_many_small_rounds(n: int, part: float) -> None:
    drawn = [len(chosen(n, number, part, 0)) for number in range(2000)]
    assert set(drawn) == {math.floor(n * part), math.ceil(n * part)}
    assert sum(drawn) / (2000 * n) == pytest.approx(part, abs=0.03)


def test_a_ramp_on_which_no_round_comes_is_refused(job: Path) -> None:
    ready = ready_for(job, on_policy_ramp=0.5, epochs=1, round_steps=0)
    recipe, lm, prompter, data = ready
    with pytest.raises(RecipeError, match=r"one round of .* steps"):
        Rounds(lm, prompter, data.pairs["train"], examples_of(ready, job / "t"), recipe, RunDir(job / "run"))


def test_the_ramp() -> None:
    section = TrainSection(on_policy=0.8, on_policy_ramp=0.5)
    assert [share(step, 40, section) for step in (0, 10, 20, 30)] == pytest.approx([0.0, 0.4, 0.8, 0.8])
    assert share(0, 40, TrainSection(on_policy=0.8)) == 0.8


def test_without_on_policy_and_with_a_share_of_0_the_training_is_the_same(job: Path) -> None:
    bits = []
    for number, own in enumerate((None, 0.0)):
        ready = ready_for(job, on_policy=0.0, round_steps=0)
        recipe, lm, prompter, data = ready
        examples = examples_of(ready, job / "t")
        lm.add_adapter(recipe.lora, 0)
        run = RunDir(job / f"run{number}")
        source = None if own is None else Rounds(lm, prompter, data.pairs["train"], examples, recipe, run)
        train(lm, examples, [], recipe.train, run, source=source)
        bits.append([p.detach().clone() for p in lm.trainable().values()])
    assert all(torch.equal(a, b) for a, b in zip(*bits, strict=True))


def test_steps_of_a_round_are_replayed_in_the_room_that_the_round_takes(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "GPU", "cpu")
    monkeypatch.setattr(replay, "WASTE", 1.0)
    made: list[Replay | None] = []
    of = Replay.of.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(Replay, "of", lambda *given, **how: made.append(of(Replay, *given, **how)) or made[-1])
    lines = []
    for on in (True, False):
        recipe, lm, prompter, data = ready_for(job, on_policy=0.5, epochs=3, round_steps=4, patience=0)
        examples = examples_of((recipe, lm, prompter, data), job / "t")
        lm.add_adapter(LoraSection(rank=4), 0)
        run = RunDir(job / f"run{on}")
        section = recipe.train.model_copy(update={"cuda_graphs": on})
        source = Rounds(lm, prompter, data.pairs["train"], examples, recipe, run)
        train(lm, examples, [], section, run, source=source)
        lines.append([line for line in run.read_jsonl("metrics.jsonl") if line["event"] == "step"])
    rounds_made = -(-len(lines[0]) // 4)
    assert len(made) == rounds_made > 1 and all(one and one.run for one in made)
    for a, b in zip(*lines, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-2)


def test_training_on_its_own_completions_brings_the_student_to_its_teacher(job: Path) -> None:
    ready = ready_for(job, on_policy=1.0, epochs=8, round_steps=4, patience=0)
    recipe, lm, prompter, data = ready
    examples = examples_of(ready, job / "t")
    lm.add_adapter(LoraSection(rank=4), 0)
    run = RunDir(job / "run")
    source = Rounds(lm, prompter, data.pairs["train"], examples, recipe, run)
    section = TrainSection(loss="reverse_kl")
    with torch.no_grad():
        before = batch_loss(lm, examples, section).item()
    train(lm, examples, [], recipe.train, run, source=source)
    with torch.no_grad():
        after = batch_loss(lm, examples, section).item()  # on the teacher's, on which it was never trained
    lines = rounds(run)
    assert lines[-1]["reverse_kl"] < 0.5 * lines[0]["reverse_kl"]
    assert after < 0.6 * before


class Killed(BaseException):
    """A kill, for what can see no signal."""


def test_killed_between_and_within_rounds_gives_the_same_bits(job: Path) -> None:
    """Moments: while the student writes a round, while the teacher judges it, at a round's first and middle step."""

    def go(folder: Path, moment: tuple[str, int] | None = None) -> bytes | None:
        raw = tiny.recipe_dict(job, train=TRAIN, lora={"rank": 4, "dropout": 0.1}, eval__latency_rows=0)
        raw["targets"]["batch_size"] = 2  # several batches in a round
        raw["train"]["checkpoint_every"] = 1  # go on in the middle of a round
        met = 0

        def progress(stage: str, done: int, total: int) -> None:
            nonlocal met
            if moment and stage.startswith(moment[0]):
                met += 1
                if met == moment[1]:
                    raise Killed

        recipe = Recipe.from_dict(raw, base_dir=job)
        try:
            pipeline.distill(recipe, folder, resume=True, progress=progress)
        except Killed:
            return None
        return (folder / "adapter/adapter_model.safetensors").read_bytes()

    straight = go(job / "straight")
    moments = [("student (round 1", 2), ("teacher (round 1", 1), ("train", 2), ("student (round 2", 1), ("train", 2),
               ("teacher (round 3", 1), ("train", 1)]  # fmt: skip
    for moment in moments:
        assert go(job / "broken", moment) is None, moment
    assert go(job / "broken") == straight
    lines = [RunDir(job / name).read_jsonl("metrics.jsonl") for name in ("straight", "broken")]
    timeless = [[{k: v for k, v in x.items() if k != "seconds"} for x in found] for found in lines]
    assert timeless[0] == timeless[1]
    assert [x["step"] for x in lines[0] if x["event"] == "round"] == [1, 4, 7]
    assert not (job / "straight/rounds/00001").exists() and (job / "straight/rounds/00003/index.jsonl").exists()


def test_the_student_that_writes_a_round_is_kept(job: Path) -> None:
    raw = tiny.recipe_dict(job, train={**TRAIN, "checkpoint_every": 100}, eval__latency_rows=0)
    pipeline.distill(Recipe.from_dict(raw, base_dir=job), job / "run")
    assert [p.stem for p in sorted((job / "run/checkpoints").glob("step-*"))] == ["step-00000006", "step-00000008"]


def test_a_round_of_another_run_is_refused(student: tuple[Ready, list[Example]], job: Path) -> None:
    (recipe, lm, prompter, data), examples = student
    run = RunDir(job / "run")
    run.append("rounds/00001.jsonl", {"items": [[0, 99]], "ids": [[1]]})
    with pytest.raises(RunError, match=r"00001\.jsonl is not a part of this run"):
        Rounds(lm, prompter, data.pairs["train"], examples, recipe, run)(0)


def line(number: int, **values: Any) -> dict[str, Any]:
    good = {
        "tokens": 20.0,
        "ended": 1.0,
        "repeated": 0.1,
        "reverse_kl": 0.3,
        "student_entropy": 0.5,
        "teacher_entropy": 0.5,
    }
    return {"round": number, "step": 1, "student_rows": 8, "rows": 8, **good, **values}


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"tokens": 1.0}, "completions of 1.0 tokens where the teacher's have 21.0"),
        ({"ended": 0.0}, "no completion ends, where 100% did in an earlier round"),
        ({"repeated": 0.8}, "80% of the text repeats itself"),
        ({"reverse_kl": 4.0}, "4.00 nats per token, 0.30 in the first round"),
        ({"reverse_kl": float("nan")}, "nan nats"),
        ({"student_entropy": 0.001}, "entropy 0.0010 nats per token"),
    ],
)
def test_a_collapse_stops_with_its_reason(bad: dict[str, float], said: str) -> None:
    teacher = Habits(21.0, 0.97, 0.1)
    check([line(1), line(2)], teacher)
    check([line(1, **bad)], teacher)  # an untrained student may do what it likes
    with pytest.raises(TrainError, match=f"(?s)collapsed in round 2.*{said}.*train.lr"):
        check([line(1), line(2, **bad)], teacher)


def test_a_collapse_may_come_slowly() -> None:
    for slow, bad, said in (
        ({"reverse_kl": 0.8}, {"reverse_kl": 2.0}, "0.30 in the first round"),
        ({"ended": 0.1}, {"ended": 0.0}, "where 100% did"),
    ):
        check([line(1), line(2, **slow)], Habits(21.0, 0.97, 0.1))
        with pytest.raises(TrainError, match=f"(?s)round 3.*{said}"):
            check([line(1), line(2, **slow), line(3, **bad)], Habits(21.0, 0.97, 0.1))


def test_a_task_with_one_short_certain_answer_is_no_collapse() -> None:
    sure = {"tokens": 2.0, "student_entropy": 0.0001, "teacher_entropy": 0.001, "reverse_kl": 0.01}
    check([line(1, **sure), line(2, **sure)], Habits(2.0, 1.0, 0.0))
    check([line(1, tokens=1.0), line(2, tokens=1.0)], Habits(1.0, 1.0, 0.0))


def test_a_collapsing_run_stops(job: Path) -> None:
    """Far too hot: the student's text goes to pieces, and the run says so."""
    raw = tiny.recipe_dict(job, train={**TRAIN, "on_policy": 1.0, "lr": 3.0, "clip": 1e6, "epochs": 8, "warmup": 0.0})
    raw["completions"]["max_new_tokens"] = 24
    with pytest.raises(TrainError, match=r"collapsed in round \d+"):
        pipeline.distill(Recipe.from_dict(raw, base_dir=job), job / "run")


def test_repetition() -> None:
    assert repeated([1, 2, 3]) == 0.0 and repeated(list(range(20))) == 0.0
    assert repeated([7] * 13) == pytest.approx(0.9)


def test_a_run_reports_its_rounds(job: Path) -> None:
    raw = tiny.recipe_dict(job, train={**TRAIN, "on_policy_ramp": 0.6})
    run = pipeline.distill(Recipe.from_dict(raw, base_dir=job), job / "run")
    own = [x["student_rows"] for x in rounds(RunDir(job / "run"))]
    assert own[0] == 0 and own[1] in (3, 4) and own[2] in (2, 3)
    assert run.evaluation["training"]["student_completions"] == sum(own)
    page, text = ((job / "run" / name).read_text() for name in ("report.html", "report.md"))
    assert "On-policy rounds" in page and f"<td>{own[1]} of 9</td>" in page
    assert "| 1 | 1 | 0 of 12 | – |" in text
    off = {**TRAIN, "on_policy": 0.0, "round_steps": 0}
    plain = pipeline.distill(Recipe.from_dict(tiny.recipe_dict(job, train=off), base_dir=job), job / "off")
    assert plain.evaluation["cost"]["training_tokens"] < run.evaluation["cost"]["training_tokens"]
    assert "On-policy rounds" not in (job / "off/report.html").read_text()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"train": {"on_policy": 0.5, "ce_weight": 0.1}}, "ce_weight"),
        ({"train": {"on_policy": 1.5}}, "on_policy"),
        ({"train": {"round_steps": 3}}, "need train.on_policy"),
        ({"train": {"on_policy": 0.5}, "completions": {"source": "data", "supervise_end": False}}, "supervise_end"),
        (
            {"train": {"on_policy": 0.5}, "completions": {"source": "label"}, "prompt": {"label_words": ["A", "B"]}},
            "label",
        ),
    ],
)
def test_contradictions_are_refused(job: Path, values: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Recipe.from_dict(tiny.recipe_dict(job, **values), base_dir=job)


def test_it_can_be_switched_off_in_a_recipe_that_has_it(job: Path) -> None:
    raw = tiny.recipe_dict(job, train={"on_policy": 0.0, "on_policy_ramp": 0.5, "round_steps": 3})
    assert Recipe.from_dict(raw, base_dir=job).train.on_policy == 0


def test_what_the_student_may_write_must_fit(job: Path) -> None:
    raw = tiny.recipe_dict(job, completions={"source": "data", "max_new_tokens": 480})
    prepare(Recipe.from_dict(raw, base_dir=job))
    with pytest.raises(FitError, match="train query and answer"):
        prepare(Recipe.from_dict({**raw, "train": TRAIN}, base_dir=job))


def test_completions_of_the_data_may_be_mixed_in(job: Path) -> None:
    raw = tiny.recipe_dict(job, train={**TRAIN, "round_steps": 0}, completions={"source": "data", "max_new_tokens": 6})
    made = pipeline.distill(Recipe.from_dict(raw, base_dir=job), job / "run")
    assert made.evaluation["training"]["student_completions"] == 12
    written = [json.loads(x)["ids"] for x in (job / "run/rounds/00001.jsonl").read_text().splitlines()]
    assert all(1 <= len(ids) <= 6 for batch in written for ids in batch)
