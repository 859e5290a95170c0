"""Every Triton kernel compiled for GPUs that are not here: no spills, no more registers or shared memory than budgeted,
64-bit offsets, no float64 arithmetic, 16-byte loads where data is streamed."""

import json
import os

import pytest

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process and cannot be compiled", allow_module_level=True)

from compile_cases import (
    BUDGET,
    TARGETS,
    TYPES,
    Compiled,
    cases,
    compile_case,
    missing_backend,
    narrow_offset,
    triton_minor,
)

RECORDED = json.loads(BUDGET.read_text(encoding="utf-8"))


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_within_its_budget(target):
    if reason := missing_backend(target):
        pytest.skip(f"{target}: {reason}")
    complaints = []
    for name, case in cases(target).items():
        compiled = compile_case(case, target)
        complaints += [f"{name}: {complaint}" for complaint in _complaints(compiled, case.streams, name, target)]
        complaints += [f"{name}: no {needed}" for needed in case.needs if needed not in compiled.text]
    assert not complaints, f"{target}:\n" + "\n".join(complaints)


def _complaints(compiled: Compiled, streams: bool, name: str, target: str) -> list[str]:
    found = [f"32-bit offset: {line}" for line in compiled.narrow_offsets]
    found += [f"float64: {line.strip()}" for line in compiled.float64]
    if compiled.spills:
        found.append(f"spills {compiled.spills}: {compiled.use}")
    if streams and not compiled.vector_loads:
        found.append("reads aligned data less than 16 bytes at a time")
    # Another compiler allots other registers; the figures bind the version they were taken with.
    if triton_minor() == RECORDED["triton"]:
        budget = RECORDED[target][name]
        found += [f"{what} {used} > {budget[what]}" for what, used in compiled.use.items() if used > budget[what]]
    return found


def test_the_budget_lists_every_kernel_and_no_other():
    for target in TARGETS:
        assert list(RECORDED[target]) == list(cases(target))


def test_no_scalar_that_changes_between_steps_chooses_the_kernel():
    """triton compiles anew where an integer turns 1 or a multiple of 16, or a pointer loses its alignment."""
    changing = {
        "seed_low", "seed_high", "step_low", "step_high", "n_tensors", "n_chunks", "first", "n_partials",
        "grad_scale_address", "shift", "prefix_mask", "prefix", "stride", "low", "high", "capacity",
    }  # fmt: skip
    seen = set()
    for name, case in cases("sm_90").items():
        for param in case.kernel.params:
            if param.name in changing:
                seen.add(param.name)
                assert param.do_not_specialize, f"{name}: {param.name}"
            elif not param.is_constexpr:
                kind = case.types.get(param.name, TYPES.get(param.name, "fp32"))
                # Sizes and strides of a model's layers are few, and kernels gain by them; floats are never specialised.
                few = {
                    "N", "T", "O", "I", "C", "heads", "size", "splits", "split_samples", "split_tokens",
                    "x_sample", "x_head", "x_token", "dy_sample", "dy_head", "dy_token",
                }  # fmt: skip
                assert kind.startswith(("fp32", "*", "tensordesc")) or param.name in few, f"{name}: {param.name}"
    assert seen == changing


def test_every_kernel_of_the_package_is_compiled():
    import importlib
    import pkgutil

    import triton

    import fishertune_kernels

    launched = set()
    for package in pkgutil.iter_modules(fishertune_kernels.__path__):
        if package.ispkg:
            module = importlib.import_module(f"fishertune_kernels.{package.name}.triton")
            launched |= {
                value
                for value in vars(module).values()
                if isinstance(value, triton.JITFunction) and value.__name__.endswith("_kernel")
            }
    assert launched == {case.kernel for case in cases("sm_90").values()}


@pytest.mark.parametrize(
    ("line", "narrow"),
    [
        ("%6 = tt.addptr %arg0, %5 : !tt.ptr<f32>, i32 loc(#loc3)", True),
        ("%6 = tt.addptr %4, %5 : tensor<64x!tt.ptr<f32>>, tensor<64xi32>", True),
        ("%6 = tt.addptr %4, %5 : tensor<64x!tt.ptr<i32>>, tensor<64xi64> loc(#loc3)", False),
        ("%6 = tt.addptr %arg0, %5 : !tt.ptr<i32>, i64", False),
        ("%6 = arith.addi %4, %5 : i32", False),
    ],
)
def test_the_lint_tells_offsets_apart(line, narrow):
    assert narrow_offset(line) == narrow
