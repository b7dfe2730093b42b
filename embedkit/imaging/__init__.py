"""A file becomes the pixels the network sees. Torch-free."""

from embedkit.imaging.decode import Limits, decode, read_pixels
from embedkit.imaging.files import IMAGE_SUFFIXES, find_images, hash_file
from embedkit.imaging.preprocess import Pixels, Preprocess
from embedkit.imaging.shard import Shard

__all__ = [
    "IMAGE_SUFFIXES",
    "Limits",
    "Pixels",
    "Preprocess",
    "Shard",
    "decode",
    "find_images",
    "hash_file",
    "read_pixels",
]
