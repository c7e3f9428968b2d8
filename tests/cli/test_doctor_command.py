"""`luthier doctor` without a test: what is printed, for people and for machines."""

import json

import pytest

MISTAKES = {
    "a setting": (["recipe=quickstart"], "takes flags alone, and no recipe=quickstart"),
    "an unknown path": (["--only", "nf5"], "--only nf5: there is no such path. Did you mean nf4?"),
    "no path": (["--only"], "--only needs a value. Write --only PATHS."),
}


@pytest.mark.parametrize(("typed", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_said_in_words(typed, said, luthier):
    code, out, err = luthier("doctor", *typed)
    assert (code, out) == (2, "")
    assert said in err


def test_the_machine_is_printed_within_80_columns(luthier):
    code, out, _ = luthier("doctor")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    headings = [line for line in out.splitlines() if line and not line.startswith(" ")]
    assert headings == [
        "Machine", "GPUs", "torch", "Kernels", "Folders", "Hugging Face hub", "Versions",
        "What luthier would choose",
    ]  # fmt: skip


def test_the_machine_is_one_json_object(luthier):
    code, out, _ = luthier("doctor", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["holds"] is True
    assert facts["paths"] == []
    assert facts["kernels"]["bitsandbytes_nf4"] == facts["kernels"]["bitsandbytes_int8"] == "right"
    assert facts["hub"]["access"] == "offline: HF_HUB_OFFLINE is set"
    assert facts["versions"]["torch"]["state"] == "as tried"
    assert facts["folders"]["runs"]["write_mib_per_second"] > 0
