"""The benchmarks run in small on a CPU, measure what they say, and the GPU report keeps every result."""

import json
import shlex
import sys
import time

import pytest
import torch

from benchmarks import attach, checkpoint, common, gpu_report, sampler, step
from model_jit import JiT_models

TINY = ["--model", "JiT-Demo/8", "--img_size", "16", "--device", "cpu"]


class FakeRelease:
    def __init__(self, *args):
        self.peak_gb = 3.0

    def __call__(self):
        pass


def line_of(module, argv, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", *argv])
    module.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_step_reports_all_variants(monkeypatch, capsys):
    monkeypatch.setattr(step, "Release", FakeRelease)
    argv = ["--repeats", "1", "--steps", "1", "--versus=--disable_dct_patchify", "--reference", "x", *TINY]
    line = line_of(step, [*argv, "--batch_size", "2"], monkeypatch, capsys)
    assert line["reference"]["peak_gb"] == 3.0 and "first_over_reference" in line  # of a stand-in that takes no time
    assert line["benchmark"] == "step" and {"commit", "hardware", "date", "versions"} <= set(line)
    for name in ("first", "second"):
        assert line[name]["images_per_s"] > 0 and 0 < line[name]["share_of_ceiling"] < 2
    median, low, high = line["first_over_second"]
    assert low <= median <= high


def test_inductor_options_hold_for_the_second_variant(monkeypatch, capsys):
    seen, Steps = [], step.Steps

    class Noted(Steps):
        def __init__(self, *args):
            seen.append(step.inductor_config.combo_kernels)
            super().__init__(*args)

    monkeypatch.setattr(step, "Steps", Noted)
    argv = ["--repeats", "1", "--steps", "1", "--inductor", "combo_kernels=True", *TINY, "--batch_size", "2"]
    line = line_of(step, argv, monkeypatch, capsys)
    assert seen == [False, True] and line["inductor"] == [["combo_kernels", True]] and "first_over_second" in line
    with pytest.raises(SystemExit):
        line_of(step, ["--inductor", "combo=True", *TINY], monkeypatch, capsys)
    assert "no setting of torch._inductor.config" in capsys.readouterr().err


def test_sampler_and_checkpoint_report(monkeypatch, capsys):
    argv = ["--repeats", "1", *TINY, "--gen_bsz", "2", "--num_sampling_steps", "2"]
    line = line_of(sampler, argv, monkeypatch, capsys)
    assert line["range"][0] <= line["images_per_s"] <= line["range"][1]
    argv = ["--model", "JiT-Demo/8", "--img_size", "32", "--saves", "2", "--device", "cpu"]
    line = line_of(checkpoint, argv, monkeypatch, capsys)
    assert 0 <= line["blocked_range_s"][0] <= line["blocked_s"] <= line["seconds_in_all"] and line["gigabytes"] > 0


def test_attach_reports_each_network(monkeypatch, capsys):
    tiny = lambda: JiT_models["JiT-Demo/8"](input_size=16)  # noqa: E731
    monkeypatch.setattr(attach, "NETWORKS", {"tiny": (tiny, (3, 16, 16), lambda b: {"y": torch.ones(b).long()})})
    line = line_of(attach, ["--repeats", "1", "--batch_size", "2", "--device", "cpu"], monkeypatch, capsys)
    assert line["network"] == "tiny" and 0 < line["operator_ms"][0] < line["step_ms"][0]
    assert line["attached_over_plain"][0] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_kernels_of_a_step_are_kernels(monkeypatch, capsys):
    argv = ["--repeats", "2", "--kernels", *TINY[:-2], "--batch_size", "2", "--compile", "off"]
    found = line_of(step, argv, monkeypatch, capsys)["first"]["kernels"]
    assert 0 <= found["idle_share"] < 1 and found["launches"]["matrix products"] > 10
    assert not any("Optimizer.step" in name for name in found["longest"])  # an annotation spans kernels


def test_turns_alternate_and_the_first_is_not_timed():
    calls = []
    seconds = common.in_turns({n: lambda n=n: calls.append(n) for n in "ab"}, 2, torch.device("cpu"))
    assert calls == ["a", "b"] * 3 and {name: len(s) for name, s in seconds.items()} == {"a": 2, "b": 2}
    assert common.median_and_range([3.0, 2.0, 4.00049], 3) == [3.0, 2.0, 4.0]


def test_gpu_report_keeps_results_and_failures(monkeypatch, tmp_path, capsys):
    good, bad = '-c "print(\'{\\"benchmark\\": 1}\')"', "-c \"print('{'); raise SystemExit('no memory')\""
    monkeypatch.setattr(gpu_report, "PLAN", ((20, good), (20, bad), (0.05, '-c "import time; time.sleep(9)"')))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100 80GB")
    monkeypatch.setattr(sys, "argv", ["gpu_report", "--minutes", "5", "--out", str(tmp_path / "x.jsonl")])
    assert gpu_report.main() == 1
    lines = [json.loads(text) for text in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert lines[0]["benchmark"] == 1 and not {"failed", "output"} & set(lines[0])
    assert lines[1]["failed"] == "exit code 1" and lines[1]["output"] == ["{", "no memory"]
    assert "did not end" in lines[2]["failed"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_report.main() == 2 and "no CUDA device" in capsys.readouterr().err


def test_nothing_of_a_measurement_survives_its_limit(tmp_path):
    """Neither the process nor one that it has started."""
    child = f"import time; open({str(tmp_path / 'a')!r}, 'w'); time.sleep(3); open({str(tmp_path / 'b')!r}, 'w')"
    parent = f"import subprocess, sys; print(1, flush=True); subprocess.run([sys.executable, '-S', '-c', {child!r}])"
    line = gpu_report.measure(f"-S -c {shlex.quote(parent)}", 1.5)
    time.sleep(2)
    assert line["output"] == ["1"] and [path.name for path in tmp_path.iterdir()] == ["a"]


def test_kernels_by_kind():
    """Names that an H100 reported."""
    kinds = {
        "nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_bias_TNN": "matrix products",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x64_1x4": "attention",
        "triton_poi_fused_cat_mul_silu_silu_backward_split_view_2": "SwiGLU",
        "triton_per_fused__fused_rms_norm__to_copy_add_flip_mul_unbind_unsqueeze_view_7": "norm of q and k, rotary",
        "triton_red_fused__fused_rms_norm__fused_rms_norm_backward__to_copy_add_mul_split": "norms, adaLN, residual",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(a": "optimizer and EMA",
        "Memcpy HtoD (Pinned -> Device)": "copies",
        "triton_poi_fused_add_3": "other compiled",
        "void at::native::reduce_kernel<512, 1>": "rest",
    }
    assert {name: step.kind_of(name) for name in kinds} == kinds
