"""The affine layer as an object that remembers its latest forward: initialise, run, accumulate, move, save, load."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any, Generic, overload

from xaffine import backends, initializers
from xaffine._checks import OPERANDS, check_parameters, check_sums
from xaffine._types import LayerBias, LayerWeights
from xaffine.functional import checked_backward, checked_forward

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable
    from typing import Literal, Self

    from numpy.typing import NDArray

    from xaffine._checks import SumPlan
    from xaffine._types import Gradient, Input, Of, Original, Output, Outs, Scalar, Unknown, Wrt
    from xaffine.backends import Array

__all__ = ["AffineLayer"]

_NO_SUM = (None, None)


class AffineLayer(Generic[LayerWeights, LayerBias]):
    """The affine layer y = x W + b.

    Parameters
    ----------
    W : array, shape (n, m)
        The weights, held by reference: ``W -= lr * layer.dW`` updates the layer.
    b : array, shape (m,), optional
        The bias, held by reference; without it y = x W.
    n_batch_axes : int, optional
        Which leading axes of x are batch, as in `xaffine.affine`.

    Attributes
    ----------
    W, b : array
        The parameters. Assign to them to use others from the next forward on.
    dW, db : array or None
        The gradients from the latest backward, or the sums of several; None before it, and db without a bias.
    n_batch_axes : int or None
        As given.

    Raises
    ------
    TypeError, ValueError
        If W and b do not go together, as `xaffine.affine`.

    Notes
    -----
    A layer keeps one forward: the latest. For several at once, or from several threads, use
    `xaffine.affine_vjp`, which hands out the backward of each call.

    A copy or a pickle is the layer without its pending backward: it holds no x, and needs a forward of its own before
    a backward. It has dW and db and goes on with their sums, apart from those of the original. ``copy.copy`` shares W
    and b, ``copy.deepcopy`` and ``pickle`` do not; of tensors that autograd of torch computed, these hold the values
    alone.

    Examples
    --------
    >>> import numpy as np
    >>> from xaffine import AffineLayer
    >>> layer = AffineLayer(np.asarray([[1.0], [2.0]]), np.asarray([3.0]))
    >>> layer(np.asarray([[1.0, 1.0], [2.0, 0.0]])).tolist()
    [[6.0], [5.0]]
    >>> layer.backward(np.asarray([[1.0], [10.0]])).tolist()
    [[1.0, 2.0], [10.0, 20.0]]
    >>> layer.dW.tolist(), layer.db.tolist()
    ([[21.0], [1.0]], [11.0])
    """

    dW: Gradient[LayerWeights] = None  # type: ignore[assignment]
    db: Gradient[LayerBias] = None  # type: ignore[assignment]
    _pending: Any = None  # the plan and the operands of the latest forward
    if TYPE_CHECKING:
        _itself: Self  # by which Original tells subclasses apart

    def __init__(self, W: LayerWeights, b: LayerBias | None = None, *, n_batch_axes: int | None = None) -> None:
        check_parameters(W, b)
        self.W: LayerWeights = W
        self.b: LayerBias | Any = b  # Any stands for None, without a test at each use
        self.n_batch_axes = n_batch_axes
        self._sums: dict[str, tuple[Array, Array | None]] = {}  # of halves: a sum, and the same in float32

    def __repr__(self) -> str:
        axes = "" if self.n_batch_axes is None else f", n_batch_axes={self.n_batch_axes}"
        return f"<AffineLayer{axes}: {backends._describe(W=self.W, b=self.b)}>"

    def __getstate__(self) -> Any:
        """All that a copy or a pickle has: not the pending backward, and of the gradients the values alone."""
        state = super().__getstate__()
        attributes, *slots = state if isinstance(state, tuple) else (state,)  # a subclass may have slots
        attributes = {name: value for name, value in attributes.items() if name != "_pending"}
        attributes["_sums"] = {}
        for name in ("dW", "db"):
            gradient = getattr(self, name)
            attributes[name] = None if gradient is None else backends.backend_of(gradient).detached(gradient)
            total, wide = self._sums.get(name, _NO_SUM)
            if total is gradient:  # else another gradient has replaced it
                attributes["_sums"][name] = attributes[name], wide
        return (attributes, *slots) if slots else attributes

    def __setstate__(self, state: Any) -> None:
        for attributes in state if isinstance(state, tuple) else (state,):
            for name, value in attributes.items():
                setattr(self, name, value)

    def __copy__(self) -> Self:
        new = object.__new__(type(self))
        new.__setstate__(self.__getstate__())
        sums = new.dW, new.db, new._sums  # which are added to in place
        new.dW, new.db, new._sums = _deepcopy(sums, [new.dW, new.db, *new._wide_sums()], {})
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = memo[id(self)] = object.__new__(type(self))
        state = self.__getstate__()
        values = [value for part in (state if isinstance(state, tuple) else (state,)) for value in part.values()]
        new.__setstate__(_deepcopy(state, [*self._wide_sums(), *values], memo))
        return new

    def _wide_sums(self) -> list[Array | None]:
        return [wide for _, wide in self._sums.values()]

    @overload
    def __call__(self, x: Unknown) -> Any: ...
    @overload
    def __call__(self, x: NDArray[Scalar]) -> NDArray[Scalar]: ...
    @overload
    def __call__(self, x: Input) -> Input: ...
    def __call__(self, x: Array) -> Array:
        """Compute y = x W + b, as `forward`.

        Parameters
        ----------
        x : array, shape batch + features
            The input.

        Returns
        -------
        array, shape batch + (m,)
            The result y.
        """
        return self.forward(x)

    @overload
    def forward(self, x: Unknown, *, out: Array | None = None) -> Any: ...
    @overload
    def forward(self, x: NDArray[Scalar], *, out: Array | None = None) -> NDArray[Scalar]: ...
    @overload
    def forward(self, x: Input, *, out: Array | None = None) -> Input: ...
    def forward(self, x: Array, *, out: Array | None = None) -> Array:
        """Compute y = x W + b and remember x and W for the backward.

        Parameters
        ----------
        x : array, shape batch + features
            The input; kept by reference until the next forward.
        out : array, shape batch + (m,), optional
            A buffer that is filled with y and returned.

        Returns
        -------
        array, shape batch + (m,)
            The result y, which is `out` where that is given.

        Raises
        ------
        TypeError, ValueError
            As `xaffine.affine`; the layer is then as it was.

        Examples
        --------
        >>> import numpy as np
        >>> layer = AffineLayer.random(6, 4, seed=0)
        >>> layer.forward(np.ones((5, 2, 3), "float32")).shape
        (5, 4)
        """
        W, b = self.W, self.b
        plan, y = checked_forward(x, W, b, self.n_batch_axes, out)
        self._pending = plan, x, W, b
        return y

    # fmt: off
    @overload
    def backward(self, dy: Unknown, *, wrt: Wrt = OPERANDS, accumulate: bool = False,
                 out: Outs | None = None) -> Any: ...
    @overload
    def backward(self, dy: NDArray[Scalar], *, wrt: Of.x | Of.xW | Of.xb | Of.xWb = OPERANDS, accumulate: bool = False,
                 out: Outs | None = None) -> NDArray[Scalar]: ...
    @overload
    def backward(self, dy: Output, *, wrt: Of.x | Of.xW | Of.xb | Of.xWb = OPERANDS, accumulate: bool = False,
                 out: Outs | None = None) -> Output: ...
    @overload
    def backward(self, dy: Array, *, wrt: Of.W | Of.b | Of.Wb, accumulate: bool = False,
                 out: Outs | None = None) -> None: ...
    @overload
    def backward(self, dy: Output, *, wrt: Wrt, accumulate: bool = False,
                 out: Outs | None = None) -> Output | None: ...
    # fmt: on
    def backward(self, dy: Array, *, wrt: Wrt = OPERANDS, accumulate: bool = False, out: Outs | None = None) -> Array:
        """Compute the gradients at the latest forward; store dW and db, return dx.

        Parameters
        ----------
        dy : array, shape batch + (m,)
            ∂L/∂y for the latest y.
        wrt : iterable of {"x", "W", "b"}, optional
            The gradients wanted. The others are None and cost nothing.
        accumulate : bool, optional
            Add to dW and db what comes, so that the parts of a batch give the gradients of the whole: in place where
            the arrays can be written, so that whoever holds them sees the sum. Those that are not wanted stay as they
            are, and None counts as zero.
        out : tuple (dx, dW, db) of arrays or None, optional
            Buffers that are filled with the gradients, returned or stored; None where a new array is wanted.

        Returns
        -------
        array or None
            ∂L/∂x, with the shape and the dtype of x; None where it is not wanted.

        Raises
        ------
        RuntimeError
            There was no forward yet.
        TypeError, ValueError
            As `xaffine.affine_backward`; also for `accumulate` with buffers for dW or db, or onto a dW or db of
            another shape or library. The layer is then as it was.

        Notes
        -----
        Sums of half-precision gradients are kept in float32 beside dW and db, which are rounded from them each time. A
        dW that was assigned anew starts a new sum; what is written into one is not seen.

        Outside ``torch.no_grad()``, autograd records what is computed from a ``torch.nn.Parameter``: a dW or db can
        then be differentiated once more, and keeps its batch in memory for that. Sums are stored without that record,
        which would keep every batch; they cannot be differentiated.

        Examples
        --------
        >>> import numpy as np
        >>> layer = AffineLayer(np.asarray([[1.0], [2.0]]), np.asarray([3.0]))
        >>> for part in np.asarray([[[1.0, 0.0]], [[0.0, 1.0]]]):
        ...     y = layer(part)
        ...     dx = layer.backward(y, accumulate=True)
        >>> layer.dW.tolist(), layer.db.tolist()
        ([[4.0], [5.0]], [9.0])
        """
        if self._pending is None:
            msg = "backward needs a forward before it: call layer.forward(x) first"
            raise RuntimeError(msg)
        plan, x, W, b = self._pending
        if not accumulate:
            dx, self.dW, self.db = checked_backward(plan, x, W, b, dy, out, wrt)
            if self._sums:  # a buffer that held a sum may hold a gradient now
                self._sums = {}
            return dx
        if out is not None:
            msg = "accumulate adds to dW and db in place, and out names other places for them: leave out one of the two"
            raise ValueError(msg)
        dx, dW, db = checked_backward(plan, x, W, b, dy, None, wrt)
        if dW is None and db is None:
            return dx
        sums = check_sums(plan.backend, (self.dW, self.db), (dW, db))  # both before one is stored
        dW, wide_dW = self._sum(sums, "dW", self.dW, dW)
        db, wide_db = self._sum(sums, "db", self.db, db)
        self.dW, self.db = dW, db
        if sums.widens or self._sums:
            self._sums = {"dW": (dW, wide_dW), "db": (db, wide_db)}
        return dx

    def _sum(self, plan: SumPlan, name: str, old: Array | None, new: Array | None) -> tuple[Array, Array | None]:
        """Return old + new, where None is zero, and, for half precision, the running float32 sum."""
        if old is None:
            return None if new is None else plan.backend.detached(new), None
        wide = None
        if self._sums:
            known, wide = self._sums.get(name, _NO_SUM)
            wide = wide if known is old else None
        if new is None:
            return old, wide
        if plan.backend.calls_directly:
            return add(plan, old, new, wide)
        return plan.backend.run(add, plan, old, new, wide)

    # fmt: off
    @overload
    @classmethod
    def random(
        cls: type[Original], n: int, m: int, *, backend: Literal["numpy"] = "numpy", device: Any = None,
        dtype: str = "float32", bias: bool = True, scheme: initializers.Scheme = "kaiming_uniform",
        seed: int | None = None, n_batch_axes: int | None = None,
    ) -> AffineLayer[NDArray[Any], NDArray[Any]]: ...
    @overload
    @classmethod
    def random(
        cls, n: int, m: int, *, backend: backends.Name | str = "numpy", device: Any = None,
        dtype: str = "float32", bias: bool = True, scheme: initializers.Scheme = "kaiming_uniform",
        seed: int | None = None, n_batch_axes: int | None = None,
    ) -> Self: ...
    # fmt: on
    @classmethod
    def random(
        cls,
        n: int,
        m: int,
        *,
        backend: backends.Name | str = "numpy",
        device: Any = None,
        dtype: str = "float32",
        bias: bool = True,
        scheme: initializers.Scheme = "kaiming_uniform",
        seed: int | None = None,
        n_batch_axes: int | None = None,
    ) -> Any:
        """Make a layer with random weights and a bias of zeros.

        Parameters
        ----------
        n, m : int
            Input and output features.
        backend : str
            The name of a backend, one of `xaffine.backends.names`.
        device : optional
            One of its devices, or its text; the default one if not given.
        dtype : str
            A floating one of its dtypes.
        bias : bool
            Whether there is a b.
        scheme : str
            One of `xaffine.initializers.SCHEMES`, whose formulas and sources are there: kaiming (he), xavier
            (glorot) or lecun, each uniform or normal, or zeros.
        seed : int, optional
            The same one gives the same weights, to the last bit, on every backend; by default fresh ones.
        n_batch_axes : int, optional
            As in the constructor.

        Raises
        ------
        TypeError, ValueError
            As `xaffine.initializers.draw`; ValueError too for a dtype that the backend lacks or that is no floating
            one; ImportError and RuntimeError as `xaffine.backends.get`.

        Examples
        --------
        >>> layer = AffineLayer.random(64, 10, seed=0)
        >>> layer
        <AffineLayer: W is float32 (64, 10) (numpy on cpu); b is float32 (10,) (numpy on cpu)>
        """
        library = backends.get(backend)
        device = None if device is None else library.device(device)
        floating = [name for name in library.dtypes(device) if "int" not in name]
        if dtype not in floating:
            msg = f"weights are drawn in one of {', '.join(floating)} on {backend}, not in {dtype!r}"
            raise ValueError(msg)
        W = initializers.draw(scheme, n, m, seed=seed, complex_=dtype.startswith("complex"))
        b = W[:0].sum(axis=0) if bias else None
        weights: list[Any] = [
            None if array is None else library.from_values(array, dtype, device=device) for array in (W, b)
        ]
        return cls(*weights, n_batch_axes=n_batch_axes)

    # fmt: off
    @overload
    def to(self: Original, backend: Literal["numpy"], device: Any = None,
           dtype: str | None = None) -> AffineLayer[NDArray[Any], NDArray[Any]]: ...
    @overload
    def to(self: Original, backend: backends.Name | str, device: Any = None,
           dtype: str | None = None) -> AffineLayer: ...
    @overload
    def to(self, backend: backends.Name | str, device: Any = None, dtype: str | None = None) -> Self: ...
    # fmt: on
    def to(self, backend: backends.Name | str, device: Any = None, dtype: str | None = None) -> Any:
        """Bring the layer to another library, device or dtype: train on CuPy, serve on NumPy.

        Parameters
        ----------
        backend : str
            The name of a backend, one of `xaffine.backends.names`.
        device : optional
            One of its devices, or its text; by default where the weights are, also in another library if it has that
            GPU, else the default one.
        dtype : str, optional
            One of its dtypes, by default that of each weight.

        Returns
        -------
        AffineLayer
            A new layer without gradients. Weights that need not change are shared with this one; others are copies.

        Raises
        ------
        TypeError, ValueError
            As `xaffine.backends.move`; ImportError and RuntimeError as `xaffine.backends.get`.

        Examples
        --------
        >>> layer = AffineLayer.random(3, 2, dtype="float32")
        >>> layer.to("numpy").W is layer.W, layer.to("numpy", dtype="float64").W.dtype.name
        (True, 'float64')
        """
        library = backends.get(backend)
        device = None if device is None else library.device(device)
        moved: list[Any] = [
            None if array is None else backends.move(array, library, device=device, dtype=dtype)
            for array in (self.W, self.b)
        ]
        return type(self)(*moved, n_batch_axes=self.n_batch_axes)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save W, b and n_batch_axes to a file (extra ``io``); a file that was there is replaced in one step.

        Parameters
        ----------
        path : path-like
            A safetensors file with tensors "W" and "b", which that library reads by itself. A symbolic link is
            followed.

        Raises
        ------
        ImportError
            safetensors is not installed.
        OSError
            The file cannot be written, or the path is that of a folder, a device or a pipe; what was there stays.
        TypeError
            A dtype that the format lacks: complex128.
        TypeError, ValueError
            Weights that make no layer, as in the constructor.

        Notes
        -----
        The new file has the mode of the old one, and its owner, group and extended attributes where that is allowed.
        Other names of the old file (hard links) keep the old one.

        Examples
        --------
        >>> import tempfile
        >>> layer = AffineLayer.random(3, 2, seed=0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     layer.save(f"{folder}/layer.safetensors")
        ...     again = AffineLayer.load(f"{folder}/layer.safetensors")
        >>> bool((again.W == layer.W).all())
        True
        """
        from xaffine import _storage as storage  # hashes and JSON, whose import takes as long as all the rest

        check_parameters(self.W, self.b)
        storage.write(path, self.W, self.b, self.n_batch_axes)

    # fmt: off
    @overload
    @classmethod
    def load(cls: type[Original], path: str | os.PathLike[str], *, backend: Literal["numpy"] = "numpy",
             device: Any = None) -> AffineLayer[NDArray[Any], NDArray[Any]]: ...
    @overload
    @classmethod
    def load(cls, path: str | os.PathLike[str], *, backend: backends.Name | str = "numpy",
             device: Any = None) -> Self: ...
    # fmt: on
    @classmethod
    def load(cls, path: str | os.PathLike[str], *, backend: backends.Name | str = "numpy", device: Any = None) -> Any:
        """Load what `save` saved (extra ``io``).

        Parameters
        ----------
        path : path-like
            The file. Nothing in it is ever run.
        backend : str
            The name of the backend whose arrays to make, whichever they were.
        device : optional
            One of its devices, or its text.

        Raises
        ------
        ImportError, RuntimeError
            safetensors is not installed; or as `xaffine.backends.get`.
        OSError
            The file cannot be read.
        ValueError
            It is not what was saved: truncated, changed, another format; or a dtype that the backend lacks.

        Examples
        --------
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     AffineLayer.random(3, 2, n_batch_axes=-1).save(f"{folder}/layer.safetensors")
        ...     AffineLayer.load(f"{folder}/layer.safetensors")
        <AffineLayer, n_batch_axes=-1: W is float32 (3, 2) (numpy on cpu); b is float32 (2,) (numpy on cpu)>
        """
        from xaffine import _storage as storage  # as in save

        library = backends.get(backend)
        W, b, n_batch_axes = storage.read(path, library, None if device is None else library.device(device))
        return cls(W, b, n_batch_axes=n_batch_axes)

    # fmt: off
    @overload
    @classmethod
    def load_linear(cls: type[Original], path: str | os.PathLike[str], prefix: str = "", *,
                    backend: Literal["numpy"] = "numpy",
                    device: Any = None) -> AffineLayer[NDArray[Any], NDArray[Any]]: ...
    @overload
    @classmethod
    def load_linear(cls, path: str | os.PathLike[str], prefix: str = "", *, backend: backends.Name | str = "numpy",
                    device: Any = None) -> Self: ...
    # fmt: on
    @classmethod
    def load_linear(
        cls,
        path: str | os.PathLike[str],
        prefix: str = "",
        *,
        backend: backends.Name | str = "numpy",
        device: Any = None,
    ) -> Any:
        """Load a linear layer of torch, or of whoever stores ``weight`` (m, n) and ``bias`` (m,) (extra ``io``).

        Parameters
        ----------
        path : path-like
            A safetensors checkpoint, of which no more is read than the layer.
        prefix : str
            What stands before "weight" and "bias", such as "encoder.fc1.".
        backend, device
            As in `load`.

        Raises
        ------
        ImportError, RuntimeError, OSError, ValueError
            As `load`; ValueError too where the checkpoint has no such weight, or more than a weight and a bias.

        Notes
        -----
        Every tensor whose name begins with the prefix must be one of the two: scales of quantised weights, adapters and
        the like change what the layer computes. The empty prefix therefore takes a file of one layer and nothing else.

        A ``torch.nn.Linear`` in memory needs no file: ``AffineLayer(linear.weight.detach().mT, linear.bias.detach())``
        shares its weights.

        Examples
        --------
        >>> import tempfile
        >>> import numpy as np
        >>> from safetensors.numpy import save_file
        >>> weights = {"fc.weight": np.asarray([[1.0, 2.0]]), "fc.bias": np.asarray([3.0])}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file(weights, f"{folder}/model.safetensors")
        ...     layer = AffineLayer.load_linear(f"{folder}/model.safetensors", "fc.")
        >>> layer.W.tolist(), layer.b.tolist()
        ([[1.0], [2.0]], [3.0])
        """
        from xaffine import _storage as storage  # as in save

        library = backends.get(backend)
        device = None if device is None else library.device(device)
        W, b = storage.read_linear(path, prefix, library, device)
        return cls(W, b, n_batch_axes=-1)


def add(plan: SumPlan, sum_so_far: Array, gradient: Array, wide: Array | None) -> tuple[Array, Array | None]:
    """Add a gradient to a sum and, for half precision, to the running float32 sum: as values, without their record.

    The sum is written where the old one is if possible, so that whoever holds it sees the new one.
    """
    backend, dtype = plan.backend, sum_so_far.dtype
    in_place = backend.adds_in_place(sum_so_far)
    gradient = backend.detached(gradient)
    if plan.widens and (wider := backend.wide(dtype)) != dtype:
        wide = backend.cast(backend.detached(sum_so_far), wider) if wide is None else wide
        wide = backend.xp.add(wide, backend.cast(gradient, wider))
        total = backend.cast(wide, dtype)
        if in_place:
            sum_so_far[...] = total
        return (sum_so_far if in_place else total), wide
    if plan.casts:
        gradient = backend.cast(gradient, dtype)
    if in_place:
        sum_so_far += gradient
        return sum_so_far, None
    return backend.xp.add(backend.detached(sum_so_far), gradient), None


def _deepcopy(whole: Any, parts: Iterable[Any], memo: dict[int, Any]) -> Any:
    """Copy in depth; those parts that ``copy.deepcopy`` refuses go through a pickle."""
    for part in parts:
        if id(part) not in memo and not _is_copyable(part):
            memo[id(part)] = pickle.loads(pickle.dumps(part))  # noqa: S301 - our own
    return copy.deepcopy(whole, memo)


def _is_copyable(part: Any) -> bool:
    try:
        return backends.backend_of(part).is_copyable(part)
    except TypeError:  # no array
        return True
