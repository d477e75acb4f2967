"""Labels of a server and of vLLM: the local teacher's own, whatever happens on the way, or an error that says why not."""

from __future__ import annotations

import functools
import json
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from ctxdistill import engines, pipeline, runtimes
from ctxdistill.dataset import prepare
from ctxdistill.endpoint import Server
from ctxdistill.errors import CtxDistillError, ModelError, RecipeError
from ctxdistill.gguf_export import write_model
from ctxdistill.lm import LM
from ctxdistill.prompts import join
from ctxdistill.recipe import Recipe
from ctxdistill.rundir import RunDir
from ctxdistill.targets import Labelling, Target, TargetStore, label
from server import serve

K = 20
Reply = tuple[int, Any, dict[str, str]]
Spoil = Callable[[dict[str, Any], int], Any]
"""(the answer, how many requests came before) -> another body, or a whole reply."""


class Teacher:
    """Answers `/completions` as vLLM does, or (`ids_beside`) in the form of llama.cpp, from a tiny model."""

    def __init__(self, lm: LM, *, ids_beside: bool = False, spoil: Spoil | None = None, seconds: float = 0.0) -> None:
        self.lm, self.ids_beside, self.seconds = lm, ids_beside, seconds
        self.spoil = spoil or (lambda answer, number: answer)
        self.lock, self.under_way, self.most = threading.Lock(), 0, 0

    def __call__(self, body: dict[str, Any], number: int) -> Reply:
        with self.lock:
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        time.sleep(self.seconds)
        with self.lock, torch.no_grad():
            answer = self._given(body) if "prompt_logprobs" in body else self._written(body)
            self.under_way -= 1
        found = self.spoil(answer, number)
        return found if isinstance(found, tuple) else (200, found, {})

    def _logprobs(self, prompt: list[int], ids: list[int]) -> torch.Tensor:
        return self.lm.head(self.lm.hidden([join(prompt, ids)])[0]).log_softmax(-1)  # [T, V]

    def _written(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt, k = body["prompt"], body["logprobs"]
        ids = self.lm.generate(
            [prompt], max_new_tokens=body["max_tokens"], ends=lambda ids: ids[-1] in body["stop_token_ids"],
            temperature=body["temperature"], seeds=[body["seed"]],
        )[0]  # fmt: skip
        values, index = self._logprobs(prompt, ids).topk(k)  # [T, K]
        tops = [list(zip(i, v, strict=True)) for i, v in zip(index.tolist(), values.tolist(), strict=True)]
        if self.ids_beside:
            content = [
                {"id": i, "token": "?", "top_logprobs": [{"id": j, "token": "?", "logprob": v} for j, v in top]}
                for i, top in zip(ids, tops, strict=True)
            ]
            logprobs: dict[str, Any] = {"content": content}
        else:
            logprobs = {
                "tokens": [f"token_id:{i}" for i in ids],
                "top_logprobs": [{f"token_id:{j}": v for j, v in top} for top in tops],
            }
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(ids)}
        return {"choices": [{"logprobs": logprobs, "finish_reason": "stop"}], "usage": usage}

    def _given(self, body: dict[str, Any]) -> dict[str, Any]:
        ids = body["prompt"]
        values, index = self._logprobs(ids[:1], ids[1:]).topk(body["prompt_logprobs"])  # [L - 1, K]
        own = self._logprobs(ids[:1], ids[1:]).gather(1, torch.tensor(ids[1:])[:, None])  # [L - 1, 1]
        told: list[Any] = [None]
        for i, v, mine, token in zip(index.tolist(), values.tolist(), own.tolist(), ids[1:], strict=True):
            told.append({str(j): {"logprob": x, "rank": 1, "decoded_token": "?"} for j, x in zip(i, v, strict=True)})
            told[-1].setdefault(str(token), {"logprob": mine[0]})
        usage = {"prompt_tokens": len(ids), "completion_tokens": 1}
        return {"choices": [{"prompt_logprobs": told}], "usage": usage}


class Ready:
    """A recipe with a server, its rows, and a way to label them."""

    def __init__(self, folder: Path, url: str = "http://127.0.0.1:9/v1", **overrides: Any) -> None:
        self.folder = folder
        given = {"targets__kind": "topk", "targets__k": K, "teacher__engine": "server", "teacher__endpoint": url,
                 "teacher__endpoint_model": "big", "teacher__at_once": 3}  # fmt: skip
        self.raw = tiny.recipe_dict(folder, **(given | overrides))
        self.recipe = Recipe.from_dict(self.raw, base_dir=folder)
        self.lm, self.prompter, self.rows = prepare(self.recipe)
        self.run = RunDir(folder / "run")

    def label(self, name: str, *, asked: bool = True) -> list[Target]:
        ask = engines.labeller(self.recipe, self.lm, self.prompter, self.run) if asked else None
        store = TargetStore(self.folder / name)
        return [
            t for ts in label(self.lm, self.prompter, self.rows.pairs["train"], self.recipe, store, ask=ask) for t in ts
        ]


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that a client wanted to make; it makes none."""
    found: list[float] = []
    monkeypatch.setattr(engines, "Server", functools.partial(Server, wait=found.append))
    return found


def same(found: list[Target], wanted: list[Target]) -> None:
    assert len(found) == len(wanted) > 10
    for one, two in zip(found, wanted, strict=True):
        assert one.ids == two.ids and one.tensors.keys() == two.tensors.keys() == {"topk_logprobs", "topk_ids"}
        assert one.tensors["topk_ids"].dtype == torch.int32
        assert torch.allclose(one.tensors["topk_logprobs"], two.tensors["topk_logprobs"], atol=1e-4)
        assert torch.equal(one.tensors["topk_ids"], two.tensors["topk_ids"])


# -- what is asked and told -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids_beside", [False, True], ids=["vllm", "llama.cpp"])
def test_it_labels_what_the_local_teacher_labels(job: Path, ids_beside: bool) -> None:
    ready = Ready(job)
    teacher = Teacher(ready.lm, ids_beside=ids_beside, seconds=0.02)
    with serve(teacher) as (url, seen):
        ready = Ready(job, url)
        found = ready.label("asked")
    same(found, ready.label("own", asked=False))
    assert teacher.most == 3  # as many under way as at_once says, and no more
    assert len(seen) == len(found) and {r["path"] for r in seen} == {"/v1/completions"}
    body = seen[0]["body"]
    assert body["prompt"] in [list(p.teacher) for p in ready.rows.pairs["train"]]  # ids, not a text
    assert (body["model"], body["max_tokens"], body["logprobs"], body["stop_token_ids"]) == ("big", 6, K, [1])
    record = json.loads((ready.run / "teacher.json").read_text())
    assert record["rows"] == 4 and record["kl"] < 1e-5 and record["engine"] == f"big at {url}"


def test_given_completions_are_scored_and_only_they(job: Path) -> None:
    with serve(Teacher(Ready(job).lm)) as (url, seen):
        ready = Ready(job, url, completions__source="data")
        found = ready.label("asked")
    same(found, ready.label("own", asked=False))
    assert {(r["body"]["max_tokens"], r["body"]["prompt_logprobs"]) for r in seen} == {(1, K)}
    assert all(len(t.tensors["topk_ids"]) == len(t.ids) for t in found)  # nothing is kept of the prompt


def test_sampled_completions_have_seeds_of_their_own(job: Path) -> None:
    lm = Ready(job).lm
    with serve(Teacher(lm)) as (url, seen):
        ready = Ready(job, url, completions__temperature=1.0, completions__samples=2)
        found = ready.label("asked")
        again = Ready(job, url, completions__temperature=1.0, completions__samples=2).label("again")
    assert [t.ids for t in found] == [t.ids for t in again]
    assert len({r["body"]["seed"] for r in seen[: len(found)]}) == len(found)
    assert {r["body"]["temperature"] for r in seen} == {1.0}


def test_the_text_style_ends_where_the_teacher_would(job: Path) -> None:
    text: dict[str, Any] = {"context__system": None, "prompt__style": "text", "prompt__pattern": "Q: {prompt}\nA:",
            "prompt__answer_pattern": " {answer}", "completions__max_new_tokens": 24}  # fmt: skip
    free = Ready(job, **text, prompt__separator="zzz")
    said = "".join(free.prompter.text(t.ids) for t in free.label("free", asked=False))
    text["prompt__separator"] = max(filter(str.isascii, said), key=said.count)  # what this model writes often
    with serve(Teacher(free.lm)) as (url, seen):
        ready = Ready(job, url, **text)
        found = ready.label("asked")
    same(found, ready.label("own", asked=False))
    assert {r["body"]["max_tokens"] for r in seen} == {24} and {len(t.ids) for t in found} - {24}  # some are cut


# -- failures ---------------------------------------------------------------------------------------------------------


def test_what_may_pass_is_tried_again(job: Path, pauses: list[float]) -> None:
    bad: dict[int, Any] = {
        0: (429, "slow down", {"Retry-After": "17"}),
        2: (500, "oops", {}),
        5: (200, b"<html>garbage", {}),
        6: (200, b'{"choices": [', {"Content-Length": "9999"}),  # the connection breaks off
        8: (200, {"choices": []}, {}),
    }
    with serve(Teacher(Ready(job).lm, spoil=lambda answer, n: bad.get(n, answer))) as (url, seen):
        ready = Ready(job, url)
        found = ready.label("asked")
    same(found, ready.label("own", asked=False))
    assert 17.0 in pauses and len(pauses) == 5 and len(seen) == len(found) + 5


def test_a_server_that_dies_loses_nothing_that_was_labelled(job: Path, pauses: list[float]) -> None:
    lm = Ready(job).lm
    with serve(Teacher(lm, spoil=lambda answer, n: answer if n < 8 else (503, b"gone", {}))) as (url, _):
        ready = Ready(job, url, teacher__retries=1)
        with pytest.raises(ModelError, match="503: gone") as caught:
            ready.label("asked")
        assert "what was written so far is kept" in caught.value.fix and "teacher.endpoint" in caught.value.fix
    kept = len(TargetStore(job / "asked"))
    assert kept == 8
    with serve(Teacher(lm)) as (url, seen):  # elsewhere, and it goes on
        ready = Ready(job, url)
        found = ready.label("asked")
    assert len(seen) == len(found) - kept
    same(found, ready.label("own", asked=False))


def spoilt(change: Callable[[dict[str, Any]], None]) -> Spoil:
    """Change the first choice of every answer after the self-test's."""

    def spoil(answer: dict[str, Any], number: int) -> Any:
        if number >= 4:
            change(answer["choices"][0])
        return answer

    return spoil


def first_top(choice: dict[str, Any]) -> dict[str, Any]:
    return choice["logprobs"]["top_logprobs"][0]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda c: first_top(c).update({next(iter(first_top(c))): float("nan")}), "not finite"),
        (lambda c: first_top(c).update({next(iter(first_top(c))): float("-inf")}), "not finite"),
        (lambda c: first_top(c).pop(next(iter(first_top(c)))), f"{K - 1} log-probabilities"),
        (lambda c: first_top(c).update(dict.fromkeys(first_top(c), -0.5)), "probabilities that add up to 12.13"),
        (lambda c: first_top(c).update({"token_id:999999": 0.0}), "probabilities that add up to|outside of the 261"),
        (lambda c: c["logprobs"].update(tokens=["a"] * len(c["logprobs"]["tokens"])), "texts"),
        (lambda c: c.update(logprobs=None), "none"),
        (lambda c: c.update(token_ids=[7]), "tokens \\[7\\]"),
        (lambda c: c.update(prompt_token_ids=[0, 7]), "tokens"),
    ],
)
def test_what_cannot_be_is_an_error_with_the_row(
    job: Path, pauses: list[float], change: Callable[[dict[str, Any]], None], found: str
) -> None:
    with serve(Teacher(Ready(job).lm, spoil=spoilt(change))) as (url, _):
        ready = Ready(job, url, teacher__at_once=1)
        with pytest.raises(ModelError, match=f"cannot label row (?s:.*)found: .*({found})"):
            ready.label("asked")
    assert pauses == []  # asking again would not help
    assert len(TargetStore(job / "asked")) == 4


def test_a_prompt_that_the_server_adds_to_is_refused(job: Path) -> None:
    def longer(answer: dict[str, Any], number: int) -> Any:
        answer["usage"]["prompt_tokens"] += 1  # a second BOS, for example
        return answer

    with serve(Teacher(Ready(job).lm, spoil=longer)) as (url, _), pytest.raises(ModelError, match="as they were sent"):
        Ready(job, url).label("asked")


def test_the_self_test_stops_other_weights_before_anything_is_kept(job: Path, tmp_path_factory: Any) -> None:
    other = tiny.save(tmp_path_factory.mktemp("other"), seed=1)
    with serve(Teacher(LM.load(Ready(job).recipe.model.model_copy(update={"name": str(other)})))) as (url, seen):
        ready = Ready(job, url)
        with pytest.raises(ModelError, match=r"does not say what the local teacher says: KL \d") as caught:
            ready.label("asked")
        assert "by the engine and" in caught.value.found and "teacher.tolerance = 0.01" in caught.value.expected
        assert len(seen) == 4 and not (job / "asked" / "index.json").exists()
        Ready(job, url, teacher__tolerance=100.0).label("wanted")  # where the difference is wanted


def joined(answer: dict[str, Any]) -> dict[str, Any]:
    """The answer of a llama.cpp that tells two tokens as one, which ends as if it were whole."""
    content = answer["choices"][0]["logprobs"]["content"]
    content.pop(0)
    content[-1]["id"] = 1
    return answer


def test_rows_that_are_not_told_token_by_token_are_left_to_the_local_teacher(job: Path) -> None:
    spoil: Spoil = lambda answer, n: joined(answer) if n in (1, 7) else answer  # noqa: E731
    with serve(Teacher(Ready(job).lm, ids_beside=True, spoil=spoil)) as (url, _):
        ready = Ready(job, url)
        found = ready.label("asked")
    same(found, ready.label("own", asked=False))
    assert json.loads((ready.run / "teacher.json").read_text())["left"] == 2
    assert "2 rows were left to the local teacher" in engines.notes(ready.run)[0]


def test_a_kill_before_the_local_teacher_s_turn_is_resumed(
    job: Path, tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Joins(Teacher):
        """Does not tell some rows, however often they are asked for."""

        rows: set[tuple[int, ...]] = set()  # noqa: RUF012

        def _written(self, body: dict[str, Any]) -> dict[str, Any]:
            answer = super()._written(body)
            return joined(answer) if tuple(body["prompt"]) in self.rows else answer

    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    def attempt(lm: LM) -> list[Target]:
        with serve(Joins(lm, ids_beside=True)) as (url, _):
            return Ready(job, url, teacher__at_once=1).label("asked")

    def left() -> Any:
        return json.loads((job / "run" / "teacher.json").read_text()).get("left")

    ready = Ready(job, teacher__at_once=1)
    ask = engines.labeller(ready.recipe, ready.lm, ready.prompter, ready.run)
    order = Labelling(ready.lm, ready.prompter, ready.rows.pairs["train"], ready.recipe, ask=ask)
    assert order.batches == [(0, 8), (8, 13)]
    Joins.rows = {order.job(order.order[n]).pair.teacher for n in (2, 5, 9)}
    with monkeypatch.context() as patch:
        patch.setattr(Labelling, "_label", killed)
        with pytest.raises(KeyboardInterrupt):
            attempt(ready.lm)
    assert len(TargetStore(job / "asked")) == 6
    other = tiny.save(tmp_path_factory.mktemp("other"), seed=1)
    with pytest.raises(ModelError, match="does not say what the local teacher says"):  # it is still put to the test
        attempt(LM.load(ready.recipe.model.model_copy(update={"name": str(other)})))
    assert len(TargetStore(job / "asked")) == 8 and left() == 2
    same(attempt(ready.lm), ready.label("own", asked=False))
    assert left() == 3
    (job / "run" / "teacher.json").unlink()
    Joins.rows = {pair.teacher for pair in ready.rows.pairs["train"]}
    with (
        pytest.raises(ModelError, match="tells none of the first rows"),
        serve(Joins(ready.lm, ids_beside=True)) as (url, _),
    ):
        Ready(job, url).label("fresh")


def test_completions_that_end_elsewhere_are_left_to_the_local_teacher(job: Path) -> None:
    def short(answer: dict[str, Any], number: int) -> Any:
        if number == 6:  # stopped by an end token of its own, which it does not tell
            logprobs = answer["choices"][0]["logprobs"]
            logprobs.update(tokens=logprobs["tokens"][:2], top_logprobs=logprobs["top_logprobs"][:2])
            answer["usage"]["completion_tokens"] = 2
        return answer

    with serve(Teacher(Ready(job).lm, spoil=short)) as (url, _):
        ready = Ready(job, url)
        same(ready.label("asked"), ready.label("own", asked=False))
    assert json.loads((ready.run / "teacher.json").read_text())["left"] == 1


# -- the whole path ---------------------------------------------------------------------------------------------------


def test_a_run_is_labelled_by_a_server_and_evaluated_without(job: Path) -> None:
    with serve(Teacher(Ready(job).lm)) as (url, seen):
        ready = Ready(job, url, behaviour__unrelated=0, eval__latency_rows=0)
        run = pipeline.distill(ready.recipe, job / "run")
        labelled = len(seen)
    assert labelled == len(ready.rows.pairs["train"]) + len(ready.rows.pairs["validation"])
    assert any(note.startswith(f"labelled by big at {url}: KL to the local") for note in run.evaluation["notes"])
    assert 0 < run.evaluation["training"]["topk_mass"] < 1
    again = pipeline.evaluate(job / "run")  # nobody listens any more, and nobody need
    assert again["table"]["distilled"]["kl"] == run.evaluation["table"]["distilled"]["kl"]
    moved = Recipe.from_dict(
        {**ready.raw, "teacher": {**ready.raw["teacher"], "endpoint": "http://127.0.0.1:9/v1"}}, job
    )
    pipeline.distill(moved, job / "run", resume=True)  # where it was is no part of the run


# -- vLLM in this process ---------------------------------------------------------------------------------------------


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The part of vLLM's interface that is used, on a tiny model."""
    module = types.ModuleType("vllm")
    module.__version__ = "0.0"  # type: ignore[attr-defined]
    module.lm, module.options = None, {}  # type: ignore[attr-defined]

    class Engine:
        def __init__(self, **options: Any) -> None:
            module.options = options  # type: ignore[attr-defined]
            self.teacher = Teacher(module.lm)  # type: ignore[attr-defined]

        def generate(self, prompts: list[Any], params: list[Any], use_tqdm: bool) -> Iterator[Any]:
            for prompt, how in zip(prompts, params, strict=True):
                body = {"prompt": prompt["prompt_token_ids"], **vars(how)}
                if "prompt_logprobs" in body:
                    told = self.teacher._given(body)["choices"][0]["prompt_logprobs"]
                    parsed = [at and {int(i): types.SimpleNamespace(**e) for i, e in at.items()} for at in told]
                    yield types.SimpleNamespace(prompt_logprobs=parsed, outputs=[])
                else:
                    found = engines.written(self.teacher._written(body)["choices"][0]["logprobs"])
                    assert found
                    top = [{i: types.SimpleNamespace(logprob=v) for i, v in at.items()} for at in found.top]
                    yield types.SimpleNamespace(
                        outputs=[types.SimpleNamespace(token_ids=tuple(found.ids), logprobs=top)]
                    )

    module.LLM, module.SamplingParams = Engine, types.SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


@pytest.mark.parametrize("source", ["teacher", "data"])
def test_vllm_in_this_process(job: Path, fake_vllm: Any, source: str) -> None:
    local = {"teacher__engine": "vllm", "teacher__endpoint": None, "teacher__endpoint_model": None}
    ready = Ready(job, **local, completions__source=source)
    fake_vllm.lm = ready.lm
    same(ready.label("asked"), ready.label("own", asked=False))
    options = fake_vllm.options
    assert options["enable_prefix_caching"] and options["max_logprobs"] == K and options["max_num_seqs"] == 3
    assert options["model"] == str((job / "model").resolve()) and options["dtype"] == "float32"
    assert not options["trust_remote_code"]


def test_without_vllm_it_says_what_to_do(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    local = {"teacher__engine": "vllm", "teacher__endpoint": None, "teacher__endpoint_model": None}
    with pytest.raises(ModelError, match="vLLM is not installed") as caught:
        Ready(job, **local).label("asked")
    assert "ctxdistill[vllm]" in caught.value.fix


# -- llama.cpp itself -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    runtimes.find_llama_server() is None,
    reason="no llama-server: install llama.cpp, or name the program in CTXDISTILL_LLAMA_SERVER",
)
def test_llama_cpp_labels_what_the_local_teacher_labels(tmp_path: Path) -> None:
    job = tmp_path
    tiny.save(job / "model")
    table = job / "model" / "tokenizer.json"  # llama.cpp wants at least one merge
    tokenizer = json.loads(table.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["zz"] = vocabulary.pop("\u010a")  # in the place of a byte that does not occur
    tokenizer["model"]["merges"] = [["z", "z"]]
    table.write_text(json.dumps(tokenizer))
    weights = load_file(job / "model" / "model.safetensors")
    others = [i for piece, i in vocabulary.items() if not piece.isascii()]
    weights["lm_head.weight"][others] = 0.0  # so that it writes whole characters, which llama.cpp tells
    save_file(weights, job / "model" / "model.safetensors", {"format": "pt"})
    ready = Ready(job)
    write_model(job / "tiny.gguf", ready.lm.model, ready.lm.tokenizer, None, name="tiny", end=1)
    with runtimes.llama_server(job / "tiny.gguf", None, ready.lm.tokenizer, context=512) as server:
        ready = Ready(job, f"{server.url}/v1", teacher__at_once=1)
        found = ready.label("asked")
        given = Ready(job, f"{server.url}/v1", completions__source="data")
        with pytest.raises(ModelError, match="not of a text that is given to it") as caught:
            given.label("given")
    assert 'completions.source = "teacher"' in caught.value.fix
    own = ready.label("own", asked=False)
    assert [t.ids for t in found] == [t.ids for t in own]
    record = json.loads((ready.run / "teacher.json").read_text())
    assert record["kl"] < 1e-4 and record["rows"] == 4 and "left" not in record
    for one, two in zip(found, own, strict=True):
        assert (one.tensors["topk_logprobs"] - two.tensors["topk_logprobs"]).abs().max() < 0.01


# -- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ({"targets__kind": "hidden"}, 'needs targets.kind = "topk"'),
        ({"teacher__endpoint": None}, "belong together"),
        ({"teacher__endpoint": None, "teacher__endpoint_model": None}, "needs teacher.endpoint and"),
        ({"teacher__endpoint": "ftp://x"}, "teacher.endpoint: expected http"),
        ({"teacher__key_variable": "sk-123"}, "teacher.key_variable: expected the name"),
        ({"teacher__engine": "local"}, 'teacher.endpoint has no effect with teacher.engine = "local"'),
        ({"teacher__memory": 0.3}, "teacher.memory has no effect"),
        ({"completions__source": "label", "prompt__label_words": ["a", "b"]}, "does not choose labels"),
        ({"completions__extract": "x(.*)"}, "completions.extract asks the teacher twice"),
    ],
)
def test_recipes_that_cannot_be(job: Path, overrides: dict[str, Any], problem: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Ready(job, **overrides)
    assert problem in str(caught.value)


def test_a_key_that_is_not_set(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_KEY", raising=False)
    with pytest.raises(CtxDistillError, match=r"which teacher\.key_variable names"):
        Ready(job, teacher__key_variable="NO_KEY").label("asked")
