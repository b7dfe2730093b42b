"""From labelled photos to training batches: readers, splits, sampler, augmentation, loader."""

from embedkit.data.augment import Augment
from embedkit.data.doctor import Checkup, check_photos
from embedkit.data.doctor_facts import FactCache, gather_facts
from embedkit.data.generated import draw_products
from embedkit.data.loader import PhotoLoader
from embedkit.data.readers import PhotoSet, Triplet, read_photos, resolve_source
from embedkit.data.sampler import PKSampler
from embedkit.data.split import hold_out_classes, hold_out_groups

__all__ = [
    "Augment",
    "Checkup",
    "FactCache",
    "PKSampler",
    "PhotoLoader",
    "PhotoSet",
    "Triplet",
    "check_photos",
    "draw_products",
    "gather_facts",
    "hold_out_classes",
    "hold_out_groups",
    "read_photos",
    "resolve_source",
]
