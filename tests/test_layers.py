"""The modules form layers, the light ones load without torch, and the source has no unsafe loading."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ctxdistill

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "ctxdistill"
ORDER = re.findall(r"```\n(errors < .*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), flags=re.DOTALL)[
    0
]
"""As contributors read it."""
FREE = {"__init__", "__main__"}
"""The package's face: may import everything."""
LIGHT = [
    "cli", "report", "recipe", "stats", "rows", "rundir", "errors", "tasks", "draws", "grid", "analysis", "study_report",
    "compare", "formats",
]  # fmt: skip
"""Modules that must not load torch."""

RANK = {name.strip(): i for i, layer in enumerate(ORDER.split("<")) for name in layer.split(",")}


def module_of(path: Path) -> str:
    """`tasks/rte.py` belongs to `tasks`."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> set[str]:
    """Modules of this package that `path` imports, anywhere in it (inside of functions, too)."""
    return imported(ast.parse(path.read_text(encoding="utf-8")), inside_folder=path.parent != PACKAGE)


def imported(tree: ast.AST, inside_folder: bool = False) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            up = node.level - inside_folder
            names = [f"ctxdistill.{node.module or alias.name}" for alias in node.names] if up else []
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("ctxdistill.")}
    return found


def wrong(module: str, uses: set[str]) -> set[str]:
    """What `module` imports and should not: everything that is not to its left."""
    return {name for name in uses - {module} if RANK.get(name, -1) >= RANK[module]}


SOURCES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_only_from_the_left(path: Path) -> None:
    module = module_of(path)
    if module in FREE:
        return
    assert module in RANK, f"{module} is in no layer: add it to ORDER"
    assert wrong(module, imports(path)) == set()


def test_the_checker_itself() -> None:
    tree = ast.parse(
        "import ctxdistill.lm\nfrom ctxdistill import losses\nfrom ctxdistill.rows import Row\nimport torch\n"
        "from .stats import x\nfrom . import train\ndef f():\n    from ctxdistill.evaluate import y\n"
    )
    assert imported(tree) == {"lm", "losses", "rows", "stats", "train", "evaluate"}
    assert wrong("rows", {"recipe", "errors"}) == set()
    assert wrong("rows", {"lm", "recipe"}) == {"lm"}
    assert wrong("losses", {"stats"}) == {"stats"}  # neighbours in a layer do not know each other
    assert wrong("train", {"pipeline", "errors"}) == {"pipeline"}


def test_losses_imports_only_torch() -> None:
    tree = ast.parse((PACKAGE / "losses.py").read_text(encoding="utf-8"))
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names == {"torch"}


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_do_not_load_torch(module: str) -> None:
    if not any((PACKAGE / name).exists() for name in (f"{module}.py", f"{module}/__init__.py")):
        pytest.skip(f"ctxdistill.{module} does not exist")
    code = f"import sys, ctxdistill.{module}; print(sorted(m for m in ('torch', 'transformers') if m in sys.modules))"
    env = {"PYTHONPATH": str(PACKAGE.parent), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


@pytest.mark.parametrize("unsafe", [r"\bpickle\b", r"torch\.load\(", r"trust_remote_code\s*=\s*True"])
def test_source_has_no_unsafe_loading(unsafe: str) -> None:
    assert len(SOURCES) > 5
    assert [p.name for p in SOURCES if re.search(unsafe, p.read_text(encoding="utf-8"))] == []


def test_the_readme_knows_every_module() -> None:
    table = re.findall(r"^\| `.*? \|", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    named = {name.strip("/") for row in table for name in re.findall(r"`([\w/]+)`", row)}
    assert set(RANK) <= named


def test_the_package_shows_its_names() -> None:
    code = "import ctxdistill; print(set(ctxdistill.__all__) - set(dir(ctxdistill)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout == "set()\n"
    assert all(getattr(ctxdistill, name) is not None for name in ctxdistill.__all__)
    assert (PACKAGE / "py.typed").exists()
