"""A run's directory: who may write there, and what it holds.

config.yaml     the whole resolved config
overrides.yaml  what was typed
run.json        status, versions, git, hardware, launch, seeds, data, results
metrics.jsonl   every logged metric, a step a line
replies.jsonl   held-out rows answered before and after training
evaluations.jsonl  held-out rows answered at each evaluation, where that is asked for
loss.png        the loss over the steps
model/          the adapter or model, tokenizer, chat template and chat settings
checkpoints/    the trainer's checkpoints
"""

import re
import shutil
from pathlib import Path
from typing import Any, Literal

import yaml

from luthier.errors import UserError
from luthier.record.files import read_json, write_text

# Keys that change where or whether a run happens, not what it computes.
NEUTRAL = ("output_dir", "dry_run", "overwrite", "tracker", "card")

HIDDEN = "(hidden)"
SECRET = re.compile(r"^(hub_|auth_|use_auth_|api_|access_)?(token|key|secret|password)$|_api_key$")

Claim = Literal["new", "unfinished", "finished"]


def claim(folder: Path, resolved: dict[str, Any], overwrite: bool = False) -> Claim:
    """Say whether `folder` is new, or holds this very run unfinished or finished.

    Raises UserError where another config has used it, with the keys that differ.
    """
    if overwrite or not (folder / "config.yaml").is_file():
        _refuse_foreign(folder)
        return "new"
    old = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    differing = differences(old, resolved)
    if differing and _failed_before_training(folder):
        return "new"
    if differing:
        raise UserError(_other_config(folder, differing))
    return "finished" if is_finished(folder) else "unfinished"


def is_finished(folder: Path) -> bool:
    """Whether `folder` holds a run that came to its end."""
    return (read_json(folder / "run.json") or {}).get("status") == "finished"


def prepare(folder: Path, resolved: dict[str, Any], overrides: list[str]) -> None:
    """Write what identifies the run: its config and what was typed."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.yaml", to_yaml(resolved))
    write_text(
        folder / "overrides.yaml",
        yaml.safe_dump([redacted_override(o) for o in overrides], allow_unicode=True),
    )


def clear(folder: Path) -> None:
    """Remove what an earlier run left in `folder`; only files that luthier itself writes."""
    for name in ("config.yaml", "overrides.yaml", "run.json", "metrics.jsonl", "replies.jsonl",
                 "evaluations.jsonl", "before.json", "loss.png"):  # fmt: skip
        (folder / name).unlink(missing_ok=True)
    for name in ("model", "checkpoints", "tensorboard"):
        shutil.rmtree(folder / name, ignore_errors=True)


def to_yaml(resolved: dict[str, Any]) -> str:
    """A resolved config as YAML, in its own order, without the values of secrets."""
    return yaml.safe_dump(redacted(resolved), sort_keys=False, allow_unicode=True)


def redacted(value: Any) -> Any:
    """A copy of a config in which no secret's value stands."""
    if isinstance(value, dict):
        return {k: HIDDEN if SECRET.search(str(k)) and v else redacted(v) for k, v in value.items()}
    return [redacted(part) for part in value] if isinstance(value, list) else value


def redacted_override(override: str) -> str:
    """An override as typed, without the value of a secret."""
    key, equals, _ = override.partition("=")
    return f"{key}={HIDDEN}" if equals and SECRET.search(key.split(".")[-1]) else override


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The lines `key: old -> new` in which two resolved configs differ, neutral keys left out."""
    a, b = _flat(old), _flat(redacted(new))
    return [
        f"{key}: {a.get(key, '(absent)')} -> {b.get(key, '(absent)')}"
        for key in sorted(a.keys() | b.keys())
        if key.split(".")[0] not in NEUTRAL and a.get(key) != b.get(key)
    ]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {
        key: leaf
        for name, part in value.items()
        for key, leaf in _flat(part, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def _failed_before_training(folder: Path) -> bool:
    """Whether a run stopped with an error before there was anything to lose."""
    failed = (read_json(folder / "run.json") or {}).get("status") == "failed"
    return failed and not (folder / "metrics.jsonl").exists()


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir: {folder} is a file, not a folder. Choose another output_dir.")
    ours = (folder / "config.yaml").is_file() or (folder / "run.json").is_file()
    if folder.is_dir() and any(folder.iterdir()) and not ours:
        raise UserError(
            f"output_dir: {folder} holds files that are no run of luthier. "
            "Choose an empty folder, so that nothing of yours is overwritten."
        )


def _other_config(folder: Path, differing: list[str]) -> str:
    shown = "\n".join(f"  {line}" for line in differing[:10])
    more = f"\n  and {len(differing) - 10} more" if len(differing) > 10 else ""
    return (
        f"output_dir: {folder} holds a run with another config:\n{shown}{more}\n"
        "Choose another output_dir=..., or overwrite=true to replace that run."
    )
