"""Reads the settings of a distillation from a YAML file and from single values on the command line."""

import inspect
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vision_attn.distill.config import Config


def read_config(arguments: Sequence[str], program: str) -> Config | str:
    """Read `--config FILE` and values such as `--optimizer.learning_rate 1e-4`, which override it.

    Returns:
        The settings; or, with `--print-config`, what to print.

    Raises:
        ValueError: If a key does not exist or a value does not fit.
        FileNotFoundError: If there is no such file.
    """
    try:
        import jsonargparse  # noqa: PLC0415, of the extra 'distill'
    except ModuleNotFoundError:
        raise ValueError("settings are read by jsonargparse: pip install 'vision_attn[distill]'") from None
    arguments, printed = list(arguments), "--print-config" in arguments
    if printed:
        arguments.remove("--print-config")
    for flag, value in itertools.pairwise(arguments):
        if flag == "--config" and not Path(value).is_file():
            raise FileNotFoundError(f"--config: {value} does not exist")
    parser = jsonargparse.ArgumentParser(
        prog=program,
        description="The settings of a distillation, from a YAML file and from single values on the command line.",
        exit_on_error=False,
        default_env=False,
        print_config=None,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file; values that follow override it")
    parser.add_class_arguments(Config, None, fail_untyped=True)
    _explain(parser)
    try:
        values: Any = parser.parse_args(arguments)
        if printed:
            return parser.dump(values, skip_none=False)
        made = parser.instantiate_classes(values)
    except jsonargparse.ArgumentError as error:
        raise ValueError(" ".join(str(error).split())) from None
    return Config(**{name: getattr(made, name) for name in Config.__dataclass_fields__})


def _explain(parser: Any) -> None:
    """Give each key its line of the docstrings above: jsonargparse reads them only with another package."""
    actions = {action.dest: action for action in parser._actions}
    kinds: dict[str, Any] = {name: entry.type for name, entry in Config.__dataclass_fields__.items()}
    del kinds["stages"]
    for section, kind in {**kinds, "": Config}.items():
        summary, _, arguments = inspect.cleandoc(kind.__doc__).partition("\n\nArgs:\n")
        for group in parser._action_groups:
            group.title = summary.rstrip(".") if group.title == str(kind) else group.title
        for name, text in re.findall(r"^    (\w+): (.+?)(?=^    \w|\Z)", arguments, re.MULTILINE | re.DOTALL):
            actions[f"{section}.{name}".strip(".")].help = " ".join(text.split()).replace("%", "%%")
