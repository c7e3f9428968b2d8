"""Rows of one form share a plan: the same token ids as without it, several times as fast.

`FastPath` is the one seam to the rest of `luthier.chat`: a row that `match` gives None for, or that
`encode` gives None for, goes the plain way. A test holds both ways against each other.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from luthier.chat.control_tokens import ControlTokens
from luthier.chat.fast_path.plans import FastPathEncoder, FastPathRow, FormCache
from luthier.chat.labels import LabelBuilder
from luthier.chat.template import ChatTemplate
from luthier.chat.tokens import TokenEncoder
from luthier.chat.types import ChatSequence


class FastPath:
    """The fast path of one template with one tokenizer."""

    def __init__(
        self,
        template: ChatTemplate,
        controls: ControlTokens,
        tokens: TokenEncoder,
        label_builder: LabelBuilder,
        train_on: str | list[str],
        allows_roles: Callable[[Iterable[str]], bool],
    ) -> None:
        """`allows_roles`: whether messages may have these roles; other rows never match."""
        self._arguments = (tokens, train_on, allows_roles)
        self._forms = FormCache(template, controls, train_on, allows_roles)
        self._encoder = FastPathEncoder(tokens, label_builder)

    def with_template(
        self, template: ChatTemplate, controls: ControlTokens, label_builder: LabelBuilder
    ) -> "FastPath":
        """Return the fast path of this template with other variables, which has its own plans."""
        tokens, train_on, allows_roles = self._arguments
        other = FastPath(template, controls, tokens, label_builder, train_on, allows_roles)
        symbolic_template = self._forms.symbolic_template
        other._forms.symbolic_template = symbolic_template.with_variables(template.variables)
        return other

    def match(self, row: dict[str, Any]) -> FastPathRow | None:
        """Return the row with the plan of its form; None where it must be planned for itself."""
        return self._forms.match(row)

    def encode(self, rows: Sequence[FastPathRow]) -> list[list[ChatSequence] | None]:
        """Return the sequences of each row; None for a row whose text needs a closer look."""
        return self._encoder.encode(rows)
