"""What made a run besides its config and code: versions, hardware. Never the environment."""

import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

MAIN = (
    *("luthier", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers"),
    *("safetensors", "bitsandbytes", "hydra-core", "numpy", "deepspeed", "flash-attn"),
)
"""The packages that decide a run's numbers, in the order in which people look for them."""


def versions() -> dict[str, str]:
    """The version of Python and of every package that is installed, the main ones first."""
    installed = dict(filter(None, map(_name_and_version, metadata.distributions())))
    first = {name: installed.pop(name) for name in MAIN if name in installed}
    return {"python": platform.python_version(), **first, **dict(sorted(installed.items()))}


def _name_and_version(package: metadata.Distribution) -> tuple[str, str] | None:
    """What stands in the head of a package's metadata, which takes long to parse as a whole."""
    text = package.read_text("METADATA") or package.read_text("PKG-INFO") or ""
    name, version = (re.search(rf"^{key}: (.+)$", text, re.M) for key in ("Name", "Version"))
    return (name[1].strip().lower(), version[1].strip()) if name and version else None


def hardware() -> dict[str, Any]:
    """The machine's processor, memory (GiB) and accelerators. Needs torch."""
    import psutil
    import torch

    facts: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()}",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }
    if torch.cuda.is_available():
        facts["gpus"] = [
            {
                "name": torch.cuda.get_device_name(i),
                "memory_gib": round(torch.cuda.get_device_properties(i).total_memory / 2**30, 1),
            }
            for i in range(torch.cuda.device_count())
        ]
        facts["cuda"] = torch.version.cuda
    return facts


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_memory_gib() -> dict[str, float]:
    """The most memory this process has held so far, in GiB, on the host and on the GPU."""
    import resource

    import torch

    # Linux counts kibibytes, macOS bytes.
    unit = 2**30 if sys.platform == "darwin" else 2**20
    peak = {"host": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 2)}
    if torch.cuda.is_available():
        peak["gpu"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return peak
