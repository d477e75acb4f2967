"""The loop: a LoRA student without the context learns to agree with the teacher's targets.

In: (student prompt, target) examples and the model with a fresh adapter. Out: the trained adapter on the model, a line
per step in `metrics.jsonl`, checkpoints. Invariants: the loss is a sum over supervised tokens divided by the global
number of supervised tokens of the step, so the gradient does not depend on micro-batches or processes; everything drawn
at a step depends only on the seed and the step, so a checkpoint needs no random state and a resumed run has the same bits.
Of several processes each learns from its share of a step's rows, and the first alone writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
import math
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn.parallel import DistributedDataParallel

from ctxdistill import processes, sealed, trackers
from ctxdistill.errors import TrainError
from ctxdistill.lm import LM, WORTH_SHARING, common_prefix
from ctxdistill.objective import Example, Stats, add, batch_loss
from ctxdistill.prompts import join
from ctxdistill.recipe import TrainSection
from ctxdistill.replay import Replay
from ctxdistill.rundir import Progress, RunDir, no_progress, write_atomic

NOTHING = 1e-6
"""A loss below this, in nats per token, leaves nothing to learn."""
SUMS = ("loss", "retain", "kl", "reverse_kl", "jsd", "forward_kl", "ce", "teacher_entropy", "student_entropy")
"""All sums over the positions of a step that there may be."""
GPU = "cuda"
"""The type of device that replays steps."""
SEEN = 256
"""Steps whose rows say how much room a recorded one needs; on-policy, those of a round do."""


class Source(Protocol):
    """What is learnt from, step by step (counted from 0)."""

    def __call__(self, step: int) -> list[Example]:
        """The batch of a step."""

    def round(self, step: int) -> range:
        """Steps whose batches can be asked for as soon as that of `step`, the same for each of them."""


class Plain:
    """The rows of `rows_of` as they are."""

    def __init__(self, examples: Sequence[Example], section: TrainSection, steps: int) -> None:
        self.examples, self.section, self.steps = examples, section, steps

    def __call__(self, step: int) -> list[Example]:
        return [self.examples[i] for i in rows_of(step, len(self.examples), self.section)]

    def round(self, step: int) -> range:
        """The first ones, which stand for all."""
        return range(min(self.steps, SEEN))


class Part(NamedTuple):
    """Rows of a step."""

    rows: Sequence[Example]
    divisor: float
    """Of the sum of their losses."""
    how: TrainSection
    name: str
    """Of the sum in the log."""


@dataclass
class State:
    """Where training stands; with the adapter and the optimizer's moments, all that a checkpoint holds."""

    step: int = 0
    best_step: int = 0
    best_loss: float = math.inf
    """Of the held-out queries, the same loss that is trained."""
    stale_epochs: int = 0
    seconds: float = 0.0
    tokens: int = 0
    """Supervised tokens so far."""
    stopped: bool = False
    savings: int = 0
    """How often the device's memory did not hold a step (`saving`)."""


class Step(torch.nn.Module):
    """`batch_loss` as a module that has the trained weights for parameters, which is what DDP wants: it sums the gradients
    over all processes while the last backward pass of a step is still going on."""

    loss: Callable[..., torch.Tensor]

    def __init__(self, lm: LM) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(lm.trainable().values())
        self.loss = lambda *given: batch_loss(lm, *given)  # the frozen weights are nobody's business

    def forward(self, rows: Sequence[Example], section: TrainSection, stats: Stats | None) -> torch.Tensor:
        return self.loss(rows, section, stats)

    @classmethod
    def of_all(cls, lm: LM) -> torch.nn.Module:
        """For this process, or for all of them: then its gradients are the means over processes."""
        if processes.count() == 1:
            return cls(lm)
        # an expert that no token of a step was sent to has no gradient
        return DistributedDataParallel(cls(lm), find_unused_parameters=any(".experts." in n for n in lm.trainable()))


def shares(rows: Sequence[Example], size: int) -> Iterator[list[Example]]:
    """This process's share of `rows` in batches of at most `size`: as many batches in every process, the last maybe empty,
    since where the weights are shared out all processes must come to every forward pass."""
    mine, most = range(processes.rank(), len(rows), processes.count()), -(-len(rows) // processes.count())
    return ([rows[j] for j in mine[i : i + size]] for i in range(0, most, size))


@torch.no_grad()
def mean_loss(lm: LM, examples: Sequence[Example], section: TrainSection) -> float:
    """Mean loss per supervised token, in nats. Of several processes each takes its share, and all must come here."""
    sums = torch.zeros(2, dtype=torch.float64)  # loss, tokens
    for rows in shares(examples, section.micro_batch or section.batch_size):
        loss = batch_loss(lm, rows or examples[:1], section).item()
        if rows:
            sums += torch.tensor([loss, sum(len(e.target.ids) for e in rows)], dtype=torch.float64)
    loss, tokens = processes.total(sums).tolist()
    return float(loss / tokens)


def mean_kl(lm: LM, examples: Sequence[Example], batch_size: int) -> float:
    """Mean KL(teacher || student) per supervised token, in nats, whatever is trained."""
    return mean_loss(lm, examples, TrainSection(loss="forward_kl", batch_size=batch_size))


def forward_tokens(lm: LM, examples: Sequence[Example], section: TrainSection, size: int) -> int:
    """Tokens of the student's forwards over all `examples` once, in steps of `size` rows: what they all start with is read
    once in each pass of a model whose rows can be packed."""
    lengths = [len(e.prompt) + len(e.target.ids) for e in examples]
    shared = len(common_prefix(e.prompt for e in examples)) if len(lengths) > 1 else 0
    if not lm.can_pack or section.gradient_checkpointing or WORTH_SHARING * shared < max(lengths):
        shared = 0
    full, rest = divmod(len(lengths), size)
    passes = sum(-(-n // (section.micro_batch or size)) for n in [size] * full + [rest])
    return sum(lengths) - len(lengths) - (len(lengths) - passes) * shared


def saving(section: TrainSection, times: int, found: str = "") -> TrainSection:
    """How to train on a device whose memory did not hold a step so many `times`: each time the cheapest of what is left. That is
    to record no steps; to have half as many rows in a pass, down to one; and to compute activations again. None changes the gradient.

    Raises: `TrainError` when nothing is left, with what the device said (`found`).
    """
    for _ in range(times):
        rows = section.micro_batch or section.batch_size
        if section.cuda_graphs:
            change: dict[str, Any] = {"cuda_graphs": False}
        elif rows > 1:
            change = {"micro_batch": -(-rows // 2)}
        elif not section.gradient_checkpointing:
            change = {"gradient_checkpointing": True}
        else:
            raise TrainError(
                "the device's memory does not hold a step with one row",
                found=found,
                fix='shorten the rows, set model.quantize = "4bit", take a smaller model, or close what else uses the device',
            )
        section = section.model_copy(update=change)
    return section


def saved(section: TrainSection, times: int) -> list[str]:
    """What `saving` did, for a reader."""
    how, done = saving(section, times), ["are not recorded"]
    if how.micro_batch != section.micro_batch:
        done.append(f"are taken {how.micro_batch} rows at a time")
    if how.gradient_checkpointing != section.gradient_checkpointing:
        done.append("compute activations again")
    said = f"the device's memory does not hold a training step of {section.batch_size} rows; steps {', '.join(done)}"
    return [said] if times else []


def learning_rate(step: int, steps: int, section: TrainSection) -> float:
    """Linear warm-up, then what `schedule` says, as a function of the step (from 0) alone."""
    if section.schedule == "paper":
        epoch, warmup = step * section.epochs // steps, int(section.warmup * section.epochs)
        return section.lr * min(1.0, epoch / warmup) if warmup else section.lr
    warmup = max(1, round(section.warmup * steps))
    if step < warmup:
        return section.lr * (step + 1) / warmup
    if section.schedule == "constant":
        return section.lr
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    return section.lr * (section.min_lr + (1 - section.min_lr) * cosine)


def order(n: int, epoch: int, seed: int, shuffle: bool = True) -> Sequence[int]:
    """The rows of an epoch in the order they are seen."""
    return _permutation(n, epoch, seed) if shuffle else range(n)


@functools.lru_cache(maxsize=1)  # of all rows: not to be drawn again for every step
def _permutation(n: int, epoch: int, seed: int) -> array[int]:
    drawn = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return array("q", drawn.numpy().tobytes())


def rows_of(step: int, n: int, section: TrainSection) -> list[int]:
    """Which of `n` rows a step learns from."""
    epoch, position = divmod(step, math.ceil(n / section.batch_size))
    first = position * section.batch_size
    return list(order(n, epoch, section.seed, section.shuffle)[first : first + section.batch_size])


def retained_rows(n: int, section: TrainSection) -> int:
    """How many of `n` rows that hold the student to the base model are in each step: a quarter of a batch, at least one."""
    return min(n, max(1, section.batch_size // 4)) if section.retain_weight else 0


def retained_at(step: int, retained: Sequence[Example], section: TrainSection) -> list[Example]:
    """The rows of a step that hold the student to the base model, in turn."""
    count = retained_rows(len(retained), section)
    return [retained[(step * count + i) % len(retained)] for i in range(count)]


def train(
    lm: LM,
    examples: Sequence[Example],
    validation: Sequence[Example],
    section: TrainSection,
    run: RunDir,
    *,
    source: Source | None = None,
    retained: Sequence[Example] = (),
    progress: Progress = no_progress,
) -> State:
    """Train the adapter on `examples`; leave the best one by `validation` (or the last) on the model.

    `retained` rows add `retain_weight` times their own mean loss (without cross-entropy) to that of each step.
    With a `source`, each step learns from what that returns; it may use the model as it then is (`policy.Rounds`).
    Goes on from the newest checkpoint in the run folder, if there is one. A step that the memory of a GPU does not hold is
    taken again with less at a time (`saving`), and so are all that follow.

    Raises: `TrainError` when the loss or a gradient is not finite, or no gradient reaches the adapter.
    """
    accelerator = trackers.reporting(section, run, cpu=lm.device.type == "cpu")
    main = processes.leads()
    parameters = lm.trainable()
    optimizer = torch.optim.AdamW(parameters.values(), lr=section.lr, weight_decay=section.weight_decay, fused=True)
    per_epoch = math.ceil(len(examples) / section.batch_size)
    steps = per_epoch * section.epochs

    def log(line: dict[str, Any]) -> None:
        if main:
            run.append("metrics.jsonl", line)
            trackers.report(accelerator, line)

    state = restore(run, parameters, optimizer)
    if main:
        drop_later_metrics(run, state.step if state != State() else -1)
    wanted, section = section, saving(section, state.savings)
    lm.training(True)
    lm.recompute(section.gradient_checkpointing)
    model = Step.of_all(lm)
    source = source or Plain(examples, section, steps)
    known, replays = range(0), dict[str, Replay]()
    if validation and state.best_loss == math.inf:  # a checkpoint of step 0 has it already
        validate(lm, validation, section, state, per_epoch, run, parameters, log)

    while state.step < steps and not state.stopped:
        started = time.perf_counter()
        batch = source(state.step)
        if (now := source.round(state.step)) != known:
            known, replays = now, recordings(lm, map(source, now), retained, section)
        tokens = sum(len(e.target.ids) for e in batch)  # of all processes: the one denominator of this step
        kept = retained_at(state.step, retained, section)
        parts = [Part(batch, float(tokens), section, "loss")]
        if kept:
            mean = sum(len(e.target.ids) for e in kept) / section.retain_weight
            parts.append(Part(kept, mean, as_retained(section), "retain"))
        rate = learning_rate(state.step, steps, section)
        for group in optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(section.seed * 1_000_003 + state.step + (processes.rank() << 40))  # dropout, if any
        optimizer.zero_grad()
        sums = attempt(model, parts, replays)
        if isinstance(sums, str):
            state.savings += 1
            state.seconds += time.perf_counter() - started
            section, known, replays = saving(wanted, state.savings, found=sums), range(0), {}
            lm.recompute(section.gradient_checkpointing)
            if section.checkpoint_every:  # a resumed run, too, must save from this step on
                checkpoint(run, state, parameters, optimizer)
            how = section.model_dump(include={"cuda_graphs", "micro_batch", "gradient_checkpointing"})
            log({"event": "memory", "step": state.step, "epoch": state.step / per_epoch, **how})
            continue
        stats = {name: float(value) for name, value in sums.items()}
        total = stats.pop("loss", 0.0) + (retain := stats.pop("retain", 0.0))
        norm = float(torch.nn.utils.clip_grad_norm_(parameters.values(), section.clip))
        check_step(state.step + 1, total, norm, [*batch, *kept])
        optimizer.step()
        state.step += 1
        state.tokens += tokens
        state.seconds += time.perf_counter() - started
        line = {
            "event": "step", "step": state.step, "epoch": state.step / per_epoch,
            "loss": total, "lr": rate, "grad_norm": norm, "tokens": tokens,
            **{k: v / tokens for k, v in stats.items()}, "seconds": time.perf_counter() - started,
        }  # fmt: skip
        if kept:
            line["retain"] = retain / section.retain_weight
        log(line)
        progress(f"train (loss {total:.3f})", state.step, steps)
        if state.step in (steps // 2, steps) and total > NOTHING:
            check_effect(lm, batch[0], state.step)
        if validation and state.step % per_epoch == 0:
            validate(lm, validation, section, state, per_epoch, run, parameters, log)
        every, whole = section.checkpoint_every, section.round_steps or per_epoch
        due = state.step % every == 0 if every else False
        due = due or (section.on_policy > 0 and state.step % whole == 0)  # the student that writes the next round
        if main and every and (due or state.step == steps or state.stopped):
            checkpoint(run, state, parameters, optimizer)

    processes.wait()
    trackers.finish(accelerator)
    if validation:
        load_tensors(run / "checkpoints/best.safetensors", parameters)
    lm.recompute(False)  # the next one to be trained on this model may not want it
    lm.training(False)
    return state


def recordings(
    lm: LM, batches: Iterable[Sequence[Example]], retained: Sequence[Example], section: TrainSection
) -> dict[str, Replay]:
    """What a GPU replays in the place of the parts of a step, by their names, for steps like `batches`; of several processes
    none does."""
    if lm.device.type != GPU or processes.count() > 1 or not section.cuda_graphs:
        return {}
    of_parts = {"loss": batches}
    if section.retain_weight:
        of_parts["retain"] = (retained_at(step, retained, section) for step in range(SEEN))
    made = {}
    for name, whole in of_parts.items():
        how = section if name == "loss" else as_retained(section)
        passes = (rows for one in whole if one for rows in shares(one, how.micro_batch or len(one)))
        if found := Replay.of(lm, passes, how, log=name == "loss"):
            made[name] = found
    return made


def as_retained(section: TrainSection) -> TrainSection:
    """How the student is held to the base model: without cross-entropy."""
    return section.model_copy(update={"ce_weight": 0.0})


def attempt(model: torch.nn.Module, parts: Sequence[Part], replays: dict[str, Replay]) -> Stats | str:
    """`backward`; or what the device says if its memory does not hold the step, which then leaves nothing behind."""
    try:
        return backward(model, parts, replays)
    except torch.OutOfMemoryError as error:
        if processes.count() > 1:  # the others wait for this one
            raise
        said = str(error).partition("\n")[0]
    # by now the error is gone, which knew all that was computed
    replays.clear()
    model.zero_grad()
    gc.collect()
    torch.cuda.empty_cache()
    return said


def backward(model: torch.nn.Module, parts: Sequence[Part], replays: dict[str, Replay] | None = None) -> Stats:
    """Leave the gradient of a step on the trained weights, that of all processes together; returns the sums for the log.
    A part that fits in one of `replays` is replayed; one that cannot be recorded is dropped from them."""
    world, sums, todo = processes.count(), Stats(), list[Part]()
    for rows, divisor, how, name in parts:
        for micro in shares(rows, how.micro_batch or len(rows)):
            # without rows it takes part all the same, with a weight of 0
            todo.append(Part(micro, divisor, how, name) if micro else Part(rows[:1], math.inf, how, ""))
    for number, (rows, divisor, how, name) in enumerate(todo, 1):
        last = number == len(todo)
        noted = sums if name == "loss" else None
        if replays and name in replays and replays[name].fits(rows):
            try:
                add(sums, name, replays[name](rows, divisor, noted))
                continue
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # the model waits for the GPU somewhere
                del replays[name]
        with model.no_sync() if isinstance(model, DistributedDataParallel) and not last else contextlib.nullcontext():
            loss = model(rows, how, noted) / divisor
            (loss * world).backward()  # DDP takes the mean over processes
        add(sums, name, loss)
    if world == 1:
        return sums
    # one tensor of a fixed length, whatever rows a process had
    values = torch.stack([sums.get(name, loss.new_zeros(())).detach().float() for name in SUMS])
    return {name: v for name, v in zip(SUMS, processes.total(values), strict=True) if name in sums or name in SUMS[:2]}


def validate(
    lm: LM,
    validation: Sequence[Example],
    section: TrainSection,
    state: State,
    per_epoch: int,
    run: RunDir,
    parameters: dict[str, torch.nn.Parameter],
    log: Callable[[dict[str, Any]], None],
) -> None:
    """Measure loss and KL on held-out queries, keep the adapter if it is the best so far, note when to stop."""
    lm.training(False)
    loss = mean_loss(lm, validation, section)
    plain = (section.loss, section.temperature, section.ce_weight) == ("forward_kl", 1.0, 0.0)
    kl = loss if plain else mean_kl(lm, validation, section.micro_batch or section.batch_size)
    lm.training(True)
    if not math.isfinite(loss):
        raise TrainError(
            f"step {state.step}: the loss of the held-out queries is {loss}",
            expected="a finite number",
            fix="lower train.lr; float16 weights overflow easily: use bfloat16 or float32",
        )
    best = loss < state.best_loss
    if best:
        state.best_loss, state.best_step, state.stale_epochs = loss, state.step, 0
        if processes.leads():
            tensors = {n: p.detach().contiguous() for n, p in parameters.items()}
            write_atomic(run / "checkpoints/best.safetensors", sealed.save(tensors))
    else:
        state.stale_epochs += 1
        state.stopped = 0 < section.patience <= state.stale_epochs
    log({
        "event": "validation", "step": state.step, "epoch": state.step / per_epoch, "kl": kl, "loss": loss, "best": best,
    })  # fmt: skip


def check_step(step: int, loss: float, norm: float, batch: Sequence[Example]) -> None:
    """Stop at the step where something went wrong, and name its rows."""
    rows = ", ".join(e.id for e in batch[:8])
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise TrainError(
            f"step {step}: loss {loss}, gradient norm {norm}",
            expected="finite numbers",
            found=f"rows {rows}",
            fix="look at these rows with `ctxdistill show`; lower train.lr; float16 weights overflow easily: use bfloat16 or float32",
        )
    if step == 1 and norm == 0 and loss > 0:
        raise TrainError("step 1: no gradient reaches the adapter", expected="a gradient norm above 0", found="0")


@torch.no_grad()
def check_effect(lm: LM, example: Example, step: int) -> None:
    """Raise `TrainError` when the student is the base model, bit by bit, after so many steps with something to learn."""
    if lm.peft is None or lm.trains_head:
        return
    lm.training(False)
    sides = []
    for on in (True, False):
        with lm.adapter(on):
            sides.append(lm.hidden([join(example.prompt, example.target.ids)])[0])  # [T, d]
    lm.training(True)
    if torch.equal(*sides):
        raise TrainError(
            f"step {step}: the adapter has no effect",
            expected="other answers than the base model's",
            found=f"the same hidden states, bit by bit, in row {example.id}",
            fix='raise train.lr; in 16-bit weights small updates vanish: use model.dtype = "float32"',
        )


# -- checkpoints ------------------------------------------------------------------------------------------------------


def checkpoint(
    run: RunDir, state: State, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """One file with everything that training goes on from; the one before it is kept until this one is whole."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"adapter.{name}"] = parameter.detach().contiguous()
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = value.contiguous()
    path = run / f"checkpoints/step-{state.step:08d}.safetensors"
    write_atomic(path, sealed.save(tensors, json.dumps(dataclasses.asdict(state))))
    for old in sorted((run / "checkpoints").glob("step-*.safetensors"))[:-2]:
        old.unlink()


def restore(run: RunDir, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> State:
    """Load the newest checkpoint into adapter and optimizer; a fresh `State` when there is none."""
    paths = sorted((run / "checkpoints").glob("step-*.safetensors"))
    if not paths:
        return State()
    tensors, text = read_checkpoint(paths[-1])
    state = State(**json.loads(text))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors.pop(f"adapter.{name}"))
    moments: dict[torch.nn.Parameter, dict[str, torch.Tensor]] = {p: {} for p in parameters.values()}
    for full, tensor in tensors.items():
        key, _, name = full.partition(".")
        moments[parameters[name]][key] = tensor
    packed = optimizer.state_dict()
    packed["state"] = dict(enumerate(moments.values()))
    optimizer.load_state_dict(packed)
    return state


def load_tensors(path: Path, parameters: dict[str, torch.nn.Parameter]) -> None:
    """Copy the adapter in `path` into `parameters`."""
    tensors, _ = read_checkpoint(path)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def read_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], str]:
    """Tensors and text of a checkpoint. Raises `TrainError` naming one that is damaged, and what to delete: the best
    adapter cannot be had again but by training again, a checkpoint has one before it."""
    damaged, again = (
        (path.parent, "train again") if path.name.startswith("best") else (path, "go on from the one before")
    )
    try:
        return sealed.load(path)
    except ValueError as error:
        raise TrainError(
            f"the checkpoint {path} is damaged: {error}", fix=f"delete {damaged} and {again} with --resume"
        ) from None


def drop_later_metrics(run: RunDir, step: int) -> None:
    """Forget log lines of what will be done again, which is all that is behind `step`."""
    if (run / "metrics.jsonl").exists():
        kept = (line for line in run.lines("metrics.jsonl") if line["step"] <= step)
        run.write_jsonl("metrics.jsonl", kept)
