"""Which implementation runs, and with which block sizes."""

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from absl import logging

from pallas_kernels import Unsupported, blocks, dispatch


def takes(result: str) -> Any:
    return lambda *args, **kwargs: (result, args, kwargs)


def refuses(*args: Any, **kwargs: Any) -> Any:
    raise Unsupported("L=3 must be even")


def breaks(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError("a kernel that does not lower")


@pytest.fixture
def preferences(monkeypatch: pytest.MonkeyPatch) -> None:
    order = {dispatch.platform(): ("first", "second", "third")}
    monkeypatch.setattr(dispatch, "PREFERENCES", order)


@pytest.mark.usefixtures("preferences")
def test_none_takes_the_first_that_accepts() -> None:
    table = {"third": takes("third"), "second": takes("second"), "first": refuses}
    assert dispatch.run("op", table, None, 1, key=2) == ("second", (1,), {"key": 2})
    assert dispatch.run("op", {"third": takes("third")}, None)[0] == "third"


@pytest.mark.usefixtures("preferences")
def test_a_name_runs_or_raises() -> None:
    table = {"first": takes("first"), "second": refuses}
    with pytest.raises(Unsupported, match="L=3 must be even"):
        dispatch.run("op", table, "second")
    with pytest.raises(ValueError, match=r"op: implementation='fourth' is not one of .*'first'"):
        dispatch.run("op", table, "fourth")


@pytest.mark.usefixtures("preferences")
def test_all_refuse() -> None:
    with pytest.raises(Unsupported, match="first: L=3 must be even; second: L=3 must be even"):
        dispatch.run("op", {"first": refuses, "second": refuses}, None)


@pytest.mark.usefixtures("preferences")
def test_a_broken_kernel_is_not_passed_over() -> None:
    with pytest.raises(NotImplementedError, match="does not lower"):
        dispatch.run("op", {"first": breaks, "second": takes("second")}, None)


@pytest.mark.usefixtures("preferences")
def test_the_choice_is_logged_once_with_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(logging, "info", lines.append)
    for _ in range(2):
        dispatch.run("logged op", {"first": refuses, "second": takes("second")}, None)
    (line,) = lines
    assert "logged op runs as second" in line and "first: L=3 must be even" in line


def test_every_platform_prefers_known_names() -> None:
    assert set(dispatch.PREFERENCES) == {"cpu", "gpu", "tpu"}
    for names in dispatch.PREFERENCES.values():
        assert names and "reference" not in names


CASE = {"shape": {"L": 64, "B": 2}, "dtype": "float32", "heuristic": {"chunk": 16, "warps": 4}}


@pytest.fixture
def tuned(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    table: Mapping[str, Any] = {dispatch.device_kind(): {"op/x": {"B2 L64 float32": {"chunk": 32}}}}
    file = tmp_path / "tuned.json"
    file.write_text(json.dumps(table))
    monkeypatch.setattr(blocks, "TUNED_FILE", file)
    blocks._tuned.cache_clear()
    yield
    blocks._tuned.cache_clear()


@pytest.mark.usefixtures("tuned")
def test_argument_beats_tuned_beats_heuristic() -> None:
    assert blocks.choose("op/x", **CASE, override=None) == {"chunk": 32, "warps": 4}
    assert blocks.choose("op/x", **CASE, override={"chunk": 8}) == {"chunk": 8, "warps": 4}
    assert blocks.choose("op/y", **CASE, override=None) == {"chunk": 16, "warps": 4}
    other = CASE | {"dtype": "bfloat16"}
    assert blocks.choose("op/x", **other, override=None) == {"chunk": 16, "warps": 4}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"chunks": 8}, r"op/x: blocks has 'chunks'; it takes \['chunk', 'warps'\]"),
        ({"chunk": 0}, r"blocks\['chunk'\]=0 must be a positive integer"),
        ({"chunk": -4}, r"blocks\['chunk'\]=-4 must be a positive integer"),
    ],
)
def test_wrong_overrides_raise(override: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        blocks.choose("op/x", **CASE, override=override)
