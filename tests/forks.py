"""The command line in processes that can be killed, without waiting for PyTorch to be imported in each of them.

A server process imports everything once and forks. Each child runs `ctxdistill.cli.main` with real arguments, on real
files, and takes real signals; what a fork leaves out is the start of the interpreter and the imports, during which no
file is touched. A child writes its output to a file of its own. (The page cache outlives a SIGKILL: this is no test of
power cuts.)
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Forks:
    """The server. Use as a context manager."""

    def __init__(self, log: Path) -> None:
        self.log, self.count = log, 0
        log.mkdir(parents=True, exist_ok=True)
        self.server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert self._answer() == "ready"

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *failure: object) -> None:
        assert self.server.stdin and self.server.stdout
        self.server.stdin.close()
        self.server.wait(30)
        self.server.stdout.close()

    def _answer(self) -> Any:
        assert self.server.stdout
        return json.loads(self.server.stdout.readline())

    def _ask(self, question: dict[str, Any]) -> Any:
        assert self.server.stdin
        self.server.stdin.write(json.dumps(question) + "\n")
        return self._answer()

    def start(self, arguments: Sequence[str | Path], cwd: Path, **options: Any) -> Child:
        """Run `ctxdistill ARGUMENTS` in `cwd`. Options: `env`, a dict; `largest_file`, in bytes."""
        self.count += 1
        output = self.log / f"{self.count}.txt"
        asked = {"arguments": [str(a) for a in arguments], "cwd": str(cwd), "output": str(output), **options}
        return Child(self, self._ask(asked), output)

    def run(self, arguments: Sequence[str | Path], cwd: Path, **options: Any) -> tuple[int, str]:
        """(exit code, what it said)."""
        return self.start(arguments, cwd, **options).wait()


class Child:
    """A command that is running."""

    def __init__(self, forks: Forks, pid: int, output: Path) -> None:
        self.forks, self.pid, self.output = forks, pid, output

    def says(self, text: str, timeout: float = 60.0) -> bool:
        """Wait until its output holds `text`; False when it has not come in time."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if text in self.output.read_text(errors="replace"):
                return True
            time.sleep(0.002)
        return False

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self) -> tuple[int, str]:
        """(exit code, or minus the signal that ended it, what it said)."""
        code: int = self.forks._ask({"wait": self.pid})
        return code, self.output.read_text(errors="replace")


def child(asked: dict[str, Any]) -> None:
    """The forked process."""
    os.chdir(asked["cwd"])
    os.environ.update(asked.get("env", {}))
    out = os.open(asked["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    if size := asked.get("largest_file"):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write fails with an error, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    from ctxdistill import cli

    code = cli.main(asked["arguments"])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve() -> None:
    import torch

    torch.set_num_threads(1)  # threads do not survive a fork
    from ctxdistill import cli, pipeline  # noqa: F401

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    print(json.dumps("ready"), file=answers)
    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked:
            _, status = os.waitpid(asked["wait"], 0)
            print(json.dumps(os.waitstatus_to_exitcode(status)), file=answers)
        elif pid := os.fork():
            print(json.dumps(pid), file=answers)
        else:
            try:
                child(asked)
            finally:
                os._exit(70)


if __name__ == "__main__":
    serve()
