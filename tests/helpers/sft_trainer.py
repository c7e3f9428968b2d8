"""What the tests of batches share: tiny random models, rows, and the loss in plain arithmetic."""

import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTConfig

from luthier.data.batching.settings import BatchingSettings
from luthier.model.varlen_attention import register_varlen_attention
from luthier.train.methods.sft import TokenTrainer

VOCABULARY = 64
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 1,
}  # fmt: skip
GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128,
    "bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(**SMALL, head_dim=8, sliding_window=4),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=4),
    "gpt2": lambda: transformers.GPT2Config(**GPT2),
    "mixtral": lambda: transformers.MixtralConfig(
        **SMALL, num_local_experts=4, router_aux_loss_coef=0.0
    ),
    "mamba": lambda: transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8
    ),
    "falcon": lambda: transformers.FalconConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    ),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, ffn_dim=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.0,
    ),
    "lfm2": lambda: transformers.Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(
        **SMALL, head_dim=8, linear_num_key_heads=2, linear_num_value_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=32, shared_expert_intermediate_size=32, router_aux_loss_coef=0.0,
        layer_types=["linear_attention", "full_attention"],
    ),
    "bloom": lambda: transformers.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4
    ),
    "rwkv": lambda: transformers.RwkvConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, context_length=64
    ),
}  # fmt: skip


def model(name="llama", attention="sdpa", dtype=torch.float32):
    register_varlen_attention()
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation=attention)
    # Random weights of the usual size give logits near zero, in which little could be seen.
    for parameter in made.parameters():
        parameter.data *= 3 if parameter.dim() > 1 else 1
    return made.to(dtype)


def tokenizer():
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="1", eos_token="2")


def rows(count=24, longest=20, seed=0):
    """Rows of 2 tokens and more; most train from their first token on, as plain text does."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, size=1):
        return torch.randint(low, high, (size,), generator=generator).tolist()

    out = {"input_ids": [], "labels": []}
    for number in range(count):
        ids = draw(3, VOCABULARY, draw(2, longest)[0])
        prompt = draw(0, len(ids))[0] if number % 3 == 0 else 0
        out["input_ids"].append(ids)
        out["labels"].append([-100] * prompt + ids[prompt:])
    return out


def plain_loss(net, data):
    """The mean over all trained tokens, row by row, with logits and cross entropy."""
    total, count = torch.zeros(()), 0
    for ids, labels in zip(data["input_ids"], data["labels"], strict=True):
        logits = net(torch.tensor([ids])).logits[0, :-1].float()
        total = total + torch.nn.functional.cross_entropy(
            logits, torch.tensor(labels[1:]), ignore_index=-100, reduction="sum"
        )
        count += sum(label != -100 for label in labels[1:])
    return total / count


def packing(length=32, **also):
    return BatchingSettings(**({"packing": True, "eval_packing": True, "length": length} | also))


def trainer(net, folder, data, batching=None, images=None, **args):
    settings = {
        "output_dir": str(folder), "report_to": [], "use_cpu": True, "bf16": False,
        "dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None, "optim": "sgd",
        "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0, "seed": 3,
        "activation_checkpointing": False, "logging_steps": 1, "save_strategy": "no",
        "prediction_loss_only": True, "dataloader_pin_memory": False, "disable_tqdm": True,
    }  # fmt: skip
    rows = Dataset.from_dict(data) if isinstance(data, dict) else data
    made = TokenTrainer(
        net, args=SFTConfig(**(settings | args)), train_dataset=rows, batching=batching,
        eval_dataset=rows if isinstance(data, dict) else None, processing_class=tokenizer(),
        images=images,
    )  # fmt: skip
    made.remove_callback(PrinterCallback)
    made.remove_callback(ProgressCallback)
    return made
