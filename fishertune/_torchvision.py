"""Makes ``import timm`` work beside a CPU build of torch.

timm imports torchvision, whose PyPI wheel is built for CUDA. Without CUDA its native library does not load, and the
import then stops where it registers shape functions for two operators nobody declared. Declaring their schemas first
lets the import pass; nothing in this project calls them. Import this module before timm.
"""

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def _declare() -> torch.library.Library | None:
    if torch.version.cuda is not None or torch.version.hip is not None:
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)
    return library


_LIBRARY = _declare()  # the registration lives as long as this object
