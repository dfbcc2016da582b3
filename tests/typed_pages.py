"""What a user copies from a page passes strict type checkers: ``python tests/typed_pages.py`` runs them on all pages.

The code of a page becomes one module, in which every line keeps its number. Functions of a page's own need no
annotations, since these pages teach; what they call of xaffine is checked all the same.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/guides/*.md"))]
MYPY = [
    "--allow-untyped-defs",
    "--allow-incomplete-defs",
    "--allow-untyped-calls",
    "--allow-redefinition",
    "--disable-error-code=no-redef",
]
PYRIGHT = {
    "typeCheckingMode": "standard",
    "pythonVersion": "3.11",
    "reportMissingImports": False,
    "reportRedeclaration": False,
}
BLOCK = re.compile(r"^```(?:python|\{code-cell\}.*)\n(---\n(?:.*\n)*?---\n|(?::.*\n)*)((?:.*\n)*?)```$", re.MULTILINE)


def module_of(text: str) -> str:
    """The code of a page that a reader sees, and nothing in the place of all other lines."""
    code, end = "", 0
    for block in BLOCK.finditer(text):
        if not re.search("remove-(input|cell)", block[1]):
            code += "\n" * text.count("\n", end, block.start(2)) + re.sub("^[%!].*", "", block[2], flags=re.MULTILINE)
            end = block.end()
    return code


def main() -> int:
    """Run both, and return 0 if neither finds anything."""
    with tempfile.TemporaryDirectory() as folder:
        modules = [str(Path(folder, f"{page.stem.lower().replace('-', '_')}.py")) for page in PAGES]
        for page, module in zip(PAGES, modules, strict=True):
            Path(module).write_text(module_of(page.read_text(encoding="utf-8")), encoding="utf-8")
        Path(folder, "pyrightconfig.json").write_text(json.dumps(PYRIGHT), encoding="utf-8")
        python = [sys.executable, "-m"]
        codes = [
            subprocess.run([*python, "mypy", *MYPY, *modules], cwd=ROOT, check=False).returncode,
            subprocess.run(
                [*python, "basedpyright", "--project", folder, "--pythonpath", sys.executable], check=False
            ).returncode,
        ]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
