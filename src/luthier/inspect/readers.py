"""The reader of each source: what makes sequences of its rows."""

from typing import TYPE_CHECKING, Any

from luthier.config.methods import METHODS
from luthier.config.schema import RunConfig
from luthier.data.examples import Opened
from luthier.inspect.rows import RowReader

if TYPE_CHECKING:
    from luthier.inspect.conversations import ConversationReader


class Readers:
    """The readers under the settings of a config; sources that train alike share one."""

    def __init__(self, tokenizer: Any, config: RunConfig, end_tokens: list[int]) -> None:
        """`end_tokens`: those of the model's generation config."""
        self._tokenizer = tokenizer
        self._config = config
        self._end_tokens = end_tokens
        self._conversations: dict[str, ConversationReader] = {}

    def of(self, opened: Opened) -> RowReader:
        """The reader of a source."""
        facts = METHODS[self._config.trainer.method]
        if opened.shape.kind == "conversation" and (facts.rewards or facts.teacher):
            return self._prompts()
        if opened.shape.kind == "conversation":
            return self.conversations(opened)
        from luthier.inspect.documents import DocumentReader

        config = self._config
        return DocumentReader(self._tokenizer, config.chat.max_length, config.dataset.stride)

    def _prompts(self) -> RowReader:
        from luthier.data.encoders.prompts import longest_prompt
        from luthier.inspect.prompts import PromptReader

        config = self._config
        return PromptReader(self._tokenizer, config.chat, self._end_tokens, longest_prompt(config))

    def conversations(self, opened: Opened) -> "ConversationReader":
        """The reader of a source of conversations, with the turns that the source says train."""
        from luthier.inspect.conversations import ConversationReader

        chat, own = self._config.chat, opened.config.train_on
        train_on = chat.train_on if own is None else own
        if repr(train_on) not in self._conversations:
            settings = chat.model_copy(update={"train_on": train_on})
            self._conversations[repr(train_on)] = ConversationReader(
                self._tokenizer, settings, self._end_tokens
            )
        return self._conversations[repr(train_on)]
