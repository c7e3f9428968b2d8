"""What a sweep varies: Hydra's sweep grammar, typed or in YAML, as axes with values or bounds."""

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException

from luthier.config.override_errors import parse_override
from luthier.config.recipes import list_options
from luthier.config.schema import GROUPS
from luthier.errors import Mistake, format_value, suggest_options

KEY = "hydra.sweeper.params"
_BETWEEN = 0.381
"""Where between its bounds an interval is checked: a share that no round number hits."""
_RUN = ("name", "output_dir", "overwrite", "dry_run")
_FORMS = "Write lora.r=8,16,32, range(1,9,2), interval(0.1,0.5) or tag(log,interval(1e-5,1e-3))"


@dataclass(frozen=True)
class SearchAxis:
    """One key that a sweep varies: over `values`, or between `low` and `high`."""

    key: str
    """As typed, with `+` where there is one."""
    text: str
    """What stands behind the key."""
    values: tuple[str, ...] = ()
    """Each as Hydra reads it; none for an interval."""
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    """Of values that are a range of numbers."""
    log: bool = False
    whole: bool = False
    """Whether the numbers of an interval or a range are whole."""

    @property
    def name(self) -> str:
        """Return the key as results show it."""
        return self.key.lstrip("+")

    @property
    def is_interval(self) -> bool:
        """Return whether every number between two bounds may be taken."""
        return not self.values

    def ends(self) -> tuple[str, ...]:
        """Return the values that stand for all when a configuration is checked.

        Each, or the bounds of an interval and a number between them, which is seldom whole.
        """
        between = self.low + _BETWEEN * (self.high - self.low)
        return self.values or tuple(map(self.number, (self.low, between, self.high)))

    def number(self, drawn: float) -> str:
        """Return a number of this axis as text, without the noise of its last digits."""
        return str(round(drawn)) if self.whole else repr(float(f"{drawn:.12g}"))


@dataclass(frozen=True)
class SearchSpace:
    """The axes, and the words of the command line that hold for every trial."""

    axes: tuple[SearchAxis, ...]
    fixed: tuple[str, ...]

    @property
    def size(self) -> float:
        """Return how many points there are; infinite with an interval."""
        count = 1.0
        for axis in self.axes:
            count *= len(axis.values) or float("inf")
        return count


def read_space(
    lines: Iterable[str], params: Mapping[str, Any]
) -> tuple[SearchSpace, list[Mistake]]:
    """Tell axes from fixed words: what is typed, then what YAML adds (`hydra.sweeper.params`).

    A key that is typed wins over the same key in YAML.
    """
    parser = OverridesParser.create()
    axes: dict[str, SearchAxis] = {}
    fixed, mistakes, typed = [], [], set()
    entries = [(line, line) for line in lines]
    entries += [
        (f"{key}={_format_entry(values)}", f"{KEY}.{key}") for key, values in flatten_values(params)
    ]
    for line, source_key in entries:
        try:
            override = parse_override(parser, line)
        except HydraException:
            mistakes += (
                [Mistake(source_key, _describe_parse_error(line))] if source_key != line else []
            )
            # A typed word that cannot be read stays: the check of the configuration reports it.
            fixed += [line] if source_key == line else []
            continue
        bare = override.get_key_element().lstrip("+~")
        # Typed words come first in the list, so their keys are known when YAML is read.
        if source_key != line and bare in typed:
            continue
        typed.add(bare)
        if not override.is_sweep_override():
            fixed.append(line)
            continue
        axis = _read_axis(override, line.partition("=")[2])
        if isinstance(axis, str):
            mistakes.append(Mistake(source_key if source_key != line else bare, axis))
        else:
            axes[bare] = axis
    return SearchSpace(tuple(axes.values()), tuple(fixed)), mistakes


def first_point(lines: Iterable[str]) -> list[str]:
    """Return the typed words with the first value of each axis: one configuration of the sweep."""
    space, _ = read_space(lines, {})
    return [*space.fixed, *(f"{axis.key}={axis.ends()[0]}" for axis in space.axes)]


def flatten_values(params: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return the entries of a mapping by dotted key, in order."""
    leaves: list[tuple[str, Any]] = []
    for key, values in params.items():
        name = f"{prefix}{key}"
        leaves += (
            flatten_values(values, f"{name}.") if isinstance(values, Mapping) else [(name, values)]
        )
    return leaves


def _format_entry(values: Any) -> str:
    """Return an entry of YAML in Hydra's grammar; a list is the values to try."""
    if isinstance(values, list):
        return f"choice({','.join(_quote_item(item) for item in values)})"
    return values if isinstance(values, str) else format_value(values)


def _quote_item(item: Any) -> str:
    if isinstance(item, list):
        return f"[{','.join(_quote_item(element) for element in item)}]"
    if isinstance(item, str):
        return "'" + item.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return format_value(item)


def _describe_parse_error(line: str) -> str:
    value = line.partition("=")[2]
    if value == "choice()":
        return f"the list is empty. {_FORMS}."
    return f"{value!r} cannot be read. {_FORMS}; within {{...}} of YAML, in quotes."


def _read_axis(override: Override, text: str) -> SearchAxis | str:
    """Return the axis that an override stands for, or what is wrong with it."""
    key, sweep = override.get_key_element(), override.value()
    bare = key.lstrip("+~")
    if override.is_delete():
        return "`~` takes a key away, and nothing of it can vary. Remove the values behind it."
    if bare in _RUN or bare.split(".")[0].split("/")[0] == "hydra":
        return f"{text} is several values, and a sweep has one {bare}. Write {bare}=VALUE."
    if isinstance(sweep, IntervalSweep):
        return _read_interval(key, text, sweep)
    values = _match_options(bare, sweep) if isinstance(sweep, Glob) else _list_values(override)
    if isinstance(values, str):
        return values
    if len(set(values)) < len(values):
        twice = next(candidate for candidate in values if values.count(candidate) > 1)
        return f"{twice} stands there twice, and would be trained twice. Remove one."
    if not values:
        return f"{text} holds no value. {_FORMS}."
    if isinstance(sweep, RangeSweep) and not sweep.shuffle:
        low, high = sorted((float(values[0]), float(values[-1])))
        is_integer = all(candidate.lstrip("-").isdigit() for candidate in values)
        return SearchAxis(key, text, values, low, high, abs(float(sweep.step)), whole=is_integer)
    return SearchAxis(key, text, values)


def _read_interval(key: str, text: str, sweep: IntervalSweep) -> SearchAxis | str:
    unknown = [tag for tag in sweep.tags if tag != "log"]
    if unknown:
        return f"tag {unknown[0]!r} means nothing here. The only tag is log."
    assert sweep.start is not None and sweep.end is not None
    if not sweep.start < sweep.end:
        return f"{text} is empty: its first bound must be less than its second."
    log = "log" in sweep.tags
    if log and sweep.start <= 0:
        return f"{text}: a logarithmic scale begins above 0."
    is_integer = isinstance(sweep.start, int) and isinstance(sweep.end, int)
    return SearchAxis(key, text, (), sweep.start, sweep.end, None, log, is_integer)


def _list_values(override: Override) -> tuple[str, ...] | str:
    sweep = override.value()
    if isinstance(sweep, ChoiceSweep) and sweep.shuffle:
        return "shuffle() draws another order at each start. Take hydra/sweeper=random."
    if isinstance(sweep, RangeSweep) and sweep.shuffle:
        return "shuffle() draws another order at each start. Take hydra/sweeper=random."
    if isinstance(sweep, RangeSweep) and sweep.step == 0:
        return "a range with step 0 never ends."
    texts = tuple(str(element) for element in override.sweep_string_iterator())
    if not isinstance(sweep, RangeSweep):
        return texts
    # Hydra counts in floats, and so may count one too far.
    return tuple(f"{float(element):.12g}" for element in texts if _is_before(float(element), sweep))


def _is_before(number: float, sweep: RangeSweep) -> bool:
    assert sweep.stop is not None
    # A billionth of a step is far above the noise of floats and far below a value of its own.
    near = 1e-9 * abs(sweep.step)
    return number < sweep.stop - near if sweep.step > 0 else number > sweep.stop + near


def _match_options(group: str, sweep: Glob) -> tuple[str, ...] | str:
    """Return the options of a group whose names fit."""
    if group not in (*GROUPS, "recipe"):
        return f"glob() lists the options of a group. {suggest_options(group, (*GROUPS, 'recipe'))}"
    names = [
        name
        for name in list_options(group)
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in sweep.include)
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in sweep.exclude)
    ]
    return tuple(names) or f"no option of {group} fits. Options: {', '.join(list_options(group))}."
