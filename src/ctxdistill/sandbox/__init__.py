"""Does a program pass its tests? Run in two processes that can do little else.

In: source code, tests, limits. Out: an `Outcome`. Invariants: nothing runs in this process; the program's code runs in one
child, the tests in another, which calls the program's functions by name and gets plain values back, so that nothing the
program does (ending the process, printing, changing Python's own functions, catching errors) can make a test pass; only
a verdict with this call's secret counts; both are killed at the end, whatever they do.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctxdistill.errors import RunError

CHILD = Path(__file__).with_name("child.py")
STARTING = 5.0
"""Seconds that two fresh processes may take to start, on a busy machine; not the program's."""


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    seconds: float = 5.0
    """For all its tests together, by the clock and of processor time."""
    memory_mb: int = 512
    """Address space of each of the two processes."""
    file_mb: int = 4
    """Largest file in its folder."""
    processes: int = 16
    """Processes of this user above which it may start none; without effect for root, where seccomp forbids it."""


@dataclass(frozen=True)
class Outcome:
    """What became of a program."""

    verdict: str
    """`passed`; `wrong`: a test's assertion failed; `error`; `timeout`; `no verdict`: the judge itself ended."""
    detail: str
    isolation: tuple[str, ...] = ()
    """What was in force: `network namespace`, `landlock`, `seccomp`, `audit hook`."""

    @property
    def passed(self) -> bool:
        return self.verdict == "passed"


def run(code: str, tests: Sequence[str], setup: Sequence[str] = (), limits: Limits | None = None) -> Outcome:
    """Run `code`, then `tests` on its functions.

    Args:
        tests: statements, usually `assert f(1) == 2`; arguments and results are plain data (numbers, texts, bytes, lists,
            tuples, sets, dicts of them, iterators).
        setup: code that both are given first, usually imports.

    Raises: `RunError` where the system has no such limits.
    """
    if os.name != "posix":
        raise RunError(
            "code is not run here", expected="Linux (or macOS), whose processes can be limited", found=sys.platform
        )
    limits = limits or Limits()
    if not tests:
        raise ValueError("no tests: everything would pass")
    nonce = secrets.token_hex(16)
    shared = {"limits": _numbers(limits), "setup": list(setup)}
    with contextlib.ExitStack() as stack:
        (call_to, call_from), (answer_to, answer_from) = _pipe(stack), _pipe(stack)
        # the program is told neither the tests nor the secret
        program = stack.enter_context(_child("program", call_to, answer_from, stdout=subprocess.DEVNULL))
        judge = stack.enter_context(_child("judge", call_from, answer_to, stdout=subprocess.PIPE))
        for end in (call_to, call_from, answer_to, answer_from):  # so that each side sees when the other is gone
            end.close()
        told = {**shared, "tests": list(tests), "nonce": nonce, "seconds": limits.seconds}
        with contextlib.suppress(BrokenPipeError):
            program.stdin.write(json.dumps({**shared, "code": code}) + "\n")
            program.stdin.close()
        try:
            said, _ = judge.communicate(json.dumps(told) + "\n", timeout=limits.seconds + STARTING)
        except subprocess.TimeoutExpired:
            return Outcome("timeout", f"not finished after {limits.seconds:g} s")
    return _verdict(said, nonce)


def _pipe(stack: contextlib.ExitStack) -> tuple[Any, Any]:
    """The end to read from and the end to write to."""
    read, write = os.pipe()
    return stack.enter_context(os.fdopen(read)), stack.enter_context(os.fdopen(write, "w"))


@contextlib.contextmanager
def _child(role: str, calls: Any, answers: Any, *, stdout: int) -> Iterator[Any]:
    """A child in an empty folder of its own, with nothing of this process but two pipes; killed at the end."""
    with tempfile.TemporaryDirectory(prefix="ctxdistill-", ignore_cleanup_errors=True) as folder:
        pipes = [calls.fileno(), answers.fileno()]
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(CHILD), role, *map(str, pipes)],
            stdin=subprocess.PIPE, stdout=stdout, stderr=subprocess.DEVNULL, text=True, cwd=folder, pass_fds=pipes,
            env={"HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"}, start_new_session=True,
        )  # fmt: skip
        try:
            yield child
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()  # type: ignore[union-attr]
            if child.stdout:
                child.stdout.close()
            child.wait()


def _numbers(limits: Limits) -> dict[str, int]:
    """As the child sets them: bytes and whole seconds."""
    return {
        "cpu": math.ceil(limits.seconds) + 1, "memory": limits.memory_mb << 20, "file": limits.file_mb << 20,
        "processes": limits.processes,
    }  # fmt: skip


def _verdict(said: str, nonce: str) -> Outcome:
    """What the judge said, if it was the judge."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        found = json.loads(said)
        if secrets.compare_digest(found["nonce"], nonce):
            return Outcome(str(found["verdict"]), str(found["detail"]), tuple(map(str, found["isolation"])))
    return Outcome("no verdict", "the judge ended before its verdict")


@functools.cache
def isolation() -> tuple[str, ...]:
    """What is in force on this system, from a program that must pass and one that must not.

    Raises: `RunError` when these do not come out as they must: then nothing measured here would mean anything.
    """
    good, bad = (run(f"def f(x):\n    return x + {n}", ["assert f(1) == 2"]) for n in (1, 2))
    if not good.passed or bad.verdict != "wrong":
        raise RunError(
            "programs cannot be run in the sandbox of this system",
            expected="a right program that passes and a wrong one that does not",
            found=f"{good.verdict} {good.detail}; {bad.verdict} {bad.detail}",
            fix="see docs/howto-code.md; without it, leave pass_at_1 out of eval.metrics",
        )
    return good.isolation
