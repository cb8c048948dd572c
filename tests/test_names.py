"""Names: one public class or constant of the code has one meaning."""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHARED = {"FORMAT": "the description of a format, which each format folder of exporters/ has under this name"}
"""Names that stand in several modules by design, and why."""


def defined(path: Path) -> set[str]:
    """Public names of classes (CapWords) and constants (ALL_CAPS) that a module defines at its top level."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            parts = (part for target in targets for part in ast.walk(target))
            names |= {part.id for part in parts if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    return {name for name in names if name[0].isupper()}


def repeated(root: Path) -> dict[str, list[str]]:
    """Modules of each name that more than one module defines."""
    places = defaultdict(list)
    for folder in ("selfpruner_hub", "exporters", "spaces"):
        for path in sorted((root / folder).rglob("*.py")):
            for name in defined(path):
                places[name].append(path.relative_to(root).as_posix())
    return {name: paths for name, paths in sorted(places.items()) if len(paths) > 1}


def test_a_public_name_is_defined_in_one_module():
    wrong = {name: paths for name, paths in repeated(ROOT).items() if name not in SHARED}
    assert not wrong, "\n".join(f"{name}: {', '.join(paths)}" for name, paths in wrong.items())


def test_every_shared_name_is_still_shared():
    assert repeated(ROOT).keys() >= SHARED.keys()
