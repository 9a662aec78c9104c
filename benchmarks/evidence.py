"""What the scripts beside this one share: data, the norms of all libraries, reports.

A norm is called the same way whatever library it comes from, so that model, optimizer
and data are one code, and the norm alone differs.
"""

import datetime
import functools
import gzip
import importlib.metadata
import io
import itertools
import json
import os
import platform
import sys
import time
import warnings
from pathlib import Path
from typing import Any


os.environ.setdefault("KERAS_BACKEND", "jax")

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import scipy.stats
from PIL import Image
from tables import dumped, table as table

import jbn
from jbn.training.data import load_dataset


mpl.use("Agg")
DOCS = Path(__file__).parents[1] / "docs"
EVIDENCE, BENCHMARKS = DOCS / "evidence", DOCS / "benchmarks"
# Okabe and Ito (2008): eight colors that color-blind people tell apart.
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE = (
    "#000000 #E69F00 #56B4E9 #009E73 #F0E442 #0072B2 #D55E00 #CC79A7".split()
)
COLORS = {
    "jbn": BLUE,
    "jbn, trim=5": SKY,
    "jbn, float64": SKY,
    "flax.linen": ORANGE,
    "Haiku": GREEN,
    "Equinox": PURPLE,
    "Keras": RED,
    "PyTorch": BLACK,
}
STARTED = time.perf_counter()


def digits():
    """Images (n, 8, 8) from 0 to 1 and labels, for training and test."""
    data = load_dataset("digits")
    return tuple(
        (split.image[..., 0].astype(np.float32) / 255, split.label)
        for split in (data.train, data.test)
    )


def load_idx(folder, name):
    """An array of MNIST's files."""
    path = next(Path(folder).glob(f"{name}*"))
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rb") as file:
        content = file.read()
    rank = content[3]
    shape = np.frombuffer(content, ">i4", rank, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def load_images(path, split, number=None):
    """So many images of an archive of JPEGs, in random order, and their labels.

    At random, since classes may take turns in the archive.
    """
    with np.load(path) as archive:
        jpeg, offsets = archive[f"{split}_jpeg"], archive[f"{split}_offsets"]
        labels = archive[f"{split}_labels"].astype(np.int32)
    index = np.random.default_rng(0).permutation(len(labels))[:number]
    read = lambda i: Image.open(io.BytesIO(jpeg[offsets[i] : offsets[i + 1]].tobytes()))
    images = [np.asarray(read(i).convert("RGB")) for i in index]
    return np.float32(np.stack(images)) / 255, labels[index]


def load(path):
    """The name of a data set; training and test images, from 0 to 1, and labels."""
    if path is None:
        return "digits", *((x[..., None], y) for x, y in digits())
    if Path(path).is_dir():
        read = functools.partial(load_idx, path)
        train, test = (
            (np.float32(read(f"{split}-images"))[..., None] / 255, read(f"{split}-lab"))
            for split in ("train", "t10k")
        )
        return Path(path).name, train, test
    splits = (load_images(path, split) for split in ("train", "test"))
    return Path(path).stem.split("_")[0], *splits


def held_out(images, labels, number):
    """Splits a training set at random: all but `number` examples, and the others."""
    index = np.random.default_rng(0).permutation(len(labels))
    cut = lambda i: (images[i], labels[i].astype(np.int32))
    return cut(index[number:]), cut(index[:number])


def points(images):
    """The inked pixels of each image, as rows of (row, column, ink)."""
    found = []
    for image in images:
        r, c = np.nonzero(image)
        found.append(np.stack([r, c, image[r, c]], 1).astype(np.float64))
    return found


def draw_dots(panel, names, values_of, methods):
    """Accuracies in percent, a row for each name, as dots with the range of the seeds.

    `values_of(name, method)` has one share for each seed; `methods` a color and a
    marker for each method.
    """
    names = names[::-1]
    for i, (method, (color, marker)) in enumerate(methods.items()):
        values = 100 * np.array([values_of(name, method) for name in names])
        middle = values.mean(1)
        panel.errorbar(
            middle,
            np.arange(len(names)) + 0.27 - 0.18 * i,
            xerr=[middle - values.min(1), values.max(1) - middle],
            fmt=marker,
            markersize=6,
            color=color,
            label=method,
        )
    panel.set_yticks(np.arange(len(names)), names)
    panel.set(xlabel="accuracy (%), mean of three severities", xlim=(0, 102))
    panel.grid(axis="y", visible=False)


# ---- Networks ----------------------------------------------------------------------


class ConvNet(nn.Module):
    """Patches of 4x4 pixels, two 3x3 convolutions, a mean.

    The convolutions are matrix products of shifted images: on a CPU these are some
    twenty times faster than XLA's convolutions.
    """

    num_classes: int
    norm: Any

    @nn.compact
    def __call__(self, x, train):
        """Returns logits."""

        def layer(x, width):
            x = nn.Dense(width, use_bias=False)(x)
            return nn.relu(self.norm()(x, use_running_average=not train))

        def near(x):
            h, w = x.shape[1:3]
            x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            shifts = itertools.product(range(3), repeat=2)
            return jnp.concatenate([x[:, i : i + h, j : j + w] for i, j in shifts], -1)

        n, h, w, c = x.shape
        x = (x - 0.5).reshape(n, h // 4, 4, w // 4, 4, c).swapaxes(2, 3)
        x = layer(x.reshape(n, h // 4, w // 4, 16 * c), 16)
        x = nn.avg_pool(layer(near(x), 16), (2, 2), (2, 2))
        return nn.Dense(self.num_classes)(layer(near(x), 32).mean((1, 2)))


# ---- Norms -------------------------------------------------------------------------


class Jbn:
    """`jbn.batch_norm`; `options` are passed on to it."""

    name, has_mask, has_axis_name = "jbn", True, True

    def __init__(self, momentum, **options):
        self.options = dict(momentum=momentum, **options)

    def init(self, features, dtype):
        """Makes parameters and state of a layer."""
        params, stats = jbn.init(features, param_dtype=dtype)
        return params, jax.tree.map(lambda v: v.astype(dtype), stats)

    def apply(self, params, state, x, *, train, mask=None, axis_name=None):
        """The output and the new state; `mask` has the shape of `x`, less features."""
        return jbn.batch_norm(
            x,
            params,
            state,
            use_running_average=not train,
            mask=None if mask is None else mask[..., None],
            axis_name=axis_name if train else None,
            **self.options,
        )

    def stats(self, state):
        """The mean and variance that inference uses."""
        return state.mean, state.var


class FlaxLinen:
    """`flax.linen.BatchNorm`."""

    name, has_mask, has_axis_name = "flax.linen", True, True

    def __init__(self, momentum):
        import flax.linen as nn

        self.layer, self.momentum = nn.BatchNorm, momentum

    def init(self, features, dtype):
        """As above."""
        layer = self.layer(use_running_average=True, param_dtype=dtype)
        variables = layer.init(jax.random.key(0), jnp.zeros((1, features), dtype))
        state = jax.tree.map(lambda v: v.astype(dtype), variables["batch_stats"])
        return variables["params"], state

    def apply(self, params, state, x, *, train, mask=None, axis_name=None):
        """As above."""
        layer = self.layer(
            use_running_average=not train,
            momentum=self.momentum,
            axis_name=axis_name if train else None,
        )
        y, updated = layer.apply(
            {"params": params, "batch_stats": state},
            x,
            mask=None if mask is None else mask[..., None],
            mutable=["batch_stats"],
        )
        return y, updated["batch_stats"]

    def stats(self, state):
        """As above."""
        return state["mean"], state["var"]


class Haiku:
    """`haiku.BatchNorm`, which takes no mask."""

    name, has_mask, has_axis_name = "Haiku", False, True

    def __init__(self, momentum):
        import haiku as hk

        self.hk, self.momentum = hk, momentum

    def layer(self, axis_name):
        """The transformed layer."""
        return self.hk.without_apply_rng(
            self.hk.transform_with_state(
                lambda x, train: self.hk.BatchNorm(
                    True, True, self.momentum, cross_replica_axis=axis_name
                )(x, train)
            )
        )

    def init(self, features, dtype):
        """As above."""
        rows = jnp.zeros((1, features), dtype)
        return self.layer(None).init(jax.random.key(0), rows, True)

    def apply(self, params, state, x, *, train, mask=None, axis_name=None):
        """As above."""
        layer = self.layer(axis_name if train else None)
        # Its parameters have the rank of what it sees first: rows.
        y, new = layer.apply(params, state, x.reshape(-1, x.shape[-1]), train)
        return y.reshape(x.shape), new if train else state

    def stats(self, state):
        """As above."""
        average = lambda name: state[f"batch_norm/~/{name}_ema"]["average"].ravel()
        return average("mean"), average("var")


class Equinox:
    """`equinox.nn.BatchNorm(mode="batch")`, which takes no mask."""

    name, has_mask, has_axis_name = "Equinox", False, True

    def __init__(self, momentum):
        import equinox

        self.eqx, self.momentum = equinox, momentum

    def layer(self, features, dtype, axis_name=None):
        """The layer and its state."""
        names = "rows" if axis_name is None else ("rows", axis_name)
        return self.eqx.nn.make_with_state(self.eqx.nn.BatchNorm)(
            features, names, momentum=self.momentum, dtype=dtype, mode="batch"
        )

    def init(self, features, dtype):
        """As above. The state is its arrays; the layer that it goes with is remade."""
        layer, state = self.layer(features, dtype)
        return (layer.weight, layer.bias), jax.tree.leaves(state)

    def apply(self, params, state, x, *, train, mask=None, axis_name=None):
        """As above."""
        layer, fresh = self.layer(x.shape[-1], x.dtype, axis_name if train else None)
        full = jax.tree.unflatten(jax.tree.structure(fresh), state)
        layer = self.eqx.tree_at(lambda v: (v.weight, v.bias), layer, params)
        y, new = jax.vmap(
            lambda row: layer(row, full, inference=not train),
            axis_name="rows",
            out_axes=(0, None),
        )(x.reshape(-1, x.shape[-1]))
        return y.reshape(x.shape), jax.tree.leaves(new) if train else state

    def stats(self, state):
        """As above."""
        layer, fresh = self.layer(state[-1].size, state[-1].dtype)
        full = jax.tree.unflatten(jax.tree.structure(fresh), state)
        mean, var = full.get(layer.batch_state_index)
        count = np.float64(full.get(layer.batch_counter))
        seen = 1 - self.momentum**count if count else 1.0
        return mean / seen, var / seen


class Keras:
    """`keras.layers.BatchNormalization`; merges devices on TensorFlow alone."""

    name, has_mask, has_axis_name = "Keras", True, False

    def __init__(self, momentum):
        import keras

        self.keras, self.momentum, self.layers = keras, momentum, {}

    def layer(self, features, dtype):
        """The layer, made once: Keras variables are not for tracing."""
        key = features, jnp.dtype(dtype).name
        if key not in self.layers:
            layer = self.keras.layers.BatchNormalization(
                momentum=self.momentum, epsilon=1e-5, dtype=key[1]
            )
            layer.build((None, features))
            layer.input_spec = None  # built for rows, called on sequences as well
            self.layers[key] = layer
        return self.layers[key]

    def init(self, features, dtype):
        """As above."""
        layer = self.layer(features, dtype)
        values = lambda variables: [jnp.array(v.value) for v in variables]
        trained = values(layer.trainable_variables)
        return trained, values(layer.non_trainable_variables)

    def apply(self, params, state, x, *, train, mask=None, axis_name=None):
        """As above."""
        layer = self.layer(x.shape[-1], x.dtype)
        kept = layer._reduction_axes
        layer._reduction_axes = list(range(x.ndim - 1))  # as `build` of this rank does
        try:
            return layer.stateless_call(params, state, x, training=train, mask=mask)
        finally:
            layer._reduction_axes = kept

    def stats(self, state):
        """As above."""
        return tuple(state)


def norms(momentum, *others):
    """A norm of each library that is installed; the others are named on stderr."""
    made = [Jbn(momentum), *others]
    for make in (FlaxLinen, Haiku, Equinox, Keras):
        try:
            made.append(make(momentum))
        except ImportError:
            print(f"{make.name}: not installed, left out", file=sys.stderr)
    return made


# ---- Reports -----------------------------------------------------------------------


def show(value):
    """A number in a cell, with two digits."""
    if value is None:
        return "not offered"
    if not np.isfinite(value):
        return "NaN"
    if not 1e-2 <= value < 1e4:
        return f"{value:.0e}"
    return f"{value:.2g}" if value < 100 else f"{value:.0f}"


def percent(values):
    """The mean of accuracies with the smallest and largest, in percent."""
    values = 100 * np.asarray(values)
    return f"{values.mean():.1f} ({values.min():.1f} to {values.max():.1f})"


def student(values):
    """Student's interval of the mean: with few seeds the bootstrap's is too narrow."""
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values)
    return np.mean(values) + np.array([-half, half])


def style():
    """Sets how figures look; returns pyplot."""
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "figure.dpi": 100,
            "savefig.dpi": 100,
            "font.size": 11,
            "axes.titlesize": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#DDDDDD",
            "grid.linewidth": 0.6,
            "axes.axisbelow": True,
            "legend.frameon": False,
            "figure.constrained_layout.use": True,
        }
    )
    warnings.filterwarnings("error", module="matplotlib")
    return plt


def log(text):
    """Prints the progress to stderr, with the processor time so far."""
    print(f"{text} ({time.process_time():.0f} s of CPU)", file=sys.stderr, flush=True)


def command():
    """How this script was called."""
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def known(name):
    """The results that a script has written so far, by data set."""
    path = EVIDENCE / f"{name}.json"
    return json.loads(path.read_text())["results"] if path.is_file() else {}


def report(
    name,
    question,
    seeds,
    results,
    text,
    figure,
    notes=(),
    folder=EVIDENCE,
    packages=(),
):
    """Prints the table; writes NAME.json and NAME.png, if there is a folder for it.

    `packages` are those beside the usual ones whose versions matter.
    """
    usual = "jax jaxlib flax dm-haiku equinox keras torch optax numpy matplotlib"
    versions = {"python": platform.python_version(), "jbn": jbn.__version__}
    for package in (*usual.split(), *packages):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    about = {
        "question": question,
        "command": command(),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "platform": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores,"
        f" {jax.default_backend()}",
        "versions": versions,
        "seeds": list(seeds),
        "notes": list(notes),
        "wall_seconds": round(time.perf_counter() - STARTED, 1),
        "cpu_seconds": round(time.process_time(), 1),
    }
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        content = {**about, "results": plain(results)}
        (folder / f"{name}.json").write_text(dumped(content) + "\n")
        figure.savefig(folder / f"{name}.png")
    print(f"{about['platform']}, JAX {jax.__version__}, {about['date']}\n")
    print(text)
    print(f"\n{about['wall_seconds']} s, {about['cpu_seconds']} s of CPU")


def plain(value):
    """As JSON has it: numbers to six digits, and `null` where there is none."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, np.ndarray | jax.Array):
        return plain(np.asarray(value).tolist())
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value
