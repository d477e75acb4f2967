"""What the adapter does beyond the held-out rows as they are served: elsewhere, turned up and down, prompted again.

In: a model with its adapter on, held-out pairs with the teacher's targets, everyday prompts. Out: the part `behaviour` of
`evaluation.json`. Invariants: whoever is compared sees the same completion ids, written by the side that the student is
compared with; every estimate comes with a 95 % interval over rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from ctxdistill import generic, stats
from ctxdistill.adapters import encoder_of
from ctxdistill.dataset import Data
from ctxdistill.evaluate import Score, fidelity, kl_estimate, same, teacher_targets
from ctxdistill.lm import LM, check_fit
from ctxdistill.prompts import Pair, Prompter, join
from ctxdistill.recipe import CompletionsSection, Recipe, TargetsSection
from ctxdistill.rundir import Progress, no_progress
from ctxdistill.spool import Lazy
from ctxdistill.store import Target, TargetStore
from ctxdistill.targets import label


def behaviour(
    recipe: Recipe, lm: LM, prompter: Prompter, rows: Data, store: TargetStore, progress: Progress = no_progress
) -> dict[str, Any]:
    """All checks that `recipe.behaviour` asks for: `unrelated`, and on a number of held-out rows `strengths`, `again` (not
    where the teacher is asked behind its thoughts, which the student does not have) and `other` (not in the text style,
    which has no roles). A check that is off is None."""
    b, c = recipe.behaviour, recipe.completions
    found: dict[str, Any] = {"rows": 0, "unrelated": None, "strengths": None, "again": None, "other": None}
    plain = unrelated(prompter, generic.HELD_OUT[: b.unrelated])
    plain = [pair for pair in plain if len(pair.teacher) + TOKENS <= lm.window]  # their number is reported
    pairs = rows.pairs["eval"][: b.rows]
    strengths = b.strengths if encoder_of(lm.peft) is None else ()  # a cartridge has no strength
    elsewhere = recipe.prompt.style == "chat" and bool(b.other_system)
    alike = not (c.extract and c.teach == "answer")  # student and teacher behind the teacher's prompt
    total = len(plain)  # rows that are scored
    if pairs:
        total += len(strengths) * (len(pairs) + len(plain)) + (1 + 2 * alike + elsewhere) * len(pairs)
    check = Check(recipe, lm, prompter, store, progress, total)
    theirs = check.base(plain, TOKENS) if plain else []
    if plain:
        found["unrelated"] = check.compare(plain, theirs)
    if not pairs:
        return found
    targets = teacher_targets(lm, prompter, pairs, recipe, store)
    found["rows"] = len(pairs)
    with lm.adapter(False):
        base = check.scores(pairs, targets)
    found["strengths"] = []
    for value in strengths:
        with lm.adapter(True, value):
            point = {"strength": value, "kl_closed": check.closed(check.scores(pairs, targets), base)}
            point["unrelated_kl"] = kl_estimate(check.scores(plain, theirs), **check.options) if plain else None
        found["strengths"].append(point)
    if alike:
        again = [dataclasses.replace(pair, student=pair.teacher) for pair in pairs]
        alone = kl_estimate(check.scores(pairs, targets), **check.options)
        found["again"] = check.compare(again, targets) | {"alone": alone}
    if elsewhere:
        found["other"] = other(check, rows, pairs, targets)
    return found


def unrelated(prompter: Prompter, texts: Sequence[str]) -> list[Pair]:
    """Everyday prompts as the student gets them; the teacher's prompt is the same one, so the teacher is the base model."""
    prompts = [prompter.served([{"role": "user", "content": text}]) for text in texts]
    return [
        Pair(f"generic-{i}", text, None, ids, ids, "generic", {})
        for i, (text, ids) in enumerate(zip(texts, prompts, strict=True))
    ]


def other(check: Check, rows: Data, pairs: Sequence[Pair], targets: Sequence[Target]) -> dict[str, Any]:
    """The held-out queries behind another system prompt: against the base model with the same one.

    `obeys` is the share of answers that are the base model's there, `keeps` the share of those that are, as a whole, the
    teacher's with the taught context, `base_keeps` how often base model and teacher agree anyhow.
    """
    held_out, section = rows.splits["eval"]
    system = check.recipe.behaviour.other_system
    prompts = [check.prompter.served_query(row, section, system) for row in held_out[: len(pairs)]]
    there = [dataclasses.replace(p, teacher=ids, student=ids) for p, ids in zip(pairs, prompts, strict=True)]
    limit = check.recipe.eval.max_new_tokens
    theirs = check.base(there, limit)
    scores = check.scores(there, theirs, write=limit)
    taught = [check.prompter.text(target.ids) for target in targets]
    asked = [check.prompter.text(target.ids) for target in theirs]
    keeps = [float(same(s["prediction"], text)) for s, text in zip(scores, taught, strict=True)]
    agree = [float(same(a, b)) for a, b in zip(asked, taught, strict=True)]
    return {
        "system": system,
        "kl": kl_estimate(scores, **check.options),
        "obeys": check.share([s["same"] for s in scores]),
        "keeps": check.share(keeps),
        "base_keeps": check.share(agree),
    }


TOKENS = 32
"""Longest answer of the base model to an everyday prompt."""


class Check:
    """What the checks share. `total`: how many rows they will score."""

    def __init__(
        self,
        recipe: Recipe,
        lm: LM,
        prompter: Prompter,
        store: TargetStore,
        progress: Progress = no_progress,
        total: int = 0,
    ) -> None:
        self.recipe, self.lm, self.prompter, self.store = recipe, lm, prompter, store
        self.progress, self.done, self.total = progress, 0, total
        self.options = {"resamples": recipe.eval.bootstrap, "seed": stats.SEED}

    def base(self, pairs: Sequence[Pair], limit: int) -> Sequence[Target]:
        """The base model's own greedy answers to the prompts `pair.teacher`, with what it says of each token."""
        kind = TargetsSection(kind="hidden", batch_size=self.recipe.targets.batch_size)
        return base_targets(self.lm, self.prompter, pairs, self.recipe, self.store, kind, limit, self.progress)

    @torch.no_grad()
    def scores(self, pairs: Sequence[Pair], targets: Sequence[Target], *, write: int = 0) -> list[Score]:
        """`kl`, `top1` and `tokens` of the model as it is now behind `pair.student`, against `targets`; with `write` also
        its greedy answer of at most so many tokens, `prediction`, and whether it is the target's, `same`."""
        prompts = [pair.student for pair in pairs]
        prefix = self.lm.prefix(prompts)
        tokens = max(map(len, prompts), default=0) + max([write, *(len(t.ids) for t in targets)])
        size = self.lm.rows_at_once(self.recipe.targets.batch_size, tokens, len(prefix.ids) if prefix else 0)
        scores: list[Score] = []
        for start in range(0, len(pairs), size):
            some = slice(start, start + size)
            rows = [join(prompt, t.ids) for prompt, t in zip(prompts[some], targets[some], strict=True)]
            hidden = self.lm.hidden(rows, prefix)
            new = [fidelity(self.lm, self.prompter, t, h) for t, h in zip(targets[some], hidden, strict=True)]
            if write:
                written = self.lm.generate(prompts[some], max_new_tokens=write, ends=self.prompter.ends, prefix=prefix)
                for score, target, ids in zip(new, targets[some], written, strict=True):
                    # no further than the other side was let; one more than its end shows an answer that goes on
                    shown = ids[: len(target.ids) + self.prompter.ends(list(target.ids))]
                    score["same"] = float(same(self.prompter.text(shown), self.prompter.text(target.ids)))
                    score["prediction"] = self.prompter.text(ids)
            scores += new
            self.done += len(new)
            self.progress("behaviour", self.done, self.total)
        return scores

    def compare(self, pairs: Sequence[Pair], targets: Sequence[Target]) -> dict[str, Any]:
        """KL to the targets, and the share of answers that are the same."""
        scores = self.scores(pairs, targets, write=1 + max(len(t.ids) for t in targets))
        return {
            "rows": len(scores),
            "kl": kl_estimate(scores, **self.options),
            "same": self.share([s["same"] for s in scores]),
        }

    def closed(self, student: Sequence[Score], base: Sequence[Score]) -> dict[str, Any] | None:
        """`kl_closed` on these rows."""
        own, others = ([s["kl"] * s["tokens"] for s in side] for side in (student, base))
        found = stats.kl_closed(own, others, [s["tokens"] for s in base], **self.options)
        return found.to_dict() if found else None

    def share(self, values: Sequence[float]) -> dict[str, Any]:
        return stats.bootstrap_mean(values, **self.options).to_dict()


def base_targets(
    lm: LM,
    prompter: Prompter,
    pairs: Sequence[Pair],
    recipe: Recipe,
    store: TargetStore,
    kind: TargetsSection,
    limit: int = TOKENS,
    progress: Progress = no_progress,
) -> Sequence[Target]:
    """What the base model answers to each `pair.teacher`, at most `limit` tokens, greedy. Raises: `FitError`."""
    check_fit([(p.origin, len(p.teacher) + limit) for p in pairs], lm.window, "a prompt of the behaviour checks")
    completions = CompletionsSection(source="teacher", max_new_tokens=limit)
    made = label(
        lm, prompter, pairs, recipe, store, completions=completions, kind=kind, progress=progress, stage="base answers"
    )
    return Lazy.over(made, lambda row: row[0])
