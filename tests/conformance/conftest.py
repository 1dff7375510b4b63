import pytest

from backends.testing.tiny import write_tiny_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a model of random weights."""
    return str(write_tiny_model(tmp_path_factory.mktemp("tiny")))
