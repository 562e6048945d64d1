"""A classifier on an inner map of the base network: its loss helps the layers below to train, and it is never served.

Shapes: B batch, C channels, H height and width of the map, V classes of one vertical.

Source: Szegedy et al., arXiv 1409.4842, section 5.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from concentration.networks.bases.base_network import Tap
from concentration.objectives.fused_block import HeadParameters

NUM_FILTERS = 128
NUM_HIDDEN = 1024


class AuxiliaryClassifier(nn.Module):
    """From a tapped map (B, C, H, H) to what its classifiers see, (B, 1024).

    5x5 average pooling of stride 3, a 1x1 convolution of 128 filters, a fully connected layer of 1024 units, dropout; then a
    linear classifier for each vertical, which predicts the same classes as the network does.
    """

    def __init__(self, tap: Tap, vertical_sizes: Sequence[int]):
        super().__init__()
        self.loss_weight = tap.loss_weight
        num_cells = ((tap.size - 5) // 3 + 1) ** 2
        self.pool = nn.AvgPool2d(kernel_size=5, stride=3)
        self.reduce = nn.Conv2d(tap.channels, NUM_FILTERS, kernel_size=1)
        self.connect = nn.Linear(NUM_FILTERS * num_cells, NUM_HIDDEN)
        self.dropout = nn.Dropout(tap.dropout)
        self.classifiers = nn.ModuleList(nn.Linear(NUM_HIDDEN, size) for size in vertical_sizes)
        for layer in (self.reduce, self.connect):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        for classify in self.classifiers:
            nn.init.xavier_normal_(classify.weight)
            nn.init.zeros_(classify.bias)

    def forward(self, maps: Tensor) -> Tensor:
        reduced = torch.relu(self.reduce(self.pool(maps)))
        return self.dropout(torch.relu(self.connect(reduced.flatten(1))))

    def classify(self, hidden_BS: Tensor) -> list[Tensor]:
        """Logits per vertical, (B, V)."""
        return [classify(hidden_BS) for classify in self.classifiers]

    def head_parameters(self) -> list[HeadParameters]:
        """The classifier of every vertical; its logits are not paced."""
        return [HeadParameters(classify.weight, classify.bias) for classify in self.classifiers]

    def set_prior(self, logit_C: Tensor) -> None:
        """Starts the output biases at given logits (C,), in the order of the output index."""
        sizes = [classify.out_features for classify in self.classifiers]
        with torch.no_grad():
            for classify, logit_V in zip(self.classifiers, logit_C.split(sizes), strict=True):
                classify.bias.copy_(logit_V)
