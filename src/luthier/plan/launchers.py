"""How a config file of accelerate shares the work, as the plan counts it."""

from pathlib import Path
from typing import Any

import yaml

from luthier.errors import UserError
from luthier.plan.sharding import Sharding

_COPIES = ("MULTI_GPU", "MULTI_CPU", "MULTI_XPU", "MULTI_NPU")


def read(file: str, processes: int | None = None) -> Sharding:
    """Return the sharding of an accelerate config such as `launch/fsdp2.yaml`.

    `processes` wins over the file's own number, as `--num_processes` does. Raises UserError for a
    file that cannot be read or a kind that the plan does not know.
    """
    config = _load(file)
    number = processes or int(config.get("num_processes") or 1)
    kind = str(config.get("distributed_type") or "NO").upper()
    if kind in ("NO", "FALSE"):
        return Sharding()
    if kind == "FSDP":
        return _fsdp(config.get("fsdp_config") or {}, number, file)
    if kind == "DEEPSPEED":
        return _deepspeed(config.get("deepspeed_config") or {}, number, file)
    if kind in _COPIES:
        return Sharding("ddp", number)
    raise _unknown(file, f"distributed_type: {kind}")


def _load(file: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(Path(file).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--launch {file}: cannot be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise UserError(f"--launch {file}: this is no YAML: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"--launch {file}: this is no config file of accelerate.")
    return found


def _fsdp(config: dict[str, Any], number: int, file: str) -> Sharding:
    if int(config.get("fsdp_version") or 1) != 2:
        raise _unknown(file, "fsdp_version: 1 (luthier's own file is launch/fsdp2.yaml)")
    return Sharding(
        "fsdp2",
        number,
        reshard=bool(config.get("fsdp_reshard_after_forward", True)),
        offload_weights=bool(config.get("fsdp_offload_params", False)),
    )


def _deepspeed(config: dict[str, Any], number: int, file: str) -> Sharding:
    stage = int(config.get("zero_stage") or 0)
    if stage not in (2, 3):
        raise _unknown(file, f"zero_stage: {stage}")

    def is_away(name: str) -> bool:
        return str(config.get(name) or "none").lower() not in ("none", "no", "false")

    return Sharding(
        f"zero{stage}",
        number,
        offload_weights=stage == 3 and is_away("offload_param_device"),
        offload_optimizer=is_away("offload_optimizer_device"),
    )


def _unknown(file: str, what: str) -> UserError:
    return UserError(
        f"--launch {file}: {what} is not counted. The plan knows one process, DDP, FSDP2, and "
        "DeepSpeed ZeRO of stage 2 and 3."
    )
