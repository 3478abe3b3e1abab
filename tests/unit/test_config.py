"""The configuration says exactly what is wrong and where."""

import tomllib
from pathlib import Path

import msgspec
import pytest

from kat_stream.config import Config, dump, load
from kat_stream.errors import ConfigError


def test_a_dumped_configuration_loads_as_itself(tmp_path: Path) -> None:
    config = load(None, ["run.steps=7", "data.scaffold=shell", "engine.urls=['http://a', 'http://b']"])
    path = tmp_path / "config.toml"
    path.write_text(dump(config))
    assert load(path) == config
    assert msgspec.convert(tomllib.loads(dump(config)), Config) == config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[run]\nstepz = 3", "unknown key `run.stepz`; did you mean `run.steps`?"),
        ("[trainr]\nlevel = 'turn'", "unknown key `trainr`; did you mean `trainer`?"),
        ("[run]\nsteps = 'many'", "`run.steps`: expected `int`, got `str`"),
        ("run = 3", "`run` is a section"),
        ("[run\n", "not valid TOML"),
    ],
)
def test_a_mistake_names_file_key_and_the_nearest_valid_one(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert expected in str(caught.value)


@pytest.mark.parametrize("override", ["steps=3", "run.steps", "run.stepz=3"])
def test_a_bad_override_is_refused(override: str) -> None:
    with pytest.raises(ConfigError):
        load(None, [override])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml: cannot be read"):
        load(tmp_path / "nowhere.toml")
