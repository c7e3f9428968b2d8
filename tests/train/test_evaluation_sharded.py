"""Split weights are gathered once for all tokens, and are split again behind that."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         str(Path(__file__).parents[1] / "helpers" / "sharded_generation.py"), str(folder)],
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_replies_are_those_of_the_whole_model(ranks):
    assert [rank["same"] for rank in ranks] == [True, True]
    # One rank answers three questions, the other none.
    assert [rank["tokens"] for rank in ranks] == [[12, 12, 12], []]


def test_each_part_is_gathered_once(ranks):
    # Two layers and what stands around them, for two batches of twelve tokens.
    assert [rank["gathered"] for rank in ranks] == [3, 3]


def test_training_goes_on_with_split_weights(ranks):
    for rank in ranks:
        assert rank["split again"]
        assert rank["resharding"] == [True, True, True]
        assert rank["gradients"][0] == pytest.approx(rank["gradients"][1], rel=1e-5)
