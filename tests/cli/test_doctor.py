"""`hairpin doctor`: every absent thing has a reason, and the reasons are right."""

import json
import socket
from importlib import metadata

import pytest
import torch

from hairpin.cli import doctor
from hairpin.cli.doctor import Finding


def by_name(findings):
    return {finding.name: finding for finding in findings}


def test_the_table_holds_every_finding(run):
    findings = json.loads(run("doctor", "--json").out)["findings"]
    table = run("doctor").out
    assert {"software", "devices", "kernels", "back ends", "links", "extras", "bench"} == {
        finding["topic"] for finding in findings
    }
    for finding in findings:
        assert finding["name"] in table
        assert finding["detail"]


def test_what_this_machine_has():
    found = by_name(doctor.examine())
    assert found["torch"].detail == torch.__version__
    assert found["loopback"].present
    assert found["gloo"].present == torch.distributed.is_gloo_available()
    assert found.get("cuda:0", found.get("cuda")).present == torch.cuda.is_available()


def test_no_gpu_in_a_build_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    finding = by_name(doctor.examine_devices())["cuda"]
    assert not finding.present
    assert "built without CUDA" in finding.detail
    assert "install a CUDA build" in finding.remedy


def test_no_gpu_in_a_build_with_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    finding = by_name(doctor.examine_devices())["cuda"]
    assert "no GPU or driver answers" in finding.detail
    assert "nvidia-smi" in finding.remedy


@pytest.mark.parametrize(
    ("built", "gpu", "why"),
    [(False, False, "NCCL needs CUDA"), (True, False, "there is no GPU to use it")],
)
def test_why_there_is_no_nccl(monkeypatch, built, gpu, why):
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    finding = by_name(doctor.examine_backends())["nccl"]
    assert not finding.present
    assert why in finding.detail


def test_torch_without_distributed(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    (finding,) = doctor.examine_backends()
    assert not finding.present
    assert "built without torch.distributed" in finding.detail


def test_a_loopback_that_is_down(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket, "create_server", refuse)
    finding = by_name(doctor.examine_links())["loopback"]
    assert not finding.present
    assert "Network is unreachable" in finding.detail


def test_no_compiler(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    finding = by_name(doctor.examine_software())["torch.compile on CPU"]
    assert not finding.present
    assert "install g++" in finding.remedy


def test_extras_are_read_from_the_packages_metadata(monkeypatch):
    lines = ["torch<3", "pillow>=10; extra == 'video'", 'nowhere-1>=2 ; extra == "video"']
    lines += ["rich ; extra == 'tables'", "colorama; platform_system == 'Windows'"]
    assert doctor.group_by_extra(lines) == {"video": ["pillow", "nowhere-1"], "tables": ["rich"]}
    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    found = by_name(doctor.examine_extras())
    assert found["video"] == Finding(
        "extras", "video", False, "not installed: nowhere-1", 'pip install "hairpin[video]"'
    )
    assert found["tables"].present
    assert found["tables"].detail.startswith("rich ")


def test_extras_where_the_package_is_not_installed(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", absent)
    (finding,) = doctor.examine_extras()
    assert not finding.present
    assert "not installed" in finding.detail


def test_the_reason_of_the_bench_is_passed_on(monkeypatch):
    monkeypatch.setattr("hairpin.bench.network.why_not", lambda: "no ip command")
    (finding,) = doctor.examine_bench()
    assert (finding.present, finding.detail) == (False, "no ip command")
    assert "loopback" in finding.remedy


@pytest.mark.parametrize(
    ("gpu", "why", "words"),
    [
        (False, None, "no CUDA device; attention, "),
        (True, None, "attention, gated_projections, gated_residual and layer_norm run in Triton"),
        (True, "Triton is not installed", "Triton is not installed; attention, "),
    ],
)
def test_which_kernels_compute(monkeypatch, gpu, why, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr("hairpin.kernels.choice.why_not_here", lambda: why)
    (finding,) = doctor.examine_kernels()
    assert finding.present == (gpu and why is None)
    assert words in finding.detail
    assert (finding.remedy is not None) == (why == "Triton is not installed")


@pytest.mark.parametrize(
    ("gpu", "why", "words", "remedy"),
    [
        (True, None, "causal and window attention across ranks", None),
        (False, None, "no CUDA device; torch's own kernels", None),
        (True, "not installed", "not installed; torch's own kernels", "pip install 'flash-attn"),
    ],
)
def test_whether_flash_attn_computes(monkeypatch, gpu, why, words, remedy):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr("hairpin.exchange.flash.why_not", lambda: why)
    (finding,) = doctor.examine_flash_attn()
    assert finding.present == (gpu and why is None)
    assert words in finding.detail
    assert (finding.remedy or "").startswith(remedy or "")
    assert (finding.remedy is None) == (remedy is None)
