"""How the five families use a longer context than they were trained on: 30m models on novels.

    python -m bmojo_jax.data.train_tokenizer --path BOOKS --include '**/train/*' \\
        --validation_include '**/validation/*' --vocab_size 8192 --output books-8k.json
    python train.py --config configs/length_generalisation.py:bmojo --workdir runs/bmojo \\
        --config.data.path=BOOKS --config.data.tokenizer=books-8k.json
    python eval.py --workdir runs/bmojo --suite perplexity --data_path BOOKS \\
        --include '**/test/*' --anchors 2 \\
        --contexts 256,512,1024,2048,4096,8192,16384,32768

Purpose: perplexity of held-out books by context length, 256 to 32,768 tokens, after training on
rows of 2,048; all families (`:transformer`, `:mamba`, `:hybrid`, `:bmojo_f`, `:bmojo`) at the same
number of parameters (3 %), tokens, batches and learning rate. BOOKS is a folder or archive with
long documents in `train/`, `validation/` and `test/`.

Hardware: one H100 of 80 GB. 9.8 M tokens are what B'MOJO reads in four minutes through XLA's scan:
far too few for a good model, enough to see what a longer context does to each. Training takes 4.5
minutes (bmojo) to 1 (transformer), the evaluation about one; what came of it:
`results/length_generalisation`.
"""

import dataclasses

from bmojo_jax import presets
from bmojo_jax.config import DataConfig, OptimConfig, TrainConfig
from bmojo_jax.settings import to_config_dict


def get_config(family: presets.Family = "bmojo"):
    return to_config_dict(
        TrainConfig(
            model=dataclasses.replace(
                presets.model(family, "30m", vocab_size=8192), compute_dtype="bfloat16"
            ),
            optim=OptimConfig(learning_rate=2e-3, warmup_steps=50),
            data=DataConfig(
                include="**/train/*",
                validation_include="**/validation/*",
                sequence_length=2048,
                batch_size=16,
            ),
            steps=300,
            eval_every=300,
            eval_batches=8,
            checkpoint_every=150,
            keep_best=0,
        )
    )
