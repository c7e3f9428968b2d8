"""`run.json`: what made a run, how it stands and what came out."""

import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from luthier.config.schema import RunConfig
from luthier.record import facts
from luthier.record.files import read_json, write_json
from luthier.record.rundir import redacted_override


class RunRecord:
    """The record of one run; every update is on disk at once, so that a killed run tells too."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "run.json"
        self.entries: dict[str, Any] = read_json(self.path) or {}
        self._clock = time.monotonic()

    def start(self, config: RunConfig, overrides: list[str]) -> None:
        """Say what runs, on what; the results of an earlier part of the same run stay."""
        self.update(
            status="running",
            recipe=config.recipe,
            command=[redacted_override(word) for word in sys.argv],
            overrides=[redacted_override(o) for o in overrides],
            seeds={"seed": config.seed, "deterministic": config.deterministic},
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=facts.versions(),
            git={
                "luthier": facts.git_state(Path(__file__).parent),
                "here": facts.git_state(Path.cwd()),
            },
            hardware=facts.hardware(),
        )

    def update(self, **entries: Any) -> None:
        """Set entries and write the file."""
        self.entries |= entries
        write_json(self.path, self.entries)

    def end(self, status: str, **entries: Any) -> None:
        """Say how the run ended, after how many seconds and at what peak memory (GiB)."""
        self.update(
            status=status,
            ended=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - self._clock, 1),
            peak_memory_gib=facts.peak_memory_gib(),
            **entries,
        )
