"""What baselines that look at one layer of each model need: which layers these are, and rows of attention other than VAT's."""

import torch
from torch import nn

from cdistill.data.samples import IGNORE_INDEX
from cdistill.train.step import ALL_ROWS, Step
from cdistill.vat import PackedRegions, Regions, packed_regions, token_regions
from cdistill.vat.recorders import AnyRegions


class ChosenLayers(nn.Module):
    """A layer of the student and one of the teacher, 0-based indices, -1 for none; a module, because in those terms keep what
    depends on models."""

    def __init__(self, student: int = -1, teacher: int = -1) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher


def all_tokens(step: Step) -> AnyRegions:
    """Every real token of every sample that counts, as rows and as columns; of what is packed, those with a label."""
    ids = step.batch["input_ids"]
    if step.is_packed:
        packed = packed_regions(ids, step.labels, step.batch["position_ids"], **ALL_ROWS)
        lengths = torch.tensor([sample.stop - sample.start for sample in packed.samples], device=ids.device)
        positions = torch.arange(max(s.stop - s.start for s in packed.samples), device=ids.device)
        real = (positions < lengths[:, None]) & step.have_labels(packed.samples)[:, None]
        rows = torch.where(real, positions, -1).int()
        return PackedRegions(rows, rows, packed.samples, packed.sequence)
    real = torch.ones_like(ids, dtype=torch.bool)
    if "attention_mask" in step.batch:
        real = step.batch["attention_mask"] != 0
    if step.counted is not None:
        real = real & step.counted[:, None]
    rows = torch.where(real, torch.arange(ids.shape[1], device=ids.device), -1).int()
    return Regions(rows, rows)


def instruction_to_vision(step: Step) -> AnyRegions:
    """Rows: text after the first visual token that is not labelled, the instructions; columns: the visual tokens."""
    ids, rows = step.batch["input_ids"], {"rows": "text", "visual_token_ids": step.visual_ids}
    if step.is_packed:
        found: AnyRegions = packed_regions(ids, step.labels, step.batch["position_ids"], **rows)  # type: ignore[arg-type]
        assert isinstance(found, PackedRegions)
        starts = [sample.row * ids.shape[1] + sample.start for sample in found.samples]
        first = torch.tensor(starts, device=ids.device)
    else:
        found = token_regions(ids, None, step.batch.get("attention_mask"), **rows)  # type: ignore[arg-type]
        first = torch.arange(len(ids), device=ids.device) * ids.shape[1]
    labelled = step.labels.flatten()[found.rows.clamp(min=0) + first[:, None]] != IGNORE_INDEX
    return found._replace(rows=found.rows.masked_fill(labelled, -1))
