"""What a run prints when it has ended: a sample, and its loss beside what needs no model."""

import dataclasses
import json
import pathlib

import jax

from bmojo_jax import generate
from bmojo_jax.config import TrainConfig
from bmojo_jax.data import baselines, sources, tokenizers
from bmojo_jax.trainer import Outcome

_SAMPLING = generate.Sampling(temperature=0.8, top_p=0.95)


def report(config: TrainConfig, outcome: Outcome, workdir: pathlib.Path) -> None:
    """Prints the sample and the closing line, and writes both below `workdir`.

    Of several processes the first one does, without a sample: the parameters may be spread over
    all of them, and too large for one.
    """
    if jax.process_index():
        return
    if outcome.interrupted:
        print(f"stopped after step {outcome.step}; the same command continues from there")
        return
    if config.sample_tokens and jax.process_count() > 1:
        print(f"no sample of several processes: python -m bmojo_jax.generate --workdir {workdir}")
    elif config.sample_tokens:
        tokenizer = outcome.tokenizer
        prompt = [tokenizer.boundary_id, *tokenizer.encode(config.sample_prompt).tolist()]
        (ids,) = generate.generate(
            config.model,
            outcome.params,
            [prompt],
            max_tokens=config.sample_tokens,
            sampling=dataclasses.replace(_SAMPLING, num_words=tokenizer.vocab_size),
            stop_ids=[tokenizer.boundary_id],
        )
        decoder = tokenizers.StreamingDecoder(tokenizer)
        decoder.push(prompt)  # what follows continues a text
        sample = config.sample_prompt + decoder.push(ids) + decoder.finish()
        (workdir / "sample.txt").write_text(sample, encoding="utf-8")
        print(f"\n--- a sample, {len(ids)} tokens ---\n{sample}\n---\n")
    if outcome.validation is None:
        return
    result = {"step": outcome.step, **outcome.validation.metrics()}
    line = f"validation: {outcome.validation.bits_per_byte:.3f} bits per byte"
    if config.compare_with == "zlib_and_bigram":
        documents = sources.read_split(config.data, "validation")
        result["zlib_bits_per_byte"] = baselines.zlib_bits_per_byte(documents)
        result["bigram_bits_per_byte"] = baselines.bigram_bits_per_byte(
            sources.read_split(config.data, "train"), documents
        )
        size = sum(len(document) for document in documents)
        line += (
            f" (zlib -9: {result['zlib_bits_per_byte']:.3f}, "
            f"byte bigram: {result['bigram_bits_per_byte']:.3f}), on the same {size:,} held-out "
            "bytes"
        )
        if size != outcome.validation.num_bytes:  # see tokenizers.py
            line += f" ({outcome.validation.num_bytes:,.0f} as the tokenizer writes them)"
    (workdir / "validation.json").write_text(json.dumps(result, indent=2) + "\n")
    print(line)
