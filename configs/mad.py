"""Synthetic tasks of the MAD suite: what a mixer can do with tokens, in a model of two of them.

    python train.py --config configs/mad.py:bmojo,in_context_recall --workdir runs/mad-recall
    python train.py --config configs/mad.py:mamba,noisy_recall --workdir runs/mad-noisy \\
        --config.optim.weight_decay=0
    python eval.py --workdir runs/mad-recall --suite mad

Purpose: comparisons of mixers after arXiv 2403.17844 (athms/mad-lab). The argument is a family
(attention, swa, mamba, hybrid, bmojo_f, bmojo) and a task: in_context_recall, noisy_recall,
fuzzy_recall, selective_copying, memorization (`bmojo_jax/data/tasks/mad.py`).

Recipe, theirs: width 128, [mixer, SwiGLU] twice, AdamW, batch 128, 200 epochs of 12,800 rows,
cosine to 1e-6 (here a share of the peak: 1e-6 for 5e-4), rates 1e-4, 5e-4 and 1e-3, which train at
once, decay 0.1 and again 0; the best counts, by macro-averaged accuracy on 1,280 test rows. Ours:
norms as in all B'MOJO layers, rotary positions in attention, heads of 32, a window of 32, 100 steps
of warm-up, tied embeddings.

Hardware: one accelerator; 20,000 steps of 3 replicas. Not measured yet.
"""

from typing import Any

from bmojo_jax.config import DataConfig, ModelConfig, OptimConfig, TaskConfig, TrainConfig
from bmojo_jax.settings import to_config_dict

PATTERNS = {
    "attention": "attention+mlp",
    "swa": "swa+mlp",
    "mamba": "mamba+mlp",
    "hybrid": "mamba+mlp,swa+mlp",
    "bmojo_f": "bmojo_f+mlp",
    "bmojo": "bmojo+mlp",
}
# Words and tokens of a row.
SIZES = {
    "in_context_recall": (16, 128),
    "noisy_recall": (32, 128),
    "fuzzy_recall": (16, 128),
    "selective_copying": (16, 256),
    "memorization": (256, 32),
}


def get_config(argument: str = "bmojo,in_context_recall"):
    family, _, name = argument.partition(",")
    if family not in PATTERNS or name not in SIZES:
        raise ValueError(
            f"{argument!r}: must be FAMILY,TASK with one of {tuple(PATTERNS)} and one of "
            f"{tuple(SIZES)}"
        )
    words, length = SIZES[name]
    chosen: Any = name
    return to_config_dict(
        TrainConfig(
            model=ModelConfig(
                vocab_size=words,
                width=128,
                depth=2,
                pattern=PATTERNS[family],
                num_heads=4,
                num_kv_heads=4,
                head_width=32,
                window=32,
                eidetic_tokens=32,
                chunk=32,
                mlp_width=256,
            ),
            optim=OptimConfig(warmup_steps=100, final_fraction=0.002),
            data=DataConfig(sequence_length=length, batch_size=128),
            task=TaskConfig(
                name=chosen, vocab_size=words, train_examples=12_800, rates=(1e-4, 5e-4, 1e-3)
            ),
            steps=20_000,
            log_every=100,
            eval_every=1000,
            checkpoint_every=1000,
            keep_last=1,
            keep_best=0,
        )
    )
