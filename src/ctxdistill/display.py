"""What the command line prints: progress, the gate, results, prompts, errors.

In: plain data as the pipeline returns it. Out: text on a rich console. Invariants: text that comes from a model or from
data is never read as markup and cannot move the cursor or reorder the line (`plain`); nothing depends on colour alone;
nothing here imports torch.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from ctxdistill.errors import CtxDistillError, redact
from ctxdistill.report import visible
from ctxdistill.results import (
    arm_label,
    behaviour_facts,
    cells,
    crosstalk_table,
    examples,
    finite,
    in_one_line,
    in_time,
    result_table,
    shorter,
    tally,
    verdict,
)

WORTH_ROUNDING = 1.5
"""How many times as fast a CPU must multiply in the other of float32 and bfloat16 for `plan` to speak of it."""
SIDE_BY_SIDE = 120
"""Columns from which two prompts stand beside each other."""
QUIET = 10.0
"""Seconds between two lines about the same stage when nobody watches a bar."""
TRIED = ("zero_shot", "in_context", "distilled")
"""The arms of `try`, in their order."""
LONGEST = 200
"""Characters of an answer in the side-by-side table; what is left out is counted."""


def console(*, stderr: bool = False) -> Console:
    """A console for now: width and colour are those of the stream as it is."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else SIDE_BY_SIDE
    return Console(file=stream, width=width, highlight=False, emoji=False, markup=False)


def plain(text: Any, style: str = "") -> Text:
    """Text from anywhere, shown as itself."""
    return Text(visible(str(text)), style=style)


def say(out: Console, text: Any, style: str = "") -> None:
    """A line, shown as itself and never broken, so that it can be copied."""
    out.print(plain(text, style), soft_wrap=True)


# -- progress ---------------------------------------------------------------------------------------------------------


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each", style="dim")


class Watcher:
    """A `Progress` callable that reports on stderr: a bar on a terminal, else a line now and then.

    A stage's name may end in a changing remark in brackets, such as `train (loss 0.123)`. On a terminal the remark loses its
    beginning where the line is too narrow, and what a stage did inside of another one goes when that one goes on.
    """

    def __init__(self, first: str) -> None:
        self.stopped = False
        """Whether the user has asked to stop; then the next call raises KeyboardInterrupt."""
        self.err = console(stderr=True)
        self._first = first
        self._log = _Log(self.err)
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._done: dict[str, int] = {}
        self._name, self._state, self._printed = "", ("", 0, 0), True
        self._began = self._last = self._called = time.monotonic()
        self._first_call = (self._called, 0)  # of the stage: when, and how much was done

    def __enter__(self) -> Watcher:
        logging.getLogger("ctxdistill").addHandler(self._log)
        logging.getLogger("ctxdistill").setLevel(logging.INFO)
        if not self.err.is_terminal:
            self.err.print(self._first)
            return self
        columns = BarColumn(self._bar_width), MofNCompleteColumn(), _Rate(), TimeRemainingColumn()
        text = TextColumn("{task.description}", markup=False)
        self._bar = Progress(text, *columns, console=self.err, redirect_stdout=False)
        self._bar.start()
        self._tasks[""] = self._bar.add_task(self._first, total=None)
        return self

    def __exit__(self, *failure: object) -> None:
        logging.getLogger("ctxdistill").removeHandler(self._log)
        self.close()

    def close(self) -> None:
        """Leave the terminal to others, until the next call. May be called twice."""
        self._line()
        if self._bar:
            self._forget_first()
            self._bar.stop()
            for task in self._bar.task_ids:  # what is drawn stays; it is not to be drawn again below
                self._bar.remove_task(task)
            self._tasks.clear()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        name = stage.partition(" (")[0]
        again = done < self._done.get(name, 0)  # the same stage, on other rows
        self._done[name] = done
        if self._bar:
            self._forget_first()
            self._bar.start()
            if again or name not in self._tasks:
                self._tasks[name] = self._bar.add_task(stage, total=total)
            self._end_inner(self._tasks[name])
            self._bar.update(self._tasks[name], description=self._fitting(stage, total), completed=done, total=total)
            return
        if again or name != self._name:
            self._line()  # a stage that ended early, too, has its last line
            now = time.monotonic()
            self._name, self._began, self._last, self._first_call = name, self._called, now, (now, done)
        self._state, self._printed, self._called = (stage, done, total), False, time.monotonic()
        if done >= total or self._called - self._last >= QUIET:
            self._line()

    @property
    def _bar_width(self) -> int:
        return min(40, self.err.width // 5)

    def _fitting(self, stage: str, total: int) -> str:
        """The stage's name, with the end of its remark where the line has no room for all of it."""
        counts = 2 * len(str(total)) + 1
        room = self.err.width - self._bar_width - counts - len("99.9 s each 0:00:00") - 4
        name, _, remark = (text := visible(stage)).partition(" (")
        left = max(room - len(f"{name} (…"), 1)
        return text if len(text) <= room or not remark else f"{name} (…{remark[-left:]}"

    def _end_inner(self, outer: TaskID) -> None:
        """Remove the bars of what was done inside of a stage that is not over."""
        if self._bar and not next(task for task in self._bar.tasks if task.id == outer).finished:
            self._tasks = {name: task for name, task in self._tasks.items() if task <= outer}
            for task in [task for task in self._bar.task_ids if task > outer]:
                self._bar.remove_task(task)

    def _forget_first(self) -> None:
        if self._bar and "" in self._tasks:
            self._bar.remove_task(self._tasks.pop(""))

    def _line(self) -> None:
        if self._printed:
            return
        (stage, done, total), (since, first) = self._state, self._first_call
        text = f"{stage}: {done}/{total} in {self._called - self._began:.0f} s"
        if self._called - since >= 1 and done > first:  # a stage may begin, or go on, with much done already
            each = (self._called - since) / (done - first)
            text += f", {1 / each:.1f}/s" if each <= 1 else f", {each:.1f} s each"
            text += f", {duration(each * (total - done))} left" if done < total else ""
        say(self.err, text)
        self._printed, self._last = True, time.monotonic()


class _Log(logging.Handler):
    """What the pipeline remarks, above the bar."""

    def __init__(self, err: Console) -> None:
        super().__init__(logging.INFO)
        self.err = err

    def emit(self, record: logging.LogRecord) -> None:
        say(self.err, redact(record.getMessage()), "dim")


# -- errors -----------------------------------------------------------------------------------------------------------


def error(message: str) -> None:
    """`Error: ...` on stderr."""
    console(stderr=True).print(Text.assemble(("Error: ", "bold red"), visible(message)), soft_wrap=True)


def error_dict(found: CtxDistillError) -> dict[str, Any]:
    """The same for machines."""
    names = ("message", "expected", "found", "fix")
    return {"kind": type(found).__name__, **{name: getattr(found, name) for name in names}}


# -- gate and results -------------------------------------------------------------------------------------------------


def gate(out: Console, found: Mapping[str, Any]) -> None:
    """The gate's verdict and its reasons."""
    style = "bold green" if found["verdict"] == "teach" else "bold yellow"
    out.print(Text.assemble("gate: ", (found["verdict"], style)))
    for reason in found.get("reasons") or []:
        _item(out, reason)
    if query := found.get("query_tokens"):
        longest = f"a query {query['mean']:.0f} (longest {query['max']:,})"
        window = f"{found['window']:,} tokens" if found.get("window") else "not known"
        context = f"the context takes {found['context_tokens']:,} tokens"
        if found["context_tokens"] <= 0:
            context = f"with the context in it the prompt is {shorter(-found['context_tokens'])}"
        _item(out, f"{context}, {longest}; the model's window: {window}")


def estimate(out: Console, found: Mapping[str, Any]) -> None:
    """What the rest would take, below the gate's verdict."""
    for text in (_expected(found), *found["notes"]):
        _item(out, text)


def plan(out: Console, found: Mapping[str, Any]) -> None:
    """What a run would take, stage by stage."""
    rows = ", ".join(f"{n:,} {split}" for split, n in found["rows"].items() if n)
    say(out, f"{found['model']} on {found['device']}, rows: {rows}")
    table = Table(box=None, pad_edge=False, show_header=False)
    for stage, seconds in found["stages"].items():
        table.add_row(plain(stage), plain(duration(seconds)))
    out.print(table)
    say(out, _expected(found))
    for note in found["notes"]:
        _item(out, note)
    gain = found.get("bfloat16") or 1.0
    slower, faster = "float32", "bfloat16"
    if found["dtype"] == faster:
        slower, faster, gain = faster, slower, 1 / gain
    if gain >= WORTH_ROUNDING:
        text = f"this processor multiplies in {faster} {gain:.1f} times as fast as in {slower}; "
        say(out, f"{text}to see what the run would then take, add model.dtype={faster}")


def _expected(found: Mapping[str, Any]) -> str:
    text = f"estimated: {duration(found['seconds'])} to distil, {found['memory_mb']:,.0f} MB of memory"
    text += f", {found['disk_mb']:,.0f} MB on disk"
    return text + (f", cost {found['cost']:.2f}" if finite(found.get("cost")) else "")


def queries(out: Console, found: Mapping[str, Any], shown: int = 5) -> None:
    """What was written: how much by each kind and from each chunk, what was rejected, how different the rest is."""
    candidates = f"{found['candidates']:,} candidates in {duration(found['seconds'])}"
    say(out, f"{found['written']:,} of {found['wanted']:,} queries, from {candidates}", "bold")
    if found["rejected"]:
        out.print(plain("rejected: " + ", ".join(f"{reason} {n:,}" for reason, n in found["rejected"].items())))
    for title, column in (("kinds", "kind"), ("chunks", "chunk")):
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column(column)
        for name in ("written", "candidates"):
            table.add_column(name, justify="right")
        for name, value in found[title].items():
            table.add_row(plain(name), f"{value['written']:,}", f"{value['candidates']:,}")
        out.print(table)
    if d := found["diversity"]:
        out.print(
            plain(
                f"diversity: {d['distinct_1']:.2f} of the words and {d['distinct_2']:.2f} of the word pairs are different; "
                f"mean distance of two queries {d['mean_distance']:.2f}, of a query to its nearest {d['nearest_distance']:.2f}"
            ),
            soft_wrap=True,
        )
    for row in found.get("examples", [])[:shown]:
        _item(out, f"{row['kind']}: {row['query']}")
    say(out, f"file: {found['file']}")


def grid(out: Console, found: dict[str, Any]) -> None:
    """What a study can be made of."""
    for title in ("tasks", "arms", "controls"):
        table = Table(
            box=None, pad_edge=False, title=title, title_justify="left", title_style="bold", show_header=False
        )
        for name, value in found[title].items():
            if title == "tasks":
                ood = ", ".join(value["ood"]) or "none"
                value = f"{value['title']}; patterns {', '.join(value['patterns'])}; out of domain: {ood}"
            table.add_row(plain(name), plain(value))
        out.print(table)
        out.print()


def study(out: Console, found: Mapping[str, Any]) -> None:
    """How many cells have a result and why others have none, what the claims come to, and where all of it is."""
    holes = sum(found["cells"].values()) - found["cells"]["done"]
    again = f" (--retry computes {'it' if holes == 1 else 'these'} again)" if holes else ""
    say(out, f"cells: {tally(found['cells'])}{again}")
    for status, first in found["reasons"].items():
        say(out, f"  {tally({status: found['cells'][status]})}, first {first['cell']}: {in_one_line(first['reason'])}")
    for claim in found["claims"]:
        say(out, f"{claim['verdict']}: {claim['claim']}")
    say(out, f"report: {found['report']} and {Path(found['text']).name}")
    say(out, f"all numbers: {found['study']}")


def composed(out: Console, path: Path, found: Mapping[str, Any]) -> None:
    """The cross-talk matrix of a sum of adapters, what each of them does alone, the verdict."""
    if matrix := crosstalk_table(found):
        out.print(_columns(matrix["columns"], matrix["rows"]))
        out.print()
    alone = [[i, *(cells("kl_closed", found["alone"][i][j]) for j in found["names"])] for i in found["names"]]
    out.print(_columns(["KL closed %, rows of", *(f"by {name} alone" for name in found["names"])], alone))
    out.print()
    verdict = "Good: each context is learnt, and they are kept apart."
    if not found["good"]:
        verdict = f"Not good: {'; '.join(found['reasons'])}."
    out.print(plain(verdict, "bold"))
    say(out, f"adapter: {path / 'adapter'} (rank {found['rank']}; transformers and vLLM use it as any PEFT adapter)")
    say(out, "the sum: " + " + ".join(f"{weight:g} times {name}" for name, weight in found["weights"].items()))


def results(out: Console, path: Path, evaluation: Mapping[str, Any], scores: Sequence[Mapping[str, Any]]) -> None:
    """Everything that a finished run says: gate, table, five rows side by side, verdict, cost, files."""
    if evaluation.get("gate"):
        gate(out, evaluation["gate"])
    out.print()
    out.print(_table(evaluation))
    rows, answers = evaluation.get("rows", 0), evaluation.get("answers", 0)
    out.print(plain(f"{rows} held-out rows, {answers} with a reference answer; in brackets: 95 % intervals", "dim"))
    if shown := examples(scores, evaluation, 5):
        out.print()
        _side_by_side(out, shown, evaluation["arms"])
    if facts := behaviour_facts(evaluation):
        out.print()
        out.print(plain("elsewhere", "bold"))
        for name, text in facts:
            _item(out, f"{name}: {text}")
    if matrix := crosstalk_table(evaluation.get("crosstalk")):
        out.print()
        out.print(_columns(matrix["columns"], matrix["rows"]))
    found = verdict(evaluation)
    out.print()
    out.print(plain(found["sentence"], "bold"))
    for remark in [*found["remarks"], *pays_off(evaluation.get("cost") or {}), *(evaluation.get("notes") or [])]:
        _item(out, remark)
    out.print()
    for name, file in (("adapter", path / "adapter"), ("report", path / "report.html")):
        say(out, f"{name}: {file}")


def comparison(out: Console, found: Mapping[str, Any], page: Path) -> None:
    """Several runs side by side: the table, the tested differences, what is not compared."""
    for run in found["runs"]:
        say(out, f"{run['letter']}  {run['name']} ({run['path']})", "bold")
        out.print(Padding(plain(run["sentence"]), (0, 0, 0, 3), expand=False))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("")
    for run in found["runs"]:
        table.add_column(plain(run["letter"]), justify="right", overflow="fold")
    for row in found["table"]:
        table.add_row(plain(row["label"]), *(plain(cell) for cell in row["cells"]))
    out.print()
    out.print(table)
    for runs, pairs in itertools.groupby(found["pairs"], lambda pair: pair["runs"]):
        out.print()
        tests = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        for title in (runs, "rows", "difference", "p (Holm)", ""):
            tests.add_column(plain(title), overflow="fold")
        for pair in pairs:
            tests.add_row(*(plain(pair[name]) for name in ("label", "rows", "text", "p_holm_text", "reading")))
        out.print(tests)
    out.print()
    for item in found["refused"]:
        _item(out, f"{item['runs']}, {item['what']}: not compared, {item['why']}")
    for note in found["notes"]:
        _item(out, note)
    say(out, f"page: {page}")


def _columns(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table of numbers; the first column names its rows."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(plain(column), justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(plain, row))
    return table


def _item(out: Console, text: str) -> None:
    out.print(Padding(plain(f"- {text}"), (0, 0, 0, 2), expand=False))


def _table(evaluation: Mapping[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("")
    for arm in evaluation["arms"]:
        table.add_column(plain(arm_label(arm)), justify="right", overflow="fold")
    for row in result_table(evaluation):
        table.add_row(plain(row["label"]), *(plain(row["cells"][arm]) for arm in evaluation["arms"]))
    return table


def _side_by_side(out: Console, shown: Iterable[Mapping[str, Any]], arms: Sequence[str]) -> None:
    """Each query with its reference answer, and below it one line per arm; columns would break long answers apart."""
    width = max(len(arm_label(arm)) for arm in (*arms, "reference"))
    for row in shown:
        out.print(plain(row["query"] or row["row"], "bold"))
        lines = [("reference", row["answer"], "")] if row["answer"] is not None else []
        lines += [(found["label"], found["prediction"], found["mark"]["text"]) for found in row["arms"]]
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(width=width, no_wrap=True, style="dim")
        grid.add_column(overflow="fold")
        grid.add_column(no_wrap=True)
        for label, text, mark in lines:
            style = "green" if mark.startswith("✓") else "red" if mark.startswith("✗") else ""
            grid.add_row(plain(label), plain(_clip(text)), plain(mark, style))
        out.print(Padding(grid, (0, 0, 0, 2), expand=False))


def _clip(text: str | None) -> str:
    flat = "–" if text is None else " ⏎ ".join(line.strip() for line in text.strip().splitlines())
    return flat if len(flat) <= LONGEST else f"{flat[:LONGEST]} … (+{len(flat) - LONGEST} characters)"


def pays_off(cost: Mapping[str, Any]) -> list[str]:
    """When the work of distilling is earned back, as sentences."""
    lines = []
    if finite(saved := cost.get("prompt_tokens_saved")):
        total = (cost.get("seconds") or {}).get("total")
        spent = f"; distilling took {duration(total)}" if finite(total) else ""
        lines.append(f"every request is {shorter(saved)}{spent}")
    money = cost.get("break_even_money") or {}
    ways = [("time on this machine", cost.get("break_even_requests")), ("prompt tokens", cost.get("break_even_tokens"))]
    for way, requests in ways + ([("money", money.get("requests"))] if money else []):
        if finite(requests):
            days = f" ({money['days']:,.1f} days)" if way == "money" and finite(money.get("days")) else ""
            lines.append(f"pays off after {math.ceil(requests):,} requests, counted in {way}{days}")
        elif way == "time on this machine":
            lines += (
                [f"counted in {way} it {said}"] if (said := in_time(cost.get("ms_saved"))) else []
            )  # else not measured
        elif cost:
            lines.append(f"never pays off counted in {way}: a request saves none")
    return lines


def duration(seconds: float) -> str:
    """`42 s`, `3.5 min`, `2.1 h`."""
    for unit, size, digits in (("h", 3600, 1), ("min", 60, 1)):
        if seconds >= 2 * size:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds:.0f} s"


# -- exports ----------------------------------------------------------------------------------------------------------


def exported(out: Console, found: Mapping[str, Any]) -> None:
    """Where an export is, what is in it, how to serve and to ask it."""
    lines = [f"{found['format']}: {found['folder']}", *_files(found["files"])]
    if merged := found["merged"]:
        lines.append(
            f"merged in float32, written as {found['dtype']}; against base and adapter: KL {merged['kl']:.2g} nats per token "
            f"(at most {merged['kl_max']:.2g}), the same next token at {merged['top1']:.1%} of {merged['tokens']} positions"
        )
    lines += ["serve it:", *(f"  {command}" for command in found["serve"])]
    (way, asked), *_ = found["request"].items()
    path = "chat/completions" if way == "messages" else "completions"
    lines.append(f"ask it at /v1/{path}, with such {way}: {json.dumps(asked, ensure_ascii=False)}")
    if words := found.get("label_words"):
        lines.append(f"hold the server to the label words, among which the results were chosen: {', '.join(words)}")
        lines.append("  (vLLM: structured_outputs.choice; llama.cpp: a grammar)")
    if push := found.get("push"):
        would = f"nothing is uploaded; --push-for-real would put into {push['repo']}, as private:"
        lines += [f"uploaded to {push['uploaded']}:" if push["uploaded"] else would, *_files(push["files"])]
        lines += [f"  - {remark}" for remark in push["remarks"]]
    for line in lines:
        say(out, line)


def _files(sizes: Mapping[str, int]) -> list[str]:
    return [f"  {name}  {size / 1e6:,.2f} MB" for name, size in sizes.items()]


def checked(out: Console, found: Mapping[str, Any]) -> None:
    """What `check` compared, and its verdict."""
    asked = f" (model {found['model']})" if found["model"] else ""
    out.print(
        plain(f"{found['format']} through {found['runtime']}{asked}, {found['rows']} held-out rows"), soft_wrap=True
    )
    for item in found["checks"]:
        mark, style = ("✓", "green") if item["passed"] else ("✗", "red")
        say(out, f"{mark} {item['check']}: {item['found']}", style)
        say(out, f"    allowed: {item['allowed']}")
    labels = "" if found["labels"] is None else f"; {found['labels']} are label words"
    out.print(plain(f"  answers: {found['same_text']} of {found['rows']} are the same, letter by letter{labels}"))
    for row in [r for r in found["answers"] if r["student"] != r["export"]][:3]:
        for line in (row["query"], f"  student: {_clip(row['student'])}", f"  export:  {_clip(row['export'])}"):
            say(out, f"    {_clip(line) if line == row['query'] else line}")
    verb, style = ("answers", "bold green") if found["passed"] else ("does NOT answer", "bold red")
    out.print(plain(f"the export {verb} as the student does", style))


def targets(out: Console, action: str, found: Mapping[str, Any]) -> None:
    """What was found in a target store, or done with it."""
    shards = (
        f"{found['folder']}: {found['rows']:,} rows in {found['shards']:,} shards, {found['bytes'] / 2**20:,.1f} MB"
    )
    say(out, shards)
    if action == "verify":
        for bad in found["damaged"]:
            say(out, f"✗ {bad['shard']} ({bad['rows']} rows): {bad['problem']}", "red")
        good = not found["damaged"]
        out.print(plain("✓ every checksum is right", "green") if good else plain("drop them: ctxdistill targets prune"))
    elif action == "stats":
        rows = [[kind, *(f"{c[name]:,}" for name in ("rows", "tokens", "bytes")),
                 f"{c['bytes_per_token']:,.1f}" if c["tokens"] else "-"] for kind, c in found["kinds"].items()]  # fmt: skip
        out.print(_columns(["kind", "rows", "tokens", "bytes", "bytes per token"], rows))
        unused = "not known" if found["unused"] is None else f"{found['unused']:,}"
        more = {
            "rows the run does not use": unused,
            "repeated rows": found["repeated"],
            "files left over": found["leftovers"],
        }
        for name, value in more.items():
            out.print(plain(f"  {name}: {value}"))
    else:
        before = found["before"]
        out.print(plain(f"  before: {before['shards']:,} shards, {before['bytes'] / 2**20:,.1f} MB"))
        out.print(plain("  rows dropped: " + ", ".join(f"{n:,} {name}" for name, n in found["dropped"].items())))
        if not found["unused_known"]:
            out.print(
                plain("  which rows are used is known only of a run that alone uses its targets; all others stay")
            )


# -- prompts ----------------------------------------------------------------------------------------------------------


def row(out: Console, shown: Mapping[str, Any]) -> None:
    """Both prompts of a row and the supervised tokens; what the chat template added by itself is marked."""
    marked = out.color_system is None  # dim and underline would not be seen
    out.print(plain(f"row {shown['id']} ({shown['split']})", "bold"))
    out.print(Text.assemble("added by the chat template: ", _part("like this", "template", marked)))
    titles = {side: f"{side} prompt, {shown[f'{side}_tokens']:,} tokens" for side in ("teacher", "student")}
    prompts = {side: Text.assemble(*(_part(p["text"], p["kind"], marked) for p in shown[side])) for side in titles}
    if out.is_terminal and out.width >= SIDE_BY_SIDE:
        table = Table(expand=True, header_style="bold")
        for side in titles:
            table.add_column(titles[side], ratio=1, overflow="fold")
        table.add_row(*prompts.values())
        out.print(table)
    else:
        for side, text in prompts.items():
            out.print(Rule(titles[side], align="left"))
            out.print(text, soft_wrap=True)
    tokens = shown["completion"]
    out.print(Rule("supervised tokens" + ("" if tokens is None else f", {len(tokens)}"), align="left"))
    if tokens is None:
        out.print("not made yet: the teacher writes them when the recipe is distilled")
    else:
        out.print(Text(" ").join(_token(text) for text, _ in tokens), soft_wrap=True)


def _part(text: str, kind: str, marked: bool) -> Text:
    if kind != "template":
        return plain(text, "bold" if kind == "query" else "")
    return plain(f"⟦{text}⟧") if marked else plain(text, "dim underline")


def _token(text: str) -> Text:
    return Text.assemble("⟨", plain(text.replace("\n", "\\n").replace("\t", "\\t"), "bold"), "⟩")


class Answers:
    """Prints streamed answers, arm by arm, under a header per arm."""

    def __init__(self, out: Console) -> None:
        self.out, self.arm = out, ""

    def add(self, arm: str, piece: str) -> None:
        """The next piece of an arm's answer."""
        if arm != self.arm:
            if self.arm:
                self.out.print()
            self.out.print(Rule(plain(arm_label(arm)), align="left"))
            self.arm = arm
        self.out.print(plain(piece), end="", soft_wrap=True)
        self.out.file.flush()

    def end(self, answers: Mapping[str, str]) -> None:
        """After the last piece; names the arms that answered nothing."""
        for arm, answer in answers.items():
            if not answer:
                self.add(arm, "(an empty answer)")
        self.out.print()


__all__ = ["Answers", "Watcher", "console", "error", "error_dict", "gate", "plain", "results", "row", "visible"]
