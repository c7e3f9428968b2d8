"""The Python of the cards of models with a head runs as it stands there."""

import json
import re

import pytest
import torch

from helpers.head_runs import CASES, finish
from luthier.export.write_card import write_card

WITH_HEADS = {name: case for name, case in CASES.items() if case[0] != "seq2seq"}


@pytest.mark.parametrize(("method", "rows", "also"), WITH_HEADS.values(), ids=WITH_HEADS)
def test_it_says_a_label_or_a_number(tmp_path, monkeypatch, capsys, method, rows, also):
    run, _ = finish(tmp_path / "tiny", method, rows, also)
    assert write_card(run) is None
    text = (run / "model" / "README.md").read_text()
    (code,) = re.findall(r"(?:```|~~~)python\n(.*?)\n(?:```|~~~)", text, re.DOTALL)
    # A card does not show where the base is on this machine.
    source = code.replace("path/to/base", f"{tmp_path}/tiny/base")
    monkeypatch.chdir(run / "model")
    capsys.readouterr()
    known = {}
    exec(compile(source, "card", "exec"), known)
    said = capsys.readouterr().out.strip()
    config = known["model"].config
    labels = set(config.id2label.values())
    if method == "reward" or config.problem_type == "regression":
        assert float(said) == known["logits"].item()
    elif config.problem_type == "multi_label_classification" or method == "tag":
        assert set(json.loads(said.replace("'", '"'))) <= labels
    else:
        assert said in labels
    assert isinstance(known["logits"], torch.Tensor)
