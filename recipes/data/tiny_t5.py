"""Make the model of recipe=tiny_seq2seq: a T5 of 0.2 M random weights that knows 58 words.

There is no encoder-decoder model small enough to come with luthier; this one takes a second to
make and learns one thing from nothing. The same data and seed give the same model:

    python recipes/data/tiny_t5.py
"""

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration
from transformers.utils.logging import disable_progress_bar

NOTES = Path(__file__).parent / "tiny.notes.train.jsonl"
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, with an end token behind a text as T5's has it."""
    words = [PAD, END, UNKNOWN, *sorted({word for text in texts for word in text.split()})]
    vocabulary = {word: number for number, word in enumerate(words)}
    backend = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, vocabulary[END])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=END, unk_token=UNKNOWN
    )


def make_model(words: int, seed: int) -> T5ForConditionalGeneration:
    """A T5 of two layers on either side, with random weights."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=words, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
        decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def main() -> None:
    """Write the model and its tokenizer."""
    parser = argparse.ArgumentParser(description="Make the model of recipe=tiny_seq2seq.")
    parser.add_argument("--out", type=Path, default=Path("tiny_t5"), help="folder to fill")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other weights")
    args = parser.parse_args()
    disable_progress_bar()
    rows = [json.loads(line) for line in NOTES.read_text("utf-8").splitlines()]
    tokenizer = make_tokenizer([row[side] for row in rows for side in ("source", "target")])
    make_model(len(tokenizer), args.seed).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"wrote {args.out}: the model and its tokenizer")


if __name__ == "__main__":
    main()
