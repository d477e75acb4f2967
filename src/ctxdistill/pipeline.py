"""The straight path, and the public API.

    recipe -> rows -> prompt pairs -> gate -> teacher targets -> student training -> evaluation -> report

In: a `Recipe`. Out: a run folder (see `docs/concepts.md`). Each stage reads what the one before wrote and keeps what it
made, so that an interrupted run goes on where it was (`resume=True`) and ends with the same bits.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctxdistill import adapters, engines, generic, groups, losses, processes, programs, sandbox, synthesis, trackers
from ctxdistill import evaluate as evaluation
from ctxdistill import plan as planning
from ctxdistill import report as reports
from ctxdistill.accounts import cost, notes, spent, summary, timed
from ctxdistill.behaviour import Check, base_targets, behaviour, unrelated
from ctxdistill.cluster import label_spread
from ctxdistill.compose import compose
from ctxdistill.crosstalk import groups_of, matrix
from ctxdistill.dataset import Data, claim, describe, prepare, prompter_of, read_rows, stored_recipe, synthesize
from ctxdistill.errors import DataError, GateError, ModelError, RecipeError, RunError
from ctxdistill.lm import LM, common_prefix
from ctxdistill.objective import Example
from ctxdistill.policy import Rounds
from ctxdistill.prompts import Pair, Prompter
from ctxdistill.recipe import Recipe
from ctxdistill.rundir import Progress, RunDir, no_progress, reading, writing
from ctxdistill.session import Piece, Session
from ctxdistill.spool import Lazy
from ctxdistill.store import TargetStore
from ctxdistill.targets import Ask, Labelling, label
from ctxdistill.train import State, train
from ctxdistill.weights import PACKAGE, packaged_gguf, pick_device

log = logging.getLogger("ctxdistill")


@dataclass(frozen=True)
class Run:
    """A finished run: its folder (`path`), its `adapter`'s, and what was measured (`evaluation`, also `evaluation.json` there).

    An estimate is `{mean, low, high, n}` with a 95 % interval, as a fraction where the terminal says percent. `evaluation` holds:

    - `table`: of each arm (`zero_shot`, `in_context`, `distilled`) the estimates of every metric, of `kl` (nats per token), `top1`,
      `prompt_tokens` and `latency_ms`.
    - `kl_closed`, `gap_closed`: the share of the KL, and of the teacher's gain in `main_metric`, that the adapter closes;
      None or `{undefined: why}` where there is none.
    - `comparisons`: differences of arms with paired tests. `constant`: what always the same answer would score.
    - `gate`: the verdict and its reasons. `training`: steps, best step, seconds, sizes. `completions`: what became of them.
    - `cost`: seconds by stage, what a request saves, after how many it pays off. `notes`: what a reader must know.
    - `behaviour`: the change elsewhere, by strength. `parts`, `crosstalk`: by chunk, column or context, where a recipe has them.
    """

    path: Path
    evaluation: dict[str, Any]

    @property
    def adapter(self) -> Path:
        """The PEFT adapter's folder."""
        return self.path / "adapter"


def distill(
    recipe: Recipe, out: str | Path | None = None, *, resume: bool = False, progress: Progress | None = None
) -> Run:
    """Internalise the recipe's context into an adapter in the run folder `out` (default `runs/<recipe name>`).

    Args:
        resume: go on with what is there; the logger `ctxdistill` says what that is, or that there is nothing.

    Raises: `GateError` when there is nothing to teach (unless `gate.on_fail = "warn"`), and any other `CtxDistillError`.
    """
    progress = progress or no_progress
    trackers.check(recipe.train.report_to)
    processes.begin(pick_device(recipe.model.device))
    run = RunDir(out or Path("runs") / (recipe.name or "run"))
    if processes.leads() and (run.path.exists() or recipe.queries.synthesize):
        run.lock()  # who has it is said before anything is loaded, or written there
    begun = processes.leads() and run.path.is_dir() and any(path.name != ".lock" for path in run.path.iterdir())
    if resume and not begun and processes.leads():
        log.warning("nothing to resume in %s: starting from the beginning", run.path)
    try:
        lm, prompter, rows = processes.first(lambda: prepare(recipe, run.path, progress))
        manifest = describe(recipe, lm, prompter, rows)
        processes.first(lambda: take(run, manifest, resume))
        if resume and begun and processes.leads():
            log.info("going on in %s, where there are: %s", run.path, ", ".join(left(run)))
        log.info("loss: %s = %s", recipe.train.loss, losses.LOSSES[recipe.train.loss].formula)
        taught = processes.first(lambda: teach(recipe, lm, prompter, rows, run, progress))
        lm.add_adapter(recipe.lora, recipe.train.seed, common_prefix(p.teacher for p in rows.pairs["train"]))
        if recipe.train.shard:
            lm.shard()
        with timed(run, "train"):
            source = None
            if recipe.train.on_policy:
                source = Rounds(lm, prompter, rows.pairs["train"], taught.examples, recipe, run, progress=progress)
            state = train(
                lm, taught.examples, taught.validation, recipe.train, run,
                source=source, retained=taught.retained, progress=progress,
            )  # fmt: skip
        if processes.leads():
            save_adapter(lm, run)
            if recipe.train.shard:
                lm = whole(lm, recipe)
            conclude(recipe, lm, prompter, rows, run, taught, state, progress)
        processes.wait()
        return Run(run.path, run.read_json("evaluation.json"))
    finally:
        run.release()


def label_rows(
    recipe: Recipe, out: str | Path | None = None, *, ray: str | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Ask the teacher about all queries, into the run folder `out` (or `targets.dir`), where `distill` finds the targets.
    What is there already is kept.

    Args:
        ray: the address of a Ray cluster that does the work, or `local`; unset: this process.

    Returns: `run` and `targets` (folders), `rows` and `made` (completions in all, and those that were missing).
    """
    progress = progress or no_progress
    if ray and recipe.teacher.engine != "local":
        raise RecipeError(
            "a cluster labels with the local model of each worker",
            expected='teacher.engine = "local"',
            found=recipe.teacher.engine,
            fix="leave --ray out: the engine may have as many machines as it likes",
        )
    run = RunDir(out or Path("runs") / (recipe.name or "run"))
    lm, prompter, rows = prepare(recipe, run.path, progress)
    manifest = describe(recipe, lm, prompter, rows)
    claim(run, manifest, resume=True)
    try:
        run.write_json("recipe.json", manifest)
        store = TargetStore.of(recipe, run.path)
        ask = engines.labeller(recipe, lm, prompter, run)
        works = {
            split: Labelling(lm, prompter, rows.pairs[split], recipe, ask=ask) for split in ("train", "validation")
        }
        there = len(store)
        with timed(run, "label"):
            if ray:
                label_spread(ray, manifest, run.path, works, store, progress)
            for work in works.values():
                work.into(store, progress)  # with a cluster, nothing is left to do
        total = sum(len(work.keys) for work in works.values())
        return {"run": str(run.path), "targets": str(store.folder), "rows": total, "made": len(store) - there}
    finally:
        run.release()


def gate(
    recipe: Recipe, *, judged: Callable[[dict[str, Any]], None] | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Is there anything to teach? Measures the zero-shot and in-context arms; trains nothing, keeps nothing but
    queries that the model had to write first.

    Args:
        judged: called with all but the estimate, as soon as it is known.

    Returns: `verdict` (`teach` or not) with its `reasons`, `kl` and `gain` (estimates, the latter in `metric`), `context_tokens`,
        `query_tokens`, `window`, `fits`, and as `estimate` what `plan` predicts.
    """
    progress = progress or no_progress
    lm, prompter, rows = prepare(recipe, None, progress)
    verdict = run_gate(recipe, lm, prompter, rows, None, None, progress)
    if judged:
        judged(verdict)
    speeds = planning.measure(recipe, lm, prompter, rows, progress)
    return verdict | {"estimate": planning.predict(recipe, lm, rows, speeds)}


def queries(
    recipe: Recipe, out: str | Path | None = None, *, force: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Let the model write the queries that `queries.synthesize` asks for; returns the summary that is beside the file.

    Args:
        out: the file; unset: where `distill` looks for it.
        force: replace a file that is there.

    Raises: `RecipeError` when the recipe wants none, `RunError` when the file is there.
    """
    if not recipe.queries.synthesize:
        raise RecipeError(
            "the recipe wants no queries written",
            expected="how many",
            fix="write synthesize = 200, for example, into [queries] of the recipe, so that distill reads them, too",
        )
    file = Path(out) if out else synthesis.queries_file(recipe)
    synthesis.refuse_overwrite(file, force)
    prompter = prompter_of(recipe)
    lm = None if recipe.synthesis.endpoint else LM.load(recipe.model, recipe.base_dir)
    return synthesize(recipe, prompter, lm, file, progress or no_progress)


def plan(recipe: Recipe, *, progress: Progress | None = None) -> dict[str, Any]:
    """What a run would take: `seconds` (by `stages`), `memory_mb`, `disk_mb`, `cost`, `notes`, from each stage tried on a few rows;
    `bfloat16`: how many times as fast a CPU multiplies in that as in float32, for a model (`dtype`) in one of them."""
    progress = progress or no_progress
    lm, prompter, rows = prepare(recipe, None, progress)
    found = planning.predict(recipe, lm, rows, planning.measure(recipe, lm, prompter, rows, progress))
    counts = {split: len(pairs) for split, pairs in rows.pairs.items()}
    about = {"model": lm.info["name"], "device": lm.info["device"], "dtype": lm.info["dtype"], "rows": counts}
    return found | about | {"bfloat16": planning.gain_of_bfloat16(lm)}


def evaluate(run: str | Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """Measure all arms of a finished run again, from its adapter, and renew its report; returns what `Run.evaluation` holds."""
    folder = RunDir.existing(run)
    old = folder.read_json("evaluation.json")
    recipe = stored_recipe(folder)
    with reading(folder.path):
        spent_before = dict(old["cost"]["seconds"]), int(old["cost"]["training_tokens"])
    progress = progress or no_progress
    lm, prompter, rows = prepare(recipe, folder.path, progress)
    # the same model, context and rows as then, or the tables would mix two things
    claim(folder, describe(recipe, lm, prompter, rows), resume=True)
    try:
        lm.load_adapter(folder / "adapter")
        store = TargetStore.of(recipe, folder.path)
        result = measure(recipe, lm, prompter, rows, store, folder, list(evaluation.ARMS), progress)
        result |= {key: old[key] for key in ("gate", "training", "notes", "completions") if key in old}
        ask = engines.labeller(recipe, lm, prompter, folder)
        made = make_examples(recipe, lm, prompter, rows.pairs["train"], store, no_progress, ask=ask)  # from the store
        result["parts"] = groups.tables(prompter, rows, scores_of(folder), made)
        result["cost"] = cost(recipe, result, *spent_before)
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
    """Both prompts of a row, in the order train, validation, eval; needs the tokenizer only.

    Returns: `id`, `split`, `teacher` and `student` (pieces of text with their kind), their numbers of tokens, and the `completion`'s
        tokens with their ids, where it is given.
    """
    prompter = prompter_of(recipe)
    splits = read_rows(recipe, prompter)[0]
    flat = [(split, r, section) for split, (found, section) in splits.items() for r in found]
    if not 0 <= row < len(flat):
        raise DataError(f"there is no row {row}", expected=f"0 to {len(flat) - 1}", fix="choose one with --row")
    split, chosen, section = flat[row]
    given = chosen.fields.get(section.answer) if recipe.completions.source == "data" else None
    return prompter.shown(chosen, section, split, None if given is None else prompter.completion(str(given)))


def load_student(run: str | Path, *, merge: bool = False, strength: float = 1.0) -> tuple[Any, Any]:
    """The distilled model, ready for `generate`, and its tokenizer.

    Args:
        run: the run folder.
        merge: add the adapter into the weights, not quantised (a plain transformers model), instead of a PEFT model.
        strength: of the adapter: 0 is the base model, 1 the adapter as trained; above 1 it does more of the same.
    """
    folder = RunDir.existing(run)
    recipe = stored_recipe(folder)
    section = recipe.model.model_copy(update={"quantize": "none"}) if merge else recipe.model
    lm = LM.load(section, recipe.base_dir)
    lm.load_adapter(folder / "adapter")
    adapters.scale(lm.peft, strength)
    if merge and adapters.encoder_of(lm.peft) is not None:
        raise ModelError("a cartridge cannot be merged into the weights", fix="load it without merge")
    return (lm.peft.merge_and_unload() if merge else lm.peft), lm.tokenizer


def try_text(
    run: str | Path, text: str, *, max_new_tokens: int | None = None, strength: float = 1.0
) -> Generator[tuple[str, str], None, None]:
    """Answer `text` as base model, as teacher with the context, and as student: (arm, piece of text) as it is written."""
    if not text.strip():
        raise RunError("the text is empty", expected="a query")
    with contextlib.closing(Session.load(run).answer(text, strength=strength, max_new_tokens=max_new_tokens)) as said:
        for part in said:
            if isinstance(part, Piece):
                yield part.arm, part.text


def demo(out: str | Path | None = None, *, small: bool = False, progress: Progress | None = None) -> Run:
    """The embedded example: reminders in free text become `task | day | time`. `small`: a quarter of the queries and of the
    rows to measure. `out`: `runs/demo`, or `runs/demo-small`. Goes on with what is there."""
    overrides = []
    if gguf := packaged_gguf(PACKAGE):
        overrides.append(f"model.name={str(gguf)!r}")
    if small:
        overrides += ["queries.limit=64", "eval.limit=24", "eval.latency_rows=2"]
    recipe = Recipe.load(Path(__file__).parent / "demo" / "recipe.toml", overrides)
    folder = Path(out or Path("runs") / ("demo-small" if small else "demo"))
    return distill(recipe, folder, resume=(folder / "recipe.json").exists(), progress=progress)


# -- stages -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Taught:
    """What the teacher says, and the gate of it."""

    verdict: dict[str, Any]
    examples: Sequence[Example]
    validation: Sequence[Example]
    retained: Sequence[Example]
    judged: Counter[str]
    """What became of the completions."""


def take(run: RunDir, manifest: dict[str, Any], resume: bool) -> None:
    """Make the run folder that of the first process; the others see whether it is there for them, too."""
    if processes.leads():
        claim(run, manifest, resume=resume)
        run.write_json("recipe.json", manifest)
    else:
        run.join(manifest["fingerprint"])


def left(run: RunDir) -> list[str]:
    """What an earlier attempt has left in the run folder, for people."""
    names = {"queries.jsonl": "written queries", "gate.json": "the gate's scores", "targets": "targets"}
    found = [what for name, what in names.items() if (run / name).exists()]
    if steps := sorted(run.path.glob("checkpoints/step-*.safetensors")):
        found.append(f"a checkpoint of step {int(steps[-1].stem.removeprefix('step-'))}")
    return [*found, *(["the adapter"] if (run / "adapter").exists() else [])] or ["only the recipe"]


def teach(recipe: Recipe, lm: LM, prompter: Prompter, rows: Data, run: RunDir, progress: Progress) -> Taught:
    """Pass the gate, and label the rows, or read the labels where they are made. Raises: `GateError`."""
    store = TargetStore.of(recipe, run.path)
    verdict: dict[str, Any] = {}
    if processes.leads():
        with timed(run, "gate"):
            verdict = run_gate(recipe, lm, prompter, rows, store, run, progress)
        if verdict["verdict"] != "teach" and recipe.gate.on_fail == "stop":
            raise GateError(
                "the gate found nothing to teach: " + "; ".join(verdict["reasons"]),
                fix='change the context or the queries, or go on all the same with gate.on_fail="warn"',
            )
    with timed(run, "label"):
        judged, ask = Counter[str](), engines.labeller(recipe, lm, prompter, run)
        examples, validation = (
            make_examples(recipe, lm, prompter, rows.pairs[split], store, progress, judged, ask)
            for split in ("train", "validation")
        )
        retained = keep_examples(recipe, lm, prompter, store)
    if processes.leads():
        save_prompts(run, prompter, rows, [examples, validation])
    return Taught(verdict, examples, validation, retained, judged)


def whole(lm: LM, recipe: Recipe) -> LM:
    """The student with the base loaded again, for this process alone: `lm` is shared out."""
    if processes.count() == 1:
        return lm
    student = LM.load(recipe.model, recipe.base_dir)
    student.add_adapter(recipe.lora, recipe.train.seed)
    for name, parameter in student.trainable().items():
        parameter.data.copy_(lm.trainable()[name])
    student.training(False)
    student.notes = lm.notes
    return student


def conclude(
    recipe: Recipe,
    lm: LM,
    prompter: Prompter,
    rows: Data,
    run: RunDir,
    taught: Taught,
    state: State,
    progress: Progress,
) -> None:
    """Evaluate the student, and write what came out."""
    with timed(run, "evaluate"):
        result = measure(recipe, lm, prompter, rows, TargetStore.of(recipe, run.path), run, ["distilled"], progress)
    examples = taught.examples
    result["parts"] = groups.tables(prompter, rows, scores_of(run), examples)
    result |= {"gate": taught.verdict, "training": summary(recipe, lm, prompter, run, state, examples)}
    learnt = {"train": examples, "validation": taught.validation, "retained": taught.retained}
    seconds, tokens = spent(recipe, lm, prompter, run, rows.pairs, learnt, result)
    result |= {
        "cost": cost(recipe, result, seconds, tokens),
        "notes": [
            *notes(recipe, lm, prompter, rows, result["training"]),
            *acceptance(taught.judged),
            *ran(recipe, result),
            *engines.notes(run),
        ],
        "completions": dict(taught.judged),
    }
    run.write_json("evaluation.json", result)
    reports.write_card(run.path)
    reports.write_report(run.path)


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
    pairs = rows.pairs["eval"]
    if run and (run / "gate.json").exists():
        # measured before; judged again, since the recipe may now ask for less
        known = scores_of(run, evaluation.ARMS[:2])
        if all(len(scores) == len(pairs) for scores in known.values()):
            verdict = evaluation.gate_verdict(known, pairs, lm, recipe)
            run.write_json("gate.json", verdict)
            return verdict
    with contextlib.ExitStack() as stack:
        if store is None:
            store = TargetStore(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        targets = evaluation.teacher_targets(lm, prompter, pairs, recipe, store, progress)
        scores = {
            arm: evaluation.score_arm(arm, lm, prompter, pairs, targets, recipe, progress=progress)
            for arm in ("zero_shot", "in_context")
        }
    verdict = evaluation.gate_verdict(scores, pairs, lm, recipe)
    if run:
        run.write_jsonl("scores.jsonl", [score for arm in scores.values() for score in arm])
        run.write_json("gate.json", verdict)
    return verdict


def make_examples(
    recipe: Recipe,
    lm: LM,
    prompter: Prompter,
    pairs: Sequence[Pair],
    store: TargetStore,
    progress: Progress,
    judged: Counter[str] | None = None,
    ask: Ask | None = None,
) -> Sequence[Example]:
    """Ask the teacher about the queries; an `Example` for each completion that is accepted. `judged` counts the fates.

    Raises: `DataError` when none is accepted.
    """
    if not pairs:
        return []
    judged = Counter() if judged is None else judged
    made = label(lm, prompter, pairs, recipe, store, ask=ask, progress=progress)
    checker = recipe.completions.checker
    check = evaluation.load_function(checker, recipe, "completions.checker") if checker else None
    accepted, samples = array("Q"), recipe.completions.samples
    for number, (pair, target) in enumerate(
        (pair, target) for pair, targets in zip(pairs, made, strict=True) for target in targets
    ):
        fate = "accepted"
        if not target.ids:
            fate = "no answer found by completions.extract"
        elif check and not check(prompter.answer(target.ids), prompter.reference(pair.answer), pair.fields):
            fate = f"rejected by {checker}"
        judged[fate] += 1
        if fate == "accepted":
            accepted.append(number)
    if not accepted:
        raise DataError(
            "none of the teacher's completions is accepted",
            found=", ".join(f"{fate} {n}" for fate, n in judged.items()),
            fix="look at what the teacher writes to held-out rows (in_context in scores.jsonl, in the run folder), "
            "then change the pattern or the checker",
        )

    def example(number: int) -> Example:
        pair = pairs[number // samples]
        return Example(pair.id, pair.student, made[number // samples][number % samples])

    return Lazy(accepted, example)


def keep_examples(recipe: Recipe, lm: LM, prompter: Prompter, store: TargetStore) -> list[Example]:
    """Everyday prompts with what the base model says of its own answers, for `train.retain_weight`."""
    if not recipe.train.retain_weight:
        return []
    pairs = unrelated(prompter, generic.TRAINED)
    made = base_targets(lm, prompter, pairs, recipe, store, recipe.targets)
    return [Example(pair.id, pair.student, target) for pair, target in zip(pairs, made, strict=True)]


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
    scores = scores_of(run, evaluation.ARMS)
    for arm in arms:
        scores[arm] = evaluation.score_arm(arm, lm, prompter, pairs, targets, recipe, progress=progress)
    run.write_jsonl("scores.jsonl", [score for arm in scores.values() for score in arm])
    latencies = {}
    if recipe.eval.latency_rows:
        latencies = {arm: evaluation.latency(arm, lm, prompter, pairs, recipe, progress) for arm in evaluation.ARMS}
    found = evaluation.tables({k: v for k, v in scores.items() if v}, latencies, recipe.eval)
    found["behaviour"] = behaviour(recipe, lm, prompter, rows, store, progress)
    if recipe.behaviour.contexts:
        check = Check(recipe, lm, prompter, store)
        groups = groups_of(recipe, prompter, rows)
        found["crosstalk"] = matrix(dict.fromkeys(groups, check), groups, progress)
    return found


def acceptance(judged: Counter[str]) -> list[str]:
    """How many completions were accepted, where any was not."""
    asked, good = judged.total(), judged["accepted"]
    others = [f"{fate} {n}" for fate, n in judged.items() if fate != "accepted"]
    text = f"{good} of the teacher's {asked} completions were accepted ({100 * good / max(1, asked):.1f} %)"
    return [f"{text}: {', '.join(others)}"] if others else []


def ran(recipe: Recipe, result: dict[str, Any]) -> list[str]:
    """In what programs were run, where any were."""
    if not any(programs.METRIC in cells for cells in result["table"].values()):
        return []
    held = ", ".join(sandbox.isolation())
    return [f"programs were run with limits of {recipe.code.seconds:g} s and {recipe.code.memory_mb} MB behind: {held}"]


def scores_of(run: RunDir, arms: Sequence[str] = evaluation.ARMS) -> dict[str, list[evaluation.Score]]:
    """The stored scores of each of `arms`, maybe none."""
    scores = run.read_jsonl("scores.jsonl")
    return {arm: [s for s in scores if s["arm"] == arm] for arm in arms}


def save_prompts(
    run: RunDir, prompter: Prompter, rows: Data, examples: Sequence[Sequence[Example]], most: int = 200
) -> None:
    """`prompts.jsonl`: the first rows as `ctxdistill show` prints them, with the first of their completions."""
    first = most * prompter.recipe.completions.samples  # examples are in the order of the rows
    ids = {e.id: e.target.ids for some in reversed(examples) for e in reversed(some[:first])}
    flat = [(split, row, section) for split, (found, section) in rows.splits.items() for row in found[:most]][:most]
    run.write_jsonl(
        "prompts.jsonl", [prompter.shown(row, section, split, ids.get(row.id)) for split, row, section in flat]
    )


def save_adapter(lm: LM, run: RunDir) -> None:
    """`adapter/` in PEFT's format, whole or not at all."""
    beside, folder = run / ".adapter.tmp", run / "adapter"
    with writing(folder):
        shutil.rmtree(beside, ignore_errors=True)
        adapters.save(lm.peft, beside)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(beside, folder)


__all__ = [
    "Run",
    "compose",
    "demo",
    "distill",
    "evaluate",
    "gate",
    "label_rows",
    "load_student",
    "plan",
    "queries",
    "report",
    "show",
    "try_text",
]
