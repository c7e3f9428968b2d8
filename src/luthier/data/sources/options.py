"""The formats of files: by which suffix each is known, and what `dataset.options` may say of it."""

import codecs
import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from luthier.errors import UserError, format_value, suggest_options


def _codec_name(name: str) -> str:
    """Return the one name of an encoding that has many."""
    try:
        # `codecs.lookup` also finds codecs of bytes, such as base64; `encode` refuses those.
        "a".encode(name)
        return codecs.lookup(name).name
    except LookupError as error:
        raise ValueError("Python knows no such encoding; try utf-8 or windows-1252") from error


Character = Annotated[str, Field(min_length=1, max_length=1)]
Encoding = Annotated[str, AfterValidator(_codec_name)]


class FormatOptions(BaseModel):
    """The options of a format that has none."""

    # `strict`: YAML has types, so `delimiter: 1` is a mistake and not the text "1".
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class LineOptions(FormatOptions):
    """The options of JSONL."""

    encoding: Encoding = "utf-8"


class JsonOptions(LineOptions):
    """The options of JSON."""

    rows: str | None = "auto"
    """The key under which a file that is one object holds its rows; null if the object is a row."""


class CsvOptions(LineOptions):
    """The options of CSV and TSV."""

    delimiter: Character = ","
    quotechar: Character | None = '"'
    """null for files in which quotes are plain characters."""
    header: Annotated[list[str], Field(min_length=1)] | None = None
    """The columns' names, for files whose first line is a row."""


class TsvOptions(CsvOptions):
    """The options of CSV with tabs."""

    delimiter: Character = "\t"


class TextOptions(LineOptions):
    """The options of plain text."""

    by: Literal["line", "paragraph", "file"] = "line"
    """What one row is."""


class HubOptions(FormatOptions):
    """The options of hub datasets."""

    data_dir: str | None = None
    """The folder of the repository that is read."""
    data_files: str | list[str] | None = None
    """The files of the repository that are read."""


_OPTIONS_OF_FORMAT: dict[str, type[FormatOptions]] = {
    "jsonl": LineOptions,
    "json": JsonOptions,
    "csv": CsvOptions,
    "tsv": TsvOptions,
    "text": TextOptions,
    "hub": HubOptions,
}


def read_options(format: str, settings: dict[str, Any], name: str) -> FormatOptions:
    """Return the options of a format.

    UserError names the key, such as `dataset.options.delimiter`.
    """
    model = _OPTIONS_OF_FORMAT.get(format, FormatOptions)
    try:
        return model.model_validate(settings)
    except ValidationError as error:
        mistake = error.errors(include_url=False)[0]
        key = str(mistake["loc"][0])
        where = f"{name}.options.{key}"
        if mistake["type"] == "extra_forbidden":
            raise UserError(f"{where}: {_describe_unknown_option(format, key, model)}") from error
        problem = mistake["msg"].removeprefix("Value error, ")
        raise UserError(
            f"{where}={format_value(mistake['input'])} does not fit: {problem}."
        ) from error


def _describe_unknown_option(format: str, key: str, model: type[FormatOptions]) -> str:
    """Return the text for an option that the format does not have."""
    if not model.model_fields:
        return f"{format} has no options. Remove it."
    return f"{format} has no such option. {suggest_options(key, model.model_fields)}"


FORMAT_OF_SUFFIX = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".txt": "text",
    ".md": "text",
}
"""Suffix -> format; case does not count."""
COMPRESSION_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".zip")
"""Suffixes that may stand behind the format's own."""
TABLE_FORMATS = ("parquet", "arrow")
"""Formats that are read through Arrow and cannot be read front to back alone."""


def format_of(name: str) -> str | None:
    """Return the format that a file's name says, below any compression; None if it says none."""
    path = PurePosixPath(name.lower())
    # There may be several, as in data.jsonl.gz.zip.
    while path.suffix in COMPRESSION_SUFFIXES:
        path = path.with_suffix("")
    return FORMAT_OF_SUFFIX.get(path.suffix)


_ARCHIVES = {
    r"\.(tar(\.\w+)?|tgz|tbz2?|txz)$": "Unpack it (tar xf {name}), and name the files in it.",
    r"\.(7z|rar)$": "Unpack it, and name the files in it.",
}


def archive_command(name: str) -> str | None:
    """Return what to do about an archive that is not opened, by its name; None for other files."""
    advice = (text for pattern, text in _ARCHIVES.items() if re.search(pattern, name.lower()))
    return next((text.format(name=name) for text in advice), None)


_SPREADSHEET = "a spreadsheet. Open it and save it as CSV with the encoding UTF-8."
_OTHER_FILES = {
    (".xlsx", ".xlsm", ".xls", ".ods", ".numbers"): _SPREADSHEET,
    (".pdf", ".docx", ".doc", ".odt", ".rtf", ".pptx", ".epub", ".html", ".htm"): "a document. "
    "Save its text as .txt, which trains with trainer=pretrain, or write rows of it into JSONL.",
    (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"): "an image. Rows name their images by path "
    "(`luthier docs images`).",
    (".yaml", ".yml"): "YAML, which holds no rows. A config of another trainer is for "
    "`luthier convert`.",
    (".safetensors", ".gguf", ".pt", ".pth"): "a model's file. A model is named by model.path.",
}
"""Suffixes of files that people name and that hold no rows -> what they are and what to do."""
_MEMBERS = {"xl/workbook.xml": ".xlsx", "word/document.xml": ".docx"}
"""A file inside an office document, which is a zip archive -> the document's suffix."""


def describe_other_file(name: str, members: Sequence[str] = ()) -> str | None:
    """Return what a file is that holds no rows, by its name or by what is in its zip archive."""
    inside = next((suffix for member, suffix in _MEMBERS.items() if member in members), None)
    suffix = inside or PurePosixPath(name.lower()).suffix
    return next((text for suffixes, text in _OTHER_FILES.items() if suffix in suffixes), None)


def is_file_name(name: str) -> bool:
    """Return whether a name ends as data files do, so that it is no hub dataset's."""
    return format_of(name) is not None or name.lower().endswith(COMPRESSION_SUFFIXES)
