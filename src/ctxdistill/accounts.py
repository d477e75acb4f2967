"""What a run took, when it pays off, and what its reader must know.

In: times, token counts and tables of a run. Out: the parts `training`, `cost` and `notes` of `evaluation.json`, FLOPs of
forwards and of training, and peak memory. Invariants: a cost counts what was done once, however often the run was
resumed; FLOPs of the parts of a sequence add up to those of the whole, so a cached start costs nothing twice.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from ctxdistill import processes
from ctxdistill.dataset import Data
from ctxdistill.lm import LM, head_size
from ctxdistill.objective import Example
from ctxdistill.policy import rounds
from ctxdistill.prompts import Pair, Prompter
from ctxdistill.recipe import Recipe
from ctxdistill.rundir import RunDir
from ctxdistill.spool import Lazy
from ctxdistill.targets import Labelling, captured_mass
from ctxdistill.train import State, forward_tokens, retained_rows, saved, saving
from ctxdistill.weights import give_back_memory, weights_in


def summary(
    recipe: Recipe, lm: LM, prompter: Prompter, run: RunDir, state: State, examples: Sequence[Example]
) -> dict[str, Any]:
    """How training went."""
    per_epoch = -(-len(examples) // recipe.train.batch_size)
    return {
        "steps": state.step,
        "epochs": state.step / per_epoch,
        "stopped_early": state.stopped,
        "best_step": state.best_step if state.best_loss < float("inf") else state.step,
        "best_validation_kl": best_kl(run),
        "seconds": state.seconds,
        "trainable_parameters": sum(p.numel() for p in lm.trainable().values()),
        "adapter_bytes": (run / "adapter" / "adapter_model.safetensors").stat().st_size,
        "train_rows": len(examples),
        "student_completions": sum(line["student_rows"] for line in rounds(run)),
        "supervised_tokens": state.tokens,
        "truncated_completions": truncated(recipe, prompter, examples),
        "memory_savings": state.savings,
        "topk_mass": captured_mass(Lazy.over(examples, lambda e: e.target)),
    }


def best_kl(run: RunDir) -> float | None:
    """KL of the adapter that was kept, on the queries that chose it."""
    kept = [line["kl"] for line in run.lines("metrics.jsonl") if line["event"] == "validation" and line["best"]]
    return kept[-1] if kept else None


def truncated(recipe: Recipe, prompter: Prompter, examples: Sequence[Example]) -> int:
    """Completions that the teacher did not end within `max_new_tokens`."""
    if recipe.completions.source != "teacher":
        return 0
    return sum(not prompter.ends(list(e.target.ids)) for e in examples)


def spent(
    recipe: Recipe,
    lm: LM,
    prompter: Prompter,
    run: RunDir,
    pairs: Mapping[str, Sequence[Pair]],
    learnt: Mapping[str, Sequence[Example]],
    result: Mapping[str, Any],
) -> tuple[dict[str, float], int]:
    """What distilling took: seconds by stage, and tokens that labelling and training put through the model, a token of a
    training step being three.

    What rows share counts as often as it is read. Not counted: gate and evaluation, padding, and the thoughts that
    `completions.extract` leaves out. Completions that were rejected count as long as the others.

    Args:
        pairs: the rows that were labelled, `train` and `validation`.
        learnt: the examples made of them, and those that hold the student to the base model, `retained`.
        result: the parts of `evaluation.json` so far.
    """
    seconds = {"gate": 0.0, "label": 0.0, "train": 0.0, "evaluate": 0.0}
    for line in reversed(run.read_jsonl("timings.jsonl")):  # the first time counts: later ones found the work done
        seconds[line["stage"]] = line["seconds"]
    # a resumed run has trained in several processes; its state knows the whole
    training = result["training"]
    seconds["train"] = max(seconds["train"], training["seconds"])
    seconds["total"] = sum(seconds.values())
    section = saving(recipe.train, training["memory_savings"])
    size, rows = section.batch_size, learnt["train"]
    teacher = 0.0
    with lm.adapter(False):
        for split in ("train", "validation"):
            if made := [len(e.target.ids) - 1 for e in learnt[split]]:  # the last token is not read
                asked = Labelling(lm, prompter, pairs[split], recipe)
                teacher += asked.prompt_tokens() + len(asked.keys) * statistics.fmean(made)
        if kept := learnt["retained"]:
            teacher += sum(len(e.prompt) + len(e.target.ids) - 1 for e in kept)
            teacher -= (len(kept) - 1) * lm.shared([e.prompt for e in kept])
    # on-policy, what was learnt from is of other lengths than the teacher's completions
    own = training["supervised_tokens"] - training["epochs"] * sum(len(e.target.ids) for e in rows)
    student = training["epochs"] * forward_tokens(lm, rows, section, size) + own
    if kept:
        count = retained_rows(len(kept), section)
        student += training["steps"] * count / len(kept) * forward_tokens(lm, kept, section, count)
    measured = sum(line["event"] == "validation" for line in run.lines("metrics.jsonl"))
    held_out = measured * forward_tokens(lm, learnt["validation"], section, size) if measured else 0.0
    written = sum(line.get("forward_tokens", 0) for line in rounds(run))
    return seconds, round(teacher + 3 * student + held_out + written)


def cost(recipe: Recipe, result: Mapping[str, Any], seconds: dict[str, float], tokens: int) -> dict[str, Any]:
    """What a request saves, by the tables of `evaluation.json`, and after how many requests the `seconds` and `tokens` spent are
    earned back (not rounded): in time only where the timed rows show that one is quicker."""
    teacher, student, timed = result["table"]["in_context"], result["table"]["distilled"], result["ms_saved"]
    saved = teacher["prompt_tokens"]["mean"] - student["prompt_tokens"]["mean"]
    quicker = timed is not None and timed["n"] > 1 and timed["low"] > 0  # one row has no interval
    money = None
    c = recipe.cost
    if c.per_million_tokens and c.machine_hour and saved > 0:
        requests = seconds["total"] / 3600 * c.machine_hour / (saved * c.per_million_tokens / 1e6)
        money = {"requests": requests, "days": requests / c.requests_per_day if c.requests_per_day else None}
    return {
        "seconds": seconds,
        "prompt_tokens_saved": saved,
        "ms_saved": timed,
        "break_even_requests": 1000 * seconds["total"] / timed["mean"] if quicker else None,
        "break_even_money": money,
        "training_tokens": tokens,
        "break_even_tokens": tokens / saved if saved > 0 else None,
    }


def notes(recipe: Recipe, lm: LM, prompter: Prompter, rows: Data, training: Mapping[str, Any]) -> list[str]:
    """What a reader of the results must know. `training` is the `summary`."""
    found = [*lm.notes, *prompter.template_notes(), *saved(recipe.train, training["memory_savings"])]
    if n := rows.counts.get("turns_without_text"):
        found.append(f"{n} assistant's turns hold a tool call and no text, and are not taught")
    if n := rows.counts["dropped_duplicates"]:
        found.append(f"{n} rows with a repeated query were dropped")
    if n := rows.counts["left_out_by_limit"]:
        found.append(f"{n} rows were left out by a limit in the recipe")
    if n := training["truncated_completions"]:
        found.append(
            f"{n} of {training['train_rows']} training completions reached "
            f"max_new_tokens = {recipe.completions.max_new_tokens} without an end"
        )
    if (mass := training["topk_mass"]) is not None:
        found.append(
            f"top-{recipe.targets.k} targets hold {100 * mass:.1f} % of the teacher's probability; the rest is one bucket"
        )
    if training["best_step"] == 0 and recipe.train.validation:
        found.append("training never lowered the held-out loss: the adapter that was kept is the untrained one")
    if recipe.model.trust_remote_code:
        found.append("the model ran code of its own (trust_remote_code)")
    return found


@contextlib.contextmanager
def timed(run: RunDir, stage: str) -> Iterator[None]:
    """Keep the wall time of a stage; what a killed process had spent is not counted."""
    started = time.perf_counter()
    yield
    if processes.leads():
        run.append("timings.jsonl", {"stage": stage, "seconds": time.perf_counter() - started})


# -- counted, not timed -----------------------------------------------------------------------------------------------


def forward_flops(lm: LM, new: int, before: int = 0, projected: int = 0, *, classes: int = 0) -> float:
    """FLOPs of one row without padding, a multiplication and an addition being two:

        2 W new  +  4 a (sum over layers and new positions of the keys seen)  +  2 d V projected

    with W the weights of all linear layers below the head (biases free), a = attention heads x head size (2 a for the
    score and 2 a for the weighted value of each key), d and V the width and height of the head.

    Not counted: look-ups in embeddings, norms, activations, softmax, rotary angles, the adapter (it can be merged),
    mixtures of experts, and the recurrences of state-space layers. A position sees itself and the keys before it, at
    most a sliding window of them; kernels that compute the whole rectangle and mask it do more.

    Args:
        new: tokens that go through the blocks. Scoring T tokens after a prompt of P, or generating them, is P + T - 1.
        before: tokens whose keys and values are already cached.
        projected: positions that go through the head; with `new = 0`, the head alone.
        classes: height of a classification head that stands in for the vocabulary's (0: the vocabulary's).
    """
    head = lm.model.get_output_embeddings().weight  # [V, d]
    tables = {id(head), *(id(m.weight) for m in lm.model.modules() if isinstance(m, torch.nn.Embedding))}
    weights = sum(
        weights_in(p)
        for name, p in lm.model.named_parameters(remove_duplicate=False)
        if p.dim() == 2 and "lora_" not in name and id(p) not in tables
    )
    height, width = head.shape
    return float(2 * weights * new + _attention_flops(lm, new, before) + 2 * width * (classes or height) * projected)


def _attention_flops(lm: LM, new: int, before: int) -> float:
    config = lm.model.config.get_text_config()
    sliding = getattr(config, "sliding_window", None) or before + new
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention"] * config.num_hidden_layers  # over everything, where there is no window
    pairs = 0  # of a position and a key that it sees
    for kind in kinds:
        if "attention" in kind and kind != "linear_attention":
            window = sliding if kind == "sliding_attention" else before + new
            growing = min(max(window - before, 0), new)  # positions that still see everything before them
            pairs += growing * before + growing * (growing + 1) // 2 + (new - growing) * window
    return float(4 * config.num_attention_heads * head_size(config) * pairs)


def training_flops(lm: LM, new: int, projected: int, adapted: Literal["lora", "full"], *, classes: int = 0) -> float:
    """FLOPs of one row's forward and backward; arguments as for `forward_flops`. The optimizer is not counted.

    - `full`: three forwards (the forward, gradients of activations, gradients of weights).
    - `lora`: a forward, the gradients of activations (once more for linear layers and head, twice for attention, where
      both factors of each product need one), and 6 FLOPs per token and weight of the adapter that is on the model. An
      upper bound: the first layers that read the embeddings hand no gradient down.

    The teacher comes on top: `forward_flops` to label a row, and where hidden states are stored its head,
    `forward_flops(lm, 0, projected=T)`, each time they are used. `gradient_checkpointing` adds one forward.
    """
    forward = forward_flops(lm, new, projected=projected, classes=classes)
    if adapted == "full":
        return 3 * forward
    adapter = sum(p.numel() for name, p in lm.model.named_parameters() if "lora_" in name)
    return float(2 * forward + _attention_flops(lm, new, 0) + 6 * adapter * new)


class Peak:
    """Context manager: `mb` is the most memory in use while inside, in units of 2^20 bytes.

    On CUDA what torch allocated on the device; otherwise the resident memory of the process, model and libraries
    included. Where the system cannot forget an earlier peak (not Linux), `mb` is the peak since the process began and
    `since_start` says so. One at a time: a second one inside resets the first one's peak.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.mb = 0.0
        self.since_start = False

    def __enter__(self) -> Peak:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return self
        give_back_memory()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # see proc(5): the peak starts again from what is in use now
            _resident_peak()
        except (OSError, LookupError):
            self.since_start = True
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            self.mb = torch.cuda.max_memory_allocated(self.device) / 2**20
        elif self.since_start:
            import resource  # there is none on Windows

            unit = 1 if sys.platform == "darwin" else 1024
            self.mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
        else:
            self.mb = _resident_peak()


def _resident_peak() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields["VmHWM"].split()[0]) / 1024
