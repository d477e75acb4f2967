"""Targets from one and many contexts against a slow oracle, and what each arm leaves behind."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from ctxdistill import losses
from ctxdistill.accounts import forward_flops
from ctxdistill.arms import ARMS, Arm
from ctxdistill.cells import NOTHING, Bench, examples, judge, prompt_cost, run_cell
from ctxdistill.draws import Draw
from ctxdistill.errors import DataError, FitError
from ctxdistill.grid import Study
from ctxdistill.lm import LM
from ctxdistill.recipe import ModelSection
from ctxdistill.rows import Row
from ctxdistill.rundir import RunDir
from ctxdistill.targets import point_mass
from ctxdistill.tasks import TASKS, Pattern
from ctxdistill.teachers import fitted, focused, teach

WORDS = {"HUM": "who", "LOC": "city", "NUM": "two"}  # several tokens each for a byte tokenizer
PATTERN = Pattern("Q: {text}\nA:", WORDS, instruction="Name the kind.", student_instruction="Kind?")


def row(i: int, label: str) -> Row:
    return Row(f"r{i}", {"text": f"{label.lower()} {i}?", "label": label, "index": i}, f"data:{i}")


ROWS = [row(i, list(WORDS)[i % 3]) for i in range(30)]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    folder = tiny.save(tmp_path_factory.mktemp("cells") / "model", "llama", chat=False)
    return LM.load(ModelSection(name=str(folder)))


@pytest.fixture
def bench(lm: LM) -> Bench:
    return make_bench(lm)


def make_bench(lm: LM, **grid: Any) -> Bench:
    study = Study.from_dict(
        {
            "model": {"names": ["m", "m2"]}, "tasks": {"names": ["trec", "sst2"]},
            "grid": {"contexts": 3, "queries": 6, **grid}, "eval": {"batch_size": 4, "latency_rows": 1},
            "train": {"epochs": 2, "batch_size": 4, "lr": 0.01}, "finetune": {"epochs": 2, "batch_size": 2}, "full_lr": 1e-3,
        }
    )  # fmt: skip
    draw = Draw((tuple(ROWS[:4]), tuple(ROWS[4:8]), tuple(ROWS[8:12])), tuple(ROWS[12:18]))
    other = (Pattern("{text} ->", {"a": "b", "c": "d"}), (Row("o", {"text": "elsewhere", "label": "a"}, "o"),) * 2)
    return Bench(study, lm, TASKS["trec"], PATTERN, draw, {"trec": ROWS[18:]}, 0, None, (other, other, other))


def prompt_text(demos: tuple[Row, ...], query: Row) -> str:
    parts = ["Name the kind."] + [f"Q: {d.fields['text']}\nA: {WORDS[d.fields['label']]}" for d in demos]
    return "\n\n".join([*parts, f"Q: {query.fields['text']}\nA:"])


def logprobs(lm: LM, text: str, answer: str) -> torch.Tensor:
    """The model's log-probabilities at each position of an answer, by the plain forward."""
    prompt, ids = (lm.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (text, answer))
    with torch.no_grad():
        out = lm.model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0].log_softmax(-1)
    return out[len(prompt) - 1 : -1]


def test_prompts_are_what_the_pattern_says(bench: Bench) -> None:
    (reading,) = bench.readings(ARMS["cd_one"], bench.draw.queries, "queries")
    assert bench.lm.tokenizer.decode(reading.prompts[0]) == prompt_text(ROWS[:4], ROWS[12])
    made, _, _ = examples(bench, ARMS["cd_one"])
    assert bench.lm.tokenizer.decode(made[0].prompt) == f"Kind?\n\nQ: {ROWS[12].fields['text']}\nA:"
    kept, _, _ = examples(bench, ARMS["cd_small_context"])
    shown = "".join(f"Q: {d.fields['text']}\nA: {WORDS[d.fields['label']]}\n\n" for d in ROWS[2:4])
    assert bench.lm.tokenizer.decode(kept[0].prompt) == f"Kind?\n\n{shown}Q: {ROWS[12].fields['text']}\nA:"


def test_out_of_domain_the_query_alone_is_written_in_another_way(bench: Bench) -> None:
    bench.pattern = dataclasses.replace(PATTERN, ood={"far": "Asked: {text}\nA:"})
    query = ROWS[18]
    (reading,) = bench.readings(ARMS["in_context"], [query], "far")
    *context, asked = prompt_text(ROWS[:4], query).split("\n\n")
    assert bench.lm.tokenizer.decode(reading.prompts[0]).split("\n\n") == [*context, asked.replace("Q:", "Asked:")]
    (kept,) = bench.pairs(bench.student_prompter(ARMS["cd_small_context"], "far"), [query])
    assert bench.lm.tokenizer.decode(kept.student).split("\n\n")[1:] == [*context[-2:], asked.replace("Q:", "Asked:")]


@pytest.mark.parametrize("arm", ["cd_one", "cd_many"])
def test_targets_are_the_mixture_of_the_contexts(bench: Bench, arm: str) -> None:
    readings = bench.readings(ARMS[arm], bench.draw.queries, "queries")
    targets = teach(readings, bench.lm, soft=True, batch_size=4)
    contexts = bench.draw.contexts if arm == "cd_many" else bench.draw.contexts[:1]
    for query, target in zip(bench.draw.queries, targets, strict=True):
        # slow: p(whole answer) under each context, averaged, decides the label
        said = {w: [logprobs(bench.lm, prompt_text(c, query), f" {w}") for c in contexts] for w in WORDS.values()}
        ids = {w: bench.lm.tokenizer(f" {w}", add_special_tokens=False)["input_ids"] for w in said}
        whole = {
            w: sum(p[range(len(ids[w])), ids[w]].sum().exp().item() for p in each) / len(contexts)
            for w, each in said.items()
        }
        best = max(whole, key=lambda w: whole[w])
        assert list(target.ids) == ids[best]
        # the mixture's conditional at t is p(answer so far, next) / p(answer so far), both averaged over contexts
        for t in range(len(target.ids)):
            before = torch.stack([p[range(t), ids[best][:t]].sum().exp() for p in said[best]])  # [K]
            joint = torch.stack([p[t].exp() for p in said[best]]) * before[:, None]  # [K, V]
            expected = joint.mean(0) / before.mean()
            assert torch.allclose(target.tensors["logprobs"][t].exp(), expected, atol=2e-5)


def test_the_weight_of_the_label_words() -> None:
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    shares = torch.tensor([0.2, 0, 0, 0.8])
    for weight, expected in ((0.0, p), (1.0, shares), (0.25, 0.75 * p + 0.25 * shares)):
        assert torch.allclose(focused(p.log(), [0, 3, 3], weight).exp(), expected)
    student = torch.randn(4, requires_grad=True)
    both, plain, labels = (
        torch.autograd.grad(losses.divergence("forward_kl", target[None], student[None]).sum(), student)[0]
        for target in (focused(p.log(), [0, 3], 0.25), p.log(), focused(p.log(), [0, 3], 1.0))
    )
    assert torch.allclose(both, 0.75 * plain + 0.25 * labels, atol=1e-6)


def test_a_hard_target_is_the_preferred_label(bench: Bench) -> None:
    readings = bench.readings(ARMS["cd_one"], bench.draw.queries, "queries")
    soft, hard = (teach(readings, bench.lm, soft=s, batch_size=4) for s in (True, False))
    assert [t.ids for t in soft] == [t.ids for t in hard]
    assert (hard[0].tensors["logprobs"].exp().sum(-1) == 1).all() and hard[0].tensors["logprobs"].max() == 0


def test_a_point_mass_is_cross_entropy() -> None:
    student = torch.randn(2, 7, requires_grad=True)
    target = point_mass((3, 5), 7).tensors["logprobs"]
    kl = losses.divergence("forward_kl", target, student).sum()
    (one,) = torch.autograd.grad(kl, student)
    ce = torch.nn.functional.cross_entropy(student, torch.tensor([3, 5]), reduction="sum")
    (other,) = torch.autograd.grad(ce, student)
    assert kl.item() == pytest.approx(ce.item(), rel=1e-6) and torch.allclose(one, other, atol=1e-7)


def test_calibration_divides_by_the_prior_and_keeps_the_mass(bench: Bench) -> None:
    bench.pattern = Pattern(PATTERN.pattern, WORDS, answer_pattern="{answer}")  # a byte tokenizer shares the space
    (reading,) = bench.readings(Arm(calibration="queries"), bench.draw.queries, "queries")
    p = reading.scores.logprobs.exp()  # [N, L]
    shares = p / p.sum(1, keepdim=True)
    expected = shares / shares.mean(0)
    expected = expected / expected.sum(1, keepdim=True) * p.sum(1, keepdim=True)
    assert torch.allclose(reading.answers.exp(), expected, rtol=1e-4)
    with torch.no_grad():
        raw = bench.lm.head(reading.scores.first).log_softmax(-1)  # [N, V]
    plain, first = raw.exp(), torch.stack([reading.calibrated(row) for row in raw]).exp()
    ids = [label[0] for label in reading.prompter.labels.values()]
    others = [i for i in range(plain.shape[1]) if i not in ids]
    assert torch.equal(first[:, others], plain[:, others])
    assert torch.allclose(first.sum(1), torch.ones(len(first)), atol=1e-4)
    ratio = first[:, ids] / plain[:, ids] * shares.mean(0)  # the same for all labels of a row
    assert torch.allclose(ratio, ratio[:, :1].expand(-1, 3), rtol=1e-3)


def test_the_prior_of_queries_without_content(bench: Bench) -> None:
    (reading,) = bench.readings(Arm(calibration="content_free"), bench.draw.queries, "queries")
    expected = torch.zeros(3)
    for text in ("N/A", "[MASK]", ""):
        prompt = prompt_text(ROWS[:4], Row("", {"text": text, "label": "HUM"}, ""))
        said = []
        for word in WORDS.values():
            p = logprobs(bench.lm, prompt, f" {word}")
            said.append(p[range(len(p)), bench.lm.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]].sum())
        expected += torch.stack(said).softmax(0) / 3
    assert reading.calibration is not None and reading.calibration.scale == 1
    assert torch.allclose((-reading.calibration.bias).exp(), expected, atol=1e-4)


def test_a_slope_and_biases_are_fitted_to_labelled_rows() -> None:
    random = torch.Generator().manual_seed(0)
    truth = torch.randn(4000, 3, generator=random).mul(2).log_softmax(1)
    labels = torch.multinomial(truth.exp(), 1, generator=random)[:, 0]
    said = (truth / 0.5 - torch.tensor([0.0, 1.0, -2.0])).log_softmax(1)  # too sure of itself, and biased
    scale, bias = fitted(said, labels)
    assert scale == pytest.approx(0.5, abs=0.05)
    assert (bias - bias.mean()).tolist() == pytest.approx([1 / 6, 2 / 3, -5 / 6], abs=0.1)  # half of the biases
    few = fitted(said[:2], labels[:2])  # two rows say little: it stays near no change, and finite
    assert 0.5 < few.scale < 2 and few.bias.abs().max() < 1.5

    def loss(scale: float, bias: torch.Tensor) -> float:
        prior = 0.5 * (torch.tensor(scale).log().square() + bias.square().sum())
        return (
            torch.nn.functional.cross_entropy(scale * said[:50] + bias, labels[:50], reduction="sum") + prior
        ).item()

    scale, bias = fitted(said[:50], labels[:50])
    for step in torch.eye(3) * 0.05:  # no neighbour is better
        assert loss(scale, bias) < min(loss(scale, bias + step), loss(scale, bias - step))
    assert loss(scale, bias) < min(loss(scale * 1.05, bias), loss(scale / 1.05, bias))


@pytest.mark.parametrize("control", ["", "shuffled_labels", "irrelevant_context", "zero_shot_teacher"])
def test_each_context_is_calibrated_on_the_demonstrations_of_the_others(bench: Bench, control: str) -> None:
    arm = bench.study.arm("cd_many_calibrated" + (f"+{control}" if control else ""))
    readings = bench.readings(arm, bench.draw.queries, "queries")
    sets = bench.labelled(arm)
    words = list(WORDS.values())
    for number, (context, reading) in enumerate(zip(bench.contexts(arm), readings, strict=True)):
        rows = [d for i, demos in enumerate(sets) for d in demos if i != number or control == "zero_shot_teacher"]
        assert len(rows) == (12 if control == "zero_shot_teacher" else 8)
        assert not {d.id for d in rows} & {d.id for d in context.demos}
        scores = bench.read(context, rows, "elsewhere", bench.lm)[2].logprobs
        expected = fitted(scores, torch.tensor([words.index(d.fields["answer"]) for d in rows]))
        assert reading.calibration is not None
        assert torch.allclose(reading.calibration.bias, expected.bias, atol=1e-3)
        assert reading.calibration.scale == pytest.approx(expected.scale, rel=1e-3)


def test_no_context_is_calibrated_on_what_it_holds_where_contexts_share_rows(bench: Bench) -> None:
    arm = bench.study.arm("cd_many_calibrated")
    bench.draw = dataclasses.replace(bench.draw, contexts=(tuple(ROWS[:4]), tuple(ROWS[2:6]), tuple(ROWS[4:8])))
    judged = [[row.id for row in bench.calibration_rows(arm, number)] for number in range(3)]
    assert judged == [
        ["r4", "r5", "r4", "r5", "r6", "r7"],
        ["r0", "r1", "r6", "r7"],
        ["r0", "r1", "r2", "r3", "r2", "r3"],
    ]
    assert len(bench.readings(arm, bench.draw.queries, "queries")) == 3
    bench.draw = dataclasses.replace(bench.draw, contexts=(tuple(ROWS[:4]), tuple(ROWS[3::-1])))
    with pytest.raises(DataError, match="no demonstrations of other contexts"):
        bench.readings(arm, bench.draw.queries, "queries")


def test_many_contexts_mix_in_the_labels_of_all_their_demonstrations(bench: Bench) -> None:
    made, _, _ = examples(bench, Arm(context="many", demos_weight=1.0))
    assert [e.id for e in made] == [r.id for r in (*ROWS[12:18], *ROWS[:12])]
    made, _, _ = examples(bench, ARMS["ft_lora_many"])
    assert [e.id for e in made] == [r.id for r in ROWS[:12]]
    for example, r in zip(made, ROWS, strict=False):
        assert bench.lm.tokenizer.decode(example.target.ids) == f" {WORDS[r.fields['label']]}"
    made, _, _ = examples(bench, Arm(demos_weight=2.0))
    assert [e.id for e in made[6:]] == [r.id for r in ROWS[:4]] * 3  # two for each of the six queries


def test_a_calibrated_teacher_needs_labels_that_differ_at_once(lm: LM) -> None:
    bench = make_bench(lm)
    bench.pattern = Pattern(PATTERN.pattern, {"HUM": "xa", "LOC": "xb", "NUM": "two"})
    (reading,) = bench.readings(Arm(calibration="content_free"), bench.draw.queries, "queries")
    with pytest.raises(DataError, match="share their first token"):
        teach([reading], lm, soft=True, batch_size=4)


def test_what_the_controls_see(bench: Bench) -> None:
    study = bench.study
    real = bench.contexts(study.arm("cd_many"))
    shuffled = bench.contexts(study.arm("cd_many+shuffled_labels"))
    assert [[d.fields["text"] for d in c.demos] for c in real] == [
        [d.fields["text"] for d in c.demos] for c in shuffled
    ]
    answers = [[[d.fields["answer"] for d in c.demos] for c in side] for side in (real, shuffled)]
    assert answers[0] != answers[1] and [sorted(a) for a in answers[0]] == [sorted(a) for a in answers[1]]
    assert [c.system for c in bench.contexts(study.arm("cd_many+irrelevant_context"))] == [
        "elsewhere -> b\n\nelsewhere -> b"
    ] * 3
    assert bench.contexts(study.arm("cd_one+zero_shot_teacher")) == [NOTHING]
    (reading,) = bench.readings(study.arm("cd_one+zero_shot_teacher"), bench.draw.queries, "queries")
    assert bench.lm.tokenizer.decode(reading.prompts[0]).startswith("Kind?")  # what the student reads


def test_judging_one_and_many_contexts(bench: Bench) -> None:
    rows = bench.evaluation["trec"]
    readings = bench.readings(ARMS["in_context_mean"], rows, "trec")
    single = [judge(bench, rows, [r], bench.lm) for r in readings]
    mean = judge(bench, rows, readings, bench.lm, each=True)
    assert [s["correct"] for s in mean] == [
        sum(x) / 3 for x in zip(*[[s["correct"] for s in a] for a in single], strict=True)
    ]
    assert {s["prediction"] for s in mean} == {None}  # the contexts do not agree
    for i, score in enumerate(judge(bench, rows, readings, bench.lm)):
        average = sum(r.scores.logprobs[i].exp() for r in readings)
        assert score["prediction"] == list(WORDS)[int(average.argmax())]
        assert score["correct"] == float(score["prediction"] == score["label"])
    greedy = single[0][0]
    with torch.no_grad():
        ids = torch.tensor([readings[0].prompts[0]])
        top = bench.lm.model(input_ids=ids).logits[0, -1].argmax().item()
    first = bench.lm.tokenizer(f" {WORDS[greedy['label']]}", add_special_tokens=False)["input_ids"][0]
    assert greedy["exact"] == float(top == first)


@pytest.mark.parametrize(
    "name", ["zero_shot", "in_context", "ft_lora", "ft_full", "ft_head", "cd_one", "cd_ce", "ab_full_hard_context"]
)
def test_a_cell_leaves_the_model_as_it_was(lm: LM, tmp_path: Path, name: str) -> None:
    bench = make_bench(lm)
    before = {n: p.clone() for n, p in lm.model.named_parameters()}
    trainable: list[int] = []
    bench.after_training = lambda lm: trainable.append(sum(p.numel() for p in lm.trainable().values())) or {}
    record, scores = run_cell(bench, ARMS[name], RunDir(tmp_path))
    after = dict(lm.model.named_parameters())
    assert set(after) == set(before) and all(torch.equal(p, before[n]) for n, p in after.items())
    assert lm.peft is None and lm.classes is None and not lm.trainable() and not lm.model.training
    assert len(scores) == len(ROWS) - 18 and {s["prediction"] for s in scores} <= set(WORDS)
    cost = record["cost"]
    assert cost["request_flops"] > 0 and cost["peak_mb"] > 0
    if ARMS[name].trains == "nothing":
        assert (cost["trainable"], cost["train_flops"], record["training"]) == (0, 0.0, None)
        return
    assert trainable == [cost["trainable"]]
    if name != "cd_ce":  # whose batches mix two kinds of targets
        assert record["training"]["loss_last"] < record["training"]["loss_first"]
    examples_seen = {"ft_lora": 4, "ft_full": 4, "ft_head": 4, "cd_ce": 6 + 4}.get(name, 6)
    steps = -(-examples_seen // (2 if name.startswith("ft") else 4)) * 2
    assert record["training"]["steps"] == steps
    assert cost["labelled"] == 4 and cost["unlabelled"] == (0 if name.startswith("ft") else 6)
    made, _, _ = examples(bench, ARMS[name])
    assert cost["trained_tokens"] == 2 * sum(len(e.prompt) + len(e.target.ids) - 1 for e in made)  # in two epochs
    assert cost["adapter_bytes"] == 4 * cost["trainable"]


@pytest.mark.parametrize(
    ("arm", "labelled", "unlabelled", "contexts"),
    [
        (ARMS["zero_shot"], 0, 0, 1),
        (ARMS["in_context"], 4, 0, 1),
        (ARMS["in_context_many"], 12, 0, 3),
        (ARMS["in_context_mean"], 4, 0, 1),  # one of them at a time
        (Arm(trains="nothing", calibration="queries", queries=3), 4, 3, 1),
    ],
)
def test_what_arms_that_train_nothing_cost(
    bench: Bench, arm: Arm, labelled: int, unlabelled: int, contexts: int
) -> None:
    cost = prompt_cost(bench, arm)
    assert (cost["labelled"], cost["unlabelled"]) == (labelled, unlabelled)
    lengths = [[len(p) for p in r.prompts] for r in bench.readings(arm, bench.evaluation["trec"], "trec")]
    assert cost["prompt_tokens"] == pytest.approx(contexts * np.mean(lengths))
    one = forward_flops(bench.lm, round(np.mean(lengths)), projected=1)
    assert cost["request_flops"] == pytest.approx(contexts * one)


def test_what_a_calibrated_teacher_costs(lm: LM, tmp_path: Path) -> None:
    bench = make_bench(lm)
    bench.pattern = Pattern(PATTERN.pattern, WORDS, answer_pattern="{answer}")  # a byte tokenizer shares the space
    plain, calibrated, control = (
        run_cell(bench, bench.study.arm(name), RunDir(tmp_path / name))[0]["cost"]
        for name in ("cd_one", "cd_many_calibrated", "cd_many_calibrated+zero_shot_teacher")
    )
    assert (plain["labelled"], calibrated["labelled"], control["labelled"]) == (4, 12, 12)
    # three contexts, each read with 6 queries and with the 8 demonstrations of the others
    assert calibrated["teacher_flops"] > 1.5 * 3 * plain["teacher_flops"]


def test_distillation_brings_the_student_to_its_teacher(lm: LM, tmp_path: Path) -> None:
    bench = make_bench(lm)
    arm = Arm(context="many", label_weight=0.0, train={"epochs": 60, "lr": 0.02}, lora={"rank": 8})
    record, _ = run_cell(bench, arm, RunDir(tmp_path))
    assert record["training"]["loss_last"] < 0.1 * record["training"]["loss_first"]


def test_a_context_that_does_not_fit_is_said_before_anything_is_done(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", "llama", chat=False)
    bench = make_bench(LM.load(ModelSection(name=str(folder), window=80)))
    with pytest.raises(FitError, match=r"a prompt .* does not fit") as caught:
        run_cell(bench, ARMS["in_context"], RunDir(tmp_path / "run"))
    assert "grid.demos" in caught.value.fix and "context." not in caught.value.fix  # keys that a study has
    run_cell(bench, ARMS["zero_shot"], RunDir(tmp_path / "run"))


def test_a_row_in_several_contexts_is_one_labelled_example(lm: LM) -> None:
    bench = make_bench(lm)
    bench.draw = Draw((tuple(ROWS[:4]), tuple(ROWS[2:6]), tuple(ROWS[:4])), tuple(ROWS[12:18]))
    assert prompt_cost(bench, ARMS["in_context_many"])["labelled"] == 6


def test_beyond_the_window(tmp_path: Path) -> None:
    """Demonstrations that together fill the window many times over: the student comes closer to what they say together
    than the single contexts, all of which fit, do on average. (On a random model there is no truth to be closer to.)"""
    folder = tiny.save(tmp_path / "model", "llama", chat=False, seed=3)
    lm = LM.load(ModelSection(name=str(folder), window=128))
    bench = make_bench(lm, contexts=16, queries=48)
    rows = [row(i, list(WORDS)[i % 3]) for i in range(112)]
    contexts = tuple(tuple(rows[4 * k : 4 * k + 4]) for k in range(16))
    bench.draw = Draw(contexts, tuple(rows[64:]))
    assert sum(len(lm.tokenizer(prompt_text(c, rows[0]))["input_ids"]) for c in contexts) > 5 * lm.window
    arm = Arm(context="many", label_weight=0.0, train={"epochs": 60, "lr": 0.01}, lora={"rank": 16})
    made, _, _ = examples(bench, arm)
    together = [e.target.tensors["logprobs"][0] for e in made]  # the average at the first position, V each
    readings = bench.readings(arm, rows[64:], "queries")

    def distance(logprobs: torch.Tensor) -> float:
        return losses.divergence("forward_kl", torch.stack(together), logprobs).mean().item()

    single = [distance(lm.head(r.scores.first).log_softmax(-1)) for r in readings]
    found: list[float] = []

    def look(lm: LM) -> dict[str, Any]:
        hidden = torch.cat(lm.hidden([([*e.prompt, 5], 1) for e in made]))  # [N, d]
        found.append(distance(lm.head(hidden).log_softmax(-1)))
        return {}

    bench.after_training = look
    record, _ = run_cell(bench, arm, RunDir(tmp_path / "run"))
    assert record["cost"]["labelled"] == 64
    assert found[0] < sum(single) / len(single)


def test_nothing_is_read_twice(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    plain = Bench.scores
    monkeypatch.setattr(Bench, "scores", lambda self, *a: asked.append(len(a[1])) or plain(self, *a))
    rows = bench.draw.queries
    (first,) = bench.readings(Arm(), rows, "queries")
    assert asked == [6]
    (calibrated,) = bench.readings(Arm(calibration="queries"), rows, "queries")
    assert asked == [6] and calibrated.scores is first.scores
    bench.readings(Arm(context="many", calibration="queries"), rows, "queries")
    assert asked == [6, 6, 6]  # the two other contexts
    (fewer,) = bench.readings(Arm(calibration="queries", queries=3), bench.evaluation["trec"], "trec")
    (more,) = bench.readings(Arm(calibration="queries"), bench.evaluation["trec"], "trec")
    assert fewer.scores is more.scores
    assert fewer.calibration and more.calibration and not torch.equal(fewer.calibration.bias, more.calibration.bias)


def test_gradient_checkpointing_is_left_with_the_cell(lm: LM, tmp_path: Path) -> None:
    losses_seen = []
    for train in ({}, {"gradient_checkpointing": True}):
        record, _ = run_cell(make_bench(lm), Arm(train=train), RunDir(tmp_path / str(len(losses_seen))))
        losses_seen.append(record["training"])
        assert not lm.model.is_activation_checkpointing
        assert not lm.model.get_input_embeddings()._forward_hooks
    assert losses_seen[0]["loss_last"] == pytest.approx(losses_seen[1]["loss_last"], rel=1e-4)
