"""Collectives and traffic of a program, read from its text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmojo_jax import hlo

TEXT = """HloModule made_up, is_scheduled=true

%cond.1 (p.1: (s32[], f32[8,4])) -> pred[] {
  %p.1 = (s32[], f32[8,4]) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %n.1 = s32[] constant(5)
  ROOT %lt = pred[] compare(%i.1, %n.1), direction=LT
}

%piece.1 (x: f32[2,4]) -> f32[8,4] {
  ROOT %ag.1 = f32[8,4]{1,0} all-gather(%x), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
}

%piece.2 (x: f32[2,4]) -> f32[8,4] {
  ROOT %ag.2 = f32[8,4]{1,0} all-gather(%x), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
}

%body.1 (p.2: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %one = f32[8,4]{1,0} fusion(%slice), kind=kLoop, calls=%piece.1
  %two = f32[8,4]{1,0:S(1)} fusion(%slice), kind=kLoop, calls=%piece.2
  %cp = (bf16[2,4], bf16[2,4], u32[], u32[]) collective-permute-start(%h), channel_id=8, \
source_target_pairs={{0,1}}
  %alone = f32[9]{0} all-reduce(%z), channel_id=9, replica_groups={{0},{1}}, to_apply=%add
  ROOT %out = (s32[], f32[8,4]) tuple(%i, %one)
}

ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %loop = (s32[], f32[8,4]) while(%start), condition=%cond.1, body=%body.1
  %sum = f32[10]{0} all-reduce(%y), channel_id=1, \
replica_groups=mesh['data'=2,'tensor'=4] {'tensor'}, to_apply=%add
  %part = f32[10]{0} reduce-scatter(%y), channel_id=2, replica_groups={{0,1}}, to_apply=%add
  ROOT %r = f32[8,4]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_collectives_of_a_text():
    # The gather is in two pieces of one channel; one all-reduce reaches nobody.
    assert sorted(hlo.collectives(TEXT)) == [
        hlo.Collective("all-gather", 8 * 4 * 4 * 3 / 4, 5),
        hlo.Collective("all-reduce", 2 * 40 * 3 / 4, 1),
        hlo.Collective("collective-permute", 2 * 4 * 2, 5),
        hlo.Collective("reduce-scatter", 40, 1),
    ]


@pytest.mark.parametrize(
    ("instruction", "wanted"),
    [
        ("(f32[100], f32[200]) all-reduce-start(%a, %b)", ("all-reduce", 2 * 1200 * 3 / 4)),
        (
            "((f32[10], f32[20]), (f32[40], f32[80])) all-gather-start(%a, %b)",
            ("all-gather", 480 * 3 / 4),
        ),
        ("(f32[8], f32[8], u32[], u32[]) collective-permute-start(%a)", ("collective-permute", 32)),
    ],
)
def test_collectives_that_are_begun(instruction, wanted):
    text = (
        f"ENTRY %main (a: f32[8]) -> f32[8] {{\n  %x = {instruction}, replica_groups=[1,4]<=[4]\n}}"
    )
    assert hlo.collectives(text) == [hlo.Collective(*wanted, 1)]


def test_a_sum_of_which_a_part_is_kept():
    text = """
%all-reduce-scatter.1 (x: f32[8,4]) -> f32[2,4] {
  %ar = f32[8,4]{1,0} all-reduce(%x), channel_id=3, replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %ds = f32[2,4]{1,0} dynamic-slice(%ar, %i, %j)
}

ENTRY %main (a: f32[8,4]) -> f32[2,4] {
  ROOT %r = f32[2,4]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    assert hlo.collectives(text) == [hlo.Collective("reduce-scatter", 8 * 4 * 4 * 3 / 4, 1)]


def test_traffic_of_a_text():
    # What stays on the chip, S(1), tuples and what has only begun cost nothing.
    loop, condition = 8 * 4 * 4 + 9 * 4, 1
    assert hlo.traffic(TEXT) == 2 * (5 * (loop + condition) + 2 * 40)
    stacked = TEXT.replace("f32[9]{0} all-reduce", "f32[5,9]{1,0} all-reduce")
    assert hlo.traffic(stacked) == hlo.traffic(TEXT)


@pytest.mark.parametrize("trips", [3, 11])
def test_collectives_of_a_program(trips):
    mesh = jax.make_mesh((8,), ("one",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(x):
        def step(x, _):
            return jax.lax.ppermute(x, "one", [(i, (i + 1) % 8) for i in range(8)]), None

        x, _ = jax.lax.scan(step, x, length=trips)
        return jax.lax.all_gather(x, "one", tiled=True)

    run = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=jax.P("one"), out_specs=jax.P(), check_vma=False)
    )
    text = run.lower(jax.ShapeDtypeStruct((16, 5), np.float32)).compile().as_text()
    found = {c.kind: c for c in hlo.collectives(text)}
    assert found["collective-permute"] == ("collective-permute", 2 * 5 * 4, trips)
    assert found["all-gather"] == ("all-gather", 14 * 5 * 4, 1)
    assert jnp.isfinite(hlo.traffic(text))
