"""What a language model says of the replies in a batch, summed over the tokens that train."""

from typing import Any

import torch
from torch import Tensor

OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")
"""What TRL's fused language-model head is to give for each token."""


def forward(model: Any, inputs: dict[str, Any], **more: Any) -> Any:
    """Run a model with TRL's fused head; the outputs begin with the second token."""
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    return model(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        labels=labels,
        use_cache=False,
        fused_lm_head=True,
        **more,
    )


def mask_of(inputs: dict[str, Any]) -> Tensor:
    """The tokens that train, from the second on; bool of shape (sequences, width - 1)."""
    return inputs["completion_mask"][:, 1:].bool()


def token_sums(outputs: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Sums over the trained tokens of each sequence, float32, and how many tokens there are.

    `logps` keeps its gradient. Prompt-learning adapters put positions in front, which are left out.
    """
    mask = mask_of(inputs)
    width = mask.shape[1]
    given = {
        "entropy": outputs.entropy,
        "logits": outputs.mean_logits,
        "right": outputs.is_top1,
    }
    found = {
        name: torch.where(mask, part[:, -width:].detach(), 0).float().sum(dim=1)
        for name, part in given.items()
        if part is not None
    }
    return found | {
        "logps": outputs.log_probs[:, -width:].float().sum(dim=1),
        "trained": mask.sum(dim=1).float(),
        "tokens": inputs["attention_mask"].sum(dim=1).float(),
    }


def in_pairs(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sums of two replies side by side: `chosen_logps` and `rejected_logps`, and so on."""
    pairs = {}
    for name, part in sums.items():
        pairs[f"chosen_{name}"], pairs[f"rejected_{name}"] = part.chunk(2)
    tokens = pairs.pop("chosen_tokens") + pairs.pop("rejected_tokens")
    counts = {f"{side}_tokens": pairs.pop(f"{side}_trained") for side in ("chosen", "rejected")}
    return pairs | counts | {"tokens": tokens}


def count_pairs(inputs: Any) -> Tensor:
    """The real pairs of a batch, and the trained tokens of their better replies: shape (2,)."""
    real = inputs["real"]
    trained = inputs["completion_mask"][: len(real), 1:].sum(dim=1)
    return torch.stack([real.sum(), trained[real].sum()]).float()
