"""The gallery of a report: test images with the three best leaves of each.

Shapes: C outputs of the subject.
"""

import base64
import io
import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from concentration.data.decoding import open_image
from concentration.data.order import permutation
from concentration.data.views import CentreView, decode_view
from concentration.stages.subject import Subject

#: Pixels of a picture's side, at most.
GALLERY_PIXELS = 96


def build_gallery(subject: Subject, num_pictures: int) -> list[dict]:
    """Samples drawn evenly over the verticals, with the three best leaves of each."""
    taxonomy, split = subject.taxonomy, subject.split
    queues = [split.routed(vertical) for vertical in taxonomy.verticals]
    queues = [ordinals[permutation(len(ordinals), number)] for number, ordinals in enumerate(queues)]
    turns = range(max((len(queue) for queue in queues), default=0))
    drawn = list(dict.fromkeys(int(queue[turn]) for turn in turns for queue in queues if turn < len(queue)))
    readers = subject.build_readers()
    entries = []
    for ordinal in drawn[:num_pictures]:
        read = {size: reader.read(np.array([ordinal]), epoch=0) for size, reader in readers.items()}
        if not any(samples.skipped_B[0] for samples in read.values()):
            scores_C = subject.score({size: samples.images for size, samples in read.items()})[0].cpu()
            encoded = next(iter(readers.values())).read_encoded(ordinal)
            entries.append(_describe_sample(subject, ordinal, scores_C, encoded))
    return entries


def _describe_sample(subject: Subject, ordinal: int, scores_C: Tensor, encoded: bytes) -> dict:
    taxonomy, labels = subject.taxonomy, subject.labels(ordinal)
    leaf_scores_C = scores_C.masked_fill(~torch.from_numpy(taxonomy.is_leaf), -math.inf)
    best = [int(output) for output in leaf_scores_C.topk(min(3, int(taxonomy.is_leaf.sum()))).indices]
    return {
        "key": subject.split.key(ordinal),
        "image": _to_data_uri(encoded),
        "labels": [taxonomy.class_of_output(output).name for output in labels],
        "vertical": taxonomy.class_of_output(labels[0]).vertical,
        "top3": [
            {
                "name": taxonomy.class_of_output(output).name,
                "vertical": taxonomy.class_of_output(output).vertical,
                "probability": round(float(scores_C[output].sigmoid()), 4),
                "lineage": list(taxonomy.lineage(output)),
                "correct": output in labels,
            }
            for output in best
        ],
    }


def _to_data_uri(encoded: bytes) -> str:
    size = min(GALLERY_PIXELS, max(open_image(encoded).size))
    pixels = decode_view(encoded, CentreView(), 0, size)[0]
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
