"""From labelled photos to training batches: readers, splits, sampler, augmentation, loader."""

from embedkit.data.augment import Augment
from embedkit.data.class_batches import HardClassSampler, VariedPKSampler
from embedkit.data.doctor import Checkup, check_photos
from embedkit.data.doctor_facts import FactCache, gather_facts
from embedkit.data.generated import draw_products
from embedkit.data.inject import inject_noise, write_noisy
from embedkit.data.loader import PhotoLoader
from embedkit.data.readers import PhotoSet, Triplet, read_photos, resolve_source
from embedkit.data.sampler import PKSampler
from embedkit.data.split import hold_out_classes, hold_out_groups

__all__ = [
    "Augment",
    "Checkup",
    "FactCache",
    "HardClassSampler",
    "PKSampler",
    "PhotoLoader",
    "PhotoSet",
    "Triplet",
    "VariedPKSampler",
    "check_photos",
    "draw_products",
    "gather_facts",
    "hold_out_classes",
    "hold_out_groups",
    "inject_noise",
    "read_photos",
    "resolve_source",
    "write_noisy",
]
