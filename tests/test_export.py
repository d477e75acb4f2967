"""A finished run as files for serving stacks; on a tiny model."""

from __future__ import annotations

import json
import re
import resource
import shlex
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from ctxdistill import export as exports
from ctxdistill import pipeline
from ctxdistill.adapters import scale
from ctxdistill.cli import main
from ctxdistill.dataset import stored_recipe
from ctxdistill.errors import ModelError, RecipeError, RunError
from ctxdistill.lm import LM
from ctxdistill.recipe import ModelSection, Recipe
from ctxdistill.rundir import RunDir, no_progress
from ctxdistill.weights import quiet_peft

IDS = torch.arange(5, 29)[None]  # [1, 24]


@pytest.fixture(scope="module")
def made(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every format, exported once."""
    place = tmp_path_factory.mktemp("exports")
    return {name: exports.export(finished, name, place / name) for name in exports.FORMATS}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits  # [1, 24, V]


def student_of(run: Path, strength: float = 1.0) -> Any:
    lm = LM.load(ModelSection(name=str(run.parent / "model")))
    lm.load_adapter(run / "adapter")
    scale(lm.peft, strength)
    return lm.peft


def test_the_files_are_there_and_named_with_their_sizes(made: dict[str, dict[str, Any]]) -> None:
    names = {
        "peft": {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"},
        "merged": {
            "config.json",
            "model.safetensors",
            "generation_config.json",
            "tokenizer.json",
            "chat_template.jinja",
        },
        "gguf": {"tiny.gguf"},
        "gguf-adapter": {"tiny-adapter.gguf"},
        "ollama": {"tiny.gguf", "Modelfile"},
    }
    for form, wanted in names.items():
        folder = Path(made[form]["folder"])
        there = {p.name for p in folder.iterdir()}
        assert there >= wanted | {"README.md", "export.json"}
        assert made[form]["files"] == {n: (folder / n).stat().st_size for n in there - {"export.json"}}
        assert all(p.stat().st_mode & 0o044 for p in folder.iterdir())
        assert json.loads((folder / "export.json").read_text())["format"] == form


def test_each_says_how_to_serve_it(finished: Path, made: dict[str, dict[str, Any]]) -> None:
    base = finished.parent / "model"
    said = {form: [shlex.split(c) for c in found["serve"]] for form, found in made.items()}
    folder = {form: found["folder"] for form, found in made.items()}
    lora = ["--enable-lora", "--lora-modules", f"tiny={folder['peft']}", "--max-lora-rank", "8"]
    assert said["peft"] == [["vllm", "serve", str(base.resolve()), *lora], ["transformers", "serve", folder["peft"]]]
    assert said["merged"][0] == ["vllm", "serve", folder["merged"], "--served-model-name", "tiny"]
    assert said["gguf"] == [["llama-server", "-m", f"{folder['gguf']}/tiny.gguf", "--alias", "tiny"]]
    first, then = said["gguf-adapter"]
    assert first[:3] == ["ctxdistill", "export", str(finished)] and first[-1] in then[2]
    assert then[3:5] == ["--lora", f"{folder['gguf-adapter']}/tiny-adapter.gguf"]
    assert said["ollama"][0][-4:] == ["create", "tiny", "-f", "Modelfile"]
    assert all(
        found["request"] == {"messages": [{"role": "user", "content": "please say ant"}]} for found in made.values()
    )


@pytest.mark.parametrize("strength", [1.0, 0.25])
def test_peft_and_merged_are_the_student(finished: Path, tmp_path: Path, strength: float) -> None:
    want = logits(student_of(finished, strength))
    for form, kind in (("peft", AutoPeftModelForCausalLM), ("merged", AutoModelForCausalLM)):
        exports.export(finished, form, tmp_path / form, strength=strength)
        with quiet_peft():
            found = logits(kind.from_pretrained(str(tmp_path / form), dtype=torch.float32))
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    assert (want - logits(student_of(finished, 0.0))).abs().max() > 0.01
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "peft"))
    assert tokenizer.chat_template == tiny.TEMPLATE


def test_what_merging_and_rounding_cost_is_measured(finished: Path, made: dict[str, dict[str, Any]]) -> None:
    assert made["peft"]["merged"] is None
    exact, half = made["merged"]["merged"], made["gguf"]["merged"]
    assert exact["rows"] == 8 and exact["tokens"] == half["tokens"] > 8
    assert exact["kl"] < 1e-6 and exact["top1"] > 0.9
    assert half["kl"] < 1e-4
    assert exact["kl"] <= exact["kl_max"]


def test_a_gguf_of_no_strength_is_the_base(finished: Path, tmp_path: Path) -> None:
    exports.export(finished, "gguf", tmp_path / "base", strength=0.0)
    found = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "base" / "tiny.gguf").tensors}
    base = load_file(finished.parent / "model" / "model.safetensors")
    np.testing.assert_array_equal(
        found["blk.1.ffn_up.weight"], base["model.layers.1.mlp.up_proj.weight"].half().numpy()
    )


def test_the_strength_is_in_a_gguf_adapter(finished: Path, made: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    exports.export(finished, "gguf-adapter", tmp_path / "weak", strength=0.25)
    weak, full = (
        {t.name: t.data for t in gguf.GGUFReader(folder / "tiny-adapter.gguf").tensors}
        for folder in (tmp_path / "weak", Path(made["gguf-adapter"]["folder"]))
    )
    for name, tensor in full.items():
        np.testing.assert_allclose(weak[name], tensor * (0.25 if name.endswith("lora_b") else 1.0), rtol=1e-6)


def test_the_end_of_an_answer_ends_the_merged_model(made: dict[str, dict[str, Any]]) -> None:
    settings = json.loads((Path(made["merged"]["folder"]) / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [1]


def test_sampling_settings_that_the_base_does_not_use_are_left_out(finished: Path, tmp_path: Path) -> None:
    run = copied(finished, tmp_path)
    shutil.copytree(finished.parent / "model", tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    settings = json.loads(path.read_text()) | {"temperature": 0.9, "top_p": 0.6, "top_k": 7, "max_length": 99}
    path.write_text(json.dumps(settings))
    made = json.loads((run / "recipe.json").read_text())
    base = str(finished.parent / "model")
    (run / "recipe.json").write_text(json.dumps(made).replace(base, str(tmp_path / "model")))
    names = {"temperature", "top_p", "top_k"}
    for sampling in (False, True):
        path.write_text(json.dumps(settings | {"do_sample": sampling}))
        out = exports.export(run, "merged", tmp_path / "out")["folder"]
        found = json.loads((Path(out) / "generation_config.json").read_text())
        assert names & set(found) == (names if sampling else set())
        assert found["max_length"] == 99 and found["eos_token_id"] == [1]


# -- Ollama -----------------------------------------------------------------------------------------------------------


def filled(template: str, prompt: str) -> str:
    """A Go template with nothing but strings and the prompt, executed."""
    found = re.split(r'\{\{ (\.Prompt|"(?:[^"\\]|\\.)*") \}\}', template)
    assert not any("{{" in text for text in found[::2])
    return "".join(t if i % 2 == 0 else prompt if t == ".Prompt" else json.loads(t) for i, t in enumerate(found))


def template_of(text: str) -> str:
    found = re.search(r'TEMPLATE """((?:(?!""").)*)"""\n', text, re.DOTALL)
    assert found
    return found[1]


def test_the_modelfile_holds_the_exact_student_prompt(finished: Path, made: dict[str, dict[str, Any]]) -> None:
    text = (Path(made["ollama"]["folder"]) / "Modelfile").read_text()
    assert text.startswith("FROM ./tiny.gguf\n")
    prompt = json.loads((finished / "recipe.json").read_text())["student_prompt"]["text"]
    assert filled(template_of(text), "please say ant") == prompt.replace("{query}", "please say ant")
    assert 'PARAMETER stop """</s>"""\n' in text and "PARAMETER temperature 0\n" in text


def test_the_modelfile_leaves_out_the_bos_that_llama_cpp_adds(finished: Path, tmp_path: Path) -> None:
    run = RunDir(finished)
    made = run.read_json("recipe.json")
    job = exports.Job(run, stored_recipe(run), made, tmp_path, tmp_path, 1.0, no_progress)
    text = exports.modelfile(job, ["FROM ./x.gguf"], begins=True)
    assert "<s>" + filled(template_of(text), "hello") == made["student_prompt"]["text"].replace("{query}", "hello")


@pytest.mark.parametrize("text", ['say """ {{ .System }}', '"quoted"', "{{{{", "plain\n", '"'])
def test_nothing_in_a_prompt_can_leave_the_template(text: str) -> None:
    written = exports._literal(text)
    assert '"""' not in written and not written.startswith('"') and not written.endswith('"')
    assert filled(written, "") == text


def test_ollama_takes_one_text(finished: Path, tmp_path: Path) -> None:
    run = copied(finished, tmp_path)
    made = json.loads((run / "recipe.json").read_text())
    made["student_prompt"]["fields"] = ["{a}", "{b}"]
    (run / "recipe.json").write_text(json.dumps(made))
    with pytest.raises(RecipeError, match="one text"):
        exports.export(run, "ollama")


# -- the card ---------------------------------------------------------------------------------------------------------


def test_the_card_is_ready_for_the_hub(finished: Path, made: dict[str, dict[str, Any]]) -> None:
    evaluation = json.loads((finished / "evaluation.json").read_text())
    forms = (("peft", "peft"), ("merged", "transformers"), ("gguf", None), ("gguf-adapter", None), ("ollama", None))
    for form, library in forms:
        card = ModelCard.load(Path(made[form]["folder"]) / "README.md")
        assert card.data.base_model == "model" and card.data.library_name == library
        assert {"context-distillation", "ctxdistill"} <= set(card.data.tags)
        results = {r.metric_type: r for r in card.data.eval_results}
        for metric, want in (("kl_closed", evaluation["kl_closed"]), ("kl", evaluation["table"]["distilled"]["kl"])):
            assert results[metric].metric_value == pytest.approx(want["mean"])
            assert results[metric].metric_args["low"] == pytest.approx(want["low"])
            assert results[metric].metric_args["high"] == pytest.approx(want["high"])
            assert results[metric].metric_args["rows"] == 8
        assert str(finished.parent) not in card.content and made[form]["folder"] not in card.content
        assert "path/to/this/folder" in card.content
    assert ModelCard.load(finished / "adapter" / "README.md").data.library_name == "peft"


def test_the_card_of_another_strength_claims_no_results(finished: Path, tmp_path: Path) -> None:
    exports.export(finished, "peft", tmp_path / "half", strength=0.5)
    card = ModelCard.load(tmp_path / "half" / "README.md")
    assert not card.data.eval_results and "0.5 of its strength" in card.content


# -- folders ----------------------------------------------------------------------------------------------------------


def copied(run: Path, place: Path) -> Path:
    shutil.copytree(run, place / "run", ignore=shutil.ignore_patterns("targets", "checkpoints", ".lock"))
    return place / "run"


def test_a_folder_of_something_else_is_left_alone(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="something else"):
        exports.export(finished, "peft", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("out", [".", "..", "../here"])
def test_the_current_folder_is_not_replaced(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(RunError, match=f"{tmp_path}.* (is the current folder|holds something else)"):
        exports.export(finished, "peft", out)
    (tmp_path / "here" / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match=f"{tmp_path}.* holds something else"):
        exports.export(finished, "peft", out)
    assert exports.export(finished, "peft", "../here/new")["folder"] == str(tmp_path / "here" / "new")


def test_an_export_that_fails_leaves_the_old_one(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    exports.export(finished, "peft", out)
    before = (out / "export.json").read_bytes()

    def broken(job: exports.Job) -> list[str]:
        (job.out / "half.gguf").write_text("half")
        raise ModelError("no")

    monkeypatch.setitem(exports.FORMATS, "gguf", broken)
    with pytest.raises(ModelError):
        exports.export(finished, "gguf", out)
    assert (out / "export.json").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["out"]
    exports.export(finished, "gguf-adapter", out)
    assert not (out / "adapter_model.safetensors").exists()  # replaced, not mixed


@pytest.mark.parametrize("form", ["peft", "merged", "gguf"])
def test_a_disk_that_takes_no_more_is_an_error_that_helps(finished: Path, tmp_path: Path, form: str) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limit[1]))
    try:
        with pytest.raises(RunError, match=f"cannot write {tmp_path}"):
            exports.export(finished, form, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list(tmp_path.iterdir())


def test_a_damaged_adapter_is_called_so(finished: Path, tmp_path: Path) -> None:
    run = copied(finished, tmp_path)
    with open(run / "adapter" / "adapter_model.safetensors", "r+b") as file:
        file.truncate(500)
    for form in ("peft", "merged"):
        with pytest.raises(RunError, match="is damaged"):
            exports.export(run, form)


def test_a_run_without_an_adapter_has_nothing_to_export(finished: Path, tmp_path: Path) -> None:
    run = copied(finished, tmp_path)
    shutil.rmtree(run / "adapter")
    with pytest.raises(RunError, match="no adapter yet") as caught:
        exports.export(run, "peft")
    assert f"distill RECIPE --out {run} --resume" in caught.value.fix  # it was not loaded from a file


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("support.toml train.lr=1e-3", "support.toml train.lr=1e-3"),
        ("a.toml; rm -r x", "'a.toml;' rm -r x"),
        (None, "None"),
        ("a 'b", "RECIPE"),
    ],
)
def test_how_to_finish_a_run_names_its_recipe(finished: Path, tmp_path: Path, typed: str | None, told: str) -> None:
    run = copied(finished, tmp_path)
    made = json.loads((run / "recipe.json").read_text())
    (run / "recipe.json").write_text(json.dumps({**made, "typed": typed}))
    assert RunDir(run).finish == f"finish the run with `ctxdistill distill {told} --out {run} --resume`"


def test_a_model_that_llama_cpp_lacks_is_an_error_and_not_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.save(tmp_path / "model", "opt-125m")
    recipe = Recipe.from_dict(tiny.recipe_dict(tmp_path, train__epochs=1, eval__latency_rows=0), base_dir=tmp_path)
    run = pipeline.distill(recipe, tmp_path / "run").path
    capsys.readouterr()
    for form in ("gguf", "gguf-adapter", "ollama"):
        assert main(["export", str(run), "--format", form, "--json"]) == 2
        error = json.loads(capsys.readouterr().out)["error"]
        assert "'opt' cannot be written as GGUF" in error["message"] and "merged" in error["fix"]
    assert main(["export", str(run), "--format", "merged"]) == 0
    assert "vllm serve" in capsys.readouterr().out


# -- the hub ----------------------------------------------------------------------------------------------------------


class Hub:
    """What was asked of the hub."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        for name in ("create_repo", "upload_folder"):
            monkeypatch.setattr(HfApi, name, self._note(name))

    def _note(self, name: str) -> Any:
        def call(api: HfApi, *args: Any, **kwargs: Any) -> str:
            self.asked.append((name, {**kwargs, "args": args}))
            return "https://hub/owner/name"

        return call


def test_push_says_what_it_would_upload_and_does_not(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = Hub(monkeypatch)
    out = tmp_path / "out"
    assert main(["export", str(finished), "--format", "peft", "--out", str(out), "--push", "owner/name"]) == 0
    said = capsys.readouterr().out
    assert hub.asked == []
    assert "nothing is uploaded" in said and "owner/name" in said and "adapter_model.safetensors" in said
    assert "adapter_config.json names a base on this machine" in said and "start of the context" in said
    found = exports.push(out, "owner/name", really=True)
    assert [name for name, _ in hub.asked] == ["create_repo", "upload_folder"]
    assert hub.asked[0][1]["private"] is True and hub.asked[1][1]["folder_path"] == out
    assert found["uploaded"] == "https://hub/owner/name"
    assert set(found["files"]) == {p.name for p in out.iterdir()} - {"export.json"}
    assert hub.asked[1][1]["allow_patterns"] == list(found["files"])  # the manifest names places of this machine


def test_push_needs_a_name_and_an_export(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunError, match="is no export"):
        exports.push(finished, "owner/name")
    out = tmp_path / "out"
    assert main(["export", str(finished), "--format", "gguf-adapter", "--out", str(out), "--push", "a/b/c"]) == 2
    assert "is no name of a repository" in capsys.readouterr().err
    assert main(["export", str(finished), "--format", "peft", "--push-for-real"]) == 2
    assert "--push OWNER/NAME" in capsys.readouterr().err


def test_the_hub_out_of_reach_is_an_error_that_helps(finished: Path, tmp_path: Path) -> None:
    exports.export(finished, "gguf-adapter", tmp_path / "out")
    with pytest.raises(RunError, match="did not take owner/name") as caught:
        exports.push(tmp_path / "out", "owner/name", really=True)  # HF_HUB_OFFLINE is set in the tests
    assert "hf auth login" in caught.value.fix
