"""Draw the figures of the documentation: ``python docs/make_figures.py`` writes docs/figures/*.svg.

The layout figures are computed from ``tritern_kernels.formats``: what they show is what ``pack`` does.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path

import torch

from tritern_kernels import ATOM, formats

FOLDER = Path(__file__).parent / "figures"
LIGHT = {
    "ground": "#ffffff", "ink": "#1f2328", "soft": "#59636e", "plain": "#f1f3f5",
    "s0": "#a9cdfb", "s1": "#a8dfb8", "s2": "#fbdc8e", "s3": "#f2b8cf",
}  # fmt: skip
DARK = {
    "ground": "#0d1117", "ink": "#f0f3f6", "soft": "#a4adb8", "plain": "#262c36",
    "s0": "#1f5796", "s1": "#1f6b3e", "s2": "#775c0c", "s3": "#87345a",
}  # fmt: skip


def _style(colours: dict[str, str]) -> str:
    rules = [f".{name}{{fill:{colour}}}" for name, colour in colours.items()]
    rules.append(f".edge{{stroke:{colours['soft']};stroke-width:1;fill:none}}")
    rules.append(f".thick{{stroke:{colours['ink']};stroke-width:2;fill:none}}")
    return "".join(rules)


class Figure:
    """An SVG of rectangles, words and arrows, in units of pixels, that follows the reader's colour scheme."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def text(
        self, x: float, y: float, words: str, *, size: int = 14, kind: str = "ink", anchor: str = "middle",
        mono: bool = False, bold: bool = False,
    ) -> None:  # fmt: skip
        """Words with their base line at y; ``\\n`` starts a new line."""
        family = "monospace" if mono else "sans-serif"
        weight = ' font-weight="bold"' if bold else ""
        for i, line in enumerate(words.split("\n")):
            self.parts.append(
                f'<text class="{kind}" x="{x:g}" y="{y + 1.3 * size * i:g}" font-size="{size}" '
                f'font-family="{family}" text-anchor="{anchor}"{weight}>{escape(line)}</text>'
            )

    def note(
        self, x: float, y: float, *lines: str, size: int = 13, kind: str = "soft", bold: bool = False
    ) -> None:
        """Lines of words that start at x."""
        self.text(x, y, "\n".join(lines), size=size, kind=kind, anchor="start", bold=bold)

    def box(
        self, x: float, y: float, width: float, height: float, words: str = "", *, kind: str = "plain",
        size: int = 13, mono: bool = False, thick: bool = False,
    ) -> None:  # fmt: skip
        """A rectangle with words in its middle."""
        place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3"'
        self.parts.append(f'<rect class="{kind}" {place}/>')
        self.frame(x, y, width, height, "thick" if thick else "edge")
        lines = words.count("\n")
        if words:
            self.text(
                x + width / 2, y + height / 2 + 0.36 * size - 0.65 * size * lines, words, size=size, mono=mono
            )

    def frame(self, x: float, y: float, width: float, height: float, kind: str = "thick") -> None:
        """The outline of a rectangle."""
        place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3"'
        self.parts.append(f'<rect class="{kind}" {place}/>')

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line through points with a head at the last."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.parts.append(f'<polyline class="edge" points="{path}"/>')
        (x0, y0), (x, y) = points[-2:]
        dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
        head = [
            (x, y),
            (x - 8 * dx - 4 * dy, y - 8 * dy - 4 * dx),
            (x - 8 * dx + 4 * dy, y - 8 * dy + 4 * dx),
        ]
        self.parts.append(f'<polygon class="soft" points="{" ".join(f"{a:g},{b:g}" for a, b in head)}"/>')

    def svg(self) -> str:
        """The file's content."""
        return "\n".join(
            [
                '<svg xmlns="http://www.w3.org/2000/svg" role="img" '
                f'viewBox="0 0 {self.width} {self.height}">',
                f"<title>{escape(self.title)}</title>",
                f"<style>{_style(LIGHT)}@media(prefers-color-scheme:dark){{{_style(DARK)}}}</style>",
                f'<rect class="ground" width="{self.width}" height="{self.height}" rx="8"/>',
                *self.parts,
                "</svg>\n",
            ]
        )


def places() -> dict[tuple[int, int], int]:
    """Which weight k of an atom lies in (byte, slab), read off ``pack``."""
    packed = formats.pack(torch.eye(ATOM, dtype=torch.int8))  # row k holds +1, bits 01, at k
    return {(int(b), int(packed[k, b]).bit_length() // 2): k for k, b in packed.nonzero().tolist()}


def packed_word() -> Figure:
    """One 32-bit word, one shift and one AND: four int8 weights."""
    f = Figure(860, 440, "A 32-bit word of 16 two-bit codes; one shift and one AND give four int8 weights")
    where = places()
    codes = [1, 0, -1, 1, 0, 1, 1, -1, -1, 1, 0, 0, 1, -1, 1, 0]
    cells = [(byte, slab) for byte in (3, 2, 1, 0) for slab in (3, 2, 1, 0)]  # bit 31 at the left
    code = dict(zip(cells, codes))
    left, width = 46, 48
    f.text(left, 28, "one 32-bit word of packed weights, bit 31 at the left", anchor="start", bold=True)
    for byte in (3, 2, 1, 0):
        f.text(left + (3 - byte) * 4 * width + 2 * width, 50, f"byte {byte}", size=12, kind="soft")

    def row(y: float, content: Iterable[tuple[int, int] | None], labels: bool = False) -> None:
        for i, cell in enumerate(content):
            x = left + i * width
            if cell is None:
                f.box(x, y, width, 30, "00", mono=True)
            else:
                f.box(x, y, width, 30, f"{code[cell] & 3:02b}", kind=f"s{cell[1]}", mono=True)
                if labels:
                    f.text(x + width / 2, y + 46, f"{code[cell]:+d}" if code[cell] else "0", size=12)
                    f.text(x + width / 2, y + 62, f"k={where[cell]}", size=11, kind="soft")
        for byte in range(4):
            f.frame(left + byte * 4 * width, y, 4 * width, 30)

    row(58, cells, labels=True)
    f.text(left, 156, "w << 6: slab 0 of each byte comes to the top of its byte", anchor="start", bold=True)
    row(168, [*cells[3:], None, None, None])
    f.text(left, 232, "& 0xC0C0C0C0: nothing else is left", anchor="start", bold=True)
    row(244, [c if c and c[1] == 0 else None for c in [*cells[3:], None, None, None]])
    f.text(
        left,
        308,
        "read as int8: 64 times the code, four weights ready for the tensor core",
        anchor="start",
        bold=True,
    )
    for i, byte in enumerate((3, 2, 1, 0)):
        cell = byte, 0
        f.box(
            left + i * 4 * width,
            320,
            4 * width,
            34,
            f"{64 * code[cell]}",
            kind="s0",
            mono=True,
            size=15,
            thick=True,
        )
        f.text(left + (i * 4 + 2) * width, 372, f"k={where[cell]}", size=11, kind="soft")
    f.note(
        left,
        404,
        "<< 4, << 2 and no shift, each with the same AND, give slabs 1, 2 and 3.",
        "The factor 64 leaves in the epilogue, as 1/64 within the scale of the output row.",
    )
    return f


def atom() -> Figure:
    """Which k lies where among the 32 bytes of an atom."""
    f = Figure(900, 262, "128 weights of a row in 32 bytes: which k lies in which byte and slab")
    where = places()
    left, top, width, height = 62, 56, 25.5, 30
    f.text(
        14,
        24,
        "an atom: 128 weights of one row in 32 bytes; each number is the k that lies there",
        anchor="start",
        bold=True,
    )
    f.text(left - 8, top - 8, "byte", size=11, kind="soft", anchor="end")
    for byte in range(32):
        f.text(left + (byte + 0.5) * width, top - 8, str(byte), size=11, kind="soft")
        for slab in range(4):
            f.box(
                left + byte * width,
                top + slab * height,
                width,
                height,
                str(where[byte, slab]),
                kind=f"s{slab}",
                size=11,
            )
    for slab in range(4):
        f.text(left - 8, top + (slab + 0.62) * height, f"slab {slab}", size=12, anchor="end")
    for word in range(8):
        f.frame(left + word * 4 * width, top, 4 * width, 4 * height)
    order = formats.to_packed_order(torch.arange(ATOM)[None])[0].tolist()
    shown = ", ".join(map(str, order[:6])), ", ".join(map(str, order[32:36]))
    f.note(
        left,
        206,
        "Slab j is bits 2j and 2j + 1 of a byte; a frame is one 32-bit word. int8 activations are stored in",
        f"the order of the rows above ({shown[0]}, ... then {shown[1]}, ...), by the kernel that quantizes",
        "them: a slab meets 32 neighbours, and no weight has to be moved.",
    )
    return f


def gemm_tile() -> Figure:
    """One program of the int8 GEMM."""
    f = Figure(900, 430, "One tile of the GEMM: the weights on the left, out^T = W x^T")
    f.text(20, 28, "one tile of outᵀ = W xᵀ: the weights are the left operand", anchor="start", bold=True)
    f.box(20, 150, 90, 210)
    f.box(20, 210, 90, 70, kind="s0")
    f.box(50, 210, 30, 70, thick=True, kind="s0")
    f.text(65, 380, "W packed\nuint8 [N, K / 4]\nglobal memory", size=12)
    f.text(65, 142, "K / 4 bytes", size=11, kind="soft")
    f.arrow((80, 245), (158, 245))
    f.box(160, 210, 52, 70, "packed", kind="s0", size=11)
    f.text(186, 300, "shared\nmemory", size=12)
    f.arrow((212, 245), (268, 245))
    f.text(240, 236, "shift,\n", size=12)
    f.text(240, 262, "AND", size=12)
    f.box(270, 210, 190, 70, "64 · codes, int8\n[BLOCK_N, BLOCK_K]", kind="s0")
    f.text(365, 300, "registers only: the unpacked\nweights are never stored", size=12)
    f.box(500, 60, 110, 128, "x_q int8\n[BLOCK_K,\nBLOCK_M]", kind="s1")
    f.text(488, 100, "shared\nmemory", size=12, anchor="end")
    f.text(
        626,
        84,
        "xᵀ, int8: one column a token,\nK in packed order, quantized\nby the kernel before",
        size=12,
        anchor="start",
    )
    f.box(500, 210, 110, 70, "int32 sums\n[BLOCK_N,\nBLOCK_M]", kind="s2", thick=True)
    f.arrow((460, 245), (498, 245))
    f.arrow((555, 188), (555, 208))
    f.text(555, 300, "registers; exact, so the\ntile does not matter", size=12)
    f.arrow((610, 245), (648, 245))
    f.box(
        650,
        200,
        230,
        90,
        "epilogue, once a tile:\nsum · scale_x[m] · scale[n] / 64\n+ bias[n], GELU if asked for",
        kind="s3",
    )
    f.arrow((765, 290), (765, 338))
    f.text(775, 320, "transposed", size=12, anchor="start")
    f.box(650, 340, 230, 34, "y [M, N] in the dtype of x")
    f.text(180, 404, "the loop goes along K, one BLOCK_K at a time", size=12, kind="soft", anchor="start")
    f.arrow((270, 386), (460, 386))
    return f


def scales() -> Figure:
    """Where the two scales of a layer are applied."""
    f = Figure(900, 330, "Scales of a layer: one per token, one per output row, applied to exact int32 sums")
    f.text(20, 28, "one layer with int8 activations", anchor="start", bold=True)
    f.box(20, 60, 130, 56, "x [M, K]\nfloat")
    f.arrow((150, 88), (188, 88))
    f.box(190, 60, 170, 56, "per token m:\nabsmax / 127", kind="s1")
    f.arrow((360, 76), (448, 76))
    f.text(404, 69, "x_q int8", size=12)
    f.arrow((360, 106), (400, 106), (400, 290), (788, 290), (788, 252))
    f.text(420, 284, "scale_x [M] float32", size=12, anchor="start")
    f.box(20, 170, 130, 56, "W [N, K]\nfloat")
    f.arrow((150, 198), (188, 198))
    f.box(190, 170, 170, 56, "once, when patched:\nthe rule (mse, ...)", kind="s0")
    f.arrow((360, 182), (520, 182), (520, 118))
    f.text(460, 175, "codes, two bits", size=12)
    f.arrow((360, 214), (656, 214))
    f.text(460, 208, "scale [N] float32", size=12)
    f.box(450, 50, 190, 66, "int32 sums over k of\nx_q[m, k] · codes[n, k]\nexact", kind="s2")
    f.arrow((640, 84), (788, 84), (788, 158))
    f.box(
        658,
        160,
        222,
        90,
        "y[m, n] = sum · scale_x[m]\n· scale[n] + bias[n]\nfloat32, then x's dtype",
        kind="s3",
        size=12,
    )
    return f


def distillation() -> Figure:
    """One training step."""
    f = Figure(900, 470, "A distillation step: student and frozen teacher on the same texts")
    f.text(20, 28, "one step of distillation", anchor="start", bold=True)
    f.box(20, 200, 120, 60, "2 batches of 32\ntexts, no labels")
    f.arrow((140, 215), (170, 215), (170, 110), (198, 110))
    f.arrow((140, 245), (170, 245), (170, 330), (198, 330))
    f.box(200, 70, 300, 80, "teacher: the model as it was,\nfrozen, full precision")
    f.box(200, 240, 320, 170)
    f.text(360, 262, "student: the layers as they will be served", size=13, bold=True)
    f.text(
        360, 284, "first 30 % of the steps: codes blended with W,\nthen packed codes and int8 activations;\n"
        "word embeddings rounded to int8 throughout", size=12,
    )  # fmt: skip
    f.box(215, 342, 130, 50, "latent W and\nscale, float32", kind="s0", size=12)
    f.arrow((345, 367), (373, 367))
    f.box(375, 342, 130, 50, "codes: sign(w)\nif |w| > scale / 2", kind="s0", size=12)
    f.arrow((500, 110), (690, 110), (690, 138))
    f.arrow((520, 310), (690, 310), (690, 272))
    f.text(528, 100, "vectors, hidden states", size=12, anchor="start")
    f.text(528, 302, "vectors, hidden states", size=12, anchor="start")
    f.box(580, 140, 300, 130, kind="s2")
    f.note(600, 162, "1", "0.2", "3", kind="ink", bold=True)
    f.note(634, 162, "1 − cosine of the vectors", "KL of similarities within the batch", kind="ink")
    f.note(634, 196, "squared distance of hidden states", kind="ink")
    f.note(
        600,
        226,
        "each scaled on the first batch so that its",
        "gradient starts as long as the others'",
        size=12,
    )
    f.arrow((800, 270), (800, 440), (280, 440), (280, 394))
    f.text(530, 432, "gradients to W, scale and all else", size=12, anchor="start", kind="soft")
    f.text(530, 458, "straight through both roundings, inside the clip", size=12, anchor="start", kind="soft")
    return f


FIGURES = {
    "packed-word": packed_word,
    "atom": atom,
    "gemm-tile": gemm_tile,
    "scales": scales,
    "distillation": distillation,
}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        (FOLDER / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")
