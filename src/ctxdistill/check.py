"""Does an export answer as the student does? Asks it through the stack that serves it, on held-out rows.

In: an export's folder, the run that it came from, and optionally a server's address. Out: prompts, next-token distributions and
greedy answers compared, each with what is allowed, and the verdict. Invariants: both sides are compared behind the same
tokens, those of the export's own answers; the student is the training-time one at the export's strength; an export that
does nothing, another chat template and an implicit system prompt cannot pass.

Dimensions: T tokens of an answer, V vocabulary, K likeliest tokens that the stack tells.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ctxdistill import files
from ctxdistill.adapters import scale
from ctxdistill.dataset import stored_recipe
from ctxdistill.errors import RunError
from ctxdistill.evaluate import freely
from ctxdistill.export import FORMATS, MANIFEST, held_out
from ctxdistill.gguf_export import write_model
from ctxdistill.lm import LM
from ctxdistill.prompts import Prompter, join
from ctxdistill.recipe import Recipe
from ctxdistill.rundir import LOADING, Progress, RunDir, no_progress, reading
from ctxdistill.runtimes import Answer, Endpoint, Request, Runtime, Transformers, llama_server

ROWS = 16
LOST = 0.02
"""Share of what the adapter changes (KL between student and base) that an export may lose."""
NOISE = 2.0
"""A stack that computes otherwise (quantised activations) may be this many times as far from the student as it is, without
the adapter, from the base."""
NOTHING = 1e-4
"""Nats per token below which an adapter does nothing that could be checked."""
AGREE = 0.95
"""Smallest share of positions where the student would choose the export's token."""
ENDS = 0.9
"""Smallest share of the answers that the student ends by itself which the export ends, too."""


@dataclass
class Tally:
    """What was seen on all rows."""

    kl: list[float] = field(default_factory=list)
    """KL(student || export) at each position."""
    moved: list[float] = field(default_factory=list)
    """KL(student || base) there, over the same outcomes: what the adapter changes."""
    floor: list[float] = field(default_factory=list)
    """KL(base || export without its adapter) at the positions of its answers, where the stack can switch it off."""
    agree: list[bool] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def mean(self, name: str) -> float | None:
        values = getattr(self, name)
        return sum(values) / len(values) if values else None


def check(
    export: str | Path,
    against: str | Path,
    *,
    endpoint: str | None = None,
    model: str = "",
    base: str | Path | None = None,
    rows: int = ROWS,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Compare an export with its run's student; `passed` is the verdict, `checks` say why, `model` is what a server was asked for,
    `labels` how many of the export's answers are label words, where the recipe has some.

    Args:
        export: a folder that `export` wrote.
        against: the run.
        endpoint: ask this server, which serves the export, instead of loading it.
        model: the server's name of the model; default the export's own name if the server lists it, else its first.
        base: the GGUF file under a GGUF adapter; default the run's base.
        rows: held-out rows, the first ones.

    Raises: `RunError` or `ModelError` when the export is of another run, or cannot be loaded or asked.
    """
    folder, run = Path(export), RunDir.existing(against)
    manifest = _manifest(folder, run)
    recipe = stored_recipe(run)
    lm = LM.load(recipe.model, recipe.base_dir)
    lm.load_adapter(run / "adapter")
    scale(lm.peft, manifest["strength"])
    prompter = Prompter(recipe, lm.tokenizer)
    split, section = held_out(run, recipe, prompter)
    chosen = split[:rows]
    tally = Tally()
    template = None if endpoint or manifest["format"] != "ollama" else _ollama_template(folder)
    longest = max(len(prompter.pair(row, section).student) for row in chosen)
    room = longest + recipe.eval.max_new_tokens + 64
    with _runtime(folder, manifest, recipe, lm, prompter, endpoint, model, base, room) as stack:
        progress(LOADING, 1, 1)
        for number, row in enumerate(chosen, 1):
            pair = prompter.pair(row, section)
            request = (
                prompter.request(row, section) if template is None else template.replace("{{ .Prompt }}", pair.query)
            )
            _compare(tally, stack, request, lm, prompter, pair.student, pair.query, recipe.eval.max_new_tokens)
            progress("check", number, len(chosen))
        name, asked = stack.name, stack.model if endpoint and isinstance(stack, Endpoint) else None
    checks, words = judge(tally), recipe.prompt.label_words
    return {
        "export": str(folder), "format": manifest["format"], "strength": manifest["strength"], "runtime": name, "model": asked,
        "passed": all(c["passed"] for c in checks), "checks": checks,
        "rows": len(chosen), "tokens": len(tally.kl),
        "kl": tally.mean("kl"), "kl_base": tally.mean("moved"), "kl_floor": tally.mean("floor"), "top1": tally.mean("agree"),
        "same_text": sum(r["student"] == r["export"] for r in tally.rows), "answers": tally.rows,
        "labels": sum(bool(freely(r["export"], None, words)["free_label"]) for r in tally.rows) if words else None,
    }  # fmt: skip


def _understood(manifest: dict[str, Any]) -> None:
    """Raise ValueError, TypeError or KeyError for a manifest that `export` does not write. Files are names in its folder."""
    if manifest["format"] not in FORMATS or not math.isfinite(manifest["strength"]) or manifest["strength"] < 0:
        raise ValueError(f"format {manifest['format']!r}, strength {manifest['strength']!r}")
    for key in ("model", "adapter"):
        if Path(name := manifest.get(key, "x")).name != name:
            raise ValueError(f"{key} = {name!r} is no file of the folder")
    for key, kind in (("name", str), ("stop", list), ("student_prompt", dict)):
        if not isinstance(manifest[key], kind):
            raise TypeError(f"{key} is not what it should be")


def _manifest(folder: Path, run: RunDir) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = files.read_json(folder / MANIFEST, files.MAX_RECIPE)
    except (OSError, ValueError):
        raise RunError(
            f"{folder} is no export", expected=MANIFEST, fix="make one with `ctxdistill export RUN --format ...`"
        ) from None
    with reading(folder):
        _understood(manifest)
    with reading(run.path):
        made = run.read_json("recipe.json")["fingerprint"]
    if manifest["run"] != made:
        raise RunError(
            f"{folder} was not made from {run.path}", expected=f"run {made}", found=f"run {manifest['run']}",
            fix="name the run that it was made from, or export again",
        )  # fmt: skip
    return manifest


# -- the stack --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _runtime(
    folder: Path,
    manifest: dict[str, Any],
    recipe: Recipe,
    lm: LM,
    prompter: Prompter,
    endpoint: str | None,
    model: str,
    base: str | Path | None,
    room: int,
) -> Iterator[Runtime]:
    """The stack for this export: a server that runs, llama.cpp for GGUF files, else transformers.

    `room`: tokens of the longest prompt with its answer.
    """
    kwargs = recipe.prompt.template_kwargs | recipe.prompt.student_template_kwargs
    stop = manifest["stop"] if recipe.prompt.style == "text" or manifest["format"] == "ollama" else []
    if endpoint:
        yield Endpoint(endpoint, lm.tokenizer, model, manifest["name"], template_kwargs=kwargs, stop=stop)
    elif manifest["format"] in ("peft", "merged"):
        yield Transformers.load(folder, manifest["student_prompt"], kwargs)
    else:
        with contextlib.ExitStack() as opened:
            adapter = folder / manifest["adapter"] if "adapter" in manifest else None
            if adapter is None:
                below = folder / manifest["model"]
            else:
                below = Path(base or manifest["base"] or opened.enter_context(_base_gguf(lm, prompter)))
            if not below.is_file():
                raise RunError(f"no GGUF file at {below}", fix="name the base that is under the adapter with --base")
            yield opened.enter_context(
                llama_server(below, adapter, lm.tokenizer, context=room, template_kwargs=kwargs, stop=stop)
            )


@contextlib.contextmanager
def _base_gguf(lm: LM, prompter: Prompter) -> Iterator[Path]:
    """The base of the run as a GGUF file, for as long as the block lasts."""
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "base.gguf"
        end = prompter.end[0] if prompter.recipe.prompt.style == "chat" else None
        lm.remove_adapter()
        write_model(path, lm.model, lm.tokenizer, None, name="base", end=end)
        yield path


def _ollama_template(folder: Path) -> str:
    """The prompt of the Modelfile, as Ollama fills it."""
    try:
        text = files.read_text(folder / "Modelfile", files.MAX_RECIPE)
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {folder / 'Modelfile'}: {error}", fix="export it again") from None
    found = re.search(r'^TEMPLATE """(.*?)"""$', text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise RunError(f"{folder / 'Modelfile'} has no TEMPLATE", fix="export it again")
    with reading(folder):
        return re.sub(r'\{\{ (".*?") \}\}', lambda m: str(json.loads(m[1])), found[1])


# -- comparing --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _compare(
    tally: Tally,
    stack: Runtime,
    request: Request,
    lm: LM,
    prompter: Prompter,
    prompt: tuple[int, ...],
    query: str,
    limit: int,
) -> None:
    """Ask one row, and add what was seen to `tally`."""
    ids = stack.prompt_ids(request)
    answer = stack.answer(request, limit)
    assert answer is not None  # only without the adapter
    with lm.adapter(True):
        own = lm.generate([prompt], max_new_tokens=limit, ends=prompter.ends)[0]
    known = _known(answer)
    if known:
        row = [join(prompt, known)]
        with lm.adapter(True):
            student = lm.head(lm.hidden(row)[0]).log_softmax(-1)  # [T, V]
        with lm.adapter(False):
            base = lm.head(lm.hidden(row)[0]).log_softmax(-1)  # [T, V]
        tally.kl += [kl_of_top(p, *top) for p, top in zip(student, answer.top, strict=False)]
        # over the same outcomes, so that an export that is the base is as far from the student as the base is
        others = [(ids, b.cpu()[ids]) for b, (ids, _) in zip(base, answer.top, strict=False)]
        tally.moved += [kl_of_top(p, *top) for p, top in zip(student, others, strict=True)]
        tally.agree += (student.argmax(-1).cpu() == torch.tensor(known)).tolist()
    plain = stack.answer(request, limit, base=True)
    if plain is not None and (known := _known(plain)):
        with lm.adapter(False):
            base = lm.head(lm.hidden([join(prompt, known)])[0]).log_softmax(-1)  # [T, V]
        tally.floor += [kl_of_top(p, *top) for p, top in zip(base, plain.top, strict=False)]
    tally.rows.append({
        "query": query, "student": prompter.text(own), "export": _text(answer, prompter),
        "student_ended": prompter.ends(own), "export_ended": answer.ended,
        "prompt_tokens": len(prompt), "export_prompt_tokens": answer.prompt_tokens,
        "difference": None if ids is None else difference(list(prompt), ids, prompter),
        "counted_only": ids is None,
    })  # fmt: skip


def _known(answer: Answer) -> list[int]:
    """The answer's tokens up to the first that cannot be told."""
    ids = answer.ids[: answer.ids.index(-1)] if -1 in answer.ids else answer.ids
    return ids[: len(answer.top)]


def _text(answer: Answer, prompter: Prompter) -> str:
    """The answer without its end, spelled as the student's is."""
    return prompter.text(answer.ids) if answer.ids and -1 not in answer.ids else answer.text.strip()


def kl_of_top(student: torch.Tensor, ids: torch.Tensor, logprobs: torch.Tensor) -> float:
    """KL(student [V] || export) in nats, where the export tells `logprobs` [K] of the tokens `ids` [K]; the others are one more
    outcome, which makes it a lower bound that is exact for K = V."""
    p, q = student.double().cpu()[ids], logprobs.double()  # [K], [K]
    kl = (p.exp() * (p - q)).sum()
    if len(ids) < len(student):
        rest_p, rest_q = ((1 - x.exp().sum()).clamp(min=1e-9) for x in (p, q))
        kl = kl + rest_p * (rest_p.log() - rest_q.log())
    return max(0.0, kl.item())


def difference(prompt: list[int], found: list[int], prompter: Prompter) -> str | None:
    """Where the stack's prompt differs from the student's, in words; None if it does not."""
    if prompt == found:
        return None
    start = next(
        (i for i, (a, b) in enumerate(zip(prompt, found, strict=False)) if a != b), min(len(prompt), len(found))
    )
    end = 0
    while end < min(len(prompt), len(found)) - start and prompt[-1 - end] == found[-1 - end]:
        end += 1
    ours, theirs = (ids[start : len(ids) - end] for ids in (prompt, found))
    said = [
        f"{what} {prompter.tokenizer.decode(ids)!r:.160}" for what, ids in (("adds", theirs), ("lacks", ours)) if ids
    ]
    return f"from token {start} on it {' and '.join(said)}"


# -- the verdict ------------------------------------------------------------------------------------------------------


def judge(tally: Tally) -> list[dict[str, Any]]:
    """Each check with `found` and `allowed` in words, and whether it `passed`."""
    rows = tally.rows
    differing = [r for r in rows if r["difference"] or r["prompt_tokens"] != r["export_prompt_tokens"]]
    first = differing[0] if differing else {}
    counted = f"{first.get('export_prompt_tokens')} tokens instead of {first.get('prompt_tokens')}"
    only = " (counted; the server does not tell its tokens)" if any(r["counted_only"] for r in rows) else ""
    kl, moved, floor = (tally.mean(name) for name in ("kl", "moved", "floor"))
    agree = tally.mean("agree")
    ended = [r["export_ended"] for r in rows if r["student_ended"]]
    checks = [
        ("prompt", not differing, f"{len(rows) - len(differing)} of {len(rows)} prompts are the student's{only}"
         + (f"; first difference: {first['difference'] or counted}" if differing else ""),
         "all, token by token: no other template, no system text of the stack's own"),
    ]  # fmt: skip
    if kl is None or moved is None or agree is None:
        checks.append(("distribution", False, "no token of an answer could be compared", "some"))
    else:
        limit = max(LOST * moved, NOISE * (floor or 0))
        noise = "" if floor is None else f"; without the adapter the stack is {floor:.4g} from the base"
        checks += [
            ("adapter", moved >= NOTHING and kl < moved / 2,
             f"KL {kl:.4g} from the student, which is {moved:.4g} from the base",
             f"at most half of that, and an adapter that changes something (at least {NOTHING:g})"),
            ("distribution", kl <= limit, f"KL {kl:.4g} nats per token over {len(tally.kl)} tokens{noise}",
             f"{limit:.4g}: {LOST:.0%} of what the adapter changes"
             + ("" if floor is None else f", or {NOISE:g} times the stack's own noise")),
            ("next token", agree >= AGREE, f"the student's choice at {agree:.1%} of the positions", f"{AGREE:.0%}"),
        ]  # fmt: skip
    share = sum(ended) / len(ended) if ended else 1.0
    checks.append(
        ("end", share >= ENDS, f"{sum(ended)} of the {len(ended)} answers end that the student ends", f"{ENDS:.0%}")
    )
    return [dict(zip(("check", "passed", "found", "allowed"), c, strict=True)) for c in checks]
