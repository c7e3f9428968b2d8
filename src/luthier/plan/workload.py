"""What one step of a run has to hold, read from its configuration."""

from dataclasses import dataclass, field, fields
from functools import cache
from importlib import import_module
from typing import Any

from luthier.config.methods import METHODS
from luthier.config.schema import RunConfig
from luthier.model.device import Machine

ASSUMED_LENGTH = 2048
"""Tokens of a row where `chat.max_length` sets no bound."""
AUTO = "auto"


_PAIRS = ("dpo", "orpo", "cpo", "reward")
"""Methods of which a row is two sequences, side by side in one forward."""
_COMPARING = ("dpo", "kto", "grpo", "rloo")
"""Methods for which full fine-tuning keeps the model as it was."""


@dataclass(frozen=True)
class Checkpointing:
    """Activations are computed again in the backward: `trainer.args.activation_checkpointing`."""

    every_n_layers: int = 1
    offload: bool = False
    """What is kept waits in main memory."""


@dataclass(frozen=True)
class Workload:
    """One micro-batch of a run and how it is computed."""

    rows: int
    """Sequences in one forward of one process."""
    length: int
    """Tokens of each."""
    accumulation: int
    """Micro-batches of one optimizer step."""
    checkpointing: Checkpointing | None
    offload: bool
    """`trainer.args.activation_offloading`."""
    optimizer: str
    autocast: str | None
    """The number format of mixed precision."""
    masked: bool
    """Whether attention gets a mask of (length, length): rows of different lengths, or packed."""
    flash: bool
    """Whether attention has flash-attention's kernels, which need no mask."""
    full: bool
    """Whether the weights themselves train, all or some."""
    reference: bool = False
    """Whether the weights as they were are kept, too."""
    task: str = "CAUSAL_LM"
    """What the model does, as peft calls it."""
    dropout: bool = True
    """Whether layers drop activations."""
    assumptions: tuple[str, ...] = field(default=())
    """What the configuration leaves open, in words."""


def read(config: RunConfig, machine: Machine) -> Workload:
    """Return the step of a configuration; `auto` checkpointing counts as off."""
    method = config.trainer.method
    args = defaults(method) | config.trainer.args
    rows = int(args["per_device_train_batch_size"]) * (2 if method in _PAIRS else 1)
    length, assumptions = _length(config)
    packed, flash = bool(args.get("packing")), "flash" in machine.attention
    return Workload(
        rows=rows,
        length=length,
        accumulation=int(args["gradient_accumulation_steps"]),
        checkpointing=_checkpointing(args),
        offload=bool(args.get("activation_offloading")),
        optimizer=str(args["optim"]),
        autocast=_autocast(config.trainer.args, machine),
        masked=not flash and (packed or rows > 1 or config.trainer.padding == "max_length"),
        flash=flash,
        full=not config.lora,
        reference=not config.lora and _has_reference(method, args),
        task=METHODS[method].task,
        dropout=not args.get("disable_dropout"),
        assumptions=(*assumptions, *_unseen(method, args)),
    )


@cache
def defaults(method: str = "sft") -> dict[str, Any]:
    """The settings of a method's trainer where the configuration is silent."""
    package, file, name = METHODS[method].config
    module = ".".join([package, *file.removesuffix(".py").split("/")])
    return {f.name: f.default for f in fields(getattr(import_module(module), name))}


def _has_reference(method: str, args: dict[str, Any]) -> bool:
    if method not in _COMPARING or args.get("precompute_ref_log_probs"):
        return False
    return method in ("dpo", "kto") or bool(args.get("beta"))


def _length(config: RunConfig) -> tuple[int, tuple[str, ...]]:
    if config.chat.max_length is not None:
        return config.chat.max_length, ()
    said = (
        f"chat.max_length is null, so rows may have any length: {ASSUMED_LENGTH:,} tokens are "
        "assumed. Set chat.max_length for a bound that holds."
    )
    return ASSUMED_LENGTH, (said,)


def _checkpointing(args: dict[str, Any]) -> Checkpointing | None:
    wanted = args["activation_checkpointing"]
    if wanted is None:
        wanted = args["gradient_checkpointing"]  # TRL's trainers set the older name
    if not wanted or wanted == AUTO:
        return None
    given = args["activation_checkpointing_kwargs"] or {}
    return Checkpointing(int(given.get("every_n_layers", 1)), bool(given.get("offload", False)))


def _autocast(given: dict[str, Any], machine: Machine) -> str | None:
    """Mixed precision as luthier's training sets it: the machine's format unless it is given."""
    if given.get("bf16", machine.dtype == "bfloat16"):
        return "bfloat16"
    return "float16" if given.get("fp16", machine.dtype == "float16") else None


def _unseen(method: str, args: dict[str, Any]) -> tuple[str, ...]:
    """What changes memory and is not followed, in words."""
    names = {
        "torch_compile": "torch.compile mostly keeps less than what is counted here",
        "use_liger_kernel": "Liger's kernels keep less than what is counted here",
    }
    said = [f"trainer.args.{name}: {text}." for name, text in names.items() if args.get(name)]
    if method in ("grpo", "rloo", "distill"):
        said.append(f"trainer.method={method}: the keys and values of generation are not counted.")
    return tuple(said)
