"""Draw photographs, the regions that merging leaves of them, and the saliency of the unmerged and the merged model."""

from pathlib import Path
from typing import Any

import torch

from atm_triton import ATMConfig
from atm_triton.measure.evaluate import share
from atm_triton.measure.visualize import merge_map, paint, pixels
from atm_triton.summary import summary
from benchmarks.paper.methods import Way, of_baseline, of_config
from benchmarks.photos.compare import Photos
from benchmarks.photos.weights import read

SHOWN = 4  # photographs
PREFERRED = {  # the first one that was measured is shown, under this name
    "atm, calibrated, image": "ATM, calibrated, each image by its own count",
    "threshold, image": "one threshold, each image by its own count",
}
SAVED = 0.3


@torch.inference_mode()
def draw(photos: Photos, result: dict[str, Any], path: Path) -> None:
    """Draw a row for each of the first images: the photograph, the tokens that are left, and both saliency maps."""
    from matplotlib.figure import Figure

    shown = _shown(result)
    if shown is None:
        return
    method, way = shown
    model = way.patch(share(photos.model))
    images = photos.test[:SHOWN]
    before, after = (read(each, photos.decoder, images)[2] for each in (photos.model, model))
    figure = Figure(figsize=(8.4, 2.2 * len(images)), layout="constrained")
    for number, panels in enumerate(figure.subplots(len(images), 4, squeeze=False)):
        seen, regions = pixels(photos.model, images[number]), merge_map(model, images[number])[-1]
        read(model, photos.decoder, images[number : number + 1])
        error = (before[number] - after[number]).abs().mean().item()
        titles = ("photograph", f"{len(regions.unique())} tokens", "saliency, unmerged", f"merged: off by {error:.3f}")
        for panel, what, title in zip(
            panels, (seen, paint(seen, regions), before[number].numpy(), after[number].numpy()), titles, strict=True
        ):
            panel.imshow(what, interpolation="antialiased", vmin=0, vmax=1)  # "nearest" would drop outlines
            panel.set_title(title, fontsize=8)
            panel.set_axis_off()
        panels[0].set_title(f"photograph, {summary(model).paper_gflops:.2f} GFLOPs", fontsize=8)
    figure.suptitle(f"{PREFERRED[method]}; unmerged {photos.whole:.2f} GFLOPs", fontsize=9)
    figure.savefig(path, dpi=160)


def _shown(result: dict[str, Any]) -> tuple[str, Way] | None:
    """The most preferred method that was measured, at the cost nearest to the usual one."""
    for method in PREFERRED:
        rows = [row for row in result["rows"] if row["method"] == method and "settings" in row]
        if rows:
            given = min(rows, key=lambda row: abs(row["share"] - SAVED))["settings"]
            if "config" in given:
                return method, of_config(ATMConfig(**given["config"]))
            return method, of_baseline("threshold", cls_only_last=False, **given)
    return None
