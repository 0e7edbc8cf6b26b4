"""Watch one or two runs write, side by side in the terminal: what each forward pass added stands out.

    python notebooks/watch.py out/diffusion --steps=32
    python notebooks/watch.py out/ar out/diffusion --prompt="Fellow citizens"

All flags are those of sample.py. Where the output is no terminal, the texts stand side by side at once. With
--gif=FILE the first text of each is drawn as an animation instead, one frame for each forward pass. With
--half=FILE no text is written but a checkpoint: the best weights of the run in half precision, and no more.
These were made so:

    python notebooks/watch.py out/preset-ar-s1 --half=notebooks/checkpoints/ar.pt
    python notebooks/watch.py out/preset-diffusion-s1 --half=notebooks/checkpoints/diffusion.pt
    python notebooks/watch.py notebooks/checkpoints/ar.pt notebooks/checkpoints/diffusion.pt \\
        --prompt="Fellow citizens" --length=128 --num_samples=1 --temperature=0.6 --seed=11 \\
        --gif=notebooks/results/writing.gif

(of the seeds 1 to 18 the one whose texts are the easiest to read).
"""

import argparse
import codecs
import html
import io
import itertools
import os
import re
import shutil
import sys
import time
import unicodedata
from pathlib import Path

from wcwidth import wcswidth, wcwidth

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sample  # noqa: E402
from model import UserError, load_checkpoint, save_checkpoint, write_atomic  # noqa: E402
from sampling import expanded  # noqa: E402

PAGE, CELL = 1680, (18, 42)  # of a GIF, in pixels: its width, and the width and height of a character
TO_COME = {"ar": "white", "diffusion": "#F7D9C4"}  # what is not written yet: nothing, or a pale block


def characters(tokenizer, ids, when):
    """Yield each character of a text, and the forward pass that wrote the last of its bytes. CRLF: LF."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder, encoding, since = io.IncrementalNewlineDecoder(decoder, True), sys.stdout.encoding or "utf-8", 0
    for piece, n in [*zip((tokenizer.pieces[i] for i in ids), when, strict=True), (b"", 0)]:
        since = max(since, n) if decoder.getstate()[0] else n  # a character may begin in the token before
        for c in decoder.decode(piece, final=not piece):
            yield c.encode(encoding, "replace").decode(encoding), since


def placed(c, column):
    """What stands for a character at a column: text whose cells do not depend on the terminal."""
    if c == "\t":
        return " " * (8 - column % 8)
    if unicodedata.category(c) == "Zs":
        return " " * wcwidth(c)  # so that a line can end at any kind of space
    if unicodedata.category(c) == "Cf" or "\ufe00" <= c <= "\ufe0f" or "\U0001f3fb" <= c <= "\U0001f3ff":
        return ""  # what joins or turns its neighbours, and the variants and skin colours of emoji
    half_a_flag = "\U0001f1e6" <= c <= "\U0001f1ff"
    return "\ufffd" if half_a_flag or not (c.isprintable() or c == "\n") else c  # nothing steers the terminal


def layout(tokenizer, ids, when):
    """A text of one character for each cell, and of each cell [what to print, its width, since when].

    The second cell of a wide character is "\\0" in the text. Marks go with what is before.
    """
    text, cells, word = "", [], ""
    for character, since in characters(tokenizer, ids, when):
        for c in placed(character, len(text) - text.rfind("\n") - 1):
            if wcwidth(c) == 0 and text[-1:] in ("", "\n"):
                c = "\ufffd"  # a mark with nothing before it
            word = c if c in " \n" else word.strip("\n")[-16:] + c
            width = 1 if c in " \n" else wcswidth(word) - wcswidth(word[:-1])  # 0: some letters join, too
            if wcwidth(c) == 0 or width == 0:
                base = cells[len(text.rstrip("\0")) - 1]
                base[:] = base[0] + c, base[1] + width, max(base[2], since)
                second = width
            else:
                cells.append([c.replace("\n", " "), width, since])
                text += c
                second = width - 1
            cells += [["", 0, since]] * second
            text += "\0" * second
    return text, cells


def wrap(text, width):
    """The lines of a layout's text, as matches of at most `width` cells that end at spaces if they can."""
    return re.finditer(rf"(.{{1,{width}}}\Z|.{{0,{width - 1}}}\s|.{{1,{width}}})(?!\0)", text)


def frame(text, cells, blank, width, now):
    """A layout during forward pass `now`, in lines of `width` cells: what is to come blank, new inverse."""
    painted = []
    for shown, size, since in cells:
        if since > now:
            shown = f"\033[2m{blank * size}\033[m"
        elif since == now > 0:
            shown = f"\033[7m{shown}\033[m"
        painted.append(shown if size else "")
    return ["".join(painted[m.start():m.end()]) + " " * (width - len(m[0])) for m in wrap(text, width)]


def play(results, row, animate):
    """Print text `row` of the results side by side; if asked, as it develops, for ten seconds at most."""
    size, last = shutil.get_terminal_size(), max(int(when[row].max()) for *_, when in results)
    width = max(2, (size.columns + 2) // len(results) - 3)
    blank = {"ar": " ", "diffusion": "░"}  # for what is to come
    texts = [(*layout(tokenizer, ids[row].tolist(), when[row].tolist()), blank[record["objective"]])
             for record, tokenizer, ids, when in results]
    for now in range(0 if animate else last + 1, last + 2):  # after the last nothing is new any more
        columns = [frame(*text, width, now) for text in texts]
        lines = [" │ ".join(line) for line in itertools.zip_longest(*columns, fillvalue=" " * width)]
        if now <= last:
            lines = lines[:size.lines - 1]  # the next is drawn over this, but not over what has scrolled away
            print(*lines, sep="\n", end=f"\n\033[{len(lines)}A", flush=True)
            time.sleep(min(0.4, 10 / last))
    print(*lines, sep="\n")


def paint(drawing, cells, line, corner, now, objective, font):
    """Draw one line (a match of wrap) of a layout at a corner (x, y) as forward pass `now` leaves it.

    The prompt is grey, what is new stands on the objective's colour, what is masked is a pale block.
    """
    x, y = corner
    for i in range(*line.span()):
        shown, size, since = cells[i]
        ends = i + 1 == line.end() or cells[i + 1][2] != since  # the token: leave a gap between two masks
        box = (x, y + 2, x + CELL[0] * size - 1 - 4 * ends, y + CELL[1] - 3)
        if since > now:
            drawing.rectangle(box, fill=TO_COME[objective])
        elif since == now > 0:
            drawing.rectangle(box, fill=sample.COLOURS[objective])
            drawing.text((x, y + CELL[1] // 2), shown, "white", font, "lm")
        else:
            drawing.text((x, y + CELL[1] // 2), shown, "#222222" if since else "#777777", font, "lm")
        x += CELL[0] * size


def write_gif(path, results):
    """Animate the first text of one or two results side by side: one frame for each forward pass, and a rest.

    840 pixels wide in a page, drawn at twice that for sharp displays. The same texts give the same file.
    """
    from matplotlib import get_data_path
    from PIL import Image, ImageColor, ImageDraw, ImageFont  # matplotlib needs it, and brings the fonts
    folder = Path(get_data_path()) / "fonts" / "ttf"
    plain, bold = (ImageFont.truetype(folder / f"DejaVuSans{kind}.ttf", 30) for kind in ("Mono", "-Bold"))
    width = (PAGE // CELL[0] - 2) // len(results) - 2  # cells of a column: one is free on each side of it
    texts = [layout(tokenizer, ids[0].tolist(), when[0].tolist()) for _, tokenizer, ids, when in results]
    columns = [[*wrap(text, width)] for text, _ in texts]
    last = [max(since for *_, since in cells) for _, cells in texts]
    height, frames = CELL[1] * (max(map(len, columns)) + 3), []
    for now in range(max(last) + 2):  # after the last nothing is new any more
        frames.append(Image.new("RGB", (PAGE, height), "white"))
        drawing = ImageDraw.Draw(frames[-1])
        for side, (lines, (_, cells), (record, *_)) in enumerate(zip(columns, texts, results, strict=True)):
            x, objective = CELL[0] * (2 + side * (width + 2)), record["objective"]
            caption = f"{objective.replace('ar', 'AR')}: {min(now, last[side])} forward passes"
            box = (x, CELL[1] // 2, x + CELL[0] * width, 2 * CELL[1])
            drawing.rectangle(box, fill=sample.COLOURS[objective])
            drawing.text((x + CELL[0], 5 * CELL[1] // 4), caption, "white", bold, "lm")
            for number, line in enumerate(lines):
                corner = (x, (number + 2) * CELL[1] + CELL[1] // 2)
                paint(drawing, cells, line, corner, now, objective, plain)
    inks = ["#222222", "#777777", *sample.COLOURS.values(), *TO_COME.values()]
    shades = Image.new("RGB", (8, len(inks)))  # the palette: each ink in eight steps from white
    for y, ink in enumerate(inks):
        for x in range(8):
            shades.putpixel((x, y), tuple(255 + (c - 255) * x // 7 for c in ImageColor.getrgb(ink)))
    palette = shades.quantize(256)
    first, *rest = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    each = max(20, min(400, 10_000 // max(last)))  # milliseconds
    write_atomic(path, lambda f: first.save(f, "GIF", save_all=True, append_images=rest, loop=0,
                                            duration=[1000, *[each] * (len(rest) - 1), 3000]))
    print(f"{path}: {len(frames)} frames, {path.stat().st_size / 1e6:.2f} MB")


STYLE = """<style>
.unmasking {display: grid; grid-template-columns: 1fr 1fr; gap: 0 1.5em; max-width: 60em; padding: 1em;
  background: white; color: #222; font: 15px/1.5 sans-serif}
.unmasking .control {grid-column: 1 / 3; display: flex; gap: 1em; align-items: center; margin-bottom: 0.5em}
.unmasking input {flex: 1}
.unmasking b {color: var(--colour)}
.unmasking .text {white-space: pre-wrap; font-family: monospace; overflow-wrap: anywhere}
.unmasking .given {color: #777}
.unmasking .new {color: white; background: var(--colour)}
.unmasking .later {color: transparent; background: var(--to-come); box-shadow: inset -2px 0 white}
</style>"""
SCRIPT = """<script>
(function () {
  const box = document.getElementById("NAME");
  const slider = box.querySelector("input"), button = box.querySelector("button");
  let timer = null;
  function kind(when, now) {
    if (when === 0) return "given";
    if (when > now) return "later";
    return when === now ? "new" : "";
  }
  function draw() {
    box.querySelector("output").textContent = slider.value;
    for (const token of box.querySelectorAll("span[data-when]"))
      token.className = kind(Number(token.dataset.when), Number(slider.value));
  }
  function stop() {
    clearInterval(timer);
    timer = null;
    button.textContent = "play";
  }
  function step() {
    if (slider.value === slider.max) return stop();
    slider.stepUp();
    draw();
  }
  button.addEventListener("click", function () {
    if (timer !== null) return stop();
    if (slider.value === slider.max) slider.value = 0;
    draw();
    button.textContent = "pause";
    timer = setInterval(step, 120);
  });
  slider.addEventListener("input", function () { stop(); draw(); });
  draw();
})();
</script>"""


def stepper(name, tokenizer, texts, start=0):
    """HTML, for a notebook or any page, with a slider that steps through how texts were written.

    name: its id in the page; texts: {"ar": (ids (L,), when (L,)), "diffusion": ...}, as the samplers return
    them; start: the forward pass to begin at. It needs no server; without scripts the whole texts are there.
    """
    last, panels = max(int(when.max()) for _, when in texts.values()), []
    for objective, (ids, when) in texts.items():
        parts = itertools.groupby(characters(tokenizer, ids.tolist(), when.tolist()), key=lambda part: part[1])
        spans = [f'<span data-when="{n}">{html.escape("".join(c for c, _ in part))}</span>' for n, part in parts]
        style = f"--colour: {sample.COLOURS[objective]}; --to-come: {TO_COME[objective]}"
        title = objective.replace("ar", "AR")
        panels.append(f'<div style="{style}"><b>{title}</b><div class="text">{"".join(spans)}</div></div>')
    control = (f'<div class="control"><button type="button">play</button>'
               f'<label for="{name}-now">forward pass <output>{start}</output> of {last}</label>'
               f'<input id="{name}-now" type="range" min="0" max="{last}" value="{start}"></div>')
    body = f'<div class="unmasking" id="{name}">{control}{"".join(panels)}</div>'
    return STYLE + body + SCRIPT.replace("NAME", name)


def save_half(run, path):
    """Write the best weights of a run to path in float16, without optimizers and log: a quarter of last.pt.

    model.load_checkpoint reads it, and model.model_from_checkpoint makes float32 of the weights again.
    """
    saved = load_checkpoint(sample.find_checkpoint(run, None))
    if path.resolve().parent == Path(run).resolve():
        raise UserError(f"{path} is in the folder of the run itself: name another place")
    weights = {name: w.half() for name, w in saved.get("average", saved["model"]).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, {"config": saved["config"], "tokenizer": saved["tokenizer"], "model": weights,
                           "state": {"step": saved["state"]["step"]}})
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def watch(argv):
    """What the command line asks for."""
    own = argparse.ArgumentParser(usage="python notebooks/watch.py RUN [RUN] [FLAGS]", add_help=False,
                                  allow_abbrev=False, description=__doc__.split("\n\n")[0])
    own.add_argument("--gif", type=expanded, metavar="FILE", help="play nothing: draw the first text as an animation")
    own.add_argument("--half", type=expanded, metavar="FILE", help="no text: write the best weights, in half precision")
    own.add_argument("-h", "--help", action="store_true", help="this, and sample.py's flags (no --run, --json)")
    files, argv = own.parse_known_args(argv)
    if files.help:
        print(own.format_help())
        sample.parse(["--help"])
    runs = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    if len(runs) > 2:
        raise UserError(f"{len(runs)} runs do not fit side by side: name one or two")
    args = sample.parse(argv[len(runs):])
    runs = runs or [args.run]
    if files.half:
        if len(runs) > 1:
            raise UserError("--half takes one run")
        save_half(runs[0], files.half)
        return
    results = [sample.generate(args, run, alone=len(runs) == 1) for run in runs]
    for record, *_ in results:
        name = f"{record['run']}/{record['checkpoint']}.pt"
        print(f"{name}: {record['objective']}, step {record['step']:,}")
    if files.gif:
        write_gif(files.gif, results)
        return
    for row in range(args.num_samples):
        print(f"----- {row + 1}")
        play(results, row, sys.stdout.isatty())


def main(argv=None):
    return sample.told(watch, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None where it is closed
    sys.stdout.reconfigure(errors="replace")  # by one cell
    sys.exit(main())
