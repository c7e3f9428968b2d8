"""Whether a run may go on: its data, tokenizer and weights must be those of its begin."""

import hashlib
import json
from typing import Any

from luthier.config.schema import RunConfig
from luthier.data.prepare import PreparedData
from luthier.data.store import tokenizer_digest
from luthier.errors import UserError
from luthier.model.model_images import ModelImages
from luthier.model.weights_hash import identify_weights
from luthier.record import checkpoints
from luthier.record.config_diff import find_code_changes
from luthier.record.record import RunRecord
from luthier.train.reward_checks import hash_reward_models

# What of a record must stay as it was -> the config's key and what a message calls it.
_FIXED_INPUTS = {
    "tokenizer.sha256": ("model.tokenizer", "the tokenizer"),
    "tokenizer.template_sha256": ("chat.template", "the chat template"),
    "model.weights_sha256": ("model.path", "the model's weights"),
    "processor.sha256": ("model.path", "the processor of images"),
    "teacher.weights_sha256": ("trainer.teacher", "the teacher's weights"),
    "rewards.weights_sha256": ("trainer.rewards", "the weights of a reward model"),
    # Last, as another tokenizer or template makes other rows.
    "data.sha256": ("dataset", "the rows, or what trains in them"),
}


def hash_run_inputs(
    config: RunConfig, tokenizer: Any, encoder: Any, prepared: PreparedData, with_weights: bool
) -> dict[str, dict[str, Any]]:
    """Return what a run is made of, for its record: hashes of tokenizer, template, weights, data.

    `encoder` is the chat encoder, or None for a method that reads no conversations. A hash is None
    where there is nothing that could be hashed, and is then not compared. `with_weights` is False
    for processes whose neighbour on the same machine reads the same weight files.
    """
    template = encoder.settings()["template"] if encoder else tokenizer.chat_template
    template_hash = hashlib.sha256(str(template).encode()).hexdigest() if template else None
    inputs: dict[str, dict[str, Any]] = {
        "tokenizer": {
            "sha256": tokenizer_digest(tokenizer) if tokenizer.is_fast else None,
            "template_sha256": template_hash,
        },
        "data": {"sha256": prepared.content_hash},
    }
    if prepared.has_images and isinstance(encoder.images, ModelImages):
        hashes = json.dumps(encoder.images.hash_files(), sort_keys=True)
        inputs["processor"] = {"sha256": hashlib.sha256(hashes.encode()).hexdigest()}
    if with_weights:
        inputs["model"] = identify_weights(config.model.path, config.model.revision)
    if with_weights and config.trainer.teacher:
        inputs["teacher"] = identify_weights(config.trainer.teacher, None)
    if with_weights and (rewards_hash := hash_reward_models(config.trainer.rewards)):
        inputs["rewards"] = {"weights_sha256": rewards_hash}
    return inputs


def refuse_changed_inputs(
    record: RunRecord, inputs: dict[str, dict[str, Any]], config: RunConfig
) -> None:
    """Raise UserError where data, template, tokenizer or weights are not those of the run's begin.

    Where nothing was trained yet, the run begins again with what there is now.
    """
    folder = record.path.parent
    changed = []
    for name in _FIXED_INPUTS:
        before, now = _record_value(record.entries, name), _record_value(inputs, name)
        # A hash that either side lacks says nothing: an older record has fewer of them.
        if before and now and before != now:
            changed.append((name, before, now))
    if not changed:
        return
    if not checkpoints.list_checkpoints(folder / "checkpoints"):
        # The measure before the training was that of other inputs.
        (folder / "before.json").unlink(missing_ok=True)
        return
    name, before, now = changed[0]
    key, label = _FIXED_INPUTS[name]
    also = "".join(f", and {_FIXED_INPUTS[other][1]}" for other, _, _ in changed[1:])
    code = find_code_changes(record.entries, config.model_dump(mode="json"))
    own = [change.new for change in code if change.key.startswith("dataset.")]
    also += f" with {' and '.join(own)}" if own and name == "data.sha256" else ""
    raise UserError(
        f"{key}: {label}{also} changed since the run in {folder} began (SHA-256 {before[:12]}... "
        f"-> {now[:12]}...), so it cannot go on as the run that it was.\nPut back what there was, "
        "choose another output_dir=..., or overwrite=true to begin anew."
    )


def describe_changed_versions(record: RunRecord) -> str | None:
    """Return the sentence for a run that goes on under other versions than those of its last part.

    The record of this session must have been started. None where nothing changed, or where there
    is nothing yet that was trained under the old ones.
    """
    sessions = record.entries["sessions"]
    if len(sessions) < 2 or not checkpoints.list_checkpoints(record.path.parent / "checkpoints"):
        return None
    old, new = (session["versions"] for session in sessions[-2:])
    changes = [
        f"{name} {old[name]} -> {new.get(name, 'not installed')}"
        for name in old
        if new.get(name) != old[name]
    ]
    if not changes:
        return None
    return (
        f"versions  changed since the run's last part: {', '.join(changes)}.\nFrom here on its "
        "numbers may differ from those of a run under one version; run.json has both."
    )


def _record_value(entries: dict[str, Any], name: str) -> str:
    """Return the entry that a dotted name names; an empty text where there is none."""
    group, key = name.split(".")
    return str((entries.get(group) or {}).get(key) or "")
