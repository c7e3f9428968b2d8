"""What a run's folder holds for its report, without secrets."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.config.renamed_settings import read_recorded_config
from luthier.record.checkpoints import METRICS_FILE, read_step_log
from luthier.record.record import read_record
from luthier.redaction import redact
from luthier.report.charts import Points
from luthier.report.data_summary import DataSummary, read_data_summary
from luthier.storage import lock
from luthier.storage.typed_files import has_entry, load_json_lines

_UNCHARTED = (
    "_runtime", "_samples_per_second", "_steps_per_second", "_time", "num_tokens", "total_flos",
    "train_loss", "train_runtime",
)  # fmt: skip
"""Endings of logged numbers that are no curve: counters, and times of whole evaluations."""
_LOSSES = ("loss", "reward")
_COMMON_CURVES = (
    "mean_token_accuracy", "learning_rate", "grad_norm", "tokens_per_second", "memory_gib",
)  # fmt: skip
"""What every run logs, besides its loss and what its results are named by."""


@dataclass(frozen=True)
class RunFiles:
    """The record, the logs and the replies of one run."""

    folder: Path
    record: dict[str, Any]
    config: dict[str, Any]
    """The resolved config; empty where it is gone."""
    metrics: list[dict[str, Any]]
    replies: list[dict[str, Any]]
    data: DataSummary
    dropped: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """What the run is called: its recipe and the name of its folder."""
        recipe, folder = self.record.get("recipe"), self.folder.name
        if not recipe or folder == recipe:
            return folder
        return str(recipe) if folder == "default" else f"{recipe} / {folder}"

    @property
    def status(self) -> str:
        """How the run ended; `killed` where its process is gone and has not said so."""
        status = str(self.record.get("status", "unknown"))
        if status == "running" and not lock.is_locked(self.folder):
            return "killed"
        return status

    @property
    def last_step(self) -> int:
        """The last optimizer step that something was logged at."""
        return max((int(row["step"]) for row in self.metrics), default=0)

    def setting(self, key: str) -> Any:
        """Return a setting of the config by its dotted key; None where there is none."""
        value: Any = self.config
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return value

    def curves(self) -> dict[str, dict[str, Points]]:
        """Return the logged numbers as curves: name -> line -> points.

        The lines of one curve are those of training (`train`) and of each evaluation set (`eval`,
        or its name). What is looked at first comes first.
        """
        sets = self.setting("dataset.eval.sets")
        sets = sorted(sets, key=len, reverse=True) if isinstance(sets, dict) else []
        curves: dict[str, dict[str, Points]] = {}
        for row in self.metrics:
            for key, value in row.items():
                is_number = isinstance(value, int | float) and not isinstance(value, bool)
                if key in ("step", "epoch") or key.endswith(_UNCHARTED) or not is_number:
                    continue
                name, line = _split_name(key, sets)
                curves.setdefault(name, {}).setdefault(line, []).append((row["step"], value))
        names = self.record.get("results", {})
        results = [name for result in names for name in (result, result.rpartition("/")[2])]
        order = [*dict.fromkeys([*_LOSSES, *results, *_COMMON_CURVES])]

        def position(name: str) -> int:
            return order.index(name) if name in order else len(order)

        def line_position(name: str) -> int:
            return ("train", "eval").index(name) if name in ("train", "eval") else 2

        return {
            name: {line: curves[name][line] for line in sorted(curves[name], key=line_position)}
            for name in sorted(curves, key=position)
        }


def read_run_files(folder: Path) -> RunFiles:
    """Read a run's folder. Raises UserError for a file that is damaged."""
    config = folder / "config.yaml"
    return RunFiles(
        folder=folder,
        # What an older luthier wrote holds what is hidden today.
        record=redact(read_record(folder)),
        config=redact(read_recorded_config(config)) if has_entry(config) else {},
        metrics=read_step_log(folder / METRICS_FILE),
        replies=load_json_lines(folder / "replies.jsonl", dict[str, Any]),
        data=read_data_summary(folder),
        dropped=load_json_lines(folder / "dropped.jsonl", dict[str, Any]),
    )


def _split_name(key: str, sets: list[str]) -> tuple[str, str]:
    """Return the curve and the line that a logged number belongs to."""
    if not key.startswith("eval_"):
        return key, "train"
    name = key.removeprefix("eval_")
    for eval_set in sets:
        if name.startswith(f"{eval_set}_"):
            return name.removeprefix(f"{eval_set}_"), eval_set
    return name, "eval"
