"""What processes of a launch hold is compared by rank, and what differs is said in words."""

import threading

import pytest
from torch.distributed import TCPStore

from luthier.errors import UserError
from luthier.train.launch import rank_agreement
from luthier.train.launch.rank_agreement import RankFacts

HASH = "0123456789abcdef" * 4


def ranks(name, *values):
    """Facts of ranks, two on each machine."""
    return [RankFacts(f"node{at // 2 + 1}", {name: value}) for at, value in enumerate(values)]


@pytest.mark.parametrize(
    ("gathered", "line", "advice"),
    [
        pytest.param(
            ranks("torch (package)", *["2.13.0"] * 2, *["2.12.1"] * 2),
            "  torch (package): 2.13.0 on ranks 0-1 (node1), 2.12.1 on ranks 2-3 (node2)\n",
            "Install the same versions",
            id="version",
        ),
        pytest.param(
            ranks("luthier (its code)", "a", "a", "a", "b"),
            "a on ranks 0-1 (node1) and 2 (node2), b on rank 3 (node2)",
            "Check out the same commit",
            id="code",
        ),
        pytest.param(
            ranks("seed (config)", "1", "2", "1", "1"),
            "1 on ranks 0 (node1) and 2-3 (node2), 2 on rank 1 (node1)",
            "the same command",
            id="config",
        ),
        pytest.param(
            ranks("weights of the model", HASH, None, HASH[::-1], None),
            "0123456789ab... on rank 0 (node1), fedcba987654... on rank 2 (node2)",
            "model.revision",
            id="weights",
        ),
        pytest.param(
            ranks("model.attention", "sdpa", "flash_attention_2"),
            "sdpa on rank 0 (node1), flash_attention_2 on rank 1 (node1)",
            "such as model.attention=sdpa",
            id="attention",
        ),
    ],
)
def test_differences_are_named_with_rank_and_machine(gathered, line, advice):
    problem = rank_agreement._describe_differences(gathered)
    assert problem.startswith("The processes of this launch differ, and would not train one model:")
    assert line in problem
    assert advice in problem


def test_what_one_does_not_know_is_not_compared():
    gathered = ranks("weights of the model", HASH, None, None, HASH)
    assert rank_agreement._describe_differences(gathered) == ""


@pytest.mark.parametrize(
    ("present", "dtypes", "message"),
    [
        pytest.param([0, 1, 2], ["float32"] * 3, "", id="alike"),
        pytest.param([0, 1, 2], ["float32", "bfloat16", None], "bfloat16 on rank 1", id="differ"),
        pytest.param([0, 2], ["float32"] * 3, "Rank 1 of this launch did not come", id="missing"),
        pytest.param([1, 2], ["float32"] * 3, "Rank 0 of this launch did not", id="no-first"),
    ],
)
def test_all_hear_one_verdict_before_they_join(monkeypatch, present, dtypes, message):
    monkeypatch.setattr(rank_agreement, "_PATIENCE", 10.0 if len(present) == 3 else 1.0)
    monkeypatch.setattr(rank_agreement, "_READ_SECONDS", 0.5)
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    verdicts = {}

    def take_part(rank):
        store = TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
        facts = RankFacts(f"node{rank}", {"model.dtype": dtypes[rank]})
        try:
            rank_agreement._compare_by_store(store, rank, 3, facts)
            verdicts[rank] = ""
        except UserError as error:
            verdicts[rank] = str(error)

    threads = [threading.Thread(target=take_part, args=[rank]) for rank in present]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(verdicts) == present
    assert len(set(verdicts.values())) == 1
    assert message in verdicts[2]
    assert bool(message) == bool(verdicts[2])


def test_one_process_exchanges_nothing():
    rank_agreement.check_rank_agreement({"model.dtype": "float32"})
