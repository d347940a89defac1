"""d2kd: knowledge distillation for Detectron2's detectors."""

import importlib.util
import sys
import warnings

__version__ = "0.1.0"


class _NeedsDetectron2:
    """Refuses to import a module of d2kd without Detectron2, but for the commands: one of them installs it."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        package, _, module = name.partition(".")
        first = module.split(".")[0]
        if package != "d2kd" or first in ("__main__", "tools"):
            return
        if module in ("utils", "utils.errors"):
            return
        if importlib.util.find_spec("detectron2") is None:  # it may be installed by now
            raise ModuleNotFoundError(
                "d2kd needs Detectron2, which is not on PyPI: run `d2kd install-detectron2`, "
                "or install an official build (https://detectron2.readthedocs.io)",
                name="detectron2",
            )


# Looked for, not imported: an error inside Detectron2 keeps its own message, and `--help` stays quick.
if importlib.util.find_spec("detectron2") is None:
    sys.meta_path.insert(0, _NeedsDetectron2)

# What torch says about Detectron2's and fvcore's own code: nobody who uses d2kd can act on it.
warnings.filterwarnings("ignore", "`torch.jit.script", category=FutureWarning)
warnings.filterwarnings("ignore", "`torch.jit.script", category=DeprecationWarning)
warnings.filterwarnings("ignore", "torch.meshgrid: in an upcoming release", category=UserWarning)
warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", category=FutureWarning)
