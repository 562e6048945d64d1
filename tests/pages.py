"""The examples in Python that README and docs show, for tests to run."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def list_examples(page: str, section: str) -> list[str]:
    """The code blocks of one section of a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    [body] = re.findall(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    return re.findall(r"^```python\n(.*?)^```", body, re.DOTALL | re.MULTILINE)
