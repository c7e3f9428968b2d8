"""Training from Python: `luthier.train` and the run that it gives, for notebooks and scripts."""

import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from html import escape
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.config.load import load_config
from luthier.config.trust import EVERYTHING, NO_TRUST, TRUST_FLAG
from luthier.errors import UserError, explain_memory_shortage, format_for_hydra
from luthier.record.record import read_metrics, read_record
from luthier.record.run_dir import find_run
from luthier.redaction import redact
from luthier.storage.typed_files import load_json_lines
from luthier.storage.write_errors import describe_write_error
from luthier.terminal import guard_output
from luthier.train.signals import STOPPED_EXIT_CODE

if TYPE_CHECKING:
    from pandas import DataFrame

    from luthier.infer.llm import LLM

Setting = str | Mapping[str, Any]
"""A setting as on the command line (`lora.r=8`), or several as a mapping (`{"lora.r": 8}`)."""
_PREVIEW_HEIGHT, _REPORT_HEIGHT = 480, 720
_STYLE = "border-collapse:collapse;margin:.5em 0"


class TrainingStopped(KeyboardInterrupt):
    """A training was stopped, by Ctrl-C or a signal; the same call resumes it."""

    def __init__(self, run: "Run") -> None:
        super().__init__(
            f"{run.folder} stopped after its last complete step. Make the same call to resume."
        )
        self.run = run

    def _render_traceback_(self) -> list[str]:
        """Return what a notebook shows of it."""
        return [str(self)]


def train(recipe: Setting, *settings: Setting, trust: bool = False) -> "Run":
    """Train as `python train.py` does, in this process, and return the run.

        run = luthier.train("qlora_llama", "lora.r=8", {"dataset.path": "my.jsonl"})

    `recipe` is the name of a recipe, or the first of the settings. A run that is finished already
    is returned at once, and one that was stopped goes on. `trust` lets recipes run code that is not
    in this project. Raises UserError for a mistake in the settings or the files, and
    TrainingStopped where the training was interrupted.
    """
    words = [word for setting in (recipe, *settings) for word in _as_overrides(setting)]
    if isinstance(recipe, str) and "=" not in recipe:
        words[0] = f"recipe={recipe}"
    with _caller_state(words):
        loaded = load_config(words, trust)
        from luthier.cli.train import train as train_config

        try:
            code = train_config(loaded)
        except UserError as error:
            mistake: UserError | None = error
        except Exception as error:
            mistake = describe_write_error(error, None, "") or explain_memory_shortage(error)
            if mistake is None:
                raise
        else:
            mistake = None
    if mistake is not None:
        # Without its frames, which hold on to the model and all of its memory.
        raise mistake.with_traceback(None) from None
    run = Run._at(Path(loaded.config.output_dir), is_trusted=True)
    if code == STOPPED_EXIT_CODE:
        raise TrainingStopped(run)
    return run


def _as_overrides(setting: Setting) -> list[str]:
    """Return settings as they are typed in a command."""
    if isinstance(setting, Mapping):
        return [f"{key}={_as_text(value)}" for key, value in setting.items()]
    if not isinstance(setting, str):
        raise UserError(
            'luthier.train takes settings as text ("lora.r=8") or as a mapping '
            f'({{"lora.r": 8}}), and got {type(setting).__name__}.'
        )
    if setting.startswith("-"):
        raise UserError(
            f"{setting}: luthier.train takes settings and no flags. {TRUST_FLAG} is trust=True "
            "here; a sweep (-m) is started as a command."
        )
    if setting.lstrip("+~").startswith(("hydra.", "hydra/")):
        raise UserError(f"{setting}: this is a setting of a sweep, which is started as a command.")
    return [setting]


def _as_text(value: Any) -> str:
    return format_for_hydra(str(value) if isinstance(value, os.PathLike) else value)


@contextmanager
def _caller_state(words: list[str]) -> Iterator[None]:
    """Leave this process as it was, and let no earlier run reach into this one.

    A run sets variables for libraries, seeds, kernels, filters of warnings, and guards what is
    printed: a command ends with it, and a notebook goes on.
    """
    argv, environ, streams = sys.argv, dict(os.environ), (sys.stdout, sys.stderr)
    kernels = _kernel_switches()
    _forget_accelerator()
    # The record holds what was typed, and `luthier train` does the same with it.
    sys.argv = ["luthier train", *words]
    guard_output()
    try:
        with warnings.catch_warnings():
            yield
    finally:
        sys.argv, (sys.stdout, sys.stderr) = argv, streams
        for name in os.environ.keys() - environ.keys():
            del os.environ[name]
        os.environ.update(environ)
        _set_kernel_switches(kernels)
        if "torch" in sys.modules:
            from luthier.infer.generate import release_memory

            release_memory()


def _kernel_switches() -> tuple[bool, bool, bool]:
    """Return which kernels torch may take; as it comes, where nobody has imported it."""
    if "torch" not in sys.modules:
        return False, False, False
    import torch

    cudnn = torch.backends.cudnn
    return torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark


def _set_kernel_switches(switches: tuple[bool, bool, bool]) -> None:
    if "torch" in sys.modules:
        import torch

        deterministic, torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = switches
        torch.use_deterministic_algorithms(deterministic)


def _forget_accelerator() -> None:
    """Let accelerate choose device and number format anew; it keeps the first ones it was given."""
    if "accelerate" not in sys.modules or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Run:
    """A run: its folder, what made it and what came out; in a notebook, its results and its plot.

    Everything is read from the folder when it is asked for.
    """

    def __init__(self, folder: str | os.PathLike[str], *, trust: bool = False) -> None:
        """Take the folder of a run, or its name below `runs/`; UserError where there is none.

        `trust` lets the code run that its config names.
        """
        self._set(find_run(os.fspath(folder)), trust)

    @classmethod
    def _at(cls, folder: Path, is_trusted: bool) -> "Run":
        """Return the run of a folder, which a dry run has not written."""
        run = cls.__new__(cls)
        run._set(folder, is_trusted)
        return run

    def _set(self, folder: Path, is_trusted: bool) -> None:
        self.folder = folder
        """Where all of it lies."""
        self._trust = EVERYTHING if is_trusted else NO_TRUST

    @property
    def record(self) -> dict[str, Any]:
        """What stands in `run.json`; empty where there is none."""
        return redact(read_record(self.folder))

    @property
    def status(self) -> str:
        """`running`, `finished`, `stopped`, `failed` or `interrupted`; `new` before it began."""
        return str(self.record.get("status", "new"))

    @property
    def results(self) -> dict[str, dict[str, float | None]]:
        """The name of each result -> its value `before` and `after` the training."""
        return self.record.get("results", {})

    @property
    def metrics(self) -> "DataFrame | list[dict[str, Any]]":
        """What was logged, a row for each line of `metrics.jsonl`: a frame of pandas.

        Without pandas it is a list of mappings.
        """
        return _as_frame(read_metrics(self.folder))

    @property
    def replies(self) -> "DataFrame | list[dict[str, Any]]":
        """The held-out rows that were answered before and after the training, as `metrics` is."""
        file = self.folder / "replies.jsonl"
        return _as_frame(load_json_lines(file, dict[str, Any]) if file.is_file() else [])

    @property
    def report(self) -> "RunReport":
        """What `luthier show` prints of the run; in a notebook its page (`luthier report`).

        `run.report.html` is that page.
        """
        from luthier.cli.show import make_page, print_page

        text = _printed(lambda console: print_page(self.folder, make_page(self.folder), console))
        return RunReport(text, self.folder)

    def llm(self, **options: Any) -> "LLM":
        """Return the trained model, to be asked within a block; it is loaded as the block begins.

            with run.llm() as llm:
                llm.generate(["Lunch with Ana on Friday at noon."])

        `options` are those of `luthier.infer.LLM`. Raises UserError where the run has no model yet.
        """
        from luthier.infer.llm import LLM

        return LLM(str(self.folder), **{"trust": self._trust} | options)

    def preview(
        self, count: int = 3, *, first: int = 1, held_out: bool = False, ids: bool = False
    ) -> "Preview":
        """Return rows of the dataset as the tokens that train, as `luthier preview` shows them.

        `first` is the number of the first row, from 1. `held_out` shows rows that do not train,
        and `ids` the id of each token. Raises UserError where there are no such rows.
        """
        from luthier.inspection.dataset import open_dataset
        from luthier.inspection.statistics import select_split
        from luthier.inspection.tokens import view_rows
        from luthier.model.artifact import read_run_config

        material = open_dataset(read_run_config(self.folder, self._trust))
        own_sets = [key for key in material.evaluated if ".sets." not in key]
        split = (own_sets[0] if own_sets else "held out") if held_out else "train"
        chosen = select_split(material, split)
        total, side = sum(len(rows) for _, rows in chosen), "held-out" if held_out else "training"
        if not 1 <= first <= total:
            raise UserError(f"preview: first={first}, and there are {total:,} {side} rows.")
        numbers = range(first - 1, min(first - 1 + count, total))
        return Preview(f"{self.folder}", view_rows(material, chosen, numbers, side), ids)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, {self.status})"

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the results, and the loss over the steps."""
        head = f"<b>{escape(str(self.folder))}</b> &nbsp; {escape(self.status)}"
        rows = "".join(
            f"<tr><td>{escape(name)}</td>"
            + "".join(f"<td>{_number(values.get(when))}</td>" for when in ("before", "after"))
            + "</tr>"
            for name, values in self.results.items()
        )
        head_row = "<tr><th></th><th>before</th><th>after</th></tr>"
        table = f'<table style="{_STYLE}">{head_row}{rows}</table>' if rows else ""
        return f"<div>{head}{table}{_image(self.folder / 'loss.png')}</div>"


class RunReport(str):
    """The text of a run's report, with its page."""

    def __new__(cls, text: str, folder: Path) -> "RunReport":
        """Take the text, and the folder of the run."""
        report = super().__new__(cls, text)
        report._folder = folder
        return report

    _folder: Path

    @property
    def html(self) -> str:
        """The page as it is now, as `luthier report` writes it."""
        from luthier.report.run_files import read_run_files
        from luthier.report.run_report import render_report

        return render_report(read_run_files(self._folder))

    def _repr_html_(self) -> str:
        return _in_frame(self.html, _REPORT_HEIGHT)


class Preview:
    """Rows as tokens: coloured in a notebook, marked when printed."""

    def __init__(self, title: str, view: Any, ids: bool) -> None:
        self._title, self._view, self._ids = title, view, ids

    @cached_property
    def html(self) -> str:
        """The page, as `luthier preview --html` writes it."""
        from luthier.inspection.render import render_html

        return render_html(f"luthier preview: {self._title}", self._view, self._ids)

    def _repr_html_(self) -> str:
        """Return the page in a frame: its style and its script stay away from the notebook's."""
        return _in_frame(self.html, _PREVIEW_HEIGHT)

    def __repr__(self) -> str:
        from luthier.inspection.render import print_view

        return _printed(lambda console: print_view(console, self._view, self._ids))


def _in_frame(html: str, height: int) -> str:
    """Return a page in a frame of so many pixels, out of which its scripts cannot reach."""
    return (
        f'<iframe srcdoc="{escape(html, quote=True)}" sandbox="allow-scripts" '
        f'style="width:100%;height:{height}px;border:0;resize:vertical"></iframe>'
    )


def _as_frame(rows: list[dict[str, Any]]) -> Any:
    try:
        import pandas
    except ImportError:
        return rows
    return pandas.DataFrame(rows)


def _printed(print_to: Any) -> str:
    """Return what a function prints to the console that it is given, without colours."""
    from luthier.terminal import make_console

    text = StringIO()
    # In a notebook rich would show it in the cell, whatever its file is.
    print_to(make_console(file=text, width=100, no_color=True, force_jupyter=False))
    return text.getvalue().rstrip("\n")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _image(file: Path) -> str:
    """Return a picture in HTML; nothing where the file is not there."""
    if not file.is_file():
        return ""
    from base64 import b64encode

    data = b64encode(file.read_bytes()).decode()
    return f'<img src="data:image/png;base64,{data}" style="max-width:640px" alt="{file.stem}">'
