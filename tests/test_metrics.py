import json
import math
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmojo_jax import metrics
from bmojo_jax.config import ModelConfig


def _reporter(directory, start_step=0, steps=6, log_every=2):
    return metrics.Reporter(
        directory,
        steps=steps,
        start_step=start_step,
        log_every=log_every,
        tokens_per_step=32,
        flops_per_token=1e6,
    )


def _records(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def _values(loss):
    return {"loss": jnp.float32(loss), "bits_per_byte": jnp.float32(loss / 2)}


def _train(reporter, steps, loss=lambda step: 8.0 / step):
    return [reporter.train(step, _values(loss(step))) for step in steps]


def test_metrics_arrive_one_step_late(tmp_path):
    reporter = _reporter(tmp_path)
    assert _train(reporter, range(1, 4)) == [None, _values(8.0), _values(4.0)]
    assert [record["step"] for record in _records(tmp_path)] == [2]
    reporter.close()


def test_only_the_metrics_of_the_step_before_are_waited_for(tmp_path, monkeypatch):
    fetched = []
    device_get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: fetched.append(x) or device_get(x))
    reporter = _reporter(tmp_path)
    values = [_values(step) for step in (1, 2, 3)]
    for step, value in enumerate(values, start=1):
        reporter.train(step, value)
        assert fetched == values[: step - 1]
    reporter.close()
    assert fetched == values


def test_records(tmp_path):
    reporter = _reporter(tmp_path, steps=5)
    _train(reporter, range(1, 5))
    with reporter.paused():
        reporter.validation(4, {"loss": 3.0, "bits_per_byte": 2.0, "accuracy": 0.5})
    _train(reporter, [5])
    reporter.close()
    records = _records(tmp_path)
    # Every second step, the validation, and the last step.
    assert [(r["step"], r["split"], r["loss"]) for r in records] == [
        (2, "train", 4.0),
        (4, "train", 2.0),
        (4, "validation", 3.0),
        (5, "train", pytest.approx(1.6)),
    ]
    assert records[1]["tokens"] == 4 * 32
    assert records[1]["bits_per_byte"] == 1.0
    assert records[1]["tokens_per_second"] > 0
    assert records[2]["accuracy"] == 0.5
    assert "mfu" not in records[1]  # a CPU has no stated peak


def test_rate_leaves_out_compilation_and_pauses(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(metrics, "peak_flops", lambda kind: 1e9)
    reporter = _reporter(tmp_path, steps=4)
    for step in range(1, 5):
        now[0] += 100.0 if step == 1 else 1.0
        _train(reporter, [step])
        reporter.flush()
        if step == 3:
            with reporter.paused():
                now[0] += 50.0
    reporter.close()
    rates = [record["tokens_per_second"] for record in _records(tmp_path)]
    assert rates == [32.0, 32.0]
    assert _records(tmp_path)[0]["mfu"] == pytest.approx(32.0 * 1e6 / (1e9 * jax.device_count()))


def test_resuming_doubles_nothing_and_loses_nothing(tmp_path):
    reporter = _reporter(tmp_path, log_every=1)
    _train(reporter, range(1, 6))
    reporter.validation(4, {"loss": 1.0, "bits_per_byte": 1.0})
    reporter.close()
    # A crash may cut the last line short.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "los')
    reporter = _reporter(tmp_path, start_step=4, log_every=1)
    _train(reporter, range(5, 7))
    reporter.close()
    assert [(record["step"], record["split"]) for record in _records(tmp_path)] == [
        (1, "train"),
        (2, "train"),
        (3, "train"),
        (4, "train"),
        (4, "validation"),
        (5, "train"),
        (6, "train"),
    ]


def test_non_finite_values_are_valid_json(tmp_path):
    reporter = _reporter(tmp_path, log_every=1)
    _train(reporter, range(1, 4), loss=lambda step: math.nan if step == 2 else 1.0)
    reporter.close()

    def refuse(constant):
        raise ValueError(constant)

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [record["loss"] for record in records] == [1.0, None, 1.0]


def test_figure_and_tensorboard(tmp_path):
    reporter = _reporter(tmp_path)
    _train(reporter, range(1, 7))
    reporter.validation(6, {"loss": 2.0, "bits_per_byte": 1.0})
    reporter.close()
    png = (tmp_path / "loss.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", png[16:24]) == (840, 540)
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert b"train/bits_per_byte" in content and b"validation/loss" in content


def test_nothing_reported_still_closes(tmp_path):
    _reporter(tmp_path).close()
    assert (tmp_path / "loss.png").exists()


def test_the_bar_does_not_flood(tmp_path, capsys):
    reporter = _reporter(tmp_path, steps=300, log_every=1)
    _train(reporter, range(1, 301))
    reporter.close()
    assert capsys.readouterr().err.count("\r") < 10


def test_norms():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3)).astype(np.float32), rng.normal(size=4).astype(np.float32)
    got = metrics.norms(grad={"a": a, "b": [b]}, param=b)
    assert got["grad_norm"] == pytest.approx(np.sqrt((a**2).sum() + (b**2).sum()), rel=1e-6)
    assert got["param_norm"] == pytest.approx(np.linalg.norm(b), rel=1e-6)


def test_bits_per_byte():
    assert metrics.bits_per_byte(10 * math.log(2), 4.0) == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("cpu", None),
    ],
)
def test_peaks(kind, peak):
    assert metrics.peak_flops(kind) == peak


SIZES = dict(
    width=32, num_heads=4, num_kv_heads=2, head_width=6, mlp_width=40, ssm_state=5, vocab_size=11
)


def test_flops_of_a_transformer():
    model = ModelConfig(pattern="attention+mlp", depth=3, **SIZES)
    matrices = 32 * 24 * 2 + 32 * 12 * 2 + 3 * 32 * 40
    attention = 4 * 4 * 6 * (1 + 2 + 3 + 4 + 5 + 6 + 7) / 7
    expected = 3 * (3 * (2 * matrices + attention) + 2 * 32 * 11)
    assert metrics.flops_per_token(model, 7) == pytest.approx(expected)


def test_flops_of_mamba():
    model = ModelConfig(pattern="mamba", depth=2, **SIZES)
    matrices = 32 * 2 * 64 + 64 * (2 + 2 * 5) + 2 * 64 + 64 * 32
    expected = 3 * (2 * 2 * matrices + 2 * 32 * 11)
    assert metrics.flops_per_token(model, 7) == pytest.approx(expected)


def test_flops_count_the_keys_that_a_query_sees():
    sizes = SIZES | {"window": 3, "fading_window": 2, "eidetic_tokens": 2, "chunk": 4}
    L, W, F, C = 10, 3, 2, 4
    # Counted key by key from the definition of the three windows.
    in_context = sum(1 for i in range(L) for j in range(L) if i - W + 1 <= j <= i)
    fading = sum(1 for i in range(L) for j in range(L) if i - W - F + 1 <= j <= i - W)
    memory = sum(min(2, len([t for t in range(L) if t <= i // C * C - W])) for i in range(L))

    def attention_flops(pattern, expected_keys, fading_projections):
        model = ModelConfig(pattern=pattern, depth=1, **sizes)
        mamba = ModelConfig(pattern="mamba", depth=1, **sizes)
        matrices = 32 * 24 * 2 + 32 * 12 * (4 if fading_projections else 2)
        got = metrics.flops_per_token(model, L) - metrics.flops_per_token(mamba, L)
        assert got == pytest.approx(3 * (2 * matrices + 4 * 24 * expected_keys / L))

    attention_flops("bmojo_f", in_context + fading, True)
    attention_flops("bmojo", in_context + fading + memory, True)
    swa = ModelConfig(pattern="swa", depth=1, **sizes)
    expected = 3 * (2 * (32 * 24 * 2 + 32 * 12 * 2) + 4 * 24 * in_context / L + 2 * 32 * 11)
    assert metrics.flops_per_token(swa, L) == pytest.approx(expected)
