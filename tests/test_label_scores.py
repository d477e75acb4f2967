"""Scores of labels against each label's own forward pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ctxdistill import targets
from ctxdistill.lm import LM
from ctxdistill.recipe import ModelSection
from ctxdistill.targets import documents, score_labels

LABELS = {"a": (7,), "b": (8, 9), "c": (8, 10, 11), "d": (8, 10, 12), "e": (7, 13), "f": (14, 7)}
"""Of one token and of several, with common starts; one label is the start of another."""
PROMPTS = [[*range(10, 40), *range(s, s + n)] for s, n in ((60, 4), (70, 9), (80, 2), (90, 1), (100, 6))]


@pytest.mark.parametrize("batch_size", [1, 2, 32])
@pytest.mark.parametrize("head", [1, 64])
@pytest.mark.parametrize("pack", [True, False])
@torch.no_grad()
def test_scores_are_those_of_each_label_alone(
    llama: Path, batch_size: int, head: int, pack: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = LM.load(ModelSection(name=str(llama)))
    assert lm.can_pack
    lm.can_pack = pack
    monkeypatch.setattr(targets, "HEAD", head)
    for prefix in (None, lm.prefix(PROMPTS)):
        found = score_labels(lm, PROMPTS, LABELS, prefix=prefix, batch_size=batch_size)
        for n, prompt in enumerate(PROMPTS):
            for label, ids in enumerate(LABELS.values()):
                logits = lm.model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0]
                said = logits.log_softmax(-1)[len(prompt) - 1 : -1]
                expected = said[range(len(ids)), ids].sum()
                torch.testing.assert_close(found.logprobs[n, label], expected, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(lm.head(found.first[n]), logits[len(prompt) - 1], atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_what_labels_share_is_forwarded_once(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = LM.load(ModelSection(name=str(llama)))
    read: list[int] = []
    backbone = LM._backbone
    monkeypatch.setattr(LM, "_backbone", lambda self, **x: read.append(x["input_ids"].numel()) or backbone(self, **x))
    prefix = lm.prefix(PROMPTS)
    score_labels(lm, PROMPTS, LABELS, prefix=prefix, batch_size=32)
    starts = 4  # (8), (8, 10), (7), (14)
    assert read == [30, sum(len(p) - 30 + starts for p in PROMPTS)]


def test_rows_with_a_document_in_common_come_together() -> None:
    system, long, other = tuple(range(50)), tuple(range(100, 200)), tuple(range(200, 300))
    prompts = [
        (*system, *long, 1),
        (*system, 2),
        (*system, *other, 3),
        (*system, *long, 4, 5),
        (*system, *other[:20], 6),
    ]
    parts, number = documents(prompts, len(system))
    assert parts == [(), long[:64]]
    assert number.tolist() == [1, 0, 0, 1, 0]
    assert documents([], 0)[1].tolist() == []
