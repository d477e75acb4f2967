"""A run, loaded once, that answers many messages.

In: the folder of a finished run; texts, or queries that were held out. Out: what base model, teacher and student write,
piece by piece, what each answer took, and where student and teacher differ, token by token. Invariants: every answer is
greedy and written by `LM.generate`, or the likeliest of the recipe's label words as in the evaluation, with its prompt read
from the start, as a server without prefix cache does; the model is one request's at a time, and between two requests it is
as it was loaded.

Dimensions: T tokens of an answer, V vocabulary.
"""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ctxdistill import losses
from ctxdistill.accounts import forward_flops
from ctxdistill.dataset import read_rows, stored_recipe
from ctxdistill.errors import CtxDistillError
from ctxdistill.evaluate import ARMS
from ctxdistill.lm import LM, check_fit
from ctxdistill.prompts import Pair, Prompter, join
from ctxdistill.recipe import Recipe
from ctxdistill.rundir import RunDir
from ctxdistill.targets import score_labels

TOP = 5
"""Alternatives that are shown of each side at a token."""
KEPT = 64
"""Answers that are remembered: greedy, so asking again would give the same."""
CHUNK = 64
"""Positions whose logits are in memory at a time."""


@dataclass(frozen=True)
class Piece:
    """The next piece of an arm's answer."""

    arm: str
    text: str


@dataclass(frozen=True)
class Answer:
    """An arm's whole answer, and what it took."""

    arm: str
    text: str
    ids: tuple[int, ...]
    """With the end token, unless the limit came first."""
    prompt_tokens: int
    seconds: float
    flops: float
    """Of the whole request (`accounts.forward_flops`), the adapter not counted, since it can be merged."""
    ended: bool
    """Whether the model ended the answer itself."""


@dataclass(frozen=True)
class Token:
    """A token of the teacher's answer, and what both sides would have written there."""

    text: str
    kl: float
    """KL(teacher || student) of the next-token distributions, in nats."""
    teacher: tuple[tuple[str, float], ...]
    """The likeliest tokens with their probabilities, the first one first."""
    student: tuple[tuple[str, float], ...]


class Session:
    """A finished run with its model in memory."""

    def __init__(self, run: RunDir, recipe: Recipe, lm: LM) -> None:
        self.run, self.recipe, self.lm = run, recipe, lm
        self.prompter = Prompter(recipe, lm.tokenizer)
        self._busy = threading.Lock()
        self._known: OrderedDict[tuple[object, ...], Answer] = OrderedDict()

    @classmethod
    def load(cls, run: str | Path, before: Session | None = None) -> Session:
        """Load a finished run. `before`: a session that is no longer needed; its model is used again where it is the same.

        Raises: `RunError` or `ModelError` when the run is not finished or its model is not there; `before` then goes on
            as it was.
        """
        folder = RunDir.existing(run)
        recipe = stored_recipe(folder)
        if before is None or (before.recipe.model, before.recipe.base_dir) != (recipe.model, recipe.base_dir):
            lm = LM.load(recipe.model, recipe.base_dir)
            lm.load_adapter(folder / "adapter")
            return cls(folder, recipe, lm)
        with before._busy:
            lm = before.lm
            lm.remove_adapter()
            try:
                lm.load_adapter(folder / "adapter")
                return cls(folder, recipe, lm)
            except BaseException:
                lm.remove_adapter()
                lm.load_adapter(before.run / "adapter")
                raise

    @functools.cached_property
    def held_out(self) -> dict[str, Pair]:
        """The run's held-out rows by the text of their query; empty where their files are gone or are not what they
        were."""
        measured = {line["row"] for line in self.run.read_jsonl("scores.jsonl")}
        try:
            rows, section = read_rows(self.recipe, self.prompter, self.run.path)[0]["eval"]
        except CtxDistillError:
            return {}
        pairs = [self.prompter.pair(row, section) for row in rows if row.id in measured]
        return {pair.query: pair for pair in pairs}

    def pair(self, text: str) -> Pair:
        """Both prompts of a text, of the held-out row itself where it is one's query.

        Raises: `RecipeError` where the recipe's queries are more than a text.
        """
        return self.held_out.get(text) or self.prompter.pair_of_text(text)

    def answer(
        self, text: str, *, strength: float = 1.0, max_new_tokens: int | None = None
    ) -> Generator[Piece | Answer, None, None]:
        """Answer as base model, as teacher and as student at `strength`: pieces as they are written, and after the last
        piece of each arm its `Answer`. What was asked before comes from memory, in one piece. Where the recipe has label
        words, each arm chooses one of them, of any length.

        Raises: `FitError` when the prompt does not fit, `RecipeError` as `pair`.
        """
        pair = self.pair(text)
        labels = self.prompter.labels
        limit = max(map(len, labels.values()), default=max_new_tokens or self.recipe.eval.max_new_tokens)
        room = self.lm.window - len(pair.teacher)
        short = f"at most {room} max_new_tokens (--max-new-tokens)" if room > 0 and not labels else "shorten the text"
        check_fit([("your text", len(pair.teacher) + limit)], self.lm.window, "the prompt with its answer", short)
        for arm in ARMS:
            prompt = pair.teacher if arm == "in_context" else pair.student
            key = (arm, prompt, limit, strength if arm == "distilled" else None)
            if key in self._known:
                yield Piece(arm, self._known[key].text)
            else:
                answers = self._choose(arm, prompt, strength) if labels else self._write(arm, prompt, strength, limit)
                self._known[key] = yield from answers
                while len(self._known) > KEPT:
                    self._known.popitem(last=False)
            yield self._known[key]

    def _choose(self, arm: str, prompt: Sequence[int], strength: float) -> Generator[Piece, None, Answer]:
        """The label word that is likeliest after `prompt`, in one piece."""
        labels = self.prompter.labels
        with torch.no_grad(), self._busy, self.lm.adapter(arm == "distilled", strength):
            started = time.perf_counter()
            logprobs = score_labels(self.lm, [prompt], labels, prefix=None, batch_size=1).logprobs[0]  # [labels]
            seconds = time.perf_counter() - started
        word = list(labels)[int(logprobs.argmax())]
        yield Piece(arm, word)
        starts = {ids[:n] for ids in labels.values() for n in range(1, len(ids))}  # a tree, read behind the prompt
        flops = forward_flops(self.lm, len(prompt) + len(starts), projected=1 + len(starts))
        return Answer(arm, word, labels[word], len(prompt), seconds, flops, True)

    def _write(self, arm: str, prompt: Sequence[int], strength: float, limit: int) -> Generator[Piece, None, Answer]:
        """The answer to `prompt`, piece by piece. A reader who stops early stops the writing, too."""
        tokens: queue.SimpleQueue[int | float | BaseException] = queue.SimpleQueue()
        abandoned = threading.Event()

        def ends(ids: list[int]) -> bool:
            return abandoned.is_set() or self.prompter.ends(ids)

        def write() -> None:
            try:
                with self._busy, self.lm.adapter(arm == "distilled", strength):
                    started = time.perf_counter()
                    self.lm.generate([prompt], max_new_tokens=limit, ends=ends, on_token=tokens.put)
                    tokens.put(time.perf_counter() - started)
            except BaseException as error:  # handed to the reader
                tokens.put(error)

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        ids: list[int] = []
        shown = ""
        try:
            while isinstance(token := tokens.get(), int):
                ids.append(token)
                text = self.prompter.text(ids)
                if text.startswith(shown) and len(text) > len(shown) and not text.endswith("\ufffd"):
                    yield Piece(arm, text[len(shown) :])
                    shown = text
        finally:
            abandoned.set()
            writer.join()
        if isinstance(token, BaseException):
            raise token
        flops = forward_flops(self.lm, len(prompt) + len(ids) - 1, projected=len(ids))
        text, ended = self.prompter.text(ids), self.prompter.ends(ids)
        return Answer(arm, text, tuple(ids), len(prompt), token, flops, ended)

    @torch.no_grad()
    def differences(self, text: str, answer: Sequence[int], *, strength: float = 1.0) -> list[Token]:
        """Where the student at `strength` and the teacher differ, at each token of the teacher's `answer` to `text`."""
        pair = self.pair(text)
        with self._busy:
            with self.lm.adapter(False):
                teacher = self.lm.hidden([join(pair.teacher, answer)])[0]  # [T, d]
            with self.lm.adapter(True, strength):
                student = self.lm.hidden([join(pair.student, answer)])[0]  # [T, d]
            pieces = iter(self.prompter.pieces(answer))
            return [
                token
                for start in range(0, len(answer), CHUNK)
                for token in self._tokens(pieces, *(side[start : start + CHUNK] for side in (teacher, student)))
            ]

    def _tokens(self, pieces: Iterator[str], teacher: torch.Tensor, student: torch.Tensor) -> Iterator[Token]:
        """A `Token` for each position of hidden states [p, d]; takes its text from `pieces`."""
        logits = [self.lm.head(side) for side in (teacher, student)]  # [p, V] each
        kl = losses.divergence("forward_kl", logits[0], logits[1]).clamp(min=0).tolist()  # [p]
        best = [side.softmax(-1).topk(TOP) for side in logits]  # [p, TOP] each
        for position, value in enumerate(kl):
            sides = (
                tuple(zip(self.prompter.pieces(ids[position].tolist()), chances[position].tolist(), strict=True))
                for chances, ids in best
            )
            yield Token(next(pieces), value, *sides)
