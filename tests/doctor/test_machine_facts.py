"""What is said of versions, disks and the hub."""

import tomllib
from itertools import chain
from pathlib import Path

import pytest
from huggingface_hub import constants

from helpers.hub_server import TOKEN, Hub
from luthier.doctor import machine_facts
from luthier.doctor.machine_facts import hub_facts, version_facts
from luthier.model.source import is_hub_unreachable

ROOT = Path(__file__).parents[2]

VERSIONS = {
    "the same": ("2.13", "2.13", "as tried"),
    "a patch": ("2.13.4", "2.13", "as tried"),
    "a build": ("2.13.0+cu130", "2.13", "as tried"),
    "a pre-release": ("2.13.0rc1", "2.13", "as tried"),
    "a newer one": ("2.14.0", "2.13", "newer than tried"),
    "a newer major one": ("3.0", "2.13", "newer than tried"),
    "an older one": ("2.12.1", "2.13", "older than needed"),
    "an older patch": ("1.3.7", "1.3.8", "older than needed"),
    "none": (None, "2.13", "missing"),
}


@pytest.mark.parametrize(("here", "tried", "state"), VERSIONS.values(), ids=VERSIONS)
def test_versions_are_compared_with_those_that_were_tried(here, tried, state, monkeypatch):
    monkeypatch.setattr(machine_facts, "_installed", lambda name: here)
    monkeypatch.setattr(machine_facts.metadata, "requires", lambda name: [f"torch>={tried}"])
    assert version_facts() == {"torch": {"here": here, "tried": tried, "state": state}}


def test_packages_for_developers_and_absent_options_are_left_out(monkeypatch):
    requires = [
        "pytest>=9.2; extra == 'test'",
        "mlflow-skinny>=3.17; extra == 'mlflow'",
        "rich>=15",
    ]
    monkeypatch.setattr(machine_facts.metadata, "requires", lambda name: requires)
    monkeypatch.setattr(machine_facts, "_installed", {"pytest": "9.2", "rich": "15.0"}.get)
    assert list(version_facts()) == ["rich"]


def test_a_requirement_names_the_release_that_the_tests_pass_with():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name, equals, version = line.partition("==")
        if equals:
            pins[name.lower().replace("_", "-")] = version
    bounds = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    checked, other = 0, []
    for bound in bounds:
        name, at_least, version = bound.partition(">=")
        pin = pins.get(name.partition("[")[0].lower())
        if at_least and pin and name != "pre-commit":
            checked += 1
            if not f"{pin}.".startswith(f"{version}."):
                other.append(f"{bound}, and {pin} is tried")
    assert other == []
    assert checked > 30


@pytest.fixture
def hub(monkeypatch):
    """A hub that this process may ask."""
    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    is_hub_unreachable.cache_clear()
    yield server
    server.close()
    is_hub_unreachable.cache_clear()


LOGINS = {
    "a token": (TOKEN, "ada"),
    "a wrong token": ("hf_" + "b" * 34, "a token that the hub refuses (hf auth login)"),
    "no token": (None, "none (hf auth login)"),
}


@pytest.mark.parametrize(("token", "login"), LOGINS.values(), ids=LOGINS)
def test_the_hub_says_who_is_logged_in_and_no_token_is_shown(token, login, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: token)
    facts = hub_facts()
    assert facts == {"endpoint": hub.endpoint, "access": "reachable", "login": login}
    assert "hf_" not in str(facts).replace("(hf auth login)", "")


def test_a_hub_that_does_not_answer_is_said(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: TOKEN)
    hub.close()
    facts = hub_facts()
    assert facts["access"] == "no answer within 3 seconds"
    assert facts["login"] == "a token, which was not tried"


def test_a_folder_that_cannot_be_written_is_said():
    facts = machine_facts._disk_facts(Path("/proc/luthier"))
    assert facts["path"] == "/proc/luthier"
    assert facts["write_mib_per_second"] is None
    assert facts["problem"].startswith("cannot be written: ")
