"""Only the launch checks of a training script; each rank prints one line of JSON."""

import json
import sys

from luthier.errors import UserError, report_error
from luthier.train.launch.checks import check_launch_request, check_running_launch


def probe() -> None:
    check_launch_request()
    assert "torch" not in sys.modules, "check_launch_request must not import torch"
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator()
    facts = check_running_launch(accelerator)
    ranks = accelerator.reduce(torch.tensor(accelerator.process_index + 1))
    backend = torch.distributed.get_backend() if facts["processes"] > 1 else None
    line = {**facts, "sum": int(ranks), "backend": backend, "gpus": torch.cuda.device_count()}
    print("PROBE " + json.dumps(line) + "\n", end="", flush=True)
    # Without this, gloo's threads abort one exit in some.
    accelerator.end_training()


if __name__ == "__main__":
    try:
        probe()
    except UserError as error:
        sys.exit(report_error(error))
