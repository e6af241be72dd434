"""The suites of needles and of the phonebook."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from bmojo_jax import evaluate, model
from bmojo_jax.checkpoint import Trained
from bmojo_jax.data.tasks.prompts import count
from bmojo_jax.data.tokenizers import ByteTokenizer
from bmojo_jax.evaluate import answers, needles, phonebook
from bmojo_jax.evaluate.scoring import Score
from tests.runs import tiny_run, write_documents

KNOWN = 700  # tokens, up to which the oracle knows the answer


def trained_on(folder, pattern="bmojo"):
    write_documents(folder)
    config = tiny_run(folder, model={"pattern": pattern}, data={"sequence_length": 600})
    return Trained(config, model.init_params(config.model, jax.random.key(0)), 6, ByteTokenizer())


@pytest.fixture
def oracle(monkeypatch):
    """Knows the answers to short prompts, and half of the digits of others; counts prompts."""
    asked = []

    def answer(trained, prompts, *, description):
        found = []
        for prompt in prompts:
            size = len(prompt.answer.encode())
            known = count(trained.tokenizer, prompt.text) <= KNOWN
            greedy_L = np.arange(size) < (size if known else size // 2)
            text = prompt.text[len(prompt.question) :] if known else "0000"
            score = Score(np.where(greedy_L, -0.1, -3.0), greedy_L)
            found.append(answers.Answer(text, score, answers.found_share(prompt.references, text)))
        asked.append((description, prompts))
        return found

    monkeypatch.setattr(answers, "answers", answer)
    return asked


def written(result, folder):
    evaluate.write(result, folder)
    name = result["suite"]
    assert json.loads((folder / f"{name}.json").read_text()) == json.loads(json.dumps(result))
    assert (folder / f"{name}.png").stat().st_size > 5000
    return evaluate.table(result)


def test_needles_by_length_variant_and_depth(oracle, tmp_path):
    trained = trained_on(tmp_path / "documents")
    result = needles.run(
        trained, lengths=(1400, 650), items=12, variants="single_1,single_2,multiquery"
    )
    rows = result["by_length"]
    assert [(row["variant"], row["length"]) for row in rows] == [
        *(("single_1", 650), ("single_2", 650)),
        *(("single_1", 1400), ("single_2", 1400), ("multiquery", 1400)),
    ]
    assert [(row["variant"], row["length"]) for row in result["too_short"]] == [("multiquery", 650)]
    for row in rows:
        known = row["length"] == 650
        assert row["items"] == 12
        assert row["generated"] == row["exact"] == (1.0 if known else 0.0)
        assert row["accuracy"] == pytest.approx(1.0 if known else 0.5, abs=0.02)
        assert row["nats"] == pytest.approx(0.1 if known else 1.55, abs=0.05)
        low, high = row["exact_interval"]
        assert low <= row["exact"] <= high and 0.15 < high - low < 0.35
    # Essays are held-out documents: words of the run's own.
    for description, prompts in oracle:
        assert len(prompts) == 12
        assert ("surprises" in "".join(p.prompt for p in prompts)) == (
            "single_1" not in description
        )
    depths = result["by_depth"]
    assert sum(row["items"] for row in depths if row["length"] == 650) == 24
    assert all(row["last"] - row["first"] == pytest.approx(0.2) for row in depths)
    assert {row["exact"] for row in depths if row["length"] == 1400} == {0.0}
    text = written(result, tmp_path / "eval")
    assert "multiquery at 650" in text and "needles" in text.splitlines()[0]
    assert sum("100.0%" in line for line in text.splitlines()) == 2 + sum(
        row["length"] == 650 for row in depths
    )


def test_default_lengths_and_what_is_refused(oracle, tmp_path):
    trained = trained_on(tmp_path / "documents")
    result = needles.run(trained, items=1, variants="single_1")
    assert [row["length"] for row in result["too_short"]] == [300]
    assert [row["length"] for row in result["by_length"]] == [600, 1200, 2400, 4800]
    assert len({prompts[0].references for _, prompts in oracle}) == 1  # the same at every length
    with pytest.raises(ValueError, match=r"lengths=\(50, 60\): must be longer; .*at least"):
        needles.run(trained, lengths=(50, 60), variants="single_1")
    with pytest.raises(ValueError, match="items=0"):
        needles.run(trained, items=0)
    with pytest.raises(ValueError, match=r"--variants='single': 'single' must be one of"):
        needles.run(trained, variants="single")
    with pytest.raises(ValueError, match=r"lengths=\(0,\)"):
        phonebook.run(trained, lengths=(0,))


def test_a_run_on_needles_hides_them_in_its_essays(oracle, tmp_path):
    trained = trained_on(tmp_path / "documents")
    for path in (trained.config.data.path, ""):
        data = dataclasses.replace(trained.config.data, source="needles", path=path)
        config = dataclasses.replace(trained.config, data=data)
        needles.run(
            dataclasses.replace(trained, config=config),
            lengths=(1200,),
            items=3,
            variants="single_2",
        )
        for prompt in oracle[-1][1]:
            assert prompt.question.count("special magic number") == 4  # one is hidden
            assert ("The grass is green." in prompt.question) == (not path)


def test_phonebook_by_length(oracle, tmp_path):
    result = phonebook.run(trained_on(tmp_path / "documents"), lengths=(2000, 500), items=7)
    rows = result["by_length"]
    assert [row["length"] for row in rows] == [500, 2000]
    assert [row["generated"] for row in rows] == [1.0, 0.0]
    assert [row["items"] for row in rows] == [7, 7]
    assert 12 < rows[0]["lines"] < 20 and 65 < rows[1]["lines"] < 85
    text = written(result, tmp_path / "eval")
    assert f"{rows[1]['lines']:.1f}" in text and "100.0%" in text
    some = phonebook.run(trained_on(tmp_path / "documents"), lengths=(60, 500), items=2)
    assert [row["length"] for row in some["by_length"]] == [500]
    assert "left out, since a book does not fit: 60" in evaluate.table(some)
    with pytest.raises(ValueError, match=r"lengths=\(60,\): must be longer; .*at least"):
        phonebook.run(trained_on(tmp_path / "documents"), lengths=(60,), items=2)


@pytest.mark.slow
def test_suites_with_a_model(tmp_path):
    """An untrained model finds nothing and is about as surprised as by bytes drawn at random."""
    trained = trained_on(tmp_path / "documents", pattern="mamba")
    results = [
        needles.run(trained, lengths=(450, 600), items=3, variants="single_1,multikey_2"),
        phonebook.run(trained, lengths=(300,), items=3),
    ]
    for result in results:
        for row in result["by_length"]:
            assert row["generated"] == row["exact"] == 0
            assert row["nats"] == pytest.approx(np.log(257), rel=0.2)
            low, high = row["nats_interval"]
            assert low <= row["nats"] <= high
        written(result, tmp_path / "eval")
