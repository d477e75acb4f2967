"""A TOML file and overrides become one recipe, or one message with everything that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from ctxdistill import recipe as module
from ctxdistill.errors import CtxDistillError, RecipeError, several
from ctxdistill.recipe import Recipe, fields_of, section_of

MINIMAL = """
[model]
name = "m"
[context]
system = "Be kind."
[queries]
data = "q.jsonl"
"""


def load(folder: Path, text: str = MINIMAL, *overrides: str) -> Recipe:
    path = folder / "job.toml"
    path.write_text(text, encoding="utf-8")
    return Recipe.load(path, overrides)


def fails(folder: Path, text: str = MINIMAL, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load(folder, text, *overrides)
    return str(caught.value)


def is_section(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


SECTIONS = [c for c in vars(module).values() if is_section(c) and issubclass(c, module.Section)]


def test_minimal_recipe(tmp_path: Path) -> None:
    r = load(tmp_path)
    assert (r.name, r.model.name, r.context.system, r.queries.data) == ("job", "m", "Be kind.", "q.jsonl")
    assert r.path("sub/x.txt") == (tmp_path / "sub/x.txt").resolve()
    assert r.path("/else/x.txt") == Path("/else/x.txt").resolve()


def test_recipe_is_frozen(tmp_path: Path) -> None:
    r = load(tmp_path)
    with pytest.raises(ValidationError):
        r.train.lr = 1.0  # type: ignore[misc]


def test_every_key_has_a_docstring() -> None:
    missing = [
        f"{cls.__name__}.{name}"
        for cls in SECTIONS
        for name, field in cls.model_fields.items()
        if not field.description and not is_section(field.annotation)
    ]
    assert missing == ["Recipe.base_dir"]  # not a key of the file
    assert all(cls.__doc__ for cls in SECTIONS if cls is not module.Section)
    assert len(SECTIONS) >= 13


@pytest.mark.parametrize(
    ("override", "key", "near"),
    [
        ("train.lerning_rate=1", "train.lerning_rate", "warmup"),
        ("train.epoch=1", "train.epoch", "epochs"),
        ("trian.epochs=1", "trian", "train"),
        ("eval.splits='x'", "eval.splits", "split"),
        ("context.demo='x'", "context.demo", "demos"),
        ("prompt.labelwords=['a','b']", "prompt.labelwords", "label_words"),
    ],
)
def test_unknown_key_suggests_the_nearest(tmp_path: Path, override: str, key: str, near: str) -> None:
    message = fails(tmp_path, MINIMAL, override)
    assert f"{key}: unknown key" in message
    assert near in message


def test_unknown_key_far_from_all_lists_them(tmp_path: Path) -> None:
    assert "known: alpha, dropout, method, rank, targets, tokens" in fails(tmp_path, MINIMAL, "lora.zzz=1")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.lr='fast'", ["train.lr", "number", '"fast"']),
        ("train.epochs=0", ["train.epochs", "greater than or equal to 1", "found 0"]),
        ("train.epochs=1.5", ["train.epochs", "found 1.5"]),
        ("train.warmup=2", ["train.warmup", "less than or equal to 1"]),
        ("eval.share=1", ["eval.share", "less than 1"]),
        ("train.validation=1.0", ["train.validation", "less than 1"]),
        ("train.loss='mse'", ["train.loss", "'forward_kl', 'reverse_kl' or 'jsd'", '"mse"']),
        ("context.documents='a.txt'", ["context.documents", "list", '"a.txt"']),
        ("model='m'", ["model", '"m"']),
        ("queries.limit=-1", ["queries.limit", "found -1"]),
        ("eval.bootstrap=5", ["eval.bootstrap", "100"]),
    ],
)
def test_wrong_values_say_key_expected_and_found(tmp_path: Path, override: str, parts: list[str]) -> None:
    message = fails(tmp_path, MINIMAL, override)
    assert all(part in message for part in parts), message
    assert "1 problem" in message


def test_wrong_values_come_with_what_the_key_is(tmp_path: Path) -> None:
    for override, about in (
        ("train.lr='fast'", "Peak learning rate of AdamW"),
        ("train.epochs=0", "Passes over the training queries."),
        ("prompt.label_words=[1, 2]", "Label tasks: all possible answers."),
        ("lora.targets=7", "Modules to adapt: all linear layers"),
    ):
        message = fails(tmp_path, MINIMAL, override)
        assert about in message and "docs/" not in message, message
    assert "ctxdistill init" in message


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_a_recipe_in_utf_16(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "job.toml"
    path.write_bytes(MINIMAL.encode(encoding))
    with pytest.raises(RecipeError, match="looks like UTF-16") as caught:
        Recipe.load(path)
    assert str(path) in caught.value.message and caught.value.fix == "save it as UTF-8"
    path.write_bytes(MINIMAL.replace("Be", "B\xe9").encode("latin-1"))
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path)
    assert caught.value.fix == "save it as UTF-8"


def test_all_problems_at_once(tmp_path: Path) -> None:
    text = '[model]\ndtype = "int8"\n[queries]\ndata = "q"\nprmpt = "x"\n[train]\nlr = "fast"\nepochs = 0\n'
    message = fails(tmp_path, text)
    assert "5 problems" in message
    for key in ("model.name: missing", "model.dtype", "queries.prmpt: unknown key", "train.lr", "train.epochs"):
        assert key in message


# -- overrides --------------------------------------------------------------------------------------------------------


def test_overrides_have_toml_types_and_strings_need_no_quotes(tmp_path: Path) -> None:
    r = load(
        tmp_path, MINIMAL,
        "train.lr=1e-4", "train.epochs=7", "model.trust_remote_code=true", "context.documents=['a.txt', 'b.txt']",
        "model.name=owner/some-model", "train.loss=jsd", "context.system=You are: kind = good", 'name="quoted"',
        "prompt.template_kwargs.enable_thinking=false", "eval.format=",
    )  # fmt: skip
    assert (r.train.lr, r.train.epochs, r.model.trust_remote_code) == (1e-4, 7, True)
    assert (r.context.documents, r.model.name, r.train.loss) == (["a.txt", "b.txt"], "owner/some-model", "jsd")
    assert (r.context.system, r.name) == ("You are: kind = good", "quoted")
    assert r.prompt.template_kwargs == {"enable_thinking": False}
    assert r.eval.format == ""


def test_override_wins_over_the_file_and_the_last_over_the_first(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL + "[train]\nepochs = 2\n", "train.epochs=3", "train.epochs=5").train.epochs == 5


@pytest.mark.parametrize("override", ["train.lr", "=3", "train lr=3", "--lr=3", ".lr=1", "train.=1", "train..lr=1"])
def test_malformed_override(tmp_path: Path, override: str) -> None:
    message = fails(tmp_path, MINIMAL, override)
    assert "override" in message or "unknown key" in message


def test_override_through_a_value(tmp_path: Path) -> None:
    assert "name is a value, not a section" in fails(tmp_path, MINIMAL, "model.name.x=3")


# -- files ------------------------------------------------------------------------------------------------------------


def test_missing_recipe_and_folder(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no recipe at") as caught:
        Recipe.load(tmp_path / "none.toml")
    assert "ctxdistill init" in caught.value.fix
    with pytest.raises(RecipeError, match="is a folder"):
        Recipe.load(tmp_path)


def test_not_toml_and_not_utf8(tmp_path: Path) -> None:
    assert "not valid TOML" in fails(tmp_path, "[model]\nname = m\n")
    path = tmp_path / "job.toml"
    path.write_bytes(b'[model]\nname = "\xff"\n')
    with pytest.raises(RecipeError, match="cannot read"):
        Recipe.load(path)


def test_toml_types_stay(tmp_path: Path) -> None:
    # What YAML would turn into booleans and text: label words and small numbers.
    more = '[prompt]\nlabel_words = ["yes", "no", "1e-4"]\n[train]\nlr = 1e-4\n'
    r = load(tmp_path, MINIMAL + more)
    assert r.prompt.label_words == ["yes", "no", "1e-4"]
    assert r.train.lr == 1e-4
    assert "prompt.label_words" in fails(tmp_path, MINIMAL + "[prompt]\nlabel_words = [true, false]\n")
    assert "model.name" in fails(tmp_path, MINIMAL.replace('"m"', "2024-01-01"))


def test_to_dict_is_json_and_makes_the_same_recipe(tmp_path: Path) -> None:
    r = load(tmp_path, MINIMAL, "lora.targets=['q_proj']", "train.lr=3e-4")
    plain = json.loads(json.dumps(r.to_dict()))
    assert "base_dir" not in plain
    assert Recipe.from_dict(plain, base_dir=tmp_path).to_dict() == r.to_dict()
    with pytest.raises(RecipeError, match="base_dir: not a key"):
        Recipe.from_dict({**plain, "base_dir": "."})


# -- contradictions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["context.system="], "there is no context"),
        (["context.system_file=s.txt"], "system and system_file are both given"),
        (["context.teacher_prompt=p"], "teacher_prompt excludes the other kinds, found system, teacher_prompt"),
        (["context.student_demos=2"], "student_demos needs context.demos"),
        (["prompt.style=text", "prompt.instruction=x"], "has no roles"),
        (["completions.source=label"], "needs prompt.label_words"),
        (["completions.samples=4"], "needs completions.temperature above 0"),
        (["prompt.label_words=['a']"], "two or more different words"),
        (["prompt.label_words=['a', 'a', 'b']"], "two or more different words"),
        (["prompt.pattern={prompt} {answer}"], "{answer}: the model would be told the answer"),
        (["prompt.pattern={prompt} {answer}", "queries.answer=label"], "{answer}: the model would be told the answer"),
        (["prompt.pattern={prompt} {label}", "queries.answer=label"], "{label}: the model would be told the answer"),
        (["prompt.pattern={prompt} {gold}", "eval.data=e", "eval.answer=gold"], "{gold}: the model would be told"),
        (["queries.prompt=text", "queries.answer=text"], "queries.prompt and queries.answer are both 'text'"),
        (["eval.data=e.jsonl", "eval.prompt=answer"], "eval.prompt and eval.answer are both 'answer'"),
        (["prompt.pattern={a"], "prompt.pattern: "),
        (["prompt.pattern={a.b}"], "not a plain column name"),
        (["prompt.answer_pattern=answer"], "must have {answer} as its one field"),
        (["eval.limit=20", "eval.answer=label"], "eval.limit, eval.answer: no effect without eval.data"),
        (["eval.split=test"], "eval.split: no effect without eval.data"),
        (["eval.format=("], "not a regular expression"),
        (["eval.metrics=['exact_mach']"], "unknown metric 'exact_mach'; did you mean 'exact_match'?"),
        (["eval.metrics=['a b:c']"], "unknown metric 'a b:c'"),
    ],
)
def test_contradictions(tmp_path: Path, overrides: list[str], part: str) -> None:
    assert part in fails(tmp_path, MINIMAL, *overrides)


def test_contradictions_are_reported_together(tmp_path: Path) -> None:
    message = fails(tmp_path, MINIMAL, "completions.samples=4", "completions.source=label", "eval.format=(")
    for part in ("completions.samples above 1", 'completions.source = "label"', "eval.format"):
        assert part in message


def test_queries_need_data(tmp_path: Path) -> None:
    assert "queries.data: missing" in fails(tmp_path, '[model]\nname = "m"\n[context]\nsystem = "s"\n[queries]\n')


@pytest.mark.parametrize(
    "overrides",
    [
        ["prompt.style=text", "prompt.instruction=x", "context.system="],
        ["eval.metrics=['exact_match', 'my.module:score']"],
        ["completions.samples=4", "completions.temperature=0.7"],
        ["completions.source=label", "prompt.label_words=['a', 'b']"],
        ["prompt.pattern={premise} {{x}} {hypothesis}"],
        ["queries.messages=turns", "queries.answer=prompt"],
        ["eval.limit=20", "eval.split=test", "eval.data=hub:a/b"],
        ["eval.share=0.5", "eval.group=sort", "eval.max_new_tokens=8"],
    ],
)
def test_these_are_no_contradictions(tmp_path: Path, overrides: list[str]) -> None:
    text = MINIMAL.replace('system = "Be kind."\n', "") if "context.system=" in overrides else MINIMAL
    overrides = [o for o in overrides if o != "context.system="]
    assert load(tmp_path, text, *overrides).model.name == "m"


def test_fields_of() -> None:
    assert fields_of("{a} {{b}} {c}{a}") == {"a", "c"}
    assert fields_of("none") == set()
    for pattern in ("{", "}", "{}", "{0.x}", "{a!r}", "{a:>3}", "{a[0]}"):
        with pytest.raises(ValueError):
            fields_of(pattern)


def test_section_of() -> None:
    assert section_of([]) is Recipe
    assert section_of(["train"]) is module.TrainSection
    assert section_of(["nothing"]) is Recipe


# -- errors -----------------------------------------------------------------------------------------------------------


def test_error_has_its_parts() -> None:
    error = CtxDistillError("wrong", expected="a", found="b", fix="c")
    assert str(error) == "wrong\n  expected: a\n  found: b\n  fix: c"
    assert str(CtxDistillError("wrong", fix="c")) == "wrong\n  fix: c"


def test_several_counts_and_cuts() -> None:
    assert str(several(RecipeError, "x", ["a"])) == "x: 1 problem\n  - a"
    error = several(RecipeError, "x", [str(i) for i in range(25)], fix="mend")
    assert isinstance(error, RecipeError)
    assert "25 problems" in str(error)
    assert "  - 19\n  - ... and 5 more\n  fix: mend" in str(error)
