"""The command line: words in, an exit code out. It can do nothing that the Python API cannot.

Exit codes: 0; 2 for what the user can fix (`CtxDistillError`, wrong usage); 1 for a bug, with its traceback; 130 after
Ctrl-C or SIGTERM. Invariants: with `--json` exactly one JSON object goes to stdout, errors included, and all else to stderr; torch
is imported by the commands that need it, never by this module, so that `--help` is quick.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ctxdistill import __version__, processes, trust
from ctxdistill.errors import CtxDistillError, RunError, as_memory_error, redact
from ctxdistill.rundir import RunDir, write_atomic

if TYPE_CHECKING:
    from ctxdistill.display import Watcher

app = typer.Typer(
    name="ctxdistill",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help, at once
)

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a .toml file.", show_default=False)]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Values in place of the recipe's: train.lr=1e-4.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and progress on stderr.")]
Paper = Annotated[
    Path | None,
    typer.Option(help="For a study: a CSV of the paper's runs, shown beside ours.", show_default=False),
]
Ray = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="Spread the work over this Ray cluster, or: local.", show_default=False),
]
LOADING = "reading the rows, loading the model"
Kind = Literal["system", "few-shot", "document"]
Format = Literal["peft", "merged", "gguf", "gguf-adapter", "ollama"]


class Interrupted(Exception):
    """Ctrl-C, with what to do to go on."""


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit()


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_version)
    ] = False,
    allow_code: Annotated[
        bool,
        typer.Option(
            "--allow-code", help="Let recipes, also those in run folders, run functions, programs and models' code."
        ),
    ] = False,
) -> None:
    """Turn a context (examples, a system prompt, documents) into a LoRA adapter, and measure how faithful it is.

    Start with: ctxdistill demo
    """
    if allow_code and not trust.code_allowed():
        os.environ[trust.ALLOW] = "1"
        context.call_on_close(lambda: os.environ.pop(trust.ALLOW, None))


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(help="Run folder. Unset: runs/demo.", show_default=False)] = None,
    small: Annotated[bool, typer.Option("--small", help="A fraction of the work, in runs/demo-small.")] = False,
    as_json: Json = False,
) -> None:
    """Distil the built-in example: a few minutes on two CPU cores.

    Free-text reminders become one line. It ends with the results and where the adapter and the report are.

    Example: ctxdistill demo --out runs/first
    """
    again = _again("demo", *(["--small"] if small else []), *(["--out", str(out)] if out else []))
    with _work(as_json, f"stopped; go on with: {again}", alone=False) as watcher:
        from ctxdistill import pipeline

        run = pipeline.demo(out, small=small, progress=watcher)
    _finish(run.path, run.evaluation, as_json)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="[PATH]", help="A new file, or a folder.")] = Path("recipe.toml"),
    kind: Annotated[Kind, typer.Option(help="What the context is.")] = "few-shot",
    source: Annotated[
        Path | None, typer.Option("--from", help="Rows of TRL, ms-swift, bakery or OpenAI.", show_default=False)
    ] = None,
    context: Annotated[
        Path | None, typer.Option(help="With --from: the system prompt, for rows without one.", show_default=False)
    ] = None,
    model: Annotated[str | None, typer.Option(help="With --from: the model.", show_default=False)] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Write a recipe with comments, to start from.

    With --from, one that reads rows written for another tool.

    Example: ctxdistill init support.toml --kind system
    """
    path = path / "recipe.toml" if path.is_dir() else path
    if path.suffix != ".toml":  # --force must not replace rows, which a slip may name
        raise RunError("a recipe is a .toml file", found=str(path), fix=f"name it {path.with_suffix('.toml')}")
    if path.exists() and not force:
        raise RunError(f"{path} is there already", fix="choose another name, or replace it with --force")
    if source is None:
        if context or model:
            raise RunError("--context and --model belong to --from", fix="edit them in the recipe that is written")
        text = Path(__file__).with_name("recipes").joinpath(f"{kind}.toml").read_text(encoding="utf-8")
        remarks: list[str] = []
        edit = "the model, the context, the files with queries (its comments say what they look like)"
    else:
        from ctxdistill.formats import MODEL, recipe_for

        text, remarks = recipe_for(source, path, model=model or MODEL, context=context)
        edit = "the model, and what else its comments say"
    write_atomic(path, text)
    name = shlex.quote(str(path))
    steps = [
        f"edit {name}: {edit}",
        f"look at the prompts:        ctxdistill show {name}",
        f"is there anything to teach? ctxdistill gate {name}",
        f"distil:                     ctxdistill distill {name}",
    ]
    if as_json:
        _json({"recipe": str(path), "kind": None if source else kind, "remarks": remarks, "next": steps})
        return
    from ctxdistill import display

    for text in (*remarks, f"wrote {path}; next:", *(f"  {number}. {step}" for number, step in enumerate(steps, 1))):
        display.say(display.console(), text)


@app.command()
def queries(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="The file. Unset: where distill looks for it.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Let the model write queries from the context alone.

    They go into a file, to read and change before training. The recipe says how many (queries.synthesize, in the place
    of queries.data or beside it) and how ([synthesis]). With such a recipe `distill` uses the file when it is there, and
    writes it first when it is not.

    Example: ctxdistill queries handbook.toml
    """
    from ctxdistill.recipe import Recipe

    loaded = Recipe.load(recipe, overrides or ())
    with _work(as_json, "stopped; the same command goes on", first="loading the model") as watcher:
        from ctxdistill import display, pipeline

        found = pipeline.queries(loaded, out, force=force, progress=watcher)
    _json(found) if as_json else display.queries(display.console(), found)


@app.command()
def gate(recipe: RecipeArgument, overrides: Overrides = None, as_json: Json = False) -> None:
    """Measure whether there is anything to teach; train nothing.

    The model answers held-out queries with the context and without it.

    Example: ctxdistill gate support.toml eval.max_new_tokens=32
    """
    from ctxdistill.recipe import Recipe

    loaded = Recipe.load(recipe, overrides or ())
    with _work(as_json) as watcher:
        from ctxdistill import display, pipeline

        def judged(found: dict[str, Any]) -> None:
            if not as_json:
                watcher.close()
                display.gate(display.console(), found)

        found = pipeline.gate(loaded, judged=judged, progress=watcher)
    _json(found) if as_json else display.estimate(display.console(), found["estimate"])


@app.command()
def plan(recipe: RecipeArgument, overrides: Overrides = None, as_json: Json = False) -> None:
    """Predict the time, memory and disk that a run takes.

    Every stage is tried on a few rows.

    Example: ctxdistill plan support.toml train.epochs=4
    """
    from ctxdistill.recipe import Recipe

    loaded = Recipe.load(recipe, overrides or ())
    with _work(as_json) as watcher:
        from ctxdistill import display, pipeline

        found = pipeline.plan(loaded, progress=watcher)
    _json(found) if as_json else display.plan(display.console(), found)


@app.command()
def show(
    source: Annotated[Path, typer.Argument(metavar="RECIPE|RUN", help="A recipe or a run folder.", show_default=False)],
    overrides: Overrides = None,
    row: Annotated[int, typer.Option(help="Which row, from 0: training, validation, evaluation.", min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Print a row as teacher and student see it.

    The tokens on which they shall agree come last. Special tokens are visible; what the chat template adds is marked.

    Example: ctxdistill show support.toml --row 3
    """
    from ctxdistill import display

    if source.is_dir():
        if overrides:
            raise RunError("a run's values are fixed", found=" ".join(overrides), fix="show the recipe instead")
        found = _stored_row(source, row)
    else:
        from ctxdistill.recipe import Recipe

        loaded = Recipe.load(source, overrides or ())
        with _work(as_json, first="loading the tokenizer"):
            from ctxdistill import pipeline

            found = pipeline.show(loaded, row)
    _json(found) if as_json else display.row(display.console(), found)


@app.command()
def distill(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. Unset: runs/NAME.", show_default=False)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run in this folder.")] = False,
    as_json: Json = False,
) -> None:
    """Distil the recipe's context into a LoRA adapter.

    The gate runs first and stops when there is nothing to teach, unless gate.on_fail=warn. At the end all that came out
    is measured, and a report is written. On several devices: torchrun --nproc-per-node 4 -m ctxdistill distill ..., or
    accelerate launch.

    Example: ctxdistill distill support.toml train.epochs=2 --out runs/support
    """
    from ctxdistill.recipe import Recipe

    loaded = Recipe.load(recipe, overrides or ())
    folder = out or Path("runs") / (loaded.name or "run")
    again = _again("distill", str(recipe), *(overrides or ()), "--out", str(folder), "--resume")
    with _work(as_json, f"stopped; go on with: {again}", alone=False) as watcher:
        from ctxdistill import pipeline

        run = pipeline.distill(loaded, folder, resume=resume, progress=watcher)
    _finish(run.path, run.evaluation, as_json)


@app.command("label")
def label_(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. Unset: runs/NAME.", show_default=False)] = None,
    ray: Ray = None,
    as_json: Json = False,
) -> None:
    """Ask the teacher about all queries; train nothing.

    What it says is kept: `distill` with the same recipe and folder finds it. Here or on a cluster; run it again to go on.

    Example: ctxdistill label support.toml --ray 10.0.0.5:6379 --out runs/support
    """
    from ctxdistill.recipe import Recipe

    loaded = Recipe.load(recipe, overrides or ())
    folder = out or Path("runs") / (loaded.name or "run")
    with _work(as_json, "stopped; the same command goes on") as watcher:
        from ctxdistill import display, pipeline

        found = pipeline.label_rows(loaded, folder, ray=ray, progress=watcher)
    if as_json:
        _json(found)
    else:
        text = f"{found['rows']:,} completions labelled, {found['made']:,} of them now, in {found['targets']}"
        display.say(display.console(), text)


@app.command()
def evaluate(run: RunArgument, as_json: Json = False) -> None:
    """Measure a finished run again, and renew its report.

    Example: ctxdistill evaluate runs/support
    """
    RunDir.existing(run)
    with _work(as_json) as watcher:
        from ctxdistill import pipeline

        found = pipeline.evaluate(run, progress=watcher)
    _finish(run, found, as_json)


@app.command("try")
def try_(
    run: RunArgument,
    text: Annotated[
        str, typer.Argument(metavar="TEXT", help="A query; - reads it from standard input.", show_default=False)
    ],
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest answer. Unset: as in the recipe.", min=1, show_default=False)
    ] = None,
    strength: Annotated[float, typer.Option(help="Of the adapter: 0 none, 1 as trained.", min=0.0)] = 1.0,
    as_json: Json = False,
) -> None:
    """Answer a query without the context, with it, and distilled.

    Example: ctxdistill try runs/demo "remind me to water the plants on friday at noon"
    """
    RunDir.existing(run)
    if text == "-":
        text = _standard_input()
    with _work(as_json, first="loading the model") as watcher:
        from ctxdistill import display, pipeline

        shown, answers = display.Answers(display.console()), dict.fromkeys(display.TRIED, "")
        with contextlib.closing(
            pipeline.try_text(run, text, max_new_tokens=max_new_tokens, strength=strength)
        ) as pieces:
            for arm, piece in pieces:
                watcher.close()  # from here on the answers have the terminal
                answers[arm] += piece
                if not as_json:
                    shown.add(arm, piece)
    if as_json:
        _json({"query": text, "answers": answers})
    else:
        shown.end(answers)


@app.command()
def export(
    run: RunArgument,
    to: Annotated[Format, typer.Option("--format", help="What to write.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Folder. Unset: RUN/export/FORMAT.", show_default=False)] = None,
    strength: Annotated[float, typer.Option(help="Factor of the adapter; 0 gives the base.", min=0.0)] = 1.0,
    push: Annotated[
        str | None,
        typer.Option(metavar="REPO", help="Say what would go to this repository of the hub.", show_default=False),
    ] = None,
    push_for_real: Annotated[bool, typer.Option("--push-for-real", help="With --push: upload it, as private.")] = False,
    as_json: Json = False,
) -> None:
    """Write a run's student for a serving stack.

    peft: for vLLM and transformers. merged: one set of weights. gguf, gguf-adapter: for llama.cpp. ollama: a Modelfile.
    The command that serves it is printed.

    Example: ctxdistill export runs/support --format gguf-adapter
    """
    if push_for_real and not push:
        raise RunError("--push-for-real needs a repository", fix="name it: --push OWNER/NAME --push-for-real")
    RunDir.existing(run)
    with _work(as_json, first="loading the model") as watcher:
        from ctxdistill import display
        from ctxdistill import export as exports

        found = exports.export(run, to, out, strength=strength, progress=watcher)
        if push:
            found["push"] = exports.push(found["folder"], push, really=push_for_real)
    _json(found) if as_json else display.exported(display.console(), found)


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(metavar="EXPORT", help="An export's folder.", show_default=False)],
    against: Annotated[Path, typer.Option(metavar="RUN", help="The run that it came from.", show_default=False)],
    endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="Ask a server that serves the export.", show_default=False)
    ] = None,
    model: Annotated[
        str, typer.Option(help="The server's name of the model. Unset: the export's, else its first.")
    ] = "",
    base: Annotated[
        Path | None, typer.Option(help="A GGUF base under a GGUF adapter. Unset: the run's.", show_default=False)
    ] = None,
    rows: Annotated[int, typer.Option(help="Held-out rows to ask.", min=1)] = 16,
    as_json: Json = False,
) -> None:
    """Compare an export, where it will live, with the student.

    Both are asked about held-out rows. The prompt's tokens, the next-token distributions and the greedy answers are
    compared. Exit code 2 if they differ.

    Example: ctxdistill check runs/demo/export/gguf --against runs/demo
    """
    RunDir.existing(against)
    with _work(as_json, first="loading the model") as watcher:
        from ctxdistill import check as checks
        from ctxdistill import display

        found = checks.check(folder, against, endpoint=endpoint, model=model, base=base, rows=rows, progress=watcher)
    _json(found) if as_json else display.checked(display.console(), found)
    if not found["passed"]:
        raise typer.Exit(2)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of finished runs.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The page that is written, or a folder for it.")] = Path("compare.html"),
    as_json: Json = False,
) -> None:
    """Put finished runs side by side, with paired tests.

    They are compared on the held-out rows that they share, in the terminal and on a page.

    Example: ctxdistill compare runs/rank-4 runs/rank-16 --out ranks.html
    """
    from ctxdistill import compare as comparing
    from ctxdistill import display

    found = comparing.compare(runs)
    page = comparing.write_page(found, out / "compare.html" if out.is_dir() else out)
    if as_json:
        _json({"page": str(page), **found})
    else:
        display.comparison(display.console(), found, page)


@app.command()
def playground(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of finished runs.", show_default=False)],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets others in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes any that is free.", min=0, max=65535)] = 7860,
    as_json: Json = False,
) -> None:
    """Open a page where base, teacher and student answer.

    Side by side, with a dial for the adapter's strength. Ctrl-C ends it. Needs the extra:
    pip install "ctxdistill[playground]".

    Example: ctxdistill playground runs/demo
    """
    for run in runs:
        RunDir.existing(run)
    with _work(as_json, first="loading the model") as watcher:
        from ctxdistill import display
        from ctxdistill.playground import LOCAL, serve

        def ready(url: str) -> None:
            watcher.close()
            if as_json:
                print(json.dumps({"url": url, "runs": [str(run) for run in runs]}), file=sys.__stdout__, flush=True)
                return
            display.say(display.console(), f"playground: {url} (Ctrl-C ends it)")
            if host not in LOCAL:
                display.say(
                    display.console(), "whoever reaches this address can use the model and read held-out queries"
                )

        serve(runs, host=host, port=port, ready=ready)


@app.command()
def study(
    path: Annotated[
        Path | None, typer.Argument(metavar="[STUDY]", help="The study, a .toml file.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="The study's folder. Unset: runs/NAME.", show_default=False)] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Compute cells again that failed or did not fit.")] = False,
    paper: Paper = None,
    ray: Ray = None,
    tasks: Annotated[bool, typer.Option("--tasks", help="List tasks, patterns and arms, and exit.")] = False,
    as_json: Json = False,
) -> None:
    """Compare in-context learning, fine-tuning and distillation.

    On the same rows, with a page about it. Run it again to go on: finished cells are kept, unless a setting that they
    depend on has changed. A cell that cannot be computed becomes a row with its reason.

    Example: ctxdistill study recipes/small.toml tasks.root=data --out runs/small
    """
    from ctxdistill import display
    from ctxdistill.arms import ARMS, CONTROLS
    from ctxdistill.grid import Study
    from ctxdistill.tasks import TASKS

    if tasks:
        found: dict[str, Any] = {
            "tasks": {name: {"title": t.title, "labels": list(t.labels), "patterns": list(t.patterns),
                             "ood": [*t.ood, *t.extra_ood]} for name, t in TASKS.items()},
            "arms": {name: arm.about for name, arm in ARMS.items()},
            "controls": CONTROLS,
        }  # fmt: skip
        _json(found) if as_json else display.grid(display.console(), found)
        return
    if path is None:
        raise RunError("no study is named", expected="a .toml file", fix="ctxdistill study --tasks lists what there is")
    loaded = Study.load(path, overrides or ())
    folder = out or Path("runs") / (loaded.name or "study")
    more = [
        *(["--retry"] if retry else []),
        *(["--paper", str(paper)] if paper else []),
        *(["--ray", ray] if ray else []),
    ]
    again = _again("study", str(path), *(overrides or ()), "--out", str(folder), *more)
    with _work(as_json, f"stopped; go on with: {again}", first=f"{len(loaded.cells())} cells; {LOADING}") as watcher:
        from ctxdistill import study as studies

        page = studies.study(loaded, folder, retry=retry, paper_csv=paper, ray=ray, progress=watcher)
        found = {"report": str(page), "text": str(page.with_suffix(".md")), "study": str(folder / "study.json")}
        found |= studies.outcome(loaded, folder)
    _json(found) if as_json else display.study(display.console(), found)


@app.command()
def compose(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN=WEIGHT", help="Finished runs and their weights.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="A new folder for the sum.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Sum the adapters of several runs into one, and measure it.

    Does the sum still do what each of them does? Rows of each run are compared with the teachers of all; where the
    contexts are not kept apart, it says so.

    Example: ctxdistill compose runs/persona=1 runs/format=0.8 --out runs/both
    """
    weights: dict[str | Path, float] = {}
    for text in runs:
        folder, _, weight = text.rpartition("=")
        try:
            weights[folder] = float(weight)
        except ValueError:
            folder = ""
        if not folder or not math.isfinite(weights[folder]):
            raise RunError(f"cannot read {text!r}", expected="RUN=WEIGHT", fix="for example: runs/persona=1")
    with _work(as_json, first="loading the model") as watcher:
        from ctxdistill import display, pipeline

        found = pipeline.compose(weights, out, progress=watcher)
    _json({"adapter": str(out / "adapter"), **found}) if as_json else display.composed(display.console(), out, found)


@app.command()
def targets(
    action: Annotated[Literal["verify", "stats", "prune"], typer.Argument(help="What to do.", show_default=False)],
    folder: Annotated[
        Path, typer.Argument(metavar="RUN|FOLDER", help="A run's folder, or targets.dir.", show_default=False)
    ],
    as_json: Json = False,
) -> None:
    """Verify, count or prune what is kept of the teacher.

    verify: compare all checksums; exit code 2 and the names of damaged shards. stats: rows, tokens, bytes per token.
    prune: drop rows that are damaged or that the run does not use, and files that a kill has left, and put small shards
    together.

    Example: ctxdistill targets verify runs/support
    """
    with _work(as_json, "stopped; nothing that was whole is lost", first="reading the index", model=False) as watcher:
        from ctxdistill import display, upkeep

        if action == "stats":
            found = upkeep.stats(folder)
        else:
            found = (upkeep.verify if action == "verify" else upkeep.prune)(folder, progress=watcher)
    _json(found) if as_json else display.targets(display.console(), action, found)
    if found.get("damaged"):
        raise typer.Exit(2)


@app.command()
def report(run: RunArgument, paper: Paper = None, as_json: Json = False) -> None:
    """Write a run's or a study's report again.

    These are report.html and report.md in its folder.

    Example: ctxdistill report runs/support
    """
    if (run / "study_recipe.json").is_file():
        from ctxdistill.study_report import write_report as write_study_report

        page = write_study_report(run, paper)
    else:
        from ctxdistill.report import write_report

        if paper:
            raise RunError("--paper belongs to a study", found=f"{run} is no study's folder", fix="leave it out")
        page = write_report(RunDir.existing(run).path)
    _say_page(page, as_json)


def _say_page(page: Path, as_json: bool) -> None:
    if as_json:
        _json({"report": str(page), "text": str(page.with_suffix(".md"))})
    else:
        from ctxdistill import display

        display.say(display.console(), f"report: {page}")


# -- what the commands share ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _work(
    as_json: bool, stopped: str = "stopped", first: str = LOADING, *, alone: bool = True, model: bool = True
) -> Iterator[Watcher]:
    """Something long: progress on stderr, nothing of others on stdout beside the JSON, and a word after Ctrl-C or SIGTERM. `alone`:
    not for several processes. `model`: it will load one."""
    if alone and processes.count() > 1:
        raise RunError(
            "only `distill` and `demo` run in several processes",
            found=f"{processes.count()} processes",
            fix="start this command without torchrun or accelerate launch",
        )
    from ctxdistill import display

    try:
        with contextlib.ExitStack() as stack:
            watcher = display.Watcher(first)
            stack.enter_context(_stoppable(watcher))
            if as_json:
                stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            stack.enter_context(watcher)
            if model:
                _load_libraries()
            yield watcher
    except KeyboardInterrupt:
        raise Interrupted(stopped) from None


def _load_libraries() -> None:
    """Load torch, transformers and peft. That makes most of a million objects that stay; to look for garbage among them, while they
    are made and ever after, takes a tenth of the time."""
    if "ctxdistill.lm" in sys.modules:
        return
    gc.disable()
    try:
        import ctxdistill.lm  # noqa: F401
    finally:
        gc.freeze()
        gc.enable()


def _again(*words: str) -> str:
    """The command line that goes on with a command."""
    return shlex.join(["ctxdistill", *(["--allow-code"] if trust.code_allowed() else []), *words])


@contextlib.contextmanager
def _stoppable(watcher: Watcher) -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM raise a KeyboardInterrupt, and again at the next progress: one that is raised while Python runs a
    finalizer is lost. A signal to which somebody has given another meaning keeps it."""

    def stop(*_: object) -> None:
        watcher.stopped = True
        raise KeyboardInterrupt

    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    main = threading.current_thread() is threading.main_thread()
    ours = {number: handler for number, handler in usual.items() if main and signal.getsignal(number) == handler}
    for number in ours:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)


def _finish(path: Path, evaluation: dict[str, Any], as_json: bool) -> None:
    if as_json:
        places = {"run": path, "adapter": path / "adapter", "report": path / "report.html"}
        _json({**{name: str(place) for name, place in places.items()}, "evaluation": evaluation})
    else:
        from ctxdistill import display

        display.results(display.console(), path, evaluation, RunDir(path).read_jsonl("scores.jsonl"))


def _standard_input() -> str:
    """The text on standard input, without the end of its last line."""
    try:
        return sys.stdin.buffer.read().decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise RunError("cannot read the text on standard input", expected="UTF-8", found=str(error)) from None


def _stored_row(source: Path, row: int) -> dict[str, Any]:
    """A row of a run as the run keeps it; needs no model."""
    rows = RunDir.existing(source).read_jsonl("prompts.jsonl")
    if not rows:
        raise RunError(f"{source} holds no prompts yet", fix="show the recipe instead, or go on with the run: --resume")
    if row >= len(rows):
        raise RunError(f"{source} holds no row {row}", expected=f"0 to {len(rows) - 1}", fix="choose another --row")
    found: dict[str, Any] = rows[row]
    return found


def _json(value: dict[str, Any]) -> None:
    """The one JSON object. ASCII only, which lets no control character through; NaN, which JSON lacks, becomes null."""
    print(json.dumps(_known(value), indent=2, default=str))


def _known(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _known(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_known(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _run(arguments: Sequence[str]) -> int:
    """The command. Of several processes the first one prints, and of those that fail the first to do so."""
    streams = sys.stdout, sys.stderr
    if not processes.leads():
        _mute()
    try:
        code = typer.main.get_command(app).main(args=arguments, prog_name="ctxdistill", standalone_mode=False) or 0
        processes.end()
        return int(code)
    except BaseException:
        sys.stdout, sys.stderr = streams
        if processes.count() > 1:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal and the launcher may each send one
            if not processes.may_speak():
                _mute()
        raise


def _mute() -> None:
    """Print nothing until the process ends."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def _told(error: Exception | KeyboardInterrupt) -> tuple[int, dict[str, Any]]:
    """Print an error; the exit code, and the same for machines."""
    from ctxdistill import display

    error = as_memory_error(error) or error
    if isinstance(error, CtxDistillError):
        display.error(str(error))
        return 2, display.error_dict(error)
    if isinstance(error, typer.TyperException):
        message, context = error.format_message(), getattr(error, "ctx", None)
        if message:  # else the help was printed
            display.error(f"{message}\n  try: {context.command_path if context else 'ctxdistill'} --help")
        return error.exit_code, {"kind": "UsageError", "message": message}
    if isinstance(error, Interrupted | KeyboardInterrupt | typer.Abort):
        message = str(error) or "stopped"
        display.say(display.console(stderr=True), message)
        return 130, {"kind": "Interrupted", "message": message}
    sys.stderr.write(display.visible(redact(traceback.format_exc())))
    display.error(f"this is a bug in ctxdistill {__version__}; please report it with the lines above")
    return 1, {"kind": "Bug", "message": redact(f"{type(error).__name__}: {error}")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. Prints every error, and raises none."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character must not end a run
    try:
        code = _run(given)
        found = {"kind": "Interrupted", "message": "stopped"} if code == 130 else None
    except (Exception, KeyboardInterrupt) as error:
        code, found = _told(error)
    if found and "--json" in given:
        _json({"error": found})
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
