"""The processes of a launch hold the same versions, config, machine, data and weights, or stop.

Each of them reads the command, the packages and the files of its own machine. Where those differ,
the gradients of different models or batches would be averaged, without an error. What is compared
is exchanged in a few small messages at the start; a single process exchanges nothing.
"""

import hashlib
import json
import os
import platform
import socket
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import luthier
from luthier.config.code_settings import hash_code
from luthier.errors import UserError, format_value
from luthier.record.config_diff import flatten_config
from luthier.record.machine_info import MAIN_PACKAGES
from luthier.redaction import redact
from luthier.train.signals import gloo_group

if TYPE_CHECKING:
    from accelerate import PartialState

    from luthier.model.device import Machine

_OWN_TO_A_MACHINE = ("output_dir", "dataset.cache", "dataset.workers")
"""Keys of the config that may differ between the machines of a launch."""
_LISTED_DIFFERENCES = 8
_PATIENCE = 600.0
"""Seconds that a process of the launch may come later than the first one."""
_READ_SECONDS = 30.0
_POLL_SECONDS = 0.1


class RankFacts(NamedTuple):
    """What one process holds."""

    host: str
    facts: Mapping[str, str | None]
    """Each fact by what a message calls it; None is not compared."""


def join_processes(recorded: dict[str, Any], machine: "Machine") -> "PartialState":
    """Compare versions, code, config and device; join the processes and return their state.

    `recorded` is the config as it is written, with references to the environment in place of what
    they hold, so that a folder may have another name on each machine. Raises UserError where the
    processes differ, or cannot meet: a port in use, a machine that does not answer.
    """
    from accelerate import PartialState
    from torch.distributed import DistError, rendezvous

    try:
        store = None
        if _can_meet_by_variables():
            # Before they join: processes on different devices would wait for each other for ever.
            store, rank, size = next(rendezvous("env://"))
            _compare_by_store(store, rank, size, _environment_facts(recorded, machine))
        # It is shared by all its instances, and the first one chooses the device: on a machine
        # with a GPU it must be told here that the CPU is meant.
        state = PartialState(cpu=machine.device_type == "cpu")
        if store is None and state.num_processes > 1:
            check_rank_agreement(_environment_facts(recorded, machine).facts)
        return state
    except DistError as error:
        raise UserError(_explain_no_meeting(str(error))) from error


def _can_meet_by_variables() -> bool:
    """Return whether the environment says where the processes of a launch meet."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return all(os.environ.get(name) for name in names) and int(os.environ["WORLD_SIZE"]) > 1


def _environment_facts(recorded: dict[str, Any], machine: "Machine") -> RankFacts:
    """Return the packages, the code, the config and the device of this process."""
    config = {
        f"{key} (config)": format_value(value)
        for key, value in flatten_config(redact(recorded)).items()
        if key not in _OWN_TO_A_MACHINE
    }
    versions = {f"{name} (package)": version for name, version in _main_versions().items()}
    code: dict[str, str | None] = {"luthier (its code)": _hash_code()}
    code |= {f"{path} (its code)": entry["sha256"] for path, entry in hash_code(recorded).items()}
    devices = {"model.device": machine.device_type, "model.dtype": machine.dtype}
    return RankFacts(socket.gethostname(), versions | code | config | devices)


def _compare_by_store(store: Any, rank: int, size: int, own: RankFacts) -> None:
    """Raise UserError, in every process, where they differ, by way of the store at which they meet.

    The first process reads what all of them hold, and leaves its verdict there. The error names
    ranks that do not come, too, such as those that failed on another machine.
    """
    store.set(f"luthier/facts/{rank}", json.dumps(own))
    if rank == 0:
        keys = [f"luthier/facts/{number}" for number in range(size)]
        problem = _wait_for_ranks(store, keys, _PATIENCE)
        if not problem:
            gathered = [RankFacts(*json.loads(store.get(key))) for key in keys]
            problem = _describe_differences(gathered)
        store.set("luthier/verdict", json.dumps(problem))
    else:
        # The first process says which others are missing.
        problem = _wait_for_ranks(store, ["luthier/verdict"], _PATIENCE * 1.1)
        problem = problem or json.loads(store.get("luthier/verdict"))
    store.set(f"luthier/read/{rank}", "")
    if rank == 0:
        # It may hold the store, from which the others still read.
        _wait_for_ranks(store, [f"luthier/read/{number}" for number in range(size)], _READ_SECONDS)
    if problem:
        raise UserError(problem)


def _wait_for_ranks(store: Any, keys: Sequence[str], seconds: float) -> str:
    """Wait for keys of the ranks, by rank; return which ranks have not come, empty if all have."""
    deadline = time.monotonic() + seconds
    # The store's own way to wait hears no signal.
    while not store.check(keys):
        if time.monotonic() > deadline:
            missing = [number for number, key in enumerate(keys) if not store.check([key])]
            return (
                f"{'Rank' if len(missing) == 1 else 'Ranks'} {_join_numbers(missing)} of this "
                f"launch did not come within {_PATIENCE / 60:g} minutes. What their machines "
                "printed says why."
            )
        time.sleep(_POLL_SECONDS)
    return ""


def check_input_agreement(inputs: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise UserError where data, tokenizer, template or weights differ between the processes.

    `inputs` are the hashes of `resume.hash_run_inputs`; the first process of each machine has that
    of the weights, as all processes of a machine read the same files.
    """
    check_rank_agreement(
        {
            label: (inputs.get(group) or {}).get(key)
            for label, (group, key) in _COMPARED_INPUTS.items()
        }
    )


_COMPARED_INPUTS = {
    "tokenizer": ("tokenizer", "sha256"),
    "chat template": ("tokenizer", "template_sha256"),
    "weights of the model": ("model", "weights_sha256"),
    "weights of the teacher": ("teacher", "weights_sha256"),
    "weights of reward models": ("rewards", "weights_sha256"),
    "rows, or what trains in them": ("data", "sha256"),
}


def check_rank_agreement(facts: Mapping[str, str | None]) -> None:
    """Raise UserError, in every process, where any fact differs between the processes.

    All processes call it together, after they have joined; one that is alone goes on at once. The
    message has each value with its ranks and their machines.
    """
    problem = _describe_differences(_gather_facts(facts))
    if problem:
        raise UserError(problem)


def describe_ranks_without(path: Path) -> str:
    """Return the ranks that do not see a file, with their machines; empty where all of them do.

    All processes call it together; `path` may be another one for each. `ranks 8-15 (node2)`.
    """
    gathered = _gather_facts({"is_there": str(path.is_file())})
    ranks = _group_by_value(gathered, "is_there").get("False", [])
    return _describe_ranks(ranks, gathered) if ranks and len(gathered) > 1 else ""


def _gather_facts(facts: Mapping[str, str | None]) -> list[RankFacts]:
    """Return the facts of all processes that have joined, by rank."""
    from torch import distributed

    own = RankFacts(socket.gethostname(), dict(facts))
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return [own]
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, own, gloo_group())
    return gathered


def _describe_differences(gathered: Sequence[RankFacts]) -> str:
    """Return what differs between the processes, by rank, and what to do; empty if nothing does."""
    names = dict.fromkeys(name for rank in gathered for name in rank.facts)
    differing = [name for name in names if len(_group_by_value(gathered, name)) > 1]
    if not differing:
        return ""
    lines = [f"  {name}: {_describe_values(gathered, name)}" for name in differing]
    more = len(lines) - _LISTED_DIFFERENCES
    lines = lines[:_LISTED_DIFFERENCES] + ([f"  and {more} more"] if more > 0 else [])
    return (
        "The processes of this launch differ, and would not train one model:\n"
        + "\n".join(lines)
        + f"\n{_advice(differing[0])}"
    )


def _group_by_value(gathered: Sequence[RankFacts], name: str) -> dict[str, list[int]]:
    """Return the ranks that hold each value of a fact; those that do not know it are left out."""
    ranks: dict[str, list[int]] = {}
    for rank, (_, facts) in enumerate(gathered):
        value = facts.get(name)
        if value is not None:
            ranks.setdefault(value, []).append(rank)
    return ranks


def _describe_values(gathered: Sequence[RankFacts], name: str) -> str:
    """Return the values of a fact, each with its ranks: `5.23.0 on ranks 0-7 (node1), ...`."""
    return ", ".join(
        f"{_shorten_hash(value)} on {_describe_ranks(ranks, gathered)}"
        for value, ranks in _group_by_value(gathered, name).items()
    )


def _shorten_hash(value: str) -> str:
    """Return the beginning of a SHA-256, and any other value as it is."""
    is_hash = len(value) == 64 and set(value) <= set("0123456789abcdef")
    return f"{value[:12]}..." if is_hash else value


def _describe_ranks(ranks: Sequence[int], gathered: Sequence[RankFacts]) -> str:
    """Return some ranks with their machines: `ranks 0-7 (node1) and 12 (node2)`."""
    texts = []
    for host, group in groupby(ranks, key=lambda rank: gathered[rank].host):
        texts.append(f"{_join_numbers(list(group))} ({host})")
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {' and '.join(texts)}"


def _join_numbers(numbers: Sequence[int]) -> str:
    """Return ascending numbers with their runs joined: `0-3, 5`."""
    starts = [0, *(at + 1 for at, (a, b) in enumerate(pairwise(numbers)) if b > a + 1)]
    runs = [numbers[a:b] for a, b in pairwise([*starts, len(numbers)])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _advice(name: str) -> str:
    """Return what to do about a fact that differs."""
    if name.endswith("(package)"):
        return (
            "Install the same versions on all machines (pip install -c constraints.txt ...), or "
            "use one virtual environment on a file system that they share."
        )
    if name == "luthier (its code)":
        return "Check out the same commit on all machines, without changes of their own."
    if name.endswith("(config)"):
        return "Start all processes with the same command; a launcher does."
    if name in _COMPARED_INPUTS:
        return (
            "Give all machines the same files: from a file system that they share, or by a fixed "
            "revision of the hub (model.revision, dataset.revision)."
        )
    return f"Set it for all of them, such as {_SETTINGS.get(name, name)}."


_SETTINGS = {
    "model.device": "model.device=cuda",
    "model.dtype": "model.dtype=bfloat16",
    "model.attention": "model.attention=sdpa",
}


def _main_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a run's numbers."""
    versions = {"python": platform.python_version()}
    for name in MAIN_PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _hash_code() -> str:
    """Return one SHA-256 of luthier's own modules: two checkouts may have one version."""
    folder, digest = Path(luthier.__file__).parent, hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        name = file.relative_to(folder).as_posix()
        digest.update(f"{name}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _explain_no_meeting(error: str) -> str:
    """Return, by the text of torch's error, why the processes did not meet and what to do."""
    address = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    if "EADDRINUSE" in error or "already in use" in error:
        return (
            f"The port at which the processes of this launch meet ({address}) is in use by another "
            "program, perhaps by another run.\nChoose a free one: --main_process_port of luthier "
            "launch and accelerate launch (0 takes any, on one machine), --master_port of "
            "torchrun, or MASTER_PORT."
        )
    return (
        f"The processes of this launch could not meet at {address} (torch: {_first_line(error)}).\n"
        "All of them need the address of the first machine (--main_process_ip), the same free "
        "port (--main_process_port), the same number of processes, and no firewall between them."
    )


def _first_line(text: str) -> str:
    """Return the first line of an error of torch, without the place in its sources."""
    return text.strip().partition("\n")[0].rpartition("] ")[2][:300]
