"""Programs that do what they should not: none passes, none gets out, and right ones pass."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ctxdistill import sandbox
from ctxdistill.sandbox import Limits, Outcome, child

if os.name != "posix":
    pytest.skip("processes can be limited on POSIX systems only", allow_module_level=True)

TESTS = ["assert f(1) == 2", "assert f(4) == 5"]
QUICK = Limits(seconds=1.0, memory_mb=256)


def run(code: str, tests: list[str] = TESTS, limits: Limits = QUICK) -> Outcome:
    return sandbox.run(code, tests, limits=limits)


def test_right_and_wrong_programs() -> None:
    assert run("def f(x):\n    return x + 1").passed
    assert run("def f(x):\n    return 2").verdict == "wrong" and run("def f(x):\n    return 2").detail.startswith(
        "test 2"
    )
    assert run("def g(x):\n    return x + 1").verdict == "error"
    assert run("def f(x:").verdict == "error" and "SyntaxError" in run("def f(x:").detail
    assert sandbox.run("def f(x):\n    return math.floor(x) + 1", TESTS, ["import math"]).passed
    with pytest.raises(ValueError, match="no tests"):
        run("def f(x):\n    return x + 1", [])


CHEATS = {
    "ends well before the tests": "import sys\nsys.exit(0)",
    "ends well, past Python": "import os\nos._exit(0)",
    "ends well inside": "import os\ndef f(x):\n    os._exit(0)",
    "prints": "print('passed', '{\"verdict\": \"passed\"}' * 100)\ndef f(x):\n    print('passed')\n    return 9",
    "writes to all files that are open": (
        'import os\nfor n in range(3, 64):\n    try: os.write(n, b\'{"verdict": "passed", "nonce": ""}\\n\')\n'
        "    except OSError: pass\ndef f(x):\n    return 9"
    ),
    "says nonsense to the judge": (
        "import os\ndef f(x):\n  for n in range(3, 64):\n    try: os.write(n, b'[]\\n{}\\nnull\\n')\n    except OSError: pass\n"
    ),
    "changes what AssertionError is": "import builtins\nbuiltins.AssertionError = KeyError\ndef f(x):\n    return 9",
    "changes what equals": "class E(int):\n    def __eq__(s, o): return True\n    __hash__ = None\ndef f(x):\n    return E(9)",
    "an object that equals all": "class E:\n    def __eq__(s, o): return True\ndef f(x):\n    return E()",
    "catches what the test raises": (
        "import sys\nsys.excepthook = lambda *a: None\nsys.settrace(lambda *a: None)\n"
        "def f(x):\n    try: return 9\n    except AssertionError: return 2"
    ),
    "looks for the tests": (
        "import gc\ndef f(x):\n    found = [o for o in gc.get_objects() if isinstance(o, list) and 'assert f(1) == 2' in o]\n"
        "    return 2 if found and x == 1 else 5 if found else 0"
    ),
}


@pytest.mark.parametrize("code", CHEATS.values(), ids=CHEATS)
def test_a_cheat_does_not_pass(code: str) -> None:
    outcome = run(code)
    assert not outcome.passed and outcome.verdict in {"wrong", "error"}, outcome


def test_a_function_cannot_take_the_place_of_a_builtin_that_the_tests_use() -> None:
    cheat = "def set(x):\n    return 1\ndef f(x):\n    return [9]"
    assert run(cheat, ["assert set(f(1)) == set([2])"]).verdict == "wrong"
    # but a task may ask for a function with such a name
    assert run("def sum(a, b):\n    return a * b", ["assert sum(3, 4) == 12"]).passed


@pytest.mark.parametrize(
    "code", ["while True: pass", "import time\ndef f(x):\n    time.sleep(60)"], ids=["loop", "sleep"]
)
def test_endless_programs_are_ended(code: str) -> None:
    started = time.perf_counter()
    assert run(code).verdict == "timeout"
    assert time.perf_counter() - started < QUICK.seconds + sandbox.STARTING


def test_memory_and_file_size_are_limited() -> None:
    code = "def f(x):\n    return len(b'a' * 300_000_000)"
    assert "MemoryError" in run(code).detail
    code = "def f(x):\n    open('large', 'wb').write(b'a' * 6_000_000)\n    return 2"
    assert "OSError" in run(code).detail or "File too large" in run(code).detail


def test_a_fork_bomb_makes_no_process() -> None:
    before = len(list(Path("/proc").glob("[0-9]*"))) if Path("/proc").is_dir() else 0
    assert not run("import os\nwhile True:\n    os.fork()").passed
    assert not run("import subprocess\ndef f(x):\n    subprocess.run(['sleep', '60'])\n    return 2").passed
    if before:
        assert len(list(Path("/proc").glob("[0-9]*"))) < before + 50


def test_no_network_and_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "hunter2")
    code = "import socket\ndef f(x):\n    socket.create_connection(('127.0.0.1', 9))"
    assert run(code).verdict == "error"
    told = run("import os\ndef f(x):\n    raise ValueError(sorted(os.environ))").detail
    assert "HOME" in told and "MY_API_KEY" not in told
    told = run("import os\ndef f(x):\n    raise ValueError(open(f'/proc/{os.getppid()}/environ').read())").detail
    assert "hunter2" not in told and "PermissionError" in told


def test_files_elsewhere_are_not_written_and_its_own_are_gone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    for deed in ("open({0!r}, 'w').write('y')", "__import__('os').remove({0!r})", "__import__('shutil').rmtree({1!r})"):
        code = f"def f(x):\n    {deed.format(str(tmp_path / 'mine'), str(tmp_path))}\n    return 2"
        assert "PermissionError" in run(code).detail, deed
    assert (tmp_path / "mine").read_text() == "x"
    told = run(
        "import os\ndef f(x):\n    open('own', 'w').write('y')\n    raise ValueError(os.path.abspath('own'))"
    ).detail
    folder = Path(told.split("ValueError: ")[1]).parent
    assert folder.name.startswith("ctxdistill-") and not folder.exists()


PROBES = {
    "network namespace": ("_no_network", "import socket; socket.create_connection(('127.0.0.1', {port}))"),
    "landlock": ("_landlock", "open({outside!r}).read()"),
    "seccomp": ("_seccomp", "os.fork()"),
}


@pytest.mark.parametrize("layer", PROBES)
def test_each_layer_holds_alone(layer: str, tmp_path: Path) -> None:
    """The audit hook would hide that the kernel's own restrictions do nothing."""
    import socket

    step, deed = PROBES[layer]
    (tmp_path / "inside").mkdir()
    (tmp_path / "secret").write_text("x")
    with socket.create_server(("127.0.0.1", 0)) as server:
        deed = deed.format(port=server.getsockname()[1], outside=str(tmp_path / "secret"))
        code = (
            f"import os, sys; sys.path.insert(0, {str(Path(child.__file__).parent)!r}); import child\n{deed}\n"
            "if 'fork' in sys.argv[1] and os.getpid() != int(os.environ.get('FIRST', os.getpid())): os._exit(0)\n"
            "child._system('prctl', 38, 1, 0, 0, 0)\n"
            f"done = child.{step}({str(tmp_path / 'inside')!r})\n"
            f"try:\n    {deed}\nexcept OSError as error: print(done, type(error).__name__)\nelse: print(done, 'nothing')"
        )
        if layer == "seccomp":  # a process that forks goes on twice
            code = code.replace("os.fork()\nif", "os.fork() or os._exit(0)\nif", 1)
        done = subprocess.run([sys.executable, "-c", code, deed], capture_output=True, text=True, timeout=30)
    if done.stdout.startswith("False"):
        pytest.skip(f"this system has no {layer} for us")
    assert done.stdout.split()[0] == "True" and "nothing" not in done.stdout, done


VALUES = [
    None, True, -(10**5000), 1.5, float("inf"), "ä\ud800", b"\x00\xff", 1 + 2j, [1, (2, {3})], frozenset({"a"}), {(1,): [None]},
    range(2, 9, 3), set(),
]  # fmt: skip


def test_values_come_over_as_they_are() -> None:
    for value in VALUES:
        found = child.decode(json.loads(json.dumps(child.encode(value))))
        assert found == value and type(found) is type(value)
    made = child.decode(child.encode(n * n for n in range(4)))
    assert next(made) == 0 and list(made) == [1, 4, 9]
    with pytest.raises(TypeError, match="more than"):
        child.encode(iter(int, 1))
    strange = child.decode(child.encode(object()))
    assert strange and strange != strange.__class__(True)


def test_the_check_of_the_sandbox_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "audit hook" in sandbox.isolation()
    sandbox.isolation.cache_clear()
    monkeypatch.setattr(sandbox, "CHILD", Path("/nonexistent.py"))
    with pytest.raises(sandbox.RunError, match="cannot be run"):
        sandbox.isolation()
    sandbox.isolation.cache_clear()
