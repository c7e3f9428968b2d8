"""Every mistake in the configuration gets its words: what, where, the nearest, what to do."""

import pytest

from luthier.config import load_config
from luthier.errors import UserError

Q = "recipe=quickstart"

ONE_MISTAKE = {
    # nothing or the wrong thing is chosen
    "nothing": (
        [],
        ["recipe: nothing is chosen", "recipe=quickstart trains", "model=NAME and dataset=NAME"],
    ),
    "no dataset": (["model=smollm2_135m"], ["dataset: nothing is chosen. Add dataset=NAME: files"]),
    "no model": (["dataset=quickstart"], ["model: nothing is chosen. Add model=NAME: hub"]),
    "recipe": (["recipe=quikstart"], ["no recipe 'quikstart'", "Did you mean quickstart?"]),
    "recipe, far off": (
        ["recipe=zzz"],
        ["no recipe 'zzz'. Options: classify_modernbert, cpo_qwen"],
    ),
    "recipe as a file": (["recipe=recipes/quickstart.yaml"], ["Write recipe=quickstart."]),
    "option": ([Q, "lora=smal"], ["lora: there is no lora option 'smal'. Did you mean small?"]),
    "option, its beginning": ([Q, "model=smol"], ["Did you mean smollm2_135m or"]),
    "option, a model's name": (
        [Q, "model=Qwen/Qwen3-0.6B"],
        ["no option but a path. Write model=hub model.path=Qwen/Qwen3-0.6B."],
    ),
    "option, a file": (
        [Q, "dataset=my.jsonl"],
        ["no option but a path. Write dataset=files dataset.path=my.jsonl."],
    ),
    "option, a dataset's name": ([Q, "dataset=org/rows"], ["dataset=hub dataset.path=org/rows."]),
    "option, a number": ([Q, "model=5"], ["no model option '5'"]),
    "option, null": ([Q, "lora=null"], ["lora: null is not an option. Write lora=none."]),
    "option, added": ([Q, "+lora=small"], ["would add a second lora. Write lora=small."]),
    "group": (["model/x=3", Q], ["model/x=3: there is no such group"]),
    "group with a package": (["model@x=hub", Q], ["model@x=hub: there is no such group"]),
    # keys
    "key": ([Q, "chat.max_lenght=3"], ["no such key. Did you mean chat.max_length?"]),
    "key without its group, misspelt": (
        [Q, "num_train_epoch=3"],
        ["no such key. Did you mean trainer.args.num_train_epochs?"],
    ),
    "key without its group, in capitals": ([Q, "Num_Train_Epochs=5"], ["num_train_epochs?"]),
    "other trainer's key, misspelt": (
        [Q, "squence_len=512"],
        ["no such key. In luthier it is written chat.max_length=512."],
    ),
    "no key at all": ([Q, "zzzz=1"], ["zzzz: there is no such key. Keys here: model, quant"]),
    "no key, though some are like it": (
        [Q, "adapter_path=a"],
        ["no such key. Keys here: model, q"],
    ),
    "resume": (
        [Q, "trainer.args.resume_from_checkpoint=true"],
        ["is not set here: the same command resumes by itself; remove it."],
    ),
    "key, far off": ([Q, "chat.zzz=3"], ["chat.zzz: there is no such key. Keys here: template"]),
    "key of no group": ([Q, "modle.path=x"], ["modle: there is no such key. Did you mean model?"]),
    "key, misplaced": ([Q, "max_length=3"], ["max_length: ", "it is written chat.max_length=3."]),
    "setting, misplaced": ([Q, "learning_rate=1"], ["Did you mean trainer.args.learning_rate?"]),
    "key, renamed": (
        [Q, "dataset.shape=text"],
        ["dataset.shape: this key is called dataset.type now."],
    ),
    "key, removed": ([Q, "~sed"], ["Could not delete from config. 'sed' does not exist."]),
    "no value": (
        ["model=hub", "dataset=quickstart"],
        ["model.path: has no value. Add model.path=V"],
    ),
    "a source's value that is left to be set": (
        ["model=hub", "model.path=x", "dataset=mixture", "dataset.sources.mine.path=???"],
        ["dataset.sources.mine.path: has no value. Add dataset.sources.mine.path=VALUE. A file"],
    ),
    "a folder named by a variable that is not set": (
        [Q, "output_dir=${oc.env:LUTHIER_NO_SUCH}/x"],
        ["output_dir: \"Environment variable 'LUTHIER_NO_SUCH' not found\". Set it"],
    ),
    "a library's value that is left to be set": (
        [Q, "trainer.args.lr_scheduler_kwargs.min_lr=???"],
        ["Add trainer.args.lr_scheduler_kwargs.min_lr=VALUE."],
    ),
    "no value, said where": (["model=hub", "dataset=quickstart"], ["hub.yaml:4]", "A hub name, a"]),
    # types
    "whole number": ([Q, "seed=x"], ["seed: 'x' is not a whole number."]),
    "whole number, half": ([Q, "seed=1.5"], ["seed: 1.5 is not a whole number."]),
    "number": ([Q, "dataset.eval.share=x"], ["dataset.eval.share: 'x' is not a number."]),
    "true or false": ([Q, "dry_run=maybe"], ["dry_run: 'maybe' is not true or false."]),
    "text": ([Q, "model.revision=123"], ["model.revision: 123 is not text (put it in quotes)."]),
    "mapping": ([Q, "chat.variables=3"], ["chat.variables: 3 is not a mapping of keys to values."]),
    "group, a number": (
        [Q, "chat={max_length:x}"],
        ["chat.max_length: 'x' is not a whole number."],
    ),
    "list": ([Q, "tracker.to=wandb"], ["tracker.to: 'wandb' is not a list."]),
    "range": (
        [Q, "chat.max_length=0"],
        ["chat.max_length: 0 is out of range: it must be more than"],
    ),
    "share": ([Q, "dataset.eval.share=2"], ["2 is out of range: it must be less than 1."]),
    "choice": ([Q, "model.dtype=bf16"], ["'bf16' is not an option. Did you mean bfloat16?"]),
    "choice of a list": ([Q, "tracker.to=[wandbb]"], ["tracker.to: 'wandbb'", "mean wandb?"]),
    "date": (
        [Q, "chat.date=2024-7-26"],
        ["chat.date: '2024-7-26' is not a date. Write YYYY-MM-DD"],
    ),
    # pass-through
    "trainer, name": (
        [Q, "trainer.args.lerning_rate=1"],
        ["SFTConfig", "trainer.args.learning_rate"],
    ),
    "trainer, far off": ([Q, "trainer.args.zzzzz=1"], ["is not a setting of trl.SFTConfig."]),
    "trainer, number": ([Q, "trainer.args.learning_rate=abc"], ["'abc' is not a number."]),
    "trainer, whole": ([Q, "trainer.args.max_steps=2.5"], ["2.5 is not a whole number."]),
    "trainer, bool": ([Q, "trainer.args.tf32=3"], ["3 is not true or false or null."]),
    "trainer, option": ([Q, "trainer.args.optim=adamw_8bt"], ["Did you mean adamw_8bit?"]),
    "trainer, null": ([Q, "trainer.args.learning_rate=null"], ["null is not a number."]),
    "lora, name": ([Q, "lora.alpha=3"], ["lora.alpha: is not a setting of peft.LoraConfig."]),
    "lora, whole": ([Q, "lora.r=abc"], ["lora.r: 'abc' is not a whole number."]),
    "lora, option": ([Q, "lora.bias=al"], ["lora.bias: 'al' is not an option. Did you mean all?"]),
    "quantization, name": (
        [Q, "quantization.load_in_4bits=true"],
        ["Did you mean", "load_in_4bit?"],
    ),
    "quantization, option": ([Q, "quantization.bnb_4bit_quant_type=nf5"], ["Did you mean nf4?"]),
    "wandb, name": ([Q, "tracker.wandb.projct=x"], ["wandb.init", "tracker.wandb.project?"]),
    # luthier decides
    "kept, length": ([Q, "trainer.args.max_length=5"], ["is not set here: use chat.max_length."]),
    "kept, folder": ([Q, "trainer.args.output_dir=x"], ["is not set here: use output_dir."]),
    "kept, seed": ([Q, "trainer.args.seed=1"], ["is not set here: use seed."]),
    "kept, tracker": ([Q, "trainer.args.report_to=wandb"], ["use tracker=wandb"]),
    "kept, padding": ([Q, "trainer.args.padding_free=true"], ["lays out the rows itself"]),
    "kept, old name": (
        [Q, "trainer.args.gradient_checkpointing=true"],
        ["activation_checkpointing"],
    ),
    "kept, lora": ([Q, "lora.task_type=CAUSAL_LM"], ["lora.task_type: is not set here"]),
    "kept, model": ([Q, "model.kwargs.device_map=auto"], ["use model.device."]),
    "kept, split layers": (
        [Q, "model.kwargs.tp_plan=auto"],
        ["model.kwargs.tp_plan: is not set here", "luthier launch --config fsdp2"],
    ),
    "kept, split experts": (
        [Q, "model.kwargs.distributed_config={ep_size: 2}"],
        ["model.kwargs.distributed_config: is not set here"],
    ),
    "kept, secret": ([Q, "model.kwargs.token=hf_x"], ["log in with `hf auth login`."]),
    # together
    "4-bit, full": ([Q, "lora=none"], ["load_in_4bit with full fine-tuning", "Add lora=default"]),
    "8-bit, full": ([Q, "lora=none", "quantization=int8"], ["load_in_8bit with full fine-tuning"]),
    "both bits": ([Q, "quantization.load_in_8bit=true"], ["are both true. Keep one"]),
    "no bits": ([Q, "quantization.load_in_4bit=false"], ["neither load_in_4bit nor load_in_8bit"]),
    "two held-out sets": (
        [Q, "dataset.eval.share=0.1", "dataset.eval.count=3"],
        ["dataset.eval: path and share and count", "dataset.eval.count=null"],
    ),
    "trains on what it holds out": (
        [Q, "dataset=hub", "dataset.path=x", "dataset.eval.split=train"],
        ["dataset.eval.split: 'train' is what the model trains on"],
    ),
    "evaluation without rows": (
        [Q, "dataset.eval.path=null", "trainer.evaluation.metrics=[]"],
        [
            "trainer.args.eval_strategy: 'steps', but no rows are held out",
            "dataset.eval.share=0.05",
        ],
    ),
    "metrics without rows": (
        [Q, "dataset.eval.path=null", "trainer.args.eval_strategy=no"],
        ["trainer.evaluation.metrics: need held-out rows"],
    ),
    "best model, no evaluation": (
        [Q, "trainer.args.load_best_model_at_end=true", "trainer.args.eval_strategy=no"],
        ["needs evaluations"],
    ),
    "best model, no checkpoint": (
        [Q, "trainer.args.load_best_model_at_end=true"],
        ["save_strategy is 'no', eval_strategy 'steps'. Set trainer.args.save_strategy=steps."],
    ),
    "best model, other steps": (
        [
            *(Q, "trainer.args.load_best_model_at_end=true", "trainer.args.save_strategy=steps"),
            "trainer.args.save_steps=70",
        ],
        ["save_steps (70) must be a multiple of eval_steps (40)"],
    ),
    "two precisions": (
        [Q, "trainer.args.bf16=true", "trainer.args.fp16=true"],
        ["bf16 and fp16 are both true"],
    ),
    "batch of none": ([Q, "trainer.args.per_device_train_batch_size=0"], ["0 is too small"]),
    "rank zero": ([Q, "lora.r=0"], ["lora.r: 0 is too small; the least is 1."]),
    "dropout": ([Q, "lora.lora_dropout=1"], ["must be at least 0 and less than 1"]),
    # the grammar
    "not key=value": ([Q, "foo"], ["foo: not key=value. Write a setting as foo=VALUE."]),
    "name of a recipe alone": (["quickstart"], ["recipe: quickstart is a recipe. Write recipe=q"]),
    "a space in place of =": ([Q, "lora.r", "8"], ["lora.r: write it with `=`: lora.r=8."]),
    "recipe and a space": (["recipe", "quickstart"], ["write it with `=`: recipe=quickstart."]),
    "unreadable": ([Q, "a=b c=["], ["a: [ is opened and not closed", "Write 'a=\"b c=[\"'."]),
    "several values": (
        [Q, "lora.r=8,16"],
        ["8,16 is several values", "'lora.r=[8,16]'", "add -m"],
    ),
    "interpolation": ([Q, "model.revision=${nope}"], ["model.revision: Interpolation key 'nope'"]),
    "environment": (
        [Q, "model.revision=${oc.env:NO_SUCH}"],
        ["'NO_SUCH' not found", "oc.env:NAME,"],
    ),
    "hydra": ([Q, "hydra.foo=3"], ["Hydra: Could not override 'hydra.foo'"]),
}


@pytest.mark.parametrize("overrides, said", ONE_MISTAKE.values(), ids=ONE_MISTAKE)
def test_one_mistake(overrides, said):
    with pytest.raises(UserError) as caught:
        load_config(overrides)
    text = str(caught.value)
    assert text.startswith("1 mistake in the configuration; nothing was run.\n  ")
    assert [part for part in said if part not in text] == []


def test_all_mistakes_at_once():
    typed = ["lora.rr=3", "lora.r=abc", "trainer.args.lerning_rate=1", "seed=x", "foo"]
    with pytest.raises(UserError) as caught:
        load_config([Q, "model=smolm", "chat.max_length=-2", *typed])
    keys = [line.split(": ")[0].strip() for line in str(caught.value).splitlines()[1:]]
    wanted = "foo model chat.max_length seed trainer.args.lerning_rate lora.rr lora.r"
    assert sorted(keys) == sorted(wanted.split())


def test_what_follows_from_a_mistake_is_not_reported():
    with pytest.raises(UserError) as caught:
        load_config(["recipe=typo", "lora=typo", "quantization=nf4", "seed=x"])
    keys = [line.split(": ")[0].strip() for line in str(caught.value).splitlines()[1:]]
    assert keys == ["recipe", "lora", "seed"]


def test_an_unset_environment_is_read_where_it_is_set(monkeypatch):
    monkeypatch.setenv("SOME_REVISION", "abc")
    assert load_config([Q, "model.revision=${oc.env:SOME_REVISION}"]).config.model.revision == "abc"


def test_a_tracker_that_is_not_installed(monkeypatch):
    from luthier.config import cross_checks

    monkeypatch.setattr(cross_checks, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tensorboard is not installed. .*luthier\[tensorboard\]"):
        load_config([Q, "tracker=tensorboard"])
