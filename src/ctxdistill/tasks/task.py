"""What a task is: rows, ways to write them as prompts, and the words of its labels. In: constants of the task's file.
Out: frozen objects. Invariant: each pattern has one word for each label, in the order of the labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ctxdistill.recipe import PromptSection
from ctxdistill.rows import Row
from ctxdistill.tasks.source import Source


@dataclass(frozen=True)
class Pattern:
    """How a row becomes a prompt in the text style."""

    pattern: str
    """The query, with `{text}` or `{text1}` and `{text2}`; ends where the answer begins."""
    words: Mapping[str, str]
    """Label -> the word that the model says for it."""
    answer_pattern: str = " {answer}"
    separator: str = "\n\n"
    instruction: str = ""
    """Before the demonstrations, in the teacher's prompt."""
    student_instruction: str = ""
    """Before the query, in the student's prompt."""
    ood: Mapping[str, str] = field(default_factory=dict)
    """Out-of-domain set -> the query, where it is written in another way there."""

    def section(self, on: str = "") -> PromptSection:
        """The recipe's `[prompt]` for the in-domain rows, or for those of the out-of-domain set `on`. Demonstrations
        are always in-domain rows, so with `on` it is right for the query alone: they have `pattern`."""
        return PromptSection(
            style="text",
            pattern=self.ood.get(on, self.pattern),
            answer_pattern=self.answer_pattern,
            separator=self.separator,
            instruction=self.instruction,
            student_instruction=self.student_instruction,
            label_words=list(self.words.values()),
        )

    def query(self, row: Row, on: str = "") -> str:
        """The query of `row`, a row of the out-of-domain set `on` if that is given."""
        return self.ood.get(on, self.pattern).format(**row.fields)

    def demonstration(self, row: Row) -> str:
        """`row` with its answer."""
        return self.query(row) + self.answer_pattern.format(answer=self.words[row.fields["label"]])


@dataclass(frozen=True)
class Task:
    """A task with its sets in and out of domain."""

    name: str
    version: int
    """Goes up when rows, prompts or words change, so that results are not compared across."""
    title: str
    labels: tuple[str, ...]
    """In the order of the data set's classes."""
    train: Source
    """Demonstrations and queries come from here."""
    evaluation: Source
    ood: Mapping[str, Source] = field(default_factory=dict)
    extra_ood: Mapping[str, Source] = field(default_factory=dict)
    """Out-of-domain sets that are only used when they are asked for by name."""
    patterns: Mapping[str, Pattern] = field(default_factory=dict)
    default_pattern: str = "default"

    def __post_init__(self) -> None:
        for name, pattern in self.patterns.items():
            if tuple(pattern.words) != self.labels:
                raise ValueError(f"{self.name}, {name}: one word for each label, in the order of the labels")
