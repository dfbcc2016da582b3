"""Make a layer of what is none: a module of torch, flax, equinox or thinc, an autograd function, or functions."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np

from xaffine.backends import backend_of

if TYPE_CHECKING:
    from xaffine.backends import Backend

__all__ = ["Adapter", "Make", "adapt", "from_functions", "has_backward", "takes_batch_axes"]

Make: TypeAlias = Callable[..., Any]
"""``make(W, b)``, or ``make(W, b, n_batch_axes=k)``, returns a layer."""

Adapter: TypeAlias = Literal[
    "layer", "torch module", "torch function", "jax module", "thinc model", "function", "forward", "pair"
]
"""What is adapted."""

_LIBRARIES = {"torch module": "torch", "torch function": "torch", "jax module": "jax", "thinc model": "numpy"}
_MODULES: dict[str, Adapter] = {
    "torch.nn.modules.module.Module": "torch module",
    "torch.autograd.function.Function": "torch function",
    "flax.linen.module.Module": "jax module",
    "flax.nnx.module.Module": "jax module",
    "equinox._module._module.Module": "jax module",
}


def adapt(target: Any, backend: str | None = None, adapter: Adapter | None = None) -> tuple[Make, Adapter, str]:
    """Make a layer of what is to be checked.

    Parameters
    ----------
    target : callable or pair of callables
        A factory ``make(W, b)``, as it is; a class derived from ``torch.nn.Module``, called as ``Module(n, m)`` or with
        ``bias=False``, whose parameters are a weight (m, n) or (n, m) and a bias, or none; a class of modules of flax
        (linen or nnx) or equinox, likewise; a function of thinc, called as ``Linear(m, n)``; a class derived from
        ``torch.autograd.Function`` or a function of torch or JAX, called with x, W (in either orientation) and b, and
        differentiated by its library; another function of x, W and b, of which y alone is judged; or the pair of a
        forward ``(x, W, b)`` and a backward, which takes dy and what forward returned beside y, or ``(dy, x, W, b)``,
        and returns dx, dW and db.
    backend : str, optional
        The name of the backend whose arrays it takes; by default that of the adapter, "numpy" where it has none.
    adapter : str, optional
        One of `Adapter`; by default what the target looks like.

    Returns
    -------
    make, adapter, backend
        The factory of `check_affine`, and what was chosen.

    Raises
    ------
    ValueError
        There is no such adapter, or the backend is not that of the adapter, or cannot differentiate.

    Examples
    --------
    >>> from xaffine import AffineLayer
    >>> adapt(AffineLayer)[1:]
    ('layer', 'numpy')
    >>> def forward(x, W, b): return x @ W + b, (x, W)
    >>> def backward(dy, cache): return dy @ cache[1].T, cache[0].T @ dy, dy.sum(0)
    >>> make, *chosen = adapt((forward, backward))
    >>> chosen
    ['pair', 'numpy']
    """
    kind = _kind(target) if adapter is None else adapter
    if kind not in get_args(Adapter):
        msg = f"there is no adapter {kind!r}; there are {', '.join(map(repr, get_args(Adapter)))}"
        raise ValueError(msg)
    own = _LIBRARIES.get(kind) or backend or "numpy"
    if kind == "function" and adapter is None and own not in ("torch", "jax"):
        kind = "forward"
    if backend not in (None, own):
        msg = f"a {kind} takes arrays of {own}, not of {backend}"
        raise ValueError(msg)
    if kind == "layer":
        return target, kind, own
    if kind == "pair":
        if not isinstance(target, tuple) or len(target) != 2:
            msg = f"a pair is a forward and a backward; got {len(target) if isinstance(target, tuple) else 'one thing'}"
            raise ValueError(msg)
        return from_functions(*target), kind, own
    if kind == "forward":
        return type("Forward", (_Forward,), {"function": staticmethod(target)}), kind, own
    modules: dict[str, Any] = {"torch module": _Module, "jax module": _JaxModule, "thinc model": _Thinc}
    if kind in modules:
        return modules[kind].of(target), kind, own
    if own not in ("torch", "jax"):
        msg = (
            f"torch and JAX differentiate a function of x, W and b, and {own} does not: name one of them as the backend"
        )
        raise ValueError(msg)
    differentiated = _Torch if own == "torch" else _Jax
    function = target.apply if kind == "torch function" else target
    return type(differentiated.__name__, (differentiated,), {"function": staticmethod(function)}), kind, own


def _kind(target: Any) -> Adapter:
    """What a target looks like."""
    if isinstance(target, tuple):
        return "pair"
    for base in getattr(target, "__mro__", ()):
        if (name := f"{base.__module__}.{base.__name__}") in _MODULES:
            return _MODULES[name]
    if getattr(target, "__module__", "").startswith("thinc."):
        return "thinc model"
    if not isinstance(target, type):
        try:
            parameters = inspect.signature(target).parameters.values()
        except (TypeError, ValueError):  # a builtin, which makes no layer
            return "function"
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if len(positional) > 2 and positional[2].name != "n_batch_axes":
            return "function"
    return "layer"


class _Differentiated:
    """A layer whose gradients a library computes of its forward."""

    function: Callable[..., Any]
    zeros: Callable[[tuple[int, ...], Any], Any]
    """Makes an array like another one, of zeros."""
    is_transposed: bool | None = None
    """Whether it takes a weight (m, n), as three features and five outputs show."""
    has_backward = True
    dW: Any = None
    db: Any = None

    def __init__(self, W: Any, b: Any) -> None:
        self.operands = W, b
        if self.is_transposed is None:
            x, *others = (self.zeros(shape, W) for shape in ((2, 3), (3, 5), (5,)))
            accepted = [_accepts(self.function, x, weight, others[1]) for weight in (others[0], others[0].T)]
            type(self).is_transposed = accepted == [False, True]

    def call(self, x: Any, W: Any, b: Any) -> Any:
        """The function, with the orientation of W that it takes."""
        return self.function(x, W.T if self.is_transposed else W, b)

    def backward(self, dy: Any) -> Any:
        msg = "there are no gradients of a forward alone"
        raise NotImplementedError(msg)


class _Forward(_Differentiated):
    """A forward alone."""

    has_backward = False

    @staticmethod
    def zeros(shape: tuple[int, ...], like: Any) -> Any:
        with backend_of(like).on_device_of(like):
            return backend_of(like).xp.zeros(shape, dtype=like.dtype)

    def forward(self, x: Any) -> Any:
        return self.call(x, *self.operands)


def _accepts(function: Callable[..., Any], *arrays: Any) -> bool:
    try:
        function(*arrays)
    except Exception:  # whatever it raises
        return False
    return True


class _Torch(_Differentiated):
    """By torch's autograd, whose gradients of complex numbers are conjugates of the plain transposes."""

    @staticmethod
    def zeros(shape: tuple[int, ...], like: Any) -> Any:
        return like.new_zeros(shape)

    def leaves(self, x: Any) -> list[Any]:
        """Tensors of x, W and b, in the same memory, of which gradients are wanted."""
        return [None if each is None else each.detach().requires_grad_() for each in (x, *self.operands)]

    def forward(self, x: Any) -> Any:
        self.tensors = self.leaves(x)
        self.y = self.call(*self.tensors)
        self.has_backward = self.y.requires_grad  # else a kernel of which torch knows no gradients
        return self.y.detach()

    def backward(self, dy: Any) -> Any:
        torch = importlib.import_module("torch")
        wanted = [tensor for tensor in self.tensors if tensor is not None]
        found = torch.autograd.grad(self.y, wanted, dy.conj(), retain_graph=True, materialize_grads=True)
        dx, self.dW, *db = (gradient.conj().resolve_conj().clone() for gradient in found)  # which may be dy itself
        self.db = db[0] if db else None
        return dx


class _Module(_Torch):
    """A module of torch, with parameters of its own."""

    kind: Callable[..., Any]

    @classmethod
    def of(cls, kind: Callable[..., Any]) -> type[_Module]:
        """The layer of a class of modules, whose orientation a small one shows."""
        weight, _ = _parameters(list(kind(3, 5).parameters()), 3, 5)
        made = {"kind": staticmethod(kind), "is_transposed": tuple(weight.shape) == (5, 3)}
        return type("Module", (cls,), made)

    def __init__(self, W: Any, b: Any) -> None:
        super().__init__(W, b)
        n, m = W.shape
        module = _made(self.kind, n, m, bias=b is not None, called="bias")
        self.module = module.to(device=W.device, dtype=W.dtype)
        self.weight, self.bias = _parameters(list(self.module.parameters()), n, m, bias=b is not None)
        self.weight.data = W.T if self.is_transposed else W
        if b is not None:
            self.bias.data = b

    def leaves(self, x: Any) -> list[Any]:
        return [x.detach().requires_grad_(), self.weight, self.bias]

    def call(self, x: Any, *_: Any) -> Any:
        return self.module(x)

    def backward(self, dy: Any) -> Any:
        dx = super().backward(dy)
        if self.is_transposed:
            self.dW = self.dW.T
        return dx


def _made(kind: Callable[..., Any], *extents: Any, bias: bool, called: str, **more: Any) -> Any:
    """A module, asked not to have a bias where it shall not, unless it never has one."""
    if not bias:
        with suppress(TypeError):
            return kind(*extents, **more, **{called: False})
    return kind(*extents, **more)


def _parameters(parameters: list[Any], n: int, m: int, *, bias: bool | None = None) -> tuple[Any, Any]:
    """The weight and the bias among the parameters of a module."""
    weights = [each for each in parameters if tuple(each.shape) in ((n, m), (m, n))]
    biases = [each for each in parameters if tuple(each.shape) == (m,)]
    if len(weights) != 1 or len(weights) + len(biases) != len(parameters) or len(biases) > 1:
        shapes = ", ".join(str(tuple(each.shape)) for each in parameters) or "none"
        msg = f"a module of {n} features and {m} outputs must have a weight and at most a bias, and has {shapes}"
        raise ValueError(msg)
    if bias is not None and bias != bool(biases):
        msg = f"the module has {'no' if bias else 'always a'} bias"
        raise TypeError(msg)
    return weights[0], biases[0] if biases else None


class _Jax(_Differentiated):
    """By JAX."""

    @staticmethod
    def zeros(shape: tuple[int, ...], like: Any) -> Any:
        return importlib.import_module("jax.numpy").zeros(shape, like.dtype)

    def forward(self, x: Any) -> Any:
        jax = importlib.import_module("jax")
        operands = [each for each in (x, *self.operands) if each is not None]
        y, self.vjp = jax.vjp(lambda x, W, b=None: self.call(x, W, b), *operands)
        return y

    def backward(self, dy: Any) -> Any:
        dx, self.dW, *db = self.vjp(dy)
        self.db = db[0] if db else None
        return dx


class _JaxModule(_Jax):
    """A module of flax or equinox, whose parameters are leaves of a tree."""

    kind: Callable[..., Any]

    @classmethod
    def of(cls, kind: Callable[..., Any]) -> type[_JaxModule]:
        """The layer of a class of modules, whose orientation a small one shows."""
        leaves, *_ = _tree(kind, 3, 5, bias=True)
        weight, _ = _parameters(leaves, 3, 5)
        return type("Module", (cls,), {"kind": staticmethod(kind), "is_transposed": weight.shape == (5, 3)})

    def __init__(self, W: Any, b: Any) -> None:
        super().__init__(W, b)
        n, m = W.shape
        self.leaves, self.apply = _tree(self.kind, n, m, bias=b is not None)
        weight, _ = _parameters(self.leaves, n, m, bias=b is not None)
        self.weight_at = next(i for i, leaf in enumerate(self.leaves) if leaf is weight)

    def function(self, x: Any, W: Any, b: Any) -> Any:
        return self.apply([W if i == self.weight_at else b for i in range(len(self.leaves))], x)


def _tree(kind: Any, n: int, m: int, *, bias: bool) -> tuple[list[Any], Callable[[list[Any], Any], Any]]:
    """The parameters of a module of flax or equinox, and what computes y of others in their place, and of x."""
    jax = importlib.import_module("jax")
    names = {base.__module__.partition("._")[0] for base in kind.__mro__}
    key = jax.random.PRNGKey(0)
    if "flax.linen.module" in names:
        module = _made(kind, m, bias=bias, called="use_bias")
        tree = module.init(key, jax.numpy.zeros((1, n)))
        compute = module.apply
    elif "equinox" in names:
        tree = _made(kind, n, m, bias=bias, called="use_bias", key=key)

        def compute(module: Any, x: Any) -> Any:
            return module(x) if x.ndim == 1 else jax.vmap(module)(x)  # a module of equinox maps one sample

    else:
        nnx = importlib.import_module("flax.nnx")
        graph, tree = nnx.split(_made(kind, n, m, bias=bias, called="use_bias", rngs=nnx.Rngs(0)))

        def compute(state: Any, x: Any) -> Any:
            return nnx.merge(graph, state)(x)

    leaves, structure = jax.tree.flatten(tree)
    return leaves, lambda others, x: compute(jax.tree.unflatten(structure, others), x)


class _Thinc:
    """A model of thinc, which adds gradients up and takes a weight (m, n)."""

    kind: Callable[..., Any]
    dW: Any = None
    db: Any = None

    @classmethod
    def of(cls, kind: Callable[..., Any]) -> type[_Thinc]:
        """The layer of a function that makes models."""
        return type("Model", (cls,), {"kind": staticmethod(kind)})

    def __init__(self, W: Any, b: Any) -> None:
        n, m = W.shape
        self.model = self.kind(m, n)
        for name, value in (("W", W.T.copy()), ("b", b)):
            self.model.set_param(name, value)

    def forward(self, x: Any) -> Any:
        y, self.backprop = self.model.begin_update(x)
        return y

    def backward(self, dy: Any) -> Any:
        for name in ("W", "b"):
            self.model.set_grad(name, 0 * self.model.get_param(name))
        dx = self.backprop(dy)
        self.dW, self.db = self.model.get_grad("W").T.copy(), self.model.get_grad("b").copy()
        return dx


def from_functions(forward: Callable[..., Any], backward: Callable[..., Any]) -> Make:
    """Make a layer of a pair of functions.

    Parameters
    ----------
    forward : callable
        ``forward(x, W, b)`` returns y, or y and what its backward needs; b may be None.
    backward : callable
        ``backward(dy, x, W, b) -> (dx, dW, db)``; or ``backward(dy, cache)``, if forward returns a cache.

    Returns
    -------
    callable
        The `make` of `check_affine`.

    Examples
    --------
    >>> from xaffine import affine, affine_backward
    >>> from xaffine.testing import check_affine
    >>> report = check_affine(from_functions(affine, affine_backward), max_examples=5, seed=0)
    """

    class Pair:
        dW: Any = None
        db: Any = None

        def __init__(self, W: Any, b: Any) -> None:
            self._operands = W, b
            self._cache: Any = None

        def forward(self, x: Any) -> Any:
            W, b = self._operands
            y, *cache = result if isinstance(result := forward(x, W, b), tuple) else (result,)
            self._cache = cache or (x, W, b)
            return y

        def backward(self, dy: Any) -> Any:
            dx, self.dW, self.db = backward(dy, *self._cache)
            return dx

    return Pair


def takes_batch_axes(make: Make) -> bool:
    """Whether a factory has a parameter ``n_batch_axes``.

    Parameters
    ----------
    make : callable
        The factory.

    Returns
    -------
    bool
        False also where it has no signature to look at.

    Examples
    --------
    >>> from xaffine import AffineLayer
    >>> takes_batch_axes(AffineLayer), takes_batch_axes(lambda W, b: None)
    (True, False)
    """
    try:
        return "n_batch_axes" in inspect.signature(make).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return False


def has_backward(make: Make, backend: Backend, device: Any = None) -> bool:
    """Whether what `adapt` made has gradients: torch may know none of a kernel, as a first small call shows.

    Parameters
    ----------
    make : callable
        The factory.
    backend : Backend
        That of its arrays.
    device : optional
        One of the backend's devices.

    Returns
    -------
    bool
        True also where that call fails.

    Examples
    --------
    >>> from xaffine import AffineLayer
    >>> from xaffine.backends import get
    >>> make, *_ = adapt(lambda x, W, b: x @ W + b)
    >>> has_backward(AffineLayer, get("numpy")), has_backward(make, get("numpy"))
    (True, False)
    """
    if not (isinstance(make, type) and issubclass(make, _Differentiated)):
        return True
    if not make.has_backward:
        return False
    try:
        x, W, b = (backend.from_values(np.zeros(shape), "float32", device=device) for shape in ((2, 3), (3, 5), (5,)))
        layer: Any = make(W, b)
        layer.forward(x)
    except Exception:  # the probes tell
        return True
    return bool(layer.has_backward)
