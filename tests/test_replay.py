"""A step with fixed sizes gives the loss, sums and gradient of `batch_loss`; on a GPU it is recorded, elsewhere just done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from ctxdistill import replay
from ctxdistill import train as loop
from ctxdistill.lm import LM
from ctxdistill.objective import Example, Stats, batch_loss, position_loss, said
from ctxdistill.recipe import LoraSection, ModelSection, TrainSection
from ctxdistill.replay import Replay, Sizes
from ctxdistill.rundir import RunDir
from ctxdistill.store import Target

START = tuple(range(10, 50))
LENGTHS = [(9, 3), (14, 5), (7, 6), (20, 1), (12, 9), (30, 4), (8, 2), (11, 11)]
"""Tokens behind the start, and supervised ones."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOSE = 1e-4 if DEVICE == "cuda" else 1e-5
KINDS = {
    "hidden": lambda n, d: {"hidden": torch.randn(n, d)},
    "full": lambda n, d: {"logprobs": torch.randn(n, tiny.VOCABULARY).log_softmax(-1)},
    "topk": lambda n, d: dict(
        zip(("topk_logprobs", "topk_ids"), torch.randn(n, tiny.VOCABULARY).log_softmax(-1).topk(8), strict=True)
    ),
}


@pytest.fixture
def lm(llama: Path) -> LM:
    lm = LM.load(ModelSection(name=str(llama), device=DEVICE, dtype="float32"))
    lm.add_adapter(LoraSection(rank=4), 0)
    tiny.disturb(lm)
    return lm


def examples(lm: LM, kind: str = "hidden", start: tuple[int, ...] = START) -> list[Example]:
    torch.manual_seed(0)
    width = lm.model.get_output_embeddings().weight.shape[1]
    made = []
    for i, (n, t) in enumerate(LENGTHS):
        ids = tuple(torch.randint(60, 200, (n,)).tolist())
        made.append(Example(str(i), (*start, 60 + i, *ids[:-t]), Target("", ids[-t:], KINDS[kind](t, width))))
    return made


def gradient(lm: LM) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in lm.trainable().items() if p.grad is not None}


def plain(lm: LM, parts: list[list[Example]], section: TrainSection, divisor: float) -> tuple[float, Stats, Any]:
    lm.model.zero_grad()
    stats, total = Stats(), 0.0
    for rows in parts:
        loss = batch_loss(lm, rows, section, stats) / divisor
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    return total, stats, gradient(lm)


@pytest.mark.parametrize("start", [START, ()], ids=["shared", "apart"])
@pytest.mark.parametrize(
    ("kind", "section"),
    [
        ("hidden", TrainSection()),
        ("hidden", TrainSection(loss="reverse_kl", ce_weight=0.3)),
        ("hidden", TrainSection(loss="jsd", temperature=2.0)),
        ("full", TrainSection()),
        ("topk", TrainSection(ce_weight=0.5)),
    ],
)
def test_loss_sums_and_gradient_are_those_of_the_rows(
    lm: LM, kind: str, section: TrainSection, start: tuple[int, ...]
) -> None:
    made = examples(lm, kind, start)
    parts = [made[:4], made[4:7], made[7:]]  # the last ones have less than there is room for
    replayed = Replay.of(lm, parts, section, log=True)
    assert replayed and len(replayed.start) == len(start) and all(map(replayed.fits, parts))
    for some in (parts, parts[:1], parts[1:], parts[2:]):
        wanted = plain(lm, some, section, 7.0)
        lm.model.zero_grad()
        stats = Stats()
        loss = sum(float(replayed(rows, 7.0, stats)) for rows in some)
        assert loss == pytest.approx(wanted[0], rel=CLOSE)
        assert stats.keys() == wanted[1].keys()
        for name, value in wanted[1].items():
            assert float(stats[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-5), name
        found = gradient(lm)
        assert found.keys() == wanted[2].keys() and len(found) > 20
        largest = max(float(g.abs().max()) for g in wanted[2].values())
        for name, value in wanted[2].items():
            torch.testing.assert_close(found[name], value, atol=CLOSE * largest, rtol=0, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_of_the_teacher_is_as_it_was_after_the_loss(lm: LM, kind: str) -> None:
    known = said([e.target for e in examples(lm, kind)], lm.device)
    before = {name: value.clone() for name, value in known.teacher.items()}
    hidden = torch.randn(len(known.ids), lm.model.config.hidden_size, device=lm.device)
    position_loss(lm, known, TrainSection(), {})(hidden, slice(0, len(hidden)))
    assert before and all(torch.equal(known.teacher[name], value) for name, value in before.items())


def test_a_part_that_is_not_replayed_adds_to_the_same_gradient(lm: LM) -> None:
    made, section = examples(lm), TrainSection()
    wanted = plain(lm, [made[:4], made[4:]], section, 1.0)
    replayed = Replay.of(lm, [made[:4]], section, log=False)
    assert replayed
    for first in (0, 1):
        lm.model.zero_grad()
        for turn in (first, 1 - first):
            if turn == 0:
                replayed(made[:4], 1.0, None)
            else:
                batch_loss(lm, made[4:], section).backward()  # type: ignore[no-untyped-call]
        for name, value in gradient(lm).items():
            torch.testing.assert_close(value, wanted[2][name], atol=1e-4, rtol=1e-4, msg=name)


def test_padding_is_seen_by_no_row_and_gets_no_gradient(lm: LM) -> None:
    made, section = examples(lm), TrainSection()
    replayed = Replay.of(lm, [made], section, log=False)
    assert replayed
    replayed(made[:3], 1.0, None)
    before = gradient(lm)
    lm.model.zero_grad()
    fill = replayed._fill

    def otherwise(*inputs: Any) -> None:
        fill(*inputs)
        used = len(replayed.start) + sum(len(e.prompt) + len(e.target.ids) - 1 - len(replayed.start) for e in made[:3])
        replayed.pack.ids[0, used:] = 77
        replayed.pack.positions[0, used:] = 5

    replayed._fill = otherwise  # type: ignore[method-assign]
    replayed(made[:3], 1.0, None)
    assert all(torch.equal(value, before[name]) for name, value in gradient(lm).items())


def test_what_has_no_room_does_not_fit(lm: LM) -> None:
    made = examples(lm)
    replayed = Replay.of(lm, [made[:4]], TrainSection(), log=False)
    assert replayed and replayed.sizes == Sizes(4, 64, 32, 32)
    assert replayed.fits(made[:4]) and replayed.fits(made[:1])
    assert not replayed.fits(made[:5])  # rows
    other = [Example("x", (1, *e.prompt[1:]), e.target) for e in made[:2]]
    assert not replayed.fits(other)  # another start
    assert not replayed.fits([Example("x", START, made[0].target)])  # nothing behind the start
    long = Example("x", (*START, *range(60, 140)), made[0].target)
    assert not replayed.fits([long])


def test_steps_that_would_be_padding_for_the_most_part_are_not_replayed(lm: LM) -> None:
    made = examples(lm)
    long = Example("x", (*START, *range(60, 250), *range(60, 250)), made[0].target)
    assert Replay.of(lm, [made, made], TrainSection(), log=False)
    assert not Replay.of(lm, [[long], *[made[:1]] * 9], TrainSection(), log=False)
    lm.remove_adapter()
    lm.add_adapter(LoraSection(rank=4, dropout=0.1), 0)
    lm.training(True)
    assert not Replay.of(lm, [made, made], TrainSection(), log=False)


def test_a_run_that_replays_learns_what_one_that_does_not_learns(
    lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = examples(lm) * 2
    section = TrainSection(epochs=3, lr=0.01, batch_size=6, micro_batch=3, retain_weight=0.5, ce_weight=0.2)
    monkeypatch.setattr(loop, "GPU", DEVICE)
    calls: list[str] = []
    work = Replay._work
    monkeypatch.setattr(Replay, "_work", lambda self: calls.append("") or work(self))
    lines = []
    for on in (True, False):
        lm.remove_adapter()
        lm.add_adapter(LoraSection(rank=4), 0)
        folder = tmp_path / str(on)
        how = section.model_copy(update={"cuda_graphs": on})
        loop.train(lm, made, made[:3], how, RunDir(folder), retained=examples(lm)[:4])
        lines.append(RunDir(folder).read_jsonl("metrics.jsonl"))
        assert bool(calls) == on
        calls.clear()
    assert len(lines[0]) == len(lines[1]) > 9
    for a, b in zip(*lines, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"seconds", "event"}:
            assert a[key] == pytest.approx(b[key], rel=2e-3, abs=1e-5), key
    assert lines[0][-1]["loss"] < lines[0][0]["loss"]


def test_a_resumed_run_replays_and_has_the_same_bits(lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "GPU", DEVICE)
    made = examples(lm) * 2
    section = TrainSection(epochs=2, lr=0.01, batch_size=4, checkpoint_every=2)

    def go(name: str, stop_at: int | None = None) -> dict[str, torch.Tensor]:
        def progress(stage: str, done: int, total: int) -> None:
            if done == stop_at:
                raise KeyboardInterrupt

        lm.remove_adapter()
        lm.add_adapter(LoraSection(rank=4), 0)
        try:
            loop.train(lm, made, [], section, RunDir(tmp_path / name), progress=progress)
        except KeyboardInterrupt:
            return {}
        return {n: p.detach().clone() for n, p in lm.trainable().items()}

    straight = go("a")
    assert not go("b", 5)
    resumed = go("b")
    assert len(straight) > 10 and all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_without_memory_for_a_recorded_step_none_is_recorded(
    lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "GPU", DEVICE)

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    tried: list[int] = []
    monkeypatch.setattr(replay, "recorded", lambda *_: tried.append(1) or full)
    section = TrainSection(epochs=2, batch_size=4, lr=0.01)
    loop.train(lm, examples(lm), [], section, RunDir(tmp_path / "run"))
    assert tried == [1]
    first, *steps = RunDir(tmp_path / "run").read_jsonl("metrics.jsonl")
    assert (first["event"], first["step"], first["cuda_graphs"], first["micro_batch"]) == ("memory", 0, False, 0)
    assert [line["event"] for line in steps] == ["step"] * 4


def test_one_that_cannot_be_recorded_is_dropped(lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "GPU", DEVICE)

    def fails(*_: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    tried: list[int] = []
    monkeypatch.setattr(replay, "recorded", lambda *_: tried.append(1) or fails)
    section = TrainSection(epochs=2, batch_size=4, lr=0.01)
    made = examples(lm)
    loop.train(lm, made, [], section, RunDir(tmp_path / "run"))
    assert tried == [1]
    assert len(RunDir(tmp_path / "run").read_jsonl("metrics.jsonl")) == 4
