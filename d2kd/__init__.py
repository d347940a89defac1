"""d2kd: knowledge distillation for Detectron2's detectors."""

import importlib.util
import warnings

__version__ = "0.1.0"

# Asked, not imported: an error inside Detectron2 keeps its own message, and `--help` stays quick.
if importlib.util.find_spec("detectron2") is None:
    raise ModuleNotFoundError(
        "d2kd needs Detectron2, which is not on PyPI: run `python tools/install_detectron2.py` "
        "in a checkout of d2kd, or install an official build (https://detectron2.readthedocs.io)",
        name="detectron2",
    )

# What torch says about Detectron2's and fvcore's own code: nobody who uses d2kd can act on it.
warnings.filterwarnings("ignore", "`torch.jit.script", category=FutureWarning)
warnings.filterwarnings("ignore", "`torch.jit.script", category=DeprecationWarning)
warnings.filterwarnings("ignore", "torch.meshgrid: in an upcoming release", category=UserWarning)
warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", category=FutureWarning)
