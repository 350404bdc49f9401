"""What a stage minimises. One file an objective, named as `objective=NAME`; adding a file (and its YAML in
conf/objective/) adds the objective."""

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor, nn

from plrd_train.registry import Registry

# terms(model, input_ids) -> {name: float32 scalar} of a batch of packed sequences `input_ids` (n, seq_len). Each term
# is summed over the n * (seq_len - 1) predicted tokens, with its weight; their sum is minimised. Every batch has the
# same terms. If there is more than one, each is logged as `train/loss/NAME`.
Terms = Callable[[nn.Module, Tensor], Mapping[str, Tensor]]


class Objective(Protocol):
    """What each file here defines, as a frozen dataclass named `Objective` whose fields are its own settings."""

    def open(self, teacher: Callable[[], nn.Module]) -> Terms:
        """Begin to compute the loss of a stage. A collective.

        `teacher()`, a collective, loads the parent on an engine of its own of the run's kind: sharded over the ranks,
        frozen, in evaluation mode. An objective that calls it computes with it under `torch.no_grad()`.
        """
        ...


OBJECTIVES = Registry("objective", "recover.objectives", settings="Objective")
