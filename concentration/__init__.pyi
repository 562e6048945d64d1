"""What `import concentration` offers, for type checkers and editors, which do not see what `__init__.py` imports at first use."""

from concentration.errors import ConfigError as ConfigError
from concentration.errors import DataError as DataError
from concentration.metrics.average_precision import average_precision as average_precision
from concentration.networks.pace import Pace as Pace
from concentration.networks.pace import PaceConfig as PaceConfig
from concentration.networks.student import NetworkConfig as NetworkConfig
from concentration.networks.student import Student as Student
from concentration.networks.student import load_student as load_student
from concentration.networks.top_layers import TopConfig as TopConfig
from concentration.networks.top_layers import TopLayers as TopLayers
from concentration.objectives.fused_block import HeadParameters as HeadParameters
from concentration.objectives.fused_head import fused_loss_by_vertical as fused_loss_by_vertical
from concentration.objectives.sigmoid_cross_entropy import sigmoid_cross_entropy as sigmoid_cross_entropy
from concentration.targets import SoftTargets as SoftTargets
from concentration.taxonomy import Taxonomy as Taxonomy
from concentration.taxonomy import TaxonomyClass as TaxonomyClass

__version__: str
