"""Every processor as the tests run it: the specs, by the name of their row, that each registration brings along."""

from vision_attn.processors import REGISTRY

PROCESSORS = {name: spec for known in REGISTRY.values() for name, spec in known.tests.items()}
KIND_OF_SPEC = {name: type(spec).__name__ for name, spec in PROCESSORS.items()}
