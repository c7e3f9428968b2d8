"""What the tests of judged replies share: a tiny model, a tokenizer of bytes, rows and trainers."""

import numpy as np
import torch
import transformers
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from helpers import chatml
from helpers.chatml import CHATML, byte_tokenizer
from luthier.data.batching.settings import BatchingSettings
from luthier.data.batching.token_rows import TokenRows

SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>"]
CHAT = chatml.CHAT | {"empty_replies": "train"}
"""One of the rows has an empty reply, of which the stop token alone trains."""


def tokenizer(template=CHATML, pad="<pad>"):
    return byte_tokenizer((), SPECIAL, pad_token=pad, chat_template=template)


def config(kind=transformers.LlamaConfig, **more):
    return kind(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        bos_token_id=None, eos_token_id=258, pad_token_id=256, **more,
    )  # fmt: skip


def model(auto=transformers.AutoModelForCausalLM, seed=0, **more):
    torch.manual_seed(seed)
    made = auto.from_config(config(**more), attn_implementation="sdpa")
    # Random weights of the usual size give logits near zero, in which little could be seen.
    for parameter in made.parameters():
        parameter.data *= 3 if parameter.dim() > 1 else 1
    return made


class ListedRows:
    """A table of rows in memory."""

    def __init__(self, rows):
        self.rows = rows
        self.lengths = np.array([row["length"] for row in rows], np.int32)

    def row(self, number):
        return self.rows[number]

    def column(self, name):
        return np.array([row[name] for row in self.rows])


def listed(encoded):
    """The rows that an encoder made."""
    columns = encoded.columns
    rows = []
    for values in zip(*columns.values(), strict=True):
        row = dict(zip(columns, values, strict=True))
        rows.append(
            {k: np.array(v, np.int32) if isinstance(v, list) else v for k, v in row.items()}
        )
    return TokenRows(ListedRows(rows))


def say(role, content):
    return {"role": role, "content": content}


def preference(prompt, chosen, rejected):
    return {
        "prompt": [say("user", prompt)],
        "chosen": [say("assistant", chosen)],
        "rejected": [say("assistant", rejected)],
    }


PREFERENCES = [
    preference("Hi", "Hello!", "Go away, please."),
    preference("Name a lute.", "An oud.", "Guitar"),
    preference("2+2", "4", "It may be five, or it may be six."),
    preference("Say nothing", "", "No."),
    preference("What is a violin made of?", "Of spruce and maple.", "Glass"),
    preference("Bye", "See you.", "x"),
    preference("Sing", "La la la", "I do not sing, and never will."),
]


def unpaired(examples=PREFERENCES):
    sides = (("chosen", True), ("rejected", False))
    rows = [
        {"prompt": one["prompt"], "completion": one[side], "label": label}
        for one in examples
        for side, label in sides
    ]
    # As many good ones as bad ones would hide a mistake in the weights.
    return rows[:-1]


def arguments(make, folder, **more):
    settings = {
        "output_dir": str(folder), "report_to": [], "use_cpu": True, "bf16": False, "optim": "sgd",
        "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0, "seed": 3,
        "activation_checkpointing": False, "logging_steps": 1, "save_strategy": "no",
        "prediction_loss_only": True, "dataloader_pin_memory": False, "disable_tqdm": True,
        "remove_unused_columns": False, "per_device_eval_batch_size": 4, "max_length": None,
        "logging_nan_inf_filter": False, "train_sampling_strategy": "sequential",
    }  # fmt: skip
    return make(**settings | more)


def trainer(kind, net, args, rows, evaluated=None, batching=None, tok=None, **more):
    made = kind(
        net, args=args, train_dataset=rows, eval_dataset=rows if evaluated is None else evaluated,
        batching=batching or BatchingSettings(), processing_class=tok or tokenizer(), **more,
    )  # fmt: skip
    made.remove_callback(PrinterCallback)
    made.remove_callback(ProgressCallback)
    return made


def lora(net, task="CAUSAL_LM", **more):
    from luthier.model.adapters import add_adapter

    return add_adapter(net, {"r": 4, "lora_alpha": 8, **more}, 1, task)


def moved(net, by=0.3, seed=5):
    """The same model after some training, as far as a loss can tell: every weight that trains."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data += by * torch.randn(parameter.shape, generator=generator)
    return net


def log_probability(net, prompt, reply):
    """The log-probability of a reply behind a prompt, from whole logits."""
    ids = torch.tensor([[*prompt, *reply]])
    logits = net(ids).logits[0].float().log_softmax(-1)
    places = range(len(prompt) - 1, ids.shape[1] - 1)
    return sum(logits[place, ids[0, place + 1]] for place in places)
