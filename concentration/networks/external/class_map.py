"""Which classes of a vertical the outputs of an external model stand for, and the logits of those classes.

Shapes: B batch, O outputs of the model, V classes of the vertical, P pairs of an output and a class that it counts for.
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

#: The value of `external.classes` that needs no file: output n is class n of the vertical.
IDENTITY = "identity"

#: What the model's outputs are. Of a softmax the outputs are exclusive, so those of one class are added; sigmoids are
#: independent, so the largest counts.
OutputKind = Literal["softmax_logits", "softmax_probabilities", "sigmoid_logits", "sigmoid_probabilities"]

#: How far rounding may take a probability, or the sum of a softmax's, out of its range.
TOLERANCE = 1e-2


@dataclass(frozen=True)
class ClassMap:
    """The outputs that count for each class.

    Attributes:
        output_P, class_P: int64, the pairs; the classes are counted inside the vertical.
        num_classes: V.
    """

    output_P: Tensor
    class_P: Tensor
    num_classes: int

    @classmethod
    def build(cls, class_ids: Sequence[str | None], taxonomy: Taxonomy, smear: bool) -> "ClassMap":
        """The pairs of a vertical.

        Args:
            class_ids: (O,) the class of every output; None where the output is ignored.
            taxonomy: of the vertical alone.
            smear: an inner class without an output of its own gets those of all its descendants, each once.
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
        """Output n is class n."""
        return cls(torch.arange(num_classes), torch.arange(num_classes), num_classes)

    def find_missing(self) -> list[int]:
        """The classes that no output counts for: their probability is 0."""
        return sorted(set(range(self.num_classes)) - set(self.class_P.tolist()))

    def to(self, device: torch.device) -> "ClassMap":
        return ClassMap(self.output_P.to(device), self.class_P.to(device), self.num_classes)

    def compute_logits(self, outputs_BO: Tensor, kind: OutputKind) -> Tensor:
        """Logits (B, V) float32, at most LARGEST_LOGIT from 0, of the classes' probabilities.

        Computed in float64 from the logarithms of probabilities: a probability that float32 rounds to 1 has lost how certain
        it is, and with it its rank.
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
        """(B, V) the largest value of each class's outputs, -inf where it has none."""
        value_BP = value_BO[:, self.output_P]
        largest_BV = value_BP.new_full((len(value_BP), self.num_classes), -torch.inf)
        return largest_BV.scatter_reduce(1, self.class_P.expand_as(value_BP), value_BP, "amax")

    def _add_up(self, log_BO: Tensor) -> Tensor:
        """(B, V) the logarithm of the sum of each class's probabilities."""
        # Sums of e^(x - largest) do not vanish; the lower bound keeps -inf minus -inf away.
        largest_BV = self._take_largest(log_BO).clamp(min=-1e300)
        share_BP = torch.exp(log_BO[:, self.output_P] - largest_BV[:, self.class_P])
        sum_BV = torch.zeros_like(largest_BV).scatter_add(1, self.class_P.expand_as(share_BP), share_BP)
        return largest_BV + torch.log(sum_BV)


def check_outputs(outputs_BO: Tensor, kind: OutputKind, where: str) -> None:
    """Raises: DataError where the outputs are no numbers, or not the probabilities that `kind` says."""
    if torch.isnan(outputs_BO).any() or (outputs_BO == torch.inf).any():
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
    """Raises: DataError where what should be logits of a softmax are its probabilities, for all of several unlike images."""
    if kind == "softmax_logits" and bool((outputs_BO >= 0).all()) and _sum_to_1(outputs_BO, 1e-4):
        raise DataError(
            f"{where}: its outputs add up to 1, so the softmax is in the model; give external.output=softmax_probabilities"
        )


def _sum_to_1(outputs_BO: Tensor, tolerance: float) -> bool:
    return bool(((outputs_BO.double().sum(1) - 1).abs() < tolerance).all())


def load_class_ids(
    classes: str, num_outputs: int, names: Sequence[str], taxonomy: Taxonomy, vertical: str
) -> tuple[str | None, ...]:
    """The class id of every output (O,), None where the map has none for it.

    Args:
        classes: `identity`, or a JSON file: a list with a class id or null per output, or an object from output positions or
            names to class ids. Several outputs may have one class.
        names: of the outputs, where they are known.
        taxonomy: the whole.

    Raises:
        ConfigError: there is no such file.
        DataError: it is no such JSON, an output is none of the model's, a class is not in the vertical, or none is named.
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
    """By output, the key that stands for it."""
    key_of: dict[int, str] = {}
    for key in keys:
        output = _find_output(key, num_outputs, names, where)
        if output in key_of:
            raise DataError(f"{where}: {key_of[output]!r} and {key!r} are both output {output}; leave one out")
        key_of[output] = key
    return key_of


def _find_output(key: str, num_outputs: int, names: Sequence[str], where: str) -> int:
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
