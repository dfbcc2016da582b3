"""Train an affine layer with its batch split over the devices of a JAX mesh.

    python docs/examples/jax_mesh.py

Without accelerators, the processor stands in for eight devices.
"""

from __future__ import annotations

import jax

jax.config.update("jax_num_cpu_devices", 8)  # before the first array; accelerators are not touched by it

import jax.numpy as jnp  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

from xaffine import affine_vjp  # noqa: E402

N, FEATURES, OUTPUTS, STEPS, RATE = 1024, 16, 4, 40, 0.2


def main() -> None:
    """Fit random targets that are an affine function of x."""
    mesh = jax.make_mesh((len(jax.devices()),), ("data",))  # its axes are explicit ones
    rows, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())

    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (N, FEATURES))
    targets = x @ jax.random.normal(keys[1], (FEATURES, OUTPUTS)) + jax.random.normal(keys[2], (OUTPUTS,))
    x, targets = jax.device_put((x, targets), rows)
    W, b = jax.device_put((jnp.zeros((FEATURES, OUTPUTS)), jnp.zeros(OUTPUTS)), whole)

    @jax.jit
    def step(W: jax.Array, b: jax.Array, x: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        y, vjp = affine_vjp(x, W, b)
        error = y - targets
        gradients = vjp(error / N, wrt=("W", "b"))  # summed over the devices in here: dW is whole, as W is
        return W - RATE * gradients.dW, b - RATE * gradients.db, jnp.mean(error**2)

    for number in range(STEPS):
        W, b, loss = step(W, b, x, targets)
        if number % 10 == 9 or number == 0:
            print(f"step {number + 1:2}  loss {loss:.2e}")
    print(f"x is {jax.typeof(x)}, W is {jax.typeof(W)}")


if __name__ == "__main__":
    main()
