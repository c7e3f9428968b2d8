"""Train the config that a folder holds; `luthier reproduce` starts this once in each process."""

import os
import sys
from pathlib import Path
from typing import Any

from luthier import errors
from luthier.config import LoadedConfig
from luthier.config.env_references import fill_references, find_references, put_references
from luthier.config.passthrough import check_pass_through
from luthier.config.renamed_settings import read_recorded_config
from luthier.config.schema import RunConfig
from luthier.config.trust import NO_TRUST, Trust, check_recorded, find_hidden, trust_of
from luthier.errors import UserError
from luthier.record.config_diff import NEUTRAL_KEYS
from luthier.redaction import remember_secrets
from luthier.storage.write_errors import report_machine_error
from luthier.terminal import guard_output


def main(folder: Path, trust: Trust) -> int:
    """Train in `folder` by its config.yaml; return the exit code."""
    # Imported here: a config that this version cannot read is reported without loading torch.
    from luthier.export.write_card import write_card
    from luthier.train.run import run

    try:
        return run(load_run_config(folder, trust), write_card)
    except UserError as error:
        return errors.report_error(error)
    except Exception as error:
        # Whatever cannot be read or written, or has no memory: in words; others are raised again.
        return report_machine_error(error)


def load_run_config(folder: Path, trust: Trust = NO_TRUST) -> LoadedConfig:
    """Return the config of a run's folder, as if it had been typed.

    What it took from the environment is taken from this one. Raises UserError for code that it
    names and `trust` does not allow, and for values that neither it nor the environment has.
    """
    from pydantic import ValidationError

    # The resolved config, not the recipe: the recipe may have changed since the run.
    file = folder / "config.yaml"
    recorded = read_recorded_config(file)
    check_recorded(recorded, str(file), trust, ("model", "dataset", "chat", "trainer"))
    check_values(file, recorded)
    resolved = fill_references(recorded, with_secrets=True)
    remember_secrets(resolved)
    # As for a config that was typed: settings that luthier keeps to itself, and numbers as text.
    if mistakes := check_pass_through(resolved):
        lines = [f"  {mistake.key}: {mistake.text}" for mistake in mistakes]
        raise UserError(f"{file} cannot be run:\n" + "\n".join(lines))
    try:
        config = RunConfig.model_validate(resolved)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise UserError(
            f"{file} was written by another version of luthier, and this one "
            "does not understand:\n" + "\n".join(lines)
        ) from error
    resolved = config.model_dump(mode="json")
    return LoadedConfig(config, resolved, [], put_references(resolved, recorded))


def check_values(file: Path, recorded: Any) -> None:
    """Raise UserError for values that neither the record nor the environment has."""
    lines = [
        f"  {key}: the variable {name} is not set"
        for key, name in find_references(recorded)
        if name not in os.environ and key.split(".")[0] not in NEUTRAL_KEYS
    ]
    lines += [
        f"  {key}: a secret that was typed, and is not in the record"
        for key in find_hidden(recorded)
        if key.split(".")[0] not in NEUTRAL_KEYS
    ]
    if lines:
        raise UserError(
            f"{file} does not say all that the run needs:\n" + "\n".join(lines) + "\n"
            "Set the variables. For a secret that was typed, train with the command that began the "
            "run, and\nwrite it as a variable from then on: KEY='${oc.env:NAME}'."
        )


# Started with `python -m luthier.cli.rerun`, by accelerate too, which starts modules.
if __name__ == "__main__":
    guard_output()
    sys.exit(main(Path(sys.argv[1]), trust_of(sys.argv[2:])))
