"""`luthier merge`: adapters become part of their base, for servers that know no adapters."""

import re
import shlex
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from luthier.cli.arguments import BASE, TRUST, CommandLine, Flag, ParsedArguments
from luthier.config.trust import check_recorded, trust_of
from luthier.errors import UserError
from luthier.model.artifact import Artifact, find_artifact, read_run_chat, read_run_config

DTYPES = ("float32", "bfloat16", "float16")
ONTO = ("trained", "original")
PACKINGS = ("nf4", "int8", "gptq", "awq")
SERVERS = ("vllm", "per-expert")
FILES = ("gguf", "gguf-q8_0")

COMMAND_LINE = CommandLine(
    "merge",
    "luthier merge RUN [RUN:WEIGHT ...] [flags]\n\n"
    "Adds a run's adapter to its base in float32, casts, and writes a model that any server\n"
    "loads, with tokenizer, template, stop tokens and card. RUN is the folder of a run, a\n"
    "checkpoint or an adapter, or a hub name; several adapters of one base add up, each by its\n"
    "weight (RUN:0.5 OTHER:0.5). Of LoRA one tensor at a time is in memory; other adapters are\n"
    "merged by peft, with the model in memory in float32.\n\n"
    "An adapter that was trained on 4- or 8-bit weights is added to these, unpacked: they are\n"
    "what it learned on. --onto original adds it to the weights before they were packed.\n\n"
    "Then the model is loaded with the adapter and once more as merged, and their logits are\n"
    "compared. A checkpoint that FSDP or ZeRO left in shards is put together instead.\n\n"
    "--to gguf writes one file for llama.cpp and Ollama beside the merged model, by llama.cpp's\n"
    "own converter (--llama-cpp), and compares it with the model.\n\n"
    "--adapter-for writes an adapter in place of a model: under the names of the model's files,\n"
    "an adapter for each expert where these have a tensor for each, and with one rank and scale.",
    (
        Flag("--out", "FOLDER", "where the model goes; default: merged/ in the run's folder"),
        Flag("--dtype", "NAME", "float32, bfloat16 or float16; default: the base's"),
        Flag("--onto", "WEIGHTS", "trained (default) or original: see above"),
        BASE,
        Flag("--quantize", "FORMAT", "pack the result for serving: nf4, int8, gptq or awq"),
        Flag(
            "--adapter-for", "SERVER", "write an adapter: vllm, or per-expert (luthier docs export)"
        ),
        Flag("--to", "FORMAT", "also one file: gguf, or gguf-q8_0 with 8 bits a weight"),
        Flag("--llama-cpp", "FOLDER", "a checkout of llama.cpp ($LLAMA_CPP, or ./llama.cpp)"),
        Flag("--no-verify", None, "do not compare logits (loading takes 4 bytes a weight)"),
        Flag("--overwrite", None, "replace a model of luthier that is in the folder"),
        TRUST,
    ),
    "  luthier merge runs/quickstart/default\n"
    "  luthier merge runs/quickstart/default --out served --dtype float16\n"
    "  luthier merge runs/a/default:0.7 runs/b/default:0.3 --out both\n"
    "  luthier merge runs/quickstart/default --quantize nf4 --out served-4bit\n"
    "  luthier merge runs/quickstart/default --to gguf --llama-cpp ~/llama.cpp\n"
    "  luthier merge runs/experts/default --adapter-for vllm --out served-adapter\n",
)
_NO_ADAPTER = "this model has no adapter, so its weights stay as they are. Leave this out."
# The colon of `package:NAME` is followed by no number, so it is not taken for a weight.
_WEIGHT = re.compile(r"^(?P<word>.+):(?P<weight>-?\d+(\.\d+)?)$")


def run(arguments: list[str]) -> int:
    """Merge the adapters that were typed; returns the exit code."""
    if COMMAND_LINE.asks_help(arguments):
        return 0
    parsed = COMMAND_LINE.parse(arguments)
    _refuse_values(parsed)
    if not parsed.overrides:
        raise UserError("luthier merge: name a run, such as luthier merge runs/quickstart/default.")
    from luthier.model.model_files import sharding_of

    # A checkpoint in shards holds whole weights: it is put together and has no adapter to add.
    if len(parsed.overrides) == 1 and sharding_of(Path(parsed.overrides[0])) is not None:
        return _merge_sharded(Path(parsed.overrides[0]), parsed)
    weighted = [_split_weight(word) for word in parsed.overrides]
    base, trust = parsed.texts.get("--base"), trust_of(parsed.switches)
    artifacts = [find_artifact(word, base, trust) for word, _ in weighted]
    if "--to" in parsed.texts:
        return _write_gguf(artifacts, [weight for _, weight in weighted], parsed)
    if "--adapter-for" in parsed.texts:
        return _export_adapter(artifacts, [weight for _, weight in weighted], parsed)
    return _merge(artifacts, [weight for _, weight in weighted], parsed)


def _merge(artifacts: list[Artifact], weights: list[float], parsed: ParsedArguments) -> int:
    from luthier.environment import quiet_libraries
    from luthier.export import merge_adapter
    from luthier.export.merge_in_memory import too_large
    from luthier.export.quantize import check_format, quantize_model
    from luthier.storage.output_folder import check_target

    target = choose_target(artifacts[0], parsed)
    quantize = parsed.texts.get("--quantize")
    if quantize is not None:
        check_format(quantize)
    order = merge_adapter.MergeOrder(
        artifacts,
        weights,
        target,
        parsed.texts.get("--dtype"),
        parsed.texts.get("--onto", "trained"),
        "--no-verify" not in parsed.switches,
        quantize,
    )
    overwrite = "--overwrite" in parsed.switches
    # A model without an adapter has nothing to merge: it is only packed.
    if quantize is not None and len(artifacts) == 1 and artifacts[0].adapter is None:
        if artifacts[0].base.loader is not None:
            raise UserError(merge_adapter.NO_PACKING)
        parsed.refuse_flags(["--dtype", "--onto"], _NO_ADAPTER)
        check_target(target, overwrite, *merge_adapter.list_inputs(order.artifacts))
        quiet_libraries()
        quantize_model(artifacts[0], target, quantize, print)
        return 0
    # What can be refused is refused before the libraries are imported and weights are read.
    merge_adapter.refuse_merge(order, overwrite)
    quiet_libraries()
    try:
        merge_adapter.merge_adapters(order, print)
    # torch reports a full CPU memory as a RuntimeError ("not enough memory"), and numpy as a
    # MemoryError; other RuntimeErrors are no mistake of the user's.
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "memory" in str(error).lower():
            raise UserError(too_large(artifacts[0])) from error
        raise
    return 0


def _write_gguf(artifacts: list[Artifact], weights: list[float], parsed: ParsedArguments) -> int:
    """Merge, and write the merged model as one file: `luthier merge RUN --to gguf`."""
    first = artifacts[0]
    is_whole = len(artifacts) == 1 and first.adapter is None
    if is_whole:
        parsed.refuse_flags(["--dtype", "--onto"], _NO_ADAPTER)
    target = choose_target(first, parsed)
    file = target.with_name(f"{target.name}.gguf")
    folder = first.folder if is_whole and first.folder is not None else target
    from luthier.environment import quiet_libraries
    from luthier.export.gguf_file import GgufOrder, choose_outtype, find_converter, write_gguf
    from luthier.model.gguf import check_gguf_installed

    quiet_libraries()
    command = shlex.join(["luthier", "merge", *parsed.overrides, "--to", parsed.texts["--to"]])
    converter = find_converter(parsed.texts.get("--llama-cpp"), command, folder, file)
    check_gguf_installed()
    if file.exists() and "--overwrite" not in parsed.switches:
        raise UserError(f"{file} exists already. Choose another --out, or add --overwrite.")
    if not is_whole:
        _merge(artifacts, weights, parsed)
    elif first.folder is None:
        raise UserError(f"{first.name} is no folder of this machine. Download it first.")
    outtype = choose_outtype(folder, parsed.texts["--to"] == "gguf-q8_0")
    verify = "--no-verify" not in parsed.switches
    write_gguf(GgufOrder(folder, file, outtype, converter, verify), print)
    print(f"next      llama-server --jinja -m {shlex.quote(str(file))}")
    if (notes := folder / "EXPORT.md").is_file():
        print(f"          Ollama: the Modelfile in {notes}, with FROM {file.resolve()}")
    return 0


def _export_adapter(
    artifacts: list[Artifact], weights: list[float], parsed: ParsedArguments
) -> int:
    """Write an adapter under a server's names: `luthier merge RUN --adapter-for vllm`."""
    from luthier.environment import quiet_libraries
    from luthier.export.merge_adapter import list_inputs
    from luthier.export.server_adapter import export_adapter
    from luthier.storage.output_folder import check_target

    parsed.refuse_flags(
        ["--dtype", "--no-verify", "--onto", "--quantize"],
        "--adapter-for writes no model. Leave one of the two out.",
    )
    if len(artifacts) > 1 or weights != [1.0]:
        raise UserError("--adapter-for takes one adapter, without a weight.")
    (artifact,) = artifacts
    if artifact.adapter is None:
        raise UserError(
            f"{artifact.name} is a whole model and no adapter: servers load it as it is."
        )
    if artifact.base.loader is not None:
        raise UserError(
            "--adapter-for: a function loads this model (model.loader), and servers have no class "
            "for it. Leave it out."
        )
    target = choose_target(artifact, parsed, "merged-adapter")
    check_target(target, "--overwrite" in parsed.switches, *list_inputs(artifacts))
    quiet_libraries()
    export_adapter(artifact, target, parsed.texts["--adapter-for"], print)
    return 0


def choose_target(artifact: Artifact, parsed: ParsedArguments, name: str = "merged") -> Path:
    """Return the folder of the result: as typed, or `name` beside what it is made of."""
    typed = parsed.texts.get("--out")
    if typed is not None:
        return Path(typed).expanduser()
    if artifact.run is not None:
        return artifact.run / name
    # Beside the folder only where it was typed as a path: a hub model's folder is in the cache.
    if artifact.name == str(artifact.folder):
        return Path(f"{artifact.name.rstrip('/')}-{name}")
    raise UserError(f"{artifact.name} is not on this machine: say where the model goes, --out.")


def _refuse_values(parsed: ParsedArguments) -> None:
    allowed = {"--dtype": DTYPES, "--onto": ONTO, "--quantize": PACKINGS, "--adapter-for": SERVERS}
    allowed["--to"] = FILES
    for flag, values in allowed.items():
        typed = parsed.texts.get(flag)
        if typed is not None and typed not in values:
            raise UserError(f"{flag} {typed}: there are {', '.join(values)}.")
    if "--to" in parsed.texts and (other := {*parsed.texts} & {"--quantize", "--adapter-for"}):
        raise UserError(f"--to and {min(other)} write different models. Leave one of the two out.")
    if "--llama-cpp" in parsed.texts and "--to" not in parsed.texts:
        raise UserError("--llama-cpp: is for --to gguf. Add it, or leave both out.")


def _split_weight(word: str) -> tuple[str, float]:
    """Split RUN:WEIGHT; the weight of `package:NAME` and of a folder so called is 1."""
    match = _WEIGHT.match(word)
    if match is None or Path(word).exists():
        return word, 1.0
    return match["word"], float(match["weight"])


def _merge_sharded(folder: Path, parsed: ParsedArguments) -> int:
    """Put a sharded checkpoint together: `luthier merge RUN/checkpoints/checkpoint-N`."""
    from luthier.environment import quiet_libraries
    from luthier.export import sharded_checkpoint
    from luthier.export.merge_adapter import list_inputs
    from luthier.model.model_files import sharding_of
    from luthier.storage.output_folder import check_target, describe_written, output_folder

    parsed.refuse_flags(
        ["--onto", "--quantize", "--adapter-for", "--to"],
        "a checkpoint in shards is first put together. Leave this out, and type it when you merge "
        "the folder that is written.",
    )
    artifact = _trained_whole(folder, parsed)
    typed = parsed.texts.get("--out")
    target = Path(typed or f"{str(folder).rstrip('/')}-merged").expanduser()
    inputs, runs = list_inputs([artifact])
    # The default lies beside the checkpoint, in its run.
    check_target(target, "--overwrite" in parsed.switches, [folder, *inputs], runs if typed else [])
    if sharding_of(folder) == "zero" and find_spec("deepspeed") is None:
        raise UserError(
            f"{folder}: ZeRO's shards are read by DeepSpeed, which is not installed here:\n"
            "    pip install deepspeed\n"
            "Its own script beside them does the same: python zero_to_fp32.py . OUT "
            "--safe_serialization"
        )
    quiet_libraries()
    # Written aside and moved into place: an interruption leaves no half of a model behind.
    with output_folder(target) as aside:
        sharded_checkpoint.consolidate(folder, artifact, aside, parsed.texts.get("--dtype"), print)
    print(describe_written(target))
    return 0


def _trained_whole(folder: Path, parsed: ParsedArguments) -> Artifact:
    """Return the run that a sharded checkpoint belongs to, as an artifact of its base."""
    checkpoint = folder.resolve()
    # The checkpoint lies below its run at RUN/checkpoints/checkpoint-N.
    run = next(
        (parent for parent in checkpoint.parents if (parent / "config.yaml").is_file()), None
    )
    base = parsed.texts.get("--base")
    if run is None:
        if base is None:
            raise UserError(
                f"{folder}: shards hold no configuration, and no run is around them.\n"
                "Name the model that was trained: --base ORGANISATION/MODEL."
            )
        return replace(find_artifact(base, trust=trust_of(parsed.switches)), name=str(folder))
    config = read_run_config(run, trust_of(parsed.switches))
    if config.lora.is_enabled:
        raise UserError(
            f"{folder}: the shards of a run with adapters. Its adapter is saved whole at the end "
            f"of the run: luthier merge {run}."
        )
    model = config.model.model_copy(update={"path": base} if base else {})
    chat = read_run_chat(run)
    check_recorded({"chat": chat}, str(run / "run.json"), trust_of(parsed.switches), ("chat",))
    return Artifact(str(folder), model, chat=chat, config=config, run=run)
