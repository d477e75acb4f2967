"""Files become rows, and everything that is wrong with a file is said at once."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from ctxdistill import readers
from ctxdistill import rows as data
from ctxdistill.errors import DataError
from ctxdistill.recipe import DataSection, Recipe
from ctxdistill.rows import (
    Row,
    Rows,
    check_overlap,
    drop_duplicates,
    query_key,
    read_messages,
    read_text,
    split,
    values,
)


def recipe(folder: Path, **sections: Any) -> Recipe:
    base = {"model": {"name": "m"}, "context": {"system": "s"}, "queries": {"data": "q.jsonl"}}
    return Recipe.from_dict({**base, **sections}, base_dir=folder)


def read(
    folder: Path, name: str, text: str | bytes, *, what: str = "queries", answers: Any = "optional", **kwargs: Any
) -> Rows:
    """`text` as the file `name`, read with the columns in `kwargs["queries"]`."""
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    queries = {"data": name, **kwargs.pop("queries", {})}
    r = recipe(folder, queries=queries, **kwargs)
    return data.read(r.queries, r, what, answers=answers)


def fails(folder: Path, name: str, text: str | bytes, **kwargs: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(folder, name, text, **kwargs)
    return str(caught.value)


def lines(*objects: Any) -> str:
    return "".join(json.dumps(o) + "\n" for o in objects)


def row(prompt: str, origin: str = "f:1", **more: str) -> Row:
    return Row(id=query_key(prompt), fields={"prompt": prompt, **more}, origin=origin)


# -- formats ----------------------------------------------------------------------------------------------------------


def test_jsonl(tmp_path: Path) -> None:
    got = read(tmp_path, "q.jsonl", '{"prompt": "a\u2028b", "n": 1}\r\n\n{"prompt": "c", "answer": "d"}')
    assert [r.fields for r in got.rows] == [{"prompt": "a\u2028b", "n": 1}, {"prompt": "c", "answer": "d"}]
    assert [r.origin for r in got.rows] == ["q.jsonl:1", "q.jsonl:3"]
    assert (got.left_out, got.source) == (0, str(tmp_path / "q.jsonl"))


def test_json(tmp_path: Path) -> None:
    got = read(tmp_path, "q.json", '[{"prompt": "a"},\n {"prompt": "b"}]')
    assert [(r.fields["prompt"], r.origin) for r in got.rows] == [("a", "q.json:item 1"), ("b", "q.json:item 2")]


@pytest.mark.parametrize(("name", "separator"), [("q.csv", ","), ("q.tsv", "\t")])
def test_csv_and_tsv(tmp_path: Path, name: str, separator: str) -> None:
    cells = [["prompt", "answer"], ['"two\nlines, ""quoted"""', "x"], ["last", ""]]
    text = "\ufeff" + "\r\n".join(separator.join(c) for c in cells)
    got = read(tmp_path, name, text)
    first = {"prompt": 'two\nlines, "quoted"', "answer": "x"}
    assert [r.fields for r in got.rows] == [first, {"prompt": "last", "answer": None}]
    assert [r.origin for r in got.rows] == [f"{name}:2", f"{name}:4"]


def test_csv_with_a_long_field(tmp_path: Path) -> None:
    long = "x" * 300_000  # the csv module's own limit is 131072
    assert read(tmp_path, "q.csv", f"prompt\n{long}\n").rows[0].fields["prompt"] == long


def test_parquet(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"prompt": [f"p{i}" for i in range(3000)], "answer": [1] * 3000}), tmp_path / "x.parquet")
    raw = (tmp_path / "x.parquet").read_bytes()
    got = read(tmp_path, "q.parquet", raw)
    assert len(got.rows) == 3000
    assert (got.rows[1500].fields, got.rows[1500].origin) == ({"prompt": "p1500", "answer": 1}, "q.parquet:1501")
    some = read(tmp_path, "q.parquet", raw, queries={"limit": 1100})
    assert (len(some.rows), some.left_out) == (1100, 1900)
    assert "cannot be read as Parquet" in fails(tmp_path, "q.parquet", b"PAR1 no")


def test_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    asked: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        features = Features({"prompt": Value("string"), "answer": ClassLabel(names=["no", "yes"])})
        return Dataset.from_dict({"prompt": [f"p{i}" for i in range(5)], "answer": [1, -1, 0, 1, 0]}, features=features)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    r = recipe(tmp_path, queries={"data": "hub:owner/name", "config": "c", "split": "dev", "limit": 2})
    got = data.read(r.queries, r, "queries")
    assert asked == [(("owner/name", "c"), {"split": "dev"})]
    assert [x.origin for x in got.rows] == ["owner/name:dev:1", "owner/name:dev:2"]
    assert (got.left_out, got.source) == (3, "owner/name (c, dev)")
    assert [x.fields["answer"] for x in got.rows] == ["yes", None]  # class labels by name; -1 is the hub's "no label"

    def broken(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("offline\nand more")

    monkeypatch.setattr("datasets.load_dataset", broken)
    with pytest.raises(DataError, match=r"(?s)owner/name \(c, dev\).*ConnectionError: offline\n.*queries\.split"):
        data.read(r.queries, r, "queries")


def test_limit_counts_what_it_leaves_out(tmp_path: Path) -> None:
    some = [{"prompt": str(i)} for i in range(7)]
    for name, text in (
        ("q.jsonl", lines(*some)),
        ("q.json", json.dumps(some)),
        ("q.csv", "prompt\n" + "".join(f"{i}\n" for i in range(7))),
    ):
        got = read(tmp_path, name, text, queries={"limit": 3})
        assert [r.fields["prompt"] for r in got.rows] == ["0", "1", "2"]
        assert got.left_out == 4


# -- broken files -----------------------------------------------------------------------------------------------------


def test_all_broken_lines_are_reported_at_once(tmp_path: Path) -> None:
    raw = b"\n".join(
        [
            b'{"prompt": "fine"}',
            b'{"prompt": "no end',
            b"[1, 2]",
            b'{"promt": "x"}',
            b'{"prompt": 7}',
            b'{"prompt": "  "}',
            b'{"prompt": "\xff"}',
            b"null",
            b'{"prompt": "a", "prompt": "b"}',
            b'{"prompt": "\\ud800"}',
            b'{"prompt": null}',
            b'{"prompt": "ok", "answer": ["x"]}',
            b'{"prompt": "ok", "answer": true}',
            b'{"prompt": "ok", "answer": NaN}',
        ]
    )
    message = fails(tmp_path, "q.jsonl", raw)
    for part in (
        "13 problems",
        "q.jsonl:2: not valid JSON, column 12",
        "q.jsonl:3: expected an object {...}, found [1, 2]",
        "q.jsonl:4: no column 'prompt'; did you mean 'promt'?",
        "q.jsonl:5: prompt: expected a text, found 7",
        "q.jsonl:6: prompt: the text is empty",
        "q.jsonl:7: not valid UTF-8 at byte 13 of the line",
        "q.jsonl:8: expected an object {...}, found null",
        "q.jsonl:9: not valid JSON: the key 'prompt' occurs twice",
        "q.jsonl:10: prompt: half of a surrogate pair",
        "q.jsonl:11: prompt: expected a text, found nothing",
        "q.jsonl:12: answer: expected a text or a number, found ['x']",
        "q.jsonl:13: answer: expected a text or a number, found True",
        "q.jsonl:14: answer: expected a text or a number, found nan",
    ):
        assert part in message
    assert "q.jsonl:1:" not in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("prompt,x\na,b,c\nd\ne,f\n", ["q.csv:2: expected 2 fields as in the header, found 3", "q.csv:3: expected 2"]),
        ('prompt\n"never ends\n', ["q.csv:2: unexpected end of data"]),
        ('prompt\n"a" b\nfine\n', ["q.csv:2: ',' expected after '\"'"]),
        ("prompt,prompt\na,b\n", ["q.csv:1: column names must be different"]),
        ("prompt,\na,b\n", ["q.csv:1: column names must be different and not empty"]),
        (b"prompt\nfine\n\xe4\n", ["q.csv:3: not valid UTF-8 at byte 1 of the line"]),
        ("prompt,n\n,1\n", ["q.csv:2: prompt: expected a text, found nothing"]),
    ],
)
def test_broken_csv(tmp_path: Path, text: str | bytes, parts: list[str]) -> None:
    message = fails(tmp_path, "q.csv", text)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('{"prompt": "x"}', "q.json: expected a list of objects"),
        ('[{"prompt": "x"}, 3]', "q.json:item 2: expected an object {...}, found 3"),
        ('[{"prompt":\n "x"},\n}', "q.json: not valid JSON, line 3, column 1"),
        (b"[\xff]", "q.json: not valid UTF-8 at byte 2"),
        ("[" * 100_000, "q.json: not valid JSON"),
    ],
)
def test_broken_json(tmp_path: Path, text: str | bytes, part: str) -> None:
    assert part in fails(tmp_path, "q.json", text)


@pytest.mark.parametrize("name", ["q.jsonl", "q.json", "q.csv"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_one_error(tmp_path: Path, name: str, encoding: str) -> None:
    text = {"q.jsonl": lines({"prompt": "a"}), "q.json": '[{"prompt": "a"}]', "q.csv": "prompt\na\n"}[name]
    (tmp_path / name).write_bytes(text.encode(encoding))
    r = recipe(tmp_path, queries={"data": name})
    with pytest.raises(DataError, match="looks like UTF-16") as caught:
        data.read(r.queries, r, "queries")
    assert name in caught.value.message and caught.value.fix == "save it as UTF-8"
    with pytest.raises(DataError, match="looks like UTF-16"):
        data.read_rows(tmp_path / name)


def test_what_to_do_about_another_encoding(tmp_path: Path) -> None:
    for name, raw in (
        ("q.jsonl", b'{"prompt": "\xe4"}\n'),
        ("q.csv", b"prompt\n\xe4\n"),
        ("q.json", b'[{"prompt": "\xe4"}]'),
    ):
        message = fails(tmp_path, name, raw)
        assert message.endswith("  fix: save it as UTF-8"), message
    more = fails(tmp_path, "q.jsonl", b'{"prompt": "\xe4"}\n{"prompt": 7}\n')
    assert "save it as UTF-8" in more and "mend these lines" in more
    (tmp_path / "from.jsonl").write_bytes(b'{"prompt": "\xe4"}\n')
    with pytest.raises(DataError, match="fix: save it as UTF-8"):
        data.read_rows(tmp_path / "from.jsonl")


@pytest.mark.parametrize(
    ("name", "text", "separator", "fix"),
    [
        ("q.csv", "prompt;x\na;b\n", "';'", "save it with commas, or as .jsonl"),
        ("q.csv", "prompt;x\na, b, c;d\n", "';'", "save it with commas, or as .jsonl"),
        ("q.csv", "\ufeffprompt\tx\na\tb\n", "tabs", "save it with commas, or as .jsonl"),
        ("q.tsv", "prompt,x\na,b\n", "','", "save it with tabs, or as .jsonl"),
    ],
)
def test_other_separators_are_named(tmp_path: Path, name: str, text: str, separator: str, fix: str) -> None:
    message = fails(tmp_path, name, text)
    assert f"{name} seem to be separated by {separator}" in message
    assert message.endswith(f"fix: {fix}")


def test_a_column_may_have_a_semicolon_in_its_name(tmp_path: Path) -> None:
    assert len(read(tmp_path, "q.csv", "a;b\nc\n", queries={"prompt": "a;b"}).rows) == 1


@pytest.mark.parametrize("name", ["q.jsonl", "q.json", "q.csv", "q.tsv"])
@pytest.mark.parametrize("text", ["", "\n \n"])
def test_empty_file(tmp_path: Path, name: str, text: str) -> None:
    if name[2:] in {"csv", "tsv"} and text:
        text = "\n\n"
    assert "is empty" in fails(tmp_path, name, text)


def test_header_alone_is_empty(tmp_path: Path) -> None:
    assert "is empty" in fails(tmp_path, "q.csv", "prompt,answer\n")


def test_long_line_is_refused_without_reading_it_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_BYTES", 100)
    text = lines({"prompt": "a"}, {"prompt": "x" * 1000}, {"prompt": 3}, {"prompt": "b" * 80})
    message = fails(tmp_path, "q.jsonl", text)
    assert "q.jsonl:2: line longer than" in message
    assert "q.jsonl:3: prompt: expected a text" in message  # line numbers stay right after it
    assert "2 problems" in message


def test_no_read_asks_for_more_than_the_longest_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = readers.open_file

    class Spy:
        def __init__(self, path: Path, what: str) -> None:
            self.file = real(path, what)

        def __enter__(self) -> Spy:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def readline(self, size: int) -> bytes:
            sizes.append(size)
            return bytes(self.file.readline(size))

    monkeypatch.setattr(readers, "MAX_BYTES", 100)
    monkeypatch.setattr(readers, "open_file", Spy)
    fails(tmp_path, "q.jsonl", lines({"prompt": "x" * 1000}))
    assert len(sizes) > 10
    assert set(sizes) == {100, 101}


def test_large_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_BYTES", 1000)
    monkeypatch.setattr(readers.files, "MAX_JSON", 1000)
    assert "too large" in fails(tmp_path, "q.json", json.dumps([{"prompt": "x" * 2000}]))
    (tmp_path / "t.txt").write_text("x" * 1001)
    with pytest.raises(DataError, match="too large"):
        read_text("t.txt", recipe(tmp_path), "context.system_file")


def test_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    for name in ("queries.jsonl", "other.txt"):
        (tmp_path / name).write_text("x")
    r = recipe(tmp_path, queries={"data": "querys.jsonl"})
    with pytest.raises(DataError) as caught:
        data.read(r.queries, r, "queries")
    assert "no file" in caught.value.message
    assert caught.value.expected
    assert "queries.jsonl" in caught.value.found
    assert "similar names in" in caught.value.found and "other.txt" not in caught.value.found
    assert "queries" in caught.value.fix
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text("x")
    r = recipe(tmp_path, queries={"data": "zzzzzzz.parquet"})
    with pytest.raises(DataError, match=r"in .*: 0\.txt, 1\.txt, 2\.txt, 3\.txt, 4\.txt, \.\.\.\n"):
        data.read(r.queries, r, "queries")
    (tmp_path / "rows").mkdir()
    for name, found in (("no/q.jsonl", "there is no folder"), ("sub.csv", "is a folder"), ("rows", "is a folder")):
        (tmp_path / "sub.csv").mkdir(exist_ok=True)
        r = recipe(tmp_path, queries={"data": name})
        with pytest.raises(DataError, match=found):
            data.read(r.queries, r, "queries")


def test_unsupported_suffix_names_the_supported(tmp_path: Path) -> None:
    message = fails(tmp_path, "q.xlsx", "x")
    assert all(suffix in message for suffix in (".jsonl", ".json", ".csv", ".tsv", ".parquet", "hub:", ".xlsx"))
    assert len(read(tmp_path, "q.JSONL", lines({"prompt": "capital letters are fine"})).rows) == 1


def test_no_data_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="eval: no data is named"):
        data.read(DataSection(), recipe(tmp_path), "eval")


# -- columns ----------------------------------------------------------------------------------------------------------


def test_a_column_that_no_row_has_is_one_problem(tmp_path: Path) -> None:
    message = fails(tmp_path, "q.jsonl", lines(*[{"question": "a"}] * 50), queries={"prompt": "questions"})
    assert "1 problem\n" in message
    assert "no row has the column 'questions', which queries.prompt names; did you mean 'question'?" in message


def test_columns_of_the_pattern_are_needed_and_prompt_is_not(tmp_path: Path) -> None:
    two = {"pattern": "{premise} / {hypothesis}"}
    got = read(tmp_path, "q.jsonl", lines({"premise": "a", "hypothesis": 3}), prompt=two)
    assert len(got.rows) == 1
    text = lines({"premise": "a", "hypo": "b"}, {"premise": [], "hypothesis": "b"})
    message = fails(tmp_path, "q.jsonl", text, prompt=two)
    assert "q.jsonl:1: no column 'hypothesis'" in message
    assert "q.jsonl:2: premise: expected a text or a number, found []" in message


def test_answers(tmp_path: Path) -> None:
    text = lines({"prompt": "a", "answer": "x"}, {"prompt": "b"}, {"prompt": "c", "answer": None})
    assert len(read(tmp_path, "q.jsonl", text).rows) == 3
    message = fails(tmp_path, "q.jsonl", text, answers="required", what="context.demos")
    assert "q.jsonl:2: no column 'answer'" in message
    assert "q.jsonl:3: answer: expected a text or a number, found nothing" in message
    message = fails(tmp_path, "q.jsonl", lines({"prompt": "a", "reply": "x"}), answers="required", what="context.demos")
    assert "no row has the column 'answer', which queries.answer names" in message


def test_answers_are_label_words(tmp_path: Path) -> None:
    labels = {"label_words": ["yes", "no", "3"]}
    text = lines({"prompt": "a", "answer": "yes"}, {"prompt": "b"}, {"prompt": "c", "answer": 3})
    assert len(read(tmp_path, "q.jsonl", text, prompt=labels).rows) == 3
    message = fails(tmp_path, "q.jsonl", lines({"prompt": "a", "answer": "Yes"}), prompt=labels)
    assert "'Yes' is not one of prompt.label_words; did you mean 'yes'?" in message


def test_messages(tmp_path: Path) -> None:
    fine = [{"role": "user", "content": "hi"}]
    chat = {"messages": "chat"}
    assert len(read(tmp_path, "q.jsonl", lines({"chat": fine}), queries=chat).rows) == 1
    columns: list[Any] = [fine, "hi", [], [*fine, {"role": "me", "content": 1}], [3]]
    message = fails(tmp_path, "q.jsonl", lines(*({"chat": c} for c in columns), {"x": 1}), queries=chat)
    assert "5 problems" in message
    assert "q.jsonl:2: chat: expected a list of messages" in message
    assert "q.jsonl:3: chat: expected a list of messages" in message
    assert "message 2: role: expected one of system, user, assistant, tool, found 'me'" in message
    assert "message 2: content: expected a text, found 1" in message
    assert "q.jsonl:6: no column 'chat'" in message
    assert "q.jsonl:5: chat: message 1: expected an object with role and content, found 3" in message


def test_context_of_the_row_itself(tmp_path: Path) -> None:
    own = {"context": {"column": "privileged"}}
    good = lines({"prompt": "a", "privileged": "c"}, {"prompt": "b", "privileged": [{"role": "user", "content": "x"}]})
    assert len(read(tmp_path, "q.jsonl", good, **own).rows) == 2
    message = fails(tmp_path, "q.jsonl", lines({"prompt": "a", "privileged": 3}, {"prompt": "b"}), **own)
    assert "q.jsonl:1: privileged: expected a text, found 3" in message
    assert "q.jsonl:2: no column 'privileged'" in message
    assert len(read(tmp_path, "q.jsonl", lines({"prompt": "a"}), what="context.demos", **own).rows) == 1


def test_values() -> None:
    r = Row("i", {"question": "q", "prompt": "other", "gold": 3, "none": None}, "f:1")
    assert values(r, DataSection(prompt="question", answer="gold")) == {
        "question": "q", "prompt": "q", "gold": "3", "answer": "3",
    }  # fmt: skip
    assert "answer" not in values(r, DataSection())


# -- ids, duplicates, splits ------------------------------------------------------------------------------------------


def test_ids_depend_on_content_alone(tmp_path: Path) -> None:
    a = read(tmp_path, "a.jsonl", lines({"prompt": "x", "n": "ä"}, {"prompt": "y"})).rows
    b = read(tmp_path, "b.jsonl", lines({"prompt": "z"}, {"n": "ä", "prompt": "x"})).rows
    assert a[0].id == b[1].id
    assert len({a[0].id, a[1].id, b[0].id}) == 3
    assert a[1].id == "69331ee3871551b6"  # the same in all versions: run folders name rows by it
    assert len(a[0].id) == 16


def test_query_key() -> None:
    assert query_key("  Call\tMOM\n at６pm ") == query_key("call mom at6pm")
    assert query_key("straße") == query_key("STRASSE")
    assert query_key("a b") != query_key("ab")
    assert query_key(query_key("ﬁﬂ ½ ϓ")) == query_key("ﬁﬂ ½ ϓ")


def test_check_overlap_reports_all_with_origins() -> None:
    groups = {
        "demos": [(row("a", "d:1"), "a"), (row("b", "d:2"), "b")],
        "train queries": [(row("c", "q:1"), "c"), (row("C ", "q:2"), "C "), (row("B", "q:3"), "B")],
        "eval": [(row(t, f"e:{i}"), t) for i, t in enumerate("cbad", 1)],
    }
    with pytest.raises(DataError) as caught:
        check_overlap(groups)
    message = str(caught.value)
    for part in (
        "4 problems",
        "train queries: 1 row with a query that occurred before: q:2 = q:1 ('C ')",
        "demos and train queries overlap in 1 row of train queries: q:3 = d:2 ('B')",
        "demos and eval overlap in 2 rows of eval: e:2 = d:2 ('b'); e:3 = d:1 ('a')",
        "train queries and eval overlap in 2 rows of eval: e:1 = q:1 ('c'); e:2 = q:3 ('b')",
    ):
        assert part in message
    same = row("a")
    with pytest.raises(DataError, match="occurred before"):
        check_overlap({"demos": [(same, "a"), (same, "a")]})


def test_check_overlap_accepts_different_rows() -> None:
    groups = {name: [(row(f"{name} {i}"), f"{name} {i}") for i in range(5)] for name in ("demos", "eval")}
    check_overlap(groups)
    groups["eval"].append(groups["demos"][4])
    with pytest.raises(DataError, match="1 row of eval"):
        check_overlap(groups)


def test_drop_duplicates_keeps_the_first() -> None:
    some = [row("a", "f:1"), row("b", "f:2"), row(" A", "f:3"), row("a", "f:4")]
    kept, dropped = drop_duplicates(some, lambda r: str(r.fields["prompt"]))
    assert ([r.origin for r in kept], dropped) == (["f:1", "f:2"], 2)


def test_split_depends_on_content_and_seed_not_on_position() -> None:
    some = [row(f"q{i}") for i in range(100)]
    kept, held = split(some, 0.15, 0)
    assert len(held) == 15
    assert [r for r in some if r in kept or r in held] == some
    assert not {r.id for r in kept} & {r.id for r in held}
    assert {r.id for r in split(some[::-1], 0.15, 0)[1]} == {r.id for r in held}
    assert {r.id for r in split(some, 0.15, 1)[1]} != {r.id for r in held}
    more = {r.id for r in split([*some, *(row(f"new{i}") for i in range(10))], 0.15, 0)[1]}
    assert len({r.id for r in held} - more) <= 3  # nearly the same when rows are added


@pytest.mark.parametrize(
    ("n", "share", "sizes"),
    [
        (0, 0.5, (0, 0)),
        (1, 0.9, (1, 0)),
        (2, 0.01, (1, 1)),
        (2, 1.0, (1, 1)),
        (10, 0.0, (10, 0)),
        (10, 1.0, (1, 9)),
        (10, 0.25, (8, 2)),
    ],
)
def test_split_leaves_no_side_empty(n: int, share: float, sizes: tuple[int, int]) -> None:
    kept, held = split([row(f"q{i}") for i in range(n)], share, 3)
    assert (len(kept), len(held)) == sizes


def test_split_keeps_equal_rows_together() -> None:
    some = [row(f"q{i % 4}", f"f:{i}") for i in range(40)]
    kept, held = split(some, 0.5, 0)
    assert len(kept) == len(held) == 20
    assert not {r.id for r in kept} & {r.id for r in held}


# -- texts and histories ----------------------------------------------------------------------------------------------


def test_read_text(tmp_path: Path) -> None:
    (tmp_path / "s.txt").write_bytes("\ufeffBe kind.\r\nÄ\n".encode())
    assert read_text("s.txt", recipe(tmp_path), "context.system_file") == "Be kind.\r\nÄ\n"


@pytest.mark.parametrize(
    ("raw", "part"), [(b" \n", "is empty"), (b"ok\nno\xff", "s.txt:2 is not valid UTF-8"), (None, "there is no file")]
)
def test_read_text_errors(tmp_path: Path, raw: bytes | None, part: str) -> None:
    if raw is not None:
        (tmp_path / "s.txt").write_bytes(raw)
    with pytest.raises(DataError) as caught:
        read_text("s.txt", recipe(tmp_path), "context.system_file")
    assert part in str(caught.value)
    assert str(caught.value).startswith("context.system_file: ")


@pytest.mark.parametrize("name", ["h.json", "h.jsonl"])
def test_read_messages(tmp_path: Path, name: str) -> None:
    history = [{"role": "system", "content": ""}, {"role": "user", "content": "a"}]
    history += [{"role": "assistant", "content": "b", "name": "kept"}]
    (tmp_path / name).write_text(json.dumps(history) if name == "h.json" else lines(*history))
    assert read_messages(name, recipe(tmp_path), "context.messages") == history


def test_read_messages_errors(tmp_path: Path) -> None:
    (tmp_path / "h.jsonl").write_text(
        '{"role": "bot", "content": "x"}\n{"role": "user"}\n{"role": "assistant", "tool_calls": "go"}\n{"role": 3'
    )
    with pytest.raises(DataError) as caught:
        read_messages("h.jsonl", recipe(tmp_path), "context.messages")
    for part in (
        "4 problems",
        "h.jsonl:1: role: expected one of system, user, assistant, tool, found 'bot'",
        "h.jsonl:2: content: expected a text, found nothing",
        "h.jsonl:3: tool_calls: expected a list of objects, found 'go'",
        "h.jsonl:4: not valid JSON",
    ):
        assert part in str(caught.value)
    for name, text, part in (("e.json", "[]", "is empty"), ("h.txt", "x", "expected: a .json or .jsonl file")):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=part):
            read_messages(name, recipe(tmp_path), "context.messages")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_skip_passes_over_the_first_rows(tmp_path: Path, suffix: str) -> None:
    texts = [f"q{i}" for i in range(6)]
    text = "prompt\n" + "\n".join(texts) if suffix == ".csv" else "\n".join(json.dumps({"prompt": t}) for t in texts)
    for given, expected, left in (({"skip": 2}, texts[2:], 0), ({"skip": 2, "limit": 3}, texts[2:5], 1)):
        got = read(tmp_path, f"q{suffix}", text + "\n", queries=given)
        assert [row.fields["prompt"] for row in got.rows] == expected and got.left_out == left
    with pytest.raises(DataError, match=r"no row after queries\.skip = 6"):
        read(tmp_path, f"q{suffix}", text + "\n", queries={"skip": 6})


@pytest.mark.parametrize("skip", [0, 7])
def test_rows_of_a_long_file_are_not_in_memory(tmp_path: Path, skip: int) -> None:
    text = lines(*({"prompt": f"query {i}", "answer": f"{i}"} for i in range(4000)))
    read(tmp_path, "few.jsonl", lines({"prompt": "what is imported at first"}))
    tracemalloc.start()
    try:
        got = read(tmp_path, "q.jsonl", text, queries={"skip": skip})
        assert sum(1 for _ in got.rows) == 4000 - skip
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept - len(text) < 4000 * 40, (
        f"{kept / 4000:.0f} bytes a row"
    )  # as a list of dicts it is 550; the buffer holds the text


def test_a_list_of_texts_is_one_text_a_line_in_a_pattern(tmp_path: Path) -> None:
    row = {"prompt": "f", "tests": ["a", "b"], "numbers": [1]}
    got = read(tmp_path, "q.jsonl", json.dumps(row) + "\n", prompt={"pattern": "{prompt}: {tests}"})
    section = recipe(tmp_path).queries
    assert "{prompt}: {tests}".format_map(values(got.rows[0], section)) == "f: a\nb"
    with pytest.raises(DataError, match="numbers: expected a text or a number"):
        read(tmp_path, "q.jsonl", json.dumps(row) + "\n", prompt={"pattern": "{prompt}: {numbers}"})
