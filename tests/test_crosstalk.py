"""Several contexts in one adapter, and adapters that are summed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

import tiny
from ctxdistill import adapters, cli, display, pipeline
from ctxdistill.behaviour import Check
from ctxdistill.compose import compose, distinct, load
from ctxdistill.crosstalk import groups_of, matrix
from ctxdistill.dataset import prepare
from ctxdistill.errors import DataError, FitError, ModelError, RecipeError, RunError
from ctxdistill.lm import LM
from ctxdistill.prompts import join
from ctxdistill.recipe import LoraSection, Recipe
from ctxdistill.results import verdict
from ctxdistill.rundir import RunDir
from ctxdistill.store import TargetStore

CONTEXTS = {
    "shout": "Shout every word that you are given, as loud as you can.",
    "spell": "q w e r t y u i o p 1 2 3 4 5 6 7 8 9",
}
WORDS = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay"]


def several(job: Path, *, tags: bool = True, **overrides: Any) -> Recipe:
    """Two contexts in one recipe, with a tag in the query or without."""
    overrides = {"train__epochs": 1, "eval__latency_rows": 0, "behaviour__contexts": "tag", **overrides}
    raw = tiny.recipe_dict(job, context={"column": "ctx"}, **overrides)
    if tags:
        raw["prompt"] = {"pattern": "{tag}: {prompt}"}
    rows = [{"prompt": f"say {w}", "tag": tag, "ctx": text} for w in WORDS for tag, text in CONTEXTS.items()]
    tiny.write_jsonl(job / "queries.jsonl", rows[:12])
    tiny.write_jsonl(job / "eval.jsonl", rows[12:])
    return Recipe.from_dict(raw, base_dir=job)


def test_the_matrix_equals_the_slow_way(job: Path) -> None:
    recipe = several(job)
    lm, prompter, data = prepare(recipe)
    lm.add_adapter(LoraSection(rank=4), 0)
    tiny.disturb(lm)
    lm.training(False)
    check = Check(recipe, lm, prompter, TargetStore(job / "t"))
    groups = groups_of(recipe, prompter, data)
    found = matrix(dict.fromkeys(groups, check), groups)
    assert found["names"] == ["shout", "spell"]
    nearest = dict.fromkeys(CONTEXTS, 0)
    for i in CONTEXTS:
        words = [row.fields["prompt"] for row in data.splits["eval"][0] if row.fields["tag"] == i]
        assert len(words) == 4
        sums = {}
        for j, text in CONTEXTS.items():
            rows = []
            for word in words:
                query = f"<|user|>{i}: {word}</s><|assistant|>"
                teacher, student = (
                    lm.tokenizer(f"<s><|system|>{system}</s>{query}", add_special_tokens=False)["input_ids"]
                    for system in (text, "be kind")
                )
                with lm.adapter(False):
                    ids = lm.generate([teacher], max_new_tokens=6, ends=prompter.ends)[0]
                logs = []
                for prompt, on in ((teacher, False), (student, True)):
                    whole, n = join(prompt, ids)
                    with torch.no_grad(), lm.adapter(on):
                        logs.append(lm.model(input_ids=torch.tensor([whole])).logits[0, -n - 1 : -1].log_softmax(-1))
                rows.append((logs[0].exp() * (logs[0] - logs[1])).sum(-1))
            sums[j] = rows
            assert found["kl"][i][j]["mean"] == pytest.approx(torch.cat(rows).mean().item(), rel=1e-3)
        for a, b in zip(*(sums[j] for j in (i, *(CONTEXTS.keys() - {i}))), strict=True):
            nearest[i] += a.mean().item() < b.mean().item()
        assert found["nearest"][i]["mean"] == pytest.approx(nearest[i] / 4)


def test_contexts_that_are_mixed_up_are_not_called_good(job: Path) -> None:
    """Without a tag the student cannot know which context is meant."""
    run = pipeline.distill(several(job, tags=False, train__epochs=6), job / "run")
    found = run.evaluation["crosstalk"]
    assert not found["good"] and "nearest to its own teacher" in " ".join(found["reasons"])
    judged = verdict(run.evaluation)
    assert judged["level"] not in ("faithful", "close")
    assert any("not all learnt and kept apart" in remark for remark in judged["remarks"])
    page, text = ((job / "run" / name).read_text() for name in ("report.html", "report.md"))
    assert "Cross-talk between contexts" in page and "teacher of shout" in text
    faithful = {**run.evaluation, "kl_closed": {"mean": 0.99, "low": 0.98, "high": 1.0}, "comparisons": []}
    assert verdict(faithful)["level"] == "partial"
    assert verdict({**faithful, "crosstalk": {**found, "good": True, "reasons": []}})["level"] == "faithful"


def test_what_is_printed_has_rows_of_one_context_and_teachers_or_adapters_across(
    capsys: pytest.CaptureFixture[str],
) -> None:
    numbers = {"a": {"a": 0.1, "b": 0.2}, "b": {"a": 0.3, "b": 0.4}}
    means = {i: {j: {"mean": value} for j, value in row.items()} for i, row in numbers.items()}
    own = {i: {"mean": 0.5} for i in numbers}
    found = {"names": ["a", "b"], "kl": means, "alone": means, "nearest": own, "closed": own, "good": True, "rank": 8}
    found["weights"] = {"a": 1.0, "b": 0.25}
    display.composed(display.console(), Path("x"), found)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for row in (["a", "0.100", "0.200", "50.0", "50.0"], ["b", "0.300", "0.400", "50.0", "50.0"],
                ["a", "10.0", "20.0"], ["b", "30.0", "40.0"]):  # fmt: skip
        assert row in lines
    assert " ".join(lines[-1]) == "the sum: 1 times a + 0.25 times b"


def test_names_must_name_the_contexts(job: Path) -> None:
    recipe = several(job)
    rows = tiny.read_jsonl(job / "eval.jsonl")
    lm, prompter, data = prepare(recipe)
    assert lm and set(groups_of(recipe, prompter, data)) == set(CONTEXTS)
    for change, said in (({"tag": "spell"}, "does not name"), ({"tag": ""}, "does not name")):
        tiny.write_jsonl(job / "eval.jsonl", [{**rows[0], **change}, *rows[1:]])
        changed = several(job, tags=False)
        tiny.write_jsonl(job / "eval.jsonl", [{**rows[0], **change}, *rows[1:]])
        _, prompter, data = prepare(changed, lm)
        with pytest.raises(DataError, match=said):
            groups_of(changed, prompter, data)
    several(job)
    tiny.write_jsonl(job / "eval.jsonl", [row for row in rows if row["tag"] == "spell"])
    _, prompter, data = prepare(recipe, lm)
    with pytest.raises(DataError, match="1 contexts"):
        groups_of(recipe, prompter, data)
    with pytest.raises(RecipeError, match=r"behaviour.contexts needs context.column"):
        Recipe.from_dict(tiny.recipe_dict(job, behaviour={"contexts": "tag"}), base_dir=job)


# -- sums of adapters -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> list[Path]:
    made = []
    for name, system in CONTEXTS.items():
        job = tmp_path_factory.mktemp(name)
        (job / "model").symlink_to(llama)
        raw = tiny.recipe_dict(job, context={"system": system}, eval__latency_rows=0, behaviour={"unrelated": 0})
        pipeline.distill(Recipe.from_dict(raw, base_dir=job), job / name)
        made.append(job / name)
    return made


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's own
def test_the_sum_is_the_sum_of_the_updates(runs: list[Path], tmp_path: Path, llama: Path) -> None:
    from peft import PeftModel

    found = compose({runs[0]: 0.7, runs[1]: -0.4}, tmp_path / "sum")
    assert found["rank"] == 8 and found["weights"] == {"shout": 0.7, "spell": -0.4}
    lm = LM.load(Recipe.from_dict(tiny.recipe_dict(tmp_path, model={"name": str(llama)})).model)
    ids = torch.tensor([[0, 5, 6, 7, 8, 9]])
    with torch.no_grad():
        base = {n: p.detach().clone() for n, p in lm.model.named_parameters()}
        for run, weight in zip(runs, (0.7, -0.4), strict=True):
            lm.load_adapter(run / "adapter")
            merged = lm.peft.merge_and_unload()
            lm.peft = None
            for name, parameter in merged.named_parameters():
                update = parameter - base[name]
                base[name + "+"] = base.get(name + "+", 0) + weight * update
                parameter.copy_(base[name])
            lm.model = merged
        for name, parameter in lm.model.named_parameters():
            parameter.add_(base[name + "+"])
        slow = lm.model(ids).logits
        fresh = LM.load(Recipe.from_dict(tiny.recipe_dict(tmp_path, model={"name": str(llama)})).model).model
        fast = PeftModel.from_pretrained(fresh, str(tmp_path / "sum/adapter")).eval()(ids).logits
    torch.testing.assert_close(fast, slow, rtol=1e-3, atol=1e-3)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([[0, 5, 6, 7, 8, 9]])).logits


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's own
@pytest.mark.parametrize(
    "methods", [("lora", "lora"), ("rslora", "rslora"), ("rslora", "lora"), ("lora", "rslora")], ids="-".join
)
def test_adapters_of_every_scaling_are_summed(job: Path, methods: tuple[str, str]) -> None:
    from peft import PeftModel

    section = Recipe.from_dict(tiny.recipe_dict(job), base_dir=job).model
    shapes, weights = ({"rank": 4, "alpha": 8.0}, {"rank": 2, "alpha": 3.0, "targets": ["q_proj"]}), (0.7, -0.4)
    folders, alone = [], []
    for seed, (method, shape) in enumerate(zip(methods, shapes, strict=True)):
        lm = LM.load(section, job)
        lm.add_adapter(LoraSection.model_validate({"method": method, **shape}), 0)
        tiny.disturb(lm, seed)
        adapters.save(lm.peft, job / str(seed) / "adapter")
        folders.append(RunDir(job / str(seed)))
        alone.append(logits(lm.peft))
    lm = LM.load(section, job)
    base = {name: p.detach().clone() for name, p in lm.model.named_parameters()}
    load(lm, folders, ["one", "two"], weights)
    for name, want in zip(("one", "two"), alone, strict=True):  # adding them up leaves them as they were
        lm.peft.set_adapter(name)
        torch.testing.assert_close(logits(lm.peft), want)
    slow = LM.load(section, job).model
    with torch.no_grad():
        for folder, weight in zip(folders, weights, strict=True):
            merged = PeftModel.from_pretrained(LM.load(section, job).model, str(folder / "adapter")).merge_and_unload()
            for (name, p), q in zip(slow.named_parameters(), merged.parameters(), strict=True):
                p.add_(weight * (q - base[name]))
    lm.peft.set_adapter("composed")
    saved = adapters.save(lm.peft, job / "sum", "composed")
    for model in (lm.peft, PeftModel.from_pretrained(LM.load(section, job).model, str(saved))):
        torch.testing.assert_close(logits(model), logits(slow), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["x/a", "y/b"], ["a", "b"]),
        (["x/a", "y/a", "z/composed"], ["a", "a-2", "composed-3"]),
        (["x/a-3", "y/a", "z/a"], ["a-3", "a", "a-4"]),
        (["x/v1.2 *new*", "y/v1-2-new-"], ["v1-2-new-", "v1-2-new--2"]),
    ],
)
def test_each_run_has_a_name_of_its_own(folders: list[str], names: list[str]) -> None:
    assert distinct([Path(folder) for folder in folders]) == names


def test_a_sum_is_measured_on_the_rows_of_every_run(runs: list[Path], tmp_path: Path) -> None:
    before = {p: p.read_bytes() for run in runs for p in run.rglob("*") if p.is_file()}
    found = compose({runs[0]: 1.0, runs[1]: 0.0}, tmp_path / "sum")
    assert before == {p: p.read_bytes() for run in runs for p in run.rglob("*") if p.is_file()}
    for name in CONTEXTS:  # the second one counts for nothing: the sum is the first one
        assert found["closed"][name]["mean"] == pytest.approx(found["alone"][name]["shout"]["mean"], abs=1e-4)
    own = json.loads((runs[0] / "evaluation.json").read_text())["kl_closed"]["mean"]
    assert found["alone"]["shout"]["shout"]["mean"] == pytest.approx(own, abs=1e-4)
    assert not found["good"] and any("spell" in reason for reason in found["reasons"])
    assert json.loads((tmp_path / "sum/compose.json").read_text())["good"] is False
    assert "Not good" in (tmp_path / "sum/adapter/README.md").read_text()
    assert {p.name for p in (tmp_path / "sum").iterdir()} == {"adapter", "compose.json"}


def test_each_teacher_answers_as_its_own_recipe_says(runs: list[Path], job: Path) -> None:
    raw = tiny.recipe_dict(
        job, context={"system": "Spell it."}, eval__latency_rows=0, eval__max_new_tokens=2, train__epochs=1
    )
    pipeline.distill(Recipe.from_dict({**raw, "gate": {"on_fail": "warn"}}, base_dir=job), job / "short")
    found = compose({job / "short": 0.0, runs[0]: 1.0}, job / "sum")
    assert found["closed"]["shout"]["mean"] == pytest.approx(found["alone"]["shout"]["shout"]["mean"], abs=1e-4)
    assert found["closed"]["short"]["mean"] == pytest.approx(found["alone"]["short"]["shout"]["mean"], abs=1e-4)


def test_a_sum_that_cannot_be_written(runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(adapters, "save", full)
    with pytest.raises(RunError, match=f"the disk is full: cannot write {tmp_path / 'sum'}"):
        compose({runs[0]: 1.0, runs[1]: 1.0}, tmp_path / "sum")
    assert not (tmp_path / "sum").exists()


def test_what_cannot_be_summed(runs: list[Path], tmp_path: Path, job: Path) -> None:
    with pytest.raises(RunError, match="two or more"):
        compose({runs[0]: 1.0}, tmp_path / "a")
    (tmp_path / "b").mkdir()
    with pytest.raises(RunError, match="there already"):
        compose({runs[0]: 1.0, runs[1]: 1.0}, tmp_path / "b")
    raw = tiny.recipe_dict(job, lora={"rank": 4, "method": "dora"}, eval__latency_rows=0, behaviour={"unrelated": 0})
    pipeline.distill(Recipe.from_dict(raw, base_dir=job), job / "dora")
    with pytest.raises(ModelError, match="not a sum"):
        compose({runs[0]: 1.0, job / "dora": 1.0}, tmp_path / "c")
    other = tmp_path / "other"
    other.mkdir()
    tiny.save(other / "model", seed=9)
    raw = tiny.recipe_dict(other, eval__latency_rows=0, behaviour={"unrelated": 0})
    pipeline.distill(Recipe.from_dict(raw, base_dir=other), other / "run")
    with pytest.raises(ModelError, match="different base models"):
        compose({runs[0]: 1.0, other / "run": 1.0}, tmp_path / "d")


@pytest.mark.parametrize(
    ("reads", "found"),
    [
        ({"prompt": {"pattern": "[{voice}] {prompt}"}}, r"no column 'voice' for the pattern '\[{voice}\] {prompt}'"),
        ({"context": {"column": "voice"}}, "column 'voice' is neither a text"),
        (
            {"context": {"documents": ["a.md"], "chunk_tokens": 40, "chunk_overlap": 0, "chunk_column": "voice"}},
            "names none",
        ),
    ],
)
def test_rows_that_another_run_cannot_read(runs: list[Path], job: Path, reads: dict[str, Any], found: str) -> None:
    raw = tiny.recipe_dict(job, train__epochs=1, eval__latency_rows=0, behaviour={"unrelated": 0}, **reads)
    (job / "a.md").write_text("Shout every word.")
    for path in job.glob("*.jsonl"):
        tiny.write_jsonl(path, [{**row, "voice": "a.md:1"} for row in tiny.read_jsonl(path)])
    pipeline.distill(Recipe.from_dict(raw, base_dir=job), job / "run")
    measured: list[Any] = []
    with pytest.raises(RecipeError, match="the rows of shout cannot be put to the teacher of run") as caught:
        compose({runs[0]: 1.0, job / "run": 1.0}, job / "sum", progress=lambda *told: measured.append(told))
    assert re.search(found, caught.value.found) and "columns of both recipes" in caught.value.fix
    assert not measured and not (job / "sum").exists()


def test_rows_that_do_not_fit_behind_another_runs_context(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Any] = []
    monkeypatch.setattr("ctxdistill.compose.teacher_limit", lambda recipe: 480)
    with pytest.raises(FitError, match=r"the context of one run .* does not fit"):
        compose(dict.fromkeys(runs, 1.0), tmp_path / "sum", progress=lambda *told: measured.append(told))
    assert not measured and not (tmp_path / "sum").exists()


def test_the_command(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [f"{runs[0]}=1", f"{runs[1]}=0.5", "--out", str(tmp_path / "sum")]
    assert cli.main(["compose", *given]) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "sum" / "compose.json").read_text())
    assert "teacher of spell" in said and "by shout alone" in said
    assert ("Good:" if found["good"] else "Not good:") in said and "the sum: 1 times shout + 0.5 times spell" in said
    for wrong in (["x"], [f"{runs[0]}=much"], [f"{runs[0]}=nan"]):
        assert cli.main(["compose", *wrong, "--out", str(tmp_path / "no")]) == 2
        assert "RUN=WEIGHT" in capsys.readouterr().err


# -- other updates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dora", "rslora"])
def test_other_parameterisations_train_and_load(job: Path, method: str) -> None:
    lora = {"rank": 4, "method": method}
    run = pipeline.distill(
        Recipe.from_dict(tiny.recipe_dict(job, lora=lora, train__epochs=4), base_dir=job), job / "run"
    )
    assert run.evaluation["kl_closed"]["mean"] > 0.3
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    assert (config["use_dora"], config["use_rslora"]) == (method == "dora", method == "rslora")
    ids = torch.tensor([[0, 5, 6, 7, 8]])
    with torch.no_grad():
        none, half, full = (pipeline.load_student(run.path, strength=s)[0](ids).logits for s in (0.0, 0.5, 1.0))
        base = LM.load(Recipe.from_dict(tiny.recipe_dict(job), base_dir=job).model).model(ids).logits
    torch.testing.assert_close(none, base, rtol=1e-4, atol=1e-4)
    assert 0 < (half - base).norm() < (full - base).norm()
    again = pipeline.evaluate(run.path)
    assert again["kl_closed"] == run.evaluation["kl_closed"]
    assert RunDir(run.path).read_jsonl("scores.jsonl")
