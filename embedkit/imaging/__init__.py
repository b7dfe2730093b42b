"""A file becomes the pixels the network sees. Torch-free."""

from embedkit.imaging.decode import Limits, decode, read_pixels
from embedkit.imaging.files import IMAGE_SUFFIXES, find_images, hash_file
from embedkit.imaging.preprocess import Pixels, Preprocess

__all__ = [
    "IMAGE_SUFFIXES",
    "Limits",
    "Pixels",
    "Preprocess",
    "decode",
    "find_images",
    "hash_file",
    "read_pixels",
]
