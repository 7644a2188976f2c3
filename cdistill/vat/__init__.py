"""Visual attention alignment (VAT) on transformers models: layer matching, token regions, recorders and the hook.

Importing this package imports torch; transformers is imported when the hook is installed.
"""

from cdistill.vat.config import VAT, VATConfig
from cdistill.vat.distances import LayerDistances, layer_distances
from cdistill.vat.hook import install, installed, uninstall
from cdistill.vat.matching import LayerMatch, layer_range, match_layers
from cdistill.vat.recorders import Recorder, SliceRecorder, StudentAlignment, TeacherTargets
from cdistill.vat.regions import Regions, check_same_visual_tokens, grounded_regions, token_regions

__all__ = [
    "VAT",
    "LayerDistances",
    "LayerMatch",
    "Recorder",
    "Regions",
    "SliceRecorder",
    "StudentAlignment",
    "TeacherTargets",
    "VATConfig",
    "check_same_visual_tokens",
    "grounded_regions",
    "install",
    "installed",
    "layer_distances",
    "layer_range",
    "match_layers",
    "token_regions",
    "uninstall",
]
