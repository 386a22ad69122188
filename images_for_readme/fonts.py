"""Render fonts drawn from handwriting as labelled pictures, other hands for `train.py --extra`.

    python3 images_for_readme/fonts.py fonts.txt pictures    # npm must be there

fonts.txt: names, one a line, each the npm package @fontsource/NAME (SIL Open Font License). Every
digit and letter, both cases, is drawn once per font: pictures/A/caveat-a.png. What a font lacks,
or draws as it drew the other case, is left out. Neither fonts nor pictures are committed.
"""

import string
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

HEIGHT, MARGIN = 96, 24  # px: of the font, and of paper around a glyph
MISSING = "\U0010fffd"  # a character that no font has


def fetch(names: list[str], folder: Path) -> list[Path]:
    """Return the .woff files, regular weight, of npm's @fontsource packages."""
    packages = [f"@fontsource/{name}" for name in names]
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix"]
    subprocess.run([*command, str(folder), *packages], check=True, stdout=sys.stderr)
    files = folder / "node_modules" / "@fontsource"
    return [files / name / "files" / f"{name}-latin-400-normal.woff" for name in names]


def draw(font: ImageFont.FreeTypeFont, character: str) -> Image.Image:
    """Draw a character in black on white, with paper around it."""
    left, top, right, bottom = font.getbbox(character)
    size = (right - left + 2 * MARGIN, bottom - top + 2 * MARGIN)
    picture = Image.new("L", size, 255)
    ImageDraw.Draw(picture).text((MARGIN - left, MARGIN - top), character, 0, font)
    return picture


def render(file: Path, folder: Path) -> int:
    """Write a font's pictures as folder/CLASS/FONT-CHARACTER.png; return how many."""
    font = ImageFont.truetype(str(file), HEIGHT)
    name, drawn = file.name.partition("-latin-")[0], {bytes(font.getmask(MISSING))}
    for character in string.digits + string.ascii_uppercase + string.ascii_lowercase:
        glyph = bytes(font.getmask(character))
        if any(glyph) and glyph not in drawn:
            (folder / character.upper()).mkdir(parents=True, exist_ok=True)
            draw(font, character).save(folder / character.upper() / f"{name}-{character}.png")
        drawn.add(glyph)
    return len(drawn) - 1


def main() -> None:
    names, folder = Path(sys.argv[1]).read_text().split(), Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as scratch:
        count = sum(render(file, folder) for file in fetch(names, Path(scratch)))
    print(f"{count:,} pictures of {len(names)} fonts in {folder}")


if __name__ == "__main__":
    main()
