"""The tables of paths and of GPUs, which no machine of the tests has."""

from io import StringIO

from luthier.doctor.path_tests import PathResult
from luthier.doctor.tables import print_machine, print_path_results
from luthier.doctor.training_paths import EXACT, TrainingPath
from luthier.terminal import make_console


def printed(show, *values):
    stream = StringIO()
    show(*values, make_console(file=stream, width=80))
    return [line.rstrip() for line in stream.getvalue().splitlines()]


def path(name, missing=None):
    return TrainingPath(name, (), EXACT, "do without it", missing=missing)


NUMBERS = {
    "loss_difference": 2.3e-7, "gradient_difference": 0.0, "tokens_per_second": 12345.6,
    "peak_bytes": 31 * 2**20, "planned_bytes": 40 * 2**20,
}  # fmt: skip
RIGHT = PathResult(path("packed-flash_attention_2"), "right", None, NUMBERS)
WRONG = PathResult(path("nf4"), "wrong", "its process ended with SIGSEGV: no [more]")
ABSENT = PathResult(path("fsdp2", "there is one GPU"), "not here", "there is one GPU")


def test_paths_are_listed_with_the_reasons_below():
    assert printed(print_path_results, [RIGHT, WRONG, ABSENT]) == [
        "Paths, against float32 on the CPU",
        "path                       result      loss   gradient   tokens/s         memory",
        "─" * 80,
        "packed-flash_attention_2   right      2e-07      0e+00     12,346   31 of 40 MiB",
        "nf4                        wrong",
        "fsdp2                      not here",
        "nf4: its process ended with SIGSEGV: no [more]. Until it is right: do without",
        "it.",
        "fsdp2: there is one GPU",
        "",
        "1 of 2 paths are wrong",
    ]


def test_all_paths_are_right():
    assert printed(print_path_results, [RIGHT, ABSENT])[-1] == (
        "all 1 paths of this machine are right"
    )


FACTS = {
    "machine": {"cores": 16, "instructions": [], "memory_gib": 128.5},
    "gpus": {
        "0": {"name": "NVIDIA H200", "memory_gib": 139.8, "free_memory_gib": 139.2,
              "capability": "9.0", "bf16": True, "fp8": True},
        "1": {"name": "Tesla T4", "memory_gib": 15.0, "free_memory_gib": 14.0,
              "capability": "7.5", "bf16": False, "fp8": False},
    },
    "torch": {"nccl": None}, "kernels": {"attention": {"kernels": None, "flash_attn": "2.8"}},
    "folders": {
        "runs": {"path": "/w/runs", "free_gib": 60.1, "write_mib_per_second": 1200},
        "cache": {"path": "/c", "free_gib": 1.0, "write_mib_per_second": None,
                  "problem": "cannot be written: Read-only file system"},
    },
    "hub": {"login": "somebody"},
    "versions": {
        "torch": {"here": "2.14.0", "tried": "2.13", "state": "newer than tried"},
        "trl": {"here": "1.16.0", "tried": "1.16", "state": "as tried"},
    },
    "choice": {"largest_model_billions": {"LoRA": 12.5}},
}  # fmt: skip


def test_facts_have_their_units():
    assert printed(print_machine, FACTS) == [
        "Machine",
        "  cores               16",
        "  instructions        none",
        "  memory              128.5 GiB",
        "",
        "GPUs",
        "  GPU 0               NVIDIA H200, 139.8 GiB (139.2 free), compute capability",
        "                      9.0: bf16, fp8",
        "  GPU 1               Tesla T4, 15.0 GiB (14.0 free), compute capability 7.5:",
        "                      neither bf16 nor fp8",
        "",
        "torch",
        "  nccl                none",
        "",
        "Kernels",
        "  attention           kernels none, flash_attn 2.8",
        "",
        "Folders",
        "  runs                /w/runs: 60.1 GiB free, 1,200 MiB/s written",
        "  cache               /c: 1.0 GiB free, cannot be written: Read-only file system",
        "",
        "Hugging Face hub",
        "  login               somebody",
        "",
        "Versions",
        "  torch               2.14.0: newer than tried (2.13)",
        "  as tried            trl 1.16.0",
        "",
        "What luthier would choose",
        "  largest model       LoRA 12.5 B parameters",
        "",
    ]
