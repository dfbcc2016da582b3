"""Learn to read handwritten digits with two affine layers, on any backend.

    python docs/examples/digits.py --backend torch

The data are the 1797 images of 8 × 8 pixels that come with scikit-learn (pip install scikit-learn). They stay
tensors of shape (N, 8, 8): the first layer flattens them and its dx has their shape again.
"""

from __future__ import annotations

import argparse
import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from sklearn.datasets import load_digits

from xaffine import AffineLayer, backends

if TYPE_CHECKING:
    from collections.abc import Callable

TEST_IMAGES = 360


class Epoch(NamedTuple):
    """What came of one pass over the training images."""

    loss: float
    accuracy: float


def relu(xp: Any, h: Any) -> Any:
    """Replace what is negative by zero."""
    return xp.where(h > 0, h, xp.zeros_like(h))


def log_softmax(xp: Any, scores: Any) -> Any:
    """Turn each row of scores into logarithms of probabilities."""
    scores = scores - xp.max(scores, axis=1, keepdims=True)
    return scores - xp.log(xp.sum(xp.exp(scores), axis=1, keepdims=True))


def train(
    backend_name: str,
    *,
    epochs: int = 20,
    hidden: int = 64,
    batch: int = 32,
    rate: float = 0.2,
    seed: int = 0,
    dtype: str = "float32",
    report: Callable[[int, Epoch], None] = lambda _number, _epoch: None,
) -> list[Epoch]:
    """Train by stochastic gradient descent; return the mean loss and the test accuracy of each epoch.

    Everything random comes from NumPy, so one seed gives one loss curve on every backend, up to rounding.
    """
    backend = backends.get(backend_name)
    xp = backend.xp
    rng = np.random.default_rng(seed)

    images, labels = load_digits(return_X_y=True)
    order = rng.permutation(len(images))
    pixels = (images[order] / 16).reshape(-1, 8, 8).astype(dtype)
    onehot = np.eye(10, dtype=dtype)[labels[order]]
    x_test = backend.from_numpy(pixels[:TEST_IMAGES])
    x_train, t_train = pixels[TEST_IMAGES:], onehot[TEST_IMAGES:]

    def new_layer(n: int, m: int) -> AffineLayer:
        W = rng.standard_normal((n, m)) * np.sqrt(2 / n)  # He et al. 2015, equation 10
        return AffineLayer(backend.from_numpy(W.astype(dtype)), backend.from_numpy(np.zeros(m, dtype)))

    first, second = new_layer(64, hidden), new_layer(hidden, 10)

    def step(parameter: Any, gradient: Any) -> Any:
        return parameter - rate * gradient

    # Left lazy, the parameters of Dask would drag the history of all steps along. In one call, all is computed once.
    keep = importlib.import_module("dask").persist if backend_name == "dask" else lambda *parameters: parameters

    history = []
    for number in range(1, epochs + 1):
        order = rng.permutation(len(x_train))
        loss = 0.0
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            x, t = backend.from_numpy(x_train[rows]), backend.from_numpy(t_train[rows])
            h = first(x)
            log_p = log_softmax(xp, second(relu(xp, h)))
            loss -= float(xp.sum(t * log_p))

            # The derivative of the mean cross-entropy by the scores is (p - t) / N.
            dh = second.backward((xp.exp(log_p) - t) / len(rows))
            first.backward(xp.where(h > 0, dh, xp.zeros_like(dh)))
            first.W, first.b, second.W, second.b = keep(
                step(first.W, first.dW), step(first.b, first.db), step(second.W, second.dW), step(second.b, second.db)
            )

        guesses = np.argmax(backend.to_numpy(second(relu(xp, first(x_test)))), axis=1)
        accuracy = float(np.mean(guesses == np.argmax(onehot[:TEST_IMAGES], axis=1)))
        history.append(Epoch(loss / len(order), accuracy))
        report(number, history[-1])
    return history


def main() -> None:
    """Train with progress on the terminal."""
    parser = argparse.ArgumentParser(description="Learn handwritten digits with two affine layers.")
    # The softmax of a sparse array has no zeros left, and the products of the sparse library need them.
    names = [name for name in backends.names() if name != "sparse"]
    parser.add_argument("--backend", default="numpy", choices=names)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    def report(number: int, epoch: Epoch) -> None:
        bar = "#" * round(30 * number / options.epochs)
        print(f"{number:4d}  [{bar:30s}]  loss {epoch.loss:.4f}  test accuracy {epoch.accuracy:.1%}", flush=True)

    try:
        train(options.backend, epochs=options.epochs, seed=options.seed, report=report)
    except (ImportError, RuntimeError) as error:
        parser.exit(2, f"{error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "interrupted\n")


if __name__ == "__main__":
    main()
