"""Print code lines, tokens and tokens per code line of each file and room of src/anew.

    python tools/code_size.py [FOLDER]

Comments, docstrings and blank lines do not count. A line counts once, even if a token of it began
on an earlier line.
"""

import ast
import io
import sys
import tokenize
from collections import defaultdict
from pathlib import Path

NOT_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


def docstring_lines(source: str) -> set[int]:
    """Return the numbers of the lines that docstrings begin on."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            has_docstring = ast.get_docstring(node, clean=False) is not None
            if has_docstring:
                found.add(node.body[0].lineno)
    return found


def code_size(path: Path) -> tuple[int, int]:
    """Return the numbers of code lines and of tokens in a file."""
    source = path.read_text(encoding="utf-8")
    docstrings = docstring_lines(source)
    lines = set()
    tokens = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        is_docstring = token.type == tokenize.STRING and token.start[0] in docstrings
        if token.type in NOT_CODE or is_docstring:
            continue
        tokens += 1
        lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines), tokens


def main(folder: Path) -> None:
    rooms: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for path in sorted(folder.rglob("*.py")):
        lines, tokens = code_size(path)
        name = path.relative_to(folder)
        for room in (name.parts[0] if len(name.parts) > 1 else "(top)", "all"):
            rooms[room][0] += lines
            rooms[room][1] += tokens
        if lines:
            print(f"{tokens / lines:5.1f} {tokens:7,} {lines:6,}  {name}")
    print()
    for room, (lines, tokens) in rooms.items():
        print(f"{tokens / max(lines, 1):5.1f} {tokens:7,} {lines:6,}  {room}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("src/anew"))
