"""Adapters of several runs become one, by a weighted sum of their updates, and are measured before anybody trusts it.

In: finished runs with the same base model, a weight for each. Out: a folder with the adapter, `compose.json` and
`README.md`. Invariants: the sum is exact, W + sum of w_i times update_i (the factors are put side by side, so the ranks add
up); the sum is judged on the held-out rows of every run, beside each adapter alone.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctxdistill import adapters
from ctxdistill.behaviour import Check
from ctxdistill.crosstalk import CLOSED, Group, matrix
from ctxdistill.dataset import Data, prepare, stored_recipe
from ctxdistill.errors import DataError, ModelError, RecipeError, RunError
from ctxdistill.evaluate import teacher_limit, teacher_targets
from ctxdistill.lm import LM, check_fit
from ctxdistill.prompts import Pair, Prompter
from ctxdistill.recipe import Recipe
from ctxdistill.rundir import LOADING, Progress, RunDir, no_progress, reading, write_atomic, writing
from ctxdistill.store import TargetStore
from ctxdistill.weights import quiet_peft

ROWS = 32
"""Held-out rows of each run on which the sum is measured."""


def compose(runs: Mapping[str | Path, float], out: str | Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """Sum the adapters of `runs` (folder -> weight) into `out`, and measure the sum.

    Returns what `compose.json` holds: `names`, `weights`, `rank`; `alone`, KL closed on the rows of one run (first key) by
    the adapter of another; `closed`, the same by the sum; `kl`, `nearest`, `good` and `reasons` of the cross-talk matrix.

    Raises: `RunError` for fewer than two runs or an `out` that is there; `ModelError` for adapters that cannot be summed;
    `RecipeError` for rows of one run that another's recipe cannot read, `FitError` where it leaves them no room. All before
    anything is measured.
    """
    folders = [RunDir.existing(run) for run in runs]
    names = distinct([folder.path for folder in folders])
    if len(folders) < 2:
        raise RunError("there is nothing to compose", expected="two or more runs", found=", ".join(names) or "none")
    if Path(out).exists():
        raise RunError(f"{out} is there already", fix="choose another folder with --out")
    recipes = [stored_recipe(folder) for folder in folders]
    check_same(folders, recipes)
    lm, prompter, data = prepare(recipes[0], folders[0].path)
    prompters, rows = [prompter], [data]
    for recipe, folder in zip(recipes[1:], folders[1:], strict=True):
        _, prompter, data = prepare(recipe, folder.path, lm=lm)
        prompters.append(prompter)
        rows.append(data)
    groups = crossed(names, prompters, rows)
    limits = dict(zip(names, map(teacher_limit, recipes), strict=True))
    lengths = (
        (pair.origin, len(pair.teacher) + limits[name])
        for group in groups.values()
        for name, pairs in group.items()
        for pair in pairs
    )
    check_fit(lengths, lm.window, "the context of one run with a query of another, and answer")
    load(lm, folders, names, list(runs.values()))
    progress = progress or no_progress
    progress(LOADING, 1, 1)
    stores = [TargetStore.of(recipe, folder.path) for recipe, folder in zip(recipes, folders, strict=True)]
    checks = [Check(r, lm, p, s) for r, p, s in zip(recipes, prompters, stores, strict=True)]
    held_out = [data.pairs["eval"][:ROWS] for data in rows]
    alone: dict[str, dict[str, Any]] = {}
    for name, check, pairs in zip(names, checks, held_out, strict=True):
        targets = teacher_targets(lm, check.prompter, pairs, check.recipe, check.store)
        with lm.adapter(False):
            base = check.scores(pairs, targets)
        alone[name] = {}
        for other in names:
            lm.peft.set_adapter(other)
            alone[name][other] = check.closed(check.scores(pairs, targets), base)
        progress("adapters alone", len(alone), len(names))
    lm.peft.set_adapter("composed")
    with tempfile.TemporaryDirectory() as place:  # what one context's teacher says of another's rows belongs to no run
        store = TargetStore(Path(place))
        checks = [Check(r, lm, p, store) for r, p in zip(recipes, prompters, strict=True)]
        found = matrix(dict(zip(names, checks, strict=True)), groups, progress)
    rank = sum(recipe.lora.rank for recipe in recipes)
    found |= {"weights": dict(zip(names, runs.values(), strict=True)), "rank": rank, "alone": alone}
    save(lm, Path(out), found, [folder.path for folder in folders])
    return found


def distinct(paths: Sequence[Path]) -> list[str]:
    """A short name for each run: its folder's, with a number where two are called the same. PEFT wants no dots, and the card
    no markup."""
    names: list[str] = []
    for path in paths:
        own = re.sub(r"[^\w-]+", "-", path.resolve().name)
        numbered = (f"{own}-{n}" for n in itertools.count(len(names) + 1))
        names.append(next(name for name in itertools.chain([own], numbered) if name not in [*names, "composed"]))
    return names


def check_same(folders: Sequence[RunDir], recipes: Sequence[Recipe]) -> None:
    """Raise `ModelError` for runs whose adapters cannot be summed."""
    hashes = []
    for folder in folders:
        with reading(folder.path):
            hashes.append(str(folder.read_json("recipe.json")["model"]["weights_sha256"]))
    for folder, sha in zip(folders, hashes, strict=True):
        if sha != hashes[0]:
            raise ModelError(
                "adapters of different base models cannot be summed",
                expected=f"weights {hashes[0][:16]}..., as in {folders[0].path}",
                found=f"weights {sha[:16]}... in {folder.path}",
            )
    for folder, recipe in zip(folders, recipes, strict=True):
        if recipe.lora.method in ("dora", "cartridge"):
            raise ModelError(
                f"the adapter of {folder.path} cannot be summed",
                expected='lora.method = "lora" or "rslora"',
                found=f'"{recipe.lora.method}", which is not a sum of products of two factors',
            )


def crossed(names: Sequence[str], prompters: Sequence[Prompter], rows: Sequence[Data]) -> Mapping[str, Group]:
    """The first held-out rows of each run, with the prompts of every run. Raises `RecipeError` for rows that another run's
    recipe cannot read."""
    groups: dict[str, dict[str, list[Pair]]] = {name: {} for name in names}
    for name, data in zip(names, rows, strict=True):
        queries, section = data.splits["eval"]
        for other, prompter in zip(names, prompters, strict=True):
            try:
                groups[name][other] = [prompter.pair(row, section) for row in queries[:ROWS]]
            except (KeyError, DataError) as error:
                lacking = f"no column {error} for the pattern {prompter.recipe.prompt.pattern!r}"
                raise RecipeError(
                    f"the rows of {name} cannot be put to the teacher of {other}",
                    expected=f"held-out rows with all that the recipe of {other} reads",
                    found=error.message if isinstance(error, DataError) else lacking,
                    fix="distil again with rows that have the columns of both recipes (prompt.pattern, context.column, "
                    "context.chunk_column)",
                ) from None
    return groups


def load(lm: LM, folders: Sequence[RunDir], names: Sequence[str], weights: Sequence[float]) -> None:
    """Put all adapters on the model, under their names, and their sum as `composed`."""
    lm.load_adapter(folders[0] / "adapter", names[0])
    with quiet_peft():
        for folder, name in zip(folders[1:], names[1:], strict=True):
            adapters.settings_of(folder / "adapter")
            lm.peft.load_adapter(str(folder / "adapter"), adapter_name=name)
        # peft copies these settings into the sum, whose own factor must be 1: that of each adapter goes into its tensors
        lm.peft.peft_config[names[0]].use_rslora = False
        lm.peft.add_weighted_adapter(list(names), list(weights), "composed", combination_type="cat")
    lm.training(False)


def save(lm: LM, out: Path, found: Mapping[str, Any], paths: Sequence[Path]) -> None:
    """The folder, whole or not at all."""
    beside = out.with_name(f".{out.name}.tmp")
    with writing(out):
        shutil.rmtree(beside, ignore_errors=True)
        os.replace(adapters.save(lm.peft, beside, "composed"), beside / "adapter")
        (beside / "README.md").unlink(missing_ok=True)
        run = RunDir(beside)
        run.write_json("compose.json", {**found, "runs": [str(path) for path in paths]})
        write_atomic(beside / "adapter" / "README.md", card(found))
        os.replace(beside, out)


def card(found: Mapping[str, Any]) -> str:
    """What the sum is and what it is worth, as Markdown."""
    lines = ["# A sum of adapters", "", *[f"- {w:g} times `{name}`" for name, w in found["weights"].items()], ""]
    lines += [
        verdict(found),
        "",
        "| rows of | " + " | ".join(f"KL to {n}'s teacher" for n in found["names"]) + " | KL closed |",
    ]
    lines.append("|---|" + "---:|" * (len(found["names"]) + 1))
    for i in found["names"]:
        kls = " | ".join(f"{found['kl'][i][j]['mean']:.3f}" for j in found["names"])
        share = found["closed"][i]
        lines.append(f"| {i} | {kls} | {'–' if share is None else format(100 * share['mean'], '.1f') + ' %'} |")
    return "\n".join(lines) + "\n"


def verdict(found: Mapping[str, Any]) -> str:
    """One sentence."""
    if found["good"]:
        return f"Good: the sum closes at least {100 * CLOSED:.0f} % of each context's KL, and keeps the contexts apart."
    return "Not good: " + "; ".join(found["reasons"]) + "."
