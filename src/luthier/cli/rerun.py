"""Train the config that a folder holds; `luthier reproduce` starts this once in each process."""

import sys
from pathlib import Path

from luthier import errors
from luthier.config import LoadedConfig
from luthier.config.renamed_settings import read_recorded_config
from luthier.config.schema import RunConfig
from luthier.errors import UserError


def main(folder: Path) -> int:
    """Train in `folder` by its config.yaml; return the exit code."""
    # Imported here: a config that this version cannot read is reported without loading torch.
    from luthier.export.write_card import write_card
    from luthier.train.run import run

    try:
        return run(load_run_config(folder), write_card)
    except UserError as error:
        return errors.report_error(error)
    except Exception as error:
        return errors.report_unexpected(error)


def load_run_config(folder: Path) -> LoadedConfig:
    """Return the config of a run's folder, as if it had been typed."""
    from pydantic import ValidationError

    # The resolved config, not the recipe: the recipe may have changed since the run.
    resolved = read_recorded_config(folder / "config.yaml")
    try:
        config = RunConfig.model_validate(resolved)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise UserError(
            f"{folder / 'config.yaml'} was written by another version of luthier, and this one "
            "does not understand:\n" + "\n".join(lines)
        ) from error
    return LoadedConfig(config, config.model_dump(mode="json"), [])


# Started with `python -m luthier.cli.rerun`, by accelerate too, which starts modules.
if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
