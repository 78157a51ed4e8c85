"""Where samples come from: folders, tables, arrays and built-in sets, decoded, split and ready to train on."""

from convince.data.decode import FORMATS, LIMIT_PIXELS, Unreadable, decode
from convince.data.decoding import read_files
from convince.data.loading import load, load_like
from convince.data.pool import Data, Skipped
from convince.data.preprocess import Preprocess
from convince.data.store import MappedStore, MemoryStore, Store, StreamStore

__all__ = [
    "FORMATS",
    "LIMIT_PIXELS",
    "Data",
    "MappedStore",
    "MemoryStore",
    "Preprocess",
    "Skipped",
    "Store",
    "StreamStore",
    "Unreadable",
    "decode",
    "load",
    "load_like",
    "read_files",
]
