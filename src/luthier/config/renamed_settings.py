"""Settings and results that earlier versions of luthier named otherwise.

In a config the old name is a mistake whose message gives the new one (`luthier.config.validate`).
In the record of an earlier run it is read as the new one, so that such a run can still be resumed,
repeated, compared and loaded.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from luthier.storage.typed_files import DamagedFileError, load_json, load_yaml

_RENAMED_KEYS = {
    "dataset.shape": "dataset.type",
    "dataset.sources.*.shape": "dataset.sources.*.type",
    "dataset.eval.sets.*.shape": "dataset.eval.sets.*.type",
}
"""Old key -> new key, which stand in the same group; `*` is any name that the user chose."""
_RENAMED_VALUES = {"trainer.evaluation.when": {"ends": "start_and_end"}}
"""Key (its new name) -> old value -> new value."""
_RENAMED_RESULTS = {"held_out_loss": "eval_loss"}
"""Old name -> new name of what a run measures."""


def new_key(key: str) -> str | None:
    """Return what a key such as `dataset.shape` is called now; None if it was never renamed."""
    pattern = _pattern_of(key, _RENAMED_KEYS)
    if pattern is None:
        return None
    group, _, _ = key.rpartition(".")
    return f"{group}.{_RENAMED_KEYS[pattern].rpartition('.')[2]}"


def new_value(key: str, value: object) -> str | None:
    """Return what a value of this key is called now; None if it was never renamed."""
    pattern = _pattern_of(key, _RENAMED_VALUES)
    return None if pattern is None else _RENAMED_VALUES[pattern].get(str(value))


def new_result_name(name: str) -> str:
    """Return what a result of a run is called now; `SET/NAME` is one of an evaluation set."""
    evaluation_set, slash, measure = name.rpartition("/")
    return f"{evaluation_set}{slash}{_RENAMED_RESULTS.get(measure, measure)}"


def with_new_result_names(results: dict[str, Any]) -> dict[str, Any]:
    """Return the results of a run that any version of luthier wrote, with the names of today."""
    return {new_result_name(name): value for name, value in results.items()}


class _Marker(BaseModel):
    """What the marker of a run's folder says of its config; an older luthier wrote no keys."""

    model_config = ConfigDict(extra="allow", defer_build=True)

    config_keys: list[str] = []


class _RecordedTrainer(BaseModel):
    """The group `trainer` of a recorded config, as far as two configs are compared by it."""

    model_config = ConfigDict(extra="allow", defer_build=True)

    method: str = ""
    args: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None


class _RecordedConfig(BaseModel):
    """A config that any version of luthier wrote."""

    model_config = ConfigDict(extra="allow", defer_build=True)

    model: dict[str, Any] | None = None
    dataset: dict[str, Any] | None = None
    chat: dict[str, Any] | None = None
    lora: dict[str, Any] | None = None
    quantization: dict[str, Any] | None = None
    trainer: _RecordedTrainer | None = None


_ADVICE = (
    "Put it back from a copy. Without one the run cannot go on or be loaded as it was made; "
    "its model/ folder can still be used by itself, copied to another place."
)


def read_recorded_config(file: Path) -> dict[str, Any]:
    """Read the `config.yaml` of a run, with the names of this version wherever they differ.

    Raises UserError where the file is missing or damaged.
    """
    config: dict[str, Any] | None = load_yaml(file, _RecordedConfig, _ADVICE)
    if config is None:
        raise DamagedFileError(f"{file}: it is missing.\n{_ADVICE}")
    # A config is checked by the names above without what reads folders.
    from luthier.storage.output_folder import MARKER

    # YAML that was cut behind a line can still be read; the marker names the keys that it had.
    missing = [key for key in _read_config_keys(file.parent / MARKER) if key not in config]
    if missing:
        raise DamagedFileError(f"{file}: {missing[0]} is missing: a part was cut off.\n{_ADVICE}")
    renamed: dict[str, Any] = with_new_names(config)
    return renamed


def _read_config_keys(marker: Path) -> list[str]:
    """Return the keys that luthier wrote into a run's config; none where they are not known."""
    with suppress(DamagedFileError):
        return (load_json(marker, _Marker) or {}).get("config_keys", [])
    return []


def with_new_names(value: Any, key: str = "") -> Any:
    """Return a resolved config, or what stands under `key` in one, with the names of today."""
    if not isinstance(value, dict):
        return new_value(key, value) or value
    renamed = {}
    for name, below in value.items():
        old_key = f"{key}.{name}" if key else str(name)
        key_now = new_key(old_key)
        new_name = key_now.rpartition(".")[2] if key_now else name
        renamed[new_name] = with_new_names(below, key_now or old_key)
    return renamed


def _pattern_of(key: str, table: dict[str, Any]) -> str | None:
    """Return the key of the table that matches this one, name by name; None if there is none."""
    names = key.split(".")
    for pattern in table:
        patterns = pattern.split(".")
        if len(patterns) == len(names) and all(
            ours in ("*", name) for ours, name in zip(patterns, names, strict=True)
        ):
            return pattern
    return None
