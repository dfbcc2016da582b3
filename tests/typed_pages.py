"""The examples of README and guides under strict type checkers, as users run them: ``python tests/typed_pages.py``.

The code of a page becomes one module, in which every line keeps its number. Its own functions need no annotations,
may be defined twice and may override others, since these pages teach; what they use of xaffine is checked all the same.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/guides/*.md"))]
EXAMPLES = str(ROOT / "docs" / "examples")  # of which a page may load one
BLOCK = re.compile(r"^```(?:python|\{code-cell\}.*)\n(?:---\n(?:.*\n)*?---\n)?(?::.*\n)*((?:.*\n)*?)```$", re.MULTILINE)
MYPY = [
    "--allow-untyped-defs", "--allow-incomplete-defs", "--allow-untyped-calls", "--allow-redefinition",
    "--ignore-missing-imports", *(f"--disable-error-code={code}" for code in ("misc", "no-redef", "override")),
]  # fmt: skip
PYRIGHT = {
    "typeCheckingMode": "standard",  # that of pyright
    "pythonVersion": "3.11",
    "extraPaths": [EXAMPLES],
    "analyzeUnannotatedFunctions": False,
    "reportMissingImports": False,
    "reportMissingModuleSource": False,
    "reportRedeclaration": False,
    "reportIncompatibleMethodOverride": False,
}


def module_of(text: str) -> str:
    """The code of a page, and nothing in the place of all other lines."""
    text = re.sub(r"^:load: \S+/(\w+)\.py$", r"from \1 import *", text, flags=re.MULTILINE)
    assert len(BLOCK.findall(text)) == len(re.findall(r"^```(?:python$|\{code-cell)", text, re.MULTILINE))
    code, end = "", 0
    for block in BLOCK.finditer(text):
        code += "\n" * text.count("\n", end, block.start(1)) + block[1]
        end = block.end(1)
    return code


def main() -> int:
    """Run both, on the script of a user too, and return 0 if neither finds anything."""
    script = ROOT / "tests" / "typed_script.py"
    texts = {page.stem.replace("-", "_"): module_of(page.read_text(encoding="utf-8")) for page in PAGES}
    with tempfile.TemporaryDirectory() as folder:
        modules = [Path(folder, f"{name}.py") for name in texts]
        for module, code in zip(modules, texts.values(), strict=True):
            module.write_text(code, encoding="utf-8")
        Path(folder, script.name).write_text(script.read_text(encoding="utf-8"), encoding="utf-8")
        Path(folder, "pyrightconfig.json").write_text(json.dumps(PYRIGHT), encoding="utf-8")
        mypy = ["mypy", *MYPY, *map(str, modules)]
        pyright = ["basedpyright", "--level", "error", "--project", folder, "--pythonpath", sys.executable]
        environment = {**os.environ, "MYPYPATH": EXAMPLES}
        codes = [
            subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=environment, check=False).returncode
            for command in (mypy, pyright)
        ]
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
