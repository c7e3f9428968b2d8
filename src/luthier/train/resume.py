"""Whether a run may go on: what of it has changed since it began, and what that means."""

import hashlib
from pathlib import Path
from typing import Any

from luthier.config.renamed_settings import read_recorded_config
from luthier.config.schema import RunConfig
from luthier.data.prepare import PreparedData
from luthier.data.store import tokenizer_digest
from luthier.errors import UserError
from luthier.model.weights_hash import identify_weights
from luthier.record import checkpoints, run_dir
from luthier.record.config_diff import ConfigChange, schedule_depends_on_length
from luthier.record.record import RunRecord

_FIXED_INPUTS = {
    "tokenizer.sha256": ("model.tokenizer", "the tokenizer"),
    "tokenizer.template_sha256": ("chat.template", "the chat template"),
    "model.weights_sha256": ("model.path", "the model's weights"),
    "teacher.weights_sha256": ("trainer.teacher", "the teacher's weights"),
    # Last, as another tokenizer or template makes other rows.
    "data.sha256": ("dataset", "the rows, or what trains in them"),
}
"""What of a record must stay as it was -> the config's key and the words for it."""
_FIXED_LAUNCH = {
    "processes": "the number of processes",
    "sharding": "the sharding",
    "precision": "the mixed precision",
}


def describe_config_changes(folder: Path, resolved: dict[str, Any]) -> list[str]:
    """A sentence for each change of the config with which a run goes on; noted where it matters.

    Call it before the new config is written. Raises UserError where a finished run is to become
    longer and has no checkpoint.
    """
    found = run_dir.changed(folder, resolved)
    longer = [change for change in found if change.kind == "length"]
    sentences = [f"{change}, which changes nothing of the training" for change in found
                 if change.kind == "harmless"]  # fmt: skip
    if not longer:
        return sentences
    last = checkpoints.find_newest_checkpoint(folder / "checkpoints").path
    if run_dir.is_finished(folder) and last is None:
        raise UserError(
            f"output_dir: {folder} holds this run, finished without a checkpoint, so it cannot "
            f"become longer ({longer[0]}).\nChoose another output_dir=..., or overwrite=true, which"
            " trains it anew."
        )
    if last is None:
        return sentences
    step = checkpoints.checkpoint_step(last)
    _note_length(folder, longer, step)
    old = read_recorded_config(folder / "config.yaml")
    return sentences + [
        _describe_new_length(change, step, schedule_depends_on_length(old)) for change in longer
    ]


def hash_run_inputs(
    config: RunConfig, tokenizer: Any, encoder: Any, prepared: PreparedData
) -> dict[str, dict[str, Any]]:
    """What a run is made of, for its record: hashes of the tokenizer, its template, the weights."""
    template = encoder.settings()["template"] if encoder else tokenizer.chat_template
    made = {
        "tokenizer": {
            "sha256": tokenizer_digest(tokenizer) if tokenizer.is_fast else None,
            "template_sha256": _sha256(str(template)) if template else None,
        },
        "model": identify_weights(config.model.path, config.model.revision),
        "data": {"sha256": prepared.content_hash},
    }
    if config.trainer.teacher:
        made["teacher"] = identify_weights(config.trainer.teacher, None)
    return made


def refuse_changed_inputs(record: RunRecord, now: dict[str, dict[str, Any]]) -> None:
    """Raise UserError where data, template, tokenizer or weights are not those of the run's begin.

    Where nothing was trained yet, the run begins again with what there is now.
    """
    folder = record.path.parent
    changed = [name for name in _FIXED_INPUTS if _is_changed(record.entries, now, name)]
    if not changed:
        return
    if not checkpoints.list_checkpoints(folder / "checkpoints"):
        (folder / "before.json").unlink(missing_ok=True)
        return
    key, words = _FIXED_INPUTS[changed[0]]
    also = "".join(f", and {_FIXED_INPUTS[name][1]}" for name in changed[1:])
    was, is_now = (_record_value(entries, changed[0])[:12] for entries in (record.entries, now))
    raise UserError(
        f"{key}: {words}{also} changed since the run in {folder} began (SHA-256 {was}... -> "
        f"{is_now}...), so it cannot go on as the run that it was.\nPut back what there was, "
        "choose another output_dir=..., or overwrite=true to begin anew."
    )


def refuse_other_launch(record: RunRecord, now: dict[str, Any]) -> None:
    """Raise UserError where a run with checkpoints was launched in another way than now."""
    old = record.entries.get("launch", {})
    folder = record.path.parent
    if not checkpoints.list_checkpoints(folder / "checkpoints"):
        return
    for name, words in _FIXED_LAUNCH.items():
        if name in old and old[name] != now[name]:
            raise UserError(
                f"The run in {folder} was launched with {words} {old[name]}, and now with "
                f"{now[name]}: its steps would be made of other batches.\nLaunch it as before, "
                "choose another output_dir=..., or overwrite=true to begin anew."
            )


def _note_length(folder: Path, longer: list[ConfigChange], step: int) -> None:
    """Leave in the record that the steps so far were taken on the way to another end."""
    record = RunRecord(folder)
    lines = [str(change) for change in longer]
    extended = [*record.entries.get("extended", []), {"at_step": step, "changes": lines}]
    record.update(extended=extended)


def _describe_new_length(change: ConfigChange, step: int, rates_follow: bool) -> str:
    if not rates_follow:
        return f"{change}: the run goes on from step {step} to its new end"
    return (
        f"{change}: from step {step} on, the learning rate is that of a run of the new length; the "
        "steps before were taken at the rates of the old one. For the numbers of a run that has "
        "this length from its first step, choose another output_dir"
    )


def _is_changed(old: dict[str, Any], new: dict[str, Any], name: str) -> bool:
    was, is_now = _record_value(old, name), _record_value(new, name)
    return bool(was) and bool(is_now) and was != is_now


def _record_value(entries: dict[str, Any], name: str) -> str:
    group, key = name.split(".")
    return str((entries.get(group) or {}).get(key) or "")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
