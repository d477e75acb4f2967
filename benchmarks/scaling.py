"""What a large job would take: times, costs, bytes and network, by arithmetic from the constants below.

    python benchmarks/scaling.py --price 2.5

Nothing is run: a shape's FLOPs and bytes are exact, the shares of a GPU's peak that they reach are assumptions, and what the
processors do beside the GPUs was measured (`benchmarks/volume.py`). docs/scaling.md says what one H100 reached.

Letters: C context, Q query, T answer tokens; W weights of the linear layers; d width, V vocabulary, L layers.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

QUERIES = 1_000_000
QUERY, ANSWER, EPOCHS = 50, 50, 1
"""Tokens of a query with its template, of an answer; passes over the rows."""
CONTEXTS = (2_000, 100_000)
GPUS = (1, 8, 64)
RANK = 16
ROWS = 32
"""Rows of a GPU in a training step."""
WRITTEN, HELD = 256, 2**32
"""Rows that a GPU writes side by side, and the bytes that their own keys and values may take (as `lm.rows_at_once`)."""
TOP_K = 256


@dataclass(frozen=True)
class Shape:
    """A model in bfloat16, all of whose layers are alike."""

    name: str
    width: int
    layers: int
    heads: int
    groups: int
    """Key-value heads."""
    head: int
    """Width of a head."""
    inner: int
    """Width of the feed-forward part."""
    vocabulary: int
    tied: bool = False

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(in, out) of a layer's linear maps."""
        q, kv = self.heads * self.head, self.groups * self.head
        d, f = self.width, self.inner
        return [(d, q), (d, kv), (d, kv), (q, d), (d, f), (d, f), (f, d)]

    @property
    def weights(self) -> int:
        """W."""
        return self.layers * sum(a * b for a, b in self.matrices)

    @property
    def bytes(self) -> int:
        """Of all weights."""
        return 2 * (self.weights + (1 if self.tied else 2) * self.width * self.vocabulary)

    @property
    def adapter(self) -> int:
        """Parameters of the adapter on all linear layers."""
        return self.layers * RANK * sum(a + b for a, b in self.matrices)

    def cache(self, tokens: int) -> int:
        """Bytes of the keys and values of some tokens."""
        return 2 * 2 * self.layers * self.groups * self.head * tokens

    def forward(self, new: int, before: int = 0, projected: int = 0) -> float:
        """FLOPs of a row: 2 W new + 4 a (keys seen) + 2 d V projected, as `accounts.forward_flops` counts them."""
        seen = new * before + new * (new + 1) / 2
        return (
            2.0 * self.weights * new
            + 4 * self.layers * self.heads * self.head * seen
            + 2 * self.width * self.vocabulary * projected
        )

    def training(self, new: int, projected: int) -> float:
        """FLOPs of a row's training step: forward, gradients of activations (attention's twice), the adapter, and the
        head on the teacher's kept hidden states; as `accounts.training_flops`."""
        attention = 4 * self.layers * self.heads * self.head * new * (new + 1) / 2
        teacher = 2.0 * self.width * self.vocabulary * projected
        return 2 * self.forward(new, projected=projected) + attention + 6 * self.adapter * new + teacher


SHAPES = {
    "7B": Shape("7B (Qwen2.5-7B's shape)", 3584, 28, 28, 4, 128, 18944, 152064),
    "70B": Shape("70B (Llama-3.1-70B's shape)", 8192, 80, 64, 8, 128, 28672, 128256),
}


@dataclass(frozen=True)
class Machine:
    """A GPU, eight to a machine. Peaks are the maker's; `reached` are assumptions."""

    name: str = "H100 SXM"
    flops: float = 989e12
    """bfloat16, dense."""
    memory: float = 80e9
    bandwidth: float = 3.35e12
    """Bytes per second of its memory."""
    link: float = 450e9
    """Bytes per second and direction between the GPUs of a machine."""
    wire: float = 50e9
    """The same between machines, for each GPU (400 Gbit/s)."""
    disk: float = 3e9
    """Bytes per second that a machine's disk writes or reads."""
    reached: float = 0.40
    """Of the FLOPs, in forwards and training steps (on the two CPU cores of docs/performance.md: 0.7 to 0.8)."""
    reached_memory: float = 0.60
    """Of the memory's bandwidth, when answers are written."""


GPU = Machine()
CORES = 16
"""Of the processor, for each GPU of a machine."""
TOKENISED = {2_000: 4.0e-3, 100_000: 231e-3}
"""Measured: CPU seconds to render and tokenise both prompts of a row, by context; all cores of a machine share it."""
HANDLED = {2_000: 2.1e-3, 100_000: 15.2e-3}
"""Measured: CPU seconds of one core for all else that is done to a row beside the model: 1.8 ms at any context (read, checked,
labelled, stored; benchmarks/volume.py), its key, and reading its prompt back nine times."""


def ways(shape: Shape, gpus: int, context: int) -> int | None:
    """Over how many GPUs the weights are split, so that they, the context's cache and 15 GB fit; None: they do not."""
    for split in (1, 2, 4, 8):
        if split <= gpus and (shape.bytes + shape.cache(context)) / split + 15e9 <= GPU.memory:
            return split
    return None


def score_seconds(shape: Shape, context: int) -> float:
    """GPU seconds to ask the teacher about a given answer."""
    return shape.forward(QUERY + ANSWER - 1, context) / (GPU.flops * GPU.reached)


def write_seconds(shape: Shape, context: int) -> float:
    """GPU seconds to write an answer, whose states are kept: each token of all rows side by side reads the weights, the context's
    cache once for all of them and each row's own, or computes, whichever takes longer."""
    own = shape.cache(QUERY + ANSWER)
    rows = min(WRITTEN, HELD // own)
    step = max(
        (shape.bytes + shape.cache(context) + rows * own) / (GPU.bandwidth * GPU.reached_memory),
        rows * shape.forward(1, context + QUERY, 1) / (GPU.flops * GPU.reached),
    )
    prompt = shape.forward(QUERY, context) / (GPU.flops * GPU.reached)
    return prompt + ANSWER * step / rows


def train_seconds(shape: Shape, split: int, gpus: int) -> tuple[float, float]:
    """(GPU seconds of a row in training, of which waiting for the network cannot be hidden behind computing)."""
    step = ROWS * shape.training(QUERY + ANSWER - 1, ANSWER) / (GPU.flops * GPU.reached)
    wire = network(shape, split, gpus)
    return (step + max(0.0, wire - step)) / ROWS, max(0.0, wire - step) / ROWS


def network(shape: Shape, split: int, gpus: int) -> float:
    """Seconds of a step's traffic: gradients of the adapter to all GPUs (32-bit, a ring), and where the weights are split
    within a machine, these twice (forward and backward)."""
    gradients = 0.0 if gpus == 1 else 2 * (gpus - 1) / gpus * 4 * shape.adapter / (GPU.wire if gpus > 8 else GPU.link)
    return gradients + (2 * shape.bytes * (split - 1) / split / GPU.link if split > 1 else 0.0)


def target_bytes(shape: Shape) -> dict[str, int]:
    """Bytes of a supervised token on the disk, its id included."""
    return {"hidden": 2 * shape.width + 4, "topk": 8 * TOP_K + 4, "full": 4 * shape.vocabulary + 4}


def table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """A Markdown table."""
    print(f"\n{title}\n\n| {' | '.join(header)} |\n|{'---|' + '---:|' * (len(header) - 1)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def hours(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} h" if seconds >= 360 else f"{seconds / 60:,.1f} min"


def shapes() -> None:
    """What follows from the shapes alone."""
    rows = []
    for shape in SHAPES.values():
        kinds = target_bytes(shape)
        rows.append(
            [shape.name, f"{shape.bytes / 1e9:,.0f}", f"{shape.cache(1) / 1e3:,.0f}", f"{shape.adapter / 1e6:,.1f}",
             *(f"{kinds[k]:,}" for k in kinds), f"{QUERIES * ANSWER * kinds['hidden'] / 1e9:,.0f}"]
        )  # fmt: skip
    header = ["model", "weights GB", "cache KB/token", f"adapter M (rank {RANK})"]
    header += ["hidden B/token", f"topk {TOP_K} B/token", "full B/token", "hidden, all rows GB"]
    table("Shapes", header, rows)


def speeds() -> None:
    """Per GPU, and what a step sends."""
    rows = []
    for shape in SHAPES.values():
        for context in CONTEXTS:
            split = ways(shape, 8, context) or 8
            score, write = score_seconds(shape, context), write_seconds(shape, context)
            train, _ = train_seconds(shape, split, 8)
            prefill = shape.forward(context) / (GPU.flops * GPU.reached) / split
            rows.append(
                [shape.name, f"{context:,}", f"{(QUERY + ANSWER) / score:,.0f}", f"{ANSWER / write:,.0f}",
                 f"{(QUERY + ANSWER) / train:,.0f}", f"{prefill:,.1f}", f"{4 * shape.adapter / 1e6:,.0f}",
                 f"{2 * shape.bytes * (split - 1) / split / 1e9:,.0f}"]
            )  # fmt: skip
    header = ["model", "context", "scored tok/s", "written tok/s", "trained tok/s", "context read once, s"]
    header += ["gradients MB/step", "weights GB/step (split)"]
    table("Per GPU and second; bytes of a step", header, rows)


def jobs(price: float, given: bool) -> None:
    """Times and costs of the whole job. The GPUs are paid for while the processors prepare the rows; every machine prepares
    all of them."""
    rows = []
    for shape in SHAPES.values():
        for context in CONTEXTS:
            for gpus in GPUS:
                split = ways(shape, gpus, context)
                if split is None:
                    rows.append([shape.name, f"{context:,}", str(gpus), *["does not fit"], *["-"] * 5])
                    continue
                one = (score_seconds if given else write_seconds)(shape, context)
                label = QUERIES * one / gpus
                row, waited = train_seconds(shape, split, gpus)
                train = EPOCHS * QUERIES * row / gpus
                processors = QUERIES * (TOKENISED[context] / (CORES * min(gpus, 8)) + HANDLED[context])
                stored = QUERIES * ANSWER * target_bytes(shape)["hidden"]
                disk = stored / (GPU.disk * max(1, gpus // 8)) * (1 + EPOCHS)
                total = label + train + processors
                parts = {"labelling": label, "training": train - EPOCHS * QUERIES * waited / gpus,
                         "network": EPOCHS * QUERIES * waited / gpus, "disk": disk,
                         "processors": processors}  # fmt: skip
                first = max(parts, key=lambda name: parts[name])
                rows.append(
                    [shape.name, f"{context:,}", str(gpus), hours(label), hours(train), f"{total / 3600 * gpus * price:,.0f}",
                     hours(disk), hours(processors), first]
                )  # fmt: skip
    header = ["model", "context", "GPUs", "labelling", "training", f"cost at {price:g} per GPU hour"]
    header += ["disk", "processors", "longest"]
    table(f"{QUERIES:,} queries, answers {'given' if given else 'written by the teacher'}", header, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--price", type=float, default=2.5, help="of a GPU hour")
    args = parser.parse_args()
    print(f"{GPU.name}: {GPU.flops / 1e12:,.0f} TFLOP/s, of which {GPU.reached:.0%}; {GPU.bandwidth / 1e12:g} TB/s, of which "
          f"{GPU.reached_memory:.0%}; query {QUERY}, answer {ANSWER} tokens, {EPOCHS} epoch, {ROWS} rows in a step")  # fmt: skip
    shapes()
    speeds()
    jobs(args.price, given=True)
    jobs(args.price, given=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
