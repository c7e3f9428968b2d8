"""What processes of a launch hold is compared by rank, and what differs is said in words."""

import json
import threading
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from luthier.errors import UserError
from luthier.train import rank_agreement
from luthier.train.rank_agreement import RankFacts

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
    with pytest.raises(UserError, match="would not train one model") as stopped:
        rank_agreement._refuse_differences(gathered)
    assert line in str(stopped.value)
    assert advice in str(stopped.value)


def test_what_one_does_not_know_is_not_compared():
    rank_agreement._refuse_differences(ranks("weights of the model", HASH, None, None, HASH))


def test_facts_are_exchanged_by_the_store_before_the_processes_join():
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    gathered = {}

    def take_part(rank):
        own = TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)
        facts = RankFacts(f"node{rank}", {"model.dtype": ["float32", "bfloat16", None][rank]})
        gathered[rank] = rank_agreement._exchange(own, rank, 3, facts)

    threads = [threading.Thread(target=take_part, args=[rank]) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert gathered[0] == gathered[1] == gathered[2]
    assert [rank.host for rank in gathered[0]] == ["node0", "node1", "node2"]


def test_ranks_that_do_not_come_are_named(monkeypatch):
    monkeypatch.setattr(rank_agreement, "_PATIENCE", timedelta(seconds=0.3))
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    facts = RankFacts("node1", {})
    store.set("luthier/facts/2", json.dumps(facts))
    with pytest.raises(UserError, match=r"Ranks 1, 3 of this launch did not come within"):
        rank_agreement._exchange(store, 0, 4, facts)


def test_one_process_exchanges_nothing():
    rank_agreement.check_rank_agreement({"model.dtype": "float32"})
