"""Mistakes a kernel could have, each with the test that must turn red when it is made.

``python tests/kernels/mutations.py [--write] [name …]`` copies the package, makes one mistake at a time, rebuilds the
C++ library where its source changed, runs the named tests and reports ``killed`` or ``SURVIVED``. A name selects every
mutation that begins with it; ``--write`` records the outcomes in ``docs/mutations.md``. The text to replace must occur
exactly once in its file: a mutation that no longer applies is an error here and in ``test_mutations.py``.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import hypothesis  # noqa: F401 (this and the next are imported here for the forks)
import pytest
import torch  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "docs" / "mutations.md"
COPIED = ("kernels", "csrc", "tests/kernels", "CMakeLists.txt", "pyproject.toml")
SECONDS = 600  # for a test; one that takes longer does not end


class Mutation:
    """One mistake.

    Args:
        name: operator/rung/slug.
        file: relative to the project's root.
        find, replace: the right text, which occurs once, and the wrong one.
        what: the mistake in words, for the report.
        tests: pytest node ids, tried in this order until one is red.
    """

    def __init__(self, name: str, file: str, find: str, replace: str, what: str, *tests: str) -> None:
        self.name, self.file, self.find, self.replace, self.what, self.tests = name, file, find, replace, what, tests

    @property
    def operator(self) -> str:
        return self.name.split("/")[0]

    @property
    def rung(self) -> str:
        return self.name.split("/")[1]

    def applied(self, source: str) -> str:
        """The file's text with the mistake in it.

        Raises:
            ValueError: if the text to replace does not occur exactly once.
        """
        count = source.count(self.find)
        if count != 1:
            raise ValueError(
                f"{self.name}: the text to replace occurs {count} times in {self.file}, expected once. The code has "
                f"changed: write the same mistake for the new code in {Path(__file__).name}.\n{self.find}"
            )
        return source.replace(self.find, self.replace)


# Where the tests are --------------------------------------------------------------------------------------------------


def interpreted(file: str, test: str) -> str:
    return f"tests/kernels/triton/interpreter/test_interpreted_{file}.py::{test}"


def native(test: str) -> str:
    return f"tests/kernels/test_native.py::{test}"


def reference(test: str) -> str:
    return f"tests/kernels/test_reference.py::{test}"


def select(test: str) -> str:
    return f"tests/kernels/test_select.py::{test}"


def ops(test: str) -> str:
    return f"tests/kernels/test_ops.py::{test}"


def contract(test: str) -> str:
    return f"tests/kernels/test_contract.py::{test}"


COMPILED = "tests/kernels/triton/compiled/test_compiled.py::test_compiles_within_its_budget[sm_90]"

# Where the code is ----------------------------------------------------------------------------------------------------

PACKAGE = "kernels/fishertune_kernels"
LIBRARY = f"{PACKAGE}/lib"
COMMON = f"{PACKAGE}/triton_common.py"
API = "csrc/cpu/api.cpp"
CHUNKS = "csrc/cpu/chunks.h"
NUMERIC = "csrc/cpu/numeric.inl"
PHILOX = "csrc/cpu/philox.inl"
ELEMENTWISE = "csrc/cpu/elementwise.inl"
SELECTION = "csrc/cpu/selection.inl"
STEP = "csrc/cpu/sparse_adamw.inl"


def triton(operator: str) -> str:
    return f"{PACKAGE}/{operator}/triton.py"


# The mistakes ---------------------------------------------------------------------------------------------------------

SQUARES = triton("squared_grad_accumulate")
SQUARES_RED = interpreted("elementwise", "test_squared_grad_accumulate")
PER_SAMPLE = triton("per_sample_squared_grad")
PER_SAMPLE_RED = interpreted("per_sample", "test_per_sample_squared_grad")
PER_SAMPLE_VARIANTS = interpreted("per_sample", "test_every_variant_and_split")
AFFINE = triton("per_sample_affine_squared_grad")
AFFINE_RED = interpreted("per_sample_affine", "test_per_sample_affine")
PERTURB = triton("gaussian_perturb")
PERTURB_RED = interpreted("elementwise", "test_gaussian_perturb")
OUTSIDE_RED = interpreted("elementwise", "test_nothing_outside_a_perturbed_tensor_is_written")
PRECISION = triton("precision_update")
NATURAL_RED = interpreted("elementwise", "test_precision_update_natural")
SGVB_RED = interpreted("elementwise", "test_precision_update_sgvb")
SCORE = triton("dr_fim_score")
SCORE_RED = interpreted("elementwise", "test_dr_fim_score")
HISTOGRAM = triton("select_threshold")
HISTOGRAM_RED = interpreted("selection", "test_key_histogram")
BRACKET_RED = interpreted("selection", "test_collect_bracket")
COMPACT = triton("compact")
COMPACT_RED = interpreted("selection", "test_threshold_and_compaction")
ADAMW = triton("sparse_adamw")
ADAMW_RED = interpreted("selection", "test_sparse_adamw")
STOCHASTIC_RED = interpreted("step", "test_stochastic_rounding_has_the_references_bits")
NORM = triton("selected_grad_norm")
NORM_RED = interpreted("step", "test_selected_grad_norm")
VALUES = triton("values")
VALUES_RED = interpreted("selection", "test_gather_and_scatter_move_bits")
NUMBERS_RED = interpreted("elementwise", "test_rounding_expm1_and_keys")
NOISE_RED = interpreted("elementwise", "test_noise_equals_a_float64_box_muller_of_philox")
SHARDS_RED = interpreted("elementwise", "test_noise_is_a_function_of_the_global_index")

TRITON = (
    # squared_grad_accumulate
    Mutation(
        "squared_grad_accumulate/triton/tail", SQUARES,
        "offsets < size if MASKED", "offsets <= size if MASKED", "tail mask one element too long", SQUARES_RED,
    ),
    Mutation(
        "squared_grad_accumulate/triton/whole-chunk", SQUARES,
        "if start + BLOCK <= size:", "if start + BLOCK <= size + 1:",
        "a chunk short of one element takes the path without masks", SQUARES_RED,
    ),
    Mutation(
        "squared_grad_accumulate/triton/half-square", SQUARES,
        "tl.load(grad + offsets, mask=mask).to(tl.float32)", "tl.load(grad + offsets, mask=mask)",
        "squares a half gradient in its own precision", SQUARES_RED,
    ),
    Mutation(
        "squared_grad_accumulate/triton/half-sum", SQUARES,
        "old + weight * (g * g), mask", "(old + weight * (g * g)).to(tl.float16).to(tl.float32), mask",
        "accumulates in fp16", SQUARES_RED,
    ),
    Mutation(
        "squared_grad_accumulate/triton/weight", SQUARES,
        "old + weight * (g * g)", "old + g * g", "ignores the weight", SQUARES_RED,
    ),
    Mutation(
        "squared_grad_accumulate/triton/offset-i32", SQUARES,
        "offsets = chunk_offsets(start, BLOCK)", "offsets = chunk_offsets(start, BLOCK).to(tl.int32)",
        "32-bit offsets", COMPILED,
    ),
    # per_sample_squared_grad
    Mutation(
        "per_sample_squared_grad/triton/tile-order", PER_SAMPLE,
        "rows = tl.minimum(tiles_o - first_o, GROUP)", "rows = GROUP",
        "a group with fewer rows visits the wrong tiles", PER_SAMPLE_RED,
    ),
    Mutation(
        "per_sample_squared_grad/triton/token-tail", PER_SAMPLE,
        "inside_t = start + tl.arange(0, BLOCK_T) < T",
        "inside_t = start + tl.arange(0, BLOCK_T) <= T",
        "the last block of tokens reads the next sample's first",
        PER_SAMPLE_RED,
    ),
    Mutation(
        "per_sample_squared_grad/triton/row-stride", PER_SAMPLE,
        "tile = result + slab + o[:, None] * I + i",
        "tile = result + slab + o[:, None] * (I - 1) + i",
        "rows of the result lie one element too close",
        PER_SAMPLE_RED,
    ),
    Mutation(
        "per_sample_squared_grad/triton/half-accumulator", PER_SAMPLE,
        "grad, input_precision=PRECISION)\n            squares",
        "grad, input_precision=PRECISION).to(tl.float16).to(tl.float32)\n            squares",
        "accumulates the product in fp16",
        PER_SAMPLE_VARIANTS,
    ),
    Mutation(
        "per_sample_squared_grad/triton/half-accumulator-flat", PER_SAMPLE,
        "grad, input_precision=PRECISION)\n            if start",
        "grad, input_precision=PRECISION).to(tl.float16).to(tl.float32)\n            if start",
        "flat loop: accumulates the product in fp16",
        PER_SAMPLE_VARIANTS,
    ),
    Mutation(
        "per_sample_squared_grad/triton/half-squares", PER_SAMPLE,
        "            squares += grad * grad\n    # From",
        "            squares = (squares + grad * grad).to(tl.bfloat16).to(tl.float32)\n    # From",
        "accumulates squares in bf16",
        PER_SAMPLE_VARIANTS,
    ),
    Mutation(
        "per_sample_squared_grad/triton/last-sample", PER_SAMPLE,
        "            squares += grad * grad\n    # From",
        "            squares = grad * grad\n    # From",
        "keeps the last sample only",
        PER_SAMPLE_VARIANTS,
    ),
    Mutation(
        "per_sample_squared_grad/triton/batch-square", PER_SAMPLE,
        "        for n in range(first, last):\n            grad = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)\n",
        "        grad = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)\n        for n in range(first, last):\n",
        "does not start a sample's gradient at zero",
        PER_SAMPLE_VARIANTS,
    ),
    Mutation(
        "per_sample_squared_grad/triton/batch-square-flat", PER_SAMPLE,
        "                squares += grad * grad\n                grad = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)\n",
        "                squares += grad * grad\n",
        "flat loop: does not start a sample's gradient at zero",
        PER_SAMPLE_VARIANTS,
    ),
    Mutation(
        "per_sample_squared_grad/triton/split-overlap", PER_SAMPLE,
        "last = tl.minimum(first + split_samples, N)",
        "last = tl.minimum(first + split_samples + 1, N)",
        "a split adds the next one's first sample",
        PER_SAMPLE_VARIANTS,
    ),
    Mutation(
        "per_sample_squared_grad/triton/second-stage", PER_SAMPLE,
        "for split in range(1, splits):",
        "for split in range(1, splits - 1):",
        "second stage leaves out the last split",
        PER_SAMPLE_VARIANTS,
    ),
    Mutation(
        "per_sample_squared_grad/triton/second-stage-tail", PER_SAMPLE,
        "mask = at < size if MASKED",
        "mask = at <= size if MASKED",
        "second stage writes one element too many",
        PER_SAMPLE_VARIANTS,
    ),
    Mutation(
        "per_sample_squared_grad/triton/head", PER_SAMPLE,
        "tl.cast(head, tl.int64) * dy_head + t",
        "t",
        "every head reads the first one's gradient",
        interpreted("per_sample", "test_heads_and_slices_are_read_where_they_lie"),
    ),
    Mutation(
        "per_sample_squared_grad/triton/offset-i32", PER_SAMPLE,
        "block = tl.load(at + offset,",
        "block = tl.load(at + offset.to(tl.int32),",
        "32-bit offsets into x and dY",
        COMPILED,
    ),
    # per_sample_affine_squared_grad
    Mutation(
        "per_sample_affine_squared_grad/triton/token-tail", AFFINE,
        "inside_t = start + t < end",
        "inside_t = start + t <= end",
        "the last block of a split reads the next split's first token",
        AFFINE_RED,
    ),
    Mutation(
        "per_sample_affine_squared_grad/triton/channel-tail", AFFINE,
        "inside = c < C\n",
        "inside = c <= C\n",
        "the second stage writes one channel too many",
        AFFINE_RED,
    ),
    Mutation(
        "per_sample_affine_squared_grad/triton/half-sum", AFFINE,
        "products += dy_TC * x_TC",
        "products = (products + dy_TC * x_TC).to(tl.float16).to(tl.float32)",
        "sums products in fp16",
        AFFINE_RED,
    ),
    Mutation(
        "per_sample_affine_squared_grad/triton/last-split", AFFINE,
        "grad += tl.load(sums + row + c",
        "grad = tl.load(sums + row + c",
        "second stage keeps the last split only",
        AFFINE_RED,
    ),
    Mutation(
        "per_sample_affine_squared_grad/triton/batch-square", AFFINE,
        "    for n in range(N):\n        grad = tl.zeros((BLOCK_C,), tl.float32)\n",
        "    grad = tl.zeros((BLOCK_C,), tl.float32)\n    for n in range(N):\n",
        "does not start a sample's gradient at zero",
        AFFINE_RED,
    ),
    Mutation(
        "per_sample_affine_squared_grad/triton/rstd", AFFINE,
        "(x_TC - mean_T[:, None]) * rstd_T[:, None]",
        "x_TC - mean_T[:, None] + 0 * rstd_T[:, None]",
        "does not normalise",
        AFFINE_RED,
    ),
    Mutation(
        "per_sample_affine_squared_grad/triton/weight", AFFINE,
        "old + tl.cast(weight, tl.float32) * squares",
        "old + squares",
        "ignores the weight",
        AFFINE_RED,
    ),
    Mutation(
        "per_sample_affine_squared_grad/triton/offset-i32", AFFINE,
        "dy_TC = tl.load(dy + at,",
        "dy_TC = tl.load(dy + at.to(tl.int32),",
        "32-bit offsets",
        COMPILED,
    ),
    # gaussian_perturb
    Mutation(
        "gaussian_perturb/triton/tail", PERTURB,
        "(offsets >= 0) & (offsets < size)", "(offsets >= 0) & (offsets <= size)",
        "tail mask one element too long", OUTSIDE_RED,
    ),
    Mutation(
        "gaussian_perturb/triton/head", PERTURB,
        "(offsets >= 0) & (offsets < size)", "(offsets < size)",
        "the first chunk writes before the tensor", PERTURB_RED,
    ),
    Mutation(
        "gaussian_perturb/triton/lane", PERTURB,
        "lead = offset & 3", "lead = offset & 0", "every tensor begins with lane 0 of Philox", SHARDS_RED,
    ),
    Mutation(
        "gaussian_perturb/triton/lead-chunk", PERTURB,
        "(lead == 0) & (start + BLOCK <= size)", "start + BLOCK <= size",
        "a tensor that begins inside a block takes the path without its shift", SHARDS_RED,
    ),
    Mutation(
        "gaussian_perturb/triton/sign", PERTURB,
        "theta + sign * tl.rsqrt", "theta + tl.rsqrt", "ignores the sign", PERTURB_RED,
    ),
    Mutation(
        "gaussian_perturb/triton/prior", PERTURB,
        ".to(tl.float32) + prior_precision", ".to(tl.float32)", "leaves out the prior's precision", PERTURB_RED,
    ),
    Mutation(
        "gaussian_perturb/triton/offset-i32", PERTURB,
        "offsets = chunk_offsets(start, BLOCK)", "offsets = chunk_offsets(start, BLOCK).to(tl.int32)",
        "32-bit offsets", COMPILED,
    ),
    # precision_update
    Mutation(
        "precision_update_natural/triton/tail", PRECISION,
        "mask = offsets < size if MASKED", "mask = offsets <= size if MASKED",
        "tail mask one element too long", NATURAL_RED,
    ),
    Mutation(
        "precision_update_natural/triton/keep", PRECISION,
        "keep * old + gain", "old + gain", "does not forget: E + βF̂/γ", NATURAL_RED,
    ),
    Mutation(
        "precision_update_natural/triton/gamma", PRECISION,
        "float(beta / gamma)", "float(beta)", "leaves out γ", NATURAL_RED,
    ),
    Mutation(
        "precision_update_natural/triton/half-sum", PRECISION,
        "tl.store(excess + offsets, new, mask=mask)\n\n\ndef precision_update_natural_",
        "tl.store(excess + offsets, new.to(tl.float16).to(tl.float32), mask=mask)\n\n\ndef precision_update_natural_",
        "accumulates in fp16", NATURAL_RED,
    ),
    Mutation(
        "precision_update_natural/triton/offset-i32", PRECISION,
        "tl.load(squared + offsets, mask=mask)", "tl.load(squared + offsets.to(tl.int32), mask=mask)",
        "32-bit offsets", COMPILED,
    ),
    Mutation(
        "precision_update_sgvb/triton/tail", PRECISION,
        "(offsets >= 0) & (offsets < size)", "(offsets >= 0) & (offsets <= size)",
        "tail mask one element too long", SGVB_RED,
    ),
    Mutation(
        "precision_update_sgvb/triton/lane", PRECISION,
        "lead = offset & 3", "lead = offset & 0", "draws from the wrong lane of Philox", SGVB_RED,
    ),
    Mutation(
        "precision_update_sgvb/triton/sign", PRECISION,
        "epsilon *= tl.cast(sign, tl.float32)", "epsilon *= 1.0", "ignores the sign of the draw", SGVB_RED,
    ),
    Mutation(
        "precision_update_sgvb/triton/noise-step", PRECISION,
        "*words(noise_step)", "*words(step)", "draws with Adam's step instead of the draw's", SGVB_RED,
    ),
    Mutation(
        "precision_update_sgvb/triton/bias-correction-1", PRECISION,
        "lr / (1 - beta1**step)", "lr", "no bias correction of the mean", SGVB_RED,
    ),
    Mutation(
        "precision_update_sgvb/triton/bias-correction-2", PRECISION,
        "1.0 - beta2**step", "1.0", "no bias correction of the square", SGVB_RED,
    ),
    Mutation(
        "precision_update_sgvb/triton/eps", PRECISION,
        "tl.sqrt_rn(tl.div_rn(square, correction2)) + eps", "tl.sqrt_rn(tl.div_rn(square, correction2) + eps)",
        "eps inside the square root", SGVB_RED,
    ),
    Mutation(
        "precision_update_sgvb/triton/one-minus-beta", PRECISION,
        "            1.0 - beta2,\n", "            torch.tensor(1.0 - torch.tensor(beta2)).item(),\n",
        "1 − β in single precision", interpreted("elementwise", "test_precision_moments_of_the_prior_term_are_exact"),
    ),
    Mutation(
        "precision_update_sgvb/triton/floor", PRECISION,
        "new = tl.where(new < floor, floor, new)", "new = new", "lets the precision reach zero",
        interpreted("elementwise", "test_precision_stays_positive_under_a_huge_step"),
    ),
    Mutation(
        "precision_update_sgvb/triton/offset-i32", PRECISION,
        "tl.load(exp_avg + offsets, mask=mask)", "tl.load(exp_avg + offsets.to(tl.int32), mask=mask)",
        "32-bit offsets", COMPILED,
    ),
    # dr_fim_score
    Mutation(
        "dr_fim_score/triton/tail", SCORE,
        "offsets < size if MASKED", "offsets <= size if MASKED", "tail mask one element too long", SCORE_RED,
    ),
    Mutation(
        "dr_fim_score/triton/minimum", SCORE,
        "tl.minimum(f, f_shifted)", "tl.maximum(f, f_shifted)", "divides by the larger of F and F'", SCORE_RED,
    ),
    Mutation(
        "dr_fim_score/triton/eps-over-gamma", SCORE,
        "prior_precision + eps / gamma", "prior_precision + eps", "eps is not divided by γ (Eq. 15)", SCORE_RED,
    ),
    Mutation(
        "dr_fim_score/triton/first", SCORE,
        "if not FIRST:", "if True:", "the first score is averaged with what the buffer held", SCORE_RED,
    ),
    Mutation(
        "dr_fim_score/triton/mean", SCORE,
        "float(damping), 1.0 / count]",
        "float(damping), 0.9 / count]",
        "wrong share in the running mean",
        SCORE_RED,
    ),
    Mutation(
        "dr_fim_score/triton/half", SCORE,
        "tl.load(fisher + offsets, mask=mask).to(tl.float32)",
        "tl.load(fisher + offsets, mask=mask).to(tl.float16).to(tl.float32)", "computes with fp16 values", SCORE_RED,
    ),
    Mutation(
        "dr_fim_score/triton/offset-i32", SCORE,
        "offsets = chunk_offsets(start, BLOCK)", "offsets = chunk_offsets(start, BLOCK).to(tl.int32)",
        "32-bit offsets", COMPILED,
    ),
    # key_histogram
    Mutation(
        "key_histogram/triton/tail", HISTOGRAM,
        "        inside = offsets < size\n        if",
        "        inside = offsets <= size\n        if",
        "counts one element too many",
        HISTOGRAM_RED,
    ),
    Mutation(
        "key_histogram/triton/offset-i32", HISTOGRAM,
        "        offsets = chunk_offsets(chunk * BLOCK, BLOCK)\n",
        "        offsets = chunk_offsets(chunk * BLOCK, BLOCK).to(tl.int32)\n",
        "32-bit offsets",
        COMPILED,
    ),
    Mutation(
        "key_histogram/triton/stride", HISTOGRAM,
        "current += tl.num_programs(0)", "current += 1", "programs count each other's chunks again", HISTOGRAM_RED,
    ),
    Mutation(
        "key_histogram/triton/nan", HISTOGRAM,
        "member = inside & ~nan &", "member = inside &", "NaN is counted among the keys", HISTOGRAM_RED,
    ),
    Mutation(
        "key_histogram/triton/nan-count", HISTOGRAM,
        "nans += nan.to(tl.int32)", "nans = nan.to(tl.int32)", "counts NaN of the last chunk only", HISTOGRAM_RED,
    ),
    Mutation(
        "key_histogram/triton/prefix", HISTOGRAM,
        "(key & tl.cast(prefix_mask, tl.uint32)) == tl.cast(prefix, tl.uint32)",
        "(key & tl.cast(prefix, tl.uint32)) == tl.cast(prefix, tl.uint32)",
        "the prefix mask is not the mask", HISTOGRAM_RED,
    ),
    Mutation(
        "key_histogram/triton/second-stage", HISTOGRAM,
        "tl.atomic_add(counts + bins, found, mask=found > 0",
        "tl.atomic_add(counts + bins, found, mask=(found > 0) & (tl.program_id(0) == 0)",
        "only the first program adds its counts", HISTOGRAM_RED,
    ),
    Mutation(
        "key_histogram/triton/digit", HISTOGRAM,
        "(BINS - 1)).to(tl.int32)", "(BINS // 2 - 1)).to(tl.int32)", "drops the digit's top bit", HISTOGRAM_RED,
    ),
    Mutation(
        "key_histogram/triton/minus-zero", COMMON,
        "word = tl.where(word == 0x80000000, 0, word)\n", "word = word\n",
        "−0 ranks below +0", NUMBERS_RED, COMPACT_RED,
    ),
    Mutation(
        "key_histogram/triton/negative", COMMON,
        "word ^ 0xFFFFFFFF, word | 0x80000000)", "word & 0x7FFFFFFF, word | 0x80000000)",
        "negative scores rank by size", NUMBERS_RED,
    ),
    # collect_bracket, sample_scores
    Mutation(
        "collect_bracket/triton/tail", HISTOGRAM,
        "\n    inside = offsets < size\n",
        "\n    inside = offsets <= size\n",
        "counts one element too many",
        BRACKET_RED,
    ),
    Mutation(
        "collect_bracket/triton/nan", HISTOGRAM,
        "ranked = inside & ~nan",
        "ranked = inside",
        "NaN is ranked",
        BRACKET_RED,
    ),
    Mutation(
        "collect_bracket/triton/high", HISTOGRAM,
        "(key > tl.cast(high, tl.uint32))",
        "(key >= tl.cast(high, tl.uint32))",
        "the upper end of the bracket is outside",
        BRACKET_RED,
    ),
    Mutation(
        "collect_bracket/triton/low", HISTOGRAM,
        "(key >= tl.cast(low, tl.uint32))",
        "(key > tl.cast(low, tl.uint32))",
        "the lower end of the bracket is outside",
        BRACKET_RED,
    ),
    Mutation(
        "collect_bracket/triton/position", HISTOGRAM,
        "position = first + tl.cumsum(between.to(tl.int32), axis=0).to(tl.int64) - 1",
        "position = first + tl.cumsum(between.to(tl.int32), axis=0).to(tl.int64)",
        "candidates begin one place too late",
        BRACKET_RED,
    ),
    Mutation(
        "collect_bracket/triton/reserve", HISTOGRAM,
        "tl.atomic_add(cursor, found.to(tl.int64), sem=\"relaxed\")",
        "tl.load(cursor)",
        "chunks do not reserve room for their candidates",
        BRACKET_RED,
    ),
    Mutation(
        "collect_bracket/triton/number", HISTOGRAM,
        "(number << 32) | key.to(tl.int64)",
        "key.to(tl.int64) + 0 * number",
        "candidates forget their tensor",
        BRACKET_RED,
    ),
    Mutation(
        "collect_bracket/triton/second-stage", HISTOGRAM,
        "totals[:, 1:] = self._counts.cumsum(dim=1)",
        "totals[:, 1:] = self._counts",
        "second stage without its scan",
        BRACKET_RED,
    ),
    Mutation(
        "collect_bracket/triton/offset-i32", HISTOGRAM,
        "\n    offsets = chunk_offsets(chunk * BLOCK, BLOCK)\n",
        "\n    offsets = chunk_offsets(chunk * BLOCK, BLOCK).to(tl.int32)\n",
        "32-bit offsets",
        COMPILED,
    ),
    Mutation(
        "sample_scores/triton/place", HISTOGRAM,
        "place = within * stride + ((turn * stride) >> 32)",
        "place = within * stride + ((turn * stride) >> 33)",
        "the second half of every run is never drawn",
        interpreted("selection", "test_sample"),
    ),
    Mutation(
        "sample_scores/triton/short-run", HISTOGRAM,
        "inside & (place < size)",
        "inside & (place <= size)",
        "draws behind the tensor",
        interpreted("selection", "test_sample"),
    ),
    Mutation(
        "dr_fim_threshold/triton/tail", SCORE,
        "inside = chunk_offsets(start, BLOCK) < size",
        "inside = chunk_offsets(start, BLOCK) <= size",
        "counts one element too many",
        interpreted("selection", "test_scores_and_their_bracket_in_one_pass"),
    ),
    # compact
    Mutation(
        "compact/triton/tail", COMPACT,
        "inside = offsets < size", "inside = offsets <= size", "compares one element behind the tensor",
        interpreted("selection", "test_nothing_behind_the_scores_is_ranked"),
    ),
    Mutation(
        "compact/triton/greater", COMPACT,
        "inside & (score > value), inside", "inside & (score >= value), inside", "ties count as larger", COMPACT_RED,
    ),
    Mutation(
        "compact/triton/quota", COMPACT,
        "tie_number <= quota", "tie_number < quota", "keeps one tie too few", COMPACT_RED,
    ),
    Mutation(
        "compact/triton/tie-order", COMPACT,
        "tie_number = ties_before + tl.cumsum(", "tie_number = tl.cumsum(",
        "every chunk counts its ties from one", COMPACT_RED,
    ),
    Mutation(
        "compact/triton/position", COMPACT,
        "above_before + tl.minimum(ties_before, quota)", "above_before + ties_before",
        "earlier ties that are not kept shift the indices", COMPACT_RED,
    ),
    Mutation(
        "compact/triton/scan", COMPACT,
        "totals[:, 1:] = counts.cumsum(dim=1)", "totals[:, 1:] = counts", "second stage without its scan", COMPACT_RED,
    ),
    Mutation(
        "compact/triton/first-chunk", COMPACT,
        "totals[:, :-1] - totals[:, first_T[table.owners.long()]]", "totals[:, :-1]",
        "a later tensor's indices begin behind the earlier ones'", COMPACT_RED,
    ),
    Mutation(
        "compact/triton/index-dtype", COMPACT,
        "torch.int32 if numel <= 2**31", "torch.int32 if numel <= 2**32", "int32 indices beyond 2³¹ elements",
        interpreted("selection", "test_the_index_dtype_changes_behind_two_to_the_31"),
    ),
    Mutation(
        "compact/triton/offset-i32", COMPACT,
        "tl.load(scores + offsets).to(tl.float32)", "tl.load(scores + offsets.to(tl.int32)).to(tl.float32)",
        "32-bit offsets", COMPILED,
    ),
    Mutation(
        "compact/triton/position-i32", COMPACT,
        "tl.store(indices + position,", "tl.store(indices + position.to(tl.int32),",
        "32-bit positions of the indices", COMPILED,
    ),
    # sparse_adamw
    Mutation(
        "sparse_adamw/triton/tail", ADAMW,
        "offsets < size if MASKED", "offsets <= size if MASKED", "tail mask one element too long", ADAMW_RED,
    ),
    Mutation(
        "sparse_adamw/triton/gated-tail", ADAMW,
        "            moves = moves & mask\n", "            moves = moves\n",
        "the gate alone decides in the tail", ADAMW_RED,
    ),
    Mutation(
        "sparse_adamw/triton/gate", ADAMW,
        ">= tl.cast(active_threshold, tl.float32)", "> tl.cast(active_threshold, tl.float32)",
        "a score equal to the threshold does not move", ADAMW_RED,
    ),
    Mutation(
        "sparse_adamw/triton/eps", ADAMW,
        "tl.div_rn(tl.sqrt_rn(square), tl.cast(correction2_sqrt, tl.float32)) + tl.cast(eps, tl.float32)",
        "tl.div_rn(tl.sqrt_rn(square + tl.cast(eps, tl.float32)), tl.cast(correction2_sqrt, tl.float32))",
        "eps inside the square root", ADAMW_RED,
    ),
    Mutation(
        "sparse_adamw/triton/bias-correction-1", ADAMW,
        "lr / (1 - beta1**step)", "lr", "no bias correction of the mean", ADAMW_RED,
    ),
    Mutation(
        "sparse_adamw/triton/bias-correction-2", ADAMW,
        "math.sqrt(1 - beta2**step)", "math.sqrt(1 - beta2)", "bias correction of the square stays at step 1",
        ADAMW_RED,
    ),
    Mutation(
        "sparse_adamw/triton/weight-decay", ADAMW,
        "1.0 - lr * weight_decay", "1.0 - weight_decay", "weight decay without the learning rate", ADAMW_RED,
    ),
    Mutation(
        "sparse_adamw/triton/one-minus-beta", ADAMW,
        "            1.0 - beta2,\n", "            torch.tensor(1.0 - torch.tensor(beta2)).item(),\n",
        "1 − β in single precision", ADAMW_RED,
    ),
    Mutation(
        "sparse_adamw/triton/master", ADAMW,
        "tl.store(master + offsets, theta, mask=moves)",
        "tl.store(master + offsets, theta, mask=moves & (theta != theta))",
        "the master copy is not written", ADAMW_RED,
    ),
    Mutation(
        "sparse_adamw/triton/half-moment", ADAMW,
        "tl.store(exp_avg_sq + offsets, square, mask=mask)",
        "tl.store(exp_avg_sq + offsets, square.to(tl.bfloat16).to(tl.float32), mask=mask)",
        "keeps the second moment in bf16", ADAMW_RED,
    ),
    Mutation(
        "sparse_adamw/triton/index", ADAMW,
        "tl.store(param + index, rounded", "tl.store(param + index + 1, rounded", "writes the neighbour", ADAMW_RED,
    ),
    Mutation(
        "sparse_adamw/triton/index-i32", ADAMW,
        "other=0 if MASKED else None).to(tl.int64)", "other=0 if MASKED else None).to(tl.int32)",
        "32-bit offsets into the parameter", COMPILED,
    ),
    Mutation(
        "sparse_adamw/triton/grad-scale", ADAMW,
        ".to(tl.float32) * gain",
        ".to(tl.float32)",
        "ignores grad_scale",
        ADAMW_RED,
    ),
    Mutation(
        "sparse_adamw/triton/scale-on-device", ADAMW,
        "gain = tl.load(grad_scale_address)",
        "gain = gain",
        "ignores the scale on the device",
        interpreted("step", "test_compact_gradients_and_a_scale_on_the_device_step_alike"),
    ),
    Mutation(
        "sparse_adamw/triton/compact-grads", ADAMW,
        "where = offsets if COMPACT else index",
        "where = index",
        "reads compact gradients by index",
        interpreted("step", "test_compact_gradients_and_a_scale_on_the_device_step_alike"),
    ),
    Mutation(
        "sparse_adamw/triton/stochastic-offset", ADAMW,
        "rounding_bits(offset + index,",
        "rounding_bits(index,",
        "rounding bits of the local index",
        STOCHASTIC_RED,
    ),
    Mutation(
        "rounding/triton/stochastic-bits", COMMON,
        "moved = (word + random) >> 16",
        "moved = (word + 0x8000) >> 16",
        "rounds to nearest instead of at random",
        STOCHASTIC_RED,
    ),
    Mutation(
        "rounding/triton/stochastic-lane", COMMON,
        "even = tl.where((element & 2) != 0, word2, word0)",
        "even = word0",
        "two lanes of Philox round four elements",
        STOCHASTIC_RED,
    ),
    Mutation(
        "rounding/triton/stochastic-stream", COMMON,
        "(element >> 34).to(tl.uint32) | 0x80000000",
        "(element >> 34).to(tl.uint32)",
        "rounding bits are those of the normals",
        STOCHASTIC_RED,
    ),
    # selected_grad_norm
    Mutation(
        "selected_grad_norm/triton/tail", NORM,
        "offsets < size if MASKED",
        "offsets <= size if MASKED",
        "counts one element too many",
        NORM_RED,
    ),
    Mutation(
        "selected_grad_norm/triton/index", NORM,
        "tl.load(grad + index, mask=mask, other",
        "tl.load(grad + index + 1, mask=mask, other",
        "reads the neighbour",
        NORM_RED,
    ),
    Mutation(
        "selected_grad_norm/triton/overflow", NORM,
        "scaled = g * ((253 - exponent) << 23).to(tl.float32, bitcast=True)",
        "scaled = g * ((253 - exponent + exponent - 126) << 23).to(tl.float32, bitcast=True)",
        "squares are not scaled",
        interpreted("step", "test_the_norm_neither_overflows_nor_vanishes"),
    ),
    Mutation(
        "selected_grad_norm/triton/last-chunk", NORM,
        "total += tl.load(partials + at, mask=mask, other=0.0) * factor",
        "total = tl.load(partials + at, mask=mask, other=0.0) * factor",
        "second stage keeps its last block only",
        interpreted("step", "test_the_norm_of_many_chunks"),
    ),
    Mutation(
        "selected_grad_norm/triton/exponent", NORM,
        "factor = (tl.maximum(127 + 2 * below, 0) << 23)",
        "factor = (tl.maximum(127 + below, 0) << 23)",
        "second stage scales sums of squares as if they were sums",
        NORM_RED,
    ),
    Mutation(
        "selected_grad_norm/triton/offset-i32", NORM,
        "other=0 if MASKED else None).to(tl.int64)",
        "other=0 if MASKED else None).to(tl.int32)",
        "32-bit offsets",
        COMPILED,
    ),
    # gather_values, scatter_values_
    Mutation(
        "values/triton/tail", VALUES,
        "offsets < size if MASKED", "offsets <= size if MASKED", "tail mask one element too long", VALUES_RED,
    ),
    Mutation(
        "values/triton/direction", VALUES,
        "_launch(tensors, values, indices, scatter=True)", "_launch(tensors, values, indices, scatter=False)",
        "scatter gathers", VALUES_RED,
    ),
    Mutation(
        "values/triton/index-i32", VALUES,
        "other=0 if MASKED else None).to(tl.int64)", "other=0 if MASKED else None).to(tl.int32)",
        "32-bit offsets into the tensor", COMPILED,
    ),
    # what they share
    Mutation(
        "lists/triton/first-chunk", COMMON,
        "chunk - tl.load(layout + tl.cast(n_tensors, tl.int64) + owner)", "chunk",
        "a later tensor begins at its number in the launch", SQUARES_RED,
    ),
    Mutation(
        "lists/triton/chunk-i32", COMMON,
        "tl.load(owners + chunk)", "tl.load(owners + chunk.to(tl.int32))", "32-bit chunk numbers", COMPILED,
    ),
    Mutation(
        "lists/triton/lead", COMMON,
        "(sizes_T + lead_T + block - 1) // block", "(sizes_T + block - 1) // block",
        "no chunk for the elements that the shift pushes out of the last one", PERTURB_RED,
    ),
    Mutation(
        "lists/triton/table-of-other-sizes", COMMON,
        "sizes = tuple(tensor.numel() for tensor in sized)",
        "sizes = tuple(max(1, tensor.numel()) for tensor in sized)",
        "an empty tensor gets a chunk", SQUARES_RED,
    ),
    Mutation(
        "lists/triton/alignment", COMMON,
        "(table[n_scattered:] & 15).any()",
        "(table[n_scattered:] & 1).any()",
        "claims an alignment that the tensors lack",
        interpreted("elementwise", "test_alignment_is_claimed_where_it_holds"),
    ),
    Mutation(
        "lists/triton/scalar-loads", COMMON,
        "address = tl.multiple_of(address, 16)", "address = address", "loads one element at a time", COMPILED,
    ),
    Mutation(
        "rounding/triton/truncate", COMMON,
        "word + 0x7FFF + ((word >> 16) & 1)", "word", "bf16 by truncation", NUMBERS_RED,
    ),
    Mutation(
        "rounding/triton/half-up", COMMON,
        "word + 0x7FFF + ((word >> 16) & 1)", "word + 0x8000", "bf16 ties away from zero", NUMBERS_RED,
    ),
    Mutation(
        "rounding/triton/nan", COMMON,
        "kept = tl.where(value != value, word | 0x400000, nearest)", "kept = nearest",
        "NaN rounds to a number", NUMBERS_RED,
    ),
    Mutation(
        "expm1/triton/cancellation", COMMON,
        "tl.where(tl.abs(x) < 0.5, x + x * x * series, tl.exp(x) - 1)", "tl.exp(x) - 1 + 0 * series",
        "e^x − 1 cancels near zero", NUMBERS_RED,
    ),
    Mutation(
        "philox/triton/lane-order", COMMON,
        "tl.join(tl.join(normal0, normal2), tl.join(normal1, normal3))",
        "tl.join(tl.join(normal0, normal1), tl.join(normal2, normal3))",
        "elements take each other's lane", NOISE_RED,
    ),
    Mutation(
        "philox/triton/counter", COMMON,
        "high = (blocks >> 32).to(tl.uint32)", "high = (blocks >> 63).to(tl.uint32)",
        "the counter wraps at 2³⁴ elements", NOISE_RED,
    ),
    Mutation(
        "philox/triton/seed", COMMON,
        "(tl.cast(seed_high, tl.int64) << 32) | (tl.cast(seed_low, tl.int64) & 0xFFFFFFFF)\n    blocks",
        "tl.cast(seed_low, tl.int64) & 0xFFFFFFFF\n    blocks",
        "half of the seed is not used",
        NOISE_RED,
    ),
    Mutation(
        "philox/triton/step", COMMON,
        "zero + tl.cast(step_high, tl.uint32)\n    )\n    normal0",
        "zero\n    )\n    normal0",
        "half of the step is not used",
        NOISE_RED,
    ),
    Mutation(
        "philox/triton/quadrant", COMMON,
        "along = tl.where(((quarter + 1) & 2) != 0, -along, along)",
        "along = tl.where((quarter & 2) != 0, -along, along)", "a quarter of the cosines has the wrong sign", NOISE_RED,
    ),
)  # fmt: skip

NORMAL_ROUNDS = """k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const uint64_t"""
ROUNDING_ROUNDS = NORMAL_ROUNDS.replace("uint64_t", "Wide")

CPP = (
    # squared_grad_accumulate, per_sample_squared_grad
    Mutation(
        "squared_grad_accumulate/cpp/tail", ELEMENTWISE,
        "for (int64_t i = 0; i < n; ++i) {\n      const float x",
        "for (int64_t i = 0; i < n - 1; ++i) {\n      const float x",
        "leaves out the last element of a chunk", native("test_squares_accumulate"),
    ),
    Mutation(
        "squared_grad_accumulate/cpp/half-sum", ELEMENTWISE,
        "accumulator[i] += weight * (x * x);",
        "bf16 sum; narrow(accumulator[i] + weight * (x * x), &sum); accumulator[i] = widen(sum);",
        "accumulates in bf16", native("test_squares_accumulate"),
    ),
    Mutation(
        "squared_grad_accumulate/cpp/weight", ELEMENTWISE,
        "accumulator[i] += weight * (x * x);", "accumulator[i] += (x * x) + 0 * weight;",
        "ignores the weight", native("test_squares_accumulate"),
    ),
    Mutation(
        "per_sample_squared_grad/cpp/tile", f"{PACKAGE}/per_sample_squared_grad/native.py",
        "last = min(first + tile, n_out)", "last = min(first + tile - 1, n_out)",
        "leaves out the last row of a tile", native("test_per_sample_squares"),
    ),
    Mutation(
        "per_sample_squared_grad/cpp/batch-square", f"{PACKAGE}/per_sample_squared_grad/native.py",
        "for x_TI, dy_TO in zip(x_all, dy_all, strict=True):",
        "for x_TI, dy_TO in [(x_all.flatten(0, 1), dy_all.flatten(0, 1))]:",
        "squares the batch's gradient", native("test_per_sample_squares"),
    ),
    Mutation(
        "per_sample_squared_grad/cpp/half-product", f"{PACKAGE}/per_sample_squared_grad/native.py",
        "torch.mm(dy_TO[:, first:last].T, x_TI, out=grad_OI)",
        "grad_OI.copy_(torch.mm(dy_TO[:, first:last].T.bfloat16(), x_TI.bfloat16()))",
        "multiplies in bf16", native("test_per_sample_squares"),
    ),
    Mutation(
        "per_sample_squared_grad/cpp/bias", f"{PACKAGE}/per_sample_squared_grad/native.py",
        "dy_NHTO[:, head], weight)",
        "dy_NHTO[:, head], 1.0)",
        "the bias ignores the weight",
        native("test_per_sample_squares"),
    ),
    # per_sample_affine_squared_grad
    Mutation(
        "per_sample_affine_squared_grad/cpp/token-tail", "csrc/cpu/affine.inl",
        "row.tokens - begin < kTokens ? row.tokens : begin + kTokens",
        "row.tokens - begin < kTokens ? row.tokens - 1 : begin + kTokens",
        "leaves out the last token",
        native("test_per_sample_affine_squares"),
    ),
    Mutation(
        "per_sample_affine_squared_grad/cpp/batch-square", "csrc/cpu/affine.inl",
        "    total[c] += sums[c] * sums[c];\n    sums[c] = 0.0f;",
        "    total[c] += sums[c] * sums[c];",
        "does not start a sample's gradient at zero",
        native("test_per_sample_affine_squares"),
    ),
    Mutation(
        "per_sample_affine_squared_grad/cpp/rstd", "csrc/cpu/affine.inl",
        "((widen(x[k * stride + c]) - m[k]) * r[k])",
        "(widen(x[k * stride + c]) - m[k] + 0 * r[k])",
        "does not normalise",
        native("test_per_sample_affine_squares"),
    ),
    Mutation(
        "per_sample_affine_squared_grad/cpp/half-sum", "csrc/cpu/affine.inl",
        "total[c] += part[c];",
        "bf16 half; narrow(total[c] + part[c], &half); total[c] = widen(half);",
        "sums tokens in bf16",
        native("test_per_sample_affine_squares"),
    ),
    Mutation(
        "per_sample_affine_squared_grad/cpp/channels", "csrc/cpu/affine.inl",
        "at = token * row.channels + first;",
        "at = token * row.channels;",
        "every range of channels reads the first one",
        native("test_per_sample_affine_squares"),
    ),
    # gaussian_perturb and its numbers
    Mutation(
        "gaussian_perturb/cpp/tail", ELEMENTWISE,
        "for (int64_t j = 0; j < m; ++j) {\n        narrow(", "for (int64_t j = 0; j < m - 1; ++j) {\n        narrow(",
        "leaves out the last element of a piece", native("test_perturbation_is_the_prescribed_draw"),
    ),
    Mutation(
        "gaussian_perturb/cpp/sign", ELEMENTWISE,
        "widen(t[j]) + sign * noise[j]", "widen(t[j]) + 0 * sign + noise[j]",
        "ignores the sign", native("test_perturbation_scale_and_sign"),
    ),
    Mutation(
        "gaussian_perturb/cpp/prior", ELEMENTWISE,
        "__builtin_sqrtf(e[j] + prior_precision)", "__builtin_sqrtf(e[j] + 0 * prior_precision)",
        "leaves out the prior's precision", native("test_perturbation_scale_and_sign"),
    ),
    Mutation(
        "gaussian_perturb/cpp/chunk-offset", API,
        """static_cast<float>(sign), seed, step,
                         static_cast<uint64_t>(row.offset + c.begin)""",
        """static_cast<float>(sign), seed, step,
                         static_cast<uint64_t>(row.offset)""",
        "every chunk draws the same numbers", native("test_perturbation_does_not_depend_on_how_a_vector_is_cut"),
        reference("test_normal_draws_are_normal"),
    ),
    Mutation(
        "philox/cpp/lane", PHILOX,
        "body(i, m, noise + skip);", "body(i, m, noise);",
        "a piece begins with lane 0", native("test_perturbation_is_the_prescribed_draw"),
    ),
    Mutation(
        "philox/cpp/piece", PHILOX,
        "n - i < kNoise - skip ? n - i : kNoise - skip", "n - i < kNoise ? n - i : kNoise",
        "uses numbers behind the last drawn", native("test_perturbation_is_the_prescribed_draw"),
    ),
    Mutation(
        "philox/cpp/sine-and-cosine", PHILOX,
        "out[4 * j + 2 * pair] = radius * c;\n      out[4 * j + 2 * pair + 1] = radius * s;",
        "out[4 * j + 2 * pair] = radius * s;\n      out[4 * j + 2 * pair + 1] = radius * c;",
        "sine and cosine change places", native("test_perturbation_is_the_prescribed_draw"),
    ),
    Mutation(
        "philox/cpp/counter", PHILOX,
        "static_cast<uint32_t>((counter + j) >> 32)", "0u",
        "the counter wraps at 2³⁴ elements", native("test_perturbation_is_the_prescribed_draw"),
    ),
    Mutation(
        "philox/cpp/seed", PHILOX,
        NORMAL_ROUNDS,
        NORMAL_ROUNDS.replace("static_cast<uint32_t>(seed >> 32)", "0u"),
        "half of the seed is not used",
        native("test_perturbation_is_the_prescribed_draw"),
    ),
    Mutation(
        "philox/cpp/rounds", PHILOX,
        NORMAL_ROUNDS,
        NORMAL_ROUNDS.replace("10", "9"),
        "nine rounds",
        native("test_perturbation_is_the_prescribed_draw"),
    ),
    Mutation(
        "rounding/cpp/stochastic-rounds", PHILOX,
        ROUNDING_ROUNDS,
        ROUNDING_ROUNDS.replace("10", "9"),
        "rounding bits of nine rounds",
        reference("test_stochastic_rounding_is_the_prescribed_carry"),
    ),
    Mutation(
        "rounding/cpp/stochastic-stream", PHILOX,
        "c1 = (g >> 34) | 0x80000000u",
        "c1 = g >> 34",
        "rounding bits are those of the normals",
        reference("test_stochastic_rounding_is_the_prescribed_carry"),
    ),
    Mutation(
        "rounding/cpp/stochastic-lane", PHILOX,
        "even = (g & 2) != 0 ? c2 : c0",
        "even = c0",
        "two lanes of Philox round four elements",
        reference("test_stochastic_rounding_is_the_prescribed_carry"),
    ),
    Mutation(
        "rounding/cpp/stochastic-bits", STEP,
        "narrow_stochastic(p[j], random[j], rounded + j)",
        "narrow_stochastic(p[j], 0x8000u, rounded + j)",
        "rounds to nearest instead of at random",
        reference("test_stochastic_rounding_is_the_prescribed_carry"),
    ),
    Mutation(
        "philox/cpp/step", PHILOX,
        "c3 = static_cast<uint32_t>(step >> 32)", "c3 = 0u",
        "half of the step is not used", native("test_perturbation_is_the_prescribed_draw"),
    ),
    Mutation(
        "philox/cpp/logarithm", NUMERIC,
        "0x3f3504f3u) >> 23;", "0x3f000000u) >> 23;",
        "the logarithm's argument is reduced to [½, 1), where its polynomial does not hold",
        native("test_perturbation_is_the_prescribed_draw"),
    ),
    Mutation(
        "philox/cpp/quadrant", NUMERIC,
        "static_cast<uint32_t>((q + 1) & 2) << 30", "static_cast<uint32_t>(q & 2) << 30",
        "a quarter of the cosines has the wrong sign", native("test_perturbation_is_the_prescribed_draw"),
    ),
    Mutation(
        "rounding/cpp/bf16-truncate", NUMERIC,
        "(u + 0x7fffu + ((u >> 16) & 1u)) >> 16", "u >> 16",
        "bf16 by truncation", native("test_half_conversions_agree_with_torch_on_every_bit_pattern"),
    ),
    Mutation(
        "rounding/cpp/bf16-half-up", NUMERIC,
        "(u + 0x7fffu + ((u >> 16) & 1u)) >> 16", "(u + 0x8000u) >> 16", "bf16 ties away from zero",
        native("test_half_conversions_agree_with_torch_on_every_bit_pattern"),
    ),
    Mutation(
        "rounding/cpp/bf16-nan", NUMERIC,
        "nan ? 0x7fc0u : rounded", "nan ? rounded : rounded", "a bf16 NaN rounds to a number",
        native("test_half_conversions_agree_with_torch_on_every_bit_pattern"),
    ),
    Mutation(
        "rounding/cpp/fp16-half-up", NUMERIC,
        "0x0fffu + ((magnitude >> 13) & 1u)", "0x1000u", "fp16 ties away from zero",
        native("test_half_conversions_agree_with_torch_on_every_bit_pattern"),
    ),
    Mutation(
        "rounding/cpp/fp16-subnormal", NUMERIC,
        "uint32_t h = magnitude < (113u << 23) ? subnormal : normal;", "uint32_t h = normal + 0 * subnormal;",
        "fp16 subnormals round as normal numbers",
        native("test_half_conversions_agree_with_torch_on_every_bit_pattern"),
    ),
    Mutation(
        "rounding/cpp/fp16-overflow", NUMERIC,
        "h = magnitude >= (143u << 23) ? 0x7c00u : h;", "", "65536 is not infinity in fp16",
        native("test_half_conversions_agree_with_torch_on_every_bit_pattern"),
    ),
    # precision_update
    Mutation(
        "precision_update_natural/cpp/tail", ELEMENTWISE,
        "for (int64_t i = 0; i < n; ++i) excess[i]", "for (int64_t i = 0; i < n - 1; ++i) excess[i]",
        "leaves out the last element of a chunk", native("test_natural_update"),
    ),
    Mutation(
        "precision_update_natural/cpp/keep", ELEMENTWISE,
        "keep * excess[i] + take", "excess[i] + 0 * keep + take", "does not forget", native("test_natural_update"),
    ),
    Mutation(
        "precision_update_natural/cpp/gamma", API,
        "static_cast<float>(beta / gamma)", "static_cast<float>(beta + 0 * gamma)",
        "leaves out γ", native("test_natural_update"),
    ),
    Mutation(
        "precision_update_sgvb/cpp/tail", ELEMENTWISE,
        "for (int64_t j = 0; j < m; ++j) {\n        const float precision",
        "for (int64_t j = 0; j < m - 1; ++j) {\n        const float precision",
        "leaves out the last element of a piece",
        native("test_sgvb_update_is_adam_on_the_logarithm_of_the_precision"),
    ),
    Mutation(
        "precision_update_sgvb/cpp/sign", API,
        "static_cast<float>(0.5 * options->sign)", "0.5f", "ignores the sign of the draw",
        native("test_sgvb_update_is_adam_on_the_logarithm_of_the_precision"),
    ),
    Mutation(
        "precision_update_sgvb/cpp/eps", ELEMENTWISE,
        "(__builtin_sqrtf(m2) * k.inv_sqrt_bias2 + k.eps);\n        const float moved",
        "(__builtin_sqrtf(m2 * k.inv_sqrt_bias2 * k.inv_sqrt_bias2 + k.eps));\n        const float moved",
        "eps inside the square root", native("test_sgvb_update_is_adam_on_the_logarithm_of_the_precision"),
        reference("test_sgvb_update_is_adam_on_the_log_precision"),
    ),
    Mutation(
        "precision_update_sgvb/cpp/bias-correction-1", API,
        """        static_cast<float>(1.0 - options->beta2),
        static_cast<float>(options->lr / (1.0 - std::pow(options->beta1, step))),""",
        """        static_cast<float>(1.0 - options->beta2),
        static_cast<float>(options->lr),""",
        "no bias correction of the mean", native("test_sgvb_update_is_adam_on_the_logarithm_of_the_precision"),
    ),
    Mutation(
        "precision_update_sgvb/cpp/bias-correction-2", API,
        """(1.0 - std::pow(options->beta1, step))),
        static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(options->beta2, step))),
        static_cast<float>(options->eps),
        // The sum""",
        """(1.0 - std::pow(options->beta1, step))),
        1.0f,
        static_cast<float>(options->eps),
        // The sum""",
        "no bias correction of the square", native("test_sgvb_update_is_adam_on_the_logarithm_of_the_precision"),
    ),
    Mutation(
        "precision_update_sgvb/cpp/chunk-offset", API,
        "c.end - c.begin, constants,\n                              static_cast<uint64_t>(row.offset + c.begin)",
        "c.end - c.begin, constants,\n                              static_cast<uint64_t>(row.offset)",
        "every chunk draws the same numbers", native("test_sgvb_update_is_adam_on_the_logarithm_of_the_precision"),
    ),
    Mutation(
        "precision_update_sgvb/cpp/floor", ELEMENTWISE,
        "select(moved < k.floor, k.floor, moved)", "moved", "lets the precision reach zero",
        native("test_sgvb_update_keeps_the_precision_positive"),
    ),
    Mutation(
        "expm1/cpp/cancellation", NUMERIC,
        "return scale * p + (scale - 1.0f);", "return (scale * p + scale) - 1.0f;",
        "e^x − 1 cancels near zero", native("test_sgvb_update_is_adam_on_the_logarithm_of_the_precision"),
        native("test_small_steps_of_the_precision_do_not_cancel"),
    ),
    # dr_fim_score
    Mutation(
        "dr_fim_score/cpp/tail", ELEMENTWISE,
        "for (int64_t i = 0; i < n; ++i) {\n      const float a",
        "for (int64_t i = 0; i < n - 1; ++i) {\n      const float a",
        "leaves out the last element of a chunk", native("test_scores"),
    ),
    Mutation(
        "dr_fim_score/cpp/minimum", ELEMENTWISE,
        "select(a < b, a, b)", "select(a < b, b, a)", "divides by the larger of F and F'", native("test_scores"),
    ),
    Mutation(
        "dr_fim_score/cpp/eps-over-gamma", API,
        "prior_precision + eps / gamma : eps", "prior_precision + eps : eps",
        "eps is not divided by γ (Eq. 15)", native("test_scores"),
    ),
    Mutation(
        "dr_fim_score/cpp/first", ELEMENTWISE,
        "k.first ? now : score[i]", "score[i]", "the first score is averaged with what the buffer held",
        native("test_scores"),
    ),
    Mutation(
        "dr_fim_score/cpp/zero-times-infinity", ELEMENTWISE,
        "select(k.ratio_scale == 0.0f, 0.0f, k.ratio_scale * ratio)", "k.ratio_scale * ratio",
        "a term that is switched off still makes NaN",
        native("test_half_conversions_agree_with_torch_on_every_bit_pattern"),
    ),
    # key_histogram
    Mutation(
        "key_histogram/cpp/tail", SELECTION,
        """  for (; i < n; ++i) {
    const uint32_t u = bits_of(x[i]);
    ++h0""",
        """  for (; i < n - 1; ++i) {
    const uint32_t u = bits_of(x[i]);
    ++h0""",
        "leaves out the last element", native("test_histogram_counts_keys"),
    ),
    Mutation(
        "key_histogram/cpp/prefix-tail", SELECTION,
        """  for (; i < n; ++i) {
    const uint32_t u = bits_of(x[i]), key""",
        """  for (; i < n - 1; ++i) {
    const uint32_t u = bits_of(x[i]), key""",
        "under a prefix, leaves out the last element", native("test_histogram_counts_keys"),
    ),
    Mutation(
        "key_histogram/cpp/half-block", SELECTION,
        "const int64_t m = n - i < kBlock ? n - i : kBlock;", "const int64_t m = n - i <= kBlock ? n - i - 1 : kBlock;",
        "leaves out the last element of half-precision scores", native("test_histogram_counts_keys"),
    ),
    Mutation(
        "key_histogram/cpp/nan", SELECTION,
        "if (is_nan(u)) {\n      ++h[nan_bin];\n    } else if", "if",
        "under a prefix, NaN is counted among the keys", native("test_histogram_counts_keys"),
    ),
    Mutation(
        "key_histogram/cpp/nan-vector", SELECTION,
        "bin = _mm256_blendv_epi8(bin, vnan, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));", "(void)vnan;",
        "vector code counts NaN among the keys", native("test_histogram_counts_keys"),
    ),
    Mutation(
        "key_histogram/cpp/minus-zero", SELECTION,
        "u = u == 0x80000000u ? 0u : u;", "", "−0 ranks below +0", native("test_histogram_counts_keys"),
    ),
    Mutation(
        "key_histogram/cpp/prefix", SELECTION,
        "(key & prefix_mask) == prefix", "key >= prefix + 0 * prefix_mask", "the prefix is a lower bound",
        native("test_histogram_counts_keys"),
    ),
    Mutation(
        "key_histogram/cpp/threads", API,
        "for (int64_t t = 0; t < team; ++t) {\n      flush(t);", "for (int64_t t = 0; t < 1; ++t) {\n      flush(t);",
        "only the first thread's counts are added", native("test_histogram_counts_keys"),
    ),
    Mutation(
        "key_histogram/cpp/flush", API,
        "std::memset(counter, 0, static_cast<size_t>(kReplicas * stride) * sizeof *counter);", "",
        "counters that were added are added again", native("test_counters_are_flushed_before_they_wrap"),
    ),
    # compact
    Mutation(
        "compact/cpp/greater", SELECTION,
        "kept += x[i] >= value;",
        "kept += x[i] > value;",
        "the tail drops ties",
        native("test_threshold_and_compaction_are_exact"),
    ),
    Mutation(
        "compact/cpp/greater-avx512", SELECTION,
        "_mm512_cmp_ps_mask(v, least, _CMP_GE_OQ)",
        "_mm512_cmp_ps_mask(v, least, _CMP_GT_OQ)",
        "AVX-512 code drops ties",
        native("test_threshold_and_compaction_are_exact"),
    ),
    Mutation(
        "compact/cpp/nan-avx2", SELECTION,
        "_mm256_cmp_ps(v, least, _CMP_GE_OQ)",
        "_mm256_cmp_ps(v, least, _CMP_NLT_UQ)",
        "AVX2 code selects NaN",
        native("test_compaction_leaves_out_nan_and_what_is_beyond_the_quota"),
    ),
    Mutation(
        "compact/cpp/quota", SELECTION,
        "kept += !tied || ties > 0;",
        "kept += !tied || ties > 1;",
        "keeps one tie too few",
        native("test_threshold_and_compaction_are_exact"),
    ),
    Mutation(
        "compact/cpp/tie-order", API,
        "std::max<int64_t>(row.ties - before.ties, 0)",
        "row.ties",
        "every chunk has the tensor's whole quota of ties",
        native("test_threshold_and_compaction_are_exact"),
    ),
    Mutation(
        "compact/cpp/position", API,
        "first = before.above + std::min(before.ties, row.ties)",
        "first = before.above + before.ties",
        "earlier ties that are not kept shift the indices",
        native("test_threshold_and_compaction_are_exact"),
    ),
    Mutation(
        "compact/cpp/base", API,
        "static_cast<Index>(base + offsets[i])",
        "static_cast<Index>(offsets[i] + 0 * base)",
        "indices of a later chunk begin at zero",
        native("test_threshold_and_compaction_are_exact"),
    ),
    Mutation(
        "compact/cpp/room", API,
        "if (first + kept > row.count) return;",
        "",
        "writes more indices than there is room for",
        native("test_compaction_stays_within_its_memory"),
    ),
    # collect_bracket, sample_scores
    Mutation(
        "collect_bracket/cpp/low", SELECTION,
        "key >= low && key <= high",
        "key > low && key <= high",
        "the lower end of the bracket is outside",
        native("test_bracket_is_the_references"),
    ),
    Mutation(
        "collect_bracket/cpp/high-avx512", SELECTION,
        "_mm512_mask_cmpgt_epu32_mask(number, key, vhigh)",
        "_mm512_mask_cmpge_epu32_mask(number, key, vhigh)",
        "AVX-512 code: the upper end of the bracket is outside",
        native("test_bracket_is_the_references"),
    ),
    Mutation(
        "collect_bracket/cpp/signed-avx2", SELECTION,
        "key = _mm256_xor_si256(key_of(_mm256_castps_si256(v)), top);",
        "key = key_of(_mm256_castps_si256(v));",
        "AVX2 code compares keys as signed numbers",
        native("test_bracket_is_the_references"),
    ),
    Mutation(
        "collect_bracket/cpp/nan", SELECTION,
        "nans += !number;",
        "",
        "the tail does not count NaN",
        native("test_bracket_is_the_references"),
    ),
    Mutation(
        "collect_bracket/cpp/threads", API,
        "for (int64_t t = 0; t < team_; ++t) bracket_",
        "for (int64_t t = 0; t < 1; ++t) bracket_",
        "only the first thread's counts are added",
        native("test_bracket_is_the_references"),
    ),
    Mutation(
        "collect_bracket/cpp/number", API,
        "c.row << 32 | keys[i]",
        "keys[i]",
        "candidates forget their tensor",
        native("test_bracket_is_the_references"),
    ),
    Mutation(
        "collect_bracket/cpp/capacity", API,
        "if (first + found > bracket_.capacity) return;",
        "if (first + found >= bracket_.capacity) return;",
        "candidates that just fit are not written",
        native("test_bracket_is_the_references"),
    ),
    Mutation(
        "sample_scores/cpp/place", SELECTION,
        "static_cast<uint64_t>(stride)) >> 32)",
        "static_cast<uint64_t>(stride)) >> 33)",
        "the second half of every run is never drawn",
        native("test_sample_is_the_references"),
    ),
    Mutation(
        "dr_fim_threshold/cpp/dtype", API,
        "row.score + chunk.begin, FT_FP32);",
        "row.score, FT_FP32);",
        "counts the first chunk's scores for every chunk",
        native("test_scores_and_their_bracket_in_one_pass"),
    ),
    # sparse_adamw
    Mutation(
        "sparse_adamw/cpp/tail", STEP,
        "end - i < kGather ? end - i : kGather;", "end - i < kGather ? end - i - 1 : kGather;",
        "leaves out the last element of a range", native("test_step_follows_torch_adamw"),
    ),
    Mutation(
        "sparse_adamw/cpp/gate", STEP,
        ">= k.active_threshold", "> k.active_threshold", "a score equal to the threshold does not move",
        native("test_inactive_elements_gather_momentum_but_do_not_move"),
    ),
    Mutation(
        "sparse_adamw/cpp/gated-moments", STEP,
        "      first[j] = m1;\n      second[j] = m2;",
        """      if (row.score != nullptr && !(row.score[i + j] >= k.active_threshold)) continue;
      first[j] = m1;
      second[j] = m2;""",
        "inactive elements lose their moments", native("test_inactive_elements_gather_momentum_but_do_not_move"),
    ),
    Mutation(
        "sparse_adamw/cpp/grad-scale", STEP,
        "g[j] * k.grad_scale", "g[j]", "ignores grad_scale", native("test_step_follows_torch_adamw"),
    ),
    Mutation(
        "sparse_adamw/cpp/eps", STEP,
        "(__builtin_sqrtf(m2) * k.inv_sqrt_bias2 + k.eps)", "(__builtin_sqrtf(m2 + k.eps) * k.inv_sqrt_bias2)",
        "eps inside the square root", native("test_step_follows_torch_adamw"),
    ),
    Mutation(
        "sparse_adamw/cpp/bias-correction-1", API,
        """static_cast<float>(1.0 - options->lr * options->weight_decay),
        static_cast<float>(options->lr / (1.0 - std::pow(options->beta1, step))),""",
        """static_cast<float>(1.0 - options->lr * options->weight_decay),
        static_cast<float>(options->lr),""",
        "no bias correction of the mean", native("test_step_follows_torch_adamw"),
    ),
    Mutation(
        "sparse_adamw/cpp/bias-correction-2", API,
        """static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(options->beta2, step))),
        static_cast<float>(options->eps),
        static_cast<float>(options->grad_scale)""",
        """static_cast<float>(1.0 / std::sqrt(1.0 - options->beta2)),
        static_cast<float>(options->eps),
        static_cast<float>(options->grad_scale)""",
        "bias correction of the square stays at step 1", native("test_step_follows_torch_adamw"),
    ),
    Mutation(
        "sparse_adamw/cpp/weight-decay", API,
        "1.0 - options->lr * options->weight_decay", "1.0 - options->weight_decay",
        "weight decay without the learning rate", native("test_step_follows_torch_adamw"),
    ),
    Mutation(
        "sparse_adamw/cpp/half-moment", STEP,
        "second[j] = m2;", "bf16 kept; narrow(m2, &kept); second[j] = widen(kept);",
        "keeps the second moment in bf16", native("test_step_follows_torch_adamw"),
    ),
    Mutation(
        "sparse_adamw/cpp/index", STEP,
        "for (int64_t j = 0; j < n; ++j) param[at[j]] = rounded[j];",
        "for (int64_t j = 0; j < n; ++j) param[at[j == 0 ? 0 : j - 1]] = rounded[j];",
        "writes to the index before",
        native("test_step_follows_torch_adamw"),
    ),
    Mutation(
        "sparse_adamw/cpp/master", STEP,
        "if (row.master != nullptr) __builtin_memcpy(row.master + i, p, static_cast<size_t>(n) * sizeof *p);",
        "",
        "the master copy is not written",
        native("test_step_in_half_precision"),
    ),
    Mutation(
        "sparse_adamw/cpp/gated-master", STEP,
        "if (row.master != nullptr) row.master[i + j] = p[j];",
        "",
        "the master copy of a gated step is not written",
        native("test_inactive_elements_gather_momentum_but_do_not_move"),
    ),
    Mutation(
        "sparse_adamw/cpp/compact-grads", STEP,
        "g[j] = widen(grad[i + j]);",
        "g[j] = widen(grad[j]);",
        "every block reads the first compact gradients",
        native("test_neighbours_step_as_scattered_elements_do"),
    ),
    Mutation(
        "sparse_adamw/cpp/index-range", API,
        "low < 0 || high >= numel || low > high", "high >= numel || low > high", "takes a negative index",
        native("test_index_out_of_range_is_refused_before_anything_is_written"),
    ),
    # selected_grad_norm
    Mutation(
        "sparse_adamw/cpp/run-with-a-gap", STEP,
        "static_cast<int64_t>(at[0]) == n - 1;", "static_cast<int64_t>(at[0]) >= n - 1;",
        "takes every block of indices for neighbours", native("test_neighbours_step_as_scattered_elements_do"),
    ),
    Mutation(
        "sparse_adamw/cpp/run-start", STEP,
        "const T* const __restrict run = from + at[0];", "const T* const __restrict run = from + at[0] + 1;",
        "reads neighbours from one element too far", native("test_neighbours_step_as_scattered_elements_do"),
    ),
    Mutation(
        "sparse_adamw/cpp/run-write", STEP,
        "static_cast<size_t>(n) * sizeof *rounded);", "static_cast<size_t>(n - 1) * sizeof *rounded);",
        "leaves out the last of a block of neighbours", native("test_neighbours_step_as_scattered_elements_do"),
    ),
    Mutation(
        "selected_grad_norm/cpp/tail", "csrc/cpu/selected_grad_norm.inl",
        "const int64_t n = end - i < kGather ? end - i : kGather;",
        "const int64_t n = end - i < kGather ? end - i - 1 : kGather;",
        "leaves out the last element",
        native("test_the_norms_sum_is_the_same_to_the_last_bit"),
    ),
    Mutation(
        "selected_grad_norm/cpp/float", "csrc/cpu/selected_grad_norm.inl",
        "double sums[kLanes] = {};",
        "float sums[kLanes] = {};",
        "adds up in single precision",
        reference("test_the_selected_norm_neither_overflows_nor_vanishes"),
        native("test_the_norms_sum_is_the_same_to_the_last_bit"),
    ),
    Mutation(
        "selected_grad_norm/cpp/lanes", "csrc/cpu/selected_grad_norm.inl",
        "sums[lane] += sums[lane + width];",
        "sums[lane] += sums[lane + width - 1];",
        "adds the wrong lanes",
        native("test_the_norms_sum_is_the_same_to_the_last_bit"),
    ),
    Mutation(
        "selected_grad_norm/cpp/index", "csrc/cpu/selected_grad_norm.inl",
        "gather(grad, at, n, g);",
        "gather(grad, index, n, g);",
        "reads the first block's elements for every block",
        reference("test_selected_grad_norm"),
    ),
    # gather_values, scatter_values_
    Mutation(
        "values/cpp/tail", API,
        "for (int64_t i = begin; i < end; ++i) {\n#if", "for (int64_t i = begin; i < end - 1; ++i) {\n#if",
        "leaves out the last element of a chunk", native("test_gather_and_scatter"),
    ),
    Mutation(
        "values/cpp/item-size", API,
        "case 2: return move_index<Gather, uint16_t>", "case 2: return move_index<Gather, uint8_t>",
        "moves half of a 16-bit element", native("test_gather_and_scatter"),
    ),
    Mutation(
        "values/cpp/direction", API,
        "return move_values<false>(rows", "return move_values<true>(rows", "scatter gathers",
        native("test_gather_and_scatter"),
    ),
    # what they share
    Mutation(
        "lists/cpp/threads", CHUNKS,
        "walk(total * t / threads, total * (t + 1) / threads,",
        "walk(total * t / threads, total * (t + 1) / threads - (t + 1 < threads),",
        "a thread leaves out its last chunk", native("test_squares_accumulate"),
    ),
    Mutation(
        "lists/cpp/last-chunk", CHUNKS,
        "body(Chunk{row, begin, std::min(begin + chunk_, sizes_[row])",
        "body(Chunk{row, begin, begin + chunk_",
        "the last chunk goes on behind the tensor",
        native("test_nothing_behind_a_tensor_is_written"),
    ),
    Mutation(
        "lists/cpp/element-size", API,
        "static_cast<const char*>(data) + i * (dtype == FT_FP32 ? 4 : 2)", "static_cast<const char*>(data) + i * 4",
        "a later chunk of half-precision data begins too far", native("test_squares_accumulate"),
    ),
)  # fmt: skip

REFERENCE = (
    Mutation(
        "squared_grad_accumulate/reference/weight", f"{PACKAGE}/squared_grad_accumulate/reference.py",
        "value=weight", "value=1.0", "ignores the weight", reference("test_squared_grad_accumulate"),
    ),
    Mutation(
        "squared_grad_accumulate/reference/half-square", f"{PACKAGE}/squared_grad_accumulate/reference.py",
        "accumulator.addcmul_(wide, wide, value=weight)", "accumulator.add_(grad * grad, alpha=weight)",
        "squares a half gradient in its own precision", reference("test_squared_grad_accumulate"),
    ),
    Mutation(
        "per_sample_squared_grad/reference/batch-square", f"{PACKAGE}/per_sample_squared_grad/reference.py",
        "in zip(x_NHTI, dy_NHTO, strict=True)",
        "in [(x_NHTI.transpose(0, 1).flatten(1, 2), dy_NHTO.transpose(0, 1).flatten(1, 2))]",
        "squares the batch's gradient",
        reference("test_per_sample_squared_grad_equals_vmap"),
    ),
    Mutation(
        "per_sample_affine_squared_grad/reference/rstd", f"{PACKAGE}/per_sample_affine_squared_grad/reference.py",
        " * rstd_NT[n, :, None].to(dtype)",
        "",
        "does not normalise",
        reference("test_per_sample_affine_squared_grad_equals_vmap"),
    ),
    Mutation(
        "selected_grad_norm/reference/scale", f"{PACKAGE}/selected_grad_norm/reference.py",
        "(values / scale).square().sum().sqrt() * scale",
        "values.square().sum().sqrt() + 0 * scale",
        "squares overflow",
        reference("test_the_selected_norm_neither_overflows_nor_vanishes"),
    ),
    Mutation(
        "per_sample_squared_grad/reference/autocast", f"{PACKAGE}/per_sample_squared_grad/reference.py",
        "enabled=False", "enabled=torch.is_autocast_enabled(accumulator_OI.device.type)",
        "an autocast region reaches the product", reference("test_per_sample_squared_grad_equals_vmap"),
    ),
    Mutation(
        "gaussian_perturb/reference/sign", f"{PACKAGE}/gaussian_perturb/reference.py",
        "sign * deviation", "deviation", "ignores the sign", reference("test_gaussian_perturb_is_the_formula"),
    ),
    Mutation(
        "philox/reference/lane", f"{PACKAGE}/philox.py",
        "start = offset - 4 * first", "start = 0", "every tensor begins with lane 0",
        reference("test_normal_draws_belong_to_their_global_index"),
    ),
    Mutation(
        "philox/reference/counter", f"{PACKAGE}/philox.py",
        "blocks & _LOW, blocks >> 32", "blocks & _LOW, blocks * 0", "the counter wraps at 2³⁴ elements",
        reference("test_normal_draws_belong_to_their_global_index"),
    ),
    Mutation(
        "precision_update_sgvb/reference/bias-correction", f"{PACKAGE}/precision_update/reference.py",
        "1 - beta1**step, 1 - beta2**step", "1 - beta1, 1 - beta2", "bias correction stays at step 1",
        reference("test_sgvb_update_is_adam_on_the_log_precision"),
    ),
    Mutation(
        "precision_update_natural/reference/gamma", f"{PACKAGE}/precision_update/reference.py",
        "alpha=beta / gamma", "alpha=beta", "leaves out γ", reference("test_natural_update"),
    ),
    Mutation(
        "dr_fim_score/reference/eps-over-gamma", f"{PACKAGE}/dr_fim_score/reference.py",
        "prior_precision + eps / gamma", "prior_precision + eps", "eps is not divided by γ (Eq. 15)",
        reference("test_scores_are_the_papers_formulas"),
    ),
    Mutation(
        "dr_fim_score/reference/mean", f"{PACKAGE}/dr_fim_score/reference.py",
        "(score - mean) / count", "(score - mean) / (count + 1)", "wrong share in the running mean",
        reference("test_scores_are_the_papers_formulas"),
    ),
    Mutation(
        "key_histogram/reference/minus-zero", f"{PACKAGE}/select_threshold/reference.py",
        "(scores.float() + 0.0)", "scores.float()", "−0 ranks below +0", select("test_every_k"),
    ),
    Mutation(
        "key_histogram/reference/nan", f"{PACKAGE}/select_threshold/reference.py",
        "member = ~nan & ", "member = ", "NaN is counted among the keys",
        select("test_histogram_counts_digits_under_a_prefix"),
    ),
    Mutation(
        "select_threshold/reference/rank", f"{PACKAGE}/select_threshold/search.py",
        "torch.searchsorted(running[row], rank - above)",
        "torch.searchsorted(running[row], rank - above, right=True)",
        "takes the next digit where counts reach the rank exactly",
        select("test_every_k"),
    ),
    Mutation(
        "select_threshold/reference/missed-bracket", f"{PACKAGE}/select_threshold/search.py",
        "if n_missing or not above < k <= above + inside:",
        "if n_missing:",
        "believes a bracket that missed",
        select("test_a_wrong_bracket_costs_time_only"),
    ),
    Mutation(
        "select_threshold/reference/missing-candidates", f"{PACKAGE}/select_threshold/search.py",
        "if n_missing or not above",
        "if not above",
        "goes on without its candidates",
        select("test_a_wrong_bracket_costs_time_only"), select("test_a_sample_cannot_be_fooled"),
    ),
    Mutation(
        "select_threshold/reference/tie-order", f"{PACKAGE}/select_threshold/search.py",
        "before = counts.cumsum(0) - counts", "before = counts.sum() - counts.cumsum(0)",
        "the last tensors' ties are kept", select("test_every_k"),
    ),
    Mutation(
        "select_threshold/reference/nan", f"{PACKAGE}/select_threshold/search.py",
        "    if n_nan:\n", "    if False:\n", "ranks NaN", select("test_nan_is_refused_with_the_count"),
    ),
    Mutation(
        "compact/reference/quota", f"{PACKAGE}/compact/reference.py",
        "tie.cumsum(0) <= ties_kept", "tie.cumsum(0) < ties_kept", "keeps one tie too few", select("test_every_k"),
    ),
    Mutation(
        "sparse_adamw/reference/eps", f"{PACKAGE}/sparse_adamw/reference.py",
        "(square.sqrt() / correction2_sqrt).add_(eps)", "(square + eps).sqrt() / correction2_sqrt",
        "eps inside the square root", reference("test_sparse_adamw_with_everything_selected_is_adamw"),
    ),
    Mutation(
        "sparse_adamw/reference/gate", f"{PACKAGE}/sparse_adamw/reference.py",
        ">= active_threshold", "> active_threshold", "a score equal to the threshold does not move",
        reference("test_elements_below_the_threshold_wait_with_their_moments_current"),
    ),
    Mutation(
        "sparse_adamw/reference/master", f"{PACKAGE}/sparse_adamw/reference.py",
        "master[i].copy_(new)", "pass", "the master copy is not written",
        reference("test_master_copy_is_the_float32_run_and_the_parameter_its_rounding"),
    ),
    Mutation(
        "values/reference/numbers", f"{PACKAGE}/values/reference.py",
        "tensor.view(-1)[index.long()] = value", "tensor.view(-1)[index.long()] = value + 0",
        "changes NaN payloads or −0", reference("test_gather_and_scatter_move_bits"),
    ),
)  # fmt: skip

CONTRACT = (
    Mutation(
        "sparse_adamw/contract/falling-index", f"{PACKAGE}/ops.py",
        "bool((index[1:] > index[:-1]).all())", "True", "takes indices that repeat or fall",
        ops("test_refusals_name_the_value_and_the_remedy"),
    ),
    Mutation(
        "sparse_adamw/contract/stale-index", f"{PACKAGE}/ops.py",
        "known[1] == index._version and ", "", "an index that was changed is not checked again",
        ops("test_an_index_that_changed_is_checked_again"),
    ),
    Mutation(
        "sparse_adamw/contract/learning-rate-in-the-graph", f"{PACKAGE}/ops.py",
        "Tensor(d!)[] master, Scalar lr,", "Tensor(d!)[] master, float lr,",
        "torch.compile makes the learning rate a constant", ops("test_changing_hyper_parameters_do_not_recompile"),
    ),
    Mutation(
        "sparse_adamw/contract/hidden-write", f"{PACKAGE}/ops.py",
        "Tensor[] scores, Tensor(d!)[] master", "Tensor[] scores, Tensor[] master",
        "the schema hides that the master copy is written", ops("test_what_is_written_is_what_the_schema_says"),
    ),
    Mutation(
        "sparse_adamw/contract/autograd", f"{PACKAGE}/ops.py",
        "_mark_written(params, exp_avg, exp_avg_sq, master)", "_mark_written(exp_avg, exp_avg_sq, master)",
        "autograd does not see that parameters changed", ops("test_autograd_sees_the_write_and_no_graph_is_built"),
    ),
    Mutation(
        "squared_grad_accumulate/contract/strided-output", f"{PACKAGE}/ops.py",
        "if mutated and not tensor.is_contiguous():", "if False:",
        "writes to a tensor that is not contiguous", ops("test_refusals_name_the_value_and_the_remedy"),
    ),
    Mutation(
        "squared_grad_accumulate/contract/half-accumulator", f"{PACKAGE}/ops.py",
        '_check_tensors("accumulators", accumulators, device, STATE_DTYPES, mutated=True)',
        '_check_tensors("accumulators", accumulators, device, mutated=True)',
        "takes a half-precision accumulator", ops("test_refusals_name_the_value_and_the_remedy"),
    ),
    Mutation(
        "compact/contract/fake-index-dtype", f"{PACKAGE}/ops.py",
        "dtype=torch.int32 if tensor.numel() <= 2**31 else torch.int64,", "dtype=torch.int32,",
        "traced indices of a large tensor are int32",
        contract("test_shapes_and_dtypes_beyond_two_to_the_31_elements"),
    ),
    Mutation(
        "dr_fim_score/contract/fake-dtype", f"{PACKAGE}/ops.py",
        "torch.empty(tensor.shape, dtype=torch.promote_types(tensor.dtype, torch.float32), device=tensor.device)",
        "torch.empty(tensor.shape, dtype=torch.float32, device=tensor.device)", "traced float64 scores are float32",
        contract("test_shapes_and_dtypes_beyond_two_to_the_31_elements"),
    ),
    Mutation(
        "lists/contract/strides", f"{PACKAGE}/ops.py",
        "return [tensor.contiguous() for tensor in tensors]",
        "return [t.as_strided(t.shape, torch.empty(t.shape, device=\"meta\").stride()) for t in tensors]",
        "reads any tensor as if it were contiguous", contract("test_what_is_read_may_have_any_strides"),
    ),
    Mutation(
        "sparse_adamw/contract/gradient", f"{PACKAGE}/sparse_adamw/reference.py",
        "g = selected.to(mean.dtype) * scale",
        "g = selected.to(mean.dtype) * scale\n        grad.mul_(scale)",
        "scales the caller's gradient",
        contract("test_what_is_read_keeps_its_bits"),
    ),
    Mutation(
        "values/contract/unwritten", f"{PACKAGE}/values/native.py",
        "rows.write(value, dtype=None),\n            tensor.numel(),\n            index.numel(),",
        "rows.write(value, dtype=None),\n            tensor.numel(),\n            max(index.numel() - 1, 0),",
        "leaves the last gathered value as it was allocated",
        contract("test_any_size_and_dtype_leaves_nothing_unwritten"),
    ),
    Mutation(
        "lists/contract/threads", CHUNKS,
        "walk(total * t / threads, total * (t + 1) / threads,",
        "walk(total * t / threads, total * (t + 1) / threads - (t + 1 < threads),",
        "results depend on the number of threads",
        contract("test_the_same_call_gives_the_same_bits"),
    ),
    Mutation(
        "lists/contract/triton-at-import", f"{PACKAGE}/dispatch.py",
        "import torch\n\nBACKENDS", "import torch\nimport triton\n\nBACKENDS", "the package needs triton",
        contract("test_every_operator_runs_without_triton_the_library_and_a_gpu"),
    ),
    Mutation(
        "gaussian_perturb/contract/step-in-the-graph", f"{PACKAGE}/ops.py",
        "Scalar prior_precision, SymInt seed, SymInt step, ", "float prior_precision, SymInt seed, SymInt step, ",
        "torch.compile makes the prior's precision a constant", contract("test_one_graph_serves_every_step"),
    ),
)  # fmt: skip

MUTATIONS = (*TRITON, *CPP, *REFERENCE, *CONTRACT)


# Running them ---------------------------------------------------------------------------------------------------------


class Tree:
    """A copy of what the kernels and their tests need, in which one file at a time is wrong.

    Tests run in forks of this process, which has imported torch once and nothing of the package.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in COPIED:
            source, target = ROOT / name, folder / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        # A mistake shows at any level of optimisation, and this one compiles in half the time.
        build_file = folder / "CMakeLists.txt"
        build_file.write_text(build_file.read_text(encoding="utf-8").replace("-O3", "-O1"), encoding="utf-8")
        self._built = folder / "build"
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        self._call("cmake", *generator, "-S", str(folder), "-B", str(self._built), "-DCMAKE_BUILD_TYPE=Release")
        self._build()
        shutil.copytree(folder / LIBRARY, folder / "right")

    def _call(self, *command: str) -> None:
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")

    def _build(self) -> None:
        self._call("cmake", "--build", str(self._built), "--parallel", str(os.cpu_count() or 1))
        self._call("cmake", "--install", str(self._built), "--prefix", str(self.folder / LIBRARY))

    def _pytest(self, test: str, output: int) -> int:
        """In a fork: runs the test with the tree's package."""
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(self.folder)
        for name in [name for name in os.environ if name.startswith("FISHERTUNE_")]:
            del os.environ[name]
        os.environ["TRITON_INTERPRET"] = "1" if "/interpreter/" in test else "0"
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        os.environ["PYTHONPATH"] = str(self.folder / "kernels")
        sys.dont_write_bytecode = True
        sys.path[:] = [str(self.folder / "kernels"), *(path for path in sys.path if not path.startswith(str(ROOT)))]
        import fishertune_kernels

        assert fishertune_kernels.__file__.startswith(str(self.folder)), fishertune_kernels.__file__
        return pytest.main(["-x", "-q", "-rf", "--tb=line", "-p", "no:cacheprovider", test])

    def red(self, test: str) -> str | None:
        """The first test under this node id that fails, or None if all pass.

        Raises:
            SystemExit: if nothing ran, for instance because the node does not exist or its file does not import.
        """
        with tempfile.TemporaryFile("w+") as output:
            child = os.fork()
            if child == 0:
                status = 99
                try:
                    status = self._pytest(test, output.fileno())
                finally:
                    sys.stdout.flush()
                    os._exit(status)
            deadline = time.monotonic() + SECONDS
            while not (ended := os.waitpid(child, os.WNOHANG))[0]:
                if time.monotonic() > deadline:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    return f"{test} (does not end)"
                time.sleep(0.05)
            output.seek(0)
            printed = output.read()
        status = os.waitstatus_to_exitcode(ended[1])
        failed = re.search(r"^FAILED (.+?)(?: - .*)?$", printed, re.M)
        if status == 1 and failed:
            return failed[1]
        if status < 0:
            return f"{test} (crashes)"
        if status == 0 and re.search(r"\d+ passed", printed):
            return None
        raise SystemExit(f"{test} did not run:\n{printed[-3000:]}")

    def killed_by(self, mutation: Mutation) -> str | None:
        """The test that turns red with the mistake in place; the tree is whole again afterwards."""
        file = self.folder / mutation.file
        right = file.read_text(encoding="utf-8")
        compiled = mutation.file.startswith("csrc/")
        file.write_text(mutation.applied(right), encoding="utf-8")
        try:
            if compiled:
                self._build()
            return next((red for test in mutation.tests if (red := self.red(test))), None)
        finally:
            file.write_text(right, encoding="utf-8")
            if compiled:
                shutil.copytree(self.folder / "right", self.folder / LIBRARY, dirs_exist_ok=True)


def chosen(names: Sequence[str]) -> list[Mutation]:
    """Mutations whose name begins with one of these; all of them for none."""
    unknown = [name for name in names if not any(mutation.name.startswith(name) for mutation in MUTATIONS)]
    if unknown:
        known = ", ".join(sorted({mutation.operator for mutation in MUTATIONS}))
        raise SystemExit(f"No mutation begins with {unknown[0]!r}. Operators: {known}.")
    return [m for m in MUTATIONS if not names or any(m.name.startswith(name) for name in names)]


def run(mutations: Sequence[Mutation]) -> Iterator[tuple[Mutation, str | None]]:
    """Each mutation with the test that turned red, or None where the mistake survived.

    Raises:
        SystemExit: if one of the tests is red without any mistake.
    """
    with tempfile.TemporaryDirectory() as folder:
        tree = Tree(Path(folder))
        for test in dict.fromkeys(test for mutation in mutations for test in mutation.tests):
            if red := tree.red(test):
                raise SystemExit(f"{red} is red without any mistake; mend that first.")
        for mutation in mutations:
            yield mutation, tree.killed_by(mutation)


# The report -----------------------------------------------------------------------------------------------------------

HEADER = """# Mistakes tried on the kernels

Each row is one mistake, made in a copy of the package, and the test that turned red. Written by
`python tests/kernels/mutations.py --write`; the mistakes themselves are in that file, and one that no longer applies to
the code fails `tests/kernels/test_mutations.py`.

| operator | rung | mistake | test that turned red |
|---|---|---|---|
"""


def row_start(mutation: Mutation) -> str:
    """What identifies a row of the report."""
    return f"| `{mutation.operator}` | {mutation.rung} | {mutation.what} | "


def write_report(outcomes: Mapping[str, str | None]) -> None:
    """Rows of mutations that were not run keep what they say."""
    old = REPORT.read_text(encoding="utf-8").splitlines() if REPORT.is_file() else []
    rows = []
    for mutation in MUTATIONS:
        start = row_start(mutation)
        row = next((line for line in old if line.startswith(start)), f"{start}not run |")
        if mutation.name in outcomes:
            red = outcomes[mutation.name]
            row = f"{start}`{red.removeprefix('tests/kernels/')}` |" if red else f"{start}**none: it survived** |"
        rows.append(row)
    REPORT.write_text(HEADER + "\n".join(rows) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help="beginning of a name; all if none is given")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--write", action="store_true", help=f"record the outcomes in {REPORT.relative_to(ROOT)}")
    arguments = parser.parse_args()
    mutations = chosen(arguments.names)
    if arguments.list:
        print("\n".join(mutation.name for mutation in mutations))
        return
    outcomes: dict[str, str | None] = {}
    for mutation, red in run(mutations):
        outcomes[mutation.name] = red
        verdict = "killed" if red else "SURVIVED"
        print(f"{verdict:8s} {mutation.name:52s} {red or 'none of ' + ', '.join(mutation.tests)}", flush=True)
        if arguments.write:
            write_report(outcomes)
    survivors = [name for name, red in outcomes.items() if red is None]
    print(f"{len(outcomes) - len(survivors)} of {len(outcomes)} killed" + "".join(f"\n  {n}" for n in survivors))
    raise SystemExit(bool(survivors))


if __name__ == "__main__":
    main()
