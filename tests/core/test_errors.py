"""How several faults are said at once."""

from deltaw.core.errors import TargetError, did_you_mean, faults


def test_faults_of_repeated_layers_are_one_line_with_each_suggestion_once() -> None:
    known = [f"model.language.layers.{n}.q_proj" for n in range(4)]
    names = [f"model.text.layers.{n}.q_proj" for n in range(4)]
    said = str(
        faults(TargetError, "the base", [f"{name}: no such module{did_you_mean(name, known)}" for name in names])
    )
    line = "model.text.layers.*.q_proj (4 times): no such module; did you mean 'model.language.layers.*.q_proj'?"
    assert said.splitlines()[1:] == [f"  - {line}"]
