"""The GPU acceptance command: its logic runs on a CPU, it sees a wrong kernel, and it never invents a GPU figure."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

import fishertune_kernels as fk

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_acceptance.py"


@pytest.fixture(scope="module")
def acceptance():
    spec = importlib.util.spec_from_file_location("gpu_acceptance", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_quick_run_checks_every_operator_and_gives_no_figures(acceptance, tmp_path, capsys):
    assert acceptance.main(["--quick", "--seed", "1", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    result = json.loads(path.read_text())
    assert path.name.startswith("cpu-quick-") and result["quick"] and result["seed"] == 1
    checked = " ".join(check["operator"] for check in result["checks"])
    timed = {timing["operator"] for timing in result["timings"]}
    for operator in set(fk.__all__) - {"Threshold", "key_histogram", "precision_update_", "dr_fim_score_"}:
        assert operator in checked and operator in timed
    assert all(check["passed"] for check in result["checks"])
    assert result["copy_gb_per_s"] is None and result["bf16_product_tflop_per_s"] is None
    assert all(set(timing) == {"operator", "what"} for timing in result["timings"])
    output = capsys.readouterr().out
    assert "no GPU was measured" in output and " ms" not in output


@pytest.mark.parametrize("mistake", ["a wrong value", "an element not written"])
def test_a_wrong_kernel_is_seen(acceptance, monkeypatch, tmp_path, capsys, mistake):
    right = fk.gaussian_perturb

    def wrong(params, *arguments, **options):
        perturbed = right(params, *arguments, **options)
        perturbed[-1].view(-1)[-1] += 0.1 if mistake == "a wrong value" else float("nan")
        return perturbed

    monkeypatch.setattr(acceptance.fk, "gaussian_perturb", wrong)
    assert acceptance.main(["--quick", "--out", str(tmp_path)]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "WRONG" in line]
    assert len(lines) == 3 and all(line.startswith("gaussian_perturb") for line in lines)
    (path,) = tmp_path.iterdir()
    failed = {check["operator"] for check in json.loads(path.read_text())["checks"] if not check["passed"]}
    assert failed == {"gaussian_perturb"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_and_writes_nothing(acceptance, tmp_path):
    with pytest.raises(SystemExit, match=r"no CUDA device.*--quick"):
        acceptance.main(["--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_errors_are_measured_against_the_tolerance(acceptance):
    one = torch.ones(3)
    assert acceptance.error([one], [one.double()]) == 0
    assert acceptance.error([one + 1e-3], [one.double()], atol=1e-2) == pytest.approx(0.1, rel=1e-3)
    assert acceptance.error([torch.tensor([1.0, float("nan")])], [torch.ones(2)]) == float("inf")
    assert acceptance.error([torch.empty(0)], [torch.empty(0)]) == 0
