"""Fix the completion ids once, ask the teacher once, keep what the loss needs.

In: pairs of prompts, the model with its adapter off. Out: a `Target` per completion: its ids and what the teacher said
at each of its positions. Invariants: the store holds whole shards with checksums; a row's key covers everything its
target depends on; batches are formed from the whole list and not from what is missing, so an interrupted labelling gives
the same bits as an uninterrupted one.

What is kept (`targets.kind`): `hidden` the final hidden state [T, d], exact since teacher and student share the head;
`full` log-probabilities [T, V]; `topk` the largest log-probabilities and their ids [T, K], normalised over the whole
vocabulary before selection, so that 1 - sum is the tail mass.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save

from ctxdistill.errors import RunError
from ctxdistill.lm import LM, Prefix, common_prefix
from ctxdistill.prompts import Pair, Prompter, join
from ctxdistill.recipe import CompletionsSection, Recipe, TargetsSection
from ctxdistill.rundir import Progress, fingerprint, no_progress, write_atomic

HEAD = 64
"""Positions whose logits are in memory at a time when labels are scored."""
SHARED = 64
"""Tokens that rows must have in common, beyond what all have, to be labelled side by side."""
FILLS = 4
"""A batch that is filled to this part at least is worth a shared document: reading it costs more than rows that are missing."""
FLIGHTS = 8
"""Rows of a shard from somebody else, in units of what they are asked at once: the last ones of a shard fly alone."""
TREE = 32
"""Tokens of a tree of labels that cost about as much as one more prompt in the batch."""


@dataclass(frozen=True)
class Target:
    """What the student learns from one completion."""

    key: str
    ids: tuple[int, ...]
    """Completion ids, the same on both sides."""
    tensors: dict[str, torch.Tensor]
    """`hidden` [T, d]; or `logprobs` [T, V]; or `topk_logprobs` and `topk_ids` [T, K]."""


class TargetStore:
    """A folder of safetensors shards and an `index.json`: key -> shard, shard -> checksum.

    Raises (at construction): `RunError` naming a shard that is missing or whose bytes have changed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards: dict[str, str] = {}  # file name -> sha256
        self.where: dict[str, str] = {}  # key -> file name
        index = folder / "index.json"
        if not index.is_file():
            return
        try:
            stored = json.loads(index.read_text(encoding="utf-8"))
            self.shards, self.where = dict(stored["shards"]), dict(stored["keys"])
        except (ValueError, KeyError, OSError) as error:
            raise RunError(
                f"{index} is damaged: {error}", fix=f"delete {folder}; the targets will be made again"
            ) from None
        for name, sha in self.shards.items():
            path = folder / name
            found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no file"
            if found != sha:
                raise RunError(
                    f"the target shard {path} is damaged",
                    expected=f"sha256 {sha}",
                    found=found,
                    fix=f"delete {folder}; the targets will be made again",
                )

    def __contains__(self, key: str) -> bool:
        return key in self.where

    def __getitem__(self, key: str) -> Target:
        with safe_open(self.folder / self.where[key], framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(f"{key}.")]  # noqa: SIM118 (not a dict)
            tensors = {name.partition(".")[2]: file.get_tensor(name) for name in names}
        return Target(key, tuple(tensors.pop("ids").tolist()), tensors)

    def add(self, targets: Sequence[Target]) -> None:
        """Write one shard, then the index; a kill in between leaves a shard that nothing names and that is rewritten."""
        tensors = {f"{t.key}.{name}": tensor.contiguous() for t in targets for name, tensor in t.tensors.items()}
        tensors |= {f"{t.key}.ids": torch.tensor(t.ids, dtype=torch.int32) for t in targets}
        name = f"{fingerprint([t.key for t in targets])}.safetensors"
        raw = save(tensors)
        write_atomic(self.folder / name, raw)
        self.shards[name] = hashlib.sha256(raw).hexdigest()
        self.where |= {t.key: name for t in targets}
        write_atomic(self.folder / "index.json", json.dumps({"shards": self.shards, "keys": self.where}, indent=1))


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


def label(
    lm: LM,
    prompter: Prompter,
    pairs: Sequence[Pair],
    recipe: Recipe,
    store: TargetStore,
    *,
    completions: CompletionsSection | None = None,
    kind: TargetsSection | None = None,
    written: Sequence[tuple[int, ...]] | None = None,
    prefix: Prefix | None = None,
    whole: bool = False,
    ask: Ask | None = None,
    progress: Progress = no_progress,
    stage: str = "teacher",
) -> list[list[Target]]:
    """Targets for every pair: `completions.samples` of them each, in the order of `pairs`. A target without ids stands for
    a completion in which `completions.extract` found no answer.

    Args:
        completions, kind: in the place of the recipe's, for rows that are evaluated and not trained on.
        written: completions that somebody else has written (the student), one for each pair, in the place of the
            rows' answers (`completions.source = "data"`).
        prefix: what all teacher prompts start with, if it has been read already.
        whole: take all of a completion in which no answer was found.
        ask: who labels in the place of the local model, which takes what they cannot tell.
    """
    completions, kind = completions or recipe.completions, kind or recipe.targets
    decisive = completions.model_dump(exclude={"checker"})
    base = fingerprint(
        [
            lm.fingerprint,
            prompter.end,
            decisive,
            whole and completions.extract,
            kind.kind,
            kind.k if kind.kind == "topk" else 0,
        ]
    )
    if ask:
        base = fingerprint([base, ask.identity])
    if completions.source == "label":
        base = fingerprint([base, prompter.labels])
    seed = recipe.train.seed if completions.temperature > 0 else 0
    given: Sequence[tuple[int, ...] | None] = [None] * len(pairs)
    if completions.source == "data":
        given = written or [prompter.completion(pair.answer or "") for pair in pairs]
    jobs = [
        Job(pair, fingerprint([base, pair.teacher, ids, sample, seed]), ids)
        for pair, ids in zip(pairs, given, strict=True)
        for sample in range(completions.samples)
    ]
    group = documents([job.pair.teacher for job in jobs])
    order = sorted(range(len(jobs)), key=lambda i: (group[i], len(jobs[i].pair.teacher), jobs[i].key))
    size, count = kind.batch_size, Counter(group)
    if ask:
        size = max(size, FLIGHTS * ask.at_once)
    # a document with rows for a good part of a batch has batches of its own, for all of which it is read once; to write
    # answers, every row of other batches reads its document itself
    own = [part if FILLS * count[part] >= size else () for part in group]
    alike = [list(found) for _, found in itertools.groupby(sorted(order, key=lambda i: own[i]), key=lambda i: own[i])]
    chunks = [found[i : i + size] for found in alike for i in range(0, len(found), size)]
    todo = [[jobs[i] for i in chunk if jobs[i].key not in store] for chunk in chunks]
    done, said = 0, -1

    def say(more: int) -> None:
        nonlocal said
        if said != done + more:
            said = done + more
            progress(stage, said, len(jobs))

    with torch.no_grad(), lm.adapter(False):
        known, read = prefix, None
        for number, batch in enumerate(todo):
            if ask and batch:
                batch = asked(ask, batch, store, say)
            elif known is None and batch and (part := own[chunks[number][0]]) != read:
                # What all rows of this part start with, also when some are done: its length must not depend on what is left.
                rows = [job.pair.teacher for job, mine in zip(jobs, own, strict=True) if mine == part or not part]
                prefix, read = lm.prefix(rows), part
            for i in range(0, len(batch), kind.batch_size):
                store.add(
                    _label_batch(lm, prompter, batch[i : i + kind.batch_size], completions, kind, seed, prefix, whole)
                )
            done += len(chunks[number])
            say(0)
    made = [store[job.key] for job in jobs]
    n = completions.samples
    return [made[i : i + n] for i in range(0, len(made), n)]


def asked(ask: Ask, jobs: Sequence[Job], store: TargetStore, count: Callable[[int], None]) -> list[Job]:
    """Keep what is told of `jobs`, also when it ends half-way; returns those that are not told. `count` is called with the
    number of targets so far."""
    told = dict[str, Target]()
    try:
        for target in ask(jobs):
            told[target.key] = target
            count(len(told))
    finally:
        if told:
            store.add([told[job.key] for job in jobs if job.key in told])
    return [job for job in jobs if job.key not in told]


def documents(prompts: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """What rows are put side by side by, so that a document that some of them share is read once for each batch: the
    `SHARED` tokens behind what all rows start with, or () where no other row has the same ones."""
    first = len(common_prefix(prompts)) if prompts else 0
    found = [prompt[first : first + SHARED] for prompt in prompts]
    count = Counter(found)
    return [part if len(part) == SHARED and count[part] > 1 else () for part in found]


def _label_batch(
    lm: LM,
    prompter: Prompter,
    jobs: Sequence[Job],
    completions: CompletionsSection,
    kind: TargetsSection,
    seed: int,
    prefix: Prefix | None,
    whole: bool,
) -> list[Target]:
    prompts: list[Sequence[int]] = [job.pair.teacher for job in jobs]
    given = [job.ids for job in jobs if job.ids is not None]
    if given:  # of one source: all of them or none
        ids = given
    elif completions.source == "label":
        scores = score_labels(lm, prompts, prompter.labels, prefix=prefix, batch_size=kind.batch_size).logprobs
        words = list(prompter.labels.values())
        ids = [words[i] for i in scores.argmax(1).tolist()]
    else:
        seeds = [int(fingerprint([seed, job.key])[:15], 16) for job in jobs]
        written = lm.generate(
            prompts,
            max_new_tokens=completions.max_new_tokens,
            ends=prompter.ends,
            temperature=completions.temperature,
            seeds=seeds,
            prefix=prefix,
        )
        ids = [tuple(row) for row in written]
        if completions.extract:
            prompts, ids = _answers(prompter, prompts, ids, completions, whole)
    found = [i for i, c in enumerate(ids) if c]
    hidden = lm.hidden([join(prompts[i], ids[i]) for i in found], prefix) if found else []
    kept = {i: keep(lm, h, kind) for i, h in zip(found, hidden, strict=True)}
    return [Target(job.key, c, kept.get(i, {})) for i, (job, c) in enumerate(zip(jobs, ids, strict=True))]


def _answers(
    prompter: Prompter,
    prompts: Sequence[Sequence[int]],
    written: Sequence[tuple[int, ...]],
    completions: CompletionsSection,
    whole: bool,
) -> tuple[list[Sequence[int]], list[tuple[int, ...]]]:
    """What is scored, behind which prompt: the answers behind the teacher's thoughts, or all; () where none was found."""
    pattern = re.compile(completions.extract or "", re.DOTALL)
    before: list[Sequence[int]] = []
    ids: list[tuple[int, ...]] = []
    for prompt, row in zip(prompts, written, strict=True):
        parts = prompter.split_answer(row, pattern)
        if parts and completions.teach == "answer":
            before.append((*prompt, *parts[0]))
            ids.append(parts[1])
        else:
            before.append(prompt)
            ids.append(row if parts or whole else ())
    return before, ids


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
    if not targets or "topk_logprobs" not in targets[0].tensors:
        return None
    return float(torch.cat([t.tensors["topk_logprobs"].exp().sum(1) for t in targets]).mean())
