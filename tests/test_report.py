"""The report, the adapter card and the table, from a synthetic run folder that is as hostile as data can be."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from ctxdistill import plots, report, results
from ctxdistill.errors import RunError

HOSTILE = [
    "<script>alert(1)</script>",
    "</style><b>out</b>",
    '"><img src=x onerror=alert(1)>',
    "```\n# a heading\n````",
    "a | b | c <svg/onload=alert(1)>",
    "$\\frac{a}{$ <b>",
    "abc\u202edef\u2066ghi",
    "[click](https://example.org/) {{ 7 * 7 }} {% raw %}",
    "half a character \ud83d and a null \x00",
]
ARMS = ["zero_shot", "in_context", "distilled"]


def estimate(mean: float, half: float, n: int = 120) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def make_evaluation() -> dict[str, Any]:
    return {
        "arms": ARMS,
        "rows": 120,
        "answers": 120,
        "main_metric": "exact_match",
        "table": {
            "zero_shot": {
                "format": estimate(0.0, 0.0),
                "exact_match": estimate(0.0, 0.0),
                "field_accuracy": estimate(0.021, 0.015),
                "mine:brevity": estimate(3.25, 0.5),
                "kl": estimate(1.874, 0.12),
                "top1": estimate(0.41, 0.03),
                "prompt_tokens": {"mean": 36.8, "low": 30, "high": 49, "n": 120},
                "latency_ms": estimate(1210.4, 60, 8),
            },
            "in_context": {
                "format": estimate(0.992, 0.008),
                "exact_match": estimate(0.825, 0.067),
                "field_accuracy": estimate(0.925, 0.03),
                "prompt_tokens": {"mean": 539.8, "low": 533, "high": 552, "n": 120},
                "latency_ms": estimate(842.1, 40, 8),
            },
            "distilled": {
                "format": estimate(0.983, 0.017),
                "exact_match": estimate(0.8167, 0.07),
                "field_accuracy": estimate(0.919, 0.03),
                "kl": estimate(0.054, 0.009),
                "top1": estimate(0.978, 0.007),
                "prompt_tokens": {"mean": 36.8, "low": 30, "high": 49, "n": 120},
                "latency_ms": estimate(420.5, 25, 8),
            },
        },
        "kl_closed": {"mean": 0.971, "low": 0.965, "high": 0.976},
        "gap_closed": {"mean": 0.99, "low": 0.93, "high": 1.05},
        "comparisons": [
            {
                "a": "in_context",
                "b": "zero_shot",
                "metric": "exact_match",
                "difference": {"mean": 0.825, "low": 0.758, "high": 0.892},
                "p_mcnemar": 1.2e-29,
            },
            {
                "a": "distilled",
                "b": "zero_shot",
                "metric": "exact_match",
                "difference": {"mean": 0.8167, "low": 0.742, "high": 0.883},
                "p_mcnemar": 2.5e-29,
            },
            {
                "a": "distilled",
                "b": "in_context",
                "metric": "exact_match",
                "difference": {"mean": -0.0083, "low": -0.058, "high": 0.042},
                "p_mcnemar": 1.0,
            },
            {
                "a": "distilled",
                "b": "in_context",
                "metric": "field_accuracy",
                "difference": {"mean": -0.006, "low": -0.03, "high": 0.018},
                "p_mcnemar": None,
            },
        ],
        "constant": {"prediction": "call mom | sunday | 6pm", "metric": "exact_match", "mean": 0.008},
        "gate": {
            "verdict": "teach",
            "reasons": ["the teacher's exact match is 82.5 points above zero-shot"],
            "gain": {"mean": 0.825, "low": 0.758, "high": 0.892},
            "metric": "exact_match",
            "kl": estimate(1.874, 0.12),
            "context_tokens": 503,
            "query_tokens": {"mean": 36.8, "max": 49},
            "window": 8192,
            "fits": True,
            "estimate": {"seconds": 141.3, "memory_mb": 1480, "cost": None},
        },
        "training": {
            "steps": 100,
            "epochs": 4,
            "best_step": 100,
            "best_validation_kl": 0.0521,
            "seconds": 96.4,
            "trainable_parameters": 4884480,
            "adapter_bytes": 19561328,
            "train_rows": 200,
            "supervised_tokens": 2911,
            "truncated_completions": 1,
        },
        "cost": {
            "seconds": {"gate": 21.5, "label": 18.2, "train": 96.4, "total": 136.1},
            "prompt_tokens_saved": 503.0,
            "ms_saved": {"mean": 421.6, "low": 390.0, "high": 450.0, "n": 24},
            "break_even_requests": 323,
            "break_even_money": None,
            "training_tokens": 161_000,
            "break_even_tokens": 320.1,
        },
        "notes": ["1 completion hit max_new_tokens without an end."],
    }


def make_recipe() -> dict[str, Any]:
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n"
    return {
        "recipe": {
            "name": "reminders",
            "model": {"name": "HuggingFaceTB/SmolLM2-135M-Instruct", "revision": "12fd25f", "trust_remote_code": False},
            "lora": {"rank": 12, "alpha": 32.0},
            "train": {"loss": "forward_kl", "temperature": 1.0, "ce_weight": 0.0, "lr": 5e-4, "epochs": 4, "seed": 0},
            "eval": {"max_new_tokens": 48},
        },
        "explicit": ["train.lr", "lora.rank"],
        "fingerprint": "5f0c" * 8,
        "created": "2025-01-31T12:00:00+00:00",
        "versions": {
            "ctxdistill": "0.1.0",
            "torch": "2.13.0",
            "transformers": "5.24.0",
            "peft": "0.19.0",
            "python": "3.11.2",
        },
        "model": {
            "name": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "revision": "12fd25f77366fa6b3b4b768ec3050bf629380bac",
            "weights_sha256": "a1" * 32,
            "tokenizer_sha256": "b2" * 32,
            "template_sha256": "c3" * 32,
            "dtype": "float32",
            "device": "cpu",
            "architecture": "LlamaForCausalLM",
            "parameters": 134515008,
            "window": 8192,
        },
        "context": {
            "sha256": "d4" * 32,
            "tokens": 503,
            "kinds": ["system", "demos"],
            "preview": "system: Turn the reminder into one line: task | day | time.\n"
            "user: remind me to feed the cat at noon\n"
            "assistant: feed the cat | today | noon",
        },
        "rows": {
            "train": 200,
            "validation": 20,
            "eval": 120,
            "demos": 10,
            "dropped_duplicates": 0,
            "left_out_by_limit": 0,
            "sha256": "e5" * 32,
        },
        "student_prompt": {
            "text": system + "<|im_start|>user\n{query}<|im_end|>\n<|im_start|>assistant\n",
            "template_inserts": system,
        },
    }


def make_metrics() -> list[dict[str, Any]]:
    rng, lines = random.Random(0), []
    for step in range(1, 101):
        kl = 1.9 * math.exp(-step / 16) + 0.05 * (1 + 0.4 * rng.random())
        rate = 5e-4 * min(step / 10, 0.55 + 0.45 * math.cos(math.pi * step / 100))
        lines.append(
            {
                "event": "step",
                "step": step,
                "epoch": step / 25,
                "loss": kl,
                "kl": kl,
                "lr": rate,
                "grad_norm": 0.4,
                "tokens": 230,
            }
        )
        if step % 25 == 0:
            lines.append({"event": "validation", "step": step, "epoch": step / 25, "kl": kl * 1.15, "best": True})
    return lines


def make_scores(queries: list[str]) -> list[dict[str, Any]]:
    rng, lines = random.Random(1), []
    texts = {"zero_shot": "I'm sorry, but I cannot set reminders for you.", "in_context": "call mom | sunday | 6pm"}
    for number, query in enumerate(queries):
        for arm in ARMS:
            right = float(arm != "zero_shot" and number % 4 != 3)
            spread = {"zero_shot": 2.2, "in_context": 0.0, "distilled": 0.12}[arm]
            words = ["call", " mom", " |", " sunday", " |", " ", "6", "pm", "<|im_end|>"]
            lines.append(
                {
                    "arm": arm,
                    "row": f"eval:{number}",
                    "query": query,
                    "answer": "call mom | sunday | 6pm",
                    "prediction": texts.get(arm, "call mom | sunday | 6pm") if number < 8 else query,
                    "metrics": {"exact_match": right, "format": right, "field_accuracy": right},
                    "prompt_tokens": 540 if arm == "in_context" else 37,
                    "kl": spread / 2,
                    "tokens": len(words),
                    "top1": 0.9,
                    "token_kl": [[word, spread * rng.random() ** 2] for word in words] if spread else [],
                }
            )
    return lines


def plant(value: Any, index: list[int] | None = None) -> Any:
    """`value` with hostile text after every string that is data, not a key that code reads."""
    index = index or [0]
    if isinstance(value, dict):
        code = {"row", "arm", "arms", "metric", "main_metric", "a", "b", "event"}
        return {k: v if k in code else plant(v, index) for k, v in value.items()}
    if isinstance(value, list):
        return [plant(item, index) for item in value]
    if isinstance(value, str):
        index[0] += 1
        return f"{value} {HOSTILE[index[0] % len(HOSTILE)]}"
    return value


Run = Callable[..., Path]


def build_run(path: Path, *, hostile: bool = False, **changes: Any) -> Path:
    """A run folder; `changes` replace top-level values of evaluation.json."""
    queries = [f"remind me to call mom on sunday at {hour}pm" for hour in range(1, 10)]
    evaluation, recipe, scores = {**make_evaluation(), **changes}, make_recipe(), make_scores(queries)
    if hostile:
        evaluation, recipe, scores = plant(evaluation), plant(recipe), plant(scores)
        for number, line in enumerate(scores):
            line["query"] = line["prediction"] = HOSTILE[number // 3 % len(HOSTILE)]
    (path / "adapter").mkdir(parents=True)
    for name, value in (("evaluation.json", evaluation), ("recipe.json", recipe)):
        (path / name).write_text(json.dumps(value))
    for name, values in (("metrics.jsonl", make_metrics()), ("scores.jsonl", scores)):
        (path / name).write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


class Page(HTMLParser):
    """Tags with their attributes, and the text a reader sees."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.quiet = 0
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self.quiet += tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self.quiet -= tag == "style"

    def handle_data(self, data: str) -> None:
        self.text += "" if self.quiet else data


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return build_run(tmp_path / "run")


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    return build_run(tmp_path / "hostile", hostile=True)


def page_of(path: Path) -> Page:
    return Page(report.write_report(path).read_text(encoding="utf-8"))


def squeeze(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def test_the_table_has_the_numbers_that_were_measured() -> None:
    rows = {row["metric"]: row for row in report.result_table(make_evaluation())}
    assert rows["exact_match"]["label"] == "exact match %"
    assert rows["exact_match"]["cells"] == {
        "zero_shot": "0.0",
        "in_context": "82.5 [75.8, 89.2]",
        "distilled": "81.7 [74.7, 88.7]",
    }
    assert rows["kl"]["cells"]["distilled"] == "0.054 [0.045, 0.063]"
    assert rows["kl_closed"]["cells"] == {"zero_shot": "0.0", "in_context": "100.0", "distilled": "97.1 [96.5, 97.6]"}
    assert rows["prompt_tokens"]["cells"]["in_context"] == "539.8"  # counted: no interval
    assert rows["mine:brevity"]["cells"] == {"zero_shot": "3.250 [2.750, 3.750]", "in_context": "–", "distilled": "–"}
    assert list(rows) == [
        "format",
        "exact_match",
        "field_accuracy",
        "mine:brevity",
        "kl",
        "kl_closed",
        "top1",
        "prompt_tokens",
        "latency_ms",
    ]


@pytest.mark.parametrize(
    ("metric", "value", "options", "text"),
    [
        ("exact_match", {"mean": 0.825, "low": 0.75, "high": 0.892}, {}, "82.5 [75.0, 89.2]"),
        ("exact_match", {"mean": 0.825, "low": 0.75, "high": 0.892}, {"unit": "%"}, "82.5 % [75.0, 89.2]"),
        ("exact_match", {"mean": -0.00001, "low": -0.05, "high": 0.04}, {"sign": True}, "+0.0 [-5.0, +4.0]"),
        ("latency_ms", {"mean": 1210.44}, {}, "1,210"),
        ("exact_match", {"mean": math.nan, "low": 0, "high": 1}, {}, "–"),
        ("exact_match", None, {}, "–"),
    ],
)
def test_cells_writes_estimates(
    metric: str, value: dict[str, float] | None, options: dict[str, Any], text: str
) -> None:
    assert report.cells(metric, value, **options) == text


def test_the_verdict_says_what_was_measured(run: Path) -> None:
    sentence = (
        "Faithful: the adapter closes 97.1 % [96.5, 97.6] of the KL and answers with 81.7 % exact match against 82.5 % "
        "with the context in the prompt and 0.0 % without it, using 37 instead of 540 prompt tokens."
    )
    assert report.verdict(make_evaluation())["sentence"] == sentence
    assert sentence in page_of(run).text
    assert sentence in (run / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("closed", "level"),
    [
        ((0.95, 0.94, 0.96), "faithful"),
        ((0.949, 0.94, 0.96), "close"),
        ((0.8, 0.7, 0.9), "close"),
        ((0.79, 0.7, 0.9), "partial"),
        ((0.1, -0.02, 0.2), "no effect"),
        ((-0.5, -0.7, -0.3), "no effect"),
        (None, "not judged"),
    ],
)
def test_the_level_follows_the_kl_that_is_closed(closed: tuple[float, float, float] | None, level: str) -> None:
    estimate = dict(zip(("mean", "low", "high"), closed, strict=True)) if closed else None
    found = report.verdict({**make_evaluation(), "kl_closed": estimate})
    assert found["level"] == level
    doubted = any("counts only if such answers will do" in remark for remark in found["remarks"])
    assert doubted == (level not in ("faithful", "close"))  # what is saved is told of every run
    doubtful = any("The interval reaches below" in remark for remark in found["remarks"])
    assert doubtful == (closed in ((0.95, 0.94, 0.96), (0.8, 0.7, 0.9)))


def test_the_verdict_does_not_hide_an_adapter_that_is_worse_than_its_teacher() -> None:
    evaluation = make_evaluation()
    evaluation["comparisons"][2] = {
        "a": "in_context",
        "b": "distilled",
        "metric": "exact_match",
        "difference": {"mean": 0.1, "low": 0.04, "high": 0.16},
    }
    remarks = " ".join(report.verdict(evaluation)["remarks"])
    assert "-10.0 points [-16.0, -4.0]: the adapter is worse than its teacher" in remarks
    assert "no difference shown" not in remarks
    for kept, level in ((0.3, "partial"), (0.9, "close")):  # whatever the KL says, that is not faithful
        evaluation["gap_closed"] = {"mean": kept, "low": kept - 0.1, "high": kept + 0.1}
        assert report.verdict(evaluation)["level"] == level


@pytest.mark.parametrize(
    ("teacher", "student", "said"),
    [
        (
            (-0.4, -0.5, -0.3),
            (-0.36, -0.46, -0.26),
            "In-context minus zero-shot, exact match: -40.0 points [-50.0, -30.0]; distilled minus zero-shot, exact match: "
            "-36.0 points [-46.0, -26.0]: the adapter, as its teacher, is worse than the model without the context.",
        ),
        (
            (-0.04, -0.1, 0.02),
            (-0.06, -0.11, -0.01),
            "Distilled minus zero-shot, exact match: -6.0 points [-11.0, -1.0]: the adapter is worse than "
            "the model without the context.",
        ),
        (
            (-0.06, -0.11, -0.01),
            (-0.04, -0.1, 0.02),
            "In-context minus zero-shot, exact match: -6.0 points [-11.0, -1.0]: the teacher is worse than "
            "the model without the context.",
        ),
        ((-0.04, -0.1, 0.02), (-0.04, -0.1, 0.02), None),
    ],
)
def test_a_context_that_makes_it_worse_is_remarked_upon(
    teacher: tuple[float, ...], student: tuple[float, ...], said: str | None
) -> None:
    evaluation = make_evaluation()
    for pair, numbers in zip(evaluation["comparisons"], (teacher, student), strict=False):
        pair["difference"] = dict(zip(("mean", "low", "high"), numbers, strict=True))
    found = report.verdict(evaluation)
    assert found["level"] == "faithful"  # to such a teacher
    assert [remark for remark in found["remarks"] if "the model without the context" in remark] == (
        [said] if said else []
    )


def test_the_table_of_rounds() -> None:
    numbers = {"reverse_kl": 0.1, "student_entropy": 0.2, "teacher_entropy": 0.3, "tokens": 5.5, "ended": 0.5}
    line = {"event": "round", "round": 1, "step": 8, "student_rows": 3, "rows": 4, **numbers, "repeated": 0.25}
    table = results.round_table([{"event": "step"}, line])
    assert table and table["rows"] == [["1", "8", "3 of 4", "0.100", "0.200", "0.300", "5.5", "50.0", "25.0"]]
    assert len(table["columns"]) == 9 and results.round_table(make_metrics()) is None


def test_an_adapter_that_a_constant_answer_equals_is_called_so() -> None:
    evaluation = make_evaluation()
    assert "does not beat" not in " ".join(report.verdict(evaluation)["remarks"])
    evaluation["constant"]["mean"] = evaluation["table"]["distilled"]["exact_match"]["mean"]
    said = "Always answering “call mom | sunday | 6pm” scores 81.7 % exact match; the adapter does not beat that."
    assert said in report.verdict(evaluation)["remarks"]


def test_it_says_why_gap_closed_is_undefined(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", gap_closed={"undefined": "the teacher's gain is not different from 0"})
    said = "(gap closed) is undefined: the teacher's gain is not different from 0."
    assert said in page_of(run).text
    assert said in (run / "report.md").read_text(encoding="utf-8")


def test_nothing_in_data_becomes_markup(hostile: Path) -> None:
    page = page_of(hostile)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "iframe", "link", "object", "embed", "form", "base"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert [tag for tag, _ in page.tags].count("style") == 1
    for text in (
        "<script>alert(1)</script>",
        "</style><b>out</b>",
        '"><img src=x onerror=alert(1)>',
        "{{ 7 * 7 }} {% raw %}",
    ):
        assert text in page.text
    assert "abc⟨U+202E⟩def⟨U+2066⟩ghi" in page.text
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00]", page.text)


def test_the_page_loads_nothing_and_runs_nothing(hostile: Path) -> None:
    page = page_of(hostile)
    policy = [
        a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    targets = [
        a[name] for _, a in page.tags for name in ("src", "href", "xlink:href", "data", "action", "srcset") if name in a
    ]
    assert targets
    assert all(target and target.startswith("#") for target in targets)
    styles = [a["style"] for _, a in page.tags if a.get("style")]
    css = re.findall(r"<style>.*?</style>", (hostile / "report.html").read_text(encoding="utf-8"), re.DOTALL)
    assert not [s for s in [*styles, *css] if s and re.search(r"@import|url\((?!#)", s)]


def test_ids_are_unique_and_references_lead_somewhere(run: Path) -> None:
    page = page_of(run)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    html = (run / "report.html").read_text(encoding="utf-8")
    assert set(re.findall(r'(?:href="#|url\(#|labelledby=")([^")]+)', html)) <= set(ids)


def test_the_page_shows_every_part(run: Path) -> None:
    page = page_of(run)
    text = squeeze(page.text)
    assert [a["aria-label"] for tag, a in page.tags if tag == "svg"] == [
        "Loss, KL and validation KL per training step, and the learning rate",
        "Cumulative tokens over requests, with the context in the prompt and distilled",
        "Cumulative minutes over requests, with the context in the prompt and distilled",
    ]
    for part in (
        "✓ correct",
        "✗ incorrect",
        "Distilled minus in-context, exact match: -0.8 points [-5.8, +4.2]; no difference shown.",
        "323 requests",
        "Counted in time, it pays off after 323 requests.",
        "Counted in prompt tokens, it pays off after 321 requests",
        "a1" * 32,
        "d4" * 32,
        "2.13.0",
        "always answering “call mom | sunday | 6pm” scores 0.8 % exact match",
        "1 completion hit max_new_tokens without an end.",
        "< 0.001",
        "train.lr, lora.rank",
        "It keeps 99.0 % [93.0, 105.0] of the teacher's gain in exact match.",
        "136 s (gate 22 s, label 18 s, train 96 s)",
        "in-context 82.5, zero-shot 0.0",
        "instead of 539.8 with the context",
        "(distilling processed 161,000 tokens)",
        "+82.5 [+75.8, +89.2]",
        "in-context higher",
    ):
        assert part in text, part
    assert text.count("remind me to call mom on sunday at") == 8
    heat = [
        (a["class"], a["title"]) for tag, a in page.tags if tag == "span" and (a.get("title") or "").startswith("KL ")
    ]
    assert len(heat) == 8 * 2 * 9
    levels = [sum(float(str(title).split()[1]) >= limit for limit in report.HEAT) for _, title in heat]
    assert [kind for kind, _ in heat] == [f"k k{level}" for level in levels] and len(set(levels)) > 3


def test_equal_runs_give_equal_bytes(tmp_path: Path) -> None:
    one, two = (report.write_report(build_run(tmp_path / name)).read_bytes() for name in ("a", "b"))
    assert one == two


def test_markdown_is_escaped(hostile: Path) -> None:
    report.write_report(hostile)
    report.write_card(hostile)
    for path in (hostile / "report.md", hostile / "adapter" / "README.md"):  # the front matter is YAML
        text, fenced = "", ""
        for line in path.read_text(encoding="utf-8").split("\n---\n\n# ")[-1].split("\n"):
            ticks = re.match("`{3,}", line)
            if fenced:
                fenced = "" if line == fenced else fenced
            elif ticks:
                fenced = ticks[0]
            else:
                text += line + "\n"
        assert not fenced, path
        assert not re.search(r"<\w|</", text), path
        assert "# a heading" not in re.findall("^#+ .*", text, re.MULTILINE)
        assert "](" not in text.replace("\\](", "")
        for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
            columns = {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
            assert len(columns) == 1, table


def test_markdown_has_the_same_table(run: Path) -> None:
    report.write_report(run)
    text = (run / "report.md").read_text(encoding="utf-8")
    assert "| metric | zero-shot | in-context | distilled |\n|---|---:|---:|---:|\n" in text
    assert "| exact match % | 0.0 | 82.5 [75.8, 89.2] | 81.7 [74.7, 88.7] |\n" in text
    assert "| zero-shot | I'm sorry, but I cannot set reminders for you. | ✗ incorrect | 1.100 |\n" in text
    assert "| in-context | call mom \\| sunday \\| 6pm | ✓ correct | 0.000 |\n" in text


def test_a_fence_cannot_be_ended_from_inside() -> None:
    for text in ("```", "a\n````\nb", "~~~"):
        first, *_, last = report.fence(text, "").split("\n")
        assert first == last
        assert first not in text


def test_the_card_says_how_to_serve(run: Path) -> None:
    path = report.write_card(run)
    assert path == run / "adapter" / "README.md"
    card = path.read_text(encoding="utf-8")
    _, front, body = card.split("---\n", 2)
    assert front.splitlines()[:8] == [
        'base_model: "HuggingFaceTB/SmolLM2-135M-Instruct"',
        "base_model_relation: adapter",
        "library_name: peft",
        "pipeline_tag: text-generation",
        "tags:",
        "- lora",
        "- context-distillation",
        "- ctxdistill",
    ]
    index = yaml.safe_load(front)["model-index"][0]
    metrics = {m["type"]: m for m in index["results"][0]["metrics"]}
    table = make_evaluation()["table"]["distilled"]
    assert index["name"] == "reminders" and set(table) - set(metrics) == {"prompt_tokens", "latency_ms"}
    for name, metric in metrics.items():
        if name in table:
            assert metric["value"] == table[name]["mean"] and metric["args"]["low"] == table[name]["low"]
    prompt = make_recipe()["student_prompt"]["text"]
    assert f"```\n{prompt}\n```" in body
    code = re.search(r"```python\n(.*?)\n```", body, re.DOTALL)
    assert code
    compile(code[1], "card", "exec")
    assert f"prompt = {prompt!r}" in code[1]
    assert """prompt = prompt.replace('{query}', "your query")""" in code[1]
    assert (
        "vllm serve HuggingFaceTB/SmolLM2-135M-Instruct --revision 12fd25f "
        "--enable-lora --lora-modules reminders=path/to/this/folder" in body
    )
    assert "--max-lora-rank 16\n" in body  # rank 12 is not a value that vLLM takes
    for part in (
        "d4" * 32,
        "c3" * 32,
        "12fd25f77366fa6b3b4b768ec3050bf629380bac",
        "forward_kl",
        "81.7 [74.7, 88.7]",
        "feed the cat | today | noon",
    ):
        assert part in body


def test_hostile_text_cannot_leave_the_code_of_the_card(hostile: Path) -> None:
    card = report.write_card(hostile).read_text(encoding="utf-8")
    ticks, code = re.findall(r"^(`{3,})python\n(.*?)\n\1$", card, re.MULTILINE | re.DOTALL)[0]
    compile(code, "card", "exec")
    assert json.loads(card.split("\n")[1].removeprefix("base_model: "))
    assert ticks


def test_a_gguf_base_is_loaded_as_one(run: Path) -> None:
    recipe = make_recipe()
    recipe["recipe"]["model"] = {"name": "models/small.gguf", "revision": None, "trust_remote_code": False}
    (run / "recipe.json").write_text(json.dumps(recipe))
    assert "from_pretrained('models', gguf_file='small.gguf')" in report.write_card(run).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["recipe.json", "evaluation.json"])
def test_an_incomplete_run_is_an_error_that_helps(run: Path, name: str) -> None:
    (run / name).unlink()
    for write in (report.write_report, report.write_card):
        with pytest.raises(RunError, match=name) as caught:
            write(run)
        assert caught.value.expected
        assert "metrics.jsonl" in caught.value.found
        assert f"--out {run} --resume" in caught.value.fix
    assert not (run / "report.html").exists()


def test_a_half_filled_evaluation_is_an_error(run: Path) -> None:
    (run / "evaluation.json").write_text('{"arms": ["zero_shot"]}')
    with pytest.raises(RunError, match="incomplete") as caught:
        report.write_report(run)
    assert "table" in caught.value.expected
    assert caught.value.found == "arms"


def test_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught:
        report.write_report(tmp_path / "nothing")
    assert caught.value.found == "no such folder"


def test_optional_parts_may_be_missing(tmp_path: Path) -> None:
    evaluation = make_evaluation()
    table = {
        arm: {k: v for k, v in row.items() if k in ("kl", "top1", "prompt_tokens")}
        for arm, row in evaluation["table"].items()
    }
    cost = {**evaluation["cost"], "ms_saved": None, "break_even_requests": None}
    run = build_run(
        tmp_path / "run",
        table=table,
        main_metric=None,
        answers=0,
        kl_closed=None,
        gap_closed=None,
        comparisons=[],
        constant=None,
        cost=cost,
        notes=[],
        gate={**evaluation["gate"], "gain": None, "metric": None},
    )
    lines = [json.loads(line) for line in (run / "scores.jsonl").read_text().splitlines()]
    (run / "scores.jsonl").write_text(
        "".join(json.dumps({**line, "answer": None, "metrics": {}}) + "\n" for line in lines)
    )
    text = squeeze(page_of(run).text)
    for part in (
        "Not judged: the share of the KL that the adapter closes is not defined for this run "
        "(KL without the context: 1.874 [1.754, 1.994]",
        "Only fidelity to the teacher was measured",
        "No reference answer",
        "not known, because the time of a request was not measured",
    ):
        assert part in text, part
    assert "correct" not in text
    assert report.write_card(run).is_file()


def test_the_bare_minimum_renders(run: Path) -> None:
    for name in ("metrics.jsonl", "scores.jsonl"):
        (run / name).unlink()
    (run / "evaluation.json").write_text(json.dumps({"arms": ARMS, "table": {"zero_shot": {"kl": {"mean": 1.5}}}}))
    recipe = make_recipe()
    (run / "recipe.json").write_text(json.dumps({"recipe": recipe["recipe"], "model": {"name": "m"}}))
    text = page_of(run).text
    for part in ("No training curve was recorded.", "No single rows were recorded.", "Cost was not recorded."):
        assert part in text
        assert part.startswith("No training") or part in (run / "report.md").read_text(encoding="utf-8")
    assert "1.500" in report.write_card(run).read_text(encoding="utf-8")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures of the plots that a test makes, in the place of their SVG."""
    figures: list[Any] = []
    monkeypatch.setattr(plots, "_svg", lambda figure, *_: figures.append(figure))
    return figures


def lines_of(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    """Label -> x and y of each line of a plot."""
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}


def test_lines_of_the_break_even_plots(drawn: list[Any]) -> None:
    plots.break_even_plots(make_evaluation())
    for figure, paid, teacher, student in zip(
        drawn, (161_000, 136.1 / 60), (539.8, 0.8421 / 60), (36.8, 0.4205 / 60), strict=True
    ):
        lines = lines_of(figure.axes[0])
        (_, end), costs = lines["context in the prompt"]
        assert costs == pytest.approx([0, teacher * end])
        assert lines["distilled, training included"][1] == pytest.approx([paid, paid + student * end])


def test_lines_of_the_strength_plot(drawn: list[Any]) -> None:
    closed, elsewhere = (0.0, 0.6, 0.9), (0.0, 0.1, 0.3)
    estimates = [({"mean": a, "low": a, "high": a}, {"mean": b}) for a, b in zip(closed, elsewhere, strict=True)]
    points = [{"strength": s / 2, "kl_closed": a, "unrelated_kl": b} for s, (a, b) in enumerate(estimates)]
    plots.strength_plot(points)
    (x, top), (_, bottom) = (next(iter(lines_of(axes).values())) for axes in drawn[0].axes)
    assert (x, top, bottom) == ([0, 0.5, 1], [0, 60, 90], list(elsewhere))


def test_lines_of_the_training_plot(drawn: list[Any]) -> None:
    lines = make_metrics()
    for line in lines:
        if line["event"] == "step":
            line["loss"] = 2 * line["kl"]
        line["best"] = line["event"] == "validation" and line["step"] in (25, 75)
    plots.training_plot(lines)
    top, bottom = (lines_of(axes) for axes in drawn[0].axes)
    steps = [line for line in lines if line["event"] == "step"]
    for label, factor in (("KL", 1), ("loss", 2)):
        assert top[label] == ([line["step"] for line in steps], [factor * line["kl"] for line in steps])
    assert top["KL, held-out"][0] == [25, 50, 75, 100] and top["best, kept"][0] == [75]  # the last that was best
    assert next(iter(bottom.values()))[1] == [line["lr"] for line in steps]


def test_a_run_that_saves_nothing_never_pays_off(tmp_path: Path) -> None:
    cost = {
        **make_evaluation()["cost"],
        "ms_saved": {"mean": -3.0, "low": -5.0, "high": -1.0, "n": 24},
        "prompt_tokens_saved": 0.0,
        "break_even_requests": None,
        "break_even_tokens": None,
    }
    text = squeeze(page_of(build_run(tmp_path / "run", cost=cost)).text)
    assert "Counted in time, it never pays off: -3.0 ms [-5.0, -1.0] saved by a request, 24 rows" in text
    assert "Counted in prompt tokens, it never pays off" in text
    assert "Each request takes 3 ms more" in text


def test_the_verdict_says_what_a_reader_may_not_expect() -> None:
    evaluation = {**make_evaluation(), "rows": 104}
    plain = " ".join(report.verdict(evaluation)["remarks"])
    assert not any(words in plain for words in ("label words", "unrelated prompts", "few"))
    share = {"mean": 0.32, "low": 0.17, "high": 0.52, "n": 25}
    table = {arm: {**part, "free_label": {**share, "mean": 0.8}} for arm, part in evaluation["table"].items()}
    table["distilled"]["free_label"] = share
    kl = {"mean": 0.602, "low": 0.5, "high": 0.7, "n": 16}  # a small part of what was taught
    table["zero_shot"]["kl"] = {"mean": 9.7, "low": 9.0, "high": 10.0, "n": 25}
    unrelated = {"unrelated": {"kl": kl, "rows": 16, "same": {"mean": 0.0}}}
    remarks = " ".join(report.verdict({**evaluation, "table": table, "rows": 4, "behaviour": unrelated})["remarks"])
    assert "one of them on 32.0 % [17.0, 52.0] (in-context: 80.0 % [17.0, 52.0])" in remarks
    assert "KL to the base model 0.602 [0.500, 0.700] nats per token, 6 % of the taught KL" in remarks
    assert "measured on 4 held-out rows, which are few" in remarks


def test_time_that_is_not_shown_to_be_saved_does_not_pay_off(tmp_path: Path) -> None:
    saved = {"mean": 400.0, "low": -100.0, "high": 900.0, "n": 4}
    cost = {**make_evaluation()["cost"], "ms_saved": saved, "break_even_requests": None}
    run = build_run(tmp_path / "run", cost=cost)
    text = squeeze(page_of(run).text)
    assert "Counted in time, it is not shown to pay off: +400 ms [-100, +900] saved by a request, 4 rows" in text
    assert "321 requests" in text and "counted in prompt tokens; in time it is not shown to pay off" in text


@pytest.mark.parametrize(("mean", "said"), [(400.0, "+400 ms"), (-400.0, "-400.0 ms")])
def test_one_timed_row_shows_nothing(tmp_path: Path, mean: float, said: str) -> None:
    saved = {"mean": mean, "low": mean, "high": mean, "n": 1}
    cost = {**make_evaluation()["cost"], "ms_saved": saved, "break_even_requests": None}
    text = squeeze(page_of(build_run(tmp_path / "run", cost=cost)).text)
    assert f"Counted in time, it is not shown to pay off: {said} saved by a request, 1 row." in text
    assert f"Each request takes 400 ms {'less' if mean > 0 else 'more'} (1 row), on the machine" in text


@pytest.mark.parametrize(
    ("saved", "told"),
    [
        (
            {"mean": -3.0, "low": -5.0, "high": -1.0, "n": 24},
            "neverno prompt tokens are saved; in time it never pays off",
        ),
        (
            {"mean": 4.0, "low": -1.0, "high": 9.0, "n": 4},
            "not shownno prompt tokens are saved; in time it is not shown to pay off",
        ),
        (None, "not shownno prompt tokens are saved; time was not measured"),
    ],
)
def test_what_is_not_shown_is_not_called_never(tmp_path: Path, saved: dict[str, float] | None, told: str) -> None:
    cost = {**make_evaluation()["cost"], "ms_saved": saved, "break_even_requests": None, "break_even_tokens": None}
    text = squeeze(page_of(build_run(tmp_path / "run", cost=cost)).text)
    assert f"pays off after{told}" in text


def test_a_context_that_the_template_outweighs_is_not_called_shorter(tmp_path: Path) -> None:
    evaluation = make_evaluation()
    cost = {**evaluation["cost"], "prompt_tokens_saved": -10.0, "break_even_tokens": None}
    run = build_run(tmp_path / "run", cost=cost, gate={**evaluation["gate"], "context_tokens": -10})
    text = squeeze(page_of(run).text)
    assert "Each request is 10 prompt tokens longer: the chat template puts a system text of its own" in text
    assert "context tokensnone more than the chat template's own system text" in text


def test_examples_mark_what_is_partly_right_and_keep_the_order() -> None:
    evaluation = {**make_evaluation(), "main_metric": "field_accuracy"}
    scores = make_scores(["a", "b", "c"])
    scores[2]["metrics"]["field_accuracy"] = 2 / 3
    found = report.examples(scores, evaluation, count=2)
    assert [example["query"] for example in found] == ["a", "b"]
    assert [arm["mark"]["text"] for arm in found[0]["arms"]] == ["✗ incorrect", "✓ correct", "partly right: 66.7 %"]
    for score, valid in zip(scores, (0, 1, 1), strict=False):
        score["metrics"]["format"] = valid
    found = report.examples(scores, {**evaluation, "main_metric": "format"}, count=1)
    assert [arm["mark"]["text"] for arm in found[0]["arms"]] == ["✗ not valid", "✓ valid", "✓ valid"]
    assert [
        token["level"]
        for token in report.examples([{**scores[0], "token_kl": [["x", 0.04], ["y", 0.05], ["z", 9]]}], evaluation)[0][
            "arms"
        ][0]["tokens"]
    ] == [0, 1, 5]


def test_the_report_does_not_load_torch(run: Path) -> None:
    code = (
        "import sys; from ctxdistill import report; report.write_report(sys.argv[1]); report.write_card(sys.argv[1]); "
        "print(sorted({'torch', 'transformers', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
