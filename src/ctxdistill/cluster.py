"""Work spread over the machines of a Ray cluster: batches to label, cells of a study.

In: an address, a function, items. Out: each item's result, in the order in which they are done. Invariants: what a worker
makes does not depend on which one it is or on what it did before, so the items of a machine that is lost are done by
another; workers write nothing, the process that asked for the work does; a bounded number of items is under way.

All machines see the recipe, its data and the model under the same paths. A worker takes a GPU where the cluster has some,
else all the CPUs that a machine has given to Ray.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ctxdistill import errors
from ctxdistill.dataset import prepare, recipe_of
from ctxdistill.errors import CtxDistillError, RunError
from ctxdistill.rundir import Progress, no_progress
from ctxdistill.store import Shard, TargetStore, read_index
from ctxdistill.targets import Labelling

AHEAD = 2
"""Items under way for each worker."""
RETRIES = 4
"""How often an item is tried again after the worker that had it was lost."""
BATCHES = 16
"""Batches of an item; what a lost worker has to do again."""


def fan_out(address: str, work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """(number, `work(item)`) for each of `items`, as they are done. `address` is that of a running cluster, or `local`.

    Raises: `RunError` when Ray is not installed or the cluster cannot be reached, or loses an item again and again; what
    `work` raises of ours.
    """
    ray = connect(address)
    try:
        resources, workers = slots(ray.nodes())
        remote = ray.remote(**resources, max_retries=RETRIES)(_guarded)
        waiting, running = iter(enumerate(items)), dict[Any, int]()
        while True:
            while len(running) < AHEAD * workers and (found := next(waiting, None)):
                running[remote.remote(work, found[1])] = found[0]
            if not running:
                return
            (done,), _ = ray.wait(list(running), num_returns=1)
            try:
                result, error = ray.get(done)
            except ray.exceptions.RayTaskError:
                raise  # a bug, with its traceback
            except ray.exceptions.RayError as lost:
                raise RunError(
                    f"the cluster could not do its work: {str(lost).strip().splitlines()[0]}",
                    fix="look at the machine's log; the same command goes on with what is missing",
                ) from None
            if error:
                raise getattr(errors, error[0])(error[1])
            yield running.pop(done), result
    finally:
        ray.shutdown()


def connect(address: str) -> Any:
    """Ray, connected."""
    try:
        import ray
    except ImportError:
        raise RunError("Ray is not installed", fix='pip install "ctxdistill[ray]"') from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that is started here reports to nobody
    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    except Exception as error:  # it raises what it likes
        raise RunError(
            f"cannot reach the Ray cluster at {address}: {str(error).strip().splitlines()[0]}",
            expected="the address that `ray start --head` printed, or local",
        ) from None
    return ray


def slots(nodes: Sequence[dict[str, Any]]) -> tuple[dict[str, float], int]:
    """(what a worker takes, number of workers at a time)."""
    machines = [node["Resources"] for node in nodes if node["Alive"]]
    gpus = int(sum(machine.get("GPU", 0) for machine in machines))
    if gpus:
        return {"num_gpus": 1, "num_cpus": 1}, gpus
    cpus = [machine["CPU"] for machine in machines if machine.get("CPU")]
    if not cpus:
        raise RunError("the Ray cluster has no CPU to give", fix="start a machine with `ray start --address ...`")
    return {"num_cpus": min(cpus)}, len(cpus)


def _guarded(work: Callable[[Any], Any], item: Any) -> tuple[Any, tuple[str, str] | None]:
    """(result, None), or (None, (kind, message)) for an error of ours, which crosses the wire as words."""
    try:
        return work(item), None
    except CtxDistillError as error:
        return None, (type(error).__name__, str(error))


# -- labelling --------------------------------------------------------------------------------------------------------


def label_spread(
    address: str,
    manifest: dict[str, Any],
    run: Path,
    works: dict[str, Labelling],
    store: TargetStore,
    progress: Progress = no_progress,
) -> None:
    """Label what is missing of each split's completions, on the cluster; the store gets the shards that a run alone would
    have made.

    Raises: `RunError` when a worker's targets are not those of this machine (another model file or version).
    """
    items = []
    for split, work in works.items():
        store.note_used(work.keys)
        todo = [batch for batch in range(len(work.batches)) if work.missing(batch, store)]
        items += [(split, todo[i : i + BATCHES]) for i in range(0, len(todo), BATCHES)]
    total = sum(len(batches) for _, batches in items)
    done = 0
    spec = json.dumps({"manifest": manifest, "run": str(run.resolve())})
    for number, shards in fan_out(address, functools.partial(_labelled, spec), items):
        split, batches = items[number]
        work = works[split]
        for batch, (line, raw) in zip(batches, shards, strict=True):
            shard = Shard(**line)
            expected = [work.key(n) for n in work.order[slice(*work.batches[batch])].tolist()]
            if shard.keys != expected:
                raise RunError(
                    "a worker made targets of another kind than this machine would",
                    expected="the same model files, device, recipe, data and versions on all machines",
                    fix="compare `ctxdistill --version`, torch and the model on the machines",
                )
            store.adopt(shard, raw)
        done += len(batches)
        progress("teacher (batches)", done, total)


@functools.lru_cache(maxsize=1)
def _prepared(spec: str) -> dict[str, Labelling]:
    """The model and what is to be labelled, once in each worker."""
    given = json.loads(spec)
    recipe = recipe_of(given["manifest"])
    lm, prompter, rows = prepare(recipe, Path(given["run"]))
    return {split: Labelling(lm, prompter, rows.pairs[split], recipe) for split in ("train", "validation")}


def _labelled(spec: str, item: tuple[str, list[int]]) -> list[tuple[dict[str, Any], bytes]]:
    """The shards of some batches: (line of the index, bytes)."""
    split, batches = item
    made = []
    for batch in batches:
        with tempfile.TemporaryDirectory() as folder:
            for _ in _prepared(spec)[split].run(TargetStore(Path(folder)), [batch]):
                pass
            (shard,) = read_index(Path(folder))
            made.append((shard._asdict(), (Path(folder) / shard.shard).read_bytes()))
    return made
