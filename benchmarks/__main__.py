"""python -m benchmarks NAME [options]: each benchmark is a module with a `main(arguments)`; results go to benchmarks/results."""

import importlib
import pkgutil
import sys

import benchmarks

NAMES = sorted(m.name for m in pkgutil.iter_modules(benchmarks.__path__) if not m.name.startswith("_"))

if __name__ == "__main__":
    chosen = sys.argv[1:2] or NAMES
    if chosen[0] not in NAMES:
        sys.exit(f"no benchmark {chosen[0]!r}; there are: {', '.join(NAMES)}")
    for name in chosen:
        importlib.import_module(f"benchmarks.{name}").main(sys.argv[2:])
