"""Layers in files: what is saved comes back, whole or not at all, and nothing else does."""

from __future__ import annotations

import builtins
import json
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

safetensors = pytest.importorskip("safetensors", reason="the extra io is not installed")
from safetensors.numpy import load_file, save_file  # noqa: E402 - after it is known to be there

from xaffine import AffineLayer, storage  # noqa: E402
from xaffine.backends import Backend  # noqa: E402


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "layer.safetensors"


def test_what_is_saved_comes_back(backend: Backend, device: Any, file: Path) -> None:
    for dtype in [d for d in backend.dtypes(device) if "int" not in d and d != "complex128"]:
        for n, m in ((5, 4), (0, 4), (5, 0)):
            layer = AffineLayer.random(n, m, xp=backend.name, device=device, dtype=dtype, seed=1, n_batch_axes=-1)
            layer.save(file)
            back = AffineLayer.load(file, xp=backend.name, device=device)
            for name in ("W", "b"):
                old, new = getattr(layer, name), getattr(back, name)
                assert (new.dtype, type(new)) == (old.dtype, type(old))
                assert np.array_equal(backend.to_numpy(new), backend.to_numpy(old))
            assert back.n_batch_axes == -1


def test_integers_and_no_bias_come_back(backend: Backend, device: Any, file: Path) -> None:
    for dtype in [d for d in backend.dtypes(device) if "int" in d]:
        W = backend.from_numpy(np.arange(6).reshape(2, 3).astype(dtype), device=device)
        AffineLayer(W).save(file)
        back = AffineLayer.load(file, xp=backend.name, device=device)
        assert back.b is back.n_batch_axes is None
        assert back.W.dtype == W.dtype
        assert np.array_equal(backend.to_numpy(back.W), backend.to_numpy(W))


def test_other_libraries_read_it(backend: Backend, file: Path) -> None:
    layer = AffineLayer.random(5, 4, xp=backend.name, seed=1)
    layer.save(file)
    tensors = load_file(file)
    assert tensors.keys() == {"W", "b"}
    assert np.array_equal(tensors["W"], backend.to_numpy(layer.W))
    assert np.array_equal(AffineLayer.load(file).W, tensors["W"])
    with safetensors.safe_open(file, framework="np") as opened:
        metadata = opened.metadata()
    assert (metadata["format"], metadata["version"], metadata["n_batch_axes"]) == ("xaffine", "1", "None")


@pytest.mark.once
@pytest.mark.parametrize("layout", [np.asfortranarray, lambda a: a[::-1], lambda a: a.astype(">f4")])
def test_any_memory_is_saved(file: Path, layout: Any) -> None:
    W = layout(np.arange(6, dtype=np.float32).reshape(2, 3))
    storage.write(file, W, None, None)
    assert np.array_equal(AffineLayer.load(file).W, W)
    loaded = AffineLayer.load(file).W
    assert loaded.flags.writeable
    assert loaded.dtype.isnative


@pytest.mark.once
def test_bfloat16_needs_no_library_to_be_stored(file: Path) -> None:
    layer = AffineLayer.random(5, 4, dtype="bfloat16", seed=1)
    layer.save(file)
    with safetensors.safe_open(file, framework="np") as opened:
        assert opened.get_slice("W").get_dtype() == "BF16"
    assert AffineLayer.load(file).W.dtype.name == "bfloat16"
    assert np.array_equal(AffineLayer.load(file).W, layer.W)


@pytest.mark.once
def test_dtype_that_the_format_lacks_is_refused(file: Path) -> None:
    with pytest.raises(TypeError, match=r"has no complex128, the dtype of W\. Cast first: layer\.to\(\.\.\., dtype"):
        AffineLayer.random(2, 2, dtype="complex128").save(file)
    assert not file.exists()


@pytest.mark.once
def test_dtype_that_the_backend_lacks_is_refused(file: Path) -> None:
    AffineLayer.random(2, 2, dtype="float16").save(file)
    with pytest.raises(ValueError, match="holds W in float16, which array-api-strict does not have"):
        AffineLayer.load(file, xp="array-api-strict")


@pytest.mark.once
class TestWriting:
    """The old file or the new one, whole."""

    def test_replaces_in_one_step(self, file: Path) -> None:
        old, new = (AffineLayer.random(5, 4, seed=seed) for seed in (1, 2))
        old.save(file)
        new.save(file)
        assert np.array_equal(AffineLayer.load(file).W, new.W)
        assert list(file.parent.iterdir()) == [file]
        umask = os.umask(0)
        os.umask(umask)
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask

    @pytest.mark.parametrize("step", ["write", "fsync", "replace"])
    def test_failure_leaves_the_old_file(self, monkeypatch: pytest.MonkeyPatch, file: Path, step: str) -> None:
        old = AffineLayer.random(5, 4, seed=1)
        old.save(file)
        before = file.read_bytes()

        def fail(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        if step == "write":
            opened = Path.open

            class Full:
                def __init__(self, inner: Any) -> None:
                    self.inner = inner

                def __enter__(self) -> Any:
                    return self

                def __exit__(self, *_: Any) -> None:
                    self.inner.close()

                def write(self, data: bytes) -> None:
                    self.inner.write(data[: len(data) // 2])
                    fail()

            monkeypatch.setattr(Path, "open", lambda self, mode: Full(opened(self, mode)))
        else:
            monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), fail)
        with pytest.raises(OSError, match="No space left"):
            AffineLayer.random(5, 4, seed=2).save(file)
        monkeypatch.undo()
        assert file.read_bytes() == before
        assert list(file.parent.iterdir()) == [file]
        assert np.array_equal(AffineLayer.load(file).W, old.W)

    def test_all_is_on_disk_before_the_name_is(self, monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
        steps: list[str] = []
        replace, fsync = Path.replace, os.fsync
        monkeypatch.setattr(os, "fsync", lambda fd: (steps.append("fsync"), fsync(fd))[1])
        monkeypatch.setattr(Path, "replace", lambda old, new: (steps.append("replace"), replace(old, new))[1])
        AffineLayer.random(2, 2).save(file)
        assert steps == ["fsync", "replace", "fsync"]

    def test_folders_that_cannot_be_synced_are_left_alone(self, monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
        def refuse(*_: Any) -> int:
            raise PermissionError

        monkeypatch.setattr(os, "open", refuse)
        storage._sync_folder(file.parent)

    def test_folder_that_is_not_there_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            AffineLayer.random(2, 2).save(tmp_path / "nowhere" / "layer")
        with pytest.raises(FileNotFoundError):
            AffineLayer.load(tmp_path / "nothing")

    def test_without_safetensors_it_says_how_to_get_it(self, monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
        real = builtins.__import__

        def no_safetensors(name: str, *rest: Any) -> Any:
            if name == "safetensors":
                raise ImportError(name)
            return real(name, *rest)

        monkeypatch.setattr(builtins, "__import__", no_safetensors)
        for call in (AffineLayer.random(2, 2).save, AffineLayer.load):
            with pytest.raises(ModuleNotFoundError, match=r'pip install "xaffine\[io\]"'):
                call(file)


def header_of(data: bytes) -> dict[str, Any]:
    return dict(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]))


def with_header(data: bytes, header: Any) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + int.from_bytes(data[:8], "little") :]


@pytest.mark.once
class TestReading:
    """Nothing but what was saved."""

    @pytest.fixture
    def data(self, file: Path) -> bytes:
        AffineLayer.random(5, 4, seed=1, n_batch_axes=1).save(file)
        return file.read_bytes()

    def refused(self, file: Path, data: bytes, words: str) -> None:
        file.write_bytes(data)
        with pytest.raises(ValueError, match=words):
            AffineLayer.load(file)

    @pytest.mark.parametrize("length", [0, 7, 8, 100, -1])
    def test_truncated_file(self, file: Path, data: bytes, length: int) -> None:
        self.refused(file, data[:length], r"layer\.safetensors is no safetensors file, or a damaged one: ")

    def test_longer_file(self, file: Path, data: bytes) -> None:
        self.refused(file, data + b"\0", "or a damaged one")

    def test_renamed_pickle_is_not_run(self, file: Path, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> Any:
                return (Path.touch, (tmp_path / "ran",))

        self.refused(file, pickle.dumps(Evil()), "is no safetensors file")
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize(
        "start",
        [
            b"\xff" * 8,
            (2**62).to_bytes(8, "little"),
            (10**8).to_bytes(8, "little"),
            (4).to_bytes(8, "little") + b"null",
            (2).to_bytes(8, "little") + b"[]",
            (100_000).to_bytes(8, "little") + b"[" * 100_000,
        ],
    )
    def test_hostile_header(self, file: Path, data: bytes, start: bytes) -> None:
        self.refused(file, start + data[8:], "is no safetensors file, or a damaged one|was not saved by")

    @pytest.mark.parametrize("offsets", [[0, 2**63], [-4, 76], [76, 0], [0, 0], [16, 96], [8, 88]], ids=str)
    def test_hostile_offsets(self, file: Path, data: bytes, offsets: list[int]) -> None:
        header = header_of(data)
        header["W"]["data_offsets"] = offsets
        self.refused(file, with_header(data, header), "is no safetensors file, or a damaged one")

    @pytest.mark.parametrize(
        "change",
        [
            {"dtype": "I32"},
            {"dtype": "F16", "shape": [10, 4]},
            {"shape": [4, 5]},
            {"shape": [20]},
            {"shape": [5, 2, 2]},
        ],
        ids=str,
    )
    def test_wrong_dtype_or_shape(self, file: Path, data: bytes, change: Any) -> None:
        header = header_of(data)
        header["W"].update(change)
        self.refused(file, with_header(data, header), "was changed after it was saved: its SHA-256 is another")

    def test_missing_and_strange_names(self, file: Path, data: bytes) -> None:
        header = header_of(data)
        header["V"] = header.pop("W")
        self.refused(file, with_header(data, header), r"must hold W, and b or not; it holds \['V', 'b'\]")
        save_file({"b": np.ones(4, "f")}, file, header["__metadata__"])
        self.refused(file, file.read_bytes(), r"it holds \['b'\]")

    def test_bias_that_is_gone(self, file: Path, data: bytes) -> None:
        tensors, metadata = load_file(file), header_of(data)["__metadata__"]
        save_file({"W": tensors["W"]}, file, metadata)
        self.refused(file, file.read_bytes(), "SHA-256")

    @pytest.mark.parametrize("change", [{"version": "2"}, {"format": "pt"}, {"format": None}])
    def test_other_format_or_version(self, file: Path, data: bytes, change: Any) -> None:
        metadata = {k: v for k, v in (header_of(data)["__metadata__"] | change).items() if v is not None}
        save_file(load_file(file), file, metadata)
        self.refused(file, file.read_bytes(), r"was not saved by AffineLayer\.save in format version 1: .*load_linear")

    def test_file_without_metadata(self, file: Path) -> None:
        save_file({"W": np.ones((2, 2), "f")}, file)
        self.refused(file, file.read_bytes(), "was not saved by")

    def test_changed_batch_axes(self, file: Path, data: bytes) -> None:
        metadata = header_of(data)["__metadata__"] | {"n_batch_axes": "0"}
        save_file(load_file(file), file, metadata)
        self.refused(file, file.read_bytes(), "SHA-256")

    def test_dtypes_that_no_layer_has(self, file: Path, data: bytes) -> None:
        save_file({"W": np.ones((2, 2), bool)}, file, header_of(data)["__metadata__"])
        self.refused(file, file.read_bytes(), r"it holds \[\]")

    def test_long_texts_are_cut(self) -> None:
        assert len(storage._short("x" * 1000)) == 201

    def test_ten_thousand_corrupted_files(self, file: Path, data: bytes) -> None:
        """Bytes flipped, dropped, doubled, cut, spliced: a ValueError, or the very weights that were saved."""
        rng = np.random.default_rng(0)
        saved = AffineLayer.load(file)
        refused = 0
        for _ in range(10_000):
            corrupted = bytearray(data)
            for _ in range(rng.integers(1, 4)):
                at, length = rng.integers(len(corrupted) + 1), int(rng.geometric(0.2))
                match rng.integers(5):
                    case 0:
                        if at < len(corrupted):
                            corrupted[at] ^= 1 << rng.integers(8)
                    case 1:
                        del corrupted[at : at + length]
                    case 2:
                        corrupted[at:at] = rng.bytes(length)
                    case 3:
                        corrupted[at : at + length] = data[:length]
                    case _:
                        del corrupted[at:]
            file.write_bytes(corrupted)
            try:
                layer = AffineLayer.load(file)
            except ValueError:
                refused += 1
                continue
            assert np.array_equal(layer.W, saved.W)
            assert np.array_equal(layer.b, saved.b)
            assert layer.n_batch_axes == saved.n_batch_axes
        assert refused > 9_000


class TestLinear:
    """Checkpoints of others: weight (m, n) and bias (m,)."""

    def test_weights_are_transposed(self, backend: Backend, device: Any, file: Path) -> None:
        weight, bias = np.arange(6, dtype="f").reshape(2, 3), np.ones(2, "f")
        save_file({"fc.weight": weight, "fc.bias": bias, "norm.weight": bias}, file)
        layer = AffineLayer.load_linear(file, "fc.", xp=backend.name, device=device)
        assert np.array_equal(backend.to_numpy(layer.W), weight.T)
        assert np.array_equal(backend.to_numpy(layer.b), bias)
        x = np.arange(12, dtype="f").reshape(2, 2, 3)  # as nn.Linear maps the last axis
        y = layer(backend.from_numpy(x, device=device))
        assert np.array_equal(backend.to_numpy(y), x @ weight.T + bias)

    @pytest.mark.once
    def test_bias_may_be_missing(self, file: Path) -> None:
        save_file({"weight": np.ones((2, 3), "f")}, file)
        assert AffineLayer.load_linear(file).b is None

    @pytest.mark.once
    def test_what_is_no_linear_layer_is_refused(self, file: Path) -> None:
        save_file({"a.weight": np.ones((2, 3), "f"), "a.bias": np.ones(3, "f"), "c.weight": np.ones(3, "f")}, file)
        with pytest.raises(ValueError, match=r"has no weight; the prefixes of a weight in it are \['a\.', 'c\.'\]"):
            AffineLayer.load_linear(file)
        with pytest.raises(ValueError, match=r"a\.weight must have the shape \(m, n\) and a\.bias \(m,\); they have"):
            AffineLayer.load_linear(file, "a.")
        with pytest.raises(ValueError, match=r"they have \(3,\)$"):
            AffineLayer.load_linear(file, "c.")
        file.write_bytes(b"nothing of the kind")
        with pytest.raises(ValueError, match="is no safetensors file"):
            AffineLayer.load_linear(file)
