"""A folder with all that benchmarks/gpu.py needs on a machine without a network.

    python benchmarks/gpu.py --pack FOLDER        # here; asks the package index for the wheels
    FOLDER/run.sh --minutes 8                     # there

In it are the scripts, and as wheels luthier and every library below it that is pure Python, in the
version that is installed here. Libraries with compiled code depend on the machine's Python and its
CUDA: `expected.json` lists them with the versions that are installed here, and `run.sh` compares.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
SCRIPTS = ("gpu.py", "shapes.py", "memory.py")
SOURCES = ("src", "conf", "recipes", "pyproject.toml", "README.md", "LICENSE")
"""What luthier's own wheel is built from."""
RUN = """#!/usr/bin/env bash
# Measures the GPU of this machine without a network: ./run.sh [--minutes 8] [--json gpu.json]
# PYTHON=... chooses a Python that has the packages with compiled code:
{expected}
set -euo pipefail
cd "$(dirname "$0")"
python=${{PYTHON:-python3}}

"$python" - <<'CHECK'
import json, os, sys
from importlib.metadata import PackageNotFoundError, version
from zipfile import ZipFile

if sys.version_info < (3, 11):
    sys.exit("Python 3.11 or newer is needed; PYTHON=... chooses another one.")
for name, wanted in json.load(open("expected.json")).items():
    try:
        if version(name).partition("+")[0] != wanted:
            print(f"{{name}}: {{version(name)}} is here, {{wanted}} was tried", file=sys.stderr)
    except PackageNotFoundError:
        print(f"{{name}}: not here; {{wanted}} was tried", file=sys.stderr)
# dill 0.4 pickles modules whole unless their path has this name in it, and fails at that.
if not os.path.isdir("site-packages"):
    for wheel in sorted(os.listdir("wheels")):
        ZipFile(os.path.join("wheels", wheel)).extractall("site-packages.part")
    os.rename("site-packages.part", "site-packages")
CHECK

export PYTHONPATH="$PWD/site-packages"
exec "$python" gpu.py "$@"
"""


def write_offline_folder(folder: Path) -> None:
    """Write the folder, which must not be there yet, and say what is in it."""
    if folder.exists():
        raise SystemExit(f"{folder} is there already. Name a folder that is not.")
    pure, compiled = split_dependencies("luthier")
    with tempfile.TemporaryDirectory() as name:
        part = Path(name, "folder")
        (part / "wheels").mkdir(parents=True)
        for script in SCRIPTS:
            shutil.copy(Path(__file__).with_name(script), part)
        source = Path(name, "luthier")
        source.mkdir()
        for entry in SOURCES:
            copy = shutil.copytree if (ROOT / entry).is_dir() else shutil.copy
            copy(ROOT / entry, source / entry)
        build_wheels([str(source), *(f"{d}=={v}" for d, v in pure.items())], part / "wheels")
        (part / "expected.json").write_text(json.dumps(compiled, indent=1) + "\n")
        lines = "\n".join(f"#   {name} {version}" for name, version in compiled.items())
        (part / "run.sh").write_text(RUN.format(expected=lines))
        (part / "run.sh").chmod(0o755)
        shutil.copytree(part, folder)
    size = sum(file.stat().st_size for file in folder.rglob("*"))
    print(
        f"{folder}: {len(pure) + 1} wheels, {size / 1e6:.0f} MB. Copy it and start run.sh there.\n"
        f"Expected there, because they have compiled code: {', '.join(compiled)}."
    )


def split_dependencies(name: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return what a package needs, by name and version: pure Python, and with compiled code.

    What torch itself needs comes with torch, and so does its CUDA. A package that asks for one
    exact version of compiled code (pydantic) counts as compiled: it has to come with that.
    """
    packages = {name: distribution(name)}
    waiting = [name]
    while waiting:
        above = waiting.pop()
        for requirement in [] if above == "torch" else needed_packages(packages[above]):
            key = requirement.name.lower().replace("_", "-")
            if key not in packages:
                try:
                    packages[key] = distribution(requirement.name)
                except PackageNotFoundError:
                    continue
                waiting.append(key)
    del packages[name]
    compiled = {key for key, package in packages.items() if not is_pure(package)}
    for key, package in packages.items():
        exact = [r.name for r in needed_packages(package) if str(r.specifier).startswith("==")]
        if {each.lower().replace("_", "-") for each in exact} & compiled:
            compiled.add(key)
    versions = {key: packages[key].version.partition("+")[0] for key in sorted(packages)}
    return (
        {key: version for key, version in versions.items() if key not in compiled},
        {key: version for key, version in versions.items() if key in compiled},
    )


def needed_packages(package: Distribution) -> list[Requirement]:
    """Return the requirements of a package on this machine, without its extras."""
    requirements = map(Requirement, package.requires or ())
    return [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]


def is_pure(package: Distribution) -> bool:
    """Tell whether a package runs on every machine: its wheel is for any."""
    tags = [line for line in (package.read_text("WHEEL") or "").splitlines() if "Tag:" in line]
    return bool(tags) and all(tag.endswith("-none-any") for tag in tags)


def build_wheels(requirements: list[str], folder: Path) -> None:
    """Fetch or build wheels of exactly these; raises SystemExit with pip's last words."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir"]
    done = subprocess.run([*command, str(folder), *requirements], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"pip wheel failed: {done.stderr.strip()[-1000:]}")
