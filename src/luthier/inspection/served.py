"""`luthier check RUN --served`: what was saved, held against the tokens that it was trained on."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from itertools import islice
from typing import Any

from luthier.chat import ChatEncoder, ChatError
from luthier.config.schema import RunConfig
from luthier.config.trust import NO_TRUST, Trust
from luthier.data.examples import BadRows, DatasetSources, OpenedSource
from luthier.data.formats.conversations import TEMPLATE_KWARGS, template_inputs
from luthier.errors import UserError
from luthier.inspection.readers import shorten_location
from luthier.inspection.rules import Rule, first_difference, join_replies, tokens_around
from luthier.inspection.tokens import token_decoder
from luthier.model.adapter_keys import (
    WRAPPED,
    find_joined_adapters,
    find_renames,
    find_unknown_layers,
    layer_name,
)
from luthier.model.artifact import Artifact, find_artifact
from luthier.model.load import read_model_config
from luthier.model.model_class import build_empty_model
from luthier.model.model_files import ADAPTER_WEIGHTS_FILE, read_generation_file
from luthier.model.model_images import ModelImages, find_model_images
from luthier.model.response_template import compare_reading
from luthier.model.vision_processor import VisionProcessor, find_vision_processor
from luthier.storage.sizes import read_safetensors_header

DEFAULT_ROWS = 500
"""Rows of each source that are compared where nobody says how many."""
_PROMPT_TYPES = ("conversation", "preference", "unpaired")


@dataclass(frozen=True)
class ServedTurn:
    """A prompt as the training had it, and the reply behind it if that trained."""

    where: str
    messages: list[dict[str, Any]]
    inputs: Mapping[str, Any]
    """What the row has for the template beside its messages."""
    prompt: list[int]
    reply: list[int]


class ServedCheck:
    """The rules that hold where a server reads and stops as the training did."""

    def __init__(
        self, artifact: Artifact, trained: ChatEncoder, saved: Any, ends: list[int]
    ) -> None:
        """`trained`: what made the training rows; `saved`: the tokenizer that was saved.

        `ends`: the end tokens of the saved generation config.
        """
        self.artifact = artifact
        self._trained, self._saved, self._ends = trained, saved, ends
        self._text_of = token_decoder(trained.tokenizer)
        self.prompts = Rule("prompts are those of apply_chat_template, as saved", "turns")
        self.texts = Rule("replies read the same with the tokenizer that was saved", "replies")
        self.replies = Rule("replies end with an end token of generation_config.json", "replies")
        self.stops = Rule("the template's stop tokens are in generation_config.json", "tokens")
        self.rules = [self.prompts, self.texts, self.replies, self.stops]
        self.messages: Rule | None = None
        if getattr(saved, "response_template", None) is not None:
            self.messages = Rule("the response template reads replies as luthier does", "replies")
            self.rules.append(self.messages)
        self.layers = _check_layers(artifact)
        if self.layers is not None:
            self.rules.append(self.layers)
        for token in trained.stop_token_ids:
            wrong = f"{self._text_of(token)} ({token}) is not an end token there"
            self.stops.note("generation_config.json", None if token in ends else wrong)

    @property
    def holds(self) -> bool:
        """Whether no rule breaks, and there was something to look at."""
        return bool(self.prompts.checked) and not any(rule.broken for rule in self.rules)

    def check(self, turn: ServedTurn) -> None:
        """Hold one turn against the rules."""
        served = self._applied(turn, {})
        if served == turn.prompt:
            self.prompts.note(turn.where, None)
        else:
            self.prompts.note(
                turn.where, self._why(turn, served), self._tokens_at_difference(turn.prompt, served)
            )
        if turn.reply:
            last = turn.reply[-1]
            wrong = f"it ends with {self._text_of(last)} ({last})"
            self.replies.note(turn.where, None if last in self._ends else wrong)
            read = [each.decode(turn.reply) for each in (self._trained.tokenizer, self._saved)]
            differs = None if read[0] == read[1] else f"{read[0][:60]!r} reads as {read[1][:60]!r}"
            self.texts.note(turn.where, differs)
            self._check_message(turn)

    def _check_message(self, turn: ServedTurn) -> None:
        """Hold the message that the saved response template reads against luthier's."""
        if self.messages is None:
            return
        parsed = self._trained.parse(turn.reply, turn.messages, **turn.inputs)
        if parsed.reason is None:
            problem = compare_reading(
                self._saved.response_template, self._trained, turn.prompt, turn.reply,
                parsed.message, turn.inputs.get("tools"),
            )  # fmt: skip
            self.messages.note(turn.where, problem)

    def _why(self, turn: ServedTurn, served: list[int] | str) -> str:
        """Why a prompt is another one, as far as it can be told by trying."""
        if isinstance(served, str):
            return f"apply_chat_template refuses it: {served}"
        variables = self._trained.variables
        if variables and self._applied(turn, variables) == turn.prompt:
            return (
                f"requests must set chat_template_kwargs={json.dumps(variables)}, as training did"
            )
        if served == self._of_today(turn):
            return f"the template writes today's date; the training had {self._trained.date}"
        if self._applied(turn, {**variables, "sanitize_control_tokens": True}) == turn.prompt:
            return "the text contains a control token, which a server would read as one"
        return "the prompt differs"

    @cached_property
    def _today(self) -> ChatEncoder:
        """The encoder of the training on this day, without its variables, as a server is."""
        now = {"date": date.today().isoformat(), "variables": {}}
        return self._trained.with_settings(now)

    def _of_today(self, turn: ServedTurn) -> list[int] | None:
        try:
            return self._today.prompt(turn.messages, **turn.inputs)
        except ChatError:
            return None

    def _applied(self, turn: ServedTurn, more: dict[str, Any]) -> list[int] | str:
        """The prompt as transformers makes it of what was saved, or why it does not."""
        settings = {
            "tools": turn.inputs.get("tools"), "add_generation_prompt": True,
            **more, **turn.inputs.get(TEMPLATE_KWARGS, {}),
        }  # fmt: skip
        try:
            if self._processor is not None:
                messages = self._trained.convert_content(turn.messages)
                template = self._saved.chat_template
                return self._processor.encode_prompt(messages, chat_template=template, **settings)
            ids: list[int] = self._saved.apply_chat_template(
                turn.messages, return_dict=False, **settings
            )
        except Exception as error:  # a template may raise anything
            return str(error)
        return ids

    @cached_property
    def _processor(self) -> VisionProcessor | None:
        """The model's processor with the tokenizer that was saved; None for a model of text."""
        images = self._trained.images
        if not isinstance(images, ModelImages):
            return None
        try:
            return find_vision_processor(self.artifact.base)
        except UserError:  # a model whose processor cannot be had is served for text alone
            return None

    def _tokens_at_difference(self, trained: list[int], served: list[int] | str) -> dict[str, str]:
        if isinstance(served, str):
            return {}
        at = first_difference(trained, served)
        both = {"trained": trained, "served": served}
        return {name: tokens_around(ids, at, self._text_of) for name, ids in both.items()}


def check_served(word: str, limit: int | None = None, trust: Trust = NO_TRUST) -> ServedCheck:
    """Compare what a run saved with its own rows, `limit` of each source.

    `trust` is what may run of the code that the run's config names. Raises UserError for a word
    that is no run, a run that was not trained on chats, and rows that are no longer there.
    """
    artifact = find_artifact(word, trust=trust)
    if artifact.config is None or artifact.folder is None:
        raise UserError(
            f"{word}: --served compares a run with its own rows, and this is not a run's folder."
        )
    sources = [*_opened(artifact.config)]
    if not sources:
        raise UserError(f"{word}: it was not trained on chats, so no prompts are served.")
    served = _served(artifact, artifact.config)
    for opened in sources:
        for turn in _turns(opened, served._trained, limit or DEFAULT_ROWS):
            served.check(turn)
    return served


def _check_layers(artifact: Artifact) -> Rule | None:
    # Servers have no class for a model that a function of the user's own loads.
    if artifact.adapter is None or artifact.base.loader is not None:
        return None
    return check_adapter_layers(artifact)


def check_adapter_layers(artifact: Artifact) -> Rule:
    """Look for the layer of each weight of an adapter in the class that servers load its base by.

    That is the class that the base's config.json names; it is built without weights. Servers pass
    over a weight whose layer they do not find, and vLLM over one adapter for all experts of a layer
    where it looks for an adapter of each.
    """
    assert artifact.adapter is not None
    empty = build_empty_model(read_model_config(artifact.base), artifact.task)
    rule = Rule(f"the adapter's weights belong to layers of {type(empty).__name__}", "weights")
    keys = read_safetensors_header(artifact.adapter / ADAPTER_WEIGHTS_FILE).tensors
    unknown, renames = set(find_unknown_layers(keys, empty)), find_renames(keys, empty)
    joined = set(find_joined_adapters(keys, empty))
    for key in keys:
        wrong = None
        if key in unknown:
            advice = "merge it: luthier merge RUN"
            if key in renames:
                advice = (
                    f"there it is {layer_name(renames[key])}: luthier merge RUN --adapter-for vllm"
                )
            wrong = f"there is no {layer_name(key)}, so a server leaves it out; {advice}"
        elif key in joined:
            experts = layer_name(key).replace(WRAPPED, "")
            wrong = (
                f"it holds all of {experts}, and vLLM reads an adapter for each expert of this "
                "model: luthier merge RUN --adapter-for vllm"
            )
        rule.note(ADAPTER_WEIGHTS_FILE, wrong)
    return rule


def _served(artifact: Artifact, config: RunConfig) -> ServedCheck:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    saved = AutoTokenizer.from_pretrained(
        artifact.folder, trust_remote_code=artifact.base.trust_remote_code
    )
    if saved.chat_template is None:
        raise UserError(f"{artifact.folder}: no chat template was saved with the tokenizer.")
    return ServedCheck(artifact, _trained(artifact, config), saved, _ends(artifact))


def _trained(artifact: Artifact, config: RunConfig) -> ChatEncoder:
    """The encoder of the training, from the base's own tokenizer."""
    from luthier.model.embeddings import add_tokens
    from luthier.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config.model)
    added = [*config.model.add_tokens, *config.model.add_special_tokens]
    if any(text not in tokenizer.get_vocab() for text in added):
        add_tokens(tokenizer, config.model)
    if artifact.chat is None:
        raise UserError(f"{artifact.name}: there are no chat settings (chat.json) beside it.")
    settings = artifact.chat | {"max_length": None, "on_lost": "keep", "empty_replies": "train"}
    images = find_model_images(config.model)
    return ChatEncoder.from_settings(tokenizer, settings, images)


def _ends(artifact: Artifact) -> list[int]:
    """The end tokens in the saved generation config; none where there is none."""
    assert artifact.folder is not None
    ids = (read_generation_file(artifact.folder) or {}).get("eos_token_id")
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def _opened(config: RunConfig) -> Iterator[OpenedSource]:
    """The sources of a run whose rows have prompts."""
    sources = DatasetSources(config.dataset)
    for key in sources.by_key:
        opened = sources.open(key)
        if opened.row_format.example_type in _PROMPT_TYPES:
            yield opened


def _turns(opened: OpenedSource, encoder: ChatEncoder, limit: int) -> Iterator[ServedTurn]:
    """The prompts of a source's first rows; rows that train nothing have none."""
    for placed in islice(opened.examples(BadRows()), limit):
        example, where = placed.example, shorten_location(placed.where)
        inputs = template_inputs(example)
        try:
            if opened.row_format.example_type != "conversation":
                messages = example["prompt"]
                yield ServedTurn(where, messages, inputs, encoder.prompt(messages, **inputs), [])
                continue
            for sequence in encoder.encode(example["messages"], **inputs):
                for reply in join_replies(sequence.replies):
                    before = [_plain(each) for each in example["messages"][: reply.message]]
                    ids = sequence.input_ids
                    if before:
                        yield ServedTurn(
                            where, before, inputs, ids[: reply.start], ids[reply.start : reply.stop]
                        )
        except ChatError:
            continue  # a row that did not train


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message without luthier's own field."""
    return {key: value for key, value in message.items() if value is not None and key != "train"}
