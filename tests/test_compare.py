"""Runs side by side: what is paired, what is refused, and the numbers against obvious ones."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from ctxdistill import cli, display
from ctxdistill.compare import compare, write_page
from ctxdistill.errors import RunError
from ctxdistill.results import NO_VALUE
from ctxdistill.stats import Estimate, kl_closed
from test_report import HOSTILE, Page, build_run

Change = Callable[[dict[str, Any]], None]


def make(path: Path, *, rows: range = range(60), right: int = 4, kl: float = 0.1, **changes: Any) -> Path:
    """A run with `rows`, of which every `right`-th is wrong; `changes` replace values of recipe.json, `model__dtype`."""
    build_run(path)
    lines = []
    noise = np.random.default_rng(rows.start + right).random(1000)
    for n in rows:
        for arm in ("zero_shot", "in_context", "distilled"):
            good = float(arm != "zero_shot" and (arm == "in_context" or n % right != 0))
            lines.append(
                {"arm": arm, "row": f"r{n}", "query": f"q{n}", "answer": "a", "prediction": "a", "prompt_tokens": 10, "top1": 1.0,
                 "metrics": {"exact_match": good, "field_accuracy": good * 0.5 + 0.25, "format": 1.0}, "tokens": 5 + n % 3,
                 "kl": {"zero_shot": 2.0 + n / 100, "in_context": 0.0, "distilled": kl * (0.5 + noise[n])}[arm]}
            )  # fmt: skip
    (path / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = json.loads((path / "recipe.json").read_text())
    for key, value in changes.items():
        section, name = key.split("__")
        recipe[section][name] = value
    (path / "recipe.json").write_text(json.dumps(recipe))
    return path


def pair_of(found: dict[str, Any], metric: str) -> dict[str, Any]:
    (pair,) = [p for p in found["pairs"] if p["metric"] == metric]
    return dict(pair)


def test_what_the_adapters_do_elsewhere_stands_beside(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a"), make(tmp_path / "b")
    evaluation = json.loads((a / "evaluation.json").read_text())
    kl, same = ({"mean": mean, "low": 0.25, "high": 0.75, "n": 16} for mean in (0.4, 0.5))
    evaluation["behaviour"] = {"unrelated": {"rows": 16, "kl": kl, "same": same}}
    (a / "evaluation.json").write_text(json.dumps(evaluation))
    rows = {row["label"]: row["cells"] for row in compare([a, b])["table"] if row["group"] == "retention"}
    assert rows == {
        "KL to the base model, unrelated prompts": ["0.400 [0.250, 0.750]", NO_VALUE],
        "the same answer there %": ["50.0 [25.0, 75.0]", NO_VALUE],
    }


def test_two_runs_on_the_same_rows(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a", kl=0.1), make(tmp_path / "b", right=2, kl=0.9)
    found = compare([a, b])
    assert found["refused"] == []
    exact = pair_of(found, "exact_match")
    assert (exact["rows"], exact["test"]) == (60, "McNemar")
    assert exact["difference"]["mean"] == pytest.approx((45 - 30) / 60)
    assert exact["p"] == pytest.approx(2 * 0.5**15)  # all 15 rows that differ go one way
    assert exact["reading"] == "A is higher" and exact["text"].startswith("+25.0 points [")
    field = pair_of(found, "field_accuracy")
    assert field["test"] == "sign flips" and field["difference"]["mean"] == pytest.approx(0.125)
    closed = pair_of(found, "kl_closed")

    def share(path: Path) -> Estimate:
        lines = [json.loads(line) for line in (path / "scores.jsonl").read_text().splitlines()]
        sums = [[x["kl"] * x["tokens"] for x in lines if x["arm"] == arm] for arm in ("distilled", "zero_shot")]
        tokens = [x["tokens"] for x in lines if x["arm"] == "distilled"]
        estimate = kl_closed(*sums, tokens, resamples=200, seed=0)
        assert estimate
        return estimate

    assert closed["difference"]["mean"] == pytest.approx(share(a).mean - share(b).mean)
    assert closed["difference"]["low"] > 0 and closed["p"] < 0.001
    # Holm by hand: the smallest p times four
    ordered = sorted(found["pairs"], key=lambda p: p["p"])
    assert ordered[0]["p_holm"] == pytest.approx(4 * ordered[0]["p"])
    assert len(found["pairs"]) == 4


def test_a_difference_counts_by_its_corrected_p(tmp_path: Path) -> None:
    rows = range(1, 19)
    found = compare([make(tmp_path / "a", rows=rows, right=1000), make(tmp_path / "b", rows=rows, right=3)])
    exact = pair_of(found, "exact_match")  # 6 rows differ, all one way
    assert exact["p"] == pytest.approx(2 * 0.5**6) and exact["p"] < 0.05 < exact["p_holm"]
    assert exact["reading"] == "no difference shown" and exact["p_text"] == "0.031" != exact["p_holm_text"]


def test_a_base_that_is_the_teacher_has_nothing_to_close(tmp_path: Path) -> None:
    folders = [make(tmp_path / name) for name in "ab"]
    for file in (folder / "scores.jsonl" for folder in folders):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        zeros = [line | ({"kl": 0.0} if line["arm"] == "zero_shot" else {}) for line in lines]
        file.write_text("".join(json.dumps(line) + "\n" for line in zeros))
    (refused,) = compare(folders)["refused"]
    assert refused["what"] == "fidelity" and refused["why"] == "the base model already is the teacher"


def test_equal_runs_show_no_difference(tmp_path: Path) -> None:
    found = compare([make(tmp_path / "a"), make(tmp_path / "b")])
    assert {pair["reading"] for pair in found["pairs"]} == {"no difference shown"}
    assert {pair["p_holm"] for pair in found["pairs"]} == {1.0}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model__weights_sha256": "ff" * 32}, "the models differ"),
        ({"context__sha256": "ff" * 32}, "the contexts differ"),
        ({"model__template_sha256": "ff" * 32}, "chat templates"),
        ({"model__dtype": "bfloat16"}, "chat templates or types of the weights"),
    ],
)
def test_another_teacher_is_no_measure_of_fidelity(tmp_path: Path, changes: dict[str, str], why: str) -> None:
    found = compare([make(tmp_path / "a"), make(tmp_path / "b", right=2, **changes)])
    assert [item["what"] for item in found["refused"]] == ["fidelity"]
    assert why in found["refused"][0]["why"]
    assert {pair["metric"] for pair in found["pairs"]} == {
        "format",
        "exact_match",
        "field_accuracy",
    }  # the answers still are
    assert any("differ: a difference is one of" in note for note in found["notes"]) == ("template" not in why)


@pytest.mark.parametrize(("key", "value", "why"), [("tokens", 9, "other lengths"), ("kl", 2.5, "equally far")])
def test_other_completions_are_no_measure_of_fidelity(tmp_path: Path, key: str, value: Any, why: str) -> None:
    a, b = make(tmp_path / "a"), make(tmp_path / "b")
    lines = [json.loads(line) for line in (b / "scores.jsonl").read_text().splitlines()]
    lines[0][key] = value  # the base model on the first row
    (b / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = compare([a, b])
    assert [item["what"] for item in found["refused"]] == ["fidelity"] and why in found["refused"][0]["why"]


def test_only_shared_rows_are_paired(tmp_path: Path) -> None:
    found = compare([make(tmp_path / "a"), make(tmp_path / "b", rows=range(20, 90))])
    assert {pair["rows"] for pair in found["pairs"]} == {40}
    assert any("held-out rows differ" in note for note in found["notes"])
    apart = compare([make(tmp_path / "c"), make(tmp_path / "d", rows=range(55, 90))])
    assert apart["pairs"] == []
    assert "they share 5 held-out rows (of 60 and 35)" in apart["refused"][0]["why"]


def test_three_runs_are_compared_in_pairs_and_settings_that_differ_are_shown(tmp_path: Path) -> None:
    folders = [make(tmp_path / name, recipe__name=name) for name in "xyz"]
    recipe = json.loads((folders[1] / "recipe.json").read_text())
    recipe["recipe"]["lora"]["rank"] = 4
    recipe["recipe"]["train"] |= {"batch_size": 2, "note": "so " * 40}
    recipe["recipe"]["gate"] = {"min_kl": 9}  # decides whether there is a run, and no number of it
    recipe["rows"]["train"] = 7
    (folders[1] / "recipe.json").write_text(json.dumps(recipe))
    found = compare(folders)
    assert {(p["a"], p["b"]) for p in found["pairs"]} == {("A", "B"), ("A", "C"), ("B", "C")}
    rows = {row["label"]: row["cells"] for row in found["table"]}
    assert rows["rank"] == ["12", "4", "12"]
    assert rows["train.batch_size"] == [NO_VALUE, "2", NO_VALUE]  # a version that has no such key beside one that has
    assert rows["train.note"][1] == "so " * 19 + "…"
    assert rows["training rows"] == ["200", "7", "200"]
    assert not {"loss", "name", "gate.min_kl"} & rows.keys()  # the same everywhere, or said elsewhere
    assert rows["KL closed %"] == ["97.1 [96.5, 97.6]"] * 3
    assert rows["exact match %, its teacher"][0] == "82.5 [75.8, 89.2]"
    pays_off = [rows[f"pays off after requests ({way})"][0] for way in ("time", "tokens")]
    assert pays_off == ["323", "321"]  # after 320.1, as the report says it


@pytest.mark.parametrize("width", [80, 120])
def test_no_word_is_broken_in_a_terminal(tmp_path: Path, width: int) -> None:
    found = compare([make(tmp_path / name, right=right) for name, right in zip("abc", (4, 5, 7), strict=True)])
    out = Console(width=width, record=True, file=io.StringIO())
    display.comparison(out, found, Path("page.html"))
    said = out.export_text()
    words = {
        word
        for pair in found["pairs"]
        for key in ("label", "text", "reading", "p_holm_text")
        for word in pair[key].split()
    }
    assert len(found["pairs"]) > 9 and words <= set(said.split()) and "difference" in said.split()
    assert [line.split("  ")[0] for line in said.splitlines() if " minus " in line] == [
        "A minus B", "A minus C", "B minus C",
    ]  # fmt: skip


def test_what_cannot_be_compared_is_an_error(tmp_path: Path) -> None:
    a = make(tmp_path / "a")
    for folders in ([a], [a, a], [a, tmp_path / "." / "a"]):
        with pytest.raises(RunError, match="cannot be compared"):
            compare(folders)
    with pytest.raises(RunError, match="does not exist"):
        compare([a, tmp_path / "none"])
    b = make(tmp_path / "b")
    (b / "evaluation.json").unlink()
    with pytest.raises(RunError, match="not a finished run"):
        compare([a, b])


def test_a_folder_for_the_page(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    runs = [str(make(tmp_path / name)) for name in "ab"]
    assert cli.main(["compare", *runs, "--out", str(tmp_path), "--json"]) == 0
    page = tmp_path / "compare.html"
    assert json.loads(capfd.readouterr().out)["page"] == str(page) and page.is_file()


def test_the_page_is_one_file_that_escapes_everything(tmp_path: Path) -> None:
    a = make(tmp_path / "a", recipe__name=HOSTILE[0], model__name=HOSTILE[1])
    b = make(tmp_path / "b", recipe__name=HOSTILE[2] + HOSTILE[5], model__weights_sha256="ff" * 32)
    html = write_page(compare([a, b]), tmp_path / "page.html").read_text()
    page = Page(html)
    assert all(text in page.text for text in HOSTILE[:3])  # as text
    assert {tag for tag, _ in page.tags} & {"script", "img", "link", "iframe", "a"} == set()
    for _, attributes in page.tags:
        assert not {name for name in attributes if name.startswith("on")} | (set(attributes) & {"src", "href"}) - {
            "href"
        }
    assert "default-src 'none'" in html and "\u202e" not in html
    assert "Before you believe a difference" in page.text and "<svg" in html


def test_the_command_prints_a_table_and_json(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    a, b = make(tmp_path / "a"), make(tmp_path / "b", right=2, model__weights_sha256="ff" * 32)
    line = ["compare", str(a), str(b), "--out", str(tmp_path / "page.html")]
    assert cli.main(line) == 0
    out = capfd.readouterr().out
    assert "KL closed %" in out and "A is higher" in out and "not compared, the models differ" in out
    assert (tmp_path / "page.html").is_file()
    assert cli.main([*line, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["pairs"][0]["metric"] == "format" and found["page"].endswith("page.html")
    assert cli.main(["compare", str(a)]) == 2
    assert "cannot be compared" in capfd.readouterr().err


def test_it_does_not_load_torch(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a"), make(tmp_path / "b")
    code = (
        "import sys; from ctxdistill.cli import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'peft'} & set(sys.modules); sys.exit(f'{code} {heavy}' if code or heavy else 0)"
    )
    command = [sys.executable, "-c", code, "compare", str(a), str(b), "--out", str(tmp_path / "page.html")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
