"""Every mode of differentiation, of functions of x, weights, scale, bias, epsilon."""

from typing import Any

import jax
import jax.numpy as jnp


SHAPE = (6, 5, 3)
# References, and derivatives, are only compiled to be run once.
QUICKLY: dict[str, Any] = {"xla_backend_optimization_level": 0}


def once(f, *args):
    """What a reference returns: in one program, since each eager operation is one."""
    return jax.jit(f, compiler_options=QUICKLY)(*args)


def plain(x, weights, scale, bias, epsilon):
    """The formula, for JAX to differentiate."""
    w = jnp.broadcast_to(weights, x.shape)
    total = w.sum((0, 1), keepdims=True)
    mean = (w * x).sum((0, 1), keepdims=True) / total
    var = (w * jnp.square(x - mean)).sum((0, 1), keepdims=True) / total
    xh = (x - mean) / jnp.sqrt(var + epsilon)
    return xh * scale.reshape(1, 1, -1) + bias.reshape(1, 1, -1)


def example(rng):
    """Arguments; scale and bias differ, and epsilon is of the size of the variance."""
    return tuple(
        jnp.asarray(v)
        for v in (
            rng.standard_normal(SHAPE),
            rng.uniform(0.1, 2.0, (*SHAPE[:2], 1)),
            rng.standard_normal(SHAPE[-1]),
            rng.standard_normal(SHAPE[-1]),
            0.5,
        )
    )


def modes(ct):
    """Every way to differentiate, as functions of `f` and its arguments."""

    def loss(f):
        # Not a plain sum, whose gradient is zero whatever the bug.
        return lambda *args: (jnp.sin(f(*args)) * ct).sum()

    def along(f, args):
        g = jax.grad(loss(f))
        return jax.jvp(lambda x: g(x, *args[1:]), (args[0],), (ct,))[1]

    def over_grad(f, args):
        g = jax.grad(loss(f))
        return jax.grad(lambda *a: (g(*a) * ct).sum(), argnums=range(5))(*args)

    return {
        "grad": lambda f, a: jax.grad(loss(f), argnums=range(5))(*a),
        "grad of x alone": lambda f, a: jax.grad(loss(f))(*a),
        "grad of affine alone": lambda f, a: jax.grad(loss(f), argnums=(2, 3))(*a),
        "jvp": lambda f, a: jax.jvp(f, a, a),
        "jacfwd": lambda f, a: jax.jacfwd(f, argnums=(0, 1, 2))(*a),
        "jacrev": lambda f, a: jax.jacrev(f, argnums=(0, 1, 2))(*a),
        "hessian": lambda f, a: jax.hessian(loss(f))(*a),
        "hvp, forward over reverse": along,
        "hvp, reverse over reverse": over_grad,
        "third": lambda f, a: jax.grad(lambda *a: (along(f, a) * ct).sum())(*a),
        "linearize": lambda f, a: jax.linearize(f, *a)[1](*a),
        "linear_transpose": lambda f, a: jax.linear_transpose(
            jax.linearize(lambda x: f(x, *a[1:]), a[0])[1], a[0]
        )(ct),
        "remat": lambda f, a: jax.grad(loss(jax.checkpoint(f)), argnums=range(5))(*a),
        "jit inside": lambda f, a: jax.grad(loss(jax.jit(f)), argnums=range(5))(*a),
        "vmap of grad": lambda f, a: jax.vmap(jax.grad(loss(f)), (0, *[None] * 4))(
            jnp.stack([a[0], 2 * a[0]]), *a[1:]
        ),
        "grad of vmap": lambda f, a: jax.grad(
            lambda x: jax.vmap(lambda x: loss(f)(x, *a[1:]))(x).sum()
        )(jnp.stack([a[0], 2 * a[0]])),
        "scan": lambda f, a: jax.grad(
            lambda x: (
                jax.lax.scan(lambda c, _: (f(c, *a[1:]), None), x, length=3)[0] * ct
            ).sum()
        )(a[0]),
        "cond": lambda f, a: jax.grad(
            lambda x: jax.lax.cond(
                x[0, 0, 0] < 1e9, lambda x: loss(f)(x, *a[1:]), lambda x: x.sum(), x
            )
        )(a[0]),
    }
