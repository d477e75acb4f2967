"""The ways to adapt a model that a study compares, as data.

In: nothing. Out: `ARMS`, the presets by name, and `CONTROLS`. Invariant: an arm is data, never a branch of its own: what the
teacher sees, what is trained, on which rows, towards which targets.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import model_validator

from ctxdistill.recipe import AtLeastZero, Fraction, NotNegative, Section

CONTROLS = {
    "zero_shot_teacher": "the teacher sees no demonstrations",
    "shuffled_labels": "the demonstrations' labels are shuffled among them",
    "irrelevant_context": "the teacher sees the demonstrations of another task",
}
"""What an arm is compared with to tell what the context taught from what training on soft labels does by itself."""


class Arm(Section):
    """One way to adapt a model to a task."""

    label: str = ""
    """Its name in tables. Empty: the arm's key."""
    about: str = ""
    """What it is, in one sentence."""
    family: Literal["baseline", "prompt", "finetune", "distill", "control"] = "distill"
    """Where it stands in tables."""
    trains: Literal["nothing", "lora", "full", "head"] = "lora"
    """What is trained: nothing, a LoRA adapter, all weights, or all weights with a classification head in place of the
    language model's."""
    context: Literal["none", "one", "many"] = "one"
    """The demonstrations that the teacher sees (for arms that train nothing: the model itself): none, the n of the
    demonstration set, or `grid.contexts` sets of n each, whose distributions are averaged. With true labels as targets
    there is no teacher: `none` learns from the n, `many` from the demonstrations of all contexts."""
    targets: Literal["teacher", "teacher_label", "gold"] = "teacher"
    """What is learned: the teacher's distribution, the label that it prefers (as if it were the truth), or the true
    labels of the demonstrations."""
    combine: Literal["mixture", "each"] = "mixture"
    """With many contexts and nothing trained: answer from the averaged distribution, or report the mean over contexts of
    answering with one."""
    calibration: Literal["none", "content_free", "queries", "demonstrations"] = "none"
    """Label probabilities are divided by those that the context suggests by itself: on `content_free` queries (contextual
    calibration, Zhao et al. 2021, "Calibrate Before Use"), or their mean over the training `queries` (batch calibration,
    Zhou et al. 2023), which assumes that the labels are about equally frequent. Or a slope and a bias for each label are
    fitted for each context on the labelled `demonstrations` of the other contexts (Platt scaling); needs many contexts."""
    demos_weight: AtLeastZero = 0.0
    """Distillation with this many parts of cross-entropy on the true labels of the demonstrations that the teacher sees
    for one part of queries: they are repeated among the queries until their share is about that large. Each is there at least
    once: where the demonstrations alone are more than that share (8 contexts of 16 are as many as 128 queries), they weigh more."""
    label_weight: Fraction | None = None
    """In place of the study's `label_weight`."""
    student_demos: NotNegative = 0
    """The student keeps the last so many demonstrations in its prompt."""
    teacher: Literal["self", "bigger"] = "self"
    """Who teaches: the model itself, or the study's `model.teacher`."""
    queries: NotNegative = 0
    """Training queries; 0: the grid's."""
    train: dict[str, Any] = {}
    """Values in place of the study's `train` section (or `finetune`, for true labels)."""
    lora: dict[str, Any] = {}
    """Values in place of the study's `lora` section."""
    control: str = ""
    """One of the controls; written `NAME+CONTROL` in `grid.arms`."""
    control_of: str | None = None
    """The arm that a control is the control of."""

    @model_validator(mode="after")
    def _consistent(self) -> Arm:
        problems = []
        if self.targets == "gold" and (self.context == "one" or self.demos_weight or self.calibration != "none"):
            problems.append(
                'targets = "gold" learns from the demonstrations themselves, those of the set (context = "none") or of all '
                'contexts ("many"), without a teacher'
            )
        if self.calibration == "demonstrations" and self.context == "one":
            problems.append('calibration = "demonstrations" takes those of the other contexts: context must be "many"')
        if self.trains == "nothing" and self.context == "none" and self.calibration in ("queries", "demonstrations"):
            problems.append(
                "without demonstrations and training there are no rows of the training set: the one calibration that needs "
                'none is "content_free"'
            )
        if self.trains == "head" and self.targets != "gold":
            problems.append('trains = "head" has classes and no vocabulary: targets must be "gold"')
        if self.teacher == "bigger" and (self.trains == "nothing" or self.targets == "gold"):
            problems.append('teacher = "bigger" needs an arm that learns from a teacher')
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _presets() -> dict[str, Arm]:
    demos, many = "the n demonstrations in the prompt", "several sets of n demonstrations, averaged"
    arms = {
        "zero_shot": Arm(label="zero-shot", family="baseline", trains="nothing", context="none", about="no demonstrations"),
        "in_context": Arm(label="in-context", family="prompt", trains="nothing", about=demos),
        "in_context_calibrated": Arm(
            label="in-context, calibrated", family="prompt", trains="nothing", calibration="content_free",
            about=f"{demos}, label probabilities divided by those of content-free queries",
        ),
        "in_context_mean": Arm(
            label="in-context, mean of sets", family="prompt", trains="nothing", context="many", combine="each",
            about="what one set of n demonstrations scores on average over the sets that the many-context arms use",
        ),
        "in_context_many_calibrated": Arm(
            label="in-context, sets averaged, calibrated", family="prompt", trains="nothing", context="many",
            calibration="demonstrations",
            about=f"{many}, each calibrated on the other sets' demonstrations: what teaches the calibrated students",
        ),
        "in_context_many": Arm(
            label="in-context, sets averaged", family="prompt", trains="nothing", context="many",
            about=f"{many}: as many times the cost per request as there are sets",
        ),
        "ft_full": Arm(
            label="fine-tuned, all weights", family="finetune", trains="full", context="none", targets="gold",
            about="pattern-based fine-tuning of all weights on the n demonstrations",
        ),
        "ft_lora": Arm(
            label="fine-tuned, LoRA", family="finetune", context="none", targets="gold",
            about="pattern-based fine-tuning of a LoRA adapter on the n demonstrations",
        ),
        "ft_head": Arm(
            label="fine-tuned, class head", family="finetune", trains="head", context="none", targets="gold",
            about="all weights and a new classification head, trained on the n demonstrations",
        ),
        "ft_lora_many": Arm(
            label="fine-tuned, LoRA, all demonstrations", family="finetune", context="many", targets="gold",
            train={"epochs": 8},  # more rows in an epoch than one set has
            about="a LoRA adapter fine-tuned on the demonstrations of all contexts: the labels that many contexts need",
        ),
        "cd_one": Arm(label="distilled, one context", about=f"LoRA student of the teacher with {demos}"),
        "cd_many": Arm(label="distilled, many contexts", context="many", about=f"LoRA student of the teacher with {many}"),
        "cd_calibrated": Arm(
            label="distilled, calibrated teacher", calibration="content_free", about="as one context, the teacher calibrated"
        ),
        "cd_many_calibrated": Arm(
            label="distilled, many contexts, calibrated", context="many", calibration="demonstrations",
            about="as many contexts, each teacher calibrated on the other contexts' demonstrations before averaging",
        ),
        "cd_many_ce": Arm(
            label="distilled, many contexts, with true labels", context="many", calibration="demonstrations",
            demos_weight=0.5,
            about="as many contexts, calibrated, with cross-entropy on all their demonstrations mixed in",
        ),
        "cd_ce": Arm(
            label="distilled, with true labels", demos_weight=0.25,
            about="as one context, with cross-entropy on the demonstrations mixed in",
        ),
        "cd_small_context": Arm(
            label="distilled, keeps 2 demonstrations", student_demos=2,
            about="as one context, the student keeps the last two demonstrations in its prompt",
        ),
        "kd_bigger": Arm(
            label="bigger teacher, no context", context="none", teacher="bigger",
            about="knowledge distillation: a bigger model without demonstrations teaches",
        ),
        "cd_bigger": Arm(
            label="bigger teacher, one context", teacher="bigger", about="a bigger model with the n demonstrations teaches"
        ),
    }  # fmt: skip
    # The paper leaves the ablation of LoRA x knowledge x context for later (section 6): all eight corners of that cube.
    cube = itertools.product(
        (("lora", "LoRA"), ("full", "all weights")),
        (
            ("soft", "teacher", "the teacher's distribution"),
            ("hard", "teacher_label", "the label that the teacher prefers"),
        ),
        (("context", "one", "teacher with context"), ("none", "none", "teacher without context")),
    )
    for (trains, trained), (soft, targets, learned), (seen, context, taught) in cube:
        about = f"ablation: {trained}, {learned}, {taught}"
        values = {"label": f"{trained}, {soft}, {taught}", "about": about, "trains": trains, "targets": targets}
        arms[f"ab_{trains}_{soft}_{seen}"] = Arm.model_validate({**values, "context": context})
    return arms


ARMS: Mapping[str, Arm] = _presets()
