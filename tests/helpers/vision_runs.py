"""Runs on rows with images, and the same in plain transformers with the processor's own batch."""

import contextlib
import io
import json

import torch
import transformers
from transformers import AutoProcessor

from helpers.chatml import jsonl
from helpers.vision_families import VISION_FAMILIES, picture, save_vision_family
from luthier.config.schema import ModelConfig
from luthier.model.vision_processor import find_vision_processor

RATE = 0.05
SIZES = {"wide": (60, 28), "tall": (28, 57), "small": (30, 30)}
"""Width and height of the pictures that the rows name."""


def text(value):
    return {"type": "text", "text": value}


def image(name):
    return {"type": "image", "image": f"{name}.png"}


def turn(role, *content):
    return {"role": role, "content": list(content)}


ROWS = [
    [turn("user", image("wide"), text("What is it?")), turn("assistant", text("A boat."))],
    [turn("user", text("Name a colour.")), turn("assistant", text("Green."))],
    [
        turn("user", text("This "), image("tall"), text(" or "), image("small")),
        turn("assistant", text("The first.")),
        turn("user", text("Why?")),
        turn("assistant", text("It is tall.")),
    ],
    [turn("user", text("Two and two?")), turn("assistant", text("Four, as all know."))],
]
HELD_OUT = [
    [turn("user", image("small"), text("And this?")), turn("assistant", text("A house."))],
    [turn("user", text("Three and one?")), turn("assistant", text("Four."))],
]

PAIRS = [
    {"prompt": row[:1], "chosen": row[1:2], "rejected": [turn("assistant", text("No."))]}
    for row in ROWS
]


class VisionRuns:
    """A model of a family with rows, and what plain transformers makes of both."""

    def __init__(self, folder, name):
        self.folder, self.family = folder, VISION_FAMILIES[name]
        self.base = save_vision_family(folder / "model", name)
        for number, (each, size) in enumerate(SIZES.items()):
            picture(*size, number).save(folder / f"{each}.png")
        for each, rows in (("rows", ROWS), ("held", HELD_OUT)):
            jsonl(folder / f"{each}.jsonl", [{"messages": row} for row in rows])
        jsonl(folder / "pairs.jsonl", PAIRS)
        self.vision = find_vision_processor(ModelConfig(path=str(self.base)))
        self.processor = (
            self.vision.processor
            if self.family.needs_torchvision
            else AutoProcessor.from_pretrained(self.base)
        )

    # Commands.

    def words(self, output, *more, rows="rows", rate=RATE):
        words = [
            "trainer=sft", "model=hub", f"model.path={self.base}", "model.device=cpu",
            "model.dtype=float32", "dataset=files", f"dataset.path={self.folder / rows}.jsonl",
            f"dataset.eval.path={self.folder / 'held.jsonl'}", "dataset.eval.share=null",
            f"dataset.cache={self.folder / 'cache'}", "chat.max_length=256",
            "trainer.args.per_device_train_batch_size=2", "trainer.args.disable_tqdm=true",
            "trainer.args.per_device_eval_batch_size=2", "trainer.args.lr_scheduler_type=constant",
            "trainer.args.gradient_accumulation_steps=2", "trainer.args.optim=sgd",
            f"trainer.args.learning_rate={rate}", "trainer.args.max_grad_norm=0",
            "trainer.args.warmup_steps=0", "trainer.args.weight_decay=0",
            "trainer.args.logging_steps=1", "trainer.args.max_steps=2",
            "trainer.args.activation_checkpointing=false", "trainer.evaluation.samples=0",
            f"output_dir={self.folder / output}",
        ]  # fmt: skip
        return list({word.partition("=")[0]: word for word in [*words, *more]}.values())

    def command(self, words):
        """Run `train.py` in this process; returns the exit code and what it said."""
        from luthier.cli.train import main, train
        from luthier.errors import UserError, report_error

        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                code = main(train, words)
            except UserError as error:
                code = report_error(error)
        return code, out.getvalue()

    def train(self, output, *more, **settings):
        code, said = self.command(self.words(output, *more, **settings))
        assert code == 0, said[-3000:]
        self.said = said
        return self.folder / output

    def results(self, run):
        return json.loads((run / "run.json").read_text())["results"]

    # Plain transformers.

    def model(self, folder=None, **settings):
        """The model of a folder by the class that its config.json names."""
        make = getattr(transformers, self.family.architecture)
        return make.from_pretrained(folder or self.base, **settings).eval()

    def inputs(self, row, **settings):
        """The processor's own inputs for a conversation, with its pictures."""
        opened = [
            {**message, "content": [self._open(part) for part in message["content"]]}
            for message in row
        ]
        return self.processor.apply_chat_template(
            opened, tokenize=True, return_dict=True, return_tensors="pt", **settings
        )

    def _open(self, part):
        if part["type"] != "image":
            return part
        from PIL import Image

        return {"type": "image", "image": Image.open(self.folder / part["image"]).convert("RGB")}

    def log_probabilities(self, model, row):
        """Those of each reply's tokens, each behind the prompt that a server would give."""
        end = self.processor.tokenizer.eos_token_id
        summed, count = torch.zeros(()), 0
        for number, message in enumerate(row):
            if message["role"] != "assistant":
                continue
            start = self.inputs(row[:number], add_generation_prompt=True)["input_ids"].shape[1]
            inputs = self.inputs(row[: number + 1])
            ids = inputs["input_ids"][0].tolist()
            stop = ids.index(end, start) + 1
            logits = model(**inputs).logits[0, start - 1 : stop - 1].float().log_softmax(-1)
            summed = summed + logits.gather(1, torch.tensor(ids[start:stop])[:, None]).sum()
            count += stop - start
        return summed, count

    def nll(self, model, rows):
        """The mean negative log-likelihood over the trained tokens of some rows."""
        summed, counts = zip(*(self.log_probabilities(model, row) for row in rows), strict=True)
        return -sum(summed) / sum(counts)
