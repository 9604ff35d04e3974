"""The demo's level, drawn in code: a bright hall in which every wall has a colour of its own, as a WAD for ZDoom."""

import io
import math
import struct

import numpy as np
from PIL import Image

MAP = "map01"
HEIGHT = TILE = 128  # of the hall and of a texture: map units, of which a pixel is one
COLOURS = {  # RGB; first the walls' eight, in the order in which they are passed
    "RED": (214, 64, 58), "ORANGE": (236, 134, 46), "YELLOW": (240, 202, 62), "GREEN": (96, 178, 74),
    "TEAL": (40, 168, 160), "BLUE": (58, 110, 206), "VIOLET": (132, 86, 190), "PINK": (228, 116, 164),
    "CREAM": (236, 226, 204), "SKY": (164, 206, 232), "WARM": (196, 164, 136), "COOL": (140, 164, 186),
    "SAGE": (150, 176, 140), "LILAC": (174, 156, 188), "GREY": (128, 128, 128),
}  # fmt: skip
# Zones of the floor: its colour, that of the pillar and of the disc in the niche, the pillar's place, and the outline
# clockwise: corners, each with the wall that begins there. "" is open to the next zone, DISC is the back of a niche.
ZONES = (
    ("WARM", "BLUE", (-256, 192), (
        (-512, 0, "RED"), (-512, 384, "ORANGE"), (-384, 384, "CREAM"), (-384, 480, "DISC"), (-256, 480, "CREAM"),
        (-256, 384, "ORANGE"), (0, 384, ""), (0, 0, ""))),
    ("SAGE", "PINK", (256, 192), (
        (0, 384, "YELLOW"), (512, 384, "GREEN"), (512, 256, "CREAM"), (608, 256, "DISC"), (608, 128, "CREAM"),
        (512, 128, "GREEN"), (512, 0, ""), (0, 0, ""))),
    ("COOL", "ORANGE", (256, -192), (
        (512, 0, "TEAL"), (512, -384, "BLUE"), (384, -384, "CREAM"), (384, -480, "DISC"), (256, -480, "CREAM"),
        (256, -384, "BLUE"), (0, -384, ""), (0, 0, ""))),
    ("LILAC", "GREEN", (-256, -192), (
        (0, -384, "VIOLET"), (-512, -384, "PINK"), (-512, -256, "CREAM"), (-608, -256, "DISC"), (-608, -128, "CREAM"),
        (-512, -128, "PINK"), (-512, 0, ""), (0, 0, ""))),
)  # fmt: skip
PILLAR_RADIUS = 48


def random_start(rng: np.random.Generator, clear: int = 64) -> tuple[int, int]:
    """A place (x, y) in map units that is at least `clear` from every wall and pillar."""
    while True:
        x, y = int(rng.integers(clear - 512, 513 - clear)), int(rng.integers(clear - 384, 385 - clear))
        if all(math.dist((x, y), pillar) > PILLAR_RADIUS + clear for _, _, pillar, _ in ZONES):
            return x, y


def write_wad() -> bytes:
    """The level as a WAD that holds all that is seen: the palette, the textures and the map MAP01."""
    colours, colormap = _palette()
    pictures = [(name, _png(picture)) for name, picture in textures().items()]
    lumps = [("PLAYPAL", colours.tobytes()), ("COLORMAP", colormap.tobytes()), ("TX_START", b""), *pictures]
    lumps += [("TX_END", b""), (MAP.upper(), b""), ("TEXTMAP", _map().encode()), ("ENDMAP", b"")]
    directory, data = b"", b""
    for name, lump in lumps:
        directory += struct.pack("<ii8s", 12 + len(data), len(lump), name.encode())
        data += lump
    return struct.pack("<4sii", b"PWAD", len(lumps), 12 + len(data)) + data + directory


def shade(colour: str, level: float | np.ndarray) -> np.ndarray:
    """RGB (... 3) for each level (...): 0 is black, 1 the colour itself, 2 white."""
    rgb, level = np.array(COLOURS[colour]), np.asarray(level)[..., None]
    return np.minimum(level, 1) * rgb + np.maximum(level - 1, 0) * (255 - rgb)


def textures() -> dict[str, np.ndarray]:
    """Pictures (h w 3) uint8 by name: walls, pillars (P_), backs of niches with a disc (D_), floors (F_), CEILING."""
    # The renderer's rounding shows rows beyond the wall; were the height no power of two, it would show other memory.
    y, x = np.mgrid[: 2 * HEIGHT, :TILE] + 0.5
    plain = np.select([(y < 20) | (y > HEIGHT + 16), y > HEIGHT - 20], [1.5, 0.5], 1.0)
    pilasters = np.where((plain == 1) & (abs(x - TILE / 2) > TILE / 2 - 10), 0.75, plain)
    disc = ((x - TILE / 2) ** 2 + (y - 62) ** 2 < 34**2)[..., None]
    tiles = np.where((np.arange(2 * TILE) < TILE)[:, None] == (np.arange(2 * TILE) < TILE), 1.1, 0.86)
    made = {"CEILING": shade("SKY", np.ones((TILE, TILE)))}
    made |= {colour: shade(colour, pilasters) for colour in COLOURS}
    made |= {f"P_{colour}": shade(colour, plain) for colour in COLOURS}
    for floor, accent, _, _ in ZONES:
        made[f"D_{accent}"] = np.where(disc, shade(accent, 1), shade("CREAM", plain))
        made[f"F_{floor}"] = shade(floor, tiles)
    return {name: picture.round().astype(np.uint8) for name, picture in made.items()}


def _palette() -> tuple[np.ndarray, np.ndarray]:
    """The 256 colours that the renderer has (256 3) uint8, and what each becomes in 34 levels of light (34 256) uint8.

    Its own palette is browns and greys for a third: our hues would fall into few steps.
    """
    ramps = [shade(colour, np.linspace(0.15, 1.6, 17)) for colour in COLOURS]
    colours = np.concatenate([np.zeros((1, 3)), *ramps])
    lit = [colours * max(0.0, 1 - level / 32) for level in range(34)]
    nearest = [np.argmin(((row[:, None] - colours) ** 2).sum(-1), axis=1) for row in lit]
    return colours.round().astype(np.uint8), np.array(nearest, dtype=np.uint8)


def _png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def _map() -> str:
    """UDMF. A line's sector is on its right: outlines run clockwise, pillars counter-clockwise."""
    edges: dict[tuple[tuple[int, int], tuple[int, int]], tuple[int, str]] = {}
    for sector, (_, accent, (x, y), outline) in enumerate(ZONES):
        turns = [math.tau * (i + 0.5) / 8 for i in range(8)]
        pillar = [(x + round(PILLAR_RADIUS * math.cos(a)), y + round(PILLAR_RADIUS * math.sin(a))) for a in turns]
        loops = [[(corner[:2], corner[2].replace("DISC", f"D_{accent}")) for corner in outline]]
        loops += [[(corner, f"P_{accent}") for corner in pillar]]
        for loop in loops:
            for (here, wall), (there, _) in zip(loop, loop[1:] + loop[:1], strict=True):
                edges[here, there] = sector, wall
    corners = {corner: i for i, corner in enumerate(dict.fromkeys(here for here, _ in edges))}
    sides = {edge: i for i, edge in enumerate(edges)}
    blocks = ['namespace = "zdoom";']
    blocks += [f"vertex {{ x = {x}; y = {y}; }}" for x, y in corners]
    for sector, wall in edges.values():
        blocks.append(f'sidedef {{ sector = {sector}; texturemiddle = "{wall or "-"}"; }}')
    for (here, there), side in sides.items():
        back = sides.get((there, here))
        kind = "blocking = true;" if back is None else f"twosided = true; sideback = {back};"
        if back is None or side < back:
            blocks.append(f"linedef {{ v1 = {corners[here]}; v2 = {corners[there]}; sidefront = {side}; {kind} }}")
    for floor, *_ in ZONES:
        look = f'texturefloor = "F_{floor}"; textureceiling = "CEILING"; lightlevel = 240;'
        blocks.append(f"sector {{ heightfloor = 0; heightceiling = {HEIGHT}; {look} }}")
    skills = " ".join(f"skill{i} = true;" for i in range(1, 6))
    blocks.append(f"thing {{ x = 0.0; y = 0.0; type = 1; {skills} single = true; coop = true; dm = true; }}")
    return "\n".join(blocks)
