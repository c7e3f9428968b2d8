"""What the trainers of preferences and ratings share: losses of a step, metrics of a set."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor

from luthier.config.schema import RunConfig
from luthier.data.batching.image_collators import ImageInputs
from luthier.data.batching.preference_collators import (
    PairCollator,
    PreferenceCollator,
    PreferenceDataset,
)
from luthier.data.batching.samplers import SampledDataset, Sampler
from luthier.data.batching.settings import BatchingSettings
from luthier.data.batching.token_rows import TokenRows
from luthier.data.prepare import PreparedData
from luthier.errors import UserError
from luthier.model.device import Machine
from luthier.train.methods.method import TrainingMethod
from luthier.train.methods.reference_model import (
    check_reference_settings,
    copy_adapter_undrawn,
    drop_unchanged_copy,
    load_reference_model,
    precompute_all_scores,
    precompute_scores,
    set_copy_aside,
)
from luthier.train.trainers.base import TrainerMixin, keep_weight_precision

RowScores = dict[str, Tensor]
"""What a forward pass yields for each row of a batch, by name; each has the shape (rows,)."""
FUSED_HEAD_OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")
"""What TRL's fused language-model head is to return for each token."""


class LossTerms(NamedTuple):
    """What a loss is the sum of; each has the shape (rows,), or is a plain zero."""

    rows: Tensor | float
    """RowTuple of which the loss has the mean over all rows."""
    tokens: Tensor | float = 0.0
    """Sums over the tokens of the better replies: the loss has the mean over all such tokens."""


class PlaceholderDataset(Dataset):
    """Stands in for rows that are tokens already, where TRL wants a dataset to prepare."""

    def map(self, *args: Any, **kwargs: Any) -> "PlaceholderDataset":
        """Leave the rows as they are."""
        return self


class PreferenceMethod(TrainingMethod):
    """A method whose rows are two replies to one prompt, or replies with a rating."""

    def required_arguments(self, config: RunConfig) -> dict[str, Any]:
        """Rows keep their columns, and come cut to their length."""
        return {"remove_unused_columns": False, "max_length": None}


class ReferenceMethod(PreferenceMethod):
    """A method whose loss compares the model with what it was before training."""

    def build_arguments(
        self, config: RunConfig, machine: Machine, folder: Path, has_eval: bool
    ) -> Any:
        """Return the arguments; UserError for an adapter that the reference would have, too."""
        args = super().build_arguments(config, machine, folder, has_eval)
        check_reference_settings(config)
        return args

    def load_model(self, config: RunConfig, machine: Machine, prepared: PreparedData) -> Any:
        """Return a causal language model, and load its reference where that is a model too."""
        self.reference_model = load_reference_model(config, machine)
        return super().load_model(config, machine, prepared)


class PreferenceTrainerMixin(TrainerMixin):
    """Stands before a trainer of TRL: `LuthierDPOTrainer(PreferenceTrainerMixin, DPOTrainer)`.

    The loss is a mean over rows (pairs, or replies with a rating), and where it has a part by
    token, over tokens: of the whole step in training (all micro-batches and ranks), of the whole
    set in evaluation. So neither the batch size, nor gradient accumulation, nor the number of
    processes changes it. Metrics are taken over all rows since the last line of the log, or over
    the whole set.
    """

    # compute_loss divides by the step's rows itself, and gathers their number from all ranks.
    loss_is_scaled_for_ga = True
    counts_all_ranks = True
    # Pairs of replies; trainers of other rows set their own.
    collator_class: type[PreferenceCollator] = PairCollator
    result_metrics: tuple[str, ...] = ("rewards/accuracies", "rewards/margins")
    reference_columns: tuple[str, ...] = ()
    """The columns in which a batch has what the reference says; empty without a reference."""
    aux_loss_enabled: bool
    """Whether the model is one of experts, whose router has a loss; set by TRL."""
    router_aux_loss_coef: float
    """The weight of the router's loss; set by TRL."""

    def __init__(
        self,
        model: Any,
        *,
        args: Any,
        train_dataset: TokenRows,
        eval_dataset: TokenRows | dict[str, TokenRows] | None,
        batching: BatchingSettings,
        processing_class: Any,
        images: ImageInputs | None = None,
        **kwargs: Any,
    ) -> None:
        """Take what the trainer takes, with rows of a table as datasets.

        `images` makes the inputs of pictures, for rows that have some.
        """
        self.batching = batching
        self._scores_since_log: list[RowScores] = []
        self._eval_scores: list[RowScores] = []
        self._tokens_seen = 0
        self._router_loss: Tensor | None = None
        # TRL 1.16 reads the columns of a dataset and prepares its rows when a trainer is built.
        # These rows are tokens already, so it gets others, and the true ones are set behind that.
        placeholder = PlaceholderDataset.from_dict(
            {name: [""] for name in ("prompt", "chosen", "rejected")}
        )
        copying = copy_adapter_undrawn(model) if self.reference_columns else nullcontext()
        with copying, keep_weight_precision(model), _trl_errors_as_user_errors():
            super().__init__(
                model=model,
                args=args,
                train_dataset=placeholder,
                eval_dataset=None if eval_dataset is None else placeholder,
                data_collator=self.collator_class(
                    processing_class.pad_token_id,
                    batching.length if batching.constant else None,
                    vars(args).get("pad_to_multiple_of"),
                    images,
                ),
                processing_class=processing_class,
                **kwargs,
            )
        self.train_dataset = train_dataset
        self.eval_dataset = eval_dataset
        self.model_accepts_loss_kwargs = True
        if self.reference_columns:
            drop_unchanged_copy(self.model)
            if args.precompute_ref_log_probs:
                precompute_all_scores(self)

    # What a trainer of this family defines.

    def score_rows(self, model: Any, inputs: dict[str, Any]) -> RowScores:
        """What the model, and the reference if there is one, say of each row of a batch.

        `chosen_tokens` counts the tokens that `LossTerms.tokens` sums over, `tokens` all that are
        read. As it stands here: the log-probabilities of both replies of pairs.
        """
        return split_pairs(sum_token_outputs(self.forward_with_router(model, inputs), inputs))

    def score_reference(self, inputs: dict[str, Any]) -> RowScores:
        """What the reference says of each row of a batch, by the names of `reference_columns`."""
        raise NotImplementedError

    def loss_terms(self, scores: RowScores) -> LossTerms:
        """The loss of each row."""
        raise NotImplementedError

    def aggregate_metrics(self, scores: RowScores) -> dict[str, float]:
        """The metrics over all rows."""
        raise NotImplementedError

    def count_items(self, inputs: Mapping[str, Any]) -> Tensor:
        """The rows of a batch, and the tokens that `LossTerms.tokens` sums over: shape (2,).

        As it stands here: the real pairs, and the trained tokens of their better replies.
        """
        real = inputs["real"]
        trained = inputs["completion_mask"][: len(real), 1:].sum(dim=1)
        return torch.stack([real.sum(), trained[real].sum()]).float()

    # Training.

    def order_rows(self, sampler: Sampler, is_training: bool) -> SampledDataset:
        """The rows as they are, each with its partner."""
        return PreferenceDataset(sampler)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Leave rows as they are: they are tokens."""
        return dataset

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """The rows with what the reference says of each, where TRL asks for it."""
        if isinstance(dataset, PlaceholderDataset):
            return dataset
        return precompute_scores(self, dataset, name, batch_size)

    def forward_with_router(self, model: Any, inputs: dict[str, Any]) -> Any:
        """Run the model, and remember the router's loss of a model of experts."""
        settings = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs = forward_fused(model, inputs, **settings)
        self._router_loss = outputs.aux_loss if self.aux_loss_enabled else None
        return outputs

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Tensor:
        """The counts of a step, over all its batches and all processes."""
        # Trainer counts labels here; this loss is divided by rows, and by tokens of better replies.
        zero = torch.zeros(2, device=device)
        counts = sum((self.count_items(batch).to(device) for batch in batch_samples), zero)
        return self.accelerator.gather(counts[None]).sum(dim=0)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Sum the loss over the rows and tokens of a step, which all ranks count together."""
        counts = self.count_items(inputs) if num_items_in_batch is None else num_items_in_batch
        scores = self.score_rows(model, dict(inputs)) | {"real": inputs["real"]}
        loss = _divide_terms(self.loss_terms(scores), scores["real"], counts.clamp(min=1))
        loss = self._scale_over_ranks(loss, num_items_in_batch)
        # The batch is the whole step: `build_trainer_arguments` and the config's checks see to it.
        if num_items_in_batch is not None and self._router_loss is not None:
            loss = loss + self.router_aux_loss_coef * self._router_loss
        batches = self._scores_since_log if self.model.training else self._eval_scores
        batches.append({name: values.detach() for name, values in scores.items()})
        return (loss, {}) if return_outputs else loss

    # Evaluation and logs.

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None, None]:
        """Take the scores of a batch; there are no labels to give back."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as Trainer does, with loss and metrics of the whole set."""
        self._eval_scores.clear()
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        scores = self._join_over_ranks(self._eval_scores)
        if len(scores["real"]):
            metrics = self.aggregate_metrics(scores)
            metrics["loss"] = _mean_terms(self.loss_terms(scores), scores)
            output.metrics.update({f"{prefix}_{n}": value for n, value in metrics.items()})
        return output

    def _join_over_ranks(self, batches: list[RowScores]) -> RowScores:
        """The scores of all real rows of some batches of all ranks; no row is there twice."""
        # Rows that only fill up a batch are left out here, for the loss and for all metrics.
        real = torch.cat([scores["real"] for scores in batches]).bool()
        joined = {name: torch.cat([s[name] for s in batches])[real] for name in batches[0]}
        if self.accelerator.num_processes == 1:
            return joined
        ranks = gather_object([{name: values.cpu() for name, values in joined.items()}])
        return {
            name: torch.cat([rank[name] for rank in ranks]).to(values.device)
            for name, values in joined.items()
        }

    def add_log_means(self, logs: dict[str, float]) -> None:
        """Add the metrics of the rows since the last line of the log."""
        if not self._scores_since_log:
            return
        scores = self._join_over_ranks(self._scores_since_log)
        self._scores_since_log.clear()
        self._tokens_seen += int(scores["tokens"].sum())
        logs |= self.aggregate_metrics(scores) if len(scores["real"]) else {}
        logs["num_tokens"] = self._tokens_seen

    # Checkpoints.

    def counter_state(self) -> dict[str, Any]:
        """The counters, with the scores of the rows since the last line of the log."""
        # JSON has no number formats, so each column goes with its own.
        batches = self._scores_since_log
        joined = {n: torch.cat([s[n] for s in batches]) for n in (batches[0] if batches else ())}
        scores = {name: [str(values.dtype), values.tolist()] for name, values in joined.items()}
        return super().counter_state() | {"scores": scores, "tokens_seen": self._tokens_seen}

    def load_counter_state(self, state: dict[str, Any]) -> None:
        """Count on from what `counter_state` returned."""
        super().load_counter_state(state)
        self._tokens_seen = state["tokens_seen"]
        scores = {
            name: torch.tensor(
                values,
                dtype=getattr(torch, dtype.removeprefix("torch.")),
                device=self.args.device,
            )
            for name, (dtype, values) in state["scores"].items()
        }
        self._scores_since_log = [scores] if scores else []

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save as Trainer does, without TRL's copy of the adapter, which each start makes anew."""
        with set_copy_aside(self.accelerator.unwrap_model(self.model)):
            super()._save(output_dir, state_dict)


@contextmanager
def _trl_errors_as_user_errors() -> Iterator[None]:
    """Pass on what TRL and peft say of settings that do not go together."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"trainer.args and lora, as TRL has them: {error}") from error


def _divide_terms(terms: LossTerms, real: Tensor, counts: Tensor) -> Tensor:
    """The loss of a batch: the sums of both terms over the real rows, each by its count."""
    # `where` and no product: what is not finite in a row that fills up the batch must not count.
    quotients = [
        torch.where(real, term, 0).sum() / count
        for term, count in zip(terms, counts, strict=True)
        if isinstance(term, Tensor)
    ]
    return torch.stack(quotients).sum()


def _mean_terms(terms: LossTerms, scores: RowScores) -> float:
    """The loss of a whole set, added up in float64."""
    means = [mean_over_rows(terms.rows)] if isinstance(terms.rows, Tensor) else []
    if isinstance(terms.tokens, Tensor):
        means.append(mean_over_tokens(terms.tokens, scores["chosen_tokens"]))
    return sum(means)


def mean_over_rows(values: Tensor, where: Tensor | None = None) -> float:
    """The mean over all rows, or over those where a mask is true; 0 if there are none."""
    values = values if where is None else values[where]
    return float(values.cpu().double().sum()) / max(len(values), 1)


def mean_over_tokens(sums: Tensor, counts: Tensor) -> float:
    """The mean over tokens, from the sums and the token counts of all rows; 0 without tokens."""
    return float(sums.cpu().double().sum()) / max(float(counts.cpu().double().sum()), 1)


def count_rows(inputs: Mapping[str, Any]) -> Tensor:
    """The real rows of a batch, for a loss without a part by token: shape (2,), the second 0."""
    real = inputs["real"].sum()
    return torch.stack([real, torch.zeros_like(real)]).float()


def forward_fused(model: Any, inputs: dict[str, Any], **settings: Any) -> Any:
    """Run a model with TRL's fused head; the outputs begin with the second token."""
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    return model(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        labels=labels,
        use_cache=False,
        fused_lm_head=True,
        **inputs.get("image_inputs", {}),
        **settings,
    )


def completion_mask(inputs: dict[str, Any]) -> Tensor:
    """The tokens that train, from the second on; bool of shape (sequences, width - 1)."""
    return inputs["completion_mask"][:, 1:].bool()


def sum_token_outputs(outputs: Any, inputs: dict[str, Any]) -> RowScores:
    """Sums over the trained tokens of each sequence, float32, and how many tokens there are.

    `logps` keeps its gradient.
    """
    mask = completion_mask(inputs)
    # Prompt-learning adapters of peft put positions in front, which are left out.
    width = mask.shape[1]
    token_outputs = {
        "entropy": outputs.entropy,
        "logits": outputs.mean_logits,
        "right": outputs.is_top1,
    }
    sums = {
        name: torch.where(mask, values[:, -width:].detach(), 0).float().sum(dim=1)
        for name, values in token_outputs.items()
        if values is not None
    }
    return sums | {
        "logps": outputs.log_probs[:, -width:].float().sum(dim=1),
        "trained": mask.sum(dim=1).float(),
        "tokens": inputs["attention_mask"].sum(dim=1).float(),
    }


def split_pairs(sums: RowScores) -> RowScores:
    """The sums of two replies side by side: `chosen_logps` and `rejected_logps`, and so on."""
    pairs = {}
    for name, values in sums.items():
        pairs[f"chosen_{name}"], pairs[f"rejected_{name}"] = values.chunk(2)
    tokens = pairs.pop("chosen_tokens") + pairs.pop("rejected_tokens")
    counts = {f"{side}_tokens": pairs.pop(f"{side}_trained") for side in ("chosen", "rejected")}
    return pairs | counts | {"tokens": tokens}


def pair_metrics(
    scores: RowScores, chosen_rewards: Tensor, rejected_rewards: Tensor
) -> dict[str, float]:
    """The metrics of pairs with these rewards, and of the tokens of their replies."""
    sides = ("chosen", "rejected")
    entropy = sum(scores[f"{side}_entropy"] for side in sides)
    trained = sum(scores[f"{side}_tokens"] for side in sides)
    logits = {
        f"logits/{side}": mean_over_tokens(scores[f"{side}_logits"], scores[f"{side}_tokens"])
        for side in sides
    }
    return logits | {
        "rewards/chosen": mean_over_rows(chosen_rewards),
        "rewards/rejected": mean_over_rows(rejected_rewards),
        "rewards/accuracies": mean_over_rows((chosen_rewards > rejected_rewards).float()),
        "rewards/margins": mean_over_rows(chosen_rewards - rejected_rewards),
        "entropy": mean_over_tokens(torch.as_tensor(entropy), torch.as_tensor(trained)),
        "mean_token_accuracy": mean_over_tokens(scores["chosen_right"], scores["chosen_tokens"]),
    }
