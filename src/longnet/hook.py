"""Makes LongNet known to transformers, and to PEFT, as soon as a program uses their models, and not before.

`import longnet` is enough for `from_pretrained(…, attn_implementation="dilated")`, the Auto classes and `pipeline()`,
whichever of the two libraries is imported first; a program that uses the op alone never pays for transformers.
"""

from __future__ import annotations

import importlib
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Whoever chooses an attention, or asks an Auto class, has loaded one of these.
_OF_TRANSFORMERS = (
    "transformers.modeling_utils",
    "transformers.models.auto.configuration_auto",
    "transformers.models.auto.modeling_auto",
)
# Whoever saves or loads an adapter has loaded this.
_OF_PEFT = ("peft.peft_model",)
# The module transformers as it was first imported: importing its models makes it anew, and who has it keeps this one.
_first: list[ModuleType] = []


def introduce() -> None:
    """Register with transformers and with PEFT: now where their models are there, else once they are."""
    _keep_first()
    for package, triggers, register in (
        ("transformers", _OF_TRANSFORMERS, _register),
        ("peft", _OF_PEFT, _register_with_peft),
    ):
        if any(name in sys.modules for name in triggers):
            register()
        elif not any(isinstance(finder, _Watch) and finder.package == package for finder in sys.meta_path):
            sys.meta_path.insert(0, _Watch(package, triggers, register))


def name_in_transformers(models: Iterable[type]) -> None:
    """Make classes attributes of transformers, by their names, whenever it was imported."""
    for model in models:
        for module in (*_first, sys.modules["transformers"]):
            setattr(module, model.__name__, model)


def _keep_first() -> None:
    if not _first and "transformers" in sys.modules:
        _first.append(sys.modules["transformers"])


def _register() -> bool:
    """Import `longnet.model`, which registers everything with transformers; say whether that went well."""
    try:
        importlib.import_module("longnet.model")
    except ImportError as error:
        # transformers itself is fine, and its user may need nothing of ours.
        warnings.warn(f"LongNet cannot make itself known to transformers: {error}", stacklevel=2)
        return False
    return True


def _register_with_peft() -> None:
    if _register():
        importlib.import_module("longnet.model.adapters").meet_peft()


class _Watch(MetaPathFinder):
    """Sees a package's modules being loaded; registers when the outermost of them is finished.

    In the middle of it some modules are half-made, and ours import many.

    Args:
        package: whose modules.
        triggers: names of modules; one of them has to be among those loaded.
        register: what to call then.
    """

    def __init__(self, package: str, triggers: Sequence[str], register: Callable[[], object]) -> None:
        self.package = package
        self._triggers, self._register = triggers, register
        self._here = threading.local()
        self._triggered = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec that the other finders give, its loader watched; None for what is not the package's."""
        if fullname.partition(".")[0] != self.package:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Watched(spec.loader, self)
                return spec
        return None

    def begin(self) -> None:
        """Note that a module begins to be executed."""
        self._here.depth = getattr(self._here, "depth", 0) + 1

    def end(self, name: str) -> None:
        """Note that it is over; register when it was the outermost."""
        self._here.depth -= 1
        self._triggered |= name in self._triggers
        if not self._here.depth:
            _keep_first()
            if self._triggered and self in sys.meta_path:
                sys.meta_path.remove(self)
                self._register()


class _Watched(Loader):
    """A module's own loader, which tells when it begins and ends."""

    def __init__(self, loader: Loader, watch: _Watch) -> None:
        self._loader, self._watch = loader, watch

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Return the loader's module."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module, its loader its own again."""
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._watch.begin()
        try:
            self._loader.exec_module(module)
        finally:
            self._watch.end(module.__name__)
