"""Which layers of a model are adjacent, and whether values between are used elsewhere.

Layers mark their inputs and outputs, and the model is traced once, because only the
jaxpr shows every use of a value.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal


@dataclasses.dataclass(frozen=True)
class Layers:
    """The layers to mark, for both APIs of Flax.

    Attributes:
        names: Returns the variables that a layer reads: a dict from our name to the
            collection and the layer's name. `None`: the layer is not marked.
        check: Gets the path, layer and arguments of each call; may raise.
    """

    names: Callable[[Any], Mapping[str, tuple[str, str]] | None]
    check: Callable[[str, Any, tuple, Mapping], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """A call of a layer, with shapes as in Python, where `vmap` hides its axis."""

    path: str
    layer: Any
    args: tuple[Any, ...]  # without the input
    kwargs: Mapping[str, Any]
    x_shape: tuple[int, ...]
    y_shape: tuple[int, ...]
    y_dtype: Any
    shapes: Mapping[str, tuple[int, ...]]  # of the variables, by our names


def trace(model: Any, inputs: tuple, kwargs: Mapping, layers: Layers) -> "Flow":
    """Traces a Linen model (whose first input is the variables) or an NNX model."""
    recorder = _Recorder(layers)
    if isinstance(model, nn.Module):
        return _trace_linen(model, inputs[0], inputs[1:], kwargs, recorder)
    return _trace_nnx(model, inputs, kwargs, recorder)


class Value:
    """A value in the flat jaxpr: the node that computes it, and its uses."""

    def __init__(self, aval: Any, node: "Node | None" = None):
        self.shape = tuple(getattr(aval, "shape", ()))
        self.dtype = getattr(aval, "dtype", None)
        self.node = node
        self.uses: list[Node] = []
        self.array: Any = None  # of a variable of the model


class Node:
    """An operation in the flat jaxpr."""

    def __init__(self, index: int, name: str, params: Mapping, inputs: list[Value]):
        self.index = index
        self.name = name
        self.params = params
        self.inputs = inputs
        self.outputs: list[Value] = []
        for value in inputs:
            value.uses.append(self)


class Flow:
    """A model as a flat jaxpr, with the calls of its layers.

    Attributes:
        calls: The calls, in order, by index.
        leaves: Values of the variables of the layers, by `(path, our name)`.
    """

    def __init__(self, closed: ClosedJaxpr, calls: dict[int, Call], num_results: int):
        self.leaves: dict[tuple[str, str], Value] = {}
        self._marks: dict[tuple[int, str], list[Node]] = {}
        self._inside: dict[int, str] = {}  # the primitive around a call, if any
        self._count = itertools.count()
        self.inputs = [Value(v.aval) for v in closed.jaxpr.invars]
        outputs = self._flatten(closed.jaxpr, self.inputs)
        self._node("result", {}, outputs[:num_results])
        self._node("state", {}, outputs[num_results:])
        # Without calls that were only traced for the shapes of their results.
        seen = {index for index, _ in self._marks} | set(self._inside)
        self.calls = {i: call for i, call in calls.items() if i in seen}

    def obstacle(self, index: int) -> str | None:
        """Why one call does not determine what a layer does, or `None`."""
        call = self.calls[index]
        if index in self._inside:
            return f"runs inside `{self._inside[index]}`"
        begins, ends = (self._marks.get((index, what), []) for what in ("in", "out"))
        times = sum(other.path == call.path for other in self.calls.values())
        times = max(times, len(begins))
        if times > 1:
            return f"is called {times} times"
        start, stop = begins[0], ends[0]
        for name, shape in call.shapes.items():
            leaf = self.leaves.get((call.path, name))
            marks = self._marks.get((index, name), [])
            if leaf is None or not marks or marks[0].inputs[0] is not leaf:
                return f"has a `{name}` that is computed from other variables"
            if leaf.shape != shape:
                return f"has a `{name}` with an axis for `vmap`"
            for use in leaf.uses:
                if use.name == "state" or _mark_of(use.name, use.params):
                    continue
                if not start.index <= use.index <= stop.index:
                    return f"has a `{name}` that is also used elsewhere"
        if (start.inputs[0].shape, stop.inputs[0].shape) != (
            call.x_shape,
            call.y_shape,
        ):
            return "runs inside `vmap`"
        return None

    def neighbor(
        self, index: int, places: list[int], forward: bool, passing: Container[str]
    ) -> tuple[int, list[int]] | str:
        """The layer before or after another, if nothing else uses what is between.

        Args:
            index: The call of the other.
            places: Axes of its input and output (which have the same shape) that are
                followed.
            forward: Whether to look for the layer after it.
            passing: Paths of layers that do nothing.

        Returns:
            The call of the layer, and these axes in its output (if forward, in its
            input); or the reason why there is none.
        """
        near, far = ("out", "in") if forward else ("in", "out")
        way = "after" if forward else "before"
        node = self._marks[index, near][0]
        shared = False
        while True:
            value = node.outputs[0] if forward else node.inputs[0]
            shared |= len(value.uses) != 1
            if forward:
                if shared:
                    return f"its output is used {len(value.uses)} times"
                node = value.uses[0]
            elif value.node is None:
                return "no layer comes before it"
            else:
                node = value.node
            if node.name in ("result", "state"):
                return "its output is that of the model"
            mark = _mark_of(node.name, node.params)
            if mark is None or mark[0] not in self.calls:
                moves = _moves(node)
                if moves is None:
                    return f"the operation {way} it is `{node.name}`"
                moves = moves if forward else {b: a for a, b in moves.items()}
                if not set(places) <= set(moves):
                    return (
                        f"a `{node.name}` {way} it mixes its features with other axes"
                    )
                places = [moves[a] for a in places]
                continue
            other, what = mark
            path = self.calls[other].path
            if path in passing:
                node = self._marks[other, near][0]
                continue
            if what != far:
                return f"it is inside {path!r}"
            if shared:
                return f"the output of {path!r} is also used elsewhere"
            return other, places

    def _node(self, name: str, params: Mapping, inputs: list[Value]) -> Node:
        return Node(next(self._count), name, params, inputs)

    def _flatten(self, jaxpr: Jaxpr, inputs: list[Value]) -> list[Value]:
        env = dict(zip(jaxpr.invars, inputs, strict=True))
        env |= {v: Value(v.aval) for v in jaxpr.constvars}
        read = lambda v: Value(v.aval) if isinstance(v, Literal) else env[v]
        for eqn in jaxpr.eqns:
            operands = [read(v) for v in eqn.invars]
            name = eqn.primitive.name
            inner = list(_jaxprs(eqn.params)) if name in _INLINE else []
            if len(inner) == 1 and len(inner[0].invars) == len(operands):
                outputs = self._flatten(inner[0], operands)
            else:
                node = self._node(name, eqn.params, operands)
                outputs = node.outputs = [Value(v.aval, node) for v in eqn.outvars]
                self._note(node)
            env |= zip(eqn.outvars, outputs, strict=True)
        return [read(v) for v in jaxpr.outvars]

    def _note(self, node: Node) -> None:
        mark = _mark_of(node.name, node.params)
        if mark:
            self._marks.setdefault(mark, []).append(node)
        for inner in _jaxprs(node.params):
            for index in _marked_calls(inner):
                self._inside[index] = node.name


# Primitives whose inner jaxpr runs once, with their inputs, for their outputs.
_INLINE = {
    "checkpoint",
    "closed_call",
    "core_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "jit",
    "pjit",
    "remat",
    "remat2",
}


def _jaxprs(params: Mapping) -> Iterable[Jaxpr]:
    for param in params.values():
        for value in param if isinstance(param, tuple | list) else (param,):
            if isinstance(value, ClosedJaxpr):
                yield value.jaxpr
            elif isinstance(value, Jaxpr):
                yield value


_SAME_SHAPE = {
    "convert_element_type",
    "copy",
    "name",
    "sharding_constraint",
    "stop_gradient",
}
_RESHAPES = {"broadcast_in_dim", "expand_dims", "reshape", "squeeze"}


def _moves(node: Node) -> dict[int, int] | None:
    """The new place of each axis in an operation that only moves values, or `None`.

    Without axes that are merged or split.
    """
    if len(node.inputs) != 1 or len(node.outputs) != 1:
        return None
    x, y = node.inputs[0], node.outputs[0]
    if node.name == "transpose":
        return {a: b for b, a in enumerate(node.params["permutation"])}
    if node.name in _SAME_SHAPE:
        kinds = (jnp.floating, jnp.complexfloating)
        of = lambda v: [jnp.issubdtype(v.dtype, kind) for kind in kinds]
        same = of(x) == of(y) and any(of(x))
        return {a: a for a in range(len(x.shape))} if same else None
    if node.name not in _RESHAPES or math.prod(x.shape) != math.prod(y.shape):
        return None
    if node.params.get("dimensions") is not None and node.name == "reshape":
        return None
    before = lambda shape, a: (math.prod(shape[:a]), shape[a])
    ends = {before(y.shape, b): b for b in range(len(y.shape))}
    starts = {a: ends.get(before(x.shape, a)) for a in range(len(x.shape))}
    return {a: b for a, b in starts.items() if b is not None}


# Marks are names of values, which every transformation of JAX preserves.

_MARK = "jbn.tools.dataflow/"


def _mark_of(name: str, params: Mapping) -> tuple[int, str] | None:
    """The call that a mark belongs to, and what it marks."""
    text = str(params.get("name", "")) if name == "name" else ""
    if not text.startswith(_MARK):
        return None
    index, what = text.removeprefix(_MARK).split("/")
    return int(index), what


def _marked_calls(jaxpr: Jaxpr) -> Iterable[int]:
    for eqn in jaxpr.eqns:
        mark = _mark_of(eqn.primitive.name, eqn.params)
        if mark:
            yield mark[0]
        for inner in _jaxprs(eqn.params):
            yield from _marked_calls(inner)


class _Recorder:
    """Marks the inputs and outputs of layers, and records their calls.

    Calls of a layer may be nested: `convert` calls a replacement, and a class calls the
    method of its base class. The innermost call counts.
    """

    def __init__(self, layers: Layers):
        self.layers = layers
        self.calls: dict[int, Call] = {}
        self._indices = itertools.count()

    def call(self, path, layer, variables, function, args, kwargs) -> Any:
        kwargs = dict(kwargs)
        given = [args[0]] if args else [kwargs.pop(n) for n in _INPUT if n in kwargs]
        if not given:
            return function(**kwargs)  # which says what is missing
        index = next(self._indices)
        mark = lambda value, what: checkpoint_name(value, f"{_MARK}{index}/{what}")
        x = mark(jnp.asarray(given[0]), "in")
        for name, value in variables.items():
            mark(value, name)
        try:
            y = function(x, *args[1:], **kwargs)
        except flax.errors.ModifyScopeVariableError:
            # A layer that updates its statistics at inference.
            self.layers.check(path, layer, args[1:], kwargs)
            raise
        if any(other.path == path for i, other in self.calls.items() if i > index):
            return y
        shapes = {name: value.shape for name, value in variables.items()}
        self.layers.check(path, layer, args[1:], kwargs)
        shape = x.shape, y.shape, y.dtype
        self.calls[index] = Call(path, layer, args[1:], kwargs, *shape, shapes)
        return mark(y, "out")


_INPUT = ("x", "inputs")


def _trace_linen(model, variables: Mapping, inputs, kwargs, recorder) -> Flow:
    layers = recorder.layers

    def intercept(next_call, args, kwargs, context):
        layer: Any = context.module
        names = layers.names(layer) if context.method_name == "__call__" else None
        if names is None:
            return next_call(*args, **kwargs)
        scope: Any = layer.scope
        path = "/".join(scope.path)
        words.setdefault(path, {}).update(names)
        seen = {
            ours: unboxed(scope.get_variable(collection, name))
            for ours, (collection, name) in names.items()
            if scope.has_variable(collection, name)
        }
        return recorder.call(path, layer, seen, next_call, args, kwargs)

    # With `mutable` as given: some models derive their mode from it.
    mutable = kwargs.get("mutable", False)

    def run(variables, inputs, kwargs):
        with nn.intercept_methods(intercept):
            found = model.apply(variables, *inputs, **(kwargs | {"mutable": mutable}))
        return (found, ()) if mutable is False else found

    words: dict[str, dict[str, tuple[str, str]]] = {}
    kwargs = {key: value for key, value in kwargs.items() if key != "mutable"}
    variables = dict(variables)
    flow = _traced(run, variables, inputs, kwargs, recorder)
    structure = jax.tree.structure(variables)
    leaves = jax.tree.unflatten(structure, flow.inputs[: structure.num_leaves])
    for call in flow.calls.values():
        path = call.path.split("/") if call.path else []
        for ours, (collection, name) in words[call.path].items():
            leaf = get(leaves, (collection, *path, name))
            if leaf is not None:
                flow.leaves[call.path, ours] = unboxed(leaf)
    return flow


def _trace_nnx(model: nnx.Module, inputs, kwargs, recorder) -> Flow:
    layers = recorder.layers
    marked = nnx.clone(model)
    for path, node in nnx.iter_graph(marked):
        layer: Any = node
        if isinstance(node, nnx.Module) and layers.names(node) is not None:
            # A static attribute, so that `nnx.jit` does not reuse the trace of another
            # layer.
            layer._dataflow_mark = _Mark(recorder, "/".join(map(str, path)))
            object.__setattr__(layer, "__class__", _marking(type(layer)))
    graph, state = nnx.split(marked)

    def run(state, inputs, kwargs):
        return nnx.merge(graph, state)(*inputs, **kwargs), ()

    flow = _traced(run, state, inputs, kwargs, recorder)
    values: dict[Any, Value] = dict(zip(_paths(state), flow.inputs, strict=False))
    # In a state, a shared variable has the first of its paths.
    first = {id(node): path for path, node in nnx.iter_graph(model)}
    modules = nnx_layers(model)
    for index, call in flow.calls.items():
        # Restores the original state: that of the trace holds tracers.
        layer = modules[call.path]
        flow.calls[index] = dataclasses.replace(call, layer=layer)
        for ours, (_, name) in (layers.names(layer) or {}).items():
            variable = getattr(layer, name, None)
            leaf = values.get(first.get(id(variable)))
            if variable is not None and leaf is not None:
                flow.leaves[call.path, ours] = leaf
    return flow


@dataclasses.dataclass(frozen=True, eq=False)
class _Mark:
    recorder: _Recorder
    path: str


@functools.cache
def _marking(cls: Any) -> type:
    """A subclass of an NNX layer class whose calls go through the recorder."""

    @functools.wraps(cls.__call__)
    def call(self, *args, **kwargs):
        mark, function = self._dataflow_mark, super(marking, self).__call__
        names = mark.recorder.layers.names(self) or {}
        found = {our: getattr(self, name, None) for our, (_, name) in names.items()}
        seen = {name: v[...] for name, v in found.items() if v is not None}
        return mark.recorder.call(mark.path, self, seen, function, args, kwargs)

    marking = type(cls)(cls.__name__, (cls,), {"__call__": call})
    return marking


def _paths(state: Any) -> list[tuple]:
    """Paths of the leaves of an NNX state, in the form of `nnx.iter_graph`."""
    clean = lambda key: getattr(key, "key", getattr(key, "name", None))
    found = []
    for path, _ in jax.tree.leaves_with_path(state):
        keys = [clean(key) for key in path]
        found.append(tuple(keys[:-1]) if keys[-1] == "value" else tuple(keys))
    return found


def _traced(run: Callable, variables, inputs, kwargs, recorder: _Recorder) -> Flow:
    """Traces `run`, with the arrays among its arguments as inputs."""
    leaves, structure = jax.tree.flatten((inputs, dict(kwargs)))
    kinds = jax.Array | np.ndarray | jax.ShapeDtypeStruct
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, kinds)]

    def flat(variables, arrays):
        given = list(leaves)
        for i, array in zip(places, arrays, strict=True):
            given[i] = array
        result, state = run(variables, *jax.tree.unflatten(structure, given))
        are = lambda tree: [v for v in jax.tree.leaves(tree) if hasattr(v, "shape")]
        return are(result), are(state)

    arrays = [leaves[i] for i in places]
    closed, shapes = jax.make_jaxpr(flat, return_shape=True)(variables, arrays)
    flow = Flow(closed, recorder.calls, len(shapes[0]))
    for value, array in zip(flow.inputs, jax.tree.leaves(variables), strict=False):
        value.array = array
    return flow


def nnx_layers(model: nnx.Module) -> dict[str, Any]:
    """All nodes of an NNX model by path."""
    return {"/".join(map(str, path)): node for path, node in nnx.iter_graph(model)}


def get(tree: Any, path: Iterable[str]) -> Any:
    """The value at `path` in nested dicts, or `None`."""
    for name in path:
        if not isinstance(tree, Mapping) or name not in tree:
            return None
        tree = tree[name]
    return tree


def unboxed(leaf: Any) -> Any:
    """A variable without its metadata box."""
    return leaf.value if isinstance(leaf, BOXES) else leaf  # pyright: ignore[reportAttributeAccessIssue]


BOXES = (nn.meta.AxisMetadata,)
