"""The attention of a B'MOJO layer, whole and in the parts of which `bmojo_jax.attention` consists.

In order: the projections of u and f to queries, keys and values; QK-norm and rotary positions
("norms" and "rotary" are those two apart); the innovation of f; the selection of what every chunk
remembers; the gathers of its keys and values, with the keys' norm and rotation to their slots; the
attention itself; the output projection. "mixer" is all of it, given u and the fading stream f.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import timing
from benchmarks.attention_programs import useful_flops
from benchmarks.parts import Arrays, MakePart, Part, of_modules, product_flops
from bmojo_jax import memory
from bmojo_jax.attention import Attention
from bmojo_jax.config import ModelConfig
from bmojo_jax.layers import Documents
from pallas_kernels import innovation, memory_attention, norm_rotary
from pallas_kernels.rotary import rotary
from pallas_kernels.shapes import AttentionShape

# What the mixer consists of; the others are parts of these, or all of them.
INSIDE = (
    "projections",
    "norms + rotary",
    "innovation",
    "selection",
    "gathers",
    "attention",
    "output",
)
# What has no matrix products, and must cost no more than the bytes that it moves.
AROUND = ("norms + rotary", "innovation", "selection", "gathers")
FORWARD = ("forward",)


def parts_of(config: ModelConfig, *, batch: int, length: int) -> dict[str, MakePart]:
    """Every part of the attention of a layer with these settings."""
    B, L, D = batch, length, config.width
    H, G, K = config.num_heads, config.num_kv_heads, config.head_width
    W, M, C = config.window, config.eidetic_tokens, config.chunk
    shape = AttentionShape(B, L, H, G, K, W, config.fading_span, M, C)
    Z = -(-L // C)

    def attention(implementation: str | None, seed: int) -> Attention:
        return Attention(
            dataclasses.replace(config, attention_implementation=implementation),
            window=W,
            fading_window=config.fading_span,
            eidetic_tokens=M,
            output_scale=1.0,
            rngs=nnx.Rngs(seed),
        )

    def drawn(seed: int) -> Callable[..., jax.Array]:
        keys = iter(jax.random.split(jax.random.key(seed), 16))
        return lambda *sizes: jax.random.normal(next(keys), (B, *sizes), jnp.bfloat16)

    # Arrays, not constants of the programs: XLA would compute angles and masks while compiling.
    def positions() -> jax.Array:
        return jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32)[None, :], (B, L))

    def innovation_test(implementation: str | None) -> Callable[..., jax.Array]:
        # Other implementations are the attention's.
        chosen = "xla" if implementation == "xla" else None
        return functools.partial(innovation, implementation=chosen)

    def mixer(implementation: str | None, seed: int) -> Part:
        normal = drawn(seed)

        def run(module: Attention, u_BLD: Any, f_BLD: Any, positions_BL: Any) -> Arrays:
            e_BL = test(f_BLD, positions_BL) if M else None
            documents = Documents(positions_BL, None)
            return {"y_BLD": module(u_BLD, documents, f_BLD=f_BLD, e_BL=e_BL)[0]}

        test = innovation_test(implementation)
        module = attention(implementation, seed)
        return of_modules(module, run, normal(L, D), normal(L, D), constants=(positions(),))

    def projections(implementation: str | None, seed: int) -> Part:
        normal, module = drawn(seed), attention(implementation, seed)

        def run(projections: Any, u_BLD: Any, f_BLD: Any) -> Arrays:
            q_proj, k_proj, v_proj = projections
            out = {"q": q_proj(u_BLD), "k": k_proj(u_BLD), "v": v_proj(u_BLD)}
            return out | {"fading_k": k_proj(f_BLD), "fading_v": v_proj(f_BLD)}

        flops = product_flops(B * L * D * K * (H + 4 * G))
        modules = (module.q_proj, module.k_proj, module.v_proj)
        return of_modules(modules, run, normal(L, D), normal(L, D), flops=flops)

    def rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
        return rotary(x, positions, config.rope_theta)

    def norms(implementation: str | None, seed: int) -> Part:
        normal, module = drawn(seed), attention(implementation, seed)

        def run(norms: Any, q: Any, k: Any, fading_k: Any) -> Arrays:
            q_norm, k_norm = norms
            return {"q": q_norm(q), "k": k_norm(k), "fading_k": k_norm(fading_k)}

        inputs = (normal(L, H, K), normal(L, G, K), normal(L, G, K))
        return of_modules((module.q_norm, module.k_norm), run, *inputs)

    def rotations(implementation: str | None, seed: int) -> Part:
        normal = drawn(seed)

        def run(inputs: Arrays, positions_BL: jax.Array) -> Arrays:
            return {name: rotate(x, positions_BL) for name, x in inputs.items()}

        inputs = {"q": normal(L, H, K), "k": normal(L, G, K), "fading_k": normal(L, G, K)}
        return Part(run, inputs, positions())

    def norms_and_rotary(implementation: str | None, seed: int) -> Part:
        normal, module = drawn(seed), attention(implementation, seed)
        # Other implementations are the attention's.
        chosen = "xla" if implementation == "xla" else None

        def run(norms: Any, q: Any, k: Any, fading_k: Any, positions_BL: Any) -> Arrays:
            def placed(x: jax.Array, norm: Any) -> jax.Array:
                return norm_rotary(
                    x,
                    norm.scale[...],
                    positions_BL,
                    theta=config.rope_theta,
                    eps=config.norm_eps,
                    implementation=chosen,
                )

            q_norm, k_norm = norms
            out = {"q": placed(q, q_norm), "k": placed(k, k_norm)}
            return out | {"fading_k": placed(fading_k, k_norm)}

        inputs = (normal(L, H, K), normal(L, G, K), normal(L, G, K))
        modules = (module.q_norm, module.k_norm)
        return of_modules(modules, run, *inputs, constants=(positions(),))

    def of_fading(implementation: str | None, seed: int) -> Part:
        test = innovation_test(implementation)
        return Part(
            lambda f_BLD, positions_BL: {"e_BL": test(f_BLD, positions_BL)},
            drawn(seed)(L, D),
            positions(),
            kinds=FORWARD,  # its gradient is wanted where the gate is on
        )

    def innovations(seed: int) -> jax.Array:
        """With ties."""
        return jnp.round(64 * jnp.square(drawn(seed)(L).astype(jnp.float32)))

    def select(e_BL: jax.Array, start_BL: jax.Array) -> memory.Selection:
        return memory.select(e_BL, start_BL, window=W, chunk=C, size=M)

    def selection(implementation: str | None, seed: int) -> Part:
        def run(e_BL: jax.Array, start_BL: jax.Array) -> Arrays:
            index_BZM, valid_BZM = select(e_BL, start_BL)
            return {"index_BZM": index_BZM, "valid_BZM": valid_BZM.astype(jnp.int32)}

        def exact(e_BL: jax.Array, start_BL: jax.Array) -> Arrays:
            del start_BL  # zeros
            rows = [best_of_prefixes(e_L, W, C, M) for e_L in np.asarray(e_BL)]
            index_BZM, valid_BZM = (np.stack(arrays) for arrays in zip(*rows, strict=True))
            return {"index_BZM": jnp.asarray(index_BZM), "valid_BZM": jnp.asarray(valid_BZM)}

        starts = jnp.zeros((B, L), jnp.int32)
        return Part(run, innovations(seed), starts, kinds=FORWARD, exact=exact)

    def gathers(implementation: str | None, seed: int) -> Part:
        normal, module = drawn(seed), attention(implementation, seed)
        chosen = select(innovations(seed), jnp.zeros((B, L), jnp.int32))

        def run(k_norm: Any, k_BLGK: Any, v_BLGK: Any, chosen: Any, positions_BL: Any) -> Arrays:
            kept = memory.recall({"k_BLGK": k_BLGK, "v_BLGK": v_BLGK}, chosen)
            slots_BZM = memory.slot_positions(
                positions_BL[:, ::C], window=W, fading_window=config.fading_span, size=M
            )
            return kept | {"k_BLGK": rotate(k_norm(kept["k_BLGK"]), slots_BZM)}

        inputs = (normal(L, G, K), normal(L, G, K))
        kept = 2 * B * Z * M * G * K * inputs[0].dtype.itemsize
        # Read and written are the rows that are kept; gradients have a row for every token.
        least = {"forward": 2 * kept, "forward_backward": 3 * kept + timing.nbytes(inputs)}
        constants = (chosen, positions())
        return of_modules(module.k_norm, run, *inputs, constants=constants, least_bytes=least)

    def attend(implementation: str | None, seed: int) -> Part:
        normal = drawn(seed)
        valid_BZM = select(innovations(seed), jnp.zeros((B, L), jnp.int32)).valid_BZM if M else None

        def run(inputs: Arrays, valid_BZM: jax.Array | None) -> Arrays:
            out = memory_attention(
                **inputs,
                window=W,
                fading_window=config.fading_span,
                eidetic_valid_BZM=valid_BZM,
                chunk=C,
                implementation=implementation,
            )
            return {"o_BLHK": out.o_BLHK}

        names = ("k_BLGK", "v_BLGK", "fading_k_BLGK", "fading_v_BLGK")
        inputs = {"q_BLHK": normal(L, H, K)} | {name: normal(L, G, K) for name in names}
        if M:
            names = ("eidetic_k_BZMGK", "eidetic_v_BZMGK")
            inputs |= {name: normal(Z, M, G, K) for name in names}
        flops = {"forward": useful_flops("forward", "ours", shape)}
        flops["forward_backward"] = flops["forward"] + useful_flops("backward", "ours", shape)
        return Part(run, inputs, valid_BZM, flops=flops)

    def output(implementation: str | None, seed: int) -> Part:
        normal, module = drawn(seed), attention(implementation, seed)
        return of_modules(
            module.o_proj,
            lambda o_proj, o_BLHK: {"y_BLD": o_proj(o_BLHK)},
            normal(L, H, K),
            flops=product_flops(B * L * D * H * K),
        )

    parts: dict[str, MakePart] = {
        "mixer": mixer,
        "projections": projections,
        "norms": norms,
        "rotary": rotations,
        "norms + rotary": norms_and_rotary,
        "innovation": of_fading,
        "selection": selection,
        "gathers": gathers,
        "attention": attend,
        "output": output,
    }
    if M:
        return parts
    return {n: v for n, v in parts.items() if n not in ("innovation", "selection", "gathers")}


def best_of_prefixes(
    e_L: np.ndarray, window: int, chunk: int, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Spec section 3 for one document, a chunk at a time: index and validity [Z, M]."""
    kept = np.zeros(0, np.int32)
    index, valid = [], []
    for first in range(0, len(e_L), chunk):
        new = np.arange(max(first - chunk - window + 1, 0), max(first - window + 1, 0))
        kept = np.concatenate([kept, new])
        kept = np.sort(kept[np.lexsort((kept, -e_L[kept]))[:size]])
        empty = size - len(kept)
        index.append(np.concatenate([np.zeros(empty, np.int32), kept]))
        valid.append(np.arange(size) >= empty)
    return np.stack(index).astype(np.int32), np.stack(valid).astype(np.int32)


def named(config: ModelConfig, length: int) -> Mapping[str, int]:
    """The sizes of a case, for its record."""
    return {
        "L": length,
        "G": config.num_kv_heads,
        "M": config.eidetic_tokens,
        "C": config.chunk,
    }
