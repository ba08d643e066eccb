"""Processors, each a file and a paper: the specs that `convert` takes, by name."""

import ast
import dataclasses
from typing import Any

from vision_attn.processors.agent import Agent
from vision_attn.processors.agent_sd import AgentSD
from vision_attn.processors.base import REGISTRY, AttnSpec, Layer, Moment, Processor, register, registrations
from vision_attn.processors.clear import Clear
from vision_attn.processors.halo import Halo
from vision_attn.processors.hilo import HiLo
from vision_attn.processors.inline import InLine
from vision_attn.processors.linear_local import LinearLocal
from vision_attn.processors.linfusion import LinFusion
from vision_attn.processors.moh import MoH
from vision_attn.processors.multipole import Multipole
from vision_attn.processors.neighborhood import Neighborhood
from vision_attn.processors.paro import Paro
from vision_attn.processors.rala import RALA
from vision_attn.processors.schedule import Schedule
from vision_attn.processors.softmax import Softmax
from vision_attn.processors.super_token import SuperToken

__all__ = [
    "RALA",
    "REGISTRY",
    "Agent",
    "AgentSD",
    "AttnSpec",
    "Clear",
    "Halo",
    "HiLo",
    "InLine",
    "Layer",
    "LinFusion",
    "LinearLocal",
    "MoH",
    "Moment",
    "Multipole",
    "Neighborhood",
    "Paro",
    "Processor",
    "Schedule",
    "Softmax",
    "SuperToken",
    "from_config",
    "make_spec",
    "register",
    "registrations",
    "spec_of_text",
    "to_config",
]


def make_spec(name: str, **fields: object) -> AttnSpec:
    """Return the spec with a name, in any case, and with the given fields.

    Raises:
        ValueError: If no spec has that name; the known ones are listed.
        TypeError: If the spec has no such field, or lacks one.
    """
    if not isinstance(name, str) or name.lower() not in REGISTRY:
        raise ValueError(f"unknown processor {name!r}: known are {', '.join(sorted(REGISTRY))}")
    spec = REGISTRY[name.lower()].spec
    known = list(getattr(spec, "__dataclass_fields__", {}))
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise TypeError(f"{spec.__name__} has no field {', '.join(unknown)}: it has {', '.join(known) or 'none'}")
    return spec(**fields)


def spec_of_text(text: str) -> AttnSpec:
    """Return the spec that a command line names: 'clear', 'clear:radius=8,pool=2', 'neighborhood:kernel_size=(3,5)'.

    A spec inside another stands in brackets: 'moh:spec=(clear:radius=8),share=0.5'. A schedule cannot be written this
    way.

    Raises:
        ValueError: If a field has no value, or the processor is unknown.
        TypeError: If the processor has no such field.
    """
    name, _, rest = text.partition(":")
    known = sorted(key for key, known in REGISTRY.items() if known.spec is not Schedule)
    if name.lower() not in known:
        raise ValueError(f"unknown processor {name!r}: known are {', '.join(known)}")
    fields: dict[str, object] = {}
    for field in filter(None, _split_fields(rest)):
        key, equals, value = field.partition("=")
        if not equals:
            raise ValueError(f"fields are written name=value, got {field!r} in {text!r}")
        if key == "spec":
            fields[key] = spec_of_text(value[1:-1] if value.startswith("(") else value)
            continue
        try:
            fields[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            fields[key] = value
    return make_spec(name, **fields)


def _split_fields(text: str) -> list[str]:
    """Split at the commas that are outside brackets."""
    fields, depth = [""], 0
    for letter in text:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            fields.append("")
        else:
            fields[-1] += letter
    return fields


def to_config(value: Any) -> Any:
    """Turn a spec into what JSON can hold: a dictionary of its class's name and its fields."""
    if isinstance(value, AttnSpec):
        fields = dataclasses.fields(value)  # type: ignore[arg-type]
        return {"class": type(value).__name__, **{f.name: to_config(getattr(value, f.name)) for f in fields}}
    return [to_config(item) for item in value] if isinstance(value, tuple) else value


def from_config(value: Any) -> Any:
    """Undo `to_config`.

    Raises:
        ValueError: If a spec or a field's value is not known.
        TypeError: If a field is not known.
    """
    if isinstance(value, dict):
        if "class" not in value:
            raise ValueError(f"a spec is written with its class, {{'class': 'Clear', 'radius': 8}}, got {value!r}")
        return make_spec(value["class"], **{name: from_config(v) for name, v in value.items() if name != "class"})
    return tuple(from_config(item) for item in value) if isinstance(value, list) else value
