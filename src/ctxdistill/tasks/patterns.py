"""Ways to write pairs of sentences that several tasks share.

In: a task's labels, words for them and names of fields. Out: `Pattern`s by name. Invariant: the strings are those of the
paper's published code, which differ from its Table 1, and of Mosbach et al. 2023, with one exception: the latter end the
query of "minimal" in a space, and lose the line break before "Answer:" in the query (not in the demonstrations) of
"eval-harness"; here a query is always written as a demonstration without its answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ctxdistill.tasks.task import Pattern

ENTAILMENT = "Are the following sentences examples of entailment, yes or no?"
PARAPHRASE = "Are the following sentences duplicates or paraphrases of each other, yes or no?"
THINK = "Think logically. "
"""What the teacher is told and the student is not."""


def fields(first: str, second: str) -> str:
    """The paper's query: each text after the capitalised name of its column."""
    return f"{first}: {{text1}}\n{second}: {{text2}}\nLabel:"


def paper(
    labels: Sequence[str],
    words: Sequence[str],
    question: str,
    query: str,
    ood: Mapping[str, str] | None = None,
) -> Pattern:
    """The prompts of the paper's code; the two sets may be written in different ways."""
    return Pattern(
        pattern=query,
        words=dict(zip(labels, words, strict=True)),
        instruction=THINK + question,
        student_instruction=question,
        ood=dict(ood or {}),
    )


def mosbach(labels: Sequence[str], **patterns: tuple[str, Sequence[str]]) -> dict[str, Pattern]:
    """Patterns without instruction: name (with `_` for `-`) -> (query, words)."""
    return {
        name.replace("_", "-"): Pattern(query, dict(zip(labels, words, strict=True)))
        for name, (query, words) in patterns.items()
    }


def entailment(labels: Sequence[str], query: str, ood: Mapping[str, str] | None = None) -> dict[str, Pattern]:
    """All patterns of MNLI and RTE."""
    return {
        "paper": paper(labels, ("yes", "no"), ENTAILMENT, query, ood),
        # The authors' label words are right here; the name exists so that one study can ask all tasks for it.
        "paper-compat": paper(labels, ("yes", "no"), ENTAILMENT, query, ood),
        **mosbach(
            labels,
            minimal=("{text1} {text2} ?", ("Yes", "No")),
            gpt_3=("{text1} question: {text2} Yes or No? answer:", ("Yes", "No")),
            eval_harness=("{text1} \nQuestion: {text2} True or False?\nAnswer:", ("True", "False")),
        ),
    }
