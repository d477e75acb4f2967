"""The stacks that an export is served with, each behind the same two questions: which prompt, and which answer.

In: an export's folder, or the address of a server. Out: for a request, the prompt's token ids as the stack makes them, and its
greedy answer with the probabilities of the likeliest next tokens at each position. Invariant: a stack is asked as its
clients ask it (messages, or a text), never with ids that were made here, so that what it adds by itself is seen.

Dimensions: V vocabulary, K likeliest tokens.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from ctxdistill import files
from ctxdistill.adapters import settings_of
from ctxdistill.endpoint import WRONG, opener_of
from ctxdistill.errors import ModelError, RunError, redact
from ctxdistill.messages import Message
from ctxdistill.weights import loading, quiet_peft

Request = list[Message] | str
"""Messages for the stack's chat template, or a text."""
TOP = 20
"""Likeliest tokens to ask a server for: the most that OpenAI's interface allows."""
START_SECONDS = 120


@dataclass(frozen=True)
class Answer:
    """A stack's greedy answer."""

    ids: list[int]
    """Its tokens, the end token among them if the stack tells it."""
    top: list[tuple[torch.Tensor, torch.Tensor]]
    """For each token: ids [K] and log-probabilities [K] of the likeliest at its position, all [V] where the stack gives them."""
    text: str
    ended: bool
    """By itself, not by the limit."""
    prompt_tokens: int
    """As the stack counts them."""


class Runtime(Protocol):
    """A stack that serves an export."""

    name: str

    def prompt_ids(self, request: Request) -> list[int] | None:
        """The prompt as the stack makes it; None where it only counts."""

    def answer(self, request: Request, limit: int, *, base: bool = False) -> Answer | None:
        """The greedy answer of at most `limit` tokens, with the adapter or (`base`) without, where the stack can do both,
        else None."""


# -- transformers -----------------------------------------------------------------------------------------------------


@dataclass
class Transformers:
    """A PEFT folder or merged weights, loaded as the transformers documentation says."""

    name: str
    model: Any
    tokenizer: Any
    template_kwargs: dict[str, Any]
    add_special_tokens: bool

    @classmethod
    def load(cls, folder: Path, prompt: dict[str, Any], template_kwargs: dict[str, Any]) -> Transformers:
        """Raises `ModelError` when transformers cannot load the folder."""
        is_adapter = (folder / "adapter_config.json").is_file()
        if is_adapter:
            settings_of(folder)
        kind = AutoPeftModelForCausalLM if is_adapter else AutoModelForCausalLM
        with loading(str(folder)), quiet_peft():
            model = kind.from_pretrained(str(folder), dtype=torch.float32).eval()
            tokenizer = AutoTokenizer.from_pretrained(str(folder))
        name = "transformers with PEFT" if is_adapter else "transformers"
        return cls(name, model, tokenizer, template_kwargs, prompt["add_special_tokens"])

    def prompt_ids(self, request: Request) -> list[int]:
        if isinstance(request, str):
            return list(self.tokenizer(request, add_special_tokens=self.add_special_tokens)["input_ids"])
        return list(
            self.tokenizer.apply_chat_template(
                request, add_generation_prompt=True, return_dict=False, **self.template_kwargs
            )
        )

    @torch.no_grad()
    def answer(self, request: Request, limit: int, *, base: bool = False) -> Answer | None:
        if base:
            return None
        ids = self.prompt_ids(request)
        out = self.model.generate(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=limit, do_sample=False, output_logits=True, return_dict_in_generate=True,
            pad_token_id=self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0,
        )  # fmt: skip
        written = out.sequences[0, len(ids) :].tolist()
        every = torch.arange(out.logits[0].shape[-1])
        top = [(every, logits[0].float().log_softmax(-1)) for logits in out.logits]  # [V], [V] each
        eos = self.model.generation_config.eos_token_id
        ended = written[-1] in (eos if isinstance(eos, list) else [eos])
        return Answer(written, top, self.tokenizer.decode(written, skip_special_tokens=True), ended, len(ids))


# -- servers ----------------------------------------------------------------------------------------------------------


@dataclass
class Endpoint:
    """A server with OpenAI's interface and log-probabilities: vLLM, llama-server, Ollama and others."""

    url: str
    """Without `/v1`."""
    tokenizer: Any
    """Turns the server's texts of tokens into ids."""
    model: str = ""
    """Empty: the `usual` one if the server lists it, else its first."""
    usual: str = ""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    stop: list[str] = field(default_factory=list)
    """Texts that end an answer in the text style."""
    name: str = ""
    lora: bool = False
    """A llama-server whose adapter can be switched off in a request."""

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/").removesuffix("/v1")
        self.name = self.name or redact(f"the server at {self.url}")
        found = self.call("/v1/models")
        with self.understood("/v1/models", found, '{"data": [{"id": the name of a model}, ...]}'):
            listed = [str(entry["id"]) for entry in found.get("data") or []]
        own = [name for name in listed if name.removesuffix(":latest") == self.usual]  # Ollama adds that
        self.model = self.model or [*own, *listed, "default"][0]

    def call(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Ask the server. Raises `RunError` when it cannot be reached or refuses."""
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
            with opener_of(self.url).open(request, timeout=600) as response:
                raw = response.read(files.MAX_JSON + 1)
            if len(raw) > files.MAX_JSON or not isinstance(answer := files.parse_json(raw.decode()), dict):
                raise ValueError("its answer is no object, or larger than 256 MB")
            return answer
        except urllib.error.HTTPError as error:
            found = f"{error.code} {error.read(300).decode(errors='replace')}"
            raise RunError(f"{self.name} refuses {path}", found=found) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            fix = "start the server, and give its address with --endpoint http://HOST:PORT"
            raise RunError(f"{self.name} does not answer", found=str(error), fix=fix) from None

    @contextlib.contextmanager
    def understood(self, path: str, answer: dict[str, Any], expected: str) -> Iterator[None]:
        """Inside, what is wrong with the form of the server's answer raises `RunError`."""
        try:
            yield
        except WRONG as error:
            raise RunError(
                f"{self.name} answers {path} in another form than OpenAI's interface",
                expected=expected,
                found=f"{json.dumps(answer)[:300]} ({type(error).__name__}: {error})",
                fix="use a newer version of the server, or check the export itself without --endpoint",
            ) from None

    def prompt_ids(self, request: Request) -> list[int] | None:
        chat = {"messages": request, "chat_template_kwargs": self.template_kwargs}
        with contextlib.suppress(RunError, *WRONG):  # llama-server
            text = request if isinstance(request, str) else self.call("/apply-template", chat)["prompt"]
            body = {"content": text, "prompt": text, "model": self.model, "add_special": True, "parse_special": True}
            return [int(i) for i in self.call("/tokenize", body)["tokens"]]
        with contextlib.suppress(RunError, *WRONG):  # vLLM
            body = {**chat, "model": self.model, "add_generation_prompt": True}
            return [int(i) for i in self.call("/tokenize", body)["tokens"]]
        return None

    def answer(self, request: Request, limit: int, *, base: bool = False) -> Answer | None:
        if base and not self.lora:
            return None
        body: dict[str, Any] = {"model": self.model, "temperature": 0, "max_tokens": limit, "seed": 0}
        if self.lora:
            body["lora"] = [{"id": 0, "scale": 0.0 if base else 1.0}]
        if isinstance(request, str):
            path, body = "/v1/completions", {**body, "prompt": request, "logprobs": TOP, "stop": self.stop}
        else:
            more = {"chat_template_kwargs": self.template_kwargs} if self.template_kwargs else {}
            chat = {"messages": request, "logprobs": True, "top_logprobs": TOP}
            path, body = "/v1/chat/completions", {**body, **chat, **more}
        found = self.call(path, body)
        with self.understood(path, found, "choices with a text, finish_reason and logprobs; usage with prompt_tokens"):
            choice = found["choices"][0]
            if not choice.get("logprobs"):
                raise RunError(
                    f"{self.name} gives no log-probabilities",
                    expected="logprobs in each answer",
                    fix="use a newer version of the server, or check the export itself without --endpoint",
                )
            text = choice["text"] if isinstance(request, str) else choice["message"]["content"]
            positions = entries(choice["logprobs"])
            return Answer(
                ids=[self.id_of(chosen) for chosen, _ in positions],
                top=[self.known(top) for _, top in positions],
                text=str(text or ""),
                ended=choice["finish_reason"] == "stop",
                prompt_tokens=int(found["usage"]["prompt_tokens"]),
            )

    def known(self, top: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids [K] and log-probabilities [K] of the tokens that can be told; the others stay in the rest."""
        pairs = {self.id_of(entry): entry["logprob"] for entry in top}
        pairs.pop(-1, None)
        return torch.tensor(list(pairs), dtype=torch.long), torch.tensor(list(pairs.values()), dtype=torch.float32)

    def id_of(self, entry: dict[str, Any]) -> int:
        """The id of a token as the server writes it; -1 if it cannot be told."""
        if "id" in entry:
            return int(entry["id"])
        return self.ids_by_text.get(entry["token"], -1)

    @functools.cached_property
    def ids_by_text(self) -> dict[str, int]:
        """Each token's text inside a sentence -> its id; texts of several tokens are left out, the same as parts of characters."""
        anchor = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        before = self.tokenizer.decode(anchor)
        texts = self.tokenizer.batch_decode([[*anchor, i] for i in range(len(self.tokenizer))])
        found: dict[str, int] = {}
        for i, text in enumerate(texts):
            piece = text.removeprefix(before)
            found[piece] = i if piece not in found and "\ufffd" not in piece else -1
        return found


def entries(logprobs: dict[str, Any]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """(chosen token, likeliest tokens) of each position, from either form of OpenAI's `logprobs`."""
    if logprobs.get("content") is not None:  # of the chat interface
        return [(entry, entry["top_logprobs"]) for entry in logprobs["content"]]
    tops = logprobs.get("top_logprobs") or [{}] * len(logprobs["tokens"])
    return [
        ({"token": token}, [{"token": text, "logprob": value} for text, value in (top or {}).items()])
        for token, top in zip(logprobs["tokens"], tops, strict=True)
    ]


# -- llama.cpp --------------------------------------------------------------------------------------------------------


def find_llama_server() -> str | None:
    """The `llama-server` program: `CTXDISTILL_LLAMA_SERVER`, else the one on the path."""
    return os.environ.get("CTXDISTILL_LLAMA_SERVER") or shutil.which("llama-server")


@contextlib.contextmanager
def llama_server(
    model: Path,
    adapter: Path | None,
    tokenizer: Any,
    *,
    context: int,
    template_kwargs: dict[str, Any] | None = None,
    stop: list[str] | None = None,
) -> Iterator[Endpoint]:
    """llama.cpp's server on the loopback, for as long as the block lasts.

    Raises: `ModelError` when there is no such program, or it cannot load the files.
    """
    program = find_llama_server()
    if program is None:
        raise ModelError(
            "llama-server is not installed",
            expected="llama.cpp's server on the path, or named by CTXDISTILL_LLAMA_SERVER",
            fix="install llama.cpp, or start a server with the export and check that: --endpoint http://HOST:PORT",
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [program, "-m", str(model), "--host", "127.0.0.1", "--port", str(port), "-c", str(context), "-np", "1",
               "--jinja", "-t", str(torch.get_num_threads())]  # fmt: skip
    command += ["--lora", str(adapter)] if adapter else []
    with tempfile.TemporaryFile() as log:
        try:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        except OSError as error:
            raise ModelError(f"cannot start {program}: {error.strerror}", fix="check CTXDISTILL_LLAMA_SERVER") from None
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process, log)
            yield Endpoint(
                f"http://127.0.0.1:{port}", tokenizer, template_kwargs=template_kwargs or {}, stop=stop or [],
                name="llama.cpp", lora=adapter is not None,
            )  # fmt: skip
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes], log: Any) -> None:
    """Return when the server says that it is ready. Raises `ModelError` with its last words when it ends or takes too long."""
    opener = opener_of(url)
    for _ in range(START_SECONDS * 10):
        with contextlib.suppress(OSError), opener.open(url, timeout=5) as response:
            if response.status == 200:
                return
        if process.poll() is not None:
            break
        time.sleep(0.1)
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines()
    wrong = [line for line in lines if "error" in line.lower() or "failed" in line.lower()] or lines
    raise ModelError("llama-server could not load the files", found="; ".join(wrong[-4:])[:600])
