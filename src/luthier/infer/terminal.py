"""`luthier chat`: a conversation with a model in the terminal."""

import sys
from typing import TYPE_CHECKING, Any

from luthier.errors import UserError
from luthier.inspect.arguments import Flag, Grammar

if TYPE_CHECKING:
    from luthier.infer.llm import LLM

GRAMMAR = Grammar(
    "chat",
    "luthier chat MODEL [key=value ...] [flags]\n\n"
    "A conversation with a model in the terminal. MODEL is a run's folder, a checkpoint, an\n"
    "adapter, a model's folder or hub name, or package:NAME. With --compare the base answers\n"
    "beside the tuned model, each in a conversation of its own; an adapter's base is in memory\n"
    "only once. Questions may also come through a pipe, a line each.\n\n"
    "Settings: any field of GenerationConfig, such as temperature=0.7 (greedy without);\n"
    "model.device, .dtype, .attention and .device_map; quantization=none, nf4 or int8.",
    (
        Flag("--compare", None, "base and tuned model side by side"),
        Flag("--system", "TEXT", "the system prompt"),
        Flag("--seed", "N", "for sampling"),
        Flag("--base", "MODEL", "the base of an adapter, where it is no longer where it was"),
    ),
    "  luthier chat runs/quickstart/default\n"
    "  luthier chat runs/quickstart/default --compare --system 'Turn the note into JSON.'\n"
    "  luthier chat Qwen/Qwen3-0.6B temperature=0.6 top_p=0.95\n",
)


def run(words: list[str]) -> int:
    """Chat until the user leaves; returns 0."""
    if GRAMMAR.asks_help(words):
        return 0
    given = GRAMMAR.parse(words)
    from luthier.infer.llm import LLM
    from luthier.infer.words import sort

    typed = sort("chat", given.overrides, ("MODEL",))
    llm = LLM(typed.places[0], base=given.texts.get("--base"), **typed.llm())
    other = _base_of(llm, typed.llm()) if "--compare" in given.switches else None
    settings: dict[str, Any] = dict(typed.generation)
    if "--seed" in given.numbers:
        settings["seed"] = given.numbers["--seed"]
    from luthier.environment import hush

    hush()
    return _talk(llm, other, settings, given.texts.get("--system"))


def _base_of(llm: "LLM", settings: dict[str, Any]) -> "LLM":
    """What answers as the base: the adapter's own, or the model that the run began with."""
    from luthier.infer.llm import LLM

    if llm.has_adapter:
        return llm
    config = llm.artefact.config
    if config is None:
        raise UserError(f"--compare: {llm.artefact.word} is not tuned by a run here; it is a base.")
    return LLM(config.model.path, **settings)


def _talk(llm: "LLM", other: "LLM | None", settings: dict[str, Any], system: str | None) -> int:
    from contextlib import ExitStack

    from rich.console import Console

    from luthier.infer.talk import Talk

    console = Console(highlight=False)
    with ExitStack() as stack:
        with Console(stderr=True).status("loading"):
            stack.enter_context(llm)
            if other is not None and other is not llm:
                stack.enter_context(other)
        talk = Talk(console, llm, other, settings, system)
        if sys.stdin.isatty():
            talk.interactive()
        else:
            for line in sys.stdin:
                if line.strip():
                    talk.take(line.strip())
    return 0
