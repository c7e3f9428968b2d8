"""What all tests share: no network, no telemetry, a cache that the machine keeps."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
# Threads that wait must not spin: on a shared machine two trainings would starve each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_collection_modifyitems(items):
    """Begin with the longest test, so that no worker is left alone with it at the end."""
    items.sort(key=lambda item: "quickstart_learns" not in item.name)
