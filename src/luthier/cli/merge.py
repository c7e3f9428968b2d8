"""`luthier merge`: adapters become part of their base, for servers that know no adapters."""

import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from luthier.cli.arguments import CommandLine, Flag, ParsedArguments
from luthier.errors import UserError
from luthier.model.artifact import Artifact, find_artifact, read_run_config

DTYPES = ("float32", "bfloat16", "float16")
ONTO = ("trained", "original")
PACKINGS = ("nf4", "int8", "gptq", "awq")

GRAMMAR = CommandLine(
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
    "compared. A checkpoint that FSDP or ZeRO left in shards is put together instead.",
    (
        Flag("--out", "FOLDER", "where the model goes; default: merged/ in the run's folder"),
        Flag("--dtype", "NAME", "float32, bfloat16 or float16; default: the base's"),
        Flag("--onto", "WEIGHTS", "trained (default) or original: see above"),
        Flag("--base", "MODEL", "the adapter's base, where it is no longer at its place"),
        Flag("--quantize", "FORMAT", "pack the result for serving: nf4, int8, gptq or awq"),
        Flag("--no-verify", None, "do not compare logits (loading takes 4 bytes a weight)"),
        Flag("--overwrite", None, "replace what is in the folder"),
    ),
    "  luthier merge runs/quickstart/default\n"
    "  luthier merge runs/quickstart/default --out served --dtype float16\n"
    "  luthier merge runs/a/default:0.7 runs/b/default:0.3 --out both\n"
    "  luthier merge runs/quickstart/default --quantize nf4 --out served-4bit\n",
)
_WEIGHT = re.compile(r"^(?P<word>.+):(?P<weight>-?\d+(\.\d+)?)$")


def run(arguments: list[str]) -> int:
    """Merge what was typed."""
    if GRAMMAR.asks_help(arguments):
        return 0
    parsed = GRAMMAR.parse(arguments)
    _refuse_values(parsed)
    if not parsed.overrides:
        raise UserError("luthier merge: name a run, such as luthier merge runs/quickstart/default.")
    from luthier.export import sharded_checkpoint

    if (
        len(parsed.overrides) == 1
        and sharded_checkpoint.sharding_of(Path(parsed.overrides[0])) is not None
    ):
        return _merge_sharded(Path(parsed.overrides[0]), parsed)
    parted = [_parted(word) for word in parsed.overrides]
    artifacts = [find_artifact(word, parsed.texts.get("--base")) for word, _ in parted]
    return _merge(artifacts, [weight for _, weight in parted], parsed)


def _merge(artifacts: list[Artifact], weights: list[float], parsed: ParsedArguments) -> int:
    from luthier.environment import quiet_libraries
    from luthier.export import merge_adapter
    from luthier.export.merge_in_memory import too_large
    from luthier.export.quantize import check_format, quantize_model
    from luthier.storage.atomic import check_target

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
    if quantize is not None and len(artifacts) == 1 and artifacts[0].adapter is None:
        check_target(target, overwrite)
        quiet_libraries()
        quantize_model(artifacts[0], target, quantize, print)
        return 0
    merge_adapter.refuse_merge(order, overwrite)
    quiet_libraries()
    try:
        merge_adapter.merge_adapters(order, print)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "memory" in str(error).lower():
            raise UserError(too_large(artifacts[0])) from error
        raise
    return 0


def choose_target(artifact: Artifact, parsed: ParsedArguments) -> Path:
    """Where the model goes: as typed, or beside what it is made of."""
    typed = parsed.texts.get("--out")
    if typed is not None:
        return Path(typed).expanduser()
    if artifact.run is not None:
        return artifact.run / "merged"
    if artifact.name == str(artifact.folder):
        return Path(f"{artifact.name.rstrip('/')}-merged")
    raise UserError(f"{artifact.name} is not on this machine: say where the model goes, --out.")


def _refuse_values(parsed: ParsedArguments) -> None:
    allowed = {"--dtype": DTYPES, "--onto": ONTO, "--quantize": PACKINGS}
    for flag, values in allowed.items():
        typed = parsed.texts.get(flag)
        if typed is not None and typed not in values:
            raise UserError(f"{flag} {typed}: there are {', '.join(values)}.")


def _parted(word: str) -> tuple[str, float]:
    """A word and its weight; `package:NAME` and a folder of that very name have none."""
    match = _WEIGHT.match(word)
    if match is None or Path(word).exists():
        return word, 1.0
    return match["word"], float(match["weight"])


def _merge_sharded(folder: Path, parsed: ParsedArguments) -> int:
    """Put a sharded checkpoint together: `luthier merge RUN/checkpoints/checkpoint-N`."""
    from luthier.environment import quiet_libraries
    from luthier.export import sharded_checkpoint
    from luthier.storage.atomic import check_target, output_folder

    artifact = _trained_whole(folder, parsed)
    target = Path(parsed.texts.get("--out") or f"{str(folder).rstrip('/')}-merged").expanduser()
    check_target(target, "--overwrite" in parsed.switches)
    if sharded_checkpoint.sharding_of(folder) == "zero" and find_spec("deepspeed") is None:
        raise UserError(
            f"{folder}: ZeRO's shards are read by DeepSpeed, which is not installed here:\n"
            "    pip install deepspeed\n"
            "Its own script beside them does the same: python zero_to_fp32.py . OUT "
            "--safe_serialization"
        )
    quiet_libraries()
    with output_folder(target) as aside:
        sharded_checkpoint.consolidate(folder, artifact, aside, parsed.texts.get("--dtype"), print)
    print(f"written   {target}")
    return 0


def _trained_whole(folder: Path, parsed: ParsedArguments) -> Artifact:
    """The run that a sharded checkpoint belongs to, as an artifact of its base."""
    checkpoint = folder.resolve()
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
        return replace(find_artifact(base), name=str(folder))
    config = read_run_config(run)
    if config.lora.is_enabled:
        raise UserError(
            f"{folder}: the shards of a run with adapters. Its adapter is saved whole at the end "
            f"of the run: luthier merge {run}."
        )
    model = config.model.model_copy(update={"path": base} if base else {})
    return Artifact(str(folder), model, config=config, run=run)
