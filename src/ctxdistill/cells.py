"""One cell of a study: one arm on one demonstration set, measured on all evaluation sets.

In: a `Bench`, which holds what the cells of a demonstration set share (model, rows, what the teacher said), and an `Arm`.
Out: one score per evaluation row and the cell's record. Invariants: every arm is made by the same few stages, prompts ->
teacher targets -> `train.train` -> label scores; few-shot fine-tuning differs from distillation by its targets alone;
afterwards the model is as it was before; a context that does not fit is a `FitError` before anything is computed.

Dimensions: N rows, L labels, K contexts, T positions of an answer, V vocabulary, d hidden size.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from ctxdistill.accounts import Peak, forward_flops, training_flops
from ctxdistill.arms import Arm
from ctxdistill.draws import Draw
from ctxdistill.errors import DataError
from ctxdistill.grid import Study
from ctxdistill.lm import LM, check_fit, common_prefix
from ctxdistill.objective import Example
from ctxdistill.prompts import Context, Pair, Prompter, join
from ctxdistill.recipe import DataSection, Recipe
from ctxdistill.rows import Row
from ctxdistill.rundir import Progress, RunDir, no_progress
from ctxdistill.targets import LabelScores, point_mass, score_labels
from ctxdistill.tasks import Pattern, Task
from ctxdistill.teachers import Calibration, Prompts, Reading, average, fitted, teach
from ctxdistill.train import State, train

CONTENT_FREE = ("N/A", "[MASK]", "")
"""Queries without content (Zhao et al. 2021, section 5)."""
NOTHING = Context(None, (), ())
"""No demonstrations."""
SECTION = DataSection(data="queries.jsonl")
Score = dict[str, Any]
FIT = "lower grid.demos, raise model.window where the study sets it, or take a model with a larger window"


@dataclass
class Bench:
    """What the cells of one model, task, number of demonstrations and demonstration set share."""

    study: Study
    lm: LM
    task: Task
    pattern: Pattern
    draw: Draw
    evaluation: dict[str, list[Row]]
    """Set name -> rows; the in-domain set first."""
    seed: int
    teacher: LM | None = None
    """The bigger model, where an arm asks for one."""
    irrelevant: tuple[tuple[Pattern, tuple[Row, ...]], ...] = ()
    """Demonstrations of another task, one set for each context, for the control."""
    after_training: Callable[[LM], dict[str, Any]] | None = None
    """What else to measure on each trained arm."""
    seen: dict[Any, tuple[Prompter, Prompts, LabelScores]] = field(default_factory=dict)
    """What was read already, by what it depends on."""

    # -- prompts ------------------------------------------------------------------------------------------------------

    def prompter(self, context: Context, *, student_demos: int = 0, where: str = "", lm: LM | None = None) -> Prompter:
        """Prompts with `context`, whose demonstrations are in-domain rows, and queries as the set `where` is written."""
        raw = {
            "model": {"name": self.lm.info["name"]},
            "prompt": self.pattern.section(where).model_dump() | {"shared_first_token": "allow"},
            "context": {"demos": "demos.jsonl", "student_demos": student_demos},
            "queries": {"data": "queries.jsonl"},
            "completions": {"source": "label", "supervise_end": False},
        }
        tokenizer = (lm or self.lm).tokenizer
        return Prompter(Recipe.from_dict(raw), tokenizer, context, demo_pattern=self.pattern.pattern)

    def student_prompter(self, arm: Arm, where: str = "") -> Prompter:
        """Prompts of the student: without a context, or with the last few demonstrations of the set."""
        context = Context(None, (), self.labelled(arm)[0])
        return self.prompter(context, student_demos=arm.student_demos, where=where)

    def contexts(self, arm: Arm) -> list[Context]:
        """What the teacher of `arm` sees (for an arm without training: the model itself); one or more."""
        if arm.context == "none":
            return [NOTHING]
        chosen = self.draw.contexts if arm.context == "many" else self.draw.contexts[:1]
        if arm.control == "irrelevant_context":
            return [Context(rendered(pattern, demos), (), ()) for pattern, demos in self.irrelevant[: len(chosen)]]
        return [Context(None, (), demos) for demos in self.labelled(arm)[: len(chosen)]]

    def labelled(self, arm: Arm) -> list[tuple[Row, ...]]:
        """The demonstrations of all contexts, each set with its answers: the true label words, or those of the control."""
        sets = []
        for number, demos in enumerate(self.draw.contexts):
            words = [self.pattern.words[row.fields["label"]] for row in demos]
            if arm.control == "shuffled_labels":
                words = [words[i] for i in np.random.default_rng([self.seed, number]).permutation(len(words))]
            sets.append(tuple(answered(r, w) for r, w in zip(demos, words, strict=True)))
        return sets

    def demonstrations(self, arm: Arm) -> tuple[Row, ...]:
        """Those whose answers `arm` may learn from: of the set, or of all contexts."""
        sets = self.labelled(arm)
        return tuple(row for demos in (sets if arm.context == "many" else sets[:1]) for row in demos)

    def queries(self, arm: Arm) -> tuple[Row, ...]:
        """The unlabelled rows that `arm` learns from."""
        return self.draw.queries[: arm.queries or self.study.grid.queries]

    def pairs(self, prompter: Prompter, rows: Sequence[Row]) -> list[Pair]:
        return [prompter.pair(row, SECTION) for row in rows]

    # -- label scores -------------------------------------------------------------------------------------------------

    def scores(self, prompter: Prompter, prompts: Sequence[Sequence[int]], lm: LM) -> LabelScores:
        """Label scores of the model as it is, shortest prompts first to pad little."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        some = [prompts[i] for i in order]
        room = max(map(len, prompter.labels.values()))
        lengths = [(self.task.name, len(p) + room) for p in some]
        check_fit(lengths, lm.window, "a prompt of demonstrations, query and answer", FIT)
        with torch.no_grad():
            found = score_labels(
                lm, some, prompter.labels, prefix=lm.prefix(some), batch_size=self.study.eval.batch_size
            )
        back = torch.from_numpy(np.argsort(order))
        return LabelScores(found.logprobs[back], found.first[back])

    def readings(self, arm: Arm, rows: Sequence[Row], where: str) -> list[Reading]:
        """What the frozen model (or the bigger teacher) says on `rows` with each context of `arm`."""
        lm = self.lm if arm.teacher == "self" else self.bigger
        return [
            Reading(*self.read(context, rows, where, lm), self.calibration(arm, number, context, lm))
            for number, context in enumerate(self.contexts(arm))
        ]

    def read(self, context: Context, rows: Sequence[Row], where: str, lm: LM) -> tuple[Prompter, Prompts, LabelScores]:
        """Prompts with `context` and their label scores, computed once for all arms: `where` and their number say which
        rows they are, since fewer queries are the beginning of more."""
        prompter = self.prompter(context, where=where, lm=lm)
        key = (id(lm), where, len(rows), prompter.fingerprint)
        if key not in self.seen:
            # without a context the teacher reads what the student reads
            prompts = [p.student if context is NOTHING else p.teacher for p in self.pairs(prompter, rows)]
            with lm.adapter(False):
                self.seen[key] = (prompter, prompts, self.scores(prompter, prompts, lm))
        return self.seen[key]

    @property
    def bigger(self) -> LM:
        if self.teacher is None:
            raise RuntimeError("no bigger teacher was loaded")  # a bug, not the user's
        return self.teacher

    def calibration(self, arm: Arm, number: int, context: Context, lm: LM) -> Calibration | None:
        """How the label probabilities under context `number` of `arm` are put right."""
        if arm.calibration == "none":
            return None
        rows = self.calibration_rows(arm, number)
        prompter, _, scores = self.read(context, rows, arm.calibration, lm)
        if arm.calibration == "demonstrations":
            words = list(prompter.labels)
            return fitted(scores.logprobs, torch.tensor([words.index(row.fields["answer"]) for row in rows]))
        return Calibration(1.0, -average(list(scores.logprobs.log_softmax(1))))

    def calibration_rows(self, arm: Arm, number: int) -> Sequence[Row]:
        """What context `number` of `arm` is calibrated on; no demonstration that it holds itself (contexts share some where
        together they are more than there are rows).

        Raises: `DataError` when all demonstrations are its own.
        """
        if arm.calibration == "demonstrations":
            sets = self.labelled(arm)
            own = set() if arm.context == "none" else {row.id for row in sets[number]}
            if rows := [row for demos in sets for row in demos if row.id not in own]:
                return rows
            raise DataError(
                f"no demonstrations of other contexts are left to calibrate context {number} on",
                expected="contexts with other rows",
                found=f"{len(sets)} contexts with the same {len(own)} rows",
                fix="lower grid.demos, give more rows, or leave the calibrated arms out",
            )
        if arm.calibration == "content_free":
            fields = [dict.fromkeys(("text", "text1", "text2"), text) for text in CONTENT_FREE]
            return [Row(id="", fields=f, origin="a query without content") for f in fields]
        return self.queries(arm) if arm.calibration == "queries" else ()


# -- arms -------------------------------------------------------------------------------------------------------------


def examples(bench: Bench, arm: Arm) -> tuple[list[Example], Prompter, float | None]:
    """What the student of `arm` learns from, how it is prompted, and the teacher's accuracy on the queries."""
    prompter = bench.student_prompter(arm)
    labels, vocabulary = prompter.labels, bench.lm.model.get_output_embeddings().weight.shape[0]
    true = []
    shown = bench.demonstrations(arm) if arm.targets == "gold" or arm.demos_weight else ()
    for row, pair in zip(shown, bench.pairs(prompter, shown), strict=True):
        word = row.fields["answer"]
        one_class = arm.trains == "head"
        target = (
            point_mass((list(labels).index(word),), len(labels)) if one_class else point_mass(labels[word], vocabulary)
        )
        true.append(Example(row.id, pair.student, target))
    if arm.targets == "gold":
        return true, prompter, None
    queries = bench.queries(arm)
    readings = bench.readings(arm, queries, "queries")
    lm = bench.lm if arm.teacher == "self" else bench.bigger
    targets = teach(
        readings,
        lm,
        soft=arm.targets == "teacher",
        batch_size=bench.study.eval.batch_size,
        label_weight=bench.study.weight(arm),
    )
    found = [Example(p.id, p.student, t) for p, t in zip(bench.pairs(prompter, queries), targets, strict=True)]
    if arm.demos_weight:
        found += true * max(1, round(arm.demos_weight * len(found) / len(true)))
    return found, prompter, float(np.mean([s[bench.study.eval.main] for s in judge(bench, queries, readings, lm)]))


def judge(bench: Bench, rows: Sequence[Row], readings: Sequence[Reading], lm: LM, *, each: bool = False) -> list[Score]:
    """Scores of N rows from the mixture of all readings; with `each`, the mean over readings of their scores, which have no
    one prediction."""
    if each and len(readings) > 1:
        single = [judge(bench, rows, [reading], lm) for reading in readings]
        means = [
            {key: float(np.mean([score[key] for score in same])) for key in ("correct", "exact")}
            for same in zip(*single, strict=True)
        ]
        return [{**first, **mean, "prediction": None} for first, mean in zip(single[0], means, strict=True)]
    words = bench.pattern.words
    names, labels = list(words), [readings[0].prompter.labels[word] for word in words.values()]
    predicted = average([r.answers for r in readings]).argmax(1).tolist()
    greedy: Sequence[int | None] = [None] * len(rows)  # a classification head has no vocabulary to be greedy over
    if lm.classes is None:
        greedy = [
            token for some in torch.split(torch.arange(len(rows)), 64) for token in most_probable(readings, lm, some)
        ]
    return [
        {
            "row": row.id, "label": row.fields["label"], "prediction": names[i],
            "correct": float(names[i] == row.fields["label"]),
            "exact": None if token is None else float(token == labels[names.index(row.fields["label"])][0]),
        }
        for row, i, token in zip(rows, predicted, greedy, strict=True)
    ]  # fmt: skip


@torch.no_grad()
def most_probable(readings: Sequence[Reading], lm: LM, rows: torch.Tensor) -> list[int]:
    """The token that the mixture of the readings finds most probable after the prompt of each of `rows`."""
    logprobs = [lm.head(r.scores.first[rows].to(lm.device)).log_softmax(-1).cpu() for r in readings]  # K of [rows, V]
    return average(logprobs).argmax(1).tolist()


def run_cell(
    bench: Bench, arm: Arm, run: RunDir, progress: Progress = no_progress
) -> tuple[dict[str, Any], list[Score]]:
    """One arm: train it if it is trained, score it on every evaluation set. Returns the cell's record and its scores.

    Raises: `FitError` when a prompt does not fit; `TrainError`; `DataError`.
    """
    started = time.perf_counter()
    with Peak(bench.lm.device) as peak:
        if arm.trains == "nothing":
            scores = []
            for where, rows in bench.evaluation.items():
                found = judge(bench, rows, bench.readings(arm, rows, where), bench.lm, each=arm.combine == "each")
                scores += [{"set": where, **score} for score in found]
            record: dict[str, Any] = {"teacher": None, "training": None, "cost": prompt_cost(bench, arm)}
        else:
            record, scores = trained(bench, arm, run, progress)
    record["cost"] |= {"seconds": time.perf_counter() - started, "peak_mb": peak.mb}
    return record, scores


def trained(bench: Bench, arm: Arm, run: RunDir, progress: Progress) -> tuple[dict[str, Any], list[Score]]:
    """A trained arm: examples, training, scores; the weights are afterwards as before."""
    study, lm = bench.study, bench.lm
    made, prompter, teacher = examples(bench, arm)
    section = study.training(arm, bench.seed)
    with contextlib.ExitStack() as stack:
        if arm.trains == "lora":
            lm.add_adapter(study.adapter(arm), section.seed)
            stack.callback(lm.remove_adapter)
        else:
            stack.enter_context(lm.all_weights(len(bench.pattern.words) if arm.trains == "head" else 0, section.seed))
        state = train(lm, made, [], section, run, progress=progress)
        record = {"teacher": None if teacher is None else {"accuracy": teacher, "rows": len(bench.queries(arm))}}
        record |= {"training": losses_of(run, state), "cost": training_cost(bench, arm, made, prompter, state)}
        lm.training(study.eval.dropout)  # on in the authors' procedure alone
        scores = []
        for where, rows in bench.evaluation.items():
            scores += [{"set": where, **score} for score in student_scores(bench, arm, rows, where)]
        lm.training(False)
        if bench.after_training is not None:
            record["retention"] = bench.after_training(lm)
    return record, scores


def student_scores(bench: Bench, arm: Arm, rows: Sequence[Row], where: str) -> list[Score]:
    """The student's scores on the rows of an evaluation set."""
    lm = bench.lm
    prompter = bench.student_prompter(arm, where)
    prompts = [p.student for p in bench.pairs(prompter, rows)]
    with lm.adapter(True):
        if lm.classes is None:
            found = bench.scores(prompter, prompts, lm)
        else:
            one: dict[str, tuple[int, ...]] = {
                word: (i,) for i, word in enumerate(prompter.labels)
            }  # a class is a vocabulary of its own
            with torch.no_grad():
                found = score_labels(lm, prompts, one, prefix=None, batch_size=bench.study.eval.batch_size)
        return judge(bench, rows, [Reading(prompter, prompts, found)], lm)


# -- costs ------------------------------------------------------------------------------------------------------------


def losses_of(run: RunDir, state: State) -> dict[str, Any]:
    """How training went."""
    losses = [line["loss"] for line in run.lines("metrics.jsonl") if line["event"] == "step"]
    return {"steps": state.step, "loss_first": losses[0], "loss_last": losses[-1]}


def prompt_cost(bench: Bench, arm: Arm) -> dict[str, Any]:
    """What a request costs with an arm that trains nothing: it reads its contexts each time."""
    where, rows = next(iter(bench.evaluation.items()))
    readings = bench.readings(arm, rows, where)
    lengths = [len(prompt) for reading in readings for prompt in reading.prompts]
    shown = len(readings) if arm.combine == "mixture" else 1
    flops = forward_flops(bench.lm, round(float(np.mean(lengths))), projected=1) * shown
    return {
        "labelled": len({r.id for c in bench.contexts(arm)[:shown] for r in c.demos}),
        "unlabelled": len(bench.queries(arm)) if arm.calibration == "queries" else 0,
        "trained_tokens": 0, "teacher_flops": 0.0, "train_flops": 0.0, "request_flops": flops, "trainable": 0,
        "adapter_bytes": 0, "prompt_tokens": float(np.mean(lengths)) * shown,
        "latency_ms": latency(bench, readings[0].prompter, [r.prompts for r in readings][:shown], on=False),
    }  # fmt: skip


def training_cost(bench: Bench, arm: Arm, made: Sequence[Example], prompter: Prompter, state: State) -> dict[str, Any]:
    """What an arm took to train, and what a request costs with it."""
    lm, study = bench.lm, bench.study
    epochs = study.training(arm, bench.seed).epochs
    classes = len(prompter.labels) if arm.trains == "head" else 0
    lengths = [len(e.prompt) + len(e.target.ids) - 1 for e in made]
    kind: Literal["lora", "full"] = "lora" if arm.trains == "lora" else "full"
    shapes = Counter((n, len(e.target.ids)) for n, e in zip(lengths, made, strict=True))
    per_epoch = sum(count * training_flops(lm, *shape, kind, classes=classes) for shape, count in shapes.items())
    parameters = list(lm.trainable().values())
    contexts = bench.contexts(arm)
    teacher = 0.0
    if arm.targets != "gold":
        who = lm if arm.teacher == "self" else bench.bigger
        for number, reading in enumerate(bench.readings(arm, bench.queries(arm), "queries")):
            asked = [*reading.prompts]
            if arm.calibration not in ("none", "queries"):  # the queries are read anyhow
                judged = bench.calibration_rows(arm, number)
                asked += bench.read(contexts[number], judged, arm.calibration, who)[1]
            shared = len(common_prefix(asked)) if who.can_share and len(asked) > 1 else 0
            rest = Counter(len(p) - shared for p in asked)
            teacher += forward_flops(who, shared)
            teacher += sum(count * forward_flops(who, n, shared, projected=1) for n, count in rest.items())
    where, rows = next(iter(bench.evaluation.items()))
    student = bench.student_prompter(arm, where)
    prompts = [p.student for p in bench.pairs(student, rows)]
    mean = float(np.mean([len(p) for p in prompts]))
    shown: Sequence[Row] = bench.demonstrations(arm) if arm.targets == "gold" or arm.demos_weight else ()
    if arm.calibration == "demonstrations":
        shown = [row for demos in bench.labelled(arm) for row in demos]
    return {
        "labelled": len({r.id for c in contexts for r in c.demos} | {r.id for r in shown}),
        "unlabelled": 0 if arm.targets == "gold" else len(bench.queries(arm)),
        "trained_tokens": sum(lengths) * epochs, "teacher_flops": teacher, "train_flops": per_epoch * epochs,
        "request_flops": forward_flops(lm, round(mean), projected=1, classes=classes), "prompt_tokens": mean,
        "trainable": sum(p.numel() for p in parameters), "parameters": lm.info["parameters"],
        "adapter_bytes": sum(p.numel() * p.element_size() for p in parameters),
        "latency_ms": latency(bench, student, [prompts], on=True),
    }  # fmt: skip


def latency(bench: Bench, prompter: Prompter, prompts: Sequence[Sequence[Sequence[int]]], *, on: bool) -> float | None:
    """Milliseconds per request, one at a time, the whole prompt read each time; `prompts` by context and row."""
    count = min(bench.study.eval.latency_rows, len(prompts[0]))
    times = []
    with torch.no_grad(), bench.lm.adapter(on):
        for row in [0, *range(count)]:  # the first one warms up
            started = time.perf_counter()
            for context in prompts:
                bench.lm.head(bench.lm.hidden([join(context[row], (0,))])[0])
            times.append(1000 * (time.perf_counter() - started))
    return float(np.median(times[1:])) if count else None


# -- rows -------------------------------------------------------------------------------------------------------------


def answered(row: Row, word: str) -> Row:
    """A demonstration: the row with the word that answers it."""
    return Row(row.id, {**row.fields, "answer": word}, row.origin)


def rendered(pattern: Pattern, demos: Sequence[Row]) -> str:
    """Demonstrations of a task as plain text."""
    return pattern.separator.join(pattern.demonstration(row) for row in demos)
