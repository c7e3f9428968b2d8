"""The memory that a run needs on a machine, and the choices that training takes from it."""

import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from luthier.config.methods import METHODS
from luthier.config.schema import RunConfig
from luthier.environment import quiet_bitsandbytes
from luthier.errors import UserError
from luthier.memory.estimate import Estimate, estimate_memory, gradient_shares
from luthier.memory.meta_model import (
    Weight,
    build_meta_model,
    reward_model_bytes,
    teacher_bytes,
)
from luthier.memory.sharding import SHARDING_KINDS, Sharding
from luthier.memory.simulate import SimulatedStep, simulate_step
from luthier.memory.workload import (
    AUTO_CHECKPOINTING,
    Checkpointing,
    Hardware,
    Workload,
    detect_hardware,
    machine_for,
    read_workload,
)
from luthier.model.device import Machine
from luthier.model.load import describe_packing, read_model_config, resolve_attention
from luthier.model.model_class import check_trains_on_text
from luthier.model.vision_processor import find_vision_processor

USUAL_GPU_COUNTS = (2, 4, 8)
"""Numbers of GPUs that a simulated step can be read for later, to say what more of them give."""
_STEP_CACHE: dict[tuple[str, Machine, Workload, str, str], SimulatedStep] = {}


@dataclass(frozen=True)
class MemoryPlan:
    """The memory that a run needs on a machine, under each of the shardings that were planned."""

    name: str
    """The name of the recipe, or the path of the model where there is no recipe."""
    model: str
    parameters: int
    """The number of the model's weights, without those of an adapter."""
    trained: int
    """The number of weights that train: those of an adapter, or of the model."""
    hardware: Hardware
    dtype: str
    attention: str
    workload: Workload
    estimates: tuple[Estimate, ...]
    unpacked_experts: Mapping[str, int] = field(default_factory=dict)
    """Number format -> bytes of the experts that stay in it although the run quantizes."""
    packing: str | None = None
    """What is quantized and what is not, in words; None for a run that quantizes nothing."""
    longest_allowed: tuple[int, int] | None = None
    """The tokens of the longest rows that the configuration allows, and the bytes of a step of such
    rows; None where that is what is planned."""

    @property
    def best(self) -> Estimate:
        """The first estimate that fits, or the smallest one if none does."""
        fitting = [estimate for estimate in self.estimates if estimate.fits]
        return fitting[0] if fitting else min(self.estimates, key=lambda estimate: estimate.total)

    @property
    def fits(self) -> bool:
        """Whether one of the estimates fits."""
        return self.best.fits


def plan_memory(
    config: RunConfig,
    hardware: Hardware | None = None,
    shardings: Sequence[Sharding] = (Sharding(),),
    images: tuple[tuple[int, int], ...] = (),
) -> MemoryPlan:
    """Plan a run's memory from its configuration alone; takes seconds, needs no weights.

    `hardware` is this machine if it is None, and `images` are the height and width of the images
    of the row with most of them. `activation_checkpointing: auto` is planned as
    `choose_checkpointing` decides it. Raises UserError where the model's config.json cannot be had
    or the plan cannot count a part of the run, whatever the reason: a run that cannot be planned
    may well train.
    """
    if config.model.loader is not None:
        raise UserError(
            "model.loader: the plan builds a model without weights by its class, and this one is "
            "known when the function has loaded it. So there are no numbers for it; a run with "
            "trainer.args.max_steps=2 prints the memory that it took."
        )
    hardware = hardware or detect_hardware(config.model)
    machine = machine_for(config.model, hardware)
    with _without_warnings(), _errors_in_words(config):
        task = METHODS[config.trainer.base_method].task
        if task == "SEQ_2_SEQ_LM":
            # A step of what a run refuses could be planned.
            architecture = read_model_config(config.model)
            check_trains_on_text(architecture, config.model.trust_remote_code, task)
        packs = config.trainer.args.packs_rows
        machine = resolve_attention(config.model, machine, task, packs)
        workload = replace(read_workload(config, machine), images=images)
        plan = _plan_workload(config, machine, workload, hardware, shardings)
        if plan.fits or config.trainer.args.activation_checkpointing != AUTO_CHECKPOINTING:
            return plan
        workload = replace(workload, checkpointing=Checkpointing())
        return _plan_workload(config, machine, workload, hardware, shardings)


def fits_in_memory(config: RunConfig, hardware: Hardware | None = None) -> bool:
    """Tell whether a run fits on one device of `hardware`, which is this machine if it is None."""
    return plan_memory(config, hardware).fits


def choose_checkpointing(
    config: RunConfig,
    hardware: Hardware | None = None,
    sharding: Sharding | None = None,
    images: tuple[tuple[int, int], ...] = (),
) -> bool:
    """Tell whether activations have to be computed again: True where they do not fit.

    It is what `trainer.args.activation_checkpointing: auto` means: a third of the speed is given
    up only for memory that is not there. `hardware` is this machine and `sharding` one process
    where they are None; `images` as in `plan_memory`, which raises UserError as this does.
    """
    return plan_auto(config, hardware, sharding, images).workload.checkpointing is not None


def plan_auto(
    config: RunConfig,
    hardware: Hardware | None = None,
    sharding: Sharding | None = None,
    images: tuple[tuple[int, int], ...] = (),
) -> MemoryPlan:
    """Plan a run as `choose_checkpointing` does, with the checkpointing that it decides."""
    with_auto = config.with_trainer_args(activation_checkpointing=AUTO_CHECKPOINTING)
    return plan_memory(with_auto, hardware, (sharding or Sharding(),), images)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence what libraries warn of while a step is simulated: nothing is computed in it."""
    quiet_bitsandbytes()
    # torch 2.13 logs the traceback of an operator that fails on tensors without content, besides
    # raising it.
    torch_log = logging.getLogger("torch._subclasses.fake_tensor")
    level = torch_log.level
    torch_log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch_log.setLevel(level)


@contextmanager
def _errors_in_words(config: RunConfig) -> Iterator[None]:
    """Raise UserError for whatever a model's own code raises on tensors without content."""
    try:
        yield
    except Exception as error:
        # What the run itself refuses is refused here in the same words.
        task = METHODS[config.trainer.base_method].task
        architecture = read_model_config(config.model)
        check_trains_on_text(architecture, config.model.trust_remote_code, task)
        if isinstance(error, UserError):
            raise
        lines = str(error).strip().splitlines() or [""]
        raise UserError(
            f"model.path={config.model.path}: the plan cannot try a step of this model: "
            f"{type(error).__name__}: {lines[0]}\nSo there are no numbers for it, which does not "
            "mean that it cannot train. A run with trainer.args.max_steps=2 trains or says why "
            "not, and prints the memory that it took."
        ) from error


def _plan_workload(
    config: RunConfig,
    machine: Machine,
    workload: Workload,
    hardware: Hardware,
    shardings: Sequence[Sharding],
) -> MemoryPlan:
    """Plan a workload whose checkpointing is decided."""
    # Weights that train whole are gathered from slices in 16 bits, where copies of them are
    # float32 and autocast makes 16-bit weights of them: two different steps.
    steps = {}
    for is_sliced in sorted({sharding.slices and workload.full for sharding in shardings}):
        dtype = workload.autocast if is_sliced and workload.autocast else "float32"
        steps[is_sliced] = _simulate_or_reuse(
            config, machine, workload, hardware.kind, shardings, dtype
        )
    file_dtype = str(read_model_config(config.model).dtype).removeprefix("torch.")
    size_of_teacher = teacher_bytes(config, machine)
    size_of_rewards = reward_model_bytes(config, machine)
    estimates = [
        estimate_memory(
            steps[sharding.slices and workload.full],
            workload,
            sharding,
            hardware=hardware,
            file_dtype=file_dtype,
            teacher=size_of_teacher,
            reward_models=size_of_rewards,
        )
        for sharding in shardings
    ]
    weights = next(iter(steps.values())).weights
    if config.trainer.args.packing and any(map(_is_convolution, weights)):
        notes = (*workload.assumptions, _DOCUMENT_PADDING)
        workload = replace(workload, assumptions=notes)
    return MemoryPlan(
        name=config.recipe or config.model.path,
        model=config.model.path,
        parameters=sum(w.elements for w in weights if workload.full or not w.trains),
        trained=sum(w.elements for w in weights if w.trains),
        hardware=hardware,
        dtype=machine.dtype,
        attention=machine.attention,
        workload=workload,
        estimates=tuple(estimates),
        unpacked_experts=_unpacked_experts(weights),
        packing=next(iter(steps.values())).packing,
    )


_DOCUMENT_PADDING = (
    "trainer.args.packing: layers that carry a state compute documents of like length side by "
    "side. The padding behind these is not counted; it is less than half of what such layers hold."
)


def _is_convolution(weight: Weight) -> bool:
    """Tell whether a weight is a convolution over tokens, channel by channel, as in Mamba."""
    is_depthwise = len(weight.shape) == 3 and weight.shape[1] == 1
    return bool(weight.layer) and is_depthwise and not weight.is_expert


def _unpacked_experts(weights: Sequence[Weight]) -> dict[str, int]:
    """Return the bytes of experts by number format where other weights are quantized."""
    if not any(weight.is_quantized for weight in weights):
        return {}
    sizes: Counter[str] = Counter()
    for weight in weights:
        if weight.is_expert and not weight.is_quantized and not weight.trains:
            sizes[weight.format] += weight.stored
    return dict(sizes)


def _simulate_or_reuse(
    config: RunConfig,
    machine: Machine,
    workload: Workload,
    device_type: str,
    shardings: Sequence[Sharding],
    dtype: str,
) -> SimulatedStep:
    """Simulate a step, or return the one that was simulated for the same model and rows.

    Optimizers and numbers of GPUs make no difference to a step. `dtype` is that of weights which
    train whole.
    """
    # A cached step must be readable for other numbers of GPUs, which `advise` plans later.
    usual = [Sharding(kind, count) for kind in SHARDING_KINDS for count in USUAL_GPU_COUNTS]
    shares = frozenset(gradient_shares([*shardings, *usual], workload))
    # The key leaves out what makes no difference to a step, so that advice reuses it.
    model_json = config.model_dump_json(include={"model": True, "quantization": True, "lora": True})
    step = replace(workload, optimizer="", assumptions=(), reference=False)
    key = (model_json, machine, step, device_type, dtype)
    if key not in _STEP_CACHE or not shares <= set(_STEP_CACHE[key].peaks):
        model = build_meta_model(config, machine, dtype)
        packing = describe_packing(model)
        processor = find_vision_processor(config.model) if workload.images else None
        simulated = simulate_step(model, workload, device_type, shares, processor)
        _STEP_CACHE[key] = replace(simulated, packing=packing)
    return _STEP_CACHE[key]
