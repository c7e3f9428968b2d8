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
from luthier.record.secrets import redact_override, redact_secrets
from luthier.storage.atomic import read_json, write_json

RECORD_FORMAT = 2
"""The format of a run's directory; raise it when an older luthier could not read what is new."""


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record of a run's directory; it is empty where there is none yet.

    Raises UserError for one that cannot be read, or that a newer luthier wrote.
    """
    try:
        entries: dict[str, Any] = read_json(folder / "run.json") or {}
    except ValueError as error:
        raise UserError(f"{folder / 'run.json'} cannot be read as JSON: {error}.") from error
    record_format = entries.get("format", 1)
    if record_format > RECORD_FORMAT:
        version = entries.get("versions", {}).get("luthier", "a newer version")
        raise UserError(
            f"{folder} was written by luthier {version}, in a form (format {record_format}) that "
            f"this version does not know: it reads up to format {RECORD_FORMAT}.\n"
            "Update luthier, or choose another folder."
        )
    return entries


class RunRecord:
    """The record of one run; every update is on disk at once, so that a killed run tells too.

    A run that was stopped and goes on has one record with several sessions.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "run.json"
        self.entries: dict[str, Any] = read_record(folder)
        self._clock = time.monotonic()

    def start(self, config: RunConfig, overrides: list[str]) -> None:
        """Write what runs, on what; the results of an earlier session of the same run stay."""
        began = _now()
        self.entries.pop("error", None)
        # A session whose end nobody has recorded was killed.
        sessions = [
            session | ({"status": "killed"} if session["status"] == "running" else {})
            for session in self.entries.get("sessions", [])
        ]
        self.update(
            format=RECORD_FORMAT,
            status="running",
            recipe=config.recipe,
            command=[redact_override(word) for word in sys.argv],
            overrides=[redact_override(override) for override in overrides],
            cwd=str(Path.cwd()),
            seeds={"seed": config.seed, "deterministic": config.deterministic},
            started=self.entries.get("started", began),
            versions=machine_info.package_versions(),
            git={
                "luthier": machine_info.git_state(Path(__file__).parent, self.path.parent),
                "here": machine_info.git_state(Path.cwd(), self.path.parent),
            },
            hardware=machine_info.hardware_facts(),
            sessions=[
                *sessions,
                {"started": began, "host": socket.gethostname(), "status": "running"},
            ],
        )

    def update(self, **entries: Any) -> None:
        """Set entries and write the file, without secrets."""
        self.entries |= entries
        # Hidden on the way to the disk, whoever set the entries.
        write_json(self.path, redact_secrets(self.entries))

    def update_session(self, **entries: Any) -> None:
        """Set entries of the session that is going on."""
        *earlier, session = self.entries["sessions"]
        self.update(sessions=[*earlier, session | entries])

    def end(self, status: str, **entries: Any) -> None:
        """Write how the run ended, after how many seconds and at what peak memory (GiB).

        The seconds are those of all its sessions together.
        """
        # Not from the two times of day, between which the clock may be set.
        ended, seconds = _now(), round(time.monotonic() - self._clock, 1)
        self.update_session(status=status, ended=ended, seconds=seconds)
        total = sum(session.get("seconds", 0) for session in self.entries["sessions"])
        self.update(
            status=status,
            ended=ended,
            seconds=round(total, 1),
            peak_memory_gib=machine_info.peak_memory_gib(),
            **entries,
        )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
