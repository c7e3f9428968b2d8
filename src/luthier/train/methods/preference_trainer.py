"""What the trainers of judged replies share: losses of a whole step, metrics of a whole set."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor

from luthier.config.schema import RunConfig
from luthier.data.batching.preference_collators import PreferenceCollator, PreferenceDataset
from luthier.data.batching.samplers import SampledDataset, Sampler
from luthier.data.batching.settings import BatchingSettings, read_batching_settings
from luthier.data.batching.token_rows import TokenRows
from luthier.data.prepare import PreparedData
from luthier.errors import UserError
from luthier.model.device import Machine
from luthier.model.load import load_model
from luthier.train.arguments import build_trainer_arguments
from luthier.train.methods.labelled import evaluation_rows
from luthier.train.methods.method import TrainerInputs
from luthier.train.trainers.base import LoaderMixin, keep_weight_precision

RowScores = dict[str, Tensor]
"""What a forward pass says of each row of a batch, by name; each has the shape (rows,)."""


class LossTerms(NamedTuple):
    """What a loss is the sum of; each has the shape (rows,), or is a plain zero."""

    rows: Tensor | float
    """Numbers of which the loss has the mean over all rows."""
    tokens: Tensor | float = 0.0
    """Sums over the tokens of the better replies: the loss has the mean over all such tokens."""


class PlaceholderDataset(Dataset):
    """Stands in for rows that are tokens already, where TRL wants a dataset to prepare."""

    def map(self, *args: Any, **kwargs: Any) -> "PlaceholderDataset":
        """Leave the rows as they are."""
        return self


class PreferenceTrainerMixin(LoaderMixin):
    """Stands before a trainer of TRL: `class Mine(PreferenceTrainerMixin, DPOTrainer)`.

    The loss is a mean over rows (pairs, or replies with a verdict), and where it has a part by
    token, over tokens: of the whole step in training (all micro-batches and ranks), of the whole
    set in evaluation. So neither the batch size, nor gradient accumulation, nor the number of
    processes changes it. Metrics are taken over all rows since the last line of the log, or over
    the whole set.
    """

    # compute_loss divides by the step's rows itself.
    loss_is_scaled_for_ga = True
    collator_class: type[PreferenceCollator]

    def __init__(
        self,
        model: Any,
        *,
        args: Any,
        train_dataset: TokenRows,
        eval_dataset: TokenRows | dict[str, TokenRows] | None,
        batching: BatchingSettings,
        processing_class: Any,
        **kwargs: Any,
    ) -> None:
        """Take what the trainer takes, with rows of a table as datasets."""
        self.batching = batching
        self._since_log: list[RowScores] = []
        self._evaluated: list[RowScores] = []
        self._tokens_seen = 0
        nothing = PlaceholderDataset.from_dict(
            {name: [""] for name in ("prompt", "chosen", "rejected")}
        )
        with keep_weight_precision(model), _in_words():
            super().__init__(
                model=model,
                args=args,
                train_dataset=nothing,
                eval_dataset=None if eval_dataset is None else nothing,
                data_collator=self.collator_class(
                    processing_class.pad_token_id,
                    batching.length if batching.constant else None,
                    vars(args).get("pad_to_multiple_of"),
                ),
                processing_class=processing_class,
                **kwargs,
            )
        self.train_dataset = train_dataset
        self.eval_dataset = eval_dataset
        self.model_accepts_loss_kwargs = True

    def score_rows(self, model: Any, inputs: dict[str, Any]) -> RowScores:
        """What the model, and the reference if there is one, say of each row of a batch.

        `chosen_tokens` counts the tokens that `Terms.tokens` sums over, `tokens` all that are read.
        """
        raise NotImplementedError

    def loss_terms(self, scores: RowScores) -> LossTerms:
        """The loss of each row."""
        raise NotImplementedError

    def aggregate_metrics(self, scores: RowScores) -> dict[str, float]:
        """The metrics of all rows."""
        raise NotImplementedError

    def count_items(self, inputs: Mapping[str, Any]) -> Tensor:
        """The rows of a batch, and the tokens that `Terms.tokens` sums over: shape (2,)."""
        raise NotImplementedError

    def router_loss(self) -> Tensor | float:
        """What the last forward pass adds to the loss of a step for balanced experts."""
        return 0.0

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Leave rows as they are: they are tokens."""
        return dataset

    def order_rows(self, sampler: Sampler, is_training: bool) -> SampledDataset:
        """The rows as they are, each with its partner."""
        return PreferenceDataset(sampler)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Tensor:
        """The counts of a step, over all its batches and all processes."""
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
        loss = _sum(self.loss_terms(scores), scores, counts.clamp(min=1))
        if num_items_in_batch is not None:
            # DDP averages gradients over ranks, and the counts are of all of them.
            loss = loss * self.accelerator.num_processes
            loss = loss + self.router_loss() / self.current_gradient_accumulation_steps
        kept = {name: part.detach() for name, part in scores.items()}
        (self._since_log if self.model.training else self._evaluated).append(kept)
        return (loss, {}) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None, None]:
        """Take the scores of a batch; there are no labels to give back."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as Trainer does, with loss and metrics of the whole set."""
        self._evaluated.clear()
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        scores = self._of_all(self._evaluated)
        if len(scores["real"]):
            measured = self.aggregate_metrics(scores)
            measured["loss"] = _mean(self.loss_terms(scores), scores)
            output.metrics.update({f"{prefix}_{n}": value for n, value in measured.items()})
        return output

    def _of_all(self, batches: list[RowScores]) -> RowScores:
        """The scores of all real rows of some batches of all ranks; no row is there twice."""
        real = torch.cat([scores["real"] for scores in batches]).bool()
        own = {name: torch.cat([s[name] for s in batches])[real] for name in batches[0]}
        if self.accelerator.num_processes == 1:
            return own
        ranks = gather_object([{name: part.cpu() for name, part in own.items()}])
        return {
            name: torch.cat([rank[name] for rank in ranks]).to(part.device)
            for name, part in own.items()
        }

    def counter_state(self) -> dict[str, Any]:
        """What was counted, with the scores of the rows since the last line of the log."""
        names = self._since_log[0] if self._since_log else ()
        joined = {name: torch.cat([s[name] for s in self._since_log]) for name in names}
        scores = {name: [str(part.dtype), part.tolist()] for name, part in joined.items()}
        return super().counter_state() | {"scores": scores, "tokens_seen": self._tokens_seen}

    def load_counter_state(self, counted: dict[str, Any]) -> None:
        """Go on counting from there."""
        super().load_counter_state(counted)
        self._tokens_seen = counted["tokens_seen"]
        scores = {
            name: torch.tensor(
                values,
                dtype=getattr(torch, dtype.removeprefix("torch.")),
                device=self.args.device,
            )
            for name, (dtype, values) in counted["scores"].items()
        }
        self._since_log = [scores] if scores else []

    def add_log_means(self, logs: dict[str, float]) -> None:
        """Add the metrics of the rows since the last line of the log."""
        if not self._since_log:
            return
        scores = self._of_all(self._since_log)
        self._since_log.clear()
        self._tokens_seen += int(scores["tokens"].sum())
        logs |= self.aggregate_metrics(scores) if len(scores["real"]) else {}
        logs["num_tokens"] = self._tokens_seen


@contextmanager
def _in_words() -> Iterator[None]:
    """Pass on what TRL and peft say of settings that do not go together."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"trainer.args and lora, as TRL has them: {error}") from error


def _sum(terms: LossTerms, scores: RowScores, counts: Tensor) -> Tensor:
    """The loss: sums over real rows by the counts."""
    real = scores["real"]
    parts = [
        torch.where(real, part, 0).sum() / count
        for part, count in zip(terms, counts, strict=True)
        if isinstance(part, Tensor)
    ]
    return torch.stack(parts).sum()


def _mean(terms: LossTerms, scores: RowScores) -> float:
    """The loss of a whole set, added up in float64."""
    parts = [mean_over_rows(terms.rows)] if isinstance(terms.rows, Tensor) else []
    if isinstance(terms.tokens, Tensor):
        parts.append(mean_over_tokens(terms.tokens, scores["chosen_tokens"]))
    return sum(parts)


def mean_over_rows(part: Tensor, where: Tensor | None = None) -> float:
    """The mean over all rows, or over those where something holds; 0 if there are none."""
    part = part if where is None else part[where]
    return float(part.cpu().double().sum()) / max(len(part), 1)


def mean_over_tokens(sums: Tensor, counts: Tensor) -> float:
    """A mean over tokens, from the sums and the counts of all rows."""
    return float(sums.cpu().double().sum()) / max(float(counts.cpu().double().sum()), 1)


# What a language model says of the replies in a batch, summed over the tokens that train.

FUSED_HEAD_OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")
"""What TRL's fused language-model head is to give for each token."""


def forward_fused(model: Any, inputs: dict[str, Any], **more: Any) -> Any:
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


def completion_mask(inputs: dict[str, Any]) -> Tensor:
    """The tokens that train, from the second on; bool of shape (sequences, width - 1)."""
    return inputs["completion_mask"][:, 1:].bool()


def sum_token_outputs(outputs: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Sums over the trained tokens of each sequence, float32, and how many tokens there are.

    `logps` keeps its gradient. Prompt-learning adapters put positions in front, which are left out.
    """
    mask = completion_mask(inputs)
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


def split_pairs(sums: dict[str, Tensor]) -> dict[str, Tensor]:
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


# What the methods share that train on replies which are judged.


class PreferenceMethod:
    """A method whose rows are two replies to one prompt."""

    make: ClassVar[Any]
    """The class of the trainer's arguments."""
    reference: Any = None
    """The model that the trained one is compared with, if it is one of its own."""

    def own(self, config: RunConfig) -> dict[str, Any]:
        """What the arguments must say besides."""
        return {"max_length": None}

    def build_arguments(
        self, config: RunConfig, machine: Machine, folder: Path, has_eval: bool
    ) -> Any:
        """The trainer's arguments."""
        own = {"remove_unused_columns": False} | self.own(config)
        return build_trainer_arguments(self.make, config, machine, folder, has_eval, own)

    def load_model(self, config: RunConfig, machine: Machine, prepared: PreparedData) -> Any:
        """A causal language model."""
        return load_model(
            config.model, config.quantization, machine, full=not config.lora.is_enabled
        )

    def common(self, given: TrainerInputs) -> dict[str, Any]:
        """What every trainer takes."""
        return {
            "model": given.model,
            "args": given.args,
            "train_dataset": given.prepared.train,
            "eval_dataset": evaluation_rows(given.prepared.eval),
            "batching": read_batching_settings(given.config),
            "processing_class": given.tokenizer,
            "callbacks": given.callbacks,
        }
