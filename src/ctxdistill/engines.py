"""Somebody else than the local model labels: an OpenAI-compatible server, or vLLM in this process.

In: jobs, each a prompt's token ids and maybe those of a completion. Out: targets with the top-k log-probabilities at each
position of the completion. Invariants: token ids go out and come back, and those that come back are checked; before the first
target is kept, four rows are compared with the local teacher; what was told before a failure is kept; a row whose tokens are
not told one by one (llama.cpp joins those that are parts of one character) or that ends where the teacher would not is left
to the local teacher, and counted.

Dimensions: T positions of a completion, K likeliest tokens, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from ctxdistill import losses
from ctxdistill.endpoint import Server
from ctxdistill.errors import CtxDistillError, ModelError
from ctxdistill.lm import LM
from ctxdistill.prompts import Prompter, join
from ctxdistill.recipe import Recipe
from ctxdistill.rundir import RunDir
from ctxdistill.store import Target
from ctxdistill.targets import Job
from ctxdistill.weights import locate

log = logging.getLogger("ctxdistill")
ROWS = 4
"""Rows of the self-test."""
RECORD = "teacher.json"
"""In the run folder: who labelled, what the self-test found, how many rows were left to the local teacher."""
ENTRY_BYTES = 250
"""Most bytes of one token with its log-probability in a server's answer."""
MASS = 1e-3
"""How far the probabilities may be above 1 together: rounding."""


class Said(NamedTuple):
    """What an engine says of a completion."""

    ids: list[int]
    top: list[dict[int, float]]
    """For each of them the log-probabilities of the likeliest tokens at its position."""


@dataclass(frozen=True)
class Terms:
    """How completions are written and what is told of them."""

    k: int
    max_new_tokens: int
    temperature: float
    stops: list[int]
    """Token ids at which a completion ends."""


class Engine(Protocol):
    """Something that labels."""

    @property
    def name(self) -> str: ...

    def say(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Said | None]]:
        """What is said of each job, in any order; None where it cannot be told. Raises: `ModelError`, after the others."""


# -- a server ---------------------------------------------------------------------------------------------------------


@dataclass
class OpenAI:
    """`POST /completions` with token ids for a prompt."""

    server: Server
    terms: Terms
    at_once: int

    @property
    def name(self) -> str:
        return self.server.name

    def say(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Said | None]]:
        key, failures = self.server.key(), list[BaseException]()
        with ThreadPoolExecutor(self.at_once) as pool:
            # after a failure nothing more is asked; what is under way may still be kept
            asked = {pool.submit(lambda job: None if failures else self._one(job, key), job): job for job in jobs}
            try:
                for done in as_completed(asked):
                    try:
                        said = done.result()
                    except CtxDistillError as error:
                        failures.append(error)
                    else:
                        if said or not failures:
                            yield asked[done], said
            except BaseException as error:  # Ctrl-C, for example
                failures.append(error)
                raise
        if failures:
            raise failures[0]

    def _one(self, job: Job, key: str) -> Said | None:
        terms, prompt = self.terms, [*job.pair.teacher, *(job.ids or ())]
        body: dict[str, Any] = {"model": self.server.model, "prompt": prompt}
        if job.ids is None:
            body |= {
                "max_tokens": terms.max_new_tokens, "temperature": terms.temperature, "seed": int(job.key[:7], 16),
                "logprobs": terms.k, "stop_token_ids": terms.stops,
                "return_tokens_as_token_ids": True, "return_token_ids": True,  # of vLLM; llama.cpp does so unasked
            }  # fmt: skip
            tokens = terms.max_new_tokens
        else:
            body |= {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": terms.k}
            tokens = len(prompt)
        most = 1_000_000 + tokens * (terms.k + 2) * ENTRY_BYTES
        return self.server.ask("completions", body, lambda answer: self._read(answer, job, prompt), key=key, most=most)

    def _read(self, answer: dict[str, Any], job: Job, prompt: list[int]) -> Said | None:
        choice, usage = answer["choices"][0], answer["usage"]
        came = choice.get("prompt_token_ids") or prompt
        if came != prompt or usage["prompt_tokens"] != len(prompt):
            raise self._wrong(job, f"{len(prompt)} prompt tokens as they were sent", f"{usage['prompt_tokens']} tokens")
        if job.ids is not None:
            return self._given(choice.get("prompt_logprobs"), job, len(prompt))
        if not choice.get("logprobs"):
            raise self._wrong(job, "log-probabilities of the tokens that it writes (`logprobs`)", "none")
        said = written(choice["logprobs"])
        if said is None:
            raise self._wrong(job, "token ids beside the log-probabilities, as vLLM and llama.cpp tell them", "texts")
        whole = len(said.ids) == usage["completion_tokens"]
        if (own := choice.get("token_ids")) and own != said.ids:
            raise self._wrong(job, "log-probabilities of the tokens that it wrote", f"tokens {own} and {said.ids}")
        return said if whole else None

    def _given(self, told: list[dict[str, dict[str, float]] | None] | None, job: Job, length: int) -> Said:
        if not told:
            raise ModelError(
                f"{self.name} gives log-probabilities of tokens that it writes, not of a text that is given to it",
                expected="prompt_logprobs in its answer, as vLLM has them",
                found="none, as with llama.cpp",
                fix='let the teacher write: completions.source = "teacher"; or serve with vLLM, or label with '
                'teacher.engine = "local"',
            )
        assert job.ids is not None
        top = [{int(i): float(entry["logprob"]) for i, entry in (at or {}).items()} for at in told[-len(job.ids) :]]
        if len(told) != length or any(i not in at for i, at in zip(job.ids, top, strict=True)):
            raise self._wrong(job, f"log-probabilities of the {len(job.ids)} tokens that were sent", "other tokens")
        return Said(list(job.ids), top)

    def _wrong(self, job: Job, expected: str, found: str) -> ModelError:
        return ModelError(
            f"{self.name} cannot label row {job.pair.id}", expected=expected, found=found,
            fix="serve the model with vLLM or llama.cpp's llama-server; see docs/howto-labelling-server.md",
        )  # fmt: skip


def written(logprobs: Mapping[str, Any]) -> Said | None:
    """The tokens that a server wrote, from either form of OpenAI's `logprobs`; None where there are no token ids.

    llama.cpp tells ids beside the texts; vLLM, if asked, writes `token_id:17` in the place of the texts.
    """
    if (content := logprobs.get("content")) is not None:
        if any("id" not in at for entry in content for at in (entry, *entry["top_logprobs"])):
            return None
        top = [{at["id"]: float(at["logprob"]) for at in entry["top_logprobs"]} for entry in content]
        return Said([entry["id"] for entry in content], top)
    if not all(token.startswith("token_id:") for token in logprobs["tokens"]):
        return None

    def number(token: str) -> int:
        return int(token.removeprefix("token_id:"))

    top = [{number(token): float(value) for token, value in at.items()} for at in logprobs["top_logprobs"]]
    return Said([number(token) for token in logprobs["tokens"]], top)


# -- vLLM in this process ---------------------------------------------------------------------------------------------


@dataclass
class Vllm:
    """vLLM's offline engine. Its scheduler bounds what is under way."""

    llm: Any
    params: Any
    """`vllm.SamplingParams`"""
    terms: Terms
    name: str

    @classmethod
    def load(cls, recipe: Recipe, lm: LM, terms: Terms) -> Vllm:
        """Raises: `ModelError` when vLLM is not installed or cannot load the model."""
        try:
            import vllm
        except ImportError as error:
            raise ModelError(
                "vLLM is not installed", expected="the package vllm, for a GPU", found=str(error),
                fix="pip install 'ctxdistill[vllm]', or teacher.engine = \"server\" with a vLLM that runs elsewhere",
            ) from None  # fmt: skip
        source, _ = locate(recipe.model, recipe.base_dir)
        try:
            llm = vllm.LLM(
                model=str(source), revision=recipe.model.revision, dtype=lm.info["dtype"],
                trust_remote_code=recipe.model.trust_remote_code, max_model_len=lm.window, max_logprobs=terms.k,
                max_num_seqs=recipe.teacher.at_once, gpu_memory_utilization=recipe.teacher.memory,
                enable_prefix_caching=True, seed=0,
            )  # fmt: skip
        except (RuntimeError, ValueError, OSError) as error:
            raise ModelError(
                f"vLLM cannot load {recipe.model.name}", found=str(error).strip().split("\n")[0],
                fix="change teacher.memory (its share of the GPU), or label with teacher.engine = \"local\"",
            ) from error  # fmt: skip
        return cls(llm, vllm.SamplingParams, terms, f"vLLM {vllm.__version__}")

    def say(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Said | None]]:
        terms = self.terms
        params = [
            self.params(
                max_tokens=terms.max_new_tokens, temperature=terms.temperature, seed=int(job.key[:7], 16),
                logprobs=terms.k, stop_token_ids=terms.stops, detokenize=False,
            )
            if job.ids is None
            else self.params(max_tokens=1, temperature=0.0, prompt_logprobs=terms.k, detokenize=False)
            for job in jobs
        ]  # fmt: skip
        prompts = [{"prompt_token_ids": [*job.pair.teacher, *(job.ids or ())]} for job in jobs]
        for job, out in zip(jobs, self.llm.generate(prompts, params, use_tqdm=False), strict=True):
            if job.ids is None:
                ids, told = list(out.outputs[0].token_ids), out.outputs[0].logprobs
            else:
                ids, told = list(job.ids), out.prompt_logprobs[-len(job.ids) :]
            yield job, Said(ids, [{i: entry.logprob for i, entry in at.items()} for at in told])


# -- targets ----------------------------------------------------------------------------------------------------------


class Labeller:
    """`targets.Ask` for an engine, which is reached or started when the first job comes."""

    def __init__(self, recipe: Recipe, lm: LM, prompter: Prompter, run: RunDir) -> None:
        self.recipe, self.lm, self.prompter, self.run = recipe, lm, prompter, run
        self.section, self.at_once = recipe.teacher, recipe.teacher.at_once
        self.identity: list[Any] = [self.section.engine, self.section.endpoint_model]
        self.vocabulary = lm.model.get_output_embeddings().weight.shape[0]
        self.k = min(recipe.targets.k, self.vocabulary - 1)
        self._engine: Engine | None = None
        self._tested = False
        self._record: dict[str, Any] = run.read_json(RECORD) if (run / RECORD).is_file() else {}

    def __call__(self, jobs: Sequence[Job]) -> Iterator[Target]:
        """See `targets.Ask`. Raises: `ModelError` when the engine says something that cannot be, or fails the self-test."""
        self._engine = self._engine or self._start()
        done, tested = 0, list[tuple[Job, Target]]()
        if not self._tested:
            while len(tested) < ROWS and done < len(jobs):  # some may not be told
                some = jobs[done : done + ROWS - len(tested)]
                tested += self._targets(some)
                done += len(some)
            # a run that goes on may begin with rows that could not be told before
            if tested or not self._record:
                self._test(self._engine, tested)
                self._tested = True
            yield from (target for _, target in tested)
        yield from (target for _, target in self._targets(jobs[done:]))

    def left(self, rows: int) -> None:
        """See `targets.Ask`."""
        self._record["left"] = self._record.get("left", 0) + rows
        self.run.write_json(RECORD, self._record)

    def _start(self) -> Engine:
        c, section = self.recipe.completions, self.section
        ends = self.prompter.end if self.recipe.prompt.style == "chat" else ()
        stops = sorted({i for i in (*ends, self.lm.tokenizer.eos_token_id) if i is not None})
        terms = Terms(self.k, c.max_new_tokens, c.temperature, stops)
        if section.engine == "vllm":
            return Vllm.load(self.recipe, self.lm, terms)
        assert section.endpoint and section.endpoint_model  # the recipe is checked
        return OpenAI(
            Server(
                section.endpoint, section.endpoint_model, section.key_variable, section.retries, section.timeout,
                section="teacher",
            ),
            terms, self.at_once,
        )  # fmt: skip

    def _targets(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Target]]:
        assert self._engine is not None
        for job, said in self._engine.say(jobs):
            ids = None if said is None else self._ended(said.ids) if job.ids is None else said.ids
            if said is not None and ids:
                yield job, Target(job.key, tuple(ids), self._kept(job, said.top[: len(ids)]))

    def _ended(self, ids: list[int]) -> list[int] | None:
        """What the teacher would have written of `ids`; None where it would have gone on."""
        limit = self.recipe.completions.max_new_tokens
        found = next((n for n in range(1, len(ids) + 1) if self.prompter.ends(ids[:n])), 0)
        return ids[:found] if found else ids if len(ids) == limit else None

    def _kept(self, job: Job, top: Sequence[Mapping[int, float]]) -> dict[str, torch.Tensor]:
        """The `topk` tensors of a target. Raises: `ModelError` for what are no log-probabilities, and too few of them."""
        rows = [sorted(at.items(), key=lambda item: -item[1])[: self.k] for at in top]
        few = min(map(len, rows))
        problem = ""
        if few < self.k:
            problem = f"{few} log-probabilities at a position"
        elif not all(math.isfinite(value) for row in rows for _, value in row):
            problem = "a log-probability that is not finite"
        elif (most := max(math.fsum(math.exp(value) for _, value in row) for row in rows)) > 1 + MASS:
            problem = f"probabilities that add up to {most:.4g}"
        elif any(not 0 <= i < self.vocabulary for row in rows for i, _ in row):
            problem = f"a token id outside of the {self.vocabulary} of the model"
        if problem:
            assert self._engine is not None
            raise ModelError(
                f"{self._engine.name} cannot label row {job.pair.id}",
                expected=f"log-probabilities over the whole vocabulary of the {self.k} likeliest tokens",
                found=problem,
                fix=f"vLLM: start it with --max-logprobs {self.k}, and without --logprobs-mode; or lower targets.k; "
                "what was labelled so far is kept",
            )
        return {
            "topk_logprobs": torch.tensor([[value for _, value in row] for row in rows]),  # [T, K]
            "topk_ids": torch.tensor([[i for i, _ in row] for row in rows], dtype=torch.int32),  # [T, K]
        }

    @torch.no_grad()
    def _test(self, engine: Engine, tested: Sequence[tuple[Job, Target]]) -> None:
        """Compare with the local teacher, behind the same tokens."""
        if not tested:
            raise ModelError(
                f"{engine.name} tells none of the first rows token by token",
                expected="completions that end as the local teacher's do, and each of their tokens",
                fix='serve the same model, with its end tokens; or label with teacher.engine = "local"',
            )
        found: list[tuple[float, float, float, str]] = []  # KL, log-probability there and here, where
        for job, target in tested:
            with self.lm.adapter(False):
                logits = self.lm.head(self.lm.hidden([join(job.pair.teacher, target.ids)])[0]).cpu()  # [T, V]
            values, index = target.tensors["topk_logprobs"], target.tensors["topk_ids"].long()  # [T, K]
            kl = losses.topk_divergence("forward_kl", values, index, logits)  # [T]
            own = logits.log_softmax(-1).gather(1, index)  # [T, K]
            for t, nats in enumerate(kl.tolist()):
                token = self.lm.tokenizer.decode([int(index[t, 0])])
                where = f"after {t} tokens of row {job.pair.id}, for {token!r}"
                found.append((nats, float(values[t, 0]), float(own[t, 0]), where))
        mean, (_, there, here, where) = sum(f[0] for f in found) / len(found), max(found)
        if not mean <= self.section.tolerance:
            raise ModelError(
                f"{engine.name} does not say what the local teacher says: KL {mean:.4g} nats per token, "
                f"over {len(found)} tokens of {len(tested)} rows",
                expected=f"at most teacher.tolerance = {self.section.tolerance:g}",
                found=f"log-probability {there:.4f} by the engine and {here:.4f} by the local teacher, {where}",
                fix="serve the weights of model.name, in its precision, without anything that changes log-probabilities; "
                "raise teacher.tolerance where the difference is wanted (quantised weights, for example)",
            )
        self._record |= {
            "engine": engine.name,
            "rows": len(tested),
            "tokens": len(found),
            "kl": 0.0 if mean < 0 else mean,
        }
        self.run.write_json(RECORD, self._record)
        log.info("%s", described(self._record))


def labeller(recipe: Recipe, lm: LM, prompter: Prompter, run: RunDir) -> Labeller | None:
    """Who labels the training rows of a recipe; None for the local model."""
    return None if recipe.teacher.engine == "local" else Labeller(recipe, lm, prompter, run)


def described(record: Mapping[str, Any]) -> str:
    """What `RECORD` holds, in a sentence."""
    text = (
        f"labelled by {record['engine']}: KL to the local teacher {record['kl']:.2g} nats per token, over {record['tokens']} "
        f"tokens of {record['rows']} rows"
    )
    if left := record.get("left"):
        text += f"; {left} rows were left to the local teacher"
    return text


def notes(run: RunDir) -> list[str]:
    """For the reader of a report."""
    return [described(run.read_json(RECORD))] if (run / RECORD).is_file() else []
