"""What made a run besides its config: versions, git state, hardware. Never the environment."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    *("luthier", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers"),
    *("safetensors", "bitsandbytes", "hydra-core", "omegaconf", "pydantic", "jinja2", "numpy"),
    *("wandb", "tensorboard", "deepspeed", "flash-attn"),
)


def versions() -> dict[str, str]:
    """The version of Python and of each package that takes part in a run and is installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.rstrip("\n") if done.returncode == 0 else None


def git_state(folder: Path) -> dict[str, Any] | None:
    """The commit that `folder` is checked out at, and the files that differ; None outside git."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no") or ""
    return {
        "commit": commit,
        "branch": _git(folder, "rev-parse", "--abbrev-ref", "HEAD"),
        "dirty": bool(changed),
        "changed_files": [line[3:] for line in changed.splitlines()],
    }


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
