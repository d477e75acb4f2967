"""The page of a study and its text, from synthetic study folders of several shapes, one as hostile as data can be."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ctxdistill import plots
from ctxdistill.plots import arm_mark, arm_styles
from ctxdistill.study_report import accuracy, count, write_report
from test_analysis import SKILL, TASKS, analyse, build_study, edit, only
from test_report import HOSTILE as ALL_HOSTILE
from test_report import Page, squeeze

HOSTILE = [text.replace("\ud83d", "") for text in ALL_HOSTILE]  # half a character cannot be in a file that was written

CODE = {
    *("name", "task", "arm", "model", "set", "family", "control_of", "evaluation", "ood", "status", "domain"),
    *("row", "prediction"),
}
"""Keys whose values code reads, or that are only compared."""


def plant(value: Any, index: list[int] | None = None) -> Any:
    """`value` with hostile text after every string that is data."""
    index = index or [0]
    if isinstance(value, dict):
        return {k: v if k in CODE else plant(v, index) for k, v in value.items()}
    if isinstance(value, list):
        return [plant(item, index) for item in value]
    if isinstance(value, str):
        index[0] += 1
        return f"{value} {HOSTILE[index[0] % len(HOSTILE)]}"
    return value


def hostile_change(value: Any) -> Any:
    if "arms" in value:  # every arm's label gets another of the strings
        return {**plant(value, [1]), "name": "study " + " ".join(HOSTILE)}
    return value if "prediction" in value else plant(value)


def build_hostile(path: Path) -> Path:
    tasks = [{**task, "pattern": HOSTILE[0]} for task in TASKS]
    folder = build_study(path, demos=(4, 16), sets=(0, 1, 2), rows=60, tasks=tasks, change=hostile_change)
    edit(folder, "tiny-trec-n16-set0-cd_many", status="failed", reason=" ".join(HOSTILE))
    return folder


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(build_study(tmp_path_factory.mktemp("study") / "full"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(build_hostile(tmp_path_factory.mktemp("study") / "hostile"))


def small(path: Path, **options: Any) -> Path:
    return build_study(path, **{"demos": (16,), "sets": (0, 1, 2), "rows": 30, "tasks": TASKS[:1], **options})


def text_of(path: Path) -> str:
    return squeeze(Page(path.read_text(encoding="utf-8")).text)


def test_the_page_shows_every_part(full: Path) -> None:
    found, text = analyse(full.parent), text_of(full)
    row = only(found["table"], task="sst2", set="cr", n=16, arm="cd_many")
    for part in (
        "In domain, a student matches in-context learning (within 2 points).",
        "of 4 cells",
        "There are 4 demonstration sets.",
        "At a glance",
        "Controls against their arm",
        "What was compared",
        "Our numbers in the layout of the paper's Table 3",
        "No number of the paper is in this table. No cell of this study is one of the paper's.",
        "A control that is shown to be below its arm says that the arm's gain needs its context; no difference shown decides",
        "Seconds are those on this machine; later arms of a cell reuse what earlier ones read, so compare FLOPs.",
        "counted in FLOPs",
        "2 labels · sst2: 240 rows · cr: 240 rows (out of domain) · pattern default",
        squeeze(accuracy(row)),
        f"All {sum(r['task'] == 'sst2' for r in found['comparisons'])} comparisons",
        f"corrected for all {len(found['comparisons'])} comparisons of the study (Holm)",
        "What it cost, 16 demonstrations",
        "pays off after requests",
        "Retention: what training did to everything else",
    ):
        assert part in text, part
    assert text.index("not decidable") < text.index("What cannot be concluded") < text.index("TREC 3 labels")


def test_what_a_claim_is_about_is_read_without_opening_anything(full: Path) -> None:
    scope = "whatever accuracy they buy"
    text = (full.parent / "report.md").read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if "needs less compute than few-shot fine-tuning" in line]
    assert scope in line
    folded = "".join(re.findall(r"<details.*?</details>", html := full.read_text(encoding="utf-8"), re.DOTALL))
    assert scope in html and scope not in folded


def test_claims_come_before_everything_else(full: Path) -> None:
    page = Page(full.read_text(encoding="utf-8"))
    ids = [a["id"] for tag, a in page.tags if tag in ("section", "h2") and "id" in a]
    assert ids[:3] == ["claims", "limits", "glance"]
    assert sum(tag == "details" for tag, _ in page.tags) >= 8  # long tables are folded


def test_numbers_in_the_table_are_those_of_the_analysis(full: Path) -> None:
    found = analyse(full.parent)
    text = (full.parent / "report.md").read_text(encoding="utf-8")
    row = only(found["table"], task="trec", n=16, arm="cd_one")
    pair = only(found["comparisons"], task="trec", n=16, a="cd_one", b="in_context")
    sign = {"above": "▲", "below": "▼", "open": "·"}[pair["reading"]]
    line = f"| distilled, one context | {accuracy(row)} | {sign} {100 * pair['difference']:+.1f} | {100 * row['exact']:.1f} |"
    assert line in text
    assert f"{100 * row['mean']:.1f}\u202f±\u202f{100 * row['sd']:.1f} [" in line
    inside, outside = (only(found["table"], task="sst2", set=name, n=16, arm="cd_one") for name in ("sst2", "cr"))
    assert f"| SST-2 | tiny | {100 * inside['teacher']:.1f} | {accuracy(inside)} | {accuracy(outside)} |" in text
    pair = only(found["comparisons"], task="trec", n=16, a="cd_many", b="zero_shot")
    assert re.search(r"\| 16 \| trec \| distilled, many contexts minus zero-shot \| \+.* \| higher \|", text)
    assert pair["reading"] == "above"
    assert "| fine-tuned, LoRA | 21 | 20 | 21 | 45.0 | 50.0 |" in text  # perplexity, before, at worst; formats, before
    assert "| control: shuffled labels | distilled, one context | in domain | ▼ 4 |" in text
    for said in (
        "mean ± standard deviation over demonstration sets",
        "counted in FLOPs",
        "no difference shown decides nothing",
    ):
        assert said in text
    assert "compare FLOPs" in text
    for n, requests in ((4, "29"), (16, "75")):
        row = only(found["table"], task="trec", n=n, arm="cd_one")
        results = text.split(f"### {n} demonstrations\n")[1].split("###")[0]
        assert f"| distilled, one context | {accuracy(row)} |" in results
        costs = text.split(f"### What it cost, {n} demonstrations\n")[1].split("###")[0]
        assert re.search(rf"\| distilled, one context \|.*\| {requests} \|\n", costs)


def test_plots_are_whole_and_named(full: Path) -> None:
    html = full.read_text(encoding="utf-8")
    page = Page(html)
    labels = [a["aria-label"] for tag, a in page.tags if tag == "svg" and a.get("role") == "img"]
    assert labels == [
        "Accuracy against the number of demonstrations",
        "Accuracy against FLOPs of teacher and training",
        "Accuracy in domain against out of domain",
        "Accuracy against the number of demonstrations",
        "Accuracy against FLOPs of teacher and training",
    ]
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#|labelledby=")([^")]+)', html)) <= set(ids)
    for plot in re.findall(r"<svg role=.*?</svg>", html, re.DOTALL):
        ticks = [t.strip() for t in re.findall(r"<text[^>]*>([^<]*)</text>", plot)]
        assert {"0", "20", "40", "60", "80", "100"} <= set(ticks)  # the whole axis


def test_points_are_where_the_numbers_say(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(plots, "_svg", lambda figure, *_: figures.append(figure))
    look = {"color": "#2f86de", "marker": "o", "hollow": False}
    inside, outside = (0.6, 0.5, 0.7), (0.4, 0.3, 0.5)
    plots.domain_plot([{**look, "x": inside, "y": outside}], (0.2, 0.1), "a")
    plots.cost_plot([{**look, "x": 1e6, "y": outside}, {**look, "x": 0, "y": inside}], 0.1, "FLOPs", "b")
    series = [[(4, *outside), (16, *inside)], [(16, *outside)], [(None, *inside)]]
    plots.demos_plot([{**look, "points": points} for points in series], 0.1, "c")
    expected = [
        [(60, 40)],
        [(1e6, 40), (1e5, 60)],
        [(0, 40), (1, 60), (1, 40)],
    ]  # what costs nothing is left of the rest
    for figure, points in zip(figures, expected, strict=True):
        marked = [line.get_xydata()[0] for line in figure.axes[0].get_lines() if line.get_marker() == "o"]
        assert [tuple(point) for point in marked] == [pytest.approx(point) for point in points]


def test_arms_look_different() -> None:
    arms = [{"name": f"{family}{i}", "family": family} for family in ("distill", "control", "other") for i in range(6)]
    styles = arm_styles(arms)
    assert len({(s["color"], s["marker"], s["hollow"]) for s in list(styles.values())[:12]}) == 12
    assert len({arm_mark(s) for s in list(styles.values())[:12]}) == 12


def test_the_papers_table(tmp_path: Path) -> None:
    runs = tmp_path / "runs.csv"
    head = "model,context_set_id,dataset,context_size,accuracy_teacher,accuracy_indomain,accuracy_ood"
    runs.write_text(f"{head}\nopt-125m,0,qqp,16,0.625,0.6,0.7\nopt-125m,1,qqp,16,0.625,0.63,0.72\n")
    tasks = [{**TASKS[1], "name": "qqp", "title": "QQP", "evaluation": "qqp", "ood": ["paws"]}]
    page = write_report(small(tmp_path / "a", models=("facebook/opt-125m",), tasks=tasks), runs)
    assert "62.5, 61.5, 71.0" in text_of(page)
    assert "The paper's Table 3, with our numbers" in text_of(page)
    assert "No number of the paper" not in text_of(page)
    assert "measured with inverted labels" in text_of(page)
    assert "| 62.5, 61.5, 71.0 |" in (page.parent / "report.md").read_text(encoding="utf-8")
    other = text_of(write_report(small(tmp_path / "b"), runs))
    assert "No cell of this study is one of the paper's." in other
    assert "inverted" not in other
    bare = text_of(write_report(page.parent))
    assert "No number of the paper is in this table. The paper's own tasks and models: QQP with opt-125m." in bare


@pytest.mark.parametrize(
    ("options", "parts", "absent"),
    [
        ({"sets": (0,)}, ["With 1 demonstration set,", "No cell decides it"], ["± 0"]),
        ({"rows": 30}, ["TREC has 30 evaluation rows, fewer than 200", "± 18 points"], []),
        ({"models": ("org/a", "org/b")}, ["TREC · a", "TREC · b"], []),
        ({"skill": {**SKILL, "in_context": 0.35}}, ["With 16 demonstrations there is nothing to teach", "Undefined where"], []),
        ({"demos": (2, 8)}, ["8 demonstrations"], ["16 demonstrations"]),
    ],
)  # fmt: skip
def test_shapes_of_studies(tmp_path: Path, options: dict[str, Any], parts: list[str], absent: list[str]) -> None:
    text = text_of(write_report(small(tmp_path / "s", **options)))
    for part in parts:
        assert part in text, part
    for part in absent:
        assert part not in text


def test_a_line_says_on_how_many_sets_it_rests_where_these_are_fewer(tmp_path: Path) -> None:
    folder = small(tmp_path / "s")
    for number in (0, 1):
        (folder / "cells" / f"tiny-trec-n16-set{number}-cd_one" / "cell.json").unlink()
    page = write_report(folder)
    text = (folder / "report.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("| distilled, one context (1 of 3 sets) |")]
    assert len(lines) == 2  # results and costs
    assert "| distilled, one context minus in-context (1 of 3 sets) |" in text
    assert "distilled, many contexts (" not in text and "| zero-shot (" not in text
    assert text_of(page).count("1 of 3 sets") == text.count("1 of 3 sets")


@pytest.mark.parametrize(
    ("sets", "over"),
    [
        ((0,), "95 % interval over rows, since there are fewer than 3 demonstration sets"),
        ((0, 1, 2), "95 % interval over demonstration sets and rows"),
    ],
)
def test_what_intervals_are_over_is_said_of_this_study(tmp_path: Path, sets: tuple[int, ...], over: str) -> None:
    page = write_report(small(tmp_path / "s", sets=sets))
    for text in (text_of(page), (page.parent / "report.md").read_text(encoding="utf-8")):
        assert text.count(over) == 2  # at a glance, and below the results
        assert ("interval over demonstration sets and rows" in text) == (len(sets) == 3)


def test_cells_without_a_result_are_listed(tmp_path: Path) -> None:
    folder = small(tmp_path / "s")
    edit(folder, "tiny-trec-n16-set0-cd_one", status="infeasible", reason="3,000 tokens do not fit 2,048")
    page = write_report(folder)
    assert "1 infeasible: 3,000 tokens do not fit 2,048" in text_of(page)
    assert "tiny-trec-n16-set0-cd_one" in (folder / "report.md").read_text(encoding="utf-8")


def test_cells_with_the_same_reason_but_for_numbers_are_one_entry(tmp_path: Path) -> None:
    folder = small(tmp_path / "s")
    reasons = [f"prompts do not fit: {n} of 9 rows\nexpected: at most 400\nfound: {400 + n} tokens" for n in (3, 4, 4)]
    for number, reason in enumerate(reasons):
        edit(folder, f"tiny-trec-n16-set{number}-cd_one", status="infeasible", reason=reason)
    edit(folder, "tiny-trec-n16-set0-ft_lora", status="failed", reason="no layer of opt-125m\nfound: nope")
    page = write_report(folder)
    text = text_of(page)
    assert "3 infeasible: prompts do not fit: … of … rows" in text
    assert "1 failed: no layer of opt-125m" in text
    html = page.read_text(encoding="utf-8")
    (listed,) = re.findall(r"<summary>3 infeasible.*?</details>", html, re.DOTALL)
    assert "3 of 9 rows\nexpected: at most 400\nfound: 403 tokens" in listed  # line breaks, which pre-line shows
    assert "404 tokens" not in listed  # one of them in full
    assert listed.count("<li>") == 3
    assert "white-space: pre-line" in html
    lines = (folder / "report.md").read_text(encoding="utf-8").split("## Cells without a result")[1].splitlines()
    (line,) = [line for line in lines if line.startswith("- 3 infeasible")]
    assert line == "- 3 infeasible: prompts do not fit: … of … rows"
    assert [line.count("tiny-trec-n16-set") for line in lines if line.startswith("  - ")] == [1, 3, 1, 1]


def test_a_study_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    folder = small(tmp_path / "s")
    for cell in (folder / "cells").iterdir():
        (cell / "cell.json").unlink()
    text = text_of(write_report(folder))
    assert "not run: the study is not finished" in text
    assert "Not measured on the same rows and demonstration sets in any cell." in text


def test_nothing_in_data_becomes_markup(hostile: Path) -> None:
    page = Page(hostile.read_text(encoding="utf-8"))
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "iframe", "link", "object", "embed", "form", "base"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert [tag for tag, _ in page.tags].count("style") == 1
    for text in HOSTILE[:3]:
        assert text in page.text
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00]", page.text)
    targets = [a[name] for _, a in page.tags for name in ("src", "href", "xlink:href", "srcset", "data") if name in a]
    assert targets
    assert all(target and target.startswith("#") for target in targets)
    policy = [
        a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_small_p_values_are_read_as_they_are_written(full: Path) -> None:
    text = (full.parent / "report.md").read_text(encoding="utf-8")
    assert "| < 0.001 |" in text.replace("\u202f", " ")
    assert "&lt;" not in text


def test_numbers_of_demonstrations_ascend_everywhere(tmp_path: Path) -> None:
    page = write_report(small(tmp_path / "s", demos=(16, 2, 4)))
    html, text = page.read_text(encoding="utf-8"), (page.parent / "report.md").read_text(encoding="utf-8")
    assert re.findall(r"^### (\d+) demonstrations$", text, re.MULTILINE) == ["2", "4", "16"]
    assert re.findall(r"^### What it cost, (\d+)", text, re.MULTILINE) == ["2", "4", "16"]
    assert re.findall(r"Results with (\d+) dem", html) == re.findall(r"Costs with (\d+) dem", html) == ["2", "4", "16"]
    numbers = [int(n) for n in re.findall(r"^\| (\d+) \| trec \|", text, re.MULTILINE)]
    assert numbers == sorted(numbers) and len(set(numbers)) == 3
    assert "<h3>16 demonstrations</h3>" in html  # what is not folded is that of the paper


@pytest.mark.parametrize("which", ["full", "hostile"])
def test_markdown_is_escaped_and_its_tables_are_whole(which: str, request: pytest.FixtureRequest) -> None:
    text = (request.getfixturevalue(which).parent / "report.md").read_text(encoding="utf-8")
    assert not re.search(r"<\w|</", text)
    assert "# a heading" not in re.findall("^#+ .*", text, re.MULTILINE)
    assert "](" not in text.replace("\\](", "")
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) > 8
    for table in tables:
        rows = table.splitlines()
        assert len(rows) > 2, table
        assert re.fullmatch(r"\|(-+:?\|)+", rows[1]), table
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1, table


def test_equal_studies_give_equal_bytes(tmp_path: Path) -> None:
    one, two = (write_report(small(tmp_path / name)).read_bytes() for name in ("a", "b"))
    assert one == two


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0.0, "0"), (12.5, "12.5"), (1234.4, "1,234"), (5.125e12, "5.12T"), (4884480.0, "4.88M")]
)  # fmt: skip
def test_counts_for_people(value: Any, text: str) -> None:
    assert count(value) == text


def test_the_report_does_not_load_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from ctxdistill import study_report; study_report.write_report(sys.argv[1]); "
        "print(sorted({'torch', 'transformers', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    folder = str(small(tmp_path / "s"))
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
