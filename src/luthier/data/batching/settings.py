"""How token rows become batches, as the config says it. Needs no heavy import."""

from dataclasses import dataclass

from luthier.config.library_settings import TrainerArgs
from luthier.config.schema import RunConfig
from luthier.errors import UserError

_SAMPLING_STRATEGIES = ("random", "sequential", "group_by_length")
_APART = "luthier packs whole documents by best fit over the whole set, which TRL calls bfd"


@dataclass(frozen=True)
class BatchingSettings:
    """What `trainer.args` and `trainer.padding` say about packing and padding."""

    packing: bool = False
    """Several documents share a training row."""
    eval_packing: bool = False
    """The same for evaluation sets; the losses are the same either way."""
    length: int | None = None
    """The tokens of a packed row: `chat.max_length`."""
    constant: bool = False
    """Every row is padded to `length`, so that all batches have one shape."""


def read_batching_settings(config: RunConfig) -> BatchingSettings:
    """Read the config's packing and padding.

    Raises UserError for what luthier does not do, and where `chat.max_length` is missing.
    """
    args = config.trainer.args
    _refuse_strategies(args)
    # As in TRL, evaluation rows are packed like training rows unless eval_packing says otherwise.
    plan = BatchingSettings(
        packing=args.packing,
        eval_packing=args.eval_packing,
        length=config.chat.max_length,
        constant=config.trainer.padding == "max_length",
    )
    if plan.length is None and (plan.packing or plan.eval_packing or plan.constant):
        key = "trainer.padding=max_length" if plan.constant else "trainer.args.packing=true"
        raise UserError(
            f"{key} needs the length of a row, and chat.max_length is null.\n"
            "Set chat.max_length, such as chat.max_length=2048."
        )
    return plan


def _refuse_strategies(args: TrainerArgs) -> None:
    """Stop at strategies of TRL and transformers that luthier does not have."""
    packing = args.packing_strategy
    if packing != "bfd":
        raise UserError(
            f"trainer.args.packing_strategy={packing}: {_APART}.\n"
            "Remove it; chat.on_long and dataset.stride say what becomes of long rows."
        )
    sampling = args.train_sampling_strategy
    if sampling not in _SAMPLING_STRATEGIES:
        raise UserError(
            f"trainer.args.train_sampling_strategy={sampling} is not one of "
            f"{', '.join(_SAMPLING_STRATEGIES)}.\nTo balance batches better than group_by_length "
            "does, set trainer.args.packing=true."
        )
