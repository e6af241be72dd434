"""B'MOJO of 1.4 billion parameters on a pod of TPUs, or a cluster of GPUs.

    python -m bmojo_jax.data.tokenize --config configs/lm_1_4b_pod.py --output /shared/tokens \\
        --config.data.source=text --config.data.path=DIR --config.data.tokenizer=tokenizer.json
    python -m bmojo_jax.aot --topology v5e:16x16 --config configs/lm_1_4b_pod.py
    python train.py --distributed --config configs/lm_1_4b_pod.py \\
        --workdir /shared/runs/pod --config.data.path=/shared/tokens

Purpose: pretraining at scale. `:FAMILY` names another family of `bmojo_jax/presets.py` at equal
parameters. 50,000 batches of 2.1 million tokens are 105e9 tokens. Peak rate as in `configs/lm.py`.

Topology and mesh. 256 chips of a v5e (16x16), 64 hosts of 4. Parameters, gradients and optimizer
are cut over 32 devices (mesh.fsdp) and held 8 times (mesh.data=-1: what is left); a batch of 1024
rows of 2048 tokens is cut over all 256, 4 rows each. The same settings fit any number of devices
that 32 divides. For others set mesh.fsdp; pieces of the width (2048) below 64 columns a device are
slow to gather. The second command says, on any machine, whether it fits and what to change if not.
What it said, by libtpu 0.0.48.1 for jax 0.11.2 (`results/tpu`; compiled, not run):

    topology   batch                  memory of a device   step, by estimate    results/tpu
    v5e:16x16  1024 x 2048            12.1 of 16 GiB       0.56 to 0.96 s       bmojo-1_4b-v5e-256
    v5p:4x4x4  1024 x 2048            46.7 of 95 GiB       0.96 to 1.37 s       bmojo-1_4b-v5p-64
    v6e:8x8    256 x 2048             12.4 of 32 GiB       0.23 to 0.40 s       bmojo-1_4b-v6e-64
    v5p:4x4x4  1 x 1,048,576, below   25.8 of 95 GiB       0.64 to 0.97 s       ...-L1048576

Launch. The third command runs on every host at the same time; JAX learns from a TPU pod, SLURM or
Kubernetes who the others are:

    gcloud compute tpus tpu-vm ssh NAME --worker=all --command="cd bmojo && .venv/bin/python ..."
    srun --ntasks-per-node=1 .venv/bin/python train.py --distributed ...        (GPUs, SLURM)
    .venv/bin/python train.py --distributed --coordinator=HOST0:1234 --num_processes=N \\
        --process_id=I ...                                           (anything else, on host I)

The work directory and the data must be one file system for all hosts. Documents are read in
data.shards=64 parts, by as many hosts as divide that.

Resume: the same command, on all hosts. SIGTERM to any of them (preemption) saves within
log_every steps and ends all; when one dies the others end within a minute and say so. Another
mesh, or another number of hosts, continues the same run: parameters are placed anew and shards
shared out anew.

Long rows: mesh.context cuts a row over devices; the last line above is one row of 1,048,576
tokens over 64 chips:

    --config.data.sequence_length=1048576 --config.data.batch_size=1 --config.data.shards=1
    --config.mesh.data=1 --config.mesh.fsdp=1 --config.mesh.context=64

Only the settings and the compiled step are tested: nobody has run it on a pod yet.
"""

import dataclasses

from bmojo_jax import presets
from bmojo_jax.config import DataConfig, MeshConfig, OptimConfig, TrainConfig
from bmojo_jax.settings import to_config_dict
from configs import lm


def get_config(family: str = "bmojo"):
    model = presets.model(family, "1_4b", head_width=128)  # pyrefly: ignore[bad-argument-type]
    return to_config_dict(
        TrainConfig(
            model=dataclasses.replace(model, compute_dtype="bfloat16", remat="dots"),
            optim=OptimConfig(learning_rate=lm.PEAK_RATES["1_4b"], warmup_steps=2000),
            data=DataConfig(
                source="tokens",
                sequence_length=2048,
                batch_size=1024,
                document_start="chunk",
                shards=64,
            ),
            mesh=MeshConfig(data=-1, fsdp=32),
            steps=50_000,
            eval_every=1000,
            eval_batches=8,
            checkpoint_every=500,
            keep_last=3,
        )
    )
