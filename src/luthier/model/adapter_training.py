"""Adapters whose training needs more than gradients: LoRA+'s two rates, AdaLoRA's ranks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from luthier.config.library_settings import LoraSettings
from luthier.errors import UserError

RANKS_FILE = "adalora_ranks.safetensors"
"""The file of a checkpoint with the averages of the weights' importance and the ranks left.

With it a resumed run goes on as it would have.
"""
_AVERAGES = ("exp_avg_ipt", "exp_avg_unc")
"""The attributes of peft's rank allocator that hold averages."""


class RankAllocation(TrainerCallback):
    """Drops the least important ranks of AdaLoRA after each step, until the budget is reached.

    The penalty that keeps the directions apart is added to the gradients once a step: it is part of
    no loss that is shown. Zhang et al., https://arxiv.org/abs/2303.10512
    """

    def __init__(self) -> None:
        """Start with all ranks."""
        self.rank_masks: dict[str, list[bool]] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the schedule's number of steps; raises UserError where it does not fit into them."""
        model = kwargs["model"]
        config = model.peft_config["default"]
        config.total_step = state.max_steps
        if config.tinit + config.tfinal >= state.max_steps:
            raise UserError(
                f"lora.tinit={config.tinit} and lora.tfinal={config.tfinal} leave no step of "
                f"{state.max_steps} in which ranks could go. Make them smaller, or train longer."
            )
        file = _checkpoint_folder(args, state) / RANKS_FILE
        if state.global_step and file.is_file():
            self.rank_masks = _load_ranks(model.base_model, file)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the gradients of the penalty."""
        import torch

        model = kwargs["model"]
        pairs = [
            (name, p)
            for name, p in model.named_parameters()
            if ".lora_A." in name or ".lora_B." in name
        ]
        penalty = sum(_orthogonality_error(name, p) for name, p in pairs) / len(pairs)
        penalty = penalty * model.peft_config["default"].orth_reg_weight
        gradients = torch.autograd.grad(penalty, [p for _, p in pairs])
        for (_, parameter), gradient in zip(pairs, gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Rate the ranks by this step's gradients, and drop those that are due.

        peft has its users call `update_and_allocate` themselves.
        """
        model = kwargs["model"]
        config = model.peft_config["default"]
        config.rank_pattern = self.rank_masks
        model.base_model.update_and_allocate(state.global_step + 1)
        # peft would save no more than these ranks, and a checkpoint must fit all.
        self.rank_masks, config.rank_pattern = config.rank_pattern, None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write `RANKS_FILE` into the checkpoint."""
        if state.is_world_process_zero:
            allocator = kwargs["model"].base_model.rankallocator
            _save_ranks(allocator, self.rank_masks, _checkpoint_folder(args, state) / RANKS_FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the model be saved with the ranks that are left."""
        kwargs["model"].peft_config["default"].rank_pattern = self.rank_masks


def _checkpoint_folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _save_ranks(allocator: Any, mask: dict[str, list[bool]] | None, file: Path) -> None:
    """Write the allocator's averages and the masks of the ranks that are left."""
    import torch
    from safetensors.torch import save_file

    tensors = {
        f"{average}/{name}": value.cpu().contiguous()
        for average in _AVERAGES
        for name, value in getattr(allocator, average).items()
    }
    tensors |= {f"kept/{name}": torch.tensor(ranks) for name, ranks in (mask or {}).items()}
    save_file(tensors, file)


def _load_ranks(tuner: Any, file: Path) -> dict[str, list[bool]] | None:
    """Put the averages back, and return the masks of the ranks that are left; None for all."""
    from safetensors.torch import load_file

    allocator, weights = tuner.rankallocator, dict(tuner.model.named_parameters())
    masks = {}
    for key, value in load_file(file).items():
        average, _, name = key.partition("/")
        if average == "kept":
            masks[name] = value.tolist()
        else:
            getattr(allocator, average)[name] = value.to(weights[name].device)
            allocator.ipt.setdefault(name, value)
    return masks or None


def _orthogonality_error(name: str, weight: Any) -> Any:
    """Return how far the directions of a matrix are from being orthogonal to each other."""
    import torch

    products = weight @ weight.T if ".lora_A." in name else weight.T @ weight
    return torch.linalg.matrix_norm(products - torch.eye(*products.shape, device=weight.device))


def prepare_trainer(trainer: Any, lora: LoraSettings) -> None:
    """Give a `transformers.Trainer` what the configured adapter needs; call it before training."""
    if lora.method == "adalora":
        trainer.add_callback(RankAllocation())
    ratio = lora.plus_ratio
    if ratio is None:
        return
    create_as_before = trainer.create_optimizer

    def create_optimizer(model: Any = None) -> Any:
        is_new = trainer.optimizer is None
        optimizer = create_as_before(model)
        if is_new:
            trained_model = trainer.model if model is None else model
            groups = lora_plus_groups(optimizer.param_groups, trained_model, ratio)
            optimizer.param_groups[:] = groups
        return optimizer

    trainer.create_optimizer = create_optimizer


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
        split: tuple[list[Any], list[Any]] = ([], [])
        for parameter in group["params"]:
            split[id(parameter) in faster].append(parameter)
        slow.append(group | {"params": split[0]})
        fast.append(group | {"params": split[1], "lr": group["lr"] * ratio})
    return [group for group in slow + fast if group["params"]]
