"""What TRL's trainers share whose model answers prompts: ids, stop tokens, order, whole weights."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from luthier.errors import UserError
from luthier.infer.dequantize import unpacked
from luthier.infer.generate import dense_head
from luthier.train.gathered import unsharded
from luthier.train.methods.prompted import PromptRows, PromptSampler
from luthier.train.methods.shared import Exact, precision_kept, recomputing_paused

if TYPE_CHECKING:
    from trl import GRPOTrainer as Base
else:
    Base = object


class Prompted(Exact, Base):
    """Stands before a trainer of TRL whose model answers prompts.

    The prompts are luthier's own ids, and what ends a completion are the template's stop tokens.
    Completions are drawn without dropout. Under FSDP2 the weights are gathered once for all tokens.
    """

    def __init__(
        self,
        *,
        model: Any,
        stop_ids: list[int],
        train_rows: PromptRows,
        eval_rows: Mapping[str, PromptRows],
        **kwargs: Any,
    ) -> None:
        """Take what TRL's trainer takes, with `PromptRows` as datasets, those of sets by name.

        `stop_ids`: the tokens that end a completion.
        """
        self._prompt_ids: list[list[int]] = []
        self._set = ""
        with precision_kept(model):
            super().__init__(
                model=model,
                # TRL takes no other kind of dataset.
                train_dataset=Dataset.from_dict({"prompt": [""]}),
                eval_dataset=dict(eval_rows) or None,
                **kwargs,
            )
        self.train_dataset = train_rows
        self._refuse_too_few()
        self._stop_at(stop_ids)

    def _refuse_too_few(self) -> None:
        """Stop where no step could ever be filled."""
        order = self._get_train_sampler()
        if not len(order):
            raise UserError(
                f"dataset: there are {order.num_samples} prompts, and the model answers "
                f"{order.batch_size} at once.\nSet a smaller "
                "trainer.args.per_device_train_batch_size or gradient_accumulation_steps."
            )

    def _stop_at(self, stop_ids: list[int]) -> None:
        """Let these tokens, and no others, end a completion."""
        self.eos_token_ids = stop_ids
        if self.use_vllm:
            given = self.vllm_generation.generation_kwargs or {}
            self.vllm_generation.generation_kwargs = given | {"stop_token_ids": stop_ids}
            return
        own = {"eos_token_id": stop_ids, "use_cache": True}
        self.generation_kwargs |= own
        self.generation_config.update(**own)

    def _get_train_sampler(self, dataset: Any = None) -> PromptSampler:
        return PromptSampler.like(super()._get_train_sampler(dataset))

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Answer prompts and score the answers; the prompts' ids go past TRL's own encoding."""
        self._prompt_ids = [row["prompt_ids"] for row in inputs]
        rows = [{key: row[key] for key in row if key != "prompt_ids"} for row in inputs]
        with recomputing_paused(self.model):
            return super()._generate_and_score_completions(rows)

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """The ids that the chat encoder made; neither images nor other fields."""
        return self._prompt_ids, None, {}

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        if self.use_vllm:
            return super()._generate_single_turn(*args, **kwargs)
        model: Any = self.accelerator.unwrap_model(self.model)
        was_training = self.model.training
        with ExitStack() as stack:
            if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version == 2:
                reshards = self.accelerator.state.fsdp_plugin.reshard_after_forward
                stack.enter_context(unsharded(model, reshards))
            stack.enter_context(unpacked(model))
            stack.enter_context(dense_head(model))
            self.model.eval()
            stack.callback(self.model.train, was_training)
            return super()._generate_single_turn(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate one set, whose name its measures will have."""
        self._set = kwargs["metric_key_prefix"].removeprefix("eval").removeprefix("_")
        return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; TRL has one name for what it measures in all evaluation sets."""
        if not self.model.training and self._set:
            means = self._metrics["eval"]
            for name in list(means):
                means[f"{self._set}_{name}"] = means.pop(name)
        super().log(logs, start_time)
