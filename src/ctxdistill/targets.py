"""Fix the completion ids once, ask the teacher once, keep what the loss needs.

In: pairs of prompts, the model with its adapter off. Out: a `Target` per completion: its ids and what the teacher said
at each of its positions. Invariants: a row's key covers everything its target depends on; batches are formed from the whole
list and not from what is missing, so a labelling that is interrupted, or done in parts, gives the same bits as one that is
not; of a row that is not being labelled, 50 bytes are in memory.

What is kept (`targets.kind`): `hidden` the final hidden state [T, d], exact since teacher and student share the head;
`full` log-probabilities [T, V]; `topk` the largest log-probabilities and their ids [T, K], normalised over the whole
vocabulary before selection, so that 1 - sum is the tail mass.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import re
from array import array
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypedDict, Unpack

import numpy as np
import torch

from ctxdistill.caches import Prefix
from ctxdistill.errors import ModelError
from ctxdistill.lm import LM, check_finite, common_prefix
from ctxdistill.prompts import Pair, Prompter, join
from ctxdistill.recipe import CompletionsSection, Recipe, TargetsSection
from ctxdistill.rundir import Progress, fingerprint, no_progress
from ctxdistill.spool import Lazy
from ctxdistill.store import Keys, Target, TargetStore

HEAD = 64
"""Positions whose logits are in memory at a time when labels are scored."""
SHARED = 64
"""Tokens that rows must have in common, beyond what all have, to be labelled side by side."""
FILLS = 4
"""A batch that is filled to this part at least is worth a shared document: reading it costs more than rows that are missing."""
FLAT = 1e-6
"""Logits that differ by less are the same."""
FLIGHTS = 8
"""Rows of a shard from somebody else, in units of what they are asked at once: the last ones of a shard fly alone."""
TREE = 32
"""Tokens of a tree of labels that cost about as much as one more prompt in the batch."""


@dataclass(frozen=True)
class Job:
    """One completion to label."""

    pair: Pair
    key: str
    ids: tuple[int, ...] | None
    """The completion, where it is given; None where the teacher writes it or chooses a label."""


class Ask(Protocol):
    """Somebody else than the local model who labels."""

    identity: list[Any]
    """What its targets depend on beside the local model."""
    at_once: int

    def __call__(self, jobs: Sequence[Job]) -> Iterator[Target]:
        """The targets of `jobs` in any order, none for what it cannot tell."""

    def left(self, rows: int) -> None:
        """So many rows that it could not tell were labelled by the local model."""


class How(TypedDict, total=False):
    """What `Labelling` takes by name."""

    completions: CompletionsSection | None
    kind: TargetsSection | None
    written: Sequence[tuple[int, ...]] | None
    prefix: Prefix | None
    whole: bool
    ask: Ask | None


def label(
    lm: LM,
    prompter: Prompter,
    pairs: Sequence[Pair],
    recipe: Recipe,
    store: TargetStore,
    *,
    progress: Progress = no_progress,
    stage: str = "teacher",
    **how: Unpack[How],
) -> Sequence[list[Target]]:
    """Targets for every pair: `completions.samples` of them each, in the order of `pairs`. A target without ids stands for
    a completion in which `completions.extract` found no answer. See `Labelling` for what else it takes."""
    return Labelling(lm, prompter, pairs, recipe, **how).into(store, progress, stage)


class Labelling:
    """The completions to label, in batches. Of each it holds the key and its place in the order; the rest is made when
    its batch is due.

    Args:
        completions, kind: in the place of the recipe's, for rows that are evaluated and not trained on.
        written: completions that somebody else has written (the student), one for each pair, in the place of the
            rows' answers (`completions.source = "data"`).
        prefix: what all teacher prompts start with, if it has been read already.
        whole: take all of a completion in which no answer was found.
        ask: who labels in the place of the local model, which takes what they cannot tell.
    """

    def __init__(
        self,
        lm: LM,
        prompter: Prompter,
        pairs: Sequence[Pair],
        recipe: Recipe,
        *,
        completions: CompletionsSection | None = None,
        kind: TargetsSection | None = None,
        written: Sequence[tuple[int, ...]] | None = None,
        prefix: Prefix | None = None,
        whole: bool = False,
        ask: Ask | None = None,
    ) -> None:
        self.lm, self.prompter, self.pairs, self.written, self.whole = lm, prompter, pairs, written, whole
        self.completions, self.kind = completions or recipe.completions, kind or recipe.targets
        self.prefix, self.given, self.ask = prefix, prefix is not None, ask
        self.caches_well: bool | None = None  # not tried yet
        self.read: int | None = None  # the part whose start `prefix` is
        self.base = self._base()
        self.seed = recipe.train.seed if self.completions.temperature > 0 else 0
        self.samples = self.completions.samples
        raw, lengths = bytearray(), array("i")
        for i, pair in enumerate(pairs):
            for sample in range(self.samples):
                raw += bytes.fromhex(self._key(pair, self._given(i, pair), sample))
                lengths.append(len(pair.teacher))
        self.keys: Keys = np.frombuffer(bytes(raw), dtype="S16")  # [N], N = pairs x samples
        prompts = Lazy(range(len(self.keys)), self._prompt)
        first = len(common_prefix(prompts)) if prompts else 0
        tokens = max(lengths, default=0) + self.completions.max_new_tokens
        self.at_once = lm.rows_at_once(self.kind.batch_size, tokens, first)
        part = documents(prompts, first)[1]  # [N]
        count = np.bincount(part, minlength=1)
        # a document with rows for a good part of a batch has batches of its own, for all of which it is read once; to write
        # answers, every row of other batches reads its document itself
        self.own = np.where(FILLS * count[part] >= self.at_once, part, 0)
        order = np.lexsort((self.keys, np.frombuffer(lengths, dtype=np.int32), part))
        self.order = order[np.argsort(self.own[order], kind="stable")]  # [N]
        ends = np.flatnonzero(np.diff(self.own[self.order], append=-1)) + 1  # of the batches that share a document
        size = max(self.at_once, FLIGHTS * ask.at_once) if ask else self.at_once
        self.batches = [
            (first, min(first + size, end))
            for start, end in itertools.pairwise([0, *ends.tolist()])
            for first in range(start, end, size)
        ]

    def _base(self) -> str:
        """What all keys have in common."""
        c, kind = self.completions, self.kind
        base = fingerprint(
            [
                self.lm.fingerprint,
                self.prompter.end,
                c.model_dump(exclude={"checker"}),
                self.whole and c.extract,
                kind.kind,
                kind.k if kind.kind == "topk" else 0,
            ]
        )
        if self.ask:
            base = fingerprint([base, self.ask.identity])
        return fingerprint([base, self.prompter.labels]) if c.source == "label" else base

    def _given(self, i: int, pair: Pair) -> tuple[int, ...] | None:
        if self.completions.source != "data":
            return None
        return self.written[i] if self.written else self.prompter.completion(pair.answer or "")

    def _key(self, pair: Pair, ids: tuple[int, ...] | None, sample: int) -> str:
        return fingerprint([self.base, pair.teacher, ids, sample, self.seed])

    def key(self, number: int) -> str:
        """The key of completion `number`: sample `number % samples` of pair `number // samples`."""
        return digits(self.keys, number)

    def _prompt(self, number: int) -> tuple[int, ...]:
        return self.pairs[number // self.samples].teacher

    def job(self, number: int) -> Job:
        i = number // self.samples
        pair = self.pairs[i]
        return Job(pair, self.key(number), self._given(i, pair))

    def missing(self, batch: int, store: TargetStore) -> list[int]:
        """The completions of a batch that are not in the store."""
        return [n for n in self.order[slice(*self.batches[batch])].tolist() if self.key(n) not in store]

    def into(
        self, store: TargetStore, progress: Progress = no_progress, stage: str = "teacher"
    ) -> Sequence[list[Target]]:
        """Label all that is missing in `store`; the targets of each pair."""
        store.note_used(self.keys)  # before, so that nobody drops the first ones while the last ones are labelled
        with contextlib.closing(self.run(store)) as labelling:  # after an error at once, which keeps what was told
            for done in labelling:
                progress(stage, done, len(self.keys))
        return self.targets(store)

    def run(self, store: TargetStore, batches: Iterable[int] | None = None) -> Generator[int]:
        """Label what is missing in `batches` (all of them), a shard each; now and then, the number of completions behind it."""
        size = self.at_once
        for batch in range(len(self.batches)) if batches is None else batches:
            first, end = self.batches[batch]
            todo = [self.job(n) for n in self.missing(batch, store)]
            if todo and self.ask:
                todo = yield from self._asked(todo, store, first)
            with torch.no_grad(), self.lm.adapter(False):
                for i in range(0, len(todo), size):
                    self._prefix(int(self.own[self.order[first]]))
                    store.add(found := self._label(todo[i : i + size]))
                    if self.ask:
                        self.ask.left(len(found))
            yield end

    def _asked(self, jobs: Sequence[Job], store: TargetStore, behind: int) -> Generator[int, None, list[Job]]:
        """Keep what `ask` tells of `jobs`, also when it ends half-way; returns those of which it tells nothing."""
        assert self.ask
        told = dict[str, Target]()
        try:
            for target in self.ask(jobs):
                told[target.key] = target
                yield behind + len(told)
        finally:
            if told:
                store.add([told[job.key] for job in jobs if job.key in told])
        return [job for job in jobs if job.key not in told]

    def _prefix(self, part: int) -> None:
        """Read what the rows of a part start with, also when some are done: its length must not depend on what is left."""
        if self.given or self.read == part:
            return
        rows = np.flatnonzero(self.own == part) if part else range(len(self.keys))
        self.prefix = self.lm.prefix(Lazy(rows, self._prompt))
        self.read = part

    def prompt_tokens(self) -> int:
        """Tokens of prompts that are read for all completions: what the rows of a part start with once, the rest for each row."""
        total, writes = 0, self.completions.source == "teacher" and not self.completions.extract
        for number, part in enumerate(np.unique(self.own).tolist()):
            rows = np.flatnonzero(self.own == part)
            prompts = Lazy(rows, self._prompt)
            start = self.lm.shared(prompts if part else Lazy(range(len(self.keys)), self._prompt))
            total += start + sum(len(prompt) - start for prompt in prompts)
            if writes and number == 0:  # the first row is read again (`_agree`)
                total += len(self._prompt(int(self.order[0]))) - start
        return total

    def targets(self, store: TargetStore) -> Sequence[list[Target]]:
        """What the store holds for each pair, all being labelled."""
        keys, samples = self.keys, self.samples
        return Lazy(
            range(len(self.pairs)), lambda i: [store[digits(keys, n)] for n in range(i * samples, (i + 1) * samples)]
        )

    def _label(self, jobs: Sequence[Job]) -> list[Target]:
        """The targets of a batch: what is written is read once, while it is written."""
        lm, prompter, completions = self.lm, self.prompter, self.completions
        states: list[torch.Tensor] = []
        prompts: list[Sequence[int]] = [job.pair.teacher for job in jobs]
        given = [job.ids for job in jobs if job.ids is not None]
        if given:  # of one source: all of them or none
            ids = given
        elif completions.source == "label":
            size = self.at_once
            scores = score_labels(lm, prompts, prompter.labels, prefix=self.prefix, batch_size=size).logprobs
            words = list(prompter.labels.values())
            ids = [words[i] for i in scores.argmax(1).tolist()]
        else:
            seeds = [int(fingerprint([self.seed, job.key])[:15], 16) for job in jobs]
            written, states = lm.write(
                prompts,
                max_new_tokens=completions.max_new_tokens,
                ends=prompter.ends,
                temperature=completions.temperature,
                seeds=seeds,
                prefix=self.prefix,
            )
            ids = [tuple(row) for row in written]
            if completions.extract:
                prompts, ids = self._answers(prompts, ids)
                states = []
        found = [i for i, c in enumerate(ids) if c]
        if states and self._agree(join(prompts[0], ids[0]), states[0]):
            hidden = states
        else:
            hidden = lm.hidden([join(prompts[i], ids[i]) for i in found], self.prefix) if found else []
        check_teacher(lm, [jobs[i] for i in found], hidden)
        kept = {i: keep(lm, h, self.kind) for i, h in zip(found, hidden, strict=True)}
        return [Target(job.key, c, kept.get(i, {})) for i, (job, c) in enumerate(zip(jobs, ids, strict=True))]

    def _agree(self, row: tuple[Sequence[int], int], states: torch.Tensor) -> bool:
        """Whether the states [T, d] that a row was written with are those of reading it. One row is tried: what could be wrong is
        how a model's cache works, which is the same for all."""
        if self.caches_well is None:
            read = self.lm.hidden([row], self.prefix)[0]
            self.caches_well = self.lm.same(states, read)
        return self.caches_well

    def _answers(
        self, prompts: Sequence[Sequence[int]], written: Sequence[tuple[int, ...]]
    ) -> tuple[list[Sequence[int]], list[tuple[int, ...]]]:
        """What is scored, behind which prompt: the answers behind the teacher's thoughts, or all; () where none was found."""
        pattern = re.compile(self.completions.extract or "", re.DOTALL)
        before: list[Sequence[int]] = []
        ids: list[tuple[int, ...]] = []
        for prompt, row in zip(prompts, written, strict=True):
            parts = self.prompter.split_answer(row, pattern)
            if parts and self.completions.teach == "answer":
                before.append((*prompt, *parts[0]))
                ids.append(parts[1])
            else:
                before.append(prompt)
                ids.append(row if parts or self.whole else ())
        return before, ids


def digits(keys: Keys, number: int) -> str:
    """A key as 32 hex digits."""
    return keys[number : number + 1].tobytes().hex()


def documents(prompts: Sequence[Sequence[int]], first: int) -> tuple[list[tuple[int, ...]], np.ndarray[Any, Any]]:
    """What rows are put side by side by, so that a document that some of them share is read once for each batch: the
    `SHARED` tokens behind the `first` ones, which all rows start with.

    Returns: the parts that more than one row has, in order, () first; and for each prompt the number of its part, [N], 0
        where no other row has the same one.
    """
    raw = bytearray()
    for prompt in prompts:
        part = prompt[first : first + SHARED]
        raw += hashlib.sha256(str(part).encode()).digest()[:16] if len(part) == SHARED else bytes(16)
    found, where, inverse, count = np.unique(
        np.frombuffer(bytes(raw), dtype="S16"), return_index=True, return_inverse=True, return_counts=True
    )
    shared = [i for i in np.flatnonzero(count > 1).tolist() if found[i] != b""]
    parts = {i: tuple(prompts[int(where[i])][first : first + SHARED]) for i in shared}
    number = np.zeros(len(found), dtype=np.int64)
    for place, i in enumerate(sorted(shared, key=lambda i: parts[i]), 1):
        number[i] = place
    return [(), *sorted(parts.values())], number[inverse]


def check_teacher(lm: LM, jobs: Sequence[Job], hidden: Sequence[torch.Tensor]) -> None:
    """Raise `ModelError` where the teacher's hidden states [T, d] of `jobs` are not finite, or say nothing: all next tokens
    equally likely at the first position."""
    for job, states in zip(jobs, hidden, strict=True):
        check_finite(states, "the hidden states", [job.pair.id])
    if jobs:
        logits = lm.head(hidden[0][:1])  # [1, V]
        if logits.max() - logits.min() < FLAT:
            raise ModelError(
                "the teacher finds all next tokens equally likely: there is nothing to learn from it",
                expected="logits that differ",
                found=f"{logits.shape[-1]:,} logits of {logits.max().item():g} in row {jobs[0].pair.id}",
                fix="check the weights of the model: its output head or its last layers may be empty",
            )


def keep(lm: LM, hidden: torch.Tensor, kind: TargetsSection) -> dict[str, torch.Tensor]:
    """What a target holds of the teacher's hidden states [T, d]."""
    if kind.kind == "hidden":
        return {"hidden": hidden.cpu().clone()}
    logprobs = lm.head(hidden).log_softmax(-1)  # [T, V]
    if kind.kind == "full":
        return {"logprobs": logprobs.cpu()}
    values, ids = logprobs.topk(min(kind.k, logprobs.shape[-1] - 1))  # [T, K]
    return {"topk_logprobs": values.cpu(), "topk_ids": ids.cpu().int()}


class LabelScores(NamedTuple):
    """What a model thinks of each label after each of N prompts."""

    logprobs: torch.Tensor
    """Log-probability of each label's whole token sequence, [N, labels], on the CPU."""
    first: torch.Tensor
    """Final hidden state at the first answer position, [N, d], on the CPU."""


def score_labels(
    lm: LM,
    prompts: Sequence[Sequence[int]],
    labels: dict[str, tuple[int, ...]],
    *,
    prefix: Prefix | None,
    batch_size: int,
) -> LabelScores:
    """Score every label after every prompt.

    What labels begin with is forwarded once: labels of one token take one forward of the prompt together, longer ones
    are a tree of tokens behind it.
    """
    nodes: dict[tuple[int, ...], int] = {(): -1}  # what some label begins with -> its last token's place in the tree
    for label in labels.values():
        for n in range(1, len(label)):
            nodes.setdefault(label[:n], len(nodes) - 1)
    tree = [(start[-1], nodes[start[:-1]]) for start in nodes if start]
    steps = [
        (number, 1 + nodes[label[:n]], token)
        for number, label in enumerate(labels.values())
        for n, token in enumerate(label)
    ]
    which, where, token = (torch.tensor(x, device=lm.device) for x in zip(*steps, strict=True))
    size = max(1, batch_size // (1 + len(tree) // TREE))
    scores, first = list[torch.Tensor](), list[torch.Tensor]()
    for begin in range(0, len(prompts), size):
        found = lm.follow(prompts[begin : begin + size], tree, prefix)  # [1 + tree, d] each
        first += [hidden[0].cpu() for hidden in found]
        for some in range(0, len(found), max(1, HEAD // (1 + len(tree)))):
            states = torch.stack(found[some : some + max(1, HEAD // (1 + len(tree)))])  # [n, 1 + tree, d]
            said = lm.head(states).log_softmax(-1)[:, where, token]  # [n, steps]
            scores.append(said.new_zeros(len(said), len(labels)).index_add(1, which, said).cpu())
    return LabelScores(torch.cat(scores), torch.stack(first))


def point_mass(ids: Sequence[int], size: int) -> Target:
    """The target of a given answer: all probability on its tokens, so that forward KL is the cross-entropy.

    Args:
        size: of the vocabulary (or the number of classes).
    """
    logprobs = torch.full((len(ids), size), -torch.inf)  # [T, V]
    logprobs[torch.arange(len(ids)), torch.tensor(ids)] = 0.0
    return Target("", tuple(ids), {"logprobs": logprobs})


def captured_mass(targets: Sequence[Target]) -> float | None:
    """Mean share of the teacher's probability that top-k targets hold; None for exact targets."""
    total, count = 0.0, 0
    for target in targets:
        if "topk_logprobs" not in target.tensors:
            return None
        total += float(target.tensors["topk_logprobs"].double().exp().sum())
        count += len(target.ids)
    return total / count if count else None
