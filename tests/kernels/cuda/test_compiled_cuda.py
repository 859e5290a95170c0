"""The CUDA kernels compiled for sm_80 and sm_90, without a GPU: within their budget, and what their PTX may hold."""

import functools
import json
import re

import pytest
from cuda_compile import BUDGET, CSRC, STREAMING, TARGETS, missing, nvcc_version, ptx, use

if reason := missing():
    pytest.skip(reason, allow_module_level=True)

RECORDED = json.loads(BUDGET.read_text(encoding="utf-8"))
compiled = functools.cache(ptx)
KERNELS = set(re.findall(r"\b(\w+_kernel)\(", "".join(path.read_text() for path in (CSRC / "cuda").glob("*.cuh"))))


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_within_its_budget(target: str) -> None:
    found = use(target)
    assert list(found) == list(RECORDED[target])
    assert {name.split("<")[0] for name in found} == KERNELS
    for name, figures in found.items():
        assert figures["spills"] == 0, name
        # Another compiler allots other registers; the figures bind the version they were taken with.
        if nvcc_version() == RECORDED["nvcc"]:
            over = {what: n for what, n in figures.items() if n > RECORDED[target][name][what]}
            assert not over, f"{name}: {over}, budget {RECORDED[target][name]}"


@pytest.mark.parametrize("target", TARGETS)
def test_no_float64_and_no_flushing_of_denormals(target: str) -> None:
    for name, text in compiled(target).items():
        assert not re.findall(r"^.*\.f64\b.*$", text, re.M), name
        assert ".ftz" not in text, name  # scores below 1e-38 would all tie


@pytest.mark.parametrize("target", TARGETS)
def test_addresses_are_64_bits_wide(target: str) -> None:
    texts = compiled(target)
    assert ".address_size 64" in texts[""]
    for name, text in texts.items():
        # Global, or through a pointer that came from memory; shared memory has 32-bit addresses of its own.
        access = r"\b(?:ld|st|atom|red)\.(?!param|shared)\S+\s.*?\[(.*?)\]"
        accesses = re.findall(access, text)
        assert all(re.fullmatch(r"%rd\d+(?:\+-?\d+)?", address) for address in accesses), name
        assert accesses or not name, name


@pytest.mark.parametrize("target", TARGETS)
def test_scores_are_read_16_bytes_at_a_time(target: str) -> None:
    texts = compiled(target)
    for name, expected in STREAMING.items():
        assert len(re.findall(r"ld\.global\S*\.v4\.[bfu]32", texts[name])) == expected, name
