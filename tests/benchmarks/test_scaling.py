"""The arithmetic of many GPUs by hand, and the tables of docs/launch.md by the script."""

from pathlib import Path

import pytest

import scaling
from scaling import Traffic, balance_tokens, gather, step_traffic, tokens_per_second
from shapes import GPUS, SHAPES

PAGE = (Path(__file__).parents[2] / "docs" / "launch.md").read_text(encoding="utf-8")
LLAMA, H100 = SHAPES["llama_8b"], GPUS["H100"]
WEIGHTS = 2 * 8_030_261_248
"""Bytes of the 8B model in bfloat16."""
ADAPTER = 2 * 41_943_040


@pytest.mark.parametrize(
    ("processes", "link", "network"),
    [(1, 0, 0), (8, 7e9, 0), (64, 7.875e9, 7e9), (512, 7.984375e9, 7.875e9)],
)
def test_a_gather_brings_what_a_gpu_and_a_machine_lack(processes, link, network):
    assert gather(8e9, processes) == Traffic(link, network)


@pytest.mark.parametrize(
    ("sharding", "rank", "micro_batches", "link"),
    [
        pytest.param("ddp", None, 1, 2 * 2 * WEIGHTS * 7 / 8, id="ddp-full-float32-gradients"),
        pytest.param("ddp", None, 4, 2 * 2 * WEIGHTS * 7 / 8, id="ddp-once-for-all-micro-batches"),
        pytest.param("ddp", 16, 1, 2 * 2 * ADAPTER * 7 / 8, id="ddp-adapters-alone"),
        pytest.param("zero2", None, 4, (4 + 1) * WEIGHTS * 7 / 8, id="zero2-each-micro-batch"),
        pytest.param("zero3", None, 4, 4 * 3 * WEIGHTS * 7 / 8, id="zero3-each-micro-batch"),
        pytest.param("fsdp2", None, 1, 4 * WEIGHTS * 7 / 8, id="fsdp2-gradients-in-float32"),
        pytest.param("fsdp2", None, 4, 10 * WEIGHTS * 7 / 8, id="fsdp2-gradients-once"),
        pytest.param(
            "fsdp2", 16, 1, (2 * (WEIGHTS + ADAPTER) + 2 * ADAPTER) * 7 / 8, id="fsdp2-frozen"
        ),
        pytest.param("hsdp", None, 1, 4 * WEIGHTS * 7 / 8, id="hsdp-on-one-machine"),
    ],
)
def test_bytes_of_a_step_on_one_machine(sharding, rank, micro_batches, link):
    traffic = step_traffic(sharding, LLAMA, rank, 8, micro_batches)
    assert traffic.link == pytest.approx(link)
    assert traffic.network == 0


def test_hsdp_sends_gradients_alone_between_machines():
    traffic = step_traffic("hsdp", LLAMA, None, 64)
    assert traffic.link == pytest.approx(4 * WEIGHTS * 7 / 8)
    assert traffic.network == pytest.approx(2 * 2 * WEIGHTS * 7 / 8)


def test_the_worked_example_of_the_page():
    # 56.2 GB at 450 GB/s x 0.8, against 6 x 7.5 GFLOP and attention a token at 989 TFLOP/s x 0.4.
    assert step_traffic("fsdp2", LLAMA, None, 8).seconds(H100) == pytest.approx(0.1561, abs=1e-4)
    assert scaling.step_flops(LLAMA, None, 1) == pytest.approx(48.25e9, abs=0.01e9)
    tokens = balance_tokens("fsdp2", LLAMA, None, 8, H100)
    assert tokens == pytest.approx(1280, abs=1)
    assert "1,280 tokens" in PAGE


def test_fewer_tokens_than_that_make_a_gpu_wait():
    limit = balance_tokens("fsdp2", LLAMA, None, 64, H100)
    most = tokens_per_second("fsdp2", LLAMA, None, 64, H100, 4 * limit)
    assert tokens_per_second("fsdp2", LLAMA, None, 64, H100, limit) == pytest.approx(most)
    assert tokens_per_second("fsdp2", LLAMA, None, 64, H100, limit / 2) == pytest.approx(most / 2)


def test_a_gpu_without_a_usual_network_is_refused():
    with pytest.raises(ValueError, match="network"):
        step_traffic("ddp", LLAMA, 16, 64).seconds(GPUS["L40S"])


@pytest.mark.parametrize(
    "table",
    [scaling.traffic_table(H100), scaling.speed_table(H100, 2**19)],
    ids=["traffic", "speed"],
)
def test_the_page_shows_the_tables_that_the_script_prints(table):
    _, rows = table
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    assert [line for line in lines if line not in PAGE] == []


def test_the_page_says_what_preparing_a_billion_tokens_takes():
    data = scaling.prepare_rows(1e9)
    minutes, gigabytes = data["core_seconds"] / 60, data["memory"] / 1e3
    assert f"{minutes:,.0f} minutes of one core" in PAGE
    assert f"{gigabytes:,.1f} GB of memory" in PAGE
    assert f"{data['cache'] / 1e3:,.0f} GB of cache" in PAGE


def test_preparation_passes_through_what_was_measured():
    large = scaling.PREPARED[1]
    data = scaling.prepare_rows(large.tokens)
    assert data["rows"] == large.rows
    assert data["core_seconds"] == pytest.approx(large.core_seconds)
    assert data["memory"] == pytest.approx(large.megabytes)
