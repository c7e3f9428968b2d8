"""TRL's SFTTrainer with exact numbers: float32 adapters, token-weighted losses, few syncs."""

import math
from typing import Any

import torch
from trl import SFTTrainer

from luthier.errors import UserError


class TokenTrainer(SFTTrainer):
    """Trains rows of `input_ids` and `labels`.

    Every loss is the mean negative log-likelihood over trained tokens: of the whole step in
    training (all micro-batches and ranks), of the whole set in evaluation. So neither the batch
    size, nor gradient accumulation, nor the number of processes changes it. Accuracy and entropy
    are means over the same tokens.
    """

    # compute_loss divides by the step's tokens itself, also where the model class's forward
    # does not take `num_items_in_batch`.
    loss_is_scaled_for_ga = True

    def __init__(self, model: Any, **kwargs: Any) -> None:
        # TRL rounds trainable weights of a quantized model to bfloat16, where small updates vanish.
        exact = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
        super().__init__(model=model, **kwargs)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.dtype != exact[name].dtype:
                parameter.data = exact[name].to(parameter.device)
        self.model_accepts_loss_kwargs = True
        # Trained tokens, right answers, entropy, input tokens; since the last log.
        self._sums = torch.zeros(4, device=self.args.device)
        self._eval_sums = torch.zeros(4, dtype=torch.float64)
        self._tokens_seen = 0

    def _send_telemetry(self) -> None:
        """Tell nobody that someone trains."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, also after an evaluation.

        accelerate marks a model that it prepared for evaluation as prepared, and then never wraps
        it for DDP: each rank would train alone, without a word. So the mark is taken off here.
        """
        model: Any = self.model
        if vars(model).pop("_is_accelerate_prepared", False):
            original = vars(model).pop("_original_forward", None)
            if original is not None:
                model.forward = original
        return super().train(*args, **kwargs)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the summed loss over the step's trained tokens, which all ranks count together."""
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        per_token = -outputs.log_probs
        if self.args.loss_type == "dft":
            # Dynamic fine-tuning, https://huggingface.co/papers/2508.05629
            per_token = per_token * outputs.log_probs.exp().detach()
        tokens = outputs.label_mask.sum() if num_items_in_batch is None else num_items_in_batch
        # Clamped, so that a batch with nothing to train is a loss of 0 and not 0 / 0.
        loss = per_token.sum() / torch.as_tensor(tokens).clamp(min=1)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # DDP averages gradients over ranks, and the count is of all of them.
            loss = loss * self.accelerator.num_processes
        if self.aux_loss_enabled:
            loss = loss + self._router_loss(outputs, num_items_in_batch)
        self._count(outputs, per_token.detach(), inputs)
        return (loss, outputs) if return_outputs else loss

    def _router_loss(self, outputs: Any, num_items_in_batch: Any) -> torch.Tensor:
        steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        return self.router_aux_loss_coef * outputs.aux_loss / steps

    def _count(self, outputs: Any, per_token: torch.Tensor, inputs: dict[str, Any]) -> None:
        if self.model.training:
            parts = (outputs.label_mask, outputs.is_top1, outputs.entropy.detach(), _real(inputs))
            self._sums += torch.stack([part.sum().float() for part in parts])
            return
        parts = (outputs.label_mask, outputs.is_top1, outputs.entropy, per_token)
        rows = torch.stack([part.float().sum(dim=1) for part in parts], dim=1)
        # Row by row, so that rows which only fill up the last batch of a rank do not count twice.
        self._eval_sums += self.accelerator.gather_for_metrics(rows).double().sum(dim=0).cpu()

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as Trainer does, with the loss of the whole set in place of a mean of means."""
        self._eval_sums.zero_()
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        tokens, right, entropy, loss = self._eval_sums.tolist()
        if tokens:
            output.metrics[f"{prefix}_loss"] = loss / tokens
            output.metrics[f"{prefix}_mean_token_accuracy"] = right / tokens
            output.metrics[f"{prefix}_entropy"] = entropy / tokens
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means since the last log, reduced over the ranks once; stop on a broken loss."""
        if self.model.training and "loss" in logs:
            self._add_means(logs)
            if not math.isfinite(logs["loss"]):
                raise UserError(_broken_loss(logs["loss"], self.state.global_step, self.args))
        super().log(logs, start_time)

    def _add_means(self, logs: dict[str, float]) -> None:
        sums = self.accelerator.reduce(self._sums, reduction="sum")
        tokens, right, entropy, seen = sums.tolist()
        self._sums.zero_()
        self._tokens_seen += int(seen)
        logs["mean_token_accuracy"] = right / max(tokens, 1)
        logs["entropy"] = entropy / max(tokens, 1)
        logs["num_tokens"] = self._tokens_seen


def _real(inputs: dict[str, Any]) -> torch.Tensor:
    """A tensor whose sum is the number of tokens that are no padding."""
    if "attention_mask" in inputs:
        return inputs["attention_mask"]
    return torch.ones_like(inputs["input_ids"])


def _broken_loss(loss: float, step: int, args: Any) -> str:
    return (
        f"The loss is {loss} at step {step}, so the run stops; checkpoints up to then are in "
        f"{args.output_dir}. A smaller trainer.args.learning_rate, more trainer.args.warmup_steps, "
        "or model.dtype=bfloat16 in place of float16 usually mends it."
    )
