"""The command line, with a stub in the pipeline's place: what goes to which stream, and the exit code."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
import tomllib
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import ctxdistill
import tiny
from ctxdistill import cli, display
from ctxdistill.errors import GateError
from ctxdistill.recipe import Recipe

COMMANDS = (
    "demo", "init", "queries", "gate", "plan", "show", "distill", "label", "evaluate", "try", "export", "check", "compare",
    "playground", "study", "compose", "targets", "report",
)  # fmt: skip
HOSTILE = "[red]x[/red] [/nope] \x1b[2J\x1b]0;owned\x07 \u202egnp\u202c \x9b31m {query} end"

GATE = {
    "verdict": "teach", "reasons": ["the context changes the model: KL 1.234"], "gain": None, "metric": None,
    "kl": {"mean": 1.234, "low": 1.0, "high": 1.5}, "context_tokens": 321, "query_tokens": {"mean": 12.5, "max": 20},
    "window": 8192, "fits": True, "estimate": {"seconds": 90.0, "memory_mb": 700.0, "disk_mb": 12.0, "cost": None,
                 "notes": []},
}  # fmt: skip
ARM = {
    "exact_match": {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 10},
    "kl": {"mean": 1.0, "low": 0.9, "high": 1.1, "n": 10},
}
EVALUATION: dict[str, Any] = {
    "arms": ["zero_shot", "in_context", "distilled"], "rows": 10, "answers": 10, "main_metric": "exact_match",
    "table": {arm: {**ARM, "prompt_tokens": {"mean": tokens, "low": tokens, "high": tokens, "n": 10}}
              for arm, tokens in (("zero_shot", 20.0), ("in_context", 341.0), ("distilled", 20.0))},
    "kl_closed": {"mean": 0.97, "low": 0.96, "high": 0.98},
    "gap_closed": {"mean": float("nan"), "low": 0.0, "high": 1.0},
    "comparisons": [], "constant": None, "gate": GATE, "notes": ["a note"],
    "cost": {"seconds": {"total": 200.0}, "prompt_tokens_saved": 321.0,
             "ms_saved": {"mean": 50.0, "low": 40.0, "high": 60.0, "n": 10}, "break_even_requests": 4321,
             "break_even_money": None, "training_tokens": 1000, "break_even_tokens": 99},
}  # fmt: skip
ROW = {
    "id": "r1", "split": "train",
    "teacher": [{"text": "<|system|>", "kind": "template"}, {"text": "Shout.", "kind": "context"},
                {"text": "say ant", "kind": "query"}],
    "student": [{"text": "<|system|>be kind", "kind": "template"}, {"text": "say ant", "kind": "query"}],
    "completion": [["AN", 5], ["T\n", 6], ["</s>", 1]], "teacher_tokens": 14, "student_tokens": 9,
}  # fmt: skip


PLAN = {
    "model": "m", "device": "cpu", "rows": {"train": 1300, "validation": 0, "eval": 8}, "seconds": 100.0,
    "stages": {"gate": 10.0, "label": 20.0, "train": 65.0, "evaluate": 5.0}, "memory_mb": 1700.0, "disk_mb": 12.0, "cost": 0.5,
    "dtype": "float32",
    "bfloat16": 1.9, "notes": ["steps [b]are[/b] taken 2 rows at a time"],
}  # fmt: skip


def scores(text: str = "call mom | sunday | 6pm") -> list[dict[str, Any]]:
    return [
        {"arm": arm, "row": f"r{n}", "query": f"query {n}", "answer": "gold", "prediction": f"{arm} {text}",
         "metrics": {"exact_match": 1.0}, "kl": 0.1, "tokens": 3, "top1": 1.0}
        for n in range(7) for arm in EVALUATION["arms"]
    ]  # fmt: skip


def write_run(folder: Path, text: str = "fine") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.json").write_text("{}")
    for name, lines in (("scores.jsonl", scores(text)), ("prompts.jsonl", [ROW, {**ROW, "id": "r2"}])):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> types.SimpleNamespace:
    """Stands in for `ctxdistill.pipeline`, in a folder with a recipe and a run."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", "my.toml"]) == 0
    write_run(tmp_path / "run")

    def work(*given: Any, progress: Callable[[str, int, int], None], **options: Any) -> Any:
        stub.calls.append((given, options))
        print("a library that prints")
        for done in range(1, 4):
            progress(f"train (loss {done})", done, 3)
        return types.SimpleNamespace(path=tmp_path / "run", evaluation=EVALUATION)

    def pieces(
        run: Path, text: str, max_new_tokens: int | None = None, strength: float = 1.0
    ) -> Iterator[tuple[str, str]]:
        yield from [("zero_shot", "Sorry, "), ("zero_shot", HOSTILE), ("in_context", "yes")]

    def judge(recipe: Any, *, judged: Callable[[Any], None], progress: Callable[[str, int, int], None]) -> Any:
        work(progress=progress)
        judged(GATE)
        progress("plan: label", 1, 1)
        return GATE | {"estimate": PLAN}

    stub = types.SimpleNamespace(
        calls=[], demo=work, distill=work, show=lambda recipe, row: ROW, try_text=pieces,
        gate=judge, plan=lambda recipe, progress: (work(progress=progress), PLAN)[1],
        evaluate=lambda run, progress: (work(progress=progress), EVALUATION)[1],
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "ctxdistill.pipeline", stub)  # type: ignore[arg-type]
    monkeypatch.setattr(ctxdistill, "pipeline", stub, raising=False)
    return stub


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


# -- streams and exit codes ------------------------------------------------------------------------------------------

LINES = {
    "demo": ["demo"], "init": ["init", "new.toml"], "gate": ["gate", "my.toml"],
    "plan": ["plan", "my.toml"], "show": ["show", "my.toml"],
    "show a run": ["show", "run"], "distill": ["distill", "my.toml", "train.lr=1e-4"], "evaluate": ["evaluate", "run"],
    "try": ["try", "run", "hello"],
}  # fmt: skip


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_json_is_one_object_and_nothing_else(
    line: list[str], pipeline: types.SimpleNamespace, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    assert cli.main([*line, "--json"]) == 0
    captured = capfd.readouterr()
    found = json.loads(captured.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert isinstance(found, dict)
    assert captured.out.isascii()
    assert "\x1b" not in captured.out
    if pipeline.calls:
        assert "train (loss 3): 3/3" in captured.err
        assert "a library that prints" in captured.err


def test_the_verdict_is_printed_before_the_estimate(pipeline: types.SimpleNamespace, tmp_path: Path) -> None:
    """On a terminal, where bars are drawn."""
    code = (
        "import ctxdistill, sys, types; from ctxdistill import cli\n"
        "def gate(recipe, *, judged, progress):\n"
        "    progress('evaluate in-context', 8, 8)\n"
        f"    judged({GATE!r})\n"
        "    progress('plan: label', 1, 1)\n"
        f"    return {GATE!r} | {{'estimate': {PLAN!r}}}\n"
        "ctxdistill.pipeline = sys.modules['ctxdistill.pipeline'] = types.SimpleNamespace(gate=gate)\n"
        "sys.modules['ctxdistill.lm'] = None\n"
        "cli.main(['gate', 'my.toml'])\n"
    )
    shown = in_terminal(code, 100, tmp_path)
    places = [shown.rindex(text) for text in ("evaluate in-context", "gate: ", "plan: label", "estimated: 100 s")]
    assert places == sorted(places)
    assert shown.count("estimated: ") == shown.count("gate: ") == 1


def test_a_plan_is_told_stage_by_stage(pipeline: types.SimpleNamespace, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "my.toml"]) == 0
    lines = [" ".join(line.split()) for line in capfd.readouterr().out.splitlines()]
    assert "m on cpu, rows: 1,300 train, 8 eval" in lines
    assert "train 65 s" in lines
    assert "estimated: 100 s to distil, 1,700 MB of memory, 12 MB on disk, cost 0.50" in lines
    assert any("steps [b]are[/b] taken 2 rows at a time" in line for line in lines)


def test_a_context_that_adds_no_token_and_requests_that_are_no_quicker(capfd: pytest.CaptureFixture[str]) -> None:
    display.gate(display.console(), {**GATE, "context_tokens": -10})
    assert "with the context in it the prompt is 10 prompt tokens shorter, a query 12" in capfd.readouterr().out
    noisy = {"mean": 50.0, "low": -40.0, "high": 140.0, "n": 4}
    cost = {**EVALUATION["cost"], "prompt_tokens_saved": -10.0, "ms_saved": noisy, "break_even_requests": None}
    assert display.pays_off(cost) == [
        "every request is 10 prompt tokens longer: the chat template puts a system text of its own in the context's place "
        "(context.student_system); distilling took 3.3 min",
        "counted in time on this machine it is not shown to pay off: +50.0 ms [-40.0, +140.0] saved by a request, 4 rows",
        "pays off after 99 requests, counted in prompt tokens",
    ]


@pytest.mark.parametrize(("dtype", "gain", "times"), [("float32", 1.9, 1.9), ("bfloat16", 0.125, 8.0)])
def test_a_plan_says_which_type_would_be_faster(
    dtype: str, gain: float, times: float, pipeline: types.SimpleNamespace, capfd: pytest.CaptureFixture[str]
) -> None:
    pipeline.plan = lambda recipe, progress: {**PLAN, "dtype": dtype, "bfloat16": gain}
    assert cli.main(["plan", "my.toml"]) == 0
    (other,) = {"float32", "bfloat16"} - {dtype}
    hint = f"this processor multiplies in {other} {times} times as fast as in {dtype}; "
    assert f"{hint}to see what the run would then take, add model.dtype={other}\n" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("dtype", "gain"),
    [("float32", None), ("float32", 0.3), ("float32", 1.4), ("bfloat16", 2.0), ("bfloat16", 0.7), ("float16", None)],
)
def test_a_plan_does_not_speak_of_what_would_not_pay(
    dtype: str, gain: float | None, pipeline: types.SimpleNamespace, capfd: pytest.CaptureFixture[str]
) -> None:
    pipeline.plan = lambda recipe, progress: {**PLAN, "dtype": dtype, "bfloat16": gain}
    assert cli.main(["plan", "my.toml"]) == 0
    assert "multiplies" not in capfd.readouterr().out


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_text_output(line: list[str], pipeline: types.SimpleNamespace, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(line) == 0
    captured = capfd.readouterr()
    assert captured.out.strip()
    assert "Traceback" not in captured.err


def test_a_result_says_everything(pipeline: types.SimpleNamespace, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["distill", "my.toml", "train.lr=1e-4", "--out", "x", "--resume"]) == 0
    (recipe, folder), options = pipeline.calls[0]
    assert (recipe.train.lr, folder, options) == (1e-4, Path("x"), {"resume": True})
    out = capfd.readouterr().out
    for text in (
        "gate: teach", "exact match %", "50.0 [40.0, 60.0]", "zero-shot", "in-context", "distilled", "97.0", "query 4",
        "gold", "run/adapter", "run/report.html", "321 prompt tokens shorter; distilling took 3.3 min",
        "4,321 requests, counted in time", "99 requests, counted in prompt tokens", "a note",
    ):  # fmt: skip
        assert text in out
    assert "query 5" not in out  # five rows, no more


@pytest.mark.parametrize(
    ("arguments", "out", "small"),
    [([], None, False), (["--small"], None, True), (["--out", "here"], Path("here"), False)],
)
def test_demo_folders(arguments: list[str], out: Path | None, small: bool, pipeline: types.SimpleNamespace) -> None:
    assert cli.main(["demo", *arguments]) == 0
    assert pipeline.calls == [((out,), {"small": small})]


def test_what_the_user_can_fix_is_2(pipeline: types.SimpleNamespace, capfd: pytest.CaptureFixture[str]) -> None:
    pipeline.distill = failing(GateError("nothing to teach", expected="a gain", found=HOSTILE, fix="warn"))
    assert cli.main(["distill", "my.toml"]) == 2
    captured = capfd.readouterr()
    assert captured.err.endswith("  fix: warn\n")
    assert "Error: nothing to teach\n  expected: a gain\n  found: [red]x[/red]" in captured.err
    assert "Traceback" not in captured.err
    assert "\x1b" not in captured.err
    assert cli.main(["distill", "my.toml", "--json"]) == 2
    error = json.loads(capfd.readouterr().out)["error"]
    expected = {
        "kind": "GateError",
        "message": "nothing to teach",
        "expected": "a gain",
        "found": HOSTILE,
        "fix": "warn",
    }
    assert error == expected


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["distill"], "Missing argument"),
        (["distil", "x"], "distill"),
        (["gate", "my.toml", "--nope"], "No such option"),
        (["show", "my.toml", "--row", "-1"], "--row"),
        (["gate", "missing.toml"], "no recipe at missing.toml"),
        (["study", "missing.toml"], "no study at missing.toml"),
        (["study", "."], "a study file (.toml)"),
        (["gate", "my.toml", "train.lrr=1"], "did you mean 'lr'?"),
        (["gate", "my.toml", "lr"], "section.key=value"),
        (["init", "my.toml"], "is there already"),
        (["init", "x.toml", "--kind", "poem"], "poem"),
        (["init", "my.toml/x.toml"], "cannot write"),
        (["init", "rows.jsonl", "--from", "rows.jsonl", "--force"], "name it rows.toml"),
        (["show", "run", "--row", "2"], "0 to 1"),
        (["show", "run", "train.lr=1"], "a run's values are fixed"),
        (["show", "."], "is not a run folder"),
        (["evaluate", "missing"], "does not exist"),
        (["try", "missing", "hello"], "does not exist"),
        (["try", "my.toml", "hello"], "is a file, and no run folder"),
        (["report", "run"], "run"),
    ],
)
def test_usage_is_2(
    line: list[str], words: str, pipeline: types.SimpleNamespace, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    assert cli.main([*line, "--json"]) == 2
    captured = capfd.readouterr()
    assert captured.err.startswith("Error: ")
    assert words in captured.err
    assert "Traceback" not in captured.err
    assert json.loads(captured.out)["error"]["message"]


def test_a_bug_is_1_with_its_traceback(pipeline: types.SimpleNamespace, capfd: pytest.CaptureFixture[str]) -> None:
    pipeline.gate = failing(ZeroDivisionError("oops"))
    assert cli.main(["gate", "my.toml", "--json"]) == 1
    captured = capfd.readouterr()
    assert "Traceback" in captured.err
    assert "ZeroDivisionError: oops" in captured.err
    assert "please report it" in captured.err.splitlines()[-1]
    assert json.loads(captured.out) == {"error": {"kind": "Bug", "message": "ZeroDivisionError: oops"}}


def test_ctrl_c_is_130_and_says_how_to_go_on(
    pipeline: types.SimpleNamespace, capfd: pytest.CaptureFixture[str]
) -> None:
    pipeline.distill = failing(KeyboardInterrupt())
    assert cli.main(["distill", "my.toml", "name=two words"]) == 130
    captured = capfd.readouterr()
    again = "ctxdistill distill my.toml 'name=two words' --out 'runs/two words' --resume"
    assert captured.err.splitlines()[-1] == f"stopped; go on with: {again}"
    assert "Traceback" not in captured.err


def test_a_study_that_is_stopped_goes_on_as_it_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.toml").write_text('[model]\nnames = "a/b"\n[tasks]\nnames = "trec"\n')
    monkeypatch.setattr("ctxdistill.study.study", failing(KeyboardInterrupt()))
    assert cli.main(["study", "s.toml", "--paper", "p.csv", "--ray", "local", "--retry"]) == 130
    again = "ctxdistill study s.toml --out runs/s --retry --paper p.csv --ray local"
    assert capfd.readouterr().err.splitlines()[-1] == f"stopped; go on with: {again}"


def test_the_package_is_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "ctxdistill", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ctxdistill.__version__


def test_ctrl_c_while_the_command_line_is_imported() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    module, _, name = project["scripts"]["ctxdistill"].partition(":")
    code = (
        "import sys\n"
        "class Stop:\n"
        "    def find_spec(name, *_):\n"
        "        if name == 'typer': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Stop)\n"
        f"from {module} import {name}\n"
        f"sys.exit({name}())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, "--json"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "stopped\n")
    assert json.loads(done.stdout) == {"error": {"kind": "Interrupted", "message": "stopped"}}


def test_version(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capfd.readouterr().out == f"{ctxdistill.__version__}\n"


# -- help and speed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_parses(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    out = capfd.readouterr().out
    assert f"Example: ctxdistill {command}" in out
    assert "--json" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_every_word(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Brackets, for example, are no markup."""
    about = typer.main.get_command(cli.app).commands[command]  # type: ignore[attr-defined]
    assert cli.main([command, "--help"]) == 0
    out = "".join(capfd.readouterr().out.split())
    for text in (about.help, *(parameter.help for parameter in about.params)):
        assert "".join(text.split()) in out


def test_the_list_of_commands_says_each_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["--help"]) == 0
    lines = capfd.readouterr().out.partition("Commands:")[2].strip().splitlines()
    assert [line.split()[0] for line in lines] == list(COMMANDS)
    assert all(line.endswith(".") and not line.endswith("..") for line in lines), lines


def test_help_waits_for_nothing_that_prints() -> None:
    code = "import sys; from ctxdistill.cli import main; sys.exit(main(['--help']) or 'rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0


def test_the_commands_are_these() -> None:
    assert tuple(typer.main.get_command(cli.app).commands) == COMMANDS  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "line", [["--help"], ["distill", "--help"], ["show", "run"], ["init", "new.toml"], ["study", "--tasks"]]
)
def test_no_torch_where_none_is_needed(line: list[str], tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    code = (
        "import sys; from ctxdistill.cli import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'matplotlib', 'scipy'} & set(sys.modules); "
        "sys.exit(f'{code} {heavy}' if code or heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *line], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# -- what is printed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: 2.00 GiB"),
        MemoryError("2.00 GiB"),
    ],
    ids=["gpu", "cpu", "python"],
)
def test_too_little_memory_is_no_bug(
    error: Exception, pipeline: types.SimpleNamespace, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    pipeline.gate = full
    assert cli.main(["gate", "my.toml", "--json"]) == 2
    out, err = capfd.readouterr()
    found = json.loads(out[out.index("{") :])["error"]
    assert "does not hold" in found["message"] and "2.00 GiB" in found["found"] and "more" not in found["found"]
    assert all(key in found["fix"] for key in ("targets.batch_size", "train.micro_batch", "model.quantize"))
    assert "Traceback" not in err and "bug" not in err


def test_hostile_text_is_shown_as_itself(
    pipeline: types.SimpleNamespace, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", HOSTILE)
    row = {
        **ROW,
        "student": [{"text": HOSTILE, "kind": kind} for kind in ("template", "query")],
        "completion": [[HOSTILE, 1]],
    }
    pipeline.show = lambda recipe, row_number: row
    for line in (["distill", "my.toml"], ["try", "run", "hello"], ["show", "my.toml"]):
        capfd.readouterr()
        assert cli.main(line) == 0
        out = capfd.readouterr().out
        assert "[red]x[/red] [/nope] ⟨U+001B⟩[2J" in " ".join(out.split())
        assert not set("\x1b\x07\x9b\u202e\u202c") & set(out)


def test_show_marks_the_template_without_colour(
    pipeline: types.SimpleNamespace, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    assert cli.main(["show", "run", "--row", "1"]) == 0
    out = capfd.readouterr().out
    assert "row r2 (train)" in out
    assert "added by the chat template: ⟦like this⟧" in out
    assert "⟦<|system|>⟧Shout.say ant" in out
    assert "⟦<|system|>be kind⟧say ant" in out
    assert "⟨AN⟩ ⟨T\\n⟩ ⟨</s>⟩" in out


def test_show_does_not_break_long_lines(pipeline: types.SimpleNamespace, capfd: pytest.CaptureFixture[str]) -> None:
    long = "word " * 2000
    pipeline.show = lambda recipe, row: {**ROW, "teacher": [{"text": long, "kind": "context"}], "completion": None}
    assert cli.main(["show", "my.toml"]) == 0
    out = capfd.readouterr().out
    assert long in out
    assert "not made yet" in out


def test_answers_come_under_headers(pipeline: types.SimpleNamespace, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    assert cli.main(["try", "run", "hello"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split(" ─")[0] for line in lines if "─" in line] == ["zero-shot", "in-context", "distilled"]
    assert lines[1].startswith("Sorry, [red]x")
    assert lines[-1] == "(an empty answer)"


@pytest.mark.parametrize(
    ("given", "asked"), [(b"two\nlines\n", "two\nlines"), (b"caf\xc3\xa9", "caf\u00e9"), (b"caf\xe9", None)]
)
def test_a_dash_is_the_text_on_standard_input(
    given: bytes, asked: str | None, pipeline: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
    capfd.readouterr()
    assert cli.main(["try", "run", "-", "--json"]) == (2 if asked is None else 0)
    found = json.loads(capfd.readouterr().out)
    assert found.get("query") == asked
    if asked is None:
        assert "UTF-8" in found["error"]["expected"]


def test_progress_lines_when_nobody_watches(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    with display.Watcher("loading") as watcher:
        for done in range(1, 26):
            now[0] += 1.0
            watcher(f"train (loss {done / 10})", done, 40)  # ends early
        watcher("evaluate zero-shot", 3, 3)
        said = capfd.readouterr().err.splitlines()
        watcher("teacher", 2, 2)
        now[0] += 5.0
        watcher("teacher", 1, 1)  # the same stage on other rows
    assert said == [
        "loading",
        "train (loss 1.1): 11/40 in 11 s, 1.0/s, 29 s left",
        "train (loss 2.1): 21/40 in 21 s, 1.0/s, 19 s left",
        "train (loss 2.5): 25/40 in 25 s, 1.0/s, 15 s left",
        "evaluate zero-shot: 3/3 in 0 s",
    ]
    assert capfd.readouterr().err.splitlines() == ["teacher: 2/2 in 0 s", "teacher: 1/1 in 5 s"]


def test_an_interrupt_that_a_finalizer_swallows_comes_again(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python reports an exception of a finalizer, and goes on."""
    reached: list[str] = []

    class Last:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    def distil(*_: object, progress: Any, **__: object) -> None:
        last = Last()
        del last
        reached.append("after the signal")
        progress("train", 1, 2)
        reached.append("after the progress")

    monkeypatch.setattr("ctxdistill.pipeline.distill", distil)
    monkeypatch.setattr(sys, "unraisablehook", lambda *_: None)
    recipe = tiny.write_recipe(job / "recipe.toml", tiny.recipe_dict(job))
    assert cli.main(["distill", str(recipe), "--out", str(job / "run")]) == 130
    assert reached == ["after the signal"]


def test_what_was_done_before_makes_no_stage_look_fast(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A run that goes on, and rounds in between."""
    now = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    with display.Watcher("loading") as watcher:
        for done in (101, 102, 103, 104):
            now[0] += 4.0
            watcher("train (loss 1.0)", done, 200)
        watcher("student (round 2)", 8, 8)
        for done in (105, 106, 107, 108):
            now[0] += 4.0
            watcher("train (loss 1.0)", done, 200)
    assert capfd.readouterr().err.splitlines() == [
        "loading",
        "train (loss 1.0): 104/200 in 16 s, 4.0 s each, 6.4 min left",
        "student (round 2): 8/8 in 0 s",
        "train (loss 1.0): 108/200 in 16 s, 4.0 s each, 6.1 min left",
    ]


def in_terminal(code: str, columns: int, tmp_path: Path) -> str:
    """What a terminal of this width gets from `python -c code`."""
    main, end = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": "40"}
    env.pop("NO_COLOR", None)
    process = subprocess.Popen([sys.executable, "-c", code], stdin=end, stdout=end, stderr=end, cwd=tmp_path, env=env)
    os.close(end)
    parts = []
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        parts.append(part)
    os.close(main)
    assert process.wait(timeout=60) == 0
    return b"".join(parts).decode()


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    code = (
        "import time, logging; from ctxdistill import display\n"
        "with display.Watcher('loading') as w:\n"
        "    logging.getLogger('ctxdistill').info('loss: [b]x[/b]')\n"
        "    for n in range(1, 6): w('train [b] (loss 1)', n, 5); time.sleep(0.05)\n"
    )
    shown = in_terminal(code, 100, tmp_path)
    assert "train [b] (loss 1)" in shown
    assert "5/5" in shown
    assert "━━━" in shown
    assert "/s" in shown
    assert "loss: [b]x[/b]" in shown


def test_the_bars_of_a_study_fit_a_line_and_show_what_runs(tmp_path: Path) -> None:
    """The end of a long name is kept, and what a stage inside did is gone when the outer one goes on."""
    code = (
        "import time; from ctxdistill import display\n"
        "with display.Watcher('loading') as w:\n"
        "    for n in range(3):\n"
        "        w('cells (SmolLM2-135M-Instruct.Q4_1-sst2-n4-set1-in_context)', n, 7); time.sleep(0.2)\n"
        "        for m in (1, 2): w('train (loss 0.123)', m, 2); time.sleep(0.2)\n"
        "    w('cells (SmolLM2-135M-Instruct.Q4_1-sst2-n4-set1-cd_one)', 3, 7); time.sleep(0.2)\n"
    )
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", in_terminal(code, 80, tmp_path)).replace("\r", "\n")
    lines = [line for line in shown.split("\n") if line.strip()]
    assert all(len(line.rstrip()) <= 80 for line in lines)
    bars = [line for line in lines if "cells (" in line]
    assert bars and all("set1-in_context)" in line or "set1-cd_one)" in line for line in bars)
    assert all(re.search(r"\d:\d\d:\d\d", line) for line in bars if "3/7" in line)  # the time left is not cut off
    last = shown[shown.index("3/7") :]
    assert "train" not in last


@pytest.mark.parametrize(("columns", "beside"), [(140, True), (80, False)])
def test_prompts_stand_beside_each_other_when_there_is_room(columns: int, beside: bool, tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    shown = in_terminal("from ctxdistill.cli import main; main(['show', 'run'])", columns, tmp_path)
    lines = shown.splitlines()
    assert any("teacher prompt" in line and "student prompt" in line for line in lines) is beside
    assert "\x1b[2;4m<|system|>" in shown  # dim and underlined
    assert "⟦" not in shown


@pytest.mark.parametrize(
    "line", [["compare", "."], ["evaluate"], ["try", "hello"], ["export", "--format", "peft"], ["report"]]
)
@pytest.mark.parametrize(
    ("file", "what", "fix"),
    [
        ("study_recipe.json", "a study's folder", "ctxdistill report"),
        ("compose.json", "a sum of adapters", "both/adapter"),
    ],
)
def test_a_folder_of_another_kind_is_named(
    line: list[str], file: str, what: str, fix: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if (line, file) == (["report"], "study_recipe.json"):
        return  # that is what writes it
    folder = tmp_path / "both"
    folder.mkdir()
    (folder / file).write_text("{}")
    assert cli.main([line[0], str(folder), *line[1:]]) == 2
    said = capfd.readouterr().err
    assert what in said and fix in said and "no recipe.json in it" not in said


# -- init ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["system", "few-shot", "document"])
def test_init_writes_a_valid_recipe(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "folder" / "my recipe.toml"
    assert cli.main(["init", str(path), "--kind", kind]) == 0
    recipe = Recipe.load(path)
    assert recipe.name == "my recipe"
    given = {"system": recipe.context.system, "few-shot": recipe.context.demos, "document": recipe.context.documents}
    assert given[kind]
    assert f"ctxdistill distill '{path}'" in capfd.readouterr().out
    assert path.read_text().count(" # ") > 10  # comments


@pytest.mark.parametrize("kind", ["system", "few-shot", "document"])
def test_every_key_that_a_template_suggests_is_valid(kind: str, tmp_path: Path) -> None:
    """Commented keys, put in one at a time. Those that exclude another key are left to the comment beside them."""
    text = (Path(cli.__file__).parent / "recipes" / f"{kind}.toml").read_text()
    lines = text.splitlines()
    tried = 0
    for number, line in enumerate(lines):
        key = line.removeprefix("# ").partition(" = ")[0]
        if (
            not line.startswith("# ")
            or not key.isidentifier()
            or key in {"system_file", "style", "samples", "instruction"}
        ):
            continue
        section = next(found for found in reversed(lines[:number]) if found.lstrip("# ").startswith("["))
        opened = [section.lstrip("# ").partition("#")[0]] if section.startswith("#") else []
        new = [*lines[:number], *opened, line.removeprefix("# "), *lines[number + 1 :]]
        (tmp_path / "r.toml").write_text("\n".join(new))
        assert Recipe.load(tmp_path / "r.toml")
        tried += 1
    assert tried >= 2


def test_init_into_a_folder_and_force(tmp_path: Path) -> None:
    assert cli.main(["init", str(tmp_path)]) == 0
    path = tmp_path / "recipe.toml"
    path.write_text("mine")
    assert cli.main(["init", str(tmp_path)]) == 2
    assert path.read_text() == "mine"
    assert cli.main(["init", str(path), "--force"]) == 0
    assert path.read_text() != "mine"
