"""A study end to end on tiny models: cells, resuming, holes, the authors' procedure."""

from __future__ import annotations

import dataclasses
import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from ctxdistill import cells as cells_module
from ctxdistill import cli, study_report
from ctxdistill import study as studies
from ctxdistill.cells import NOTHING
from ctxdistill.errors import DataError, ModelError, RecipeError, RunError
from ctxdistill.grid import Study
from ctxdistill.readers import Record
from ctxdistill.study import study
from ctxdistill.tasks import TASKS, Pattern, Source, Task
from ctxdistill.tasks.source import Local

LABELS = ("up", "down")


def source(name: str, start: int, count: int) -> Source:
    def read(path: Path, most: int, problems: list[str]) -> tuple[list[Record], int]:
        made = [
            (f"x:{i}", {"text": f"{'abcdefgh'[i % 8]}{i}", "label": LABELS[i % 2]}) for i in range(start, start + count)
        ]
        return made, count

    return Source(name, LABELS, Local(file="x.txt", read=read, counts={"up": count // 2, "down": count // 2}), None)


def task(name: str, start: int, ood: str = "") -> Task:
    words = dict(zip(LABELS, ("yes", "no"), strict=True))
    pattern = Pattern(
        "{text}:", words, instruction="Think. Up?", student_instruction="Up?", ood={ood: "{text} ="} if ood else {}
    )
    return Task(
        name, 1, name.title(), LABELS, source("train", start, 60), source("eval", start + 60, 12),
        {ood: source("ood", start + 80, 10)} if ood else {}, {}, {"default": pattern, "paper-compat": pattern},
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(TASKS, "updown", task("updown", 0, "far"))
    monkeypatch.setitem(TASKS, "gretel", task("gretel", 2000, "hans"))
    monkeypatch.setitem(TASKS, "other", task("other", 1000))
    tiny.save(tmp_path / "opt", "opt-350m", chat=False)
    (tmp_path / "x.txt").write_text("here\n")
    return tmp_path


def grid(folder: Path, **sections: Any) -> Study:
    raw: dict[str, Any] = {
        "name": "tiny", "model": {"names": ["opt"]}, "tasks": {"names": ["updown"], "root": "."},
        "grid": {
            "demos": [2, 4], "sets": [0, 1], "contexts": 2, "queries": 6,
            "arms": ["zero_shot", "in_context", "ft_lora", "cd_one", "cd_many"],
        },
        "train": {"epochs": 1, "lr": 0.01}, "finetune": {"epochs": 1}, "eval": {"latency_rows": 0, "batch_size": 8},
    }  # fmt: skip
    for name, values in sections.items():
        raw[name] = {**raw.get(name, {}), **values} if isinstance(values, dict) else values
    return Study.from_dict(raw, folder)


def cells(out: Path) -> dict[str, Any]:
    return {p.parent.name: json.loads(p.read_text()) for p in sorted((out / "cells").glob("*/cell.json"))}


def test_a_study_end_to_end(folder: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    page = study(grid(folder), folder / "out", progress=lambda *a: seen.append(a))
    found = cells(folder / "out")
    assert len(found) == 1 + 2 * 2 * 4 and {c["status"] for c in found.values()} == {"done"}
    rows = [s["row"] for s in tiny.read_jsonl(folder / "out/cells/opt-updown-zero_shot/scores.jsonl")]
    for name, cell in found.items():
        scores = tiny.read_jsonl(folder / "out" / "cells" / name / "scores.jsonl")
        assert [s["set"] for s in scores] == ["updown"] * 12 + [
            "far"
        ] * 10  # the same rows in the same order, everywhere
        assert [s["row"] for s in scores] == rows
        assert cell["sets"] == {"updown": {"domain": "in", "rows": 12}, "far": {"domain": "out", "rows": 10}}
    draws = json.loads((folder / "out/draws/updown-n4-set1.json").read_text())
    assert len(draws["contexts"]) == 2 and len(draws["queries"]) == 6
    used = [i for c in draws["contexts"] for i in c] + draws["queries"]
    assert len(set(used)) == len(used) == 14  # demonstrations and queries never overlap
    two = json.loads((folder / "out/draws/updown-n2-set1.json").read_text())
    assert two["queries"] == draws["queries"]
    assert page.is_file() and "Updown" in page.read_text()
    table = json.loads((folder / "out/study.json").read_text())["table"]
    assert {row["arm"] for row in table} == {"constant", "zero_shot", "in_context", "ft_lora", "cd_one", "cd_many"}
    stages = [(done, total) for stage, done, total in seen if stage.startswith("cells (")]
    assert stages[0] == (0, 17) and stages[-1] == (17, 17)
    running = [stage for stage, _, _ in seen if stage.startswith("cells (")]
    assert running[:2] == [
        "cells (updown-zero_shot)",
        "cells (updown-n2-set0-in_context)",
    ]  # the one that runs, not the last


def test_no_row_that_is_measured_is_trained_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, far = source("eval", 50, 12), source("ood", 40, 4)  # the training rows are 0 to 59
    monkeypatch.setitem(TASKS, "updown", dataclasses.replace(TASKS["updown"], evaluation=held, ood={"far": far}))
    rows = studies.read_task(grid(folder), "updown")
    assert {row.fields["index"] for row in rows.train} == {*range(40), *range(44, 50)} and rows.dropped == 14
    assert {name: len(found) for name, found in rows.evaluation.items()} == {"updown": 12, "far": 4}
    paper = studies.read_task(grid(folder, grid={"draw": "paper"}), "updown")
    assert len(paper.train) == 60 and paper.dropped == 0  # as the authors have it


def test_a_part_of_the_rows_is_the_same_part_for_all_sets(folder: Path) -> None:
    some = grid(folder, eval={"rows": 5})
    rows = studies.read_task(some, "updown").evaluation["updown"]
    first, second = (studies.measured(some, "updown", rows, 5, seed) for seed in (0, 1))
    assert first == second and len(first) == 5


def test_finished_cells_are_kept_and_changed_ones_made_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    run = studies.Runner.run

    def counted(self: Any, cell: Any) -> None:
        made.append(cell.id)
        if len(made) == 3:
            raise KeyboardInterrupt
        run(self, cell)

    monkeypatch.setattr(studies.Runner, "run", counted)
    small = {"demos": [2], "sets": [0]}
    with pytest.raises(KeyboardInterrupt):
        study(grid(folder, grid=small), folder / "out")
    assert len(cells(folder / "out")) == 2
    study(grid(folder, grid=small), folder / "out")
    assert made == [made[0], made[1], made[2], made[2], *made[4:]] and len(made) == 6
    first = cells(folder / "out")
    study(grid(folder, grid=small), folder / "out")
    assert len(made) == 6 and cells(folder / "out") == first
    study(grid(folder, grid=small, finetune={"epochs": 2}), folder / "out")
    assert made[6:] == ["opt-updown-n2-set0-ft_lora"]
    study(grid(folder, grid={"demos": [2], "sets": [0, 1]}, finetune={"epochs": 2}), folder / "out")
    assert len(made) == 7 + 4  # a grown grid


def test_cells_of_other_settings_are_counted_and_the_settings_named(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ctxdistill")
    small = {"demos": [2], "sets": [0], "arms": ["zero_shot", "in_context"]}
    for rows, sets in ((11, [0]), (11, [0]), (12, [0, 1])):
        caplog.clear()
        study(grid(folder, grid=small | {"sets": sets}, eval={"rows": rows}), folder / "out")
        said = [line for line in caplog.messages if "settings" in line]
        if rows == 11:
            assert not said
    assert said == ["finished cells of other settings (eval.rows), computed again: 2"]


def test_the_memory_of_training_all_weights_is_spoken_of_where_an_arm_does(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ctxdistill")
    for arm, spoken in (("in_context", False), ("ft_full", True)):
        caplog.clear()
        study(grid(folder, grid={"demos": [2], "sets": [0], "arms": [arm]}), folder / arm)
        (line,) = [text for text in caplog.messages if "million parameters" in text]
        assert ("train all weights" in line) is spoken


def test_a_cell_does_not_depend_on_what_ran_before_it(folder: Path) -> None:
    only = {"demos": [4], "sets": [1], "arms": ["cd_many"]}
    study(grid(folder), folder / "all")
    study(grid(folder, grid=only), folder / "alone")
    (name,) = cells(folder / "alone")
    one, other = (tiny.read_jsonl(folder / out / "cells" / name / "scores.jsonl") for out in ("all", "alone"))
    assert one == other
    losses = [cells(folder / out)[name]["training"] for out in ("all", "alone")]
    assert losses[0] == losses[1]


def test_what_does_not_fit_is_a_row_with_its_reason(folder: Path) -> None:
    page = study(grid(folder, model={"window": 32}, grid={"demos": [2, 16]}), folder / "out")
    found = cells(folder / "out")
    states = {name: cell["status"] for name, cell in found.items()}
    assert states["opt-updown-zero_shot"] == states["opt-updown-n16-set0-ft_lora"] == "done"
    assert states["opt-updown-n16-set0-in_context"] == states["opt-updown-n16-set1-cd_many"] == "infeasible"
    assert "at most 32 tokens" in found["opt-updown-n16-set0-in_context"]["reason"]
    assert "at most 32 tokens" in page.read_text()
    before = found["opt-updown-n16-set0-in_context"]
    study(grid(folder, model={"window": 32}, grid={"demos": [2, 16]}), folder / "out", retry=True)
    assert cells(folder / "out")["opt-updown-n16-set0-in_context"]["reason"] == before["reason"]


def test_a_failed_cell_stops_no_other(folder: Path) -> None:
    out = folder / "out"
    study(
        grid(folder, grid={"demos": [2], "sets": [0]}, train={"lr": 1e30, "clip": 1e30, "epochs": 20, "batch_size": 2}),
        out,
    )
    found = cells(out)
    assert (
        found["opt-updown-n2-set0-cd_one"]["status"] == "failed"
        and "finite" in found["opt-updown-n2-set0-cd_one"]["reason"]
    )
    assert found["opt-updown-n2-set0-ft_lora"]["status"] == "done"


def test_a_cell_without_room_stops_no_other_and_leaves_the_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    plain = cells_module.train

    def full(lm: Any, *given: Any, **options: Any) -> Any:
        assert not held or held[0]() is None  # what the cell before held is free
        if lm.peft is None:
            activations = torch.zeros(9)
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return plain(lm, *given, **options)

    monkeypatch.setattr(cells_module, "train", full)
    arms = {"demos": [2], "sets": [0], "arms": ["ft_full", "cd_one"]}
    page = study(grid(folder, grid=arms), folder / "out")
    found = cells(folder / "out")
    assert held and {name: cell["status"] for name, cell in found.items()} == {
        "opt-updown-n2-set0-ft_full": "failed",
        "opt-updown-n2-set0-cd_one": "done",
    }
    reason = found["opt-updown-n2-set0-ft_full"]["reason"]
    assert "Tried to allocate 2.00 GiB" in reason and "micro_batch" in reason and "--retry" in reason
    assert "micro_batch" in page.read_text()
    study(grid(folder, grid=arms), folder / "out")
    assert len(held) == 1  # not tried again at each start
    study(grid(folder, grid=arms), folder / "out", retry=True)
    assert len(held) == 2


def test_a_student_whose_numbers_are_lost_stops_no_other_cell(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the student's fault, and no model is missing."""
    plain = cells_module.student_scores

    def lost(bench: Any, arm: Any, *given: Any) -> Any:
        if arm.trains == "full":
            raise ModelError("the logits of the model are not finite")
        return plain(bench, arm, *given)

    monkeypatch.setattr(cells_module, "student_scores", lost)
    arms = {"demos": [2], "sets": [0], "arms": ["ft_full", "cd_one"]}
    study(grid(folder, grid=arms), folder / "out")
    found = cells(folder / "out")
    assert {name.rpartition("-")[2]: cell["status"] for name, cell in found.items()} == {
        "ft_full": "failed",
        "cd_one": "done",
    }
    assert "not finite" in found["opt-updown-n2-set0-ft_full"]["reason"]


def test_controls_a_bigger_teacher_and_retention(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.save(folder / "big", "opt-1.3b", chat=False, seed=1)
    monkeypatch.setattr(studies, "texts", lambda root, rows: ["some text that has nothing to do with it"] * rows)
    arms = [
        "zero_shot",
        "cd_one",
        "cd_one+shuffled_labels",
        "cd_one+irrelevant_context",
        "cd_one+zero_shot_teacher",
        "kd_bigger",
        "cd_bigger",
    ]
    made = grid(
        folder, model={"teacher": "big"}, tasks={"names": ["updown", "other"]},
        grid={"demos": [4], "sets": [0], "arms": arms}, retention={"texts": 2}, label_weight=0.0,
    )  # fmt: skip
    study(made, folder / "out")
    found = cells(folder / "out")
    assert {c["status"] for c in found.values()} == {"done"}
    base = found["opt-updown-zero_shot"]["retention"]["perplexity"]
    assert base > 1 and found["opt-updown-n4-set0-cd_one"]["retention"]["perplexity"] != base
    # the base model's own distribution is what it already says: nothing to learn, unlike from a real context
    assert found["opt-updown-n4-set0-cd_one+zero_shot_teacher"]["training"]["loss_first"] < 1e-5
    assert found["opt-updown-n4-set0-cd_one"]["training"]["loss_first"] > 1e-3
    teachers = {name: found[f"opt-updown-n4-set0-{name}"]["training"]["loss_first"] for name in arms[1:]}
    assert len(set(teachers.values())) == len(teachers)


def test_formats_are_followed_before_and_after(folder: Path) -> None:
    rows = [
        {"key": 1, "prompt": "No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        {"key": 2, "prompt": "In Thai.", "instruction_id_list": ["language:response_language"], "kwargs": [{"language": "th"}]},
        {"key": 3, "prompt": "Say it in capitals.", "instruction_id_list": ["change_case:english_capital"], "kwargs": [{}]},
    ]  # fmt: skip
    tiny.save(folder / "opt", "opt-350m")  # with a chat template
    (folder / "ifeval").mkdir()
    tiny.write_jsonl(folder / "ifeval/input_data.jsonl", rows)
    arms = ["zero_shot", "ft_lora"]
    made = grid(folder, grid={"demos": [2], "sets": [0, 1], "arms": arms}, retention={"formats": 2, "sets": 1})
    page = study(made, folder / "out")
    found = {name: cell["retention"] for name, cell in cells(folder / "out").items()}
    before, after, later = (found[f"opt-updown-{name}"] for name in ("zero_shot", "n2-set0-ft_lora", "n2-set1-ft_lora"))
    for measured in (before, after):
        assert measured["format"] in (0.0, 0.5, 1.0)
        assert (measured["format_rows"], measured["format_passed_over"]) == (2, 1)
    assert later["format"] is None  # only `retention.sets` of the sets are measured, since it is slow
    assert "2 prompts of IFEval; 1 before them" in page.read_text()


def test_programs_are_written_before_and_after_where_it_is_allowed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save(folder / "opt", "opt-350m")  # with a chat template
    (folder / "mbpp").mkdir()
    problem = {"task_id": 11, "prompt": "Write f.", "test_list": ["assert f(1) == 2"], "test_imports": []}
    (folder / "mbpp/sanitized-mbpp.json").write_text(
        json.dumps([problem, {**problem, "task_id": 12, "prompt": "Again."}])
    )
    arms = ["zero_shot", "ft_lora"]
    values: dict[str, Any] = {"grid": {"demos": [2], "sets": [0], "arms": arms}}
    with pytest.raises(RecipeError, match="run_code=true"):
        grid(folder, **values, retention={"programs": 2})
    # a random model writes no programs: every second answer becomes a right one
    ran = []

    def passes(answer: str, row: Any, section: Any) -> float:
        ran.append(answer)
        return float(len(ran) % 2)

    monkeypatch.setattr("ctxdistill.programs.pass_at_1", passes)
    monkeypatch.setattr("ctxdistill.retention.Format.obeyed", lambda self, answer: all(c(answer) for c in self.checks))
    page = study(grid(folder, **values, retention={"programs": 2, "run_code": True}), folder / "out")
    found = [cell["retention"] for cell in cells(folder / "out").values()]
    assert [(r["pass_at_1"], r["program_rows"]) for r in found] == [(0.5, 2)] * 2 and len(ran) == 4
    for text in (page.read_text(), page.with_suffix(".md").read_text()):
        assert "pass@1 %" in text and "2 problems of MBPP" in text and "50.0" in text


def test_a_teacher_with_another_tokenizer_is_refused(folder: Path) -> None:
    tiny.save(folder / "big", "llama", chat=False)
    path = folder / "big" / "tokenizer.json"
    path.write_text(path.read_text().replace('"<|user|>"', '"<|human|>"'))
    made = grid(folder, model={"teacher": "big"}, grid={"demos": [2], "sets": [0], "arms": ["kd_bigger"]})
    with pytest.raises(ModelError, match="another tokenizer"):
        study(made, folder / "out")


@pytest.mark.parametrize(("key", "value"), [("names", ["no/such-model"]), ("teacher", "no/such-model")])
def test_a_packaged_file_of_the_model_is_named_as_a_study_takes_it(
    key: str, value: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ctxdistill.weights.packaged_gguf", lambda package: folder / "such-model.Q4_1.gguf")
    made = grid(folder, model={key: value}, grid={"demos": [2], "sets": [0], "arms": ["cd_one"]})
    with pytest.raises(ModelError, match="cannot load the model") as caught:
        study(made, folder / "out")
    assert f"model.{key}={folder / 'such-model.Q4_1.gguf'}" in caught.value.fix


def test_two_at_once_are_refused(folder: Path) -> None:
    lock = studies.RunDir(folder / "out")
    lock.lock()
    with pytest.raises(RunError, match="in use by process"):
        study(grid(folder), folder / "out")
    lock.release()


def test_a_folder_of_something_else_is_refused_and_left_as_it_is(folder: Path) -> None:
    only = {"demos": [2], "sets": [0], "arms": ["in_context"]}
    study(grid(folder, grid=only), folder / "out")
    before = {
        path: path.read_bytes() for path in (folder / "out").rglob("*") if path.is_file() and path.name != ".lock"
    }
    for other, found in (
        (grid(folder, name="else", grid=only), "the study 'tiny'"),
        (grid(folder, tasks={"names": ["other"]}, grid=only), "opt-updown-n2-set0-in_context"),
    ):
        with pytest.raises(RunError, match="belongs to another study") as caught:
            study(other, folder / "out")
        assert found in caught.value.found and "--out" in caught.value.fix
        assert ("name=tiny" in caught.value.fix) == (other.name == "else")
        assert all(path.read_bytes() == raw for path, raw in before.items())
    study(grid(folder, tasks={"names": ["updown", "other"]}, grid=only), folder / "out")  # a grown grid goes on
    assert len(cells(folder / "out")) == 2
    (folder / "run").mkdir()
    (folder / "run/recipe.json").write_text("{}")
    with pytest.raises(RunError, match="not empty and is not a study's folder"):
        study(grid(folder, grid=only), folder / "run")


def test_the_papers_runs_are_read_before_anything_is_computed(folder: Path) -> None:
    (folder / "wrong.csv").write_text("model,dataset\nopt,rte\n")
    for name in ("nope.csv", "wrong.csv"):
        with pytest.raises(DataError, match="cannot read the paper's runs") as caught:
            study(grid(folder), folder / "out", paper_csv=folder / name)
        assert "--paper" in caught.value.fix and not (folder / "out").exists()


def compat(folder: Path, **sections: Any) -> Study:
    """The shipped study of the authors' procedure, on a tiny task whose out-of-domain rows are drawn as those of HANS."""
    raw = studies_file("paper-compat")
    raw["model"]["names"], raw["tasks"] = ["opt"], {"names": ["gretel"], "root": "."}
    raw["grid"] |= {"demos": [4], "sets": [0, 1]}
    raw["eval"] |= {"latency_rows": 0, "rows": 8, "ood_rows": 5}
    raw["train"]["epochs"] = 2
    for name, values in sections.items():
        raw[name] |= values
    return Study.from_dict(raw, folder)


def studies_file(name: str) -> dict[str, Any]:
    import tomllib

    return tomllib.loads((Path(__file__).parents[1] / "recipes" / f"{name}.toml").read_text())


def test_the_authors_procedure(folder: Path) -> None:
    made = compat(folder, tasks={"pattern": "paper-compat"})
    study(made, folder / "out")
    found = cells(folder / "out")
    table = (folder / "out/all_runs.csv").read_text().splitlines()
    columns = (
        "model,context_set_id,dataset,context_size,accuracy_teacher,accuracy_indomain,accuracy_ood,"
        "trainable_parameters,all_parameters"
    )
    assert table[0] == columns and len(table) == 3
    for line, (name, cell) in zip(table[1:], sorted(found.items()), strict=True):
        values = dict(zip(columns.split(","), line.split(","), strict=True))
        scores = tiny.read_jsonl(folder / "out/cells" / name / "scores.jsonl")
        inside = [s["exact"] for s in scores if s["set"] == "gretel"]
        assert float(values["accuracy_indomain"]) == sum(inside) / 8  # exact match of the greedy token
        assert float(values["accuracy_teacher"]) * 32 == round(float(values["accuracy_teacher"]) * 32)
        assert (
            int(values["trainable_parameters"]) == 2 * 2 * 16 * 32 * 3
        )  # q_proj and v_proj, A and B, rank, width, layers
        steps = [m for m in tiny.read_jsonl(folder / "out/cells" / name / "metrics.jsonl") if m["event"] == "step"]
        assert len(steps) == 2 * 32 and cell["training"]["steps"] == 64  # a step after every example
        assert {m["lr"] for m in steps[:32]} == {1e-5}  # int(0.1 * 2) = 0 epochs of warm-up
    draws = json.loads((folder / "out/draws/gretel-n4-set0.json").read_text())
    assert draws["contexts"] == [sorted(draws["contexts"][0])] and len(draws["queries"]) == 32
    assert draws["evaluation"]["gretel"] == list(range(8))  # the first rows
    other = json.loads((folder / "out/draws/gretel-n4-set1.json").read_text())
    for seed, drawn in ((0, draws), (1, other)):
        assert drawn["evaluation"]["hans"] == np.random.default_rng(seed + 1).permutation(10)[:5].tolist()
    means = {
        row["set"]: row["mean"]
        for row in json.loads((folder / "out/study.json").read_text())["table"]
        if row["arm"] == "cd_one"
    }
    exact = [float(line.split(",")[5]) for line in table[1:]]
    assert means["gretel"] == pytest.approx(sum(exact) / 2)  # the page counts by the authors' rule, too
    assert "most probable next token" in (folder / "out/report.html").read_text()
    for name in found:  # a random model says no label word: now it has said four, one of them out of domain
        file = folder / "out/cells" / name / "scores.jsonl"
        tiny.write_jsonl(file, [s | {"exact": float(i in (0, 1, 2, 8))} for i, s in enumerate(tiny.read_jsonl(file))])
    studies.write_authors_table(studies.RunDir(folder / "out"), made)
    for line in (folder / "out/all_runs.csv").read_text().splitlines()[1:]:
        assert line.split(",")[5:7] == ["0.375", "0.2"]


def test_students_are_measured_with_dropout_in_the_authors_procedure_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((folder / "opt/config.json").read_text())
    (folder / "opt/config.json").write_text(json.dumps(config | {"dropout": 0.5}))
    seen: list[Any] = []
    plain = cells_module.student_scores

    def watched(bench: Any, arm: Any, rows: Any, where: str) -> Any:
        asked = bench.prompter(NOTHING, where=where)
        prompts = [p.student for p in bench.pairs(asked, rows)]
        seen.append([bench.scores(asked, prompts, bench.lm).logprobs for _ in range(2)])
        return plain(bench, arm, rows, where)

    monkeypatch.setattr(cells_module, "student_scores", watched)
    for name, dropout in (("noisy", True), ("calm", False)):
        seen.clear()
        study(compat(folder, grid={"sets": [0]}, eval={"dropout": dropout}), folder / name)
        assert len(seen) == 2 and all(bool((one == two).all()) is not dropout for one, two in seen)


def test_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (
        '[model]\nnames = ["opt"]\n[tasks]\nnames = ["updown"]\nroot = "."\n'
        '[grid]\ndemos = [2]\nsets = [0]\narms = ["zero_shot", "in_context"]\n[eval]\nlatency_rows = 0\n'
    )
    (folder / "s.toml").write_text(text)
    assert cli.main(["study", str(folder / "s.toml"), "grid.queries=4", "--out", str(folder / "out"), "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["report"] == str(folder / "out/report.html") and found["study"] == str(folder / "out/study.json")
    assert found["claims"] == json.loads((folder / "out/study.json").read_text())["claims"] and found["claims"]
    assert found["cells"] == {"done": 2, "infeasible": 0, "failed": 0}
    assert found["reasons"] == {}
    assert "2 cells" in captured.err
    (folder / "out/report.html").unlink()
    assert cli.main(["report", str(folder / "out")]) == 0 and (folder / "out/report.html").is_file()
    capsys.readouterr()
    assert cli.main(["study", "--tasks", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert "hans" in listed["tasks"]["mnli"]["ood"] and "cd_many" in listed["arms"] and len(listed["controls"]) == 3
    assert cli.main(["study", "--tasks"]) == 0 and "shuffled_labels" in capsys.readouterr().out
    assert cli.main(["study"]) == 2 and "--tasks" in capsys.readouterr().err
    assert cli.main(["study", str(folder / "nothing.toml")]) == 2
    assert study_report.write_report(folder / "out").name == "report.html"


def test_the_command_line_says_what_came_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (
        '[model]\nnames = ["opt"]\nwindow = 32\n[tasks]\nnames = ["updown"]\nroot = "."\n'
        '[grid]\ndemos = [16]\nsets = [0]\nqueries = 4\narms = ["in_context", "zero_shot"]\n[eval]\nlatency_rows = 0\n'
    )
    (folder / "s.toml").write_text(text)
    line = ["study", str(folder / "s.toml"), "--out", str(folder / "out")]
    assert cli.main(line) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "cells: 1 done, 1 did not fit (--retry computes it again)"
    assert "opt-updown-n16-set0-in_context" in said[1] and "at most 32 tokens" in said[1]  # the reason, in one line
    verdicts = [text for text in said if text.startswith("not decidable: ")]
    assert len(verdicts) == 4 and "In domain, a student matches in-context learning" in verdicts[0]
    assert [text.partition(": ")[2] for text in said[-2:]] == [
        f"{folder / 'out/report.html'} and report.md",
        str(folder / "out/study.json"),
    ]
    assert cli.main([*line, "--json"]) == 0
    captured = capsys.readouterr()
    assert "2 of 2 cells are finished (1 did not fit: --retry)" in captured.err
    found = json.loads(captured.out)
    assert found["cells"] == {"done": 1, "infeasible": 1, "failed": 0}
    assert found["reasons"]["infeasible"]["cell"] == "opt-updown-n16-set0-in_context"
    assert cli.main([*line, 'grid.arms=["in_context"]', "--json"]) == 2
    found = json.loads(capsys.readouterr().out)["error"]
    assert "no cell" in found["message"] and "1 did not fit" in found["found"] and "--retry" in found["fix"]
    assert str(folder / "out/report.html") in found["fix"]
