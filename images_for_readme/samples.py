"""Draw the sample pictures, tests/samples; the name of each begins with its character.

    python3 -m images_for_readme.samples tests/samples

All is computed from seeds, so that the same call draws the same pictures.
"""

import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from tests.strokes import hand, ink


class Sample(NamedTuple):
    """One sample picture: what is written, how, on what, and as which file."""

    name: str  # begins with the character
    writer: int  # seed of the hand
    size: tuple[int, int]
    form: int = 0
    fill: float = 0.7  # longest side of the character over the shorter side of the picture
    offset: tuple[float, float] = (0.0, 0.0)
    pen: tuple[int, int, int] = (25, 25, 30)
    paper: tuple[int, int, int] = (255, 255, 255)
    shading: float = 0.0  # how unevenly it is lit, part of white
    grain: float = 0.0  # of the paper and the camera, part of white
    blur: float = 0.0  # Gaussian, px
    mode: str = "RGB"  # of the file
    width: float = 0.0  # of the line, where it is not the hand's own


BLUE, RED, PENCIL, WHITE = (28, 50, 140), (170, 30, 40), (105, 105, 110), (255, 255, 255)
BLACKBOARD, CREAM, KRAFT, NIGHT = (38, 66, 56), (247, 240, 222), (196, 160, 116), (18, 22, 40)
SAMPLES = [
    Sample("0_scan.png", 11, (64, 80), mode="L"),
    Sample("1_pencil.jpg", 12, (240, 320), 0, pen=PENCIL, paper=CREAM, shading=0.15, grain=0.02),
    Sample("2_tiny.png", 13, (12, 12), mode="L", fill=0.9, width=0.11),
    Sample("2_form.tif", 27, (90, 90), 1, pen=BLUE, offset=(0.1, -0.08)),
    Sample("3_chalk.png", 14, (200, 200), pen=(235, 235, 225), paper=BLACKBOARD, grain=0.05),
    Sample("4_marker.webp", 35, (400, 300), pen=RED, width=0.13, offset=(-0.2, 0.0)),
    Sample("5_fax.png", 16, (100, 100), mode="1"),
    Sample("6_canvas.gif", 17, (60, 60), pen=WHITE, paper=(0, 0, 0), mode="P"),
    Sample("7_receipt.bmp", 18, (48, 72), 1, mode="L"),
    Sample("8_photo.jpg", 19, (800, 600), 0, 0.4, (0.15, 0.1), BLUE, CREAM, 0.35, 0.03, 1.5),
    Sample("9_emnist.png", 20, (28, 28), pen=WHITE, paper=(0, 0, 0), mode="L", fill=0.86),
    Sample("A_photo.jpg", 21, (640, 480), 0, 0.6, (0, 0), (35, 35, 60), CREAM, 0.45, 0.03, 1.2),
    Sample("A_scan.png", 22, (120, 110), 1, mode="L"),
    Sample("B_deep.png", 23, (160, 160), mode="I;16"),
    Sample("C_glass.png", 24, (180, 220), pen=(20, 90, 70), mode="RGBA"),
    Sample("D_poster.jpg", 25, (2000, 1600), 0, 0.8, pen=RED, paper=KRAFT, shading=0.3, width=0.1),
    Sample("D_note.gif", 26, (80, 80), 1, pen=BLUE, paper=(255, 246, 150), mode="P"),
    Sample("E_print.jpg", 28, (150, 150), mode="CMYK"),
    Sample("E_script.png", 29, (100, 100), 1, pen=BLUE),
    Sample("F_thin.png", 30, (300, 300), mode="L", width=0.012),
    Sample("G_shade.jpg", 31, (360, 480), 0, 0.6, (0, 0.1), PENCIL, WHITE, 0.4, 0.02),
    Sample("H_sideways.jpg", 32, (300, 200), pen=BLUE, paper=CREAM, grain=0.02),
    Sample("H_small.png", 33, (24, 20), 1, 0.9, mode="L", width=0.1),
    Sample("I_serif.png", 34, (70, 110), mode="L"),
    Sample("J_ink.webp", 35, (256, 256), pen=(60, 20, 90), paper=CREAM),
    Sample("K_KRAFT.JPG", 36, (500, 500), pen=(40, 28, 20), paper=KRAFT, shading=0.25, grain=0.04),
    Sample("L_night.png", 37, (128, 128), pen=(250, 220, 90), paper=NIGHT),
    Sample("M_sticker.gif", 38, (140, 120), pen=RED, mode="P transparent"),
    Sample("N_float.tif", 39, (64, 64), mode="F"),
    Sample("N_script.png", 40, (200, 160), 1, pen=(0, 90, 60)),
    Sample("O_round.bmp", 41, (90, 90), pen=BLUE),
    Sample("P_strip.png", 42, (600, 90), 0, 0.85, (-0.35, 0), mode="L"),
    Sample("Q_card.jpg", 43, (220, 300), 0, 0.75, pen=(20, 20, 20), paper=CREAM, shading=0.35),
    Sample("R_pixels.ppm", 44, (32, 32), 0, 0.8, width=0.1),
    Sample("S_wall.jpg", 45, (480, 640), 0, 0.8, (0, 0), WHITE, (150, 70, 60), 0.3, 0.05, 1.0),
    Sample("T_dark.png", 46, (110, 110), pen=(120, 200, 255), paper=NIGHT, mode="P"),
    Sample("T_script.png", 47, (90, 130), 1, mode="L"),
    Sample("U_grey.png", 48, (72, 72), pen=(120, 120, 120), paper=(190, 190, 190), mode="LA"),
    Sample("V_tick.png", 49, (2000, 1000), 0, 0.6, (0.2, 0), mode="P", width=0.05),
    Sample("W_fat.png", 50, (150, 130), 0, 0.85, width=0.15, mode="L"),
    Sample("X_ballot.png", 51, (40, 40), 0, 0.75, pen=BLUE),
    Sample("Y_script.jpg", 52, (130, 180), 2, pen=BLUE, paper=CREAM, grain=0.02),
    Sample("Z_bar.png", 53, (100, 100), 1, mode="L"),
]


def colour(coverage: np.ndarray, sample: Sample) -> np.ndarray:
    """Lay a sample's ink (height, width) on its paper: (height, width, 3) uint8."""
    rng, (width, height) = np.random.default_rng(sample.writer), sample.size

    def noise(cells: int) -> np.ndarray:  # smooth, in about [-1, 1]
        coarse = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
        return np.asarray(coarse.resize(sample.size, Image.Resampling.BICUBIC))

    if sample.grain:  # a dry line lets the paper through
        coverage = coverage * (1 - 2 * sample.grain * np.abs(noise(40)))
    ink = coverage[..., None]
    picture = ink * sample.pen + (1 - ink) * np.array(sample.paper, np.float32)
    if sample.blur:
        blurred = Image.fromarray(np.uint8(picture)).filter(ImageFilter.GaussianBlur(sample.blur))
        picture = np.asarray(blurred, np.float32)
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    angle, phase = rng.uniform(0, 2 * math.pi, 2)  # the light falls off to one side
    wave = np.sin(1.3 * (x * math.cos(angle) + y * math.sin(angle)) + phase)
    light = (0.5 + 0.5 * wave) * (1 - 0.25 * (x * x + y * y))
    picture = picture * (1 - sample.shading * (1 - light[..., None]))
    picture += 255 * sample.grain * noise(max(sample.size) // 3 + 2)[..., None]
    return np.uint8(np.clip(np.round(picture), 0, 255))


def sample_picture(sample: Sample) -> Image.Image:
    """Draw a sample, in the mode that its file will have."""
    writer, longest = hand(sample.writer, sample.width), sample.fill * min(sample.size)
    options = {"form": sample.form, "longest": longest, "offset": sample.offset}
    coverage = ink(sample.name[0], writer, sample.size, **options)
    if sample.mode == "I;16":
        return Image.fromarray(np.uint16(65535 * (1 - coverage)))
    if sample.mode == "F":
        return Image.fromarray(1 - coverage)
    if sample.mode == "RGBA":  # all the ink, and nothing but ink, is opaque
        picture = Image.new("RGB", sample.size, sample.pen)
        picture.putalpha(Image.fromarray(np.uint8(255 * coverage)))
        return picture
    picture = Image.fromarray(colour(coverage, sample))
    if sample.mode[0] != "P":
        return picture.convert(sample.mode, dither=Image.Dither.NONE)
    picture = picture.quantize(8)
    if "transparent" in sample.mode:
        picture.info["transparency"] = picture.getpixel((0, 0))
    return picture


def write_samples(folder: Path) -> None:
    """Draw every sample picture into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for sample in SAMPLES:
        picture = sample_picture(sample)
        options = {"quality": 70} if sample.name.lower().endswith("jpg") else {"optimize": True}
        if "sideways" in sample.name:  # its EXIF block tells to turn it by 90 degrees clockwise
            picture, options["exif"] = picture.transpose(Image.Transpose.ROTATE_90), Image.Exif()
            options["exif"][0x0112] = 6
        if "transparency" in picture.info:
            options["transparency"] = picture.info["transparency"]
        picture.save(folder / sample.name, **options)


if __name__ == "__main__":
    write_samples(Path(sys.argv[1]))
