"""What processors make of images, without a processor: the texts are those of transformers' own."""

from types import SimpleNamespace

from tokenizers import AddedToken
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.processing_utils import ProcessorMixin
from transformers.utils.chat_template_utils import encode_marked_chat, render_jinja_template

from helpers.conversations import pair, trl


class CountExpander:
    """An image as so many placeholders, as LLaVA and Qwen-VL write it."""

    def __init__(self, placeholder, prefix_ids=()):
        self.placeholder = placeholder
        self.prefix_ids = list(prefix_ids)

    def expand(self, image):
        return self.placeholder * image["tokens"]

    def settings(self):
        return {"placeholder": self.placeholder}


class TileExpander(CountExpander):
    """An image as rows of tiles, a line break behind each row, then all of it, as Idefics3."""

    TOKENS = (
        "<fake_token_around_image>", "<global-img>", "<image>",
        "<row_1_col_1>", "<row_1_col_2>", "<row_2_col_1>", "<row_2_col_2>",
    )  # fmt: skip

    def expand(self, image):
        fake, picture, token = self.TOKENS[:3]
        processor = SimpleNamespace(
            fake_image_token=fake, global_image_tag=picture, image_token=token, image_seq_len=3
        )
        side = {"rows": [[image["tiles"]]], "cols": [[image["tiles"]]]}
        return Idefics3Processor.replace_image_token(processor, side, 0)


class BlockExpander(CountExpander):
    """An image between blank lines, with words around its crops, as Gemma 3."""

    TOKENS = ("<start_of_image>", "<image_soft_token>", "<end_of_image>")

    def expand(self, image):
        start, soft, end = self.TOKENS
        processor = SimpleNamespace(full_image_sequence=f"\n\n{start}{soft * 4}{end}\n\n")
        crops = {"num_crops": [image.get("crops", 0)]}
        return Gemma3Processor.replace_image_token(processor, crops, 0)


class Family:
    """A model's template with a tokenizer that has its tokens, and what it makes of images."""

    def __init__(self, name, tokenizer="gpt2-words"):
        source, expander, tokens, (bos, eos), self.takes_parts_only = FAMILIES[name]
        self.tokenizer = pair(tokenizer, source, eos=eos, bos=bos)
        added = [token for token in tokens if token not in self.tokenizer.added_tokens_encoder]
        self.tokenizer.add_tokens(
            [AddedToken(token, normalized=False) for token in added], special_tokens=True
        )
        placeholder = next(token for token in PLACEHOLDERS if token in source)
        has_bos = name != "llava_next"
        self.images = expander(placeholder, [] if has_bos else [self.tokenizer.bos_token_id])

    def prompt(self, messages, generation=True):
        """The ids of transformers' own: the text of the template, its images, then the tokens."""
        tokenizer, images = self.tokenizer, self.images
        if self.takes_parts_only:
            messages = [
                {**m, "content": [{"type": "text", "text": m["content"]}]}
                if isinstance(m["content"], str)
                else m
                for m in messages
            ]
        source = tokenizer.chat_template
        marked, _, _, _ = tokenizer._mark_chat_inputs(
            source, [messages], None, None, {}, True, False
        )
        (text,), _ = render_jinja_template(
            conversations=marked,
            chat_template=source,
            add_generation_prompt=generation,
            **tokenizer.special_tokens_map,
        )
        processor = SimpleNamespace(
            image_token=images.placeholder, all_special_multimodal_tokens=[images.placeholder]
        )
        pictures = [
            images.expand(part["image"])
            for message in messages
            if isinstance(message["content"], list)
            for part in message["content"]
            if part["type"] == "image"
        ]
        (text,), _ = ProcessorMixin.get_text_with_replacements(processor, [text], pictures)
        is_begun = text.startswith(tokenizer.bos_token)
        prefix = [] if is_begun else images.prefix_ids
        return [*prefix, *encode_marked_chat(tokenizer, text)]


PLACEHOLDERS = ("<|image_pad|>", "<start_of_image>", "<image>")
_CHATML_ENDS = ("<|endoftext|>", "<|im_end|>")
_TILE_ENDS = ("<|begin_of_text|>", "<end_of_utterance>")
# name: (template, expander, tokens of images, (bos, eos), whether contents must be lists of parts)
FAMILIES = {
    "qwen2_5_vl": (trl("qwen2_5_vl"), CountExpander, (), _CHATML_ENDS, False),
    "qwen3_vl": (trl("qwen3_vl"), CountExpander, (), _CHATML_ENDS, False),
    "gemma3": (trl("gemma3"), BlockExpander, BlockExpander.TOKENS, ("<bos>", "<eos>"), False),
    "idefics3": (trl("idefics3"), TileExpander, TileExpander.TOKENS, _TILE_ENDS, True),
    "smolvlm": (
        trl("smolvlm"), TileExpander, TileExpander.TOKENS, ("<|im_start|>", _TILE_ENDS[1]), True,
    ),
    "llava_next": (trl("llava_next"), CountExpander, ("<image>",), ("<s>", "</s>"), True),
    "lfm2_2_5_vl": (
        trl("lfm2_2_5_vl"), CountExpander, ("<image>",), ("<|startoftext|>", "<|im_end|>"), False,
    ),
}  # fmt: skip


def image(**shape):
    """An image part; `tokens`, `tiles` and `crops` are what one expander or another looks at."""
    shape = {"tokens": 5, "tiles": 2, **shape}
    return {"type": "image", "image": shape}


def text(value):
    """A text part."""
    return {"type": "text", "text": value}
