"""Methods and host kinds are found, never listed: every module of our own room, then the entry points of others.

A file in `deltaw/methods` or `deltaw/hosts` is picked up by being there. Another package declares an entry point in
the group of the same name and registers itself when that is loaded:

    [project.entry-points."deltaw.methods"]
    mine = "my_package.my_method"

This is the one place where core reaches rooms above it, by name and only to let them register themselves.
"""

import functools
import importlib
import importlib.metadata
import pkgutil


@functools.cache
def load(group: str) -> None:
    """Import all modules of the package `group` ("deltaw.methods", "deltaw.hosts", or another whose modules register
    themselves) and all its entry points, once."""
    package = importlib.import_module(group)
    for module in pkgutil.iter_modules(package.__path__, prefix=f"{group}."):
        importlib.import_module(module.name)
    for entry_point in importlib.metadata.entry_points(group=group):
        entry_point.load()
