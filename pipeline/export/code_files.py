"""Which of our modeling files an exported directory needs beside its weights."""

import ast
from collections.abc import Mapping
from pathlib import Path

FOLDER = Path(__file__).parent / "hf"


def code_files(auto_map: Mapping[str, str]) -> list[Path]:
    """Files that an ``auto_map`` of config.json names, and those that they import, by name."""
    wanted = {name.partition(".")[0] for name in auto_map.values()}
    found: set[str] = set()
    while left := wanted - found:
        module = left.pop()
        found.add(module)
        nodes = ast.walk(ast.parse((FOLDER / f"{module}.py").read_text()))
        wanted |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level and node.module}
    return [FOLDER / f"{module}.py" for module in sorted(found)]
