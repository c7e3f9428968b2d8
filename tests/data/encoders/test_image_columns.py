"""Images of conversations and of judged replies: no token of one trains, each is named in order."""

import json
import pickle

import pytest

from helpers.chatml import CHAT, SPECIAL, byte_tokenizer
from luthier.chat import ChatError
from luthier.data.encoders.chat import ConversationEncoder
from luthier.data.encoders.preference import PreferenceEncoder, RewardEncoder, UnpairedEncoder

PLACEHOLDER = "<img>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for p in m.content %}{{ '<img>' if p.type == 'image' else p.text }}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKENIZER = byte_tokenizer((*SPECIAL, PLACEHOLDER), chat_template=TEMPLATE)
IMAGE_ID = TOKENIZER.convert_tokens_to_ids(PLACEHOLDER)


class Expander:
    """An image has one token for each 10 pixels of its width."""

    placeholder = PLACEHOLDER
    prefix_ids = ()

    def expand(self, image):
        return PLACEHOLDER * (image["width"] // 10)

    def settings(self):
        return {"kind": "test"}


def image(letter, width=20):
    """An image whose SHA-256 is of one letter."""
    ref = {"sha256": letter * 64, "width": width, "height": 10, "source": f"{letter}.png"}
    return {"type": "image", "image": ref}


def digests(letters):
    return b"".join(bytes.fromhex(letter * 64) for letter in letters)


def user(*parts):
    content = [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]
    return {"role": "user", "content": content}


def bot(content):
    return {"role": "assistant", "content": content}


def encoder(make=ConversationEncoder, **settings):
    return make(TOKENIZER, CHAT | settings, Expander())


def test_a_sequence_names_its_images_in_the_order_of_their_tokens():
    rows = [
        {"messages": [user(image("a"), "q", image("b", 30)), bot("x"), user(image("c")), bot("y")]},
        {"messages": [user("no image"), bot("z")]},
    ]
    # What a worker process gets.
    encoded = pickle.loads(pickle.dumps(encoder())).encode(rows)
    assert encoded.columns["images"] == [digests("abc"), b""]
    ids, labels = (encoded.columns[name] for name in ("input_ids", "labels"))
    first = slice(0, int(ids.offsets[1]))
    tokens = ids.values[first].tolist()
    assert tokens.count(IMAGE_ID) == 2 + 3 + 2
    trained = [token for token in labels.values[first].tolist() if token != -100]
    assert TOKENIZER.decode(trained) == "x<|im_end|>y<|im_end|>"


def test_images_in_a_reply_do_not_train():
    content = [{"type": "text", "text": "See "}, image("b", 50), {"type": "text", "text": "!"}]
    encoded = encoder().encode([{"messages": [user(image("a"), "q"), bot(content)]}])
    labels = encoded.columns["labels"].values.tolist()
    assert encoded.columns["images"] == [digests("ab")]
    assert TOKENIZER.decode([t for t in labels if t != -100]) == "See !<|im_end|>"
    assert encoded.columns["trained"].tolist() == [len("See !") + 1]


def test_a_turn_that_goes_takes_its_image():
    messages = [user(image("a", 400), "q"), bot("x"), user(image("b"), "r"), bot("y")]
    encoded = encoder(max_length=60).encode([{"messages": messages}])
    assert encoded.columns["images"] == [digests("b")]
    assert encoded.outcomes[0].cut_turns == 1


def test_text_alone_has_no_column_of_images():
    row = {"messages": [{"role": "user", "content": "q"}, bot("x")]}
    encoded = ConversationEncoder(TOKENIZER, CHAT).encode([row])
    assert sorted(encoded.columns) == ["input_ids", "labels", "trained"]
    with_images = encoder()
    assert json.dumps(with_images.settings()["images"]) == '{"kind": "test"}'
    assert "images" not in ConversationEncoder(TOKENIZER, CHAT).settings()


def test_a_model_of_text_refuses_images_with_the_row():
    row = {"messages": [user(image("a"), "q"), bot("x")]}
    with pytest.raises(ChatError) as error:
        ConversationEncoder(TOKENIZER, CHAT).encode([row])
    assert error.value.row == 0


def pair(prompt, chosen="yes", rejected="no"):
    return {"prompt": prompt, "chosen": [bot(chosen)], "rejected": [bot(rejected)]}


@pytest.mark.parametrize("make", [PreferenceEncoder, RewardEncoder])
def test_a_pair_names_the_images_of_its_prompt(make):
    examples = [pair([user(image("a"), image("b"), "Same?")]), pair([user("Hi")])]
    encoded = pickle.loads(pickle.dumps(encoder(make))).encode(examples)
    assert encoded.columns["images"] == [digests("ab"), b""]
    if make is PreferenceEncoder:
        assert encoded.columns["prompt_ids"][0].count(IMAGE_ID) == 4


def test_a_rated_reply_names_the_images_of_its_prompt():
    example = {"prompt": [user(image("a"), "q")], "completion": [bot("x")], "label": True}
    encoded = encoder(UnpairedEncoder).encode([example])
    assert encoded.columns["images"] == [digests("a")]


def test_turns_of_a_prompt_that_go_take_their_images():
    prompt = [user(image("a", 400), "q"), bot("x"), user(image("b"), "r")]
    encoded = encoder(PreferenceEncoder, max_length=60).encode([pair(prompt)])
    assert encoded.columns["images"] == [digests("b")]


def test_an_image_in_a_judged_reply_is_refused():
    chosen = [{"type": "text", "text": "See"}, image("b")]
    with pytest.raises(ChatError) as error:
        encoder(PreferenceEncoder).encode([pair([user("q")], chosen)])
    assert "chosen holds an image, and models reply with text only" in str(error.value)


def test_the_same_tokens_for_another_image_are_another_row():
    from luthier.data.encoders.chat import hash_sequences

    rows = [{"messages": [user(image(letter), "q"), bot("x")]} for letter in "ab"]
    first, second = (hash_sequences(encoder().encode([row]).columns) for row in rows)
    assert first[0] != second[0]
