"""What is known about one template: how it renders, steers, plans and labels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from luthier.chat.control import Controls
from luthier.chat.errors import ChatError
from luthier.chat.forms import Forms
from luthier.chat.labels import Labeller
from luthier.chat.planning import Planner
from luthier.chat.template import ChatTemplate, template_text
from luthier.chat.tokens import TokenEncoder
from luthier.chat.tracks import Tracks


@dataclass(frozen=True, slots=True)
class Kit:
    """All that works on the rows of one template."""

    template: ChatTemplate
    controls: Controls
    planner: Planner
    labeller: Labeller
    forms: Forms
    tracks: Tracks


class Kits:
    """The kits of a tokenizer's templates; each is made when it is first asked for."""

    def __init__(
        self,
        tokenizer: Any,
        template: str | dict[str, str] | None,
        variables: dict[str, Any],
        date: str,
        eos_token_ids: Iterable[int],
        boundaries: Literal["served", "segments"],
        train_on: str | list[str],
    ) -> None:
        self.sources = _template_sources(tokenizer, template)
        self._tokens = TokenEncoder(tokenizer)
        self._variables = {**tokenizer.special_tokens_map, **variables}
        self._date = date
        self._eos_token_ids = list(eos_token_ids)
        self._boundaries = boundaries
        self._train_on = train_on
        self._made: dict[str, Kit] = {}
        self.default = self.of(None)

    def of(self, tools: list | None) -> Kit:
        """The kit for rows with these tools, or without any."""
        name = "tool_use" if tools and "tool_use" in self.sources else "default"
        if name not in self._made:
            self._made[name] = self._make(self.sources[name])
        return self._made[name]

    def _make(self, source: str) -> Kit:
        template = ChatTemplate(source, self._variables, self._date)
        controls = Controls(template, self._tokens, self._eos_token_ids)
        labeller = Labeller(self._tokens, controls, self._boundaries)
        return Kit(
            template,
            controls,
            Planner(template, controls),
            labeller,
            Forms(template, controls, self._train_on),
            Tracks(self._tokens, labeller),
        )


def _template_sources(tokenizer: Any, template: str | dict[str, str] | None) -> dict[str, str]:
    """The text of each template by its name; `default` is always there."""
    if isinstance(template, str):
        return {"default": template_text(template)}
    own = template if template is not None else tokenizer.chat_template
    if own is None:
        raise ChatError(
            "the tokenizer has no chat template; give one as Jinja text or a file "
            "(`chat.template=path/to/template.jinja`)",
            reason="no template",
        )
    if isinstance(own, str):
        return {"default": own}
    return {"default": own.get("default", next(iter(own.values()))), **own}
