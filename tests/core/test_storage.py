"""Layers in files: what is saved comes back, whole or not at all, and nothing else does."""

from __future__ import annotations

import builtins
import json
import math
import os
import pickle
import re
import resource
import stat
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

safetensors = pytest.importorskip("safetensors", reason="the extra io is not installed")
from safetensors.numpy import load_file, save_file  # noqa: E402 - after it is known to be there

from tests.helpers import floating_dtypes  # noqa: E402
from xaffine import AffineLayer, _storage  # noqa: E402
from xaffine.backends import Backend  # noqa: E402


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "layer.safetensors"


def test_what_is_saved_comes_back(backend: Backend, device: Any, file: Path) -> None:
    for dtype in set(floating_dtypes(backend, device)) - {"complex128"}:
        for n, m in ((5, 4), (0, 4), (5, 0)):
            layer = AffineLayer.random(n, m, backend=backend.name, device=device, dtype=dtype, seed=1, n_batch_axes=-1)
            layer.save(file)
            back = AffineLayer.load(file, backend=backend.name, device=device)
            for name in ("W", "b"):
                old, new = getattr(layer, name), getattr(back, name)
                assert (new.dtype, type(new)) == (old.dtype, type(old))
                assert np.array_equal(backend.to_numpy(new), backend.to_numpy(old))
            assert back.n_batch_axes == -1


def test_integers_and_no_bias_come_back(backend: Backend, device: Any, file: Path) -> None:
    for dtype in [d for d in backend.dtypes(device) if "int" in d]:
        W = backend.from_numpy(np.arange(6).reshape(2, 3).astype(dtype), device=device)
        AffineLayer(W).save(file)
        back = AffineLayer.load(file, backend=backend.name, device=device)
        assert back.b is back.n_batch_axes is None
        assert back.W.dtype == W.dtype
        assert np.array_equal(backend.to_numpy(back.W), backend.to_numpy(W))


def test_other_libraries_read_it(backend: Backend, file: Path) -> None:
    layer = AffineLayer.random(5, 4, backend=backend.name, seed=1)
    layer.save(file)
    tensors = load_file(file)
    assert tensors.keys() == {"W", "b"}
    assert np.array_equal(tensors["W"], backend.to_numpy(layer.W))
    assert np.array_equal(AffineLayer.load(file).W, tensors["W"])
    with safetensors.safe_open(file, framework="np") as opened:
        metadata = opened.metadata()
    assert (metadata["format"], metadata["version"], metadata["n_batch_axes"]) == ("xaffine", "1", "None")


@pytest.mark.parametrize("layout", [np.asfortranarray, lambda a: a[::-1], lambda a: a.astype(">f4")])
def test_any_memory_is_saved(file: Path, layout: Any) -> None:
    W = layout(np.arange(6, dtype=np.float32).reshape(2, 3))
    _storage.write(file, W, None, None)
    assert np.array_equal(AffineLayer.load(file).W, W)
    loaded = AffineLayer.load(file).W
    assert loaded.flags.writeable
    assert loaded.dtype.isnative


def test_bfloat16_needs_no_library_to_be_stored(file: Path) -> None:
    layer = AffineLayer.random(5, 4, dtype="bfloat16", seed=1)
    layer.save(file)
    with safetensors.safe_open(file, framework="np") as opened:
        assert opened.get_slice("W").get_dtype() == "BF16"
    assert AffineLayer.load(file).W.dtype.name == "bfloat16"
    assert np.array_equal(AffineLayer.load(file).W, layer.W)


def test_dtype_that_the_format_lacks_is_refused(file: Path) -> None:
    with pytest.raises(TypeError, match=r"has no complex128, the dtype of W\. Cast first: layer\.to\(\.\.\., dtype"):
        AffineLayer.random(2, 2, dtype="complex128").save(file)
    assert not file.exists()


def test_dtype_that_the_backend_lacks_is_refused(file: Path) -> None:
    AffineLayer.random(2, 2, dtype="float16").save(file)
    with pytest.raises(ValueError, match="holds W in float16, which array-api-strict does not have"):
        AffineLayer.load(file, backend="array-api-strict")


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

        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if step == "write":
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        else:
            monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), fail)
        try:
            with pytest.raises(OSError, match=r"No space left|File too large"):
                AffineLayer.random(5, 4, seed=2).save(file)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
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

    @pytest.mark.parametrize("mode", [0o600, 0o640, 0o666])
    def test_mode_is_kept_and_never_wider(self, monkeypatch: pytest.MonkeyPatch, file: Path, mode: int) -> None:
        AffineLayer.random(2, 2).save(file)
        file.chmod(mode)
        os.utime(file, (0, 0))
        seen: list[int] = []
        header = _storage._header

        def look(*arguments: Any) -> bytes:  # while the new file is still empty
            seen.extend(stat.S_IMODE(entry.stat().st_mode) for entry in file.parent.iterdir() if entry != file)
            return header(*arguments)

        monkeypatch.setattr(_storage, "_header", look)
        new = AffineLayer.random(5, 4, seed=1)
        new.save(file)
        assert seen == [0o600]
        assert stat.S_IMODE(file.stat().st_mode) == mode
        assert file.stat().st_mtime > 0
        assert np.array_equal(AffineLayer.load(file).W, new.W)

    @pytest.mark.parametrize("umask", [0o077, 0o027, 0o000])
    def test_new_file_follows_the_umask(self, file: Path, umask: int) -> None:
        before = os.umask(umask)
        try:
            AffineLayer.random(2, 2).save(file)
        finally:
            os.umask(before)
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask

    def test_group_that_cannot_be_kept_loses_its_rights(self, monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
        AffineLayer.random(2, 2).save(file)
        file.chmod(0o664)

        def refuse(*_: Any) -> None:
            raise PermissionError

        facts = list(file.stat())
        facts[stat.ST_GID] += 1
        new = file.with_name("new")
        new.touch(0o600)
        monkeypatch.setattr(os, "chown", refuse)
        _storage._keep_rights(file, os.stat_result(facts), new)
        assert stat.S_IMODE(new.stat().st_mode) == 0o604

    def test_links_are_followed(self, file: Path, tmp_path: Path) -> None:
        (tmp_path / "elsewhere").mkdir()
        first, second = tmp_path / "first", tmp_path / "second"
        target = tmp_path / "elsewhere" / file.name
        first.symlink_to("second")
        second.symlink_to(Path("elsewhere") / file.name)  # to nothing, as yet
        for seed in (1, 2):
            layer = AffineLayer.random(5, 4, seed=seed)
            layer.save(first)
            assert first.is_symlink()
            assert second.is_symlink()
            assert not target.is_symlink()
            assert np.array_equal(AffineLayer.load(target).W, layer.W)
            assert np.array_equal(AffineLayer.load(first).W, layer.W)
        assert list(target.parent.iterdir()) == [target]
        loop = tmp_path / "loop"
        loop.symlink_to(loop)
        for call in (AffineLayer.random(2, 2).save, AffineLayer.load):
            with pytest.raises(OSError, match="symbolic links"):
                call(loop)
        assert loop.is_symlink()

    def test_other_names_of_the_old_file_keep_it(self, file: Path, tmp_path: Path) -> None:
        old, other = AffineLayer.random(5, 4, seed=1), tmp_path / "other"
        old.save(file)
        other.hardlink_to(file)
        AffineLayer.random(5, 4, seed=2).save(file)
        assert np.array_equal(AffineLayer.load(other).W, old.W)

    @pytest.mark.parametrize("name", ["n" * 255, "é" * 127, ".", "with space\n"])
    def test_name_may_have_all_bytes(self, tmp_path: Path, name: str) -> None:
        file = tmp_path / "folder" / name
        (tmp_path / "folder").mkdir()
        if name == ".":
            with pytest.raises(IsADirectoryError):
                AffineLayer.random(2, 2).save(file)
            return
        for _ in range(2):
            AffineLayer.random(2, 2, seed=1).save(file)
        assert np.array_equal(AffineLayer.load(file).W, AffineLayer.random(2, 2, seed=1).W)
        assert [entry.name for entry in file.parent.iterdir()] == [name]

    def test_what_is_no_regular_file_stays(self, tmp_path: Path) -> None:
        pipe, link = tmp_path / "pipe", tmp_path / "link"
        os.mkfifo(pipe)
        link.symlink_to(os.devnull)
        for call in (AffineLayer.random(2, 2).save, AffineLayer.load, AffineLayer.load_linear):
            for path in (pipe, link, Path(os.devnull)):
                with pytest.raises(OSError, match="is kept in a regular file, not in a device, a pipe or a socket"):
                    call(path)
            with pytest.raises(IsADirectoryError, match=str(tmp_path)):
                call(tmp_path)
        assert pipe.is_fifo()
        assert Path(os.devnull).is_char_device()
        assert {entry.name for entry in tmp_path.iterdir()} == {"pipe", "link"}

    def test_weights_that_make_no_layer_are_not_saved(self, file: Path) -> None:
        layer = AffineLayer.random(3, 2)
        layer.b = np.zeros(3, "f")
        with pytest.raises(ValueError, match=r"b must have the shape \(m,\) = \(2,\)"):
            layer.save(file)
        layer.b = np.zeros(2, int)
        with pytest.raises(TypeError, match="the dtypes must be of one kind"):
            layer.save(file)
        assert not file.exists()

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_nothing_is_copied_that_lies_right(self, file: Path, dtype: str) -> None:
        layer = AffineLayer.random(1000, 2000, dtype=dtype, seed=1)
        tracemalloc.start()
        layer.save(file)
        saved = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert saved < layer.W.nbytes / 10  # buffers, the header, imports

    def test_folders_that_cannot_be_synced_are_left_alone(self, monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
        def refuse(*_: Any) -> int:
            raise PermissionError

        monkeypatch.setattr(os, "open", refuse)
        _storage._sync_folder(file.parent)

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
            with pytest.raises(ModuleNotFoundError, match="pip install safetensors"):
                call(file)


def header_of(data: bytes) -> dict[str, Any]:
    return dict(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]))


def with_header(data: bytes, header: Any) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + int.from_bytes(data[:8], "little") :]


def write_checkpoint(file: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """A safetensors file with zeros in tensors of those dtypes and shapes, in this order: a hole in a sparse file."""
    header, end = {}, 0
    for name, (code, shape) in tensors.items():
        width = 8 if code == "BOOL" else int(re.search(r"\d+", code)[0])  # type: ignore[index]
        start, end = end, end + math.prod(shape) * width // 8
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + end)


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
        metadata, W = header_of(data)["__metadata__"], np.ones((2, 2), "f")
        save_file({"W": W > 0}, file, metadata)
        self.refused(file, file.read_bytes(), r"in dtypes that no layer has: W is BOOL \(2, 2\)\. Nothing was loaded")
        save_file({"W": W, "b": W[0] > 0}, file, metadata)
        self.refused(file, file.read_bytes(), r"in dtypes that no layer has: b is BOOL \(2,\)\. Nothing was loaded")
        save_file({"W": W, "c": W > 0}, file, metadata)
        self.refused(file, file.read_bytes(), r"must hold W, and b or not; it holds \['W', 'c'\]")

    @pytest.mark.parametrize("b", [np.ones(4, "i4"), np.ones(5, "f")], ids=["kind", "shape"])
    def test_weights_that_make_no_layer(self, file: Path, b: np.ndarray) -> None:
        _storage.write(file, np.ones((5, 4), "f"), b, None)
        self.refused(file, file.read_bytes(), "holds weights that make no layer: .*W is float32")

    def test_file_that_is_cut_while_it_is_read(self, monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
        AffineLayer.random(100, 100).save(file)
        check = _storage._check_saved

        def cut(*arguments: Any) -> None:
            check(*arguments)
            os.truncate(file, 20_000)

        monkeypatch.setattr(_storage, "_check_saved", cut)
        self.refused(file, file.read_bytes(), "ends within W: it was cut while it was read")

    def test_long_texts_are_cut(self) -> None:
        assert len(_storage._short("x" * 1000)) == 201

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
            file.unlink()  # file systems flush what is written in place of something else
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

    def test_header_is_that_of_the_library(self, file: Path, data: bytes) -> None:
        """It takes our files for its own, and its own layout of one, by whatever order of tensors, is read."""
        values = {"W": ("float16", np.ones((3, 1), "<f2")), "b": ("float64", np.ones(1, "<f8"))}
        layer = AffineLayer(values["W"][1], values["b"][1])
        layer.save(file)
        metadata = header_of(file.read_bytes())["__metadata__"]
        save_file({"W": layer.W, "b": layer.b}, file, metadata)
        assert list(header_of(file.read_bytes())) != list(header_of(data))
        again = AffineLayer.load(file)
        assert (again.W.tolist(), again.b.tolist()) == (layer.W.tolist(), layer.b.tolist())


class TestLinear:
    """Checkpoints of others: weight (m, n) and bias (m,)."""

    def test_weights_are_transposed(self, backend: Backend, device: Any, file: Path) -> None:
        weight, bias = np.arange(6, dtype="f").reshape(2, 3), np.ones(2, "f")
        save_file({"fc.weight": weight, "fc.bias": bias, "norm.weight": bias}, file)
        layer = AffineLayer.load_linear(file, "fc.", backend=backend.name, device=device)
        assert np.array_equal(backend.to_numpy(layer.W), weight.T)
        assert np.array_equal(backend.to_numpy(layer.b), bias)
        x = np.arange(12, dtype="f").reshape(2, 2, 3)  # as nn.Linear maps the last axis
        y = layer(backend.from_numpy(x, device=device))
        assert np.array_equal(backend.to_numpy(y), x @ weight.T + bias)

    def test_bias_may_be_missing(self, file: Path) -> None:
        save_file({"weight": np.ones((2, 3), "f")}, file)
        assert AffineLayer.load_linear(file).b is None

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

    @pytest.mark.parametrize(
        "code", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4", "F6_E2M3", "F6_E3M2", "BOOL"]
    )
    def test_dtypes_that_no_layer_has_are_named(self, file: Path, code: str) -> None:
        for name, shape in (("weight", (4, 4)), ("bias", (4,))):
            tensors = {"fc.weight": ("F32", (4, 4)), "fc.bias": ("F32", (4,)), f"fc.{name}": (code, shape)}
            write_checkpoint(file, tensors)
            with pytest.raises(ValueError, match=rf"no layer has: fc\.{name} is {code} {re.escape(str(shape))}\. Not"):
                AffineLayer.load_linear(file, "fc.")
            write_checkpoint(file, {"conv.weight": (code, (4, 4)), **dict.fromkeys(["fc.weight"], ("F32", (4, 4)))})
            assert not AffineLayer.load_linear(file, "fc.").W.any()

    @pytest.mark.parametrize(
        ("prefix", "more"),
        [
            ("fc.", "weight_scale"), ("fc.", "input_scale"), ("fc.", "lora_A.weight"), ("fc.", "weight_g"),
            ("fc.", "base_layer.weight"), ("fc.", "parametrizations.weight.original0"), ("a.fc.", "weight.absmax"),
            ("fc.", "g_idx"), ("fc.", ""), ("fc.", "."), ("", "weight_scale"), ("", "lora_A"), ("in_proj_", "scale"),
            ("", "weight.absmax"), ("", "lora_A.weight"), ("", "head.weight"), ("in_proj_", "weight.absmax"),
        ],
    )  # fmt: skip
    def test_tensors_beside_weight_and_bias_are_refused(self, file: Path, prefix: str, more: str) -> None:
        fine = {f"{prefix}weight": ("F32", (2, 4)), f"{prefix}bias": ("F32", (2,))}
        name = re.escape(f"{prefix}{more}")
        for code, shape in (("F32", ()), ("F8_E4M3", (3, 1)), ("I32", (0,))):
            write_checkpoint(file, {**fine, f"{prefix}{more}": (code, shape)})
            with pytest.raises(
                ValueError, match=rf"than a weight and a bias: {name} is {code} {re.escape(str(shape))}\."
            ):
                AffineLayer.load_linear(file, prefix)
        write_checkpoint(file, fine)
        assert AffineLayer.load_linear(file, prefix).W.shape == (4, 2)

    @pytest.mark.parametrize(
        ("prefix", "other"),
        [("fc.", "fc2.weight"), ("fc.", "fc"), ("fc.", "a.fc.weight_scale"), ("in_proj_", "out_proj.weight")],
    )
    def test_tensors_of_other_modules_are_left_alone(self, file: Path, prefix: str, other: str) -> None:
        write_checkpoint(file, {f"{prefix}weight": ("F32", (2, 4)), other: ("F8_E4M3", (3,))})
        assert AffineLayer.load_linear(file, prefix).b is None

    def test_weight_by_another_name_is_not_found(self, file: Path) -> None:
        write_checkpoint(
            file, {"fc.weight_packed": ("U8", (2, 4)), "fc.bias": ("F32", (2,)), "a.weight": ("F32", (1,))}
        )
        with pytest.raises(
            ValueError, match=r"in it are \['a\.'\]\. Under .* fc\.bias is F32 \(2,\); fc\.weight_packed is U8"
        ):
            AffineLayer.load_linear(file, "fc.")
        write_checkpoint(file, {f"fc.{i}": ("U8", (2,)) for i in range(7)})
        with pytest.raises(ValueError, match=r"fc\.4 is U8 \(2,\) and 2 more$"):
            AffineLayer.load_linear(file, "fc.")
        with pytest.raises(ValueError, match=r"in it are \[\]$"):
            AffineLayer.load_linear(file, "gc.")

    @pytest.mark.parametrize(("first", "second"), [("F32", "I32"), ("I8", "BF16"), ("F64", "C64"), ("I64", "U64")])
    def test_bias_of_another_kind_is_refused(self, file: Path, first: str, second: str) -> None:
        write_checkpoint(file, {"weight": (first, (2, 4)), "bias": (second, (2,))})
        with pytest.raises(ValueError, match=r"holds weights that make no layer: .* (one|same) kind"):
            AffineLayer.load_linear(file)

    def test_bias_of_another_dtype_of_the_kind_is_kept(self, file: Path) -> None:
        write_checkpoint(file, {"weight": ("F16", (2, 4)), "bias": ("F64", (2,))})
        layer = AffineLayer.load_linear(file)
        assert (layer.W.dtype, layer.b.dtype) == (np.float16, np.float64)

    def test_no_more_is_read_than_the_layer(self, file: Path) -> None:
        others = {f"{name}.weight": ("F32", (1 << 18, 1 << 12)) for name in ("a", "z")}  # 4 GiB each, of holes
        write_checkpoint(file, {"a.weight": others["a.weight"], "fc.weight": ("F32", (2, 8)), **others})
        tracemalloc.start()
        AffineLayer.load_linear(file, "fc.")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 24  # what is imported for it included
        program = f"""
import resource
from xaffine import AffineLayer, _storage
resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30))
print(AffineLayer.load_linear({str(file)!r}, "fc.").W.shape)
# ru_maxrss would count what the parent had when it started this process.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
        shape, peak = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        assert shape == "(8, 2)"
        assert int(peak) * 1024 < 1 << 29  # NumPy itself takes less than a tenth of that
