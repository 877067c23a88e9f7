"""Words of a command line to checked parameters, with every problem in one message."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from steps.text2sql.errors import UserError
from steps.text2sql.parameter_checks import FORMS
from steps.text2sql.params import (
    CHAIN,
    NOT_FROM_MAIN,
    SET_BY_MAIN,
    SET_BY_SWEEP,
    OwnMainParams,
    SweepParams,
    conflicts,
)

Params = TypeVar("Params")


def parse(params_class: type[Params], argv: Sequence[str]) -> Params:
    """Build a step's parameters from `--name value` words, without abbreviations.

    Raises:
        UserError: naming every unknown, missing or wrong parameter at once.
    """
    given = _pairs(argv)
    types = get_type_hints(params_class, include_extras=True)
    problems = [*_unknown(given, types), *(f"{name}: missing" for name in types if name not in given)]
    values = _checked(given, types, problems)
    return params_class(**values)


class Call(NamedTuple, Generic[Params]):
    """Checked parameters of an entry point that starts steps: all as given, its own, and the text of those to
    hand on, by step."""

    given: dict[str, str]
    own: Params
    steps: dict[str, dict[str, str]]


MainParams = Call[OwnMainParams]
SweepCall = Call[SweepParams]


def parse_main(argv: Sequence[str]) -> MainParams:
    """Check main's own parameters and those of all steps, before the first of them starts.

    Raises:
        UserError: naming every unknown or wrong parameter at once.
    """
    refused = dict.fromkeys(SET_BY_MAIN, "main finds this out itself")
    return _with_handed_on(argv, OwnMainParams, list(CHAIN), refused)


def parse_sweep(argv: Sequence[str]) -> SweepCall:
    """Check sweep's own parameters and those of the steps that it starts.

    Raises:
        UserError: naming every unknown or wrong parameter at once; or a prepared dataset and values that it
            would have to be prepared with.
    """
    call = _with_handed_on(argv, SweepParams, ["prepare_data", "train"], SET_BY_SWEEP)
    others = sorted(call.steps["prepare_data"].keys() - get_type_hints(SweepParams).keys())
    if call.own.dataset_uri and others:
        raise UserError(
            f"dataset_uri={call.own.dataset_uri}: is prepared already, so {', '.join(others)} would change "
            "nothing; leave them out, or leave dataset_uri out."
        )
    return call


def _with_handed_on(
    argv: Sequence[str], own_class: type[Params], steps: list[str], refused: Mapping[str, str]
) -> Call[Params]:
    """Check what an entry point is given; `refused` are names that no user may give here, and why."""
    given = _pairs(argv)
    by_step = {step: _taken_from_main(step) for step in steps}
    own = get_type_hints(own_class, include_extras=True)
    handed_on = {name: hint for hints in by_step.values() for name, hint in hints.items()}
    types = {name: hint for name, hint in (handed_on | own).items() if name not in refused}
    problems = [f"{name}: {refused[name]}" for name in refused.keys() & given.keys()]
    problems += [f"{name}: missing" for name in own if name not in given]
    others = {name: value for name, value in given.items() if name not in refused}
    values = _checked(others, types, [*_unknown(others, types), *problems])
    own_params = own_class(**{name: values[name] for name in own})
    texts = {name: _expanded(value, values.get(name)) for name, value in given.items()}
    found = {step: {n: texts[n] for n in hints if n in given} for step, hints in by_step.items()}
    return Call(given, own_params, found)


def _expanded(given: str, value: Any) -> str:
    """The text of a value, of a path below `~` the whole one: not all that it is handed to know that sign."""
    return value if given.startswith("~") and isinstance(value, str) else given


def _taken_from_main(step: str) -> dict[str, Any]:
    hints = get_type_hints(CHAIN[step], include_extras=True)
    return {name: hint for name, hint in hints.items() if name not in NOT_FROM_MAIN.get(step, ())}


def _pairs(argv: Sequence[str]) -> dict[str, str]:
    """Words to {name: value}. Not argparse: MLflow writes every parameter as two words, whatever the value.

    A value may begin with a dash, and a shortened name must not be completed.
    """
    names, values = argv[0::2], argv[1::2]
    if len(names) != len(values) or not all(name.startswith("--") for name in names):
        raise UserError(f"parameters must come as --name value pairs, got: {' '.join(argv)}")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError("\n".join(f"{name.removeprefix('--')}: given more than once" for name in repeated))
    return {name.removeprefix("--"): value for name, value in zip(names, values, strict=True)}


def _unknown(given: Mapping[str, str], types: Mapping[str, Any]) -> Iterator[str]:
    for name in given.keys() - types.keys():
        near = difflib.get_close_matches(name, types, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(sorted(types))}"
        yield f"{name}={given[name]}: no such parameter; {hint}"


def _checked(given: Mapping[str, str], types: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    values = {}
    for name in given.keys() & types.keys():
        try:
            values[name] = TypeAdapter(types[name]).validate_python(given[name])
        except ValidationError as error:
            problems.append(f"{name}={given[name]}: {_message(error)}")
        except OSError as error:  # a folder that may not be listed
            problems.append(f"{name}={given[name]}: cannot be read: {error.strerror}")
    problems += conflicts(values)
    if problems:
        raise UserError("\n".join(sorted(problems)))
    return values


def _message(error: ValidationError) -> str:
    texts = [
        FORMS.get(problem.get("ctx", {}).get("pattern"), problem["msg"].removeprefix("Value error, "))
        for problem in error.errors()
    ]
    return " or ".join(texts).replace("Input should be ", "must be ").replace(" or must be ", " or ")
