"""The networks of `--model`: width, depth, and classes of one's own."""

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbn import models
from jbn.linen import BatchNorm
from jbn.training.config import Config, parse_config
from jbn.training.errors import UsageError
from jbn.training.networks import check_own, make_model


def network(image_shape: tuple[int, ...] = (32, 32, 3), **flags: Any) -> Any:
    return make_model(Config(**flags), 10, image_shape, BatchNorm)


def test_defaults_are_those_of_the_models():
    options: dict[str, Any] = {"num_classes": 10, "norm": BatchNorm}
    small = {**options, "stem": "small"}
    for name, expected in {
        "mlp": models.MLP(**options),
        "resnet8": models.resnet8(**options),
        "resnet18": models.resnet18(**small),
        "resnet50": models.resnet50(**small),
        "unet": models.UNet(**options),
    }.items():
        assert network(model=name) == expected


@pytest.mark.parametrize("model", ["resnet18", "resnet50"])
def test_the_stem_follows_the_images(model: str):
    assert network((224, 224, 3), model=model).stem == "imagenet"
    assert network((96, 95, 3), model=model).stem == "small"
    # Whatever the flag was that made them so large.
    assert network((96, 96, 3), model=model, image_size=32).stem == "imagenet"


def test_width_and_depth():
    assert network(model="mlp", width=8, depth=3).features == (8, 8, 8)
    assert network(model="unet", width=4, depth=2).widths == (4, 8)
    assert network(model="resnet8", depth=20) == models.resnet20(norm=BatchNorm)
    resnet34 = network(model="resnet18", depth=34, width=16)
    assert (resnet34.stage_sizes, resnet34.widths) == ((3, 4, 6, 3), (16, 32, 64, 128))
    assert sum(network(model="resnet50", depth=101).stage_sizes) * 3 + 2 == 101
    assert sum(network(model="resnet50", depth=152).stage_sizes) * 3 + 2 == 152
    for model, depth, match in (
        ("resnet8", 18, "8, 14, 20 or another 6n"),
        ("resnet18", 50, "resnet18 has a depth of 18 or 34"),
        ("resnet50", 18, "resnet50 has a depth of 50 or 101 or 152"),
    ):
        with pytest.raises(UsageError, match=match):
            network(model=model, depth=depth)


OWN = """
import flax.linen as nn
from typing import Any

class Net(nn.Module):
    num_classes: int
    norm: Any
    width: int = 4

    @nn.compact
    def __call__(self, x, *, train, mask=None):
        x = nn.Dense(self.width)(x.reshape(x.shape[0], -1) / 255.0)
        return nn.Dense(self.num_classes)(self.norm()(x, use_running_average=not train))

class Wide(Net):
    def __call__(self, x, *, train, mask=None):
        return x.reshape(2, -1)

class Maskless(Net):
    def __call__(self, x, *, train):
        return x.reshape(2, -1)[:, :3]

class Raises(Net):
    def __call__(self, x, *, train, mask=None):
        raise RuntimeError("in two\\nlines")

class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x

def make(**options):
    return Net(**options)

def fails(num_classes, norm):
    raise RuntimeError("in two\\nlines")

number = 3
other = lambda num_classes, norm: 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_networks.py").write_text(OWN)
    (tmp_path / "own_broken.py").write_text("import nonesuch")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


@pytest.mark.usefixtures("own", "standard_promotion")
@pytest.mark.parametrize("name", ["Net", "make"])
def test_a_class_of_ones_own(name: str):
    config = parse_config([f"--model=own_networks:{name}", "--width=6"])
    model: Any = make_model(config, 3, (4, 4, 1), BatchNorm)
    x = jnp.zeros((2, 4, 4, 1), jnp.uint8)
    logits, variables = model.init_with_output(jax.random.key(0), x, train=False)
    assert np.shape(logits) == (2, 3)
    assert variables["params"]["Dense_0"]["kernel"].shape == (16, 6)


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "flags", "match"),
    [
        ("nonesuch:Net", (), r"nonesuch cannot be imported \(ModuleNotFoundError: No"),
        ("own_broken:Net", (), "own_broken cannot be imported"),
        ("own_networks:Nut", (), "own_networks has no class Nut"),
        ("own_networks:number", (), "own_networks has no class number"),
        ("own_networks:other", (), "makes a int, not a Linen module"),
        ("own_networks:Plain", (), "must take `num_classes`"),
        ("own_networks:fails", (), r"cannot be made \(RuntimeError: in two lines\)"),
        ("own_networks:Net", ("--depth=3",), "must take `depth`, for --depth"),
        ("own_networks:Net", ("--precision=bf16",), "must take `dtype`, for --prec"),
        ("own_networks:Net", ("--dropout=.5",), "must take `dropout`, for --dropout"),
    ],
)
def test_classes_that_do_not_fit(name: str, flags: tuple[str, ...], match: str):
    config = parse_config([f"--model={name}", *flags])
    with pytest.raises(UsageError, match=match):
        make_model(config, 3, (4, 4, 1), BatchNorm)


@pytest.mark.usefixtures("own", "standard_promotion")
@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("Net", None),
        ("Wide", r"returns \(2, 16\) for images of shape \(2, 4, 4, 1\): .*\(2, 3\)"),
        ("Maskless", r"with train=True \(TypeError: .*unexpected .* 'mask'"),
        ("Raises", r"\(RuntimeError: in two lines, in \S*own_networks.py:\d+\)\.$"),
    ],
)
def test_outputs_are_checked(name: str, match: str | None):
    path = f"own_networks:{name}"
    model = make_model(parse_config([f"--model={path}"]), 3, (4, 4, 1), BatchNorm)
    if match is None:
        check_own(path, model, 3, (4, 4, 1))
        return
    with pytest.raises(UsageError, match=match) as raised:
        check_own(path, model, 3, (4, 4, 1))
    assert "\n" not in str(raised.value)
