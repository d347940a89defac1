"""The pages of the documentation: the README, those in ``docs/``, notebooks included, and the projects' READMEs."""

import json
import re
import shlex
from pathlib import Path

from .common import ROOT

PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("docs/notebooks/*.ipynb")),
    *sorted(ROOT.glob("projects/*/README.md")),
]
BASH = "%%bash"


def cells(notebook: Path, kind: str) -> list[str]:
    """The cells of a notebook, "code" or "markdown"."""
    found = json.loads(notebook.read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def text_of(page: Path) -> str:
    """What a page says; of a notebook, its Markdown, and its cells for bash as fenced blocks."""
    if page.suffix == ".md":
        return page.read_text()
    shell = [x.partition("\n")[2] for x in cells(page, "code") if x.startswith(BASH)]
    return "\n\n".join([*cells(page, "markdown"), *(f"```bash\n{x}\n```" for x in shell)])


TEXTS = [text_of(page) for page in PAGES]

# Two pages may show the same lines.
BLOCKS = list(
    dict.fromkeys(x for text in TEXTS for x in re.findall(r"```python\n(.*?)```", text, re.DOTALL))
)
FILES = dict(
    match.groups() for x in BLOCKS if (match := re.fullmatch(r"# (\S+\.py)\n(.*)", x, re.DOTALL))
)
"""The blocks whose first line names a file, by that name."""


def block(phrase: str) -> str:
    """The one example of Python that has these words."""
    (found,) = (x for x in BLOCKS if phrase in x)
    return found


def commands() -> list[list[str]]:
    """The words after ``d2kd`` of every command that stands on a line of its own."""
    found = []
    for text in TEXTS:
        fenced = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        indented = re.findall(
            r"(?:^    .*\n)+", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE
        )
        for line in "\n".join(fenced + indented).replace("\\\n", " ").splitlines():
            match = re.match(
                r"\s*(?:\S+=\S+ )*(?:d2kd|\S*torchrun .*-m d2kd|python -m d2kd) (.+)", line
            )
            if match:
                words = shlex.split(re.sub(r"[][]|…(?!/)", "", match[1]), comments=True)
                found.append(words)
    return found
