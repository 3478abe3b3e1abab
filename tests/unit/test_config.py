"""The configuration says exactly what is wrong and where."""

import tomllib
from pathlib import Path
from typing import get_type_hints

import msgspec
import pytest

import kat_stream.demo
from kat_stream.cli.main import main
from kat_stream.config import Config, check_training, dump, load
from kat_stream.errors import ConfigError
from kat_stream.rl.settings import PenaltyConfig, RatioConfig
from kat_stream.runs import create_run, load_run, reopen_run


def test_a_dumped_configuration_loads_as_itself(tmp_path: Path) -> None:
    odd = r'policy.name="a \" b \\ c \n d \t e \u0000 f \u007f g \u00e9"'
    config = load(None, ["run.steps=7", "data.scaffold=shell", "engine.urls=['http://a', 'http://b']", odd])
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
        ("log.security = 3", "`log.security` is a section, written [log.security]"),
        ("scorer.teachers = [1]", "`scorer.teachers` is a list of sections, written [[scorer.teachers]]"),
        ("[run\n", "not valid TOML"),
        ("run = " + "[" * 2000 + "]" * 2000, "not valid TOML"),
    ],
)
def test_a_mistake_names_file_key_and_the_nearest_valid_one(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trainer.keep_checkpoints=0", "trainer.keep_checkpoints is 0, expected at least 1"),
        ("trainer.keep_checkpoints=-1", "trainer.keep_checkpoints is -1, expected at least 1"),
        ("trainer.checkpoint_every=0", "trainer.checkpoint_every is 0, expected at least 1"),
        ("trainer.keep_weights=0", "trainer.keep_weights is 0, expected at least 1"),
        ("trainer.step_timeout_s=0", "trainer.step_timeout_s is 0, expected more than 0"),
        ("trainer.megatron.tensor_parallel=0", "trainer.megatron.tensor_parallel is 0, expected at least 1"),
        ("sampler.group_size=0", "sampler.group_size is 0, expected at least 1"),
        ("sampler.groups_per_step=0", "sampler.groups_per_step is 0, expected at least 1"),
        ("sampler.staleness=-3", "sampler.staleness is -3, expected at least 0"),
        ("sampler.eval_tasks=0", "sampler.eval_tasks is 0, expected at least 1"),
        ("sampler.rollout_timeout_s=nan", "sampler.rollout_timeout_s is nan, expected more than 0"),
        ("log.dead_letters_share=1.5", "log.dead_letters_share is 1.5, expected at most 1"),
        ("gateway.more=[[0, 0], [0, 70000]]", "gateway.more[1][1] is 70000, expected at most 65535"),
        ("trainer.dual_clip=nan", "trainer.dual_clip is nan, expected a finite number of 64 bits"),
        ("sampler.scaffold.codex=nan", "sampler.scaffold.codex is nan, expected a finite number of 64 bits"),
        (f"sampler.max_turns={1 << 63}", f"sampler.max_turns is {1 << 63}, expected a finite number of 64 bits"),
        ("trainer.learning_rate=inf", "trainer.learning_rate is inf, expected a finite number of 64 bits"),
        ("trainer.learning_rate=-inf", "trainer.learning_rate is -inf, expected at least 0"),
        ("sft.learning_rate=inf", "sft.learning_rate is inf, expected a finite number of 64 bits"),
        ("trainer.clip_high=inf", "trainer.clip_high is inf, expected a finite number of 64 bits"),
        ("log.partitions=1001", "log.partitions is 1001, expected at most 1000"),
    ],
)
def test_a_number_outside_its_range_is_refused_with_key_value_and_bound(override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, [override])
    assert str(caught.value) == f"defaults: {expected}"


def test_every_number_that_is_a_setting_has_a_range_or_any_number_is_meant() -> None:
    """A new setting is not forgotten. The loss's numbers are checked together (kat_stream.rl.settings)."""
    of_the_loss = {field for kind in (RatioConfig, PenaltyConfig) for field in kind.__annotations__}
    of_the_loss |= {"distillation_coefficient", "distillation_clip"}
    free = {
        f"{section}.{field.encode_name}"
        for section, kind in get_type_hints(Config).items()
        for field in msgspec.structs.fields(kind)
        if field.type in (int, float) and field.name not in of_the_loss
    }
    assert free == {"run.seed"}


@pytest.mark.parametrize("name", ["demo", "codex", "mini-swe-agent"])
def test_the_configurations_that_ship_load(name: str) -> None:
    assert load(Path(kat_stream.demo.__path__[0]) / f"{name}.toml").run.steps > 0


@pytest.mark.parametrize(
    "override", ["run.steps=0", "sampler.staleness=0", "sampler.eval_every=0", "scorer.wait_s=0", "metrics.port=0"]
)
def test_nothing_is_a_number_where_it_means_something(override: str) -> None:
    section, name = override.removesuffix("=0").split(".")
    assert getattr(getattr(load(None, [override]), section), name) == 0


def test_a_run_that_trains_samples_at_the_temperature_at_which_the_learner_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Any other would make every ratio wrong and say nothing; `eval` and looking at an old run may have it."""
    hot = load(None, ["sampler.temperature=0.7", f"run.directory='{tmp_path}'", "run.name='r'"])
    with pytest.raises(ConfigError, match=r"sampler\.temperature is 0\.7: .*every ratio would be wrong"):
        create_run(hot)
    assert list(tmp_path.iterdir()) == []
    assert main(["run", "--dry-run", "--set", "sampler.temperature=0.7"]) != 0
    said = capsys.readouterr()
    assert "sampler.temperature is 0.7" in said.err and said.out == ""
    for temperature in (0, 1):
        check_training(load(None, [f"sampler.temperature={temperature}"]))


def test_an_old_run_that_was_sampled_hot_does_not_go_on(tmp_path: Path) -> None:
    _, folder = create_run(load(None, [f"run.directory='{tmp_path}'", "run.name='r'"]))
    settings = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(settings.replace("temperature = 1.0", "temperature = 0.7"))
    assert load_run(folder).sampler.temperature == 0.7
    with pytest.raises(ConfigError, match="a run that trains takes 1"):
        reopen_run(folder)


def test_a_configuration_without_a_name_is_none_that_a_run_has_left(tmp_path: Path) -> None:
    (tmp_path / "config.toml").touch()
    with pytest.raises(ConfigError, match=r"no run\.name"):
        reopen_run(tmp_path)


def test_static_weights_with_several_updates_are_refused() -> None:
    settings = ['trainer.loss="static_weights"', 'trainer.denominator="train"']
    load(None, settings)
    with pytest.raises(ConfigError, match=r"\[trainer\] loss static_weights is exact on-policy"):
        load(None, [*settings, "trainer.updates=2"])


def test_two_teachers_of_one_name_are_refused() -> None:
    """One would be asked under the scores of the other."""
    one = "{name='t', url='http://a', model='m', scores={'d/s'=1.0}}"
    load(None, [f"scorer.teachers=[{one}]"])
    with pytest.raises(ConfigError, match="there are two teachers t"):
        load(None, [f"scorer.teachers=[{one}, {one}]"])


def test_a_store_in_a_folder_is_the_same_wherever_a_service_starts() -> None:
    """A worker started elsewhere would put its values where no other service finds them: dead letters."""
    for url in ("", "file:/blobs", "file:///blobs", "file:~/blobs", "s3://bucket/prefix"):
        assert load(None, [f"blobs.url='{url}'"]).blobs.url == url
    for url in ("file:blobs", "file://blobs", "file:"):
        with pytest.raises(ConfigError, match="expected an absolute path"):
            load(None, [f"blobs.url='{url}'"])


@pytest.mark.parametrize("override", ["steps=3", "run.steps", "run.stepz=3"])
def test_a_bad_override_is_refused(override: str) -> None:
    with pytest.raises(ConfigError):
        load(None, [override])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml: cannot be read"):
        load(tmp_path / "nowhere.toml")
