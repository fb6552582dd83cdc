"""What a figure was made with: the machine, the program and its libraries."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "accelerate")


def environment() -> dict[str, Any]:
    """Commit, packages and machine, as plain data."""
    return {
        "git_commit": _git_commit(),
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "hardware": hardware(),
    }


def hardware() -> str:
    """The machine, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if "model name" in line), model)
    return f"{os.cpu_count()} CPU cores, {model}, {torch.get_num_threads()} threads"


def gpu_memory() -> dict[str, float]:
    """The most that was allocated on the GPU since it was last asked, GiB."""
    if not torch.cuda.is_available():
        return {}
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return {"gpu_memory_gib": peak}


def process_memory() -> float:
    """The most memory that this process has held since it began, GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def _version(package: str) -> str | None:
    with contextlib.suppress(PackageNotFoundError):  # measuring takes few of them
        return version(package)
    return None


def _git_commit() -> str | None:
    """The commit; with "-dirty" after it where files differ from it."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "describe", "--always", "--match=", "--abbrev=40", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None
