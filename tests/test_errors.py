"""What errors of the machine mean for the user."""

import errno

import pytest

from luthier.errors import explain_lost_process, explain_memory_shortage, report_unexpected


class TorchOutOfMemory(RuntimeError):
    """torch's own class for a full GPU is a RuntimeError too."""


def caused(error, cause):
    error.__cause__ = cause
    return error


SHORT_OF_MEMORY = {
    "Python": (MemoryError(), "The memory of this machine is not enough."),
    "numpy": (
        MemoryError("Unable to allocate 8.00 GiB for an array"),
        "is not enough: Unable to allocate 8.00 GiB for an array",
    ),
    "torch on the CPU": (
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: can't allocate memory: "
            "you tried to allocate 27262976 bytes. Error code 12 (Cannot allocate memory)"
        ),
        "tried to allocate 27262976 bytes",
    ),
    "torch on a GPU": (
        TorchOutOfMemory("CUDA out of memory. Tried to allocate 2.00 GiB."),
        "The memory of the GPU is full: CUDA out of memory. Tried to allocate 2.00 GiB.",
    ),
    "a thread": (RuntimeError("can't start new thread"), "no further threads"),
    "a library that cannot be mapped": (
        ImportError("libtorch_cpu.so: failed to map segment from shared object"), "libtorch_cpu.so",
    ),
    "the system": (OSError(errno.ENOMEM, "Cannot allocate memory"), "is not enough"),
    "as the cause of another": (caused(ValueError("no batch"), MemoryError()), "is not enough"),
}  # fmt: skip


@pytest.mark.parametrize("where", SHORT_OF_MEMORY)
def test_too_little_memory_is_said_in_words(where, capsys):
    error, text = SHORT_OF_MEMORY[where]
    assert report_unexpected(error) == 2
    printed = capsys.readouterr().err
    assert text in printed
    assert "ulimit" in printed or "nvidia-smi" in printed


@pytest.mark.parametrize("error", [ValueError("out of memory"), RuntimeError("size mismatch")])
def test_any_other_error_keeps_its_traceback(error):
    assert explain_memory_shortage(error) is None
    with pytest.raises(type(error)):
        report_unexpected(error)


GLOO = "[pair.cc:553] Connection closed by peer [127.0.0.1]:16557 (third_party/gloo)"


@pytest.mark.parametrize(
    ("error", "world", "is_lost"),
    [
        pytest.param(RuntimeError(GLOO), "2", True, id="gloo"),
        pytest.param(RuntimeError(GLOO), "1", False, id="one process"),
        pytest.param(ConnectionResetError("Connection reset by peer"), "2", False, id="the hub"),
        pytest.param(RuntimeError("shapes do not fit"), "2", False, id="another error"),
    ],
)
def test_the_end_of_another_process_is_said_in_one_sentence(
    error, world, is_lost, monkeypatch, tmp_path, capsys
):
    note = tmp_path / "error.json"
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(note))
    assert (explain_lost_process(error) is not None) == is_lost
    if is_lost:
        assert report_unexpected(error) == 1
        assert "rank 0: another process of this run has ended" in capsys.readouterr().err
        assert not note.exists(), "the launcher would take it for the cause"
