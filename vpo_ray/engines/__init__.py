"""Engines: each knows its model, and neither Ray nor stages."""

import logging

# diffusers and transformers import torchao where it is installed, and on a machine without a GPU it
# warns of each kernel that it cannot load, and torch of how it registers its types.
for _name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
    logging.getLogger(_name).setLevel(logging.ERROR)
