"""A dataset of TensorFlow Datasets, built of real text on local disk, and a run trained on it."""

import dataclasses
import importlib
import json
import pathlib
import pickle
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds

from bmojo_jax import presets, trainer
from bmojo_jax.config import DataConfig, SourceConfig, from_config_dict
from bmojo_jax.data import sources
from bmojo_jax.data.documents import BadDocument, Source
from tests.runs import records, tiny_run

ROOT = pathlib.Path(__file__).parent.parent.parent


def texts(split):
    """This project's own documentation and code."""
    files = sorted([ROOT / "README.md", *ROOT.glob("bmojo_jax/*.py"), *ROOT.glob("configs/*.py")])
    files = [path for path in files if path.stat().st_size]
    assert len(files) > 20
    return {
        path.relative_to(ROOT).as_posix(): path.read_bytes()
        for i, path in enumerate(files)
        if (i % 5 == 0) == (split == "validation")
    }


class OwnFiles(tfds.core.GeneratorBasedBuilder):
    """Files as TFDS would have them; needs no TensorFlow as long as array_record is written."""

    VERSION = tfds.core.Version("1.2.0")
    BUILDER_CONFIGS = [  # noqa: RUF012  (as TFDS wants it)
        tfds.core.BuilderConfig(name="plain"),
        tfds.core.BuilderConfig(name="with_bad"),
    ]

    def _info(self):
        text = tfds.features.Text()
        features = {"path": text, "body": text, "size": tfds.features.Scalar(np.int64)}
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features | {"words": tfds.features.Sequence(text)}),
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {split: self._generate_examples(split) for split in ("train", "validation")}

    def _generate_examples(self, split):
        bodies = texts(split)
        if self.builder_config.name == "with_bad":
            bodies |= {"bad": b"caf\xe9", "blank": b" \n"}
        for path, body in bodies.items():
            yield path, {"path": path, "body": body, "size": len(body), "words": ["a", path]}


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    for config in ("plain", "with_bad"):
        builder = OwnFiles(data_dir=str(folder), config=config, file_format="array_record")
        builder.download_and_prepare()
    return folder


@pytest.fixture
def data(data_dir):
    return DataConfig(source="tfds", path=str(data_dir), name="own_files/plain", text_field="body")


def opened(data, split="train"):
    source = sources.open_source(data, split)
    assert isinstance(source, Source)
    return source


def documents(source):
    return [source[index] for index in range(len(source))]


def test_documents_are_those_of_the_splits(data):
    for split in ("train", "validation"):
        source = opened(data, split)
        assert sorted(documents(source)) == sorted(texts(split).values())
        assert documents(pickle.loads(pickle.dumps(source))) == documents(source)
    assert opened(data).name(3) == "own_files/plain/1.2.0/train#3"
    exact = dataclasses.replace(data, name="own_files/plain:1.2.0")
    assert documents(opened(exact)) == documents(opened(data))


def test_a_split_may_be_a_part(data):
    whole = documents(opened(data))
    cut = len(whole) // 2
    parts = dataclasses.replace(data, split=f"train[{cut}:]", validation_split=f"train[:{cut}]")
    assert documents(opened(parts, "validation")) == whole[:cut]
    assert documents(opened(parts)) == whole[cut:]


def test_bad_documents_are_named(data):
    data = dataclasses.replace(data, name="own_files/with_bad")
    found = [document for document in documents(opened(data)) if isinstance(document, BadDocument)]
    assert sorted(document.reason for document in found) == ["empty", "not UTF-8"]
    assert all(bad.name.startswith("own_files/with_bad/1.2.0/train#") for bad in found)
    replaced = documents(opened(dataclasses.replace(data, not_utf8="replace")))
    assert "caf\ufffd".encode() in replaced
    assert sum(isinstance(document, BadDocument) for document in replaced) == 1


def test_fingerprint_is_of_the_dataset_and_not_of_its_place(data, data_dir, tmp_path):
    first = opened(data).fingerprint()
    moved = tmp_path / "moved"
    shutil.copytree(data_dir, moved)
    elsewhere = dataclasses.replace(data, path=str(moved))
    assert opened(elsewhere).fingerprint() == first
    others = [
        opened(data, "validation").fingerprint(),
        opened(dataclasses.replace(data, split="train[1:]")).fingerprint(),
        opened(dataclasses.replace(data, text_field="path")).fingerprint(),
        opened(dataclasses.replace(data, name="own_files/with_bad")).fingerprint(),
    ]
    assert len({first, *others}) == 5

    source = opened(elsewhere)  # its files are opened when they are read
    shutil.rmtree(moved)
    assert source[1] == BadDocument("own_files/plain/1.2.0/train#1", "unreadable")


def test_errors_name_the_setting(data, data_dir, tmp_path):
    def refuse(match, **changes):
        with pytest.raises(ValueError, match=match):
            opened(dataclasses.replace(data, **changes))

    refuse(r"data\.name='': must be NAME", name="")
    how = r"tfds\.builder\('{}', file_format='array_record', data_dir='.*'\)\.download_and_prepare"
    for name in ("pg19", "c4/en", "own_files/plain:9.9.9"):
        refuse(rf"data\.name='{name}': must be .* in data\.path=.*" + how.format(name), name=name)
    refuse(r"data\.name='pg19': .* in TFDS's own folder", name="pg19", path="")
    refuse(r"data\.name='own_files/plain': must be a dataset", path=str(tmp_path))
    refuse(r"data\.split='test': must be of \('train', 'validation'\)", split="test")
    refuse(r"data\.split='train\[': must be of", split="train[")
    refuse(r"data\.validation_split='dev': must be of", validation_split="dev")
    refuse(r"data\.split='train': must share no", validation_split="train[:1]")
    refuse(r"data\.text_field='text': must be one of .*'body'", text_field="text")
    for field in ("size", "words"):
        refuse(rf"data\.text_field='{field}': must be a feature of text", text_field=field)
    mixed_in = (SourceConfig(source="tfds", path=data.path, name=data.name, text_field="no"),)
    with pytest.raises(ValueError, match=r"data\.mixed_in\[0\]\.text_field='no': must be one of"):
        sources.open_mixed_in(dataclasses.replace(data, mixed_in=mixed_in))

    shutil.copytree(data_dir, tmp_path / "copy")
    (folder,) = (tmp_path / "copy").glob("own_files/plain/*")
    for path in folder.glob("*-train.*"):
        path.unlink()
    refuse(r"data\.split='train': must be complete; 1 of 1 files", path=str(tmp_path / "copy"))
    info = json.loads((folder / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    (folder / "dataset_info.json").write_text(json.dumps(info))
    refuse(r"must be in the format array_record, .*tfrecord", path=str(tmp_path / "copy"))


@pytest.mark.slow
def test_a_run_is_trained_on_it(data, tmp_path):
    settings = {name: getattr(data, name) for name in ("source", "path", "name", "text_field")}
    config = tiny_run(tmp_path, data=settings, steps=2, eval_every=2, eval_batches=2)
    outcome = trainer.train(config, tmp_path / "run")
    assert outcome.step == 2
    assert [line["step"] for line in records(tmp_path / "run")] == [1, 2]
    assert 4 < records(tmp_path / "run")[0]["loss"] < 7


@pytest.mark.parametrize("name", ["pg19", "c4"])
@pytest.mark.parametrize("size", presets.SIZES)
def test_config_files_say_what_is_not_prepared(name, size, tmp_path):
    made = importlib.import_module(f"configs.{name}").get_config(f"bmojo,{size}")
    made.data.path = str(tmp_path)
    config = from_config_dict(made)
    tokens = config.data.batch_size * config.data.sequence_length
    assert (tokens, config.model.vocab_size) == (131_072, 32_768)
    with pytest.raises(ValueError, match=rf"data\.name='{name}.*download_and_prepare"):
        sources.open_source(config.data, "train")
