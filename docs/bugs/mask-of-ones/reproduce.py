"""transformers 5: an encoder that is traced attends with a mask that masks nothing."""

import warnings

import torch
import transformers
from transformers import AttentionInterface, ViTConfig, ViTModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

warnings.simplefilter("ignore")
transformers.utils.logging.set_verbosity_error()
ATTENTION = torch.nn.functional.scaled_dot_product_attention


def unmasked(module, query, key, value, attention_mask, **settings):
    return sdpa_attention_forward(module, query, key, value, None, **settings)


def look(module: torch.fx.GraphModule, inputs):
    """A backend of torch.compile that prints what attention is given."""
    for node in module.graph.nodes:
        if node.target is ATTENTION:
            mask = node.kwargs["attn_mask"]
            print("traced:", None if mask is None else tuple(mask.meta["example_value"].shape))
    return module.forward


AttentionInterface.register("unmasked", unmasked)
sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 64}
model = ViTModel(ViTConfig(image_size=64, **sizes), add_pooling_layer=False).eval()
pixels = torch.zeros(1, 3, 64, 64)
print("torch", torch.__version__, "transformers", transformers.__version__)
with torch.inference_mode():
    for name in ("sdpa", "unmasked"):
        model.set_attn_implementation(name)
        torch.compiler.reset()
        torch.compile(model, backend=look)(pixels)
