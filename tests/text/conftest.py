"""The bundled model's vocabulary, read once."""

import pytest

from gateway.cli.model import find_model
from gateway.text import Vocabulary, load_text


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    return load_text(find_model("bundled"))
