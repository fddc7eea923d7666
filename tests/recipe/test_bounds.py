"""Numbers have two ends; a key that is set twice, equal grid values and too many settings are refused."""

import pytest
from typer.testing import CliRunner

from kdistill.cli.commands import app
from kdistill.data import load
from kdistill.errors import InputError
from kdistill.recipe import Data, Stage, grid
from kdistill.recipe.checks import check_stage
from kdistill.recipe.loading import load_recipe


@pytest.mark.parametrize(
    "setting",
    [
        *("training.epochs=1000000", "teacher_training.batch_size=99999999", "seeds=99999", "seed=99999999999"),
        *("data.shift=5000", "data.image_size=100000", "cache.views=10000000", "data.train_limit=99999999999"),
    ],
)
def test_an_upper_bound_is_said(setting):
    with pytest.raises(InputError, match=r"expects at most [\d,]+, received"):
        load_recipe("mnist", "smoke", [setting])


@pytest.mark.parametrize(
    "setting",
    [
        *("training.learning_rate=1e9", "teacher_training.weight_decay=2", "data.mixup=1e5", "data.cutmix=2000"),
        *("temperature=2e6", "temperature=linear:1:1e7", "training.learning_rate=inf", "temperature=nan"),
        *("teacher.timeout=1e9", "teacher.scale=1e12", "teacher.std=nan", "teacher.mean=1e99", "margin=7"),
    ],
)
def test_numbers_that_are_not_whole_have_two_ends(setting):
    with pytest.raises(InputError, match="expects .*received"):
        load_recipe("mnist", "smoke", ["teacher.file=a.keras"] * setting.startswith("teacher.") + [setting])


@pytest.mark.parametrize(
    "words",
    [
        *("compress a.keras --scheme qat --shift 1001", "compress a.keras --scheme qat --epochs 100001"),
        *("compress a.keras --scheme qat --temperature nan", "compress a.keras --scheme qat --learning-rate inf"),
        *("compress a.keras --scheme prune --sparsity 2", "compress a.keras --scheme cluster --clusters 2"),
        *("compress a.keras --scheme qat --seed 99999999999", "compress a.keras --scheme qat --batch-size 9999999"),
        *("compress a.keras --scheme qat --weight 1.5", "cache prune --days 1e9", "cache prune --days nan"),
        *("cache prune --days -1", "evaluate a.keras --mean nan", "evaluate a.keras --std -1", "plan mnist --share 2"),
        *("evaluate a.keras --std inf", "evaluate a.keras --image-size 0", "evaluate a.keras --image-size 99999"),
        *("export a.keras --max-drop 101", "export a.keras --max-drop nan", "export a.keras --min-agreement inf"),
        *("run mnist --worker-timeout nan", "run mnist --worker-timeout 1e9", "run mnist --margin 101"),
        *(
            "run mnist --together 99999",
            "sweep mnist --together 99999",
            "sweep mnist --seeds 2000",
            "run mnist --seeds 0",
        ),
        *("run mnist --seeds 3..999", "run mnist --teacher-timeout 1e12 --set teacher.file=a.keras"),
    ],
)
def test_options_have_two_ends(words):
    message = call(*words.split())
    assert any(text in message for text in ("Invalid value for", "expects")) and "Traceback" not in message


def test_compressions_in_python_have_two_ends():
    for stage in (Stage("qat", epochs=10**6), Stage("qat", batch_size=1 << 21), Stage("qat", learning_rate=1e9)):
        with pytest.raises(InputError, match="expects at most"):
            check_stage(stage, "stage")


def test_the_limit_is_compared_with_the_data():
    messages = []
    load(Data(train_limit=999_999), say=messages.append)
    assert any("train_limit=999,999 leaves out nothing: there are 10,000 training images" in text for text in messages)


@pytest.mark.parametrize(
    "settings",
    [["seeds=2", "seeds=3"], ["training.epochs=2", "training.epochs=2"], ["temperature=1", "distill.temperature=2"]],
)
def test_a_key_is_set_once(settings):
    with pytest.raises(InputError, match="is set twice"):
        load_recipe("mnist", "smoke", settings)


def call(*words):
    ended = CliRunner().invoke(app, list(words))
    assert ended.exit_code == 2, ended.output
    return " ".join(ended.output.split())


def test_options_that_contradict_each_other():
    assert "'seeds' is set twice" in call("run", "mnist", "--seeds", "2", "--set", "seeds=3")
    assert "'max_seeds' is set twice" in call("run", "mnist", "--seeds", "2", "--set", "max_seeds=9")
    assert "'margin' is set twice" in call("run", "mnist", "--margin", "1", "--set", "margin=0.1")
    assert "'seeds' is set twice" in call("sweep", "mnist", "--seeds", "2", "--set", "seeds=3")
    assert "names npu twice" in call("export", "a.keras", "--profile", "npu", "--profile", "npu")
    assert "different numbers from 1 to" in call("benchmark", "a.tflite", "--threads", "100000")
    assert "different numbers from 1 to" in call("benchmark", "a.tflite", "--threads", "1", "--threads", "1")


def test_grids():
    recipe = load_recipe("mnist", "smoke")
    for values in ("1,1.0", "2,2e0", "0.50,0.5,1"):
        with pytest.raises(InputError, match="a value appears twice"):
            grid.axes(recipe, [f"temperature={values}"])
    for values in ("1,2,...,99999999", "0,1e-9,...,1", "1,1.0001,...,100"):
        with pytest.raises(InputError, match="at most 10,000"):
            grid.axes(recipe, [f"temperature={values}"])
    with pytest.raises(InputError, match="15,000 settings; a sweep has at most 10,000"):
        grid.axes(recipe, ["temperature=1,2,...,150", "distillation_weight=0.001,0.002,...,0.1"])
    assert len(grid.axes(recipe, ["temperature=1,2,...,100"])["distill.temperature"]) == 100


def test_caches(tmp_path):
    folder = tmp_path / ("a" * 16)
    folder.mkdir()
    (folder / "about.json").write_text('{"rows": 1, "part_rows": 1, "classes": 2, "top_k": null}')
    assert "names 0 caches" in call("cache", "prune", "--key", "", "--cache", str(tmp_path))
    assert folder.is_dir()
    assert "holds no teacher cache" in call("cache", "verify", "--cache", str(folder))
    assert "holds no teacher cache" in call("cache", "verify", "--cache", str(tmp_path / "nowhere"))
