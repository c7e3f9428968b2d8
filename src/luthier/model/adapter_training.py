"""What some adapters ask of a trainer: LoRA+'s two learning rates, AdaLoRA's ranks."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from luthier.config.library_settings import LoraSettings
from luthier.errors import UserError

# AdaLoRA's changing ranks, and what a checkpoint must hold so that a run goes on as it would.

RANKS_FILE = "adalora_ranks.safetensors"
"""In a checkpoint: how much each weight mattered so far, and which ranks are kept."""
_AVERAGES = ("exp_avg_ipt", "exp_avg_unc")


class RankAllocation(TrainerCallback):
    """After each step the least important ranks go, until the budget is reached.

    The penalty that keeps the directions apart is added to the gradients once a step: it is part of
    no loss that is shown. Zhang et al., https://arxiv.org/abs/2303.10512
    """

    def __init__(self) -> None:
        """Start with all ranks."""
        self.kept: dict[str, list[bool]] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Tell the schedule how many steps there are; UserError where it does not fit into them."""
        model = given["model"]
        config = model.peft_config["default"]
        config.total_step = state.max_steps
        if config.tinit + config.tfinal >= state.max_steps:
            raise UserError(
                f"lora.tinit={config.tinit} and lora.tfinal={config.tfinal} leave no step of "
                f"{state.max_steps} in which ranks could go. Make them smaller, or train longer."
            )
        file = _checkpoint(args, state) / RANKS_FILE
        if state.global_step and file.is_file():
            self.kept = _restore(model.base_model, file)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Add the gradients of the penalty."""
        import torch

        model = given["model"]
        pairs = [(name, p) for name, p in model.named_parameters() if _is_direction(name)]
        penalty = sum(_overlap(name, p) for name, p in pairs) / len(pairs)
        penalty = penalty * model.peft_config["default"].orth_reg_weight
        gradients = torch.autograd.grad(penalty, [p for _, p in pairs])
        for (_, parameter), gradient in zip(pairs, gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Rate the ranks by this step's gradients, and drop those that are due."""
        model = given["model"]
        config = model.peft_config["default"]
        config.rank_pattern = self.kept
        model.base_model.update_and_allocate(state.global_step + 1)
        # peft would save no more than these ranks, and a checkpoint must fit all.
        self.kept, config.rank_pattern = config.rank_pattern, None

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Write what the coming steps need beside the checkpoint's weights."""
        if state.is_world_process_zero:
            allocator = given["model"].base_model.rankallocator
            _keep(allocator, self.kept, _checkpoint(args, state) / RANKS_FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Let the model be saved with the ranks that are left."""
        given["model"].peft_config["default"].rank_pattern = self.kept


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _keep(allocator: Any, kept: dict[str, list[bool]] | None, file: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {
        f"{average}/{name}": value.cpu().contiguous()
        for average in _AVERAGES
        for name, value in getattr(allocator, average).items()
    }
    tensors |= {f"kept/{name}": torch.tensor(ranks) for name, ranks in (kept or {}).items()}
    save_file(tensors, file)


def _restore(tuner: Any, file: Path) -> dict[str, list[bool]] | None:
    """Put the averages back, and return which ranks were kept."""
    from safetensors.torch import load_file

    allocator, weights = tuner.rankallocator, dict(tuner.model.named_parameters())
    kept = {}
    for key, value in load_file(file).items():
        kind, _, name = key.partition("/")
        if kind == "kept":
            kept[name] = value.tolist()
        else:
            getattr(allocator, kind)[name] = value.to(weights[name].device)
            allocator.ipt.setdefault(name, value)
    return kept or None


def _is_direction(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def _overlap(name: str, weight: Any) -> Any:
    """How far the directions of a matrix are from being orthogonal to each other."""
    import torch

    products = weight @ weight.T if ".lora_A." in name else weight.T @ weight
    return torch.linalg.matrix_norm(products - torch.eye(*products.shape, device=weight.device))


def prepare_trainer(trainer: Any, lora: LoraSettings) -> None:
    """Give a `transformers.Trainer` what the configured adapter needs; call it before training."""
    if lora.plus_ratio is not None:
        trainer.create_optimizer = partial(
            _create, trainer, trainer.create_optimizer, lora.plus_ratio
        )
    if lora.method == "adalora":
        trainer.add_callback(RankAllocation())


def lora_plus_groups(
    groups: Sequence[dict[str, Any]], model: Any, ratio: float
) -> list[dict[str, Any]]:
    """Return an optimizer's groups with LoRA's B matrices apart, at `ratio` times the rate.

    LoRA+ (Hayou et al., https://arxiv.org/abs/2402.12354). Each group keeps its weight decay and
    whatever else it has; those at the old rate come first.
    """
    faster = {id(p) for name, p in model.named_parameters() if ".lora_B." in name}
    slow, fast = [], []
    for group in groups:
        parts: tuple[list[Any], list[Any]] = ([], [])
        for parameter in group["params"]:
            parts[id(parameter) in faster].append(parameter)
        slow.append(group | {"params": parts[0]})
        fast.append(group | {"params": parts[1], "lr": group["lr"] * ratio})
    return [group for group in slow + fast if group["params"]]


def _create(trainer: Any, create: Callable[..., Any], ratio: float, model: Any = None) -> Any:
    """Create the optimizer as the trainer does, then take its groups apart."""
    if trainer.optimizer is not None:
        return create(model)
    optimizer = create(model)
    whole = trainer.model if model is None else model
    optimizer.param_groups[:] = lora_plus_groups(optimizer.param_groups, whole, ratio)
    return optimizer
