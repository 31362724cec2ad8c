"""The public names: the lazy table is `__all__`, every name resolves, and `import deltaw` costs nothing."""

import subprocess
import sys
import time

import deltaw


def test_table_is_all_and_everything_resolves() -> None:
    assert set(deltaw.__all__) == {"__version__", *deltaw._WHERE}
    for name in deltaw.__all__:
        assert getattr(deltaw, name) is not None
    assert set(dir(deltaw)) == set(deltaw.__all__)


def test_functions_stay_functions_whatever_is_imported_first() -> None:
    code = (
        "import deltaw.training.run, deltaw.core.merge, deltaw.infer.generate as g, deltaw as d\n"
        "assert all(map(callable, (d.train, d.merge, d.generate, d.evaluate, d.attach)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_name() -> None:
    try:
        deltaw.atach  # noqa: B018
    except AttributeError as error:
        assert "atach" in str(error)
    else:
        raise AssertionError("no AttributeError")


def test_import_and_help_load_no_torch() -> None:
    code = "import sys, deltaw, deltaw.cli.main; assert not {'torch', 'transformers', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "deltaw", "--help"], capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - began)
        assert "quickstart" in done.stdout
    assert min(times) < 1.2  # 0.4 s on an idle core; the bound is for a busy one
