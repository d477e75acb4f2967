"""The run folder: everything a run leaves behind, written so that a kill at any moment loses at most the last step.

In: plain objects and bytes. Out: files. Invariants: a file that exists is complete (written beside, then renamed); a
JSON-lines file may end in a broken line after a kill, and that line is dropped on reading; a folder belongs to one
recipe, known by its fingerprint, and one process at a time.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shlex
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ctxdistill import files
from ctxdistill.errors import CtxDistillError, RunError

FULL = re.compile(r"\(os error 28\)|requested and \d+ written")
"""What safetensors and numpy say of a full disk, with no number to tell it by."""
Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total) while something long goes on."""
LOADING = "loading"
"""The stage that ends when libraries, rows and model are in memory: what that takes is no other stage's time."""


def no_progress(stage: str, done: int, total: int) -> None:
    """Says nothing."""


def fingerprint(value: Any) -> str:
    """32 hex digits that change when the JSON form of `value` changes. An iterator counts as a list, which is never in
    memory as a whole."""
    digest = hashlib.sha256()
    for piece in _json_pieces(value):
        digest.update(piece.encode())
    return digest.hexdigest()[:32]


def _json_pieces(value: Any) -> Iterator[str]:
    if isinstance(value, Iterator) or (isinstance(value, list) and any(isinstance(item, Iterator) for item in value)):
        for number, item in enumerate(value):
            yield ", " if number else "["
            yield from _json_pieces(item)
        yield "]"
    else:
        yield json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write `path` whole or not at all. Raises `RunError` for a full disk or missing permission."""
    raw = data.encode() if isinstance(data, str) else data
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise disk_error(path, error, len(raw)) from None
    finally:  # also after Ctrl-C; what a kill leaves, the next one to lock the folder removes
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def is_full(error: Exception) -> bool:
    """Whether a write failed since the disk is full."""
    return getattr(error, "errno", None) == errno.ENOSPC or bool(FULL.search(str(error)))


def disk_error(path: Path, error: Exception, size: int = 0) -> RunError:
    """The error for a write that failed."""
    if is_full(error):
        return RunError(
            f"the disk is full: cannot write {path}",
            expected=f"{size / 1e6:.1f} MB free" if size else "",
            fix="free some space, then run it again (a run goes on with --resume): nothing that was finished is lost",
        )
    return RunError(
        f"cannot write {path}: {getattr(error, 'strerror', None) or error}", fix="choose another folder with --out"
    )


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, a write that fails, by safetensors too, raises `RunError` about `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise disk_error(path, error) from None


class RunDir:
    """A run folder at `path`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: int | None = None

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @classmethod
    def existing(cls, path: str | Path) -> RunDir:
        """The folder of a run that was begun. Raises `RunError` when there is none."""
        run = cls(path)
        if not (run / "recipe.json").is_file():
            fix = ""
            if (run / "study_recipe.json").is_file():
                what = "is a study's folder, and no run folder"
                fix = f"its page is written by: ctxdistill report {shlex.quote(str(path))}"
            elif (run / "compose.json").is_file():
                what = "holds a sum of adapters, and is no run folder"
                fix = f"name one of the runs behind the sum; to use the sum, serve {run / 'adapter'}"
            elif run.path.is_dir():
                what = "is not a run folder (no recipe.json in it)"
            else:
                what = "is a file, and no run folder" if run.path.exists() else "does not exist"
            expected = "a folder written by `ctxdistill distill` or `ctxdistill demo`"
            raise RunError(f"{path} {what}", expected=expected, fix=fix)
        return run

    @property
    def finish(self) -> str:
        """How to finish the run."""
        typed = "RECIPE"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            typed = shlex.join(shlex.split(str(files.read_json(self / "recipe.json")["typed"])))  # a stranger's, too
        return f"finish the run with `ctxdistill distill {typed} --out {shlex.quote(str(self.path))} --resume`"

    def claim(self, identity: str, *, resume: bool, differs: Callable[[Any], str] = str) -> None:
        """Make the folder this process's, for the recipe with this fingerprint. `differs` says how the manifest of another
        recipe differs from this one.

        Raises: `RunError` when another process holds it, it belongs to another recipe, it holds a run and `resume` is
        off, or it holds files that are not a run's.
        """
        if self._lock is None:
            self.lock()
        try:
            self._check_owner(identity, resume, differs)
        except RunError:
            self.release()
            raise

    def join(self, identity: str) -> None:
        """Read a folder that another process of the same run has claimed. Raises: `RunError` when it is not here."""
        stored = self.read_json("recipe.json").get("fingerprint") if (self / "recipe.json").is_file() else None
        if stored != identity:
            raise RunError(
                f"the processes of the run do not have the same {self.path}, or not the same model, data and versions",
                expected=f"the folder of the first process, with recipe fingerprint {identity}",
                found=f"{stored}",
                fix="put run folder, recipe and data where all machines see them; install the same versions everywhere",
            )

    def lock(self) -> None:
        """Make the folder this process's. Raises: `RunError` when another process holds it, or it cannot be made."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.refuse_links()
            self._lock = os.open(self / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise disk_error(self.path, error) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(self._lock, 200, 0).decode(errors="replace").strip()
            os.close(self._lock)
            self._lock = None
            raise RunError(
                f"{self.path} is in use by process {holder}", fix="wait for it, or choose another --out"
            ) from None
        with contextlib.suppress(OSError):  # the disk may be full; the lock holds without a name in it
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, f"{os.getpid()} on {platform.node()}\n".encode(), 0)
            for stray in self.path.glob("checkpoints/.*.tmp"):
                stray.unlink(missing_ok=True)

    def refuse_links(self) -> None:
        """Raise `RunError` for a link in the folder that leads out of it: what is written there would be, too."""
        whole = os.path.realpath(self.path)
        for link in self.path.iterdir():
            if link.is_symlink() and not Path(target := os.path.realpath(link)).is_relative_to(whole):
                raise RunError(
                    f"{link} is a link that leads out of the run folder",
                    found=target,
                    fix="put the files themselves there, or link the whole folder",
                )

    def _check_owner(self, identity: str, resume: bool, differs: Callable[[Any], str]) -> None:
        if not (self / "recipe.json").is_file():
            strangers = [
                p.name
                for p in self.path.iterdir()
                if p.name not in {".lock", "targets", "queries.jsonl", "queries.summary.json"}
                and not p.name.endswith((".tmp", ".partial.jsonl"))
            ]
            if strangers:
                raise RunError(
                    f"{self.path} is not empty and is not a run folder",
                    found=", ".join(sorted(strangers)[:5]),
                    fix="choose a new folder with --out",
                )
            return
        with reading(self.path):
            stored = self.read_json("recipe.json")
            found = None if stored["fingerprint"] == identity else differs(stored)
        if found is not None:
            raise RunError(
                f"{self.path} belongs to another recipe",
                expected="the same values, context, rows, model and versions",
                found=found,
                fix="choose another folder with --out, delete this one, or run with what it was made with",
            )
        begun = any((self / name).exists() for name in ("checkpoints", "adapter"))
        if begun and not resume:
            raise RunError(
                f"{self.path} already holds a run of this recipe",
                fix="go on with --resume, choose another folder with --out, or delete it",
            )

    def release(self) -> None:
        """Let others use the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def write_json(self, name: str, value: Any) -> None:
        write_atomic(self / name, json.dumps(value, indent=1, ensure_ascii=False) + "\n")

    def read_json(self, name: str) -> Any:
        """Raises `RunError` when the file is missing or damaged."""
        try:
            return files.read_json(self / name)
        except FileNotFoundError:
            raise RunError(f"{self / name} is missing", fix=self.finish) from None
        except (OSError, ValueError) as error:
            raise RunError(f"{self / name} is damaged: {error}", fix="delete the run folder and start again") from None

    def append(self, name: str, value: Any) -> None:
        """Add one line to a JSON-lines file."""
        try:
            (self / name).parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
            with os.fdopen(os.open(self / name, flags, 0o644), "ab+") as file:
                if size := file.tell():
                    file.seek(size - 1)
                    if file.read(1) != b"\n":  # a kill or a full disk cut the last line off
                        file.seek(0)
                        file.truncate(file.read().rfind(b"\n") + 1)
                file.write((json.dumps(value, ensure_ascii=False) + "\n").encode())
        except OSError as error:
            raise disk_error(self / name, error) from None

    def write_jsonl(self, name: str, values: Iterable[Any]) -> None:
        write_atomic(self / name, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))

    def read_jsonl(self, name: str) -> list[dict[str, Any]]:
        """All `lines`."""
        return list(self.lines(name))

    def lines(self, name: str) -> Iterator[dict[str, Any]]:
        """One complete line after the other, an object each; none when there is no such file. A last line that a kill cut
        off is dropped.

        Raises: `RunError` naming a line that is something else.
        """
        path, number = self / name, 1
        if not path.exists():
            return
        try:
            with files.open_regular(path) as file:
                while (raw := file.readline(files.MAX_LINE)).endswith(b"\n"):
                    value = files.parse_json(raw.decode())
                    if not isinstance(value, dict):
                        raise ValueError
                    yield value
                    number += 1
            if len(raw) == files.MAX_LINE:
                raise ValueError
        except OSError as error:
            raise RunError(f"cannot read {path}: {error.strerror}", fix="check what it is") from None
        except ValueError:
            raise RunError(f"{path}:{number} is damaged", fix="delete this file and run again with --resume") from None


@contextlib.contextmanager
def reading(folder: str | Path) -> Iterator[None]:
    """Inside, what was read from a run's or a study's folder is made sense of; where it lacks what is needed, the files are
    to blame, and not the program."""
    try:
        yield
    except (CtxDistillError, OSError, MemoryError):
        raise
    except Exception as error:  # whatever code meets that is given what it does not expect
        *_, (frame, line) = traceback.walk_tb(error.__traceback__)
        where = f"{Path(frame.f_code.co_filename).name}:{line}"
        raise RunError(
            f"{folder} holds files that cannot be understood",
            expected="files as this version of ctxdistill writes them",
            found=f"{type(error).__name__}: {str(error)[:200]} ({where})",
            fix="run it again; if nobody has changed these files, this is a bug: please report it with these lines",
        ) from error
