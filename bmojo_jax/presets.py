"""Families and sizes: parameter-matched models of the ladder that GPT-3 and Mamba use.

Families (each a special case of the B'MOJO layer, spec section 5):

    transformer  attention + SwiGLU MLP          mamba    selective SSM alone
    hybrid       SSM, then sliding window        bmojo_f  window + fading memory (M = 0)
    bmojo        window + fading + eidetic memory

A size fixes the width D and the depths of the Mamba and transformer ladders. Mamba sets the number
of parameters outside the embedding; depth of the others and the transformer's MLP width follow from
it, so that all families of a size agree within 3 %, with full or grouped heads. In units of D^2 a
layer has about 6.25 (Mamba), 4 or 2.5 (attention with full heads or H/4 key and value heads).

`paper=True` is the layer as arXiv 2407.06324 has it: no `ssm_norm`, `fading_norm`, `qk_norm`,
`ssm_residual`. Mamba has no `ssm_norm` in either form: it is plain Mamba-1.
"""

import dataclasses
from typing import Literal

from bmojo_jax.config import ModelConfig

Family = Literal["transformer", "mamba", "hybrid", "bmojo_f", "bmojo"]
Size = Literal["tiny", "30m", "130m", "370m", "790m", "1_4b", "3b"]

PATTERNS: dict[Family, str] = {
    "transformer": "attention+mlp",
    "mamba": "mamba",
    "hybrid": "mamba,swa",
    "bmojo_f": "bmojo_f",
    "bmojo": "bmojo",
}


@dataclasses.dataclass(frozen=True)
class Ladder:
    """What a size fixes."""

    width: int  # D
    mamba_depth: int
    transformer_depth: int
    window: int = 512  # W
    eidetic_tokens: int = 64  # M
    chunk: int = 256  # C
    mlp_multiple: int = 64  # MLP widths are multiples of this


SIZES: dict[Size, Ladder] = {
    "tiny": Ladder(128, 14, 7, window=64, eidetic_tokens=16, chunk=64, mlp_multiple=32),
    "30m": Ladder(512, 18, 9),
    "130m": Ladder(768, 24, 12),
    "370m": Ladder(1024, 48, 24),
    "790m": Ladder(1536, 48, 24),
    "1_4b": Ladder(2048, 48, 24),
    "3b": Ladder(2560, 64, 32),
}


def mixer_parameters(config: ModelConfig, mixer: str) -> int:
    """Parameters of one mixer, without the norm before it."""
    width, inner, rank, state = (
        config.width,
        config.ssm_inner,
        config.dt_rank,
        config.ssm_state,
    )
    ssm = (
        3 * width * inner  # in and out
        + inner * (rank + 2 * state)
        + rank * inner
        + inner * (config.conv_taps + state + 3)  # conv, a_log; biases and skip
        + inner * config.ssm_norm
    )
    head = config.head_width
    attention = 2 * width * head * (config.num_heads + config.num_kv_heads)
    attention += 2 * head * config.qk_norm
    if mixer == "mamba":
        return ssm
    if mixer in ("swa", "attention"):
        return attention
    if config.fading_projections == "untied" and config.reads_fading(mixer):
        attention += 2 * width * head * config.num_kv_heads
    gate = mixer == "bmojo" and config.eidetic_gate and config.eidetic_tokens
    return ssm + attention + width * config.fading_norm + (config.num_heads if gate else 0)


def group_parameters(config: ModelConfig) -> int:
    """Parameters of one repetition of the pattern."""
    total = 0
    for block in config.blocks:
        total += mixer_parameters(config, block.mixer) + config.width
        total += block.mlp * (3 * config.width * config.mlp_width + config.width)
    return total


def model_parameters(config: ModelConfig) -> int:
    """Parameters of the whole model, embedding and head included."""
    tables = 1 if config.tie_embeddings else 2
    embedding = tables * config.vocab_size * config.width
    return embedding + config.num_groups * group_parameters(config) + config.width


def model(
    family: Family,
    size: Size,
    *,
    vocab_size: int = 50_304,
    head_width: Literal[64, 128] = 64,
    kv_heads: Literal["grouped", "full"] = "grouped",
    paper: bool = False,
) -> ModelConfig:
    """The configuration of a family at a size. Change fields with `dataclasses.replace`.

    Args:
      vocab_size: V; the embedding is tied to the head.
      kv_heads: "grouped": H // 4 key and value heads, at least one; "full": H of them.
      paper: without our norms and residual (see above).

    Raises:
      ValueError: an unknown family, size or head width.
    """
    for name, value, choices in (
        ("family", family, tuple(PATTERNS)),
        ("size", size, tuple(SIZES)),
        ("head_width", head_width, (64, 128)),
        ("kv_heads", kv_heads, ("grouped", "full")),
    ):
        if value not in choices:
            raise ValueError(f"{name}={value!r}: must be one of {choices}")
    ladder = SIZES[size]
    num_heads = ladder.width // head_width
    mamba = ModelConfig(
        vocab_size=vocab_size,
        width=ladder.width,
        depth=ladder.mamba_depth,
        pattern="mamba",
        num_heads=num_heads,
        num_kv_heads=num_heads if kv_heads == "full" else max(num_heads // 4, 1),
        head_width=head_width,
        window=ladder.window,
        eidetic_tokens=ladder.eidetic_tokens,
        chunk=ladder.chunk,
        ssm_norm=False,
        qk_norm=not paper,
        fading_norm=not paper,
        ssm_residual=not paper,
    )
    target = mamba.num_groups * group_parameters(mamba)
    pattern = PATTERNS[family]
    if family == "mamba":
        return mamba
    if family == "transformer":
        depth = ladder.transformer_depth
        config = dataclasses.replace(mamba, pattern=pattern, depth=depth, mlp_width=1)
        missing = target / depth - group_parameters(config)
        multiple = ladder.mlp_multiple
        hidden = round(missing / (3 * ladder.width) / multiple) * multiple
        return dataclasses.replace(config, mlp_width=hidden)
    length = len(pattern.split(","))
    config = dataclasses.replace(mamba, pattern=pattern, depth=length, ssm_norm=not paper)
    depth = length * round(target / group_parameters(config))
    return dataclasses.replace(config, depth=depth)
