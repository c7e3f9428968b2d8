"""Sizes of memory as people write and read them."""

import re

from luthier.errors import UserError

MIB, GIB = 2**20, 2**30
_UNITS = {"": 30, "K": 10, "M": 20, "G": 30, "T": 40}


def parse(text: str, key: str) -> int:
    """Return the bytes of a size such as `24GB`, `24GiB`, `80G` or `512MB`.

    GB is read as GiB, as GPUs are sold and as nvidia-smi counts. Raises UserError, naming `key`.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, flags=re.IGNORECASE)
    size = round(float(found[1]) * 2 ** _UNITS[found[2].upper()]) if found else 0
    if size < MIB:
        raise UserError(f"{key} {text}: write the memory of one GPU, such as {key} 24GB.")
    return size


def show(size: float) -> str:
    """Return a size in GiB, or in MiB below one: three or four digits are enough for a plan."""
    if abs(size) < GIB:
        return f"{size / MIB:,.0f} MiB"
    return f"{size / GIB:,.2f} GiB"


def count(number: int) -> str:
    """Return a number of parameters in millions or billions."""
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"
