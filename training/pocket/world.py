"""The vocabulary of the pocket world: what can stand in a scene, in which colors, before which backgrounds."""

from __future__ import annotations

__all__ = ["BACKGROUNDS", "CLASSES", "COLORS", "CONTROLS", "RELATIONS", "SIZE", "TINTABLE"]

SIZE = 64  # pixels a side
CONTROLS = ("canny", "segmentation")  # the shipped ControlNets

# Name here -> key of the drawing in the Noto emoji set. Thin shapes (bicycle, chair) are left out:
# at 64 pixels they are a handful of strokes, which neither the VAE nor the eye can hold on to.
CLASSES: dict[str, str] = {
    "dog": "dog",
    "cat": "cat",
    "rabbit": "rabbit",
    "elephant": "elephant",
    "pig": "pig",
    "duck": "duck",
    "fish": "tropical-fish",
    "turtle": "turtle",
    "bird": "bird",
    "penguin": "penguin",
    "owl": "owl",
    "bear": "teddy-bear",
    "butterfly": "butterfly",
    "crab": "crab",
    "car": "automobile",
    "bus": "bus",
    "rocket": "rocket",
    "boat": "sailboat",
    "plane": "airplane",
    "house": "house",
    "umbrella": "umbrella",
    "balloon": "balloon",
    "gift": "wrapped-gift",
    "mushroom": "mushroom",
    "tree": "deciduous-tree",
    "apple": "red-apple",
    "crown": "crown",
    "star": "star",
    "robot": "robot",
    "heart": "red-heart",
    "teapot": "teapot",
    "ball": "soccer-ball",
}

# Classes with one clear main hue, which can be drawn in any color; the others keep their own.
TINTABLE: frozenset[str] = frozenset(
    [
        "dog",
        "cat",
        "pig",
        "bird",
        "bear",
        "butterfly",
        "turtle",
        "car",
        "bus",
        "boat",
        "umbrella",
        "balloon",
        "mushroom",
        "apple",
        "crown",
        "star",
        "heart",
        "teapot",
    ]
)

# Name -> hue in degrees, saturation and value of the tint. Far enough apart to be told by eye on 20 pixels.
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (2.0, 0.88, 0.92),
    "yellow": (50.0, 0.85, 1.0),
    "green": (125.0, 0.70, 0.75),
    "blue": (217.0, 0.80, 0.95),
    "purple": (275.0, 0.65, 0.75),
    "pink": (332.0, 0.42, 1.0),
}

# Name -> the phrases a caption may use for it.
BACKGROUNDS: dict[str, tuple[str, ...]] = {
    "grass": ("on the grass", "on green grass"),
    "sea": ("in the sea", "in the blue sea"),
    "sky": ("in the sky", "in the cloudy sky"),
    "snow": ("in the snow", "on white snow"),
    "sand": ("on the sand", "on the beach"),
    "night": ("at night", "in the night sky"),
    "brick": ("in front of a brick wall", "by a brick wall"),
    "wood": ("on a wooden floor", "on the wooden floor"),
}

# Phrase between two objects -> unit step (x, y) from the second object to the first; y grows downwards.
RELATIONS: dict[str, tuple[int, int]] = {
    "to the left of": (-1, 0),
    "to the right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
