"""The CUDA kernels, run thread by thread on the emulator in random order, against numpy."""

import ctypes
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from emulated_library import CSRC, Emulated, compile_kernels, link

import fishertune_kernels as fk
from fishertune_kernels import cuda_common, dispatch, native
from fishertune_kernels.compact import cuda as compact
from fishertune_kernels.select_threshold import Threshold, search
from fishertune_kernels.select_threshold import cuda as select_threshold

TILE = 4096
SIZES = (0, 1, 33, TILE - 1, TILE, 0, 2 * TILE + 17, 5)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SPECIAL = (math.nan, -math.nan, 0.0, -0.0, math.inf, -math.inf, 1e-45, -1e-45, 6e-8, 1e-40, 1.0, -1.0, 65504.0, 3e38)


def scores(
    seed: int, *, dtypes: tuple[torch.dtype, ...] = FLOATS, shift: int = 0, nan: bool = True
) -> list[torch.Tensor]:
    """Tensors of all sizes with many ties and with every special value; ``shift`` elements off a 16-byte boundary."""
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for i, size in enumerate(SIZES):
        values = torch.randn(size + shift, generator=generator)
        values = torch.where(torch.rand(size + shift, generator=generator) < 0.3, (4 * values).round() / 4, values)
        special = torch.tensor(SPECIAL if nan else SPECIAL[2:])[: size // 2]
        values[shift + torch.randperm(size, generator=generator)[: len(special)]] = special
        tensors.append(values.to(dtypes[i % len(dtypes)])[shift:])
    return tensors


def wide(tensor: torch.Tensor) -> np.ndarray:
    """float32 values; half precision is widened by numpy, bfloat16 by its bits."""
    if tensor.dtype == torch.bfloat16:
        return (tensor.contiguous().view(torch.int16).numpy().astype(np.uint32) << 16).view(np.float32)
    return tensor.numpy().astype(np.float32)


def keys(tensor: torch.Tensor) -> np.ndarray:
    values = wide(tensor)
    bits = np.where(values == 0, np.float32(0), values).view(np.uint32)
    return np.where(bits >> 31 == 1, ~bits, bits | np.uint32(1 << 31)).astype(np.int64)


@pytest.mark.parametrize(("seed", "blocks"), [(0, 1), (1, 2), (2, 5), (3, 3)])
@pytest.mark.parametrize(("shift_bits", "bits"), [(21, 11), (24, 8), (0, 10), (16, 16), (31, 1)])
def test_key_histogram_counts_every_digit(
    emulated: Emulated, seed: int, blocks: int, shift_bits: int, bits: int
) -> None:
    emulated.schedule(seed, blocks)
    given = scores(seed, shift=seed % 2)
    found = select_threshold.key_histogram(given, shift_bits, bits, 0, 0)
    every = np.concatenate([keys(tensor) for tensor in given])
    nan = np.isnan(np.concatenate([wide(tensor) for tensor in given]))
    expected = np.bincount((every[~nan] >> shift_bits) & (2**bits - 1), minlength=2**bits)
    assert found[-1] == nan.sum() > 0
    np.testing.assert_array_equal(found[:-1].numpy(), expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_key_histogram_under_a_prefix(emulated: Emulated, dtype: torch.dtype) -> None:
    given = scores(5, dtypes=(dtype,))
    every = np.concatenate([keys(tensor)[~np.isnan(wide(tensor))] for tensor in given])
    prefix = int(np.bincount(every >> 24).argmax())
    found = select_threshold.key_histogram(given, 13, 11, 0xFF << 24, prefix << 24)
    expected = np.bincount((every[every >> 24 == prefix] >> 13) & 2047, minlength=2048)
    np.testing.assert_array_equal(found[:-1].numpy(), expected)
    assert found[-1] == sum(int(tensor.isnan().sum()) for tensor in given)


@pytest.mark.parametrize("stride", [1, 2, 61, 4096, 100_000])
def test_sample_takes_one_score_of_each_run(emulated: Emulated, stride: int) -> None:
    emulated.schedule(stride, 4)
    given = scores(6)
    found, number = select_threshold.sample_scores(given, stride).numpy(), 0
    for tensor in given:
        for run in np.array_split(wide(tensor), range(stride, tensor.numel(), stride)) if tensor.numel() else []:
            within = (number * 2654435769 % 2**32 * stride) >> 32
            expected = run[within] if within < len(run) else np.float32(np.nan)
            np.testing.assert_array_equal(found[number], expected)
            number += 1
    assert number == len(found)


@pytest.mark.parametrize(("seed", "blocks"), [(0, 1), (1, 2), (2, 5), (3, 3)])
@pytest.mark.parametrize(
    ("low", "high"),
    [
        (0xBF000000, 0xBFA00000),  # 0.5 ... 1.25
        (0x80000000, 0x80000000),  # zeros of both signs
        (0, 0xFFFFFFFF),  # everything
        (0xC0800000, 0xC0000000),  # empty: low above high
        (0xFF800000, 0xFFFFFFFF),  # +inf and beyond, where NaN patterns lie
    ],
)
def test_collect_bracket_counts_and_collects(emulated: Emulated, seed: int, blocks: int, low: int, high: int) -> None:
    emulated.schedule(seed, blocks)
    given = scores(seed, shift=seed % 2)
    expected_counts, expected = [], []
    for number, tensor in enumerate(given):
        nan = np.isnan(wide(tensor))
        key = keys(tensor)[~nan]
        inside = key[(key >= low) & (key <= high)]
        expected_counts.append([(key > high).sum(), len(inside), nan.sum()])
        expected.append(number << 32 | inside)
    expected_candidates = np.sort(np.concatenate(expected))
    for capacity in (len(expected_candidates), len(expected_candidates) + 3, len(expected_candidates) - 1):
        counts, candidates = select_threshold.collect_bracket(given, low, high, max(capacity, 0))
        np.testing.assert_array_equal(counts.numpy(), np.array(expected_counts))
        if capacity < len(expected_candidates):
            assert len(candidates) == 0
        else:
            np.testing.assert_array_equal(np.sort(candidates.numpy()), expected_candidates)


def kept(tensor: torch.Tensor, value: float, quota: int) -> np.ndarray:
    values = wide(tensor)
    ties = np.flatnonzero(values == np.float32(value))[:quota]
    return np.sort(np.concatenate((np.flatnonzero(values > np.float32(value)), ties)))


def threshold_of(given: list[torch.Tensor], value: float, quotas: list[int]) -> Threshold:
    return Threshold(value, tuple(int((wide(t) > np.float32(value)).sum()) for t in given), tuple(quotas))


@pytest.mark.parametrize(("seed", "blocks"), [(0, 1), (1, 2), (2, 5), (3, 3), (4, 9)])
@pytest.mark.parametrize("value", [0.25, -0.0, math.inf, -math.inf, 1e-45, 9.0, -9.0])
def test_compact_keeps_what_is_above_and_the_first_ties(
    emulated: Emulated, seed: int, blocks: int, value: float
) -> None:
    emulated.schedule(seed, blocks)
    given = scores(seed, shift=seed % 2)
    generator = np.random.default_rng(seed)
    quotas = [int(generator.integers(0, 1 + (wide(tensor) == np.float32(value)).sum())) for tensor in given]
    found = compact.compact(given, threshold_of(given, value, quotas))
    for tensor, quota, index in zip(given, quotas, found, strict=True):
        assert index.dtype == torch.int32
        np.testing.assert_array_equal(index.numpy(), kept(tensor, value, quota))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("quota", [0, 1, 31, 32, 1025, TILE, TILE + 700, 3 * TILE])
def test_compact_cuts_equal_scores_at_the_quota(emulated: Emulated, dtype: torch.dtype, quota: int) -> None:
    emulated.schedule(quota, 2)
    given = [torch.ones(3 * TILE - 5, dtype=dtype)]
    last = given[0].numel() - 1
    given[0][last] = 2.0  # one tie too many would take its place
    quota = min(quota, last)
    [index] = compact.compact(given, Threshold(1.0, (1,), (quota,)))
    np.testing.assert_array_equal(index.numpy(), np.append(np.arange(quota), last))


@pytest.mark.parametrize(
    ("greater", "ties"), [((40, 3), (0, 2)), ((41, 2), (2, 2)), ((0, 0), (0, 0)), ((41, 3), (2, 3))]
)
def test_compact_never_writes_more_than_the_threshold_stands_for(
    emulated: Emulated, greater: tuple[int, ...], ties: tuple[int, ...]
) -> None:
    """Scores that changed after their threshold was found: an error, and the fences unharmed."""
    given = [torch.full((TILE + 9,), 0.0), torch.full((7,), 0.0, dtype=torch.float16)]
    given[0][:41], given[0][50:52], given[1][:3], given[1][3:5] = 2.0, 1.0, 2.0, 1.0
    with pytest.raises(ValueError, match="The threshold stands for"):
        compact.compact(given, Threshold(1.0, greater, ties))


def test_totals_run_on_past_one_step_of_the_scan(emulated: Emulated) -> None:
    """A step takes 4096 tiles: the kernel that adds them up goes on to a second one."""
    tiles = 4096 + 3
    values = torch.zeros(tiles, TILE, dtype=torch.bfloat16)
    values[:, 7] = 1.0
    values[::2, 9] = 2.0
    quota = 4090
    # The two kernels over all the tiles would take minutes here: their results are written down instead.
    table = cuda_common.score_table([values])
    workspace = torch.zeros(native.lib().ft_cuda_compact_workspace(tiles), dtype=torch.uint8)
    plan = torch.zeros(tiles, 2, dtype=torch.int64)
    plan[::2, 0] = 1  # above
    plan[:, 1] = 1  # ties
    workspace[: 16 * tiles] = plan.view(torch.uint8).flatten()
    outputs, counts = torch.tensor([quota, 0, 0]), torch.zeros(1, dtype=torch.int64)
    arguments = (tensor.data_ptr() for tensor in (outputs, workspace, counts))
    # Nothing to do for the kernels over tiles; the one between them takes the sizes.
    cuda_common.launch("ft_cuda_compact", table, 1.0, *arguments, work=0)
    number = torch.arange(tiles)
    found = workspace[: 16 * tiles].view(torch.int64).view(tiles, 2)
    assert torch.equal(found[:, 0], (number + 1) // 2 + number.clamp(max=quota))
    assert torch.equal(found[:, 1], torch.where(number < quota, (1 << 32) + 1, 1))
    assert counts.tolist() == [(tiles + 1) // 2 + quota]


@pytest.mark.parametrize("seed", range(3))
def test_selection_from_end_to_end(emulated: Emulated, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """The public functions with the CUDA kernels under them, as on a GPU."""
    monkeypatch.setattr(dispatch, "_chosen", {})
    monkeypatch.setattr(dispatch, "_obstacle", lambda *_: None)
    monkeypatch.setenv("FISHERTUNE_BACKEND", "select_threshold=cuda,compact=cuda")
    monkeypatch.setattr(search, "SMALL", 1000)  # or so few scores are not sampled
    emulated.schedule(seed)
    given = scores(seed, nan=False)
    flat = np.concatenate([wide(tensor) for tensor in given])
    for k in (0, 1, 777, 5000, len(flat)):
        chosen = fk.compact(given, fk.select_threshold(given, k))
        starts = np.cumsum([0, *map(len, given)])[:-1]
        found = np.concatenate([start + index.numpy() for start, index in zip(starts, chosen, strict=True)])
        np.testing.assert_array_equal(found, np.sort(np.argsort(-flat, kind="stable")[:k]))


def test_no_scores_in_any_tensor(emulated: Emulated) -> None:
    given = [torch.ones(0), torch.ones(0, dtype=torch.bfloat16)]
    assert not select_threshold.key_histogram(given, 21, 11, 0, 0).any()
    counts, candidates = select_threshold.collect_bracket(given, 0, 2**32 - 1, 0)
    assert not counts.any()
    assert len(candidates) == 0
    assert [len(index) for index in compact.compact(given, Threshold(0.0, (0, 0), (0, 0)))] == [0, 0]


# What must not be read or computed: a process of its own, since a mistake here ends it --------------------------------

PRELUDE = """
import ctypes, mmap, sys
import numpy as np, torch
from fishertune_kernels import cuda_common, native
from fishertune_kernels.compact import cuda as compact
from fishertune_kernels.select_threshold import Threshold
from fishertune_kernels.select_threshold import cuda as select_threshold
cuda_common.launch_place = lambda device: (0, 0)
"""


def run(program: str, library: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "FISHERTUNE_NATIVE_LIBRARY": str(library)}
    command = [sys.executable, "-c", PRELUDE + program]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_nothing_is_read_beyond_a_tensor(libraries: Path) -> None:
    """Scores that end at the end of a page, or begin at its beginning, between pages that must not be touched."""
    done = run(
        """
page, libc = mmap.PAGESIZE, ctypes.CDLL(None, use_errno=True)
pages = 6
memory = mmap.mmap(-1, (pages + 2) * page)
whole = torch.frombuffer(memory, dtype=torch.uint8)
for place in (0, (pages + 1) * page):
    assert libc.mprotect(ctypes.c_void_p(whole.data_ptr() + place), ctypes.c_size_t(page), 0) == 0
inner = whole[page : (pages + 1) * page]
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for n in (1, 7, 4096, 4097, 5003):
        for scores in (inner[-n * dtype.itemsize :], inner[: n * dtype.itemsize]):
            scores = scores.view(dtype)
            scores.copy_((torch.arange(n) % 5).to(dtype))
            twos = int((scores == 2).sum())
            assert select_threshold.key_histogram([scores], 21, 11, 0, 0).sum() == n
            counts, candidates = select_threshold.collect_bracket([scores], 0xC0000000, 0xC0000000, n)
            assert len(candidates) == twos, (n, dtype)
            threshold = Threshold(2.0, (int((scores > 2).sum()),), (min(twos, 1),))
            [index] = compact.compact([scores], threshold)
            assert (scores[index.long()] >= 2).all()
""",
        libraries / "emulated.so",
    )
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-2000:]}"


def test_offsets_beyond_32_bits(libraries: Path) -> None:
    """The last tiles of a tensor of more than 2³¹ elements, whose earlier ones need no memory: nothing reads them."""
    done = run(
        """
TILE, F = 4096, 2**21 - 1  # tiles before: 2³³ elements, so that a narrow offset cannot come back by wrapping around
tail = torch.zeros(2 * TILE + 100, dtype=torch.bfloat16)
tail[[3, TILE + 9, 2 * TILE + 99]] = 2.0
tail[[5, TILE]] = 1.0
n, start = F * TILE + len(tail), F * TILE
rows = torch.tensor([[tail.data_ptr() - 2 * start, n, 1, -F]], dtype=torch.int64)
table = cuda_common.ScoreTable(rows, 3)

counts = torch.zeros(2049, dtype=torch.int64)
cuda_common.launch("ft_cuda_key_histogram", table, 21, 11, 0, 0, counts.data_ptr())
assert counts[0x80000000 >> 21] == len(tail) - 5 and counts[0xC0000000 >> 21] == 3 and counts.sum() == len(tail)

drawn, firsts = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
cuda_common.launch("ft_cuda_sample_scores", cuda_common.ScoreTable(rows + torch.tensor([2 * start, -start, 0, 0]), 1),
                   firsts.data_ptr(), 5, drawn.data_ptr(), work=1)
assert drawn.tolist() == [0.0]

counts, out = torch.zeros(4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
cuda_common.launch("ft_cuda_collect_bracket", table, 0xBF800000, 0xBF800000, counts.data_ptr(), out.data_ptr(), 2,
                   counts[3:].data_ptr())
assert counts.tolist() == [3, 2, 0, 2] and out.tolist() == [0xBF800000] * 2

# The running totals do begin at the tensor's first tile: its plan lies before the workspace, and says that it is empty.
memory = np.zeros(16 * F + native.lib().ft_cuda_compact_workspace(3), np.uint8)
workspace, count, index = memory.ctypes.data + 16 * F, torch.zeros(1, dtype=torch.int64), torch.full((6,), -7)
outputs = torch.tensor([1, 4, index[1:].data_ptr()])
cuda_common.launch("ft_cuda_compact", table, 1.0, outputs.data_ptr(), workspace, count.data_ptr())
assert count.tolist() == [4]
assert index.tolist() == [-7, start + 3, start + 5, start + TILE + 9, start + 2 * TILE + 99, -7], index
""",
        libraries / "emulated.so",
    )
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-2000:]}"


# The emulator ---------------------------------------------------------------------------------------------------------

BARRIER = re.compile(r"__syncthreads\(\);")
BARRIERS = [
    (path.name, match.start())
    for path in sorted((CSRC / "cuda").glob("*.cuh"))
    for match in BARRIER.finditer(path.read_text())
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "place"), BARRIERS)
def test_the_emulator_sees_every_barrier_that_is_missing(
    libraries: Path, tmp_path: Path, name: str, place: int
) -> None:
    csrc = tmp_path / "csrc"
    shutil.copytree(CSRC, csrc)
    source = (csrc / "cuda" / name).read_text()
    (csrc / "cuda" / name).write_text(source[:place] + BARRIER.sub("", source[place:], count=1))
    others = [path for path in libraries.rglob("*.o") if path.parent.name not in ("kernels", "cpu4")]
    library = link(tmp_path / "mutant.so", *others, *compile_kernels(tmp_path / "kernels", csrc))
    done = run(
        """
from fishertune_kernels.compact import reference as compact_reference
from fishertune_kernels.select_threshold import reference
scores = [(torch.arange(n) * 7919 % 13).float() for n in (3 * 4096 + 5, 20, 4096 * 2)]
threshold = Threshold(9.0, tuple(int((s > 9).sum()) for s in scores), (300, 1, 0))
expected = compact_reference.compact(scores, threshold)
expected_counts = reference.key_histogram(scores, 21, 11, 0, 0)
for seed in range(10):
    native.lib().emulator_schedule(ctypes.c_uint64(seed), ctypes.c_int32(2))
    found = compact.compact(scores, threshold)
    counts = select_threshold.key_histogram(scores, 21, 11, 0, 0)
    if not all(map(torch.equal, found, expected)) or not torch.equal(counts, expected_counts):
        sys.exit("a wrong answer")
""",
        library,
    )
    assert done.returncode != 0


# The interface --------------------------------------------------------------------------------------------------------


def test_the_device_is_set_for_the_call_and_restored(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [torch.ones(9)]
    monkeypatch.setattr(cuda_common, "launch_place", lambda device: (1, 0))
    assert select_threshold.key_histogram(given, 21, 11, 0, 0).sum() == 9
    assert emulated.current_device() == 0
    monkeypatch.setattr(cuda_common, "launch_place", lambda device: (7, 0))
    with pytest.raises(RuntimeError, match=r"ft_cuda_key_histogram: .*invalid device ordinal"):
        select_threshold.key_histogram(given, 21, 11, 0, 0)
    assert emulated.current_device() == 0


def test_bad_arguments_are_named(emulated: Emulated) -> None:
    table = cuda_common.score_table([torch.ones(9)])
    with pytest.raises(ValueError, match="the threshold is NaN"):
        compact.compact([torch.ones(9)], Threshold(math.nan, (0,), (0,)))
    with pytest.raises(ValueError, match="bits 17; expected"):
        select_threshold.key_histogram([torch.ones(9)], 0, 17, 0, 0)
    with pytest.raises(ValueError, match="capacity is -1"):
        cuda_common.launch("ft_cuda_collect_bracket", table, 0, 1, 1, 1, -1, 1)
    with pytest.raises(ValueError, match="stride is 0; expected 1 to"):
        cuda_common.launch("ft_cuda_sample_scores", table, 1, 0, 1)
    with pytest.raises(ValueError, match="histogram is NULL"):
        cuda_common.launch("ft_cuda_key_histogram", table, 0, 8, 0, 0, None)
    with pytest.raises(ValueError, match="the work is -3"):
        cuda_common.launch("ft_cuda_key_histogram", table._replace(n_tiles=-3), 0, 8, 0, 0, 1)
    for row, message in (
        ((16, -1, 0), "row 0: numel is -1"),
        ((16, 4, 3), r"row 0: dtype code 3; expected 0 \(fp32\)"),
        ((0, 4, 0), "row 0: a tensor of 4 elements is NULL"),
    ):
        with pytest.raises(ValueError, match=message):
            cuda_common._table(torch.device("cpu"), 0, (row,))


def test_why_cuda_is_not_available(emulated: Emulated) -> None:
    assert native.cuda_why_not() is None
    emulated.machine(devices=0)
    assert "no CUDA-capable device is detected" in str(native.cuda_why_not())
    emulated.machine(devices=0, driver=0)
    assert "this machine has no CUDA driver" in str(native.cuda_why_not())
    emulated.machine(devices=0, driver=12040)
    assert "built with CUDA 13.0 but the driver knows 12.4 at most; update the driver" in str(native.cuda_why_not())


def test_a_library_without_cuda_has_every_function_and_says_why(
    use_library: Callable[[Path], None], libraries: Path
) -> None:
    use_library(libraries / "without-cuda.so")
    assert native.available()  # the CPU part works
    reason = str(native.cuda_why_not())
    assert "not built with CUDA (for a test)" in reason
    assert "FISHERTUNE_CUDA=ON python setup.py build_native" in reason
    with pytest.raises(RuntimeError, match=r"ft_cuda_table: not built with CUDA"):
        cuda_common._table(torch.device("cpu"), 0, ((16, 4, 0),))
    null = ctypes.c_void_p(None)
    for name, arguments in native._CUDA_ARGUMENTS.items():
        given = [null if argument is ctypes.c_void_p else 0 for argument in arguments]
        assert getattr(native.lib(), name)(null, 0, 0, *given, 0, null) == 3


@pytest.mark.parametrize(
    ("version", "explanation"),
    [(native.ABI_VERSION - 1, "has interface version 1, this package needs 2"), (native.ABI_VERSION, "is older than")],
)
def test_an_old_library_is_explained_at_first_use(
    use_library: Callable[[Path], None],
    libraries: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: int,
    explanation: str,
) -> None:
    """Another interface version, or the same one from before a function was added to it."""
    source, old = tmp_path / "old.cpp", tmp_path / "old.so"
    source.write_text(f'extern "C" int ft_abi_version() {{ return {version}; }}\n')
    link(old, source)
    use_library(old)
    for reason in (native.why_not(), native.cuda_why_not()):
        assert explanation in str(reason)
        assert "rebuild it with `python setup.py build_native`" in str(reason)
    monkeypatch.setattr(dispatch, "_chosen", {})
    monkeypatch.setenv("FISHERTUNE_BACKEND", "compact=cuda")
    with pytest.raises(RuntimeError, match=f"cannot run compact on cuda tensors: .*{explanation}"):
        dispatch.implementation("compact", torch.device("cuda"), {torch.float32})
