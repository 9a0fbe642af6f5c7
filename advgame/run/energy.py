"""Energy, power, memory and utilisation of a run: NVML for GPUs, RAPL for the processor, or a reason why not.

Both sources are counters kept by the hardware, so that nothing has to be sampled between two readings.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from advgame.run import names

ONE_NODE = (
    "energy: of the node that this process runs on; what engines and trainer ranks use on other nodes is not available"
)
"""Said of a run on a cluster."""
RAPL = Path("/sys/class/powercap")
JOULES_PER_KWH = 3.6e6


class RaplCounters:
    """Joules of each processor package since this object was made, by package name."""

    def __init__(self, root: Path = RAPL):
        """Raises OSError with the reason if this machine shows no readable counter."""
        zones = sorted(zone for zone in root.glob("intel-rapl:*") if zone.name.count(":") == 1)
        if not zones:
            raise FileNotFoundError(f"no package counters in {root}")
        self._zones = {(zone / "name").read_text().strip(): zone for zone in zones}
        self._ranges = {n: int((zone / "max_energy_range_uj").read_text()) for n, zone in self._zones.items()}
        self._last = self._read()
        self._total = dict.fromkeys(self._zones, 0)

    def _read(self) -> dict[str, int]:
        return {name: int((zone / "energy_uj").read_text()) for name, zone in self._zones.items()}

    def joules(self) -> dict[str, float]:
        now = self._read()
        for name, value in now.items():
            # the counter wraps at its range, on a busy server about once an hour
            step = value - self._last[name]
            self._total[name] += step if step >= 0 else step + self._ranges[name]
        self._last = now
        return {name: total / 1e6 for name, total in self._total.items()}


class NvmlCounters:
    """Joules, bytes and busy share of GPUs by index."""

    def __init__(self, devices: Sequence[int] | None = None):
        """Raises OSError with the reason if NVML cannot be used."""
        try:
            self._nvml: Any = importlib.import_module("pynvml")
        except ImportError as error:
            raise OSError(f"{error}; install nvidia-ml-py") from error
        try:
            self._nvml.nvmlInit()
            indices = range(self._nvml.nvmlDeviceGetCount()) if devices is None else devices
            self._handles = {index: self._nvml.nvmlDeviceGetHandleByIndex(index) for index in indices}
            self._first = {index: self._millijoules(handle) for index, handle in self._handles.items()}
        except self._nvml.NVMLError as error:
            raise OSError(str(error)) from error

    def _millijoules(self, handle: Any) -> int:
        return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle))

    def joules(self) -> dict[int, float]:
        return {i: (self._millijoules(handle) - self._first[i]) / 1e3 for i, handle in self._handles.items()}

    def memory_bytes(self) -> dict[int, float]:
        return {i: float(self._nvml.nvmlDeviceGetMemoryInfo(h).used) for i, h in self._handles.items()}

    def busy(self) -> dict[int, float]:
        """Share of the last sampling window (up to a second) in which a kernel ran."""
        return {i: self._nvml.nvmlDeviceGetUtilizationRates(h).gpu / 100 for i, h in self._handles.items()}


def resident_bytes() -> int:
    """Of this process, now; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0


def gpu_roles(engines: Mapping[str, str], visible: str | None) -> dict[str, list[int]]:
    """NVML's indices of the GPUs of a run by what works there: {"trainer": [0], "attacker+judge": [1]}.

    engines: CUDA_VISIBLE_DEVICES of each engine. visible: that of this process, whose first GPU trains; None: all are
    visible. GPUs named otherwise than by index are left to "other".
    """
    roles: dict[int, list[str]] = {}
    first = "0" if visible is None else visible.split(",")[0]
    for role, devices in {"trainer": first, **engines}.items():
        for index in devices.split(","):
            if index.strip().isdigit():
                roles.setdefault(int(index), []).append(role)
    found: dict[str, list[int]] = {}
    for gpu, here in sorted(roles.items()):
        found.setdefault("+".join(here), []).append(gpu)
    return found


def _difference(now: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    return {name: value - before.get(name, 0.0) for name, value in now.items()}


class EnergyMeter:
    """Readings between two laps. `roles` names the GPUs as `gpu_roles` does; others count as "other"."""

    def __init__(
        self,
        roles: Mapping[str, Sequence[int]] | None = None,
        carbon: float = 0.4,
        rapl: Path = RAPL,
        *,
        nodes: bool = False,
    ):
        """`carbon` is in kg CO2e a kWh. nodes: others may take part. Never raises: what is missing is in `note`."""
        self.carbon = carbon
        self._role_of = {index: role for role, indices in (roles or {}).items() for index in indices}
        self._gpus: NvmlCounters | None = None
        self._packages: RaplCounters | None = None
        reasons = []
        try:
            self._gpus = NvmlCounters()
        except OSError as error:
            reasons.append(f"NVML: {' '.join(str(error).split())}")
        try:
            self._packages = RaplCounters(rapl)
        except OSError as error:
            reasons.append(f"RAPL: {error.strerror or error}")
        measured = self._gpus is not None or self._packages is not None
        self.note = (ONE_NODE if nodes else "") if measured else f"energy: not available ({'; '.join(reasons)})"
        self._before = self.reading()

    def reading(self) -> dict[str, float]:
        """The counters now: processor seconds, joules by GPU role and of the packages, and when that was."""
        own, children = os.times(), time.perf_counter()
        found = {"cpu_s": own.user + own.system + own.children_user + own.children_system, "at": children}
        if self._gpus is not None:
            for index, joules in self._gpus.joules().items():
                role = self._role_of.get(index, "other")
                found[f"gpu/{role}"] = found.get(f"gpu/{role}", 0.0) + joules
        if self._packages is not None:
            found["cpu"] = sum(self._packages.joules().values())
        return found

    def evaluated(self, begun: Mapping[str, float]) -> dict[str, float]:
        """Metrics of an evaluation that began at the reading `begun` and ends now. What else this process did meanwhile
        (a checkpoint written beside, late trees) is in it; the lap counts all of it too."""
        spent = _difference(self.reading(), begun)
        del spent["at"]
        values = {names.EVALUATION_SECONDS: spent.pop("cpu_s")}
        return values | ({names.EVALUATION_JOULES: sum(spent.values())} if spent else {})

    def lap(self) -> dict[str, float]:
        """Metrics since the last lap: `energy/...` in joules and watts, of GPUs memory and busy share too (by role, by
        index); always the processor seconds and memory used.

        Energy of a whole package or GPU is counted, whoever else uses it.
        """
        now = self.reading()
        spent = _difference(now, self._before)
        self._before = now
        seconds = max(spent.pop("at"), 1e-9)
        values = {names.PROCESS_SECONDS: spent.pop("cpu_s"), names.PROCESS_MEMORY: resident_bytes() / 2**30}
        if not spent:
            return values
        total = sum(spent.values())
        values |= {f"energy/{name}_joules": joules for name, joules in spent.items()}
        values |= {f"energy/{name}_watts": joules / seconds for name, joules in spent.items()}
        values |= {"energy/joules": total, "energy/co2e_g": total / JOULES_PER_KWH * self.carbon * 1e3}
        if self._gpus is not None:
            sizes, shares = self._gpus.memory_bytes(), self._gpus.busy()
            values |= {f"energy/gpu{index}_memory_gib": size / 2**30 for index, size in sizes.items()}
            values |= {f"energy/gpu{index}_busy": share for index, share in shares.items()}
            for role, indices in self._by_role(sizes).items():
                values[f"energy/gpu/{role}_memory_gib"] = sum(sizes[index] for index in indices) / 2**30
                values[f"energy/gpu/{role}_busy"] = sum(shares[index] for index in indices) / len(indices)
        return values

    def _by_role(self, indices: Iterable[int]) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for index in indices:
            found.setdefault(self._role_of.get(index, "other"), []).append(index)
        return found
