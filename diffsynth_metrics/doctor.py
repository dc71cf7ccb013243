"""What keeps the package from working well on this machine, and what to do about it.

Every finding is looked at on its own, so that one that fails hides no other. Nothing is changed.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch

from diffsynth_metrics.catalog import NAMES, find_card
from diffsynth_metrics.pixels.resizing import cpu_count
from diffsynth_metrics.weights.placement import choose_device
from diffsynth_metrics.weights.published import (
    downloads_are_off,
    find_parts,
    models_folder,
    on_disk,
    size_text,
)

__all__ = ["Finding", "diagnose"]

_SECONDS_TO_ANSWER = 3.0
_CGROUP_LIMIT = Path("/sys/fs/cgroup/cpu.max")
_VARIABLES = ("DIFFSYNTH_MODEL_BASE_PATH", "DIFFSYNTH_DOWNLOAD_SOURCE", "DIFFSYNTH_SKIP_DOWNLOAD")


@dataclass(frozen=True)
class Finding:
    """Something that was looked at.

    Attributes:
        subject: Such as ``"threads"``.
        state: ``"ok"``, ``"problem"``, or ``"hint"``: it could work better, or is needed by some only.
        detail: What was found.
        fix: What to do; empty where there is nothing to do.
    """

    subject: str
    state: Literal["ok", "hint", "problem"]
    detail: str
    fix: str = ""


def diagnose() -> list[Finding]:
    """Look at versions, devices, threads, hubs, disk and the files of every metric.

    Each hub is given three seconds to answer; none is asked where downloads are off.
    """
    return [
        *_look_at_versions(),
        *_look_at_devices(),
        _look_at_threads(),
        *_look_at_environment(),
        *_look_at_hubs(),
        _look_at_disk(),
        *_look_at_metrics(),
    ]


def _look_at_versions() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    own = f"diffsynth-metrics {_version('diffsynth-metrics') or 'not installed'}"
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}; {own}")
    for line in requires("diffsynth-metrics") or []:
        requirement = Requirement(line)
        if requirement.marker is None:
            yield _look_at_requirement(requirement.name, str(requirement.specifier), extra="")
        elif requirement.marker.evaluate({"extra": "eval"}):
            yield _look_at_requirement(requirement.name, str(requirement.specifier), extra="eval")


def _look_at_requirement(name: str, wanted: str, *, extra: str) -> Finding:
    from packaging.specifiers import SpecifierSet

    found = _version(name)
    package = f'"diffsynth-metrics[{extra}]"' if extra else "diffsynth-metrics"
    if found is None:
        detail = "not installed" + (", which score, compare and report need" if extra else "")
        return Finding(name, "hint" if extra else "problem", detail, f"pip install {package}")
    if not SpecifierSet(wanted).contains(found, prereleases=True):
        return Finding(
            name, "problem", f"{found}, and {wanted} is needed", f'pip install "{name}{wanted}"'
        )
    return Finding(name, "ok", found)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _look_at_devices() -> Iterator[Finding]:
    device = choose_device(None)
    yield Finding(
        "device", "ok", f"{_describe_device(device)} is used by default (torch {torch.__version__})"
    )
    free = _free_memory(device)
    if free is None:
        return
    large = [name for name in NAMES if _bytes(find_card(name).memory) > free]
    detail = f"{size_text(free)} free on {device.type}"
    if not large:
        yield Finding("memory", "ok", f"{detail}: every metric fits")
        return
    yield Finding(
        "memory",
        "hint",
        f"{detail}: too little for the weights of {', '.join(large)}",
        "free memory, or use device_map with several devices, or a machine that has more",
    )


def _describe_device(device: torch.device) -> str:
    if device.type != "cuda":
        return str(device.type)
    names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    return f"cuda ({torch.cuda.device_count()} x {', '.join(sorted(names))})"


def _free_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    available = {line.partition(":")[0]: line.split()[1] for line in lines}.get("MemAvailable")
    return int(available) * 1024 if available and device.type == "cpu" else None


def _bytes(size: str) -> float:
    """Return the bytes of a size on a card, such as ``"3.9 GB"`` or ``"none"``."""
    if size == "none":
        return 0.0
    number, _, unit = size.partition(" ")
    return float(number) * {"MB": 1e6, "GB": 1e9}[unit]


def _look_at_threads() -> Finding:
    threads, cores = torch.get_num_threads(), usable_cores()
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    detail = f"torch uses {threads} threads, {cores:g} cores may be used, {busy:.1f} are busy"
    if threads > max(cores, 1):
        fix = f"set OMP_NUM_THREADS={max(int(cores), 1)}: threads that share a core wait for each other"
        return Finding("threads", "problem", detail, fix)
    if threads > 1 and busy > cores / 2:
        fix = (
            "set OMP_NUM_THREADS=1 while other programs run: with torch's default on two busy cores, "
            "scoring took four to five times as long"
        )
        return Finding("threads", "hint", detail, fix)
    return Finding("threads", "ok", detail)


def usable_cores() -> float:
    """Return how many cores this process may use, which a container may limit to less than it shows."""
    cores = float(cpu_count())
    try:
        quota, period = _CGROUP_LIMIT.read_text().split()
        return min(cores, int(quota) / int(period))
    except (OSError, ValueError):  # no such file, or "max": no limit
        return cores


def _look_at_environment() -> Iterator[Finding]:
    for name in _VARIABLES:
        if value := os.environ.get(name):
            yield _look_at_variable(name, value)


def _look_at_variable(name: str, value: str) -> Finding:
    allowed = {
        "DIFFSYNTH_DOWNLOAD_SOURCE": ("modelscope", "huggingface"),
        "DIFFSYNTH_SKIP_DOWNLOAD": ("true", "1", "false", "0"),
    }.get(name)
    if allowed and value.lower() not in allowed:
        return Finding(
            name, "problem", repr(value), f"set it to one of {', '.join(allowed)}, or unset it"
        )
    return Finding(name, "ok", repr(value))


def _look_at_hubs() -> Iterator[Finding]:
    if downloads_are_off():
        yield Finding("hubs", "ok", "not asked: downloads are off (DIFFSYNTH_SKIP_DOWNLOAD)")
        return
    from huggingface_hub.constants import ENDPOINT
    from modelscope_hub.constants import DEFAULT_ENDPOINT

    source = (os.environ.get("DIFFSYNTH_DOWNLOAD_SOURCE") or "modelscope").lower()
    hubs = {
        "modelscope": os.environ.get("MODELSCOPE_ENDPOINT") or DEFAULT_ENDPOINT,
        "huggingface": os.environ.get("HF_ENDPOINT") or ENDPOINT,
    }
    for name, address in hubs.items():
        problem = _reach(address)
        used = " (used by default)" if name == source else ""
        if not problem:
            yield Finding(f"hub {name}", "ok", f"{address} answers{used}")
            continue
        other = next(hub for hub in hubs if hub != name)
        fix = (
            f"check the network, or set DIFFSYNTH_DOWNLOAD_SOURCE={other}; files that are on disk are "
            "used without a hub"
        )
        detail = f"{address} does not answer{used}: {problem}"
        yield Finding(f"hub {name}", "hint", detail, fix if used else "")


def _reach(address: str) -> str:
    """Ask a hub for its first page; return what went wrong, or nothing."""
    if "://" not in address:
        address = f"https://{address}"
    try:
        with urlopen(Request(address, method="HEAD"), timeout=_SECONDS_TO_ANSWER):
            return ""
    except HTTPError as error:
        # A hub may refuse this page and give files all the same; a proxy that reaches none says 5xx.
        return f"status {error.code}" if error.code >= 500 or error.code == 407 else ""
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))


def _look_at_disk() -> Finding:
    folder = models_folder()
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    detail = f"{size_text(free)} free in {folder}" + ("" if there == folder else " (not there yet)")
    fix = "set DIFFSYNTH_MODEL_BASE_PATH to another folder"
    if not os.access(there, os.W_OK):
        return Finding("disk", "problem", f"{detail}, which cannot be written", fix)
    missing = [name for name in NAMES if on_disk(name).state != "whole"]
    large = [name for name in missing if _bytes(find_card(name).download) > free]
    if large:
        return Finding("disk", "hint", f"{detail}: too little for {', '.join(large)}", fix)
    return Finding("disk", "ok", detail)


def _look_at_metrics() -> Iterator[Finding]:
    for name in NAMES:
        found = on_disk(name)
        if found.state == "whole" and not found.size:
            yield Finding(name, "ok", "has no weights")
        elif found.state == "whole":
            yield Finding(name, "ok", f"whole on disk, {size_text(found.size)}, in {found.folder}")
        elif found.state == "partly":
            fix = f"diffsynth-metrics download {name}"
            yield Finding(name, "problem", f"partly on disk, in {found.folder}: {found.problem}", fix)
        elif not find_parts(name):
            yield Finding(name, "hint", f"not installed: {found.problem}")
        else:
            get = f"diffsynth-metrics download {name} takes {find_card(name).download}"
            yield Finding(name, "hint", f"not on disk: {get}")
