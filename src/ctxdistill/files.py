"""Files that somebody else may have made, read within bounds.

In: a path. Out: bytes, or an open file. Invariants: only regular files are opened, so that a pipe cannot hang and a device
cannot fill the memory; no more is read than was asked for.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_RECIPE = 10_000_000
"""Bytes of a recipe or a study."""
MAX_JSON = 256_000_000
"""Bytes of a `.json` file, which has to be read as a whole."""
MAX_LINE = 64_000_000
"""Bytes of a line in a file that a run has written."""
MAX_PARTS = 5_000_000
"""Objects and lists in a JSON text: each takes some fifty times the memory of the two characters that it may be written with."""


def open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file to be read. Raises: OSError, also for a folder, a pipe and a device."""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would wait for who writes into it
    mode = os.fstat(file).st_mode
    if not stat.S_ISREG(mode):
        os.close(file)
        raise OSError(errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL, f"is {kind(path)}, and no regular file")
    return os.fdopen(file, "rb")


def is_utf16(start: bytes) -> bool:
    """Whether a text that begins so looks like UTF-16: with its byte order mark, or a character in two bytes of which one is 0."""
    return start[:2] in (b"\xff\xfe", b"\xfe\xff") or start[:2].count(0) == 1


def kind(path: Path) -> str:
    """What is at a path, for people."""
    if path.is_dir():
        return "a folder"
    for found, name in ((path.is_fifo, "a pipe"), (path.is_socket, "a socket"), (path.is_file, "a file")):
        if found():
            return name
    return "a device" if path.exists() else "nothing"


def read(path: Path, most: int) -> bytes:
    """The bytes of a regular file of at most `most` bytes. Raises: OSError, also for a larger file."""
    with open_regular(path) as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise OSError(errno.EFBIG, f"is larger than {most / 1e6:,.0f} MB")
    return raw


def read_text(path: Path, most: int = MAX_JSON) -> str:
    """The text of a regular UTF-8 file. Raises: OSError, and ValueError for what is not UTF-8."""
    raw = read(path, most)
    if is_utf16(raw):
        raise ValueError("it looks like UTF-16")
    return raw.decode("utf-8-sig")


def parse_json(text: str, **options: Any) -> Any:
    """The value of a JSON text. Raises: ValueError, also for what is nested too deeply or has too many parts."""
    if (parts := text.count("{") + text.count("[")) > MAX_PARTS:
        raise ValueError(f"{parts:,} objects and lists, more than {MAX_PARTS:,}")
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path, most: int = MAX_JSON) -> Any:
    """The value in a JSON file. Raises: OSError, ValueError."""
    return parse_json(read_text(path, most))


@contextlib.contextmanager
def bounded_memory(more: int) -> Iterator[None]:
    """Inside, the process may take `more` bytes of address space beyond what it has; then there is a MemoryError, where a
    compressed file would else fill the machine. Nothing happens where the system cannot say how much it has."""
    import resource  # there is none on Windows

    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (OSError, ValueError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [pages * resource.getpagesize() + more, *(x for x in (soft, hard) if x != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
