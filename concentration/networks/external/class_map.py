"""Maps the outputs of an external model to the classes of a vertical, and computes the logits of these classes.

Shapes: B batch, O outputs of the model, V classes of the vertical, P pairs of an output and a class that it counts towards.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from concentration.errors import ConfigError, DataError
from concentration.objectives.softmax_cross_entropy import LARGEST_LOGIT, compute_log_odds
from concentration.schema import parse_json, suggest
from concentration.taxonomy import Taxonomy

#: The value of `external.classes` that stands for no file: output n is class n of the vertical.
IDENTITY = "identity"

#: What the model's outputs are. If several outputs count towards one class, its probability is their sum if they are of a
#: softmax, which makes them exclusive, and the largest of them if they are of independent sigmoids.
OutputKind = Literal["softmax_logits", "softmax_probabilities", "sigmoid_logits", "sigmoid_probabilities"]

#: By how much a probability may lie outside of [0, 1], or the sum of a softmax differ from 1, through rounding.
TOLERANCE = 1e-2


@dataclass(frozen=True)
class ClassMap:
    """Which outputs count towards which class.

    Attributes:
        output_P, class_P: int64, the pairs of an output and a class; classes are numbered inside the vertical.
        num_classes: V.
    """

    output_P: Tensor
    class_P: Tensor
    num_classes: int

    @classmethod
    def build(cls, class_ids: Sequence[str | None], taxonomy: Taxonomy, smear: bool) -> "ClassMap":
        """The map from the class of each output.

        Args:
            class_ids: (O,) the class id of every output; None if the output is ignored.
            taxonomy: the taxonomy of this vertical only.
            smear: whether an inner class without an output of its own gets the outputs of all its descendants.
        """
        own: dict[int, list[int]] = {}
        for output, class_id in enumerate(class_ids):
            if class_id is not None:
                own.setdefault(taxonomy.output(class_id), []).append(output)
        inherited: dict[int, list[int]] = {}
        if smear:
            for number, outputs in own.items():
                for ancestor in taxonomy.ancestors[number]:
                    if ancestor not in own:
                        inherited.setdefault(ancestor, []).extend(outputs)
        pairs = sorted((number, output) for number, outputs in (own | inherited).items() for output in outputs)
        class_P, output_P = torch.tensor(pairs, dtype=torch.int64).T
        return cls(output_P, class_P, taxonomy.num_classes)

    @classmethod
    def identity(cls, num_classes: int) -> "ClassMap":
        """The map in which output n is class n."""
        return cls(torch.arange(num_classes), torch.arange(num_classes), num_classes)

    def find_missing(self) -> list[int]:
        """The classes that no output counts towards; their probability is 0."""
        return sorted(set(range(self.num_classes)) - set(self.class_P.tolist()))

    def to(self, device: torch.device) -> "ClassMap":
        """A copy on another device."""
        return ClassMap(self.output_P.to(device), self.class_P.to(device), self.num_classes)

    def compute_logits(self, outputs_BO: Tensor, kind: OutputKind) -> Tensor:
        """The logits of the classes' probabilities, (B, V) float32, cut to at most LARGEST_LOGIT in size.

        They are computed in float64 from the logarithms of probabilities. In float32, near-certain probabilities would all round
        to 1, and lose their order.

        Args:
            outputs_BO: the model's outputs.
            kind: what these outputs are.
        """
        outputs_BO = outputs_BO.double()
        if kind == "sigmoid_logits":
            logit_BV = self._take_largest(outputs_BO)
        elif kind == "sigmoid_probabilities":
            logit_BV = self._take_largest(outputs_BO.clamp(0, 1).logit())
        else:
            is_logits = kind == "softmax_logits"
            log_BO = outputs_BO.log_softmax(1) if is_logits else outputs_BO.clamp(0, 1).log()
            logit_BV = compute_log_odds(self._add_up(log_BO))
        return logit_BV.clamp(-LARGEST_LOGIT, LARGEST_LOGIT).float()

    def _take_largest(self, value_BO: Tensor) -> Tensor:
        """(B, V): the largest value among the outputs of each class; -inf for a class without outputs."""
        value_BP = value_BO[:, self.output_P]
        largest_BV = value_BP.new_full((len(value_BP), self.num_classes), -torch.inf)
        return largest_BV.scatter_reduce(1, self.class_P.expand_as(value_BP), value_BP, "amax")

    def _add_up(self, log_BO: Tensor) -> Tensor:
        """(B, V): the logarithm of the sum of the probabilities of each class's outputs, given their logarithms (B, O)."""
        # As in logsumexp, the largest term is taken out, so that sums do not underflow. The bound avoids -inf minus -inf.
        largest_BV = self._take_largest(log_BO).clamp(min=-1e300)
        share_BP = torch.exp(log_BO[:, self.output_P] - largest_BV[:, self.class_P])
        sum_BV = torch.zeros_like(largest_BV).scatter_add(1, self.class_P.expand_as(share_BP), share_BP)
        return largest_BV + torch.log(sum_BV)


def check_outputs(outputs_BO: Tensor, kind: OutputKind, where: str) -> None:
    """Checks the outputs of a model.

    Args:
        where: what errors call the model.

    Raises:
        DataError: an output is NaN or infinite, all of a softmax are -infinite, or `kind` says probabilities and the outputs are
            none.
    """
    is_nothing_B = (outputs_BO == -torch.inf).all(1) & (kind == "softmax_logits")
    if torch.isnan(outputs_BO).any() or (outputs_BO == torch.inf).any() or is_nothing_B.any():
        raise DataError(f"{where}: gives NaN or infinity for an image; look into the model, or give another one")
    if not kind.endswith("_probabilities"):
        return
    low, high = outputs_BO.min().item(), outputs_BO.max().item()
    if low < -TOLERANCE or high > 1 + TOLERANCE:
        raise DataError(
            f"{where}: its outputs lie between {low:.4g} and {high:.4g}, so they are no probabilities; "
            f"give external.output={kind.replace('_probabilities', '_logits')}"
        )
    if kind == "softmax_probabilities" and not _sum_to_1(outputs_BO, TOLERANCE):
        raise DataError(
            f"{where}: its outputs do not add up to 1, so they are of no softmax; give external.output=sigmoid_probabilities"
        )


def check_softmax_is_left(outputs_BO: Tensor, kind: OutputKind, where: str) -> None:
    """Checks that the model does not apply the softmax itself if `kind` says that its outputs are logits.

    Args:
        outputs_BO: the outputs for several different images: logits do not sum to 1 for all of them by chance.

    Raises:
        DataError: no output is negative, and those of each image sum to 1.
    """
    if kind == "softmax_logits" and bool((outputs_BO >= 0).all()) and _sum_to_1(outputs_BO, 1e-4):
        raise DataError(
            f"{where}: its outputs add up to 1, so the softmax is in the model; give external.output=softmax_probabilities"
        )


def _sum_to_1(outputs_BO: Tensor, tolerance: float) -> bool:
    return bool(((outputs_BO.double().sum(1) - 1).abs() < tolerance).all())


def load_class_ids(
    classes: str, num_outputs: int, names: Sequence[str], taxonomy: Taxonomy, vertical: str
) -> tuple[str | None, ...]:
    """The class id of every output, (O,); None for an output that the map leaves out.

    Args:
        classes: `identity`, or a JSON file: a list with a class id or null per output, or an object from the positions or names
            of outputs to class ids. Several outputs may have the same class.
        num_outputs: O.
        names: (O,) the names of the outputs; empty if they are not known.
        taxonomy: the whole taxonomy.
        vertical: the vertical that all classes must be in.

    Raises:
        ConfigError: the file cannot be read, or `identity` does not fit the number of outputs.
        DataError: the file has another form, names an output that the model lacks or a class outside the vertical, or no class.
    """
    restricted = taxonomy.restrict(vertical)
    if classes == IDENTITY:
        if num_outputs != restricted.num_classes:
            raise ConfigError(
                f"external.classes={IDENTITY}: the model has {num_outputs} outputs, the vertical '{vertical}' "
                f"{restricted.num_classes} classes; give a map: a JSON list with a class id or null per output"
            )
        return tuple(restricted.class_of_output(output).id for output in range(num_outputs))
    content = _load_json(Path(classes))
    if isinstance(content, list):
        if len(content) != num_outputs:
            raise DataError(
                f"{classes}: {len(content)} entries, but the model has {num_outputs} outputs; give one each"
            )
        class_ids = content
    elif isinstance(content, Mapping):
        key_of = _find_outputs(content, num_outputs, names, classes)
        class_ids = [content[key_of[output]] if output in key_of else None for output in range(num_outputs)]
    else:
        raise DataError(
            f"{classes}: found {type(content).__name__}, expected a list of class ids, or an object from outputs to class ids"
        )
    for output, class_id in enumerate(class_ids):
        if class_id is not None:
            _check_class(class_id, f"{classes}: output {output}", taxonomy, vertical)
    if not any(class_id is not None for class_id in class_ids):
        raise DataError(f"{classes}: names no class; name at least one of the vertical '{vertical}'")
    return tuple(class_ids)


def _load_json(path: Path) -> object:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"external.classes={path}: cannot be read ({error.strerror}); give a JSON file") from None
    return parse_json(content, str(path))


def _find_outputs(keys: Iterable[str], num_outputs: int, names: Sequence[str], where: str) -> dict[int, str]:
    """The key that stands for each output. Raises: DataError if two keys stand for the same one, or a key for none."""
    key_of: dict[int, str] = {}
    for key in keys:
        output = _find_output(key, num_outputs, names, where)
        if output in key_of:
            raise DataError(f"{where}: {key_of[output]!r} and {key!r} are both output {output}; leave one out")
        key_of[output] = key
    return key_of


def _find_output(key: str, num_outputs: int, names: Sequence[str], where: str) -> int:
    """The output that a key names, or whose position it is. Raises: DataError if there is none, or several have the name."""
    if names.count(key) == 1:
        return names.index(key)
    if names.count(key) > 1:
        raise DataError(f"{where}: {names.count(key)} outputs have the name {key!r}; give their positions")
    if key.isascii() and key.isdigit() and len(key) < 12 and int(key) < num_outputs:
        return int(key)
    known = "positions" if not names else "positions and names"
    raise DataError(
        f"{where}: no output {key[:40]!r}; expected {known} of the model's outputs, 0 to {num_outputs - 1}{suggest(key, names)}"
    )


def _check_class(class_id: object, where: str, taxonomy: Taxonomy, vertical: str) -> None:
    """Raises: DataError if this is not the id of a class of the vertical."""
    if not isinstance(class_id, str):
        raise DataError(f"{where} has {class_id!r}, expected a class id or null")
    if class_id not in taxonomy.position:
        ids = [c.id for c in taxonomy.classes if c.vertical == vertical]
        raise DataError(f"{where} has the class {class_id!r}, which is not in the taxonomy{suggest(class_id, ids)}")
    found = taxonomy.classes[taxonomy.position[class_id]].vertical
    if found != vertical:
        raise DataError(
            f"{where} has the class '{class_id}' of the vertical '{found}', expected one of '{vertical}'; set it to null"
        )
