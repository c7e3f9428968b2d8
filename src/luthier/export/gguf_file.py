"""A model folder as one GGUF file for llama.cpp and Ollama, by llama.cpp's own converter.

The package `gguf` 0.19 writes files and knows no architecture, and transformers 5.23 reads GGUF but
does not write it. So the script of a llama.cpp checkout runs in a process of its own, and the file
is compared with the model: chat template, tokens, the end of a reply, and the logits wherever
transformers reads the architecture back.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from luthier.errors import UserError
from luthier.export.merge_adapter import (
    BOUNDS,
    LogitsDiffer,
    compare_models,
    load_folder,
    prompts_of,
)
from luthier.model import gguf
from luthier.model.artifact import find_artifact
from luthier.model.model_files import read_config_file, read_generation_file
from luthier.model.tokenizer import load_tokenizer

CONVERTER = "convert_hf_to_gguf.py"
FORMATS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
"""Number format of a model -> what the converter calls it."""
Q8_0 = "q8_0"
"""Eight bits a weight, the only packed format that the converter itself writes."""
_Q8_BOUND = 0.5
"""The largest difference of logits that eight bits explain, in standard deviations."""
_END_KEY = "tokenizer.ggml.eos_token_id"
_GET = (
    "llama.cpp's converter is needed, and it is not on PyPI. Get it once and name its folder:\n"
    "    git clone --depth 1 https://github.com/ggml-org/llama.cpp\n"
    "    pip install gguf\n"
    "    {command} --llama-cpp llama.cpp\n"
    "or convert a merged model by hand:\n"
    "    python llama.cpp/convert_hf_to_gguf.py {folder} --outfile {file} --outtype {outtype}"
)


@dataclass(frozen=True)
class GgufOrder:
    """What is converted, and how."""

    folder: Path
    """A whole model, with its tokenizer."""
    file: Path
    outtype: str
    converter: Path
    verify: bool = True


def find_converter(llama_cpp: str | None, command: str, folder: Path, file: Path) -> Path:
    """Return llama.cpp's script.

    `llama_cpp` is the typed folder of a checkout; None for `$LLAMA_CPP`, or `llama.cpp` here. The
    other arguments stand in the message of the UserError that is raised where there is none.
    """
    place = llama_cpp or os.environ.get("LLAMA_CPP") or "llama.cpp"
    script = Path(place).expanduser() / CONVERTER
    if script.is_file():
        return script
    if llama_cpp is not None:
        raise UserError(f"--llama-cpp {llama_cpp}: there is no {CONVERTER} in this folder.")
    raise UserError(_GET.format(command=command, folder=folder, file=file, outtype="bf16"))


def choose_outtype(folder: Path, is_packed: bool) -> str:
    """Return the format of the file's numbers: eight bits, or the format of the model's own."""
    config = read_config_file(folder / "config.json") or {}
    dtype = config.get("dtype") or config.get("torch_dtype")
    return Q8_0 if is_packed else FORMATS.get(str(dtype), "f16")


def write_gguf(order: GgufOrder, say: Callable[[str], None]) -> None:
    """Convert, check, and move the file into place; UserError where the converter or a check fails.

    A file that fails a check is left beside the target, with `.unchecked` behind its name.
    """
    part = order.file.with_name(f"{order.file.name}.unchecked")
    _run_converter(order, part)
    _set_end_token(part, order.folder, say)
    _check_tokens(part, order.folder)
    if order.verify:
        _check_logits(part, order, say)
    part.replace(order.file)
    size = order.file.stat().st_size
    say(f"written   {order.file}: {order.outtype}, {size / 1e9:.2f} GB")


def _run_converter(order: GgufOrder, target: Path) -> None:
    command = [sys.executable, str(order.converter), str(order.folder)]
    command += ["--outfile", str(target), "--outtype", order.outtype]
    # The script looks for the hub's files of some models, which are in the folder already.
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode or not target.is_file():
        target.unlink(missing_ok=True)
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        tail = "\n".join(f"    {line}" for line in lines[-4:])
        raise UserError(
            f"{order.converter} cannot convert {order.folder}. Its last lines:\n{tail}\n"
            "Update llama.cpp (git pull) if the model is newer than it."
        )


def _set_end_token(file: Path, folder: Path, say: Callable[[str], None]) -> None:
    """Have the file end replies with the token that the training ended them with.

    The converter takes the tokenizer's end token, which is another one where a chat template ends
    turns with a token of its own.
    """
    ends = (read_generation_file(folder) or {}).get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    reader = gguf.open_reader(file, "r+")
    field = reader.get_field(_END_KEY)
    if not ends or field is None or int(field.contents()) in ends:
        return
    say(f"end token {ends[0]}, as trained; the converter took {int(field.contents())}")
    field.parts[field.data[0]][0] = ends[0]


def _check_tokens(file: Path, folder: Path) -> None:
    """Raise UserError where the file has another template, or other tokens, than the folder."""
    metadata = gguf.read_metadata(file)
    template = folder / "chat_template.jinja"
    expected = template.read_text(encoding="utf-8") if template.is_file() else None
    if expected is not None and metadata.get("tokenizer.chat_template") != expected:
        raise UserError(f"{file}: its chat template is not that of {template}.")
    vocabulary = _read_vocabulary(folder)
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    wrong = [text for text, number in vocabulary.items() if tokens[number : number + 1] != [text]]
    # SentencePiece vocabularies (`llama`) are spelled differently in GGUF files.
    if metadata.get("tokenizer.ggml.model") == "gpt2" and wrong:
        raise UserError(f"{file}: {len(wrong):,} of its tokens are others, such as {wrong[0]!r}.")


def _read_vocabulary(folder: Path) -> dict[str, int]:
    file = folder / "tokenizer.json"
    if not file.is_file():
        return {}
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = content["model"].get("vocab")
    return vocabulary if isinstance(vocabulary, dict) else {}


def _check_logits(file: Path, order: GgufOrder, say: Callable[[str], None]) -> None:
    artifact = find_artifact(str(order.folder))
    prompts = prompts_of(artifact, load_tokenizer(artifact.base))
    with TemporaryDirectory(dir=order.file.parent) as temporary:
        read_back = Path(temporary)
        try:
            gguf.write_model(file, read_back)
        except UserError as error:
            say(f"checked   tokens and template; not the logits: {str(error).splitlines()[0]}")
            return
        difference = compare_models(
            partial(load_folder, order.folder, artifact.task), read_back, artifact.task, prompts
        )
    if difference.relative:
        say(
            f"checked   {difference.prompts} prompts: the file's logits differ by up to "
            f"{difference.relative:.2g} standard deviations; the likeliest token is the same at "
            f"{difference.agreeing:.1%} of positions"
        )
    else:
        say(f"checked   {difference.prompts} prompts: the file's logits equal the model's")
    bound = _Q8_BOUND if order.outtype == Q8_0 else BOUNDS["bfloat16"]
    if difference.relative > bound:
        raise LogitsDiffer(
            f"{file}: its logits differ from the model's by {difference.relative:.3g} standard "
            f"deviations, more than {bound:g}. It is left there to be looked at; --no-verify "
            "leaves the check out."
        )
