"""The one place that makes `import torchvision` work when its C++ operators cannot load.

torchvision's wheels on PyPI are built for the CUDA build of torch. Beside a CPU build of torch their operators do not
load, and `import torchvision` (hence timm and parts of transformers) stops in `torchvision/_meta_registrations.py`,
which registers shapes for operators that do not exist. timm and diffusers need torchvision's Python transforms only, so
an empty stand-in for that one module is enough.

The test suite, `vision_attn.pipelines`, the demo and the backbones call `ensure_torchvision()` before they import timm
or diffusers. It changes nothing where torchvision works or is absent.
"""

import importlib
import importlib.util
import sys
import types

_MODULE = "torchvision._meta_registrations"


def ensure_torchvision() -> bool:
    """Put an empty module in the place of torchvision's operator registrations, if they cannot load.

    Returns:
        True if the stand-in is in use.
    """
    if _MODULE in sys.modules:
        return not hasattr(sys.modules[_MODULE], "__file__")
    if importlib.util.find_spec("torchvision") is None:
        return False
    try:
        importlib.import_module("torchvision")
    except RuntimeError:  # "operator torchvision::nms does not exist"
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules[_MODULE] = types.ModuleType(_MODULE, "Stand-in, see vision_attn/_compat.py")
        importlib.import_module("torchvision")
        return True
    return False
