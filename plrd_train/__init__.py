"""Families of smaller language models from one parent by progressive low-rank decomposition (PLRD, arXiv 2406.19995).

Importing this package lets `AutoConfig` and `AutoModelForCausalLM` of transformers load the members of such a family.
"""

import plrd_train.runtime.orphans  # noqa: F401  # before the imports that take long

# isort: split

from transformers import AutoConfig

from plrd_train.parents.modeling_plrd import MODEL_TYPE, PlrdConfig

AutoConfig.register(MODEL_TYPE, PlrdConfig, exist_ok=True)
