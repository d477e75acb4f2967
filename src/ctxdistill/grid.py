"""A study file becomes a checked grid: models x tasks x numbers of demonstrations x demonstration sets x arms.

In: a TOML file plus `key=value` overrides. Out: a frozen `Study`, and its `Cell`s in the order in which they run.
Invariants: every arm of a demonstration set sees the same demonstrations, queries and evaluation rows; a cell's id depends
on what it is and not on what else the grid holds, so that a grown grid keeps its finished cells.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from ctxdistill.arms import ARMS, CONTROLS, Arm
from ctxdistill.errors import RecipeError, several
from ctxdistill.recipe import (
    AboveZero,
    FolderName,
    Fraction,
    LoraSection,
    NotNegative,
    Positive,
    Section,
    TrainSection,
    nearest,
    problem_of,
    read_toml,
)
from ctxdistill.rundir import fingerprint
from ctxdistill.tasks import TASKS

UNUSED = (
    "on_policy", "on_policy_ramp", "on_policy_temperature", "round_steps", "retain_weight", "validation", "patience", "shard",
)  # fmt: skip
"""Keys of a recipe's `train` that a study does not use: its students learn from all their queries, the teacher's answers alone."""


OneOrMore = BeforeValidator(lambda value: value if isinstance(value, list) else [value])
"""For a list that may be written as its one value."""


class ModelsSection(Section):
    """The models of the study."""

    names: Annotated[list[str], OneOrMore, Field(min_length=1)]
    """Hub ids, folders or `.gguf` files, as `model.name` of a recipe. One name, as one value of any list of `grid`, needs no
    brackets: `model.names=PATH`."""
    teacher: str | None = None
    """A bigger model with the same tokenizer, for the arms that are taught by one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights, as in a recipe."""
    device: str = "auto"
    """Device, as in a recipe."""
    window: NotNegative = 0
    """Longest sequence in tokens, where it shall be shorter than the model's own; 0: the model's."""
    dropout: bool = False
    """Keep the model's own dropout while it trains and, with `eval.dropout`, while it is measured."""


class TasksSection(Section):
    """The tasks and where their rows are."""

    names: Annotated[list[str], OneOrMore, Field(min_length=1)]
    """Any of the tasks that `ctxdistill study --tasks` lists."""
    root: str | None = None
    """A folder with the data sets (relative to the study file; layout in docs/studies.md). Unset: from the hub."""
    pattern: str | None = None
    """The prompt pattern, such as `paper`, `minimal`, `gpt-3`, `eval-harness`. Unset, and for tasks that do not have it:
    the task's default."""
    ood: list[str] | None = None
    """Names of the out-of-domain sets to measure. Unset: each task's default ones; []: none."""


class GridSection(Section):
    """What is crossed with what."""

    demos: Annotated[list[Positive], OneOrMore, Field(min_length=1)] = [16]
    """Numbers of demonstrations."""
    sets: Annotated[list[NotNegative], OneOrMore, Field(min_length=1)] = [0, 1, 2]
    """Seeds; each draws its own demonstrations and queries."""
    contexts: Positive = 8
    """Demonstration sets behind the arms with many contexts (the first one is that of the one-context arms)."""
    queries: Positive = 128
    """Training queries without labels."""
    arms: Annotated[list[str], OneOrMore, Field(min_length=1)] = [
        "zero_shot",
        "in_context",
        "ft_lora",
        "cd_one",
        "cd_many",
    ]
    """Arms by name; `NAME+CONTROL` adds a control to one that learns from a teacher."""
    draw: Literal["clean", "paper"] = "clean"
    """How rows are drawn: `clean`, or `paper` as the authors' code does (docs/paper.md)."""


class MeasureSection(Section):
    """How arms are measured."""

    rows: NotNegative = 0
    """In-domain rows; 0: all."""
    ood_rows: NotNegative = 0
    """Rows of each out-of-domain set; 0: all."""
    choose: Literal["random", "paper"] = "random"
    """Which rows, where there are more: drawn once for all arms and sets; or as the authors' code does, the first ones
    (HANS: shuffled by the seed of the demonstration set plus one)."""
    main: Literal["correct", "exact"] = "correct"
    """What counts as right: the label with the highest probability, or the most probable next token being the label word
    (the authors' rule)."""
    dropout: bool = False
    """Measure students with dropout on, as the authors' code does."""
    batch_size: Positive = 32
    """Rows per forward pass."""
    latency_rows: NotNegative = 5
    """Rows on which the time of a single request is measured; 0 skips it."""


class RetentionSection(Section):
    """What training did to everything else."""

    texts: NotNegative = 0
    """Rows of unrelated text (GSM8K) whose perplexity is measured before and after; 0 skips it."""
    formats: NotNegative = 0
    """Instructions of IFEval that a program can check, answered before and after; 0 skips it."""
    programs: NotNegative = 0
    """Problems of MBPP's test set that the model writes programs for, before and after (pass@1); 0 skips it. Needs `run_code`."""
    run_code: bool = False
    """Run these programs, in a sandbox (what that protects from, and what not, is in howto-code.md). Off unless you say so."""
    sets: Positive = 1
    """On how many demonstration sets formats and programs are measured (they are slow)."""


class Study(Section):
    """Everything that a study depends on."""

    name: FolderName = ""
    """A name for the page and the folder in `runs/`: no path. Empty: the file's name."""
    model: ModelsSection
    tasks: TasksSection
    grid: GridSection = GridSection()
    train: TrainSection = TrainSection(epochs=4, lr=1e-3, batch_size=8, validation=0.0, checkpoint_every=0)
    """Training of the distilled arms; keys as in a recipe's `train`, but for those of on-policy training, `retain_weight`,
    `validation`, `patience` and `shard`, which a study does not use."""
    finetune: TrainSection = TrainSection(epochs=20, lr=5e-4, batch_size=8, validation=0.0, checkpoint_every=0)
    """Training of the arms with true labels."""
    full_lr: AboveZero = 1e-5
    """Learning rate where all weights are trained, which is in float32, whatever type they have else."""
    label_weight: Fraction = 1.0
    """Weight of the label words in what a teacher teaches: with 1 they share all probability of the target, with 0 it is the
    teacher's distribution over the whole vocabulary, most of whose divergence is form and not which label it is."""
    lora: LoraSection = LoraSection()
    eval: MeasureSection = MeasureSection()
    retention: RetentionSection = RetentionSection()
    arms: dict[str, dict[str, Any]] = {}
    """Arms of your own: `[arms.NAME]` with `like = "PRESET"` and the values to change."""
    base_dir: Path = Field(default=Path("."), exclude=True)

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Study:
        """Read `path` (a `.toml` study) and apply `section.key=value` overrides.

        Raises: `RecipeError` that lists every problem at once.
        """
        raw = read_toml(path, overrides, start="copy one of recipes/, or see docs/study.md", what="study")
        if {"context", "queries"} & raw.keys():
            raise RecipeError(f"{path} is a recipe and not a study", fix=f"ctxdistill distill {shlex.quote(str(path))}")
        return cls.from_dict(raw, Path(path).resolve().parent)

    @classmethod
    def from_dict(cls, raw: dict[str, Any], base_dir: str | Path = ".") -> Study:
        """A study from nested dicts. Relative paths start at `base_dir`."""
        raw = dict(raw)
        for name in ("train", "finetune"):  # a table in the file changes single values of the study's own defaults
            raw[name] = {**cls.model_fields[name].default.model_dump(), **raw.get(name, {})}
        try:
            return cls.model_validate({**raw, "base_dir": Path(base_dir)})
        except ValidationError as error:
            lines = [line for e in error.errors() for line in problem_of(dict(e), cls).split("\n")]
            raise several(RecipeError, "study", lines, fix="docs/study.md lists all keys") from None

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        problems = [
            f"tasks.names: unknown task {name!r}{nearest(name, set(TASKS))}"
            for name in self.tasks.names
            if name not in TASKS
        ]
        known = {name for task in self.tasks.names if task in TASKS for name in TASKS[task].patterns}
        if self.tasks.pattern is not None and self.tasks.pattern not in known:
            problems.append(
                f"tasks.pattern: no task here has the pattern {self.tasks.pattern!r}{nearest(self.tasks.pattern, known)}"
            )
        sets = {o for task in self.tasks.names if task in TASKS for o in (*TASKS[task].ood, *TASKS[task].extra_ood)}
        problems += [
            f"tasks.ood: no task here has the set {name!r}{nearest(name, sets)}"
            for name in self.tasks.ood or []
            if name not in sets
        ]
        labels = [model_label(name) for name in self.model.names]
        if len(set(labels)) != len(labels):
            problems.append(f"model.names: the last parts name the cells and must differ, found {', '.join(labels)}")
        arms = {}
        for name in self.grid.arms:
            try:
                arms[name] = self.arm(name)
            except RecipeError as error:
                problems.append(f"grid.arms: {error.message}")
                continue
            for key, cls, made in (
                ("train", TrainSection, partial(self.training, seed=0)),
                ("lora", LoraSection, self.adapter),
            ):
                try:
                    made(arms[name])
                except ValidationError as error:
                    where = f"arms.{name.partition('+')[0]}.{key}"
                    problems += [f"{where}.{problem_of(dict(found), cls)}" for found in error.errors()]
        if any(arm.teacher == "bigger" for arm in arms.values()) and not self.model.teacher:
            problems.append("model.teacher: missing; an arm is taught by a bigger model")
        if self.grid.contexts < 2 and any(arm.calibration == "demonstrations" for arm in arms.values()):
            problems.append(
                'grid.contexts: calibration = "demonstrations" judges each context by those of the others; expected 2 or '
                f"more, found {self.grid.contexts}"
            )
        if any(arm.control == "irrelevant_context" for arm in arms.values()) and len(self.tasks.names) < 2:
            problems.append(
                "the control irrelevant_context takes the demonstrations of another task: name two tasks or more"
            )
        given = {"train": self.train.model_dump(), "finetune": self.finetune.model_dump()}
        given |= {f"arms.{name.partition('+')[0]}.train": arm.train for name, arm in arms.items()}
        usual = Study.model_fields["train"].default.model_dump()
        problems += [
            f"{where}.{key}: a study does not use it; leave it out"
            for where, values in given.items()
            for key in UNUSED
            if values.get(key, usual[key]) != usual[key]
        ]
        if self.retention.programs and not self.retention.run_code:
            problems.append(
                "retention.programs runs code that the model wrote; read in docs/howto-code.md what the sandbox protects from "
                "and what not, then set retention.run_code=true"
            )
        for key in ("demos", "sets", "arms"):
            values = getattr(self.grid, key)
            if len(set(values)) != len(values):
                problems.append(f"grid.{key}: expected different values, found {values}")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def arm(self, name: str) -> Arm:
        """The arm that `grid.arms` calls `name`. Raises `RecipeError`."""
        base, plus, control = name.partition("+")
        given = dict(self.arms.get(base, {}))
        like = given.pop("like", base)
        if like not in ARMS:
            raise RecipeError(
                f"unknown arm {base!r}{nearest(base, {*ARMS, *self.arms})}"
                if like == base
                else f"arms.{base}.like: unknown arm {like!r}{nearest(like, set(ARMS))}"
            )
        try:
            arm = Arm.model_validate(
                {**ARMS[like].model_dump(), **({"label": base} if base in self.arms else {}), **given}
            )
        except ValidationError as error:
            raise RecipeError(f"arms.{base}: {problem_of(dict(error.errors()[0]), Arm)}") from None
        if not plus:
            return arm
        if control not in CONTROLS:
            raise RecipeError(f"unknown control {control!r}{nearest(control, set(CONTROLS))}")
        if arm.trains == "nothing" or arm.targets == "gold" or arm.context == "none":
            raise RecipeError(f"{name}: a control belongs to an arm that learns from a teacher with a context")
        return arm.model_copy(
            update={
                "label": f"{arm.label}: {control.replace('_', ' ')}", "about": f"control: {CONTROLS[control]}",
                "family": "control", "control": control, "control_of": base,
                "context": "none" if control == "zero_shot_teacher" else arm.context,
            }
        )  # fmt: skip

    def training(self, arm: Arm, seed: int) -> TrainSection:
        """How an arm is trained on the demonstration set `seed`."""
        base = self.finetune if arm.targets == "gold" else self.train
        lr = {"lr": self.full_lr} if arm.trains in ("full", "head") else {}
        return TrainSection.model_validate({**base.model_dump(), **lr, **arm.train, "seed": base.seed + seed})

    def weight(self, arm: Arm) -> float:
        """The weight of the label words in the targets of an arm."""
        return self.label_weight if arm.label_weight is None else arm.label_weight

    def adapter(self, arm: Arm) -> LoraSection:
        """The adapter of an arm."""
        return LoraSection.model_validate({**self.lora.model_dump(), **arm.lora})

    def drawn(self) -> tuple[int, int]:
        """How many contexts and queries are drawn for each demonstration set: what the arms together need."""
        arms = [self.arm(name) for name in self.grid.arms]
        contexts = self.grid.contexts if any(arm.context == "many" for arm in arms) else 1
        return contexts, max([self.grid.queries, *(arm.queries for arm in arms)])

    def other_task(self, name: str) -> str:
        """The task whose demonstrations the control `irrelevant_context` takes for the task `name`: the next one."""
        names = self.tasks.names
        return names[(names.index(name) + 1) % len(names)]

    def path(self, name: str) -> Path:
        """`name` as a path, relative to the study file's folder."""
        return (self.base_dir / Path(name).expanduser()).resolve()

    def to_dict(self) -> dict[str, Any]:
        """All values, defaults included, as JSON can hold them."""
        return self.model_dump(mode="json")

    def cells(self) -> list[Cell]:
        """All cells, those of a demonstration set side by side, so that what they share is made once."""
        made: dict[str, Cell] = {}
        for model in self.model.names:
            for task in self.tasks.names:
                for n in self.grid.demos:
                    for seed in self.grid.sets:
                        for name in self.grid.arms:
                            arm = self.arm(name)
                            # without demonstrations and training there is nothing that n or the set could change
                            alone = arm.context == "none" and arm.trains == "nothing"
                            cell = Cell(model, task, 0 if alone else n, None if alone else seed, name)
                            made.setdefault(cell.id, cell)
        return list(made.values())


@dataclass(frozen=True)
class Cell:
    """One arm on one demonstration set."""

    model: str
    task: str
    n: int
    """Demonstrations; 0 where the arm has none and trains nothing."""
    set: int | None
    arm: str

    @property
    def id(self) -> str:
        """A folder name that says what the cell is."""
        where = "" if self.set is None else f"-n{self.n}-set{self.set}"
        return f"{model_label(self.model)}-{self.task}{where}-{self.arm}"


def model_label(name: str) -> str:
    """A model's name for folders and tables: the last part of its path or id."""
    path = Path(name)
    return path.stem if path.suffix == ".gguf" else path.name


def cell_key(study: Study, cell: Cell) -> str:
    """What a finished cell was made with: another value anywhere that matters, and the cell is made again."""
    values = study.to_dict()
    shared = {name: values[name] for name in ("model", "lora", "eval", "retention", "full_lr")} | {"names": cell.model}
    shared["model"] = {k: v for k, v in values["model"].items() if k != "names"}
    arm = study.arm(cell.arm)
    grid = {key: values["grid"][key] for key in ("contexts", "queries", "draw")}
    if (
        arm.context == "many" or arm.calibration == "demonstrations"
    ):  # all contexts but the first move with what is drawn
        contexts, queries = study.drawn()
        if (contexts, queries) != (grid["contexts"], grid["queries"]):
            grid["drawn"] = [contexts, queries]
    training = study.training(arm, cell.set or 0).model_dump() if arm.trains != "nothing" else None
    if arm.trains != "nothing" and arm.targets == "teacher":
        training = {**(training or {}), "label_weight": study.weight(arm)}
    task = {key: values["tasks"][key] for key in ("pattern", "ood")} | {"version": TASKS[cell.task].version}
    if study.tasks.root is None:  # the hub has other rows than a folder (MNLI, QQP); a folder may be moved
        task["rows"] = "hub"
    if arm.control == "irrelevant_context":
        other = study.other_task(cell.task)
        task["other"] = [other, TASKS[other].version]
    return fingerprint(
        [shared, arm.model_dump(exclude={"label", "about", "label_weight"}), grid, training, task, cell.id]
    )
