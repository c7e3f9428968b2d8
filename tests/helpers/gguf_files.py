"""Writes a Llama folder as a GGUF file, the way llama.cpp's converter does."""

import json
from pathlib import Path

import gguf
import numpy as np
from transformers import LlamaForCausalLM

CONTROL, NORMAL = 3, 1
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def metadata(tokenizer_file: Path, pre: str) -> dict:
    """The tokenizer part of a GGUF's metadata for a tokenizer.json."""
    content = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    added = {token["id"]: token for token in content["added_tokens"]}
    tokens = {number: token for token, number in content["model"]["vocab"].items()}
    tokens |= {number: token["content"] for number, token in added.items()}
    merges = content["model"]["merges"]
    kinds = [_kind(added.get(number)) for number in sorted(tokens)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [tokens[number] for number in sorted(tokens)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in merges],
    }


def _kind(added: dict | None) -> int:
    if added is None:
        return NORMAL
    return CONTROL if added["special"] else 4


def write(model_folder: Path, file: Path, pre: str = "smollm", leave_out: str = "") -> Path:
    """Write the model and tokenizer of `model_folder` to `file`; drop the tensor `leave_out`."""
    model = LlamaForCausalLM.from_pretrained(model_folder)
    writer = gguf.GGUFWriter(file, "llama")
    _write_config(writer, model.config)
    _write_tokenizer(writer, model_folder, pre)
    for name, tensor in model.state_dict().items():
        new = _name(name)
        if new != leave_out:
            writer.add_tensor(new, _permuted(new, tensor.numpy(), model.config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _write_config(writer: gguf.GGUFWriter, config) -> None:
    writer.add_name("Tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)


def _write_tokenizer(writer: gguf.GGUFWriter, folder: Path, pre: str) -> None:
    described = metadata(folder / "tokenizer.json", pre)
    writer.add_tokenizer_model(described["tokenizer.ggml.model"])
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(described["tokenizer.ggml.tokens"])
    writer.add_token_types(described["tokenizer.ggml.token_type"])
    writer.add_token_merges(described["tokenizer.ggml.merges"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template((folder / "chat_template.jinja").read_text())


def _name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in TOP:
        return f"{TOP[stem]}.{kind}"
    _, _, number, part = stem.split(".", 3)
    return f"blk.{number}.{LAYER[part]}.{kind}"


def _permuted(name: str, weight: np.ndarray, config) -> np.ndarray:
    """Pair the rotary dimensions as llama.cpp does: neighbours, not halves."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    count = heads.get(name.split(".")[-2])
    if count is None:
        return weight
    halves = weight.reshape(count, 2, weight.shape[0] // count // 2, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))
