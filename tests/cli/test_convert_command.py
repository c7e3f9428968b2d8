"""`luthier convert`: what it writes, prints and refuses."""

import yaml

CONFIG = {
    "base_model": "owner/model", "adapter": "qlora", "load_in_4bit": True, "lora_r": 8,
    "lora_alpha": 16, "datasets": [{"path": "rows.jsonl", "type": "alpaca"}],
    "learning_rate": 2e-4, "wandb_project": None, "relora": True, "strict": False,
    "fsdp_config": {"offload_params": False},
}  # fmt: skip


def test_a_recipe_is_written_and_every_key_is_listed(luthier, workplace):
    workplace("qlora-8b.yml", yaml.safe_dump(CONFIG))
    code, out, _ = luthier("convert", "qlora-8b.yml")
    assert code == 0
    assert out.startswith("axolotl config qlora-8b.yml -> recipes/qlora_8b.yaml\n")
    assert "Not carried over (2):\n  fsdp_config: it belongs to the launch" in out
    assert "\n  relora: luthier has no equal of this method\n" in out
    for words in ("Not quite the same here (1)", "Without a value", "wandb_project", "strict"):
        assert words in out
    assert "  luthier check recipe=qlora_8b\n" in out
    assert "  luthier launch --config fsdp2 recipe=qlora_8b\n" in out
    assert max(map(len, out.splitlines())) <= 80
    code, out, _ = luthier("recipes")
    assert "qlora_8b" in out


def test_a_misspelt_key_is_named_with_the_one_it_is_like(luthier, workplace):
    workplace("a.yml", yaml.safe_dump(CONFIG | {"num_epoch": 2}))
    code, out, _ = luthier("convert", "a.yml")
    said = " ".join(out.split())
    assert code == 0 and "does not know this key of axolotl; is num_epochs meant?" in said


def test_nothing_is_overwritten(luthier, workplace):
    workplace("a.yml", yaml.safe_dump(CONFIG))
    recipe = workplace("recipes/a.yaml", "seed: 1\n")
    code, _, err = luthier("convert", "a.yml")
    assert code == 2 and "recipes/a.yaml exists" in err and recipe.read_text() == "seed: 1\n"
    code, _, _ = luthier("convert", "a.yml", "--force")
    assert code == 0 and "base_model" in recipe.read_text()


def test_what_is_left_to_correct_is_said(luthier, workplace):
    grpo = {"rl": "grpo", "trl": {"reward_funcs": ["none_such.score"]}}
    rows = {"datasets": [{"path": "rows.jsonl", "type": "my.transform"}]}
    workplace("a.yml", yaml.safe_dump(CONFIG | grpo | rows))
    code, out, _ = luthier("convert", "a.yml")
    assert code == 1 and "To correct before it runs here:\n  trainer.rewards: " in out


def test_mistakes_are_said_in_words(luthier, workplace):
    workplace("a.yml", yaml.safe_dump(CONFIG))
    workplace("empty.yml", "")
    workplace("list.yml", "[1]\n")
    workplace("folder/a.yml", "")
    for words, says in (
        (["b.yml"], "b.yml: there is no such file. Did you mean a.yml?"),
        (["nowhere/b.yml"], "nowhere/b.yml: there is no such file."),
        (["folder"], "folder: this is a folder. Name the file of the config."),
        (["empty.yml"], "empty.yml: it is empty, and no mapping of keys to values"),
        (["list.yml"], "list.yml: this is not a mapping of keys to values"),
        ([], "takes one file"),
    ):
        code, out, err = luthier("convert", *words)
        assert (code, out) == (2, "") and says in err and "Errno" not in err
    code, _, err = luthier("convert", "a.yml", "--trainer", "ppo")
    assert code == 2 and "--trainer ppo: write one of sft" in err
