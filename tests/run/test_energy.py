"""Energy counters: RAPL's own file layout, its wrap-around, and a plain reason where nothing can be measured."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from advgame.run.energy import EnergyMeter, NvmlCounters, RaplCounters, gpu_roles


def zone(root, index: int, name: str, micro: int, limit: int = 1_000_000_000):
    folder = root / f"intel-rapl:{index}"
    folder.mkdir(exist_ok=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{micro}\n")
    (folder / "max_energy_range_uj").write_text(f"{limit}\n")
    return folder / "energy_uj"


def test_rapl_counts_joules_and_survives_the_wrap(tmp_path):
    counter = zone(tmp_path, 0, "package-0", 999_000_000)
    other = zone(tmp_path, 1, "package-1", 0)
    part = tmp_path / "intel-rapl:0:0"  # a part of package 0, already counted in it
    part.mkdir()
    counters = RaplCounters(tmp_path)
    counter.write_text("1000000\n")  # 1 J up to the range, 1 J after it
    other.write_text("5000000\n")
    assert counters.joules() == {"package-0": pytest.approx(2.0), "package-1": pytest.approx(5.0)}
    counter.write_text("4000000\n")
    assert counters.joules()["package-0"] == pytest.approx(5.0)


def test_a_lap_gives_joules_watts_and_carbon(tmp_path):
    counter = zone(tmp_path, 0, "package-0", 0)
    meter = EnergyMeter(carbon=0.5, rapl=tmp_path)
    assert meter.note == ""
    counter.write_text("360000000\n")
    values = meter.lap()
    assert values["energy/cpu_joules"] == pytest.approx(360.0)
    assert values["energy/co2e_g"] == pytest.approx(
        360 / 3.6e6 * 0.5 * 1000, rel=0.5 if torch.cuda.is_available() else 1e-6
    )
    assert values["energy/cpu_watts"] > 0
    assert meter.lap()["energy/cpu_joules"] == 0.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can be measured here")
def test_what_cannot_be_measured_is_said_and_not_zero(tmp_path):
    meter = EnergyMeter(rapl=tmp_path / "none")
    assert meter.note.startswith("energy: not available (NVML: ")
    assert "RAPL: no package counters" in meter.note
    values = meter.lap()
    assert list(values) == ["energy/process_cpu_s", "energy/process_memory_gib"]
    assert 0.01 < values["energy/process_memory_gib"] < 1000


def test_process_seconds_are_those_that_were_used(tmp_path):
    meter = EnergyMeter(rapl=tmp_path / "none")
    total = sum(i * i for i in range(2_000_000))
    assert total
    assert 0 < meter.lap()["energy/process_cpu_s"] < 60


def test_an_evaluation_is_a_part_of_its_lap(tmp_path):
    counter = zone(tmp_path, 0, "package-0", 0)
    meter = EnergyMeter(rapl=tmp_path)
    counter.write_text("1000000\n")
    begun = meter.reading()
    assert sum(i * i for i in range(2_000_000))
    counter.write_text("4000000\n")
    part = meter.evaluated(begun)
    assert sum(i * i for i in range(2_000_000))
    counter.write_text("8000000\n")
    whole = meter.lap()
    assert 0 < part["energy/evaluation_cpu_s"] < whole["energy/process_cpu_s"]
    if not torch.cuda.is_available():
        assert (part["energy/evaluation_j"], whole["energy/joules"]) == (pytest.approx(3.0), pytest.approx(8.0))


def test_gpus_are_summed_by_role(monkeypatch, tmp_path):
    """With a stand-in for NVML: two GPUs of an engine, one of the trainer, one of somebody else."""
    millijoules = [1000, 5000, 7000, 9000]
    fake = SimpleNamespace(
        NVMLError=RuntimeError, nvmlInit=lambda: None, nvmlDeviceGetCount=lambda: 4,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: millijoules[handle],
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=(handle + 1) << 30),
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=20 * handle),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    meter = EnergyMeter(gpu_roles({"judge": "1,2"}, None), carbon=0.5, rapl=tmp_path / "none", nodes=True)
    assert meter.note.startswith("energy: of the node that this process runs on; ")
    for index, more in enumerate((3.6e6, 1000, 2000, 0)):
        millijoules[index] += int(more)
    values = meter.lap()
    joules = {role: values[f"energy/gpu/{role}_joules"] for role in ("trainer", "judge", "other")}
    assert joules == {"trainer": 3600.0, "judge": 3.0, "other": 0.0}
    assert values["energy/gpu/judge_watts"] > 0
    assert values["energy/co2e_g"] == pytest.approx(3603 / 3.6e6 * 500)
    assert (values["energy/gpu/judge_memory_gib"], values["energy/gpu/judge_busy"]) == (5.0, pytest.approx(0.3))
    assert (values["energy/gpu0_memory_gib"], values["energy/gpu3_busy"]) == (1.0, 0.6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; its twin is the RAPL test")
def test_nvml_counts_on_a_gpu():
    counters = NvmlCounters()
    x = torch.randn(4096, 4096, device="cuda")
    for _ in range(200):
        x = (x @ x).clamp(-1, 1)
    torch.cuda.synchronize()
    assert sum(counters.joules().values()) > 0


def test_gpus_are_named_by_what_works_there():
    assert gpu_roles({}, None) == {"trainer": [0]}
    assert gpu_roles({"attacker": "1", "judge": "1,2"}, "3,0") == {"attacker+judge": [1], "judge": [2], "trainer": [3]}
    assert gpu_roles({"defender": "0"}, None) == {"trainer+defender": [0]}
    assert gpu_roles({"defender": "GPU-5ad1"}, "MIG-77") == {}
