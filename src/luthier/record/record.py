"""`run.json`: what made a run, how it stands and what came out."""

import socket
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from luthier.config.env_references import fingerprint_variables
from luthier.config.renamed_settings import with_new_result_names
from luthier.config.schema import RunConfig, SavedChatSettings
from luthier.errors import UserError
from luthier.record import machine_info
from luthier.record.checkpoints import METRICS_FILE, STEP_LOGS, read_step_log
from luthier.redaction import redact, redact_chat, redact_override
from luthier.storage.atomic import write_json
from luthier.storage.manifest import compute_seal, hash_file
from luthier.storage.typed_files import DamagedFileError, check_value, load_json

RECORD_FORMAT = 2
"""The format of a run's directory; raise it when an older luthier could not read what is new."""
RunStatus = Literal["running", "finished", "stopped", "interrupted", "failed"]


class RecordModel(BaseModel):
    """Entries of a record; an older luthier wrote fewer of them, and a newer one may write more."""

    model_config = ConfigDict(extra="allow")


class SessionEntries(RecordModel):
    """One process of a run, from its start to its end."""

    started: str = ""
    host: str = ""
    status: Literal["running", "finished", "stopped", "interrupted", "failed", "killed"] = "running"
    ended: str = ""
    seconds: float = 0.0
    from_step: int = 0
    to_step: int = 0
    signal: str = ""
    versions: dict[str, str] = {}
    """Of Python and the packages that decide a run's numbers."""


class ModelIdentity(RecordModel):
    """Which weights a run began with."""

    path: str = ""
    revision: str | None = None
    commit: str | None = None
    weights_sha256: str | None = None
    files: list[str] = []


class RewardIdentity(RecordModel):
    """Which reward models a run used."""

    weights_sha256: str | None = None


class TokenizerIdentity(RecordModel):
    """Which tokenizer and template a run used."""

    sha256: str | None = None
    template_sha256: str | None = None


class SplitEntries(RecordModel):
    """How much there is of one split."""

    rows: int = 0
    tokens: int = 0


class CodeEntries(RecordModel):
    """A function or class of the user's own."""

    settings: list[str] = []
    """The settings that name it."""
    sha256: str | None = None


class DataEntries(RecordModel):
    """The rows of a run."""

    sha256: str | None = None
    sources: dict[str, str] = {}
    train: SplitEntries | None = None


class LaunchEntries(RecordModel):
    """How the processes of a run were started."""

    processes: int = 0
    sharding: str = ""
    precision: str = ""
    device: str = ""
    launcher: dict[str, Any] | None = None


class GpuEntries(RecordModel):
    """One accelerator."""

    name: str
    memory_gib: float = 0.0


class HardwareEntries(RecordModel):
    """The machine of a run."""

    system: str = ""
    cpu: str = ""
    cores: int | None = None
    torch_threads: int = 0
    memory_gib: float = 0.0
    gpus: list[GpuEntries] = []


class GitEntries(RecordModel):
    """A commit, and what differed from it."""

    commit: str
    branch: str | None
    remote: str | None = None
    dirty: bool
    changed_files: list[str]
    diff: str | None = None


class ExtensionEntries(RecordModel):
    """A step at which a run got another length."""

    at_step: int
    changes: list[str]


class TrackedRun(RecordModel):
    """A run's name at a tracker."""

    id: str


class ResultPair(RecordModel):
    """A result of the untrained and of the trained model."""

    before: float | None = None
    after: float | None = None


class RecordEntries(RecordModel):
    """What stands in `run.json`."""

    format: int = 1
    status: RunStatus = "running"
    recipe: str | None = None
    command: list[str] = []
    overrides: list[str] = []
    environment: dict[str, str] = {}
    """Fingerprints of the variables that the config refers to."""
    cwd: str = ""
    seeds: dict[str, Any] = {}
    started: str = ""
    ended: str = ""
    seconds: float = 0.0
    training_seconds: float = 0.0
    peak_memory_gib: dict[str, float] = {}
    versions: dict[str, str] = {}
    git: dict[str, GitEntries | None] = {}
    hardware: HardwareEntries = HardwareEntries()
    sessions: list[SessionEntries] = []
    error: str = ""
    tokenizer: TokenizerIdentity = TokenizerIdentity()
    model: ModelIdentity = ModelIdentity()
    teacher: ModelIdentity = ModelIdentity()
    rewards: RewardIdentity = RewardIdentity()
    data: DataEntries = DataEntries()
    code: dict[str, CodeEntries] = {}
    """The code that the config names, by its `python:` path."""
    warnings: list[dict[str, str]] = []
    """What usually ruins such a training: `key`, `text` and `fix` of each warning."""
    memory_plan: dict[str, float] = {}
    """What was planned for one process: `gib` of `room_gib`, for `rows` of `tokens`; empty where
    `activation_checkpointing` is not `auto`."""
    example: str = ""
    """A held-out prompt, for the model card."""
    launch: LaunchEntries = LaunchEntries()
    chat: SavedChatSettings | None = None
    trackers: dict[str, TrackedRun] = {}
    results: dict[str, ResultPair] = {}
    logs: dict[str, str] = {}
    """The SHA-256 of the logs as a finished run left them, by their names."""
    extended: list[ExtensionEntries] = []


_ADVICE = (
    "Put the file back from a copy. Without one, the results and versions that it holds are lost: "
    "overwrite=true trains the run anew."
)
_RESULT_KEYS = ("results", "seconds", "training_seconds", "peak_memory_gib")
"""What the record of a finished run has, from format 2 on."""


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record of a run's directory; it is empty where there is none yet.

    Raises UserError for one that is not as luthier wrote it, or that a newer luthier wrote.
    """
    file = folder / "run.json"
    entries: dict[str, Any] | None = load_json(file, dict[str, Any], _ADVICE)
    if entries is None:
        return {}
    record_format = entries.get("format", 1)
    check_value(str(file), {"format": record_format}, RecordEntries, _ADVICE)
    if record_format > RECORD_FORMAT:
        version = (entries.get("versions") or {}).get("luthier", "a newer version")
        raise UserError(
            f"{folder} was written by luthier {version}, in a form (format {record_format}) that "
            f"this version does not know: it reads up to format {RECORD_FORMAT}.\n"
            "Update luthier, or choose another folder."
        )
    check_value(str(file), entries, RecordEntries, _ADVICE)
    seal = entries.pop("seal", None)
    if seal is not None and seal != compute_seal(entries):
        raise DamagedFileError(
            f"{file}: its content is not what luthier wrote there.\n{_ADVICE} If you have changed "
            "it yourself, remove the entry `seal`."
        )
    lacking = [key for key in _RESULT_KEYS if key not in entries]
    if entries.get("status") == "finished" and record_format > 1 and lacking:
        raise DamagedFileError(
            f"{file}: it says that the run is finished, and has no {lacking[0]}.\n{_ADVICE}"
        )
    if "results" in entries:
        entries["results"] = with_new_result_names(entries["results"])
    return entries


def hash_logs(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each log of a run's directory, by its name."""
    return {name: hash_file(folder / name) for name in STEP_LOGS if (folder / name).is_file()}


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's `metrics.jsonl`, oldest first.

    Raises UserError for a damaged line, and for a file that is not what a finished run has left.
    """
    record = read_record(folder)
    file = folder / METRICS_FILE
    rows = read_step_log(file)
    left = record.get("logs", {}).get(METRICS_FILE)
    if record.get("status") == "finished" and left is not None:
        if not file.is_file():
            raise DamagedFileError(f"{file}: it is missing. Put it back from a copy.")
        if hash_file(file) != left:
            raise DamagedFileError(
                f"{file}: its content is not what the run left there.\nPut it back from a copy; "
                "without one, overwrite=true trains the run anew."
            )
    return rows


class RunRecord:
    """The record of one run; every update is on disk at once, so that a killed run tells too.

    A run that was stopped and goes on has one record with several sessions.
    """

    def __init__(self, folder: Path, began: float | None = None) -> None:
        """`began` is when the command did, by `time.monotonic`; None is now."""
        self.path = folder / "run.json"
        self.entries: dict[str, Any] = read_record(folder)
        self._clock = time.monotonic() if began is None else began

    def start(
        self, config: RunConfig, overrides: list[str], recorded: dict[str, Any] | None = None
    ) -> None:
        """Write what runs, on what; the results of an earlier session of the same run stay.

        `recorded` is the config with references for what it took from the environment.
        """
        began = _now()
        self.entries.pop("error", None)
        self.entries.pop("logs", None)
        versions = machine_info.package_versions()
        # A session whose end nobody has recorded was killed. An older luthier wrote no versions of
        # each, and those of all sessions are those of the last.
        last_versions = machine_info.main_versions(self.entries.get("versions", {}))
        sessions = [
            {"versions": last_versions}
            | session
            | ({"status": "killed"} if session.get("status") == "running" else {})
            for session in self.entries.get("sessions", [])
        ]
        session = {
            "started": began,
            "host": socket.gethostname(),
            "status": "running",
            "versions": machine_info.main_versions(versions),
        }
        self.update(
            format=RECORD_FORMAT,
            status="running",
            recipe=config.recipe,
            command=[redact_override(word) for word in sys.argv],
            overrides=[redact_override(override) for override in overrides],
            environment=fingerprint_variables(recorded or {}),
            cwd=str(Path.cwd()),
            seeds={"seed": config.seed, "deterministic": config.deterministic},
            started=self.entries.get("started", began),
            versions=versions,
            git={
                "luthier": machine_info.git_state(Path(__file__).parent, self.path.parent),
                "here": machine_info.git_state(Path.cwd(), self.path.parent),
            },
            hardware=machine_info.hardware_facts(),
            sessions=[*sessions, session],
        )

    def update(self, **entries: Any) -> None:
        """Set entries and write the file, without secrets."""
        self.entries |= entries
        # Hidden on the way to the disk, whoever set the entries.
        written = redact({name: value for name, value in self.entries.items() if name != "chat"})
        if "chat" in self.entries:
            written["chat"] = redact_chat(self.entries["chat"])
        write_json(self.path, {"seal": compute_seal(written), **written})

    def update_session(self, **entries: Any) -> None:
        """Set entries of the session that is going on."""
        *earlier, session = self.entries["sessions"]
        self.update(sessions=[*earlier, session | entries])

    def total_seconds(self) -> float:
        """Return the seconds of all sessions so far, this one from the start of its command."""
        earlier = sum(session.get("seconds", 0) for session in self.entries["sessions"][:-1])
        return float(earlier + time.monotonic() - self._clock)

    def end(self, status: str, **entries: Any) -> None:
        """Write how the run ended, after how many seconds and at what peak memory (GiB).

        The seconds are those of all its sessions together.
        """
        ended, total = _now(), self.total_seconds()
        # Not from the two times of day, between which the clock may be set.
        seconds = round(time.monotonic() - self._clock, 1)
        self.update_session(status=status, ended=ended, seconds=seconds)
        self.update(
            status=status,
            ended=ended,
            seconds=round(total, 1),
            peak_memory_gib=machine_info.peak_memory_gib(),
            **entries,
        )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
