"""A command's output as a moving picture of a terminal: one SVG, no script in it.

    python docs/record.py docs/pictures/demo.svg make demo          # as it ran, compressed to 20 seconds

Lines come at the moments they really came, scaled; the newest stands at the bottom. Who asked for less motion sees the end.
"""

import subprocess
import sys
import time
from html import escape
from pathlib import Path

ROWS, COLUMNS, LINE, WIDTH, SECONDS, REST = 24, 84, 19, 8.43, 20.0, 5.0


def record(command: list[str]) -> list[tuple[float, str]]:
    """(seconds since the start, line) of everything the command says."""
    began = time.monotonic()
    lines = [(0.0, "$ " + " ".join(command))]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(line)
            rest = line.rstrip("\n").expandtabs()
            while True:
                lines.append((time.monotonic() - began, rest[:COLUMNS]))
                rest = rest[COLUMNS:]
                if not rest:
                    break
    return lines


def picture(lines: list[tuple[float, str]]) -> str:
    """The recording as SVG: all lines in a column that moves up, seen through a window of ROWS."""
    last, whole = lines[-1][0] or 1.0, SECONDS + REST
    stops = [
        f"{100 * SECONDS * at / last / whole:.3f}% {{ transform: translateY({(ROWS - 1 - i) * LINE}px) }}"
        for i, (at, _) in enumerate(lines)
    ]
    end = f"translateY({(ROWS - len(lines)) * LINE}px)"
    width, height = COLUMNS * WIDTH + 32, ROWS * LINE + 52
    rows = "\n".join(
        f'<text y="{(i + 1) * LINE - 5}">{escape(text)}</text>'
        for i, (_, text) in enumerate(lines)
        if text.strip()
    )
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" role="img">
<title>{escape(lines[0][1])}, recorded over {last:.0f} seconds</title>
<style>
text {{ font: 14px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; fill: #d7dce5; white-space: pre }}
.lines {{ animation: run {whole}s step-end infinite; transform: {end} }}
@keyframes run {{ {" ".join(stops)} 100% {{ transform: {end} }} }}
@media (prefers-reduced-motion: reduce) {{ .lines {{ animation: none }} }}
</style>
<rect width="{width:.0f}" height="{height}" rx="9" fill="#171b24"/>
<circle cx="20" cy="18" r="5" fill="#e0655f"/><circle cx="38" cy="18" r="5" fill="#e3b34c"/><circle cx="56" cy="18" r="5" fill="#63b36b"/>
<svg x="16" y="36" width="{COLUMNS * WIDTH:.0f}" height="{ROWS * LINE}"><g class="lines">
{rows}
</g></svg>
</svg>
"""


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(picture(record(sys.argv[2:])), encoding="utf-8")
