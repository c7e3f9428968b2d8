"""transformers' OpenAI-compatible server, with a model and prompts that luthier makes."""

import copy
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from luthier.chat import ChatEncoder, ChatError
from luthier.infer import generation_config
from luthier.infer.llm import LLM

if TYPE_CHECKING:
    import uvicorn

_NOT_OF_TEMPLATES = ("load_audio_from_video", "num_frames")
"""What transformers' server hands on besides, for pictures and sounds."""


def run_server(llm: LLM, name: str, host: str, port: int, settings: Mapping[str, Any]) -> None:
    """Serve a loaded model until the process is told to end."""
    make_server(llm, name, host, port, settings).run()


def make_server(
    llm: LLM, name: str, host: str, port: int, settings: Mapping[str, Any]
) -> "uvicorn.Server":
    """Return a server ready to run; `settings` of generation hold for requests without any."""
    import uvicorn
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.systemone import SystemOneHandler
    from transformers.cli.serving.transcription import TranscriptionHandler
    from transformers.cli.serving.utils import GenerationState

    manager, state = _manager(llm, name), GenerationState()
    defaults = generation_config.make_generation_config(
        generation_config.check_generation_settings(settings), llm.stop_token_ids, llm.pad_id
    )
    # transformers' handlers copy the model's generation config and put the request's over it.
    llm.model.generation_config = defaults
    app = build_server(
        manager,
        _sampling(ChatCompletionHandler)(manager, state),
        completion_handler=_sampling(CompletionHandler)(manager, state),
        response_handler=_sampling(ResponseHandler)(manager, state),
        transcription_handler=TranscriptionHandler(manager, state),
        systemone_handler=SystemOneHandler(manager, state),
        generation_state=state,
    )
    # A server object and no uvicorn.run, so that a caller can stop it from another thread.
    return uvicorn.Server(uvicorn.Config(app, host=host, port=port, log_level="warning"))


def _as_trained(llm: LLM) -> Any:
    """Return the tokenizer with prompts from the encoder of the training.

    transformers' own way from messages to ids writes today's date, and takes control tokens in a
    user's text for control tokens.
    """
    # A copy, so that all else that holds the tokenizer keeps its own method.
    served = copy.copy(llm.tokenizer)
    parameters = {*inspect.signature(served.apply_chat_template).parameters, *_NOT_OF_TEMPLATES}

    def apply_chat_template(conversation: Any, tools: Any = None, **more: Any) -> Any:
        # What is no parameter of the method is a variable of the template (chat_template_kwargs).
        variables = {name: value for name, value in more.items() if name not in parameters}
        return _prompt(llm, conversation, tools, variables)

    served.apply_chat_template = apply_chat_template
    return served


def _prompt(llm: LLM, messages: Any, tools: Any, variables: dict[str, Any]) -> Any:
    """Return the ids of a request's prompt, as a batch of one; HTTP 400 for a wrong prompt.

    `variables` of the template go over those of the training.
    """
    import torch
    from fastapi import HTTPException
    from transformers import BatchEncoding

    encoder = llm.encoder
    try:
        if variables:
            # A new encoder for this request: variables are part of what an encoder checks when it
            # is made.
            encoder_settings = encoder.settings()
            encoder_settings["variables"] = encoder_settings["variables"] | variables
            encoder = ChatEncoder.from_settings(llm.tokenizer, encoder_settings)
        ids = encoder.prompt(messages, tools=tools)
        # The handlers would generate past the context, so that the client gets nonsense and 200.
        if llm.context is not None and len(ids) >= llm.context:
            text = f"the prompt has {len(ids)} tokens, and the model reads {llm.context}"
            raise HTTPException(400, text)
    except ChatError as error:
        raise HTTPException(400, str(error)) from error
    tensor = torch.tensor([ids])
    return BatchEncoding({"input_ids": tensor, "attention_mask": torch.ones_like(tensor)})


def _sampling(handler: Any) -> Any:
    """Return a handler for which a request with a temperature asks for sampling.

    transformers' own keep what the model's generation config says: greedy, whatever is asked.
    """

    class Sampling(handler):
        """The handler, with sampling where a temperature is given."""

        def _build_generation_config(self, body: Any, *positional: Any, **more: Any) -> Any:
            config = super()._build_generation_config(body, *positional, **more)
            # transformers 5.23 sets the temperature and leaves do_sample as the defaults have it
            # (`_build_generation_config` in cli/serving/utils.py): the temperature has no effect.
            if body.get("temperature"):
                config.do_sample = True
            return config

    return Sampling


def _manager(llm: LLM, name: str) -> Any:
    """Return a manager that gives the loaded model to every request, whatever its name."""
    from transformers.cli.serving.model_manager import ModelManager

    tokenizer = _as_trained(llm)

    class Held(ModelManager):
        """One model, which stays."""

        def __init__(self) -> None:
            super().__init__(device=llm.machine.device)
            # The manager would load whatever model a request names, from the hub if it must.
            self.force_model = name

        def load_model_and_processor(self, *_: Any, **__: Any) -> Any:
            """The model and its tokenizer."""
            return llm.model, tokenizer

        def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
            """The one model, as the API lists it."""
            return [{"id": name, "object": "model", "owned_by": "luthier"}]

    return Held()
