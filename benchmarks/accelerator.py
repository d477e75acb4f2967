"""Tokens per second on a GPU, and how much of its arithmetic that uses. Run: python benchmarks/accelerator.py

Models with random weights in published shapes, in bfloat16 (float32 on a CPU, where this runs, too, to be tried). Each does
four things: `label`, the teacher's forward over 256 rows of 25 query and 34 answer tokens behind a context of 1,000 that is read
once; `read`, that context itself, eight times; `write`, the same rows' first 64 tokens; and `train`, steps of a LoRA of
rank 16 on all linear layers over rows of 24 template, 25 query, and 34 or 512 answer tokens. Best of three after a first
one. `use` is the FLOPs that `accounts` counts over what a large product of matrices does in the same time in the same run.
`busy` is the part of the time in which some kernel ran, from a profile of one more run: what is missing to 1 is the
processor that starts kernels. Writing and training are timed as they are done, recorded once and replayed, and as they would be
otherwise (`not recorded`). Prints the kernels that took longest, and milliseconds of one layer's attention by the flash kernels and
with all scores at once.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from ctxdistill import packing
from ctxdistill.accounts import Peak, forward_flops, training_flops
from ctxdistill.fused import fuse_norms
from ctxdistill.lm import LM, head_size
from ctxdistill.objective import Example, Stats, batch_loss
from ctxdistill.prompts import join
from ctxdistill.recipe import LoraSection, TrainSection
from ctxdistill.replay import Replay
from ctxdistill.store import Target

SHAPES: dict[str, Callable[[], Any]] = {
    "tiny": lambda: LlamaConfig(
        vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=8192,
    ),
    "SmolLM2-135M": lambda: LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
    ),
    "Llama-3.2-1B": lambda: LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131072, tie_word_embeddings=True,
    ),
    "Qwen2.5-7B": lambda: Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, max_position_embeddings=32768, tie_word_embeddings=False,
    ),
}  # fmt: skip
CONTEXT, TEMPLATE, QUERY, ANSWER, ROWS, WRITTEN = 1000, 24, 25, 34, 256, 64
STEPS = ((8, ANSWER), (64, ANSWER), (8, 512))
"""Rows of a step, and tokens of their answers."""
ATTENTIONS = ((256, 58, 1000, False), (8, 58, 24, True), (64, 58, 24, True), (8, 535, 24, True))
"""Rows, their tokens, tokens of what they share, and whether with a gradient, of the attentions that are timed."""
TOP = 6
"""Kernels of a profile that are shown."""


def make(shape: str, device: torch.device) -> LM:
    """The model in this shape; weights are drawn on the device."""
    config = SHAPES[shape]()
    config.eos_token_id = config.pad_token_id = 0
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    fuse_norms(model)
    info = {"architecture": type(model).__name__, "revision": None, "window": config.max_position_embeddings}
    lm = LM(model, None, device, info)
    lm.records = lm.can_pack and device.type == "cuda"
    return lm


def clock(work: Callable[[], object], device: torch.device, times: int) -> float:
    """Seconds of the fastest of some runs."""
    found = []
    for _ in range(times):
        wait(device)
        started = time.perf_counter()
        work()
        wait(device)
        found.append(time.perf_counter() - started)
    return min(found)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def product_rate(device: torch.device) -> float:
    """FLOPs per second of a large product of matrices."""
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, device=device).to(torch.bfloat16 if n > 512 else torch.float32) for _ in range(2))
    clock(lambda: a @ b, device, 3)
    return 2 * n**3 * 10 / clock(lambda: [a @ b for _ in range(10)], device, 3)


def kernels(work: Callable[[], object], device: torch.device) -> tuple[float, list[tuple[str, float, int]]]:
    """Seconds in kernels while `work` runs once, and the longest: name, seconds, calls."""
    if device.type != "cuda":
        return 0.0, []
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        work()
        wait(device)
    spent, calls = defaultdict[str, float](float), defaultdict[str, int](int)
    for event in found.events() or []:
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            name = event.name.split("<")[0].removeprefix("void ")[:60]
            spent[name] += event.device_time_total / 1e6
            calls[name] += 1
    longest = sorted(spent, key=lambda name: -spent[name])[:TOP]
    rest = sum(calls.values()) - sum(calls[name] for name in longest)
    shown = [(name, spent[name], calls[name]) for name in longest]
    return sum(spent.values()), [*shown, ("others", sum(spent.values()) - sum(s for _, s, _ in shown), rest)]


def draw(n: int, vocabulary: int, generator: torch.Generator) -> list[int]:
    return torch.randint(10, vocabulary, (n,), generator=generator).tolist()


def jobs(lm: LM) -> list[tuple[str, int, float, Callable[[], object]]]:
    """What is timed: name, tokens, FLOPs, work. A work without a gradient has the adapter off."""
    generator, vocabulary = torch.Generator().manual_seed(0), lm.model.config.vocab_size
    context = draw(CONTEXT, vocabulary, generator)
    queries = [draw(QUERY, vocabulary, generator) for _ in range(ROWS)]
    rows = [join([*context, *q], draw(ANSWER, vocabulary, generator)) for q in queries]
    prefix = lm._read_prefix(context)
    each = QUERY + ANSWER - 1

    def reading() -> list[Any]:
        return [lm._read_prefix(context) for _ in range(8)]

    def writing(record: bool) -> object:
        prompts = [[*context, *q] for q in queries]
        return lm.write(prompts, max_new_tokens=WRITTEN, ends=lambda _: False, prefix=prefix, record=record)

    steps = forward_flops(lm, QUERY + WRITTEN - 1, CONTEXT, projected=WRITTEN)
    return [
        ("read the context", 8 * CONTEXT, 8 * forward_flops(lm, CONTEXT), reading),
        (f"label {ROWS} rows", ROWS * each, ROWS * forward_flops(lm, each, CONTEXT), lambda: lm.hidden(rows, prefix)),
        (f"write {ROWS} rows", ROWS * WRITTEN, ROWS * steps, lambda: writing(True)),
        ("  not recorded", ROWS * WRITTEN, ROWS * steps, lambda: writing(False)),
    ]


def training(lm: LM, rows: int, answer: int, record: bool) -> tuple[str, int, float, Callable[[], object]]:
    generator, config = torch.Generator().manual_seed(1), lm.model.config
    template = draw(TEMPLATE, config.vocab_size, generator)
    batch = []
    for i in range(rows):
        prompt = (*template, *draw(QUERY, config.vocab_size, generator))
        states = torch.randn(answer, config.hidden_size, generator=generator)
        batch.append(
            Example(str(i), prompt, Target("", tuple(draw(answer, config.vocab_size, generator)), {"hidden": states}))
        )
    parameters = list(lm.trainable().values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    replayed = Replay.of(lm, [batch], TrainSection(), log=True) if record else None

    def step() -> None:
        stats = Stats()
        optimizer.zero_grad()
        if replayed:
            replayed(batch, rows * answer, stats)
        else:
            (batch_loss(lm, batch, TrainSection(), stats) / (rows * answer)).backward()  # type: ignore[no-untyped-call]
        float(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
        optimizer.step()

    whole, head = TEMPLATE + QUERY + answer - 1, forward_flops(lm, 0, projected=answer)
    # what the rows share is computed once, and both sides are projected
    flops = training_flops(lm, whole, answer, "lora") + head - training_flops(lm, TEMPLATE, 0, "lora") * (1 - 1 / rows)
    return (
        f"step of {rows} x {answer}" if record else "  not recorded",
        rows * (whole - TEMPLATE) + TEMPLATE,
        rows * flops,
        step,
    )


def attention(lm: LM, device: torch.device) -> list[tuple[str, float, float]]:
    """What is attended to, and milliseconds by the flash kernels and with all scores at once: the mean of ten after three."""
    config, dtype = lm.model.config, lm.model.dtype
    kv, size, found = config.num_key_value_heads, head_size(config), []
    for rows, own, start, learns in ATTENTIONS:
        shapes = (
            (kv, rows, config.num_attention_heads // kv, own, size),
            *[(kv, rows, own, size)] * 2,
            *[(kv, start, size)] * 2,
        )
        tensors = [torch.randn(shape, device=device).to(dtype) / size**0.25 for shape in shapes]
        for tensor in tensors:
            tensor.requires_grad_(learns)

        def work(
            attend: Callable[..., torch.Tensor], *more: Any, tensors: Any = tensors, learns: bool = learns
        ) -> None:
            out = attend(*tensors, *more)
            if learns:
                out.backward(torch.ones_like(out))  # type: ignore[no-untyped-call]

        took = []
        for job in ((packing._flash, None), (packing._in_pieces, None, 0.0)):
            clock(lambda job=job: [work(*job) for _ in range(3)], device, 1)  # type: ignore[misc]
            took.append(100 * clock(lambda job=job: [work(*job) for _ in range(10)], device, 1))  # type: ignore[misc]
        how = "both ways" if learns else "forward"
        found.append((f"{rows} rows of {own} behind {start}, {how}", took[0], took[1]))
    return found


def measure(shape: str, device: torch.device, rate: float) -> list[dict[str, Any]]:
    """All jobs of a shape."""
    lm, found = make(shape, device), []
    print(f"\n{shape}")
    for name, flash, whole in attention(lm, device):
        print(f"attention, {name}: {flash:.3f} ms by the flash kernels, {whole:.3f} with all scores")

    def add(name: str, tokens: int, flops: float, work: Callable[[], object]) -> None:
        with Peak(device) as peak:  # of the recording, too
            first = clock(work, device, 1)
            seconds = clock(work, device, 3)
        inside, longest = kernels(work, device)
        found.append({
            "job": name, "first_s": first, "seconds": seconds, "tokens_per_s": tokens / seconds, "use": flops / seconds / rate,
            "busy": inside / seconds, "peak_mb": peak.mb, "kernels": longest,
        })  # fmt: skip

    with torch.no_grad():
        for job in jobs(lm):
            add(*job)
    lm.add_adapter(LoraSection(rank=16), 0)
    lm.training(True)
    for rows, answer in STEPS:
        for record in (True, False):
            add(*training(lm, rows, answer, record))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "shapes", nargs="*", metavar="SHAPE", help=f"some of {', '.join(SHAPES)}; default: all but tiny"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    options = parser.parse_args()
    if unknown := set(options.shapes) - set(SHAPES):
        parser.error(f"unknown shape {', '.join(sorted(unknown))}; expected some of {', '.join(SHAPES)}")
    device = torch.device(options.device)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    rate = product_rate(device)
    print(f"{card}, torch {torch.__version__}; a large product: {rate / 1e12:.1f} TFLOP/s")
    report: dict[str, Any] = {"card": card, "torch": torch.__version__, "product_flops": rate, "shapes": {}}
    for shape in options.shapes or [name for name in SHAPES if name != "tiny"]:
        found = report["shapes"][shape] = measure(shape, device, rate)
        print(f"{'job':28} {'first s':>8} {'seconds':>8} {'tokens/s':>9} {'use':>6} {'busy':>5} {'peak MB':>8}")
        for r in found:
            print(
                f"{r['job']:28} {r['first_s']:8.2f} {r['seconds']:8.4f} {r['tokens_per_s']:9,.0f} {r['use']:6.1%} "
                f"{r['busy']:5.2f} {r['peak_mb']:8,.0f}"
            )
        for r in found if device.type == "cuda" else []:
            print(f"  {r['job']}: " + "; ".join(f"{name} {1000 * s:.2f} ms / {n}" for name, s, n in r["kernels"]))
        sys.stdout.flush()
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
