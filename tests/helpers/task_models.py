"""What the tests of classify, tag and seq2seq share: tiny tokenizers, models, configs, runs."""

import copy
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer, UnigramTrainer, WordPieceTrainer
from transformers import PreTrainedTokenizerFast
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from luthier.config.schema import RunConfig
from luthier.data.prepare import prepare
from luthier.model.device import Machine
from luthier.train import methods
from luthier.train.methods import TrainerInputs

ROOT = Path(__file__).parents[2]
ASSETS = Path(os.environ["LUTHIER_ASSETS"]) if os.environ.get("LUTHIER_ASSETS") else None
MACHINE = Machine("cpu", "float32", "sdpa")
CORPUS = [
    "The lute is a plucked instrument; a luthier in Cremona makes lutes, violins and guitars.",
    "Where is my card? I lost it in Paris, and Anna Bell found it.",
] * 8
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def wordpiece(texts=CORPUS, size=400):
    """A tokenizer as BERT has it: [CLS] text [SEP] other [SEP], with segment ids."""
    return copy.deepcopy(_wordpiece(tuple(texts), size))


# Training breaks ties as it falls, so each tokenizer is trained once.
@functools.cache
def _wordpiece(texts, size):
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = WordPieceTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False)
    backend.train_from_iterator(list(texts), trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def byte_level():
    """A tokenizer as Llama-3 has it: a BOS before a text, nothing behind."""
    return copy.deepcopy(_byte_level())


@functools.cache
def _byte_level():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<pad>", "<s>", "</s>"],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def unigram(texts=CORPUS, size=300):
    """A tokenizer as T5 has it: an end token behind a text."""
    return copy.deepcopy(_unigram(tuple(texts), size))


@functools.cache
def _unigram(texts, size):
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = UnigramTrainer(
        vocab_size=size, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(list(texts), trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def bert(vocabulary, size=32, **more):
    settings = {
        "vocab_size": vocabulary, "hidden_size": size, "num_hidden_layers": 2,
        "num_attention_heads": 4, "intermediate_size": 2 * size, "max_position_embeddings": 128,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    return transformers.BertForMaskedLM(transformers.BertConfig(**settings | more))


def llama(vocabulary, **more):
    settings = {
        "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings | more))


def t5(vocabulary, size=32, **more):
    settings = {
        "vocab_size": vocabulary, "d_model": size, "d_kv": size // 4, "d_ff": 2 * size,
        "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0, "dropout_rate": 0.0,
    }  # fmt: skip
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**settings | more))


def saved(folder, make, tokenizer, **more):
    """A random model of this kind and its tokenizer in a folder, as a hub repository has them."""
    torch.manual_seed(0)
    make(len(tokenizer), **more).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def config_of(method, folder, model, rows, held=None, **also):
    """The config of a run on these rows, as the schema has it."""
    dataset = {"path": written(folder / "rows.jsonl", rows), "cache": str(folder / "cache")}
    if held is not None:
        dataset["eval"] = {"path": written(folder / "held.jsonl", held)}
    trainer = {"method": method, "args": also.pop("args", {})} | also.pop("trainer", {})
    settings = {
        "model": {
            "path": model, "device": "cpu", "dtype": "float32", "kwargs": also.pop("kwargs", {})
        },
        "dataset": dataset | also.pop("dataset", {}),
        "trainer": trainer,
        "output_dir": str(folder / "run"),
    }  # fmt: skip
    return RunConfig.model_validate(settings | also)


def built(config, tokenizer, adapt=None):
    """The trainer of a config and the prepared data, as a run builds them."""
    method = methods.load_method(config.trainer.method)
    prepared = prepare(
        config.dataset, methods.make_row_encoders(config, tokenizer), tokenizer, config.seed
    )
    args = method.build_arguments(config, MACHINE, Path(config.output_dir), bool(prepared.eval))
    args.disable_tqdm = True
    torch.manual_seed(config.seed)
    model = method.load_model(config, MACHINE, prepared)
    if adapt:
        model = adapt(model)
    trainer = method.build_trainer(TrainerInputs(config, args, model, tokenizer, prepared, []))
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer, prepared


def run(folder, *words):
    """Run train.py; return its output and the results of its record."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *words, "output_dir=run", "dataset.cache=cache"],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout, json.loads((folder / "run" / "run.json").read_text())["results"]
