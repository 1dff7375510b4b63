"""A plug-in that needs a model gets the configured one, whoever wrote it."""

import pytest

from gateway.cli.worker import _options
from gateway.config import Config, ModelSection, WorkerSection
from gateway.settings import ConfigError


def config(source: str) -> Config:
    return Config(model=ModelSection(source=source))


def test_the_configured_model_is_given_to_whoever_needs_one(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    here = config(str(tmp_path))
    needs = WorkerSection(role="decode", backend="emulation", options={"threads": 1})
    assert _options(here, needs) == {"threads": 1, "model": str(tmp_path)}
    has = WorkerSection(role="decode", backend="emulation", options={"model": "/elsewhere"})
    assert _options(here, has) == {"model": "/elsewhere"}
    needless = WorkerSection(role="decode", backend="synthetic")
    assert _options(here, needless) == {}


def test_a_model_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"model\.source"):
        _options(config("/nowhere"), WorkerSection(role="decode", backend="emulation"))
