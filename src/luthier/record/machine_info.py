"""What made a run besides its config: versions, hardware, code. Never the environment."""

import hashlib
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from luthier.redaction import redact_message, redact_text
from luthier.storage.atomic import write_text

CODE_FOLDER = "code"
"""The folder of a run with what differed from the commit of its code."""
MAX_DIFF_CHARS = 1_000_000
"""Characters of a difference that are written: more is data, not code."""
MAIN_PACKAGES = (
    *("luthier", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers"),
    *("safetensors", "bitsandbytes", "hydra-core", "numpy", "deepspeed", "flash-attn"),
)
"""The packages that decide a run's numbers, in the order in which people look for them."""


def package_versions() -> dict[str, str]:
    """Return the version of Python and of every installed package, the main ones first."""
    installed = dict(filter(None, map(_name_and_version, metadata.distributions())))
    first = {name: installed.pop(name) for name in MAIN_PACKAGES if name in installed}
    return {"python": platform.python_version(), **first, **dict(sorted(installed.items()))}


def main_versions(versions: dict[str, str]) -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a run's numbers."""
    return {name: versions[name] for name in ("python", *MAIN_PACKAGES) if name in versions}


def _name_and_version(package: metadata.Distribution) -> tuple[str, str] | None:
    """Return a package's name and version; None where its metadata has none."""
    # The head alone: to parse the whole metadata takes long.
    text = package.read_text("METADATA") or package.read_text("PKG-INFO") or ""
    name, version = (re.search(rf"^{key}: (.+)$", text, re.M) for key in ("Name", "Version"))
    return (name[1].strip().lower(), version[1].strip()) if name and version else None


def hardware_facts() -> dict[str, Any]:
    """Return the machine's processor, memory (GiB) and accelerators. Needs torch."""
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


def memory_gib() -> float:
    """Return the memory of this process in GiB: now on the host, or the most so far on a GPU."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated() / 2**30)
    return float(psutil.Process().memory_info().rss / 2**30)


def peak_memory_gib() -> dict[str, float]:
    """Return the most memory this process has held so far, in GiB, on the host and on the GPU."""
    import resource

    import torch

    # Linux counts kibibytes, macOS bytes.
    unit = 2**30 if sys.platform == "darwin" else 2**20
    peak = {"host": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 2)}
    if torch.cuda.is_available():
        peak["gpu"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return peak


def git_state(folder: Path, run: Path | None = None) -> dict[str, Any] | None:
    """Return the commit that `folder` is checked out at, and what differs; None outside git.

    `run` is a run's directory, in which the difference itself is then written; None writes none.
    """
    commit = _git_output(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    # Untracked files are outputs more often than code, and listing them may take long.
    changed = _git_output(folder, "status", "--porcelain", "--untracked-files=no") or ""
    state: dict[str, Any] = {
        "commit": commit,
        "branch": _git_output(folder, "rev-parse", "--abbrev-ref", "HEAD"),
        "remote": redact_text(_git_output(folder, "remote", "get-url", "origin") or "") or None,
        "dirty": bool(changed),
        "changed_files": [line[3:] for line in changed.splitlines()],
    }
    return state | ({"diff": _save_diff(folder, run)} if changed and run is not None else {})


def _save_diff(folder: Path, run: Path) -> str | None:
    """Write the difference into a file named by its content; return its name within the run."""
    # A program of the user's own (`diff.external`) or colours would make it no patch.
    diff = _git_output(folder, "diff", "HEAD", "--no-color", "--no-ext-diff")
    if not diff:
        return None
    text = redact_message(diff)
    if len(text) > MAX_DIFF_CHARS:
        text = f"{text[:MAX_DIFF_CHARS]}\n... cut: {len(text):,} characters in all\n"
    name = f"{CODE_FOLDER}/{hashlib.sha256(text.encode()).hexdigest()[:12]}.diff"
    write_text(run / name, f"{text}\n")
    return name


def _git_output(folder: Path, *arguments: str) -> str | None:
    """Return what a git command prints; None where it fails or there is no git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            # A repository on a network file system may hang, and a run shall not hang with it.
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.rstrip("\n") if done.returncode == 0 else None
