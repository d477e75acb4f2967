"""A finished run becomes what a serving stack loads: a PEFT folder, merged weights, GGUF files, an Ollama model.

In: a run folder. Out: a folder with the files, a card (`README.md`), `export.json` (what it is and how it must be asked) and the
command to serve it. Invariants: weights are merged in float32 on the unquantised base, and what rounding costs is measured
on held-out rows; a strength is in the files themselves, so that no stack has to know of it; the folder is whole or not there.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from ctxdistill import gguf_export, losses
from ctxdistill.adapters import scale, settings_of
from ctxdistill.dataset import read_rows, stored_recipe
from ctxdistill.errors import ModelError, RecipeError, RunError
from ctxdistill.lm import LM
from ctxdistill.prompts import Pair, Prompter, join
from ctxdistill.recipe import Recipe
from ctxdistill.report import VLLM_RANKS, slug, write_card
from ctxdistill.rundir import LOADING, Progress, RunDir, no_progress, write_atomic, writing
from ctxdistill.weights import load_tokenizer, loading, locate

ROWS = 8
"""Held-out rows on which merged weights are compared with the adapter."""
MANIFEST = "export.json"
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Settings of transformers that say how to sample."""


@dataclass
class Job:
    """One export, in progress."""

    run: RunDir
    recipe: Recipe
    made: dict[str, Any]
    """The run's `recipe.json`."""
    out: Path
    """The folder that is being written."""
    final: Path
    """Where it will be."""
    strength: float
    progress: Progress
    drift: dict[str, float] | None = None
    """What merging and rounding changed."""
    kept: dict[str, Any] = field(default_factory=dict)
    """More for `export.json`."""

    def __post_init__(self) -> None:
        self.tokenizer = load_tokenizer(self.recipe.model, self.recipe.base_dir)
        self.prompter = Prompter(self.recipe, self.tokenizer)
        self.source = locate(self.recipe.model, self.recipe.base_dir)[0]

    @property
    def name(self) -> str:
        """What the served model is called."""
        return slug(self.recipe.name)

    @property
    def base_gguf(self) -> Path | None:
        """The GGUF file that is the base, if it is one."""
        name = self.recipe.model.name
        return (self.recipe.base_dir / Path(name).expanduser()).resolve() if name.endswith(".gguf") else None

    @property
    def config(self) -> Any:
        """The base's configuration, as it is stored."""
        options = {"revision": self.recipe.model.revision, "trust_remote_code": self.recipe.model.trust_remote_code}
        with loading(self.recipe.model.name):
            return AutoConfig.from_pretrained(self.source, **options)

    @property
    def end(self) -> int | None:
        """The token that ends an answer; in the text style a text does."""
        return self.prompter.end[0] if self.recipe.prompt.style == "chat" else None


# -- formats ----------------------------------------------------------------------------------------------------------


def peft(job: Job) -> list[str]:
    """The adapter as PEFT, vLLM and transformers load it, with the tokenizer and chat template it was trained with."""
    adapter = job.run / "adapter"
    settings = settings_of(adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    scaled = {name: t * job.strength if ".lora_B." in name else t for name, t in tensors.items()}
    save_file(scaled, job.out / "adapter_model.safetensors", metadata={"format": "pt"})
    settings |= {"base_model_name_or_path": job.source, "revision": job.recipe.model.revision}
    write_atomic(job.out / "adapter_config.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    job.tokenizer.save_pretrained(job.out)
    own = shlex.join(["transformers", "serve", str(job.final)])
    if job.recipe.lora.method not in ("lora", "rslora"):
        return [own]
    rank = next((size for size in VLLM_RANKS if size >= settings["r"]), settings["r"])
    revision = ["--revision", job.recipe.model.revision] if job.recipe.model.revision else []
    return [
        shlex.join(["vllm", "serve", job.source, *revision, "--enable-lora", "--lora-modules",
                    f"{job.name}={job.final}", "--max-lora-rank", str(rank)]),
        own,
    ]  # fmt: skip


def merged(job: Job) -> list[str]:
    """One set of weights, as transformers and vLLM load any model, in the base's own type of numbers."""
    dtype = job.config.dtype or torch.float32
    model = merge(job, dtype)
    settings = model.generation_config
    if job.end is not None:
        known = settings.eos_token_id
        ends = {*(known if isinstance(known, list) else [known]), job.tokenizer.eos_token_id, job.end} - {None}
        settings.eos_token_id = sorted(ends)
    if not settings.do_sample:  # transformers reads such settings, but does not write them
        settings.update(**dict.fromkeys(SAMPLING))
    model.to(dtype).save_pretrained(job.out)
    job.tokenizer.save_pretrained(job.out)
    return [
        shlex.join(["vllm", "serve", str(job.final), "--served-model-name", job.name]),
        shlex.join(["transformers", "serve", str(job.final)]),
    ]


def gguf(job: Job) -> list[str]:
    """The whole model as one GGUF file in 16-bit floats."""
    gguf_export.architecture_of(job.config)  # before the minutes that merging takes
    model = merge(job, torch.float16)
    file = f"{job.name}.gguf"
    gguf_export.write_model(
        job.out / file, model, job.tokenizer, job.base_gguf, name=job.recipe.name or "student", end=job.end
    )
    job.kept["model"] = file
    return [shlex.join(["llama-server", "-m", str(job.final / file), "--alias", job.name])]


def gguf_adapter(job: Job) -> list[str]:
    """The adapter as a GGUF file, for the base as GGUF in any quantisation."""
    file = f"{job.name}-adapter.gguf"
    gguf_export.write_adapter(job.out / file, job.config, job.run / "adapter", job.strength)
    job.kept |= {"adapter": file, "base": str(job.base_gguf) if job.base_gguf else None}
    base, first = job.base_gguf, []
    if base is None:  # an adapter of no strength leaves the base
        folder = job.final.with_name(f"{job.final.name}-base")
        base = folder / f"{job.name}.gguf"
        run = str(job.run.path.resolve())
        first = [shlex.join(["ctxdistill", "export", run, "--format", "gguf", "--strength", "0", "--out", str(folder)])]
    return [*first, shlex.join(["llama-server", "-m", str(base), "--lora", str(job.final / file), "--alias", job.name])]


def ollama(job: Job) -> list[str]:
    """A `Modelfile` with the exact student prompt, over the base and its adapter where the base is a GGUF file, else over the
    merged model."""
    if job.base_gguf:
        gguf_adapter(job)
        lines = [f"FROM {job.base_gguf}", f"ADAPTER ./{job.kept['adapter']}"]
        begins = gguf_export.adds_bos(job.base_gguf)
    else:
        gguf(job)
        lines = [f"FROM ./{job.kept['model']}"]
        begins = gguf_export.adds_bos(job.out / job.kept["model"])
    write_atomic(job.out / "Modelfile", modelfile(job, lines, begins=begins))
    return [
        f"cd {shlex.quote(str(job.final))} && ollama create {job.name} -f Modelfile",
        f"ollama run {job.name}",
    ]


FORMATS: dict[str, Callable[[Job], list[str]]] = {
    "peft": peft,
    "merged": merged,
    "gguf": gguf,
    "gguf-adapter": gguf_adapter,
    "ollama": ollama,
}
"""Each writes its files and returns the commands that serve them."""


# -- the path ---------------------------------------------------------------------------------------------------------


def export(
    run: str | Path,
    format: str,
    out: str | Path | None = None,
    *,
    strength: float = 1.0,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Write a finished run for a serving stack; returns what `export.json` holds, with `folder` and `serve`.

    Args:
        format: a key of `FORMATS`.
        out: the folder; default `RUN/export/FORMAT`. An older export there is replaced.
        strength: factor of the adapter, within the files. 0 gives the base.

    Raises: `RunError` for an unfinished run, a folder of something else or a full disk, `ModelError` for a model the format lacks.
    """
    folder = RunDir.existing(run)
    folder.refuse_links()
    final = Path(out).resolve() if out else folder / "export" / format
    if not (folder / "adapter" / "adapter_model.safetensors").is_file():
        raise RunError(f"{folder.path} has no adapter yet", fix=folder.finish)
    if final.exists() and not (final / MANIFEST).is_file() and (not final.is_dir() or any(final.iterdir())):
        raise RunError(f"{final} holds something else than an export", fix="choose another folder with --out")
    if Path.cwd().is_relative_to(final):  # it would be gone under whoever stands in it
        raise RunError(f"{final} is the current folder, or holds it", fix="choose another folder with --out")
    beside = final.with_name(f".{final.name}.tmp")
    try:
        with writing(final):
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            recipe = stored_recipe(folder)
            _check_kind(recipe.lora.method, format, strength)
            job = Job(folder, recipe, folder.read_json("recipe.json"), beside, final, strength, progress)
            serve = FORMATS[format](job)
            found = describe(job, format)
            write_card(folder.path, beside, {**found, "serve": [elsewhere(job, command) for command in serve]})
            for file in beside.iterdir():
                file.chmod(0o644)  # safetensors are written for the owner alone; a server often runs as somebody else
            found["files"] = {p.name: p.stat().st_size for p in sorted(beside.iterdir())}
            write_atomic(beside / MANIFEST, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
            shutil.rmtree(final, ignore_errors=True)
            os.replace(beside, final)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return {"folder": str(final), **found, "serve": serve}


def _check_kind(method: str, format: str, strength: float) -> None:
    """Raise `ModelError` for kinds of adapters that the format cannot hold."""
    if method == "cartridge" and format != "peft":
        raise ModelError(
            "a cartridge is a key-value cache and no change of the weights", expected="--format peft", found=format
        )
    if method in ("dora", "cartridge") and strength != 1 and format == "peft":
        raise ModelError(
            f'an adapter of lora.method = "{method}" has no factor that a strength could go into',
            expected="--strength 1" + (", or --format merged" if method == "dora" else ""),
            found=f"{strength:g}",
        )


def elsewhere(job: Job, command: str) -> str:
    """A command as it reads on another machine, without the places of this one."""
    base = Path(job.recipe.model.name).name if Path(job.source).exists() else job.recipe.model.name
    run = job.run.path.resolve()
    places = ((job.final, "path/to/this/folder"), (run, "path/to/the/run"), (job.base_gguf, base), (job.source, base))
    for place, name in places:
        command = command.replace(str(place), name) if place else command
    return command


def describe(job: Job, format: str) -> dict[str, Any]:
    """What `export.json` says: of which run, how strong, how to ask."""
    chat = job.recipe.prompt.style == "chat"
    split, section = held_out(job.run, job.recipe, job.prompter)
    row = split[0]
    return {
        "format": format,
        "name": job.name,
        "strength": job.strength,
        "run": job.made["fingerprint"],
        "base_model": job.recipe.model.name,
        "weights_sha256": job.made["model"]["weights_sha256"],
        "student_prompt": job.made["student_prompt"],
        "stop": stops(job),
        "label_words": job.recipe.prompt.label_words,
        "request": {"messages" if chat else "prompt": job.prompter.request(row, section)},
        "merged": job.drift,
        **job.kept,
    }


def held_out(run: RunDir, recipe: Recipe, prompter: Prompter) -> tuple[Sequence[Any], Any]:
    """The evaluation's rows, and the section that says how to read them."""
    return read_rows(recipe, prompter, run.path)[0]["eval"]


def held_out_pairs(run: RunDir, recipe: Recipe, prompter: Prompter, most: int) -> list[Pair]:
    """The first held-out rows as prompts."""
    rows, section = held_out(run, recipe, prompter)
    return [prompter.pair(row, section) for row in rows[:most]]


def stops(job: Job) -> list[str]:
    """The texts that end an answer."""
    if job.recipe.prompt.style == "text":
        return [job.prompter.stop_text]
    tokens = [*job.prompter.end, *([job.tokenizer.eos_token_id] if job.tokenizer.eos_token_id is not None else [])]
    return [str(job.tokenizer.decode([i])) for i in dict.fromkeys(tokens)]


# -- merging ----------------------------------------------------------------------------------------------------------


def merge(job: Job, dtype: torch.dtype) -> Any:
    """The base (not quantised) with the adapter in its weights, in float32, rounded to `dtype`, kept as float32; measures what
    this changed, per token of the student's own answers on held-out rows: `Job.drift`."""
    section = job.recipe.model.model_copy(update={"dtype": "float32", "quantize": "none"})
    lm = LM.load(section, job.recipe.base_dir)
    lm.load_adapter(job.run / "adapter")
    scale(lm.peft, job.strength)
    pairs = held_out_pairs(job.run, job.recipe, job.prompter, ROWS)
    job.progress(LOADING, 1, 1)
    rows, before = [], []
    with torch.no_grad():
        for number, pair in enumerate(pairs, 1):
            limit = job.recipe.eval.max_new_tokens
            written = lm.generate([pair.student], max_new_tokens=limit, ends=job.prompter.ends)[0]
            rows.append(join(pair.student, written))
            before.append(lm.head(lm.hidden(rows[-1:])[0]))  # [T, V]
            job.progress("answers to compare with", number, len(pairs))
        lm.model, lm.peft = lm.peft.merge_and_unload(), None
        for parameter in lm.model.parameters():
            if dtype != torch.float16 or parameter.dim() > 1:  # GGUF keeps vectors as they are
                parameter.copy_(parameter.to(dtype))
        after = [lm.head(lm.hidden([row])[0]) for row in rows]  # [T, V]
        kl = torch.cat(
            [losses.divergence("forward_kl", a, b).clamp(min=0) for a, b in zip(before, after, strict=True)]
        )  # [tokens]
        same = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(before, after, strict=True)])  # [tokens]
    if not torch.isfinite(kl).all():
        raise ModelError(f"the merged weights do not fit into {dtype}", fix="export the adapter instead: peft")
    job.drift = {
        "kl": kl.mean().item(), "kl_max": kl.max().item(), "top1": same.float().mean().item(),
        "rows": len(rows), "tokens": kl.numel(),
    }  # fmt: skip
    job.kept["dtype"] = str(dtype).removeprefix("torch.")
    return lm.model


# -- Ollama -----------------------------------------------------------------------------------------------------------


def modelfile(job: Job, lines: list[str], *, begins: bool) -> str:
    """The Modelfile: its template is the student's prompt as it is, so that neither Ollama nor a client adds to it."""
    prompt = job.made["student_prompt"]
    if prompt["fields"] != ["{query}"]:
        raise RecipeError(
            "Ollama gives a prompt one text",
            expected="a pattern with one column",
            found=", ".join(prompt["fields"]),
            fix="export gguf or gguf-adapter, and fill in the pattern where you ask",
        )
    text = prompt["text"]
    if begins:  # llama.cpp puts it there
        text = text.removeprefix(job.tokenizer.bos_token or "")
    before, _, after = text.partition("{query}")
    template = f"{_literal(before)}{{{{ .Prompt }}}}{_literal(after)}"
    window = min(int(job.made["model"]["window"]), 4096)
    return "\n".join([
        *lines,
        "# The whole prompt, with the system text that the student was trained with, if any. Nothing else is added.",
        f'TEMPLATE """{template}"""',
        *(f'PARAMETER stop """{stop}"""' for stop in stops(job)),
        "PARAMETER temperature 0",
        f"PARAMETER num_ctx {window}",
        "",
    ])  # fmt: skip


def _literal(text: str) -> str:
    """`text` for a Go template between triple quotes: what would end either is written as a string of the template."""
    return re.sub(r'\{\{|"""|^"|"$', lambda m: "{{ " + json.dumps(m[0]) + " }}", text)


# -- the hub ----------------------------------------------------------------------------------------------------------


def push(folder: str | Path, repo: str, *, really: bool = False) -> dict[str, Any]:
    """Upload an export to the hub as a private model, or (default) only say what would be uploaded.

    Raises: `RunError` when the folder is no export, or the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    path = Path(folder)
    if not (path / MANIFEST).is_file():
        raise RunError(f"{path} is no export", expected=MANIFEST, fix="make one with `ctxdistill export`")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise RunError(f"{repo!r} is no name of a repository", expected="OWNER/NAME", found=str(error)) from None
    # the manifest is for `check` on this machine, whose places it names
    files = {p.name: p.stat().st_size for p in sorted(path.iterdir()) if p.name != MANIFEST}
    remarks = ["README.md shows the start of the context and the held-out results: read it first"]
    local = re.compile(r'(?m)(?:^FROM |: ")(?:/|[A-Z]:\\)')
    remarks += [
        f"{name} names a base on this machine; others need a name of the hub"
        for name in files
        if name.endswith(("config.json", "Modelfile")) and local.search((path / name).read_text(encoding="utf-8"))
    ]
    found = {"repo": repo, "private": True, "files": files, "bytes": sum(files.values()), "remarks": remarks}
    if not really:
        return {**found, "uploaded": None}
    try:
        api = HfApi()
        api.create_repo(repo, private=True, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo, folder_path=path, allow_patterns=list(files), commit_message="Upload with ctxdistill"
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise RunError(
            f"the hub did not take {repo}: {str(error).strip().splitlines()[0]}",
            fix="log in with `hf auth login`, check the name, and that HF_HUB_OFFLINE is not set",
        ) from None
    return {**found, "uploaded": str(done)}
