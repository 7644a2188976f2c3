"""Visual attention alignment (VAT) on transformers models: layer matching, token regions, recorders and the hook.

Importing this package imports torch; transformers is imported when the hook is installed.
"""

from cdistill.vat.config import VAT, VATConfig
from cdistill.vat.distances import HeadDistances, LayerDistances, layer_distances
from cdistill.vat.families import attention_layers, check_heads, check_packable, packed_position_ids, visual_token_ids
from cdistill.vat.generation import GenerationRecorder
from cdistill.vat.heads import HeadCounts, HeadMixture, head_counts
from cdistill.vat.hook import install, installed, uninstall
from cdistill.vat.matching import LayerMatch, layer_range, match_layers
from cdistill.vat.recorders import Recorder, SliceRecorder, StudentAlignment, TeacherLayers, TeacherTargets
from cdistill.vat.regions import (
    PackedRegions,
    PackedSample,
    Regions,
    check_same_visual_tokens,
    grounded_regions,
    packed_regions,
    token_regions,
)
from cdistill.vat.relations import StudentRelations, TeacherRelations
from cdistill.vat.resample import Resampling, resampling
from cdistill.vat.ulysses import SequenceShards

__all__ = [
    "VAT",
    "GenerationRecorder",
    "HeadCounts",
    "HeadDistances",
    "HeadMixture",
    "LayerDistances",
    "LayerMatch",
    "PackedRegions",
    "PackedSample",
    "Recorder",
    "Regions",
    "Resampling",
    "SequenceShards",
    "SliceRecorder",
    "StudentAlignment",
    "StudentRelations",
    "TeacherLayers",
    "TeacherRelations",
    "TeacherTargets",
    "VATConfig",
    "attention_layers",
    "check_heads",
    "check_packable",
    "check_same_visual_tokens",
    "grounded_regions",
    "head_counts",
    "install",
    "installed",
    "layer_distances",
    "layer_range",
    "match_layers",
    "packed_position_ids",
    "packed_regions",
    "resampling",
    "token_regions",
    "uninstall",
    "visual_token_ids",
]
