"""Images in conversations: prompts as transformers writes them, and never a trained image."""

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.conversations import (
    ASSETS,
    CHATML,
    assert_labels,
    bot,
    call,
    pair,
    replies,
    system,
    tool,
    trl,
    user,
)
from helpers.image_expanders import FAMILIES, CountExpander, Family, image, text
from luthier.chat import ChatEncoder, ChatError
from luthier.chat.encoder import ChatPromptEncoder

CONVERSATIONS = {
    "an image in front": [user([image(), text("What is it?")]), bot("A lute.")],
    "an image behind": [user([text("What is it?"), image()]), bot("A lute.")],
    "an image alone": [user([image(tiles=0)]), bot("A lute.")],
    "two of two sizes": [
        user([text("See "), image(tokens=3, tiles=0), text("and "), image(tokens=2)]),
        bot("Two lutes."),
    ],
    "side by side": [user([image(tokens=2), image(tokens=1, tiles=1), text("?")]), bot("Two.")],
    "an image in each turn": [
        user([image(), text("What is it?")]), bot("A lute."),
        user([image(tokens=7, crops=2), text("And this?")]), bot("A viol."),
    ],
    "an image later": [user("Hello"), bot("Hi."), user([image(), text("Who?")]), bot("Bach.")],
    "text around crops": [user([text("a\n"), image(crops=2), text("\nb")]), bot("ok")],
    "typed placeholders": [
        user([text("<image> <|image_pad|> <start_of_image>"), image(), text("<image>\n?")]),
        bot("ok"),
    ],
}  # fmt: skip
TOKENIZERS = ["gpt2-words", "llama3-words", "sentencepiece", "metaspace"]
REAL_TOKENIZERS = {
    "qwen2_5_vl": "qwen3",
    "qwen3_vl": "qwen3",
    "idefics3": "llama3_1",
    "smolvlm": "smollm2",
    "llava_next": "llama2",
}
"""The tokenizers of the assets that families of vision-language models are made with."""
PAIRS = [(name, tokenizer) for name in FAMILIES for tokenizer in TOKENIZERS]
PAIRS += [*REAL_TOKENIZERS.items()] if ASSETS else []


def _encoder(family, **settings):
    return ChatEncoder(family.tokenizer, images=family.images, **settings)


def _text_of(family, sequence, span):
    return family.tokenizer.decode(sequence.input_ids[span.start : span.stop])


@pytest.mark.parametrize(("name", "tokenizer"), PAIRS)
def test_prompts_are_those_of_the_processor(name, tokenizer):
    family = Family(name, tokenizer)
    encoder = _encoder(family)
    for case, messages in CONVERSATIONS.items():
        trained = 0
        for sequence in encoder.encode(messages):
            assert_labels(sequence)
            for reply in sequence.replies:
                before = messages[: reply.message]
                prompt = family.prompt(before)
                assert sequence.input_ids[: reply.start] == prompt, case
                assert encoder.prompt(before) == prompt, case
                trained += 1
            _check_images(family, sequence)
        assert trained or name == "llava_next", case


def _check_images(family, sequence):
    """Each image has its tokens, and they are one segment of its message and do not train."""
    segments = {(segment.start, segment.end): segment for segment in sequence.segments}
    for span in sequence.images:
        segment = segments[span.start, span.stop]
        assert (segment.role, segment.field, segment.trained) == ("user", "image", False)
        assert family.images.placeholder in _text_of(family, sequence, span)
    assert [segment.field for segment in sequence.segments].count("image") == len(sequence.images)
    trained = [index for index in sequence.labels if index != -100]
    assert len(trained) == sequence.trained_tokens


# What stands for each image, and the replies that train, written by hand.
EXPECTED = {
    "qwen2_5_vl": (["<|image_pad|>" * 3, "<|image_pad|>" * 2], ["Two lutes.<|im_end|>"]),
    "qwen3_vl": (["<|image_pad|>" * 3, "<|image_pad|>" * 2], ["Two lutes.<|im_end|>"]),
    "gemma3": (
        ["\n\n<start_of_image>" + "<image_soft_token>" * 4 + "<end_of_image>\n\n"] * 2,
        ["Two lutes.<end_of_turn>"],
    ),
    "idefics3": (
        [
            "<fake_token_around_image><global-img><image><image><image><fake_token_around_image>",
            "".join(
                "".join(
                    f"<fake_token_around_image><row_{row}_col_{col}><image><image><image>"
                    for col in (1, 2)
                ) + "\n"
                for row in (1, 2)
            )
            + "\n<fake_token_around_image><global-img><image><image><image>"
            "<fake_token_around_image>",
        ],
        [" Two lutes.<end_of_utterance>"],
    ),
    "llava_next": (["<image>" * 3, "<image>" * 2], [" Two lutes.</s>"]),
    "lfm2_2_5_vl": (["<image>" * 3, "<image>" * 2], ["Two lutes.<|im_end|>"]),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_an_image_is_its_own_text_in_place_of_its_part(name):
    family = Family(name)
    (sequence,) = _encoder(family).encode(CONVERSATIONS["two of two sizes"])
    pictures, trained = EXPECTED[name]
    assert [span.number for span in sequence.images] == [0, 1]
    assert [_text_of(family, sequence, span) for span in sequence.images] == pictures
    assert replies(family.tokenizer, [sequence]) == trained


def test_a_typed_placeholder_is_text():
    family = Family("qwen2_5_vl")
    typed = "<|vision_start|><|image_pad|><|vision_end|>"
    (sequence,) = _encoder(family).encode([user([text(typed), image()]), bot(typed)])
    pad = family.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert sequence.input_ids.count(pad) == 5
    assert family.tokenizer.decode(sequence.input_ids).count(typed) == 2
    # transformers looks at each part by itself, so that halves in two parts make a placeholder.
    halves = [text("<|image"), text("_pad|>")]
    for content in (typed, halves):
        (plain,) = _encoder(family).encode([user(content), bot("ok")])
        assert (plain.images, plain.input_ids.count(pad)) == ([], 0)


def test_an_image_of_an_assistant_never_trains():
    family = Family("qwen2_5_vl")
    messages = [
        user("Draw."),
        bot([text("Here: "), image(tokens=4), text(" and "), image(tokens=2), text(".")]),
    ]
    (sequence,) = _encoder(family).encode(messages)
    assert [(span.number, _text_of(family, sequence, span)) for span in sequence.images] == [
        (0, "<|image_pad|>" * 4),
        (1, "<|image_pad|>" * 2),
    ]
    trained = [index for index in sequence.labels if index != -100]
    assert family.tokenizer.decode(trained) == (
        "Here: <|vision_start|><|vision_end|> and <|vision_start|><|vision_end|>.<|im_end|>"
    )
    assert len(sequence.replies) == 3
    assert (sequence.messages, sequence.trained_tokens) == ([1], len(trained))
    assert [s.trained for s in sequence.segments if s.field == "image"] == [False, False]
    with pytest.raises(ChatError, match="the assistant's reply is blank") as caught:
        _encoder(family).encode([user("Draw."), bot([image(), text(" ")])])
    assert caught.value.message == 1


def test_an_image_between_words_of_the_processor_keeps_them_out_of_the_loss():
    family = Family("gemma3")
    messages = [user("Draw."), bot([text("So:"), image(crops=1), text("There.")])]
    (sequence,) = _encoder(family).encode(messages)
    trained = [index for index in sequence.labels if index != -100]
    assert family.tokenizer.decode(trained) == "So:There.<end_of_turn>"
    (span,) = sequence.images
    assert _text_of(family, sequence, span).startswith("Here is the original image \n\n<start")


NO_ASSISTANT_IMAGES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for p in m.content %}{% if p.type == 'image' and m.role == 'user' %}<image>"
    "{% elif p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BY_KEY = NO_ASSISTANT_IMAGES.replace("p.type == 'image'", "'image' in p")
TWICE = NO_ASSISTANT_IMAGES.replace("<image>", "<image>{% if loop.first %}<image>{% endif %}")
STRIPS_HISTORY = NO_ASSISTANT_IMAGES.replace(
    "{{ m.content }}", "{{ m.content.split('</think>')[-1] if not loop.last else m.content }}", 1
)


def _images_on(source, prefix_ids=()):
    tokenizer = pair("gpt2-words", source, eos="<|im_end|>")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    return ChatEncoder(tokenizer, images=CountExpander("<image>", prefix_ids))


PICTURE = [user([image(), text("What?")]), bot("A lute.")]
REFUSED = {
    "a part that the template drops": (
        NO_ASSISTANT_IMAGES,
        [*PICTURE, user("Draw."), bot([text("So:"), image()])],
        (3, "image", "lost image"),
        "shows 1 of the 2 images up to this message.*of this role (assistant)",
    ),
    "a token more than images": (
        TWICE, PICTURE, (0, "image", "lost image"), "writes the image token.*2 times.*1 image part",
    ),
    "a template of text": (
        CHATML, PICTURE, (0, "content", "template without images"), "never writes.*<image>",
    ),
    "a part without an image": (
        NO_ASSISTANT_IMAGES, [user([{"type": "image"}]), bot("A.")],
        (0, "content", "malformed message"), "has no image",
    ),
    "a video": (
        NO_ASSISTANT_IMAGES, [user([{"type": "video", "video": "a.mp4"}]), bot("A.")],
        (0, "content", "content is not text"), "list of parts.*found 'video'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_names_message_and_field(case):
    source, messages, named, words = REFUSED[case]
    encoder = _images_on(source)
    with pytest.raises(ChatError, match=words.replace("(", r"\(").replace(")", r"\)")) as caught:
        encoder.encode(messages)
    error = caught.value
    assert (error.message, error.field, error.reason) == named
    batch = ChatEncoder(encoder.tokenizer, images=encoder.images, on_lost="drop").encode_batch(
        [{"messages": messages}, {"messages": [user("Hi"), bot("Hello")]}]
    )
    assert (dict(batch.dropped), [len(row) for row in batch.rows]) == ({named[2]: 1}, [0, 1])


def test_a_model_of_text_refuses_images():
    encoder = ChatEncoder(_images_on(NO_ASSISTANT_IMAGES).tokenizer)
    with pytest.raises(ChatError, match="this model takes text only") as caught:
        encoder.encode(PICTURE)
    assert caught.value.message == 0


def test_a_model_of_text_refuses_images_of_tools():
    """Results of tools may be any JSON, but an image is none of it."""
    for source in (trl("qwen3_vl"), trl("gemma4"), CHATML):
        encoder = ChatEncoder(pair("gpt2-words", source, eos="<|im_end|>"))
        messages = [user("Zoom."), bot("", tool_calls=[call()]), tool([image(), text("ok")])]
        with pytest.raises(ChatError, match="this model takes text only") as caught:
            encoder.prompt(messages)
        assert caught.value.message == 2
    # An object is a result in JSON, whatever its type says.
    shows_json = CHATML.replace("message['content']", "message['content'] | tojson")
    encoder = ChatEncoder(pair("gpt2-words", shows_json, eos="<|im_end|>"))
    result = tool({"type": "image", "name": "a.png"})
    assert '"a.png"' in encoder.tokenizer.decode(encoder.prompt([user("Zoom."), result]))


def test_a_template_that_looks_for_the_key_of_a_part_shows_it():
    (sequence,) = _images_on(BY_KEY).encode(PICTURE)
    assert [span.stop - span.start for span in sequence.images] == [5]


def test_null_keys_of_arrow_are_no_images():
    parts = [
        {"type": "text", "text": "a", "image": None},
        {"type": "image", "image": {"tokens": 2}, "text": None},
    ]
    (sequence,) = _images_on(BY_KEY).encode([user(parts), bot("A.")])
    (same,) = _images_on(BY_KEY).encode([user([text("a"), image(tokens=2)]), bot("A.")])
    assert sequence.input_ids == same.input_ids


def test_text_rows_of_a_template_of_parts_are_shown():
    family = Family("idefics3")
    messages = [system("Be brief."), user("Hi"), bot("Hello"), user("Why?"), bot("So.")]
    (sequence,) = _encoder(family).encode(messages)
    assert replies(family.tokenizer, [sequence]) == [
        " Hello<end_of_utterance>", " So.<end_of_utterance>",
    ]  # fmt: skip
    assert sequence.input_ids[: sequence.replies[1].start] == family.prompt(messages[:4])


def test_a_rewritten_history_has_a_sequence_for_each_turn_with_its_images():
    encoder = _images_on(STRIPS_HISTORY)
    messages = [
        user([image(tokens=2), text("1?")]), bot("why</think>a"),
        user([image(tokens=3), text("2?")]), bot("so</think>b"),
    ]  # fmt: skip
    sequences = encoder.encode(messages)
    spans = [[(s.number, s.stop - s.start) for s in each.images] for each in sequences]
    assert spans == [[(0, 2)], [(0, 2), (1, 3)]]
    assert replies(encoder.tokenizer, sequences) == [
        "why</think>a<|im_end|>", "so</think>b<|im_end|>",
    ]  # fmt: skip


def test_turns_go_with_their_images_and_an_image_is_never_cut():
    family = Family("qwen2_5_vl")
    messages = CONVERSATIONS["an image in each turn"]
    (long,) = _encoder(family).encode(messages)
    (later,) = _encoder(family).encode(messages[2:])
    limit = len(long) - 1
    batch = _encoder(family, max_length=limit).encode_batch([{"messages": messages}])
    (cut,) = batch.rows[0]
    # The number is the image's in the row as it was given.
    assert [(span.number, span.stop - span.start) for span in cut.images] == [(1, 7)]
    assert (cut.input_ids, batch.cut) == (later.input_ids, {0: 1})
    with pytest.raises(ChatError, match="image 0 of the row has 400 tokens by itself, more than"):
        _encoder(family, max_length=300, on_long="error").encode(
            [user([image(tokens=400)]), bot("A.")]
        )
    prompts = ChatPromptEncoder(_encoder(family), limit)
    ids, dropped_messages, _ = prompts.encode([*messages, user("Sure?")])
    assert (ids, dropped_messages) == (_encoder(family).prompt([*messages[2:], user("Sure?")]), 2)


def test_the_ids_of_the_processor_stand_in_front_of_all_rows():
    encoder = _images_on(NO_ASSISTANT_IMAGES)
    prefix = [1, 2]
    with_prefix = _images_on(NO_ASSISTANT_IMAGES, prefix)
    forged = [user("<|endoftext|>Hi"), bot("Hello")]
    for messages in (PICTURE, [user("Hi"), bot("Hello")], [user("Ho"), bot("Hello")], forged):
        (plain,), (sequence,) = encoder.encode(messages), with_prefix.encode(messages)
        assert sequence.input_ids == prefix + plain.input_ids
        assert sequence.labels == [-100] * len(prefix) + plain.labels
        assert with_prefix.prompt(messages[:1]) == prefix + encoder.prompt(messages[:1])
        shift = [(s.start + len(prefix), s.stop + len(prefix)) for s in plain.images]
        assert [(span.start, span.stop) for span in sequence.images] == shift
        assert sequence.segments[-1].end == len(sequence)
    written = _images_on("{{ bos_token }}" + NO_ASSISTANT_IMAGES, [1, 2])
    (sequence,) = written.encode(PICTURE)
    assert sequence.input_ids[0] == written.tokenizer.bos_token_id


@pytest.mark.parametrize("name", FAMILIES)
def test_segments_encode_an_image_by_itself(name):
    family = Family(name)
    for messages in CONVERSATIONS.values():
        (sequence,) = _encoder(family, boundaries="segments").encode(messages)
        expansions = [
            family.images.expand(part["image"])
            for message in messages if isinstance(message["content"], list)
            for part in message["content"] if part["type"] == "image"
        ]  # fmt: skip
        assert [_text_of(family, sequence, span) for span in sequence.images] == expansions
        _check_images(family, sequence)


@pytest.mark.parametrize("name", FAMILIES)
def test_replies_to_images_are_read_back(name):
    family = Family(name)
    encoder = _encoder(family)
    messages = CONVERSATIONS["an image in each turn"]
    sequence = encoder.encode(messages)[-1]
    _, start, stop = sequence.replies[-1]
    parsed = encoder.parse(sequence.input_ids[start:stop], messages[:3])
    assert (parsed.message, parsed.reason) == (bot("A viol."), None)


def test_a_result_of_a_tool_may_hold_an_image():
    family = Family("qwen3_vl")
    result = tool([text("The page:"), image(tokens=3)])
    messages = [user("Look."), bot("", tool_calls=[call()]), result, bot("A lute.")]
    (sequence,) = _encoder(family).encode(messages)
    (segment,) = [segment for segment in sequence.segments if segment.field == "image"]
    assert (segment.role, segment.message, segment.end - segment.start) == ("tool", 2, 3)


def test_settings_describe_the_images_and_make_the_same_encoder():
    encoder = _images_on(NO_ASSISTANT_IMAGES)
    described = encoder.settings()
    assert described["images"] == {"placeholder": "<image>"}
    same = ChatEncoder.from_settings(encoder.tokenizer, described, encoder.images)
    assert same.encode(PICTURE)[0].input_ids == encoder.encode(PICTURE)[0].input_ids
    assert "images" not in ChatEncoder.from_settings(encoder.tokenizer, described).settings()
    assert encoder.with_settings({"train_on": "last"}).images is encoder.images


# No text begins with the end of a token: transformers joins the halves in two parts.
_PARTS = st.lists(
    st.one_of(
        st.text(st.sampled_from("ab <|\n?é"), min_size=1, max_size=8).map(text),
        st.sampled_from(["<image>", "<|im_end|>", "<image", "<|image_pad|>"]).map(text),
        st.builds(image, tokens=st.integers(1, 4), tiles=st.integers(0, 2)),
    ),
    min_size=1,
    max_size=5,
)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(turns=st.lists(_PARTS, min_size=1, max_size=3), data=st.data())
@pytest.mark.parametrize("name", ["qwen2_5_vl", "idefics3", "lfm2_2_5_vl"])
def test_any_images_stand_where_the_processor_puts_them(name, turns, data):
    family = _family(name, data.draw(st.sampled_from(TOKENIZERS)))
    messages = [m for parts in turns for m in (user(parts), bot("So it is."))]
    try:
        sequences = _encoder(family, on_lost="keep").encode(messages)
    except ChatError as error:
        # The two templates that strip texts may leave a turn without any.
        assert error.reason in ("cannot be neutralised", "template refuses")
        return
    images = [part for parts in turns for part in parts if part["type"] == "image"]
    for sequence in sequences:
        for reply in sequence.replies:
            assert sequence.input_ids[: reply.start] == family.prompt(messages[: reply.message])
        _check_images(family, sequence)
    expansions = [family.images.expand(part["image"]) for part in images]
    found = [_text_of(family, sequences[-1], span) for span in sequences[-1].images]
    spaceless = [re.sub(r"\s", "", each) for each in (*expansions, *found)]
    assert spaceless[: len(images)] == spaceless[len(images) :]


_FAMILIES = {}


def _family(name, tokenizer):
    if (name, tokenizer) not in _FAMILIES:
        _FAMILIES[name, tokenizer] = Family(name, tokenizer)
    return _FAMILIES[name, tokenizer]
