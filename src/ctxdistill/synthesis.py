"""The model writes queries from the context alone.

In: a recipe with `queries.synthesize`, its context, something that writes (the local model, or a server). Out: a file of
rows (query, kind of seed prompt, chunk, seed, attempt) for people to read and change, and beside it a summary: how many
candidates were rejected and why, how different the rest are. Invariants: a query comes from one chunk and is kept only if it
is well-formed and not nearly the same as a query, demonstration or held-out row before it; every rejected candidate is
counted; a file that is there is never overwritten unasked; an interrupted run goes on with what was written.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ctxdistill import rows as data
from ctxdistill.caches import Prefix
from ctxdistill.chunks import Chunk, quotas, sentences, split_document, words
from ctxdistill.endpoint import Endpoint
from ctxdistill.errors import DataError, RunError
from ctxdistill.lm import FEW, LM, check_fit
from ctxdistill.messages import Message
from ctxdistill.prompts import Prompter
from ctxdistill.recipe import Recipe, SynthesisSection
from ctxdistill.rows import Row, query_key
from ctxdistill.rundir import Progress, RunDir, fingerprint, no_progress, write_atomic
from ctxdistill.similar import Index, diversity

STAGE = "write queries"
TASK = "You write what people ask an assistant: one sentence, in the language of the text. This is what the assistant knows."
NAME = "queries.jsonl"
KINDS: dict[str, tuple[str, tuple[str, str]]] = {
    "question": (
        "Write one question that this answers: {focus}",
        ("How many paddles does the wheel of the mill have?", "Who owns the mill today?"),
    ),
    "summarise": (
        "Write one request for an overview of what this belongs to: {focus}",
        ("Give me a short overview of how the mill is built.", "Sum up who owned the mill."),
    ),
    "use": (
        "Write one question of a person who has a task for which this matters: {focus}",
        ("I want to build a model of the mill's wheel; how many paddles does it need?",
         "I would like to film inside the mill. Whom do I have to ask?"),
    ),
    "structure": (
        "Write one request for a list or a table of facts like this one: {focus}",
        ("List the parts of the mill and their numbers.", "Make a table of the mill's owners."),
    ),
    "contradict": (
        "Write one question of a person who has got this wrong: {focus}",
        ("The wheel of the mill has twelve paddles, doesn't it?", "Is it true that the mill belongs to a bank?"),
    ),
    "creative": (
        "Write one request for a poem, a story or a slogan about this: {focus}",
        ("Write a short poem about the wheel of the mill.", "Invent a slogan for the village that owns the mill."),
    ),
    "request": (
        "Write one message that a person would send to the assistant described above. It touches on this: {focus}",
        ("Could you tell me about the wheel of the mill?", "I need to reach whoever owns the mill."),
    ),
}  # fmt: skip
"""Kind -> seed prompt, where `{focus}` is a sentence of the chunk, and what is written for each of `SHOWN`."""
SHOWN = ("The wheel of the mill has 16 paddles.", "Today the mill belongs to the village of Aldermoor.")
"""Sentences for which every kind shows what is wanted; a small model does not follow the seed prompt alone."""
BORROWED = {"mill", "mills", "paddle", "paddles", "aldermoor"}
"""Words by which a query is known to be about the examples and not about the chunk."""
WITH_DOCUMENTS = ("question", "summarise", "use", "structure", "contradict", "creative")
WITHOUT = ("request", "question", "use", "contradict", "creative")
POINTS = re.compile(
    r"\b(?:the|this|that|given|following|above) (?:text|passage|paragraph|excerpt|sentence)\b", re.IGNORECASE
)
"""A query that speaks of a text which the student does not see."""


@dataclass(frozen=True)
class Candidate:
    """One attempt to write a query."""

    chunk: Chunk
    kind: str
    attempt: int
    """From 0, within the chunk."""
    seed: int
    messages: tuple[Message, ...]
    told: tuple[str, ...]
    """What the writer was told and shown; to say it again is no query."""


class Writer(Protocol):
    """Something that answers conversations: (text, whether it ended by itself) each."""

    @property
    def name(self) -> str: ...
    @property
    def identity(self) -> list[Any]: ...
    def write(self, conversations: Sequence[Sequence[Message]], seeds: Sequence[int]) -> list[tuple[str, bool]]: ...


@dataclass
class Local:
    """The recipe's own model as writer; a chunk is read once for all its candidates."""

    lm: LM
    prompter: Prompter
    section: SynthesisSection
    prefix: Prefix | None = None

    @property
    def name(self) -> str:
        return str(self.lm.info["name"])

    @property
    def identity(self) -> list[Any]:
        return [self.lm.fingerprint, self.section.temperature, self.section.max_new_tokens]

    def write(self, conversations: Sequence[Sequence[Message]], seeds: Sequence[int]) -> list[tuple[str, bool]]:
        tokenizer = self.lm.tokenizer
        if tokenizer.chat_template:
            kwargs = {**self.prompter.recipe.prompt.template_kwargs}
            prompts = [
                list(tokenizer.apply_chat_template(list(m), add_generation_prompt=True, return_dict=False, **kwargs))
                for m in conversations
            ]
        else:  # a base model goes on writing a text
            prompts = [
                list(tokenizer("\n\n".join(m["content"] for m in c) + "\n\n")["input_ids"]) for c in conversations
            ]
        limit = self.section.max_new_tokens
        check_fit(
            [(STAGE, len(p) + limit) for p in prompts], self.lm.window, "a chunk of the context with its seed prompt"
        )
        known = self.prefix.ids if self.prefix else ()
        if not known or any(tuple(p[: len(known)]) != known or len(p) <= len(known) for p in prompts):
            self.prefix = self.lm.prefix(prompts)
        stops = self.lm.stop_ids | set(self.prompter.end if self.prompter.recipe.prompt.style == "chat" else ())

        def ends(ids: list[int]) -> bool:
            query, whole = extract(tokenizer.decode(ids, skip_special_tokens=True), False)
            return ids[-1] in stops or bool(query and whole)  # what comes after it would not be read

        with self.lm.adapter(False):
            written = self.lm.generate(
                prompts,
                max_new_tokens=limit,
                ends=ends,
                temperature=self.section.temperature,
                seeds=seeds,
                prefix=self.prefix,
            )
        return [(tokenizer.decode(ids, skip_special_tokens=True), ids[-1] in stops) for ids in written]


@dataclass
class Remembered:
    """A writer whose texts are kept in a file until all are there: after an interruption at most one batch is asked for again."""

    writer: Writer
    folder: RunDir
    file: str
    known: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.known = {line["key"]: line["texts"] for line in self.folder.read_jsonl(self.file)}

    def write(self, conversations: Sequence[Sequence[Message]], seeds: Sequence[int]) -> list[tuple[str, bool]]:
        key = fingerprint([self.writer.identity, conversations, list(seeds)])
        if key not in self.known:
            self.known[key] = self.writer.write(conversations, seeds)
            self.folder.append(self.file, {"key": key, "texts": self.known[key]})
        return [(text, ended) for text, ended in self.known[key]]


# -- where it is ------------------------------------------------------------------------------------------------------


def queries_file(recipe: Recipe, folder: Path | None = None) -> Path:
    """The file of written queries: `synthesis.file`, or `queries.jsonl` in the run folder (default: `runs/NAME`)."""
    if recipe.synthesis.file:
        return recipe.path(recipe.synthesis.file)
    return (folder or Path("runs") / (recipe.name or "run")) / NAME


def summary_file(file: Path) -> Path:
    """What is known about how the file was written."""
    return file.with_name(f"{file.stem}.summary.json")


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def read_written(recipe: Recipe, file: Path) -> Sequence[Row]:
    """The rows of the file, checked like any data. Raises: `DataError` when it is not there."""
    if not file.is_file():
        raise DataError(
            f"the queries are not written yet: there is no {file}",
            expected="the file that `ctxdistill queries` writes",
            fix=f"ctxdistill queries {recipe.typed} (or distill, which writes them first)",
        )
    section = recipe.queries.model_copy(update={"data": str(file.resolve()), "skip": 0, "limit": 0})
    return data.read(section, recipe, "queries").rows


def described(recipe: Recipe, prompter: Prompter, file: Path) -> dict[str, Any]:
    """What the run's record says of the file: its hash, its summary, and whether either no longer fits."""
    sha = _sha256(file)
    found: dict[str, Any] = {"file": str(file), "sha256": sha, "held_out_by": recipe.synthesis.held_out}
    path = summary_file(file)
    if path.is_file():
        summary = RunDir(path.parent).read_json(path.name)
        found |= {
            k: summary[k] for k in ("wanted", "written", "candidates", "rejected", "kinds", "diversity", "writer")
        }
        found["edited_since"] = summary["sha256"] != sha
        found["context_changed_since"] = summary["context_sha256"] != prompter.fingerprint
    return found


# -- writing ----------------------------------------------------------------------------------------------------------


def write_queries(
    recipe: Recipe,
    prompter: Prompter,
    lm: LM | None,
    file: Path,
    known: Sequence[str],
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Write the file and its summary; returns the summary.

    Args:
        lm: the local model; not needed with an endpoint.
        known: queries, demonstrations and held-out rows that are given; nothing like them is written again.
    """
    s, started = recipe.synthesis, time.perf_counter()
    writer: Writer
    if s.endpoint and s.endpoint_model:
        writer = Endpoint(
            s.endpoint, s.endpoint_model, s.key_variable, s.retries, s.timeout,
            temperature=s.temperature, max_new_tokens=s.max_new_tokens,
        )  # fmt: skip
    elif lm is None:
        raise RuntimeError("a local writer needs the model")  # a bug, not the user's
    else:
        writer = Local(lm, prompter, s)
    partial = f".{file.name}.partial.jsonl"
    chunks = material(recipe, prompter)
    found = _Found(recipe, prompter, known)
    due = quotas(chunks, recipe.queries.synthesize, s.per_chunk)
    remembered = Remembered(writer, RunDir(file.parent), partial)
    for chunk, quota in zip(chunks, due, strict=True):
        _from_chunk(found, remembered, chunk, quota, progress, sum(due))
    summary = found.summary(chunks, due) | {
        "writer": writer.name, "context_sha256": prompter.fingerprint, "seconds": time.perf_counter() - started,
    }  # fmt: skip
    if not found.rows:
        raise DataError(
            f"none of {summary['candidates']} candidates became a query",
            expected="well-formed, different queries",
            found=", ".join(f"{reason} {n}" for reason, n in summary["rejected"].items()),
            fix="let a larger model write them (synthesis.endpoint), or write some yourself (queries.data)",
        )
    write_atomic(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found.rows))
    summary |= {"file": str(file), "sha256": _sha256(file)}
    write_atomic(summary_file(file), json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    (file.parent / partial).unlink(missing_ok=True)
    return summary


def material(recipe: Recipe, prompter: Prompter) -> list[Chunk]:
    """The chunks that queries are written from: of the documents (of the chunks that rows are bound to, where there are
    such, and then named by them, as `handbook.md:2:1`); without documents, of everything else that the context has."""
    c = prompter.context
    texts = {chunk.name: chunk.text for chunk in c.chunks} or dict(c.documents)
    if not texts:
        turns = [*c.messages, *prompter.demo_messages(c.demos)]
        messages = [f"{m['role']}: {m['content']}" for m in turns if m.get("content")]
        parts = [c.system or "", recipe.prompt.instruction, "\n".join(messages)]
        texts = {"context": "\n\n".join(part for part in parts if part.strip())}
    size = recipe.synthesis.chunk_tokens
    return [k for name, text in texts.items() for k in split_document(text, name, size, 0, prompter.count)]


def candidates(recipe: Recipe, prompter: Prompter, chunk: Chunk, first: int, n: int) -> list[Candidate]:
    """The attempts `first` to `first + n - 1` on a chunk: kinds in turn, each with another sentence of the chunk."""
    s = recipe.synthesis
    kinds = s.kinds or (WITH_DOCUMENTS if prompter.context.documents else WITHOUT)
    parts = sentences(chunk)
    random.Random(fingerprint([s.seed, chunk.name])).shuffle(parts)
    made = []
    for attempt in range(first, first + n):
        kind = kinds[attempt % len(kinds)]
        # every sentence gets every kind in the end: the shift lets kinds and sentences of equal number get past each other
        focus = parts[(attempt + attempt // math.lcm(len(kinds), len(parts))) % len(parts)]
        told, shown = KINDS[kind]
        turns = [
            m
            for sentence, query in zip(SHOWN, shown, strict=True)
            for m in ({"role": "user", "content": told.format(focus=sentence)}, {"role": "assistant", "content": query})
        ]
        messages = (
            {"role": "system", "content": f"{TASK}\n\n# {chunk.title}\n\n{chunk.text}"},
            *turns,
            {"role": "user", "content": told.format(focus=focus)},
        )
        seed = int(fingerprint([s.seed, chunk.name, kind, attempt])[:12], 16)
        made.append(Candidate(chunk, kind, attempt, seed, messages, (focus, *SHOWN, *shown)))
    return made


def _from_chunk(found: _Found, writer: Remembered, chunk: Chunk, quota: int, progress: Progress, total: int) -> None:
    """Ask for candidates about a chunk until it has its queries, or its attempts are used up."""
    recipe, attempt = found.recipe, 0
    most = math.ceil(quota * recipe.synthesis.attempts)
    while (missing := quota - found.by_chunk[chunk.name]) > 0 and attempt < most:
        n = min(recipe.targets.batch_size or FEW, max(2, math.ceil(1.5 * missing)), most - attempt)
        batch = candidates(recipe, found.prompter, chunk, attempt, n)
        texts = writer.write([c.messages for c in batch], [c.seed for c in batch])
        for candidate, (text, ended) in zip(batch, texts, strict=True):
            found.judge(candidate, text, ended, full=found.by_chunk[chunk.name] >= quota)
        attempt += n
        progress(STAGE, len(found.rows), total)


class _Found:
    """The queries so far, and what became of every candidate."""

    def __init__(self, recipe: Recipe, prompter: Prompter, known: Sequence[str]) -> None:
        self.recipe, self.prompter = recipe, prompter
        self.rows: list[dict[str, Any]] = []
        self.keys = {query_key(text) for text in known}
        self.index = Index()
        for text in known:
            self.index.add(text)
        self.given = len(known)
        self.tried: Counter[str] = Counter()  # kind -> candidates
        self.rejected: Counter[str] = Counter()
        self.by_kind: Counter[str] = Counter()
        self.by_chunk: Counter[str] = Counter()
        self.tried_chunk: Counter[str] = Counter()

    def judge(self, candidate: Candidate, text: str, ended: bool, *, full: bool) -> None:
        """Keep a candidate, or count why not."""
        self.tried[candidate.kind] += 1
        self.tried_chunk[candidate.chunk.name] += 1
        query, whole = extract(text, ended)
        reason = "not needed" if full else self.reason(query, whole, candidate)
        if reason:
            self.rejected[reason] += 1
            return
        self.keys.add(query_key(query))
        self.index.add(query)
        self.by_kind[candidate.kind] += 1
        self.by_chunk[candidate.chunk.name] += 1
        own = {"passage": candidate.chunk.name} if self.prompter.context.chunks else {}
        self.rows.append({
            self.recipe.queries.prompt: query, "kind": candidate.kind, self.recipe.context.chunk_column: self.bound(candidate),
            **own, "seed": candidate.seed, "attempt": candidate.attempt,
        })  # fmt: skip

    def bound(self, candidate: Candidate) -> str:
        """The chunk that the teacher will read with the query: the one that the passage is of, or the passage itself."""
        return candidate.chunk.source if self.prompter.context.chunks else candidate.chunk.name

    def reason(self, query: str, whole: bool, candidate: Candidate) -> str:
        """Why a candidate is no query; empty when it is one."""
        if not query:
            return "empty"
        if not whole:
            return "unfinished"
        if len(query.split()) < 3 and len(query) < 12:
            return "too short"
        if candidate.kind == "question" and not query.rstrip("\"'”’ ").endswith(("?", "？")):
            return "not a question"
        if POINTS.search(query):
            return "speaks of the text"
        echo = Index()
        for line in candidate.told:
            echo.add(line)
        if echo.nearest(query)[0] >= min(self.recipe.synthesis.similarity, 1.0):
            return "repeats its seed"
        if (BORROWED & set(words(query))) - set(words(candidate.chunk.text)):
            return "about the examples"
        if query_key(query) in self.keys:
            return "repeated"
        similarity, number = self.index.nearest(query)
        if similarity >= self.recipe.synthesis.similarity:
            return "nearly a given row" if number is not None and number < self.given else "nearly repeated"
        row = Row("", {self.recipe.queries.prompt: query, self.recipe.context.chunk_column: self.bound(candidate)}, "")
        try:
            self.prompter.check_no_leak(row, self.recipe.queries)
        except DataError:
            return "holds the context"
        return ""

    def summary(self, chunks: Sequence[Chunk], due: Sequence[int]) -> dict[str, Any]:
        texts = [row[self.recipe.queries.prompt] for row in self.rows]
        examples = [{"kind": row["kind"], "query": text} for row, text in zip(self.rows, texts, strict=True)]
        return {
            "wanted": self.recipe.queries.synthesize,
            "written": len(self.rows),
            "candidates": sum(self.tried.values()),
            "rejected": dict(self.rejected.most_common()),
            "kinds": {kind: {"written": self.by_kind[kind], "candidates": n} for kind, n in self.tried.items()},
            "chunks": {
                k.name: {
                    "tokens": k.tokens, "due": n, "written": self.by_chunk[k.name], "candidates": self.tried_chunk[k.name],
                }
                for k, n in zip(chunks, due, strict=True)
            },
            "diversity": diversity(texts),
            "examples": examples[:: max(1, len(texts) // 5)],
        }  # fmt: skip


def extract(text: str, ended: bool) -> tuple[str, bool]:
    """(the query that a candidate's text holds, whether it is whole): its first line without list marks, a label such as
    `Question:`, and the quotes around it; a line that only announces one is passed over."""
    lines = [line.strip() for line in text.strip().splitlines()]
    full = [i for i, line in enumerate(lines) if line]
    for i in full:
        line = re.sub(r"^(?:[-*•]|\d+[.)]|#+)\s+", "", lines[i])
        line = re.sub(
            r"^\**(?:[A-Za-z]+ ){0,2}(?:question|request|message|query|prompt|q)\**\s*\d*\s*[:：]\s*\**\s*",
            "",
            line,
            flags=re.I,
        )
        line = line.strip().strip("*_").strip()
        while len(line) > 1 and (line[0], line[-1]) in {('"', '"'), ("'", "'"), ("“", "”"), ("«", "»"), ("`", "`")}:
            line = line[1:-1].strip()
        if not line or (line.endswith((":", "：")) and i != full[-1]):
            continue
        return line, ended or i != full[-1]
    return "", True


def refuse_overwrite(file: Path, force: bool) -> None:
    """Raises: `RunError` for a file that is there, unless `force`."""
    if file.exists() and not force:
        raise RunError(
            f"{file} is there already, perhaps with changes of yours",
            fix="use it as it is, write to another file with --out, or replace it with --force",
        )
