"""A model is asked in batches, token by token and in a conversation, always with one answer."""

import gc

import pytest
import torch

from helpers import adapter_runs as material
from luthier.errors import UserError
from luthier.infer import LLM
from luthier.infer import generate as generating

ASKED = material.questions(13)
LONG = {"max_new_tokens": 14}


@pytest.fixture(scope="module")
def single(tuned_llm):
    return [tuned_llm.replies([text], **LONG)[0] for text in ASKED]


def test_replies_differ_in_length_and_end(single):
    assert {reply.finish for reply in single} == {"stop", "length"}
    assert len({len(reply.ids) for reply in single}) > 3
    assert len({len(reply.ids) + reply.prompt_tokens for reply in single}) > 8


@pytest.mark.parametrize("size", [2, 5, 13, None], ids=lambda n: f"{n or 'found'} at once")
def test_a_batch_answers_as_one_by_one_token_for_token(tuned_llm, single, size):
    assert tuned_llm.replies(ASKED, batch_size=size, **LONG) == single


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.8}, {"no_repeat_ngram_size": 2}, {"num_beams": 3},
        {"min_new_tokens": 9}, {"stop_strings": ["d"]}, {"bad_words_ids": [[70]]},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=lambda settings: next(iter(settings)),
)  # fmt: skip
def test_settings_of_generation_mean_the_same_in_a_batch(tuned_llm, single, settings):
    alone = [tuned_llm.replies([text], **LONG, **settings)[0] for text in ASKED[:5]]
    assert tuned_llm.replies(ASKED[:5], **LONG, **settings) == alone
    if "prompt_lookup_num_tokens" not in settings:
        assert alone != single[:5]


def test_streaming_gives_what_generation_gives(tuned_llm, single):
    for text, reply in list(zip(ASKED, single, strict=True))[:5]:
        pieces = list(tuned_llm.stream(text, **LONG))
        assert "".join(pieces) == reply.text
        assert all(pieces) and (len(pieces) > 1 or len(reply.ids) < 3)


def test_a_stream_that_is_left_stops_the_model(tuned_llm):
    import threading

    before = threading.active_count()
    stream = tuned_llm.stream(ASKED[0], max_new_tokens=60)
    next(stream)
    stream.close()
    assert threading.active_count() == before


def test_an_error_within_a_stream_reaches_the_reader(tuned_llm, monkeypatch):
    def broken(**_):
        raise ValueError("broken")

    monkeypatch.setattr(tuned_llm.model, "generate", broken)
    with pytest.raises(ValueError, match="broken"):
        list(tuned_llm.stream(ASKED[0]))


def test_the_models_own_penalties_do_not_change_a_greedy_reply(tuned_llm, single, monkeypatch):
    monkeypatch.setattr(tuned_llm.model.generation_config, "repetition_penalty", 3.0)
    monkeypatch.setattr(tuned_llm.model.generation_config, "num_beams", 4)
    assert tuned_llm.replies(ASKED[:3], **LONG) == single[:3]


def test_prompts_are_the_encoders_with_special_tokens_once(tuned_llm):
    conversation = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    texts = ["<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"]
    texts.append("<|im_start|>system\ns<|im_end|>\n" + texts[0])
    asked = ["hi", conversation, {"messages": conversation}]
    ids = tuned_llm.prompt_ids(asked)
    assert [tuned_llm.tokenizer.decode(each) for each in ids] == [texts[0], texts[1], texts[1]]
    assert tuned_llm.prompt_ids([ids[0]]) == [ids[0]]
    assert tuned_llm.stop_token_ids == [2, 0]


def test_text_that_looks_like_control_tokens_stays_text(tuned_llm):
    (ids,) = tuned_llm.prompt_ids(["<|im_end|>"])
    assert ids.count(2) == 1


def test_sampling_is_repeated_by_its_seed_and_leaves_others_alone(tuned_llm):
    state = torch.random.get_rng_state()
    one, same, other = (
        tuned_llm.generate(ASKED[:4], temperature=1.5, seed=seed, **LONG) for seed in (1, 1, 2)
    )
    assert one == same != other
    assert torch.equal(state, torch.random.get_rng_state())


def test_several_replies_to_a_prompt_follow_one_another(tuned_llm, single):
    found = tuned_llm.generate(ASKED[:3], num_beams=2, num_return_sequences=2, batch_size=2, **LONG)
    best = tuned_llm.generate(ASKED[:3], num_beams=2, **LONG)
    assert found[::2] == best and len(found) == 6


def test_replies_are_told_as_they_come(tuned_llm, single):
    told = {}
    tuned_llm.replies(ASKED[:5], batch_size=2, on_replies=told.__setitem__, **LONG)
    assert told == {n: [single[n]] for n in range(5)}


def test_the_longest_prompts_are_answered_as_far_as_the_context_goes(tuned_llm):
    room = material.CONTEXT - len(tuned_llm.prompt_ids([""])[0])
    asked = ["x" * (room - n) for n in (1, 5, 5, 60)]
    found = tuned_llm.replies(asked, max_new_tokens=20, eos_token_id=[])
    assert [len(reply.ids) for reply in found] == [1, 5, 5, 20]
    assert [
        "".join(tuned_llm.stream(text, max_new_tokens=20, eos_token_id=[])) for text in asked
    ] == [reply.text for reply in found]


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("x" * 120, "prompt 2: has 139 tokens, and the model reads 128 with its reply"),
        ([], "prompt 2: a prompt is a text, or messages"),
        ([{"role": "user"}], "prompt 2: "),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
         "prompt 2: the conversation ends with a reply"),
    ],
    ids=["longer than the context", "nothing", "no content", "ends with a reply"],
)  # fmt: skip
def test_a_prompt_that_cannot_be_answered_is_named(tuned_llm, prompt, says):
    with pytest.raises(UserError) as caught:
        tuned_llm.generate(["hi", prompt])
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_new_token": 3}, "max_new_token: is not a setting of transformers.GenerationConfig. "
         "Did you mean max_new_tokens?"),
        ({"max_length": 3}, "max_length: counts the prompt too; use max_new_tokens."),
        ({"max_new_tokens": 0}, "max_new_tokens=0: write a whole number of at least 1."),
        ({"output_scores": True}, "output_scores: replies are text"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_setting_that_does_not_exist_is_told(tuned_llm, settings, says):
    with pytest.raises(UserError) as caught:
        tuned_llm.generate(["hi"], **settings)
    assert says in str(caught.value)


def test_where_memory_runs_out_the_batch_is_halved_and_stays_so(tuned_llm, single, monkeypatch):
    sizes, answer = [], generating._answer

    def tight(model, inputs, config, more):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return answer(model, inputs, config, more)

    monkeypatch.setattr(generating, "_answer", tight)
    assert tuned_llm.replies(ASKED, batch_size=16, **LONG) == single
    assert sizes == [13, 6, *[3] * 4, 1]


def test_a_prompt_that_does_not_fit_alone_is_told(tuned_llm, monkeypatch):
    def full(*_):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(generating, "_answer", full)
    with pytest.raises(UserError, match="do not fit into the memory by themselves"):
        tuned_llm.generate(["hi"])


def test_the_base_answers_without_the_adapter(tuned_llm, base_model, single):
    with LLM(str(base_model), device="cpu", dtype="float32") as base:
        alone = base.generate(ASKED, **LONG)
        with (
            pytest.raises(UserError, match="is a whole model: it has no base in it"),
            base.as_base(),
        ):
            pass
    with tuned_llm.as_base():
        assert tuned_llm.generate(ASKED, **LONG) == alone
    assert alone != [reply.text for reply in single]
    assert tuned_llm.replies(ASKED[:2], **LONG) == single[:2]


def test_a_conversation_remembers(tuned_llm):
    chat = tuned_llm.chat(system="s")
    first = chat.say("hi", max_new_tokens=5)
    second = "".join(chat.stream("and?", max_new_tokens=5))
    # fmt: off
    said = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"},
            {"role": "assistant", "content": first}, {"role": "user", "content": "and?"}]
    # fmt: on
    assert tuned_llm.generate([said], max_new_tokens=5) == [second]
    assert chat.messages[:-1] == said
    chat.reset()
    assert chat.messages == said[:1]


def test_a_conversation_that_cannot_go_on_is_as_it_was(tuned_llm):
    chat = tuned_llm.chat()
    with pytest.raises(UserError):
        chat.say("x" * 200)
    assert chat.messages == []


def test_memory_is_free_after_the_block(tuned_run):
    import weakref

    with LLM(str(tuned_run)) as llm:
        held = weakref.ref(llm.model)
        assert not llm.model.training
        assert not any(weight.requires_grad for weight in llm.model.parameters())
    gc.collect()
    assert held() is None
    with pytest.raises(UserError, match="with LLM"):
        llm.generate(["hi"])


@pytest.mark.parametrize("packed", ["nf4", "int8"])
def test_weights_are_packed_when_asked(tuned_run, packed):
    with LLM(str(tuned_run), quantization=packed) as llm:
        assert len(llm.generate(ASKED[:3], max_new_tokens=4)) == 3
        kinds = {type(layer).__name__ for layer in llm.model.modules()}
        assert ("Linear4bit" if packed == "nf4" else "Linear8bitLt") in kinds


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"quantization": "nf3"}, "quantization=nf3: there are trained, none, nf4, int8"),
        ({"word": "nowhere/at/all"}, "there is no such folder"),
    ],
    ids=["packing", "word"],
)
def test_a_wrong_word_is_told_before_anything_loads(tuned_run, given, says):
    with pytest.raises(UserError, match=says):
        LLM(**{"word": str(tuned_run)} | given)


def test_an_adapter_for_another_base_is_told(tuned_run, tmp_path):
    deeper = material.base(tmp_path / "shallow", num_hidden_layers=1)
    with (
        pytest.raises(UserError, match=r"is for another base than .*shallow .*it has no layer for"),
        LLM(str(tuned_run), base=str(deeper)),
    ):
        pass


def test_a_model_without_a_template_goes_on_with_text(tmp_path):
    folder = material.base(tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    with LLM(str(folder), device="cpu", dtype="float32") as llm:
        assert llm.prompt_ids(["ab"]) == [llm.tokenizer("ab")["input_ids"]]
        assert llm.stop_token_ids == [0]
        assert len(llm.generate(["ab", "c"], max_new_tokens=3)) == 2
        with pytest.raises(UserError, match="has no chat template"):
            llm.generate([[{"role": "user", "content": "ab"}]])
