"""An encoder of rows with images that is small enough to check by hand."""

from helpers.letter_encoder import Letters
from luthier.data.encoders.chat import IMAGES_COLUMN, EncodedRows, row_outcome
from luthier.data.formats.image_parts import image_parts

MARK = ord("#")


class PictureLetters(Letters):
    """A letter is a token, an image one `#` for each 10 pixels of its width; the reply trains."""

    def settings(self):
        return {"pictures": self.version}

    def encode(self, examples):
        names = ("input_ids", "labels", "trained", IMAGES_COLUMN)
        made = EncodedRows({name: [] for name in names}, [])
        for example in examples:
            *before, reply = example["messages"]
            prompt = [token for message in before for token in tokens(message["content"])]
            answer = tokens(reply["content"])
            digests = [bytes.fromhex(part["image"]["sha256"]) for part in image_parts(example)]
            made.columns["input_ids"].append(prompt + answer)
            made.columns["labels"].append([-100] * len(prompt) + answer)
            made.columns["trained"].append(len(answer))
            made.columns[IMAGES_COLUMN].append(b"".join(digests))
            made.outcomes.append(row_outcome(1))
        return made


def tokens(content):
    """The tokens of a message's content."""
    if isinstance(content, str):
        return [*map(ord, content)]
    return [
        token
        for part in content
        for token in (
            [MARK] * (part["image"]["width"] // 10)
            if part["type"] == "image"
            else map(ord, part["text"])
        )
    ]
