"""Changes of a run that does not fit into memory, each with the memory that it would take then."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from luthier.config.schema import RunConfig
from luthier.memory.optimizers import find_optimizer
from luthier.memory.plan import USUAL_GPU_COUNTS, MemoryPlan, plan_memory
from luthier.memory.sharding import Sharding

Changes = dict[str, Any]
"""Groups of the config -> the settings that change in them; `args` stands for `trainer.args`."""

_SHORTEST_ROWS = 128
"""Tokens: no shorter rows than these are advised."""


@dataclass(frozen=True)
class Advice:
    """A change, and the memory of the run with it."""

    change: str
    """The words to type."""
    price: str
    """The disadvantage of the change."""
    total: int
    """Bytes of one process."""
    fits: bool


@dataclass(frozen=True)
class _Setting:
    """A change of settings before it is planned."""

    text: str
    """The words to type."""
    price: str
    """The disadvantage of the change."""
    groups: Changes = field(default_factory=dict)


_QUANTIZE = _Setting(
    "quantization=nf4",
    "frozen weights in 4 bits, slower",
    {
        "quantization": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
        }
    },
)
_ADAPT = _Setting(
    "lora=default",
    "adapters in place of the weights themselves",
    {"lora": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear"}},
)


def advise(config: RunConfig, plan: MemoryPlan) -> list[Advice]:
    """Return the changes that help a run which does not fit, the cheapest that fits first.

    Where no change alone is enough, the last one is all that leave the method as it is, together.
    A run that fits gets the change that makes it faster, if there is one. Takes seconds for each.
    """
    if plan.fits:
        return _advise_faster(config, plan)
    advice = [_plan_changed(config, plan, settings) for settings in _single_changes(config, plan)]
    advice += _advise_more_gpus(config, plan)
    if not any(change.fits for change in advice):
        # Everything that leaves method and rows as they are, at once.
        settings = [*_mild_changes(config, plan), *list(_smaller_batches(config))[-1:]]
        if config.lora.is_enabled and not config.quantization.is_enabled:
            settings.append(_QUANTIZE)
        advice.append(_plan_changed(config, plan, settings))
    return sorted(advice, key=lambda change: (not change.fits, 0 if change.fits else change.total))


def _single_changes(config: RunConfig, plan: MemoryPlan) -> Iterator[list[_Setting]]:
    """Yield changes that are made alone, those that cost the least first."""
    yield from ([setting] for setting in _mild_changes(config, plan))
    yield from _first_that_fits(config, plan, _smaller_batches(config))
    if config.lora.lora_dropout:
        yield [_Setting("lora.lora_dropout=0", "no dropout", {"lora": {"lora_dropout": 0.0}})]
    if config.lora.is_enabled and not config.quantization.is_enabled:
        yield [_QUANTIZE]
    if not config.lora.is_enabled:
        yield [_ADAPT]
    yield from _first_that_fits(config, plan, _shorter_rows(plan))


def _mild_changes(config: RunConfig, plan: MemoryPlan) -> Iterator[_Setting]:
    """Yield changes with which the run learns the same, or nearly."""
    if plan.attention == config.model.attention == "eager":
        yield _Setting("model.attention=sdpa", "nothing", {"model": {"attention": "sdpa"}})
    if plan.workload.checkpointing is None:
        yield _trainer_args("a third of the speed", activation_checkpointing=True)
    optimizer = find_optimizer(plan.workload.optimizer)
    is_sliced = any(estimate.sharding.slices for estimate in plan.estimates)
    if not is_sliced and optimizer.states == 2 and optimizer.bits == 32:
        yield _trainer_args("states of the optimizer in 8 bits", optim="adamw_8bit")


def _smaller_batches(config: RunConfig) -> Iterator[_Setting]:
    """Yield ever fewer rows at a time, and more often: the optimizer's step sees as many."""
    args = config.trainer.args
    rows = args.per_device_train_batch_size
    rows_per_step = rows * args.gradient_accumulation_steps
    while rows > 1:
        rows //= 2
        yield _trainer_args(
            "smaller products, a little slower",
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=rows_per_step // rows,
        )


def _shorter_rows(plan: MemoryPlan) -> Iterator[_Setting]:
    """Yield ever smaller bounds for the rows' lengths."""
    length = plan.workload.length
    while length >= 2 * _SHORTEST_ROWS:
        length //= 2
        change = {"chat": {"max_length": length}}
        yield _Setting(f"chat.max_length={length}", "longer rows are cut or dropped", change)


def _first_that_fits(
    config: RunConfig, plan: MemoryPlan, settings: Iterator[_Setting]
) -> Iterator[list[_Setting]]:
    """Yield the first of `settings`, from mild to strong, that fits; the last where none does."""
    last = None
    for last in settings:
        if _plan_changed(config, plan, [last]).fits:
            break
    if last is not None:
        yield [last]


def _advise_more_gpus(config: RunConfig, plan: MemoryPlan) -> list[Advice]:
    """Return the smallest number of such GPUs for which slices fit, or the largest that is tried.

    The list is empty without GPUs and for quantized weights, which cannot be in slices.
    """
    if plan.hardware.kind != "cuda" or config.quantization.is_enabled:
        return []
    for count in USUAL_GPU_COUNTS:
        if count <= plan.best.sharding.processes:
            continue
        hardware = replace(plan.hardware, count=count)
        sharding, images = Sharding("fsdp2", count), plan.workload.images
        sharded = plan_memory(config, hardware, [sharding], images)
        if sharded.fits or count == USUAL_GPU_COUNTS[-1]:
            text = f"{count} GPUs: luthier launch --config fsdp2 --num_processes {count}"
            price = "GPUs that wait for each other"
            return [Advice(text, price, sharded.best.total, sharded.fits)]
    return []


def _advise_faster(config: RunConfig, plan: MemoryPlan) -> list[Advice]:
    """Return the advice to compute no activations again, where the run fits without that."""
    if plan.workload.checkpointing is None:
        return []
    setting = _trainer_args("nothing: about a third faster", activation_checkpointing=False)
    advice = _plan_changed(config, plan, [setting])
    return [advice] if advice.fits else []


def _plan_changed(config: RunConfig, plan: MemoryPlan, settings: list[_Setting]) -> Advice:
    """Plan the run with `settings` on the same machine, shared in the same way."""
    values = config.model_dump(mode="json")
    for setting in settings:
        for name, change in setting.groups.items():
            if name == "args":
                values["trainer"]["args"] |= change
            else:
                values[name] = values[name] | change
    shardings = [estimate.sharding for estimate in plan.estimates]
    images = plan.workload.images
    best = plan_memory(RunConfig.model_validate(values), plan.hardware, shardings, images).best
    text = " ".join(setting.text for setting in settings)
    price = "; ".join(setting.price for setting in settings)
    return Advice(text, price, best.total, best.fits)


def _trainer_args(price: str, **values: Any) -> _Setting:
    """Return the setting of `trainer.args`; truth values are written as YAML has them."""
    texts = {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in values.items()
    }
    text = " ".join(f"trainer.args.{name}={value}" for name, value in texts.items())
    return _Setting(text, price, {"args": values})
