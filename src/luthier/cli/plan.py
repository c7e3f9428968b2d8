"""`luthier plan`: the memory of a run before it runs."""

from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from luthier.cli.arguments import TRUST, CommandLine, Flag, ParsedArguments
from luthier.config.recipes import format_path
from luthier.terminal import make_console, print_json

if TYPE_CHECKING:
    from luthier.config.schema import RunConfig
    from luthier.data.prepare import LargestRows
    from luthier.memory.advice import Advice
    from luthier.memory.plan import MemoryPlan
    from luthier.memory.sharding import Sharding
    from luthier.memory.workload import Hardware

COMMAND_LINE = CommandLine(
    "plan",
    "luthier plan recipe=NAME [key=value ...] [flags]\n\n"
    "Says how much memory each GPU or process of a run needs, part by part, from the\n"
    "configuration alone, and what to change if it does not fit. It tries one training step with\n"
    "tensors that have shapes and no content: no weights are loaded, no GPU is needed, and of the\n"
    "model only its config.json. It writes nothing.\n\n"
    "Exit code: 0 if the run fits, 1 if it does not, 2 for a mistake in what was typed.",
    (
        Flag(
            "--memory", "SIZE", "plan for GPUs of this size, such as 24GB, which need not be here"
        ),
        Flag("--gpus", "N", "for so many GPUs; each way of sharing the work gets a column"),
        Flag("--launch", "NAME|FILE", "for this config of `luthier launch`, such as fsdp2"),
        Flag("--json", None, "one JSON object, for machines"),
        TRUST,
    ),
    "  luthier plan recipe=quickstart\n"
    "  luthier plan recipe=qlora_llama --memory 24GB\n"
    "  luthier plan recipe=full_smollm2 --memory 24GB --gpus 4\n"
    "  luthier plan recipe=lora_qwen --memory 80GB --launch fsdp2\n",
)


def run(arguments: list[str]) -> int:
    """Plan a run; returns 0 if it fits and 1 if it does not."""
    if COMMAND_LINE.asks_help(arguments):
        return 0
    parsed = COMMAND_LINE.parse(arguments)
    # Imported behind the flags, so that `--help` and a wrong flag answer at once.
    from luthier.config import load_config
    from luthier.config.recipes import check_recipe_files
    from luthier.environment import set_environment
    from luthier.model.source import check_model_path

    # The flags come first: composing the config takes longer than reading a wrong --memory.
    hardware = _imagined(parsed)
    config = load_config(parsed.overrides, TRUST.name in parsed.switches).config
    # A wrong path is reported before transformers is imported to read the model's config.json.
    check_recipe_files(config, ["model.path"])
    check_model_path(config.model)
    set_environment(config)
    memory_plan, advice = plan_and_advise(config, hardware, parsed)
    if "--json" in parsed.switches:
        print_json(plan_as_values(memory_plan, advice))
    else:
        from luthier.memory.report import print_plan

        print_plan(memory_plan, advice)
    return 0 if memory_plan.fits else 1


def plan_and_advise(
    config: "RunConfig", imagined: "Hardware | None", parsed: ParsedArguments
) -> "tuple[MemoryPlan, list[Advice]]":
    """Plan as the flags say, and show in the terminal that it goes on."""
    from luthier.errors import UserError
    from luthier.memory.advice import advise
    from luthier.memory.plan import plan_memory
    from luthier.memory.workload import bound_by_rows
    from luthier.model.model_images import find_model_images
    from luthier.train.launch.fsdp import check_fsdp_config

    # A step on tensors without content takes seconds for a large model; the plan itself goes to
    # stdout.
    with make_console(stderr=True).status("trying a step") as status:
        shardings = _shardings(parsed)
        if config.quantization.is_enabled and any(each.kind == "zero3" for each in shardings):
            raise UserError(
                "quantization: weights of 4 or 8 bits do not train under DeepSpeed ZeRO-3.\n"
                "Instead: --launch zero2, or --launch ddp."
            )
        if any(sharding.kind == "fsdp2" for sharding in shardings):
            check_fsdp_config(config)
        hardware = imagined or _this_machine(config, shardings, parsed)
        usual = shardings or _usual(hardware, config.quantization.is_enabled)
        memory_plan = plan_memory(config, hardware, usual)
        largest, problem = _find_largest_rows(config)
        longest, images = largest or (0, ())
        bounded = bound_by_rows(config, longest)
        if bounded.chat.max_length != config.chat.max_length:
            allowed = memory_plan.workload.length, memory_plan.best.total
            memory_plan = plan_memory(bounded, hardware, usual, images)
            memory_plan = replace(memory_plan, longest_allowed=allowed)
        elif images:
            memory_plan = plan_memory(config, hardware, usual, images)
        elif problem:
            note = f"No row was read, so the longest allowed row is planned. {problem}"
            memory_plan = _with_note(memory_plan, note)
        elif bound_by_rows(config, 1) != config and not longest:
            note = (
                "The rows are not encoded yet, so the longest allowed row is planned. After "
                "`luthier prepare` the plan is for the longest row of the data."
            )
            memory_plan = _with_note(memory_plan, note)
        if images:
            pixels = sum(height * width for height, width in images)
            note = f"Each row is planned with the images of the row with most: {pixels:,} pixels."
            memory_plan = _with_note(memory_plan, note)
        elif not longest and find_model_images(config.model) is not None:
            note = "Rows that are not encoded yet are planned without images."
            memory_plan = _with_note(memory_plan, note)
        status.update("trying changes")
        return memory_plan, advise(bounded, memory_plan)


def _with_note(memory_plan: "MemoryPlan", note: str) -> "MemoryPlan":
    """Return the plan with a sentence more below its table."""
    workload = memory_plan.workload
    with_note = replace(workload, assumptions=(*workload.assumptions, note))
    return replace(memory_plan, workload=with_note)


_LONGEST_PROBLEM = 300
"""Characters of the reason for which no rows were read."""
_QUICKLY_ENCODED = 8 * 2**20
"""Bytes of data that are encoded for a plan where the cache does not hold their rows: seconds."""


def _find_largest_rows(config: "RunConfig") -> "tuple[LargestRows | None, str]":
    """Return how large training rows get, None where that is not known in seconds; and why.

    They are those of the cache. Small files that it does not hold are encoded, and nothing of that
    stays. What keeps the rows from being read is no error: a plan is also made where they are not.
    """
    from luthier.chat import ChatError
    from luthier.data.prepare import find_largest_rows, prepare
    from luthier.errors import UserError
    from luthier.model.tokenizer import load_tokenizer
    from luthier.train.methods import make_row_encoders

    try:
        tokenizer, dataset = load_tokenizer(config.model), config.dataset
        encoders = make_row_encoders(config, tokenizer)
        largest = find_largest_rows(dataset, encoders, tokenizer)
        if largest is None and _is_quickly_encoded(config):
            with TemporaryDirectory() as cache:
                elsewhere = dataset.model_copy(update={"cache": cache, "workers": 1})
                prepare(elsewhere, encoders, tokenizer, config.seed)
                largest = find_largest_rows(elsewhere, encoders, tokenizer)
    except (UserError, ChatError) as error:
        return None, shorten(str(error), _LONGEST_PROBLEM, placeholder=" ...")
    return largest, ""


def _is_quickly_encoded(config: "RunConfig") -> bool:
    """Return whether all training rows are in small files of this machine."""
    from luthier.data.examples import DatasetSources, source_key

    if config.dataset.streaming:
        return False
    sources = DatasetSources(config.dataset)
    opened = [sources.open(source_key(name, sources.train)) for name in sources.train]
    if not all(source.source.files for source in opened):
        return False
    files = {Path(file) for source in opened for file in source.source.files}
    return all(file.is_file() for file in files) and (
        sum(file.stat().st_size for file in files) <= _QUICKLY_ENCODED
    )


def plan_as_values(memory_plan: "MemoryPlan", advice: "list[Advice]") -> dict[str, Any]:
    """Return the plan as values that JSON can hold; sizes are in bytes."""
    values = asdict(memory_plan)
    # Properties are no fields, so asdict leaves them out; readers of the JSON need both.
    for estimate, estimate_values in zip(memory_plan.estimates, values["estimates"], strict=True):
        estimate_values |= {"total": estimate.total, "fits": estimate.fits}
    return values | {"fits": memory_plan.fits, "advice": [asdict(each) for each in advice]}


def _imagined(parsed: ParsedArguments) -> "Hardware | None":
    """Return the GPUs that the flags describe, None for this machine's; UserError if wrong."""
    from luthier.memory import workload

    size = parsed.texts.get("--memory")
    file = parsed.texts.get("--launch")
    number = parsed.numbers.get("--gpus")
    if file is not None:
        number = _read_sharding(file, number).processes
    return (
        workload.hypothetical_gpus(workload.parse_size(size, "--memory"), number or 1)
        if size
        else None
    )


def _shardings(parsed: ParsedArguments) -> "list[Sharding]":
    file = parsed.texts.get("--launch")
    return [_read_sharding(file, parsed.numbers.get("--gpus"))] if file else []


def _read_sharding(name: str, processes: int | None) -> "Sharding":
    from luthier.memory.sharding import read_sharding
    from luthier.train.launch.request import find_launch_file

    return read_sharding(format_path(find_launch_file(name, "--launch")), processes)


def _this_machine(
    config: "RunConfig", shardings: "list[Sharding]", parsed: ParsedArguments
) -> "Hardware":
    from luthier.errors import UserError
    from luthier.memory import workload

    number = parsed.numbers.get("--gpus")
    detected = workload.detect_hardware(
        config.model, shardings[0].processes if shardings else number
    )
    # Without a launch file --gpus means GPUs; a launch file may also describe CPU processes.
    if detected.kind != "cuda" and number and not shardings:
        raise UserError(
            f"--gpus {number}: this machine has no GPU. To plan for others, say how much memory "
            f"each has: --gpus {number} --memory 24GB."
        )
    return detected


def _usual(hardware: "Hardware", is_quantized: bool) -> "list[Sharding]":
    """Return the columns of a plan without --launch: each way to share the work, else one GPU."""
    from luthier.memory.sharding import SHARDING_KINDS, Sharding

    if hardware.count == 1 or hardware.kind != "cuda":
        return [Sharding()]
    left_out = ("none", "zero3") if is_quantized else ("none",)
    return [Sharding(kind, hardware.count) for kind in SHARDING_KINDS if kind not in left_out]
