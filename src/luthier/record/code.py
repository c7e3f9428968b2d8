"""The code that made a run: the commit, where it can be had, and what differs from it."""

import hashlib
import subprocess
from pathlib import Path
from typing import Any

from luthier.record.secrets import scrubbed
from luthier.storage.atomic import write_text

FOLDER = "code"
"""Where a run keeps what differed from the commit."""
LONGEST = 1_000_000
"""Characters of a difference that are kept: more is data, not code."""


def git_state(folder: Path, run: Path | None = None) -> dict[str, Any] | None:
    """The commit that `folder` is checked out at, and the files that differ; None outside git.

    `run`: a run's directory, in which the difference itself is then kept.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no") or ""
    state: dict[str, Any] = {
        "commit": commit,
        "branch": _git(folder, "rev-parse", "--abbrev-ref", "HEAD"),
        "remote": scrubbed(_git(folder, "remote", "get-url", "origin") or "") or None,
        "dirty": bool(changed),
        "changed_files": [line[3:] for line in changed.splitlines()],
    }
    return state | ({"diff": _kept(folder, run)} if changed and run is not None else {})


def _kept(folder: Path, run: Path) -> str | None:
    """Keep the difference in a file that is named by its content; the name, relative to the run."""
    diff = _git(folder, "diff", "HEAD", "--no-color", "--no-ext-diff")
    if not diff:
        return None
    text = scrubbed(diff)
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]}\n... cut: {len(text):,} characters in all\n"
    name = f"{FOLDER}/{hashlib.sha256(text.encode()).hexdigest()[:12]}.diff"
    write_text(run / name, f"{text}\n")
    return name


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.rstrip("\n") if done.returncode == 0 else None
