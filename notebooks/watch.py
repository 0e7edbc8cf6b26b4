"""Watch one or two runs write, side by side in the terminal: what each forward pass added stands out.

    python notebooks/watch.py out/diffusion --steps=32
    python notebooks/watch.py out/ar out/diffusion --prompt="Fellow citizens"

All flags are those of sample.py. Where the output is no terminal, the texts stand side by side at once.
"""

import codecs
import itertools
import re
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sample  # noqa: E402
from model import UserError  # noqa: E402
from prepare import DataError  # noqa: E402


def frame(record, tokenizer, ids, when, row, width, now):
    """Text `row` during forward pass `now`, in lines of `width` cells: dim is to come, inverse is new."""
    blank = " " if record["objective"] == "ar" else "░"
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text, cells = "", []
    for i, n in zip(ids[row].tolist(), when[row].tolist(), strict=True):
        for c in decoder.decode(tokenizer.pieces[i]):  # none, where a character needs more bytes
            text += c if c.isprintable() or c == "\n" else "\ufffd"  # nothing steers the terminal
            cell = text[-1].replace("\n", " ")
            if n > now:
                cell = f"\033[2m{blank}\033[m"
            elif n == now > 0:
                cell = f"\033[7m{cell}\033[m"
            cells.append(cell)
    lines = re.finditer(rf".{{0,{width - 1}}}\s|.{{1,{width}}}", text)  # broken at spaces
    return ["".join(cells[m.start():m.end()]) + " " * (width - len(m[0])) for m in lines]


def play(results, row, animate):
    """Print text `row` of the results side by side; if asked, as it develops, for ten seconds at most."""
    size, last = shutil.get_terminal_size(), max(int(when[row].max()) for *_, when in results)
    width = max(8, (size.columns + 2) // len(results) - 3)
    for now in range(0 if animate else last + 1, last + 2):  # after the last nothing is new any more
        columns = [frame(*result, row, width, now) for result in results]
        lines = [" │ ".join(line) for line in itertools.zip_longest(*columns, fillvalue=" " * width)]
        if now <= last:
            lines = lines[:size.lines - 1]  # the next is drawn over this, but not over what has scrolled away
            print(*lines, sep="\n", end=f"\n\033[{len(lines)}A", flush=True)
            time.sleep(min(0.4, 10 / last))
    print(*lines, sep="\n")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    runs = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    try:
        if len(runs) > 2:
            raise UserError(f"{len(runs)} runs do not fit side by side: name one or two")
        args = sample.parse(argv[len(runs):])
        runs = runs or [args.run or sample.newest_run()]
        results = [sample.generate(args, run, alone=len(runs) == 1) for run in runs]
        for record, *_ in results:
            print(f"{record['run']}/{record['checkpoint']}.pt: {record['objective']}, step {record['step']:,}")
        for row in range(args.num_samples):
            print(f"----- {row + 1}")
            play(results, row, sys.stdout.isatty())
    except (UserError, DataError, OSError, UnicodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
