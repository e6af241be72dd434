import dataclasses
import json

import pytest
from ml_collections import config_dict

from bmojo_jax import config
from bmojo_jax.config import (
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from bmojo_jax.settings import from_dict, to_config_dict, to_dict


def test_round_trip_through_config_dict_and_json():
    settings = TrainConfig(
        model=ModelConfig(fading_window=7, pattern="mamba, swa+mlp", depth=6),
        data=DataConfig(exclude=("a", "b")),
    )
    assert config.from_config_dict(to_config_dict(settings)) == settings
    text = json.dumps(to_dict(settings))
    assert from_dict(TrainConfig, json.loads(text)) == settings


def test_every_field_can_be_overridden():
    values = to_config_dict(TrainConfig())
    values.model.fading_window = 3  # None before
    values.optim.learning_rate = 0.5
    values.data.exclude = ("x",)
    changed = config.from_config_dict(values)
    assert changed.model.fading_span == 3
    assert changed.optim.learning_rate == 0.5
    assert changed.data.exclude == ("x",)
    with pytest.raises(TypeError):
        values.model.fading_window = "three"
    with pytest.raises((AttributeError, KeyError), match="windw"):
        values.model.windw = 3
    assert isinstance(values, config_dict.ConfigDict)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"windw": 3}}, r"model\.windw is not a setting; did you mean model\.window\?"),
        ({"stepz": 3}, r"stepz is not a setting; did you mean steps\?"),
        ({"model": {"window": 0}}, r"model\.window=0: must be a number >= 1"),
        ({"model": {"window": "3"}}, r"model\.window='3': must be of type int"),
        ({"model": {"qk_norm": 1}}, r"model\.qk_norm=1: must be of type bool"),
        ({"model": {"depth": 5, "pattern": "mamba,swa"}}, r"model\.depth=5: must be a multiple"),
        ({"model": {"pattern": "bmojoo"}}, r"model\.pattern='bmojoo'.*did you mean 'bmojo'"),
        ({"model": {"pattern": "mamba+mpl"}}, r"'mamba\+mpl' must be one of"),
        ({"model": {"pattern": ""}}, r"model\.pattern=''"),
        ({"model": {"num_heads": 6, "num_kv_heads": 4}}, r"num_kv_heads=4: must be a divisor"),
        ({"model": {"head_width": 7}}, r"model\.head_width=7: must be even"),
        ({"model": {"eidetic_tokens": -1}}, r"model\.eidetic_tokens=-1: must be a number >= 0"),
        ({"model": {"fading_window": -2}}, r"model\.fading_window=-2: must be a number >= 0"),
        ({"model": {"eidetic_positions": "slots"}}, r"must be one of \('slot', 'original'"),
        ({"optim": {"learning_rate": 0}}, r"optim\.learning_rate=0\.0: must be > 0"),
        ({"optim": {"beta2": 1.0}}, r"optim\.beta2=1\.0: must be in \[0, 1\)"),
        ({"optim": {"schedule": "cosine"}}, r"optim\.schedule='cosine': must be one of"),
        ({"data": {"validation_fraction": 1.0}}, r"data\.validation_fraction=1\.0"),
        ({"data": {"batch_size": 3}, "optim": {"accumulate": 2}}, r"data\.batch_size=3: .*=2"),
        ({"mesh": {"data": -1, "fsdp": -1}}, r"mesh\.data/fsdp=-1: must be -1 for one axis"),
        ({"mesh": {"tensor": 0}}, r"mesh\.tensor=0: must be -1 or a positive integer"),
        ({"steps": 10}, r"optim\.warmup_steps=100: must be at most steps=10"),
        ({"compare_with": "zlib_and_bigram"}, r"eval_batches=16: must be 0"),
    ],
)
@pytest.mark.usefixtures("annotations_off")
def test_errors_name_field_value_and_what_would_be_valid(values, message):
    with pytest.raises(ValueError, match=message):
        from_dict(TrainConfig, values)


def test_defaults_are_valid_and_frozen():
    settings = TrainConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.steps = 3
    assert settings.mesh == MeshConfig() and settings.optim == OptimConfig()


def test_pattern():
    model = ModelConfig(pattern="mamba, bmojo+mlp", depth=8)
    assert [(block.mixer, block.mlp) for block in model.blocks] == [
        ("mamba", False),
        ("bmojo", True),
    ]
    assert model.num_groups == 4
    assert model.dt_rank == 16 and model.ssm_inner == 512
