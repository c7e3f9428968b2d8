"""`luthier serve` runs an OpenAI-compatible server with the tokens that the model trained on.

The server is luthier's own, or vLLM where that is installed.
"""

import importlib.util
import json
import os
import shlex
import shutil
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.cli.arguments import BASE, TRUST, CommandLine, Flag, ParsedArguments
from luthier.errors import UserError

if TYPE_CHECKING:
    from luthier.cli.model_arguments import ModelArguments
    from luthier.infer.server import ServerLimits
    from luthier.model.artifact import Artifact

COMMAND_LINE = CommandLine(
    "serve",
    "luthier serve MODEL [key=value ...] [flags]\n\n"
    "Serves a run, a checkpoint, an adapter or a model through an OpenAI-compatible server:\n"
    "vLLM's where it is installed and there is a GPU, else luthier's own (on transformers).\n"
    "Template, its variables and date, and stop tokens are those of the training.\n\n"
    "Settings (not for vLLM): any field of GenerationConfig, as the default of requests;\n"
    "model.device, .dtype, .attention and .device_map; quantization=none, nf4 or int8.\n\n"
    "Where the environment has LUTHIER_API_KEY, requests must send it, as OpenAI's clients do.",
    (
        Flag("--engine", "NAME", "transformers or vllm"),
        Flag("--host", "NAME", "the address to listen at (localhost)"),
        Flag("--port", "N", "the port (8000)"),
        Flag("--name", "NAME", "what requests call the model; without it the folder's name"),
        Flag("--allowed-host", "NAME", "more names that requests may call this host, with commas"),
        Flag("--allowed-origin", "URL", "web pages whose scripts may ask (CORS), with commas"),
        Flag("--batch", "N", "write up to N replies side by side, greedily (1: one at a time)"),
        Flag("--max-waiting", "N", "requests that may wait for their turn (32)"),
        Flag("--max-body", "N", "the largest request, in MiB (4; 32 if the model reads images)"),
        Flag("--max-image-size", "N", "the largest file of an image, in MiB (20)"),
        Flag("--max-image-pixels", "N", "of a request's images together, in millions (64)"),
        Flag("--allow-image-urls", None, "fetch images from the addresses that requests name"),
        Flag("--timeout", "N", "the longest time for a reply, in seconds (600)"),
        BASE,
        TRUST,
        Flag("--show", None, "print vLLM's command line and do not run it"),
    ),
    "  luthier serve runs/quickstart/default\n"
    "  luthier serve runs/quickstart/default --port 9000 temperature=0.7\n"
    "  luthier serve runs/qlora_llama/default --engine vllm --show\n",
)
_SERVER = ("starlette", "uvicorn")
_OWN_FLAGS = (
    *("--allowed-host", "--allowed-origin", "--batch", "--max-waiting", "--max-body", "--timeout"),
    *("--max-image-size", "--max-image-pixels", "--allow-image-urls"),
)
"""Flags that vLLM's server has not."""
_PLAIN_NAMES = ("model", "default")
"""Folders whose name says nothing: the one above is named too."""


def run(arguments: list[str]) -> int:
    """Serve until the user ends it; returns the server's exit code."""
    if COMMAND_LINE.asks_help(arguments):
        return 0
    parsed = COMMAND_LINE.parse(arguments)
    from luthier.cli.model_arguments import parse_model_arguments
    from luthier.model.artifact import find_artifact

    typed = parse_model_arguments("serve", parsed.overrides, ("MODEL",))
    if _engine(parsed) == "vllm":
        _check_vllm_arguments(typed, parsed)
        artifact = find_artifact(
            typed.places[0], parsed.texts.get("--base"), typed.trust(parsed.switches)
        )
        _vllm(artifact, parsed)
        return 0
    parsed.refuse_flags(["--show"], "this prints the command of vLLM. Leave one of the two out.")
    return _transformers(typed, parsed)


def _check_vllm_arguments(typed: "ModelArguments", parsed: ParsedArguments) -> None:
    """Raise UserError for words that only luthier's own server follows."""
    typed_flags = {*parsed.texts, *parsed.numbers, *parsed.switches}
    words = [flag for flag in _OWN_FLAGS if flag in typed_flags]
    words += parsed.overrides[len(typed.places) :]
    if words:
        raise UserError(
            f"{words[0]}: is for luthier's own server, and this would start vLLM's. Leave it out, "
            "or add --engine transformers."
        )


def served_name(artifact: "Artifact") -> str:
    """Return what requests call a model: the names of its folders that tell it from others."""
    folder = artifact.run or artifact.folder
    if folder is None:
        return artifact.base.path
    components = folder.resolve().parts
    chosen = components[-1:] if components[-1] not in _PLAIN_NAMES else components[-2:]
    # A name stands in URLs and JSON: no `=` of run names such as lora.r=8.
    return "-".join(chosen).replace("=", "-")


def curl_command(name: str, host: str, port: int) -> str:
    """Return a curl command that asks the server something."""
    body = {"model": name, "messages": [{"role": "user", "content": "Hello!"}]}
    return (
        f"curl http://{host}:{port}/v1/chat/completions -H 'Content-Type: application/json' "
        f"-d '{json.dumps(body)}'"
    )


def _engine(parsed: ParsedArguments) -> str:
    chosen = parsed.texts.get("--engine", "vllm" if "--show" in parsed.switches else None)
    if chosen is None:
        if importlib.util.find_spec("vllm") is None:
            return "transformers"
        # torch takes seconds to import and is needed only where vLLM could be chosen.
        import torch

        return "vllm" if torch.cuda.is_available() else "transformers"
    if chosen not in ("transformers", "vllm"):
        raise UserError(f"--engine {chosen}: there are transformers and vllm.")
    return chosen


def _address(parsed: ParsedArguments) -> tuple[str, int]:
    return parsed.texts.get("--host", "localhost"), parsed.numbers.get("--port", 8000)


def _transformers(typed: "ModelArguments", parsed: ParsedArguments) -> int:
    missing = [name for name in _SERVER if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"luthier serve: {' and '.join(missing)} is not installed, which the server "
            "needs:\n    pip install 'luthier[serve]'"
        )
    from luthier.cli.model_arguments import open_llm
    from luthier.infer.server import check_server_settings, make_server

    check_server_settings(typed.generation)
    if parsed.numbers.get("--batch", 1) > 1:
        from luthier.infer.batch_writer import check_batch_settings

        check_batch_settings(typed.generation)
    host, port = _address(parsed)
    # uvicorn would report a taken port only after the model is loaded.
    _check_free(host, port)
    llm = open_llm(typed, parsed)
    name = parsed.texts.get("--name") or served_name(llm.artifact)
    # Its source is one text: the API's messages with roles have no meaning to it.
    if llm.artifact.task == "SEQ_2_SEQ_LM":
        raise UserError(f"{typed.places[0]}: an encoder-decoder model is not served as a chat.")
    from luthier.environment import quiet_libraries

    quiet_libraries()
    with llm:
        server = make_server(llm, name, host, port, typed.generation, _limits(parsed))
        print(
            f"serving {typed.places[0]} as {name}. Ask it:\n{curl_command(name, host, port)}",
            flush=True,
        )
        server.run()
    return 0


def _limits(parsed: ParsedArguments) -> "ServerLimits":
    from luthier.infer.request_images import ImageLimits
    from luthier.infer.server import ServerLimits

    limits, numbers = ServerLimits(), parsed.numbers
    images = limits.images
    return ServerLimits(
        batch=numbers.get("--batch", limits.batch),
        waiting=parsed.numbers.get("--max-waiting", limits.waiting),
        reply_seconds=parsed.numbers.get("--timeout", limits.reply_seconds),
        body_bytes=numbers["--max-body"] * 2**20 if "--max-body" in numbers else None,
        images=ImageLimits(
            numbers.get("--max-image-size", images.image_bytes // 2**20) * 2**20,
            numbers.get("--max-image-pixels", images.pixels // 10**6) * 10**6,
            "--allow-image-urls" in parsed.switches,
        ),
        hosts=_split_names(parsed.texts.get("--allowed-host", "")),
        origins=_split_names(parsed.texts.get("--allowed-origin", "")),
    )


def _split_names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _check_free(host: str, port: int) -> None:
    """Raise UserError, before anything is loaded, where nobody can listen."""
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: cannot be listened at: {error.strerror or error}. "
            "Choose another port."
        ) from error


def _vllm(artifact: "Artifact", parsed: ParsedArguments) -> None:
    """Become vLLM's server, or show how it would be started."""
    name = parsed.texts.get("--name") or served_name(artifact)
    command = vllm_command(artifact, name, parsed)
    if "--show" in parsed.switches:
        print(shlex.join(command))
        return
    program = shutil.which("vllm")
    if program is None:
        raise UserError("--engine vllm: vllm is not installed. See https://docs.vllm.ai for how.")
    print(f"Ask it:\n{curl_command(name, *_address(parsed))}", flush=True)
    # Replaces this process, so that signals and the exit code are vLLM's own.
    os.execv(program, command)


def vllm_command(artifact: "Artifact", name: str, parsed: ParsedArguments) -> list[str]:
    """Return the command line with which vLLM serves the model as it was trained.

    Raises UserError for an adapter that vLLM cannot put on its base.
    """
    from luthier.model import gguf, source

    host, port = _address(parsed)
    file = source.find_gguf_file(artifact.base.path)
    base = artifact.base.path if file is None else str(gguf.convert_model(file))
    command = ["vllm", "serve", base, "--host", host, "--port", str(port)]
    folder = artifact.folder
    if artifact.base.revision is not None:
        command += ["--revision", artifact.base.revision]
    if artifact.adapter is not None:
        # vLLM serves base and adapter under two names; requests for the plain name get the adapter.
        command += ["--served-model-name", f"{name}-base", "--enable-lora"]
        command += ["--lora-modules", f"{name}={artifact.adapter.resolve()}"]
        command += ["--max-lora-rank", str(_rank(artifact.adapter))]
    else:
        command += ["--served-model-name", name]
    if artifact.base.tokenizer is not None:
        command += ["--tokenizer", str(Path(artifact.base.tokenizer).resolve())]
    # Without it vLLM stops at the base's end tokens, not at those of the training's template.
    if folder is not None and (folder / "generation_config.json").is_file():
        command += ["--generation-config", str(folder.resolve())]
    if folder is not None and (folder / "chat_template.jinja").is_file():
        command += ["--chat-template", str((folder / "chat_template.jinja").resolve())]
    variables = (artifact.chat or {}).get("variables")
    if variables:
        command += ["--default-chat-template-kwargs", json.dumps(variables)]
    return command


def _rank(adapter: Path) -> int:
    """Return the smallest rank that vLLM allows which holds the adapter's."""
    from luthier.model.model_files import read_adapter_config

    config = read_adapter_config(adapter) or {}
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        raise UserError(
            f"{adapter}: vLLM takes plain LoRA alone. Merge the adapter into its base first "
            "(luthier merge), and serve that."
        )
    rank = max([config["r"], *config.get("rank_pattern", {}).values()])
    # The values that vLLM's --max-lora-rank allows; others are refused when it starts.
    sizes = (8, 16, 32, 64, 128, 256, 320, 512)
    fitting = [size for size in sizes if size >= rank]
    if not fitting:
        raise UserError(f"{adapter}: its rank {rank} is more than vLLM takes ({sizes[-1]}).")
    return fitting[0]
