"""Queries written from the context: what is kept, what is rejected and why, and the run that is trained on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tiny
from ctxdistill import cli, pipeline, synthesis
from ctxdistill.dataset import prepare, read_rows, synthesize
from ctxdistill.errors import DataError, ModelError, RecipeError, RunError
from ctxdistill.lm import LM
from ctxdistill.prompts import Prompter
from ctxdistill.recipe import Recipe
from ctxdistill.rundir import RunDir
from ctxdistill.synthesis import candidates, extract, material
from ctxdistill.weights import load_tokenizer
from server import completion, serve

THINGS = [
    "anchor",
    "bell",
    "crane",
    "dredger",
    "engine",
    "ferry",
    "gate",
    "hoist",
    "icebreaker",
    "jetty",
    "keel",
    "lamp",
]
FACTS = [f"The {thing} in the harbour of Orrel weighs {n} tons." for n, thing in enumerate(THINGS, 11)]


def recipe(job: Path, url: str | None = None, **overrides: Any) -> Recipe:
    """Two documents of six sentences, in two chunks each; `url` is the server that writes."""
    for name, part in (("a.md", FACTS[:6]), ("b.md", FACTS[6:])):
        (job / name).write_text("\n\n".join([" ".join(part[:3]), " ".join(part[3:])]))
    raw = tiny.recipe_dict(
        job, context={"documents": ["a.md", "b.md"]}, queries={"synthesize": 16}, synthesis={"chunk_tokens": 180}
    )
    if url:
        raw["synthesis"] |= {"endpoint": url, "endpoint_model": "big"}
    for key, value in overrides.items():
        section, _, name = key.partition("__")
        raw[section][name] = value
    return Recipe.from_dict(raw, base_dir=job)


def prompter(r: Recipe) -> Prompter:
    return Prompter(r, load_tokenizer(r.model, r.base_dir))


def about_focus(body: dict[str, Any], number: int) -> tuple[int, Any, dict[str, str]]:
    """What a good writer says: the seed prompt's thing, asked about in a way that the seed decides."""
    told, style = body["messages"][-1]["content"], body["seed"] % 5
    thing = told.split("The ")[-1].split(" in the")[0]
    asks = ["How heavy is the {}?", "What does that {} weigh, please?", "Tell me all of the {} that you know?",
            "Can one man lift this {} alone?", "Is any {} as light as a feather?"]  # fmt: skip
    return 200, completion(f"Question: {asks[style].format(thing)}\nAnswer: no."), {}


def write(r: Recipe, file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    summary = synthesize(r, prompter(r), None, file)
    return summary, tiny.read_jsonl(file)


def test_every_query_tells_where_it_comes_from(job: Path) -> None:
    with serve(about_focus) as (url, seen):
        r = recipe(job, url)
        summary, rows = write(r, job / "q.jsonl")
        _, same = write(r, job / "again.jsonl")
    chunks = {c.name: c for c in material(r, prompter(r))}
    assert list(chunks) == ["a.md:1", "a.md:2", "b.md:1", "b.md:2"]
    assert len(rows) == summary["written"] == 16 and rows == same
    for row in rows:
        thing = next(f for f in FACTS if f.split()[1] in row["prompt"])
        assert thing in chunks[row["chunk"]].text and row["prompt"].endswith("?")
        made = candidates(r, prompter(r), chunks[row["chunk"]], row["attempt"], 1)[0]
        assert (made.kind, made.seed) == (row["kind"], row["seed"]) and thing in made.messages[-1]["content"]
    assert summary["candidates"] == 16 + sum(summary["rejected"].values()) == len(seen) // 2
    assert summary["rejected"]["repeated"] > 0
    assert sum(k["written"] for k in summary["kinds"].values()) == 16 and len(summary["kinds"]) == 6
    assert [c["written"] for c in summary["chunks"].values()] == [4, 4, 4, 4]
    assert summary["diversity"]["mean_distance"] > 0.5 and summary["writer"] == f"big at {url}"
    assert json.loads((job / "q.summary.json").read_text()) == summary
    assert not list(job.glob("*partial*"))


def test_a_cap_and_a_shortfall_are_said(job: Path) -> None:
    with serve(about_focus) as (url, _):
        summary, rows = write(recipe(job, url, synthesis__per_chunk=2), job / "q.jsonl")
        assert len(rows) == 8 and {c["written"] for c in summary["chunks"].values()} == {2}
    with serve(lambda b, n: (200, completion("Where is the harbour of Orrel?"), {})) as (url, _):
        summary, rows = write(recipe(job, url), job / "q2.jsonl")
        assert len(rows) == 1 and summary["wanted"] == 16
        assert summary["candidates"] == 4 * 16 and summary["rejected"] == {"repeated": 63}
    with serve(lambda b, n: (200, completion(""), {})) as (url, _), pytest.raises(DataError, match="none of 64") as e:
        write(recipe(job, url), job / "q3.jsonl")
    assert "empty 64" in str(e.value) and not (job / "q3.jsonl").exists()


def test_held_out_rows_and_given_queries_are_not_written_again(job: Path) -> None:
    tiny.write_jsonl(job / "held.jsonl", [{"prompt": "how HEAVY is the anchor?", "answer": "11"}])
    tiny.write_jsonl(job / "given.jsonl", [{"prompt": "What does the bell weigh, please?"}])
    with serve(about_focus) as (url, _):
        r = recipe(job, url, eval__data="held.jsonl", queries__data="given.jsonl", synthesis__similarity=0.5)
        summary, rows = write(r, job / "q.jsonl")
        (job / "run").mkdir()
        (job / "q.jsonl").rename(job / "run" / "queries.jsonl")
        splits, counts = read_rows(r, prompter(r), job / "run")
    asked = {row["prompt"] for row in rows}
    assert "How heavy is the anchor?" not in asked and "What does that bell weigh, please?" not in asked
    assert summary["rejected"]["repeated"] and summary["rejected"]["nearly a given row"]
    assert counts["train"] + counts["validation"] == len(rows) + 1 and counts["eval"] == 1
    assert splits["eval"][0][0].fields["answer"] == "11"


def test_skip_and_limit_are_of_the_given_queries(job: Path) -> None:
    file = tiny.write_jsonl(job / "w.jsonl", [{"prompt": f"What is number {i}?"} for i in range(5)])
    for key, value in (("skip", 2), ("skip", 9), ("limit", 1)):
        r = recipe(job, queries__data="queries.jsonl", **{f"queries__{key}": value})
        assert len(synthesis.read_written(r, file)) == 5


@pytest.mark.parametrize(
    ("text", "ended", "reason"),
    [
        ("", True, "empty"), ("How heavy is the", False, "unfinished"), ("How?", True, "too short"),
        ("The anchor is heavy.", True, "not a question"), ("What does this passage say about it?", True, "speaks of the text"),
        ("The anchor in the harbour of Orrel weighs 11 tons?", True, "repeats its seed"),
        ("What should one see at the mill?", True, "about the examples"),
        ("How heavy is   the CRANE?", True, "repeated"), ("So how heavy is the crane?", True, "nearly repeated"),
        ("How heavy is the crane here in Wick?", True, ""), ("铁锚有多重，有十一吨那么重吗？", True, ""),
    ],
)  # fmt: skip
def test_why_a_candidate_is_rejected(job: Path, text: str, ended: bool, reason: str) -> None:
    r = recipe(job, synthesis__kinds=["question"], synthesis__similarity=0.6)
    p = prompter(r)
    found = synthesis._Found(r, p, [])
    one = next(c for c in candidates(r, p, material(r, p)[0], 0, 9) if "anchor" in c.told[0])
    found.judge(one, "How heavy is the crane?", True, full=False)
    found.judge(one, text, ended, full=False)
    assert found.rejected == ({reason: 1} if reason else {})
    assert len(found.rows) == (1 if reason else 2)


def test_a_query_that_holds_the_context_is_rejected(job: Path) -> None:
    r = recipe(job, context__demos="demos.jsonl", queries__synthesize=4)
    tiny.write_jsonl(
        job / "demos.jsonl",
        [{"prompt": "Which of the two cranes is heavier, the old or the new one?", "answer": "new"}],
    )
    p = prompter(r)
    found = synthesis._Found(r, p, [])
    one = candidates(r, p, material(r, p)[0], 0, 1)[0]
    found.judge(
        one,
        "Which of the two cranes is heavier, the old or the new one? And why do you say so, my friend?",
        True,
        full=False,
    )
    assert found.rejected == {"holds the context": 1}


@pytest.mark.parametrize(
    ("text", "query", "whole"),
    [
        ("How old is it?", "How old is it?", False), ('"How old is it?"', "How old is it?", False),
        ("Here is a question:\n\n1. **How old is it?**\n2. Why?", "How old is it?", True),
        ("Question 1: How old\nis it", "How old", True), ("User question: `How?`", "How?", False),
        ("- List: a, b", "List: a, b", False),
        ("The following:", "The following:", False), ("\n \n", "", True), ("“Wie alt?”\n", "Wie alt?", False),
    ],
)  # fmt: skip
def test_what_a_text_holds(text: str, query: str, whole: bool) -> None:
    assert extract(text, False) == (query, whole)
    assert extract(text, True)[1]


def test_an_interrupted_writer_does_not_ask_again(job: Path) -> None:
    whole: list[dict[str, Any]] = []
    with serve(about_focus) as (url, seen):
        _, straight = write(recipe(job, url, targets__batch_size=4), job / "straight.jsonl")
        whole += seen

    def breaks(body: dict[str, Any], number: int) -> tuple[int, Any, dict[str, str]]:
        return about_focus(body, number) if not broken or number < 4 else (400, "no", {})

    broken = True
    with serve(breaks) as (url, seen):
        r = recipe(job, url, targets__batch_size=4)
        with pytest.raises(ModelError, match="400"):
            write(r, job / "q.jsonl")
        assert not (job / "q.jsonl").exists() and (job / ".q.jsonl.partial.jsonl").exists()
        refused = len(seen) - 4
        broken = False
        _, resumed = write(r, job / "q.jsonl")
    assert resumed == straight and len(seen) == len(whole) + refused


@pytest.mark.parametrize("chat", [True, False])
def test_the_local_model_writes(job: Path, tmp_path: Path, chat: bool) -> None:
    """A random model writes noise; what matters is that it is the same noise again, and that all of it is judged."""
    tiny.save(tmp_path / "own", chat=chat)
    r = recipe(job, model__name=str(tmp_path / "own"), model__window=512, synthesis__chunk_tokens=64,
               synthesis__max_new_tokens=8, synthesis__kinds=["summarise"], synthesis__temperature=3.0,
               queries__synthesize=8)  # fmt: skip
    if not chat:
        r = Recipe.from_dict(r.to_dict() | {"prompt": {"style": "text"}}, base_dir=job)
    lm = LM.load(r.model)
    p = Prompter(r, lm.tokenizer)
    writer = synthesis.Local(lm, p, r.synthesis)
    short = [[{"role": "system", "content": "Know this."}, {"role": "user", "content": f"say {i}"}] for i in range(3)]
    first = writer.write(short, [1, 2, 3])
    assert writer.write(short, [1, 2, 3]) == first != writer.write(short, [4, 5, 6])
    assert [text for text, _ in first] != [first[0][0]] * 3
    alone = synthesis.Local(lm, p, r.synthesis).write(short[1:2], [2])
    assert alone == first[1:2]  # neither the batch nor the shared start changes a text


def bound(job: Path, url: str, **overrides: Any) -> Recipe:
    """Held-out rows are written, too, and the teacher reads a chunk at a time: the tiny model's window holds no more."""
    split = {"context__chunk_tokens": 180, "context__chunk_overlap": 0}
    return recipe(job, url, eval__data=None, eval__format=None, **split, **overrides)


def distilled(job: Path, url: str, **overrides: Any) -> pipeline.Run:
    return pipeline.distill(bound(job, url, **overrides), job / "run")


def test_a_run_writes_its_queries_first(job: Path) -> None:
    with serve(about_focus) as (url, seen):
        run = distilled(job, url)
        asked = len(seen)
        r = bound(job, url)
        pipeline.distill(r, job / "run", resume=True)
        assert len(seen) == asked  # the file is there
    manifest = json.loads((run.path / "recipe.json").read_text())
    assert sum(manifest["rows"][k] for k in ("train", "validation", "eval")) == 16
    written = manifest["written_queries"]
    assert written["written"] == 16 and not written["edited_since"] and not written["context_changed_since"]
    page = (run.path / "report.html").read_text()
    assert "repeated" in page and written["sha256"] in page
    # changed queries make another run, even where all rows stay the same
    file = run.path / "queries.jsonl"
    lines = tiny.read_jsonl(file)
    file.write_text(file.read_text() + "\n")
    with pytest.raises(RunError, match="belongs to another recipe"):
        pipeline.distill(r, job / "run", resume=True)
    file.write_text("".join(json.dumps({**row, "prompt": "Now, " + row["prompt"]}) + "\n" for row in lines))
    again = pipeline.distill(
        r.model_copy(update={"synthesis": r.synthesis.model_copy(update={"file": str(file)})}), job / "b"
    )
    edited = RunDir(again.path).read_json("recipe.json")["written_queries"]
    assert edited["edited_since"] and all("Now, " in s["query"] for s in RunDir(again.path).read_jsonl("scores.jsonl"))


@pytest.mark.parametrize("by", ["query", "chunk"])
def test_sides_do_not_overlap(job: Path, by: str) -> None:
    with serve(about_focus) as (url, _):
        r = bound(job, url, synthesis__held_out=by, eval__share=0.3, train__validation=0.3)
        _, _, rows = prepare(r, job / "run")
    sides = {split: found for split, (found, _) in rows.splits.items()}
    assert all(sides.values())
    chunks = {split: {row.fields["chunk"] for row in found} for split, found in sides.items()}
    queries = [row.fields["prompt"] for found in sides.values() for row in found]
    assert len(set(queries)) == len(queries) == 16
    together = sum(len(c) for c in chunks.values()) == len(set.union(*chunks.values()))
    assert together == (by == "chunk")


def test_the_command(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe(job)
    with serve(about_focus) as (url, _):
        (job / "r.toml").write_text(
            f'[model]\nname = "{job}/model"\n[context]\ndocuments = ["a.md", "b.md"]\n[queries]\nsynthesize = 8\n'
            f'[synthesis]\nfile = "w.jsonl"\nchunk_tokens = 180\nendpoint = "{url}"\nendpoint_model = "big"\n'
        )
        assert cli.main(["show", str(job / "r.toml")]) == 2
        assert "ctxdistill queries" in capsys.readouterr().err
        assert cli.main(["queries", str(job / "r.toml")]) == 0
        out = capsys.readouterr().out
        assert "8 of 8 queries, from" in out and "rejected: " in out and "a.md:2" in out and "diversity: " in out
        assert cli.main(["queries", str(job / "r.toml")]) == 2
        assert "--force" in capsys.readouterr().err
        assert cli.main(["queries", str(job / "r.toml"), "--force", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["written"] == 8
        assert cli.main(["show", str(job / "r.toml"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["split"] == "train"
    raw = tiny.recipe_dict(job)
    with pytest.raises(RecipeError, match="wants no queries"):
        pipeline.queries(Recipe.from_dict(raw, base_dir=job))


def test_it_is_said_where_the_queries_are_and_how_to_get_them(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(job)
    with serve(about_focus) as (url, _):
        tiny.write_recipe(job / "my garden.toml", bound(job, url).model_dump(exclude_unset=True, exclude_none=True))
        assert cli.main(["show", "my garden.toml", "train.lr=1e-4"]) == 2
        fix = capsys.readouterr().err.splitlines()[-1]
        assert "ctxdistill queries 'my garden.toml' train.lr=1e-4 (or distill" in fix
        assert cli.main(["gate", "my garden.toml"]) == 0
        assert f"16 queries are written: {Path('runs/tiny/queries.jsonl')}" in capsys.readouterr().err
        assert cli.main(["gate", "my garden.toml"]) == 0
        assert "queries are written" not in capsys.readouterr().err
    monkeypatch.chdir(job / "model")
    with pytest.raises(DataError, match="ctxdistill queries RECIPE"):
        pipeline.show(bound(job, url))


@pytest.mark.parametrize("kind", ["system", "few-shot", "document"])
def test_a_template_becomes_an_adapter_without_queries_of_ones_own(
    job: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As README.md says it: `synthesize` in the place of `data`."""
    monkeypatch.chdir(job)
    (job / "handbook.md").write_text(" ".join(FACTS[:6]))
    labels = ("delivery", "refund", "account")
    tiny.write_jsonl(job / "demos.jsonl", [{"prompt": f"my {label}", "answer": label} for label in labels])
    tiny.write_jsonl(job / "heldout.jsonl", [{"prompt": f"the {label}", "answer": label} for label in labels])
    assert cli.main(["init", "my.toml", "--kind", kind]) == 0
    text = (job / "my.toml").read_text()
    data = next(line for line in text.splitlines() if line.startswith("data = ") and "hub:" in line)
    small = ["model.name=model", "completions.max_new_tokens=4", "eval.max_new_tokens=4", "train.epochs=1",
             "gate.on_fail='warn'", "eval.latency_rows=0", "eval.bootstrap=100"]  # fmt: skip

    def writes(body: dict[str, Any], number: int) -> tuple[int, Any, dict[str, str]]:
        thing, other = THINGS[number % 12], THINGS[(number // 12 + number + 1) % 12]
        return 200, completion(f"Has any {thing} of yours got one {other} or two?"), {}

    with serve(writes) as (url, _):
        more = [*small, f"synthesis.endpoint={url!r}", "synthesis.endpoint_model='big'"]
        assert cli.main(["queries", "my.toml", "queries.synthesize=12", *more]) == 2
        assert "or delete queries.data" in capsys.readouterr().err
        (job / "my.toml").write_text(text.replace(data, "synthesize = 12"))
        assert cli.main(["queries", "my.toml", *more]) == 0
    assert cli.main(["distill", "my.toml", *small]) == 0
    record = RunDir(job / "runs/my").read_json("recipe.json")
    assert record["written_queries"]["written"] == 12
    assert record["rows"]["train"] + record["rows"]["validation"] >= 8


def test_recipes_that_contradict_themselves(job: Path) -> None:
    for overrides, complaint in [
        ({"context__column": "c"}, "excludes context.column"),
        ({"queries__messages": "m"}, "excludes queries.messages"),
        ({"completions__source": "data"}, 'excludes completions.source = "data"'),
        ({"synthesis__endpoint": "http://x/v1"}, "endpoint_model"),
        ({"synthesis__endpoint": "file:///etc", "synthesis__endpoint_model": "m"}, "http(s)"),
        ({"synthesis__endpoint": "http://u:p@x/v1", "synthesis__endpoint_model": "m"}, "without user name"),
        ({"synthesis__key_variable": "sk-123"}, "not a key"),
        ({"synthesis__kinds": ["riddle"]}, "synthesis.kinds"),
        ({"queries__synthesize": 0}, "has no effect without queries.synthesize"),
    ]:
        with pytest.raises(RecipeError) as caught:
            recipe(job, **overrides)
        assert complaint in str(caught.value), str(caught.value)
    stored = recipe(job).to_dict() | {"queries": {"data": "queries.jsonl"}, "synthesis": recipe(job).synthesis.model_copy(
        update={"chunk_tokens": 256}).model_dump()}  # fmt: skip
    Recipe.from_dict(stored, base_dir=job)  # all defaults written out, as runs keep them
