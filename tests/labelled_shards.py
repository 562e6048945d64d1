"""A few shards of labelled samples, and how the tests of readers and loaders read them."""

import json

from concentration.data.reader import SampleReader
from concentration.data.sample_targets import LabelTargets
from concentration.data.split import Split
from concentration.data.views import ViewConfig

#: By shard and sample: class ids of `conftest.CLASSES`. Some samples have labels in two verticals, and shards differ in length.
LABELS = [
    [["gull"], ["taxi", "osprey"], ["bird"], ["soup"], ["tram"]],
    [["egg", "gull"], ["soup"], ["ramen"], ["car"], ["gull"], ["taxi"], ["raptor"]],
    [["tram"], ["osprey"], ["ramen", "tram"], ["seabird"]],
]
NUM_SAMPLES = sum(map(len, LABELS))
SIZE = 12
VIEW = ViewConfig(crop_area=0.5, crop_aspect=1.5, flip=0.5, brightness=0.3)
SEED = 4


def build_reader(split: Split, views: ViewConfig | None = VIEW) -> SampleReader:
    """Smeared labels, and images of SIZE x SIZE pixels in random views; None gives the centre view."""
    return SampleReader(split, LabelTargets(split, smear=True), SIZE, views, SEED)


def encode_labels(*class_ids: str) -> bytes:
    """The content of a sample's .json member."""
    return json.dumps({"labels": class_ids}).encode()
