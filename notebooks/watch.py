"""Watch one or two runs write, side by side in the terminal: what each forward pass added stands out.

    python notebooks/watch.py out/diffusion --steps=32
    python notebooks/watch.py out/ar out/diffusion --prompt="Fellow citizens"

All flags are those of sample.py. Where the output is no terminal, the texts stand side by side at once.
"""

import codecs
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
from model import UserError  # noqa: E402


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


def frame(text, cells, blank, width, now):
    """A layout during forward pass `now`, in lines of `width` cells: what is to come blank, new inverse."""
    painted = []
    for shown, size, since in cells:
        if since > now:
            shown = f"\033[2m{blank * size}\033[m"
        elif since == now > 0:
            shown = f"\033[7m{shown}\033[m"
        painted.append(shown if size else "")
    lines = re.finditer(rf"(.{{1,{width}}}\Z|.{{0,{width - 1}}}\s|.{{1,{width}}})(?!\0)", text)  # at spaces
    return ["".join(painted[m.start():m.end()]) + " " * (width - len(m[0])) for m in lines]


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


def watch(argv):
    """What the command line asks for."""
    runs = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    if len(runs) > 2:
        raise UserError(f"{len(runs)} runs do not fit side by side: name one or two")
    args = sample.parse(argv[len(runs):])
    runs = runs or [args.run]
    results = [sample.generate(args, run, alone=len(runs) == 1) for run in runs]
    for record, *_ in results:
        name = f"{record['run']}/{record['checkpoint']}.pt"
        print(f"{name}: {record['objective']}, step {record['step']:,}")
    for row in range(args.num_samples):
        print(f"----- {row + 1}")
        play(results, row, sys.stdout.isatty())


def main(argv=None):
    return sample.told(watch, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None where it is closed
    sys.stdout.reconfigure(errors="replace")  # by one cell
    sys.exit(main())
