"""`luthier prepare` fills the cache and leaves what trains alone."""

import json
import subprocess
import sys

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers.chatml import jsonl
from helpers.letter_encoder import replies

ALPHABET = pre_tokenizers.ByteLevel.alphabet()
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
RUN = """
import sys
from luthier.cli.prepare import run
code = run(["model.path=small", "dataset.path=data.jsonl", "dataset.cache=cache"])
print(sorted({"trl", "peft"} & sys.modules.keys()))
sys.exit(code)
"""


def test_the_cache_is_filled_without_a_trainer(tmp_path):
    jsonl(tmp_path / "data.jsonl", replies("a", "b"))
    backend = Tokenizer(models.BPE({name: n for n, name in enumerate(sorted(ALPHABET))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "small")
    (tmp_path / "small" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    done = subprocess.run(
        [sys.executable, "-c", RUN], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "2 rows, 2 sequences" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_method_has_its_encoder():
    script = (
        "import sys; from luthier.train.methods.encoders import ENCODER_FACTORIES\n"
        "from luthier.config.methods import METHODS\n"
        "print(ENCODER_FACTORIES.keys() ^ METHODS.keys())\n"
        "print({'torch', 'transformers'} & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\nset()\n"
