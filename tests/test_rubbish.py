"""Whatever a file holds, its reader returns or raises a `CtxDistillError`: no traceback, no hang, no unbounded memory.

By default some 2,100 cases, the same ones each time; CTXDISTILL_RUBBISH=10 tries ten times as many, and others each time.
What once broke a reader is kept in `test_hostile.py` as a test of its own.
"""

from __future__ import annotations

import functools
import io
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ctxdistill import check, export, formats, report
from ctxdistill import compare as comparing
from ctxdistill import rows as data
from ctxdistill.adapters import settings_of
from ctxdistill.dataset import claim, stored_recipe
from ctxdistill.errors import CtxDistillError
from ctxdistill.grid import Study
from ctxdistill.lm import LM
from ctxdistill.recipe import ModelSection, Recipe
from ctxdistill.rundir import RunDir
from ctxdistill.store import TargetStore
from ctxdistill.study_report import write_report as write_study_report
from ctxdistill.targets import digits
from ctxdistill.train import read_checkpoint
from test_analysis import build_study

MORE = int(os.environ.get("CTXDISTILL_RUBBISH", "0"))
SLOW = 20.0
"""Seconds that no case may take."""
LONGEST = 20_000
"""Characters of a message that somebody might still read."""


def cases(number: int) -> Callable[[Any], Any]:
    """So many generated cases; the same ones each time, unless more are asked for."""
    return settings(
        max_examples=number * max(1, MORE),
        derandomize=not MORE,
        deadline=None,
        database=None,
        phases=[Phase.generate] if not MORE else [Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


def survives(read: Callable[[], Any]) -> CtxDistillError | None:
    """Call a reader; returns the error that it gave, if any, and lets no other pass."""
    began = time.monotonic()
    found = None
    try:
        read()
    except CtxDistillError as error:
        found = error
    assert time.monotonic() - began < SLOW
    assert found is None or (found.message.strip() and len(str(found)) < LONGEST)
    return found


# -- what rubbish is --------------------------------------------------------------------------------------------------

ODD = [
    "", "\0", "\ufeff", "\u202e", "'", '"', '"""', "\\ud800", "\\", "\n", "\r", "\r\n", "\u2028", "[", "{", "]", "}", ",", ":", "=",
    "#", "1e999", "-0", "NaN", "Infinity", "null", "true", "9" * 5000, "0x", "1_0", "2020-13-45", "[" * 3000, '{"a":' * 3000,
    "a." * 500 + "b=1", "../../x", "/dev/zero", "hub:", "<script>", "{prompt}", "{" * 50, "\x7f", "💥", "é", "__proto__", "%s", "-1",
    "99999999999999999999",
]  # fmt: skip
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from([10**400, -1, 2**63, 1e308])
    | st.sampled_from(ODD)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
rubbish = (
    st.binary(max_size=200)
    | st.text(max_size=200).map(lambda t: t.encode("utf-8", "surrogatepass"))
    | st.text(max_size=50).map(lambda t: t.encode("utf-16", "surrogatepass"))
    | st.lists(st.sampled_from(ODD), max_size=30).map(lambda parts: "".join(parts).encode())
    | values.map(lambda value: json.dumps(value).encode())
    | st.lists(values, max_size=5).map(lambda found: "\n".join(map(json.dumps, found)).encode())
)


@st.composite
def changed(draw: Any, good: bytes) -> bytes:
    """`good` with bytes flipped, cut, repeated or put in."""
    raw = good
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(raw) - 1)))
        end = min(len(raw), place + draw(st.integers(0, 40)))
        how = draw(st.integers(0, 4))
        if how == 0 and raw:
            raw = raw[:place] + bytes([raw[place] ^ draw(st.integers(1, 255))]) + raw[place + 1 :]
        elif how == 1:
            raw = raw[:place] + raw[end:]
        elif how == 2:
            raw = raw[:end] + raw[place:end] * draw(st.integers(1, 3)) + raw[end:]
        elif how == 3:
            raw = raw[:place] + draw(st.sampled_from(ODD)).encode() + raw[end:]
        else:
            raw = raw[:place]
    return raw


@st.composite
def altered(draw: Any, good: Any) -> Any:
    """A JSON value with one of its parts replaced or missing."""
    if isinstance(good, dict) and good and draw(st.integers(0, 5)):
        key = draw(st.sampled_from(sorted(good)))
        if not draw(st.integers(0, 5)):
            return {k: v for k, v in good.items() if k != key}
        return {**good, key: draw(altered(good[key]))}
    if isinstance(good, list) and good and draw(st.integers(0, 3)):
        place = draw(st.integers(0, len(good) - 1))
        return [*good[:place], draw(altered(good[place])), *good[place + 1 :]]
    return draw(values)


# -- recipes ----------------------------------------------------------------------------------------------------------

RECIPE = (
    b'name = "x"\n[model]\nname = "m"\n[context]\nsystem = "s"\ndemos = "d.jsonl"\n[queries]\ndata = "q.jsonl"\nlimit = 3\n'
    b'[prompt]\npattern = "{prompt}"\n[train]\nlr = 1e-4\nepochs = 2\n[eval]\nshare = 0.2\nmetrics = ["exact_match"]\n'
)
STUDY = b'name = "x"\n[model]\nnames = ["m"]\n[tasks]\nnames = ["trec"]\n[grid]\ndemos = [4, 16]\narms = ["cd_one"]\n'


@cases(300)
@given(
    raw=rubbish | changed(RECIPE),
    override=st.none() | st.tuples(st.sampled_from(["train.lr", "a", "", "name.x"]), values),
)
def test_recipes(raw: bytes, override: tuple[str, Any] | None, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = place(tmp_path_factory, "recipe") / "r.toml"
    path.write_bytes(raw)
    survives(lambda: Recipe.load(path, [f"{override[0]}={override[1]}"] if override else []))
    survives(lambda: Study.load(path))


RECIPE_DICT = {
    "name": "x", "model": {"name": "m", "dtype": "auto"}, "context": {"system": "s", "chunk_tokens": 64},
    "queries": {"data": "q.jsonl"}, "prompt": {"pattern": "{prompt}", "label_words": ["a", "b"], "template_kwargs": {"x": 1}},
    "lora": {"rank": 4, "targets": ["q"]}, "train": {"lr": 1e-3, "epochs": 1},
    "eval": {"share": 0.1, "format": "(?P<a>.)", "metrics": ["macro_f1"]},
    "completions": {"extract": "(x)", "checker": "a:b"}, "synthesis": {"endpoint": "http://x/"},
}  # fmt: skip


MANIFEST: dict[str, Any] = {
    "fingerprint": "x", "recipe": RECIPE_DICT, "context": {"sha256": ""}, "rows": {}, "model": {},
    "versions": {"torch": "2", "transformers": "5"},
}  # fmt: skip


@cases(200)
@given(raw=altered(RECIPE_DICT))
def test_recipes_of_the_wrong_shape(raw: Any) -> None:
    if isinstance(raw, dict):
        survives(lambda: Recipe.from_dict(raw))


@cases(60)
@given(raw=changed(STUDY))
def test_studies(raw: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = place(tmp_path_factory, "study") / "s.toml"
    path.write_bytes(raw)
    survives(lambda: Study.load(path).cells())


# -- rows -------------------------------------------------------------------------------------------------------------

ROWS: list[dict[str, Any]] = [{"prompt": "say a", "answer": "A"}, {"prompt": "say b", "answer": 2}]
CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": r, "content": c} for r, c in (("system", "s"), ("user", f"u{n}"), ("assistant", "a"))]}
    for n in range(2)
]


def parquet(columns: dict[str, list[Any]]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


GOOD: dict[str, bytes] = {
    "jsonl": "\n".join(map(json.dumps, [*ROWS, *CHATS])).encode(),
    "json": json.dumps(CHATS).encode(),
    "csv": b'prompt,answer\n"say a",A\n"say\nb",B\n',
    "tsv": b"prompt\tanswer\nsay a\tA\n",
    "parquet": parquet({"prompt": ["say a", "say b"], "answer": ["A", "B"], "n": [[1], [2, 3]]}),
}


@pytest.mark.parametrize("suffix", GOOD)
def test_rows(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"q.{suffix}"
    raw = {"model": {"name": "m"}, "context": {"system": "s"}, "queries": {"data": path.name}}
    plain = Recipe.from_dict(raw, base_dir=tmp_path)
    chat = Recipe.from_dict(
        {**raw, "queries": {"data": path.name, "messages": "messages", "turns": "conversation"}}, tmp_path
    )

    @cases(150)
    @given(raw=rubbish | changed(GOOD[suffix]))
    def run(raw: bytes) -> None:
        path.write_bytes(raw)
        for recipe in (plain, chat):
            survives(functools.partial(data.read, recipe.queries, recipe, "queries"))
        survives(lambda: data.read_messages(path.name, plain, "context.messages"))
        survives(lambda: data.read_text(path.name, plain, "context.documents"))
        survives(lambda: formats.recipe_for(path, tmp_path / "r.toml"))

    run()


@cases(100)
@given(rows=altered(ROWS) | altered(CHATS) | altered([{"prompt": CHATS[0]["messages"], "privileged_context": "x"}]))
def test_rows_of_the_wrong_shape(rows: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = place(tmp_path_factory, "rows")
    (folder / "q.json").write_text(json.dumps(rows))
    (folder / "s.txt").write_text("a system prompt")
    survives(lambda: formats.recipe_for(folder / "q.json", folder / "r.toml"))
    survives(lambda: formats.recipe_for(folder / "q.json", folder / "r.toml", context=folder / "s.txt"))


# -- run folders ------------------------------------------------------------------------------------------------------


def place(factory: pytest.TempPathFactory, name: str) -> Path:
    """A folder of that name, the same one each time."""
    folder = factory.getbasetemp() / f"rubbish-{name}"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def run(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that may be changed."""
    folder = place(tmp_path_factory, "run")
    shutil.copytree(finished, folder / "run")
    return folder / "run"


def with_file(path: Path, raw: bytes, *reads: Callable[[], Any]) -> None:
    """Call readers while a file holds something else."""
    good = path.read_bytes()
    path.write_bytes(raw)
    try:
        for read in reads:
            survives(read)
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize(
    ("name", "number"),
    [("recipe.json", 12), ("evaluation.json", 12), ("metrics.jsonl", 4), ("scores.jsonl", 4)],
)
def test_run_folders(name: str, number: int, run: Path, finished: Path, tmp_path: Path) -> None:
    good = (run / name).read_bytes()
    whole = [json.loads(line) for line in good.splitlines()] if name.endswith("l") else json.loads(good)

    def text(value: Any) -> bytes:
        lines = value if isinstance(value, list) and name.endswith("l") else [value]
        return "".join(json.dumps(line) + "\n" for line in lines).encode()

    def pages() -> None:
        report.write_report(run)
        comparing.write_page(comparing.compare([run, finished]), tmp_path / "compare.html")

    @cases(number)
    @given(raw=altered(whole).map(text) | changed(good) | rubbish)
    def check_it(raw: bytes) -> None:
        with_file(run / name, raw, pages, lambda: report.write_card(run, tmp_path), lambda: stored_recipe(RunDir(run)))

    check_it()


@cases(60)
@given(raw=altered(json.loads(json.dumps(RECIPE_DICT))) | values)
def test_stored_recipes(raw: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = place(tmp_path_factory, "stored")
    for stored in (
        raw,
        {"recipe": raw, "base_dir": ".", "explicit": []},
        {"recipe": RECIPE_DICT, "base_dir": raw, "explicit": raw},
    ):
        (folder / "recipe.json").write_text(json.dumps(stored))
        survives(lambda: stored_recipe(RunDir.existing(folder)))
        survives(lambda: claim(RunDir(folder), MANIFEST, resume=True))


@pytest.mark.parametrize("name", ["study_recipe.json", "cell.json", "scores.jsonl"])
def test_study_folders(name: str, tmp_path: Path) -> None:
    folder = build_study(tmp_path / "study", demos=(4,), sets=(0, 1), rows=20)
    path = folder / name if name.startswith("study") else sorted(folder.glob(f"cells/*/{name}"))[0]
    good = path.read_bytes()

    @cases(6)
    @given(raw=changed(good) | rubbish)
    def check_it(raw: bytes) -> None:
        with_file(path, raw, lambda: write_study_report(folder))

    check_it()


# -- tensors ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm(llama: Path) -> LM:
    return LM.load(ModelSection(name=str(llama)))


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapters(name: str, run: Path, lm: LM) -> None:
    folder = run / "adapter"
    good = (folder / name).read_bytes()

    def load() -> None:
        settings_of(folder)
        try:
            lm.load_adapter(folder)
        finally:
            lm.remove_adapter()

    @cases(60)
    @given(raw=changed(good) | shapes(name, good))
    def check_it(raw: bytes) -> None:
        with_file(folder / name, raw, load)

    check_it()


def shapes(name: str, good: bytes) -> Any:
    """JSON of the wrong shape for a JSON file, else rubbish."""
    if not name.endswith((".json", ".jsonl")):
        return rubbish
    first, *rest = good.splitlines(keepends=True) if name.endswith("l") else [good]
    return altered(json.loads(first)).map(lambda value: b"".join([json.dumps(value).encode(), b"\n", *rest]))


@pytest.mark.parametrize("name", ["index.jsonl", "*.safetensors"])
def test_target_stores(name: str, run: Path) -> None:
    path = sorted((run / "targets").glob(name))[0]
    good = path.read_bytes()

    def read() -> None:
        store = TargetStore(run / "targets")
        for number in range(len(store)):
            target = store[digits(store.table.all(), number)]
            dict(target.tensors)

    @cases(80)
    @given(raw=changed(good) | shapes(name, good) | rubbish)
    def check_it(raw: bytes) -> None:
        with_file(path, raw, read)

    check_it()


def test_checkpoints(run: Path) -> None:
    path = sorted((run / "checkpoints").glob("step-*"))[-1]
    good = path.read_bytes()

    @cases(150)
    @given(raw=changed(good) | rubbish)
    def check_it(raw: bytes) -> None:
        if raw != good:
            path.write_bytes(raw)
            assert survives(lambda: read_checkpoint(path)) is not None

    check_it()
    path.write_bytes(good)


def test_exports(run: Path) -> None:
    folder = run / "export" / "peft"
    export.export(run, "peft")
    good = json.loads((folder / "export.json").read_text())

    @cases(80)
    @given(raw=altered(good).map(lambda v: json.dumps(v).encode()) | rubbish)
    def check_it(raw: bytes) -> None:
        with_file(folder / "export.json", raw, lambda: check._manifest(folder, RunDir(run)))

    check_it()


def test_gguf(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTXDISTILL_CACHE", str(tmp_path / "cache"))
    export.export(finished, "gguf", tmp_path / "gguf")
    good = next((tmp_path / "gguf").glob("*.gguf")).read_bytes()
    head = good[: good.index(b"tokenizer.ggml.tokens")]
    path = tmp_path / "model.gguf"

    @cases(25)
    @given(raw=changed(head).map(lambda raw: raw + good[len(head) :]) | changed(good) | rubbish)
    def check_it(raw: bytes) -> None:
        path.write_bytes(raw)
        survives(lambda: LM.load(ModelSection(name=str(path))))
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)

    check_it()


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors", "generation_config.json"]
)
def test_models(name: str, llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "model")
    path = tmp_path / "model" / name
    good = path.read_bytes()

    @cases(10)
    @given(raw=changed(good) | shapes(name, good))
    def check_it(raw: bytes) -> None:
        with_file(path, raw, lambda: LM.load(ModelSection(name=str(path.parent))))

    check_it()
