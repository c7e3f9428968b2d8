"""`LLM` answers as a run, an adapter, a checkpoint or a base, loaded within a `with` block."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from luthier.chat import ChatEncoder, ParsedReply, ReplyDelta
from luthier.config.schema import ModelConfig
from luthier.config.trust import NO_TRUST, Trust
from luthier.errors import UserError
from luthier.infer import generation_config as words
from luthier.infer.dequantize import dequantized_layers
from luthier.infer.generate import ImagePromptInputs, patched_output_layer
from luthier.infer.prompt_images import (
    PromptImage,
    bind_images,
    list_prompt_images,
    open_prompts,
)
from luthier.infer.prompts import Prompt, Prompts
from luthier.infer.reply_messages import format_message
from luthier.infer.seq2seq_prompts import Seq2SeqPrompts
from luthier.infer.stream import TextStream
from luthier.model.artifact import Artifact, build_chat_encoder, find_artifact
from luthier.model.device import Machine, choose_machine
from luthier.model.load import load_trained
from luthier.model.tokenizer import check_vocabulary_fits, end_token_ids, load_tokenizer

if TYPE_CHECKING:
    from luthier.infer.chat_session import ChatSession
    from luthier.infer.stream import TokenSink


@dataclass
class LoadedModel:
    """A model in memory, and all that it takes to ask it."""

    model: Any
    tokenizer: Any
    machine: Machine
    prompter: ChatEncoder | Seq2SeqPrompts | None
    """What makes prompts of messages; None for a model without a chat template."""
    stop_ids: list[int]
    context: int | None
    """The most tokens of prompt and reply together; None where nothing bounds them."""
    longest: int | None
    """The most tokens of a prompt, and one more."""

    @property
    def reads_images(self) -> bool:
        """Whether prompts may have images."""
        return isinstance(self.prompter, ChatEncoder) and self.prompter.images is not None

    def image_inputs(self, images: Sequence[Sequence[PromptImage]]) -> ImagePromptInputs | None:
        """Return what makes the model's inputs for the images of prompts; None without images."""
        images_of_model: Any = getattr(self.prompter, "images", None)
        return bind_images(images, lambda: images_of_model.processor)

    @property
    def pad_id(self) -> int:
        """The id that prompts of a batch are padded with."""
        return int(self.tokenizer.pad_token_id)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Let the model answer fast within the block."""
        import torch

        with ExitStack() as stack:
            with torch.inference_mode():
                stack.enter_context(dequantized_layers(self.model))
            stack.enter_context(patched_output_layer(self.model))
            yield


class LoadOptions(NamedTuple):
    """An artifact with all but its weights."""

    artifact: Artifact
    """With the config that it is loaded by."""
    machine: Machine
    tokenizer: Any

    def model(self, packing: Mapping[str, Any] | None, model_kwargs: Mapping[str, Any]) -> Any:
        """Load the weights; `from_pretrained` gets `model_kwargs`. UserError where it fails."""
        model = load_trained(self.artifact, self.machine, self.tokenizer, packing, **model_kwargs)
        check_vocabulary_fits(self.tokenizer, model)
        return model


def read_load_options(artifact: Artifact, settings: Mapping[str, Any]) -> LoadOptions:
    """Choose the machine and load the tokenizer; `settings` replace fields of the artifact's model.

    Raises UserError where they cannot be had.
    """
    config = ModelConfig.model_validate(artifact.base.model_dump() | dict(settings))
    resolved = replace(artifact, base=config)
    return LoadOptions(resolved, choose_machine(config), load_tokenizer(config))


def load_for_inference(
    artifact: Artifact,
    settings: Mapping[str, Any],
    packing: Mapping[str, Any] | None,
    model_kwargs: Mapping[str, Any],
) -> LoadedModel:
    """Load a model that writes, and what makes its prompts; UserError where it cannot be had."""
    options = read_load_options(artifact, settings)
    artifact, machine, tokenizer = options
    # Before the weights: a template that cannot be read is reported within a second.
    prompter = _prompter(artifact, tokenizer)
    model = options.model(packing, model_kwargs)
    # A model that also reads pictures keeps the limits of its text in a config within its own.
    text = model.config.get_text_config()
    context = getattr(text, "max_position_embeddings", None)
    is_encoded = bool(model.config.is_encoder_decoder)
    return LoadedModel(
        model,
        tokenizer,
        machine,
        prompter,
        _stops(artifact, tokenizer, prompter),
        # An encoder-decoder model bounds source and reply each by itself, so a prompt may be as
        # long as the context: `longest` is the first length that is too long.
        None if is_encoded else context,
        context + 1 if is_encoded and context is not None else context,
    )


def _prompter(artifact: Artifact, tokenizer: Any) -> ChatEncoder | Seq2SeqPrompts | None:
    if artifact.task == "SEQ_2_SEQ_LM":
        from luthier.data.encoders.tasks import Seq2SeqEncoder

        limit = None if artifact.config is None else artifact.config.chat.max_length
        on_long = "error" if artifact.config is None else artifact.config.chat.on_long
        ends = [tokenizer.eos_token_id, *end_token_ids(artifact.base)]
        stops = [end for end in dict.fromkeys(ends) if end is not None]
        return Seq2SeqPrompts(Seq2SeqEncoder(tokenizer, limit, on_long), stops)
    if artifact.chat is None and tokenizer.chat_template is None:
        return None
    return build_chat_encoder(artifact, tokenizer)


def _stops(artifact: Artifact, tokenizer: Any, prompter: Any) -> list[int]:
    """Return the ids that end a reply; UserError for a model whose files name none."""
    if prompter is not None and prompter.stop_token_ids:
        return list(prompter.stop_token_ids)
    ends = [tokenizer.eos_token_id, *end_token_ids(artifact.base)]
    stop_ids = [end for end in dict.fromkeys(ends) if end is not None]
    if not stop_ids:
        raise UserError(
            f"{artifact.name}: neither its tokenizer nor its generation config has an end token."
        )
    return stop_ids


# Weights may be packed otherwise for answering than they were for training.

WeightPrecision = Literal["trained", "none", "nf4", "int8"] | Mapping[str, Any]
"""How weights are packed: as the run had them, not at all, in 4 or 8 bits, or as
`BitsAndBytesConfig` has it."""

_PACKED: dict[str, dict[str, Any] | None] = {
    # None leaves the packing to the artifact; {} asks for none, whatever the run had.
    "trained": None,
    "none": {},
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "int8": {"load_in_8bit": True},
}


def parse_weight_precision(precision: WeightPrecision) -> dict[str, Any] | None:
    """Fields of `BitsAndBytesConfig`; None for the run's own. UserError for an unknown name."""
    if isinstance(precision, Mapping):
        return dict(precision)
    if precision not in _PACKED:
        raise UserError(f"quantization={precision}: there are {', '.join(_PACKED)}.")
    return _PACKED[precision]


@dataclass(frozen=True)
class GeneratedReply:
    """What a model answered."""

    text: str
    """The reply without control tokens."""
    ids: list[int]
    """Its tokens, the stop token left out."""
    prompt_tokens: int
    finish: Literal["stop", "length"]
    """Whether the model ended it, or the longest length did."""
    message: dict[str, Any]
    """The reply as a message of OpenAI's API: `content`, and `reasoning_content` and `tool_calls`
    where it has them."""
    parse_error: str | None = None
    """Why `content` is all that the model wrote, control tokens too, although the model has a chat
    template: the template does not write the reply's ids for any message."""


class LLM:
    """Answers prompts and conversations with the tokens that the model was trained on.

        with LLM("runs/quickstart/default") as llm:
            llm.generate(["Lunch with Ana on Friday at noon."])

    `word`: the folder of a run, its `model/`, a checkpoint, an adapter or a whole model, a hub
    name, or `package:NAME`; or an `Artifact`. `base`: where an adapter's base is now. `device`,
    `dtype` and `attention`: as in a config's `model`; the run's own where they are None.
    `device_map`: of accelerate, for a model that needs several GPUs (`auto`).
    `quantization`: how the weights are packed. Nothing is loaded before the block begins; at its
    end the memory is free again. `trust`: what may run of the code that a run's config names.
    Raises UserError for a word that names no model that writes.
    """

    def __init__(
        self,
        word: str | Artifact,
        *,
        base: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        attention: str | None = None,
        device_map: str | dict[str, Any] | None = None,
        trust_remote_code: bool | None = None,
        quantization: WeightPrecision = "trained",
        trust: Trust = NO_TRUST,
    ) -> None:
        self.artifact: Artifact = _writes(
            word if isinstance(word, Artifact) else find_artifact(word, base, trust)
        )
        self._packing = parse_weight_precision(quantization)
        self._own = {} if device_map is None else {"device_map": device_map}
        settings = {
            "device": device,
            "dtype": dtype,
            "attention": attention,
            "trust_remote_code": trust_remote_code,
        }
        self._given = {name: value for name, value in settings.items() if value is not None}
        self._stack = ExitStack()
        self._model: Any = None

    def __enter__(self) -> "LLM":
        self._loaded = load_for_inference(self.artifact, self._given, self._packing, self._own)
        self._model, self.tokenizer = self._loaded.model, self._loaded.tokenizer
        self.machine, self.context = self._loaded.machine, self._loaded.context
        self._prompts = Prompts(self.tokenizer, self._loaded.prompter, self._loaded.longest)
        # Registered before `ready`: the stack unwinds in reverse, so hooks are removed from the
        # model while it is still there.
        self._stack.callback(self._release)
        self._stack.enter_context(self._loaded.ready())
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def model(self) -> Any:
        """The model of transformers or peft; UserError outside of the block."""
        if self._model is None:
            raise UserError("LLM: the model is loaded within a block: with LLM(...) as llm: ...")
        return self._model

    @property
    def stop_token_ids(self) -> list[int]:
        """The ids that end a reply: those of the training template."""
        return list(self._loaded.stop_ids)

    @property
    def pad_id(self) -> int:
        """The id that prompts of a batch are padded with."""
        return self._loaded.pad_id

    @property
    def encoder(self) -> "ChatEncoder":
        """What makes prompts of messages; UserError for a model that has no chat template."""
        if not self.has_template:
            raise UserError(f"{self.artifact.name}: there is no chat template.")
        encoder: Any = self._loaded.prompter
        return encoder

    @property
    def prompter(self) -> "ChatEncoder | Seq2SeqPrompts | None":
        """What makes prompts of messages; None for a model that goes on with plain text."""
        return self._loaded.prompter

    @property
    def reads_images(self) -> bool:
        """Whether prompts may have images."""
        return self._loaded.reads_images

    def image_inputs(self, images: Sequence[Sequence[PromptImage]]) -> ImagePromptInputs | None:
        """Return what makes the model's inputs for the images of prompts; None without images."""
        return self._loaded.image_inputs(images)

    @property
    def has_template(self) -> bool:
        """Whether the model can be asked in messages."""
        return isinstance(self._loaded.prompter, ChatEncoder)

    @property
    def has_adapter(self) -> bool:
        """Whether the tuned model is its base with an adapter on it."""
        return self.artifact.adapter is not None

    def prompt_ids(
        self, prompts: Sequence[Prompt], places: Sequence[str] | None = None
    ) -> list[list[int]]:
        """The ids that the model reads for each prompt; `places` name them in a UserError."""
        return self._prompts.ids(open_prompts(prompts, places), places)

    def generate(self, prompts: Sequence[Prompt], **settings: Any) -> list[str]:
        """The text of the reply to each prompt, in order.

        A prompt is a user's message, the messages of a conversation, or a dict of `messages` and
        perhaps `tools` and `chat_template_kwargs`. The content of a message may be a list of
        `{"type": "text", "text": ...}` and, for a model that reads images, `{"type": "image",
        "image": ...}`: a path, an address, bytes, or a picture of Pillow. Takes what `replies`
        takes.
        """
        return [reply.text for reply in self.replies(prompts, **settings)]

    def replies(
        self,
        prompts: Sequence[Prompt],
        *,
        places: Sequence[str] | None = None,
        batch_size: int | None = None,
        seed: int | None = None,
        on_replies: Callable[[int, list[GeneratedReply]], None] | None = None,
        **settings: Any,
    ) -> list[GeneratedReply]:
        """Answer each prompt, in order; `num_return_sequences` replies each follow one another.

        Prompts are answered side by side, padded on the left, `batch_size` at once: as many as the
        memory holds where it is None, and half as many where that was too much. `settings` are
        fields of `GenerationConfig`; greedy unless they say otherwise. `seed` is for sampling.
        `on_replies` gets the number of each prompt with its replies as soon as there are some.
        Raises UserError for a prompt that is longer than the context, by its place.
        """
        config = self.generation_config(settings)
        opened = open_prompts(prompts, places)
        ids = self._prompts.ids(opened, places)
        size = batch_size or self._size(ids, config)
        images = [list_prompt_images(prompt) for prompt in opened]
        replies_by_prompt: list[list[GeneratedReply]] = [[] for _ in ids]
        with self._sampling(seed):
            for rows, answers in self._answered(ids, images, config, size):
                for row, answer in zip(rows, answers, strict=True):
                    reply = self._reply(answer, len(ids[row]), config, opened[row])
                    replies_by_prompt[row].append(reply)
                # With num_return_sequences a row's number comes several times; its replies are told
                # once.
                for row in dict.fromkeys(rows) if on_replies else ():
                    on_replies(row, replies_by_prompt[row])  # type: ignore[misc]
        return [reply for replies in replies_by_prompt for reply in replies]

    def batch_size(self, ids: Sequence[Sequence[int]], **settings: Any) -> int:
        """How many of these prompts, as token ids, the memory holds at once with their replies."""
        return self._size(ids, self.generation_config(settings))

    def stream(
        self,
        prompt: Prompt,
        *,
        seed: int | None = None,
        on_end: Callable[[GeneratedReply], None] | None = None,
        **settings: Any,
    ) -> Iterator[str]:
        """Yield the reply to one prompt piece by piece; the pieces are the text of `generate`.

        Closing the iterator stops the model. `on_end` gets the reply that came to its end.
        """
        text, came = TextStream(self._decode), list[GeneratedReply]()
        for token in self._stream_tokens(prompt, seed, settings, came.append):
            if piece := text.add(token):
                yield piece
        if piece := text.rest():
            yield piece
        if on_end is not None:
            on_end(*came)

    def stream_deltas(
        self,
        prompt: Prompt,
        *,
        seed: int | None = None,
        on_end: Callable[[GeneratedReply], None] | None = None,
        **settings: Any,
    ) -> Iterator[ReplyDelta]:
        """Yield the reply to one prompt as pieces of its content and its reasoning, and its calls.

        Calls come whole, at the end. What was yielded is not taken back where the reply proves to
        be no message; `on_end` gets the reply that came to its end, and its `parse_error` says so.
        """
        (prompt,) = open_prompts([prompt])
        parser = self._prompts.stream_parser(prompt)
        came: list[GeneratedReply] = []
        text = TextStream(self._decode if parser is None else self.encoder.decode_reply)

        def take(piece: str) -> list[ReplyDelta]:
            if parser is not None:
                return parser.add(piece)
            return [ReplyDelta("content", piece)] if piece else []

        last: list[ReplyDelta] = []

        def finish(ids: list[int]) -> ParsedReply | None:
            if parser is None:
                return None
            last.extend([*parser.add(text.rest()), *parser.finish(ids)])
            return parser.reply

        for token in self._stream_tokens(prompt, seed, settings, came.append, finish):
            yield from take(text.add(token))
        yield from last if parser is not None else take(text.rest())
        if on_end is not None:
            on_end(*came)

    def _stream_tokens(
        self,
        prompt: Prompt,
        seed: int | None,
        settings: Mapping[str, Any],
        on_end: Callable[[GeneratedReply], None],
        parse: Callable[[list[int]], ParsedReply | None] | None = None,
    ) -> Iterator[int]:
        """Yield the ids of one reply without its stop token, and hand the whole to `on_end`."""
        from luthier.infer.stream import stream_tokens

        config = self.generation_config(settings)
        if (config.num_beams or 1) > 1 or (config.num_return_sequences or 1) > 1:
            raise UserError("stream: one reply is written at a time; leave out num_beams and "
                            "num_return_sequences, or use generate.")  # fmt: skip
        (prompt,) = open_prompts([prompt])
        (ids,) = self._prompts.ids([prompt])
        if self.context is not None:
            # transformers warns and goes on past the context, where the model writes nonsense.
            config.max_new_tokens = min(config.max_new_tokens, self.context - len(ids))
        stops, came = set(words.stop_token_ids(config)), list[int]()
        more = self._more(config) | self._image_tensors(ids, list_prompt_images(prompt))
        with self._sampling(seed):
            for token in stream_tokens(self.model, ids, config, **more):
                came.append(token)
                if token not in stops:
                    yield token
        on_end(self._reply(came, len(ids), config, prompt, parse))

    def write_tokens(
        self,
        ids: Sequence[int],
        config: Any,
        tokens: "TokenSink",
        stopped: threading.Event,
        seed: int | None = None,
        images: Sequence[PromptImage] = (),
    ) -> None:
        """Write the reply to a prompt into `tokens`, in this thread, until `stopped` is set.

        `config`: of `generation_config`. `images`: those of the prompt. One reply is written at a
        time.
        """
        from luthier.infer.stream import write_tokens

        more = self._more(config) | self._image_tensors(ids, images)
        with self._sampling(seed):
            write_tokens(self.model, ids, config, tokens, stopped, more)

    def _image_tensors(self, ids: Sequence[int], images: Sequence[PromptImage]) -> dict[str, Any]:
        """Return what the model takes for the images of a prompt, where it computes."""
        import torch

        make = self.image_inputs([images])
        if make is None:
            return {}
        inputs = make([0], torch.tensor([list(ids)]))
        return {name: value.to(self.model.device) for name, value in inputs.items()}

    def chat(
        self, system: str | None = None, tools: list[dict[str, Any]] | None = None
    ) -> "ChatSession":
        """Return a session that remembers its messages; None means no system prompt or tools."""
        from luthier.infer.chat_session import ChatSession

        return ChatSession(self.stream_deltas, system, tools)

    @contextmanager
    def as_base(self) -> Iterator[None]:
        """Answer as the base does, without the adapter, within the block; it is loaded only once.

        Raises UserError for a whole model, whose base is another one.
        """
        if not self.has_adapter:
            raise UserError(f"{self.artifact.name} is a whole model: it has no base in it.")
        # peft switches the adapter's layers off in place, so both answer from the same weights.
        with self.model.disable_adapter():
            yield

    def generation_config(self, settings: Mapping[str, Any]) -> Any:
        """Return the `GenerationConfig` of these settings, with the training's stop tokens."""
        assert self.model is not None
        return words.make_generation_config(
            words.check_generation_settings(settings), self.stop_token_ids, self.pad_id
        )

    def _size(self, ids: Sequence[Sequence[int]], config: Any) -> int:
        from luthier.infer.generate import choose_batch_size

        # Each beam and each further reply is a row of its own in the key-value cache.
        copies = (config.num_beams or 1) * (config.num_return_sequences or 1)
        longest = max(map(len, ids), default=1)
        return max(1, choose_batch_size(self.model, longest, config.max_new_tokens) // copies)

    def _answered(
        self, ids: list[list[int]], images: list[list[PromptImage]], config: Any, size: int
    ) -> Iterator[tuple[list[int], list[list[int]]]]:
        import torch

        from luthier.infer.generate import generate_in_batches

        if (config.num_beams or 1) > 1 and any(len(each) > 1 for each in images):
            # transformers 5.23 repeats pixels image by image for beams, and not prompt by prompt.
            raise UserError(
                "num_beams: a prompt has several images, which beam search would mix up. Leave "
                "num_beams out."
            )
        make = self.image_inputs(images)
        with torch.inference_mode():
            yield from generate_in_batches(
                self.model, ids, config, size, self.context, make, **self._more(config)
            )

    def _more(self, config: Any) -> dict[str, Any]:
        """Return what transformers needs besides: the tokenizer, to find stop strings."""
        return {"tokenizer": self.tokenizer} if config.stop_strings else {}

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _reply(
        self,
        ids: list[int],
        prompt_tokens: int,
        config: Any,
        prompt: Prompt,
        parse: Callable[[list[int]], ParsedReply | None] | None = None,
    ) -> GeneratedReply:
        """Return the reply of generated ids; `parse`: of the ids, where it is already under way."""
        from luthier.infer.generate import until_stop

        reply_ids = until_stop(ids, words.stop_token_ids(config))
        ended = len(reply_ids) < len(ids)
        while not ended and reply_ids and reply_ids[-1] == config.pad_token_id:
            # Behind a stop string transformers fills the row up while others of the batch go on.
            reply_ids = reply_ids[:-1]
        room = config.max_new_tokens
        if self.context is not None:
            room = min(room, self.context - prompt_tokens)
        # Other end tokens than the template's are no part of a message.
        end = [token for token in ids[len(reply_ids) :][:1] if token in self.stop_token_ids]
        parse = parse or partial(self._prompts.parse, prompt)
        parsed = parse([*reply_ids, *(end if ended else ())])
        text = self._decode(reply_ids)
        plain = {"role": "assistant", "content": text}
        return GeneratedReply(
            text,
            reply_ids,
            prompt_tokens,
            "stop" if ended or len(reply_ids) < room else "length",
            plain if parsed is None else format_message(parsed, self._prompts.turn(prompt)),
            None if parsed is None else parsed.reason,
        )

    @contextmanager
    def _sampling(self, seed: int | None) -> Iterator[None]:
        """Draw from a seed within the block, and leave others' numbers as they are."""
        import torch

        if seed is None:
            yield
            return
        # fork_rng warns where it must guess the devices, and with device_map there may be several.
        gpus = list(range(torch.cuda.device_count()))
        with torch.random.fork_rng(devices=gpus):
            torch.manual_seed(seed)
            yield

    def _release(self) -> None:
        from luthier.infer.generate import release_memory

        # Both references go: torch can only give back memory that nothing points to.
        self._model = None
        self._loaded.model = None
        release_memory()


def _writes(artifact: Artifact) -> Artifact:
    """Return the artifact if it writes replies; UserError for a model with a head."""
    names = {"SEQ_CLS": "a classifier", "TOKEN_CLS": "a tagger"}
    if artifact.task in names:
        name = "a reward model" if artifact.is_reward else names[artifact.task]
        raise UserError(
            f"{artifact.name}: this is {name}, which writes no replies. luthier evaluate measures "
            "it, and the README.md of its model/ has the Python that asks it."
        )
    return artifact
