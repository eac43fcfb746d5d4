"""What a pair matches: maps of the source beside those that the target makes of them."""

from typing import Any

from l2t_fast.reports.arrays import Array
from l2t_fast.reports.pictures.canvas import figure, name_picture


def draw_features(images: Array, source: Array, target: Array, channels: list[int], title: str) -> Any:
    """A row an image; of each channel the source's map and the target's, in the same shades of gray.

    images: [N, 3, H, W]; source, target: [N, K, h, w], R(S) and r T of K `channels`.
    """
    count, each = len(images), len(channels)
    fig = figure(1.1 * (1 + 2 * each), 0.9 + 1.1 * count)
    grid = fig.subplots(count, 1 + 2 * each, squeeze=False)
    for line, image, theirs, ours in zip(grid, images, source, target, strict=True):
        low, high = image.min(), image.max()
        line[0].imshow((image.transpose(1, 2, 0) - low) / ((high - low) or 1.0))
        for k in range(each):
            shades = {"vmin": min(theirs[k].min(), ours[k].min()), "vmax": max(theirs[k].max(), ours[k].max())}
            line[1 + 2 * k].imshow(theirs[k], cmap="gray", **shades)
            line[2 + 2 * k].imshow(ours[k], cmap="gray", **shades)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    grid[0, 0].set_title("image", fontsize=7)
    for k, channel in enumerate(channels):
        grid[0, 1 + 2 * k].set_title(f"source\nchannel {channel}", fontsize=7)
        grid[0, 2 + 2 * k].set_title("target\nprojected", fontsize=7)
    name_picture(fig, title, fontsize=9)
    return fig
