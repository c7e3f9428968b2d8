"""What a model family goes through, step by step, each held against plain transformers and peft."""

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from safetensors import safe_open

from helpers.chatml import jsonl
from helpers.model_families import FAMILIES, save_family

CHATS = [("name a colour", "green"), ("two and two", "four, as all know")]
HELD_OUT = [("name a fruit", "pear"), ("three and one", "four")]
KEYS = {"sft": ("prompt", "completion"), "seq2seq": ("source", "target")}
RATE = 0.03
STEPS = ("full", "reload", "lora", "adapter", "arch", "merge", "generate", "resume", "nf4", "pack",
         "ckpt", "plan")  # fmt: skip
"""The steps of a family in the order of the page."""


class Refused(Exception):
    """The command ended with code 2 and words, before it loaded any weights."""


class Wrong(Exception):
    """Something ran and is not right."""


def check(is_right, words):
    if not is_right:
        raise Wrong(words)


@dataclass
class FamilyRun:
    """A family with its folder, and what its steps have made so far."""

    name: str
    folder: Path
    outcomes: dict = field(default_factory=dict)
    share: float | None = None
    packed: float | None = None
    said: str = ""

    def __post_init__(self):
        self.family = FAMILIES[self.name]
        self.base = save_family(self.folder / "model", self.name)
        keys = KEYS.get(self.family.method, ("text", "label"))
        for name, rows in (("rows", CHATS), ("held", HELD_OUT)):
            pairs = [dict(zip(keys, pair, strict=True)) for pair in rows]
            if self.family.method == "classify":
                pairs = [{"text": row["text"], "label": f"class{n}"} for n, row in enumerate(pairs)]
            jsonl(self.folder / f"{name}.jsonl", pairs)

    # commands

    def command(self, *words):
        """Run a command; returns what it said. Raises Refused where it exits with 2."""
        from luthier.cli.main import COMMANDS
        from luthier.cli.train import main, train
        from luthier.errors import UserError, report_error

        out = io.StringIO()
        name, *arguments = words
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(out),
            loads_counted() as loads,
        ):
            try:
                code = (
                    main(train, arguments) if name == "train" else COMMANDS[name].load()(arguments)
                )
            except UserError as error:
                code = report_error(error)
        self.said = out.getvalue()
        if code == 2:
            text = " ".join(self.said.split())
            if loads:
                raise Wrong(f"refused after loading: {text[-600:]}")
            raise Refused(text)
        check(code == 0, f"exit code {code}: {self.said[-600:]}")
        return self.said

    def words(self, output, *more):
        """The command line of a run."""
        method = self.family.method
        sft = ["dataset=jsonl"] if method == "sft" else ["dataset=files"]
        return [
            f"trainer={method}", "model=hub", f"model.path={self.base}", "model.device=cpu",
            "model.dtype=float32", *sft, f"dataset.path={self.folder / 'rows.jsonl'}",
            f"dataset.eval.path={self.folder / 'held.jsonl'}", "dataset.eval.share=null",
            f"dataset.cache={self.folder.parent / 'cache'}", "chat.max_length=64",
            "trainer.args.per_device_train_batch_size=2", "trainer.args.disable_tqdm=true",
            "trainer.args.per_device_eval_batch_size=2", "trainer.args.lr_scheduler_type=constant",
            "trainer.args.warmup_steps=0", "trainer.args.weight_decay=0",
            "trainer.args.logging_steps=1",
            *([] if method == "classify" else ["trainer.evaluation.samples=0"]),
            f"output_dir={self.folder / output}", *more,
        ]  # fmt: skip

    def train(self, output, *more):
        """Train; returns the folder of the run."""
        self.command("train", *self.words(output, *more))
        return self.folder / output

    def lora(self, output, *more, steps=3):
        return self.train(
            output, "lora=default", f"trainer.args.max_steps={steps}",
            "trainer.args.learning_rate=0.02", *more,
        )  # fmt: skip

    # plain transformers

    def plain(self, folder, **kwargs):
        """The model of a folder by the class that its config.json names, all weights found."""
        architecture = self.architecture(folder)
        model, found = getattr(transformers, architecture).from_pretrained(
            folder, output_loading_info=True, **kwargs
        )
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            check(not found[key], f"{architecture} has {key}: {sorted(found[key])[:3]}")
        return model.eval()

    def architecture(self, folder):
        return json.loads((Path(folder) / "config.json").read_text())["architectures"][0]

    def rows(self, pairs):
        """Token ids and labels of rows, made by the tokenizer alone."""
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.base)
        for first, second in pairs:
            if self.family.method == "seq2seq":
                yield tokenizer(first)["input_ids"], tokenizer(second)["input_ids"]
                continue
            prompt = f"<|im_start|>user\n{first}<|im_end|>\n<|im_start|>assistant\n"
            start = tokenizer(prompt)["input_ids"]
            reply = tokenizer(f"{second}<|im_end|>")["input_ids"]
            yield start + reply, [-100] * len(start) + reply

    def nll(self, model, pairs):
        """The mean negative log-likelihood of the trained tokens, each row by itself."""
        total, count = 0, 0
        for ids, labels in self.rows(pairs):
            ids, labels = torch.tensor([ids]), torch.tensor([labels])
            if self.family.method == "seq2seq":
                logits = model(input_ids=ids, labels=labels).logits
            else:
                logits = model(input_ids=ids).logits[:, :-1]
                labels = labels[:, 1:]
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), labels.flatten(), reduction="sum"
            )
            total, count = total + loss, count + int((labels != -100).sum())
        return total / count

    def logits(self, model):
        """The logits of two rows, end to end."""
        with torch.no_grad():
            rows = []
            for ids, labels in self.rows(CHATS):
                kwargs = {}
                if self.family.method == "seq2seq":
                    kwargs = {"labels": torch.tensor([labels])}
                rows.append(model.eval()(torch.tensor([ids]), **kwargs).logits[0])
        return torch.cat(rows)


@contextlib.contextmanager
def loads_counted():
    """A list that grows by each call of `from_pretrained` of a model within the block."""
    calls, real = [], transformers.PreTrainedModel.from_pretrained.__func__

    def counted(cls, *args, **kwargs):
        calls.append(cls)
        return real(cls, *args, **kwargs)

    transformers.PreTrainedModel.from_pretrained = classmethod(counted)
    try:
        yield calls
    finally:
        transformers.PreTrainedModel.from_pretrained = classmethod(real)


def results(run):
    return json.loads((run / "run.json").read_text())["results"]


def tensors(folder):
    """All tensors of a folder's weight files by name."""
    files = sorted(Path(folder).glob("*.safetensors"))
    found = {}
    for file in files:
        with safe_open(file, "pt") as weights:
            found |= {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    return found


def distance(a, b):
    """How far logits are apart, in parts of the spread of the second."""
    return float((a - b).abs().max() / b.std())


# the steps


def full(run):
    """Two steps of gradient descent equal plain arithmetic, and the loss falls."""
    sgd = ["trainer.args.optim=sgd", f"trainer.args.learning_rate={RATE}",
           "trainer.args.max_grad_norm=0", "trainer.args.max_steps=2"]  # fmt: skip
    trained = run.train("full", *sgd, "lora=none", "trainer.args.activation_checkpointing=false")
    loss = results(trained)["eval_loss"]
    if run.family.method == "classify":
        check(loss["after"] != loss["before"], "the loss did not move")
        return
    model = run.plain(run.base)
    before = run.nll(model, HELD_OUT)
    check(abs(float(before) - loss["before"]) < 1e-4, f"loss {loss['before']} is {before}")
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    with torch.no_grad():
        began = run.nll(model, CHATS)
    for _ in range(2):
        model.zero_grad()
        run.nll(model, CHATS).backward()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.grad is not None:
                    weight -= RATE * weight.grad
    # What the text alone reaches, which is what an adapter can train.
    run.reached = {name for name, w in model.named_parameters() if w.grad is not None}
    run.reference = {name: w.detach().clone() for name, w in model.named_parameters()}
    run.start = start
    compare_full(run, trained)
    with torch.no_grad():
        ended = run.nll(model, CHATS)
    check(ended < began, f"the loss rose from {began} to {ended}")


def compare_full(run, trained):
    """Hold the weights of a run against those of plain arithmetic."""
    model = run.plain(trained / "model")
    for name, weight in model.named_parameters():
        moved = (run.reference[name] - run.start[name]).norm()
        off = (weight - run.reference[name]).norm()
        check(off <= 2e-3 * moved + 1e-6, f"{name} is {off:.2g} off, and moved by {moved:.2g}")


def reload(run):
    """The saved model has the base's class, names and files, and gives the trained loss."""
    trained = run.folder / "full"
    folder = trained / "model"
    if run.family.method == "classify":
        model = run.plain(folder)
        check(model.config.num_labels == 2, "labels")
        return
    check(run.architecture(folder) == run.family.architecture, f"it is {run.architecture(folder)}")
    names, base = set(tensors(folder)), set(tensors(run.base))
    check(names == base, f"names on disk differ: {sorted(names ^ base)[:4]}")
    check_processor(run, folder)
    with torch.no_grad():
        loss = float(run.nll(run.plain(folder), HELD_OUT))
    after = results(trained)["eval_loss"]["after"]
    check(abs(loss - after) < 1e-4, f"loss {loss} in place of {after}")


def check_processor(run, folder):
    lost = {p.name for p in run.base.glob("*processor*.json")} - {p.name for p in folder.iterdir()}
    check(not lost, f"{folder.name}/ lacks {sorted(lost)}")


def lora(run):
    """By default every layer matrix has an adapter; the loss falls."""
    trained = run.lora("lora", "trainer.args.save_strategy=steps", "trainer.args.save_steps=2",
                       "trainer.args.activation_checkpointing=false")  # fmt: skip
    loss = results(trained)["eval_loss"]
    check(loss["after"] != loss["before"], "the loss did not move")
    # Whether it can be loaded is the next step's question.
    with contextlib.suppress(Exception):
        run.adapted = load_adapter(run, trained)
    if hasattr(run, "adapted"):
        run.share, lacking = adapter_share(run, run.adapted)
        lacking = [name for name in lacking if not name.endswith(WITHOUT_ADAPTER)]
        check(not lacking, f"no adapter on {lacking[:4]}, share {run.share:.2f}")


WITHOUT_ADAPTER = ("mamba.out_proj.weight", "mixer.out_proj.weight")
"""What gets no adapter by default: peft refuses it, since Mamba's kernels read the weight alone."""


def load_adapter(run, trained):
    """The plain base with the saved adapter by plain peft."""
    from peft import PeftModel

    if run.family.method == "classify":
        base = transformers.AutoModelForSequenceClassification.from_pretrained(
            run.base, num_labels=2
        )
    else:
        base = run.plain(run.base)
    return PeftModel.from_pretrained(base, str(trained / "model")).eval()


def adapter(run):
    """Plain peft on the plain base gives the loss that the run measured."""
    trained = run.folder / "lora"
    if not hasattr(run, "adapted"):
        run.adapted = load_adapter(run, trained)
    model = run.adapted
    if run.family.method == "classify":
        return
    with torch.no_grad():
        loss = float(run.nll(model, HELD_OUT))
    after = results(trained)["eval_loss"]["after"]
    check(abs(loss - after) < 1e-4, f"loss {loss} in place of {after}")


def adapter_share(run, model):
    """The share of the text part's layer matrices with an adapter, and the names of the others."""
    from peft.tuners.lora import LoraLayer

    adapted = set()
    for module in model.modules():
        if isinstance(module, LoraLayer) and module.lora_A:
            name = getattr(module, "parameter_name", "weight")
            adapted.add(id(getattr(module.get_base_layer(), name)))
    base = model.get_base_model()
    outside = {id(each.weight) for each in base.modules() if isinstance(each, torch.nn.Embedding)}
    head = base.get_output_embeddings()
    outside |= {id(head.weight)} if head is not None else set()
    convolutions = [m.weight for m in base.modules() if isinstance(m, torch.nn.Conv1d)]
    outside |= set(map(id, convolutions))
    reached = getattr(run, "reached", None)
    names, total, covered = [], 0, 0
    for name, weight in base.named_parameters():
        plain = name.replace(".base_layer", "")
        if weight.dim() < 2 or id(weight) in outside or "lora_" in name:
            continue
        if "modules_to_save" in name or "original_module" in name:
            continue
        # Routers and gates of one number are left alone, and so is what no text reaches.
        if not is_matrix(name, weight) or (reached is not None and plain not in reached):
            continue
        total += weight.numel()
        if id(weight) in adapted:
            covered += weight.numel()
        else:
            names.append(plain)
    return covered / max(total, 1), names


def is_matrix(name, weight):
    """Whether this is a layer's or experts' matrix; routers and gates of one number are none."""
    is_named = name.endswith(".weight") or weight.dim() == 3
    return weight.dim() > 1 and is_named and min(weight.shape[-2:]) > 4


def arch(run):
    """Every key of the adapter's file has its place on the class of `architectures[0]`."""
    from peft import get_peft_model_state_dict

    names = set(tensors(run.folder / "lora" / "model"))
    expected = set(get_peft_model_state_dict(run.adapted, save_embedding_layers=False))
    check(names == expected, f"keys without a place: {sorted(names ^ expected)[:3]}")


def merge(run):
    """The merged model has the base's class, names and files, and the adapter's logits."""
    target = run.folder / "merged"
    run.command("merge", str(run.folder / "lora"), "--out", str(target))
    if run.family.method == "classify":
        return
    check(run.architecture(target) == run.family.architecture, f"it is {run.architecture(target)}")
    names, base = tensors(target), tensors(run.base)
    check(set(names) == set(base), f"names differ: {sorted(set(names) ^ set(base))[:4]}")
    check_processor(run, target)
    off = distance(run.logits(run.plain(target)), run.logits(run.adapted))
    check(off < 1e-3, f"logits are {off:.2g} off")
    moved = distance(run.logits(run.adapted), run.logits(run.plain(run.base)))
    check(moved > 1e-2, f"the adapter does nothing ({moved:.2g})")


def generate(run):
    """Greedy replies equal those of transformers."""
    from luthier.infer import LLM

    prompts = [first for first, _ in HELD_OUT]
    with contextlib.redirect_stdout(io.StringIO()), LLM(str(run.folder / "lora")) as llm:
        replies = llm.generate(prompts, max_new_tokens=6)
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.base)
    for prompt, reply in zip(prompts, replies, strict=True):
        if run.family.method == "sft":
            prompt = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = run.adapted.generate(input_ids=ids, max_new_tokens=6, do_sample=False,
                                   eos_token_id=tokenizer.eos_token_id,
                                   pad_token_id=tokenizer.pad_token_id)  # fmt: skip
        new = out[0] if run.family.method == "seq2seq" else out[0][ids.shape[1] :]
        expected = tokenizer.decode(new, skip_special_tokens=True)
        check(reply == expected, f"{reply!r} in place of {expected!r}")


def resume(run):
    """A run that was killed behind its second step ends as one that was not, to the last bit."""
    whole, part = run.folder / "lora", run.folder / "resumed"
    shutil.copytree(whole, part)
    shutil.rmtree(part / "model")
    shutil.rmtree(part / "checkpoints" / "checkpoint-3", ignore_errors=True)
    record = json.loads((part / "run.json").read_text())
    record = {key: value for key, value in record.items() if key != "seal"}
    (part / "run.json").write_text(json.dumps(record | {"status": "running"}))
    run.lora("resumed", "trainer.args.save_strategy=steps", "trainer.args.save_steps=2",
             "trainer.args.activation_checkpointing=false")  # fmt: skip
    check("resuming at step" in run.said, "it did not go on from the checkpoint")
    first, second = tensors(whole / "model"), tensors(part / "model")
    differ = [name for name in first if not torch.equal(first[name], second[name])]
    check(not differ and first, f"differ: {differ[:3]}")


def ckpt(run):
    """With activation checkpointing the adapter is the same."""
    trained = run.lora("ckpt", "trainer.args.activation_checkpointing=true", steps=2)
    compare_adapters(run, trained, run.folder / "lora" / "checkpoints" / "checkpoint-2")


def compare_adapters(run, trained, expected):
    one, other = tensors(trained / "model"), tensors(expected)
    check(set(one) == set(other), f"keys {sorted(set(one) ^ set(other))[:3]}")
    # Adam makes large steps of the smallest gradients, so rounding shows in single numbers.
    off = max(float((one[name] - other[name]).norm() / other[name].norm()) for name in one)
    check(off < 2e-2, f"adapters are {off:.2g} apart")


def nf4(run):
    """QLoRA trains, its adapter comes back, and what is packed is said."""
    from luthier.config.trust import NO_TRUST
    from luthier.infer.llm import read_load_options
    from luthier.model.artifact import find_artifact

    trained = run.lora("nf4", "quantization=nf4", "trainer.args.activation_checkpointing=false")
    loss = results(trained)["eval_loss"]
    check(loss["after"] != loss["before"], "the loss did not move")
    artifact = find_artifact(str(trained), None, NO_TRUST)
    model = read_load_options(artifact, {}).model(None, {})
    run.packed = packed_share(run, model)
    check(run.packed > 0, "nothing is packed")
    if run.family.method != "classify":
        with torch.no_grad():
            reloaded = float(run.nll(model, HELD_OUT))
        check(abs(reloaded - loss["after"]) < 1e-4, f"loss {reloaded} in place of {loss['after']}")


def packed_share(run, model):
    """The share of the text part's layer matrices in 4 bits."""
    import bitsandbytes

    base = model.get_base_model()
    packed = total = 0
    outside = {id(m.weight) for m in base.modules()
               if isinstance(m, torch.nn.Embedding | torch.nn.Conv1d)}  # fmt: skip
    head = base.get_output_embeddings()
    outside |= {id(head.weight)} if head is not None else set()
    for name, weight in base.named_parameters():
        plain = name.replace(".base_layer", "")
        is_reached = run.family.method == "classify" or plain in run.reached
        if id(weight) in outside or "lora_" in name or not is_reached:
            continue
        if isinstance(weight, bitsandbytes.nn.Params4bit):
            size = weight.quant_state.shape.numel()
            packed, total = packed + size, total + size
        elif is_matrix(name, weight):
            total += weight.numel()
    return packed / max(total, 1)


def pack(run):
    """Two documents in one row train as two rows do."""
    sgd = ["trainer.args.optim=sgd", f"trainer.args.learning_rate={RATE}",
           "trainer.args.max_grad_norm=0", "trainer.args.max_steps=2"]  # fmt: skip
    trained = run.train(
        "pack", *sgd, "lora=none", "trainer.args.packing=true", "chat.max_length=128",
        "trainer.args.activation_checkpointing=false",
    )  # fmt: skip
    compare_full(run, trained)


def plan(run):
    """The planned bytes of weights and adapter are those of the model."""
    words = run.words("plan", "lora=default", "trainer.args.activation_checkpointing=false")
    said = run.command("plan", *words, "--json")
    planned = json.loads(said[said.index("{") :])
    parts = {part["name"]: part["bytes"] for part in planned["estimates"][0]["parts"]}
    weights = sum(size for name, size in parts.items() if name.startswith("weights"))
    if run.family.method == "classify":
        check(weights > 0, "no weights planned")
        return
    real = sum(weight.numel() * 4 for weight in run.plain(run.base).parameters())
    adapters = sum(t.numel() * 4 for t in tensors(run.folder / "lora" / "model").values())
    check(abs(weights - real) <= 0.02 * real, f"weights {weights} planned, {real} real")
    check(abs(parts["adapters float32"] - adapters) <= 0.02 * adapters,
          f"adapter {parts['adapters float32']} planned, {adapters} real")  # fmt: skip


NEEDS = {"reload": "full", "adapter": "lora", "arch": "adapter", "merge": "adapter",
         "generate": "adapter", "resume": "lora", "ckpt": "lora", "pack": "full", "nf4": "full",
         "plan": "lora"}  # fmt: skip
"""Step -> the step without whose result it has nothing to look at."""
RESULTS = {
    "full": lambda run: hasattr(run, "reference") or run.family.method == "classify",
    "lora": lambda run: (run.folder / "lora" / "model").is_dir(),
    "adapter": lambda run: hasattr(run, "adapted"),
}
"""Step -> whether it left what others look at."""
WITHOUT = {"seq2seq": ("pack",), "classify": ("pack", "generate", "arch")}
"""Steps that mean nothing for a method."""


def go_through(run, only=STEPS):
    """Take the steps of a family, and note what becomes of each."""
    functions: dict[str, Callable] = {name: globals()[name] for name in STEPS}
    for step in (name for name in STEPS if name in only):
        has_results = RESULTS.get(NEEDS.get(step), lambda run: True)
        if step in WITHOUT.get(run.family.method, ()) or not has_results(run):
            run.outcomes[step] = ("-", "")
            continue
        try:
            functions[step](run)
            run.outcomes[step] = ("ok", "")
        except Refused as refusal:
            run.outcomes[step] = ("refused", str(refusal))
        except Wrong as wrong:
            run.outcomes[step] = ("wrong", str(wrong))
        except Exception as error:
            run.outcomes[step] = ("traceback", f"{type(error).__name__}: {error}")
            run.trace = error
    return run.outcomes
