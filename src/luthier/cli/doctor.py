"""`luthier doctor`: what this machine has, and whether each way of training is right on it."""

from typing import TYPE_CHECKING, Any

from luthier.cli.arguments import CommandLine, Flag, ParsedArguments
from luthier.errors import UserError
from luthier.terminal import make_console, print_json

if TYPE_CHECKING:
    from luthier.doctor.path_tests import PathResult

COMMAND_LINE = CommandLine(
    "doctor",
    "luthier doctor [flags]\n\n"
    "Says what this machine has for training: GPUs, driver and NCCL, the build of torch, kernels,\n"
    "cores, disks, the hub, and versions against those that were tried; and what luthier would\n"
    "choose on it.\n\n"
    "With --test: trains a tiny random model for four steps along each path that is here (number\n"
    "formats, quantization, packed rows by each attention, checkpointing, compilation, several\n"
    "processes), and holds losses and gradients against plain arithmetic in float32 on the CPU.\n"
    "It takes one to two minutes, needs no network, and leaves nothing on the disk.\n\n"
    "Exit code: 0, 1 if a path is wrong, 2 for a mistake in what was typed.",
    (
        Flag("--test", None, "train along each path, and compare it"),
        Flag("--only", "PATHS", "test these paths alone, such as nf4,ddp"),
        Flag("--json", None, "one JSON object, for machines"),
    ),
    "  luthier doctor\n"
    "  luthier doctor --test\n"
    "  luthier doctor --only nf4,packed-varlen\n"
    "  luthier doctor --test --json | jq '.paths[] | select(.state == \"wrong\")'\n",
)


def run(arguments: list[str]) -> int:
    """Describe the machine and test it if that is typed; returns 1 where a path is wrong."""
    if COMMAND_LINE.asks_help(arguments):
        return 0
    parsed = COMMAND_LINE.parse(arguments)
    if parsed.overrides:
        raise UserError(
            f"`luthier doctor` takes flags alone, and no {parsed.overrides[0]}: it is about the "
            "machine and not about a run (luthier plan is)."
        )
    # torch comes with these, behind what may be mistyped.
    from luthier.doctor.machine_facts import collect_machine_facts
    from luthier.environment import quiet_bitsandbytes

    quiet_bitsandbytes()
    is_json = "--json" in parsed.switches
    with make_console(stderr=True).status("looking at the machine"):
        paths = _select_paths(parsed)
        facts = collect_machine_facts()
    if not is_json:
        from luthier.doctor.tables import print_machine

        print_machine(facts)
    results = _test_paths(paths) if paths else []
    if is_json:
        from luthier.doctor.path_tests import result_as_values

        values = [result_as_values(result) for result in results]
        print_json(facts | {"paths": values, "holds": _holds(results)})
    elif results:
        from luthier.doctor.tables import print_path_results

        print_path_results(results)
    return 0 if _holds(results) else 1


def _holds(results: "list[PathResult]") -> bool:
    """Return whether no path is wrong."""
    return all(result.state != "wrong" for result in results)


def _select_paths(parsed: ParsedArguments) -> list[Any]:
    """Return the paths to test; none where no test is typed. Raises UserError for unknown ones."""
    only = parsed.texts.get("--only")
    if only is None and "--test" not in parsed.switches:
        return []
    from luthier.doctor.training_paths import list_training_paths, select_training_paths

    return select_training_paths(list_training_paths(), only)


def _test_paths(paths: list[Any]) -> "list[PathResult]":
    """Test the paths, and show in the terminal how far it is."""
    from luthier.doctor.path_tests import run_path_tests

    here = [path.name for path in paths if path.missing is None]
    done: list[str] = []
    with make_console(stderr=True).status(f"training along {len(here)} paths") as status:

        def show(result: "PathResult") -> None:
            if result.state != "not here":
                done.append(result.path.name)
                status.update(
                    f"{len(done)} of {len(here)} paths, {result.path.name} is {result.state}"
                )

        return run_path_tests(paths, show)
