"""What a machine has for training: devices, kernels, disks, the hub, versions; and the choices.

Everything is a plain value that JSON can hold. What cannot be found out is None or a sentence;
nothing here raises for what a machine lacks.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

from luthier.config.schema import ModelConfig
from luthier.doctor.tiny_model import NF4_LEVELS
from luthier.memory.workload import detect_hardware
from luthier.model.device import AMPERE, VARLEN_ATTENTION, choose_machine
from luthier.model.source import HUB_TIMEOUT, is_hub_unreachable
from luthier.record.machine_info import MAIN_PACKAGES, hardware_facts
from luthier.record.run_dir import RUNS
from luthier.redaction import redact_message
from luthier.storage.cache import cache_root
from luthier.storage.disk_space import free_bytes

FP8_CAPABILITY = (8, 9)
"""The first CUDA compute capability that multiplies in 8 bits."""
_COMMAND_SECONDS = 10
_WRITTEN_BYTES, _CHUNK_BYTES, _WRITING_SECONDS = 64 * 2**20, 4 * 2**20, 1.5
"""How much is written to try a disk, in pieces of what size, and for how long at most."""

_INSTRUCTIONS = (
    *("avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16"),
    *("amx_int8", "neon", "sve", "sve2", "bf16", "i8mm"),
)
"""The instruction sets that matter to training, by torch's names."""

Facts = dict[str, Any]


def collect_machine_facts() -> dict[str, Facts]:
    """Return what is here, section by section. Imports torch; takes some seconds."""
    return {
        "machine": _machine_facts(),
        "gpus": _gpu_facts(),
        "torch": _torch_facts(),
        "kernels": _kernel_facts(),
        "folders": _folder_facts(),
        "hub": hub_facts(),
        "versions": version_facts(),
        "choice": _choices(),
    }


def _machine_facts() -> Facts:
    """Return processor, cores, instruction sets and main memory."""
    import psutil
    import torch

    hardware = hardware_facts()
    is_affine = hasattr(os, "sched_getaffinity")
    capabilities = torch.cpu.get_capabilities()
    return {
        "system": hardware["system"],
        "python": platform.python_version(),
        "cpu": hardware["cpu"],
        "cores": hardware["cores"],
        "usable_cores": len(os.sched_getaffinity(0)) if is_affine else hardware["cores"],
        "torch_threads": hardware["torch_threads"],
        "instructions": [name for name in _INSTRUCTIONS if capabilities.get(name)],
        "memory_gib": hardware["memory_gib"],
        "free_memory_gib": round(psutil.virtual_memory().available / 2**30, 1),
    }


def _gpu_facts() -> Facts:
    """Return the driver and each GPU with what it computes in; no entries without one."""
    import torch

    if torch.backends.mps.is_available():
        return {"0": "Apple GPU (MPS), which shares the main memory"}
    gpus: Facts = {}
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        capability = torch.cuda.get_device_capability(number)
        free, total = torch.cuda.mem_get_info(number)
        gpus[str(number)] = {
            "name": properties.name,
            "memory_gib": round(total / 2**30, 1),
            "free_memory_gib": round(free / 2**30, 1),
            "capability": ".".join(map(str, capability)),
            "bf16": capability[0] >= AMPERE,
            "fp8": capability >= FP8_CAPABILITY,
        }
    return gpus


def _torch_facts() -> Facts:
    """Return which build of torch this is, and what it talks to other devices with."""
    import torch
    from torch import distributed

    has_nccl = distributed.is_available() and distributed.is_nccl_available()
    backends = {"gloo": distributed.is_gloo_available, "nccl": distributed.is_nccl_available}
    is_there = distributed.is_available()
    return {
        "version": torch.__version__,
        "built_for": _torch_build(torch),
        "driver": _driver_version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version()))
        if has_nccl and torch.cuda.is_available()
        else None,
        "backends": [name for name, is_built in backends.items() if is_there and is_built()],
    }


def _torch_build(torch: Any) -> str:
    """Return what torch was built for."""
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return "Apple GPUs" if torch.backends.mps.is_built() else "CPUs alone"


def _driver_version() -> str | None:
    """Return the version of NVIDIA's driver; None where there is none."""
    return _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _first_line(*command: str) -> str | None:
    """Return the first line that a command prints; None where it fails or hangs."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None


def _kernel_facts() -> Facts:
    """Return which kernels are at hand; those of bitsandbytes are run."""
    compilers = [name for name in ("g++", "clang++", "c++") if shutil.which(name)]
    return {
        "bitsandbytes_nf4": _try_kernel(_run_nf4),
        "bitsandbytes_int8": _try_kernel(_run_int8),
        "attention": _attention_packages(),
        "compiler": _first_line(compilers[0], "--version") if compilers else None,
        "triton": _installed("triton"),
        "liger_kernel": _installed("liger-kernel"),
    }


def _try_kernel(kernel: Callable[[str], float]) -> str:
    """Return `right`, or what is wrong with a kernel that gives back its relative error."""
    device = choose_machine(ModelConfig(path="")).device
    try:
        error = kernel(device)
    except Exception as failure:
        lines = str(failure).strip().splitlines() or [""]
        return redact_message(f"fails: {type(failure).__name__}: {lines[0]}")
    # Both are exact but for the rounding of 8 bits.
    return "right" if error <= 1e-2 else f"wrong: off by {error:.1e}"


def _run_nf4(device: str) -> float:
    """Pack values that 4 bits hold exactly, unpack them, and return the largest difference."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    values = torch.tensor(NF4_LEVELS, device=device).repeat(64, 8)
    unpacked = dequantize_4bit(*quantize_4bit(values, quant_type="nf4"))
    return float((unpacked - values).abs().max())


def _run_int8(device: str) -> float:
    """Multiply in 8 bits, and return the largest difference from the product in whole numbers."""
    import torch
    from bitsandbytes.functional import int8_linear_matmul

    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(-127, 128, (32, 64), generator=generator, dtype=torch.int8)
    product = int8_linear_matmul(rows.to(device), rows.to(device)).cpu()
    expected = rows.int() @ rows.int().T
    return float((product - expected).abs().max() / expected.abs().max())


def _attention_packages() -> dict[str, str | None]:
    """Return the version of whatever computes attention besides torch's own `sdpa`."""
    has_varlen = importlib.util.find_spec("torch.nn.attention.varlen") is not None
    return {
        "torch_varlen": metadata.version("torch") if has_varlen else None,
        "flash_attn": _installed("flash-attn"),
        "flash_attn_interface": _installed("flash-attn-3"),
        "kernels": _installed("kernels"),
    }


def _installed(name: str) -> str | None:
    """Return the version of an installed package; None where it is not there."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _folder_facts() -> Facts:
    """Return room and speed of the disks of the folders that runs write to."""
    from huggingface_hub import constants

    folders = {"runs": RUNS, "cache": cache_root(), "hub_cache": Path(constants.HF_HUB_CACHE)}
    return {name: _disk_facts(folder.expanduser()) for name, folder in folders.items()}


def _disk_facts(folder: Path) -> Facts:
    """Return how much a folder's disk has free, in GiB, and writes in a second, in MiB."""
    absolute = folder.absolute()
    there = next(place for place in (absolute, *absolute.parents) if place.is_dir())
    facts: Facts = {"path": str(absolute), "free_gib": round(free_bytes(absolute) / 2**30, 1)}
    try:
        return facts | {"write_mib_per_second": _writing_speed(there)}
    except OSError as error:
        reason = f"cannot be written: {error.strerror or error}"
        return facts | {"write_mib_per_second": None, "problem": reason}


def _writing_speed(folder: Path) -> int:
    """Return how many MiB a second reach the disk; the file that is written is removed."""
    chunk = os.urandom(_CHUNK_BYTES)
    written, began = 0, time.perf_counter()
    with tempfile.TemporaryFile(dir=folder) as file:
        while written < _WRITTEN_BYTES and time.perf_counter() - began < _WRITING_SECONDS:
            file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
            written += len(chunk)
    return round(written / 2**20 / (time.perf_counter() - began))


def hub_facts() -> Facts:
    """Return whether the Hugging Face hub answers, and as whom it knows this machine.

    It has a few seconds for each. The token itself goes nowhere but to the hub.
    """
    from huggingface_hub import constants, get_token

    has_token = get_token() is not None
    if constants.HF_HUB_OFFLINE:
        access, is_reachable = "offline: HF_HUB_OFFLINE is set", False
    else:
        is_reachable = not is_hub_unreachable()
        access = "reachable" if is_reachable else f"no answer within {HUB_TIMEOUT:.0f} seconds"
    login = "none (hf auth login)" if not has_token else "a token, which was not tried"
    return {
        "endpoint": redact_message(constants.ENDPOINT),
        "access": access,
        "login": _login_name() if has_token and is_reachable else login,
    }


def _login_name() -> str:
    """Return the name that the hub knows the token by, or that it refuses it."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session

    try:
        reply = get_session().get(
            f"{constants.ENDPOINT}/api/whoami-v2", headers=build_hf_headers(), timeout=HUB_TIMEOUT
        )
        if reply.status_code in (401, 403):
            return "a token that the hub refuses (hf auth login)"
        name = reply.json()["name"]
    except Exception:  # the HTTP client's own errors, and replies of another form
        return "a token, and no answer about it"
    return redact_message(str(name))


def version_facts() -> Facts:
    """Return each required package with its version here, the one tried, and how they compare.

    Those that were tried stand in luthier's own metadata: a requirement names the release that the
    tests pass with. Optional packages are listed where they are installed.
    """
    facts: Facts = {}
    for text in metadata.requires("luthier") or []:
        requirement = Requirement(text)
        here = _installed(requirement.name)
        marker = str(requirement.marker or "")
        bound = next((each.version for each in requirement.specifier), None)
        is_for_developers = any(f'"{extra}"' in marker for extra in ("test", "dev"))
        if bound is None or is_for_developers or (here is None and "extra" in marker):
            continue
        facts[requirement.name] = {
            "here": here,
            "tried": bound,
            "state": _compare_versions(here, bound),
        }
    main = [name for name in MAIN_PACKAGES if name in facts]
    return {name: facts[name] for name in [*main, *sorted(facts.keys() - set(main))]}


def _compare_versions(here: str | None, tried: str) -> str:
    """Return how a version stands to the release that was tried, such as 2.13 for 2.13.1."""
    if here is None:
        return "missing"
    version, release = Version(here), Version(tried).release
    if version.release[: len(release)] == release:
        return "as tried"
    return "newer than tried" if version > Version(tried) else "older than needed"


_BYTES_PER_WEIGHT = {"full fine-tuning": 16.0, "LoRA": 2.0, "QLoRA (nf4)": 0.6}
"""What a weight takes beside activations: in full float32 weight and gradient and two states of
AdamW; frozen 16 bits; 4 bits, with embeddings that stay in 16."""
_ACTIVATIONS_SHARE = 0.3
"""The share of the memory that is left to activations."""


def _choices() -> Facts:
    """Return what luthier would choose here where the settings say `auto`, and what to start."""
    import torch

    config = ModelConfig(path="")
    machine, hardware = choose_machine(config), detect_hardware(config)
    gpus = torch.cuda.device_count()
    room = hardware.room * (1 - _ACTIVATIONS_SHARE)
    sizes = dict(_BYTES_PER_WEIGHT)
    if machine.dtype == "float32":
        sizes["LoRA"] = 4.0
    return {
        "device": machine.device_type,
        "dtype": machine.dtype,
        "attention": machine.attention,
        # What classes without attention of variable length get in its place, a run says.
        "packed_rows": VARLEN_ATTENTION if machine.attention == "sdpa" else machine.attention,
        "processes": max(gpus, 1),
        "launch": _launch_advice(machine.device_type, gpus),
        "largest_model_billions": {
            name: round(room / size / 1e9, 1) for name, size in sizes.items()
        },
        "batch": "luthier plan recipe=NAME says what fits, and what would be faster",
    }


def _launch_advice(device_type: str, gpus: int) -> str:
    """Return how to start a run on all devices of this machine."""
    if gpus > 1:
        return (
            f"luthier launch: {gpus} processes; --config fsdp2 for a model that is too large for "
            "one GPU"
        )
    return "luthier train: one process" + (", all cores" if device_type == "cpu" else "")
