"""The table of a fidelity measurement, for the command line and for the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COLUMNS = ("policy", "kept", "PSNR dB", "SSIM", "sound dB", "audio L2", "moved", "sync", "right")
NOTE = (
    "Each clip against float32's of the same noise; PSNR and sound: median/worst, SSIM and L2: median. kept: share of "
    "the exact map's pairs of video tokens. sound: log-spectral distance. L2: relative, of the latent. moved: clips in "
    "which a heard impact moved by more than half a frame, and in which a seen one did by more than a frame, or their "
    "number changed. sync: frames between an impact's picture and its sound, mean/worst. right: clips that show and "
    "sound all that was asked for."
)


def title(found: Mapping[str, Any]) -> str:
    """Name the table of ``found``, a Fidelity as plain data."""
    return (
        f"Fidelity on the pony: {found['clips']} held-out prompts, {found['steps']} steps; float32 itself is right in "
        f"{found['right']}"
    )


def rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row of cells per policy."""
    made: list[tuple[str, ...]] = []
    for result in found["results"]:
        s = result["summary"]
        sync = "" if s["sync_error"] is None else _pair(s["sync_error"], ".1f")
        prefix = {"int8": "int8: ", "fp8": "fp8: "}.get(result["kind"].removesuffix(" op"), "")
        made.append(
            (
                f"{prefix}{result['name']}",
                f"{result['kept']:.0%}",
                _pair(s["psnr_db"], ".1f"),
                f"{s['ssim'][0]:.3f}",
                _pair(s["sound_db"], ".2f"),
                f"{s['audio_error'][0]:.2g}",
                f"{s['moved']}, {s['seen_moved']}",
                sync,
                f"{s['right']} of {s['clips']}",
            )
        )
    return made


def _pair(values: Any, form: str) -> str:
    return "/".join(format(value, form) for value in values)
