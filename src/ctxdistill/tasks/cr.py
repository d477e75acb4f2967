"""Customer reviews of products (Hu and Liu 2004), out of domain for SST-2: 3,775 sentences. The hub's copy lacks ten of
them, and its label split is not published."""

from __future__ import annotations

from ctxdistill.tasks.source import Hub, Local, Source, labelled

LABELS = ("negative", "positive")
NAMES = {"0": "negative", "1": "positive"}

SOURCE = Source(
    name="customer reviews",
    labels=LABELS,
    local=Local(
        file="cr/custrev.all",
        read=labelled("latin-1"),
        labels=NAMES,
        counts={"negative": 1368, "positive": 2407},
    ),
    hub=Hub(path="SetFit/SentEval-CR", split="train+test", labels=NAMES, counts=3765),
)
