"""Whether a server that generates has the weights that train.

A server of its own (vLLM) gets copies of the weights, and where these do not arrive it answers from
the untrained model for as long as nobody looks.
"""

from typing import Any, NamedTuple

import torch
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import pad

from luthier.errors import UserError

CHECKED_ROWS = 8
"""Completions of each process that are compared, at every generation."""
BASE_LIMIT = 0.05
"""A mean difference, in nats a token, above which it is asked whose log-probabilities these are.

vLLM's kernels and those that train differ by 0.01 to 0.03 in 16 bits; weights of a step back, by
less than that."""
LIMIT = 0.3
"""A mean difference, in nats a token, that no rounding explains."""


class SampledLogps(NamedTuple):
    """What a server sampled behind prompts, and with which log-probabilities it says it did."""

    prompt_ids: list[list[int]]
    ids: list[list[int]]
    logps: list[list[float | None]]


def check_sampled_weights(trainer: Any, sampled: SampledLogps) -> None:
    """Hold the log-probabilities of samples against those of the model that trains.

    Raises UserError where they differ by more than rounding does, or are those of the model
    without its adapter.
    """
    rows = SampledLogps(
        sampled.prompt_ids[:CHECKED_ROWS], sampled.ids[:CHECKED_ROWS], sampled.logps[:CHECKED_ROWS]
    )
    told = torch.tensor(
        [torch.nan if value is None else value for row in rows.logps for value in row]
    )
    difference = _mean_difference(told, _compute_logps(trainer, rows))
    model = trainer.accelerator.unwrap_model(trainer.model)
    if difference > BASE_LIMIT and hasattr(model, "peft_config"):
        with model.disable_adapter():
            from_base = _mean_difference(told, _compute_logps(trainer, rows))
        if from_base < difference / 2:
            raise UserError(
                "trainer.args.use_vllm: the completions are drawn from the model without its "
                f"adapter: the log-probabilities that vLLM gives differ by {difference:.3f} a "
                f"token from the trained model's, and by {from_base:.3f} from the untrained one's."
                "\n"
                "The weights do not reach vLLM. Generate without it "
                "(trainer.args.use_vllm=false), or train without an adapter (lora=none)."
            )
    if difference > LIMIT and _samples_plainly(trainer.args):
        raise UserError(
            "trainer.args.use_vllm: the completions are not drawn from the weights that train: the "
            f"log-probabilities that vLLM gives differ by {difference:.3f} a token from the "
            f"model's own, and rounding explains no more than {LIMIT}.\n"
            "Check that the server serves this model and the same tokenizer, or generate without "
            "it: trainer.args.use_vllm=false."
        )


def _samples_plainly(args: Any) -> bool:
    """Return whether tokens are drawn from the model's whole distribution."""
    # vLLM's log-probabilities are those behind all filters, which a model knows nothing of.
    return (
        args.top_p == 1.0
        and (args.top_k or 0) <= 0
        and not args.min_p
        and args.repetition_penalty == 1.0
    )


def _mean_difference(told: torch.Tensor, own: torch.Tensor) -> float:
    """Return the mean distance over the tokens of which the server says anything."""
    distance = (told - own).abs()
    return float(distance.nanmean()) if not distance.isnan().all() else 0.0


def _compute_logps(trainer: Any, rows: SampledLogps) -> torch.Tensor:
    """Return the model's log-probability of each sampled token, row behind row."""
    padding, device = trainer.processing_class.pad_token_id, trainer.accelerator.device
    prompts, completions = map(_as_tensors, (rows.prompt_ids, rows.ids))
    columns = [pad(prompts, padding, "left"), pad(completions, padding, "right")]
    masks = [
        pad([torch.ones_like(row) for row in side], 0, where)
        for side, where in ((prompts, "left"), (completions, "right"))
    ]
    with (
        torch.no_grad(),
        disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs),
    ):
        logps = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat(columns, dim=1).to(device),
            torch.cat(masks, dim=1).to(device),
            columns[1].shape[1],
            batch_size=trainer.args.per_device_train_batch_size,
        )[0]
    own: torch.Tensor = logps.float().cpu()[masks[1].bool()]
    return own


def _as_tensors(rows: list[list[int]]) -> list[torch.Tensor]:
    return [torch.tensor(row) for row in rows]
