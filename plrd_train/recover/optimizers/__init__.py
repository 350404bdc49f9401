"""How gradients change parameters. One file an optimizer, named as `optimizer=NAME`, which defines a frozen dataclass
`Optimizer` that keeps the protocol `plrd_train.engine.Optimizer`; its fields are the optimizer's own settings. Adding a
file (and its YAML in conf/optimizer/) adds the optimizer."""

from plrd_train.registry import Registry

OPTIMIZERS = Registry("optimizer", "recover.optimizers", settings="Optimizer")
