"""Sizes that fit together, or the reason why not and the nearest sizes that would do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class GeometryError(ValueError):
    """A size that an encoder or a mixture cannot have.

    Args:
        reason: what is wrong, with the values.
        nearest: values that would do, the nearest first.
        argument: the constructor argument that they are values of.
    """

    def __init__(self, reason: str, *, nearest: Sequence[int], argument: str = "image_size") -> None:
        super().__init__(f"{reason}; nearest possible {argument}: {' or '.join(map(str, nearest))}")
        self.nearest = tuple(nearest)
        self.argument = argument


def whole_grid(image_size: int, patch_size: int, *, name: str, multiple: int = 1, argument: str = "image_size") -> int:
    """Returns the side of the grid of patches that an image makes.

    Args:
        image_size: side of the image in pixels.
        patch_size: side of a patch in pixels.
        name: of the encoder, for the error.
        multiple: the grid's side must be a whole multiple of it.
        argument: the constructor argument that gives `image_size`, for the error.

    Raises:
        GeometryError: if the patches do not fill the image, or not a multiple of `multiple` of them.
    """
    step = patch_size * multiple
    steps = max(image_size // step, 0)
    if steps > 0 and steps * step == image_size:
        return steps * multiple
    sizes = sorted({max(steps, 1) * step, (steps + 1) * step}, key=lambda size: abs(size - image_size))
    patches = f"{patch_size} px patches" if multiple == 1 else f"groups of {multiple} patches of {patch_size} px"
    raise GeometryError(f"{name}: {image_size} px is no whole number of {patches}", nearest=sizes, argument=argument)


def leading_encoder(sizes: Mapping[str, tuple[int, int]]) -> str:
    """Returns the encoder whose grid a mixture takes for all: the coarsest at the largest input.

    An encoder that sees fewer pixels than another must not decide, or the detail for which the other was added
    would be lost; among those that see most, the coarsest makes the fewest tokens, and no full-resolution
    feature has to be invented. Eagle: CLIP 336 px 24x24, ConvNeXt 1024 px 32x32, SAM 1024 px 32x32, EVA-02
    1024 px 64x64, Pix2Struct 720 px 45x45 -> ConvNeXt's 32x32, with SAM and without.

    Args:
        sizes: (side of the input in pixels, side of the output grid) by name.
    """
    return min(sizes, key=lambda name: (-sizes[name][0], sizes[name][1]))
