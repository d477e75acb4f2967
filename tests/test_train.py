"""The loop: the step-0 loss, the denominator, equality of every kind of target, checkpoints."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import tiny
from ctxdistill.dataset import Data, prepare
from ctxdistill.errors import RunError, TrainError
from ctxdistill.lm import LM
from ctxdistill.objective import Example, batch_loss
from ctxdistill.pipeline import make_examples
from ctxdistill.prompts import Prompter, join
from ctxdistill.recipe import LoraSection, ModelSection, Recipe, TrainSection
from ctxdistill.rundir import RunDir, no_progress
from ctxdistill.store import Target, TargetStore
from ctxdistill.targets import Labelling, captured_mass, label
from ctxdistill.train import State, learning_rate, mean_kl, order, train

Ready = tuple[Recipe, LM, Prompter, Data]


@pytest.fixture
def ready(job: Path) -> Ready:
    recipe = Recipe.from_dict(tiny.recipe_dict(job), base_dir=job)
    return (recipe, *prepare(recipe))


def examples_of(ready: Ready, folder: Path, **targets: Any) -> Sequence[Example]:
    recipe, lm, prompter, data = ready
    recipe = recipe.model_copy(update={"targets": recipe.targets.model_copy(update=targets)})
    return make_examples(recipe, lm, prompter, data.pairs["train"], TargetStore(folder), no_progress)


def reference(
    lm: LM, prompter: Prompter, data: Data, examples: Sequence[Example], kind: str, temperature: float = 1.0
) -> torch.Tensor:
    """The slow way: both sides' full forwards, full logits, explicit probabilities. Sum over supervised tokens."""
    total = torch.zeros(())
    teachers = {p.id: p.teacher for p in data.pairs["train"]}
    for example in examples:
        ids = list(example.target.ids)
        with torch.no_grad(), lm.adapter(False):
            whole, n = join(teachers[example.id], ids)
            p = (lm.model(input_ids=torch.tensor([whole])).logits[0, -n - 1 : -1] / temperature).softmax(-1)
        whole, n = join(example.prompt, ids)
        q = (lm.model(input_ids=torch.tensor([whole])).logits[0, -n - 1 : -1] / temperature).softmax(-1)
        m = (p + q) / 2
        value = {
            "forward_kl": (p * (p / q).log()).sum(),
            "reverse_kl": (q * (q / p).log()).sum(),
            "jsd": ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2,
        }[kind]
        total = total + temperature**2 * value
    return total


def uneven(examples: Sequence[Example]) -> list[Example]:
    """With completions of different length, so that a mean of means would differ."""
    return [
        dataclasses.replace(
            e, target=Target(e.target.key, e.target.ids[:n], {"hidden": e.target.tensors["hidden"][:n]})
        )
        for e, n in zip(examples, itertools.cycle((1, 6, 2, 5, 3, 4)), strict=False)
    ]


def gradient(lm: LM, loss: torch.Tensor) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(lm.trainable().values()))])


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_loss_and_gradient_equal_the_slow_reference(
    ready: Ready, tmp_path: Path, kind: Any, temperature: float
) -> None:
    _, lm, prompter, data = ready
    examples = examples_of(ready, tmp_path / "t")
    lm.add_adapter(LoraSection(rank=4), 0)
    tiny.disturb(lm)
    section = TrainSection(loss=kind, temperature=temperature)
    fast, slow = batch_loss(lm, examples, section), reference(lm, prompter, data, examples, kind, temperature)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient(lm, fast), gradient(lm, slow), rtol=1e-3, atol=1e-5)


def test_every_kind_of_target_gives_the_same_loss(ready: Ready, tmp_path: Path) -> None:
    _, lm, _, _ = ready
    kinds = {"hidden": {}, "full": {}, "topk": {"k": tiny.VOCABULARY - 1}}
    made = {kind: examples_of(ready, tmp_path / kind, kind=kind, **more) for kind, more in kinds.items()}
    small = examples_of(ready, tmp_path / "small", kind="topk", k=8)
    lm.add_adapter(LoraSection(rank=4), 0)
    tiny.disturb(lm)
    loss = {kind: batch_loss(lm, examples, TrainSection()) for kind, examples in made.items()}
    torch.testing.assert_close(loss["full"], loss["hidden"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss["topk"], loss["hidden"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient(lm, loss["topk"]), gradient(lm, loss["hidden"]), rtol=1e-3, atol=1e-5)
    assert batch_loss(lm, small, TrainSection()).item() < loss["hidden"].item()  # a coarser partition has a smaller KL
    mass = captured_mass([e.target for e in small])
    held = torch.cat([e.target.tensors["topk_logprobs"].exp().sum(-1) for e in small])  # [T]
    assert mass == pytest.approx(held.mean().item()) and 0.03 < mass < 1.0
    assert captured_mass([e.target for e in made["hidden"]]) is None


def test_cross_entropy_is_mixed_in(ready: Ready, tmp_path: Path) -> None:
    _, lm, _, _ = ready
    examples = examples_of(ready, tmp_path / "t")
    lm.add_adapter(LoraSection(rank=4), 0)
    ce = torch.zeros(())
    for e in examples:
        ids, n = join(e.prompt, e.target.ids)
        ce = ce + F.cross_entropy(
            lm.model(input_ids=torch.tensor([ids])).logits[0, -n - 1 : -1], torch.tensor(e.target.ids), reduction="sum"
        )
    kl = batch_loss(lm, examples, TrainSection())
    mixed = batch_loss(lm, examples, TrainSection(ce_weight=0.3))
    torch.testing.assert_close(mixed, 0.7 * kl + 0.3 * ce, rtol=1e-4, atol=1e-4)


def test_with_an_empty_context_the_loss_at_step_0_is_0(ready: Ready, tmp_path: Path) -> None:
    recipe, lm, prompter, data = ready
    same = [dataclasses.replace(p, teacher=p.student) for p in data.pairs["train"]]
    made = label(lm, prompter, same, recipe, TargetStore(tmp_path / "t"))
    lm.add_adapter(LoraSection(rank=4), 0)
    empty = [Example(p.id, p.student, t[0]) for p, t in zip(same, made, strict=True)]
    tokens = sum(len(e.target.ids) for e in empty)
    assert abs(batch_loss(lm, empty, TrainSection()).item() / tokens) < 1e-6
    assert mean_kl(lm, examples_of(ready, tmp_path / "u"), 4) > 1e-3  # and with the context it is not


def test_prompt_tokens_do_not_change_the_denominator_nor_does_the_split(ready: Ready, tmp_path: Path) -> None:
    """Invariant 6: one step of 8 rows is the same update at any micro-batch."""
    _, lm, _, _ = ready
    examples = uneven(examples_of(ready, tmp_path / "t")[:8])
    gradients = []
    for micro in (0, 1, 3):
        lm.add_adapter(LoraSection(rank=4), 0)
        tiny.disturb(lm)
        section = TrainSection(batch_size=8, micro_batch=micro, epochs=1, lr=0.01, validation=0)
        train(lm, examples, [], section, RunDir(tmp_path / f"run{micro}"))
        gradients.append({n: p.grad.clone() for n, p in lm.trainable().items()})
        lm.peft.unload()
    norms = [RunDir(tmp_path / f"run{m}").read_jsonl("metrics.jsonl")[0]["grad_norm"] for m in (0, 1, 3)]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-4)
    for other in gradients[1:]:
        for name, value in gradients[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5)


def test_a_training_is_that_of_a_loop_written_out(ready: Ready, tmp_path: Path) -> None:
    """The model's own forward of one row at a time, torch's AdamW: the adapter that is left, and what the log says."""
    _, lm, _, _ = ready
    held_out, rows = (made := uneven(examples_of(ready, tmp_path / "t")))[:3], made[3:]
    section = TrainSection(
        epochs=2, batch_size=4, lr=0.01, weight_decay=2.0, clip=0.2, warmup=0.3, ce_weight=0.3, seed=5
    )
    lm.add_adapter(LoraSection(rank=4), 0)
    tiny.disturb(lm)
    trained = list(lm.trainable().values())
    before = [p.detach().clone() for p in trained]

    def per_token(rows: Sequence[Example]) -> dict[str, Any]:
        kl, ce, tokens = torch.zeros(()), torch.zeros(()), 0
        for e in rows:
            ids, n = join(e.prompt, e.target.ids)
            q = lm.model(input_ids=torch.tensor([ids])).logits[0, -n - 1 : -1].log_softmax(-1)
            p = lm.head(e.target.tensors["hidden"]).log_softmax(-1).detach()
            kl, ce, tokens = kl + (p.exp() * (p - q)).sum(), ce - q[range(n), list(e.target.ids)].sum(), tokens + n
        return {"loss": (0.7 * kl + 0.3 * ce) / tokens, "kl": kl / tokens, "ce": ce / tokens, "tokens": tokens}

    optimizer = torch.optim.AdamW(trained, weight_decay=2.0)
    wanted, best = list[dict[str, Any]](), (float("inf"), before)
    for step in range(7):
        if step % 3 == 0:  # ten rows are three steps
            found = per_token(held_out)
            if found["loss"].item() < best[0]:
                best = found["loss"].item(), [p.detach().clone() for p in trained]
            wanted.append({"loss": found["loss"], "kl": found["kl"]})
        if step < 6:
            first = 4 * (step % 3)
            found = per_token([rows[i] for i in order(10, step // 3, 5)[first : first + 4]])
            optimizer.zero_grad()
            found["loss"].backward()
            found["grad_norm"] = torch.nn.utils.clip_grad_norm_(trained, 0.2)
            found["lr"] = optimizer.param_groups[0]["lr"] = learning_rate(step, 6, section)
            optimizer.step()
            wanted.append(found)
    last = [p.grad for p in trained]

    with torch.no_grad():
        for parameter, value in zip(trained, before, strict=True):
            parameter.copy_(value)
    state = train(lm, rows, held_out, section, RunDir(tmp_path / "run"))
    for line, found in zip(RunDir(tmp_path / "run").read_jsonl("metrics.jsonl"), wanted, strict=True):
        assert {k: line[k] for k in found} == pytest.approx(
            {k: torch.as_tensor(v).item() for k, v in found.items()}, rel=1e-3
        )
    assert state.tokens == 2 * sum(len(e.target.ids) for e in rows)
    assert min(x["grad_norm"] for x in wanted if "lr" in x) > 0.2  # all steps are clipped
    for parameter, value, old, slope in zip(trained, best[1], before, last, strict=True):
        assert (parameter - value).norm() < 0.02 * (value - old).norm()
        torch.testing.assert_close(parameter.grad, slope, rtol=1e-2, atol=1e-4)


def test_dropout_is_that_of_seed_and_step_and_of_training_alone(ready: Ready, tmp_path: Path) -> None:
    _, lm, _, _ = ready
    examples = examples_of(ready, tmp_path / "t")
    lm.add_adapter(LoraSection(rank=4, dropout=0.5), 0)
    tiny.disturb(lm)
    lm.training(False)
    sure = mean_kl(lm, examples, 4)
    seen = list[float]()
    for seed in (0, 1):
        section = TrainSection(epochs=3, batch_size=16, lr=1e-12, patience=0, shuffle=False, seed=seed)
        train(lm, examples, examples, section, RunDir(tmp_path / str(seed)))
        for line in RunDir(tmp_path / str(seed)).read_jsonl("metrics.jsonl"):
            if line["event"] == "validation":
                assert line["kl"] == pytest.approx(sure, rel=1e-4)
            else:
                seen.append(line["loss"])
    assert len(set(seen)) == 6 and all(abs(loss / sure - 1) > 1e-3 for loss in seen)


def test_gradient_checkpointing_changes_nothing(ready: Ready, tmp_path: Path) -> None:
    _, lm, _, _ = ready
    examples = examples_of(ready, tmp_path / "t")
    losses, gradients = [], []
    for on in (False, True):
        lm.add_adapter(LoraSection(rank=4), 0)
        tiny.disturb(lm)
        section = TrainSection(batch_size=4, epochs=1, lr=1e-5, gradient_checkpointing=on)
        train(lm, examples, [], section, RunDir(tmp_path / f"run{on}"))
        losses.append([line["loss"] for line in RunDir(tmp_path / f"run{on}").read_jsonl("metrics.jsonl")])
        gradients.append({n: p.grad.clone() for n, p in lm.trainable().items()})  # of the last step
        lm.peft.unload()
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-3, atol=1e-5)
    assert min(float(g.abs().max()) for g in gradients[0].values()) > 1e-4
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # checkpointed rows are padded, the others packed


def memory_for(rows: int, monkeypatch: pytest.MonkeyPatch, *, kept: bool = True) -> list[int]:
    """A device whose memory holds so many rows of a step with a gradient; `kept`: with what the layers keep for it. Returns
    the rows of each pass."""
    passes: list[int] = []

    def full(lm: LM, batch: Sequence[Example], *given: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            passes.append(len(batch))
            if len(batch) > rows or (not kept and not lm.model.is_activation_checkpointing):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return batch_loss(lm, batch, *given)

    monkeypatch.setattr("ctxdistill.train.batch_loss", full)
    return passes


def test_a_step_that_the_memory_does_not_hold_is_taken_in_parts(
    ready: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, lm, _, _ = ready
    examples = examples_of(ready, tmp_path / "t")
    section = TrainSection(batch_size=8, epochs=2, lr=0.01)

    def go(name: str) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor], State]:
        lm.add_adapter(LoraSection(rank=4), 0)
        state = train(lm, examples, [], section, RunDir(tmp_path / name))
        trained = {n: p.detach().clone() for n, p in lm.trainable().items()}
        lm.remove_adapter()
        return RunDir(tmp_path / name).read_jsonl("metrics.jsonl"), trained, state

    log, whole, _ = go("whole")
    passes = memory_for(2, monkeypatch)
    other, parts, state = go("parts")
    assert max(passes) == 8 and max(passes[4:]) == 2  # 8, 8 without a recording, 4, and from then on 2
    said = [line for line in other if line["event"] == "memory"]
    assert [(line["step"], line["micro_batch"], line["gradient_checkpointing"]) for line in said] == [
        (0, 0, False), (0, 4, False), (0, 2, False)
    ]  # fmt: skip
    assert state.savings == 3
    losses = [[line["loss"] for line in lines if line["event"] == "step"] for lines in (log, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-3, atol=1e-4)


def test_a_run_that_had_too_little_memory_is_resumed_with_the_same_bits(
    ready: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, lm, _, _ = ready
    examples = examples_of(ready, tmp_path / "t")
    section = TrainSection(batch_size=8, epochs=3, lr=0.01, checkpoint_every=100, patience=1)

    def go(name: str, stop_at: int | None = None) -> tuple[dict[str, torch.Tensor], State]:
        def progress(stage: str, done: int, total: int) -> None:
            if done == stop_at:
                raise KeyboardInterrupt

        lm.add_adapter(LoraSection(rank=4), 0)
        try:
            state = train(lm, examples, examples[:3], section, RunDir(tmp_path / name), progress=progress)
            return {n: p.detach().clone() for n, p in lm.trainable().items()}, state
        except KeyboardInterrupt:
            return {}, State()
        finally:
            lm.remove_adapter()

    with monkeypatch.context() as patched:
        memory_for(1, patched, kept=False)
        straight, whole = go("straight")
        assert not go("broken", 2)[0]  # its one checkpoint is of step 0, the held-out rows measured
    passes = memory_for(8, monkeypatch)  # there is room now
    resumed, state = go("broken")
    assert set(passes) == {1}
    assert whole.step == 6 and dataclasses.replace(state, seconds=whole.seconds) == whole
    assert len(straight) > 10 and all(torch.equal(straight[name], resumed[name]) for name in straight)
    logs = [RunDir(tmp_path / name).read_jsonl("metrics.jsonl") for name in ("straight", "broken")]
    timeless = [[{k: v for k, v in x.items() if k != "seconds"} for x in found] for found in logs]
    assert timeless[0] == timeless[1] and [x["event"] for x in logs[1]].count("memory") == whole.savings > 0
    assert not lm.model.is_activation_checkpointing


def test_a_row_that_the_memory_does_not_hold_ends_the_run(
    ready: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, lm, _, _ = ready
    examples = examples_of(ready, tmp_path / "t")
    lm.add_adapter(LoraSection(rank=4), 0)
    memory_for(0, monkeypatch)
    with pytest.raises(TrainError, match=r"(?s)does not hold a step with one row.*2\.00 GiB.*model\.quantize"):
        train(lm, examples, [], TrainSection(batch_size=8), RunDir(tmp_path / "run"))


def test_the_held_out_loss_is_computed_in_parts_where_steps_are(
    ready: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, lm, _, _ = ready
    examples = examples_of(ready, tmp_path / "t")
    lm.add_adapter(LoraSection(rank=4), 0)
    most: list[int] = []

    def seen(lm: LM, batch: Sequence[Example], *given: Any) -> torch.Tensor:
        most.append(len(batch))
        return batch_loss(lm, batch, *given)

    monkeypatch.setattr("ctxdistill.train.batch_loss", seen)
    section = TrainSection(batch_size=8, micro_batch=2, epochs=1, temperature=2.0)
    train(lm, examples, examples[:6], section, RunDir(tmp_path / "run"))
    assert max(most) == 2


def test_training_lowers_the_kl_and_leaves_the_base_alone(ready: Ready, tmp_path: Path) -> None:
    _, lm, _, _ = ready
    examples = examples_of(ready, tmp_path / "t")
    before = {n: p.detach().clone() for n, p in lm.model.named_parameters()}
    lm.add_adapter(LoraSection(rank=4), 0)
    first = mean_kl(lm, examples, 4)
    state = train(lm, examples, examples[:3], TrainSection(epochs=6, lr=0.01, batch_size=4), RunDir(tmp_path / "run"))
    assert mean_kl(lm, examples, 4) < 0.5 * first
    assert state.best_loss == pytest.approx(mean_kl(lm, examples[:3], 4), rel=1e-5)  # the best one is on the model
    after = {n.replace(".base_layer", ""): p for n, p in lm.model.named_parameters() if "lora_" not in n}
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_early_stop_keeps_the_best(ready: Ready, tmp_path: Path) -> None:
    _, lm, _, _ = ready
    examples = examples_of(ready, tmp_path / "t")
    lm.add_adapter(LoraSection(rank=4), 0)
    section = TrainSection(epochs=30, lr=0.3, batch_size=4, patience=2, warmup=0)  # far too hot
    state = train(lm, examples, examples[:3], section, RunDir(tmp_path / "run"))
    assert state.stopped and state.step < 30 * 4
    log = [line for line in RunDir(tmp_path / "run").read_jsonl("metrics.jsonl") if line["event"] == "validation"]
    assert min(line["kl"] for line in log) == state.best_loss
    assert mean_kl(lm, examples[:3], 4) == pytest.approx(state.best_loss, rel=1e-5)
    assert [line["best"] for line in log[-3:]] == [True, False, False]  # at once after two epochs without a better one


def test_numbers_that_are_not_finite_stop_the_step(ready: Ready, tmp_path: Path) -> None:
    _, lm, _, _ = ready
    first, *others = examples_of(ready, tmp_path / "t")
    hidden = first.target.tensors["hidden"].index_fill(0, torch.tensor([0]), float("nan"))
    examples = [
        dataclasses.replace(first, target=dataclasses.replace(first.target, tensors={"hidden": hidden})),
        *others,
    ]
    lm.add_adapter(LoraSection(rank=4), 0)
    with pytest.raises(TrainError, match=f"(?s)finite numbers.*{examples[0].id}"):
        train(lm, examples, [], TrainSection(batch_size=64, validation=0), RunDir(tmp_path / "run"))


def test_restart_from_a_checkpoint_gives_the_same_bits(
    ready: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, lm, _, _ = ready
    examples = examples_of(ready, tmp_path / "t")
    section = TrainSection(epochs=3, lr=0.04, warmup=1.0, batch_size=4, checkpoint_every=2)  # hotter and hotter
    lora = LoraSection(rank=4, dropout=0.2)

    def go(folder: Path, stop_at: int | None = None) -> tuple[dict[str, torch.Tensor], State]:
        def progress(stage: str, done: int, total: int) -> None:
            if done == stop_at and stage.startswith("train"):
                raise KeyboardInterrupt

        lm.add_adapter(lora, 0)
        try:
            state = train(lm, examples, examples[:3], section, RunDir(folder), progress=progress)
            return {n: p.detach().clone() for n, p in lm.trainable().items()}, state
        except KeyboardInterrupt:
            return {}, State()
        finally:
            lm.peft.unload()

    straight, whole = go(tmp_path / "straight")
    for stop in (1, 5, 7, 11):
        assert not go(tmp_path / "broken", stop)[0]
    resumed, state = go(tmp_path / "broken")
    assert all(torch.equal(straight[n], resumed[n]) for n in straight)
    assert dataclasses.replace(state, seconds=whole.seconds) == whole
    assert (whole.best_step, whole.stale_epochs) == (4, 2) and whole.tokens == 3 * sum(
        len(e.target.ids) for e in examples
    )
    logs = [RunDir(tmp_path / name).read_jsonl("metrics.jsonl") for name in ("straight", "broken")]
    assert [(x["step"], x.get("loss"), x.get("kl")) for x in logs[0]] == [
        (x["step"], x.get("loss"), x.get("kl")) for x in logs[1]
    ]
    steps = [x["seconds"] for x in logs[1] if x["event"] == "step"]
    assert state.seconds == pytest.approx(sum(steps), rel=0.5)


def test_a_damaged_checkpoint_is_named(ready: Ready, tmp_path: Path) -> None:
    _, lm, _, _ = ready
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/step-00000002.safetensors").write_bytes(b"rubbish")
    lm.add_adapter(LoraSection(rank=4), 0)
    with pytest.raises(TrainError, match=r"step-00000002\.safetensors is damaged"):
        train(lm, examples_of(ready, tmp_path / "t"), [], TrainSection(), RunDir(tmp_path / "run"))


def test_labelling_in_pieces_gives_the_same_bits(ready: Ready, tmp_path: Path) -> None:
    recipe, lm, prompter, data = ready
    pairs = data.pairs["train"]
    straight = label(lm, prompter, pairs, recipe, TargetStore(tmp_path / "a"))

    def stop(stage: str, done: int, total: int) -> None:
        if 4 <= done < total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        label(lm, prompter, pairs, recipe, TargetStore(tmp_path / "b"), progress=stop)
    begun = TargetStore(tmp_path / "b")
    assert 0 < len(begun) < len(pairs)
    asked = []
    resumed = label(lm, prompter, pairs, recipe, begun, progress=lambda *a: asked.append(a))
    for (a,), (b,) in zip(straight, resumed, strict=True):
        assert a.ids == b.ids and torch.equal(a.tensors["hidden"], b.tensors["hidden"])


@pytest.mark.parametrize("wrong", [0.0, 0.01])
def test_what_is_written_is_not_read_again(
    ready: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: float
) -> None:
    """Unless one row shows that the model's cache gives other states than reading does."""
    recipe, lm, prompter, data = ready
    pairs, read = data.pairs["train"], list[int]()
    write, hidden = LM.write, LM.hidden

    def writing(self: LM, *args: Any, **how: Any) -> Any:
        ids, states = write(self, *args, **how)
        return ids, [s * (1 + wrong) for s in states]

    monkeypatch.setattr(LM, "write", writing)
    monkeypatch.setattr(LM, "hidden", lambda self, rows, *a: read.append(len(rows)) or hidden(self, rows, *a))
    made = label(lm, prompter, pairs, recipe, TargetStore(tmp_path / "a"))
    assert sum(read) == 1 + (len(pairs) if wrong else 0)
    monkeypatch.undo()
    with torch.no_grad():
        for pair, (target,) in zip(pairs, made, strict=True):
            (states,) = lm.hidden([join(pair.teacher, target.ids)])
            torch.testing.assert_close(target.tensors["hidden"], states, atol=1e-4, rtol=1e-4)


def test_the_teacher_is_asked_once(ready: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, lm, prompter, data = ready
    label(lm, prompter, data.pairs["train"], recipe, TargetStore(tmp_path / "a"))
    monkeypatch.setattr(LM, "hidden", None)
    monkeypatch.setattr(LM, "write", None)
    again = label(lm, prompter, data.pairs["train"], recipe, TargetStore(tmp_path / "a"))
    assert len(again) == len(data.pairs["train"])
    other = recipe.model_copy(update={"completions": recipe.completions.model_copy(update={"max_new_tokens": 5})})
    with pytest.raises(TypeError):  # other completions are other targets
        label(lm, prompter, data.pairs["train"], other, TargetStore(tmp_path / "a"))


def test_a_key_covers_what_its_target_depends_on(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, lm, prompter, data = ready

    def key(number: int = 0, pair: Any = None, how: Any = None, **changes: Any) -> str:
        raw = recipe.model_dump(exclude_defaults=True)
        for section, values in changes.items():
            raw[section] = raw.get(section, {}) | values
        other = Recipe.from_dict(raw, base_dir=recipe.base_dir)
        pairs = [dataclasses.replace(data.pairs["train"][0], **(pair or {}))]
        asking = Prompter(other, lm.tokenizer, prompter.context)
        return Labelling(lm, asking, pairs, other, **(how or {})).key(number)

    sampled, data_rows, found = {"temperature": 0.7, "samples": 2}, {"source": "data"}, {"extract": "(.+)"}
    same = [
        key(), key(pair={"student": (5, 6)}), key(pair={"answer": "other"}), key(train={"seed": 1, "lr": 0.1}),
        key(targets={"batch_size": 2, "k": 3}),
    ]  # fmt: skip
    others = [
        key(pair={"teacher": (5, 6)}), key(completions={"max_new_tokens": 5}), key(completions=sampled),
        key(1, completions=sampled), key(completions=sampled, train={"seed": 1}),
        key(completions={"temperature": 0.8, "samples": 2}), key(targets={"kind": "full"}),
        key(targets={"kind": "topk", "k": 3}), key(targets={"kind": "topk", "k": 4}), key(completions=data_rows),
        key(completions=data_rows, pair={"answer": "other"}), key(completions=data_rows, how={"written": [(7, 8)]}),
        key(completions=found), key(completions=found, how={"whole": True}),
    ]  # fmt: skip
    words = ["A", "B"], ["A", "C"]
    others += [key(completions={"source": "label"}, prompt={"label_words": some}) for some in words]
    with monkeypatch.context() as patch:
        patch.setattr(Prompter, "_end", lambda self: (9,))
        others.append(key())
    monkeypatch.setitem(lm.info, "weights_sha256", "other")
    others.append(key())
    assert len({*same}) == 1 and len({same[0], *others}) == 1 + len(others)


def test_a_damaged_shard_is_never_trained_on(ready: Ready, tmp_path: Path) -> None:
    _, lm, _, _ = ready
    examples_of(ready, tmp_path / "t")
    shard = next((tmp_path / "t").glob("*.safetensors"))
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    lm.add_adapter(LoraSection(rank=4), 0)
    with pytest.raises(RunError, match=f"{shard.name} is damaged"):
        train(lm, examples_of(ready, tmp_path / "t"), [], TrainSection(epochs=1), RunDir(tmp_path / "run"))
    shard.unlink()
    with pytest.raises(RunError, match="No such file"):
        list(examples_of(ready, tmp_path / "t"))


def test_completions_given_sampled_and_labels(job: Path) -> None:
    def targets(**overrides: Any) -> list[list[Any]]:
        recipe = Recipe.from_dict(tiny.recipe_dict(job, **overrides), base_dir=job)
        lm, prompter, data = prepare(recipe)
        return [[prompter, *row] for row in label(lm, prompter, data.pairs["train"], recipe, TargetStore(job / "t"))]

    given = targets(completions={"source": "data"})
    assert all(prompter.text(t.ids).isupper() and t.ids[-1:] == prompter.end for prompter, t in given)
    bare = targets(completions={"source": "data", "supervise_end": False})
    assert all(t.ids[-1:] != prompter.end for prompter, t in bare)
    sampled = targets(completions={"temperature": 1.0, "samples": 3, "max_new_tokens": 6})
    assert all(len(row) == 4 for row in sampled)
    assert any(row[1].ids != row[2].ids for row in sampled)
    cold = targets(completions={"temperature": 1e-6, "samples": 3, "max_new_tokens": 6})
    assert all(row[1].ids == row[2].ids == row[3].ids for row in cold)

    words = [r["answer"] for r in map(__import__("json").loads, (job / "queries.jsonl").read_text().splitlines())]
    recipe_words = {"label_words": ["ANT", "BEE"]}
    tiny.recipe_dict(job)
    tiny.write_jsonl(job / "q2.jsonl", [{"prompt": f"which {w}", "answer": "ANT"} for w in words])
    tiny.write_jsonl(job / "d2.jsonl", [{"prompt": "which one", "answer": "BEE"}])
    tiny.write_jsonl(job / "e2.jsonl", [{"prompt": "tell which", "answer": "ANT"}])
    labelled = targets(
        completions={"source": "label"}, prompt=recipe_words, queries={"data": "q2.jsonl"},
        context={"demos": "d2.jsonl"}, eval={"data": "e2.jsonl"},
    )  # fmt: skip
    assert {prompter.text(t.ids) for prompter, t in labelled} <= {"ANT", "BEE"}


def test_learning_rate_and_order() -> None:
    section = TrainSection(lr=1.0, warmup=0.2, min_lr=0.1)
    rates = [learning_rate(step, 10, section) for step in range(10)]
    half = [0.55 + 0.45 * math.cos(math.pi * step / 8) for step in range(8)]  # a half wave from 1 to 0.1
    assert rates == pytest.approx([0.5, 1.0, *half])
    assert sorted(order(7, 0, 1)) == list(range(7))
    assert order(50, 0, 1) == order(50, 0, 1) != order(50, 1, 1)
    assert order(50, 0, 1) != order(50, 0, 2)


def test_seed_decides_the_adapter(llama: Path) -> None:
    def fresh(seed: int) -> torch.Tensor:
        lm = LM.load(ModelSection(name=str(llama)))
        lm.add_adapter(LoraSection(rank=2), seed)
        return next(iter(lm.trainable().values())).detach()

    assert torch.equal(fresh(1), fresh(1)) and not torch.equal(fresh(1), fresh(2))


def test_the_schedule_of_the_authors_code() -> None:
    """20 epochs of 32 steps: nothing in the first epoch, half in the second, then all."""
    section = TrainSection(epochs=20, lr=1e-5, warmup=0.1, schedule="paper")
    rates = [learning_rate(step, 640, section) for step in range(640)]
    assert rates == [0.0] * 32 + [5e-6] * 32 + [1e-5] * 576


def test_a_constant_schedule_stays_after_the_warm_up() -> None:
    section = TrainSection(lr=1.0, warmup=0.2, schedule="constant")
    assert [learning_rate(step, 10, section) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]
    assert learning_rate(9, 10, section) == 1.0


def test_rows_in_their_own_order() -> None:
    assert list(order(5, epoch=3, seed=1, shuffle=False)) == [0, 1, 2, 3, 4]
    assert sorted(order(5, epoch=3, seed=1)) == [0, 1, 2, 3, 4]
