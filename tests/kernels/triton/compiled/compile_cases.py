"""Every Triton kernel with the argument types and tile sizes it is launched with, compiled without a GPU.

``python tests/kernels/triton/compiled/compile_cases.py`` (without TRITON_INTERPRET) compiles all of them, prints what
they use and writes ``budget.json``, which test_compiled.py holds them to.
"""

import json
import re
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import triton
import triton.language as tl
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fishertune_kernels.compact import triton as compact
from fishertune_kernels.dr_fim_score import triton as dr_fim_score
from fishertune_kernels.gaussian_perturb import triton as gaussian_perturb
from fishertune_kernels.per_sample_affine_squared_grad import triton as per_sample_affine
from fishertune_kernels.per_sample_squared_grad import tiles
from fishertune_kernels.per_sample_squared_grad import triton as per_sample
from fishertune_kernels.precision_update import triton as precision_update
from fishertune_kernels.select_threshold import triton as select_threshold
from fishertune_kernels.selected_grad_norm import triton as selected_grad_norm
from fishertune_kernels.sparse_adamw import triton as sparse_adamw
from fishertune_kernels.squared_grad_accumulate import triton as squared_grad
from fishertune_kernels.values import triton as values

BUDGET = Path(__file__).with_name("budget.json")
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

# Run-time arguments by name; what is not here and not a constant is a float32 scalar.
TYPES = {
    "pointers": "*i64", "layout": "*i64", "owners": "*i32", "n_tensors": "i32", "n_chunks": "i32",
    "seed_low": "i32", "seed_high": "i32", "step_low": "i32", "step_high": "i32",
    "shift": "i32", "prefix_mask": "i32", "prefix": "i32", "before": "*i64", "quotas": "*i64",
    "numbers": "*i64", "runs": "*i64", "sample": "*fp32", "counts": "*i32", "cursor": "*i64", "candidates": "*i64",
    "stride": "i32", "low": "i32", "high": "i32", "capacity": "i32",
    "N": "i32", "T": "i32", "O": "i32", "I": "i32", "C": "i32", "accumulator": "*fp32", "sums": "*fp32",
    "heads": "i32", "splits": "i32", "split_samples": "i32", "split_tokens": "i32", "size": "i32",
    **dict.fromkeys(("x_sample", "x_head", "x_token", "dy_sample", "dy_head", "dy_token"), "i32"),
    **dict.fromkeys(("result", "partials", "mean", "rstd", "norm", "grad_scale_address"), "*fp32"),
    "first": "i32", "n_partials": "i32",
}  # fmt: skip
# Torch's allocations begin at multiples of 16 bytes, and the features of a transformer are multiples of 16.
MULTIPLES_OF_16 = {
    "pointers", "layout", "owners", "counts", "numbers", "runs", "sample", "cursor", "candidates", "before", "quotas",
    "accumulator", "sums", "x", "dy", "O", "I", "C", "size", "result", "partials", "x_sample", "x_head", "x_token",
    "dy_sample", "dy_head", "dy_token",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    kernel: triton.JITFunction
    constants: dict
    types: dict = field(default_factory=dict)
    streams: bool = True
    """Whether its aligned inputs are to be read 16 bytes at a time."""
    needs: tuple[str, ...] = ()
    """Instructions the compiled text must hold."""


def _products(target: str) -> dict[str, Case]:
    """The per-sample product in every tile and variant of its table."""
    found = {}
    for operands, element in (("half", "bf16"), ("float", "fp32")):
        configs = tiles.TABLE[target, operands] | tiles.VARIANTS.get((target, operands), {})
        for name, config in configs.items():
            needs = ("wgmma.mma_async",) if target == "sm_90" else ()
            types = {"x": f"*{element}", "dy": f"*{element}"}
            if config.tma:
                needs += ("cp.async.bulk.tensor",)
                sides = {"x": config.BLOCK_I, "dy": config.BLOCK_O}
                types = {side: f"tensordesc<{element}[1, 1, {config.BLOCK_T}, {n}]>" for side, n in sides.items()}
            constants = {
                "PARTIAL": name == "narrow", "FLAT": config.flat, "TMA": config.tma, "WIDEN": False,
                "PRECISION": "ieee" if target.startswith("gfx") else "tf32x3", "GROUP": per_sample.GROUP,
                "BLOCK_O": config.BLOCK_O, "BLOCK_I": config.BLOCK_I, "BLOCK_T": config.BLOCK_T,
                "num_warps": config.num_warps, "num_stages": config.num_stages,
            }  # fmt: skip
            case = Case(per_sample.per_sample_squared_grad_kernel, constants, types, streams=False, needs=needs)
            found[f"per_sample_squared_grad {element} {name}"] = case
    return found


def cases(target: str) -> dict[str, Case]:
    aligned = {"ALIGNED": True}
    score = {"SCORE": tl.float32, **aligned}
    half_inputs = {"x": "*bf16", "dy": "*bf16"}
    return {
        "squared_grad_accumulate bf16": Case(
            squared_grad.squared_grad_accumulate_kernel, {"GRAD": tl.bfloat16, **aligned, **squared_grad.CONFIG}
        ),
        **_products(target),
        "per_sample_squared_grad partial_sum": Case(per_sample.partial_sum_kernel, per_sample.SUM_CONFIG),
        "per_sample_affine sum bf16": Case(
            per_sample_affine.affine_sum_kernel,
            {"SCALED": True, "SHIFTED": True, "NORMALISED": True, **per_sample_affine.SUM_CONFIG},
            half_inputs,
        ),
        "per_sample_affine square": Case(
            per_sample_affine.affine_square_kernel, per_sample_affine.SQUARE_CONFIG, streams=False
        ),
        "gaussian_perturb bf16": Case(
            gaussian_perturb.gaussian_perturb_kernel,
            {"PARAM": tl.bfloat16, "EXCESS": tl.float32, **aligned, **gaussian_perturb.CONFIG},
        ),
        "precision_update natural bf16": Case(
            precision_update.natural_kernel, {"SQUARED": tl.bfloat16, **aligned, **precision_update.NATURAL_CONFIG}
        ),
        "precision_update sgvb bf16": Case(
            precision_update.sgvb_kernel, {"GRAD": tl.bfloat16, **aligned, **precision_update.SGVB_CONFIG}
        ),
        "dr_fim_score fp32": Case(
            dr_fim_score.dr_fim_score_kernel,
            {"FISHER": tl.float32, "SHIFTED": tl.float32, "TASK_ONLY": False, "FIRST": False, **aligned,
             **dr_fim_score.CONFIG},
        ),
        "dr_fim_score collect fp32": Case(
            dr_fim_score.dr_fim_score_collect_kernel,
            {"FISHER": tl.float32, "SHIFTED": tl.float32, "TASK_ONLY": False, "FIRST": False, "KEEP": True, **aligned,
             **dr_fim_score.CONFIG},
        ),
        "key_histogram 8 bits fp32": Case(
            select_threshold.key_histogram_kernel,
            {"BINS": 256, "IN_REGISTERS": True, **score, **select_threshold.CONFIG},
            {"counts": "*i64"},
        ),
        "key_histogram 11 bits bf16": Case(
            select_threshold.key_histogram_kernel,
            {"BINS": 2048, "IN_REGISTERS": False, **score, "SCORE": tl.bfloat16, **select_threshold.CONFIG},
            {"counts": "*i64"},
            streams=False,  # its time goes into atomics
        ),
        "select_threshold sample bf16": Case(
            select_threshold.sample_scores_kernel, {"SCORE": tl.bfloat16, **select_threshold.SAMPLE_CONFIG},
            streams=False,  # one score from each run
        ),
        "collect_bracket fp32": Case(
            select_threshold.collect_bracket_kernel, {"KEEP": True, **score, **select_threshold.COLLECT_CONFIG}
        ),
        "collect_bracket bf16 counts only": Case(
            select_threshold.collect_bracket_kernel,
            {"KEEP": False, **score, "SCORE": tl.bfloat16, **select_threshold.COLLECT_CONFIG},
            streams=not target.startswith("gfx"),  # four scores a lane are 8 bytes there
        ),
        "compact count fp32": Case(compact.count_kernel, {**score, **compact.CONFIG}, {"counts": "*i32"}),
        "compact write fp32": Case(compact.write_kernel, {"INDEX": tl.int32, **score, **compact.CONFIG}),
        "sparse_adamw bf16 gated master": Case(
            sparse_adamw.sparse_adamw_kernel,
            {"PARAM": tl.bfloat16, "GRAD": tl.bfloat16, "INDEX": tl.int32, "COMPACT": False, "SCALED": False,
             "GATED": True, "MASTER": True, "STOCHASTIC": False, **aligned, **sparse_adamw.CONFIG},
        ),
        "sparse_adamw bf16 stochastic": Case(
            sparse_adamw.sparse_adamw_kernel,
            {"PARAM": tl.bfloat16, "GRAD": tl.bfloat16, "INDEX": tl.int32, "COMPACT": False, "SCALED": True,
             "GATED": False, "MASTER": False, "STOCHASTIC": True, **aligned, **sparse_adamw.CONFIG},
        ),
        "sparse_adamw bf16 compact": Case(
            sparse_adamw.sparse_adamw_kernel,
            {"PARAM": tl.bfloat16, "GRAD": tl.bfloat16, "INDEX": tl.int32, "COMPACT": True, "SCALED": True,
             "GATED": False, "MASTER": False, "STOCHASTIC": False, **aligned, **sparse_adamw.CONFIG},
        ),
        "sparse_adamw fp32 int64": Case(
            sparse_adamw.sparse_adamw_kernel,
            {"PARAM": tl.float32, "GRAD": tl.float32, "INDEX": tl.int64, "COMPACT": False, "SCALED": False,
             "GATED": False, "MASTER": False, "STOCHASTIC": False, **aligned, **sparse_adamw.CONFIG},
        ),
        "selected_grad_norm bf16": Case(
            selected_grad_norm.selected_squares_kernel,
            {"GRAD": tl.bfloat16, "INDEX": tl.int32, "WHOLE": False, **aligned, **selected_grad_norm.CONFIG},
        ),
        "selected_grad_norm fp32 whole": Case(
            selected_grad_norm.selected_squares_kernel,
            {"GRAD": tl.float32, "INDEX": tl.int32, "WHOLE": True, **aligned, **selected_grad_norm.CONFIG},
        ),
        "selected_grad_norm second stage": Case(
            selected_grad_norm.finish_kernel, selected_grad_norm.FINISH_CONFIG, streams=False
        ),
        "values gather 16 bit": Case(
            values.move_kernel, {"VALUE": tl.int16, "INDEX": tl.int32, "SCATTER": False, **aligned, **values.CONFIG}
        ),
        "values scatter 32 bit": Case(
            values.move_kernel, {"VALUE": tl.int32, "INDEX": tl.int64, "SCATTER": True, **aligned, **values.CONFIG}
        ),
    }  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    registers: int
    shared: int
    spills: int
    """Bytes stored outside registers for want of them; on AMD the number of spilled registers."""
    narrow_offsets: list[str]
    """Pointer arithmetic with 32-bit offsets."""
    float64: list[str]
    vector_loads: int
    """Loads of 16 bytes."""
    text: str
    """The PTX or the AMD assembly."""

    @property
    def use(self) -> dict[str, int]:
        return {"registers": self.registers, "shared": self.shared, "spills": self.spills}


def missing_backend(target: str) -> str | None:
    backend = {"cuda": "nvidia", "hip": "amd"}[TARGETS[target].backend]
    return None if backend in backends else f"this triton has no {backend} backend"


def compile_case(case: Case, target: str) -> Compiled:
    names = case.kernel.arg_names
    constants = {name: value for name, value in case.constants.items() if name in names}
    options = {name: value for name, value in case.constants.items() if name not in names}
    signature = {
        name: "constexpr" if name in constants else case.types.get(name, TYPES.get(name, "fp32")) for name in names
    }
    source = ASTSource(
        case.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if name in MULTIPLES_OF_16 and not signature[name].startswith("tensordesc")
        },
    )
    asm = triton.compile(source, target=TARGETS[target], options=options)
    narrow = [line.strip() for line in asm.asm["ttir"].splitlines() if narrow_offset(line)]
    if TARGETS[target].backend == "hip":
        return _amd(asm, narrow)
    return _nvidia(asm, narrow, target)


def narrow_offset(line: str) -> bool:
    """Whether an IR line adds a 32-bit offset to a pointer."""
    return "tt.addptr" in line and re.search(r"(?:, |x)i32>?(?: loc\(.*)?$", line.strip()) is not None


def _nvidia(asm, narrow: list[str], target: str) -> Compiled:
    ptx = asm.asm["ptx"]
    architecture = re.search(r"^\.target (\w+)", ptx, re.M)[1]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name={architecture}", file.name, "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = sum(int(size) for size in re.findall(r"(\d+) bytes spill", report))
    return Compiled(
        registers=int(re.search(r"Used (\d+) registers", report)[1]),
        shared=asm.metadata.shared,
        spills=spills,
        narrow_offsets=narrow,
        float64=re.findall(r"^.*\.f64.*$", ptx, re.M),
        vector_loads=len(
            re.findall(r"(?:ld\.global\S*\.(?:v4\.[bfu]32|v2\.[bfu]64)|cp\.async\.c[ag]\S* .*, 0x10)", ptx)
        ),
        text=ptx,
    )


def _amd(asm, narrow: list[str]) -> Compiled:
    text = asm.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    return Compiled(
        registers=number("vgpr_count"),
        shared=number("group_segment_fixed_size") or asm.metadata.shared,
        spills=number("vgpr_spill_count") + number("sgpr_spill_count"),
        narrow_offsets=narrow,
        float64=re.findall(r"^\s*v_\w+_f64.*$", text, re.M),
        vector_loads=len(re.findall(r"(?:global|buffer|flat)_load_dwordx4", text)),
        text=text,
    )


def triton_minor() -> str:
    return ".".join(triton.__version__.split(".")[:2])


def main() -> None:
    budget: dict = {"triton": triton_minor()}
    for target in TARGETS:
        if reason := missing_backend(target):
            raise SystemExit(f"{target}: {reason}. The budget needs every target.")
        budget[target] = {}
        for name, case in cases(target).items():
            start = time.perf_counter()
            compiled = compile_case(case, target)
            budget[target][name] = compiled.use
            print(
                f"{target:7s} {name:40s} {compiled.use} 16-byte loads {compiled.vector_loads} "
                f"narrow {len(compiled.narrow_offsets)} f64 {len(compiled.float64)} {time.perf_counter() - start:.1f} s"
            )
    BUDGET.write_text(json.dumps(budget, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
