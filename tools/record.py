"""Record the output of a command as an animated SVG of a terminal, without a script in it.

    python tools/record.py docs/pictures/demo.svg make demo

Lines appear at the times at which they were printed, scaled to 20 seconds in total, and the newest
line is at the bottom. Readers whose system asks for reduced motion see the last lines without the
animation.
"""

import subprocess
import sys
import time
from html import escape
from pathlib import Path

ROWS = 24  # lines that are visible at a time
COLUMNS = 84
LINE_HEIGHT = 19
CHARACTER_WIDTH = 8.43
PLAY_SECONDS = 20.0
REST_SECONDS = 5.0  # the last lines stay for this time before the animation repeats

SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" \
width="{width:.0f}" role="img">
<title>{title}, recorded over {seconds:.0f} seconds</title>
<style>
text {{ font: 14px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; \
fill: #d7dce5; white-space: pre }}
.lines {{ animation: run {repeat}s step-end infinite; transform: {end} }}
@keyframes run {{ {keyframes} 100% {{ transform: {end} }} }}
@media (prefers-reduced-motion: reduce) {{ .lines {{ animation: none }} }}
</style>
<rect width="{width:.0f}" height="{height}" rx="9" fill="#171b24"/>
<circle cx="20" cy="18" r="5" fill="#e0655f"/>\
<circle cx="38" cy="18" r="5" fill="#e3b34c"/>\
<circle cx="56" cy="18" r="5" fill="#63b36b"/>
<svg x="16" y="36" width="{text_width:.0f}" height="{text_height}"><g class="lines">
{text}
</g></svg>
</svg>
"""


def record(command: list[str]) -> list[tuple[float, str]]:
    """Run a command. Return its lines of output, each with the seconds since the start.

    Lines are cut into pieces of COLUMNS characters.
    """
    start = time.monotonic()
    lines = [(0.0, "$ " + " ".join(command))]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(line)
            seconds = time.monotonic() - start
            text = line.rstrip("\n").expandtabs()
            for column in range(0, max(1, len(text)), COLUMNS):
                lines.append((seconds, text[column : column + COLUMNS]))
    return lines


def picture(lines: list[tuple[float, str]]) -> str:
    """Return a recording as SVG: a column of all lines that moves up behind a window of ROWS."""
    seconds = lines[-1][0] or 1.0
    repeat = PLAY_SECONDS + REST_SECONDS
    keyframes = []
    texts = []
    for i, (printed_at, line) in enumerate(lines):
        percent = 100 * PLAY_SECONDS * printed_at / seconds / repeat
        offset = (ROWS - 1 - i) * LINE_HEIGHT
        keyframes.append(f"{percent:.3f}% {{ transform: translateY({offset}px) }}")
        if line.strip():
            texts.append(f'<text y="{(i + 1) * LINE_HEIGHT - 5}">{escape(line)}</text>')
    text_width = COLUMNS * CHARACTER_WIDTH
    text_height = ROWS * LINE_HEIGHT
    return SVG.format(
        width=text_width + 32,
        height=text_height + 52,
        text_width=text_width,
        text_height=text_height,
        title=escape(lines[0][1]),
        seconds=seconds,
        repeat=repeat,
        end=f"translateY({(ROWS - len(lines)) * LINE_HEIGHT}px)",
        keyframes=" ".join(keyframes),
        text="\n".join(texts),
    )


if __name__ == "__main__":
    output, *command = sys.argv[1:]
    Path(output).write_text(picture(record(command)), encoding="utf-8")
