"""Building the kernels: once, by one process, for this processor or an older one; and what happens where nobody can."""

import ctypes
import platform
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.miniatures import CPU, folder_tensors, random_model, shaped, step, write_folder
from workers.engine.native import build, memory
from workers.engine.native.build import NoCompiler, load_kernels
from workers.engine.native.model import NativeModel
from workers.engine.native.runner_cpu import CpuRunner
from workers.engine.native.runner_torch import TorchRunner

TOKENS = [(7 * each) % 97 for each in range(75)]
BATCH = step([(TOKENS, 0, list(range(5)))])


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tidemill"


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts a shell script in the compilers' place; its calls are lines of the file returned."""

    def install(script: str) -> Path:
        calls, program = tmp_path / "calls", tmp_path / "bin" / "g++"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\necho "$*" >> {calls}\n{script}\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
        monkeypatch.setattr(build, "COMPILERS", ("g++",))
        return calls

    return install


COPY = 'while [ "$1" != "-o" ]; do shift; done; cp {library} "$2"'


def any_library() -> str:
    """Something that can be loaded, in place of the kernels."""
    library: str = ctypes.CDLL("libc.so.6")._name
    found = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if library in line]
    return found[0]


def test_built_once_and_kept(cache: Path, compiler: Callable[[str], Path]) -> None:
    calls = compiler(COPY.format(library=any_library()))
    for _ in range(3):
        load_kernels()
    assert len(calls.read_text().splitlines()) == 1
    assert [path.suffix for path in sorted(cache.iterdir())] == ["", ".so"]  # the lock and the library, no leftovers


def test_many_at_once_build_once(cache: Path, compiler: Callable[[str], Path]) -> None:
    calls = compiler("sleep 0.2; " + COPY.format(library=any_library()))
    threads = [threading.Thread(target=load_kernels) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls.read_text().splitlines()) == 1


def test_other_sources_or_flags_are_another_library(
    cache: Path, compiler: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = compiler(COPY.format(library=any_library()))
    load_kernels()
    monkeypatch.setattr(build, "FLAGS", [*build.FLAGS, "-g"])
    load_kernels()
    changed = tmp_path / "kernels"
    changed.mkdir()
    for source in build.SOURCES.glob("*.*"):
        (changed / source.name).write_text(source.read_text() + "\n")
    monkeypatch.setattr(build, "SOURCES", changed)
    load_kernels()
    assert len(calls.read_text().splitlines()) == 3


def test_a_compiler_that_fails_says_why(cache: Path, compiler: Callable[[str], Path]) -> None:
    compiler("echo cannot do that >&2; exit 1")
    with pytest.raises(NoCompiler, match="cannot do that"):
        load_kernels()
    assert [path.name for path in cache.iterdir()] == ["building"]


def test_a_compiler_that_hangs_is_killed(
    cache: Path, compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler("sleep 60 & wait")
    monkeypatch.setattr(build, "COMPILE_TIMEOUT_S", 0.05)
    with pytest.raises(NoCompiler, match="killed"):
        load_kernels()


def test_no_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "COMPILERS", ("no-such-compiler",))
    with pytest.raises(NoCompiler, match="no-such-compiler"):
        load_kernels()


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(NoCompiler, match="cannot be written"):
        load_kernels()


def test_without_a_compiler_stock_operators_serve(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_folder(tmp_path)
    stock = NativeModel.load(folder, dtype=torch.float32, device=CPU, kernels="torch")
    monkeypatch.setattr(build, "COMPILERS", ("no-such-compiler",))
    model = NativeModel.load(folder, dtype=torch.float32, device=CPU, kernels="auto")
    assert "no-such-compiler" in caplog.text
    assert model.packing == TorchRunner.packing != CpuRunner.packing
    batches = (each.forward(BATCH, each.new_kv(5, 16)) for each in (model, stock))
    assert torch.equal(*batches)
    with pytest.raises(NoCompiler, match="no-such-compiler"):
        NativeModel.load(folder, dtype=torch.float32, device=CPU, kernels="cpu")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86-64's instruction sets")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_older_processors(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same sources for a processor with AVX2 only: kept in the ordinary cache, since building takes seconds."""
    wanted = random_model(shaped(), dtype, "torch")
    if "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor cannot run it")
    flags = ["-march=x86-64-v3" if flag == "-march=native" else flag for flag in build.FLAGS]
    monkeypatch.setattr(build, "FLAGS", flags)
    model = random_model(shaped(), dtype, "cpu")
    logits = model.forward(BATCH, model.new_kv(5, 16))
    expected = wanted.forward(BATCH, wanted.new_kv(5, 16))
    tolerance = 1e-4 if dtype is torch.float32 else 0.02 * float(expected.abs().mean())
    assert (logits - expected).abs().mean() < tolerance
    kv = model.new_kv(5, 16)
    pieces = [model.forward(step([(TOKENS[at : at + 5], at, list(range(5)))]), kv) for at in range(0, 75, 5)]
    assert torch.equal(torch.cat(pieces), logits)


def test_large_tensors_are_zeroed_and_aligned() -> None:
    for shape in ((3, 5), (1 << 20,), (3, 1000, 1001)):
        tensor = memory.zeros(shape, torch.bfloat16)
        assert tensor.shape == shape
        assert tensor.dtype is torch.bfloat16
        assert tensor.is_contiguous()
        assert not tensor.any()
        assert tensor.data_ptr() % memory.ALIGNMENT == 0
        tensor += 1  # all of it can be written
        assert tensor.float().sum() == tensor.numel()


def test_an_arena_gives_each_piece_its_own_place() -> None:
    sizes = [1, 33, 64, 1000, 7]
    arena = memory.Arena(sum(sizes), len(sizes), torch.float32)
    pieces = [arena.take(size) for size in sizes]
    for number, piece in enumerate(pieces):
        piece.fill_(number)
    for number, (size, piece) in enumerate(zip(sizes, pieces, strict=True)):
        assert piece.tolist() == [number] * size
        assert piece.data_ptr() % memory.ALIGNMENT == 0


def test_loading_packs_what_the_folder_holds(tmp_path: Path) -> None:
    """The file may be replaced while the model is in use: nothing of it is read any more."""
    folder = write_folder(tmp_path)
    models = [NativeModel.load(folder, dtype=torch.float32, device=CPU, kernels=each) for each in ("auto", "torch")]
    before = [each.forward(BATCH, each.new_kv(5, 16)) for each in models]
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(sum(tensor.nbytes for tensor in folder_tensors().values()) // 2)
        file.write(bytes(1 << 16))
    after = [each.forward(BATCH, each.new_kv(5, 16)) for each in models]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
