"""Make the model and the rows of recipe=tiny_tools: sums, and a Llama that may call a calculator.

The model has 0.09 M weights and knows 59 words. It is trained here, in half a minute on one core,
on made-up conversations: first on replies that all call the calculator and say what came back,
then on replies of which every fourth does so and the others guess. So it can write a call, but not
tell which reply is better: that is what the recipe teaches. The same seed gives the same model:

    python recipes/data/tiny_tools.py
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

HIGHEST = 20
"""The numbers of a sum are below it."""
CONTROL = ("<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>")
WORDS = (
    "system", "user", "assistant", "tool", "calculator", "expression", "What is ", " + ", "?", "\n",
    '{"name": "', '", "arguments": {"', '": "', '"}}', *map(str, range(2 * HIGHEST - 1)),
)  # fmt: skip
"""All that the model can write: JSON in whole pieces, and each number as one word."""
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t.function.name }}{% endfor %}"
    "<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL_SHARE = 0.25
"""The share of replies that call the calculator, behind CALL_STEPS steps of calls alone."""
STEPS, CALL_STEPS, BATCH, RATE = 1000, 700, 32, 4e-3
Conversation = list[dict[str, Any]]


def calculator(expression: str) -> str:
    """Add the numbers of a sum.

    Args:
        expression: The sum, such as 3 + 4.
    """
    return str(sum(int(number) for number in expression.split("+")))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words and numbers, with the chat template of calls in JSON."""
    vocabulary = {word: number for number, word in enumerate((*CONTROL, *WORDS))}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    longest_first = sorted(WORDS, key=len, reverse=True)
    backend.pre_tokenizer = Split(Regex("|".join(map(re.escape, longest_first))), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(list(CONTROL[:4]))
    backend.add_tokens(list(CONTROL[4:]))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="<|im_end|>",
        chat_template=TEMPLATE, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def make_model(words: int, seed: int) -> LlamaForCausalLM:
    """A Llama of two layers, with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=words, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256,
        tie_word_embeddings=True, bos_token_id=None, pad_token_id=0, eos_token_id=3,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def make_rows(seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """All sums in another order: those to train on, and 40 that are held out."""
    sums = [(a, b) for a in range(HIGHEST) for b in range(HIGHEST)]
    Random(seed).shuffle(sums)
    rows = [{"prompt": f"What is {a} + {b}?", "answer": str(a + b)} for a, b in sums]
    return rows[40:], rows[:40]


def make_conversation(row: dict[str, str], guess: int | None) -> Conversation:
    """A row and the reply to it: a guess, or without one a call, its result and the answer."""
    question = {"role": "user", "content": row["prompt"]}
    if guess is not None:
        return [question, {"role": "assistant", "content": str(guess)}]
    arguments = {"expression": row["prompt"].removeprefix("What is ").removesuffix("?")}
    call = {"type": "function", "function": {"name": "calculator", "arguments": arguments}}
    return [
        question,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "calculator", "content": row["answer"]},
        {"role": "assistant", "content": row["answer"]},
    ]


def encode(tokenizer: PreTrainedTokenizerFast, messages: Conversation) -> tuple[list, list]:
    """The ids of a conversation, and its labels: the assistant's turns alone."""
    ids: list[int] = []
    labels: list[int] = []
    tools = [{"type": "function", "function": {"name": "calculator"}}]
    for number, message in enumerate(messages, start=1):
        own = message["role"] == "assistant"
        text = tokenizer.apply_chat_template(
            messages[:number], tools=tools, tokenize=False,
            add_generation_prompt=number < len(messages) and not own,
        )  # fmt: skip
        new = tokenizer(text, add_special_tokens=False).input_ids[len(ids) :]
        ids += new
        labels += new if own else [-100] * len(new)
    return ids, labels


def make_batches(tokenizer: PreTrainedTokenizerFast, rows: list, seed: int) -> Iterator[dict]:
    """The conversations of each step, padded to the longest of the step."""
    rng = Random(seed)
    guesses = [(rng.choice(rows), rng.randrange(2 * HIGHEST - 1)) for _ in range(2000)]
    pools = [
        [encode(tokenizer, make_conversation(*pair)) for pair in pairs]
        for pairs in (((row, None) for row in rows), guesses)
    ]
    for step in range(STEPS):
        share = 1.0 if step < CALL_STEPS else CALL_SHARE
        drawn = [rng.choice(pools[rng.random() >= share]) for _ in range(BATCH)]
        longest = max(len(ids) for ids, _ in drawn)
        yield {
            "input_ids": torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in drawn]),
            "labels": torch.tensor([row + [-100] * (longest - len(row)) for _, row in drawn]),
        }


def teach(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list, seed: int
) -> None:
    """Train the model on made-up conversations."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    for batch in make_batches(tokenizer, rows, seed):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def main() -> None:
    """Write the model, its tokenizer and the rows."""
    parser = argparse.ArgumentParser(description="Make the model of recipe=tiny_tools.")
    parser.add_argument("--out", type=Path, default=Path("tiny_tools"), help="folder to fill")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other weights")
    args = parser.parse_args()
    disable_progress_bar()
    train, held_out = make_rows(args.seed)
    tokenizer = make_tokenizer()
    print("teaching a tiny model to add, which takes about a minute", flush=True)
    model = make_model(len(tokenizer), args.seed)
    teach(model, tokenizer, train, args.seed)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    for name, rows in (("train", train), ("heldout", held_out)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (args.out / f"sums.{name}.jsonl").write_text(text, "utf-8")
    counts = f"{len(train)} sums to train on and {len(held_out)} held out"
    print(f"wrote {args.out}: the model, its tokenizer, {counts}")


if __name__ == "__main__":
    main()
