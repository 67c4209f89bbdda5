"""Pictures of latents, with matplotlib (extra ``plot``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterSciNotation
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable

    from happyhorse_fast.cli.demo import FormRun

Pixels: TypeAlias = NDArray[Any]

_INK, _FAINT, _GRID = "#1b1f24", "#7d858f", "#e6e8eb"
_COLOURS = ("#1f6feb", "#d9480f", "#2b8a3e", "#862e9c", "#0b7285", "#c2255c")
_GAP = 1  # latent positions between the frames of a contact sheet
# Inches: the figure's width, its margins, a panel's title, the space below a panel.
_WIDTH, _LEFT, _RIGHT, _TITLE, _SPACE = 13.0, 0.65, 0.75, 0.27, 0.20
_HEADER, _FOOTER, _AUDIO, _CURVES = 0.75, 0.55, 0.95, 1.7


class _Page:
    """Panels one below the other, each as wide as the page; heights in inches."""

    def __init__(self, panels: list[float]) -> None:
        self.height = _HEADER + _FOOTER + sum(panels) + len(panels) * _TITLE + (len(panels) - 1) * _SPACE
        self.figure = Figure(figsize=(_WIDTH, self.height), dpi=110, facecolor="white")
        self._top = self.height - _HEADER

    def panel(self, height: float, name: str, detail: str) -> Axes:
        """The next panel, with its name at the left and a detail at the right above it."""
        bottom = self._top - _TITLE - height
        place = (_LEFT / _WIDTH, bottom / self.height, (_WIDTH - _LEFT - _RIGHT) / _WIDTH, height / self.height)
        axes = self.figure.add_axes(place)
        self._top = bottom - _SPACE
        axes.set_title(name, loc="left", fontsize=10, color=_INK, fontweight="bold", pad=4)
        axes.set_title(detail, loc="right", fontsize=9, color=_FAINT, pad=4)
        axes.tick_params(which="both", labelsize=7.5, colors=_FAINT, length=2)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return axes

    def image(self, height: float, name: str, detail: str, pixels: Pixels, *, bar: bool = False, **how: Any) -> None:
        """A panel with an image that fills it, and a colour bar beside it."""
        axes = self.panel(height, name, detail)
        axes.set_xticks([])
        axes.set_yticks([])
        image = axes.imshow(pixels, interpolation="nearest", aspect="auto", **how)
        if bar:
            self._bar(axes, image)

    def _bar(self, axes: Axes, image: ScalarMappable) -> None:
        box = axes.get_position()
        place = (box.x1 + 0.10 / _WIDTH, box.y0, 0.10 / _WIDTH, box.height)
        bar = self.figure.colorbar(image, cax=self.figure.add_axes(place))
        bar.ax.tick_params(which="both", labelsize=7, colors=_FAINT, length=2)
        bar.outline.set_visible(False)


def draw_runs(runs: list[FormRun]) -> Figure:
    """Per form a contact sheet of its latent frames, its distance to the first form, its audio; below, error by step.

    Video frames are colours of the first form's three principal components, so equal latents have equal colours.
    """
    reference, others = runs[0], runs[1:]
    _, channels, frames, rows, columns = reference.video.shape
    sheet = (_WIDTH - _LEFT - _RIGHT) * rows / (frames * (columns + _GAP) - _GAP)
    page = _Page([sheet] * (len(runs) + len(others)) + [_AUDIO] * len(runs) + [_CURVES] * bool(others))
    text: dict[str, Any] = {"x": _LEFT / _WIDTH, "ha": "left", "va": "top"}
    page.figure.text(y=1 - 0.14 / page.height, s="happyhorse_fast demo", color=_INK, fontsize=15, weight="bold", **text)
    subtitle = (
        f"seeded random weights, {len(reference.seconds)} steps; video latent {frames} frames of {rows} x {columns} in "
        f"{channels} channels, drawn as principal components; {reference.audio.shape[1]} audio tokens"
    )
    page.figure.text(y=1 - 0.43 / page.height, s=subtitle, color=_FAINT, fontsize=9.5, **text)

    project, norm = _principal_colours(reference.video), _error_scale(runs)
    for run in runs:
        cost = f"{sum(run.seconds) / len(run.seconds):.3f} s/step, peak {run.peak_bytes / 2**20:.0f} MiB"
        error = f"relative L2 {run.video_error[-1]:.1e}; " if run is not reference else "reference; "
        page.image(sheet, f"{run.form}: video", error + cost, _sheet(project(run.video), 1.0))
        if run is not reference:
            distance = _sheet(_distance(run, reference), np.nan)
            detail = "per position, relative to the latent's RMS"
            page.image(
                sheet, f"{run.form}: distance to {reference.form}", detail, distance, bar=True, cmap="magma", norm=norm
            )
    bound = max(float(run.audio.abs().quantile(0.995)) for run in runs)
    for run in runs:
        error = f"relative L2 {run.audio_error[-1]:.1e}; " if run is not reference else "reference; "
        audio = run.audio[0].T.float().numpy()
        detail = f"{error}{audio.shape[0]} channels down, {audio.shape[1]} tokens across"
        page.image(_AUDIO, f"{run.form}: audio", detail, audio, bar=True, cmap="RdBu_r", vmin=-bound, vmax=bound)
    if others:
        _error_curves(page.panel(_CURVES, "Distance along the way", f"relative L2 to {reference.form}"), others)
    return page.figure


def _principal_colours(video: torch.Tensor) -> Callable[[torch.Tensor], Pixels]:
    """A map from latents [1, C, T, H, W] to colours [T, H, W, 3], fitted to ``video``'s three principal components."""
    samples = video[0].flatten(1).double()
    mean = samples.mean(dim=1, keepdim=True)
    axes = torch.linalg.eigh((samples - mean) @ (samples - mean).T).eigenvectors[:, -3:].flip(1)
    bounds = (axes.T @ (samples - mean)).abs().quantile(0.98, dim=1, keepdim=True).clamp_min(1e-12)

    def project(latent: torch.Tensor) -> Pixels:
        scores = axes.T @ (latent[0].flatten(1).double() - mean) / bounds
        return (0.5 + 0.5 * scores.clamp(-1, 1)).reshape(3, *latent.shape[2:]).permute(1, 2, 3, 0).numpy()

    return project


def _distance(run: FormRun, reference: FormRun) -> Pixels:
    """[T, H, W]: norm over channels of the difference, relative to the reference's RMS norm."""
    norm = reference.video.double().square().sum(dim=1).mean().sqrt().clamp_min(1e-300)
    return ((run.video.double() - reference.video.double()).norm(dim=1) / norm)[0].numpy()


def _sheet(frames: Pixels, fill: float) -> Pixels:
    """[T, H, W, ...] -> [H, T * W + gaps, ...]: the frames side by side."""
    gap = np.full((frames.shape[1], _GAP, *frames.shape[3:]), fill)
    parts = [part for frame in frames for part in (frame, gap)]
    return np.concatenate(parts[:-1], axis=1)


def _error_scale(runs: list[FormRun]) -> LogNorm:
    """One scale for all forms, so that they compare by eye: from the least to the largest distance, and 2x at least."""
    distances = [_distance(run, runs[0]) for run in runs[1:]] or [np.ones(1)]
    top = max(float(d.max()) for d in distances) or 1.0
    low = min(float(np.quantile(d, 0.01)) for d in distances)
    return LogNorm(min(max(low, top / 1e4), top / 2), top)


def _error_curves(axes: Axes, runs: list[FormRun]) -> None:
    for i, run in enumerate(runs):
        steps = range(1, len(run.video_error) + 1)
        colour = _COLOURS[i % len(_COLOURS)]
        for errors, style, name in ((run.video_error, "o-", "video"), (run.audio_error, "s--", "audio")):
            axes.plot(steps, errors, style, ms=4, lw=1.4, color=colour, label=f"{run.form}: {name}")
    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter(LogFormatterSciNotation(minor_thresholds=(1.0, 0.4)))
    axes.set_xticks(range(1, len(runs[0].video_error) + 1))
    axes.set_xlabel("step", color=_FAINT, fontsize=8.5)
    axes.grid(True, which="both", color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(True)
        axes.spines[side].set_color("#d0d4d9")
    axes.legend(frameon=False, fontsize=8.5, labelcolor=_INK, loc="lower right")
