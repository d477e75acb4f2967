"""On a GPU of NVIDIA's: kernels, packing, training and whole runs give what they give elsewhere. Skipped where there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from ctxdistill import kernels, packing, pipeline
from ctxdistill.graphs import recorded
from ctxdistill.lm import LM
from ctxdistill.objective import Example, batch_loss
from ctxdistill.prompts import join
from ctxdistill.recipe import LoraSection, ModelSection, Recipe, TrainSection
from ctxdistill.rundir import RunDir
from ctxdistill.store import Target
from ctxdistill.train import train

DEVICE = torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

START = list(range(10, 50))
ROWS = [([*START, *range(s, s + n)], t) for s, n, t in ((60, 9, 3), (70, 14, 5), (80, 7, 6), (90, 20, 1))]
PACKS = sorted(set(tiny.CONFIGS) - {"gemma2", "gemma3"})
Found = dict[str, torch.Tensor]


def load(folder: Path, dtype: str = "float32", device: str = DEVICE.type) -> LM:
    """With an adapter that does something, the same one each time."""
    lm = LM.load(ModelSection(name=str(folder), device=device, dtype=dtype))  # type: ignore[arg-type]
    lm.add_adapter(LoraSection(rank=4), 0)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in lm.trainable().values():
            parameter.add_((0.05 * torch.randn(parameter.shape, generator=draw)).to(parameter))
    return lm


def examples(lm: LM) -> list[Example]:
    draw = torch.Generator().manual_seed(0)
    width = lm.model.get_output_embeddings().weight.shape[1]
    return [
        Example(str(i), tuple(ids[:-n]), Target("", tuple(ids[-n:]), {"hidden": torch.randn(n, width, generator=draw)}))
        for i, (ids, n) in enumerate(ROWS)
    ]


def loss_and_gradient(lm: LM, hidden: Callable[[LM], list[torch.Tensor]]) -> Found:
    """Of the sum of log-probabilities of the completions."""
    lm.model.zero_grad()
    ids = torch.tensor([i for row, n in ROWS for i in row[-n:]], device=lm.device)
    loss = lm.head(torch.cat(hidden(lm))).log_softmax(-1).gather(1, ids[:, None]).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    return {
        "loss": loss.detach().cpu(),
        **{n: p.grad.cpu().clone() for n, p in lm.trainable().items() if p.grad is not None},
    }


def assert_close(found: Found, wanted: Found, share: float) -> None:
    """Up to a share of the largest gradient."""
    assert found.keys() == wanted.keys() and len(found) > 10
    largest = max(float(g.abs().max()) for n, g in wanted.items() if n != "loss")
    torch.testing.assert_close(found["loss"], wanted["loss"], rtol=share, atol=0)
    for name, gradient in wanted.items():
        if name != "loss":
            torch.testing.assert_close(found[name], gradient, atol=share * largest, rtol=0, msg=name)


def packed(lm: LM) -> list[torch.Tensor]:
    assert lm.can_pack
    return lm.hidden(ROWS)


def alone(lm: LM) -> list[torch.Tensor]:
    """The obvious way: the backbone's own forward over each row."""
    return [
        lm._backbone(input_ids=torch.tensor([ids], device=lm.device), use_cache=False).last_hidden_state[0, -n - 1 : -1]
        for ids, n in ROWS
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "own", "start"), [(1, 1, 0), (1, 7, 40), (3, 33, 1), (4, 19, 700), (2, 530, 0)])
@pytest.mark.parametrize("size", [64, 8])
def test_the_flash_kernels_equal_all_scores_at_once(
    dtype: torch.dtype, rows: int, own: int, start: int, size: int
) -> None:
    """They are off by no more than all scores at once in the same type, and give the same bits each time."""
    draw, kv, group = torch.Generator().manual_seed(0), 2, 3
    shapes = (kv, rows, group, own, size), *[(kv, rows, own, size)] * 2, *[(kv, start, size)] * 2
    inputs = [(torch.randn(shape, generator=draw) / size**0.25).to(DEVICE, dtype) for shape in shapes]
    weights = torch.randn(shapes[0], generator=draw).to(DEVICE, dtype)
    assert kernels.kernel_of(inputs[0])

    def found(attend: Any, dtype: torch.dtype, hidden: torch.Tensor | None) -> list[torch.Tensor]:
        leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in inputs]
        out = attend(*leaves, hidden, 0.0)
        (out * weights.to(dtype)).sum().backward()
        return [out.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)]

    def flash(*given: Any) -> torch.Tensor:
        return packing._flash(*given[:-1])

    hidden = packing.later(own, DEVICE)
    exact, plain = found(packing._attend, torch.float64, hidden), found(packing._attend, dtype, hidden)
    fast, again = found(flash, dtype, None), found(flash, dtype, None)
    scale = max(a.abs().max().item() for a in exact if a.numel())
    for name, a, b, c, d in zip(["out", "q", "k", "v", "start_k", "start_v"], exact, plain, fast, again, strict=True):
        assert c.dtype == dtype and torch.equal(c, d), name
        if a.numel():
            error = (b - a).abs().max().item()
            assert (c - a).abs().max().item() <= 3 * error + 16 * torch.finfo(dtype).eps * scale, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own", [1, 6])
def test_rows_that_write_attend_as_with_all_scores_at_once(
    dtype: torch.dtype, own: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, length, calls = torch.Generator().manual_seed(0), 70, []
    shapes = (2, 9, 3, own, 64), *[(2, 9, length, 64)] * 2, *[(2, 700, 64)] * 2
    inputs = [(torch.randn(shape, generator=draw) / 3).to(DEVICE, dtype) for shape in shapes]
    hidden = (torch.rand(1, 9, 1, own, length, generator=draw) < 0.5).to(DEVICE)
    hidden[0, 1, 0, 0] = True  # padding before a row
    half = packing._half_flash
    monkeypatch.setattr(packing, "_half_flash", lambda *given: calls.append(1) or half(*given))
    exact, plain = (packing._attend(*(x.to(t) for x in inputs), hidden, 0.0) for t in (torch.float64, dtype))
    found = packing._behind(*inputs, hidden, 0.0)
    assert calls and found.dtype == dtype
    error = (plain.double() - exact).abs().max().item()
    assert (found.double() - exact).abs().max().item() <= 3 * error + 16 * torch.finfo(dtype).eps
    packing._behind(inputs[0].requires_grad_(), *inputs[1:], hidden, 0.0).sum().backward()
    assert len(calls) == 1  # it has no gradient
    monkeypatch.setattr(packing, "CACHE", 1)
    pieces = packing._behind(inputs[0].detach(), *inputs[1:], hidden, 0.0)
    assert len(calls) == 1  # scores of long prompts would not fit
    torch.testing.assert_close(pieces, found, atol=3 * error + 16 * torch.finfo(dtype).eps, rtol=0)


@pytest.mark.parametrize("architecture", PACKS)
def test_packed_rows_give_the_loss_and_gradient_of_rows_alone_and_of_a_cpu(tmp_path: Path, architecture: str) -> None:
    folder = tiny.save(tmp_path, architecture)
    lm = load(folder)
    fast = loss_and_gradient(lm, packed)
    assert_close(fast, loss_and_gradient(lm, alone), 1e-4)
    assert_close(fast, loss_and_gradient(load(folder, device="cpu"), alone), 1e-4)


def test_16_bits_lose_no_more_packed_than_alone(llama: Path) -> None:
    exact = loss_and_gradient(load(llama), alone)
    lm = load(llama, "bfloat16")
    assert {p.dtype for p in lm.trainable().values()} == {torch.float32}

    def error(found: Found) -> float:
        """Of all numbers of the gradient together."""
        names = sorted(exact.keys() - {"loss"})
        wanted = torch.cat([exact[n].flatten() for n in names])
        return float((torch.cat([found[n].flatten() for n in names]) - wanted).norm() / wanted.norm())

    assert 0 < error(loss_and_gradient(lm, packed)) <= 1.5 * error(loss_and_gradient(lm, alone)) < 0.5


def test_checkpointed_layers_give_the_same(llama: Path) -> None:
    lm = load(llama)
    wanted = loss_and_gradient(lm, alone)
    lm.training(True)
    lm.model.activation_checkpointing_enable()
    lm.model.enable_input_require_grads()
    assert_close(loss_and_gradient(lm, packed), wanted, 1e-4)


def test_what_is_written_is_what_a_cpu_writes(llama: Path) -> None:
    prompts = [ids for ids, _ in ROWS]
    here, there = load(llama), load(llama, device="cpu")
    for on in (False, True):
        with torch.no_grad(), here.adapter(on), there.adapter(on):
            prefix = here.prefix(prompts)
            assert prefix
            written, states = here.write(prompts, max_new_tokens=8, prefix=prefix)
            assert written == there.generate(prompts, max_new_tokens=8)
            read = here.hidden([join(p, ids) for p, ids in zip(prompts, written, strict=True)], prefix)
            for a, b in zip(read, states, strict=True):
                torch.testing.assert_close(a, b, atol=1e-4 * float(a.abs().max()), rtol=0)


def test_a_step_that_the_card_does_not_hold_is_taken_in_parts(llama: Path, tmp_path: Path) -> None:
    lm = load(llama)
    width = lm.model.get_output_embeddings().weight.shape[1]
    made = [
        Example(str(i), tuple(range(i, i + 150)), Target("", tuple(range(60, 90)), {"hidden": torch.ones(30, width)}))
        for i in range(64)
    ]
    section = TrainSection(epochs=2, lr=0.01, batch_size=64, cuda_graphs=False)

    def go(name: str) -> list[float]:
        lm.remove_adapter()
        lm.add_adapter(LoraSection(rank=4), 0)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        state = train(lm, made, [], section, RunDir(tmp_path / name))
        assert (state.savings > 0) == (name == "less")
        return [x["loss"] for x in RunDir(tmp_path / name).read_jsonl("metrics.jsonl") if x["event"] == "step"]

    whole = go("all")
    needed = torch.cuda.max_memory_reserved()
    torch.cuda.set_per_process_memory_fraction(0.6 * needed / torch.cuda.get_device_properties(DEVICE).total_memory)
    try:
        assert go("less") == pytest.approx(whole, rel=1e-4)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["replayed", "with dropout"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_gives_the_same_bits_again_and_from_a_checkpoint(
    llama: Path, tmp_path: Path, dtype: str, dropout: float
) -> None:
    lm = load(llama, dtype)
    made = examples(lm) * 3
    lm.remove_adapter()
    section = TrainSection(epochs=2, lr=0.01, batch_size=4, checkpoint_every=2)

    def go(name: str, stop_at: int | None = None) -> Found:
        def progress(stage: str, done: int, total: int) -> None:
            if done == stop_at:
                raise KeyboardInterrupt

        lm.add_adapter(LoraSection(rank=4, dropout=dropout), 0)
        try:
            train(lm, made, made[:3], section, RunDir(tmp_path / name), progress=progress)
            return {n: p.detach().clone() for n, p in lm.trainable().items()}
        except KeyboardInterrupt:
            return {}
        finally:
            lm.remove_adapter()

    first, second = go("a"), go("b")
    assert not go("c", 3)
    third = go("c")
    for other in (second, third):
        assert len(first) > 10 and all(torch.equal(first[name], other[name]) for name in first)
    lines = [RunDir(tmp_path / name).read_jsonl("metrics.jsonl") for name in "abc"]
    kept = [[(line["step"], line.get("loss"), line.get("kl")) for line in one] for one in lines]
    assert kept[0] == kept[1] == kept[2]


def test_work_that_waits_is_not_recorded_and_leaves_nothing_behind() -> None:
    before = torch.cuda.current_stream(DEVICE)
    x = torch.ones(1000, device=DEVICE)
    with pytest.raises(RuntimeError, match="synchroniz"):
        recorded(lambda: torch.zeros(1, device=DEVICE).item(), DEVICE)
    assert torch.cuda.current_stream(DEVICE) == before and torch.cuda.get_sync_debug_mode() == 0
    assert 300 < torch.nn.functional.dropout(x, 0.5).count_nonzero().item() < 700
    assert recorded(lambda: x * 2, DEVICE)().sum().item() == 2000


def test_nothing_waits_for_the_gpu_inside_a_step(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the model's first layer to the end of the backward pass."""
    lm = load(llama, "bfloat16")
    made, backbone = examples(lm), lm._backbone
    batch_loss(lm, made, TrainSection(), {}).backward()  # type: ignore[no-untyped-call]

    def watched(**inputs: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        return backbone(**inputs)

    monkeypatch.setattr(lm, "_backbone", watched)
    try:
        batch_loss(lm, made, TrainSection(), {}).backward()  # type: ignore[no-untyped-call]
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones(1, device=DEVICE).item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_whole_run_ends_where_it_does_on_a_cpu(job: Path) -> None:
    closed = {}
    for device, dtype in (("cpu", "float32"), ("cuda", "float32"), ("cuda", "auto")):
        raw = tiny.recipe_dict(job, model__device=device, model__dtype=dtype, train__epochs=6)
        run = pipeline.distill(Recipe.from_dict(raw, base_dir=job), job / f"{device}-{dtype}")
        assert run.evaluation
        closed[device, dtype] = run.evaluation["kl_closed"]["mean"]
        assert run.evaluation["table"]["distilled"]["prompt_tokens"]["mean"] > 0
    assert closed["cpu", "float32"] > 0.3
    assert closed["cuda", "float32"] == pytest.approx(closed["cpu", "float32"], abs=0.01)
    assert closed["cuda", "auto"] == pytest.approx(closed["cpu", "float32"], abs=0.1)
