"""Multi-query associative recall (MQAR): which memory recalls what has left the window.

    python train.py --config configs/mqar.py:bmojo --workdir runs/mqar-bmojo
    python train.py --config configs/mqar.py:mamba,width=128,pairs=64,filler=zero \\
        --config.task.seeds=3 --workdir runs/mqar-mamba
    python eval.py --workdir runs/mqar-bmojo --suite mqar --lengths 256,512
    python -m benchmarks.mqar --out results/mqar runs/mqar-*

Purpose: the central experiment of B'MOJO (arXiv 2407.06324): rows of 256 tokens, a window of 32,
two mixers without MLP. A row shows k pairs of a key and a value, then asks for every value by its
key (`bmojo_jax/data/tasks/mqar.py`). Rows with 8, 16, 32 and 64 pairs take turns, and each number
is tested by itself too; at 64, and only there, all answers but 2 % lie beyond two windows. The
argument after the colon is a family and, after commas, any of

    width=64|128  pairs=K or K1/K2/..., rows in turn  tokens=M (bmojo)  filler=random|zero  small

Families: attention (full), swa, mamba, hybrid (mamba, swa), bmojo_f, bmojo. All have the same norms
where they apply (`ssm_norm`, `qk_norm`, `fading_norm`), rotary positions in attention and nowhere
else, heads of 64 and tied embeddings.

Recipe, after others (HazyResearch/zoology): AdamW with decay 0.1, cosine to zero, batch 256, the
best of six learning rates, which train at once. Ours: 10 % warm-up, clipping at 1, and 4,000 steps,
a million rows, each of them new (others: 3 to 11 million, seen many times); bfloat16. In a first
sweep from 5e-4 to 1.6e-2 (`results/mqar`) everything with a state learned nothing below 8e-3 and
most at 1.6e-2, attention from 2e-3 on: so rates go from 4e-3 to 3.2e-2, the same for all.

Hardware: one accelerator; if the replicas (rates x seeds) do not fit, `task.replicas_at_once`. Six
replicas of width 64 take 8 GiB and, alone on an H100, some 45 ms a step (bmojo).

    python train.py --config configs/mqar.py:attention,small --workdir runs/mqar-small
    python train.py --config configs/mqar.py:swa,small --workdir runs/mqar-small-swa

`small` is for a CPU: 4 pairs in rows of 16 tokens, 32 words, zero filler, a window of 2. Full
attention recalls them all; two windows reach 2 tokens back and guess. On 2 CPU cores attention and
swa take 43 s together. All 12 replicas of 4 rates and 3 seeds had 100 % after 2,000 steps, taking
off between steps 250 and 1,750; swa 6 %. `qk_norm` is off here: with it, attention still guessed
among the row's values after 1,500 steps, at both rates tried.
"""

import dataclasses
from typing import Any, Literal

from bmojo_jax.config import DataConfig, ModelConfig, OptimConfig, TaskConfig, TrainConfig
from bmojo_jax.settings import to_config_dict

PATTERNS = {
    "attention": "attention",
    "swa": "swa",
    "mamba": "mamba",
    "hybrid": "mamba,swa",
    "bmojo_f": "bmojo_f",
    "bmojo": "bmojo",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What follows the family."""

    width: int = 64
    pairs: tuple[int, ...] = (8, 16, 32, 64)
    tokens: int = 64
    filler: Literal["random", "zero"] = "random"


def parse(texts: list[str]) -> Options:
    values: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name == "filler":
            values[name] = value
            continue
        numbers = value.split("/")
        single = len(numbers) == 1 or name == "pairs"
        if (
            name not in ("width", "pairs", "tokens")
            or not single
            or not all(number.isdecimal() for number in numbers)
        ):
            raise ValueError(
                f"{text!r}: must be width=D, pairs=K (or K1/K2/...), tokens=M, filler=random, "
                'filler=zero or, alone, "small"'
            )
        values[name] = tuple(map(int, numbers)) if name == "pairs" else int(value)
    return Options(**values)


def small(family: str) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(
            vocab_size=32,
            width=32,
            depth=2,
            pattern=PATTERNS[family],
            num_heads=1,
            num_kv_heads=1,
            head_width=32,
            window=2,
            eidetic_tokens=8,
            chunk=2,
            rope_theta=10.0,
            qk_norm=False,
            ssm_state=8,
        ),
        optim=OptimConfig(schedule="warmup_stable_decay", warmup_steps=50, final_fraction=0.0),
        data=DataConfig(sequence_length=16, batch_size=64),
        task=TaskConfig(
            name="mqar",
            vocab_size=32,
            pairs=(4,),
            filler="zero",
            test_examples=256,
            rates=(0.003, 0.005, 0.007, 0.01),
        ),
        steps=2000,
        log_every=50,
        eval_every=250,
        checkpoint_every=500,
    )


def get_config(argument: str = "bmojo"):
    family, *rest = argument.split(",")
    if family not in PATTERNS:
        raise ValueError(f"{family=}: must be one of {tuple(PATTERNS)}")
    if rest == ["small"]:
        return to_config_dict(small(family))
    options = parse(rest)
    width = options.width
    return to_config_dict(
        TrainConfig(
            model=ModelConfig(
                vocab_size=8192,
                width=width,
                depth=2,
                pattern=PATTERNS[family],
                num_heads=max(width // 64, 1),
                num_kv_heads=max(width // 64, 1),
                head_width=64,
                window=32,
                eidetic_tokens=options.tokens,
                chunk=32,
                compute_dtype="bfloat16",
            ),
            optim=OptimConfig(warmup_steps=400, final_fraction=0.0),
            data=DataConfig(sequence_length=256, batch_size=256),
            task=TaskConfig(
                name="mqar",
                vocab_size=8192,
                pairs=options.pairs,
                filler=options.filler,
                rates=(0.004, 0.008, 0.012, 0.016, 0.024, 0.032),
            ),
            steps=4000,
            log_every=20,
            eval_every=400,
            checkpoint_every=400,
            keep_last=1,
            keep_best=0,
        )
    )
