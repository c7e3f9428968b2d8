import pytest


@pytest.fixture(autouse=True)
def only_bundled_recipes(monkeypatch):
    monkeypatch.delenv("LUTHIER_RECIPES", raising=False)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty working directory, and a way to put YAML files into it."""
    monkeypatch.chdir(tmp_path)

    def write(place, text):
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write
