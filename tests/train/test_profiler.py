"""The table of a profile: whose time it is, what is left out, how it is printed."""

from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType

from luthier.train.profiler import OperationTime, format_operations, measure_operations


def event(key, cpu=0.0, gpu=0.0, count=4, device=DeviceType.CPU, is_mark=False):
    return SimpleNamespace(
        key=key, device_type=device, self_cpu_time_total=cpu, self_device_time_total=gpu,
        count=count, is_user_annotation=is_mark,
    )  # fmt: skip


KERNEL = {"device": DeviceType.CUDA, "count": 8}
MM = OperationTime("aten::mm", 300.0, 4)
ADD = OperationTime("aten::add", 100.0, 4)
EVENTS = {
    "a CPU, without the profiler's own mark": (
        [event("aten::add", 100), event("aten::mm", 300), event("ProfilerStep*", 9000)],
        ([MM, ADD], "CPU"),
    ),
    "what took no time is left out": ([event("aten::mm", 300), event("aten::t")], ([MM], "CPU")),
    "a GPU, each kernel once": (
        [
            event("aten::mm", 10, 300), event("sgemm", gpu=300, **KERNEL),
            event("aten::add", 9999, 100), event("vectorized_add", gpu=100, **KERNEL),
        ],
        ([MM, ADD], "GPU"),
    ),
    "a GPU, with marks around the kernels": (
        [
            event("aten::mm", 10, 300), event("sgemm", gpu=300, **KERNEL),
            event("step", gpu=300, is_mark=True, **KERNEL),
        ],
        ([MM], "GPU"),
    ),
    "a GPU, with kernels of another package": (
        [
            event("aten::mm", 10, 300), event("sgemm", gpu=300, **KERNEL),
            event("liger", gpu=100, **KERNEL),
        ],
        ([MM, OperationTime("kernels outside of torch's operations", 100.0, 0)], "GPU"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("events", "measured"), EVENTS.values(), ids=EVENTS)
def test_operations_are_measured(events, measured):
    assert measure_operations(events) == measured


def test_the_table_has_ten_operations_and_the_rest_of_the_time():
    long = OperationTime("aten::" + "x" * 60, 6_000_000.0, 400_000)
    times = [long, *(OperationTime(f"aten::op{n}", 500_000.0, 4) for n in range(12))]
    lines = format_operations(times, "CPU").splitlines()
    assert lines[0] == (
        "operation                                      CPU time     ms/step   calls/step"
    )
    assert lines[1] == (
        "aten::xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx...     50.0%    1,500.00      100,000"
    )
    assert lines[2] == (
        "aten::op0                                          4.2%      125.00            1"
    )
    assert lines[-1] == "3 others                                          12.5%      375.00"
    assert len(lines) == 12
    assert max(map(len, lines)) == 80
