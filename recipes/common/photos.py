"""A user's folder of photos: checked, and said in words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.config import require

__all__ = ["LEAST", "Photos", "read_photos"]

LEAST = 3  # photos that a subject is learnt from
ORIENTATION = 0x0112  # EXIF tag; 1 is upright


@dataclass(frozen=True, kw_only=True)
class Photos:
    """What a folder holds."""

    folder: Path
    source: Any
    """The photos as training reads them: `training.data.images.Folder`."""
    prompt: str | None
    """Caption of all photos; None: each has its own."""
    masks: Path | None
    turned: int
    """Photos that are turned upright by what their EXIF says."""
    said: list[str]
    """What is left out, repeated or resized."""

    def lines(self) -> list[str]:
        """What was seen, for the terminal."""
        sizes = sorted((self.source.size(i) for i in range(len(self.source))), key=lambda size: size[0] * size[1])
        first, last = (f"{width}x{height}" for width, height in (sizes[0], sizes[-1]))
        turned = f" ({self.turned} turned upright)" if self.turned else ""
        lines = [f"{len(sizes)} photos{turned}, {first if first == last else f'{first} to {last}'} pixels"]
        lines += self.said
        lines.append("captions: those beside the photos" if self.prompt is None else f"caption: {self.prompt!r}")
        lines.append(f"masks: {self.masks}" if self.masks else "masks: none")
        return lines


def read_photos(folder: Path, *, calls: str, prompt: str, minimum: int) -> Photos:
    """The photos of a folder, if a subject can be learnt from them.

    Args:
        folder: with the photos, and perhaps captions and masks.
        calls: what captions must call the subject, as in "sks dog".
        prompt: the caption where the folder has none.
        minimum: shortest allowed side in pixels.

    Raises:
        TrainingError: too few photos, unreadable or too small ones, masks that do not fit, or captions that do not
            name the subject.
    """
    from training.data import images

    found = images.scan(folder) if folder.is_dir() else images.Scan()
    said: list[str] = []
    captioned = bool(found.captions or found.metadata)
    masks = folder / "masks" if (folder / "masks").is_dir() else None
    source = images.folder(folder, prompt=None if captioned else prompt, masks=masks, minimum=minimum, say=said.append)
    require(len(source) >= LEAST, f"{folder} has {len(source)} photo(s); three are the least a subject is learnt from")
    silent = [source.files[i].name for i in range(len(source)) if calls not in source.caption(i)]
    require(not silent, f"captions must name the subject as {calls!r}; those of {', '.join(silent[:5])} do not")
    return Photos(
        folder=folder,
        source=source,
        prompt=None if captioned else prompt,
        masks=masks,
        turned=sum(_is_turned(file) for file in source.files),
        said=said,
    )


def _is_turned(file: Path) -> bool:
    from PIL import Image

    with Image.open(file) as image:
        return bool(image.getexif().get(ORIENTATION, 1) != 1)
