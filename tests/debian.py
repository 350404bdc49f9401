"""Debian packages that a test needs."""

import os
import shutil
import subprocess

import pytest


def require_debian(*packages: str) -> None:
    """Have these Debian packages installed, or skip the test that asks for them."""
    status = subprocess.run(
        ["dpkg-query", "--show", "--showformat=${db:Status-Status}\n", *packages], capture_output=True, text=True
    )
    if status.returncode == 0 and set(status.stdout.split()) == {"installed"}:
        return
    if os.geteuid() or not shutil.which("apt-get"):
        pytest.skip(f"needs root and apt-get to install {', '.join(packages)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update"], ["apt-get", "install", "--yes", "--no-install-recommends", *packages]):
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        if run.returncode:
            pytest.skip(
                f"{' '.join(command[:2])} failed: {(run.stderr.strip().splitlines() or ['no reason given'])[-1]}"
            )
