"""What a stage minimises. One file an objective, named as `objective=NAME`; adding a file (and its YAML in
conf/objective/) adds the objective."""

from typing import Protocol

from torch import Tensor, nn

from plrd_train.registry import Registry


class Objective(Protocol):
    """What each file here defines, as a frozen dataclass named `Objective` whose fields are its own settings."""

    def __call__(self, model: nn.Module, input_ids: Tensor) -> Tensor:
        """The loss of a batch of packed sequences `input_ids` (n, seq_len), summed over its n * (seq_len - 1) predicted
        tokens; a float32 scalar."""
        ...


OBJECTIVES = Registry("objective", "recover.objectives", settings="Objective")
