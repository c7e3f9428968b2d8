"""Weights packed for serving: by bitsandbytes, or by GPTQ and AWQ of gptqmodel."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from luthier.errors import UserError
from luthier.export import model_facts, write_card
from luthier.export.model_layout import base_folder
from luthier.export.weight_files import SHARD_BYTES, list_weight_files
from luthier.model.artifact import Artifact
from luthier.model.experts import find_experts
from luthier.model.load import find_unpacked_modules
from luthier.model.model_class import build_empty_model, read_folder_class
from luthier.model.model_files import WEIGHT_INDEX_FILE
from luthier.model.processor import copy_processor_files
from luthier.storage.manifest import MANIFEST
from luthier.storage.output_folder import describe_written, output_folder

CALIBRATION = 256
"""Training rows that GPTQ and AWQ look at."""
_PACKAGES = {
    "nf4": ("bitsandbytes",),
    "int8": ("bitsandbytes",),
    "gptq": ("gptqmodel", "optimum"),
    "awq": ("gptqmodel", "optimum"),
}
_CONFIGS = ("config.json", "quantize_config.json")


def check_format(name: str) -> None:
    """Raise UserError where the library for a format is not installed."""
    missing = [package for package in _PACKAGES[name] if find_spec(package) is None]
    if missing:
        raise UserError(
            f"--quantize {name}: this needs {' and '.join(missing)}:\n"
            f"    pip install {' '.join(missing)}\n"
            "Without that there are nf4 and int8, by bitsandbytes."
        )


def quantize_merged(
    folder: Path, name: str, artifact: Artifact, say: Callable[[str], None]
) -> dict[str, Any]:
    """Pack the weights of a model's folder in place; returns what the card says of it.

    The model is in memory whole, in 2 bytes a weight. Raises UserError where the format does not
    fit the model, or rows to look at are missing.
    """
    target = folder.with_name(f"{folder.name}.packed")
    # What an earlier try that was killed has left would be taken for part of this one.
    shutil.rmtree(target, ignore_errors=True)
    before = _count_weight_bytes(folder)
    if "bitsandbytes" in _PACKAGES[name]:
        _quantize_with_bitsandbytes(folder, target, name, artifact, say)
    else:
        _quantize_with_gptqmodel(folder, target, name, artifact)
    for file in list_weight_files(folder):
        file.unlink()
    # Four bits may fit into one file, which has no index: the old one would then win.
    (folder / WEIGHT_INDEX_FILE).unlink(missing_ok=True)
    for file in target.iterdir():
        # The tokenizer and the stop tokens are those that trained, and stay.
        if file.suffix == ".safetensors" or file.name in (WEIGHT_INDEX_FILE, *_CONFIGS):
            file.replace(folder / file.name)
    shutil.rmtree(target)
    _remove_local_paths(folder)
    say(
        f"packed    {name}: {before / 1e9:.2f} GB became {_count_weight_bytes(folder) / 1e9:.2f} GB"
    )
    method = name if name in ("gptq", "awq") else "bitsandbytes"
    return {"bits": 8 if name == "int8" else 4, "method": method}


def quantize_model(artifact: Artifact, target: Path, name: str, say: Callable[[str], None]) -> None:
    """Pack a model that has no adapter and write it to `target`."""
    source = base_folder(artifact)
    with output_folder(target) as aside:
        for file in [*list_weight_files(source), *source.glob("*.json"), *source.glob("*.jinja")]:
            # The manifest is of the unpacked files, and the facts are written anew below.
            if file.name not in (MANIFEST, model_facts.FILE):
                shutil.copyfile(file, aside / file.name)
        copy_processor_files(write_card.find_missing_processor(artifact), aside)
        chat_format = write_card.chat_format_of(artifact)
        packed = quantize_merged(aside, name, artifact, say)
        facts = replace(model_facts.load_or_collect_facts(artifact), packed=packed)
        plot = None if artifact.run is None else artifact.run / write_card.PLOT
        write_card.write_descriptions(aside, facts, chat_format, plot)
    say(describe_written(target))


def _count_weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _quantize_with_bitsandbytes(
    folder: Path, target: Path, name: str, artifact: Artifact, say: Callable[[str], None]
) -> None:
    import torch
    import transformers

    settings: dict[str, Any] = {"load_in_8bit": True}
    if name == "nf4":
        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16",
        }
    make: Any = transformers.BitsAndBytesConfig
    # With "auto" modules may land on the CPU or the disk, which transformers refuses for packed
    # weights.
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    trust = artifact.base.trust_remote_code
    architecture = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    empty = build_empty_model(architecture, artifact.task, trust)
    skipped = find_unpacked_modules(empty)
    model = read_folder_class(folder, artifact.task, trust).from_pretrained(
        folder,
        quantization_config=make(**settings, llm_int8_skip_modules=skipped),
        dtype="auto",
        device_map={"": device},
        # Never left out: transformers would ask at the terminal.
        trust_remote_code=trust,
    )
    experts = sum(group.num_weights for group in find_experts(model))
    if experts:
        # Packed experts could be read by no plain transformers (5.23), which packs linear layers.
        say(
            f"experts   {experts:,} weights keep their number format: bitsandbytes packs linear "
            "layers alone"
        )
    model.save_pretrained(target, max_shard_size=SHARD_BYTES)


def _quantize_with_gptqmodel(folder: Path, target: Path, name: str, artifact: Artifact) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig

    rows = _load_calibration_rows(artifact)
    try:
        model = GPTQModel.load(str(folder), QuantizeConfig(bits=4, group_size=128, method=name))
        model.quantize(rows)
        model.save(str(target))
    # Whichever it is, the model or the machine does not fit the library, and its text says why.
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"--quantize {name}: gptqmodel cannot pack this model on this machine: {error}\n"
            "Without it there are nf4 and int8, by bitsandbytes."
        ) from error


def _remove_local_paths(folder: Path) -> None:
    """Take the folders of this machine out of what gptqmodel wrote."""
    for file in (folder / name for name in _CONFIGS):
        if not file.is_file():
            continue
        settings = json.loads(file.read_text(encoding="utf-8"))
        for section in (settings, settings.get("quantization_config") or {}):
            (section.get("meta") or {}).pop("offload_to_disk_path", None)
        write_card.write_config(file, settings)


def _load_calibration_rows(artifact: Artifact) -> list[dict[str, list[int]]]:
    """Return the first training rows as tokens: what the model will be asked is most like them."""
    if artifact.config is None:
        raise UserError(
            f"{artifact.name}: GPTQ and AWQ look at training rows, and this is no run of luthier. "
            "Name the run's folder, or use --quantize nf4."
        )
    from luthier.data.batching.token_rows import TokenRows
    from luthier.data.prepare import prepare
    from luthier.model.tokenizer import load_tokenizer
    from luthier.train import methods

    config = artifact.config
    # The rows are encoded as in training, and usually found in the cache.
    tokenizer = load_tokenizer(artifact.base)
    prepared = prepare(
        config.dataset, methods.make_row_encoders(config, tokenizer), tokenizer, config.seed
    )
    if not isinstance(prepared.train, TokenRows):
        raise UserError(
            f"{artifact.name}: GPTQ and AWQ look at training rows, and this run streams them. Use "
            "--quantize nf4."
        )
    if prepared.has_images:
        raise UserError(
            f"{artifact.name}: GPTQ and AWQ look at training rows as tokens alone, and those of "
            "this run have images. Use --quantize nf4."
        )
    train = prepared.train
    some = [train.table.row(int(number))["input_ids"] for number in train.different[:CALIBRATION]]
    return [{"input_ids": ids.tolist(), "attention_mask": [1] * len(ids)} for ids in some]
