"""Keeps jax from loading libtpu on a machine that has no TPU."""

from __future__ import annotations

import os
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

_GOOGLE, _NETWORK_CARD = "0x1ae0", "0x0042"
"""PCI numbers. A virtual machine of Google's has such a card, with and without a TPU."""


def leave_out_libtpu() -> None:
    """Chooses the CPU where the only accelerator that jax could use is a TPU, and the machine has none.

    By default jax loads libtpu wherever it is installed. Without a TPU, libtpu prints ten lines of errors, and jax
    takes the CPU in the end. What the user has set in jax's own way stays.
    """
    if "JAX_PLATFORMS" in os.environ or "JAX_FORCE_TPU_INIT" in os.environ or find_spec("libtpu") is None:
        return
    if entry_points(group="jax_plugins") or has_tpu(Path("/")):  # GPUs are plugins
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:  # it has read its environment
        import jax

        if jax.config.values["jax_platforms"] is None:
            jax.config.update("jax_platforms", "cpu")


def has_tpu(root: Path) -> bool:
    """Whether the machine may have a TPU: a device file as TPUs have, or a PCI device of Google's of unknown kind."""
    if list(root.glob("dev/accel*")) or list(root.glob("dev/vfio/[0-9]*")):
        return True
    for vendor in root.glob("sys/bus/pci/devices/*/vendor"):
        if _number(vendor) == _GOOGLE and _number(vendor.with_name("device")) != _NETWORK_CARD:
            return True
    return False


def _number(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
