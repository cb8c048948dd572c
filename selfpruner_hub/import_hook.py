"""Functions that are called after the import of another package, without importing that package now."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_waiting: dict[str, list[Callable[[], object]]] = {}
"""Functions to call after the import of a package, by package."""


def after_import(package: str, then: Callable[[], object]) -> None:
    """Call a function after a package is imported, or at once if it is imported already.

    An error that the function raises makes the import fail.

    Args:
        package: Name of a top-level package.
        then: Function to call.
    """
    if package in sys.modules:
        then()
        return
    _waiting.setdefault(package, []).append(then)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


class _Finder(MetaPathFinder):
    """Finds the packages in `_waiting` through the other finders, and wraps their loaders in `_Loader`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a package in `_waiting`; None for any other."""
        if fullname not in _waiting:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(Loader):
    """Loads a package through its own loader, restores that loader, and then calls the waiting functions.

    Args:
        loader: Loader of the package.
    """

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the module through the package's own loader."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the package, then call the functions that wait for it."""
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        for then in _waiting.pop(module.__name__, []):
            then()


_finder = _Finder()
