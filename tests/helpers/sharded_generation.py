"""Two processes hold a model in halves (FSDP2), answer questions and train; see test_gathered."""

import copy
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.infer.generate import generate
from luthier.train.evaluation import unsharded_weights

PROMPTS = {0: [[5, 6, 7], [8, 9], [3]], 1: []}
TOKENS = 12


def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
            eos_token_id=None, bos_token_id=None,
        )
    )  # fmt: skip


def answered(net, prompts):
    return generate(net, prompts, stop_ids=[1], pad_id=0, max_new_tokens=TOKENS, batch_size=2)


def step(net):
    """The gradient's norm of one batch, the same on every rank."""
    ids = torch.arange(3, 19).view(2, 8)
    net.train()
    net(input_ids=ids, labels=ids).loss.backward()
    norms = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
             for p in net.parameters()]  # fmt: skip
    net.zero_grad()
    return sum(float(norm.square().sum()) for norm in norms)


def main():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    whole = model()
    split = copy.deepcopy(whole)
    for layer in split.model.layers:
        fully_shard(layer, reshard_after_forward=True)
    fully_shard(split, reshard_after_forward=True)
    with (
        profile(activities=[ProfilerActivity.CPU]) as seen,
        unsharded_weights(split, reshards=True),
    ):
        replies = answered(split, PROMPTS[rank])
    sharded = [p.to_local().numel() < p.numel() for p in split.parameters()]
    found = {
        "same": replies == answered(whole, PROMPTS[rank]),
        "tokens": [len(reply) for reply in replies],
        "gathered": sum(event.name.split(" ")[0] == "FSDP::all_gather" for event in seen.events()),
        "split again": all(sharded),
        "resharding": [m._get_fsdp_state()._fsdp_param_group._reshard_after_forward
                       for m in (split, *split.model.layers)],
        "gradients": [step(split), step(whole)],
    }  # fmt: skip
    dist.destroy_process_group()
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
