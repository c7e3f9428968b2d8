"""The layout stays as docs/design.md draws it: imports, names and sizes."""

import ast
import re
import tomllib
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "luthier"

LAYERS = (
    ("__main__", "notebook"),
    ("cli",),
    ("doctor", "evaluate", "export", "sweep"),
    ("train",),
    ("report",),
    ("inspection", "infer", "memory", "recipe_files"),
    ("model", "record"),
    ("data",),
    ("config",),
    ("chat", "metrics", "storage"),
    ("python_code",),
    ("errors", "gc_pause", "environment", "patterns"),
    ("terminal", "web_page"),
    ("redaction",),
)
"""From the top of the house to its ground; a package imports only from lines below its own."""

ALLOWED_UPWARD = {("environment", "config")}
"""environment reads RunConfig for an annotation alone."""

STANDALONE = {
    "chat": {"errors", "gc_pause"},
    "metrics": {"errors", "patterns", "python_code"},
    "storage": {"errors"},
}
"""Packages that other projects can use by themselves, and all of luthier that they may import."""

HEAVY = ("torch", "transformers", "trl", "peft", "accelerate")
MAY_IMPORT_HEAVY = re.compile(
    r"train\.(build|loop|evaluation|callbacks|own_callbacks|profiler|activation_checkpointing|dataloaders"
    r"|packing_check|document_masking)"
    r"|train\.(trainers|methods)\..+"
    r"|memory\.(plan|estimate|simulate|index_values|kernels|advice|report)"
    r"|model\.(adapter_training|expert_lora|fused_head|quantized_experts|varlen_attention)"
    r"|evaluate\.heads"
    r"|doctor\.step_watcher"
)
"""Modules that may import torch and its like when they are imported themselves."""

BEFORE_NUMPY = (
    *("cli.main", "cli.train", "config.load", "train.run", "data", "data.quick_check"),
    *("chat.encoder", "chat.template", "chat.template_file", "record.run_dir"),
    *("model.adapter_targets", "model.packing_support", "model.positions", "model.source"),
    *("train.reward_checks", "train.trackers", "train.launch.checks", "train.launch.fsdp"),
)
"""Modules on the way to a mistake in a config; numpy and pyarrow come after it."""

LONGEST_FUNCTION = 80
MOST_MODULES = 382
MOST_LINES = 91_000
LEAST_COMMENTS = 0.02
MOST_VAGUE_NAMES = 0.03
VAGUE = frozenset(
    [
        "found",
        "part",
        "parts",
        "given",
        "one",
        "kind",
        "kinds",
        "place",
        "places",
        "words",
        "known",
        "own",
        "shown",
        "wanted",
        "whole",
        "kept",
        "made",
        "asked",
        "said",
    ]
)
"""Names that tell a reader nothing about the value."""


def module_name(path: Path) -> str:
    """Return the dotted name below luthier; a package has the name of its folder."""
    name = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
    return name.removesuffix(".__init__") if name != "__init__" else ""


MODULES = {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}


@cache
def tree(name: str) -> ast.Module:
    """Return the syntax tree of a module."""
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def is_for_types(node: ast.stmt) -> bool:
    """Tell an `if TYPE_CHECKING:` block."""
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def statements(name: str, at_import: bool) -> list[ast.stmt]:
    """Return the imports of a module: all, or those that run when it is imported itself."""
    nodes: list[ast.AST] = [tree(name)]
    imports = []
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports.append(node)
            continue
        body = list(ast.iter_child_nodes(node))
        if at_import:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(node, ast.stmt) and is_for_types(node):
                body = list(node.orelse)
        nodes += body
    return imports


def luthier_imports(name: str, at_import: bool = False) -> dict[str, int]:
    """Return the modules of luthier that a module imports, each with a line."""
    imported = {}
    for node in statements(name, at_import):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        for target in targets:
            if target.split(".")[0] != "luthier":
                continue
            dotted = target.removeprefix("luthier").lstrip(".")
            if dotted not in MODULES:
                dotted = dotted.rpartition(".")[0]
            imported.setdefault(dotted, node.lineno)
    imported.pop("", None)
    imported.pop(name, None)
    return imported


@cache
def external_imports(name: str) -> frozenset[str]:
    """Return the other packages that a module imports when it is imported itself."""
    packages = set()
    for node in statements(name, at_import=True):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif node.module:
            packages.add(node.module.split(".")[0])
    return frozenset(packages)


def packages_above(name: str) -> list[str]:
    """Return a module and the packages around it: Python imports all of them."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


@cache
def loaded_by(name: str) -> frozenset[str]:
    """Return every module of luthier that importing this one imports, itself among them."""
    loaded: set[str] = set()
    waiting = packages_above(name)
    while waiting:
        module = waiting.pop()
        if module in loaded or module not in MODULES:
            continue
        loaded.add(module)
        for imported in luthier_imports(module, at_import=True):
            waiting += packages_above(imported)
    return frozenset(loaded)


def floor(name: str) -> int:
    """Return the line of LAYERS that a module lives on."""
    package = name.split(".")[0]
    return next(number for number, line in enumerate(LAYERS) if package in line)


def test_every_package_has_a_layer():
    packages = {name.split(".")[0] for name in MODULES if name}
    assert packages - {package for line in LAYERS for package in line} == set()


def test_imports_run_down():
    upward = []
    for name in filter(None, MODULES):
        package = name.split(".")[0]
        for imported, line in luthier_imports(name).items():
            target = imported.split(".")[0]
            if package == target or (package, target) in ALLOWED_UPWARD:
                continue
            if floor(name) >= floor(imported):
                upward.append(f"{MODULES[name].relative_to(ROOT)}:{line} imports {imported}")
    assert upward == []


@pytest.mark.parametrize("package", STANDALONE)
def test_a_package_that_others_can_use_alone(package):
    strangers = [
        f"{MODULES[name].relative_to(ROOT)}:{line} imports {imported}"
        for name in MODULES
        if name.split(".")[0] == package
        for imported, line in luthier_imports(name).items()
        if imported.split(".")[0] not in {package, *STANDALONE[package]}
    ]
    assert strangers == []


def test_no_modules_import_each_other_in_a_circle():
    circles = []
    finished: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            circles.append(" -> ".join((*path[path.index(name) :], name)))
        elif name not in finished:
            for imported in luthier_imports(name, at_import=True):
                visit(imported, (*path, name))
            finished.add(name)

    for name in filter(None, MODULES):
        visit(name, ())
    assert circles == []


def test_heavy_libraries_are_imported_by_few_modules():
    heavy = {name for name in MODULES if external_imports(name) & set(HEAVY)}
    assert {name for name in heavy if not MAY_IMPORT_HEAVY.fullmatch(name)} == set()


def test_no_light_module_brings_a_heavy_one():
    brought = {
        name: sorted(module for module in loaded_by(name) if external_imports(module) & set(HEAVY))
        for name in MODULES
        if name and not MAY_IMPORT_HEAVY.fullmatch(name)
    }
    assert {name: modules for name, modules in brought.items() if modules} == {}


@pytest.mark.parametrize("name", BEFORE_NUMPY)
def test_a_mistake_in_a_config_costs_no_numpy(name):
    numeric = {
        module
        for module in loaded_by(name)
        if external_imports(module) & {"numpy", "pyarrow", "matplotlib", "datasets"}
    }
    assert numeric == set()


def test_nobody_imports_the_command_line():
    above = ("cli", "__main__", "notebook")
    importers = {
        name for name in MODULES for imported in luthier_imports(name)
        if imported.split(".")[0] == "cli" and name.split(".")[0] not in above
    }  # fmt: skip
    assert importers == set()


UNGUARDED = re.compile(
    r"sys\.__std(out|err)__|\bstd(out|err)\.(buffer|write)\b|\bConsole\(|\brich\.print|\bunguarded\b"
    r"|\bprint\(json\.dumps\(|\bprint\(yaml\."
)
"""Ways to print past `luthier.terminal`, or to print data that it would have to change."""
MAY_PRINT_UNGUARDED = {"terminal", "chat.template_probe"}
"""The guard itself, and a child process that talks to its parent."""


def test_nothing_is_printed_past_the_guard():
    ways = {name: len(UNGUARDED.findall(path.read_text("utf-8"))) for name, path in MODULES.items()}
    assert {name for name, count in ways.items() if count} == MAY_PRINT_UNGUARDED


def test_a_public_class_name_is_used_once():
    names = Counter(
        node.name
        for name in MODULES
        for node in tree(name).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert {name: number for name, number in names.items() if number > 1} == {}


def test_a_file_name_is_shared_by_two_at_most():
    names = Counter(path.name for path in MODULES.values() if path.name != "__init__.py")
    assert {name: number for name, number in names.items() if number > 2} == {}


def test_test_files_have_names_of_their_own():
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert {name: number for name, number in names.items() if number > 1} == {}


def test_no_function_is_long():
    long = [
        f"{MODULES[name].relative_to(ROOT)}:{node.lineno} {node.name} has {length} lines"
        for name in MODULES
        for node in ast.walk(tree(name))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := node.end_lineno - node.lineno + 1) > LONGEST_FUNCTION
    ]
    assert long == []


def test_the_size_of_the_house():
    lines = [line for path in MODULES.values() for line in path.read_text("utf-8").splitlines()]
    comments = sum(line.lstrip().startswith("#") for line in lines)
    print(f"{len(MODULES)} modules, {len(lines):,} lines, {comments / len(lines):.1%} comments")
    assert len(MODULES) <= MOST_MODULES
    assert len(lines) <= MOST_LINES
    assert comments / len(lines) >= LEAST_COMMENTS


def bound_names(module: ast.Module) -> list[str]:
    """Return all names that a module binds: variables, arguments, functions and classes."""
    names = []
    for node in ast.walk(module):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.append(node.id)
        elif isinstance(node, ast.arg):
            names.append(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.append(node.name)
    return [name.strip("_").lower() for name in names]


def test_names_say_what_a_value_is():
    names = Counter(name for module in MODULES for name in bound_names(tree(module)))
    vague = {name: number for name, number in names.most_common() if name in VAGUE}
    assert sum(vague.values()) / names.total() < MOST_VAGUE_NAMES, vague


def test_the_wheel_has_every_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    on_disk = {
        ".".join(("luthier", *path.parent.relative_to(SOURCE).parts))
        for path in SOURCE.rglob("__init__.py")
    }
    beside = {f"luthier.{name}" for name in ("conf", "docs", "launch", "recipes")}
    assert set(settings["packages"]) == on_disk | beside
