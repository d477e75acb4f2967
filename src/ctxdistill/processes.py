"""The processes of one run, as `torchrun` or `accelerate launch` starts them.

In: the variables that a launcher sets (`WORLD_SIZE`, `RANK`, `LOCAL_RANK`, `MASTER_ADDR`, `MASTER_PORT`). Out: who leads,
barriers, sums over all. Invariants: the first process alone writes and prints, the others read what it wrote; of all
processes that fail, the first to do so says why, and its launcher ends the others; with one process nothing here does
anything, and torch is not imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from ctxdistill.errors import RunError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
PATIENCE = timedelta(days=7)
"""How long processes wait for the first one, which labels and evaluates alone. A launcher ends them when that has failed."""
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": (
        "DeepSpeed",
        "ZeRO-3 keeps the weights in pieces, and the teacher (the same weights without the adapter) reads them outside of "
        "its engine; of what ZeRO-1 and -2 share out, optimizer state and gradients, an adapter has next to nothing",
    ),
    "ACCELERATE_USE_FSDP": (
        "accelerate's FSDP",
        "it wraps the whole model, and the teacher (the same weights without the adapter) reads the head outside of it; "
        "train.shard = true has FSDP2 share out the frozen blocks",
    ),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "the adapter is PEFT's, on the layers of transformers"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("accelerate's parallelism config", "processes share the rows, nothing else"),
}
"""Variable of accelerate's -> its name, and why it is refused."""


def count() -> int:
    """How many processes the run has."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def rank() -> int:
    """Which of them this is, from 0."""
    return int(os.environ.get("RANK") or 0)


def leads() -> bool:
    """Whether this is the one that writes and prints."""
    return rank() == 0


def local(name: str) -> str:
    """The device of this process, where `name` (`cuda`) is what all have."""
    number = os.environ.get("LOCAL_RANK")
    return f"{name}:{number}" if number and count() > 1 and name == "cuda" else name


def begin(device: torch.device) -> None:
    """Meet the other processes. Raises `RunError` for a way to share the work that is not supported."""
    for variable, (name, why) in REFUSED.items():
        if os.environ.get(variable, "").lower() in {"1", "true"}:
            raise RunError(
                f"{name} is not supported: {why}",
                expected="processes that share the rows (DDP)",
                found=f"{variable}={os.environ[variable]}",
                fix="torchrun --nproc-per-node N -m ctxdistill distill ..., or choose multi-GPU in `accelerate config`",
            )
    if count() == 1:
        return
    import torch

    if torch.distributed.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # small things go over gloo also where gradients do not, so that to wait costs a GPU nothing
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        torch.distributed.init_process_group(backend, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"the {count()} processes of the run do not meet",
            expected="a launcher that says where: MASTER_ADDR, MASTER_PORT, RANK",
            found=str(error).split("\n")[0],
            fix="start with torchrun or accelerate launch; for one process, unset WORLD_SIZE",
        ) from None


def shard(blocks: Sequence[torch.nn.Module], device: torch.device) -> None:
    """Leave each process its part of the frozen weights of `blocks`; FSDP2 brings a block together while it is computed.
    What is trained stays whole in each process. From then on all processes must come to every forward pass."""
    if count() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (count(),))
    for block in blocks:
        fully_shard(block, mesh=mesh, ignored_params={p for p in block.parameters() if p.requires_grad})


def wait() -> None:
    """Go on when all processes have come here."""
    if count() > 1:
        import torch

        torch.distributed.barrier()  # over gloo, where it is at hand


def first(work: Callable[[], T]) -> T:
    """`work`, done by the first process, and when it is ready by the others, who find on disk what it made."""
    if leads():
        made = work()
        wait()
        return made
    wait()
    return work()


def total(values: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes, in place, the same bits in each."""
    if count() > 1:
        import torch

        torch.distributed.all_reduce(values)
    return values


def end() -> None:
    """Part from the other processes, all having done their work."""
    if count() > 1:
        import torch

        if torch.distributed.is_initialized():
            # Gloo's threads let go of the tensors of earlier sums now, and this wait holds none. FSDP2 keeps the group and its
            # threads alive to the very end, and one that frees a tensor while Python ends aborts the process.
            wait()
            torch.distributed.destroy_process_group()


def may_speak() -> bool:
    """Whether this process is the first of all to fail, or the only one: it says why, and the others nothing. They agree
    through the store at which they meet; where there is none, the one that leads speaks."""
    if count() == 1:
        return True
    import torch

    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store = torch.distributed.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=5)
        )
        return int(store.add(f"ctxdistill/failed/{again}", 1)) == 1
    except (RuntimeError, KeyError, ValueError):
        return leads()
