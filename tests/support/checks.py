"""Looking at the checks of ``dlm doctor``."""

from pathlib import Path

from cluster.preflight import Check


def of(checks: list[Check], name: str, status: str = "") -> list[Check]:
    """The checks of a name, and of a status if one is given."""
    return [check for check in checks if check.name == name and status in ("", check.status)]


def only(checks: list[Check], name: str, status: str) -> Check:
    """The one check of a name and status."""
    (check,) = of(checks, name, status)
    return check


def tree(folder: Path) -> dict[str, bytes | None]:
    """All that lies below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}
