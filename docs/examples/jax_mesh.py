"""Train an affine layer with its batch split over the devices of a JAX mesh.

    python docs/examples/jax_mesh.py

Without accelerators, the processor stands in for eight devices.
"""

from __future__ import annotations

import sys
from typing import Any

import jax

jax.config.update("jax_num_cpu_devices", 8)  # before the first array; accelerators are not touched by it

import jax.numpy as jnp  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

from xaffine import affine_vjp  # noqa: E402

N, FEATURES, OUTPUTS, STEPS, RATE = 1024, 16, 4, 40, 0.2


def moved(parameter: Any, gradient: Any) -> Any:
    """Go down the gradient."""
    return parameter - RATE * gradient


def main() -> None:
    """Fit random targets that are an affine function of x."""
    mesh = jax.make_mesh((len(jax.devices()),), ("data",))  # its axes are explicit ones
    rows, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())

    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (N, FEATURES))
    targets = x @ jax.random.normal(keys[1], (FEATURES, OUTPUTS)) + jax.random.normal(keys[2], (OUTPUTS,))
    x, targets = jax.device_put((x, targets), rows)
    W, b = jax.device_put((jnp.zeros((FEATURES, OUTPUTS)), jnp.zeros(OUTPUTS)), whole)

    def step(W: Any, b: Any, x: Any, targets: Any) -> tuple[Any, Any, Any]:
        y, vjp = affine_vjp(x, W, b)
        error = y - targets
        gradients = vjp(error / N)  # dW and db are summed over the devices in here, and whole as W and b are
        return moved(W, gradients.dW), moved(b, gradients.db), jnp.mean(error**2)

    compiled = jax.jit(step)
    for number in range(STEPS):
        W, b, loss = compiled(W, b, x, targets)
        if number % 10 == 9 or number == 0:
            print(f"step {number + 1:2}  loss {loss:.2e}")
    print(f"x is {jax.typeof(x)}, W is {jax.typeof(W)}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
