"""A classifier, a tagger or a reward model, loaded within a `with` block and measured."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.config.schema import RunConfig
from luthier.data.encoders.plain_text import OnLong
from luthier.data.encoders.preference import RewardEncoder
from luthier.data.encoders.tasks import ClassificationEncoder, TaggingEncoder
from luthier.data.examples import Opened, Placed
from luthier.evaluate.batching import by_length
from luthier.evaluate.items import Item, Items
from luthier.evaluate.outcome import Outcome
from luthier.evaluate.sets import Set
from luthier.evaluate.written import encoded, lenient, lenient_length
from luthier.infer.llm import Packing, packing_of
from luthier.model.artifact import Artefact, encoder_of

if TYPE_CHECKING:
    from luthier.evaluate.heads import Head


class DecidedMaker:
    """Makes items of rows that a head decides."""

    def __init__(self, head: "Head", encoder: Any) -> None:
        """`encoder`: that of the training's rows."""
        self.kinds: Sequence[str] = (head.kind,)
        self._head, self._encoder = head, encoder

    def add(self, found: Items, opened: Opened, placed: Iterable[Placed]) -> None:
        """Add the items of rows of one source; UserError for a label that the model has not."""
        read = (row._replace(example=self._head.read(row.where, row.example)) for row in placed)
        for row, values in encoded(self._encoder, found, read):
            columns = {n: np.asarray(v) if isinstance(v, list) else v for n, v in values.items()}
            found.rows.append(Item(row.where, [], self._head.question(row.example), columns))


class Decider:
    """Says the labels, tags or scores of rows, as `LLM` says replies; takes the same settings."""

    def __init__(
        self,
        artefact: Artefact,
        *,
        device_map: str | dict[str, Any] | None = None,
        quantization: Packing = "trained",
        **given: Any,
    ) -> None:
        """`artefact`: one whose task has a head."""
        self.artefact = artefact
        self._packing = packing_of(quantization)
        self._own = {} if device_map is None else {"device_map": device_map}
        self._given = given
        self._stack = ExitStack()

    def __enter__(self) -> "Decider":
        from luthier.infer.llm import opening

        found = opening(self.artefact, self._given)
        self.artefact, _, self.tokenizer = found
        self.model = found.model(self._packing, self._own)
        self._stack.callback(self._release)
        # By this token models find the end of a row.
        self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        self.head = self._head()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def maker(self, config: RunConfig | None) -> DecidedMaker:
        """What makes the rows of a run, or of a dataset, for it; `config`: that of the run."""
        if self.head.kind == "preference":
            chat = lenient(encoder_of(self.artefact, self.tokenizer).settings())
            return DecidedMaker(self.head, RewardEncoder(self.tokenizer, chat))
        own: OnLong = "turns" if config is None else lenient_length(config.chat.on_long)
        bounds = [self._positions(), None if config is None else config.chat.max_length]
        longest = min((bound for bound in bounds if bound is not None), default=None)
        make = ClassificationEncoder if self.head.kind == "classification" else TaggingEncoder
        return DecidedMaker(self.head, make(self.tokenizer, longest, own))

    def set_of(self, items: Items, metrics: Any, config: RunConfig | None) -> Set:
        """The rows, scored by what it decides."""
        return Set(items, [], self.head.better)

    @property
    def alphabet(self) -> Any:
        """What another model must share for its loss to be of the same: labels."""
        return self.head.names

    def measure(self, each: Set, settings: dict[str, Any]) -> Outcome:
        """Decide all rows, the longest first, and score them."""
        import torch
        from tqdm import tqdm

        items = each.items.rows
        rows: list[Mapping[str, Any]] = [item.values for item in items]
        losses, said = np.zeros((len(rows), 2)), list[Any](rows)
        pad = int(self.tokenizer.pad_token_id)
        bar = tqdm(total=len(rows), desc="rows", leave=False, disable=None)
        with torch.inference_mode(), bar:
            for batch in by_length([self.head.length(row) for row in rows]):
                found = self.head.losses(self.model, [rows[n] for n in batch], pad)
                for number, loss, one in zip(batch, found.sums, found.predicted, strict=True):
                    losses[number] = loss.item(), self.head.answers(rows[number])
                    said[number] = one.tolist()
                bar.update(len(batch))
        scored, texts = self.head.score(items, said)
        return Outcome(losses, texts, scored, has_perplexity=False)

    def _head(self) -> "Head":
        from luthier.evaluate.heads import Classes, Rewards, Tags
        from luthier.train.methods.heads import labels_of

        if self.artefact.is_reward:
            return Rewards()
        labels = labels_of(self.model.config)
        return Classes(labels) if self.artefact.task == "SEQ_CLS" else Tags(labels)

    def _positions(self) -> int | None:
        from luthier.train.methods.heads import positions
        from luthier.train.methods.labelled import base_of

        return positions(base_of(self.model))

    def _release(self) -> None:
        from luthier.infer.generate import release

        self.model = None
        release()
