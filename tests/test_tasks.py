"""Tasks: prompts and words, published counts, and the paper's own facts about the rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ctxdistill.draws import held_out, without
from ctxdistill.errors import DataError
from ctxdistill.recipe import fields_of
from ctxdistill.rows import Row
from ctxdistill.tasks import TASKS, Source, Task, load, qqp, sms_spam
from ctxdistill.tasks.source import Hub, Local, labelled

SHARED = Path(__file__).parents[2] / "shared"
DATA = SHARED / "data"
INDICES = SHARED / "paper" / "run_indices.json"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the folder with public data sets is not there")
needs_indices = pytest.mark.skipif(not INDICES.is_file(), reason="the indices of the paper's runs are not there")


def row(label: str, **texts: str) -> Row:
    return Row("0", {**texts, "label": label, "index": 0}, "f:1")


def sources(task: Task) -> Iterator[tuple[str, Source]]:
    yield "train", task.train
    yield "evaluation", task.evaluation
    yield from task.ood.items()


# -- prompts ----------------------------------------------------------------------------------------------------------

PAIR = {"text1": "A.", "text2": "B?"}
HARNESS = "Question 1: A.\nQuestion 2: B?\nQuestion: Do both questions ask the same thing? Answer:"
PROMPTS = [
    ("mnli", "paper", "", "Premise: A.\nHypothesis: B?\nLabel:", "yes no"),
    ("mnli", "paper-compat", "", "Premise: A.\nHypothesis: B?\nLabel:", "yes no"),
    ("mnli", "paper", "hans", "Premise: A.\nHypothesis: B?\nLabel:", "yes no"),
    ("mnli", "minimal", "", "A. B? ?", "Yes No"),
    ("mnli", "gpt-3", "", "A. question: B? Yes or No? answer:", "Yes No"),
    ("mnli", "eval-harness", "", "A. \nQuestion: B? True or False?\nAnswer:", "True False"),
    ("rte", "paper", "", "Sentence1: A.\nSentence2: B?\nLabel:", "yes no"),
    ("rte", "paper", "hans", "Premise: A.\nHypothesis: B?\nLabel:", "yes no"),
    ("rte", "paper-compat", "hans_constituent", "Premise: A.\nHypothesis: B?\nLabel:", "yes no"),
    ("rte", "minimal", "hans", "A. B? ?", "Yes No"),
    ("qqp", "paper", "", "Question1: A.\nQuestion2: B?\nLabel:", "no yes"),
    ("qqp", "paper-compat", "paws_qqp", "Question1: A.\nQuestion2: B?\nLabel:", "yes no"),
    ("qqp", "minimal", "", "A. B? ?", "No Yes"),
    ("qqp", "eval-harness", "", HARNESS, "No Yes"),
    ("mrpc", "paper", "", "Sentence1: A.\nSentence2: B?\nLabel:", "no yes"),
    ("mrpc", "paper", "paws_qqp", "Question1: A.\nQuestion2: B?\nLabel:", "no yes"),
    ("cola", "default", "", "Sentence: T.\nAcceptable:", "no yes"),
    ("cola", "minimal", "cola_ood", "T. ?", "No Yes"),
    ("cola", "gpt-3", "", "grammatical: T. Yes or No? answer:", "No Yes"),
    ("sst2", "default", "cr", "Review: T.\nSentiment:", "negative positive"),
    ("trec", "default", "", "Question: T.\nAnswer type:", "abbreviation entity description person location number"),
    ("sms_spam", "default", "", "Message: T.\nType:", "normal spam"),
]


@pytest.mark.parametrize(("name", "pattern", "on", "expected", "words"), PROMPTS)
def test_prompts_to_the_character(name: str, pattern: str, on: str, expected: str, words: str) -> None:
    task = TASKS[name]
    one = task.patterns[pattern]
    example = row(task.labels[0], **({"text": "T."} if "T." in expected else PAIR))
    assert one.query(example, on) == expected
    assert " ".join(one.words.values()) == words
    assert one.demonstration(example) == f"{one.query(example)} {words.split()[0]}"
    assert one.section(on).pattern.format(**example.fields) == expected


@pytest.mark.parametrize(("name", "what"), [
    ("mnli", "examples of entailment"), ("rte", "examples of entailment"),
    ("qqp", "duplicates or paraphrases of each other"), ("mrpc", "duplicates or paraphrases of each other"),
])  # fmt: skip
def test_instructions_of_the_paper(name: str, what: str) -> None:
    section = TASKS[name].patterns["paper"].section()
    assert section.student_instruction == f"Are the following sentences {what}, yes or no?"
    assert section.instruction == f"Think logically. {section.student_instruction}"
    assert (section.separator, section.style) == ("\n\n", "text")
    assert TASKS[name].patterns["minimal"].instruction == ""


def test_the_paper_s_whole_teacher_prompt() -> None:
    """Instruction, demonstrations and query, as the paper's code writes them for two demonstrations."""
    one = TASKS["mnli"].patterns["paper"]
    demos = [row("contradiction", text1="It rains.", text2="It is dry."), row("entailment", text1="x", text2="y")]
    query = row("entailment", **PAIR)
    teacher = one.separator.join([one.instruction, *map(one.demonstration, demos), one.query(query)])
    assert teacher == (
        "Think logically. Are the following sentences examples of entailment, yes or no?\n\n"
        "Premise: It rains.\nHypothesis: It is dry.\nLabel: no\n\n"
        "Premise: x\nHypothesis: y\nLabel: yes\n\n"
        "Premise: A.\nHypothesis: B?\nLabel:"
    )


def test_cola_minimal_is_separated_by_a_space() -> None:
    assert {name: p.separator for name, p in TASKS["cola"].patterns.items() if p.separator != "\n\n"} == {
        "minimal": " "
    }


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_tasks_are_whole(task: Task) -> None:
    assert task.name in TASKS and task.default_pattern in task.patterns
    pair = len(task.train.local.columns) == 2
    sets = {**dict(sources(task)), **task.extra_ood}
    for pattern in task.patterns.values():
        assert len(set(pattern.words.values())) == len(task.labels) == len(set(task.labels))
        assert set(pattern.ood) <= set(sets)
        for text in (pattern.pattern, *pattern.ood.values()):
            assert fields_of(text) == ({"text1", "text2"} if pair else {"text"})
            assert text == text.rstrip()
    for source in sets.values():
        assert source.labels == task.labels
        for place in (source.local, source.hub):
            assert place is None or len(place.columns) == (2 if pair else 1)


def test_words_of_many_labels() -> None:
    assert TASKS["clinc150"].patterns["default"].words["pto_request_status"] == "pto request status"
    assert TASKS["banking77"].patterns["default"].words["Refund_not_showing_up"] == "Refund not showing up"
    assert (len(TASKS["clinc150"].labels), len(TASKS["banking77"].labels)) == (150, 77)


# -- rows -------------------------------------------------------------------------------------------------------------

SPLITS = {
    "mnli train": (3061, 2958), "mnli evaluation": (3479, 3213), "mnli hans": (5000, 5000),
    "rte train": (1249, 1241), "rte evaluation": (146, 131), "rte hans": (5000, 5000),
    "qqp train": (611, 389), "qqp evaluation": (623, 377), "qqp paws_qqp": (486, 191),
    "mrpc train": (1194, 2474), "mrpc evaluation": (129, 279), "mrpc paws_qqp": (486, 191),
    "cola train": (2528, 6023), "cola evaluation": (162, 365), "cola cola_ood": (162, 354),
    "sst2 train": (3310, 3610), "sst2 evaluation": (912, 909), "sst2 cr": (1368, 2407),
    "trec train": (86, 1250, 1162, 1223, 835, 896), "trec evaluation": (9, 94, 138, 65, 81, 113),
    "sms_spam train": (3884, 587), "sms_spam evaluation": (943, 160),
    "clinc150 train": (50,) * 150, "clinc150 evaluation": (30,) * 150, "banking77 evaluation": (40,) * 77,
}  # fmt: skip


@needs_data
@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_counts(task: Task) -> None:
    for name, source in sources(task):
        rows = load(source, DATA)
        found = Counter(r.fields["label"] for r in rows)
        if f"{task.name} {name}" in SPLITS:
            assert tuple(found[label] for label in task.labels) == SPLITS[f"{task.name} {name}"]
        else:
            assert (task.name, name, len(rows), set(found)) == ("banking77", "train", 10_003, set(task.labels))
        texts = {"text1", "text2"} if len(source.local.columns) == 2 else {"text"}
        assert set(rows[0].fields) == {*texts, "label", "index"}
        assert len({r.id for r in rows}) == len({r.fields["index"] for r in rows}) == len(rows)


@needs_data
@needs_indices
def test_mnli_validation_rows_are_the_paper_s() -> None:
    rows = load(TASKS["mnli"].evaluation, DATA)
    first = held_out(rows, limit=100, seed=0, mode="paper-first")
    runs = {key: run["validation_indices"] for key, run in json.loads(INDICES.read_text()).items() if "mnli" in key}
    assert len(runs) == 12 and all(found == [r.fields["index"] for r in first] for found in runs.values())
    assert Counter(r.fields["label"] for r in first)["entailment"] == 59  # always "yes" is right in .59


@needs_data
def test_always_yes_on_hans() -> None:
    rows = load(TASKS["mnli"].ood["hans"], DATA)
    words = TASKS["mnli"].patterns["paper-compat"].words
    samples = [held_out(rows, limit=100, seed=seed, mode="paper-shuffled") for seed in range(4)]
    assert [sum(words[r.fields["label"]] == "yes" for r in sample) for sample in samples] == [47, 54, 49, 57]


@needs_data
def test_always_yes_on_paws_under_the_paper_s_labels() -> None:
    rows = load(TASKS["qqp"].ood["paws_qqp"], DATA)
    answers = [TASKS["qqp"].patterns["paper-compat"].words[r.fields["label"]] for r in rows]
    assert (answers[:100].count("yes"), answers.count("yes"), len(rows)) == (74, 486, 677)


@needs_indices
def test_qqp_subsample_is_the_paper_s() -> None:
    runs = {key: run for key, run in json.loads(INDICES.read_text()).items() if "qqp" in key}
    train, validation = set(qqp.subsample(363_846)), qqp.subsample(40_430, before=[363_846])
    assert len(runs) == 12 and len(train) == len(set(validation)) == 1000
    for run in runs.values():
        assert run["validation_indices"] == validation[:100]
        assert {*run["context_indices"], *run["query_indices"]} <= train
    for source, size in ((TASKS["qqp"].train, 363_846), (TASKS["qqp"].evaluation, 40_430)):
        assert source.hub is not None and not isinstance(source.hub.counts, int) and source.hub.choose is not None
        assert sum(source.hub.counts.values()) == size
    rows = [row("duplicate", text1=str(i), text2="") for i in range(40_430)]
    chosen = TASKS["qqp"].evaluation.hub.choose(rows)  # type: ignore[union-attr, misc]
    assert [int(r.fields["text1"]) for r in chosen] == validation


@needs_data
def test_sms_sides_share_no_message() -> None:
    train, evaluation = load(TASKS["sms_spam"].train, DATA), load(TASKS["sms_spam"].evaluation, DATA)
    assert without(evaluation, train)[1] == without(evaluation, [])[1]  # copies are on the same side
    assert not any(sms_spam.held_out(r) for r in train) and all(map(sms_spam.held_out, evaluation))
    assert not any(r.fields["text"].endswith("\t") for r in train)
    assert train[0].fields["text"].startswith("Go until jurong point, crazy..")


def test_sms_with_and_without_a_spreadsheet_s_columns(tmp_path: Path) -> None:
    path = tmp_path / "SMSSpamCollection"
    path.write_text('ham\t"Oh, ""you"" are"\t\t\t0\nspam\t"Win" now\r\nham\tWell\t\t\t\n')
    problems: list[str] = []
    records, total = TASKS["sms_spam"].train.local.read(path, 0, problems)  # type: ignore[misc]
    assert [(f["label"], f["text"]) for _, f in records] == [
        ("ham", 'Oh, "you" are'), ("spam", '"Win" now'), ("ham", "Well"),
    ]  # fmt: skip
    assert (total, problems) == (3, [])


# -- what is not as it should be --------------------------------------------------------------------------------------


def source(**local: Any) -> Source:
    return Source(
        name="toy",
        labels=("bad", "good"),
        local=Local(**{
            "file": "toy.txt", "read": labelled("latin-1"), "labels": {"0": "bad", "1": "good"},
            "counts": {"bad": 1, "good": 2, "odd": 1}, **local,
        }),
        hub=None,
    )  # fmt: skip


TOY = "0 a b\n1 c\n7 left out\n1:fine \xe9\n".encode("latin-1").replace(b"7 ", b"odd ")


def test_load_keeps_order_and_index(tmp_path: Path) -> None:
    (tmp_path / "toy.txt").write_bytes(TOY)
    rows = load(source(), tmp_path)
    assert [(r.fields["text"], r.fields["label"], r.fields["index"], r.origin) for r in rows] == [
        ("a b", "bad", 0, "toy.txt:1"), ("c", "good", 1, "toy.txt:2"), ("é", "good", 3, "toy.txt:4"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"bad": 2, "good": 1, "odd": 1}, "4 rows: 2 bad, 1 good, 1 odd"),
        (5, "5 rows"),
        ({"bad": 1, "good": 2}, "3 rows"),
    ],
)
def test_a_broken_count_is_refused(tmp_path: Path, counts: Any, expected: str) -> None:
    (tmp_path / "toy.txt").write_bytes(TOY)
    with pytest.raises(DataError, match="not hold what was published") as caught:
        load(source(counts=counts), tmp_path)
    assert caught.value.expected.startswith(expected) and caught.value.found == "4 rows: 1 bad, 2 good, 1 odd"
    assert len(load(source(counts=4), tmp_path)) == 3


def test_what_else_can_be_wrong(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)toy: there is no file .*toy\.txt.*mend tasks\.root"):
        load(source(), tmp_path)
    with pytest.raises(DataError, match=r"(?s)toy is not on the hub.*tasks\.root, a folder with toy\.txt"):
        load(source(), None)
    (tmp_path / "toy.txt").write_bytes(TOY)
    with pytest.raises(DataError, match=r"(?s)not valid UTF-8.*get the file again"):
        load(source(read=labelled()), tmp_path)
    (tmp_path / "toy.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=r"(?s)toy\.jsonl:1 has no 'label'.*the columns text, label"):
        load(source(file="toy.jsonl", read=None), tmp_path)
    (tmp_path / "clinc150").mkdir()
    (tmp_path / "clinc150" / "data_small.json").write_text('{"test": []}')
    with pytest.raises(DataError, match=r"expected an object with 'train'"):
        load(TASKS["clinc150"].train, tmp_path)


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    asked: list[Any] = []
    names = ["entailment", "non-entailment"]

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        columns = {"premise": "abc", "hypothesis": ["x\n", "y ", "z"], "label": [0, 1, 1], "heuristic": ["h", "i", "h"]}
        made = Features(
            {name: Value("string") for name in columns} | {"label": ClassLabel(names=names), "idx": Value("int32")}
        )
        return Dataset.from_dict({**{k: list(v) for k, v in columns.items()}, "idx": [7, 8, 9]}, features=made)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    place = {"path": "o/n", "columns": ("premise", "hypothesis"), "labels": {"non-entailment": "no"}}
    labels, local = ("entailment", "no"), Local(file="f", counts=0)
    plain = Hub(**place, config="c", split="test", index="idx", counts={"entailment": 1, "no": 2})
    rows = load(Source("toy", labels, local, plain), None)
    assert [(r.fields["text2"], r.fields["label"], r.fields["index"]) for r in rows] == [
        ("x", "entailment", 7), ("y ", "no", 8), ("z", "no", 9),
    ]  # fmt: skip
    script = Hub(
        **place, split="test", parquet="p/*.parquet", only={"heuristic": "h"}, counts={"entailment": 1, "no": 1}
    )
    rows = load(Source("toy", labels, local, script), None)
    assert [r.fields["index"] for r in rows] == [0, 2]
    assert asked == [
        (("o/n", "c"), {"split": "test"}),
        (("o/n", None), {"split": "test", "revision": "refs/convert/parquet", "data_files": {"test": "p/*.parquet"}}),
    ]
