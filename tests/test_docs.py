"""Every command, option, key, file and name that README and docs mention exists."""

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, get_args

import pytest
import yaml
from PIL import Image
from pydantic import BaseModel

from luthier.cli.main import COMMANDS
from luthier.config.code_settings import CODE_SETTINGS
from luthier.config.foreign_settings import FOREIGN_SETTINGS
from luthier.config.library_fields import read_class_fields
from luthier.config.load import load_config
from luthier.config.methods import METHODS
from luthier.config.passthrough import PASS_THROUGH_KEYS
from luthier.config.schema import DatasetConfig, RunConfig
from luthier.data.examples import BadRows, check_sources
from luthier.errors import UserError
from luthier.python_code import check_python_path
from luthier.sweep.sweep_plan import plan_sweep

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CODE_OF_CONDUCT.md",
    ROOT / "SECURITY.md",
    ROOT / "recipes" / "README.md",
    ROOT / "launch" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
GROUPS = sorted(folder.name for folder in (ROOT / "conf").iterdir() if folder.is_dir())
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))

FENCE = re.compile(r"^\s*```")
SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
OURS = ("luthier", "train.py", "python", "accelerate", "torchrun", "srun")
PLACEHOLDER = re.compile(r"[A-Z]{2,}|\b\d{3}\b|^\.\.\.$|[<>{}]|\.\.\.$")
OVERRIDE = re.compile(r"^[+~]{0,2}([a-z_][\w./@-]*)=(.*)$", re.DOTALL)
FREE = ("hydra",)
"""Keys of Hydra itself, which it checks."""


class Command(NamedTuple):
    """A command line on a page."""

    page: Path
    line: int
    text: str
    words: list[str]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


class CodeLine(NamedTuple):
    page: Path
    line: int
    text: str


def code_lines(page: Path) -> Iterator[CodeLine]:
    """Yield the lines of code blocks with continued lines joined, then the code within prose."""
    in_fence, pending, first = False, "", 0
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if FENCE.match(line):
            in_fence = not in_fence
            continue
        if in_fence or line.startswith("    "):
            first = first if pending else number
            pending += line.strip()
            if pending.endswith("\\"):
                pending = pending[:-1]
                continue
            yield CodeLine(page, first, pending.removeprefix("$ "))
            pending = ""
        else:
            for span in SPAN.findall(line):
                yield CodeLine(page, number, span)


def words_of(text: str) -> list[str]:
    try:
        return shlex.split(text, comments=True)
    except ValueError:
        return []


def commands() -> Iterator[Command]:
    """Yield every command of luthier that a page shows."""
    for page in PAGES:
        for code in code_lines(page):
            for piece in code.text.split(" && "):
                words = words_of(piece)
                while words and re.match(r"[A-Z_]+=", words[0]):
                    words = words[1:]
                if words and words[0] in OURS and ("train.py" in words or words[0] == "luthier"):
                    yield Command(page, code.line, piece, words)


ALL_COMMANDS = list(commands())


def is_placeholder(text: str) -> bool:
    return bool(PLACEHOLDER.search(text))


def nested_model(annotation: Any) -> type[BaseModel] | None:
    """Return the settings class in an annotation such as `EvalConfig | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = (nested_model(argument) for argument in get_args(annotation))
    return next((model for model in inner if model is not None), None)


def is_key(key: str) -> bool:
    """Tell whether a dotted key leads through the schema; free mappings end the walk."""
    model: type[BaseModel] | None = RunConfig
    for name in key.split("."):
        if model is None or is_placeholder(name):
            return True
        field = model.model_fields.get(name)
        if field is None:
            # Sources and evaluation sets are named by the user.
            return model.model_config.get("extra") != "forbid" or key.startswith("dataset.")
        model = nested_model(field.annotation)
    return True


@cache
def generation_names() -> frozenset[str]:
    """Return the settings of generation, and what the commands that generate take besides."""
    from transformers import GenerationConfig

    return frozenset(vars(GenerationConfig())) | {"batch_size", "metrics", "quantization"}


def is_readers(name: str) -> bool:
    """Tell whether a recipe of a page is one that its reader writes."""
    return name == "mine" or name.startswith("my_")


def wrong_override(word: str, with_generation: bool) -> str | None:
    """Return what is wrong with `key=value`, or None."""
    match = OVERRIDE.match(word)
    if match is None:
        return None
    key, values = match.groups()
    if is_placeholder(key) or key.split(".")[0].split("/")[0] in FREE:
        return None
    if with_generation and key in generation_names():
        return None
    options = [value for value in values.split(",") if not is_placeholder(value)]
    if key == "recipe":
        missing = [name for name in options if name not in RECIPES and not is_readers(name)]
        return f"there is no recipe {missing[0]}" if missing else None
    if key in GROUPS:
        have = {path.stem for path in (ROOT / "conf" / key).glob("*.yaml")}
        missing = [name for name in options if name and name not in have]
        return f"{key} has no option {missing[0]}" if missing else None
    return None if is_key(key) else f"there is no setting {key}"


@pytest.mark.parametrize("command", ALL_COMMANDS, ids=str)
def test_a_command_on_a_page_exists(command, luthier):
    words = command.words
    if words[0] != "luthier":
        words = words[words.index("train.py") + 1 :]
        name = "train"
    elif len(words) == 1 or is_placeholder(words[1]):
        return
    else:
        name, words = words[1], words[2:]
    if name.startswith("-"):
        assert name in ("--help", "--version"), command.text
        return
    assert name in COMMANDS, command.text
    generates = name in ("chat", "generate", "evaluate", "serve")
    settings = [] if name in ("diff", "show", "sweep", "reproduce") else words
    wrong = [wrong_override(word, generates) for word in settings if word[0] != "-"]
    assert [text for text in wrong if text] == [], command.text
    flags = {word.partition("=")[0] for word in words if re.match(r"-{1,2}[a-z]", word)}
    code, page, _ = luthier(name, "--help")
    assert code == 0
    assert {flag for flag in flags - {"--help", "-h"} if not has_flag(page, flag)} == set()


def has_flag(page: str, flag: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", page) is not None


COMPOSED = ("train", "launch", "preview", "check", "plan", "prepare")
"""The commands that take a run's settings."""
UNFINISHED = re.compile(r"\.\.\.$|<|(?<![A-Za-z0-9-])[A-Z]{4,}")
"""What the reader has to put something in place of, such as `NAME` and `recipe=...`."""
REFUSED = {"luthier train recipe=quickstart lora.rr=3 trainer.args.lerning_rate=1"}
"""Commands that a page shows for the message that answers them."""
READERS_RECIPE = """
defaults:
  - override /model: smollm2_135m
  - override /lora: default
  - override /dataset: files
dataset:
  path: mine.jsonl
chat:
  max_length: 1024
"""


class Composed(NamedTuple):
    """A command on a page, by what it says of a run."""

    command: Command
    overrides: list[str]
    is_sweep: bool
    is_planned: bool
    """It plans a run, for which neither the GPU nor the weights are needed."""

    def __str__(self) -> str:
        return str(self.command)


def composed_commands() -> Iterator[Composed]:
    """Yield the commands that can be composed as they stand on a page."""
    for command in ALL_COMMANDS:
        words = command.words
        if words[0] == "luthier" and (len(words) == 1 or words[1] not in COMPOSED):
            continue
        overrides = [word for word in words if word[0] != "-" and OVERRIDE.match(word)]
        if overrides and not any(UNFINISHED.search(word) for word in words):
            yield Composed(command, overrides, "-m" in words, words[1] == "plan")


ALL_COMPOSED = list(composed_commands())
DIFFERENT = {(*each.overrides, each.is_sweep): each for each in reversed(ALL_COMPOSED)}


def write_readers_files(composed: Composed) -> None:
    """Write the recipe, the rows and the code that a page supposes its reader to have."""
    text = " ".join(composed.overrides)
    Path("recipes").mkdir()
    for name in re.findall(r"recipe=(\w+)", text):
        if is_readers(name):
            Path(f"recipes/{name}.yaml").write_text(READERS_RECIPE, encoding="utf-8")
    Path("mine.jsonl").write_text('{"prompt": "Hi", "completion": "Hello!"}\n', encoding="utf-8")
    page = composed.command.page.read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    for place in re.findall(r"python\\?:([\w./]+?)(?:\.py\\?:|\.)\w+(?![\w.:])", text):
        file = Path(place.replace(".", "/") + ".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(code, encoding="utf-8")


SMALL = ["model=smollm2_135m", "dataset=files", "dataset.path=mine.jsonl"]


def compose(composed: Composed) -> None:
    if composed.is_sweep:  # it looks at the rows and at the model
        plan_sweep([*composed.overrides, *SMALL])
    else:
        load_config(composed.overrides)


@pytest.mark.parametrize("composed", DIFFERENT.values(), ids=str)
def test_a_command_on_a_page_is_valid(composed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_readers_files(composed)
    if composed.command.text in REFUSED:
        with pytest.raises(UserError) as refused:
            compose(composed)
        page = composed.command.page.read_text(encoding="utf-8")
        assert [line for line in str(refused.value).splitlines() if line not in page] == []
    else:
        compose(composed)


def needs_gpu_or_hub(composed: Composed) -> bool:
    """Tell it by the names of model and data, and by the header of the recipe."""
    if composed.is_planned or composed.command.text in REFUSED:
        return False
    settings = dict(word.split("=", 1) for word in composed.overrides)
    recipe = ROOT / "recipes" / f"{settings.get('recipe')}.yaml"
    if recipe.exists() and "model" not in settings:
        needs = re.search(r"^# Needs: (.*)", recipe.read_text(encoding="utf-8"), re.MULTILINE)
        if needs and re.search(r"(?<!no )(GPU|network)", needs[1]):
            return True
    names = [str(settings.get(key)) for key in ("model.path", "dataset.path")]
    return any(re.fullmatch(r"[A-Za-z][\w-]*/[\w.-]+", name) for name in names)


def test_a_page_says_that_its_commands_for_a_gpu_or_the_hub_were_not_run():
    silent = set()
    for composed in ALL_COMPOSED:
        page = composed.command.page
        if page not in silent and needs_gpu_or_hub(composed):
            paragraphs = re.split(r"\n\s*\n", page.read_text(encoding="utf-8"))
            said = r"(?s)\b(not|never)\s+run\b.*(GPU|hub)|(GPU|hub).*\b(not|never)\s+run\b"
            if not any(re.search(said, text) for text in paragraphs):
                silent.add(page)
    assert [page.name for page in sorted(silent)] == []


def mentioned(pattern: str) -> list[tuple[str, str]]:
    """Return the code of all pages that matches a pattern whole, each with its place."""
    return [
        (f"{code.page.relative_to(ROOT)}:{code.line}", code.text)
        for page in PAGES
        for code in code_lines(page)
        if re.fullmatch(pattern, code.text)
    ]


def test_a_setting_in_the_text_exists():
    wrong = {
        f"{where} {text}": reason
        for where, text in mentioned(r"[a-z_]+(\.\w+)*=\S*")
        if "." in text.partition("=")[0] or text.partition("=")[0] in (*GROUPS, "recipe")
        if (reason := wrong_override(text, with_generation=True)) and text not in OF_LIBRARIES
    }
    assert wrong == {}


OF_LIBRARIES: set[str] = set()
"""Assignments in the text that are arguments of other libraries' functions."""


@cache
def source_texts() -> str:
    """Return all source code: files that a run writes are named in it."""
    return "\n".join(
        path.read_text(encoding="utf-8")
        for folder in ("src", "benchmarks", "tests", "conf", "launch", "recipes")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".yaml", ".sh", ".toml")
    )


FILE = r"[\w./~*-]*[\w*-]+\.(py|md|yaml|yml|sh|toml|json|jsonl|png|html|csv|txt)"


OUR_FOLDERS = ("src/", "tests/", "conf/", "docs/", "benchmarks/", "launch/", "recipes/")


def test_a_file_in_the_text_exists():
    missing = []
    for where, text in mentioned(FILE):
        name = text.removeprefix("./")
        roots = (ROOT, ROOT / "src" / "luthier", (ROOT / where.partition(":")[0]).parent)
        if any((root / name).exists() for root in roots) or is_placeholder(name):
            continue
        looks_like_ours = name.startswith(OUR_FOLDERS) or name.endswith(".py")
        if looks_like_ours or Path(name).name not in source_texts():
            missing.append(f"{where} {text}")
    assert [text for text in missing if not is_an_example(text)] == []


EXAMPLES = ("~", "my", "recipes/my", "recipes/mine", "rows.", "replies.", "runs/", "data/")
"""How the names of a reader's files begin."""


def is_an_example(text: str) -> bool:
    """Tell a file of the reader: `~/data/train.csv`, `rows.jsonl`, `my_metrics.py`."""
    name = text.split(" ", 1)[1]
    return name.startswith(EXAMPLES) or "*" in name


@pytest.mark.parametrize("folder", ["src/luthier", ""], ids=["package", "repository"])
def test_a_folder_in_the_text_exists(folder):
    tops = {path.name for path in (ROOT / folder).iterdir() if path.is_dir()}
    missing = [
        f"{where} {text}"
        for where, text in mentioned(r"[a-z_]+(/[a-z_]+)*/")
        if text.split("/")[0] in tops
        and not any((root / text).is_dir() for root in (ROOT, ROOT / "src" / "luthier"))
        and Path(text).name not in source_texts()
    ]
    assert missing == []


def test_a_name_of_luthier_in_the_text_exists():
    missing = []
    for where, text in mentioned(r"luthier(\.[A-Za-z_]\w*)+(\(.*\))?"):
        names = text.partition("(")[0].split(".")
        if not exists(names):
            missing.append(f"{where} {text}")
    assert missing == []


def exists(names: list[str]) -> bool:
    """Tell whether dotted names are a module of luthier, or an attribute of one."""
    value: Any = importlib.import_module(names[0])
    for number, name in enumerate(names[1:], 1):
        try:
            value = getattr(value, name)
        except AttributeError:
            try:
                value = importlib.import_module(".".join(names[: number + 1]))
            except ImportError:
                return False
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_python_on_a_page_is_python_and_what_it_imports_of_luthier_exists(page):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    imports = [
        (node.module, alias.name)
        for block in blocks
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("luthier")
        for alias in node.names
    ]
    missing = [pair for pair in imports if not hasattr(importlib.import_module(pair[0]), pair[1])]
    assert missing == []


def slugs(page: Path) -> set[str]:
    """Return the anchors of a page's headings as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    broken = []
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in slugs(file)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("group", [group for group in GROUPS if group != "hydra"])
def test_the_table_of_groups_lists_every_option(group):
    row = next(
        line
        for line in (ROOT / "docs" / "config.md").read_text(encoding="utf-8").splitlines()
        if line.startswith(f"| `{group}` |")
    )
    listed = set(SPAN.findall(row.rsplit("|", 2)[1]))
    assert listed == {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")}


def test_the_page_of_recipes_lists_every_recipe():
    listed = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    assert [name for name in RECIPES if f"[{name}]({name}.yaml)" not in listed] == []


def test_the_page_on_code_lists_every_setting_that_takes_some():
    page = (ROOT / "docs" / "code.md").read_text(encoding="utf-8")
    rows = page[page.index("## Where you can use it") :].partition("\n## ")[0]
    listed = [SPAN.findall(line)[0] for line in rows.splitlines() if line.startswith("| `")]
    assert listed == list(CODE_SETTINGS)


def test_the_code_on_the_page_on_code_is_what_its_settings_take(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "code.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.py").write_text(page.partition("```python\n")[2].partition("```")[0])
    base = CODE_SETTINGS["trainer.callbacks"].base
    assert check_python_path("python:my.py:clean", ["longest"], positional=["row"]) is None
    assert check_python_path("python:my.py:Stop", ["below"], base=base) is None


def pages_of_nav(entries: list[Any]) -> Iterator[str]:
    for entry in entries:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            yield from pages_of_nav(value) if isinstance(value, list) else [value]


def test_the_sites_navigation_names_every_page_and_no_other():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    pages = {page.name for page in (ROOT / "docs").glob("*.md")}
    assert sorted(pages_of_nav(nav)) == sorted(pages | set(site_hooks().PAGES))


def site_hooks() -> Any:
    """Return mkdocs_hooks.py, which mkdocs imports by its path, too."""
    spec = spec_from_file_location("mkdocs_hooks", ROOT / "mkdocs_hooks.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("folder", "text", "on_site"),
    [
        ("docs", "[runs](runs.md#resume)", "[runs](runs.md#resume)"),
        ("docs", "[recipes](../recipes/README.md)", "[recipes](recipes.md)"),
        ("recipes", "[methods](../docs/methods.md)", "[methods](methods.md)"),
        ("recipes", "[quickstart](quickstart.yaml)", "quickstart"),
        ("", "![tokens](docs/assets/preview.png)", "![tokens](assets/preview.png)"),
        ("docs", "[TRL](https://github.com/huggingface/trl)", None),
        ("docs", "[below](#next)", None),
    ],
    ids=["page", "page elsewhere", "from elsewhere", "no page", "picture", "web", "anchor"],
)
def test_links_of_the_site(folder, text, on_site):
    assert site_hooks().site_links(text, ROOT / folder) == (on_site or text)


def test_quoted_messages_are_marked_for_the_site():
    page = SimpleNamespace(file=SimpleNamespace(src_uri="troubleshooting.md"))
    text = site_hooks().on_page_markdown("```text\nno such row\n```\n", page)
    assert text == "``` {.text .message}\nno such row\n```\n"


@pytest.mark.parametrize(
    "file", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda file: file.name
)
def test_a_file_of_github_is_yaml_and_its_commands_exist(file):
    text = file.read_text(encoding="utf-8")
    assert yaml.safe_load(text)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([\w-]+)", text)) <= targets
    assert all((ROOT / script).exists() for script in re.findall(r"run: (\.\S+)", text))


@pytest.mark.parametrize(
    "picture", sorted((ROOT / "docs" / "assets").glob("*.png")), ids=lambda file: file.name
)
def test_a_picture_is_small_and_shown(picture):
    assert picture.stat().st_size < 200_000
    assert any(f"assets/{picture.name})" in page.read_text(encoding="utf-8") for page in PAGES)


def test_some_page_shows_every_command():
    shown = {command.words[1] for command in ALL_COMMANDS if len(command.words) > 1}
    assert set(COMMANDS) - shown - {"train"} == set()


def test_wrong_settings_are_noticed():
    assert wrong_override("trainer.epochs=3", with_generation=False)
    assert wrong_override("lora=huge", with_generation=False)
    assert wrong_override("recipe=nothing", with_generation=False)
    assert wrong_override("temperature=1", with_generation=False)
    assert not wrong_override("trainer.args.max_steps=3", with_generation=False)
    assert not wrong_override("temperature=1", with_generation=True)


RUN_LENGTH = 3
"""How many words in a row a quoted line and the source must share."""


@cache
def source_phrases() -> frozenset[tuple[str, ...]]:
    """Return all runs of words in the texts of the source; what is filled in ends a run."""
    phrases: set[tuple[str, ...]] = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
            elif isinstance(node, ast.JoinedStr):
                text = "".join(
                    str(piece.value) if isinstance(piece, ast.Constant) else "\0"
                    for piece in node.values
                )
            else:
                continue
            words = text.split()
            phrases.update(zip(*(words[start:] for start in range(RUN_LENGTH)), strict=False))
    return frozenset(phrases)


def share_in_source(line: str) -> float:
    """Return the share of a line's words that stand in the source in such a run."""
    words = line.split()
    known: set[int] = set()
    for start in range(len(words)):
        if tuple(words[start : start + RUN_LENGTH]) in source_phrases():
            known.update(range(start, start + RUN_LENGTH))
    return len(known) / len(words)


def quoted_messages(page: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("page", ["troubleshooting.md", "what-trains.md", "migrating.md"])
def test_a_quoted_message_is_one_that_luthier_prints(page):
    messages = quoted_messages(page)
    assert messages
    assert [line for line in messages if share_in_source(line) < 0.4] == []


def test_a_message_that_luthier_does_not_print_is_noticed():
    assert share_in_source("no row in this spreadsheet could ever train anything useful") < 0.4


def migration_rows() -> Iterator[tuple[list[str], list[str]]]:
    """Yield the names of other trainers and the keys of luthier in each row of the tables."""
    page = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
    for line in page.partition("## What has no counterpart")[0].splitlines():
        if line.startswith("| `"):
            theirs, ours = line.split("|")[1:3]
            words = [word for span in SPAN.findall(ours) for word in span.split()]
            yield SPAN.findall(theirs), [word.partition("=")[0] for word in words]


def library_settings(group: str) -> set[str]:
    """Return the settings of `trainer.args` (of all methods), or of another such group."""
    classes = [facts.config for facts in METHODS.values()] if group == "trainer.args" else []
    keys = [key for key in PASS_THROUGH_KEYS if key.key == group]
    fields = [read_class_fields(*names) or {} for names in classes] + [
        key.fields() or {} for key in keys
    ]
    return {name for names in fields for name in names} | {
        name for key in keys for name in key.luthier_settings
    }


def test_every_key_of_the_migration_tables_exists():
    wrong = []
    for _, keys in migration_rows():
        for key in keys:
            group, _, name = key.rpartition(".")
            is_of_library = group in ("trainer.args", "lora")
            if not (name in library_settings(group) if is_of_library else is_key(key)):
                wrong.append(key)
    assert wrong == []


def test_the_migration_tables_answer_as_the_messages_do():
    wrong = []
    for names, keys in migration_rows():
        for name in names:
            answer = FOREIGN_SETTINGS.get(name)  # a name with a value has a row of its own
            if answer and answer.keys and not set(answer.keys) & set(keys):
                wrong.append((name, keys, answer.keys))
    assert wrong == []


OWN_DATA = {
    "data/mine.csv": ("sft", "prompt_completion", 6),
    "my_chats.jsonl": ("sft", "messages", 3),
    "my_pairs.jsonl": ("dpo", "preference", 3),
    "my_photos.jsonl": ("sft", "messages", 2),
}
"""The files on the page on data of one's own: the method, and what luthier finds in them."""


def files_on_the_page() -> dict[str, str]:
    """Return the content of each file that the page shows below its name."""
    page = (ROOT / "docs" / "your-data.md").read_text(encoding="utf-8")
    blocks = re.split(r"```(?:csv|json)\n", page)
    names = [re.findall(r"`((?:data/)?\w+\.(?:csv|jsonl))`", text)[-1] for text in blocks[:-1]]
    return {name: text.partition("```")[0] for name, text in zip(names, blocks[1:], strict=True)}


@pytest.mark.parametrize("name", OWN_DATA)
def test_the_files_of_the_page_on_your_own_data_are_read_as_it_says(name, tmp_path, monkeypatch):
    assert set(files_on_the_page()) == set(OWN_DATA)
    method, row_format, rows = OWN_DATA[name]
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path(name).write_text(files_on_the_page()[name], encoding="utf-8")
    Path("photos").mkdir()
    for number in (1, 2):
        Image.new("RGB", (8, 8)).save(f"photos/{number}.png")
    (opened,) = check_sources(DatasetConfig(path=name), method).open_train().values()
    assert opened.row_format.type == row_format
    bad = BadRows()
    assert len(list(opened.examples(bad))) == rows
    assert bad.rows == []


def test_the_recipe_on_the_page_on_migrating_is_valid(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
    recipe = page.split("```yaml\n")[3].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    Path("recipes").mkdir()
    Path("recipes/mine.yaml").write_text(recipe, encoding="utf-8")
    config = load_config(["recipe=mine"]).config
    assert config.model.path == "Qwen/Qwen3-0.6B"
    assert config.chat.max_length == 2048
