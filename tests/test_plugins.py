"""Methods and hosts from another package join in without a line of ours changed, and through the same suite."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from contract import suite
from contract.hosts import HOSTS, HostCase
from torch import nn

import deltaw
from deltaw.core import host, method, plugins
from deltaw.core.errors import MergeError, TargetError, UseError
from deltaw.core.method import Method, from_dict, get

OUTSIDE = Path(__file__).parent
LAYER = HostCase(
    lambda: nn.ConvTranspose2d(3, 7, (3, 2), stride=2, padding=1, output_padding=(1, 0)),
    lambda: torch.randn(2, 3, 4, 5),
)
WEIGHTS = [name for name in HOSTS if (seen := host.host_of(HOSTS[name].make())) is not None and seen.spec.stack is None]
FORWARD_ONLY = [
    suite.identity_at_start,
    suite.detach_is_exact,
    suite.gradients_reach_the_adapter_only,
    suite.extract_and_insert_are_exact,
    suite.compiled_is_equal,
    suite.checkpointed_is_equal,
    suite.modes_have_no_side_effects,
]


@pytest.fixture(scope="module", autouse=True)
def outside() -> Iterator[dict[str, ModuleType]]:
    """The package, registered as long as these tests run: what others list must not depend on them."""
    for group in ("deltaw.methods", "deltaw.hosts"):
        plugins.load(group)
    methods, kinds = dict(method._METHODS), {name: list(found) for name, found in host._KINDS.items()}
    import plugin_example.ia3
    import plugin_example.parallel
    import plugin_example.transposed

    yield {"parallel": plugin_example.parallel}
    method._METHODS.clear()
    method._METHODS.update(methods)
    host._KINDS.clear()
    host._KINDS.update(kinds)
    host._kind.cache_clear()


def make(name: str, **fields: Any) -> Method:
    cls: Any = get(name)
    return cls(**fields)


@pytest.mark.parametrize("check", [*suite.EVERY_CONFIG, *suite.ONE_CONFIG], ids=lambda check: check.__name__)
@pytest.mark.parametrize("layer", WEIGHTS)
def test_a_method_of_theirs_on_our_hosts(layer: str, check: suite.Check) -> None:
    check(make("ia3_example"), HOSTS[layer])


@pytest.mark.parametrize("check", [*suite.EVERY_CONFIG, *suite.ONE_CONFIG], ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", ["lora", "dora", "full", "ia3_example"])
def test_our_methods_on_a_host_of_theirs(name: str, check: suite.Check) -> None:
    check(make(name, rank=4, alpha=6.0) if name in ("lora", "dora") else make(name), LAYER)


@pytest.mark.parametrize("check", FORWARD_ONLY, ids=lambda check: check.__name__)
def test_a_block_that_has_no_weight(outside: dict[str, ModuleType], check: suite.Check) -> None:
    block = outside["parallel"].FeedForward
    check(make("parallel_example", rank=4, alpha=6.0), HostCase(lambda: block(12, 20), lambda: torch.randn(2, 5, 12)))


def test_the_branch_of_the_notes(outside: dict[str, ModuleType], tmp_path: Path) -> None:
    """T15: d 1024, r 8 → 2dr = 16,384; nothing at step 0; no weight can hold it."""
    model, x = nn.Sequential(outside["parallel"].FeedForward(1024, 8)), torch.randn(3, 1024)
    before = model(x)
    plan = deltaw.attach(model, make("parallel_example", rank=8, alpha=16.0), targets="0")
    assert plan.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad) == 16_384
    assert torch.equal(model(x), before) and type(model[0].up) is nn.Linear
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    tuned = model(x)
    with pytest.raises(MergeError, match="parallel_example has no ΔW, no weight can hold it"):
        deltaw.merge(model)
    with pytest.raises(UseError, match=r"its strength is 0 or 1, not 0\.5"):
        deltaw.use(model, {"default": 0.5})
    deltaw.save(model, tmp_path / "branch")
    deltaw.detach(model)
    deltaw.load(model, tmp_path / "branch")
    assert torch.equal(model(x), tuned) and not torch.equal(tuned, before)


def test_their_faults_are_ours() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 4, 3, groups=2), nn.ReLU())
    with pytest.raises(TargetError, match="0: grouped transposed convolutions are not supported"):
        deltaw.attach(model, make("lora"), targets="0")
    with pytest.raises(TargetError, match=r"\(ReLU\), none of which can carry ia3_example"):
        deltaw.attach(model, make("ia3_example"), targets="1")
    record = make("parallel_example", rank=3).to_dict()
    assert record == {"method": "parallel_example", "version": 1, "rank": 3}
    assert from_dict(record) == make("parallel_example", rank=3)


def test_entry_points_are_found_by_themselves(tmp_path: Path) -> None:
    """Installed beside deltaw, the package needs no import: the registry loads it."""
    info = tmp_path / "plugin_example-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin-example\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(
        "[deltaw.methods]\nia3_example = plugin_example.ia3\nparallel_example = plugin_example.parallel\n"
        "[deltaw.hosts]\ntransposed = plugin_example.transposed\n"
    )
    code = (
        "import torch, deltaw; from deltaw.core.method import get, names; from torch import nn;"
        "assert {'ia3_example', 'parallel_example', 'lora'} <= set(names());"
        "print(deltaw.attach(nn.Sequential(nn.ConvTranspose2d(3, 7, 2)), get('ia3_example')(), targets='0'))"
    )
    path = os.pathsep.join([str(tmp_path), str(OUTSIDE), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "ConvTranspose2d  7×3×2×2  ia3_example" in done.stdout
