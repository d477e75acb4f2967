"""The whole path on a tiny model, and a real process that is killed and resumed."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import tiny
from ctxdistill import pipeline
from ctxdistill import train as training_loop
from ctxdistill.dataset import explicit, prepare, stored_recipe
from ctxdistill.errors import DataError, FitError, GateError, ModelError, RunError
from ctxdistill.lm import LM
from ctxdistill.policy import Rounds
from ctxdistill.recipe import ModelSection, Recipe
from ctxdistill.rundir import RunDir, no_progress, write_atomic, writing
from ctxdistill.store import TargetStore
from ctxdistill.weights import loading


def recipe(job: Path, **overrides: Any) -> Recipe:
    return Recipe.from_dict(tiny.recipe_dict(job, **overrides), base_dir=job)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> pipeline.Run:
    folder = tmp_path_factory.mktemp("job")
    (folder / "model").symlink_to(llama)
    return pipeline.distill(recipe(folder), folder / "run")


def test_a_run_leaves_everything_behind(run: pipeline.Run) -> None:
    assert {p.name for p in run.path.iterdir()} >= {
        "recipe.json", "targets", "checkpoints", "adapter", "metrics.jsonl", "scores.jsonl", "evaluation.json", "report.html",
        "report.md", "prompts.jsonl", "gate.json",
    }  # fmt: skip
    assert run.evaluation["arms"] == ["zero_shot", "in_context", "distilled"]
    assert run.evaluation["rows"] == 8
    assert run.evaluation["kl_closed"]["mean"] > 0.3
    manifest = json.loads((run.path / "recipe.json").read_text())
    assert manifest["rows"] | {"sha256": ""} == {
        "train": 13, "validation": 3, "eval": 8, "demos": 3, "dropped_duplicates": 0, "left_out_by_limit": 0, "sha256": "",
    }  # fmt: skip
    assert (
        manifest["model"]["weights_sha256"] and manifest["context"]["sha256"] and manifest["model"]["template_sha256"]
    )
    assert manifest["context"]["kinds"] == ["system", "demos"]
    assert "train.lr" in manifest["explicit"] and "train.clip" not in manifest["explicit"]
    assert manifest["student_prompt"]["text"] == "<s><|system|>be kind</s><|user|>{query}</s><|assistant|>"
    card = (run.adapter / "README.md").read_text()
    assert "Shout every word" in card and manifest["context"]["sha256"] in card
    shown = RunDir(run.path).read_jsonl("prompts.jsonl")
    assert len(shown) == 24 and shown[0]["completion"] and shown[-1]["completion"] is None


def test_what_a_run_took_is_counted_by_hand(run: pipeline.Run) -> None:
    made = recipe(run.path.parent)
    lm, prompter, data = prepare(made)
    examples = pipeline.make_examples(
        made, lm, prompter, data.pairs["train"], TargetStore(run.path / "targets"), no_progress
    )
    training, folder = run.evaluation["training"], RunDir(run.path)
    lengths = [len(e.target.ids) for e in examples]
    assert (training["steps"], training["epochs"], training["train_rows"]) == (8, 2, 13)  # of 4 rows
    assert training["supervised_tokens"] == 2 * sum(lengths)
    assert training["truncated_completions"] == sum(e.target.ids[-1] != 1 for e in examples) > 0
    best = [x for x in folder.read_jsonl("metrics.jsonl") if x["event"] == "validation" and x["best"]][-1]
    assert (training["best_step"], training["best_validation_kl"]) == (best["step"], best["kl"])
    both = [[len(side) for side in (p.teacher, p.student)] for p in data.pairs["eval"]]
    context = sum(teacher - student for teacher, student in both) / len(both)
    assert run.evaluation["cost"]["prompt_tokens_saved"] == pytest.approx(context)
    seconds = {x["stage"]: x["seconds"] for x in reversed(folder.read_jsonl("timings.jsonl"))}
    assert run.evaluation["cost"]["seconds"]["label"] == seconds["label"]


def with_documents(job: Path) -> dict[str, Any]:
    """A row for each of eight chunks."""
    words = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen"]
    text = [f"The {word} lives in room {i}. " + f"{word} and {i} go to town. " * 9 for i, word in enumerate(words)]
    (job / "doc.txt").write_text("\n\n".join(text))
    for name in ("queries", "eval"):
        rows = [{"prompt": f"{name}: where is {w}?", "chunk": f"doc.txt:{i + 1}"} for i, w in enumerate(words)]
        tiny.write_jsonl(job / f"{name}.jsonl", rows)
    return {"context": {"documents": ["doc.txt"], "chunk_tokens": 270, "chunk_overlap": 0}}


def with_contexts(job: Path) -> dict[str, Any]:
    """A long context for each row."""
    for name in ("queries", "eval"):
        rows = tiny.read_jsonl(job / f"{name}.jsonl")
        tiny.write_jsonl(job / f"{name}.jsonl", [row | {"ctx": f"{row['prompt']} out loud! " * 12} for row in rows])
    return {"context": {"column": "ctx"}, "train__on_policy": 1.0}


@pytest.mark.parametrize("case", ["shared", "retained", "documents", "contexts"])
def test_the_tokens_of_a_run_are_those_that_went_through_the_model(
    job: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tiny.recipe_dict(job)
    more = {"documents": with_documents, "contexts": with_contexts}.get(case, lambda job: {})(job)
    more |= {"train__retain_weight": 1.0} if case == "retained" else {}
    queries = {name: (job / f"{name}.jsonl").read_text() for name in ("queries", "eval")}
    raw = tiny.recipe_dict(job, eval__latency_rows=0, behaviour={"unrelated": 0, "rows": 0}, **more)
    for name, text in queries.items():
        (job / f"{name}.jsonl").write_text(text)
    weight, total = [0], [0]
    backbone = LM._backbone

    def counted(self: LM, **inputs: Any) -> Any:
        total[0] += weight[0] * inputs["input_ids"].numel()
        return backbone(self, **inputs)

    def during(module: Any, name: str, times: int) -> None:
        work = getattr(module, name)

        def weighed(*args: Any, **kwargs: Any) -> Any:
            before, weight[0] = weight[0], times
            try:
                return work(*args, **kwargs)
            finally:
                weight[0] = before

        monkeypatch.setattr(module, name, weighed)

    monkeypatch.setattr(LM, "_backbone", counted)
    for module, name, times in (
        (pipeline, "make_examples", 1), (pipeline, "keep_examples", 1), (training_loop, "backward", 3),
        (training_loop, "validate", 1), (Rounds, "_round", 1),
    ):  # fmt: skip
        during(module, name, times)
    run = pipeline.distill(Recipe.from_dict(raw, base_dir=job), job / "counted")
    assert run.evaluation["cost"]["training_tokens"] == pytest.approx(total[0], rel=0.1)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's own
def test_the_adapter_loads_without_us_and_is_the_student(run: pipeline.Run) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    manifest = json.loads((run.path / "recipe.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(manifest["model"]["name"]).eval()
    ids = torch.tensor([[0, 5, 6, 7, 8]])
    plain = base(ids).logits
    theirs = PeftModel.from_pretrained(base, str(run.adapter)).eval()(ids).logits
    model, tokenizer = pipeline.load_student(run.path)
    torch.testing.assert_close(model(ids).logits, theirs)
    assert not torch.allclose(plain, theirs, atol=1e-3)
    merged, _ = pipeline.load_student(run.path, merge=True)
    torch.testing.assert_close(merged(ids).logits, theirs, rtol=1e-3, atol=1e-3)
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape[1] <= 7 and tokenizer.eos_token == "</s>"
    assert {p.suffix for p in run.path.rglob("*") if p.is_file()} <= {
        ".json",
        ".jsonl",
        ".safetensors",
        ".html",
        ".md",
        ".lock",
        ".txt",
        "",
    }


def test_evaluating_again_gives_the_same_numbers(run: pipeline.Run) -> None:
    before = RunDir(run.path).read_jsonl("scores.jsonl")
    again = pipeline.evaluate(run.path)
    assert again["kl_closed"] == run.evaluation["kl_closed"] and again["gap_closed"] == run.evaluation["gap_closed"]
    assert again["gate"] == run.evaluation["gate"]
    assert again.keys() == run.evaluation.keys()
    assert again["cost"]["seconds"] == run.evaluation["cost"]["seconds"]
    arms = again["table"]  # what a request saves is that of the table beside it
    saved = arms["in_context"]["latency_ms"]["mean"] - arms["distilled"]["latency_ms"]["mean"]
    assert again["cost"]["ms_saved"]["mean"] == pytest.approx(saved)
    for old, new in zip(before, RunDir(run.path).read_jsonl("scores.jsonl"), strict=True):
        assert (old["arm"], old["prediction"], old["metrics"]) == (new["arm"], new["prediction"], new["metrics"])
        assert old["kl"] == pytest.approx(new["kl"], abs=1e-6)


def test_what_loading_takes_is_no_stages_time(run: pipeline.Run) -> None:
    told: list[tuple[str, int, int]] = []
    pipeline.evaluate(run.path, progress=lambda *call: told.append(call))
    assert told[0] == ("loading", 1, 1) and [stage for stage, _, _ in told].count("loading") == 1


def test_evaluating_other_rows_is_refused(job: Path) -> None:
    made = pipeline.distill(recipe(job), job / "run")
    tiny.write_jsonl(job / "eval.jsonl", [{"prompt": "please say elk", "answer": "ELK"}])
    with pytest.raises(RunError, match=r"(?s)belongs to another recipe.*found: rows.eval: 3 there, 1 here$|\n"):
        pipeline.evaluate(made.path)


def test_resume_says_at_once_that_there_is_nothing(
    job: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def loads(*_: Any) -> None:
        raise ModelError("something slow")

    monkeypatch.setattr(pipeline, "prepare", loads)
    for resume in (True, False):
        with pytest.raises(ModelError):
            pipeline.distill(recipe(job), job / "nope", resume=resume)
    with pytest.raises(ModelError):
        pipeline.demo(job / "demo")  # which goes on with what may be there
    assert caplog.messages == [f"nothing to resume in {job / 'nope'}: starting from the beginning"]


def test_a_finished_run_costs_the_same_when_it_is_resumed(job: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "ctxdistill")
    first = pipeline.distill(recipe(job), job / "run")
    assert "going on" not in caplog.text
    again = pipeline.distill(recipe(job), job / "run", resume=True)
    found = "the gate's scores, targets, a checkpoint of step 8, the adapter"
    assert f"going on in {job / 'run'}, where there are: {found}" in caplog.messages
    assert again.evaluation["cost"]["seconds"] == first.evaluation["cost"]["seconds"]


def test_fine_tuning_is_judged_by_its_own_loss(job: Path) -> None:
    tuned = recipe(job, completions={"source": "data"}, train__ce_weight=1.0, train__epochs=6, train__patience=0)
    made = pipeline.distill(tuned, job / "run")
    assert made.evaluation["training"]["best_step"] > 0
    checks = [x for x in RunDir(job / "run").read_jsonl("metrics.jsonl") if x["event"] == "validation"]
    assert min(x["loss"] for x in checks) == [x for x in checks if x["best"]][-1]["loss"] < checks[0]["loss"]


def test_contexts_of_each_row_may_share_a_question(job: Path) -> None:
    raw = tiny.recipe_dict(job, context={"column": "ctx"})
    rows = [
        {"prompt": "say it", "ctx": f"The word is {w}, and you must shout it."}
        for w in ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen"]
    ]
    tiny.write_jsonl(job / "queries.jsonl", rows[:6])
    tiny.write_jsonl(job / "eval.jsonl", rows[6:])
    made = pipeline.distill(Recipe.from_dict(raw, base_dir=job), job / "run")
    assert made.evaluation["rows"] == 2
    tiny.write_jsonl(job / "queries.jsonl", [*rows[:6], rows[6]])
    with pytest.raises(DataError, match=r"eval\.jsonl:1"):
        prepare(Recipe.from_dict(raw, base_dir=job))
    tiny.write_jsonl(job / "queries.jsonl", rows[:6])
    tiny.write_jsonl(job / "demos.jsonl", [{**row, "answer": "YES"} for row in rows[5:7]])
    raw["context"] |= {"demos": "demos.jsonl"}
    with pytest.raises(DataError, match=r"(?s)queries\.jsonl:6 = demos\.jsonl:1.*eval\.jsonl:1 = demos\.jsonl:2"):
        prepare(Recipe.from_dict(raw, base_dir=job))


def test_try_streams_each_arm(run: pipeline.Run) -> None:
    pieces = list(pipeline.try_text(run.path, "say emu", max_new_tokens=4))
    assert list(dict.fromkeys(arm for arm, _ in pieces)) == ["zero_shot", "in_context", "distilled"]
    model, tokenizer = pipeline.load_student(run.path)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "say emu"}], add_generation_prompt=True, return_tensors="pt"
    )
    whole = model.generate(prompt["input_ids"], max_new_tokens=4, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    said = "".join(piece for arm, piece in pieces if arm == "distilled")
    assert said.strip() == tokenizer.decode(whole, skip_special_tokens=True).strip()


def test_try_refuses_an_empty_text(run: pipeline.Run) -> None:
    with pytest.raises(RunError, match="the text is empty"):
        next(pipeline.try_text(run.path, " \n"))


def test_who_stops_reading_stops_the_writing(run: pipeline.Run) -> None:
    pieces = pipeline.try_text(run.path, "say emu", max_new_tokens=400)
    next(pieces)
    pieces.close()
    alive = [t for t in threading.enumerate() if t is not threading.main_thread() and "write" in t.name]
    assert not alive


def test_show_needs_no_weights(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LM, "load", None)
    shown = pipeline.show(recipe(job), 0)
    assert shown["split"] == "train" and shown["completion"] is None
    given = pipeline.show(recipe(job, completions={"source": "data"}), 0)
    assert given["completion"][-1][0] == "</s>"
    with pytest.raises(DataError, match="0 to 23"):
        pipeline.show(recipe(job), 24)


@pytest.mark.parametrize("key", ["queries__data", "eval__data", "context__demos"])
def test_missing_data_is_said_before_the_model_is_asked_for(job: Path, key: str) -> None:
    r = recipe(job, model__name="no/such-model", **{key: "missing.jsonl"})
    for command in (pipeline.show, pipeline.gate):
        with pytest.raises(DataError, match=r"there is no file .*missing\.jsonl"):
            command(r)


def test_the_gate_stops_and_can_be_told_not_to(job: Path) -> None:
    with pytest.raises(GateError, match="nothing to teach"):
        pipeline.distill(recipe(job, gate={"min_kl": 100.0}), job / "run")
    assert not (job / "run" / "adapter").exists()
    # what the message advises works: the same folder, no --resume needed
    told = pipeline.distill(recipe(job, gate={"min_kl": 100.0, "on_fail": "warn"}), job / "run")
    assert told.evaluation["gate"]["verdict"] == "nothing to teach"
    assert told.adapter.is_dir()
    low = recipe(job, gate={"min_kl": 0.0, "min_gain": -1.0})  # the stored scores are judged by what is asked now
    assert pipeline.distill(low, job / "run", resume=True).evaluation["gate"]["verdict"] == "teach"
    verdict = pipeline.gate(recipe(job, gate={"min_kl": 100.0}))
    assert verdict["verdict"] == "nothing to teach" and verdict["fits"] and verdict["window"] == 512
    assert verdict["estimate"]["seconds"] > 0 and verdict["estimate"]["memory_mb"] > 0


def test_without_held_out_data_queries_are_split(job: Path) -> None:
    raw = tiny.recipe_dict(job)
    raw["eval"] = {"max_new_tokens": 6, "latency_rows": 0, "share": 0.25}
    made = pipeline.distill(Recipe.from_dict(raw, base_dir=job), job / "run")
    counts = json.loads((job / "run/recipe.json").read_text())["rows"]
    assert counts["eval"] == 4 and counts["train"] + counts["validation"] == 12
    assert made.evaluation["kl_closed"] is not None


def test_no_held_out_share_names_the_key(job: Path) -> None:
    with pytest.raises(DataError, match="no rows are left for eval") as caught:
        pipeline.show(recipe(job, eval__data=None, eval__share=0.0))
    assert "eval.share = 0" in caught.value.found
    assert "eval.share" in caught.value.fix and "eval.data" in caught.value.fix


def test_layers_that_are_not_there_cost_no_labelling(job: Path) -> None:
    with pytest.raises(ModelError, match=r"(?s)names no layer.*found: q_prj"):
        pipeline.distill(recipe(job, lora__targets=["q_prj"]), job / "run")
    assert not (job / "run").exists()


def test_a_folder_belongs_to_one_recipe(run: pipeline.Run) -> None:
    job = run.path.parent
    with pytest.raises(RunError, match="already holds a run"):
        pipeline.distill(recipe(job), run.path)
    with pytest.raises(RunError, match=r"(?s)belongs to another recipe.*found: +train.seed: 0 there, 7 here\n"):
        pipeline.distill(recipe(job, train__seed=7, cost__machine_hour=3.0), run.path, resume=True)
    (job / "mine").mkdir()
    (job / "mine/thesis.txt").write_text("x")
    with pytest.raises(RunError, match="not a run folder"):
        pipeline.distill(recipe(job), job / "mine")
    with pytest.raises(RunError, match="does not exist"):
        pipeline.evaluate(job / "nowhere")


def test_an_adapter_of_another_base_is_refused(run: pipeline.Run, tmp_path: Path) -> None:
    other = LM.load(ModelSection(name=str(tiny.save(tmp_path / "other", seed=9))))
    with pytest.raises(ModelError, match="made for another base"):
        other.load_adapter(run.adapter)


def test_what_does_not_fit_is_refused_before_anything_slow(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LM, "hidden", None)
    with pytest.raises(FitError, match=r"(?s)at most 512 tokens.*queries.jsonl"):
        pipeline.distill(recipe(job, context__system="word " * 100), job / "run")
    raw = recipe(job)
    tiny.write_jsonl(job / "eval.jsonl", [{"prompt": "say " + "x" * 600, "answer": "X"}])
    with pytest.raises(FitError, match="eval") as caught:
        pipeline.distill(raw, job / "run")
    assert "eval.jsonl:1" in caught.value.found and "shorten or remove that row" in caught.value.fix


def test_overlap_and_duplicates_are_refused_or_dropped_and_counted(job: Path) -> None:
    made = recipe(job)
    tiny.write_jsonl(
        job / "eval.jsonl", [{"prompt": "Say  ANT", "answer": "ANT"}, {"prompt": "please say elk", "answer": "ELK"}]
    )
    with pytest.raises(DataError, match=r"eval\.jsonl:1"):
        prepare(made)
    raw = tiny.recipe_dict(job, queries__duplicates="drop")
    with open(job / "queries.jsonl", "a") as file:
        file.write(json.dumps({"prompt": "say ant!"[:-1], "answer": "ANT"}) + "\n")
    _, _, data = prepare(Recipe.from_dict(raw, base_dir=job))
    assert data.counts["dropped_duplicates"] == 1


def test_a_full_disk_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="the disk is full"):
        write_atomic(tmp_path / "a.json", "{}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        OSError("100000 requested and 16352 written"),  # numpy's, in a GGUF file
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_known_whoever_writes(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(RunError, match=f"the disk is full: cannot write {tmp_path}"), writing(tmp_path):
        raise error
    with pytest.raises(RunError, match="the disk is full"), loading("a model that is converted into the cache"):
        raise error


def test_two_processes_cannot_share_a_folder(job: Path) -> None:
    first, second = RunDir(job / "run"), RunDir(job / "run")
    first.claim("x", resume=False)
    with pytest.raises(RunError, match=f"in use by process {os.getpid()}"):
        second.claim("x", resume=True)
    first.release()
    second.claim("x", resume=True)
    second.release()


KILLED = """
import sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from ctxdistill import Recipe, distill
def slow(stage, done, total):
    print(stage, done, flush=True)
    time.sleep(0.02)
distill(Recipe.load(sys.argv[1]), sys.argv[2], resume=True, progress=slow)
"""


def test_killed_at_any_moment_and_resumed_gives_the_same_bits(job: Path) -> None:
    import tomllib

    raw = tiny.recipe_dict(job, completions={"temperature": 0.8, "max_new_tokens": 6}, lora={"rank": 4, "dropout": 0.1})
    lines = []
    for section, values in raw.items():
        if isinstance(values, dict):
            lines += [f"[{section}]", *(f"{k} = {json.dumps(v)}" for k, v in values.items())]
    (job / "tiny.toml").write_text("\n".join(lines))
    assert tomllib.loads((job / "tiny.toml").read_text())["lora"]["rank"] == 4

    def start(out: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", KILLED, str(job / "tiny.toml"), str(out)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    straight = start(job / "straight")
    said, complaint = straight.communicate()
    assert straight.returncode == 0, complaint
    moments = [line.split() for line in said.splitlines()]
    random_ = random.Random(0)
    kills, stages = 0, set[str]()
    # a moment of labelling, two of training, one of evaluation, each at an unforeseen place in it
    for want in ("teacher", "train", "train", "evaluate distilled"):
        process = start(job / "broken")
        assert process.stdout
        after = random_.randint(1, 3)
        for line in process.stdout:
            if line.startswith(want):
                after -= 1
            if after == 0:
                time.sleep(random_.random() * 0.02)
                process.kill()
                kills += 1
                stages.add(want)
                break
        process.communicate()
    assert kills == 4 and len(moments) > 20
    final = start(job / "broken")
    _, complaint = final.communicate()
    assert final.returncode == 0, complaint
    name = "adapter/adapter_model.safetensors"
    assert (job / "straight" / name).read_bytes() == (job / "broken" / name).read_bytes()
    assert load_file(job / "straight" / name)
    a, b = (json.loads((job / d / "evaluation.json").read_text()) for d in ("straight", "broken"))
    assert a["kl_closed"] == b["kl_closed"]
    shutil.rmtree(job / "broken")


def test_a_stored_recipe_tells_what_was_given_from_defaults(job: Path) -> None:
    given = recipe(job)
    tiny.write_jsonl(job / "queries.jsonl", [{"prompt": f"say {n}"} for n in "abcdefghijkl"])  # without answers
    done = pipeline.distill(given, job / "run")
    stored = stored_recipe(RunDir(done.path))
    assert stored.to_dict() == given.to_dict()
    assert explicit(stored) == explicit(given)
    assert pipeline.evaluate(done.path)["rows"] == 8


@pytest.mark.parametrize(("small", "folder"), [(False, "runs/demo"), (True, "runs/demo-small")])
def test_each_demo_has_a_folder_of_its_own(small: bool, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []
    monkeypatch.setattr(pipeline, "distill", lambda recipe, out, **_: seen.append(out))
    pipeline.demo(small=small)
    pipeline.demo("here", small=small)
    assert list(map(str, seen)) == [folder, "here"]
