"""A run folder becomes a page (`report.html`), the same in text (`report.md`) and the adapter card.

In: recipe.json and evaluation.json, which must be there; metrics.jsonl and scores.jsonl, which may be missing. Out:
files, written whole. Invariants: nothing here imports torch; a page loads nothing from anywhere and runs no script;
text that comes from data is escaped by the template environment itself, so a template cannot forget it.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from ctxdistill.errors import RunError
from ctxdistill.readers import count
from ctxdistill.results import (
    HEAT,
    METRICS,
    NO_VALUE,
    Data,
    arm_label,
    behaviour_facts,
    cells,
    crosstalk_table,
    examples,
    finite,
    in_time,
    mean_of,
    metric_label,
    result_table,
    round_table,
    scored,
    shorter,
    verdict,
)
from ctxdistill.rundir import RunDir, reading, write_atomic

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["cells", "examples", "read_run", "result_table", "verdict", "write_card", "write_report"]

EXPORTS = {
    "peft": ("peft", "adapter", "lora"),
    "merged": ("transformers", "finetune", "merged"),
    "gguf": ("", "finetune", "gguf"),
    "gguf-adapter": ("", "adapter", "gguf"),
    "ollama": ("", "adapter", "gguf"),
}
"""Format of an export -> the hub's library, its relation to the base, and a tag."""
KINDS = {
    "lora": "a LoRA adapter", "rslora": "a LoRA adapter (rsLoRA)", "dora": "a DoRA adapter",
    "cartridge": "a trained key-value cache (cartridge)",
}  # fmt: skip
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the values that --max-lora-rank takes


def write_report(run: str | Path) -> Path:
    """Write `report.html` and `report.md` into the run folder; returns the path of the page.

    Raises: `RunError` when the run is incomplete or damaged, or the files cannot be written.
    """
    folder = RunDir(run)
    with reading(folder.path):
        view = _view(folder)
        text = environment("md").get_template("report.md.j2").render(view)
        page = environment("html").get_template("report.html.j2").render(view)
    write_atomic(folder / "report.md", text)
    write_atomic(folder / "report.html", page)
    return folder / "report.html"


def write_card(run: str | Path, folder: Path | None = None, export: Data | None = None) -> Path:
    """Write the card of the adapter, or of an `export` of it into its `folder`; returns its path.

    Args:
        export: what `export.json` holds, and the commands to `serve` it.

    Raises: `RunError` as `write_report` does.
    """
    at = RunDir(run)
    recipe, evaluation = read_run(at)
    name = recipe["recipe"]["model"]["name"]
    rank = int(recipe["recipe"]["lora"]["rank"])
    revision = recipe["recipe"]["model"].get("revision")
    base = Path(name)
    if base.is_absolute():  # a place that only this machine has
        base = Path("path/to") / base.name
    source, options = (base.parent.as_posix(), {"gguf_file": base.name}) if base.suffix == ".gguf" else (str(base), {})
    if revision:
        options["revision"] = revision
    vllm = (
        f"vllm serve {shlex.quote(str(base))}{f' --revision {shlex.quote(revision)}' if revision else ''} "
        f"--enable-lora --lora-modules {slug(recipe['recipe']['name'])}=path/to/this/folder "
        f"--max-lora-rank {next((size for size in VLLM_RANKS if size >= rank), rank)}"
    )
    export = export or {"format": "peft", "strength": 1.0, "serve": [vllm], "merged": None}
    library, relation, tag = EXPORTS[export["format"]]
    common = _common(recipe, evaluation)
    base_model = name if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not name.startswith(".") else base.name
    view = {
        **common,
        "model": {**common["model"], "name": base_model},
        "base_model": base_model,
        "load_arguments": Markup(", ".join([repr(source), *(f"{key}={value!r}" for key, value in options.items())])),
        "dtype": recipe["model"].get("dtype", "auto"),
        "export": export,
        "served": common["served"] or export["format"] != "peft",
        "library": library,
        "relation": relation,
        "tag": tag,
        "measured": _measured(evaluation) if export["strength"] == 1 else [],
        "serve": "\n".join(export["serve"]),
        "max_new_tokens": recipe["recipe"].get("eval", {}).get("max_new_tokens", 128),
    }
    path = (folder or at / "adapter") / "README.md"
    write_atomic(path, environment("md").get_template("card.md.j2").render(view))
    return path


def _measured(evaluation: Data) -> list[Data]:
    """The student's metrics with their intervals, as the hub's index of models takes them."""
    table = {**evaluation["table"].get("distilled", {}), "kl_closed": evaluation.get("kl_closed")}
    found = []
    for metric, estimate in table.items():
        if metric in ("prompt_tokens", "latency_ms") or not estimate or not finite(estimate.get("mean")):
            continue
        interval = {key: estimate[key] for key in ("low", "high") if finite(estimate.get(key))}
        args = {**interval, "interval": "95 % over rows", "rows": estimate.get("n", evaluation.get("rows"))}
        name = metric_label(metric).removesuffix(" %")
        found.append({"type": metric, "name": name, "value": estimate["mean"], "args": args})
    return found


# ---- what the templates see


def read_run(folder: RunDir) -> tuple[Data, Data]:
    """recipe.json and evaluation.json. Raises `RunError` when one is missing, damaged or half filled."""
    needed = {"recipe.json": ("recipe", "model"), "evaluation.json": ("arms", "table")}
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        there = sorted(p.name for p in folder.path.iterdir() if p.name[0] != ".") if folder.path.is_dir() else None
        raise RunError(
            f"{folder.path} is not a finished run: {' and '.join(missing)} missing",
            expected="a run folder with " + " and ".join(needed),
            found="no such folder" if there is None else ", ".join(there[:12]) or "an empty folder",
            fix=folder.finish,
        )
    contents = []
    for name, keys in needed.items():
        content = folder.read_json(name)
        absent = [key for key in keys if not isinstance(content, dict) or not content.get(key)]
        if absent:
            found = ", ".join(content) if isinstance(content, dict) and content else type(content).__name__
            raise RunError(
                f"{folder / name} is incomplete", expected=f"the keys {', '.join(keys)}", found=found, fix=folder.finish
            )
        contents.append(content)
    return contents[0], contents[1]


def _common(recipe: Data, evaluation: Data) -> Data:
    """What page, text and card share."""
    constant = evaluation.get("constant")
    method = recipe["recipe"]["lora"].get("method", "lora")
    return {
        "name": recipe["recipe"].get("name") or "unnamed",
        "kind": KINDS[method],
        "served": method in ("lora", "rslora"),
        "model": _filled(recipe["model"], "name", "revision", "weights_sha256", "tokenizer_sha256", "template_sha256"),
        "recipe": recipe["recipe"],
        "context": _filled(recipe.get("context"), "sha256", "tokens", "kinds", "preview"),
        "student_prompt": _filled(recipe.get("student_prompt"), "text", "template_inserts"),
        "rows_sha256": _text((recipe.get("rows") or {}).get("sha256")),
        "run": _filled(recipe, "fingerprint", "created"),
        "versions": recipe.get("versions") or {},
        "facts_of_run": _facts(recipe),
        "verdict": verdict(evaluation),
        "rows": evaluation.get("rows"),
        "answers": evaluation.get("answers"),
        "arms": [{"arm": arm, "label": arm_label(arm)} for arm in evaluation["arms"]],
        "table": result_table(evaluation),
        "constant": constant and {**constant, "text": scored(constant["metric"], constant["mean"])},
    }


def _filled(group: Mapping[str, Any] | None, *keys: str) -> Data:
    return {**dict.fromkeys(keys), **(group or {})}


def _view(folder: RunDir) -> Data:
    """Everything on the page."""
    from ctxdistill.plots import break_even_plots, strength_plot, training_plot  # matplotlib takes a second to load

    recipe, evaluation = read_run(folder)
    return {
        **_common(recipe, evaluation),
        "tiles": _tiles(evaluation),
        "gate": evaluation.get("gate") and {"verdict": NO_VALUE, "reasons": [], **evaluation["gate"]},
        "gate_facts": _gate_facts(evaluation.get("gate") or {}),
        "training_facts": _plain(evaluation.get("training") or {}),
        "curves": training_plot(folder.lines("metrics.jsonl")),
        "crosstalk": crosstalk_table(evaluation.get("crosstalk")),
        "behaviour": behaviour_facts(evaluation),
        "strength_plot": strength_plot((evaluation.get("behaviour") or {}).get("strengths") or []),
        "rounds": round_table(folder.lines("metrics.jsonl")),
        "break_even": _break_even(evaluation.get("cost") or {}),
        "break_even_plots": break_even_plots(evaluation),
        "examples": examples(folder.read_jsonl("scores.jsonl"), evaluation),
        "heat": [f"below {HEAT[0]:g}", *(f"{a:g} to {b:g}" for a, b in pairwise(HEAT)), f"{HEAT[-1]:g} and more"],
        "comparisons": [_comparison(pair) for pair in evaluation.get("comparisons") or []],
        "parts": [_parts(title, table, evaluation) for title, table in (evaluation.get("parts") or {}).items()],
        "recipe_json": json.dumps(recipe["recipe"], indent=2, ensure_ascii=False),
        "explicit": recipe.get("explicit") or [],
        "notes": evaluation.get("notes") or [],
    }


def _tiles(evaluation: Data) -> list[Data]:
    """The key numbers: `label`, `value`, `note`."""
    table, cost = evaluation["table"], evaluation.get("cost")
    zero, teacher, student = (table.get(arm, {}) for arm in ("zero_shot", "in_context", "distilled"))
    tiles = [
        (
            "KL closed",
            cells("kl_closed", evaluation.get("kl_closed"), unit="%"),
            "of the base model's KL to the teacher",
        )
    ]
    for name in dict.fromkeys([evaluation.get("main_metric"), "format", "top1"]):
        if name and student.get(name):
            label = metric_label(name)
            note = f"in-context {mean_of(name, teacher)}, zero-shot {mean_of(name, zero)}"
            note = "same next token as the teacher" if name == "top1" else note
            value = cells(name, student[name], unit="%" if label.endswith("%") else "")
            tiles.append((label.removesuffix(" %"), value, note))
    for name in ("prompt_tokens", "latency_ms"):
        if student.get(name) and teacher.get(name):
            note = f"instead of {mean_of(name, teacher)} with the context"
            tiles.append((metric_label(name), cells(name, student[name]), note))
    if cost:
        ways = {"time": cost.get("break_even_requests"), "prompt tokens": cost.get("break_even_tokens")}
        way = next((way for way, requests in ways.items() if finite(requests)), None)
        said = (in_time(cost.get("ms_saved")) or "").partition(":")[0]
        told = f"; in time it {said}" if said else ""
        if way:
            tiles.append(("pays off after", f"{math.ceil(ways[way]):,} requests", f"counted in {way}{told}"))
        else:
            value = "never" if said.startswith("never") else "not shown"
            tiles.append(("pays off after", value, f"no prompt tokens are saved{told or '; time was not measured'}"))
    return [dict(zip(("label", "value", "note"), tile, strict=True)) for tile in tiles]


def _break_even(cost: Data) -> list[str]:
    """The cost of distilling and when it is earned back, as sentences."""
    seconds, lines = cost.get("seconds") or {}, []
    if finite(seconds.get("total")):
        parts = [f"{name} {value:,.0f} s" for name, value in seconds.items() if name != "total" and finite(value)]
        remark = f" ({', '.join(parts)})" if parts else ""
        lines.append(f"Distilling took {seconds['total']:,.0f} s{remark}.")
    if finite(cost.get("prompt_tokens_saved")):
        lines.append(f"Each request is {shorter(cost['prompt_tokens_saved'])}.")
    if saved := cost.get("ms_saved"):
        more = "less" if saved["mean"] >= 0 else "more"
        interval = f"[{saved['low']:,.0f}, {saved['high']:,.0f}] saved, " if saved["n"] > 1 else ""
        shown = f"{interval}{count(saved['n'], 'row')}"
        lines.append(
            f"Each request takes {abs(saved['mean']):,.0f} ms {more} ({shown}), on the machine that measured it."
        )
    processed = f" (distilling processed {cost.get('training_tokens') or 0:,} tokens)"
    ways = [("time", cost.get("break_even_requests"), ""), ("prompt tokens", cost.get("break_even_tokens"), processed)]
    if money := cost.get("break_even_money"):
        days = f" ({money['days']:,.1f} days)" if finite(money.get("days")) else ""
        ways.append(("money", money.get("requests"), days))
    for way, requests, remark in ways if cost else []:
        if finite(requests):
            lines.append(f"Counted in {way}, it pays off after {math.ceil(requests):,} requests{remark}.")
        elif way == "time" and not saved:
            lines.append("Counted in time: not known, because the time of a request was not measured.")
        elif way == "time":
            lines.append(f"Counted in time, it {in_time(saved)}.")
        else:
            lines.append(f"Counted in {way}, it never pays off: nothing is saved per request.")
    return lines


def _gate_facts(gate: Data) -> list[tuple[str, str]]:
    facts, metric, query = [], gate.get("metric"), gate.get("query_tokens") or {}
    if gate.get("gain") and metric:
        facts.append((f"teacher's gain over zero-shot, {metric_label(metric)}", cells(metric, gate["gain"], sign=True)))
    if gate.get("kl"):
        facts.append(("KL between teacher and base per token", cells("kl", gate["kl"])))
    if gate:
        more = gate.get("context_tokens")
        none = "none more than the chat template's own system text" if finite(more) and more <= 0 else ""
        facts.append(("context tokens", none or _text(more)))
        facts.append(("query tokens, mean and longest", f"{_text(query.get('mean'))} and {_text(query.get('max'))}"))
        facts.append(("the model's window", f"{_text(gate.get('window'))}; everything fits: {_text(gate.get('fits'))}"))
    return facts


def _comparison(pair: Data) -> Data:
    metric, difference, p = pair["metric"], pair["difference"], pair.get("p_mcnemar")
    low, high = difference.get("low"), difference.get("high")
    reading = "no difference shown"
    if finite(low) and finite(high) and (low > 0 or high < 0):
        reading = f"{arm_label(pair['a'])} {'higher' if low > 0 else 'lower'}"
    return {
        "pair": f"{arm_label(pair['a'])} minus {arm_label(pair['b'])}",
        "metric": metric_label(metric),
        "difference": cells(metric, difference, sign=True),
        "p": NO_VALUE if not finite(p) else "< 0.001" if p < 0.001 else f"{p:.3f}",
        "reading": reading,
    }


def _parts(title: str, table: Sequence[Data], evaluation: Data) -> Data:
    """What each chunk, or each value of a column, contributed: `title`, `head`, `rows` of texts."""
    known = dict.fromkeys(m for row in table for found in row["metrics"].values() for m in found)
    metrics = [*(m for m in METRICS if m in known), *(m for m in known if m not in METRICS)]
    arms = evaluation["arms"]
    head = [title, "rows trained", "tokens trained", "held-out rows", "KL before", "KL after"]
    head += [f"{metric_label(m)}, {arm_label(arm)}" for m in metrics for arm in arms]
    rows = []
    for row in table:
        texts = [row["part"], *(_text(row[key]) for key in ("train_rows", "train_tokens", "rows"))]
        texts += [cells("kl", {"mean": row[key]}) for key in ("kl_before", "kl_after")]
        texts += [cells(m, {"mean": row["metrics"].get(arm, {}).get(m)}) for m in metrics for arm in arms]
        rows.append(texts)
    return {"title": title, "head": head, "rows": rows}


def _facts(recipe: Data) -> list[tuple[str, list[tuple[str, str]]]]:
    """Everything in recipe.json but the long texts and the recipe itself, as titled lists."""
    apart = {"recipe", "explicit", "student_prompt"}
    run = {key: value for key, value in recipe.items() if key not in apart and not isinstance(value, dict)}
    groups = {"run": run} | {
        key: value for key, value in recipe.items() if key not in apart and isinstance(value, dict)
    }
    return [(title, _plain({k: v for k, v in group.items() if k != "preview"})) for title, group in groups.items()]


def _plain(group: Data) -> list[tuple[str, str]]:
    return [(key.replace("_", " "), _text(value)) for key, value in group.items()]


def _text(value: Any) -> str:
    """A value for people: thousands separated, lists joined, a dash for nothing."""
    if value is None or value == "" or value == []:
        return NO_VALUE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)


# ---- escaping


def visible(text: str) -> str:
    """`text` with control and bidi characters, which hide or reorder what is around them, shown as their codes."""
    hidden = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
    return re.sub(hidden, lambda m: f"⟨U+{ord(m[0]):04X}⟩", text.replace("\r\n", "\n"))


def markdown(text: str) -> str:
    """`text` as it must be written in Markdown to be read as itself, on one line, also in a table."""
    text = re.sub(r"\s*\n\s*", " ⏎ ", visible(text)).replace("\t", " ")
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"[\\`*|$~]|(?<!\w)_|_(?!\w)|\](?=[(\[:])|^[#+-]+(?=\s)", lambda m: "\\" + m[0], text)


def fence(text: str, language: str = "") -> Markup:
    """A Markdown code block that nothing in `text` can end."""
    text = visible(text)
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return Markup(f"{ticks}{language}\n{text}\n{ticks}")


def slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.") or "adapter"


def environment(kind: str) -> Environment:
    """Templates whose every `{{ text }}` is escaped for `kind` (html or md), unless it already is `Markup`."""
    # not at the top, since `ctxdistill --help` would wait for it
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    escape = visible if kind == "html" else markdown
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=kind == "html",
        finalize=lambda value: escape(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters.update(fence=fence, plain=Markup, literal=lambda text: Markup(repr(text)))
    made.filters["quoted"] = lambda value: Markup(visible(json.dumps(value, ensure_ascii=False)))
    return made
