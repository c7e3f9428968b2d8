"""`run.json`: what made a run, how it stands and what came out."""

import socket
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from luthier.config.schema import RunConfig
from luthier.errors import UserError
from luthier.record import machine_info
from luthier.record.machine_info import git_state
from luthier.record.secrets import redact_override, redact_secrets
from luthier.storage.atomic import read_json, write_json

RECORD_FORMAT = 2
"""The form of a run's directory; raise it when an older luthier could not read what is new."""


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a run's directory; empty where there is none yet.

    Raises UserError for one that cannot be read, or that a newer luthier wrote.
    """
    try:
        entries: dict[str, Any] = read_json(folder / "run.json") or {}
    except ValueError as error:
        raise UserError(f"{folder / 'run.json'} cannot be read as JSON: {error}.") from error
    form = entries.get("format", 1)
    if form > RECORD_FORMAT:
        wrote = entries.get("versions", {}).get("luthier", "a newer version")
        raise UserError(
            f"{folder} was written by luthier {wrote}, in a form (format {form}) that this version "
            f"does not know: it reads up to format {RECORD_FORMAT}.\n"
            "Update luthier, or choose another folder."
        )
    return entries


class RunRecord:
    """The record of one run; every update is on disk at once, so that a killed run tells too."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "run.json"
        self.entries: dict[str, Any] = read_record(folder)
        self._clock = time.monotonic()

    def start(self, config: RunConfig, overrides: list[str]) -> None:
        """Say what runs, on what; the results of an earlier part of the same run stay."""
        began = _now()
        self.entries.pop("error", None)
        here = Path(__file__).parent
        self.update(
            format=RECORD_FORMAT,
            status="running",
            recipe=config.recipe,
            command=[redact_override(word) for word in sys.argv],
            overrides=[redact_override(o) for o in overrides],
            cwd=str(Path.cwd()),
            seeds={"seed": config.seed, "deterministic": config.deterministic},
            started=self.entries.get("started", began),
            versions=machine_info.package_versions(),
            git={
                "luthier": git_state(here, self.path.parent),
                "here": git_state(Path.cwd(), self.path.parent),
            },
            hardware=machine_info.hardware_facts(),
            sessions=[
                *map(_close_session, self.entries.get("sessions", [])),
                {"started": began, "host": socket.gethostname(), "status": "running"},
            ],
        )

    def update(self, **entries: Any) -> None:
        """Set entries and write the file, without secrets."""
        self.entries |= entries
        write_json(self.path, redact_secrets(self.entries))

    def note(self, **entries: Any) -> None:
        """Set entries of the part of the run that is going on."""
        sessions = self.entries["sessions"]
        self.update(sessions=[*sessions[:-1], sessions[-1] | entries])

    def end(self, status: str, **entries: Any) -> None:
        """Say how the run ended, after how many seconds and at what peak memory (GiB).

        The seconds are those of all its parts together.
        """
        ended, seconds = _now(), round(time.monotonic() - self._clock, 1)
        self.note(status=status, ended=ended, seconds=seconds)
        self.update(
            status=status,
            ended=ended,
            seconds=round(sum(part.get("seconds", 0) for part in self.entries["sessions"]), 1),
            peak_memory_gib=machine_info.peak_memory_gib(),
            **entries,
        )


def _close_session(part: dict[str, Any]) -> dict[str, Any]:
    """A part of a run that nobody has seen the end of was killed."""
    return part | {"status": "killed"} if part["status"] == "running" else part


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
