"""Contract file, stand-in and our calls say the same; so does a library that is installed."""

import importlib
import inspect
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.trtllm.contract import (
    CONNECTOR_CLASSES,
    RELEASES,
    entries,
    fields,
    find,
    found_in,
    modules,
    parameters,
)
from tests.trtllm.desk import Desk
from tests.trtllm.play import Gates, standin, write_model


def api() -> Any:
    from backends.tensorrt_llm.probe import connector_api

    return connector_api()


@pytest.mark.parametrize("release", RELEASES)
def test_the_stand_in_has_exactly_what_is_written(release: str) -> None:
    with standin(release):
        for name, has, there in modules(release):
            assert found_in(name, has) == (has if there else []), name
        for name, expected in entries("function", release):
            function = find(name, api())
            assert (function is None) == (expected is None), name
            if function is not None and expected is not None:
                by_place = name.startswith(CONNECTOR_CLASSES)  # the library calls these by place
                found = parameters(function)
                assert found == expected or (not by_place and sorted(found) == sorted(expected)), (
                    name
                )
        for name, expected in entries("record", release):
            assert sorted(fields(find(name, api()))) == sorted(expected or ()), name
        for name, expected in entries("object", release):
            assert not [it for it in expected or () if not hasattr(find(name, api()), it)], name


@pytest.mark.skipif(find_spec("tensorrt_llm") is None, reason="TensorRT-LLM is not installed")
def test_the_installed_library_has_at_least_what_is_written() -> None:
    """Of the newest release whose modules it has."""
    release = next(
        one
        for one in reversed(RELEASES)
        if all(find_spec(name) is not None for name, _, there in modules(one) if there)
    )
    missing = [
        f"{name}.{one}"
        for name, has, there in modules(release)
        for one in has
        if there and one not in found_in(name, has)
    ]
    for kind, look in (("function", parameters), ("record", fields)):
        for name, expected in entries(kind, release):
            found = find(name, api())
            if expected is not None and found is None:
                missing.append(name)
            elif expected is not None:
                missing += [f"{name}.{one}" for one in set(expected) - set(look(found))]
    assert not missing


class Spy:
    """Stands before a class or function and writes down the names of its arguments."""

    def __init__(self, real: Any, seen: set[str]) -> None:
        self._real, self._seen = real, seen

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self._seen.update(named)
        return self._real(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


SPIED = {
    "tensorrt_llm.SamplingParams": "record",
    "tensorrt_llm.llmapi.llm_args.KvCacheConfig": "record",
    "tensorrt_llm.llmapi.llm_args.KvCacheConnectorConfig": "record",
    "tensorrt_llm.llmapi.llm_args.SchedulerConfig": "record",
}


@pytest.mark.parametrize("release", RELEASES)
def test_our_calls_name_nothing_that_is_not_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, release: str
) -> None:
    """And what the library gives us has no other attributes: the stand-in's objects are as bare."""
    seen: dict[str, set[str]] = {name: set() for name in SPIED}
    asked: set[str] = set()
    with standin(release):
        import tensorrt_llm

        for name in SPIED:
            module, _, last = name.rpartition(".")
            home = importlib.import_module(module)
            monkeypatch.setattr(home, last, Spy(getattr(home, last), seen[name]))
        real = tensorrt_llm.LLM.generate_async

        def submit(self: Any, inputs: Any, **named: Any) -> Any:
            asked.update(named)
            return real(self, inputs, **named)

        submit.__signature__ = inspect.signature(real)  # type: ignore[attr-defined]
        monkeypatch.setattr(tensorrt_llm.LLM, "generate_async", submit)
        from backends.tensorrt_llm.engine import TensorRTLLM

        engine = TensorRTLLM(
            model=str(write_model(tmp_path / "model")), identity="it", kv_cache={"max_tokens": 512}
        )
        try:
            Desk(engine, Gates(tmp_path / "gates")).done(list(range(40)), n=2)
        finally:
            engine.close()
    written = dict(entries("function", release))["tensorrt_llm.LLM.generate_async"]
    assert asked
    assert asked <= set(written or ())
    for name, kind in SPIED.items():
        assert seen[name], name
        assert seen[name] <= set(dict(entries(kind, release))[name] or ()), name
