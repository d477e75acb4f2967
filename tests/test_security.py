"""What SECURITY.md promises: no code unasked, no file out of place, no secret told, no markup from data."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import tiny
from ctxdistill import cli, compose, export, pipeline, trust
from ctxdistill.dataset import stored_recipe
from ctxdistill.errors import CtxDistillError, ModelError, RecipeError, RunError, redact
from ctxdistill.evaluate import load_function
from ctxdistill.grid import Study
from ctxdistill.playground import LARGEST, _Guard
from ctxdistill.recipe import Recipe
from ctxdistill.rundir import RunDir
from server import completion, serve

# -- code -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def evil(job: Path) -> Path:
    """A recipe beside a module that leaves a mark when it is loaded."""
    (job / "evil.py").write_text(f"open({str(job / 'mark')!r}, 'w')\ndef f(prediction, answer, row):\n    return 1.0\n")
    return tiny.write_recipe(job / "r.toml", tiny.recipe_dict(job, eval__metrics=["evil:f"], eval__latency_rows=0))


def test_functions_of_a_recipe_need_the_flag(evil: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(evil.parent / "run")
    assert cli.main(["distill", str(evil), "--out", out]) == 2
    said = capsys.readouterr().err
    assert "eval.metrics = 'evil:f' runs code that is not ctxdistill's" in said and "--allow-code" in said
    assert not (evil.parent / "mark").exists()
    assert cli.main(["--allow-code", "distill", str(evil), "--out", out]) == 0
    assert (evil.parent / "mark").exists()
    assert not trust.code_allowed()  # for one command
    # the run now holds a recipe that names code: whoever has the folder is asked again
    (evil.parent / "mark").unlink()
    sys.modules.pop("evil")
    assert cli.main(["evaluate", out]) == 2
    assert not (evil.parent / "mark").exists()
    assert cli.main(["report", out]) == 0
    assert not (evil.parent / "mark").exists()


@pytest.mark.parametrize("value", ["", "0", "yes", "true"])
def test_only_1_allows_code(value: str, evil: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(trust.ALLOW, value)
    with pytest.raises(RecipeError, match="runs code"):
        load_function("evil:f", Recipe.load(evil))


def stored(finished: Path, folder: Path, **changes: Any) -> RunDir:
    """A copy of a run whose recipe somebody has changed."""
    shutil.copytree(finished, folder, symlinks=True)
    record = json.loads((folder / "recipe.json").read_text())
    for key, value in changes.items():
        section, name = key.split("__")
        record["recipe"][section][name] = value
        record["explicit"] += [f"{section}.{name}"]
    (folder / "recipe.json").write_text(json.dumps(record))
    return RunDir(folder)


@pytest.mark.parametrize("key", ["model.trust_remote_code", "code.run"])
def test_code_in_somebodys_run_needs_the_flag(
    key: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stored(finished, tmp_path / "run", **{key.replace(".", "__"): True})
    for use in (pipeline.load_student, lambda path: export.export(path, "peft"), pipeline.evaluate):
        with pytest.raises(RecipeError, match=f"{re.escape(key)} in the recipe of"):
            use(run.path)
    monkeypatch.setenv(trust.ALLOW, "1")
    assert getattr(getattr(stored_recipe(run), key.split(".")[0]), key.split(".")[1])


def test_the_card_names_remote_code(finished: Path, tmp_path: Path) -> None:
    from ctxdistill.report import write_card

    assert "| remote code | none |" in write_card(finished, tmp_path).read_text()
    run = stored(finished, tmp_path / "run", model__trust_remote_code=True)
    assert "| remote code | yes: loading the base runs code" in write_card(run.path, tmp_path).read_text()


def test_weights_are_safetensors(llama: Path, tmp_path: Path) -> None:
    import torch

    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    torch.save({"x": torch.zeros(1)}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled weights are refused"):
        pipeline.LM.load(Recipe.from_dict({**tiny.recipe_dict(tmp_path), "model": {"name": str(folder)}}).model)


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../elsewhere", "/etc/x", "a/../../b", "~/x", "link/x"])
@pytest.mark.parametrize("key", ["targets.dir", "synthesis.file"])
def test_a_recipe_writes_below_its_folder(key: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    monkeypatch.chdir(folder)
    section, _, last = key.partition(".")
    raw = {"model": {"name": "m"}, "context": {"documents": ["d"]}, "queries": {"synthesize": 3}}
    with pytest.raises(RecipeError, match=rf"{key}: .* would be written outside of"):
        Recipe.from_dict({**raw, section: {last: name}}, base_dir=folder)
    for good in ("x", "./a/../b", str(folder / "x")):
        Recipe.from_dict({**raw, section: {last: good}}, base_dir=folder)
    monkeypatch.chdir(tmp_path)  # where the person works counts, too
    if name in ("../elsewhere", "link/x"):
        Recipe.from_dict({**raw, section: {last: name}}, base_dir=folder)


@pytest.mark.parametrize("name", ["/tmp/x", "../x", "a/b", r"a\b", ".", ".."])
def test_a_name_is_the_name_of_a_folder_in_runs(name: str, tmp_path: Path) -> None:
    for cls, raw in (
        (Recipe, tiny.recipe_dict(tmp_path)),
        (Study, {"model": {"names": ["m"]}, "tasks": {"names": ["trec"]}}),
    ):
        with pytest.raises(RecipeError, match="name: "):
            cls.from_dict({**raw, "name": name}, base_dir=tmp_path)
        for good in ("x", "a name, 1.0", "..x", ""):
            assert cls.from_dict({**raw, "name": good}, base_dir=tmp_path).name == good


def test_a_stored_recipe_writes_below_its_run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = stored(finished, tmp_path / "run", targets__dir="kept")  # below a folder that the recipe itself names
    with pytest.raises(RecipeError, match=r"targets\.dir: .* would be written outside of"):
        pipeline.evaluate(run.path)
    assert not (finished.parent / "kept").exists()


@pytest.mark.parametrize("name", ["targets", "metrics.jsonl", ".lock", "export", "adapter"])
def test_links_do_not_lead_out_of_a_run(name: str, finished: Path, tmp_path: Path) -> None:
    run = stored(finished, tmp_path / "run")
    victim = tmp_path / "victim"
    victim.write_text("mine")
    if (run / name).is_dir():
        shutil.rmtree(run / name)
    else:
        (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(victim)
    with pytest.raises(RunError, match="is a link that leads out of the run folder"):
        run.lock()
    with pytest.raises(RunError):
        export.export(run.path, "peft")
    assert victim.read_text() == "mine" and not list(tmp_path.glob("*.tmp"))


def test_links_that_lead_nowhere_and_links_inside_are_no_matter(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "here").symlink_to("there")
    (tmp_path / "run" / "loop").symlink_to("loop")
    run = RunDir(tmp_path / "run")
    run.lock()
    run.release()
    (tmp_path / "run" / ".lock").unlink()
    os.mkfifo(tmp_path / "run" / ".lock")  # nothing can be written into it
    run.lock()
    run.release()


def test_a_log_that_is_a_link_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine\n")
    (tmp_path / "run" / "rounds").mkdir(parents=True)
    (tmp_path / "run" / "rounds" / "1.jsonl").symlink_to(tmp_path / "victim")
    with pytest.raises(RunError, match="cannot write"):
        RunDir(tmp_path / "run").append("rounds/1.jsonl", {"a": 1})
    assert (tmp_path / "victim").read_text() == "mine\n"


# -- secrets ----------------------------------------------------------------------------------------------------------

SECRETS = {
    "HF_TOKEN": "hf_abcdefgh12345678", "OPENAI_API_KEY": "sk-proj-0123456789abcdef", "MY_SERVER": "key-of-the-server-4711",
    "HTTPS_PROXY": "http://proxyuser:proxyword@proxy.invalid:3128", "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI0123456789",
}  # fmt: skip
TOLD = [*SECRETS.values(), "proxyword", "hunter2"]


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("secrets")
def test_secrets_are_nowhere(job: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ask = ["Where is the {}?", "How heavy is the {}?", "Is the {} old?", "Who owns the {}?", "What colour has the {}?"]
    things = ["anchor", "barrel", "canvas", "dinghy", "ensign", "flagon", "girder", "hawser"]

    def write(body: dict[str, Any], number: int) -> tuple[int, Any, dict[str, str]]:
        if number == 3:  # a server that tells what it was told
            return 503, f"bad key {SECRETS['MY_SERVER']} {SECRETS['HF_TOKEN']}".encode(), {"Retry-After": "0"}
        query = ask[number % 5].format(things[number // 5 % len(things)])
        return 200, completion(f"Question: {query}\nAnswer: no."), {}

    (job / "doc.md").write_text(" ".join(f"The {thing} lies in the harbour of Orrel." for thing in things))
    with serve(write) as (url, seen):
        raw = tiny.recipe_dict(
            job, context={"documents": ["doc.md"]}, queries={"synthesize": 12},
            synthesis={"endpoint": url, "endpoint_model": "big", "key_variable": "MY_SERVER"},
        )  # fmt: skip
        raw["eval"].pop("data")
        raw["eval"] |= {"share": 0.2, "latency_rows": 0}
        recipe = str(tiny.write_recipe(job / "r.toml", raw))
        out = str(job / "run")
        assert cli.main(["distill", recipe, "--out", out]) == 0
        assert {r["headers"]["Authorization"] for r in seen} == {f"Bearer {SECRETS['MY_SERVER']}"}
    assert cli.main(["evaluate", out]) == 0
    assert cli.main(["report", out]) == 0
    said = capfd.readouterr()
    refuse = lambda body, number: (401, f"{SECRETS['MY_SERVER']} {SECRETS['HF_TOKEN']}".encode(), {})  # noqa: E731
    with serve(refuse) as (url, _):
        assert cli.main(["distill", recipe, f"synthesis.endpoint={url}", "--out", f"{out}-2", "--json"]) == 2
        assert cli.main(["distill", recipe, "synthesis.endpoint=http://me:hunter2@x/v1", "--out", out]) == 2
        port = url.rsplit(":", 1)[1].removesuffix("/v1")
        wrong = f"http://me:hunter2@127.0.0.1:{port}"
        assert cli.main(["check", str(job), "--against", out, "--endpoint", wrong]) == 2
    failed = capfd.readouterr()
    assert "HTTP status 401: *** ***" in failed.err and "http://***@x/v1" in failed.err
    written = [path for folder in ("run", "run-2") for path in (job / folder).rglob("*") if path.is_file()]
    assert len(written) > 15
    for text in [
        said.out,
        said.err,
        failed.out,
        failed.err,
        *(path.read_bytes().decode(errors="replace") for path in written),
    ]:
        assert [secret for secret in TOLD if secret in text] == []


@pytest.mark.usefixtures("secrets")
def test_errors_and_tracebacks_are_without_secrets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for value in (SECRETS["HF_TOKEN"], SECRETS["HTTPS_PROXY"], "https://me:hunter2@host/x", "ftp://hunter2@host"):
        for part in ("expected", "found", "fix"):
            assert not any(secret in str(CtxDistillError(value, **{part: value})) for secret in TOLD)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError(f"cannot reach {SECRETS['HTTPS_PROXY']} with {SECRETS['OPENAI_API_KEY']}")

    monkeypatch.setattr(cli.RunDir, "existing", broken)
    assert cli.main(["evaluate", "x", "--json"]) == 1
    said = capsys.readouterr()
    assert "Traceback" in said.err and "http://***@proxy.invalid:3128" in said.err
    assert not any(secret in said.err + said.out for secret in TOLD)


def test_redaction_leaves_other_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "short")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false-or-true")
    text = "short false-or-true user@example.org https://host/path@2x a://b/c@d 'http://x' and me@x"
    assert redact(text) == text


# -- the playground ---------------------------------------------------------------------------------------------------


def status(scope: dict[str, Any], *, local: bool = True) -> int:
    async def inner(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(_Guard(inner, local)(scope, None, send))  # type: ignore[arg-type]
    return int(sent[0].get("status") or sent[0]["code"])


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        ({"host": "127.0.0.1:7860"}, 200), ({"host": "localhost"}, 200), ({"host": "[::1]:7860"}, 200),
        ({"host": "evil.example:7860"}, 421), ({}, 421), ({"host": "127.0.0.1.evil.example"}, 421),
        ({"host": "localhost", "content-length": str(LARGEST)}, 200), ({"host": "localhost", "content-length": str(LARGEST + 1)}, 413),
        ({"host": "localhost", "content-length": "-1"}, 413), ({"host": "localhost", "transfer-encoding": "chunked"}, 413),
    ],
)  # fmt: skip
def test_who_may_ask_the_playground_and_how_much(headers: dict[str, str], found: int) -> None:
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    assert status({"type": "http", "path": "/", "headers": raw}) == found
    if found == 421:
        assert status({"type": "http", "path": "/", "headers": raw}, local=False) == 200
        assert status({"type": "websocket", "path": "/", "headers": raw}) == 1008


def test_the_playground_listens_on_this_machine_unless_told() -> None:
    import inspect

    from ctxdistill.playground import LOCAL, serve

    assert inspect.signature(serve).parameters["host"].default in LOCAL
    assert inspect.signature(cli.playground).parameters["host"].default in LOCAL


# -- pages ------------------------------------------------------------------------------------------------------------


def test_the_card_of_a_sum_holds_no_markup_of_names(tmp_path: Path) -> None:
    names = compose.distinct([tmp_path / "a`<script>|\u202e", tmp_path / "b.c"])
    assert all(re.fullmatch(r"[\w-]+", name) for name in names)


def test_the_source_of_the_pages_runs_no_script() -> None:
    for page in (Path(cli.__file__).parent).glob("*.j2"):
        assert "<script" not in page.read_text() and " on" + "click" not in page.read_text()


# -- dependencies -----------------------------------------------------------------------------------------------------


@pytest.fixture
def audit(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script of `make lint`."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / ".ci"))
    monkeypatch.setattr(sys, "argv", ["audit.py"])
    module = importlib.import_module("audit")
    monkeypatch.delitem(sys.modules, "audit")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: True)
    return module


GOOD = {"name": "a", "version": "1", "vulns": []}
BAD = {"name": "b", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3"]}]}
UNKNOWN = {"name": "c", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("packages", "code", "said"),
    [
        ([GOOD, UNKNOWN], 0, "audit: 0 of 1 packages with known vulnerabilities; 1 unknown to the index"),
        (
            [GOOD, BAD],
            1,
            "b 2: PYSEC-1, mended in 3\naudit: 1 of 2 packages with known vulnerabilities; 0 unknown to the index",
        ),
        ([UNKNOWN], 0, "audit skipped: the index knows none of 1 packages"),
        (None, 0, "audit skipped: ERROR: no route to host"),
    ],
)
def test_the_audit_tells_a_finding_from_a_failure(
    packages: list[Any] | None,
    code: int,
    said: str,
    audit: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = "" if packages is None else json.dumps({"dependencies": packages})
    done = subprocess.CompletedProcess([], 1, out, "WARNING: x\nERROR: no route to host\n")
    monkeypatch.setattr(audit.subprocess, "run", lambda *_, **__: done)
    monkeypatch.setattr(sys, "argv", ["audit.py"])
    assert audit.main() == 0
    assert capsys.readouterr().out.strip() == said
    monkeypatch.setattr(sys, "argv", ["audit.py", "--strict"])
    assert audit.main() == code


def test_the_audit_is_skipped_where_nobody_answers(
    audit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nobody(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("pip-audit", audit.LONG)

    monkeypatch.setattr(audit.subprocess, "run", nobody)
    assert audit.main() == 0
    monkeypatch.setattr(audit.importlib.util, "find_spec", lambda name: None)
    assert audit.main() == 0
    assert capsys.readouterr().out.splitlines() == [
        f"audit skipped: the index has not answered in {audit.LONG} seconds",
        "audit skipped: pip-audit is not installed",
    ]


@pytest.fixture(autouse=True)
def forget_modules() -> Iterator[None]:
    yield
    sys.modules.pop("evil", None)
