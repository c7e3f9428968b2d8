"""`luthier push`: an adapter or a merged model with its card to the Hugging Face hub."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.errors import UserError
from luthier.export import story as stories
from luthier.export import writing
from luthier.export.parcel import Parcel, pack
from luthier.export.story import Data, Story
from luthier.inspect.arguments import Flag, Given, Grammar
from luthier.model.artefact import Artefact, find

if TYPE_CHECKING:
    from huggingface_hub import HfApi

GRAMMAR = Grammar(
    "push",
    "luthier push RUN --to USER/NAME [flags]\n\n"
    "Sends a run's adapter (or, with --merged, what luthier merge made of it) with tokenizer,\n"
    "template, card and notes for servers to the Hugging Face hub. The repository is private\n"
    "unless --public is given. Weights go as safetensors; optimizer states, pickles and files\n"
    "that belong to no model stay here.",
    (
        Flag("--to", "NAME", "the repository: USER/NAME or ORGANISATION/NAME"),
        Flag("--merged", None, "the merged model in the run's merged/ folder"),
        Flag("--public", None, "for everyone to see"),
        Flag("--dry-run", None, "show every file and the card; nothing is sent"),
        Flag("--overwrite", None, "replace what is in the repository"),
        Flag("--license", "NAME", "the licence of the model, such as apache-2.0"),
        Flag("--data-license", "NAME", "the licence of the rows that state none"),
        Flag("--language", "LIST", "the languages of the model, such as en,de"),
        Flag("--base", "MODEL", "the adapter's base, where it is no longer at its place"),
    ),
    "  luthier push runs/quickstart/default --to ada/reminders --dry-run\n"
    "  luthier push runs/quickstart/default --to ada/reminders --license apache-2.0\n"
    "  luthier push runs/quickstart/default --to ada/reminders-merged --merged --public\n",
)
_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_IGNORED = (".gitattributes",)
"""What the hub itself puts into an empty repository."""


def run(words: list[str]) -> int:
    """Push what was typed; returns the exit code."""
    if GRAMMAR.asks_help(words):
        return 0
    given = GRAMMAR.parse(words)
    target = _target(given)
    if len(given.overrides) != 1:
        raise UserError("luthier push: name one run, such as luthier push runs/quickstart/default.")
    artefact = _artefact(given.overrides[0], given)
    if artefact.folder is None:
        raise UserError(f"{artefact.word}: this model is on the hub already.")
    story = _told(artefact, target, given)
    from luthier.model.quiet import hush

    hush()
    written = writing.texts(story, writing.spoken_of(artefact), target)
    parcel = pack(artefact.folder, story, written)
    _add_what_the_run_has(parcel, artefact)
    show(parcel, target, "--public" in given.switches)
    if "--dry-run" in given.switches:
        print(f"\n{written[writing.CARD]}\nnothing was sent (--dry-run)")
        return 0
    send(parcel, target, "--public" in given.switches, "--overwrite" in given.switches)
    return 0


def show(parcel: Parcel, target: str, public: bool) -> None:
    """Print every file with its size, and what stays here."""
    print(f"to        {target}, {'public' if public else 'private'}")
    sizes = parcel.sizes()
    for name, size in sizes.items():
        print(f"  {_readable(size):>10}  {name}")
    print(f"  {_readable(sum(sizes.values())):>10}  in {len(sizes)} files")
    for name, why in parcel.left.items():
        print(f"  stays here  {name}: {why}")


def send(parcel: Parcel, target: str, public: bool, overwrite: bool) -> None:
    """Upload in one commit. Raises UserError before anything is sent where it cannot be."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    check_login(api)
    check_card(parcel.texts[writing.CARD])
    _check_repository(api, target, public, overwrite)
    operations = [CommitOperationAdd(name, path) for name, path in parcel.files.items()]
    operations += [CommitOperationAdd(n, text.encode()) for n, text in parcel.texts.items()]
    try:
        api.create_repo(target, private=not public, exist_ok=True)
        done = api.create_commit(target, operations, commit_message="Model from luthier")
    except Exception as error:  # the HTTP client has its own errors for a network that is down
        raise UserError(f"--to {target}: the hub did not take it: {_words(error)}") from error
    print(f"sent      {done.repo_url if done.repo_url else target}")


def check_login(api: "HfApi") -> None:
    """Raise UserError where there is no valid login, or the hub is out of reach."""
    from huggingface_hub import errors

    try:
        api.whoami()
    except errors.OfflineModeIsEnabled as error:
        raise UserError("HF_HUB_OFFLINE is set, so that nothing can be sent. Unset it.") from error
    except OSError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, errors.LocalTokenNotFoundError) or status in (401, 403):
            raise UserError(
                "You are not logged in to the hub (or the login is no longer valid). Log in with a "
                "token that may write:\n    hf auth login\n(or set HF_TOKEN). Nothing was sent."
            ) from error
        raise UserError(f"The hub cannot be reached: {_words(error)}. Nothing was sent.") from error
    except Exception as error:  # the HTTP client's own errors
        raise UserError(f"The hub cannot be reached: {_words(error)}. Nothing was sent.") from error


def check_card(text: str) -> None:
    """Let the hub check the card's metadata; UserError with its words where it refuses."""
    from huggingface_hub import ModelCard

    try:
        ModelCard(text).validate()
    except ValueError as error:
        raise UserError(f"The hub refuses the card: {error}. Nothing was sent.") from error


def _check_repository(api: "HfApi", target: str, public: bool, overwrite: bool) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        found = api.repo_info(target)
    except RepositoryNotFoundError:
        return
    if found.private is False and not public:
        raise UserError(
            f"--to {target}: this repository exists and is public. --public says that this is "
            "meant, or name another. Nothing was sent."
        )
    names = [one.rfilename for one in found.siblings or [] if one.rfilename not in _IGNORED]
    if names and not overwrite:
        raise UserError(
            f"--to {target}: this repository holds {len(names)} files already ({names[0]}, ...). "
            "--overwrite replaces those of the same names, or name another. Nothing was sent."
        )


def _target(given: Given) -> str:
    target = given.texts.get("--to", "")
    if not _NAME.fullmatch(target):
        typed = f"--to {target}: " if target else ""
        raise UserError(f"luthier push: {typed}name a repository: --to USER/NAME.")
    return target


def _artefact(word: str, given: Given) -> Artefact:
    artefact = find(word, given.texts.get("--base"))
    if "--merged" not in given.switches:
        return artefact
    place = None if artefact.run is None else artefact.run / "merged"
    if place is None or not place.is_dir():
        raise UserError(
            f"{word}: there is no merged model yet. Make it first:\n    luthier merge {word}"
        )
    return find(str(place))


def _told(artefact: Artefact, target: str, given: Given) -> Story:
    """The story with what was typed besides."""
    story = stories.told(artefact)
    languages = [one for one in given.texts.get("--language", "").split(",") if one]
    rows = given.texts.get("--data-license")
    data: list[Data] = [
        one if one.licence or rows is None else replace(one, licence=rows) for one in story.data
    ]
    return replace(
        story,
        title=target.partition("/")[2],
        licence=given.texts.get("--license", story.licence),
        language=languages or story.language,
        data=data,
    )


def _add_what_the_run_has(parcel: Parcel, artefact: Artefact) -> None:
    """The plot, and the chat settings, which a checkpoint does not hold."""
    plot = Path() if artefact.run is None else artefact.run / writing.PLOT
    if plot.is_file():
        parcel.files.setdefault(writing.PLOT, plot)
    if artefact.chat is not None:
        text = json.dumps(artefact.chat, indent=2, ensure_ascii=False) + "\n"
        parcel.texts.setdefault("chat.json", text)


def _readable(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def _words(error: Any) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
