"""What the launcher's settings and the recipe both say must be the same: luthier stops otherwise.

accelerate has settings of the training itself (accumulation, clipping, mixed precision, and a whole
DeepSpeed config). Some of them lose to the recipe in silence, others win
in silence, and others end in a traceback behind the loading of the model. Needs no torch.
"""

from collections.abc import Iterator
from typing import Any

from luthier.config.library_settings import TrainerArgs
from luthier.errors import UserError
from luthier.storage.typed_files import load_json
from luthier.train.launch.request import LaunchRequest

_SHARED_SETTINGS = {
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
}
"""A setting of accelerate -> the key of `trainer.args` that says the same."""
_DEEPSPEED_KEYS = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    **_SHARED_SETTINGS,
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.eps": "adam_epsilon",
    "optimizer.params.weight_decay": "weight_decay",
}
"""A dotted key of a DeepSpeed config -> the key of `trainer.args`, as transformers 5.23 pairs them
(`HfTrainerDeepSpeedConfig.trainer_config_process`)."""
_PRECISIONS = ("bf16", "fp16")


def refuse_recipe_conflicts(request: LaunchRequest, args: TrainerArgs) -> None:
    """Raise UserError where the launcher was given another value than `trainer.args` has.

    The message has each of them with its place, and says which to remove.
    """
    conflicts = [
        *_shared_setting_conflicts(request, args),
        *_precision_conflicts(request, args),
        *_deepspeed_conflicts(request, args),
    ]
    if conflicts:
        raise UserError(
            "The launcher and the recipe contradict each other:\n"
            + "".join(f"  {conflict}\n" for conflict in conflicts)
            + "The recipe describes the training, so leave these out of the launcher's settings "
            "(`auto` in a DeepSpeed config), or make both the same."
        )


def _shared_setting_conflicts(request: LaunchRequest, args: TrainerArgs) -> Iterator[str]:
    """Yield the settings of accelerate that differ from those of the recipe."""
    for name, key in _SHARED_SETTINGS.items():
        value = getattr(request, name)
        if value is not None and _differs(value, args.get(key)):
            yield f"{request.set_by[name]}, but trainer.args.{key}={args.get(key)}"


def _precision_conflicts(request: LaunchRequest, args: TrainerArgs) -> Iterator[str]:
    """Yield a mixed precision that the recipe turns off, or has another one in place of."""
    precision = request.mixed_precision
    if precision not in _PRECISIONS:
        # `accelerate config` writes `no` wherever nothing was chosen, and the recipe decides.
        return
    (other,) = (name for name in _PRECISIONS if name != precision)
    origin = request.set_by["mixed_precision"]
    if args.get(other):
        yield f"{origin}, but trainer.args.{other}=true"
    elif args.get(precision) is False:
        yield f"{origin}, but trainer.args.{precision}=false"


def _deepspeed_conflicts(request: LaunchRequest, args: TrainerArgs) -> Iterator[str]:
    """Yield the values of a DeepSpeed config file that differ from those of the recipe."""
    path = request.deepspeed_config_file
    if path is None:
        return
    config: dict[str, Any] | None = load_json(path, dict[str, Any])
    if config is None:
        raise UserError(f"{request.set_by['deepspeed_config_file']}: there is no file {path}.")
    for name, key in _DEEPSPEED_KEYS.items():
        value = _value_at(config, name)
        if value is not None and _differs(value, args.get(key)):
            yield f"`{name}: {value}` in {path}, but trainer.args.{key}={args.get(key)}"
    yield from _total_batch_conflict(request, config, args)
    for precision in _PRECISIONS:
        is_on = _value_at(config, f"{precision}.enabled")
        if isinstance(is_on, bool) and args.get(precision) not in (None, is_on):
            yield (
                f"`{precision}.enabled: {str(is_on).lower()}` in {path}, but "
                f"trainer.args.{precision}={str(args.get(precision)).lower()}"
            )


def _total_batch_conflict(
    request: LaunchRequest, config: dict[str, Any], args: TrainerArgs
) -> Iterator[str]:
    """Yield DeepSpeed's batch of all processes where it is another one than the recipe's."""
    total, processes = config.get("train_batch_size"), request.num_processes
    if total is None or processes is None:
        return
    size, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if _differs(total, size * steps * processes):
        yield (
            f"`train_batch_size: {total}` in {request.deepspeed_config_file}, but "
            f"trainer.args.per_device_train_batch_size={size} times gradient_accumulation_steps="
            f"{steps} times {processes} processes is {size * steps * processes}"
        )


def _differs(value: Any, recipe_value: Any) -> bool:
    """Return whether a launcher's value is another number than the recipe's, if both have one."""
    if recipe_value is None or value == "auto":
        return False
    try:
        return float(value) != float(recipe_value)
    except (TypeError, ValueError):
        return bool(value != recipe_value)


def _value_at(config: dict[str, Any], name: str) -> Any:
    """Return the value under a dotted key; None where there is none."""
    value: Any = config
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value
