"""What runs inside the sandbox, as a program of its own: `python -I -S child.py ROLE`. Standard library only.

In: one JSON line on stdin. Out, for the role `program`: it runs code and then answers calls of the functions in it, one JSON
line each, over two pipes. Out, for the role `judge`: it runs tests whose functions are those of the program, called over
the pipes, and writes one JSON line on stdout. Invariants: limits are in force before any code that was given runs; the
process that judges never runs the program's code, and values come over as data, never as objects with methods of their own.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import ctypes
import importlib
import itertools
import json
import os
import platform
import resource
import signal
import struct
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

MOST_ITEMS = 100_000
"""Of a generator that a function returns."""
DENIED = {
    # system call: (x86_64, aarch64); None where the machine has none of that name
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "socket": (41, 198),
    "socketpair": (53, 199), "connect": (42, 203), "ptrace": (101, 117), "kill": (62, 129), "tkill": (200, 130),
    "tgkill": (234, 131), "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "mount": (165, 40), "unshare": (272, 97), "setns": (308, 268), "bpf": (321, 280),
    "io_uring_setup": (425, 425), "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "shmget": (29, 194), "mq_open": (240, 180),
    "setsid": (112, 157), "setpriority": (141, 140), "prlimit64": (302, 261),
}  # fmt: skip
CLONE, CLONE3 = (56, 220), 435
CLONE_THREAD, CLONE_NEWUSER, CLONE_NEWNET = 0x10000, 0x10000000, 0x40000000
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
FORBIDDEN = (
    "socket.", "ctypes.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.kill", "pty.",
    "os.chmod", "os.chown", "os.link", "os.symlink", "signal.pthread_kill", "syslog.",
)  # fmt: skip
"""Starts of the names of Python's audit events."""
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "os.utime", "shutil.")


# -- restrictions -----------------------------------------------------------------------------------------------------


def restrict(limits: dict[str, Any], folder: str) -> list[str]:
    """Put all restrictions in force that this system has; their names. What is denied gives an OSError."""
    for name, most in (
        ("RLIMIT_CORE", 0), ("RLIMIT_AS", limits["memory"]), ("RLIMIT_CPU", limits["cpu"]), ("RLIMIT_FSIZE", limits["file"]),
        ("RLIMIT_NOFILE", 64), ("RLIMIT_NPROC", limits["processes"]),
    ):  # fmt: skip
        # a system may not know a limit, or refuse to set it (macOS: the address space)
        with contextlib.suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, name), (most, most))
    made = []
    if sys.platform == "linux":
        steps = (("network namespace", _no_network), ("landlock", _landlock), ("seccomp", _seccomp))
        _system("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
        made = [name for name, step in steps if step(folder)]
    sys.addaudithook(_hook(folder))
    return [*made, "audit hook"]


def _system(name: str, *args: Any) -> int:
    """A function of libc with whole numbers, or bytes for the address of a structure."""
    function = getattr(ctypes.CDLL(None), name)
    return int(function(*(ctypes.c_long(a) if isinstance(a, int) else a for a in args)))


def _no_network(_folder: str) -> bool:
    """A network namespace with nothing in it, as root or inside a user namespace; root's powers are given up."""
    done = _system("unshare", CLONE_NEWNET) == 0 or _system("unshare", CLONE_NEWUSER | CLONE_NEWNET) == 0
    _system("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))
    return done


def _landlock(folder: str) -> bool:
    """Files: Python's own can be read, those in `folder` written, and nothing else. Needs Linux 5.13."""
    create, add, restrict_self = 444, 445, 446
    version = _system("syscall", create, None, 0, 1)
    if version < 1:
        return False
    everything = (1 << (13 + (version >= 2) + (version >= 3) + (version >= 5))) - 1
    network, scope = 3 if version >= 4 else 0, 3 if version >= 6 else 0  # TCP; abstract sockets and signals
    size = 8 if version < 4 else 16 if version < 6 else 24
    rules = _system("syscall", create, struct.pack("QQQ", everything, network, scope), size, 0)
    if rules < 0:
        return False
    write, read, listing = 1 << 1, 1 << 2, 1 << 3
    library = os.path.dirname(os.path.dirname(os.path.realpath(os.__file__)))  # Python's own and shared libraries
    own = {library, *sys.path, "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/localtime"}
    for path, access in [
        *((p, read | listing) for p in sorted(own)),
        (folder, everything & ~1),
        ("/dev/null", write | read),
    ]:
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
            # a rule for a file may hold no right that only folders have
            allowed = access if os.path.isdir(path) else access & (write | read)
            _system("syscall", add, rules, 1, struct.pack("=Qi", allowed, handle), 0)
            os.close(handle)
    done = _system("syscall", restrict_self, rules, 0) == 0
    os.close(rules)
    return done


def _seccomp(_folder: str) -> bool:
    """System calls: no new process, no socket, no signal, nothing of another process. Needs x86-64 or ARM64."""
    machine = platform.machine()
    if machine not in AUDIT_ARCH or sys.byteorder != "little":
        return False
    which = list(AUDIT_ARCH).index(machine)
    numbers = [number for row in DENIED.values() if (number := row[which]) is not None]
    allow, deny, absent = 0x7FFF0000, 0x00050000 | 1, 0x00050000 | 38  # EPERM; ENOSYS, so that libc takes clone
    load, equal, least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    program: list[tuple[int, int, int, int]] = [
        (load, 0, 0, 4),
        (equal, 1, 0, AUDIT_ARCH[machine]),
        (give, 0, 0, deny),
        (load, 0, 0, 0),
    ]
    program += [(least, 0, 1, 0x40000000), (give, 0, 0, deny)]  # x86-64's second table of the same calls
    for number in numbers:
        program += [(equal, 0, 1, number), (give, 0, 0, deny)]
    program += [(equal, 0, 1, CLONE3), (give, 0, 0, absent)]
    program += [(equal, 0, 3, CLONE[which]), (load, 0, 0, 16), (any_bit, 1, 0, CLONE_THREAD), (give, 0, 0, deny)]
    program += [(give, 0, 0, allow)]
    filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    whole = struct.pack("HP", len(program), ctypes.addressof(filters))
    return _system("prctl", 22, 2, whole, 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def _hook(folder: str) -> Callable[[str, tuple[Any, ...]], None]:
    """What Python itself refuses: a second line, and on systems without the others the only one."""
    inside = os.path.realpath(folder) + os.sep
    write = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def within(path: Any) -> bool:
        return (
            isinstance(path, int) or path is None or (os.path.realpath(os.fsdecode(path)) + os.sep).startswith(inside)
        )

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event.startswith(FORBIDDEN):
            raise PermissionError(f"not in the sandbox: {event}")
        if event == "open" and args[0] not in ("/dev/null", os.devnull):
            path, mode, flags = args
            writes = bool((flags or 0) & write) or (isinstance(mode, str) and bool(set(mode) & set("wax+")))
            private = isinstance(path, str) and path.startswith("/proc")
            if (writes and not within(path)) or private:
                raise PermissionError(f"not in the sandbox: {event} {path!r:.80}")
        if event.startswith(CHANGES) and not all(within(a) for a in args if isinstance(a, str | bytes | os.PathLike)):
            raise PermissionError(f"not in the sandbox: {event} outside its folder")

    return hook


# -- values -----------------------------------------------------------------------------------------------------------


SIMPLE: dict[str, tuple[type, Callable[[Any], str], Callable[[str], Any]]] = {
    # name: (type, to text, from text); in base 16 the length of a number is not limited
    "int": (int, lambda v: int.__format__(v, "x"), lambda text: int(text, 16)),
    "float": (float, float.__repr__, float),
    "str": (str, str.__str__, str),
    "bytes": (bytes, bytes.hex, bytes.fromhex),
    "complex": (complex, lambda v: f"{v.real!r} {v.imag!r}", lambda text: complex(*map(float, text.split(" ")))),
}
MANY: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


class Opaque:
    """An object that is no plain data, on the other side: it is true or false, and equal to nothing."""

    def __init__(self, true: bool) -> None:
        self.true = true

    def __bool__(self) -> bool:
        return self.true


def encode(value: Any) -> Any:
    """A value as JSON holds it. Subclasses become the plain type, so that no equality of their own comes over."""
    if value is None or isinstance(value, bool):
        return value
    for name, (kind, write, _) in SIMPLE.items():
        if isinstance(value, kind):
            return [name, write(value)]
    if isinstance(value, dict):
        return ["dict", [[encode(k), encode(v)] for k, v in dict.items(value)]]
    for name, several in MANY.items():
        if isinstance(value, several):
            return [name, [encode(v) for v in several.__iter__(value)]]
    if isinstance(value, range):
        return ["range", [value.start, value.stop, value.step]]
    if isinstance(value, Iterator):
        items = list(itertools.islice(value, MOST_ITEMS + 1))
        if len(items) > MOST_ITEMS:
            raise TypeError(f"an iterator of more than {MOST_ITEMS} items")
        return ["iterator", [encode(v) for v in items]]
    return ["object", bool(value)]


def decode(value: Any) -> Any:
    """What `encode` made."""
    if value is None or isinstance(value, bool):
        return value
    name, given = value
    if name == "dict":
        return {decode(k): decode(v) for k, v in given}
    if name == "range":
        return range(*given)
    if name == "object":
        return Opaque(given is True)
    if name in SIMPLE:
        return SIMPLE[name][2](given)
    items = [decode(v) for v in given]
    return iter(items) if name == "iterator" else MANY[name](items)


# -- roles ------------------------------------------------------------------------------------------------------------


def told(error: BaseException) -> str:
    """An error in one line; the program's own as the program told it."""
    if isinstance(error, ProgramError):
        return str(error)[:200]
    with contextlib.suppress(Exception):  # the error's class may be the program's own
        return f"{type(error).__name__}: {error}"[:200]
    return "an error that cannot be shown"


def program(given: dict[str, Any], calls: Any, answers: Any) -> None:
    """Run the code, say which functions there are, answer their calls until the judge has no more."""

    def say(answer: dict[str, object]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    space: dict[str, Any] = {"__name__": "program"}
    try:
        for code in (*given["setup"], given["code"]):
            exec(compile(code, "<program>", "exec", dont_inherit=True), space)
    except BaseException as error:
        say({"error": told(error)})
        return
    modules = {name: value.__name__ for name, value in space.items() if isinstance(value, types.ModuleType)}
    names = [name for name, value in space.items() if callable(value) and not name.startswith("__")]
    say({"names": names, "modules": modules})
    for line in calls:
        name, args, kwargs = json.loads(line)
        try:
            say({"value": encode(space[name](*decode(args), **{k: decode(v) for k, v in kwargs.items()}))})
        except BaseException as error:
            say({"error": told(error)})


class ProgramError(Exception):
    """The program raised an error, or is gone."""


def taken(names: list[str], tests: list[str]) -> list[str]:
    """Which of the program's functions the tests may call. One that has the name of a built-in function would decide what
    the tests mean (`assert set(f(x)) == set(y)`), so it is left out, unless the tests call nothing but built-ins."""
    calls = [node.func.id for t in tests for node in ast.walk(ast.parse(t)) if _calls_name(node)]  # type: ignore[attr-defined]
    own = any(not hasattr(builtins, name) for name in calls)
    return [name for name in names if not (own and hasattr(builtins, name))]


def _calls_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name)


def judge(given: dict[str, Any], calls: Any, answers: Any) -> dict[str, Any]:
    """Run the tests; `verdict`: `passed`, or in what the first failure consists, and `detail`."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"not finished after {given['seconds']:g} s")

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, given["seconds"])

    def ask() -> dict[str, Any]:
        line = answers.readline()
        if not line:
            raise ProgramError("the program ended before it answered")
        answer = json.loads(line)
        if not isinstance(answer, dict) or "error" in answer:
            raise ProgramError(str(answer["error"]) if isinstance(answer, dict) else "no answer")
        return answer

    def function(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.write(json.dumps([name, encode(args), {k: encode(v) for k, v in kwargs.items()}]) + "\n")
            calls.flush()
            return decode(ask()["value"])

        return call

    try:
        found = ask()
        space = {"__name__": "tests", **{name: function(name) for name in taken(found["names"], given["tests"])}}
        for name, module in found["modules"].items():  # tests may rely on what the program imports
            if module.partition(".")[0] in sys.stdlib_module_names and not hasattr(builtins, name):
                space[name] = importlib.import_module(module)
    except TimeoutError as error:
        return {"verdict": "timeout", "detail": str(error)}
    except Exception as error:
        return {"verdict": "error", "detail": told(error)}
    for number, code in enumerate([*given["setup"], *given["tests"]], 1 - len(given["setup"])):
        try:
            exec(compile(code, "<tests>", "exec", dont_inherit=True), space)
        except TimeoutError as error:
            return {"verdict": "timeout", "detail": f"test {number}: {error}"}
        except AssertionError:
            return {"verdict": "wrong", "detail": f"test {number}: not as expected"}
        except BaseException as error:
            return {"verdict": "error", "detail": f"test {number}: {told(error)}"}
    return {"verdict": "passed", "detail": ""}


def main() -> None:
    """`child.py ROLE CALLS ANSWERS`: the numbers of the two pipes' ends that this side has."""
    role, calls, answers = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    given = json.loads(sys.stdin.readline())
    verdicts = os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    made = restrict(given["limits"], os.getcwd())
    if role == "program":
        verdicts.close()
        with os.fdopen(calls) as read, os.fdopen(answers, "w") as write:
            program(given, read, write)
    else:
        with os.fdopen(calls, "w") as write, os.fdopen(answers) as read:
            found = judge(given, write, read)
            verdicts.write(json.dumps({"nonce": given["nonce"], "isolation": made, **found}))
            verdicts.flush()
            os._exit(0)  # what the tests left behind has no say any more


if __name__ == "__main__":
    main()
